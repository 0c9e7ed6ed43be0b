"""
The scores of additive attention, v^T tanh(q + k), without its hidden layer being kept.

That layer is [B, T, S, A], by far the largest tensor of a model that has it. Here it is made in parts that fit the
processor's cache, each is used up at once, and the backward pass makes it again.

Shapes: B batch, S source, T target, A additive attention's hidden width, or that of all heads together; `heads`
attention heads, D = A / heads.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .onednn_products import by_vectors
from .step_products import LoopKeys, loop_weights

# How many numbers of the hidden layer are made at once: on a CPU for each thread, 2 MB in float32, which stays in its
# caches from one operation to the next (with 1 MB, calls take longer than is gained); on other devices 256 MB, where
# fewer, larger kernels are better.
NUMBERS_AT_ONCE = 2**19
NUMBERS_AT_ONCE_ON_ACCELERATOR = 2**26
# From how many queries for the same keys it pays to take the exponentials of queries and keys one by one, on a CPU.
QUERIES_TO_FACTOR = 4
# The largest key that this is done with. e^40 e^80 can overflow, and then 1 / (1 + inf) is the right zero; and with a
# query beyond 40, which counts as 40, tanh(q + k) is 1 or -1 in every digit.
LARGEST_KEY = 20


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


def _on_cpu(tensor: torch.Tensor) -> bool:
    """Is it there for real, not one that only pretends, for a tracer?"""
    return tensor.device.type == "cpu" and type(tensor) is torch.Tensor


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
        if not _on_cpu(like) or numbers > 4 * NUMBERS_AT_ONCE * torch.get_num_threads():
            return like.new_empty(shape)
        if self.memory.dtype != like.dtype or self.memory.numel() < numbers:
            with torch.inference_mode(False):  # what is made in that mode can't be written outside of it
                self.memory = torch.empty(numbers, dtype=like.dtype, device="cpu")
        return self.memory[:numbers].view(shape)


scratch = _Scratch()


def _key_factors(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
    """e^2k [B, S, A], on a CPU, if that can't overflow."""
    keys = keys.detach()
    if keys.numel() == 0 or not _on_cpu(keys) or not keys.abs().max() <= LARGEST_KEY:  # which may be NaN
        return None
    return (2 * keys.to(_sum_dtype(query, keys))).exp_()


def _query_factors(query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """e^2q [B, T, A] in `dtype`, for use with `_key_factors`."""
    limit = 4 * LARGEST_KEY
    return (2 * query.to(dtype)).clamp_(-limit, limit).exp_()


def _loop_keys(query: torch.Tensor, keys: torch.Tensor, v: torch.Tensor) -> LoopKeys | None:
    """What a loop has of keys that are the same tensor in all its steps; `None` where nothing is trained."""
    loop = loop_weights()
    if loop is None or not (keys.requires_grad and torch.is_grad_enabled()):
        return None
    record = loop.keys_of_loop.get(id(keys))
    if record is None:
        record = loop.keys_of_loop[id(keys)] = LoopKeys(keys)
        record.factors = _key_factors(query, keys)
        record.of_v = _of_v(v.detach(), _sum_dtype(query, keys))
    return record


def _sum_dtype(query: torch.Tensor, keys: torch.Tensor) -> torch.dtype:
    """float32 or wider."""
    return torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)


def _sigmoids(
    query: torch.Tensor, keys: torch.Tensor, key_factors: torch.Tensor | None, dtype: torch.dtype
) -> Callable[[slice, slice], torch.Tensor]:
    """
    r = sigmoid(-2 q - 2 k) for slices of B and T, given all of q [B, T, A] and k [B, S, A]: [B, T, S, A] in `dtype`,
    overwritten by the next. With e^2k, and e^2q as `query`, it is 1 / (1 + e^2q e^2k), without a function of
    [B, T, S, A] to compute.
    """
    like = key_factors if key_factors is not None else keys.to(dtype)
    by_source = like.unsqueeze(1)

    def room(b: slice, t: slice) -> torch.Tensor:
        return scratch((*query[b, t].shape[:2], *like.shape[1:]), like)

    if key_factors is not None:
        one, query_factors = like.new_ones(()), query.unsqueeze(2)
        return lambda b, t: torch.addcmul(one, query_factors[b, t], by_source[b], out=room(b, t)).reciprocal_()
    doubled = (-2 * query.to(dtype)).unsqueeze(2)
    return lambda b, t: torch.sub(doubled[b, t], by_source[b], alpha=2, out=room(b, t)).sigmoid_()


