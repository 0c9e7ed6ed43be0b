"""`pipeline("rnn-text2text")`: what generate() and the definitions give, for every kind of input, anywhere."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoding import count_packings, pack_at_once
from hub_client import word_tokenizer
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    pipeline,
    set_seed,
)
from transformers.pipelines.pt_utils import KeyDataset

from hf_rnn_seq2seq import (
    RnnSeq2SeqConfig,
    RnnSeq2SeqEnsemble,
    RnnSeq2SeqForConditionalGeneration,
    RnnSeq2SeqTokenizer,
    packed_products,
)
from hf_rnn_seq2seq.pipeline_rnn_seq2seq import TASK, RnnText2TextPipeline

TEXTS = ["a b c d", "d", "b b a", "c a", "d d c b a a"]
SEARCHES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.3},
    {"num_beams": 4, "num_return_sequences": 2, "gnmt_length_penalty": 0.8, "coverage_penalty": 0.3},
    {"num_beams": 4, "num_return_sequences": 4, "no_repeat_ngram_size": 1},
]


def make(
    source: str = "a b c d", target: str | None = "v w x y z", copies: bool = False, seed: int = 3, **setting: Any
) -> Any:
    """A pipeline of an untrained model in float64 whose outputs differ from one source to the next."""
    tokenizer: PreTrainedTokenizerFast = word_tokenizer(source)
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer)}
    if target is not None:
        tokenizer = RnnSeq2SeqTokenizer(tokenizer, word_tokenizer(target), copies_source=copies)
        sizes = {"vocab_size": len(tokenizer), "source_vocab_size": tokenizer.source_vocab_size}
    config = RnnSeq2SeqConfig(**{**sizes, "embedding_size": 8, "hidden_size": 16, **setting})
    model = RnnSeq2SeqForConditionalGeneration(config).double().eval()
    torch.manual_seed(seed)
    with torch.no_grad():  # large weights, and outputs of many lengths
        for parameter in model.parameters():
            parameter.uniform_(-1.5, 1.5)
        bias = model.get_output_embeddings().bias
        bias[tokenizer.pad_token_id] = bias[tokenizer.bos_token_id] = -100
        bias[tokenizer.eos_token_id] = 0.5
    return pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu", max_new_tokens=8)


@pytest.fixture(scope="module", params=["pair", "shared"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return make() if request.param == "pair" else make(target=None, seed=5)


def generated(pipe: Any, text: str, **options: Any) -> Any:
    """What generate() gives for one text."""
    inputs = pipe.tokenizer(text, return_tensors="pt")
    names = [name for name in ("input_ids", "attention_mask", "copy_ids") if name in inputs]
    return pipe.model.generate(
        **{name: inputs[name] for name in names},
        **{"max_new_tokens": 8, **options},
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
    )


def texts_of(results: list[list[dict[str, Any]]]) -> list[list[str]]:
    return [[hypothesis["generated_text"] for hypothesis in one] for one in results]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_texts_are_what_generate_gives_for_every_kind_of_input(pipe: Any, search: dict[str, Any]) -> None:
    expected = [
        pipe.tokenizer.batch_decode(generated(pipe, text, **search).sequences, skip_special_tokens=True)
        for text in TEXTS
    ]
    rows = [{"source": text} for text in TEXTS]
    assert [texts_of([pipe(text, **search)])[0] for text in TEXTS] == expected
    assert texts_of(pipe(TEXTS, batch_size=8, **search)) == expected
    assert texts_of(list(pipe((text for text in TEXTS), batch_size=2, **search))) == expected
    assert texts_of(list(pipe(KeyDataset(rows, "source"), batch_size=3, **search))) == expected
    assert len({text for texts in expected for text in texts}) > 3


def test_a_column_of_a_datasets_dataset(pipe: Any) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"source": TEXTS})
    assert list(pipe(KeyDataset(dataset, "source"), batch_size=2)) == pipe(TEXTS)
    with pytest.raises(TypeError, match=r"KeyDataset\), not Column"):
        pipe(dataset["source"])


def test_a_generator_is_read_no_faster_than_its_results(pipe: Any) -> None:
    read = []

    def texts() -> Iterator[str]:
        for text in TEXTS:
            read.append(text)
            yield text

    results = iter(pipe(texts()))
    next(results)
    assert len(read) <= 2


def test_without_texts_there_are_no_results(pipe: Any) -> None:
    assert pipe([]) == []
    assert list(pipe(text for text in [])) == []


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_scores_are_what_generate_gives_and_the_sum_of_log_probabilities(pipe: Any, search: dict[str, Any]) -> None:
    lengths = set()
    for text, hypotheses in zip(TEXTS, pipe(TEXTS, return_scores=True, batch_size=3, **search), strict=True):
        result = generated(pipe, text, **search)
        scores = [hypothesis["score"] for hypothesis in hypotheses]
        if "no_repeat_ngram_size" not in search and "num_beams" in search:
            assert scores == pytest.approx(result.sequences_scores.tolist(), rel=1e-5)
        for hypothesis, sequence in zip(hypotheses, result.sequences, strict=True):
            parts = by_definition(pipe, text, sequence.tolist())
            assert hypothesis["token_log_probabilities"] == pytest.approx([part[0] for part in parts], rel=1e-4)
            assert hypothesis["log_probability"] == pytest.approx(sum(part[0] for part in parts), rel=1e-5)
            lengths.add(len(parts))
            if not search:
                assert hypothesis["score"] == pytest.approx(hypothesis["log_probability"] / len(parts))
    assert len(lengths) > 1


def by_definition(pipe: Any, text: str, sequence: list[int]) -> list[tuple[float, list[float]]]:
    """For each generated token up to the end of sequence its log-probability and all tokens' probabilities."""
    inputs = pipe.tokenizer(text, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "copy_ids") if name in inputs}
    found = []
    for length in range(1, len(sequence)):
        if pipe.tokenizer.eos_token_id in sequence[1:length]:
            break
        with torch.no_grad():
            logits = pipe.model(**inputs, decoder_input_ids=torch.tensor([sequence[:length]])).logits[0, -1]
        log_probabilities = logits.log_softmax(-1)
        found.append((log_probabilities[sequence[length]].item(), log_probabilities.exp().tolist()))
    return found


