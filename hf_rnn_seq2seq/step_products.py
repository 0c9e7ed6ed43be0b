"""Matrix products inside the time loop, whose gradients by what all steps share wait until the loop is over.

y_t = W x_t + b for t = 1 ... T has the gradient dW = sum_t dy_t x_t^T. Taken step by step, that is T thin products,
and T additions to a gradient as large as the weight, which costs more than the rest of a step. Here a step's backward
pass makes dx_t alone and puts dy_t and x_t aside; when all steps are done, one product over all of them makes dW.
Attention's products with the keys and values of a source are treated alike, and the keys of additive attention.

Shapes: B batch, T target, I input, O output, S source, D width of what is attended to.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .onednn_products import by_vectors, rounded_rows
from .packed_products import can_be_packed, pack, packed_is_faster, packed_product, packing_repaid


class Waiting:
    """What the steps' backward passes put aside."""

    token: torch.Tensor | None  # what ties every step to the node of the graph that makes the gradient, in a loop

    def __init__(self) -> None:
        self.task = -1
        self.steps: list[tuple[torch.Tensor, ...]] = []

    def put_aside(self, *tensors: torch.Tensor) -> None:
        """What a product reads, x [..., R, I], and dy [..., R, O] of one step, R rows."""
        task = torch._C._current_graph_task_id()  # which backward(): one that did not ask for dW may have left some
        if task != self.task:
            self.task, self.steps = task, []
        self.steps.append(tensors)

    def take(self, rounded: bool = False) -> list[torch.Tensor] | None:
        """
        [..., T * R, I] and [..., T * R, O] of all steps; `None` if no step had a part in the loss. If `rounded`, with
        rows of zeros after them that make it `rounded_rows`.
        """
        steps, self.steps = self.steps, []
        if not steps or self.task != torch._C._current_graph_task_id():
            return None
        if len(steps) == 1:
            return list(steps[0])
        columns = [list(parts) for parts in zip(*steps, strict=True)]
        if rounded:
            rows = sum(len(step[0]) for step in steps)
            more = rounded_rows(rows, steps[0][0]) - rows
            for parts in columns:
                parts.append(parts[0].new_zeros(more, parts[0].size(-1)))
        return [torch.cat(parts, dim=-2) for parts in columns]

    def gradients(self) -> tuple[torch.Tensor, ...] | None:
        """Of what `token` stands for, by all steps; `None` if no step had a part in the loss."""
        raise NotImplementedError


