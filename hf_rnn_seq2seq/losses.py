"""
Losses on the target words, one for each way to normalise scores, and the coverage loss on the attention weights.

Labels of -100 are ignored everywhere. Each loss is the mean over the labels or, if `num_items_in_batch` is given, the
sum divided by it: the number of labels in all of an accumulated batch, so that its parts add up to its mean.

Shapes: B batch, T target, V vocabulary, S source, N = B T.
"""

import math

import torch
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn import functional as F
from transformers.loss.loss_utils import ForMaskedLMLoss

from .normalizers import NORMALIZERS

IGNORED = -100


def entropy(weights: torch.Tensor, normalizer: str) -> torch.Tensor:
    """
    H(p) = sum_i (p_i - p_i^alpha) / (alpha (alpha - 1)), Tsallis entropy (Peters et al. 2019, section 3): alpha is 2
    for sparsemax, 1.5 for entmax15, and for softmax 1, with -sum_i p_i log p_i for a limit. [N, V] -> [N].
    """
    if normalizer == "softmax":
        return -torch.xlogy(weights, weights).sum(-1)
    if normalizer == "sparsemax":
        return (weights * (1 - weights)).sum(-1) / 2
    return (weights * (1 - weights.sqrt())).sum(-1) / 0.75


def fenchel_young_losses(
    scores: torch.Tensor, weights: torch.Tensor, gold: torch.Tensor, normalizer: str
) -> torch.Tensor:
    """
    L(z, y) = (p - e_y)^T z + H(p) (Peters et al. 2019, section 3; Blondel et al. 2019): scores z [N, V], weights p
    [N, V], gold classes y [N] -> losses [N].
    """
    # p - e_y sums to zero, so that a shift of z changes nothing, and keeps the products of large scores exact.
    z = scores - scores.amax(-1, keepdim=True)
    expected = (weights * z).sum(-1) - z.gather(-1, gold.unsqueeze(-1)).squeeze(-1)
    return (expected + entropy(weights, normalizer)).clamp(min=0)  # below zero by rounding only


class _FenchelYoungLoss(torch.autograd.Function):
    """
    [`fenchel_young_losses`], with dL/dz = p - e_y. As p maximises p^T z + H(p), no gradient comes through p, so that
    there is nothing to be done for the normaliser in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, scores: torch.Tensor, weights: torch.Tensor, gold: torch.Tensor, normalizer: str
    ) -> torch.Tensor:
        ctx.save_for_backward(weights, gold)
        return fenchel_young_losses(scores, weights, gold, normalizer)

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        weights, gold = ctx.saved_tensors  # type: ignore[misc]  # torch says it is a tuple of one
        difference = weights.scatter_add(-1, gold.unsqueeze(-1), -torch.ones_like(weights[:, :1]))
        return difference * grad.unsqueeze(-1), None, None, None


def reduce_loss(
    losses: torch.Tensor, labelled: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """The mean of the labelled losses, or their sum divided by the number; 0 if there are none. Of one shape, any."""
    total = losses.masked_fill(~labelled, 0).sum()
    if num_items_in_batch is None:
        return total / labelled.sum().clamp(min=1)
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def token_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    normalizer: str,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    The loss that belongs to the normaliser: cross entropy to softmax; to sparsemax (Martins & Astudillo 2016,
    section 3) and entmax15 (Peters et al. 2019, section 3) their Fenchel-Young losses. A word's scores get the
    gradient p - e_y from each of them.

    The sparse losses are never negative, and zero exactly where the gold word has all the mass, which it has once its
    score is above all others by 1 (sparsemax) or 2 (entmax15).

    Args:
        scores: [B, T, V], any floating type.
        labels: [B, T], -100 where no loss is wanted.
        normalizer: a key of `NORMALIZERS`.
        num_items_in_batch: see the head of this file.

    Returns:
        A scalar; for cross entropy transformers' `ForMaskedLMLoss`, always in float32, for the others in float32, or
        float64 for such scores. Without any label it is 0, except that the mean cross entropy is NaN, as everywhere in
        transformers.
    """
    vocab_size = scores.size(-1)
    if normalizer == "softmax":
        return ForMaskedLMLoss(
            scores,
            labels,
            vocab_size=vocab_size,
            num_items_in_batch=num_items_in_batch,  # type: ignore[arg-type]  # takes an int, too
        )
    labels = labels.reshape(-1).to(scores.device)
    labelled = labels != IGNORED
    flat = scores.reshape(-1, vocab_size).to(torch.promote_types(scores.dtype, torch.float32))
    weights = NORMALIZERS[normalizer](flat, None)
    losses = _FenchelYoungLoss.apply(flat, weights, labels.masked_fill(~labelled, 0), normalizer)
    return reduce_loss(losses, labelled, num_items_in_batch)