@pytest.mark.parametrize("search", SEARCHES[:4], ids=str)
def test_alignments_are_the_attention_while_generating(pipe: Any, search: dict[str, Any]) -> None:
    for text, hypotheses in zip(TEXTS, pipe(TEXTS, return_alignments=True, batch_size=3, **search), strict=True):
        result = generated(pipe, text, **search)
        expected = pipe.model.generated_attentions(result)
        source = pipe.tokenizer(text)["input_ids"]
        side = getattr(pipe.tokenizer, "source_tokenizer", pipe.tokenizer)
        for hypothesis, weights, sequence in zip(hypotheses, expected, result.sequences, strict=True):
            torch.testing.assert_close(hypothesis["attention"].double(), weights, atol=1e-6, rtol=0)
            assert hypothesis["source_tokens"] == side.convert_ids_to_tokens(source)
            assert hypothesis["target_tokens"] == pipe.tokenizer.convert_ids_to_tokens(sequence)[1 : len(weights) + 1]
            assert hypothesis["attention"].shape == (len(hypothesis["target_tokens"]), len(source))


def test_alternatives_are_the_likeliest_tokens_at_each_place(pipe: Any) -> None:
    search = {"num_beams": 4, "num_return_sequences": 4}
    taken_for_granted = True
    for text, hypotheses in zip(TEXTS, pipe(TEXTS, num_alternatives=3, batch_size=2, **search), strict=True):
        for hypothesis, sequence in zip(hypotheses, generated(pipe, text, **search).sequences, strict=True):
            steps = by_definition(pipe, text, sequence.tolist())
            assert len(hypothesis["alternatives"]) == len(hypothesis["target_tokens"]) == len(steps)
            for shown, (_, probabilities) in zip(hypothesis["alternatives"], steps, strict=True):
                best = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:3]
                assert [token for token, _ in shown] == pipe.tokenizer.convert_ids_to_tokens(best)
                assert [p for _, p in shown] == pytest.approx([probabilities[token] for token in best], rel=1e-4)
            firsts = [alternatives[0][0] for alternatives in hypothesis["alternatives"]]
            taken_for_granted &= firsts == hypothesis["target_tokens"]
    assert not taken_for_granted
    (every,) = pipe("a", num_alternatives=1000)
    assert all(len(alternatives) == pipe.model.config.vocab_size for alternatives in every["alternatives"])


