"""generate(): every mode with and without the cache, alone and in a batch; continuing; beams' attention; refusals."""

import inspect
import itertools
from typing import Any

import pytest
import torch
from models import CONFIGURATIONS, batch_of, copying, name_of, padded, ragged_batch, tiny_model
from transformers import DynamicCache, GenerationConfig, TextStreamer, set_seed
from transformers.generation.streamers import BaseStreamer

from hf_rnn_seq2seq.tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer

LENGTHS = [5, 1, 3]

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "temperature, top-k": {"do_sample": True, "temperature": 0.7, "top_k": 5},
    "top-p": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.1, "top_k": 0},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4},
    "beams, all": {"num_beams": 4, "num_return_sequences": 4, "early_stopping": True},
    "beams, length penalty": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "repetition penalty": {"repetition_penalty": 1.5},
    "no repeated bigrams": {"no_repeat_ngram_size": 2, "num_beams": 2},
    "encoder penalties": {"encoder_repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2},
    "minimum": {"min_new_tokens": 6},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 2},
    "suppressed": {"suppress_tokens": [4, 5], "begin_suppress_tokens": [6]},
    "bad words": {"bad_words_ids": [[3], [4, 5]], "num_beams": 2},
    "biased": {"sequence_bias": [[[7, 8], 5.0]], "num_beams": 2},
    "renormalised": {"num_beams": 3, "renormalize_logits": True, "exponential_decay_length_penalty": (2, 1.5)},
    "typical": {"do_sample": True, "typical_p": 0.7, "top_k": 0},
    "eta, epsilon": {"do_sample": True, "eta_cutoff": 0.01, "epsilon_cutoff": 0.01},
}  # fmt: skip


def generate(model: Any, source: torch.Tensor, mask: torch.Tensor, seed: int = 0, **options: Any) -> Any:
    set_seed(seed)
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True, **options}
    return model.generate(source, attention_mask=mask, **{**copying(model.config, source), **options})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "setting",
    [
        {"wiring_type": "output_only", "attention_type": "dot"},
        {"wiring_type": "input_feeding", "decoder_layers": 2, "zoneout": 0.1},
        {"wiring_type": "bahdanau", "cell_type": "gru", "source_vocab_size": 11, "attention_type": "none"},
    ],
    ids=name_of,
)
def test_cached_equals_uncached(setting: dict[str, Any], mode: str) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    cached = generate(model, source, mask, **MODES[mode])
    uncached = generate(model, source, mask, use_cache=False, **MODES[mode])
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if "num_beams" in MODES[mode]:
        torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=1e-9, atol=1e-9)
        assert torch.equal(cached.beam_indices, uncached.beam_indices)


@pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)
def test_beams_reorder_every_part_of_the_state(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    cached, uncached = (
        generate(model, source, mask, num_beams=4, num_return_sequences=4, use_cache=use_cache, max_new_tokens=5)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert torch.equal(cached.beam_indices, uncached.beam_indices)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)
@pytest.mark.parametrize("beams", [1, 4])
def test_batched_equals_single(setting: dict[str, Any], beams: int) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    batch = {"source": source, "mask": mask, **copying(model.config, source)}
    together = [
        generate(model, **padded(batch, LENGTHS, side), num_beams=beams).sequences for side in ("left", "right")
    ]
    for row, length in enumerate(LENGTHS):
        single = {name: value[row : row + 1, :length] for name, value in batch.items()}
        alone = generate(model, **single, num_beams=beams).sequences[0].tolist()
        for batched in together:
            assert batched[row, : len(alone)].tolist() == alone
            # with padding 0, transformers' beam search fills up with the end of sequence
            assert torch.isin(batched[row, len(alone) :], torch.tensor([0] if beams == 1 else [0, 2])).all()


def test_the_models_of_these_tests_differ_by_mode() -> None:
    """Equal results would show little if all searches found the same."""
    model = tiny_model()
    source, mask = ragged_batch(LENGTHS)
    plain = generate(model, source, mask).sequences
    different = [
        mode
        for mode, options in MODES.items()
        if generate(model, source, mask, **options).sequences.shape != plain.shape
        or not torch.equal(generate(model, source, mask, **options).sequences, plain)
    ]
    assert len(different) > len(MODES) * 2 / 3


def test_options_do_what_they_say() -> None:
    model = tiny_model(seed=3)
    source, mask = ragged_batch(LENGTHS)

    def new_tokens(**options: Any) -> list[list[int]]:
        return generate(model, source, mask, **options).sequences[:, 1:].tolist()

    assert all(row[0] == 7 for row in new_tokens(forced_bos_token_id=7))
    assert all(row[7] == 2 or 2 in row for row in new_tokens(forced_eos_token_id=2))
    assert not any({4, 5} & set(row) for row in new_tokens(suppress_tokens=[4, 5]))
    assert all(2 not in row[:6] for row in new_tokens(min_new_tokens=6))
    assert all(len(row) <= 4 for row in new_tokens(max_new_tokens=4))
    assert generate(model, source, mask, max_length=4, max_new_tokens=None).sequences.size(1) <= 4
    for row in new_tokens(no_repeat_ngram_size=2, min_new_tokens=8):
        bigrams = list(itertools.pairwise(row))
        assert len(bigrams) == len(set(bigrams))

    def mean_length(length_penalty: float) -> float:
        model = tiny_model(seed=5)
        rows = generate(model, source, mask, num_beams=6, length_penalty=length_penalty).sequences[:, 1:].tolist()
        return sum(row.index(2) if 2 in row else len(row) for row in rows) / len(rows)

    assert mean_length(-5.0) < mean_length(5.0)


def test_scores_of_beams_are_sums_of_log_probabilities() -> None:
    model = tiny_model(seed=5)
    source, mask = ragged_batch(LENGTHS)
    out = generate(model, source, mask, num_beams=4, num_return_sequences=3, length_penalty=0.0)
    transitions = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices, normalize_logits=False)
    torch.testing.assert_close(transitions.sum(1), out.sequences_scores, rtol=1e-5, atol=1e-5)  # kept in float32
    assert (out.sequences_scores.view(3, 3).diff(dim=1) <= 0).all()  # best first
    # and equal what teacher forcing says of the same sequences
    rows = torch.arange(3).repeat_interleave(3)
    logits = model(source[rows], attention_mask=mask[rows], decoder_input_ids=out.sequences[:, :-1]).logits
    chosen = logits.log_softmax(-1).gather(2, out.sequences[:, 1:, None]).squeeze(2)
    for row, sequence in enumerate(out.sequences[:, 1:].tolist()):
        length = sequence.index(2) + 1 if 2 in sequence else len(sequence)
        assert chosen[row, :length].sum().item() == pytest.approx(out.sequences_scores[row].item(), abs=1e-5)


# Attention of what was generated

ATTENDING = [s for s in CONFIGURATIONS if s["attention_type"] != "none" and s["encoder_type"] != "pyramidal"]


