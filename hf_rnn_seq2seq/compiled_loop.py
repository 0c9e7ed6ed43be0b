"""
The time loops under torch.compile, and those of exports.

Compiled, a Python loop becomes as many copies of its body as there are steps, and another graph for every length. Here
the body is compiled once, as the body of torch's `scan`, and the length is a size like any other.
"""

from collections.abc import Callable, Sequence

import torch
from torch._higher_order_ops.scan import scan

# Named, because Dynamo can't evaluate a subscript in the annotations of a function within a function.
Tensors = Sequence[torch.Tensor]
Step = tuple[Tensors, Tensors]  # the state after it, what it puts out


def scans(length: int) -> bool:
    """Whether a loop of so many steps is being compiled: by torch.compile, not for an export."""
    return torch.compiler.is_dynamo_compiling() and length > 1


def scan_steps(
    step: Callable[[Tensors, Tensors], Step], state: Tensors, inputs: Tensors
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """
    `state, y_t = step(state, x_t)` for every t.

    Args:
        step: keeps the shapes of the state.
        state: before the first step, [B, ...] each.
        inputs: [B, T, ...] each.

    Returns:
        the state after the last step; the outputs of all steps, [B, T, ...] each.
    """

    # `scan` wants a state of unchanging type, and nothing that comes out of a step to be what went into it.
    def body(old: Tensors, x: Tensors) -> Step:
        new, outputs = step(old, x)
        kept = [after.to(before.dtype, copy=True) for before, after in zip(old, new, strict=True)]
        return kept, [output.clone() for output in outputs]

    last, outputs = scan(body, [part.clone() for part in state], [x.transpose(0, 1) for x in inputs])
    # Their gradients may be views of one tensor, which `scan` refuses: a product makes them tensors of their own.
    return [part * 1 for part in last], [output.transpose(0, 1) for output in outputs]
