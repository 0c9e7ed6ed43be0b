"""Rows whose targets have ended leave the loop: the loss and gradients of a loop that keeps them, in less work."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import CONFIGURATIONS, batch_of, tiny_model

from hf_rnn_seq2seq import shrinking_batch
from hf_rnn_seq2seq.shrinking_batch import ShrinkingBatch, rows_of_steps
from hf_rnn_seq2seq.step_products import LoopMemory

LENGTHS = [2, 6, 0, 4, 1, 4]  # a row without labels among them


def ragged(model, lengths=LENGTHS, steps=6, **others):
    """A batch with as many labels in each row; the source has padding, too."""
    torch.manual_seed(0)
    labels = torch.randint(4, model.config.vocab_size, (len(lengths), steps))
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    sources = torch.randint(4, 10, (len(lengths), 5))
    mask = torch.ones_like(sources)
    mask[1:2, 3:] = 0
    return batch_of(model, sources) | {"attention_mask": mask, "labels": labels, "skip_logits": True} | others


def loss_and_gradients(model, batch, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found, expected, **tolerances):
    torch.testing.assert_close(found[0], expected[0], **tolerances)
    for name, grad in expected[1].items():
        if grad is None:
            assert found[1][name] is None, name
        else:
            torch.testing.assert_close(
                found[1][name], grad, **tolerances, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture
def sizes(monkeypatch):
    """How many rows each step of the decoder has, from here on."""
    seen = []

    def watch(model):
        wiring = model.model.decoder.wiring
        run = wiring.forward
        monkeypatch.setattr(wiring, "forward", lambda x, *rest: seen.append(x.size(0)) or run(x, *rest))
        return seen

    return watch


@pytest.fixture
def staying(monkeypatch):
    """Call it, and no row leaves."""
    return lambda: monkeypatch.setattr(shrinking_batch, "PARTS", 1)


def both(model, batch, staying, **tolerances):
    found = loss_and_gradients(model, batch)
    staying()
    assert_same(found, loss_and_gradients(model, batch), **(tolerances or {"atol": 1e-10, "rtol": 1e-10}))


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_every_configuration_trains_as_with_all_rows(options, staying, sizes):
    model = tiny_model(**options).eval()
    seen = sizes(model)
    both(model, ragged(model), staying)
    wiring = model.model.decoder.wiring
    assert seen[: len(seen) // 2] == ([5, 4, 3, 3, 1, 1] if wiring.sequential else [6])


CASES = {
    "coverage loss": ({"coverage_loss_weight": 0.7}, {}),
    "smoothing": ({}, {"smoothing": 0.1}),
    "number of labels": ({}, {"num_items_in_batch": 5}),
    "mask": ({}, {"decoder_attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 3 + [[1, 1, 1, 1, 0, 0]] * 3)}),
    "mask of a growing state": (
        {"decoder_self_attention": True},
        {"decoder_attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]] * 3 + [[1, 1, 1, 1, 0, 0]] * 3)},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention_type", ["additive", "general"])
def test_losses_and_masks(case, attention_type, staying):
    config, arguments = CASES[case]
    model = tiny_model(wiring_type="input_feeding", attention_type=attention_type, **config).eval()
    both(model, ragged(model, **arguments), staying)


def test_dropout_masks_of_a_whole_sequence_stay_with_their_rows(staying):
    model = tiny_model(wiring_type="input_feeding", recurrent_dropout=0.5).train()
    both(model, ragged(model), staying)


def test_gradient_checkpointing(staying):
    model = tiny_model(wiring_type="input_feeding").train()
    model.gradient_checkpointing_enable()
    both(model, ragged(model), staying)


def test_autocast(staying):
    model = tiny_model(wiring_type="input_feeding").float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        both(model, ragged(model), staying, atol=2e-2, rtol=2e-2)


def test_labels_before_which_none_is_asked_for(staying):
    model = tiny_model(wiring_type="input_feeding").eval()
    batch = ragged(model, [6, 6, 6, 3, 3, 2])
    batch["labels"][:3, :4] = -100  # such rows have labels at the end alone
    both(model, batch, staying)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), more=st.integers(0, 2))
def test_any_lengths(lengths, more):
    model = tiny_model(wiring_type="input_feeding", attention_type="additive", cell_type="lstm").eval()
    batch = ragged(model, lengths, max(*lengths, 1) + more)
    found = loss_and_gradients(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shrinking_batch, "PARTS", 1)
        assert_same(found, loss_and_gradients(model, batch), atol=1e-10, rtol=1e-10)


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=40), steps=st.integers(1, 12))
def test_rows_stay_for_their_lengths_and_leave_in_time(lengths, steps):
    lengths = sorted(lengths, reverse=True)
    rows = rows_of_steps(torch.tensor(lengths), steps)
    assert len(rows) == steps
    assert rows == sorted(rows, reverse=True)
    for t, size in enumerate(rows):
        needed = sum(length > t for length in lengths)
        assert max(needed, 1) <= size <= len(lengths)
        assert size - max(needed, 1) < math.ceil(len(lengths) / shrinking_batch.PARTS)
    assert len(set(rows)) <= shrinking_batch.PARTS


def test_results_come_in_the_order_of_the_rows():
    batch = ShrinkingBatch(torch.tensor([1, 3, 2]), 3)
    x = torch.arange(1.0, 10.0).view(3, 3, 1)
    ordered = batch.sort(x)
    steps = [ordered[: batch.rows[t], t : t + 1] for t in range(3)]
    kept = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0]])
    torch.testing.assert_close(batch.join(steps, 1), x * kept.unsqueeze(2))


def test_features_and_attention_of_tokens_that_are_looked_at():
    model = tiny_model(wiring_type="input_feeding", decoder_layers=2).eval()
    batch = ragged(model)
    ids = torch.randint(4, 10, batch["labels"].shape)
    arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": ids}
    arguments |= {"use_cache": False, "output_attentions": True, "output_hidden_states": True}
    whole = model.model(**arguments)
    part = model.model(**arguments, target_lengths=torch.tensor(LENGTHS))
    looked_at = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)
    pairs = [(whole.last_hidden_state, part.last_hidden_state)]
    pairs += zip(whole.decoder_hidden_states, part.decoder_hidden_states, strict=True)
    pairs.append((whole.cross_attentions[0].transpose(1, 2), part.cross_attentions[0].transpose(1, 2)))
    for expected, found in pairs:
        torch.testing.assert_close(found[looked_at], expected[looked_at])
    assert not part.last_hidden_state[4, 4:].any()


@pytest.mark.parametrize("shown", ["output_attentions", "output_hidden_states"])
def test_what_is_shown_is_of_all_tokens(shown, sizes):
    model = tiny_model(wiring_type="input_feeding").eval()
    seen = sizes(model)
    model(**ragged(model), **{shown: True})
    setattr(model.config, shown, True)
    model(**ragged(model))
    model(**ragged(model, skip_logits=False), **{shown: False})
    assert seen == [6] * 18


def test_equal_lengths_are_left_as_they_are(monkeypatch, sizes):
    model = tiny_model(wiring_type="input_feeding").eval()
    seen = sizes(model)
    monkeypatch.setattr(ShrinkingBatch, "sort", None)  # not called
    model(**ragged(model, [6] * 6))
    assert seen == [6] * 6


def test_few_products_are_begun_anew(monkeypatch):
    made = []
    start = LoopMemory.__init__
    monkeypatch.setattr(LoopMemory, "__init__", lambda self, *rest: made.append(len(rest[0])) or start(self, *rest))
    model = tiny_model(wiring_type="input_feeding", attention_type="dot")
    model(**ragged(model, list(range(20, 52)), 51))
    assert sorted(set(made), reverse=True) == [32, 28, 24, 20, 16, 12, 8, 4]


def test_no_cache():
    model = tiny_model(wiring_type="input_feeding").eval()
    batch = ragged(model)
    del batch["labels"], batch["skip_logits"]
    arguments = batch | {"decoder_input_ids": torch.ones(6, 2, dtype=torch.long)}
    with pytest.raises(ValueError, match="`target_lengths` is for whole targets: it needs `use_cache=False`"):
        model.model(**arguments, target_lengths=torch.ones(6, dtype=torch.long))
