"""Ensembles against a plain implementation that recomputes every prefix, in every search mode."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ragged_batch, tiny_model
from transformers import DynamicCache
from transformers.generation import BaseStreamer

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.ensemble import RnnSeq2SeqEnsemble

VOCABULARY, EOS, NEW_TOKENS = 5, 2, 4
SOURCES = [[4, 3, 3], [3], [4, 4, 3, 4]]
FLOAT32 = 5e-6  # generate() sums log-probabilities in float32 whatever the model's type

# Cells, attention, wirings, depths, widths and the encoder's directions all differ.
ARCHITECTURES: list[dict[str, Any]] = [
    {"cell_type": "lstm", "attention_type": "additive", "wiring_type": "input_feeding", "decoder_layers": 2},
    {"cell_type": "gru", "attention_type": "none", "wiring_type": "output_only", "hidden_size": 6},
    {"cell_type": "gru", "attention_type": "general", "wiring_type": "bahdanau", "encoder_hidden_size": 5},
    {"cell_type": "rnn_tanh", "attention_type": "dot", "wiring_type": "output_only", "bidirectional": False},
    {"encoder_type": "conv", "attention_type": "multi_head", "attention_heads": 2, "decoder_self_attention": True},
    {"encoder_type": "pyramidal", "encoder_layers": 2, "wiring_type": "gnmt", "decoder_layers": 2},
    {"cell_type": "ssru", "head_type": "deep", "output_normalizer": "entmax15", "attention_type": "location"},
]


def members(count: int = 3, **setting: Any) -> list[RnnSeq2SeqForConditionalGeneration]:
    """Models of different architectures whose distributions are far from uniform, and differ."""
    models = []
    for index in range(count):
        model = tiny_model(seed=40 + index, **{"vocab_size": VOCABULARY, **ARCHITECTURES[index], **setting})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.mul_(3.0 if name == "head.output.weight" else 1.5)
            model.head.output.bias[EOS] += 2.0  # outputs of several lengths
        models.append(model)
    return models


def pad(sources: Sequence[Sequence[int]], left: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.zeros(len(sources), max(map(len, sources)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, source in enumerate(sources):
        place = slice(-len(source), None) if left else slice(len(source))
        ids[row, place], mask[row, place] = torch.tensor(source), 1
    return {"input_ids": ids, "attention_mask": mask}


def next_log_probabilities(
    models: Sequence[RnnSeq2SeqForConditionalGeneration],
    source: Sequence[int],
    prefix: Sequence[int],
    average: str = "probabilities",
    weights: Sequence[float] | None = None,
) -> np.ndarray:
    """[V], from each model's own run over the whole prefix: no cache, no padding, no batch."""
    weights = weights or [1 / len(models)] * len(models)
    total = np.zeros(models[0].config.vocab_size)
    for model, weight in zip(models, weights, strict=True):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([prefix]), use_cache=False)
        scores = np.exp(output.logits[0, -1].numpy().astype(np.float64))
        probabilities = scores / scores.sum()
        total += weight * (probabilities if average == "probabilities" else np.log(probabilities))
    if average == "probabilities":
        return np.log(total)
    return total - math.log(np.exp(total).sum())


def start(models: Sequence[RnnSeq2SeqForConditionalGeneration]) -> int:
    token = models[0].config.decoder_start_token_id
    assert token is not None
    return token


def generated(sequence: torch.Tensor) -> tuple[int, ...]:
    """The tokens after the start token, up to and with the first EOS."""
    tokens = sequence.tolist()[1:]
    return tuple(tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens)


AVERAGES = pytest.mark.parametrize("average", ["probabilities", "log_probabilities"])


@AVERAGES
@pytest.mark.parametrize("weights", [None, [1.0, 3.0, 0.5]])
@pytest.mark.parametrize("left", [False, True])
def test_logits_are_the_averaged_log_probabilities(average: Any, weights: list[float] | None, left: bool) -> None:
    models = members()
    ensemble = RnnSeq2SeqEnsemble(models, average, weights).eval()
    target = torch.tensor([[1, 4, 3, 3], [1, 3, 0, 4], [1, 1, 4, 4]])
    logits = ensemble(**pad(SOURCES, left), decoder_input_ids=target).logits
    assert logits.dtype == torch.float64
    shares = None if weights is None else [weight / 4.5 for weight in weights]
    for row, source in enumerate(SOURCES):
        for end in range(1, 5):
            expected = next_log_probabilities(models, source, target[row, :end].tolist(), average, shares)
            torch.testing.assert_close(logits[row, end - 1], torch.from_numpy(expected), rtol=1e-10, atol=1e-10)


