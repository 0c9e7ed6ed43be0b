"""
From scores to weights that sum to one: softmax, and two relatives of it that give true zeros.

sparsemax (Martins & Astudillo 2016) and 1.5-entmax (Peters, Niculae & Martins 2019) are softmax's neighbours among the
alpha-entmax functions: alpha = 1, 1.5, 2 for softmax, entmax15, sparsemax. Both subtract a threshold tau from the
scores and cut off what is below it; tau is exact, from the sorted scores.

Shapes: S entries of one distribution, K sorted entries; any number of dimensions before them.
"""

import math
from collections.abc import Callable

import torch
from torch.autograd.function import BackwardCFunction, FunctionCtx

# e^x = 2^(x log2 e). torch takes e^x from Intel's library where it has that, 2^x from its own: on Zen 4 in a third of
# the time, as exactly.
LOG2_E = math.log2(math.e)
# Distributions up to this size, such as attention's, are sorted whole; of larger ones first only the largest entries.
SORTED_WHOLE = 1024
SORTED_FIRST = 128


def _sparsemax_threshold(z: torch.Tensor) -> torch.Tensor:
    """
    Martins & Astudillo 2016, alg. 1: k = max{j: 1 + j z_(j) > sum_{i<=j} z_(i)}, tau = (sum_{i<=k} z_(i) - 1) / k.

    z [..., K] in descending order -> tau [..., 1].
    """
    rank = torch.arange(1, z.size(-1) + 1, device=z.device, dtype=z.dtype)
    sums = z.cumsum(-1)
    support = (1 + rank * z > sums).sum(-1, keepdim=True).clamp(min=1)  # no score at all is above a NaN
    return (sums.gather(-1, support - 1) - 1) / support


def _entmax15_threshold(z: torch.Tensor) -> torch.Tensor:
    """
    Peters et al. 2019, alg. 2: tau_j = M_j - sqrt((1 - s_j) / j), with M_j the mean of z_(1..j) and s_j the sum of
    their squared distances from it; tau = tau_k for the last k with tau_k <= z_(k).

    z [..., K], half the scores, in descending order -> tau [..., 1].
    """
    rank = torch.arange(1, z.size(-1) + 1, device=z.device, dtype=z.dtype)
    mean = z.cumsum(-1) / rank
    variance = (z * z).cumsum(-1) / rank - mean * mean
    tau = mean - (1 / rank - variance).clamp(min=0).sqrt()
    support = (tau <= z).sum(-1, keepdim=True).clamp(min=1)  # no score at all is above a NaN
    tau = tau.gather(-1, support - 1)
    # The variance of many almost equal scores is lost in rounding: one Newton step on sum_i max(z_i - tau, 0)^2 = 1.
    roots = (z - tau).clamp(min=0)
    return tau + (roots.square().sum(-1, keepdim=True) - 1) / (2 * roots.sum(-1, keepdim=True))


def _threshold(z: torch.Tensor, solve: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """
    `solve` for unordered z [..., S].

    Sorting a whole vocabulary would cost more than the output layer. The largest entries alone give a threshold that
    is never too high, as every further entry can only raise it. Entries below it cannot matter, so that the few above
    it give the exact threshold. Their number has to be read back, which a compiled graph cannot do: it sorts all.
    """
    if z.size(-1) <= SORTED_WHOLE or z.numel() == 0 or torch.compiler.is_compiling():
        return solve(z.sort(-1, descending=True).values)
    lower_bound = solve(z.topk(SORTED_FIRST).values)
    above = int((z > lower_bound).sum(-1).max())
    return lower_bound if above <= SORTED_FIRST else solve(z.topk(above).values)


class _Sparsemax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scores: torch.Tensor) -> torch.Tensor:
        z = scores - scores.amax(-1, keepdim=True)  # changes no weight, and keeps sums of large scores exact
        weights = (z - _threshold(z, _sparsemax_threshold)).clamp(min=0)
        ctx.save_for_backward(weights)
        ctx.set_materialize_grads(False)  # the losses want none from here
        return weights

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor | None) -> torch.Tensor | None:
        """Martins & Astudillo 2016, section 2.5: on the support the gradient minus its mean there, zero elsewhere."""
        if grad is None:
            return None
        (weights,) = ctx.saved_tensors
        support = (weights > 0).to(grad.dtype)
        mean = (support * grad).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return support * (grad - mean)


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, scores: torch.Tensor) -> torch.Tensor:
        z = (scores - scores.amax(-1, keepdim=True)) / 2
        weights = (z - _threshold(z, _entmax15_threshold)).clamp(min=0).square()
        ctx.save_for_backward(weights)
        ctx.set_materialize_grads(False)  # the losses want none from here
        return weights

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor | None) -> torch.Tensor | None:
        """Peters et al. 2019, section 3: J = diag(s) - s s^T / sum(s), with s = p^(2 - alpha), here the root of p."""
        if grad is None:
            return None
        (weights,) = ctx.saved_tensors
        on = weights > 0
        s = torch.where(on, weights, 1).sqrt() * on  # a root's derivative is infinite at zero
        return s * (grad - (s * grad).sum(-1, keepdim=True) / s.sum(-1, keepdim=True))


def _normalize(
    function: Callable[[torch.Tensor], torch.Tensor], scores: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is None:
        return function(scores)
    # A row without entries gets zeros, not an average.
    return function(scores.masked_fill(~mask, torch.finfo(scores.dtype).min)) * mask


def softmax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    p_i = exp(z_i) / sum_j exp(z_j) (Bridle 1990)

    Args:
        scores: [..., S], any floating type.
        mask: [..., S] or broadcastable to it, true at the entries that may have weight; None for all.

    Returns:
        Weights [..., S] in float32, or float64 for such scores: exactly zero where `mask` is false, each row summing
        to one, or to zero if `mask` has nothing in it.
    """
    return _normalize(lambda z: torch.softmax(z, dim=-1), scores, mask)


def sparsemax(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    p_i = max(z_i - tau, 0), the distribution nearest to z (Martins & Astudillo 2016, section 2).

    Arguments and result as of `softmax`. Entries more than 1 below the largest are zero.
    """
    return _normalize(_Sparsemax.apply, scores, mask)


def entmax15(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    p_i = max(z_i / 2 - tau, 0)^2 (Peters, Niculae & Martins 2019, section 3, alpha = 1.5).

    Arguments and result as of `softmax`. Entries more than 2 below the largest are zero.
    """
    return _normalize(_Entmax15.apply, scores, mask)


NORMALIZERS: dict[str, Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "softmax": softmax,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
}
