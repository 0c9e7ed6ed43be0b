"""
Matrices in the layout that oneDNN's products want, and whether their products are faster on this CPU.

That depends on the number of rows, and on the processor. Of one row a product takes the time of reading the matrix,
and in bfloat16 half of it. On AMD's Zen 4 a packed matrix is then read in a fifth of the time that torch's usual
product (MKL's) takes, on Intel's processors in up to twice the time. Of many rows a product is bound by arithmetic: in
bfloat16 twice as fast on one CPU, slower than in float32 on another with the same flags. So it is measured. Products
of whole numbers of eight bits are the fastest on both, but to pack a matrix for them takes as long as many products.

Shapes: O output, I input.
"""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .timing import fastest_seconds

# Matrices with fewer numbers are not worth oneDNN's longer call.
PACKED_SIZE = 2**18
# What is measured: products with this matrix, of 1, 2, 4, ... and MOST_ROWS rows, which stand for more, too.
MEASURED = (2048, 512)
# The same where whole numbers are one side: a vocabulary's matrix, which no cache holds.
MEASURED_WORDS = (4096, 512)
MOST_ROWS = 64
# How many times as fast as its rival something is that is worth a change of the last digit.
LEAST_GAIN = 1.1


def onednn_is_on() -> bool:
    onednn = torch.backends.mkldnn
    return bool(onednn.is_available() and onednn.enabled)


def can_be_packed(weight: torch.Tensor) -> bool:
    """Whether oneDNN is there for a matrix of this kind, and it is not too small."""
    if type(weight) not in (torch.Tensor, nn.Parameter) or not weight.is_cpu or weight.numel() < PACKED_SIZE:
        return False
    if not onednn_is_on():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [O, I] that `can_be_packed` in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def packed_product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """W x + b [..., O], x [..., I] of the type that W had when `pack` made `packed` of it."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def has_int8_products() -> bool:
    """Whether oneDNN makes products of whole numbers by the CPU's own instructions, which add them up exactly."""
    return onednn_is_on() and bool(torch.cpu._is_vnni_supported())


class Int8Product:
    """
    (x - 128) W^T of whole numbers, times scales, plus a bias: W int8 [O, I], each of its rows with a scale [O].

    All is exact but for the last two steps, which are in float32.
    """

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor):
        self.packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self.scale, self.bias = scale, bias
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)

    def __call__(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """x uint8 [R, I] and its scale -> float32 [R, O]"""
        return torch.ops.onednn.qlinear_pointwise.default(
            x, scale, 128, self.packed, self.scale, self.zeros, self.bias, 1.0, 0, torch.float32, "none", [], ""
        )


def packed_is_faster(dtype: torch.dtype, rows: int) -> bool:
    """Whether products of so many rows are to be made by `packed_product`."""
    plain, packed, _ = _packing(dtype, _measured(rows), torch.get_num_threads())
    return plain / packed > 1 / LEAST_GAIN


def packing_repaid(dtype: torch.dtype, rows: int) -> float:
    """The part of the time to `pack` a matrix that one product of so many rows takes less with it."""
    plain, packed, packing = _packing(dtype, _measured(rows), torch.get_num_threads())
    return max(plain - packed, 0.0) / packing


def rough_is_faster(rows: int) -> bool:
    """Whether products of so many rows take less time in bfloat16 than in float32, each made as fast as it can be."""
    rows, threads = _measured(rows), torch.get_num_threads()
    plain, packed, _ = _packing(torch.float32, rows, threads)
    gain = _rough_gain(rows, threads)
    return gain > LEAST_GAIN and gain * plain / packed > LEAST_GAIN


def saved_by_int8(rows: int, numel: int) -> float:
    """
    Seconds that a product of so many rows with a matrix of so many numbers takes less if all are whole numbers of
    eight bits than in float32, made as fast as it can be.
    """
    whole, exact = _int8_and_float32(_measured(rows), torch.get_num_threads())
    return (exact - whole) * max(rows / MOST_ROWS, 1) * numel / (MEASURED_WORDS[0] * MEASURED_WORDS[1])


def _measured(rows: int) -> int:
    """The number of rows that stands for so many, of a few."""
    return min(1 << max(rows - 1, 0).bit_length(), MOST_ROWS)


@functools.cache
def _packing(dtype: torch.dtype, rows: int, threads: int) -> list[float]:
    """Seconds of a product with a matrix as it is, with a packed one, and of packing it. Measured once a process."""
    x, weight = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, MEASURED[1]), MEASURED))
    packed = pack(weight)
    return fastest_seconds(lambda: F.linear(x, weight), lambda: packed_product(x, packed), lambda: pack(weight))


@functools.cache
def _rough_gain(rows: int, threads: int) -> float:
    """How many times as fast packed products are in bfloat16 as in float32. Measured once a process."""

    def product(dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        x, weight = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((rows, MEASURED[1]), MEASURED))
        if not can_be_packed(weight):
            return lambda: F.linear(x, weight)
        packed = pack(weight)
        return lambda: packed_product(x, packed)

    rough, exact = fastest_seconds(product(torch.bfloat16), product(torch.float32))
    return exact / rough


@functools.cache
def _int8_and_float32(rows: int, threads: int) -> tuple[float, float]:
    """Seconds of a product with a matrix like `MEASURED_WORDS`. Measured once a process."""
    outputs, width = MEASURED_WORDS
    make = functools.partial(torch.ones, dtype=torch.float32, device="cpu")
    weight, x = make(MEASURED_WORDS), make(rows, width)
    int8 = Int8Product(weight.to(torch.int8), make(outputs), make(outputs))
    packed, whole = pack(weight), x.to(torch.uint8)
    seconds = fastest_seconds(lambda: int8(whole, 1.0), lambda: packed_product(x, packed), lambda: F.linear(x, weight))
    return seconds[0], min(seconds[1:])