@AVERAGES
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("left", [False, True])
def test_greedy_is_the_plain_loop(average: Any, use_cache: bool, left: bool) -> None:
    models = members(len(ARCHITECTURES))
    ensemble = RnnSeq2SeqEnsemble(models, average)
    output = ensemble.generate(**pad(SOURCES, left), max_new_tokens=12, use_cache=use_cache)
    lengths = set()
    for row, source in enumerate(SOURCES):
        tokens: list[int] = []
        while len(tokens) < 12 and tokens[-1:] != [EOS]:
            scores = next_log_probabilities(models, source, [start(models), *tokens], average)
            tokens.append(int(scores.argmax()))
        assert generated(output[row]) == tuple(tokens)
        lengths.add(len(tokens))
    assert len(lengths) > 1


def all_hypotheses(
    models: Sequence[RnnSeq2SeqForConditionalGeneration], source: Sequence[int], average: str
) -> dict[tuple[int, ...], float]:
    """Everything that generate() can return, with its log-probability."""
    found: dict[tuple[int, ...], float] = {}
    open_ends: dict[tuple[int, ...], float] = {(): 0.0}
    for length in range(1, NEW_TOKENS + 1):
        grown = {}
        for prefix, total in open_ends.items():
            scores = next_log_probabilities(models, source, [start(models), *prefix], average)
            for token, score in enumerate(scores.tolist()):
                ended = token == EOS or length == NEW_TOKENS
                (found if ended else grown)[(*prefix, token)] = total + score
        open_ends = grown
    return found


@AVERAGES
@pytest.mark.parametrize("num_beams", [3, 341])  # 341 are all there are: nothing is pruned
def test_beam_search_against_every_hypothesis(average: Any, num_beams: int) -> None:
    models = members(3)
    ensemble = RnnSeq2SeqEnsemble(models, average)
    output = ensemble.generate(
        **pad(SOURCES, left=True),
        num_beams=num_beams,
        num_return_sequences=3,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for row, source in enumerate(SOURCES):
        scores = {tokens: total / len(tokens) for tokens, total in all_hypotheses(models, source, average).items()}
        assert len(scores) == 1 + 4 + 16 + 4**3 * 5 == 341  # ended after 1, 2 and 3 tokens, and all of 4
        found = [generated(sequence) for sequence in output.sequences[3 * row : 3 * row + 3]]
        assert len(set(found)) == 3
        by_generate = output.sequences_scores[3 * row : 3 * row + 3].tolist()
        assert by_generate == pytest.approx([scores[tokens] for tokens in found], rel=FLOAT32, abs=FLOAT32)
        if num_beams > 3:
            assert by_generate == pytest.approx(sorted(scores.values())[:-4:-1], rel=FLOAT32, abs=FLOAT32)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right", "both"]),
    which=st.lists(st.integers(0, len(ARCHITECTURES) - 1), min_size=1, max_size=3),
    num_beams=st.integers(1, 4),
)
def test_a_batch_is_its_rows(lengths: list[int], side: str, which: list[int], num_beams: int) -> None:
    every = members(max(which) + 1)
    ensemble = RnnSeq2SeqEnsemble([every[index] for index in which])
    ids, mask = ragged_batch(lengths, side, ids=VOCABULARY)
    together = ensemble.generate(input_ids=ids, attention_mask=mask, num_beams=num_beams, max_new_tokens=6)
    for row, sequence in enumerate(together):
        alone = ensemble.generate(input_ids=ids[row, mask[row] == 1][None], num_beams=num_beams, max_new_tokens=6)
        assert generated(sequence) == generated(alone[0])


