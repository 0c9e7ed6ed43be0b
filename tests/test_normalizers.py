"""Softmax, sparsemax and entmax15 against thresholds found by bisection, and their Jacobians."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rnn_seq2seq.configuration_rnn_seq2seq import NormalizerType
from hf_rnn_seq2seq.normalizers import NORMALIZERS, SORTED_FIRST, SORTED_WHOLE, entmax15, softmax, sparsemax

ALPHA = {"softmax": 1.0, "sparsemax": 2.0, "entmax15": 1.5}
SPARSE = ["sparsemax", "entmax15"]
LARGE = SORTED_WHOLE + 500


def bisected(scores: np.ndarray, alpha: float) -> np.ndarray:
    """alpha-entmax of one row: p_i = max((alpha - 1) z_i - tau, 0)^(1 / (alpha - 1)), tau by bisection, sum p = 1."""
    if alpha == 1:
        exponentials = np.exp(scores - scores.max())
        return exponentials / exponentials.sum()
    z = (alpha - 1) * (scores - scores.max())
    low, high = -1.0, 0.0
    for _ in range(100):
        middle = (low + high) / 2
        if (np.maximum(z - middle, 0) ** (1 / (alpha - 1))).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(z - low, 0) ** (1 / (alpha - 1))


def plain_rows(scores: torch.Tensor, mask: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """`bisected`, row by row, over the entries that the mask leaves."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    size = scores.size(-1)
    result = np.zeros((scores.numel() // size, size))
    rows = zip(result, scores.reshape(-1, size).double().numpy(), mask.reshape(-1, size).numpy(), strict=True)
    for row, z, m in rows:
        if m.any():
            row[m] = bisected(z[m], alpha)
    return torch.from_numpy(result).reshape(scores.shape)


def on_support(scores: torch.Tensor, support: torch.Tensor, name: str) -> torch.Tensor:
    """One row, from the threshold's closed form on a known support, in operations that autograd knows."""
    z = scores[support]
    if name == "softmax":
        p = torch.exp(z) / torch.exp(z).sum()
    elif name == "sparsemax":
        p = z - (z.sum() - 1) / len(z)
    else:
        z = z / 2
        distances = ((z - z.mean()) ** 2).sum()
        p = (z - z.mean() + torch.sqrt((1 - distances) / len(z))) ** 2
    return torch.zeros_like(scores).masked_scatter(support, p)


def test_the_dictionary_has_the_configurations_values() -> None:
    assert tuple(NORMALIZERS) == get_args(NormalizerType)


@st.composite
def masked_scores(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores of two or three dimensions, of very different sizes, some of them equal, with any mask or none."""
    shape = [*draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)), draw(st.integers(1, 9))]
    scale = draw(st.sampled_from([1e-3, 0.3, 1.0, 5.0, 1e4]))
    values = st.integers(-100, 100).map(lambda n: scale * n / 100) | st.sampled_from([0.0, scale])
    count = math.prod(shape)
    scores = torch.tensor(draw(st.lists(values, min_size=count, max_size=count)), dtype=torch.float64).view(shape)
    if draw(st.booleans()):
        return scores, None
    mask_shape = [1 if draw(st.booleans()) else size for size in shape[:-1]] + shape[-1:]
    count = math.prod(mask_shape)
    return scores, torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count))).view(mask_shape)


@pytest.mark.parametrize("name", NORMALIZERS)
@given(inputs=masked_scores())
@settings(max_examples=150)
def test_weights_are_those_found_by_bisection(name: str, inputs: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    scores, mask = inputs
    weights = NORMALIZERS[name](scores, mask)
    torch.testing.assert_close(weights, plain_rows(scores, mask, ALPHA[name]), atol=1e-12, rtol=0)
    visible = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.expand_as(scores)
    assert (weights[~visible] == 0).all()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), visible.any(-1).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", NORMALIZERS)
@given(inputs=masked_scores(), shift=st.sampled_from([-(2.0**20), -8.0, 0.5, 2.0**14]))
@settings(max_examples=50)
def test_a_shift_of_the_scores_changes_nothing(
    name: str, inputs: tuple[torch.Tensor, torch.Tensor | None], shift: float
) -> None:
    scores, mask = inputs
    shifted = NORMALIZERS[name](scores + shift, mask)
    torch.testing.assert_close(shifted, NORMALIZERS[name](scores, mask), atol=1e-8, rtol=0)


def test_values_worked_out_by_hand() -> None:
    torch.testing.assert_close(sparsemax(torch.tensor([1.0, 0.5, 0.0]), None), torch.tensor([0.75, 0.25, 0.0]))
    # a^2 + (a - 1/2)^2 = 1 for scores 1 and 0
    a = (1 + math.sqrt(7)) / 4
    torch.testing.assert_close(entmax15(torch.tensor([1.0, 0.0]), None), torch.tensor([a**2, (a - 0.5) ** 2]))
    torch.testing.assert_close(softmax(torch.tensor([math.log(3), 0.0]), None), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_one_entry_and_equal_entries(name: str) -> None:
    normalize = NORMALIZERS[name]
    assert normalize(torch.tensor([[-3e4], [7.0]]), None).tolist() == [[1.0], [1.0]]
    for size in (2, 3, 7, LARGE):
        equal = normalize(torch.full((2, size), 123.4), None)
        torch.testing.assert_close(equal, torch.full((2, size), 1 / size), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("name", "margin"), [("sparsemax", 1.0), ("entmax15", 2.0)])
def test_the_margin_from_which_on_one_entry_has_all(name: str, margin: float) -> None:
    scores = torch.tensor([margin, 0.0, -5.0], dtype=torch.float64)
    assert NORMALIZERS[name](scores, None).tolist() == [1.0, 0.0, 0.0]
    below = NORMALIZERS[name](scores - torch.tensor([1e-3, 0.0, 0.0]), None)
    assert 0 < below[1] < below[0] < 1
    assert below[2] == 0


def test_the_three_differ_in_how_sparse_they_are() -> None:
    scores = torch.tensor([1.2, 0.9, 0.0, -0.6, -5.0])
    assert [int((normalize(scores, None) > 0).sum()) for normalize in NORMALIZERS.values()] == [5, 2, 3]


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(4, 30, generator=generator)).to(dtype).requires_grad_()
    mask = torch.rand(4, 30, generator=generator) > 0.3
    weights = NORMALIZERS[name](scores, mask)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, NORMALIZERS[name](scores.float(), mask))
    (gradient,) = torch.autograd.grad(weights.square().sum(), scores)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("name", NORMALIZERS)
def test_gradients_against_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = (1.5 * torch.randn(3, 4, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(3, 1, 7, generator=generator) > 0.3
    mask[1] = False
    for m in (mask, None):
        assert torch.autograd.gradcheck(lambda z, m=m: NORMALIZERS[name](z, m), (scores,))
        assert torch.autograd.gradgradcheck(lambda z, m=m: NORMALIZERS[name](z, m), (scores,))


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("size", [6, LARGE])
def test_jacobian_is_that_of_the_closed_form_on_the_support(name: str, size: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for scale in (0.2, 1.0, 3.0):
        scores = scale * torch.randn(size, generator=generator, dtype=torch.float64)
        support = torch.from_numpy(bisected(scores.numpy(), ALPHA[name]) > 0)
        outputs = torch.randn(3, size, generator=generator, dtype=torch.float64)  # enough rows of J^T v
        z, plain = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        weights, expected = NORMALIZERS[name](z, None), on_support(plain, support, name)
        for v in outputs:
            (gradient,) = torch.autograd.grad(weights, z, v, retain_graph=True)
            (plain_gradient,) = torch.autograd.grad(expected, plain, v, retain_graph=True)
            torch.testing.assert_close(gradient, plain_gradient, atol=1e-10, rtol=1e-10)
            assert (gradient[~support] == 0).all()


@pytest.mark.parametrize("name", NORMALIZERS)
def test_rows_without_entries_give_zeros_and_zero_gradients(name: str) -> None:
    scores = torch.tensor([[1.0, 2.0, -1e4], [3.0, 1e4, 5.0]], requires_grad=True)
    mask = torch.tensor([[False, False, False], [True, False, True]])
    weights = NORMALIZERS[name](scores, mask)
    assert weights[0].tolist() == [0.0, 0.0, 0.0]
    assert weights[1, 1] == 0
    (gradient,) = torch.autograd.grad((weights * torch.tensor([1.0, 2.0, 3.0])).sum(), scores)
    assert gradient[0].tolist() == [0.0, 0.0, 0.0]
    assert gradient[1, 1] == 0
    assert gradient.isfinite().all()
    assert NORMALIZERS[name](torch.zeros(0, LARGE), None).shape == (0, LARGE)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_huge_scores(name: str) -> None:
    scores = torch.tensor([[1e4, -1e4, 1e4, 0.0], [-1e4, -1e4, -1e4 - 3000, -1e30]], requires_grad=True)
    weights = NORMALIZERS[name](scores, None)
    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    assert (weights[expected == 0] == 0).all()
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), scores)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 1.0, 30.0])
def test_large_vocabularies(name: str, scale: float) -> None:
    """Few and many entries above the first bound, and an outlier over many almost equal scores, which rounds worst."""
    generator = torch.Generator().manual_seed(3)
    scores = scale * torch.randn(3, 20_000, generator=generator)
    scores[1, 17] = 0.95 if name == "sparsemax" else 1.9
    expected = plain_rows(scores, None, ALPHA[name])
    if scale == 0:
        assert (expected[0] > 0).sum() > SORTED_FIRST
    torch.testing.assert_close(NORMALIZERS[name](scores.double(), None), expected, atol=1e-12, rtol=0)
    single = NORMALIZERS[name](scores, None)
    torch.testing.assert_close(single.double(), expected, atol=2e-6, rtol=0)
    rounding = scores.size(-1) * torch.finfo(torch.float32).eps / 2  # of each entry's distance from the threshold
    torch.testing.assert_close(single.double().sum(-1), torch.ones(3, dtype=torch.float64), atol=rounding, rtol=0)


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("size", [4, LARGE])
def test_not_a_number_stays_one(name: str, size: int) -> None:
    scores = torch.zeros(2, size)
    scores[0, 1] = math.nan
    weights = NORMALIZERS[name](scores, None)
    assert weights[0].isnan().all()
    assert weights[1].isfinite().all()


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("size", [9, LARGE])
def test_compiled_in_one_graph(name: str, size: int) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(3, size, generator=generator, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, size, generator=generator) > 0.3
    outputs = torch.randn(3, size, generator=generator, dtype=torch.float64)
    compiled = torch.compile(NORMALIZERS[name], fullgraph=True, backend="eager")
    weights, expected = compiled(scores, mask), NORMALIZERS[name](scores, mask)
    torch.testing.assert_close(weights, expected, atol=1e-14, rtol=0)
    (gradient,) = torch.autograd.grad(weights, scores, outputs)
    (expected_gradient,) = torch.autograd.grad(expected, scores, outputs)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", SPARSE)
def test_same_as_the_authors_package(name: str) -> None:
    package = pytest.importorskip("entmax")
    generator = torch.Generator().manual_seed(5)
    for size in (1, 5, LARGE):
        scores = torch.randn(4, size, generator=generator, dtype=torch.float64, requires_grad=True)
        outputs = torch.randn(4, size, generator=generator, dtype=torch.float64)
        weights, expected = NORMALIZERS[name](scores, None), getattr(package, name)(scores)
        torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)
        (gradient,) = torch.autograd.grad(weights, scores, outputs)
        (expected_gradient,) = torch.autograd.grad(expected, scores, outputs)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-10, rtol=0)