def _of_v(v: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """v's sum of each head [heads, 1, 1], and -2 v [heads, D, 1]."""
    v = v.to(dtype).unsqueeze(-1)
    return v.sum(1, keepdim=True), -2 * v


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()  # which takes no time


def plain_additive_scores(query: torch.Tensor, keys: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What `additive_scores` computes, as an equation. torch.compile makes one kernel of it, which keeps nothing."""
    hidden = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)).unflatten(-1, v.shape)  # [B, T, S, heads, D]
    return (hidden * v.to(hidden.dtype)).sum(-1).permute(0, 3, 1, 2)


class AdditiveScores(torch.autograd.Function):
    """
    `additive_scores` by tanh(x) = 1 - 2 r with r = sigmoid(-2 x), for which there is the faster kernel:

        score = sum_a v_a - 2 sum_a v_a r_a,  d score / d x_a = 4 v_a r_a (1 - r_a)

    For the backward pass it keeps its arguments alone, of which `key_factors` are e^2k or `None`; with them e^2q in
    place of the query. Sums are in float32 or wider. In a loop over time `keys` is the token of its `record`, which
    has the keys and adds up their gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        keys: torch.Tensor,
        v: torch.Tensor,
        key_factors: torch.Tensor | None,
        record: LoopKeys | None,
    ) -> torch.Tensor:
        ctx.record, ctx.query_dtype = record, query.dtype
        keys = keys if record is None else record.keys
        dtype = _sum_dtype(query, keys)
        if key_factors is not None:
            query = _query_factors(query, dtype)
        ctx.save_for_backward(query, keys, v, key_factors)
        heads = v.size(0)
        scores = query.new_empty(heads, query.size(0), query.size(1), keys.size(1), dtype=dtype)
        sigmoids = _sigmoids(query, keys, key_factors, dtype)
        sums, doubled_v = _of_v(v, dtype) if record is None else record.of_v
        with _without_autocast(query.device.type):
            for b, t in parts(query, keys):
                r = sigmoids(b, t)
                by_head = r.view(-1, *v.shape).transpose(0, 1)  # [heads, B T S, D]
                scores[:, b, t] = by_vectors(torch.baddbmm, sums, by_head, doubled_v).view(heads, *r.shape[:3])
        return scores.transpose(0, 1)  # [B, heads, T, S]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("The scores of additive attention can't be differentiated twice (create_graph=True).")
        query, keys, v, key_factors = ctx.saved_tensors
        record, dtype = ctx.record, grad.dtype
        sigmoids = _sigmoids(query, keys, key_factors, dtype)
        grad = grad.permute(0, 2, 3, 1).contiguous()  # [B, T, S, heads]
        d_query, d_keys = grad.new_empty(query.shape), None if record is None else record.gradient_so_far()
        first, one_query = d_keys is None, query.size(1) == 1
        if d_keys is None:
            d_keys = grad.new_empty(keys.shape)  # contiguous
        d_v = v.new_zeros(v.size(0), 1, v.size(1), dtype=dtype)  # of r's part
        with _without_autocast(query.device.type):
            for b, t in parts(query, keys):
                r = sigmoids(b, t)
                by_head = r.view(*r.shape[:3], *v.shape)
                g = grad[b, t]
                by_vectors(d_v.baddbmm_, g.flatten(0, 2).t().unsqueeze(1), by_head.flatten(0, 2).transpose(0, 1))
                # g r (1 - r), in place; of a first, single query it is the keys' gradient as it stands.
                d = d_keys[b].unsqueeze(1) if one_query and first else r
                torch.ops.aten.sigmoid_backward(g.unsqueeze(-1), by_head, grad_input=d.view(by_head.shape))
                torch.sum(d, 2, out=d_query[b, t])
                if d is not r:
                    continue
                if first and t.start == 0:
                    torch.sum(r, 1, out=d_keys[b])
                else:
                    d_keys[b] += r.squeeze(1) if one_query else r.sum(1)
        scale = 4 * v.to(dtype).flatten()
        d_query = d_query.mul_(scale).to(ctx.query_dtype)
        d_v = (grad.sum((0, 1, 2)).unsqueeze(1) - 2 * d_v.squeeze(1)).to(v.dtype)
        if record is None:
            return d_query, d_keys.mul_(scale).to(keys.dtype), d_v, None, None
        if first:
            record.put_aside(d_keys, scale)
        return d_query, None, d_v, None, None


def scores_at_once(query: torch.Tensor, keys: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[`AdditiveScores`] in few calls, for a decoding step of few rows, which takes longer to call than to compute."""
    r = torch.sub((-2 * query).unsqueeze(2), keys.unsqueeze(1), alpha=2).sigmoid_()  # [B, T, S, A]
    sums = r @ v.t() if len(v) == 1 else (r.unflatten(-1, v.shape) * v).sum(-1)  # [B, T, S, heads]
    return (v.sum(1) - 2 * sums).permute(0, 3, 1, 2)


def additive_scores(query: torch.Tensor, keys: torch.Tensor, v: torch.Tensor, shared: bool = False) -> torch.Tensor:
    """
    v_h^T tanh(q_h + k_h) of projected queries and keys (Bahdanau et al. 2015, A.1.2).

    Its gradient can't be differentiated again, which is refused with an error.

    Args:
        query: [B, T, A], any floating type.
        keys: [B, S, A].
        v: [heads, D].
        shared: are v and the keys the same in all steps of a loop, the keys the same tensor?

    Returns:
        [B, heads, T, S] in float32, or float64 for such arguments; while torch.compile or an export traces the model,
        in the arguments' own type.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return plain_additive_scores(query, keys, v)
    few = query.size(1) * keys.numel() <= NUMBERS_AT_ONCE
    if few and not torch.is_grad_enabled() and not torch.is_autocast_enabled(query.device.type):
        dtype = _sum_dtype(query, keys)
        return scores_at_once(query.to(dtype), keys.to(dtype), v.to(dtype))
    record = _loop_keys(query, keys, v) if shared else None
    if record is not None:
        return AdditiveScores.apply(query, record.token, v, record.factors, record)
    factors = _key_factors(query, keys) if query.size(1) >= QUERIES_TO_FACTOR else None
    return AdditiveScores.apply(query, keys, v, factors, None)