@AVERAGES
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 4, "num_return_sequences": 4, "gnmt_length_penalty": 0.7, "coverage_penalty": 0.6},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.5},
        {"num_beams": 4, "force_words_ids": [[7, 8], [5]]},
    ],
)
def test_equal_members_are_one_model(average: Any, options: dict[str, int]) -> None:
    model = members(1, vocab_size=13)[0]
    ids, mask = ragged_batch([5, 2, 7])
    inputs = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "return_dict_in_generate": True}
    inputs |= {"output_scores": True, "output_attentions": True, **options}
    one = model.generate(**inputs)
    three = RnnSeq2SeqEnsemble([model] * 3, average).generate(**inputs)
    assert torch.equal(one.sequences, three.sequences)
    if options:
        torch.testing.assert_close(three.sequences_scores, one.sequences_scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(three.beam_indices, one.beam_indices)
    for expected, found in zip(one.cross_attentions, three.cross_attentions, strict=True):
        torch.testing.assert_close(found, expected)


def test_coverage_of_a_shortened_source() -> None:
    """What is to be covered are the positions that the members attend to, not those of the source."""
    model = tiny_model(encoder_type="pyramidal", encoder_layers=2)
    ids, mask = ragged_batch([7, 2, 4])
    options = {"num_beams": 3, "coverage_penalty": 1.5, "max_new_tokens": 6, "output_scores": True}
    options |= {"input_ids": ids, "attention_mask": mask, "return_dict_in_generate": True}
    one, two = model.generate(**options), RnnSeq2SeqEnsemble([model] * 2).generate(**options)
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(one.sequences_scores, two.sequences_scores, rtol=1e-5, atol=1e-5)


def test_the_two_averages_differ_as_they_should() -> None:
    models = members(2)
    inputs = {**pad(SOURCES), "decoder_input_ids": torch.tensor([[1, 3], [1, 4], [1, 3]])}
    arithmetic = RnnSeq2SeqEnsemble(models, "probabilities")(**inputs).logits
    geometric = RnnSeq2SeqEnsemble(models, "log_probabilities")(**inputs).logits
    for logits in (arithmetic, geometric):
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 2, dtype=torch.float64))
    # Where the members agree least the arithmetic mean gives more than the geometric one before its normalisation.
    each = torch.stack([model(**inputs).logits.log_softmax(-1) for model in models])
    assert (arithmetic >= each.mean(0) - 1e-12).all()
    assert (arithmetic - geometric).abs().max() > 0.05
    assert (arithmetic > each[0] + math.log(0.5)).all()  # at least its share of what one member gives


def test_sampling_draws_from_the_average() -> None:
    models = members(2)
    ensemble = RnnSeq2SeqEnsemble(models, weights=[3, 1])
    torch.manual_seed(0)
    drawn = ensemble.generate(
        torch.tensor([[4, 3]]), do_sample=True, num_return_sequences=2000, max_new_tokens=1, top_k=0
    )
    found = torch.bincount(drawn[:, 1], minlength=VOCABULARY) / 2000
    expected = np.exp(next_log_probabilities(models, [4, 3], [1], weights=[0.75, 0.25]))
    assert found.tolist() == pytest.approx(expected.tolist(), abs=0.04)
    torch.manual_seed(0)
    beams = ensemble.generate(**pad(SOURCES), do_sample=True, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert beams.shape[0] == 6


def test_streaming() -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    ensemble, streamer = RnnSeq2SeqEnsemble(members()), Kept()
    output = ensemble.generate(torch.tensor([SOURCES[0]]), streamer=streamer, max_new_tokens=6)
    assert streamer.tokens == [*output[0].tolist(), -1]


def test_attention_is_the_mean_over_those_that_attend() -> None:
    models = members(4)
    inputs = {**pad(SOURCES, left=True), "decoder_input_ids": torch.tensor([[1, 3], [1, 4], [1, 3]])}
    ensemble = RnnSeq2SeqEnsemble(models, weights=[1, 5, 2, 3])
    (attention,) = ensemble(**inputs, output_attentions=True).cross_attentions
    each = [model(**inputs, output_attentions=True).cross_attentions for model in models]
    assert each[1] == ()
    expected = (each[0][0] + 2 * each[2][0] + 3 * each[3][0]) / 6
    torch.testing.assert_close(attention, expected, rtol=1e-12, atol=1e-12)
    assert RnnSeq2SeqEnsemble(models[1:2])(**inputs, output_attentions=True).cross_attentions == ()
    assert ensemble.config.attention_type == "additive"
    assert RnnSeq2SeqEnsemble(models[1:]).config.attention_type == "general"


def test_members_of_several_heads_and_of_shortened_sources() -> None:
    """Heads are averaged; of members that attend to another number of positions, the first one's weights count."""
    heads = tiny_model(0, attention_type="multi_head", attention_heads=2)
    plain = tiny_model(1)
    short = tiny_model(2, encoder_type="pyramidal", encoder_layers=2)
    ids, mask = ragged_batch([6, 3])
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.tensor([[1, 3], [1, 4]])}

    def attention(*models: RnnSeq2SeqForConditionalGeneration) -> torch.Tensor:
        return RnnSeq2SeqEnsemble(models)(**inputs, output_attentions=True).cross_attentions[0]

    both = heads(**inputs, output_attentions=True).cross_attentions[0]
    assert both.size(1) == 2
    one = plain(**inputs, output_attentions=True).cross_attentions[0]
    torch.testing.assert_close(attention(heads, plain), (both.mean(1, keepdim=True) + one) / 2)
    torch.testing.assert_close(attention(heads, short, plain), (both.mean(1, keepdim=True) + one) / 2)
    assert attention(short, plain).shape == (2, 1, 2, 3)


