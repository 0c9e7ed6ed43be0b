"""Products with single vectors are as at "highest" whatever is set; rounding up rows changes no result."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_rnn_seq2seq import chunked_loss, step_products
from hf_rnn_seq2seq.chunked_loss import linear_loss
from hf_rnn_seq2seq.onednn_products import by_vectors, rounded_rows
from hf_rnn_seq2seq.step_products import StepLinear, memory_product, shared_by_steps

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


@given(rows=st.integers(0, 5000))
def test_few_numbers_of_rows_stand_for_all(rows: int) -> None:
    narrow = torch.empty(0, dtype=torch.bfloat16)
    assert rows <= rounded_rows(rows, narrow) <= rows + rows / 16
    assert len({rounded_rows(other, narrow) for other in range(rows, 2 * rows)}) <= 33
    for others in (torch.empty(0), torch.empty(0, dtype=torch.float64), torch.empty(0, device="meta")):
        assert rounded_rows(rows, others) == rows


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What has been rounded, and to what."""
    seen: list[tuple[int, int]] = []

    def noted(rows: int, like: torch.Tensor) -> int:
        seen.append((rows, rounded_rows(rows, like)))
        return seen[-1][1]

    for module in (chunked_loss, step_products):
        monkeypatch.setattr(module, "rounded_rows", noted)
    return seen


def test_rounding_changes_neither_loss_nor_gradients(precision: str, rounded: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, requires_grad=True) for size in ((5, 9, 6), (7, 6), (7,)))
    labels = torch.randint(7, (5, 9)).masked_fill(torch.arange(45).view(5, 9) % 9 > 6, -100)
    loss, _ = linear_loss(x, weight, bias, labels, "softmax")
    inputs = (x, weight, bias)
    found = torch.autograd.grad(loss, inputs)
    assert rounded == [(35, 35 if precision == "highest" else 36)]
    plain = torch.nn.functional.cross_entropy((x @ weight.t() + bias).flatten(0, 1).double(), labels.flatten())
    torch.testing.assert_close(loss, plain.float())
    for one, other in zip(found, torch.autograd.grad(plain, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_rounding_changes_no_weights_gradient(precision: str, rounded: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    layer, x = StepLinear(6, 4), torch.randn(7, 5, 6)
    with shared_by_steps():
        steps = [layer(x_t) for x_t in x.unbind(1)]
    torch.stack(steps).square().sum().backward()
    assert set(rounded) == {(35, 35 if precision == "highest" else 36)}
    found = [parameter.grad for parameter in layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
