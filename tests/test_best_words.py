"""The best words, found block by block, are those of one search through all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rnn_seq2seq import best_words as module
from hf_rnn_seq2seq.best_words import BLOCK, best_continuations, best_words, most_probable_continuations
from tests.models import batch_of, ragged_batch, tiny_model


def by_sorting(log_probs: torch.Tensor, running: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (log_probs.view(*running.shape, -1) + running[:, :, None]).flatten(1)
    places = scores.argsort(dim=1, descending=True)[:, :kept]
    return scores.gather(1, places), places


@settings(max_examples=60)
@given(
    sources=st.integers(1, 4),
    beams=st.integers(1, 6),
    blocks=st.integers(12, 20),
    tail=st.integers(0, BLOCK - 1),
    seed=st.integers(0, 2**31),
)
def test_by_blocks_as_by_sorting(sources: int, beams: int, blocks: int, tail: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept, vocabulary = 2 * beams, blocks * BLOCK + tail
    # Distinct scores: a permutation of whole numbers.
    scores = torch.randperm(sources * beams * vocabulary, generator=generator).double()
    log_probs = -scores.view(sources * beams, vocabulary)
    running = -torch.randint(0, 1000, (sources, beams), generator=generator).double() - torch.arange(beams) / 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORTH_BLOCKS", 0)
        found = best_continuations(log_probs, running, kept)
    for one, other in zip(found, by_sorting(log_probs, running, kept), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 400),
    values=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_best_words_are_the_first_of_the_best(
    rows: int, vocabulary: int, values: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (rows, vocabulary), generator=generator).to(dtype)
    scores[scores == 0] = -torch.inf
    for one in (scores, scores.t().contiguous().t(), scores.clone().requires_grad_()):
        assert best_words(one).tolist() == [row.index(max(row)) for row in scores.tolist()]


@settings(max_examples=60)
@given(
    sources=st.integers(1, 4),
    beams=st.integers(1, 6),
    tail=st.integers(0, BLOCK - 1),
    spread=st.sampled_from([0.5, 5.0, 40.0]),
    shift=st.sampled_from([0.0, 300.0, -3000.0]),  # exponentials of which float32 does not hold
    impossible=st.booleans(),
    piece=st.sampled_from([1, 4_000, 2**19]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_most_probable_as_by_log_softmax(
    sources: int,
    beams: int,
    tail: int,
    spread: float,
    shift: float,
    impossible: bool,
    piece: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept, vocabulary = 2 * beams, 12 * BLOCK + tail
    logits = torch.randn(sources * beams, vocabulary, generator=generator) * spread
    logits[::2] += shift  # rows are not alike
    if impossible:
        logits[:, ::3] = -torch.inf
    logits = logits.to(dtype)
    running = -10 * torch.rand(sources, beams, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORTH_BLOCKS", 0)
        patch.setattr(module, "PIECE", piece)
        scores, places = most_probable_continuations(logits, running, kept)
    log_p = torch.log_softmax(logits.double(), dim=1)
    expected, _ = by_sorting(log_p, running.double(), kept)
    assert scores.dtype == torch.float32
    largest = float(logits[logits.isfinite()].abs().max())  # what they share is taken off after rounding
    tolerance = {"rtol": 1e-6, "atol": 1e-5 + 3e-7 * largest}
    torch.testing.assert_close(scores.double(), expected, **tolerance)
    there = (log_p.view(*running.shape, -1) + running.double()[:, :, None]).flatten(1).gather(1, places)
    torch.testing.assert_close(scores.double(), there, **tolerance)
    assert all(len(set(row)) == kept for row in places.tolist())


def test_what_is_not_a_number_is_the_best_as_in_torch() -> None:
    scores = torch.tensor([[1.0, torch.nan, torch.inf, torch.nan], [torch.inf, 2.0, 3.0, torch.nan]])
    assert torch.equal(best_words(scores), scores.argmax(1))


def test_blocks_are_used_from_a_size_on(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    by_blocks = module._by_blocks
    monkeypatch.setattr(module, "_by_blocks", lambda *args: used.append(1) or by_blocks(*args))
    running = torch.zeros(2, 5)
    for vocabulary, times in ((100, 0), (6_000, 0), (10_000, 1)):
        for search in (best_continuations, most_probable_continuations):
            used.clear()
            search(torch.randn(10, vocabulary), running, 10)
            assert len(used) == times, vocabulary


def test_fewer_possible_words_than_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTH_BLOCKS", 0)
    log_probs = torch.full((4, 1000), -torch.inf)
    log_probs[:, 7], log_probs[:, 900] = -0.5, -0.75
    running = torch.tensor([[0.0, -1.0], [-3.0, 0.0]])
    lost = torch.tensor([-0.5, -0.75]).logsumexp(0)
    for search, less in ((best_continuations, 0.0), (most_probable_continuations, lost)):
        scores, places = search(log_probs, running, 6)
        torch.testing.assert_close(scores[0, :4], torch.tensor([-0.5, -0.75, -1.5, -1.75]) - less)
        assert scores[0, 4:].isneginf().all()
        assert places[1, :4].tolist() == [1007, 1900, 7, 900]


def test_searches_find_what_transformers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORTH_BLOCKS", 0)
    model = tiny_model(vocab_size=900, source_vocab_size=11)
    batch = {**batch_of(model, *ragged_batch([4, 2, 3])), "max_new_tokens": 12}
    for options in (
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_return_sequences": 3, "length_penalty": 0.5},
        {"no_repeat_ngram_size": 2},  # a processor, which is to see log-probabilities
    ):
        model._fast_generation = True
        ours = model.generate(**batch, **{"num_beams": 3, **options})
        model._fast_generation = False
        assert torch.equal(ours, model.generate(**batch, **{"num_beams": 3, **options}))
