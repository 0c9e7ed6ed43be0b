"""What is measured of packed products, and what follows from it."""

import math
from collections.abc import Iterator

import pytest
import torch
from decoding import needs_int8

from hf_rnn_seq2seq import packed_products
from hf_rnn_seq2seq.packed_products import (
    Int8Product,
    can_be_packed,
    pack,
    packed_is_faster,
    packed_product,
    packing_repaid,
    rough_is_faster,
    saved_by_int8,
)

WIDE, NARROW = torch.float32, torch.bfloat16


Gains = dict[tuple[int, torch.dtype, torch.dtype], float]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gains]:
    """
    How many times as fast a packed product is, by rows, its type and its rival's, 1 by default: as a plain one of the
    same type, or as a packed one of another. To pack takes as long as 8 packed products.
    """
    gains: Gains = {}

    def fastest(*contestants: object) -> list[float]:
        one, other, *packing = (contestant() for contestant in contestants)  # type: ignore[operator]
        assert one.shape == other.shape == (len(one), packed_products.MEASURED[0])
        gain = gains.setdefault((len(one), one.dtype, other.dtype), 1.0)
        return [gain, 1.0, 8.0] if packing else [1.0, gain]

    monkeypatch.setattr(packed_products, "fastest_seconds", fastest)
    forget()
    yield gains
    forget()


def forget() -> None:
    for measurement in (packed_products._rough_gain, packed_products._packing):
        measurement.cache_clear()


def test_rows_are_measured_once_by_powers_of_two(measured: Gains) -> None:
    for rows in (1, 2, 3, 4, 17, 32, 33, 64, 65, 1000, 1):
        assert packed_is_faster(WIDE, rows)
    assert list(measured) == [(rows, WIDE, WIDE) for rows in (1, 2, 4, 32, 64)]
    packed_is_faster(NARROW, 1)
    assert list(measured)[-1] == (1, NARROW, NARROW)


def test_only_a_plain_product_that_is_clearly_faster_is_taken(measured: Gains) -> None:
    """And what of packing a product repays."""
    measured |= {(1, WIDE, WIDE): 0.5, (2, WIDE, WIDE): 0.95, (4, WIDE, WIDE): 3.0}
    assert [packed_is_faster(WIDE, rows) for rows in (1, 2, 4)] == [False, True, True]
    assert [packing_repaid(WIDE, rows) for rows in (1, 2, 3)] == [0.0, 0.0, 2 / 8]


@pytest.mark.parametrize(
    ("of_narrow", "of_packed", "expected"),
    [(1.5, 1.0, True), (1.1, 3.0, False), (0.6, 1.0, False), (1.5, 0.6, False), (3.0, 0.6, True)],
)
def test_rough_products_have_to_beat_both_exact_ones(
    measured: Gains, of_narrow: float, of_packed: float, expected: bool
) -> None:
    measured |= {(8, NARROW, WIDE): of_narrow, (8, WIDE, WIDE): of_packed}
    assert rough_is_faster(8) == expected


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_both_kinds_are_measured_for_real(rows: int) -> None:
    forget()
    assert packed_is_faster(WIDE, rows) in (True, False)
    assert 0 <= packing_repaid(WIDE, rows) < 100
    assert rough_is_faster(rows) in (True, False)
    assert packed_products._packing.cache_info().currsize == packed_products._rough_gain.cache_info().currsize == 1


@needs_int8
def test_products_of_whole_numbers_are_exact() -> None:
    torch.manual_seed(0)
    weight = torch.randint(-127, 128, (70, 515), dtype=torch.int8)
    scale, bias = torch.rand(70), torch.randn(70)
    bias[3] = -torch.inf
    product = Int8Product(weight, scale, bias)
    for rows in (1, 5, 64):
        x = torch.randint(1, 256, (rows, 515), dtype=torch.uint8)
        expected = (x.double() - 128) @ weight.double().T * 0.25 * scale.double() + bias.double()
        torch.testing.assert_close(product(x, 0.25).double(), expected, rtol=1e-6, atol=1e-3)


@needs_int8
def test_what_whole_numbers_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Is measured once for some rows, by the faster of the exact products, and grows with rows and matrix."""
    calls: list[tuple[int, ...]] = []

    def fastest(*contestants: object) -> list[float]:
        results = [contestant() for contestant in contestants]  # type: ignore[operator]
        assert (results[0] == (1 - 128) * packed_products.MEASURED_WORDS[1] + 1).all()
        assert torch.equal(results[1], results[2])
        calls.append(tuple(results[0].shape))
        return [1.0, 5.0, 4.0]

    monkeypatch.setattr(packed_products, "fastest_seconds", fastest)
    packed_products._int8_and_float32.cache_clear()
    try:
        size = math.prod(packed_products.MEASURED_WORDS)
        assert saved_by_int8(3, size) == saved_by_int8(4, size) == 3.0
        assert saved_by_int8(64, 2 * size) == 6.0
        assert saved_by_int8(128, size // 2) == 3.0
        assert calls == [(4, packed_products.MEASURED_WORDS[0]), (64, packed_products.MEASURED_WORDS[0])]
    finally:
        packed_products._int8_and_float32.cache_clear()


@needs_int8
def test_it_is_measured_for_real() -> None:
    packed_products._int8_and_float32.cache_clear()
    assert -1 < saved_by_int8(8, 2**20) < 1


def test_what_can_be_packed() -> None:
    weight = torch.randn(512, 512)
    torch.testing.assert_close(packed_product(weight[:3], pack(weight)), weight[:3] @ weight.T, atol=1e-3, rtol=1e-4)
    assert can_be_packed(weight)
    assert not can_be_packed(weight[:500])
    assert not can_be_packed(weight.double())
    assert not can_be_packed(weight.half())
    assert not can_be_packed(weight.to("meta"))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not can_be_packed(weight)
