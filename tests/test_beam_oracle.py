"""
generate() against an exhaustive search by `oracles.py`.

With a beam as wide as the space no hypothesis is ever pruned, so beam search must return exactly the n best. What is
"best" is `Hypothesis.score`. generate() takes log-softmax and sums in float32 whatever the model's type, so scores
agree to float32, and hypotheses whose scores lie closer together than that may come in either order.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from oracles import Hypothesis, all_hypotheses, greedy_tokens
from test_oracles import build, config_of, pad
from transformers.generation import GenerateBeamEncoderDecoderOutput

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration

VOCABULARY, NEW_TOKENS, EOS = 5, 4, 2
NUM_HYPOTHESES = 1 + 4 + 16 + 4**3 * 5  # strings ended by EOS after 1, 2 and 3 tokens, and all of 4 tokens
FLOAT32 = 5e-6

SOURCES = [[4, 3, 3], [3], [4, 4, 3, 4]]

MODELS: list[dict[str, Any]] = [
    {"cell_type": "lstm", "wiring_type": "input_feeding", "attention_type": "additive", "decoder_layers": 2},
    {"cell_type": "gru", "wiring_type": "bahdanau", "attention_type": "general", "bridge_type": "mean"},
    {"cell_type": "rnn_tanh", "wiring_type": "output_only", "attention_type": "dot", "bridge_type": "last"},
    {"cell_type": "lstm", "wiring_type": "output_only", "attention_type": "none", "tie_word_embeddings": True},
]


def peaked(index: int) -> RnnSeq2SeqForConditionalGeneration:
    """A model whose next-token distributions are far from uniform and depend on what came before."""
    model = build(seed=index, vocab_size=VOCABULARY, **MODELS[index])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(3.0 if name == "head.output.weight" else 1.5)
    return model


def beam_search(
    model: RnnSeq2SeqForConditionalGeneration, left: bool, num_return_sequences: int, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [B, n, T] and their scores [B, n]."""
    input_ids, attention_mask = pad(SOURCES, left)
    output = model.generate(  # type: ignore[misc]  # transformers declares `self` as a protocol of its own
        input_ids=input_ids,
        attention_mask=attention_mask,
        num_return_sequences=num_return_sequences,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    assert isinstance(output, GenerateBeamEncoderDecoderOutput)
    assert output.sequences_scores is not None
    shape = (len(SOURCES), num_return_sequences)
    return output.sequences.unflatten(0, shape), output.sequences_scores.unflatten(0, shape)


def generated(sequence: torch.Tensor) -> tuple[int, ...]:
    """The tokens after the start token, up to and with the first EOS."""
    tokens = sequence.tolist()[1:]
    return tuple(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


def check_ranking(
    sequences: torch.Tensor, scores: torch.Tensor, hypotheses: Sequence[Hypothesis], length_penalty: float
) -> None:
    """`sequences` and their scores are the best of `hypotheses`, in order."""
    best = sorted((one.score(length_penalty) for one in hypotheses), reverse=True)[: len(sequences)]
    by_tokens = {one.tokens: one.score(length_penalty) for one in hypotheses}
    found = [generated(sequence) for sequence in sequences]
    assert len(set(found)) == len(found)
    # Equal to the sorted scores rank by rank: only hypotheses tied in float32 could stand in one another's place.
    assert [by_tokens[tokens] for tokens in found] == pytest.approx(best, rel=FLOAT32, abs=FLOAT32)
    assert scores.tolist() == pytest.approx(best, rel=FLOAT32, abs=FLOAT32)


@pytest.mark.parametrize("early_stopping", [False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("index", range(len(MODELS)))
def test_widest_beam_finds_the_best(index: int, length_penalty: float, early_stopping: bool | str) -> None:
    model = peaked(index)
    sequences, scores = beam_search(
        model,
        left=index % 2 == 0,
        num_return_sequences=NUM_HYPOTHESES if length_penalty == 1 else 7,
        num_beams=NUM_HYPOTHESES,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    for row, source in enumerate(SOURCES):
        hypotheses = all_hypotheses(model.state_dict(), config_of(model), source, NEW_TOKENS)
        assert len(hypotheses) == NUM_HYPOTHESES
        check_ranking(sequences[row], scores[row], hypotheses, length_penalty)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("index", range(len(MODELS)))
def test_hypotheses_of_one_length(index: int, early_stopping: bool | str) -> None:
    """`early_stopping=True` ends the search at the first full set of hypotheses: exact when all have one length."""
    model = peaked(index)
    sequences, scores = beam_search(
        model,
        left=False,
        num_return_sequences=20,
        num_beams=4**NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        early_stopping=early_stopping,
    )
    for row, source in enumerate(SOURCES):
        every = all_hypotheses(model.state_dict(), config_of(model), source, NEW_TOKENS)
        check_ranking(sequences[row], scores[row], [one for one in every if EOS not in one.tokens], 1.0)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("index", range(len(MODELS)))
def test_scores_of_a_narrow_beam(index: int, num_beams: int, length_penalty: float) -> None:
    """Beams that are pruned and reordered at each step still carry the states of their own prefixes."""
    model = peaked(index)
    sequences, scores = beam_search(
        model, left=True, num_return_sequences=num_beams, num_beams=num_beams, length_penalty=length_penalty
    )
    for row, source in enumerate(SOURCES):
        every = all_hypotheses(model.state_dict(), config_of(model), source, NEW_TOKENS)
        by_tokens = {one.tokens: one.score(length_penalty) for one in every}
        expected = [by_tokens[generated(sequence)] for sequence in sequences[row]]
        assert scores[row].tolist() == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("index", range(len(MODELS)))
def test_greedy(index: int, use_cache: bool) -> None:
    model = peaked(index)
    input_ids, attention_mask = pad(SOURCES, left=True)
    output = model.generate(  # type: ignore[misc]  # as above
        input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=12, do_sample=False, use_cache=use_cache
    )
    assert isinstance(output, torch.Tensor)
    for row, source in enumerate(SOURCES):
        assert list(generated(output[row])) == greedy_tokens(model.state_dict(), config_of(model), source, 12)


def test_the_models_are_not_degenerate() -> None:
    """The tests above show something: outputs of every length compete, penalties and sources change the best."""
    lengths, changed_by_penalty, changed_by_source = set(), 0, 0
    for index in range(len(MODELS)):
        model = peaked(index)
        best = []
        for source in SOURCES:
            every = all_hypotheses(model.state_dict(), config_of(model), source, NEW_TOKENS)
            lengths |= {len(one.tokens) for one in sorted(every, key=lambda one: -one.score(0.0))[:7]}
            best.append([max((one.score(penalty), one.tokens) for one in every)[1] for penalty in (-1.0, 0.0, 2.0)])
            changed_by_penalty += len(set(best[-1])) > 1
        changed_by_source += len({tuple(row) for row in best}) > 1
    assert lengths == {1, 2, 3, 4}
    assert changed_by_penalty >= 5
    assert changed_by_source >= 3
