"""What decoding does while a test looks on, and what of it needs a certain CPU."""

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


def count_packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all matrices that are packed from now on."""
    sizes: list[int] = []
    original = step_products.pack

    def count(weight: torch.Tensor) -> torch.Tensor:
        sizes.append(weight.numel())
        return original(weight)

    monkeypatch.setattr(step_products, "pack", count)
    return sizes
