"""GNMT's penalties, diverse groups and forced words in generate(), against plain searches of their own."""

import itertools
from typing import Any

import pytest
import torch
from beams import (
    LENGTHS,
    SEARCHES,
    Beam,
    Hypothesis,
    check_best,
    contains_all,
    every_hypothesis,
    gnmt_score,
    scores_of,
    search,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ragged_batch
from oracles import Array, decoder_step, encode, first_state, head, log_softmax, to_numpy
from test_beam_oracle import EOS, FLOAT32, NEW_TOKENS, NUM_HYPOTHESES, SOURCES, generated, peaked
from test_oracles import config_of, pad
from transformers import GenerationMixin
from transformers.generation import GenerateBeamEncoderDecoderOutput

from hf_rnn_seq2seq import (
    RnnSeq2SeqForConditionalGeneration,
)

PENALTIES: list[dict[str, Any]] = [
    {"gnmt_length_penalty": 0.6},
    {"gnmt_length_penalty": 2.5},
    {"gnmt_length_penalty": -1.0},
    {"gnmt_length_penalty": 0.0, "coverage_penalty": 0.7},
    {"gnmt_length_penalty": 1.0, "coverage_penalty": 0.2},
    {"coverage_penalty": 2.0, "length_penalty": 0.5},
]


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_widest_beam_finds_the_best_by_gnmt_score(
    index: int, penalties: dict[str, Any], early_stopping: bool | str
) -> None:
    model = peaked(index)
    source, mask = pad(SOURCES, left=index % 2 == 0)
    out = search(
        model, source, mask, num_beams=NUM_HYPOTHESES, num_return_sequences=9, max_new_tokens=NEW_TOKENS,
        early_stopping=early_stopping, **penalties,
    )  # fmt: skip
    for row, ids in enumerate(SOURCES):
        every = every_hypothesis(model, ids)
        alpha, beta = penalties.get("gnmt_length_penalty"), penalties.get("coverage_penalty", 0.0)
        expected = [gnmt_score(one, alpha, beta, penalties.get("length_penalty", 1.0)) for one in every]
        at = slice(9 * row, 9 * row + 9)
        check_best(out.sequences[at], scores_of(out)[at], every, expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_scores_of_narrow_beams_are_of_their_own_hypotheses(num_beams: int, use_cache: bool) -> None:
    """Attention sums follow the beams through every reordering."""
    for index in range(3):
        model = peaked(index)
        source, mask = pad(SOURCES, left=True)
        out = search(
            model, source, mask, num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=NEW_TOKENS,
            gnmt_length_penalty=0.9, coverage_penalty=0.5, use_cache=use_cache,
        )  # fmt: skip
        for row, ids in enumerate(SOURCES):
            by_tokens = {one.tokens: gnmt_score(one, 0.9, 0.5) for one in every_hypothesis(model, ids)}
            at = slice(num_beams * row, num_beams * (row + 1))
            expected = [by_tokens[generated(sequence)] for sequence in out.sequences[at]]
            assert scores_of(out)[at].tolist() == pytest.approx(expected, rel=FLOAT32, abs=2 * FLOAT32)


def test_penalties_change_the_ranking() -> None:
    """The tests of the penalties show something: the nine best are others, or in another order."""
    changed = {0.6: 0, 2.5: 0, "coverage": 0}
    for index, ids in itertools.product(range(3), SOURCES):
        every = every_hypothesis(peaked(index), ids)

        def nine_best(alpha: float, beta: float, every: list[Hypothesis] = every) -> list[tuple[int, ...]]:
            return [one.tokens for one in sorted(every, key=lambda one: -gnmt_score(one, alpha, beta))[:9]]

        changed[0.6] += nine_best(0.6, 0.0) != nine_best(0.0, 0.0)
        changed[2.5] += nine_best(2.5, 0.0) != nine_best(0.6, 0.0)
        changed["coverage"] += nine_best(0.6, 0.2) != nine_best(0.6, 0.0)
    assert min(changed.values()) >= 5


def test_never_stops_while_a_running_hypothesis_could_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """With "never", what is found is what a search finds that goes on to the longest length in any case."""
    source, mask = ragged_batch(LENGTHS)
    searches: list[dict[str, Any]] = [
        {"gnmt_length_penalty": alpha, "coverage_penalty": beta} for alpha in (-1, 0, 1, 3) for beta in (0, 0.1)
    ]
    searches += [
        {"force_words_ids": [[5]]},
        SEARCHES["words, gnmt, coverage"],
    ]  # groups: compared with a plain search below

    def run(early_stopping: bool | str) -> list[GenerateBeamEncoderDecoderOutput]:
        found = []
        for seed, options in itertools.product((3, 5), searches):
            model = tiny_model(seed=seed)
            with torch.no_grad():
                model.head.output.bias[EOS] += 3  # hypotheses of many lengths
            options = {**options, "early_stopping": early_stopping, "max_new_tokens": 10}
            found.append(search(model, source, mask, **options))
        return found

    never, too_early = run("never"), run(False)
    monkeypatch.setattr(
        GenerationMixin,
        "_check_early_stop_heuristic",
        lambda self, is_early_stop_heuristic_unsatisfied, **_: is_early_stop_heuristic_unsatisfied,
    )
    for one, other in zip(never, run("never"), strict=True):
        assert list(map(generated, one.sequences)) == list(map(generated, other.sequences))
        assert scores_of(one).tolist() == scores_of(other).tolist()
        assert len(other.scores or ()) == 10
    assert sum(len(one.scores or ()) < 10 for one in never) >= 5  # some do stop
    assert any(not torch.equal(scores_of(one), scores_of(other)) for one, other in zip(never, too_early, strict=True))


@pytest.mark.parametrize("search_name", ["coverage", "words, gnmt, coverage", "words by row"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths(search_name: str, use_cache: bool) -> None:
    """Left-padded prompts in one batch give what each gives alone; their attention and words count."""
    model = tiny_model(seed=2)
    source, mask = ragged_batch(LENGTHS)
    prompts = [[1], [1, 5, 6, 7], [1, 9]]
    prompt = torch.tensor([[0, 0, 0, 1], [1, 5, 6, 7], [0, 0, 1, 9]])
    prompt_mask = (prompt != 0).long()
    options = {**SEARCHES[search_name], "max_new_tokens": 3}  # few, that not everything be covered without them
    together = search(
        model,
        source,
        mask,
        decoder_input_ids=prompt,
        decoder_attention_mask=prompt_mask,
        use_cache=use_cache,
        **options,
    )
    for row, one in enumerate(prompts):
        by_row = options.get("force_words_ids_by_row")
        own = options if by_row is None else {**options, "force_words_ids_by_row": by_row[row : row + 1]}
        if by_row is not None and not by_row[row]:
            del own["force_words_ids_by_row"]
        alone = search(model, source[row : row + 1], mask[row : row + 1], decoder_input_ids=torch.tensor([one]), **own)
        new = alone.sequences[:, len(one) :]
        assert torch.equal(together.sequences[4 * row : 4 * row + 4, prompt.size(1) :][:, : new.size(1)], new)
        torch.testing.assert_close(scores_of(together)[4 * row : 4 * row + 4], scores_of(alone))


def test_attention_of_a_prompt_counts_as_coverage() -> None:
    for index in range(3):
        model, prompt = peaked(index), (3, 4)
        source, mask = pad(SOURCES, left=False)
        out = search(
            model, source, mask, decoder_input_ids=torch.tensor([[1, *prompt]] * len(SOURCES)), num_beams=21,
            num_return_sequences=5, max_new_tokens=2, coverage_penalty=0.5, gnmt_length_penalty=0.5,
        )  # fmt: skip
        for row, ids in enumerate(SOURCES):
            every = every_hypothesis(model, ids, prompt, new_tokens=2)
            at = slice(5 * row, 5 * row + 5)
            sequences = torch.cat((out.sequences[at, :1], out.sequences[at, 3:]), 1)
            check_best(sequences, scores_of(out)[at], every, [gnmt_score(one, 0.5, 0.5) for one in every])


# Diverse groups


def diverse_beam_search(
    model: RnnSeq2SeqForConditionalGeneration,
    source: list[int],
    beams: int,
    groups: int,
    strength: float,
    new_tokens: int,
    early_stopping: bool | str,
) -> list[Beam]:
    """
    Vijayakumar et al. 2018, algorithm 1, with lists, for one source: what all groups have finished, best first.

    What transformers adds to a beam search is in it, too: of the best `2 * beams` candidates the first `beams` may
    end; scores of the finished are means; and a group is over when its running hypotheses can't improve on them.
    """
    weights, config = to_numpy(model.state_dict()), config_of(model)
    encoded = encode(weights, config, source)
    start = first_state(weights, config, encoded)
    size = beams // groups

    def log_probabilities(tokens: tuple[int, ...]) -> Array:
        state = start
        assert config.decoder_start_token_id is not None
        for token in (config.decoder_start_token_id, *tokens):
            step = decoder_step(weights, config, token, state, encoded.memory)
            state = step.state
        return log_softmax(head(weights, config, step.features))

    running = [[Beam((), 0.0)] for _ in range(groups)]
    finished: list[list[Beam]] = [[] for _ in range(groups)]
    over: set[int] = set()
    for length in range(1, new_tokens + 1):
        used: list[int] = []  # tokens that running beams have taken in this step
        for group in range(groups):
            if group in over:
                continue
            candidates = []
            for beam in running[group]:
                for token, log_probability in enumerate(log_probabilities(beam.tokens)):
                    score = beam.score + float(log_probability) - strength * used.count(token)
                    candidates.append(Beam((*beam.tokens, token), score))
            candidates = sorted(candidates, key=lambda one: -one.score)[: 2 * size]
            ended = [one for one in candidates[:size] if one.tokens[-1] == EOS or length == new_tokens]
            finished[group] += [Beam(one.tokens, one.score / length) for one in ended]
            finished[group] = sorted(finished[group], key=lambda one: -one.score)[:size]
            running[group] = [one for one in candidates if one.tokens[-1] != EOS][:size]
            used += [one.tokens[-1] for one in running[group]]
            if len(finished[group]) == size:
                best = running[group][0].score / (new_tokens if early_stopping == "never" else length)
                if early_stopping is True or best <= finished[group][-1].score:
                    over.add(group)
    return sorted((one for group in finished for one in group), key=lambda one: -one.score)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(("beams", "groups"), [(4, 2), (6, 3), (3, 3)])
@pytest.mark.parametrize("strength", [0.1, 0.7, 3.0])
def test_diverse_groups_equal_a_plain_search(
    beams: int, groups: int, strength: float, early_stopping: bool | str
) -> None:
    for index in range(3):
        model = tiny_model(seed=5 + index, **({"attention_type": "none"} if index == 2 else {}))
        source, mask = ragged_batch(LENGTHS)
        out = search(
            model, source, mask, num_beams=beams, num_return_sequences=beams, num_beam_groups=groups, max_new_tokens=5,
            diversity_penalty=strength, early_stopping=early_stopping,
        )  # fmt: skip
        for row in range(len(LENGTHS)):
            ids = source[row][mask[row].bool()].tolist()
            plain = diverse_beam_search(model, ids, beams, groups, strength, 5, early_stopping)
            at = slice(beams * row, beams * (row + 1))
            expected = [one.score for one in plain]
            assert scores_of(out)[at].tolist() == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)
            assert sorted(map(generated, out.sequences[at])) == sorted(one.tokens for one in plain)


def test_one_group_is_plain_beam_search() -> None:
    model = tiny_model(seed=5)
    source, mask = ragged_batch(LENGTHS)
    plain = search(model, source, mask)
    one = search(model, source, mask, num_beam_groups=1)
    assert torch.equal(plain.sequences, one.sequences)


def test_the_first_group_is_plain_beam_search() -> None:
    model = tiny_model(seed=5)
    source, mask = ragged_batch(LENGTHS)
    plain = search(model, source, mask, num_beams=2, num_return_sequences=2).sequences
    groups = search(model, source, mask, num_beams=6, num_return_sequences=6, num_beam_groups=3, diversity_penalty=9.0)
    for row in range(3):
        found = set(map(generated, groups.sequences[6 * row : 6 * row + 6]))
        assert set(map(generated, plain[2 * row : 2 * row + 2])) <= found


def test_diversity_grows_with_the_penalty() -> None:
    """Groups of one beam are greedy searches: the same one without a penalty to speak of, all different with much."""
    model = tiny_model(seed=3)
    source, mask = ragged_batch(LENGTHS)
    greedy = model.generate(source, attention_mask=mask, max_new_tokens=8, suppress_tokens=[EOS])
    for penalty, different in ((1e-6, 1), (50.0, 4)):
        out = search(model, source, mask, num_beam_groups=4, diversity_penalty=penalty, suppress_tokens=[EOS])
        rows = out.sequences.unflatten(0, (3, 4))
        assert all(greedy[row].tolist() in rows[row].tolist() for row in range(3))
        for step in range(1, 9):
            assert [len(set(row[:, step].tolist())) for row in rows] == [different] * 3


# Forced words

SMALL: list[Any] = [[[3, 4]], [[4], [3]], [[4, 4, 3]], [[3, 0], [0, 4]], [[[4, 3], [0]]], [[[3, 3, 3], [4, 4]], [0]]]


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("words", SMALL, ids=str)
def test_widest_beam_finds_the_best_with_the_words(words: list[Any], early_stopping: bool | str) -> None:
    for index in (0, 3):
        model = peaked(index)
        source, mask = pad(SOURCES, left=False)
        out = search(
            model, source, mask, num_beams=NUM_HYPOTHESES, num_return_sequences=6, max_new_tokens=NEW_TOKENS,
            early_stopping=early_stopping, force_words_ids=words,
        )  # fmt: skip
        for row, ids in enumerate(SOURCES):
            every = [one for one in every_hypothesis(model, ids) if contains_all(one.tokens, words)]
            count = min(6, len(every))
            at = slice(6 * row, 6 * row + count)
            expected = [one.log_probability / len(one.tokens) for one in every]
            check_best(out.sequences[at], scores_of(out)[at], every, expected)
            assert (scores_of(out)[6 * row + count : 6 * row + 6] < -1e5).all()


def dynamic_beam_allocation(
    model: RnnSeq2SeqForConditionalGeneration, source: list[int], beams: int, words: list[list[int]], new_tokens: int
) -> list[Beam]:
    """Post & Vilar 2018 as `DynamicBeamAllocation` describes it, with lists, for one source: the finished."""
    weights, config = to_numpy(model.state_dict()), config_of(model)
    encoded = encode(weights, config, source)
    start = first_state(weights, config, encoded)

    def log_probabilities(tokens: tuple[int, ...]) -> Array:
        state = start
        assert config.decoder_start_token_id is not None
        for token in (config.decoder_start_token_id, *tokens):
            step = decoder_step(weights, config, token, state, encoded.memory)
            state = step.state
        return log_softmax(head(weights, config, step.features))

    def missing(tokens: tuple[int, ...]) -> int:
        absent = [phrase for phrase in words if not contains_all(tokens, [phrase])]
        begun = [k for phrase in absent for k in range(len(phrase)) if k and list(tokens[-k:]) == phrase[:k]]
        return sum(map(len, absent)) - max(begun, default=0)

    running, finished = [Beam((), 0.0)], list[Beam]()
    for length in range(1, new_tokens + 1):
        banks: dict[tuple[int, int], list[Beam]] = {}
        for beam in running:
            for token, log_probability in enumerate(log_probabilities(beam.tokens)):
                candidate = Beam((*beam.tokens, token), beam.score + float(log_probability))
                lacks = missing(candidate.tokens)
                rank = 2 if token == EOS and lacks else int(lacks > new_tokens - length)
                banks.setdefault((rank, lacks), []).append(candidate)
        in_turn = []
        for (rank, lacks), bank in banks.items():
            for place, candidate in enumerate(sorted(bank, key=lambda one: -one.score)):
                in_turn.append(((rank, place, lacks), candidate))
        candidates = [candidate for _, candidate in sorted(in_turn, key=lambda one: one[0])][: 2 * beams]
        for one in candidates[:beams]:
            if one.tokens[-1] == EOS or length == new_tokens:
                lacks = sum(len(phrase) for phrase in words if not contains_all(one.tokens, [phrase]))
                finished.append(Beam(one.tokens, one.score / length - 1e6 * lacks))
        finished = sorted(finished, key=lambda one: -one.score)[:beams]
        running = [one for one in candidates if one.tokens[-1] != EOS][:beams]
    return finished


@pytest.mark.parametrize("words", [[[5]], [[7], [3, 4]], [[5, 6, 5, 7]], [[6, 6], [6, 3], [9]]], ids=str)
@pytest.mark.parametrize("beams", [2, 4, 5])
def test_narrow_beams_equal_a_plain_allocation(beams: int, words: list[list[int]]) -> None:
    model = tiny_model(seed=3)
    with torch.no_grad():
        model.head.output.bias[EOS] += 4
    source, mask = ragged_batch(LENGTHS)
    out = search(
        model, source, mask, num_beams=beams, num_return_sequences=beams, max_new_tokens=6, force_words_ids=words,
        early_stopping="never",
    )  # fmt: skip
    for row in range(len(LENGTHS)):
        plain = dynamic_beam_allocation(model, source[row][mask[row].bool()].tolist(), beams, words, 6)
        at = slice(beams * row, beams * (row + 1))
        assert list(map(generated, out.sequences[at])) == [one.tokens for one in plain]
        assert scores_of(out)[at].tolist() == pytest.approx([one.score for one in plain], rel=FLOAT32, abs=FLOAT32)


forms = st.lists(st.integers(3, 12), min_size=1, max_size=3)
phrases = st.one_of(forms, st.lists(forms, min_size=1, max_size=3))


def fewest_tokens(words: list[Any]) -> int:
    return sum(min(map(len, phrase)) if isinstance(phrase[0], list) else len(phrase) for phrase in words)


@settings(max_examples=30, derandomize=True)
@given(
    st.lists(st.lists(phrases, max_size=4), min_size=3, max_size=3).filter(any),
    st.integers(2, 6),
    st.sampled_from([True, False, "never"]),
    st.sampled_from([2, [2, 9, 10]]),
)
def test_words_occur_wherever_they_fit(
    words: list[Any], beams: int, early_stopping: bool | str, eos: int | list[int]
) -> None:
    if eos != 2:
        words = [[phrase for phrase in row if not {9, 10} & set(itertools.chain(*flat(phrase)))] for row in words]
        if not any(words):
            return
    model = tiny_model(seed=1)
    source, mask = ragged_batch(LENGTHS)
    out = search(
        model, source, mask, num_beams=beams, num_return_sequences=beams, early_stopping=early_stopping,
        force_words_ids_by_row=words, eos_token_id=eos,
    )  # fmt: skip
    for row, wanted in enumerate(words):
        for place in range(beams):
            sequence = tuple(out.sequences[row * beams + place, 1:].tolist())
            there = contains_all(sequence, wanted)
            assert there == (scores_of(out)[row * beams + place] > -1e5)
            # With two tokens to spare there are more such hypotheses than beams; with none there is one at least.
            assert there or fewest_tokens(wanted) > (8 if place == 0 else 6)


def flat(phrase: Any) -> list[list[int]]:
    return phrase if isinstance(phrase[0], list) else [phrase]


def test_words_are_put_where_they_fit_best() -> None:
    """Beams share out over the banks, so that words needn't wait for the end, where they are forced."""
    better = 0
    for seed in range(6):
        model = tiny_model(seed=seed)
        source, mask = ragged_batch(LENGTHS)
        options: dict[str, Any] = {"force_words_ids": [[5], [7, 3]], "num_return_sequences": 1, "max_new_tokens": 10}
        narrow, wide = (search(model, source, mask, num_beams=beams, **options).sequences_scores for beams in (2, 12))
        assert narrow is not None
        assert wide is not None
        better += int((wide > narrow + 1e-4).sum())
        assert (wide > narrow - 0.5).all()
    assert better >= 6


def test_words_with_a_forced_end() -> None:
    model = tiny_model(seed=1)
    source, mask = ragged_batch(LENGTHS)
    phrase = [5, 6, 7, 8, 4, 3]
    out = search(model, source, mask, force_words_ids=[phrase], max_new_tokens=8, forced_eos_token_id=EOS)
    for sequence in out.sequences:
        assert contains_all(generated(sequence), [phrase])
        assert EOS in sequence


def test_a_hypothesis_without_the_words_is_no_reason_to_stop() -> None:
    """Where nothing else is allowed, one ends without, but the search goes on for better ones."""
    model = tiny_model(seed=1)
    source, mask = ragged_batch(LENGTHS)
    out = search(
        model, source, mask, num_beams=2, num_return_sequences=2, force_words_ids=[[5]], early_stopping=True,
        prefix_allowed_tokens_fn=lambda row, ids: [EOS, 5],
    )  # fmt: skip
    assert all(5 in sequence for sequence in out.sequences)


def test_words_of_a_prompt_count() -> None:
    model = tiny_model(seed=1)
    source, mask = ragged_batch(LENGTHS)
    prompt = torch.tensor([[1, 5, 6]] * 3)
    plain = search(model, source, mask, decoder_input_ids=prompt)
    forced = search(model, source, mask, decoder_input_ids=prompt, force_words_ids=[[5, 6]])
    assert torch.equal(forced.sequences, plain.sequences)
    assert torch.equal(scores_of(forced), scores_of(plain))


def test_words_that_do_not_fit_are_told(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model(seed=1)
    source, mask = ragged_batch(LENGTHS)
    out = search(model, source, mask, force_words_ids=[[5, 6, 7, 8]], max_new_tokens=3)
    assert (scores_of(out) < -1e5).all()
    assert "4 tokens; there is room for 3" in caplog.text
