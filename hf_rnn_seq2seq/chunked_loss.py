"""
The loss of a head, with or without the scores of all target positions in memory.

Scores are [B, T, V]: with a large vocabulary, by far the largest tensor of a training step, held three or four times
over by a plain forward and backward pass. Here they are made for some positions at a time, and used up at once: the
gradient of the loss by the scores is p - e_y, known as soon as they are, so that one pass makes the loss and the
gradients of the output layer and of what it reads (Hsu et al. 2024, Liger Kernel, section 3.2).

Shapes: B batch, T target, V vocabulary, D what the output layer reads, N = B T, n positions at once.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForMaskedLMLoss

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .heads import Head, HeadInput, LinearHead
from .losses import IGNORED, fenchel_young_losses, smoothing_loss, token_loss
from .normalizers import LOG2_E, NORMALIZERS
from .onednn_products import rounded_rows
from .step_products import StepLinear, product_dtype

# How many scores are made at once, 32 MB in float32 (on other devices than a CPU 512 MB); but of so many positions at
# least, since each part adds to a gradient as large as the output layer.
SCORES_AT_ONCE = 2**23
SCORES_AT_ONCE_ON_ACCELERATOR = 2**27
LEAST_POSITIONS = 256


def positions_at_once(x: torch.Tensor, vocab_size: int) -> int:
    """How many positions' scores are made at once."""
    scores = SCORES_AT_ONCE if x.device.type == "cpu" else SCORES_AT_ONCE_ON_ACCELERATOR
    return max(scores // vocab_size, LEAST_POSITIONS)


def _losses_and_gradient(
    scores: torch.Tensor, gold: torch.Tensor, scales: torch.Tensor, normalizer: str, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Scores [n, V], overwritten, labels [n] and scales [n] -> losses without smoothing [n], smoothing's part without its
    weight [n], and the gradient by the scores [n, V] of their weighted sum times the scales.
    """
    scales = scales.unsqueeze(1)
    index = gold.unsqueeze(1)
    z_gold = scores.gather(1, index).squeeze(1)
    smoothed = z_gold - scores.mean(1) if smoothing > 0 else torch.zeros_like(z_gold)
    if normalizer == "softmax":
        largest = scores.amax(1, keepdim=True)
        p = torch.add(-LOG2_E * largest, scores, alpha=LOG2_E, out=scores).exp2_()  # e^(score - largest)
        total = p.sum(1, keepdim=True)
        losses = (total.log() + largest).squeeze(1) - z_gold
        p.mul_(scales / total)
    else:
        p = NORMALIZERS[normalizer](scores, None)
        losses = fenchel_young_losses(scores, p, gold, normalizer)
        p.mul_(scales)
    if smoothing > 0:
        p.sub_(scales * (smoothing / p.size(1)))
    return losses, smoothed, p.scatter_add_(1, index, scales * (smoothing - 1))


def _scores(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """W x + b, [n, V]. Of float32 on a CPU torch writes the bias into all rows first, for the product to read it."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return F.linear(x, weight).add_(bias)
    return F.linear(x, weight, bias)


class _LinearLoss(torch.autograd.Function):
    """
    Summed losses of scores W x + b, times `scale`: x [N, D], W [V, D], b [V], labels [N], scale [] -> two scalars,
    that with smoothing, and smoothing's part without its weight, which has no gradient.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        labels: torch.Tensor,
        scale: torch.Tensor,
        normalizer: str,
        smoothing: float,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device_type = x.device.type
        dtype = product_dtype(weight)
        w, b = weight.to(dtype), bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        rows = None
        given, labelled = x, labels != IGNORED
        if device_type == "cpu":  # elsewhere the products of ignored positions cost less than to wait for their number
            rows = labelled.nonzero().squeeze(1)
            more = rounded_rows(len(rows), w) - len(rows)  # of the first, without a part in the loss
            read = torch.cat((rows, rows[:1].expand(more)))
            x, labels, labelled = x[read], labels[read], torch.arange(len(read)) < len(rows)
        x = x.to(dtype)
        total, smoothed_total = (x.new_zeros((), dtype=wide) for _ in range(2))
        d_x = torch.empty_like(x) if with_gradients else None
        d_weight = None  # the first part makes it
        d_bias = torch.zeros_like(bias, dtype=wide) if with_gradients else None

        size = positions_at_once(x, len(weight))
        with torch.autocast(device_type, enabled=False):
            for start in range(0, len(x), size) or (0,):  # once without positions, too, for the gradients' zeros
                part = slice(start, start + size)
                scores = _scores(x[part], w, b).to(wide)
                gold = labels[part].masked_fill(~labelled[part], 0)
                scales = labelled[part] * scale.to(wide)  # [n]
                losses, smoothed, gradient = _losses_and_gradient(scores, gold, scales, normalizer, smoothing)
                total += losses.masked_fill(~labelled[part], 0) @ scales
                smoothed_total += smoothed.masked_fill(~labelled[part], 0) @ scales
                if d_x is None or d_bias is None:
                    continue
                d_bias += gradient.sum(0)
                narrow = gradient.to(dtype)
                torch.mm(narrow, w, out=d_x[part])
                if d_weight is None:
                    d_weight = (narrow.t() @ x[part]).to(wide)
                elif dtype == wide:
                    d_weight.addmm_(narrow.t(), x[part])
                else:
                    d_weight += narrow.t() @ x[part]
        if d_x is not None and d_weight is not None and d_bias is not None:
            d_x = d_x.to(given.dtype)
            if rows is not None:
                d_x = torch.zeros_like(given).index_copy_(0, rows, d_x[: len(rows)])
            ctx.save_for_backward(d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype))
        ctx.mark_non_differentiable(smoothed_total)
        return total + smoothing * smoothed_total, smoothed_total

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("The loss of `skip_logits=True` can't be differentiated twice (create_graph=True).")
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        found = [gradient if needed else None for gradient, needed in zip(saved, ctx.needs_input_grad, strict=False)]
        # What need not be scaled is handed on as it is, since another one of W's size takes time; but not if it is to
        # be kept for another backward pass: what gets it may add to it in place.
        keeps = torch._C._autograd._get_current_graph_task_keep_graph()
        if keeps or grad.device.type != "cpu" or grad != 1:
            found = [None if gradient is None else (gradient * grad).to(gradient.dtype) for gradient in found]
        return (*found, None, None, None, None, None)


def _scale(
    labels: torch.Tensor, normalizer: str, num_items_in_batch: torch.Tensor | int | None, dtype: torch.dtype
) -> torch.Tensor:
    """What a sum of losses is multiplied by, as in `token_loss`."""
    if num_items_in_batch is None:
        count = (labels != IGNORED).sum()
        count = count if normalizer == "softmax" else count.clamp(min=1)
    else:
        count = torch.as_tensor(num_items_in_batch, device=labels.device)
    return count.to(torch.promote_types(dtype, torch.float32)).reciprocal()


def linear_loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    normalizer: str,
    num_items_in_batch: torch.Tensor | int | None = None,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    `token_loss` and `smoothing_loss` of the scores W x + b, of which no more than `positions_at_once` exist at a time.
    Positions without a label take no time.

    With gradients enabled it computes them, too: the backward pass only hands them on. They can't be differentiated
    again, which is refused with an error.

    Args:
        x: [B, T, D], any floating type.
        weight, bias: [V, D] and [V].
        labels: [B, T], -100 where no loss is wanted.
        normalizer: a key of `NORMALIZERS`.
        num_items_in_batch: see `losses.py`.
        smoothing: weight of `smoothing_loss`.

    Returns:
        `token_loss` plus `smoothing` times `smoothing_loss`, and the latter by itself, without a gradient (`None`
        without smoothing); scalars in float32, or float64 for such weights.
    """
    labels = labels.to(x.device).flatten()
    scale = _scale(labels, normalizer, num_items_in_batch, weight.dtype)
    with_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias))
    loss, smoothed = _LinearLoss.apply(
        x.flatten(0, 1), weight, bias, labels, scale, normalizer, smoothing, with_gradients
    )
    if normalizer == "softmax" and num_items_in_batch is None:
        loss = loss + 0 * scale  # without labels NaN, as everywhere in transformers
    return loss, smoothed if smoothing > 0 else None