class LoopWeight(Waiting):
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
        super().__init__()
        self.original = weight  # kept alive: its id is its name
        self.version = version_of(weight)
        self.weight = weight.detach().to(dtype)  # once a loop, not once a step
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.needs_grad = torch.is_grad_enabled() and (
            weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        self.token = _Shared.apply(self, weight, bias) if self.needs_grad else None
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

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """dW [O, I] and db [O]."""
        taken = self.take(rounded=True)
        if taken is None:
            return None
        x, grad = taken  # [T * B, I], [T * B, O]
        return grad.t() @ x, grad.sum(0)


def version_of(weight: torch.Tensor) -> tuple[int, int]:
    """Another one when torch has seen the weight change. (What is written through `weight.data` it does not see.)"""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version


class _Shared(torch.autograd.Function):
    """Stands for tensors in the graph. All steps depend on its empty result, so its backward pass comes last."""

    @staticmethod
    def forward(ctx: Any, record: Waiting, *tensors: torch.Tensor | None) -> torch.Tensor:
        ctx.record, ctx.dtypes = record, [None if tensor is None else tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        assert tensors[0] is not None
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        found = ctx.record.gradients() or [None] * len(ctx.dtypes)
        pairs = zip(found, ctx.dtypes, strict=True)
        return None, *(None if grad is None or dtype is None else grad.to(dtype) for grad, dtype in pairs)


class _Product(torch.autograd.Function):
    """y = W x + b of one step, whose backward pass leaves dW and db to [`_Shared`]."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, record: LoopWeight, x: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        ctx.save_for_backward(x, record.weight)
        return F.linear(x, record.weight, record.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.record.put_aside(x.flatten(0, -2), grad.flatten(0, -2))
        return None, None, grad @ weight if ctx.needs_input_grad[2] else None


class LoopWeightPair(Waiting):
    """The two matrices of W x + U h + b, which have one gradient dy, for as long as one training loop runs."""

    def __init__(self, weights: tuple[torch.Tensor, torch.Tensor], biases: tuple[torch.Tensor, torch.Tensor]):
        super().__init__()
        self.original = weights
        w, u = weights
        self.w, self.u = (weight.detach().to(product_dtype(weight)) for weight in weights)
        self.bias = (biases[0].detach() + biases[1].detach()).to(self.w.dtype)
        self.token = _Shared.apply(self, w, u, *biases)

    def gradients(self) -> tuple[torch.Tensor, ...] | None:
        """dW, dU, db and db again, since each bias has its own."""
        taken = self.take(rounded=True)
        if taken is None:
            return None
        x, h, grad = taken  # [T * B, *]
        of_bias, by_output = grad.sum(0), grad.t()
        return by_output @ x, by_output @ h, of_bias, of_bias.clone()


class _ProductPair(torch.autograd.Function):
    """y = W x + U h + b of one step, whose backward pass leaves dW, dU and db to [`_Shared`]."""

    @staticmethod
    def forward(
        ctx: Any, token: torch.Tensor, record: LoopWeightPair, x: torch.Tensor, h: torch.Tensor
    ) -> torch.Tensor:
        ctx.record = record
        ctx.save_for_backward(x, h, record.w, record.u)
        return F.linear(x, record.w, record.bias).addmm_(h, record.u.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, w, u = ctx.saved_tensors
        ctx.record.put_aside(x, h, grad)
        return None, None, grad @ w if ctx.needs_input_grad[2] else None, grad @ u if ctx.needs_input_grad[3] else None


class LoopMemory(Waiting):
    """Keys or values of a source, [..., S, D], for as long as one loop runs."""

    def __init__(self, memory: torch.Tensor, transposed: bool, dtype: torch.dtype):
        super().__init__()
        self.original, self.transposed = memory, transposed
        narrow = memory.detach().to(dtype)
        self.factor = narrow.transpose(-2, -1) if transposed else narrow
        self.token = _Shared.apply(self, memory)

    def gradients(self) -> tuple[torch.Tensor] | None:
        """dM [..., S, D]."""
        taken = self.take()
        if taken is None:
            return None
        x, grad = taken
        return (grad.transpose(-2, -1) @ x if self.transposed else x.transpose(-2, -1) @ grad,)


class _MemoryProduct(torch.autograd.Function):
    """y = x M or x M^T of one step, whose backward pass leaves dM to [`_Shared`]."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, record: LoopMemory, x: torch.Tensor) -> torch.Tensor:
        ctx.record = record
        ctx.save_for_backward(x, record.factor)
        return product_with_memory(x, record.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        ctx.record.put_aside(x, grad)
        return None, None, product_with_memory(grad, factor.transpose(-2, -1))


class LoopKeys(Waiting):
    """
    Keys of additive attention, [B, S, A], for as long as one loop runs. A step's part of their gradient is as large as
    they are: it is added up where it is made (additive_scores.py), by which also no two of them take memory.
    """

    of_v: tuple[torch.Tensor, torch.Tensor]  # what additive_scores.py makes of the vector v that goes with them

    def __init__(self, keys: torch.Tensor):
        super().__init__()
        self.original, self.keys = keys, keys.detach()
        self.factors: torch.Tensor | None = None  # and of the keys
        self.token = _Shared.apply(self, keys)

    def gradient_so_far(self) -> torch.Tensor | None:
        """[B, S, A] without its scale, to be added to; `None` in the first step, which puts both aside."""
        ours = self.steps and self.task == torch._C._current_graph_task_id()
        return self.steps[0][0] if ours else None

    def gradients(self) -> tuple[torch.Tensor] | None:
        """dK [B, S, A]."""
        taken = self.take()
        if taken is None:
            return None
        grad, scale = taken
        return (grad.mul_(scale),)


class LoopWeights(dict[int, LoopWeight]):
    """The weights of one loop, or of many, by identity. A copy of it is empty."""

    def __init__(self, packed: bool, lasting: bool = False):
        super().__init__()
        self.packed, self.lasting = packed, lasting
        self.screens: dict[int, Any] = {}  # those of `screening.screen_of`
        self.pairs: dict[tuple[int, int], LoopWeightPair] = {}  # those of `linear_pair`
        self.memories: dict[tuple[int, bool], LoopMemory] = {}  # those of `memory_product`
        self.keys_of_loop: dict[int, LoopKeys] = {}  # those of `additive_scores`

    def drop_tokens(self) -> None:
        """
        After the loop. A token knows its node, which knows the record: while that has the token, only Python's
        collector of garbage frees the three, and it comes late to what has lived through a training step.
        """
        kinds = (self, self.pairs, self.memories, self.keys_of_loop)
        for record in (one for records in kinds for one in records.values()):
            record.token = None

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
        lasting.drop_tokens()


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
        dtype = product_dtype(weight)
        # What has a screen makes a first step's scores, and then mostly none.
        spared = id(weight) in weights.screens
        record = weights[id(weight)] = LoopWeight(weight, bias, dtype, weights.packed, weights.lasting, spared)
    if record.token is None:
        return record.product(x)
    return _Product.apply(record.token, record, x.to(record.weight.dtype))


def in_training_loop(*parameters: torch.Tensor) -> bool:
    """Is this a step, on a CPU, of a loop that trains all of them? For such steps there is `linear_pair`."""
    if torch.compiler.is_compiling() or _weights.get() is None or not torch.is_grad_enabled():
        return False
    return all(parameter.requires_grad and parameter.device.type == "cpu" for parameter in parameters)


def linear_pair(
    x: torch.Tensor,
    h: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """
    W x + b + U h + c [B, O] `in_training_loop`, in one tensor that is the caller's to overwrite.

    Args:
        x, h: [B, I] and [B, H].
        weights: W [O, I] and U [O, H].
        biases: b and c, [O] each.
    """
    loop = _weights.get()
    assert loop is not None
    name = (id(weights[0]), id(weights[1]))
    record = loop.pairs.get(name)
    if record is None:
        record = loop.pairs[name] = LoopWeightPair(weights, biases)
    dtype = record.w.dtype
    return _ProductPair.apply(record.token, record, x.to(dtype), h.to(dtype))


def product_dtype(matrix: torch.Tensor) -> torch.dtype:
    """The type in which torch makes products with it, here and now."""
    device_type = matrix.device.type
    autocast = torch.is_autocast_enabled(device_type) and matrix.dtype != torch.float64
    return torch.get_autocast_dtype(device_type) if autocast else matrix.dtype


def memory_product(x: torch.Tensor, memory: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    """
    x M, or x M^T if `transposed`, with keys or values M that are the same tensor in all steps of a loop.

    Args:
        x: [..., R, S], or [..., R, D] if `transposed`; the dimensions before them are those of `memory`.
        memory: [..., S, D].

    Returns:
        [..., R, D], or [..., R, S].
    """
    weights = None if torch.compiler.is_compiling() else _weights.get()
    if weights is None or not (torch.is_grad_enabled() and memory.requires_grad):
        return product_with_memory(x, memory.transpose(-2, -1) if transposed else memory)
    record = weights.memories.get((id(memory), transposed))
    if record is None:
        record = LoopMemory(memory, transposed, product_dtype(memory))
        weights.memories[id(memory), transposed] = record
    return _MemoryProduct.apply(record.token, record, x.to(record.factor.dtype))


def product_with_memory(x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """x M, most often of one row: [..., R, S] and [..., S, D] -> [..., R, D]."""
    if torch.compiler.is_compiling() or x.size(-2) > 1:
        return x @ memory
    return by_vectors(torch.matmul, x, memory)


class StepLinear(nn.Linear):
    """`nn.Linear` for use inside the time loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