def test_generated_attentions_belong_to_their_sequences() -> None:
    ensemble = RnnSeq2SeqEnsemble(members(3))
    inputs = pad(SOURCES)
    output = ensemble.generate(
        **inputs,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_attentions=True,
    )
    for row, matrix in enumerate(ensemble.generated_attentions(output)):
        source = {name: tensor[row // 2][None] for name, tensor in inputs.items()}
        alone = ensemble(**source, decoder_input_ids=output.sequences[row, :-1][None], output_attentions=True)
        torch.testing.assert_close(matrix, alone.cross_attentions[0][0, 0, : len(matrix)])


def test_loss_is_that_of_the_averaged_distribution() -> None:
    models = members(2)
    labels = torch.tensor([[3, 4, 2], [2, -100, -100], [4, 2, -100]])
    for average in ("probabilities", "log_probabilities"):
        ensemble = RnnSeq2SeqEnsemble(models, average)  # type: ignore[arg-type]
        total, count = 0.0, 0
        for source, row in zip(SOURCES, labels.tolist(), strict=True):
            target = [label for label in row if label != -100]
            for place, label in enumerate(target):
                total -= next_log_probabilities(models, source, [1, *target[:place]], average)[label]
                count += 1
        output = ensemble(**pad(SOURCES), labels=labels)
        assert output.loss.item() == pytest.approx(total / count, rel=1e-5)
        assert output.past_key_values is None
        assert ensemble(**pad(SOURCES), labels=labels, num_items_in_batch=5).loss.item() == pytest.approx(
            total / 5, rel=1e-5
        )


def test_continuing_from_a_cache_and_selecting_rows() -> None:
    ensemble = RnnSeq2SeqEnsemble(members(3))
    inputs, target = pad(SOURCES), torch.tensor([[1, 3, 4], [1, 4, 4], [1, 3, 3]])
    whole = ensemble(**inputs, decoder_input_ids=target).logits
    encoded = ensemble.get_encoder()(**inputs)
    first = ensemble(encoder_outputs=encoded, decoder_input_ids=target[:, :2], use_cache=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 2
    assert cache.is_initialized
    rest = ensemble(encoder_outputs=encoded, decoder_input_ids=target[:, 2:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-12, atol=1e-12)

    again = ensemble(encoder_outputs=encoded, decoder_input_ids=target[:, :2], use_cache=True).past_key_values
    again.batch_select_indices(torch.tensor([2, 0]))
    again.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    some = type(encoded)(**{name: tensor[rows] for name, tensor in encoded.items()})
    chosen = ensemble(encoder_outputs=some, decoder_input_ids=target[rows, 2:], past_key_values=again)
    torch.testing.assert_close(chosen.logits, whole[rows, 2:], rtol=1e-12, atol=1e-12)
    again.reset()
    assert not again.is_initialized
    fresh = ensemble(**inputs, decoder_input_ids=target, past_key_values=again)  # another source
    torch.testing.assert_close(fresh.logits, whole, rtol=1e-12, atol=1e-12)
    foreign = ensemble(**inputs, decoder_input_ids=target, past_key_values=DynamicCache())
    torch.testing.assert_close(foreign.logits, whole, rtol=1e-12, atol=1e-12)
