"""
The scores of additive attention, v^T tanh(q + k), without its hidden layer being kept.

That layer is [B, T, S, A], by far the largest tensor of a model that has it. Here it is made in parts that fit the
processor's cache, each is used up at once, and the backward pass makes it again.

Shapes: B batch, S source, T target, A additive attention's hidden width, or that of all heads together; `heads`
attention heads, D = A / heads.
"""

import math
import threading
from collections.abc import Iterator

import torch
from torch.autograd.function import BackwardCFunction, FunctionCtx

# How many numbers of the hidden layer are made at once: on a CPU for each thread, 1 MB in float32, which stays in the
# cache from one operation to the next; on other devices 256 MB, where fewer, larger kernels are better.
NUMBERS_AT_ONCE = 2**18
NUMBERS_AT_ONCE_ON_ACCELERATOR = 2**26


def parts(query: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of B and T that together cover all of [B, T, S, A], given [B, T, A] and [B, S, A]."""
    numbers = NUMBERS_AT_ONCE_ON_ACCELERATOR
    if keys.device.type == "cpu":
        numbers = NUMBERS_AT_ONCE * torch.get_num_threads()
    batch, length = query.shape[:2]
    queries = max(numbers // max(keys[0].numel(), 1), 1)
    rows = max(queries // max(length, 1), 1)
    for row in range(0, batch, rows):
        for first in range(0, length, queries):
            yield slice(row, row + rows), slice(first, first + queries)


class _Scratch(threading.local):
    """
    One piece of a CPU's memory for all parts. Were it allocated and freed at every step of a time loop, the small
    tensors that each step keeps would fill the gaps, and the process grow by a part a step.
    """

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def __call__(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Uninitialised, of `like`'s type and device."""
        numbers = math.prod(shape)
        real = like.device.type == "cpu" and type(like) is torch.Tensor  # not one that only pretends, for a tracer
        if not real or numbers > 4 * NUMBERS_AT_ONCE * torch.get_num_threads():
            return like.new_empty(shape)
        if self.memory.dtype != like.dtype or self.memory.numel() < numbers:
            with torch.inference_mode(False):  # what is made in that mode can't be written outside of it
                self.memory = torch.empty(numbers, dtype=like.dtype, device="cpu")
        return self.memory[:numbers].view(shape)


scratch = _Scratch()


def _sigmoids(doubled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """r = sigmoid(-2 q - 2 k) of some -2 q [B, T, A] and k [B, S, A]: [B, T, S, A], overwritten by the next."""
    r = scratch((*doubled.shape[:2], *keys.shape[1:]), keys)
    return torch.sub(doubled.unsqueeze(2), keys.unsqueeze(1), alpha=2, out=r).sigmoid_()


def plain_additive_scores(query: torch.Tensor, keys: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What `additive_scores` computes, as an equation. torch.compile makes one kernel of it, which keeps nothing."""
    hidden = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)).unflatten(-1, v.shape)  # [B, T, S, heads, D]
    return (hidden * v.to(hidden.dtype)).sum(-1).permute(0, 3, 1, 2)


class AdditiveScores(torch.autograd.Function):
    """
    `additive_scores` by tanh(x) = 1 - 2 r with r = sigmoid(-2 x), for which there is the faster kernel:

        score = sum_a v_a - 2 sum_a v_a r_a,  d score / d x_a = 4 v_a r_a (1 - r_a)

    For the backward pass it keeps its arguments alone. Sums are in float32 or wider.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query: torch.Tensor, keys: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, keys, v)
        dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
        heads = v.size(0)
        scores = query.new_empty(heads, query.size(0), query.size(1), keys.size(1), dtype=dtype)
        doubled, keys, v = -2 * query.to(dtype), keys.to(dtype), v.to(dtype)
        doubled_v = -2 * v.unsqueeze(-1)  # [heads, D, 1]
        with torch.autocast(query.device.type, enabled=False):
            for b, t in parts(query, keys):
                r = _sigmoids(doubled[b, t], keys[b])
                by_head = r.view(-1, *v.shape).transpose(0, 1)  # [heads, B T S, D]
                scores[:, b, t] = torch.bmm(by_head, doubled_v).view(heads, *r.shape[:3])
        scores += v.sum(1).view(-1, 1, 1, 1)
        return scores.transpose(0, 1)  # [B, heads, T, S]

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled():
            raise RuntimeError("The scores of additive attention can't be differentiated twice (create_graph=True).")
        query, keys, v = ctx.saved_tensors  # type: ignore[misc]  # torch says it is a tuple of one
        dtype = grad.dtype
        doubled, wide_keys = -2 * query.to(dtype), keys.to(dtype)
        grad = grad.permute(0, 2, 3, 1).contiguous()  # [B, T, S, heads]
        d_query, d_keys = doubled.new_empty(query.shape), doubled.new_empty(keys.shape)  # contiguous
        d_v = v.new_zeros(v.size(0), 1, v.size(1), dtype=dtype)  # of r's part
        one_query = query.size(1) == 1
        with torch.autocast(query.device.type, enabled=False):
            for b, t in parts(query, keys):
                r = _sigmoids(doubled[b, t], wide_keys[b])
                by_head = r.view(*r.shape[:3], *v.shape)
                g = grad[b, t]
                d_v.baddbmm_(g.flatten(0, 2).t().unsqueeze(1), by_head.flatten(0, 2).transpose(0, 1))
                # g r (1 - r), in place; with one query it is the keys' gradient as it stands.
                d = d_keys[b].unsqueeze(1) if one_query else r
                torch.ops.aten.sigmoid_backward(g.unsqueeze(-1), by_head, grad_input=d.view(by_head.shape))
                torch.sum(d, 2, out=d_query[b, t])
                if t.start == 0 and not one_query:
                    torch.sum(d, 1, out=d_keys[b])
                elif not one_query:
                    d_keys[b] += d.sum(1)
        scale = 4 * v.to(dtype).flatten()
        d_query, d_keys = d_query.mul_(scale), d_keys.mul_(scale)
        d_v = grad.sum((0, 1, 2)).unsqueeze(1) - 2 * d_v.squeeze(1)
        return d_query.to(query.dtype), d_keys.to(keys.dtype), d_v.to(v.dtype)


def additive_scores(query: torch.Tensor, keys: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """
    v_h^T tanh(q_h + k_h) of projected queries and keys (Bahdanau et al. 2015, A.1.2).

    Its gradient can't be differentiated again, which is refused with an error.

    Args:
        query: [B, T, A], any floating type.
        keys: [B, S, A].
        v: [heads, D].

    Returns:
        [B, heads, T, S] in float32, or float64 for such arguments; while torch.compile or an export traces the model,
        in the arguments' own type.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return plain_additive_scores(query, keys, v)
    if not torch.is_grad_enabled() and query.size(1) * keys.numel() <= NUMBERS_AT_ONCE:
        # A decoding step of a few rows, which takes longer to call than to compute.
        dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
        return plain_additive_scores(query.to(dtype), keys.to(dtype), v)
    return AdditiveScores.apply(query, keys, v)
