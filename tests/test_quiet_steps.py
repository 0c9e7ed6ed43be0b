"""Beam search's steps in which nothing ends: transformers' helpers are not asked, and the ids stay theirs."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import batch_of, ragged_batch, tiny_model
from test_fast_generation import both

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq import beam_search as beam_search_module
from hf_rnn_seq2seq.beam_search import DiverseGroups, DynamicBeamAllocation, GnmtPenalties
from hf_rnn_seq2seq.fast_generation import acts_on_ends_alone, nothing_ends
from hf_rnn_seq2seq.toolkit_search import JoeynmtSearch, OpennmtSearch, YoyodyneSearch

SEARCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "early": {"early_stopping": True},
    "never": {"early_stopping": "never", "length_penalty": 2.0},
    "short": {"length_penalty": -1.0},
    "gnmt": {"gnmt_length_penalty": 0.8},
    "opennmt": {"opennmt_length_penalty": 0.7},
    "joeynmt": {"joeynmt_length_penalty": 0.7},
    "late ends": {"gnmt_length_penalty": 0.3, "min_new_tokens": 3},
    "several ends": {"eos_token_id": [2, 9]},
    "no end": {"eos_token_id": None},
    "bad words": {"bad_words_ids": [[5], [7], [8, 9]]},
}
NEVER_QUIET: dict[str, dict[str, Any]] = {
    "yoyodyne": {"yoyodyne_beam_search": True},
    "several returned": {"num_return_sequences": 2},
}


def model_that_ends_late(seed: int, ends: float) -> RnnSeq2SeqForConditionalGeneration:
    """The lower `ends`, the later: what the score of the end of sequence is in all steps, beside the others'."""
    model = tiny_model(seed=seed, vocab_size=60)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.mul_(3)
        model.head.output.bias[2] += ends
    return model


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often finished hypotheses are updated by transformers' helper."""
    calls: list[int] = []
    original = RnnSeq2SeqForConditionalGeneration._update_finished_beams

    def count(self: Any, **arguments: Any) -> Any:
        calls.append(1)
        return original(self, **arguments)

    monkeypatch.setattr(beam_search_module.GenerationMixin, "_update_finished_beams", count)
    return calls


@pytest.mark.parametrize("search", [*SEARCHES, *NEVER_QUIET])
def test_ids_are_the_same_and_helpers_are_not_asked(search: str, updates: list[int]) -> None:
    model = model_that_ends_late(0, -1.0)
    batch = batch_of(model, *ragged_batch([5, 1, 3]))
    ours, theirs = both(model, batch, num_beams=3, max_new_tokens=25, **{**SEARCHES, **NEVER_QUIET}[search])
    assert torch.equal(ours, theirs)
    steps = theirs.size(1) - 1
    if search in NEVER_QUIET:
        assert len(updates) >= 2 * steps
    else:
        assert steps <= len(updates) < 2 * steps


@given(
    st.sampled_from(list(SEARCHES)),
    st.integers(2, 5),
    st.integers(0, 999),
    st.sampled_from([-4.0, -2.0, 0.0, 2.0]),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
)
@settings(max_examples=30)
def test_any_search_finds_the_same_ids(search: str, beams: int, seed: int, ends: float, lengths: list[int]) -> None:
    model = model_that_ends_late(seed % 7, ends)
    batch = batch_of(model, *ragged_batch(lengths, seed=seed))
    ours, theirs = both(model, batch, num_beams=beams, max_new_tokens=12, **SEARCHES[search])
    assert torch.equal(ours, theirs)


class OtherHelper(RnnSeq2SeqForConditionalGeneration):
    """Someone's own, which has to be asked in every step."""

    def _check_early_stop_heuristic(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return super()._check_early_stop_heuristic(*args, **kwargs)


def test_who_acts_on_ends_alone() -> None:
    def viewed(*searches: Any) -> Any:
        view_class = beam_search_module._view_class(RnnSeq2SeqForConditionalGeneration, searches)
        return object.__new__(view_class)

    model = tiny_model()
    assert acts_on_ends_alone(model)
    assert all(acts_on_ends_alone(viewed(search)) for search in (GnmtPenalties, OpennmtSearch, JoeynmtSearch))
    assert not any(acts_on_ends_alone(viewed(one)) for one in (YoyodyneSearch, DiverseGroups, DynamicBeamAllocation))
    assert not acts_on_ends_alone(viewed(GnmtPenalties, DiverseGroups))
    model.__class__ = OtherHelper
    assert not acts_on_ends_alone(model)


def test_nothing_ends() -> None:
    hits = torch.zeros(2, 4, dtype=torch.bool)
    scores = torch.tensor([[-1.0, -2.0, -3.0, -3.0], [-1.0, -5.0, -7.0, -9.0]])
    assert nothing_ends(hits, scores, 2)
    assert not nothing_ends(hits, scores, 3)  # which of the equal ones is the third?
    assert not nothing_ends(hits, scores.flip(1), 2)
    assert not nothing_ends(hits, scores.log(), 2)
    hits[1, 3] = True
    assert not nothing_ends(hits, scores, 2)
