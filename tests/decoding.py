"""What decoding does while a test looks on, and what of it needs a certain CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_rnn_seq2seq import step_products
from hf_rnn_seq2seq.packed_products import has_int8_products

needs_int8 = pytest.mark.skipif(
    not has_int8_products(),
    reason="products of whole numbers are exact, and made, only on a CPU with VNNI and with oneDNN",
)


def count_rows(steps: type[Any], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows these steps read a token for, one after the other from now on."""
    rows: list[int] = []
    original = steps.__call__

    def count(self: Any, tokens: torch.Tensor) -> torch.Tensor:
        rows.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(steps, "__call__", count)
    return rows


def pack_at_once(monkeypatch: pytest.MonkeyPatch, faster: Callable[[torch.dtype, int], bool] | None = None) -> None:
    """
    Every machine packs what can be packed, before its first product.

    Args:
        faster: whether products of a type and number of rows are faster with a packed matrix; by default all are.
    """
    monkeypatch.setattr(step_products, "packed_is_faster", faster or (lambda dtype, rows: True))
    monkeypatch.setattr(step_products, "packing_repaid", lambda dtype, rows: 1.0)


def count_packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all matrices that are packed from now on."""
    sizes: list[int] = []
    original = step_products.pack

    def count(weight: torch.Tensor) -> torch.Tensor:
        sizes.append(weight.numel())
        return original(weight)

    monkeypatch.setattr(step_products, "pack", count)
    return sizes