def test_scores_read_a_source_once_however_many_hypotheses_it_has(pipe: Any) -> None:
    encoded: list[int] = []
    hook = pipe.model.get_encoder().register_forward_hook(lambda _, inputs, output: encoded.append(len(output[0])))
    search = {"num_beams": 4, "num_return_sequences": 4, "coverage_penalty": 0.3}
    try:
        pipe(TEXTS[:2], return_scores=True, return_alignments=True, batch_size=2, **search)
    finally:
        hook.remove()
    assert encoded == [2, 2]  # generate()'s, then the scores'


def test_a_hypothesis_has_what_was_asked_for_and_no_more(pipe: Any) -> None:
    scores = {"score", "log_probability", "token_log_probabilities"}
    for options, keys in (
        ({}, set()),
        ({"return_scores": True}, scores),
        ({"return_alignments": True}, {"attention", "source_tokens", "target_tokens"}),
        ({"num_alternatives": 2}, {"alternatives", "target_tokens"}),
        ({"return_scores": True, "num_alternatives": 2}, {"alternatives", "target_tokens"} | scores),
        ({"return_scores": False, "num_alternatives": 0}, set()),
    ):
        assert pipe("a", **options)[0].keys() == {"generated_text"} | keys


def test_sampling_is_scored_by_the_model_itself(pipe: Any) -> None:
    options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 3}
    set_seed(1)
    hypotheses = pipe("a b c d", return_scores=True, **options)
    set_seed(1)
    result = generated(pipe, "a b c d", **options)
    for hypothesis, sequence in zip(hypotheses, result.sequences, strict=True):
        total = sum(part for part, _ in by_definition(pipe, "a b c d", sequence.tolist()))
        assert hypothesis["log_probability"] == pytest.approx(total, rel=1e-5)
    assert len({hypothesis["generated_text"] for hypothesis in hypotheses}) > 1


def test_blank_sources_have_empty_texts_and_leave_the_others_alone(pipe: Any) -> None:
    options = {"num_beams": 2, "num_return_sequences": 2, "return_scores": True, "num_alternatives": 2}
    texts = ["a b c d", "", "d", " \t"]
    results = pipe(texts, batch_size=3, return_alignments=True, **options)
    for text, hypotheses in zip(texts, results, strict=True):
        for hypothesis, alone in zip(hypotheses, pipe(text, return_alignments=True, **options), strict=True):
            torch.testing.assert_close(hypothesis.pop("attention"), alone.pop("attention"))
            assert hypothesis["generated_text"] == alone["generated_text"]
            assert hypothesis["score"] == pytest.approx(alone["score"])
        if not text.strip():
            empty = {"generated_text": "", "score": None, "log_probability": None, "token_log_probabilities": []}
            empty |= {"source_tokens": [], "target_tokens": [], "alternatives": []}
            assert hypotheses == [empty] * 2