def smoothing_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    z_y - mean(z), which with weight epsilon makes [`token_loss`] that of smoothed labels for every normaliser (Szegedy
    et al. 2016; for Fenchel-Young losses Peters & Martins 2021):

        L(z, y) + epsilon (z_y - mean(z)) = L(z, q) + const,  q = (1 - epsilon) e_y + epsilon / V

    whose gradient is p - q. The constant is the entropy of q, as in cross entropy.

    Args:
        scores: [B, T, V], or [B, T, W] where the W - V last slots are source words outside of the vocabulary. Of
            these only such as a head that copies gives more than its least log-probability have a part in the mean:
            there are as many slots as source positions, most of which no word uses.
        labels: [B, T], -100 where no loss is wanted.
        vocab_size: V.
        num_items_in_batch: see the head of this file.

    Returns:
        A scalar in float32, or float64 for such scores; 0 without any label.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    labels = labels.to(scores.device)
    labelled = labels != IGNORED
    gold = scores.gather(-1, labels.masked_fill(~labelled, 0).unsqueeze(-1)).squeeze(-1)
    if scores.size(-1) == vocab_size:
        mean = scores.mean(-1)
    else:
        least = math.log(torch.finfo(torch.float32).tiny)
        real = F.pad(scores[..., vocab_size:] > least * (1 - 1e-6), (vocab_size, 0), value=True)
        mean = scores.masked_fill(~real, 0).sum(-1) / real.sum(-1)
    return reduce_loss(gold - mean, labelled, num_items_in_batch)


def log_probabilities(scores: torch.Tensor, normalizer: str) -> torch.Tensor:
    """
    Logarithms of the normalised scores, as beam search adds them up: [..., V] -> [..., V] in float32 or float64.

    For sparsemax and entmax15 a probability of zero counts as the smallest normal float32, about 1e-38: its logarithm,
    -87.3, is finite, so that sums of it stay comparable, and far below that of any other probability.
    """
    if normalizer == "softmax":
        return torch.log_softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1)
    return NORMALIZERS[normalizer](scores, None).clamp(min=torch.finfo(torch.float32).tiny).log()


def as_logits(scores: torch.Tensor, normalizer: str) -> torch.Tensor:
    """What generate() may put through a softmax: the scores, or the log-probabilities of another normaliser."""
    return scores if normalizer == "softmax" else log_probabilities(scores, normalizer)


def coverage_loss(
    weights: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    covloss_t = sum_s min(a_ts, c_ts), c_t = sum_{t' < t} a_t' (See et al. 2017, eq. 10 and 12), without lambda.

    Deviation: several heads each have their own coverage, and their losses are averaged.

    Args:
        weights: attention weights from the first target step on, [B, heads, T, S], zero at padding. A step before the
            first token (padding on the left) would count as attention paid: its weights must be zero, too.
        labels: [B, T]; steps with -100 have no loss, but their attention counts for later steps.
        num_items_in_batch: see the head of this file.

    Returns:
        A scalar in float32, or float64 for such weights; 0 without any label.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    coverage = weights.cumsum(2) - weights  # of the steps before
    losses = torch.minimum(weights, coverage).sum(-1).mean(1)  # [B, heads, T, S] -> [B, T]
    return reduce_loss(losses, labels.to(weights.device) != IGNORED, num_items_in_batch)
