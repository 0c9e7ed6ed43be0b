"""What the tests of beam search share: its options, everything that a small model can generate, and comparisons."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from models import tiny_model as typed_tiny_model
from oracles import Array, DecoderState, decoder_step, encode, first_state, head, log_softmax, to_numpy
from test_beam_oracle import EOS, FLOAT32, NEW_TOKENS, generated
from test_oracles import config_of
from transformers.generation import GenerateBeamEncoderDecoderOutput

from hf_rnn_seq2seq import (
    RnnSeq2SeqForConditionalGeneration,
)

LENGTHS = [5, 1, 3]
SEARCHES: dict[str, dict[str, Any]] = {
    "gnmt": {"gnmt_length_penalty": 0.8},
    "coverage": {"coverage_penalty": 0.4, "length_penalty": 0.7},
    "gnmt, coverage": {"gnmt_length_penalty": 1.2, "coverage_penalty": 0.2, "early_stopping": "never"},
    "groups": {"num_beam_groups": 2, "diversity_penalty": 0.6},
    "groups of one": {"num_beam_groups": 4, "diversity_penalty": 1.5, "early_stopping": True},
    "groups, gnmt, coverage": {
        "num_beam_groups": 2, "diversity_penalty": 0.6, "gnmt_length_penalty": 1.0, "coverage_penalty": 0.3,
    },
    "words": {"force_words_ids": [[5, 6], [7]]},
    "forms": {"force_words_ids": [[5, 6], [[9, 7], [3]]], "early_stopping": True},
    "words by row": {"force_words_ids_by_row": [[[5, 6], [7]], [], [[[4, 4], [9]]]]},
    "words, gnmt, coverage": {"force_words_ids": [[5, 6]], "gnmt_length_penalty": 1.0, "coverage_penalty": 0.3},
}  # fmt: skip


def scores_of(output: GenerateBeamEncoderDecoderOutput) -> torch.Tensor:
    assert output.sequences_scores is not None
    return output.sequences_scores


def tiny_model(**setting: Any) -> Any:  # transformers declares the `self` of its methods as a protocol of its own
    return typed_tiny_model(**setting)


def search(model: Any, source: torch.Tensor, mask: torch.Tensor, **options: Any) -> GenerateBeamEncoderDecoderOutput:
    options = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4, **options}
    return model.generate(source, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options)


# Everything that can be generated, with its attention


class Hypothesis(NamedTuple):
    tokens: tuple[int, ...]
    log_probability: float
    coverage: Array  # attention summed over the tokens, [S]


def every_hypothesis(
    model: RnnSeq2SeqForConditionalGeneration,
    source: list[int],
    prompt: tuple[int, ...] = (),
    new_tokens: int = NEW_TOKENS,
) -> list[Hypothesis]:
    """All continuations of a prompt (behind the start token) to EOS or the length limit; coverage is that of all."""
    weights, config = to_numpy(model.state_dict()), config_of(model)
    encoded = encode(weights, config, source)

    def grow(
        tokens: tuple[int, ...], last: int, state: DecoderState, total: float, coverage: Array
    ) -> Iterator[Hypothesis]:
        step = decoder_step(weights, config, last, state, encoded.memory)
        if config.attention_type != "none":
            coverage = coverage + step.attention
        for token, log_probability in enumerate(log_softmax(head(weights, config, step.features))):
            if len(tokens) < len(prompt):
                if token == prompt[len(tokens)]:
                    yield from grow((*tokens, token), token, step.state, 0.0, coverage)
                continue
            new = Hypothesis((*tokens, token)[len(prompt) :], total + float(log_probability), coverage)
            if token == EOS or len(new.tokens) == new_tokens:
                yield new
            else:
                yield from grow((*tokens, token), token, step.state, new.log_probability, coverage)

    assert config.decoder_start_token_id is not None
    start = first_state(weights, config, encoded)
    return list(grow((), config.decoder_start_token_id, start, 0.0, np.zeros(len(source))))


def gnmt_score(hypothesis: Hypothesis, alpha: float | None, beta: float, length_penalty: float = 1.0) -> float:
    """Wu et al. 2016, eq. 14; with transformers' length penalty where alpha is `None`."""
    length = len(hypothesis.tokens)
    lp = length**length_penalty if alpha is None else (5 + length) ** alpha / (5 + 1) ** alpha
    cp = sum(math.log(max(min(covered, 1.0), 1.1754944e-38)) for covered in hypothesis.coverage)
    return hypothesis.log_probability / lp + beta * cp


def check_best(
    sequences: torch.Tensor, scores: torch.Tensor, hypotheses: list[Hypothesis], expected: list[float]
) -> None:
    """The sequences and their scores are the best ones, up to ties in float32."""
    by_tokens = {one.tokens: score for one, score in zip(hypotheses, expected, strict=True)}
    best = sorted(expected, reverse=True)[: len(sequences)]
    found = [generated(sequence) for sequence in sequences]
    assert len(set(found)) == len(found)
    assert [by_tokens[tokens] for tokens in found] == pytest.approx(best, rel=FLOAT32, abs=2 * FLOAT32)
    assert scores.tolist() == pytest.approx(best, rel=FLOAT32, abs=2 * FLOAT32)


class Beam(NamedTuple):
    tokens: tuple[int, ...]
    score: float


def contains_all(tokens: tuple[int, ...], phrases: list[Any]) -> bool:
    def contains(form: list[int]) -> bool:
        return any(list(tokens[i : i + len(form)]) == form for i in range(len(tokens)))

    return all(any(map(contains, phrase if isinstance(phrase[0], list) else [phrase])) for phrase in phrases)