def _by_time(inputs: HeadInput, part: slice) -> HeadInput:
    """Some target positions of what a head reads."""
    return inputs._replace(
        features=inputs.features[:, part],
        weights=None if inputs.weights is None else inputs.weights[:, :, part],
        gate_input=None if inputs.gate_input is None else inputs.gate_input[:, part],
    )


def _in_parts(
    head: Head,
    inputs: HeadInput,
    labels: torch.Tensor,
    config: RnnSeq2SeqConfig,
    num_items_in_batch: torch.Tensor | int | None,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`linear_loss` of any head: the scores of each part are made again in the backward pass."""
    normalizer = config.output_normalizer
    count = num_items_in_batch
    if count is None:
        count = (labels != IGNORED).sum()
        count = count if normalizer == "softmax" else count.clamp(min=1)

    def part_loss(part_inputs: HeadInput, part_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = head(part_inputs)
        loss = token_loss(scores, part_labels, normalizer, count)
        if smoothing == 0:
            return loss, loss.detach()
        smoothed = smoothing_loss(scores, part_labels, config.vocab_size, count)
        return loss + smoothing * smoothed, smoothed

    length = labels.size(1)
    size = max(positions_at_once(inputs.features, config.vocab_size + inputs.extra_ids) // len(labels), 1)
    losses, smoothed = [], []
    for start in range(0, length, size):
        part = slice(start, start + size)
        found = checkpoint(
            part_loss, _by_time(inputs, part), labels[:, part], use_reentrant=False, preserve_rng_state=False
        )
        losses.append(found[0])
        smoothed.append(found[1])
    return torch.stack(losses).sum(), torch.stack(smoothed).sum() if smoothing > 0 else None


def _is_plain(head: Head) -> bool:
    """Is the head's last step a product with a matrix, and nothing else? Not if sharded, quantised or watched."""
    if head.copies or not isinstance(head, LinearHead) or type(head.output) not in (nn.Linear, StepLinear):
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        for module in (head, head.output)
    )