def test_a_model_that_copies_gives_words_outside_its_vocabulary() -> None:
    pipe = make("a b c", "x y", copies=True, head_type="pointer_generator", seed=1)
    texts = ["a Zoë b", "c", "b Ödön a Zoë"]
    search = {"num_beams": 3, "num_return_sequences": 2}
    options = {"return_scores": True, "return_alignments": True, "num_alternatives": 4, "batch_size": 3}
    words: set[str] = set()
    for text, hypotheses in zip(texts, pipe(texts, **options, **search), strict=True):
        result = generated(pipe, text, **search)
        expected = pipe.tokenizer.batch_decode(result.sequences, skip_special_tokens=True, source_texts=[text])
        assert [hypothesis["generated_text"] for hypothesis in hypotheses] == expected
        scores = [hypothesis["score"] for hypothesis in hypotheses]
        assert scores == pytest.approx(result.sequences_scores.tolist(), rel=1e-5)
        for hypothesis, sequence in zip(hypotheses, result.sequences, strict=True):
            kept = [token for token in hypothesis["target_tokens"] if not token.startswith("<")]
            assert " ".join(kept) == hypothesis["generated_text"]
            steps = by_definition(pipe, text, sequence.tolist())
            for shown, (_, probabilities) in zip(hypothesis["alternatives"], steps, strict=True):
                assert [p for _, p in shown] == pytest.approx(sorted(probabilities)[:-5:-1], rel=1e-4)
            words |= {token for alternatives in hypothesis["alternatives"] for token, _ in alternatives}
            words |= {*kept}
    assert {"Zoë", "Ödön"} <= words
    # Words of one source are not offered for another.
    (other,) = pipe("c", num_alternatives=100)
    assert not {"Zoë", "Ödön"} & {token for alternatives in other["alternatives"] for token, _ in alternatives}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layers", [2, 3])
def test_a_position_of_a_shortening_encoder_stands_for_several_tokens(layers: int, side: str) -> None:
    pipe = make(encoder_type="pyramidal", encoder_layers=layers)
    pipe.tokenizer.padding_side = side
    texts = ["a b c d a", "a", "a b c", "d c b a d c b a"]
    for text, (hypothesis,) in zip(texts, pipe(texts, return_alignments=True, batch_size=4), strict=True):
        tokens, size = text.split(), 2 ** (layers - 1)
        groups = [" ".join(tokens[start : start + size]) for start in range(0, len(tokens), size)]
        assert hypothesis["source_tokens"] == groups
        assert hypothesis["attention"].shape == (len(hypothesis["target_tokens"]), len(groups))
        torch.testing.assert_close(hypothesis["attention"], pipe(text, return_alignments=True)[0]["attention"])


def test_a_model_without_attention_refuses_alignments_and_scores_all_the_same() -> None:
    pipe = make(attention_type="none", wiring_type="output_only")
    assert pipe("a", return_scores=True, return_alignments=False)[0]["score"] < 0
    message = "`return_alignments` needs attention, but this model has `attention_type`='none'"
    with pytest.raises(ValueError, match=message):
        pipe("a", return_alignments=True)
    with pytest.raises(ValueError, match=message):
        RnnText2TextPipeline(pipe.model, pipe.tokenizer, return_alignments=True)


def test_an_ensemble_is_a_model() -> None:
    first, second = make(), make(seed=1, cell_type="gru", wiring_type="output_only")
    ensemble = RnnSeq2SeqEnsemble([first.model, second.model])
    pipe = RnnText2TextPipeline(ensemble, first.tokenizer, device="cpu", max_new_tokens=8)
    search = {"num_beams": 3, "num_return_sequences": 2}
    for hypothesis, sequence in zip(
        pipe("a b c d", return_scores=True, return_alignments=True, **search),
        generated(pipe, "a b c d", **search).sequences,
        strict=True,
    ):
        total = sum(part for part, _ in by_definition(pipe, "a b c d", sequence.tolist()))
        assert hypothesis["log_probability"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (5, {}, TypeError, "a text, a list of texts, .* not int"),
        (["a", None], {}, TypeError, "not NoneType"),
        (("a", "b"), {}, TypeError, "not tuple"),
        ("a", {"num_alternatives": -1}, ValueError, "`num_alternatives` must be 0 or more, got -1"),
        ("a", {"num_return_sequences": 2}, ValueError, "num_return_sequences"),
        ("a", {"num_beans": 2}, ValueError, "num_beans"),
        ("a", {"coverage_penalty": 0.5}, ValueError, "`coverage_penalty` needs beams"),
    ],
)
def test_refusals(pipe: Any, inputs: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe(inputs, **options)


def test_options_of_the_pipeline_hold_for_every_call_that_has_none_of_its_own() -> None:
    plain = make()
    given = {"num_beams": 4, "num_return_sequences": 3, "gnmt_length_penalty": 0.5, "return_scores": True}
    pipe = RnnText2TextPipeline(plain.model, plain.tokenizer, device="cpu", max_new_tokens=8, batch_size=2, **given)
    assert pipe(TEXTS) == plain(TEXTS, batch_size=2, **given)
    now = {"num_beams": 2, "num_return_sequences": 1, "gnmt_length_penalty": None, "return_scores": False}
    assert pipe(TEXTS, **now) == plain(TEXTS, num_beams=2)
    config = GenerationConfig(
        num_beams=3, num_return_sequences=2, max_new_tokens=3, eos_token_id=2, length_penalty=2.0
    )
    by_config = plain("a b c d", generation_config=config, return_scores=True)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3, "length_penalty": 2.0}
    assert by_config == plain("a b c d", return_scores=True, **options)


