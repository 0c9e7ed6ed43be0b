"""Matrix products inside the time loop, whose weights' gradients wait until the loop is over.

y_t = W x_t + b for t = 1 ... T has the gradient dW = sum_t dy_t x_t^T. Taken step by step, that is T thin products,
and T additions to a gradient as large as the weight, which costs more than the rest of a step. Here a step's backward
pass makes dx_t alone and puts dy_t and x_t aside; when all steps are done, one product over all of them makes dW.

Shapes: B batch, T target, I input, O output.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .packed_products import can_be_packed, pack, packed_is_faster, packed_product, packing_repaid


class LoopWeight:
    """A weight for as long as one loop runs: in the type that the products want, and what its gradient waits for."""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        packed: bool = False,
        lasting: bool = False,
        spared: bool = False,
    ):
        self.original = weight  # kept alive: its id is its name
        self.version = version_of(weight)
        self.weight = weight.detach().to(dtype)  # once a loop, not once a step
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.needs_grad = torch.is_grad_enabled() and (
            weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        self.task = -1
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.token = _Weight.apply(self, weight, bias) if self.needs_grad else None
        self.spared = spared  # is its first product made before it is packed?
        # Of the time that packing takes, what it would have saved so far. When that is all of it, there are probably
        # as many products to come; what lasts for many calls is packed at once.
        self.repaid = 1.0 if lasting else 0.0
        self.packed: torch.Tensor | None = None
        self.may_pack = packed and not self.needs_grad and can_be_packed(self.weight)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """W x + b [..., O] of one step, x [..., I], without a gradient."""
        if not self.may_pack or not self.wants_packing(x.numel() // x.size(-1)):
            return F.linear(x, self.weight, self.bias)
        if self.packed is None:
            self.packed = pack(self.weight)
        return packed_product(x.to(self.weight.dtype), self.packed, self.bias)

    def wants_packing(self, rows: int) -> bool:
        """Is the next product, of so many rows, better made with a packed matrix?"""
        spared, self.spared = self.spared, False
        if spared or not packed_is_faster(self.weight.dtype, rows):
            return False
        if self.repaid < 1:
            self.repaid += packing_repaid(self.weight.dtype, rows)
        return self.repaid >= 1

    def put_aside(self, x: torch.Tensor, grad: torch.Tensor) -> None:
        """x [..., I] and dy [..., O] of one step."""
        task = torch._C._current_graph_task_id()  # which backward(): one that did not ask for dW may have left some
        if task != self.task:
            self.task, self.steps = task, []
        self.steps.append((x.flatten(0, -2), grad.flatten(0, -2)))

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """dW [O, I] and db [O] of all steps; `None` if no step had a part in the loss."""
        steps, self.steps = self.steps, []
        if not steps or self.task != torch._C._current_graph_task_id():
            return None
        x, grad = (torch.cat(parts) for parts in zip(*steps, strict=True))  # [T * B, I], [T * B, O]
        return grad.t() @ x, grad.sum(0)


def version_of(weight: torch.Tensor) -> tuple[int, int]:
    """Another one when torch has seen the weight change. (What is written through `weight.data` it does not see.)"""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


class _Weight(torch.autograd.Function):
    """Stands for the weight in the graph. All steps depend on its empty result, so its backward pass comes last."""

    @staticmethod
    def forward(ctx: Any, record: LoopWeight, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.record, ctx.dtypes = record, (weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return weight.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        found = ctx.record.gradients()
        if found is None:
            return None, None, None
        weight_dtype, bias_dtype = ctx.dtypes
        return None, found[0].to(weight_dtype), None if bias_dtype is None else found[1].to(bias_dtype)


class _Product(torch.autograd.Function):
    """y = W x + b of one step, whose backward pass leaves dW and db to [`_Weight`]."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, record: LoopWeight, x: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        ctx.save_for_backward(x, record.weight)
        return F.linear(x, record.weight, record.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.record.put_aside(x, grad)
        return None, None, grad @ weight if ctx.needs_input_grad[2] else None


class LoopWeights(dict[int, LoopWeight]):
    """The weights of one loop, or of many, by identity. A copy of it is empty."""

    def __init__(self, packed: bool, lasting: bool = False):
        super().__init__()
        self.packed, self.lasting = packed, lasting
        self.screens: dict[int, Any] = {}  # those of `screening.screen_of`

    def forget_changed(self) -> None:
        """What was made of weights that are others now."""
        kept: tuple[dict[int, Any], ...] = (self, self.screens)
        for made in kept:
            for name in [name for name, one in made.items() if one.version != version_of(one.original)]:
                del made[name]

    def __reduce__(self) -> tuple[type["LoopWeights"], tuple[bool, bool]]:
        return LoopWeights, (self.packed, self.lasting)


# The weights of the loop that runs, by identity; none outside of loops.
_weights: ContextVar[LoopWeights | None] = ContextVar("weights of the time loop", default=None)

# Those that loops without gradients share, inside `packed_weights`.
_packed: ContextVar[LoopWeights | None] = ContextVar("packed weights", default=None)


def loop_weights() -> LoopWeights | None:
    """Those of the loop that runs."""
    return _weights.get()


@contextmanager
def shared_by_steps(active: bool = True, packed: bool = False) -> Iterator[None]:
    """
    Around a time loop: `linear` casts every weight once, and makes its gradient once.

    `active=False` leaves `linear` as it is outside: for tests, and where a loop's body runs again in the backward pass
    (gradient checkpointing). What is compiled does not need it. `packed` is for many steps without gradients: see
    `pack`.
    """
    if not active or torch.compiler.is_compiling():
        yield
        return
    lasting = _packed.get()
    if lasting is None or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        lasting = LoopWeights(packed)
    lasting.forget_changed()
    before = _weights.set(lasting)
    try:
        yield
    finally:
        _weights.reset(before)


@contextmanager
def packed_weights(weights: LoopWeights | None = None) -> Iterator[None]:
    """Around loops without gradients: what they pack is packed once, and kept in `weights` if they are given."""
    before = _packed.set(LoopWeights(packed=True, lasting=True) if weights is None else weights)
    try:
        yield
    finally:
        _packed.reset(before)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """W x + b: [..., I], [O, I], [O] -> [..., O], like `torch.nn.functional.linear` and under autocast as there."""
    if torch.compiler.is_compiling():
        if weight.size(1) == 0:  # a transition without input: an export gets no empty products
            return (weight.new_zeros(len(weight)) if bias is None else bias).to(x.dtype).expand(*x.shape[:-1], -1)
        return F.linear(x, weight, bias)
    weights = _weights.get()
    if weights is None:
        return F.linear(x, weight, bias)
    record = weights.get(id(weight))
    if record is None:
        device_type = x.device.type
        autocast = torch.is_autocast_enabled(device_type) and weight.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device_type) if autocast else weight.dtype
        # What has a screen makes a first step's scores, and then mostly none.
        spared = id(weight) in weights.screens
        record = weights[id(weight)] = LoopWeight(weight, bias, dtype, weights.packed, weights.lasting, spared)
    if record.token is None:
        return record.product(x)
    return _Product.apply(record.token, record, x.to(record.weight.dtype))


class StepLinear(nn.Linear):
    """`nn.Linear` for use inside the time loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