def head_loss(
    head: Head,
    inputs: HeadInput,
    scores: torch.Tensor | None,
    labels: torch.Tensor,
    config: RnnSeq2SeqConfig,
    loss_function: Callable[..., torch.Tensor],
    num_items_in_batch: torch.Tensor | int | None = None,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The loss that belongs to `config.output_normalizer`, with smoothing.

    Args:
        head: what makes scores.
        inputs: what it reads.
        scores: what it makes of them, [B, T, V]; `None` if they are not to be held all at once. (They are where
            `loss_function` is a user's own, and where torch.compile traces the model.)
        labels: [B, T], -100 where no loss is wanted.
        config: the model's configuration.
        loss_function: the model's, for softmax.
        num_items_in_batch: see `losses.py`.
        smoothing: weight of `smoothing_loss`.

    Returns:
        The loss, and the part of it that is smoothing, without its weight (`None` without smoothing).

    Raises:
        ValueError: labels of another shape.
    """
    shape, normalizer = inputs.features.shape[:2], config.output_normalizer
    if labels.shape != shape:
        raise ValueError(f"`labels` must have the decoder input's shape {tuple(shape)}, got {tuple(labels.shape)}.")
    own_function = normalizer == "softmax" and loss_function is not ForMaskedLMLoss
    if scores is None and not own_function and not torch.compiler.is_compiling():
        if _is_plain(head):
            assert isinstance(head, LinearHead)
            x, output = head.before_output(inputs), head.output
            return linear_loss(x, output.weight, output.bias, labels, normalizer, num_items_in_batch, smoothing)
        return _in_parts(head, inputs, labels, config, num_items_in_batch, smoothing)
    if scores is None:
        scores = head(inputs)
    if normalizer == "softmax":  # transformers' way, on which a user may put another function
        loss = loss_function(scores, labels, scores.size(-1), num_items_in_batch=num_items_in_batch)
    else:
        loss = token_loss(scores, labels, normalizer, num_items_in_batch)
    if smoothing == 0:
        return loss, None
    smoothed = smoothing_loss(scores, labels, config.vocab_size, num_items_in_batch)
    return loss + smoothing * smoothed, smoothed
