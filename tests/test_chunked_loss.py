"""The loss without all scores in memory against the loss with them: values, gradients, and who asks for which."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.loss.loss_utils import ForMaskedLMLoss

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, chunked_loss
from hf_rnn_seq2seq.chunked_loss import linear_loss
from hf_rnn_seq2seq.heads import HeadInput
from hf_rnn_seq2seq.losses import IGNORED, smoothing_loss, token_loss
from hf_rnn_seq2seq.normalizers import NORMALIZERS
from tests.models import CONFIGURATIONS, batch_of, name_of, ragged_batch, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
EVERY_NORMALIZER = pytest.mark.parametrize("normalizer", NORMALIZERS)
LABELS = torch.tensor([[4, 5, 2, -100], [7, 2, -100, -100], [8, 9, 3, 2]])


def tensors(
    vocab_size: int = 11, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (3, 4)
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, weight and bias; labels, some of them ignored."""
    torch.manual_seed(0)
    shapes = [(*shape, 5), (vocab_size, 5), (vocab_size,)]
    inputs = [torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in shapes]
    labels = torch.randint(0, vocab_size, shape).masked_fill(torch.rand(shape) < 0.3, IGNORED)
    return inputs, labels


def plain_loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    normalizer: str,
    num_items: torch.Tensor | int | None,
    smoothing: float,
) -> torch.Tensor:
    scores = F.linear(x, weight, bias)
    if normalizer == "softmax":  # transformers' would compute in float32
        total = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = total / ((labels != IGNORED).sum() if num_items is None else num_items)
    else:
        loss = token_loss(scores, labels, normalizer, num_items)
    return loss + smoothing * smoothing_loss(scores, labels, scores.size(-1), num_items)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few positions at once."""
    monkeypatch.setattr(chunked_loss, "LEAST_POSITIONS", 1)
    monkeypatch.setattr(chunked_loss, "SCORES_AT_ONCE", 40)


@EVERY_NORMALIZER
@settings(max_examples=25)
@given(
    vocab_size=st.integers(2, 12),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    least=st.integers(1, 30),
    num_items=st.sampled_from([None, 7, torch.tensor(20)]),
    smoothing=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, -2.5]),
)
def test_equals_the_loss_of_all_scores(
    normalizer: str,
    vocab_size: int,
    shape: tuple[int, int],
    least: int,
    num_items: torch.Tensor | int | None,
    smoothing: float,
    scale: float,
) -> None:
    inputs, labels = tensors(vocab_size, shape=shape)
    labels[0, 0] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "LEAST_POSITIONS", least)
        patch.setattr(chunked_loss, "SCORES_AT_ONCE", 1)
        loss, smoothed = linear_loss(*inputs, labels, normalizer, num_items, smoothing)
        found = torch.autograd.grad(scale * loss, inputs)
    expected = plain_loss(*inputs, labels, normalizer, num_items, smoothing)
    torch.testing.assert_close(loss, expected, **EXACT)
    for one, other in zip(found, torch.autograd.grad(scale * expected, inputs), strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    if smoothing == 0:
        assert smoothed is None
    else:
        assert smoothed is not None
        assert not smoothed.requires_grad
        torch.testing.assert_close(
            smoothed, smoothing_loss(F.linear(*inputs), labels, vocab_size, num_items).detach(), **EXACT
        )


@EVERY_NORMALIZER
def test_gradients_against_finite_differences(normalizer: str) -> None:
    inputs, labels = tensors(5)
    assert torch.autograd.gradcheck(lambda *args: linear_loss(*args, labels, normalizer, None, 0.1)[0], inputs)


def test_differentiating_twice_is_refused() -> None:
    inputs, labels = tensors()
    loss = linear_loss(*inputs, labels, "softmax")[0]
    with pytest.raises(RuntimeError, match=r"`skip_logits=True` can't be differentiated twice"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)


@EVERY_NORMALIZER
def test_without_labels(normalizer: str) -> None:
    """NaN for cross entropy, as in transformers, and zero for the others; with a number of items zero for all."""
    inputs, labels = tensors()
    empty = torch.full_like(labels, IGNORED)
    mean = linear_loss(*inputs, empty, normalizer)[0]
    assert mean.isnan() if normalizer == "softmax" else mean == 0
    loss = linear_loss(*inputs, empty, normalizer, 3)[0]
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, inputs))


def test_only_what_is_wanted_has_a_gradient() -> None:
    (x, weight, bias), labels = tensors()
    with torch.no_grad():
        assert not linear_loss(x, weight, bias, labels, "softmax")[0].requires_grad
    loss = linear_loss(x.detach(), weight, bias.detach(), labels, "softmax")[0]
    (gradient,) = torch.autograd.grad(loss, weight)
    (expected,) = torch.autograd.grad(plain_loss(x, weight, bias, labels, "softmax", None, 0.0), weight)
    torch.testing.assert_close(gradient, expected, **EXACT)


@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_float32_and_its_scaled_gradients(scale: float) -> None:
    """On a CPU the bias is added in a pass of its own, and a gradient times one is handed on as it is."""
    inputs, labels = tensors(dtype=torch.float32)
    loss, _ = linear_loss(*inputs, labels, "softmax")
    expected = plain_loss(*inputs, labels, "softmax", None, 0.0)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(scale * loss, inputs)
    for one, other in zip(found, torch.autograd.grad(scale * expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_three_times_backward_through_one_loss_adds_up() -> None:
    inputs, labels = tensors()
    loss = linear_loss(*inputs, labels, "softmax")[0]
    loss.backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in inputs if tensor.grad is not None]
    loss.backward(retain_graph=True)
    loss.backward()
    for tensor, gradient in zip(inputs, once, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * gradient)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_summed_in_float32(autocast: bool, parts: None) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs, labels = tensors(dtype=dtype, shape=(5, 40))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = linear_loss(*inputs, labels, "softmax")[0]
    loss.backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = plain_loss(*wide, labels, "softmax", None, 0.0)
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=3e-3, atol=0)
    for one, other in zip(inputs, wide, strict=True):
        assert one.grad is not None
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=2e-2, atol=3e-4)


def test_no_more_scores_at_once_than_allowed(parts: None) -> None:
    """40 scores: three positions of eleven."""
    inputs, labels = tensors(11)
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2 and result.size(-1) == 11:
                seen.append(len(result))
            return result

    with Watch():
        linear_loss(*inputs, labels, "softmax")[0].backward()
    assert max(seen) == 3


# In a model


def losses_and_gradients(
    model: RnnSeq2SeqForConditionalGeneration, batch: dict[str, Any], **options: Any
) -> tuple[Any, list[torch.Tensor]]:
    model.zero_grad()
    output = model(**batch, **options)
    output.loss.backward()
    return output, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("setting", CONFIGURATIONS[::8], ids=name_of)
def test_models_have_the_same_loss(setting: dict[str, Any], parts: None) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch([5, 2, 4], "both")
    batch = {**batch_of(model, source, mask), "labels": LABELS, "smoothing": 0.1}
    with_logits, expected = losses_and_gradients(model, batch)
    without, found = losses_and_gradients(model, batch, skip_logits=True)
    assert without.logits is None
    # Cross entropy of all scores is computed in float32, as everywhere in transformers.
    torch.testing.assert_close(without.loss, with_logits.loss, rtol=1e-6, atol=1e-6, check_dtype=False)
    smoothing = without.smoothing_loss, with_logits.smoothing_loss
    torch.testing.assert_close(*smoothing, rtol=1e-6, atol=1e-6, check_dtype=False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("head", ["linear", "pointer_generator"])
def test_a_watched_or_replaced_output_layer_is_called(head: str, parts: None) -> None:
    """An adapter, a quantised or sharded layer: what it does on a call must happen."""
    model = tiny_model(head_type=head)
    source, mask = ragged_batch([5, 2, 4])
    batch = {"input_ids": source, "attention_mask": mask, "labels": LABELS}
    plain, expected = losses_and_gradients(model, batch, skip_logits=True)
    calls = []
    hook = model.head.output.register_forward_hook(lambda module, args, result: calls.append(len(args[0])))
    watched, found = losses_and_gradients(model, batch, skip_logits=True)
    hook.remove()
    assert len(calls) > 2  # in parts, and again in the backward pass
    torch.testing.assert_close(watched.loss, plain.loss, rtol=1e-6, atol=1e-6, check_dtype=False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    output = Doubled(model.head.output.in_features, model.head.output.out_features).double()
    output.load_state_dict(model.head.output.state_dict())
    model.head.output = output
    doubled, _ = losses_and_gradients(model, batch, skip_logits=True)
    with_logits, _ = losses_and_gradients(model, batch)
    torch.testing.assert_close(doubled.loss, with_logits.loss, rtol=1e-6, atol=1e-6, check_dtype=False)
    assert (doubled.loss - plain.loss).abs() > 0.01


def test_a_loss_function_of_the_users_own_gets_all_scores() -> None:
    model = tiny_model()
    seen = []

    def own(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        seen.append(logits.shape)
        return 3 * ForMaskedLMLoss(logits, labels, vocab_size, **kwargs)

    source, _ = ragged_batch([5, 2, 4])
    plain = model(source, labels=LABELS).loss
    model.loss_function = own
    assert model(source, labels=LABELS, skip_logits=True).loss.item() == pytest.approx(3 * plain.item(), rel=1e-6)
    assert seen == [(3, 4, 13)]


def test_coverage_loss_is_added_all_the_same() -> None:
    model = tiny_model(attention_type="additive", coverage_loss_weight=0.5)
    source, _ = ragged_batch([5, 2, 4])
    one, other = (model(source, labels=LABELS, skip_logits=skip).loss for skip in (False, True))
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_compiles_by_way_of_all_scores() -> None:
    model = tiny_model(attention_type="none", cell_type="gru", wiring_type="output_only")
    torch._dynamo.reset()

    def loss(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        head_input = HeadInput(x)
        return chunked_loss.head_loss(model.head, head_input, None, labels, model.config, ForMaskedLMLoss)[0]

    x = torch.randn(3, 4, 8, dtype=torch.float64)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, LABELS), loss(x, LABELS), rtol=1e-6, atol=1e-6, check_dtype=False)


def test_refusals() -> None:
    model = tiny_model()
    source, _ = ragged_batch([5, 2, 4])
    with pytest.raises(ValueError, match="`skip_logits=True` leaves the loss alone, which needs `labels`"):
        model(source, decoder_input_ids=LABELS.clamp(min=0), skip_logits=True)
    for skip in (False, True):
        with pytest.raises(ValueError, match=r"`labels` must have .* shape \(3, 4\), got \(3, 3\)"):
            model(source, decoder_input_ids=LABELS.clamp(min=0), labels=LABELS[:, :3], skip_logits=skip)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EVERY_NORMALIZER
def test_on_a_gpu(normalizer: str) -> None:
    inputs, labels = tensors()
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in inputs]
    loss = linear_loss(*on_gpu, labels.cuda(), normalizer, None, 0.1)[0]
    expected = plain_loss(*inputs, labels, normalizer, None, 0.1)
    torch.testing.assert_close(loss.cpu(), expected, **EXACT)
    for one, other in zip(torch.autograd.grad(loss, on_gpu), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one.cpu(), other, **EXACT)