@pytest.mark.parametrize("setting", ATTENDING[:30], ids=name_of)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 4, "num_return_sequences": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "sampling"],
)
def test_generated_attentions_are_those_of_teacher_forcing(setting: dict[str, Any], options: dict[str, Any]) -> None:
    model = tiny_model(seed=2, **setting)
    source, mask = ragged_batch(LENGTHS)
    batch = batch_of(model, source, mask)
    out = generate(model, source, mask, output_attentions=True, **options)
    matrices = model.generated_attentions(out)
    returned = options.get("num_return_sequences", 1)
    assert len(matrices) == 3 * returned
    for index, (matrix, sequence) in enumerate(zip(matrices, out.sequences.tolist(), strict=True)):
        row = slice(index // returned, index // returned + 1)
        generated = sequence[1:]
        length = generated.index(2) + 1 if 2 in generated else len(generated)
        assert matrix.shape == (length, 5)
        forced = model(
            **{name: value[row] for name, value in batch.items()},
            decoder_input_ids=torch.tensor([sequence[:length]]),
            output_attentions=True,
        ).cross_attentions[0]
        torch.testing.assert_close(matrix, forced[0].mean(0), rtol=0, atol=1e-10)


def test_generated_attentions_after_a_prompt_have_a_row_per_generated_token() -> None:
    model = tiny_model()
    source, mask = ragged_batch([3, 3])
    prompt = torch.tensor([[1, 4, 5], [1, 6, 7]])
    out = generate(model, source, mask, decoder_input_ids=prompt, output_attentions=True, min_new_tokens=4)
    matrices = model.generated_attentions(out, head=0)
    forced = model(source, decoder_input_ids=out.sequences, output_attentions=True).cross_attentions[0]
    for row in range(2):
        torch.testing.assert_close(matrices[row][:4], forced[row, 0, 2:6], rtol=0, atol=1e-10)


def test_generated_attentions_need_attentions() -> None:
    source, mask = ragged_batch([3])
    with pytest.raises(ValueError, match="output_attentions=True"):
        tiny_model().generated_attentions(generate(tiny_model(), source, mask))
    none = tiny_model(attention_type="none")
    with pytest.raises(ValueError, match="'none'"):
        none.generated_attentions(generate(none, source, mask, output_attentions=True))


# Where generation starts


def test_from_encoder_outputs_and_embeddings() -> None:
    for setting in ({}, {"source_vocab_size": 11, "cell_type": "gru"}):
        model = tiny_model(**setting)
        source, mask = ragged_batch(LENGTHS)
        for options in ({"num_beams": 3}, {}):
            expected = model.generate(source, attention_mask=mask, max_new_tokens=6, **options)
            encoded = model.get_encoder()(source, attention_mask=mask)
            from_outputs = model.generate(encoder_outputs=encoded, attention_mask=mask, max_new_tokens=6, **options)
            embedded = model.get_input_embeddings()(source)
            from_embeddings = model.generate(inputs_embeds=embedded, attention_mask=mask, max_new_tokens=6, **options)
            assert torch.equal(from_outputs, expected)
            assert torch.equal(from_embeddings, expected)


def test_continuing_from_a_cache_and_from_a_prompt() -> None:
    model = tiny_model(seed=1)
    source, mask = ragged_batch(LENGTHS)
    whole = model.generate(source, attention_mask=mask, max_new_tokens=8, min_new_tokens=8)
    for use_cache in (True, False):
        prompted = model.generate(
            source,
            attention_mask=mask,
            decoder_input_ids=whole[:, :4],
            max_new_tokens=5,
            min_new_tokens=5,
            use_cache=use_cache,
        )
        assert torch.equal(prompted, whole)
    for masked in (True, False):
        first = generate(model, source, mask, max_new_tokens=4, min_new_tokens=4)
        assert first.past_key_values.get_seq_length() == 4  # the last token is not read yet
        options = {"decoder_attention_mask": torch.ones_like(first.sequences)} if masked else {}
        continued = generate(
            model,
            source,
            mask,
            decoder_input_ids=first.sequences,
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            min_new_tokens=4,
            **options,
        )
        assert torch.equal(continued.sequences, whole)
        assert continued.past_key_values.get_seq_length() == 8


def test_an_empty_foreign_cache_is_replaced() -> None:
    model = tiny_model()
    source, mask = ragged_batch(LENGTHS)
    expected = model.generate(source, attention_mask=mask, max_new_tokens=5)
    got = model.generate(source, attention_mask=mask, max_new_tokens=5, past_key_values=DynamicCache())
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_implementation": "quantized"}, ["cache_implementation", "quantized"]),
        ({"cache_implementation": "static"}, ["cache_implementation", "static"]),
        ({"prompt_lookup_num_tokens": 3}, ["assisted generation", "stateful"]),
        ({"assistant_model": "itself"}, ["assisted generation", "stateful"]),
    ],
)
def test_what_a_recurrent_state_cannot_do_is_refused(options: dict[str, Any], words: list[str]) -> None:
    model = tiny_model()
    if "assistant_model" in options:
        options = {"assistant_model": model}
    source, _ = ragged_batch([3])
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  several words are looked for below
        model.generate(source, max_new_tokens=3, **options)
    for word in words:
        assert word in str(refusal.value)


