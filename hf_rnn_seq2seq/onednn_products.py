"""
What to mind where oneDNN makes a CPU's products: those in bfloat16, and those in float32 at a lower
`torch.set_float32_matmul_precision` than "highest".

Its batched products with a single row or column take two to four times as long as MKL's. (Less precise ones would not
be faster: they take the time of reading the matrices.) And it makes a kernel for every shape, in half a millisecond,
as long as a step's product takes, and half a megabyte; it keeps the last 1,024 of them.
"""

from collections.abc import Callable

import torch

# A number of rows is rounded up by less than one in so many.
PARTS = 16


def made_by_onednn(tensor: torch.Tensor) -> bool:
    """Are products with it oneDNN's?"""
    if tensor.device.type != "cpu":
        return False
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return tensor.dtype == torch.bfloat16 or (
        tensor.dtype == torch.float32 and matmul.fp32_precision not in ("ieee", "none")
    )


def rounded_rows(rows: int, like: torch.Tensor) -> int:
    """
    How many rows to make a product with `like` of, for `rows` that differ from batch to batch: up to a sixteenth more,
    so that few numbers stand for all.
    """
    if not made_by_onednn(like):
        return rows
    part = 1 << max(rows.bit_length() - PARTS.bit_length(), 0)
    return -(-rows // part) * part


def by_vectors(product: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """
    product(*tensors), of float32 on a CPU as at "highest".

    Args:
        product: of torch's, such as `torch.bmm`, of matrices with a single row or column.
        tensors: its arguments, all of one type and on one device.
    """
    if tensors[0].dtype != torch.float32 or not made_by_onednn(tensors[0]):
        return product(*tensors)
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        return product(*tensors)
    finally:
        matmul.fp32_precision = before
