"""Token losses against plain Fenchel-Young losses and cross entropy, and the coverage loss against a loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot
from transformers.loss.loss_utils import ForMaskedLMLoss

from hf_rnn_seq2seq.losses import coverage_loss, log_probabilities, token_loss
from hf_rnn_seq2seq.normalizers import NORMALIZERS, SORTED_WHOLE

ALPHA = {"sparsemax": 2.0, "entmax15": 1.5}
MARGIN = {"sparsemax": 1.0, "entmax15": 2.0}
SMALLEST = math.log(torch.finfo(torch.float32).tiny)


def batch(seed: int = 0, vocab_size: int = 11, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [3, 4, V] in float64 and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(3, 4, vocab_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab_size, (3, 4), generator=generator)
    labels[0, 2:] = -100
    labels[2, 0] = -100
    return scores.requires_grad_(), labels


def plain_loss(z: torch.Tensor, gold: int, alpha: float) -> float:
    """
    Omega*(z) + Omega(e_y) - z_y with Omega = -H and Omega(e_y) = 0; Omega*(z), the largest p^T z + H(p), is found at
    the p whose threshold bisection finds.
    """
    z = z - z.max()
    low, high = -1.0, 0.0
    for _ in range(200):
        tau = (low + high) / 2
        p = ((alpha - 1) * z - tau).clamp(min=0) ** (1 / (alpha - 1))
        low, high = (tau, high) if p.sum() > 1 else (low, tau)
    entropy = (p - p**alpha).sum() / (alpha * (alpha - 1))
    return float((p * z).sum() + entropy - z[gold])


def labelled(labels: torch.Tensor) -> list[tuple[int, int]]:
    return [(b, t) for b, row in enumerate(labels.tolist()) for t, label in enumerate(row) if label != -100]


@pytest.mark.parametrize("name", ALPHA)
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_sparse_losses_are_fenchel_young_losses(name: str, scale: float) -> None:
    scores, labels = batch(scale=scale)
    losses = [plain_loss(scores[b, t].detach(), int(labels[b, t]), ALPHA[name]) for b, t in labelled(labels)]
    assert token_loss(scores, labels, name).item() == pytest.approx(sum(losses) / 9, abs=1e-10)
    assert token_loss(scores, labels, name, 7).item() == pytest.approx(sum(losses) / 7, abs=1e-10)
    assert token_loss(scores, labels, name, torch.tensor(20)).item() == pytest.approx(sum(losses) / 20, abs=1e-10)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_gradient_is_weights_minus_gold(name: str) -> None:
    scores, labels = batch()
    (gradient,) = torch.autograd.grad(token_loss(scores, labels, name), scores)
    gold = one_hot(labels.clamp(min=0), scores.size(-1))
    expected = (NORMALIZERS[name](scores.detach(), None) - gold) * (labels != -100).unsqueeze(-1) / 9
    tolerance = 1e-7 if name == "softmax" else 1e-15  # cross entropy is computed in float32
    torch.testing.assert_close(gradient, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ALPHA)
def test_gradients_against_finite_differences(name: str) -> None:
    scores, labels = batch(vocab_size=5)
    assert torch.autograd.gradcheck(lambda z: token_loss(z, labels, name), (scores,))
    assert torch.autograd.gradgradcheck(lambda z: token_loss(z, labels, name, 4), (scores,))


@pytest.mark.parametrize("name", ALPHA)
@given(
    scores=st.lists(st.integers(-400, 400).map(lambda n: n / 100), min_size=1, max_size=8),
    gold=st.integers(0, 7),
    shift=st.sampled_from([0.0, -8.0, 1e4]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(max_examples=200)
def test_sparse_losses_are_never_negative_and_zero_beyond_the_margin(
    name: str, scores: list[float], gold: int, shift: float, dtype: torch.dtype
) -> None:
    gold %= len(scores)
    z = (torch.tensor(scores, dtype=dtype) + shift).view(1, 1, -1)
    loss = token_loss(z, torch.tensor([[gold]]), name).item()
    assert loss >= 0
    assert loss == pytest.approx(
        max(plain_loss(z[0, 0].double(), gold, ALPHA[name]), 0), abs=1e-8 if dtype == torch.float64 else 1e-5
    )
    others = torch.cat([z[0, 0, :gold], z[0, 0, gold + 1 :]])
    if len(others) == 0 or z[0, 0, gold] - others.max() >= MARGIN[name]:
        assert loss == 0
    elif z[0, 0, gold] - others.max() < MARGIN[name] - 0.05:
        assert loss > 0


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("sparsemax", [1.4437832832336426, 0.4437933564186096]),
        ("entmax15", [2.869537591934204, 0.8706287741661072]),
    ],
)
def test_rounding_makes_no_loss_negative(name: str, scores: list[float]) -> None:
    """Just below the margin: the terms of these two sum to -3e-8 in float32."""
    assert token_loss(torch.tensor([[scores]]), torch.tensor([[0]]), name).item() >= 0


@pytest.mark.parametrize("name", ALPHA)
def test_large_scores_and_large_vocabularies(name: str) -> None:
    scores, labels = batch(vocab_size=SORTED_WHOLE + 500, scale=1.0)
    scores, shifted = scores.detach().float().requires_grad_(), (scores.detach() + 1e4).float()
    losses = [plain_loss(scores[b, t].detach().double(), int(labels[b, t]), ALPHA[name]) for b, t in labelled(labels)]
    loss = token_loss(scores, labels, name)
    assert loss.item() == pytest.approx(sum(losses) / 9, rel=1e-6)
    assert token_loss(shifted, labels, name).item() == pytest.approx(loss.item(), rel=1e-3)  # float32 holds 1e-3 there
    (gradient,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(3, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_that_of_transformers(dtype: torch.dtype) -> None:
    scores, labels = batch()
    scores = scores.detach().to(dtype)
    for number in (None, 5, torch.tensor(12)):
        expected = ForMaskedLMLoss(scores, labels, vocab_size=11, num_items_in_batch=number)  # type: ignore[arg-type]
        assert torch.equal(token_loss(scores, labels, "softmax", number), expected)
    plain = cross_entropy(scores.float().flatten(0, 1), labels.flatten())
    assert token_loss(scores, labels, "softmax").item() == pytest.approx(plain.item(), abs=1e-6)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_parts_of_an_accumulated_batch_add_up(name: str) -> None:
    """The rows have 2, 4 and 3 labels, so that a mean of means would be another number."""
    scores, labels = batch()
    whole = token_loss(scores, labels, name)
    number = (labels != -100).sum()
    parts = [token_loss(scores[b : b + 1], labels[b : b + 1], name, number) for b in range(3)]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, atol=1e-6, rtol=0)
    (expected,) = torch.autograd.grad(whole, scores)
    (gradient,) = torch.autograd.grad(total, scores)
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_ignored_labels_do_nothing(name: str) -> None:
    scores, labels = batch()
    (gradient,) = torch.autograd.grad(token_loss(scores, labels, name), scores)
    assert (gradient[labels == -100] == 0).all()
    changed = scores.detach().clone()
    changed[labels == -100] = 77.0
    torch.testing.assert_close(token_loss(changed, labels, name), token_loss(scores, labels, name).detach())


@pytest.mark.parametrize("name", ALPHA)
def test_without_any_label_the_sparse_losses_are_zero(name: str) -> None:
    scores, labels = batch()
    for number in (None, 3):
        loss = token_loss(scores, torch.full_like(labels, -100), name, number)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, scores)
        assert (gradient == 0).all()


def test_without_any_label_cross_entropy_is_as_in_transformers() -> None:
    scores, labels = batch()
    labels = torch.full_like(labels, -100)
    assert token_loss(scores, labels, "softmax").isnan()  # a mean over nothing
    assert token_loss(scores, labels, "softmax", 3).item() == 0


@pytest.mark.parametrize("name", NORMALIZERS)
def test_bfloat16_scores_have_a_loss_in_float32(name: str) -> None:
    scores, labels = batch()
    half = scores.detach().bfloat16().requires_grad_()
    loss = token_loss(half, labels, name)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, token_loss(half.float(), labels, name))
    (gradient,) = torch.autograd.grad(loss, half)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NORMALIZERS)
def test_compiled_in_one_graph(name: str) -> None:
    scores, labels = batch()
    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        compiled = torch.compile(token_loss, fullgraph=True, backend=backend)(scores, labels, name)
        expected = token_loss(scores, labels, name)
        torch.testing.assert_close(compiled, expected)
        (gradient,) = torch.autograd.grad(compiled, scores)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NORMALIZERS)
def test_labels_and_number_may_be_on_another_device(name: str) -> None:
    scores, labels = batch()
    expected = token_loss(scores, labels, name, torch.tensor(5))
    assert token_loss(scores.cuda(), labels, name, torch.tensor(5)).cpu().item() == pytest.approx(
        expected.item(), abs=1e-6
    )


def test_log_probabilities() -> None:
    scores = torch.tensor([[[3.0, 2.7, -4.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(log_probabilities(scores, "softmax"), torch.log_softmax(scores, -1))
    for name in ALPHA:
        logs = log_probabilities(scores, name)
        weights = NORMALIZERS[name](scores, None)
        assert weights[0, 0, 2] == 0
        assert logs[0, 0, 2].item() == pytest.approx(SMALLEST)
        torch.testing.assert_close(logs[weights > 0], weights[weights > 0].log())
    for name in NORMALIZERS:
        assert log_probabilities(scores.bfloat16(), name).dtype == torch.float32
        assert log_probabilities(1e4 * scores, name).isfinite().all()


@pytest.mark.parametrize("name", ALPHA)
def test_same_as_the_authors_package(name: str) -> None:
    package = pytest.importorskip("entmax")
    scores, labels = batch()
    keep = labels != -100
    expected = getattr(package, f"{name}_loss")(scores[keep], labels[keep]).mean()
    loss = token_loss(scores, labels, name)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (loss, expected)), atol=1e-12, rtol=0)


def attention(seed: int, heads: int, target: int, source: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, target, source, generator=generator, dtype=dtype).mul(2).softmax(-1)


def plain_coverage(weights: torch.Tensor, labels: torch.Tensor) -> float:
    """The sum over labelled steps, by loops."""
    batch_size, heads, target, source = weights.shape
    total = 0.0
    for b in range(batch_size):
        for head in range(heads):
            coverage = [0.0] * source
            for t in range(target):
                for s in range(source):
                    a = weights[b, head, t, s].item()
                    if labels[b, t] != -100:
                        total += min(a, coverage[s]) / heads
                    coverage[s] += a
    return total


@given(
    seed=st.integers(0, 1000),
    heads=st.integers(1, 3),
    source=st.integers(1, 5),
    labels=st.integers(1, 5).flatmap(
        lambda t: st.lists(st.lists(st.sampled_from([-100, 4]), min_size=t, max_size=t), min_size=2, max_size=2)
    ),
)
@settings(max_examples=60)
def test_coverage_loss_is_that_of_a_loop(seed: int, heads: int, source: int, labels: list[list[int]]) -> None:
    targets = torch.tensor(labels)
    weights = attention(seed, heads, targets.size(1), source)
    total = plain_coverage(weights, targets)
    count = max(int((targets != -100).sum()), 1)
    assert coverage_loss(weights, targets).item() == pytest.approx(total / count, abs=1e-12)
    assert coverage_loss(weights, targets, 7).item() == pytest.approx(total / 7, abs=1e-12)
    assert coverage_loss(weights, targets, torch.tensor(3)).item() == pytest.approx(total / 3, abs=1e-12)


def test_coverage_loss_of_one_place_twice_and_of_none_twice() -> None:
    labels = torch.ones(1, 3, dtype=torch.long)
    assert coverage_loss(torch.eye(3).view(1, 1, 3, 3), labels).item() == 0
    stuck = torch.zeros(1, 1, 3, 3)
    stuck[..., 0] = 1
    assert coverage_loss(stuck, labels).item() == pytest.approx(2 / 3)  # all but the first step repeat


def test_coverage_loss_gradient_and_types() -> None:
    labels = torch.tensor([[4, 5, -100, 6], [4, -100, -100, -100]])
    weights = attention(0, 2, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: coverage_loss(a, labels), (weights,))
    half = coverage_loss(weights.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(coverage_loss(weights, labels).item(), rel=0.02)