def test_penalties_saved_with_the_model_count_in_scores() -> None:
    pipe = make()
    given = {"num_beams": 4, "length_penalty": 1.0, "gnmt_length_penalty": 0.9, "coverage_penalty": 0.4}
    expected = pipe(TEXTS, return_scores=True, **given)
    pipe.model.generation_config.update(**given)
    for name in ("gnmt_length_penalty", "coverage_penalty"):
        setattr(pipe.model.generation_config, name, given[name])
    assert pipe(TEXTS, return_scores=True) == expected
    assert expected != pipe(TEXTS, return_scores=True, coverage_penalty=0.0)


def test_the_limit_of_length() -> None:
    pipe = make()
    endless = {"suppress_tokens": [pipe.tokenizer.eos_token_id]}
    unlimited = RnnText2TextPipeline(pipe.model, pipe.tokenizer, device="cpu")
    lengths = [len(p("a", num_alternatives=1, **endless)[0]["target_tokens"]) for p in (pipe, unlimited)]
    assert lengths == [8, 256]
    assert len(unlimited("a", num_alternatives=1, max_new_tokens=3, **endless)[0]["target_tokens"]) == 3
    pipe.model.generation_config.max_length = 12
    assert len(unlimited("a", num_alternatives=1, **endless)[0]["target_tokens"]) == 11


def test_stop_strings_need_no_tokenizer_of_the_caller() -> None:
    pipe = make()
    endless = {"suppress_tokens": [pipe.tokenizer.eos_token_id], "num_alternatives": 1, "return_scores": True}
    texts = pipe(TEXTS, **endless)
    stop = next(token for token in texts[0][0]["target_tokens"][1:] if not token.startswith("<"))
    for (hypothesis,), (whole,) in zip(pipe(TEXTS, stop_strings=stop, batch_size=3, **endless), texts, strict=True):
        tokens = whole["target_tokens"]
        expected = tokens[: tokens.index(stop) + 1] if stop in tokens else tokens
        assert hypothesis["target_tokens"] == expected
        parts = whole["token_log_probabilities"][: len(expected)]
        assert hypothesis["log_probability"] == pytest.approx(sum(parts), rel=1e-5)


def test_truncation() -> None:
    pipe = make()
    pipe.tokenizer.model_max_length = 3
    assert pipe("a b c d a b", truncation=True) == pipe("a b c")
    assert len(pipe("a b c d a b", return_alignments=True)[0]["source_tokens"]) == 6
    assert pipe("a b c d a b", truncation=True, return_alignments=True)[0]["source_tokens"] == ["a", "b", "c"]


def test_matrices_are_packed_once_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """And anew when the weights are others."""
    pack_at_once(monkeypatch)
    monkeypatch.setattr(packed_products, "PACKED_SIZE", 0)
    packings = count_packings(monkeypatch)
    pipe, other = make(), make(seed=4)
    texts = []
    for one in (pipe, other):
        one.model.float()
        texts.append([one(text, num_beams=2)[0]["generated_text"] for text in TEXTS])
    once = len(packings) // 2
    assert 0 < once < 10
    pipe.model.load_state_dict(other.model.state_dict())
    assert [pipe(text, num_beams=2)[0]["generated_text"] for text in TEXTS] == texts[1] != texts[0]
    assert len(packings) == 3 * once
