"""Products with single vectors: as at "highest" whatever is set, which is left as it was."""

import pytest
import torch

from hf_rnn_seq2seq.step_products import memory_product
from hf_rnn_seq2seq.vector_products import by_vectors

MATMUL = torch.backends.mkldnn.matmul


@pytest.fixture(params=["highest", "high", "medium"])
def precision(request: pytest.FixtureRequest) -> str:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_the_setting_is_another_inside_only(precision: str) -> None:
    seen: list[str] = []

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(MATMUL.fp32_precision)
        return x @ y

    outside = MATMUL.fp32_precision
    x, y = torch.randn(3, 1, 4), torch.randn(3, 4, 5)
    torch.testing.assert_close(by_vectors(product, x, y), x @ y)
    assert seen == ["ieee"]
    assert (MATMUL.fp32_precision, torch.get_float32_matmul_precision()) == (outside, precision)


def test_the_setting_comes_back_after_an_error(precision: str) -> None:
    with pytest.raises(RuntimeError):
        by_vectors(torch.bmm, torch.randn(3, 1, 4), torch.randn(3, 5, 4))
    assert torch.get_float32_matmul_precision() == precision


@pytest.mark.parametrize("rows", [1, 2])
def test_one_row_of_attention_is_such_a_product(precision: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(
        "hf_rnn_seq2seq.step_products.by_vectors",
        lambda f, *given: (calls.append(precision), by_vectors(f, *given))[1],
    )
    x, keys = torch.randn(3, rows, 6), torch.randn(3, 5, 6)
    expected = torch.einsum("brd,bsd->brs", x.double(), keys.double()).float()
    torch.testing.assert_close(memory_product(x, keys, transposed=True), expected)
    assert len(calls) == (rows == 1)
