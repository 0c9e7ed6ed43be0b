"""
Products of matrices with one vector each, which attention makes at every step of a time loop.

At a lower `torch.set_float32_matmul_precision` than "highest" a CPU's float32 products go to oneDNN, whose batched
ones with a single row or column take two to four times as long as MKL's. Less precise ones would not be faster: they
take the time of reading the matrices.
"""

from collections.abc import Callable

import torch


def by_vectors(product: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """
    product(*tensors), of float32 on a CPU as at "highest".

    Args:
        product: of torch's, such as `torch.bmm`.
        tensors: its arguments, all on one device.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if before in ("ieee", "none") or tensors[0].device.type != "cpu":
        return product(*tensors)
    matmul.fp32_precision = "ieee"
    try:
        return product(*tensors)
    finally:
        matmul.fp32_precision = before