# Streaming and stop strings


class Collecting(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.extend(value.view(-1).tolist())

    def end(self) -> None:
        self.tokens.append(-1)


def test_streamers_get_every_token() -> None:
    model = tiny_model()
    source, _ = ragged_batch([4])
    streamer = Collecting()
    ids = model.generate(source, max_new_tokens=6, streamer=streamer)
    assert streamer.tokens == [*ids[0].tolist(), -1]


def test_stop_strings_and_text_streamer(capsys: pytest.CaptureFixture[str]) -> None:
    """With phones as the target vocabulary, of which the source's letters know nothing."""
    source_tokenizer = train_tokenizer(["abcdefgh"], "char")
    target_tokenizer = train_tokenizer(["p t k s m n a e i"], "symbols")
    pair = RnnSeq2SeqTokenizer(source_tokenizer=source_tokenizer, target_tokenizer=target_tokenizer)
    model = tiny_model(seed=4, source_vocab_size=pair.source_vocab_size, vocab_size=pair.target_vocab_size)
    batch = pair(["abc"], return_tensors="pt")
    free = pair.batch_decode(model.generate(**batch, max_new_tokens=8, min_new_tokens=8, suppress_tokens=[2, 3, 1, 0]))
    words = free[0].removeprefix("<s>").split()
    assert len(words) == 8
    for stop in (" ".join(words[2:4]), words[3]):
        stopped = model.generate(
            **batch, max_new_tokens=8, suppress_tokens=[2, 3, 1, 0], stop_strings=[stop], tokenizer=pair
        )
        text = pair.batch_decode(stopped, skip_special_tokens=True)[0]
        end = " ".join(words).index(stop) + len(stop)
        assert text == " ".join(words)[:end]
    shared = train_tokenizer(["p t k s m n a e i"], "symbols")
    one = tiny_model(seed=4, vocab_size=len(shared))
    ids = one.generate(torch.tensor([[5, 6]]), max_new_tokens=8, suppress_tokens=[2, 3, 1, 0])
    text = shared.decode(ids[0], skip_special_tokens=True)
    stopped = one.generate(
        torch.tensor([[5, 6]]),
        max_new_tokens=8,
        suppress_tokens=[2, 3, 1, 0],
        stop_strings=text.split()[2],
        tokenizer=shared,
    )
    assert shared.decode(stopped[0], skip_special_tokens=True) == " ".join(
        text.split()[: text.split().index(text.split()[2]) + 1]
    )
    with pytest.raises(ValueError, match="tokenizer"):
        one.generate(torch.tensor([[5, 6]]), stop_strings=["p"], max_new_tokens=3)
    capsys.readouterr()
    model.generate(
        **batch, max_new_tokens=8, suppress_tokens=[2, 3, 1, 0], streamer=TextStreamer(pair, skip_special_tokens=True)
    )
    assert capsys.readouterr().out.split() == words


def test_generation_settings_are_saved_and_used(tmp_path: Any) -> None:
    model = tiny_model()
    model.generation_config = GenerationConfig(
        max_new_tokens=3, num_beams=2, decoder_start_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.generation_config.num_beams == 2
    source, _ = ragged_batch([3])
    assert torch.equal(loaded.generate(source), model.generate(source))
    assert loaded.generate(source).size(1) <= 4


@pytest.mark.parametrize("part", ["model", "encoder"])
def test_the_signature_at_hand_is_the_functions_own(part: str) -> None:
    model = tiny_model()
    forward = (model if part == "model" else model.get_encoder()).forward
    first, *others = inspect.signature(inspect.unwrap(forward.__func__)).parameters.items()
    assert first[0] == "self"
    assert list(inspect.signature(forward).parameters.items()) == others
    assert forward.__func__.__signature__ is not None
