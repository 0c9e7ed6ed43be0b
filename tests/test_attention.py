"""
Every kind of attention in float64: against the papers' equations written out in loops, one unpadded row and one query
at a time, values and gradients; and what must hold of it whatever it computes.

Shapes: B batch, S source, T target, M memory, Q query, A hidden width of additive scoring.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_calls import build, draw, run
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ragged_batch, tiny_config, tiny_model
from plain_attention import plain_row
from torch.utils._python_dispatch import TorchDispatchMode

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, additive_scores
from hf_rnn_seq2seq.attention import ATTENTIONS, make_attention

CLOSE = {"rtol": 0, "atol": 1e-10}
TARGET = torch.tensor([[1, 4, 5, 6, 3], [1, 7, 8, 3, 10], [1, 9, 9, 4, 5]])

KINDS: dict[str, dict[str, Any]] = {
    "none": {"attention_type": "none"},
    "dot": {"attention_type": "dot"},
    "scaled_dot": {"attention_type": "scaled_dot"},
    "general": {"attention_type": "general"},
    "additive": {"attention_type": "additive", "attention_hidden_size": 5},
    "additive-bias": {"attention_type": "additive", "attention_bias": True},
    "additive-norm": {"attention_type": "additive", "layer_norm": True},
    "additive-coverage": {"attention_type": "additive", "attention_coverage": True, "attention_hidden_size": 5},
    "additive-bias-coverage": {"attention_type": "additive", "attention_bias": True, "attention_coverage": True},
    "normed_additive": {"attention_type": "normed_additive", "attention_hidden_size": 5},
    "normed_additive-coverage": {"attention_type": "normed_additive", "attention_coverage": True},
    "multi_head": {"attention_type": "multi_head", "attention_heads": 2, "attention_hidden_size": 6},
    "multi_head-dot": {"attention_type": "multi_head", "attention_heads": 4, "attention_scoring": "dot"},
    "multi_head-additive": {
        "attention_type": "multi_head",
        "attention_heads": 3,
        "attention_hidden_size": 6,
        "attention_scoring": "additive",
        "attention_bias": True,
    },
    "multi_head-one": {"attention_type": "multi_head", "attention_scoring": "additive"},
    "location": {"attention_type": "location", "location_filters": 2, "location_kernel_size": 3},
    "location-wide": {
        "attention_type": "location",
        "location_filters": 1,
        "location_kernel_size": 31,
        "attention_bias": True,
        "attention_hidden_size": 5,
    },
    "local_m": {"attention_type": "local_m", "attention_window": 1},
    "local_m-dot": {"attention_type": "local_m", "attention_window": 2, "attention_scoring": "dot"},
    "local_p": {"attention_type": "local_p", "attention_window": 2},
    "local_p-scaled_dot": {"attention_type": "local_p", "attention_window": 1, "attention_scoring": "scaled_dot"},
    "local_p-additive": {
        "attention_type": "local_p",
        "attention_window": 3,
        "attention_scoring": "additive",
        "attention_bias": True,
        "attention_hidden_size": 5,
    },
    "monotonic": {"attention_type": "monotonic", "monotonic_noise": 0.0, "attention_hidden_size": 5},
}
OWN = {"decoder_self_attention": True}
CASES = KINDS | {
    f"{name}-own": KINDS[name] | OWN
    for name in ("none", "general", "additive-coverage", "multi_head", "local_m", "monotonic")
}
every_case = pytest.mark.parametrize("name", list(CASES))
# Kinds that take a whole sequence at once.
PARALLEL = [name for name in CASES if not any(word in name for word in ("coverage", "location", "monotonic"))]


MASKS = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 1]]).bool()


def without_gaps(mask: torch.Tensor) -> torch.Tensor:
    """Every position from a row's first token to its last is one: a gap is a place like any other to a filter."""
    return (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1) > 0).flip(1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@every_case
def test_equations(name: str, training: bool) -> None:
    """A ragged batch, padding on any side and between, against each row alone: values and all gradients."""
    attention, config = build(**CASES[name])
    attention.train(training)
    queries, memory = draw(4, 5, config.query_size, seed=2), draw(4, 6, config.memory_size, seed=3)
    masks = without_gaps(MASKS) if "location" in name else MASKS
    contexts, weights, _ = run(attention, queries, memory, masks)
    assert contexts.shape == (4, 5, attention.context_size)
    assert weights.shape == (4, attention.num_heads, 5, 6)
    assert not weights.masked_select(~masks[:, None, None]).any()

    w = dict(attention.named_parameters())
    total = total_plain = torch.zeros((), dtype=torch.float64)
    for row, mask in enumerate(masks):
        context, weight = plain_row(config, w, queries[row], memory[row, mask], training)
        torch.testing.assert_close(contexts[row], context, **CLOSE)
        torch.testing.assert_close(weights[row][:, :, mask], weight, **CLOSE)
        factor = 1 + torch.arange(weight.numel(), dtype=torch.float64).view_as(weight)
        total = total + contexts[row].sin().sum() + (factor * weights[row][:, :, mask]).cos().sum()
        total_plain = total_plain + context.sin().sum() + (factor * weight).cos().sum()
    leaves = {"queries": queries, "memory": memory} | w
    if not total.requires_grad:  # no attention at all
        assert name == "none"
        return
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    expected = torch.autograd.grad(total_plain, list(leaves.values()), allow_unused=True)
    hard = "monotonic" in name and not training  # a decision has no gradient
    for leaf, one, other in zip(leaves, found, expected, strict=True):
        one, other = (torch.zeros_like(leaves[leaf]) if g is None else g for g in (one, other))
        torch.testing.assert_close(one, other, **CLOSE, msg=lambda text, leaf=leaf: f"{leaf}: {text}")
        assert (one != 0).any() or hard or (name == "none-own" and leaf == "memory"), leaf


# What holds of every kind


@pytest.mark.parametrize("name", PARALLEL)
def test_steps_equal_all_at_once(name: str) -> None:
    attention, config = build(**CASES[name])
    queries, memory = draw(4, 5, config.query_size, seed=2), draw(4, 6, config.memory_size, seed=3)
    steps = run(attention, queries, memory, MASKS)
    at_once = run(attention, queries, memory, MASKS, at_once=True)
    prepared = attention.prepare(memory, MASKS)
    first = attention(queries[:, :2], prepared, attention.first_alignment(prepared))
    rest = attention(queries[:, 2:], prepared, first[2])
    in_two = (torch.cat((first[0], rest[0]), 1), torch.cat((first[1], rest[1]), 2), rest[2])
    for found in (at_once, in_two):
        for one, other in zip((*found[:2], *found[2]), (*steps[:2], *steps[2]), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("name", [name for name in PARALLEL if "own" not in name and "local_m" not in name])
def test_beams_may_share_a_memory(name: str) -> None:
    attention, config = build(**CASES[name])
    queries, memory = draw(12, 1, config.query_size, seed=2), draw(4, 6, config.memory_size, seed=3)
    assert attention.first_alignment(attention.prepare(memory, MASKS)) == ()
    context, weights, _ = attention(queries, attention.prepare(memory, MASKS), ())
    repeated = attention.prepare(memory.repeat_interleave(3, 0), MASKS.repeat_interleave(3, 0))
    expected = attention(queries, repeated, ())
    torch.testing.assert_close(context, expected[0], **CLOSE)
    torch.testing.assert_close(weights, expected[1], **CLOSE)


@pytest.mark.parametrize("name", [name for name in CASES if name not in PARALLEL])
def test_feedback_takes_one_query(name: str) -> None:
    attention, config = build(**CASES[name])
    assert attention.feedback
    queries, memory = draw(1, 2, config.query_size, seed=2), draw(1, 3, config.memory_size, seed=3)
    with pytest.raises(ValueError, match="one query at a time, got 2"):
        run(attention, queries, memory, MASKS[:1, :3], at_once=True)


rows = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3)


@settings(max_examples=60)
@given(name=st.sampled_from(list(CASES)), training=st.booleans(), rows=rows, seed=st.integers(0, 99))
def test_any_padding_and_no_tokens_at_all(name: str, training: bool, rows: list[list[bool]], seed: int) -> None:
    """A row is what it would be alone and unpadded; one without tokens gets zeros, and no gradient is NaN."""
    attention, config = build(**CASES[name])
    attention.train(training)
    mask = without_gaps(torch.tensor(rows)) if "location" in name else torch.tensor(rows)
    memory = draw(len(rows), 7, config.memory_size, seed=seed)
    queries = draw(len(rows), 4, config.query_size, seed=seed + 1)
    contexts, weights, _ = run(attention, queries, memory, mask)
    source_context = contexts[..., : contexts.size(-1) - (config.query_size if "own" in name else 0)]
    sums = weights.sum(-1)
    for row, tokens in enumerate(mask):
        assert not weights[row][:, :, ~tokens].any()
        if not tokens.any():
            assert not weights[row].any()
            assert not source_context[row].any()
            continue
        alone = run(attention, queries[row : row + 1], memory[row : row + 1, tokens], mask[row : row + 1, tokens])
        torch.testing.assert_close(contexts[row], alone[0][0], **CLOSE)
        torch.testing.assert_close(weights[row][:, :, tokens], alone[1][0], **CLOSE)
        if "monotonic" in name:
            assert (sums[row] < 1 + 1e-12).all()
        else:
            torch.testing.assert_close(sums[row], torch.ones_like(sums[row]), **CLOSE)
    loss = contexts.sin().sum() + weights.cos().sum()
    if loss.requires_grad:
        loss.backward()
    for tensor in (queries, memory, *attention.parameters()):
        assert tensor.grad is None or tensor.grad.isfinite().all()
    assert memory.grad is None or not memory.grad[~mask].any()


@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("name", [name for name in CASES if "none" not in name and "monotonic" not in name])
def test_normalizer(name: str, normalizer: str) -> None:
    """Sums to one, and what the scores say is unlikely is exactly zero."""
    attention, config = build(spread=3, **CASES[name], attention_normalizer=normalizer)
    queries, memory = 3 * draw(4, 5, config.query_size, seed=2), draw(4, 6, config.memory_size, seed=3)
    contexts, weights, _ = run(attention, queries, memory, MASKS)
    softmax_attention, _ = build(spread=3, **CASES[name])
    softmax_contexts, softmax_weights, _ = run(softmax_attention, queries, memory, MASKS)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **CLOSE)
    assert ((weights == 0) & (softmax_weights > 0)).any()
    if "own" in name:  # its own past, too
        own = slice(config.memory_size, None)
        assert not torch.allclose(contexts[..., own], softmax_contexts[..., own])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_case
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    attention, config = build(**CASES[name])
    queries, memory = 0.3 * draw(4, 5, config.query_size, seed=2), draw(4, 6, config.memory_size, seed=3)
    expected, weights, _ = run(attention.train(), queries, memory, MASKS)
    half, half_weights, alignment = run(attention.to(dtype), queries.to(dtype), memory.to(dtype), MASKS)
    assert half.dtype == half_weights.dtype == dtype
    if "coverage" in name or "monotonic" in name:  # sums over steps stay in full precision
        assert alignment[0].dtype == torch.float32
    if "local_p" not in name:  # whose window may begin elsewhere
        torch.testing.assert_close(half.double(), expected, rtol=0.1, atol=0.1)
        torch.testing.assert_close(half_weights.double(), weights, rtol=0.1, atol=0.1)
    if name != "none":
        half.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in attention.parameters())


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    "name", ["additive", "normed_additive", "multi_head-additive", "local_p-additive", "none-own"]
)
def test_long_sequences_are_scored_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more than so many numbers at once, and the same result and gradients."""
    attention, config = build(**CASES[name])
    queries, memory = draw(2, 60, config.query_size, seed=2), draw(2, 50, config.memory_size, seed=3)
    mask = torch.arange(50) < torch.tensor([[50], [31]])
    seen, largest = [], []
    for limit in (2**26, 2**13, 1):
        monkeypatch.setattr(additive_scores, "NUMBERS_AT_ONCE", limit // torch.get_num_threads())
        for tensor in (queries, memory, *attention.parameters()):
            tensor.grad = None
        with Largest() as mode:
            contexts, weights, _ = run(attention, queries, memory, mask, at_once=True)
            (contexts.sin().sum() + weights.cos().sum()).backward()
        largest.append(mode.numel)
        gradients = [tensor.grad for tensor in (queries, memory, *attention.parameters()) if tensor.grad is not None]
        seen.append([contexts.detach(), weights.detach(), *gradients])
    scores = attention.num_heads * 2 * 60 * max(50, 60)
    assert largest[0] >= 2 * 60 * 50 * config.attention_size > 2**13
    assert max(largest[1:]) <= max(2**13, scores)
    for parts in seen[1:]:
        for one, other in zip(parts, seen[0], strict=True):
            torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.slow
def test_a_thousand_by_a_thousand_stays_within_bounds() -> None:
    config = tiny_config(attention_type="additive", attention_hidden_size=128)
    attention = make_attention(config)
    queries, memory = torch.randn(1, 1000, config.query_size), torch.randn(1, 1000, config.memory_size)
    with Largest() as mode:
        contexts, _, _ = run(attention, queries, memory, torch.ones(1, 1000, dtype=torch.bool), at_once=True)
        contexts.sum().backward()
    assert mode.numel <= 1000 * 1000  # the scores; the hidden layer is 128 times as large
    assert attention.query_projection.weight.grad.isfinite().all()


# In a model


def teacher_force(
    model: RnnSeq2SeqForConditionalGeneration, source: torch.Tensor, mask: torch.Tensor, **kwargs: Any
) -> Any:
    return model(source, attention_mask=mask, output_attentions=True, **kwargs)


@pytest.mark.parametrize("wiring", ["output_only", "input_feeding"])
@every_case
def test_beams_reorder_what_attention_carries(name: str, wiring: str) -> None:
    model = tiny_model(**CASES[name], wiring_type=wiring)
    source, mask = ragged_batch([6, 2, 4], "both")
    found = [
        model.generate(
            source,
            attention_mask=mask,
            max_new_tokens=8,
            num_beams=4,
            num_return_sequences=4,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].sequences_scores, found[1].sequences_scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wiring", ["output_only", "input_feeding"])
@every_case
def test_cached_tokens_and_padded_targets(name: str, wiring: str) -> None:
    """One call, calls of one to three tokens, and targets with padding before and between are the same."""
    model = tiny_model(**CASES[name], wiring_type=wiring)
    source, mask = ragged_batch([6, 2, 4], "left")
    whole = teacher_force(model, source, mask, decoder_input_ids=TARGET)
    cache, logits, weights = None, [], []
    for part in TARGET.split([2, 1, 2], dim=1):
        out = teacher_force(model, source, mask, decoder_input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
        weights.extend(out.cross_attentions)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **CLOSE)
    if weights:
        torch.testing.assert_close(torch.cat(weights, 2), whole.cross_attentions[0], **CLOSE)

    lengths = [5, 2, 3]
    places = [[0, 1, 2, 3, 4, 5, 6], [5, 6], [1, 3, 6]]  # among seven, and the same tokens alone
    ids, target_mask = torch.full((3, 7), 3), torch.zeros(3, 7, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = places[row][-length:]
        ids[row, at], target_mask[row, at] = TARGET[row, :length], 1
    padded = teacher_force(model, source, mask, decoder_input_ids=ids, decoder_attention_mask=target_mask)
    for row, length in enumerate(lengths):
        found = padded.logits[row, target_mask[row].bool()]
        torch.testing.assert_close(found, whole.logits[row, :length], **CLOSE)


@every_case
def test_gradient_checkpointing(name: str) -> None:
    source, mask = ragged_batch([6, 2, 4])
    quiet = {"dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0}
    target_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    seen = []
    for on in (False, True):
        model = tiny_model(**CASES[name], **quiet).train()
        if on:
            model.activation_checkpointing_enable({"use_reentrant": True})
        out = model(source, attention_mask=mask, labels=TARGET, decoder_attention_mask=target_mask)
        out.loss.backward()
        seen.append([out.loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


COMPILED = {kind: KINDS[kind] for kind in ATTENTIONS} | {
    "additive-coverage": KINDS["additive-coverage"] | {"attention_normalizer": "sparsemax"},
    "multi_head-additive-own": KINDS["multi_head-additive"] | OWN | {"attention_normalizer": "entmax15"},
}


@pytest.mark.parametrize("name", list(COMPILED))
def test_a_step_compiles_without_a_break(name: str) -> None:
    """The third token, by the state after two."""
    torch.compiler.reset()
    model = tiny_model(**COMPILED[name])
    encoded = model.get_encoder()(*ragged_batch([5, 3, 4]))
    decoder = model.model.decoder
    x = decoder.embed_tokens(TARGET)
    with torch.no_grad():
        prepared = decoder.wiring.attention.prepare(encoded.last_hidden_state, encoded.memory_mask)
        state = decoder.wiring.first_state(model.model.bridge(encoded), prepared)
        for t in (0, 1):
            _, state = decoder(x[:, t : t + 1], state, prepared)
        expected, expected_state = decoder(x[:, 2:3], state, prepared)
        found, new_state = torch.compile(decoder, fullgraph=True, backend="eager")(x[:, 2:3], state, prepared)
    pairs = zip((*found[:2], *new_state.tensors()), (*expected[:2], *expected_state.tensors()), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **CLOSE)


def test_first_weights_and_sizes() -> None:
    sizes = {}
    for name, setting in CASES.items():
        attention = make_attention(tiny_config(**setting))
        sizes[name] = sum(parameter.numel() for parameter in attention.parameters())
    assert sizes["additive-coverage"] == sizes["additive"] + 5  # w_c: A
    assert sizes["additive-bias"] == 8 * 8 + 8 * 8 + 8 + 8
    assert sizes["multi_head"] == sizes["multi_head-additive"] - 6 - 6 == 3 * 8 * 6 + 6 * 6
    assert sizes["location-wide"] == 8 * 5 + 8 * 5 + 5 + 5 + 31 + 5
    assert sizes["local_p"] == sizes["general"] + 8 * 8 + 8
    assert sizes["monotonic"] == sizes["normed_additive"] + 1
    assert sizes["general-own"] == sizes["general"] + 8 * 8 + 8 * 8 + 8

    model = RnnSeq2SeqForConditionalGeneration(tiny_config(attention_type="monotonic", monotonic_bias=-3))
    attention = model.model.decoder.wiring.attention
    assert attention.offset.item() == -3
    assert attention.scale.item() == pytest.approx(8**-0.5)
    setting = {"attention_type": "location", "location_filters": 20, "location_kernel_size": 15}
    model = RnnSeq2SeqForConditionalGeneration(tiny_config(**setting, attention_bias=True))
    attention = model.model.decoder.wiring.attention
    bound = math.sqrt(6 / (15 + 20 * 15))  # Xavier: fan in and fan out of the convolution
    assert 0.9 * bound < attention.trace.filters.abs().max() <= bound
    assert not attention.key_projection.bias.any()


def test_every_kind_is_tested() -> None:
    assert {setting["attention_type"] for setting in CASES.values()} == set(ATTENTIONS)
