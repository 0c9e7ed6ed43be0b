"""Metrics against independent oracles: a textbook edit distance, sacrebleu, jiwer, rouge_score and hand counts."""

import math
from pathlib import Path

import evaluate
import jiwer
import nltk
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.corpus.reader import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from rouge_score import rouge_scorer

import hf_rnn_seq2seq.metrics
from hf_rnn_seq2seq.metrics import METRICS, compute_metrics_for
from hf_rnn_seq2seq.metrics.edit_distance import nearest_reference_errors

SENTENCES = ["The cat sat on the mat.", "A dog, barking loudly, ran away!", "it's raining"]
NEAR_SENTENCES = ["The cat sat on a mat.", "A dog barking ran far away!", "It is raining"]
OTHER_SENTENCES = ["A cat was on the mat.", "The dog ran away, barking!", "it's raining"]

SCORES = ("bleu", "chrf", "meteor", "rouge1", "rougeL")

# A small alphabet makes equal symbols, and with them ties between alignments, frequent.
texts = st.lists(st.sampled_from(["a", "b", "æ", "tʃ", "한"]), max_size=6).map(" ".join)
examples = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5)


def edit_distance(first, second) -> int:
    """Levenshtein distance by the textbook's table."""
    table = [[i + j for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, x in enumerate(first, 1):
        for j, y in enumerate(second, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (x != y))
    return table[-1][-1]


def one_metric(name: str, predictions, references, **options):
    return compute_metrics_for([name], predictions, references, {name: options} if options else None)


@given(texts, texts)
def test_errors_against_one_reference_are_the_edit_distance(prediction: str, reference: str) -> None:
    errors = nearest_reference_errors(prediction.split(), [reference.split()])
    assert errors.total == edit_distance(reference.split(), prediction.split())
    assert errors.reference_length == len(reference.split())
    # What an alignment keeps, plus what it changes, makes up both sequences.
    assert len(prediction.split()) - len(reference.split()) == errors.insertions - errors.deletions


@settings(max_examples=40)
@given(examples, st.sampled_from(["whitespace", "characters"]))
def test_symbol_error_rate_is_summed_distance_to_the_nearest_over_its_length(pairs, symbols: str) -> None:
    def split(text: str) -> list[str]:
        return text.split() if symbols == "whitespace" else list(text)

    errors = length = 0
    for prediction, references in pairs:
        distance, negative_length = min(
            (edit_distance(split(text), split(prediction)), -len(split(text))) for text in references
        )
        errors += distance
        length -= negative_length
    predictions, references = [list(column) for column in zip(*pairs, strict=True)]
    result = one_metric("symbol_error_rate", predictions, references, symbols=symbols)
    assert result == {"symbol_error_rate": pytest.approx(100 * errors / max(length, 1))}


@settings(max_examples=30)
@given(examples)
def test_sequence_error_rate_counts_what_equals_no_reference(pairs) -> None:
    predictions, references = [list(column) for column in zip(*pairs, strict=True)]
    wrong = sum(prediction not in texts for prediction, texts in pairs)
    result = one_metric("sequence_error_rate", predictions, references)
    assert result["sequence_error_rate"] == pytest.approx(100 * wrong / len(pairs))
    assert result["exact_match"] == pytest.approx(100 * (len(pairs) - wrong) / len(pairs))


def test_error_rates_by_hand() -> None:
    predictions = ["K AE T", "D AO G Z", "F IH"]
    references = ["K AE T", "D AO G", "F IH SH"]
    result = compute_metrics_for(["sequence_error_rate", "symbol_error_rate", "wer"], predictions, references)
    assert result["sequence_error_rate"] == pytest.approx(200 / 3)
    assert result["symbol_error_rate"] == pytest.approx(200 / 9)
    assert (result["wer_substitutions"], result["wer_deletions"], result["wer_insertions"]) == pytest.approx(
        (0, 100 / 9, 100 / 9)
    )


def test_white_space_matters_only_between_characters() -> None:
    result = one_metric("sequence_error_rate", [" a  b\n", "ab"], ["a b", "a b"])
    assert result["exact_match"] == 50
    result = one_metric("sequence_error_rate", [" a  b\n", "a b"], ["a b", "a b"], symbols="characters")
    assert result["exact_match"] == 50
    assert one_metric("symbol_error_rate", ["a  b"], ["a b"], symbols="characters") == {
        "symbol_error_rate": pytest.approx(100 / 3)
    }


def test_among_equally_near_references_the_longest_normalises_in_any_order() -> None:
    for references in (["a c", "a b c"], ["a b c", "a c"]):  # "a b" is one edit from either
        assert one_metric("symbol_error_rate", ["a b"], [references])["symbol_error_rate"] == pytest.approx(100 / 3)


def test_empty_references_have_defined_figures() -> None:
    nothing = compute_metrics_for(["symbol_error_rate", "wer", "cer", "sequence_error_rate"], ["", ""], ["", ""])
    assert nothing["symbol_error_rate"] == nothing["wer"] == nothing["cer"] == nothing["sequence_error_rate"] == 0
    inserted = compute_metrics_for(["symbol_error_rate", "wer", "cer", "sequence_error_rate"], ["a b", ""], ["", ""])
    assert inserted["symbol_error_rate"] == inserted["wer"] == 200
    assert inserted["cer"] == 300
    assert inserted["sequence_error_rate"] == 50
    for predictions, references in ((["", ""], ["", ""]), (["a b", "c"], ["", ""]), (["", ""], ["a b", "c"])):
        result = compute_metrics_for(["bleu", "chrf", "meteor", "rouge"], predictions, references)
        assert all(value == 0 for name, value in result.items() if name in SCORES)
        assert all(math.isfinite(value) for value in result.values() if isinstance(value, float))


@pytest.mark.parametrize("lowercase", [False, True])
def test_wer_and_cer_equal_jiwer(lowercase: bool) -> None:
    def prepare(text: str) -> str:
        return text.lower() if lowercase else text

    predictions, references = [prepare(text) for text in NEAR_SENTENCES], [prepare(text) for text in SENTENCES]
    words = jiwer.process_words(references, predictions)
    count = words.hits + words.substitutions + words.deletions
    result = one_metric("wer", NEAR_SENTENCES, SENTENCES, lowercase=lowercase)
    assert result["wer"] == pytest.approx(100 * words.wer)
    assert result["wer_substitutions"] + result["wer_deletions"] + result["wer_insertions"] == pytest.approx(
        100 * (words.substitutions + words.deletions + words.insertions) / count
    )
    assert one_metric("cer", NEAR_SENTENCES, SENTENCES, lowercase=lowercase) == {
        "cer": pytest.approx(100 * jiwer.cer(references, predictions))
    }


def test_transcripts_without_punctuation_and_with_loose_spacing() -> None:
    assert one_metric("wer", ["¡hello —  world"], ["hello, world"], remove_punctuation=True)["wer"] == 0
    assert one_metric("cer", [" hello   world "], ["hello world"])["cer"] == 0
    assert one_metric("cer", ["helloworld"], ["hello world"])["cer"] == pytest.approx(100 / 11)


@pytest.mark.parametrize(
    "options", [{}, {"lowercase": True}, {"tokenize": "none"}, {"tokenize": "char"}, {"smooth_method": "floor"}]
)
def test_bleu_equals_sacrebleu_with_one_and_several_references(options: dict) -> None:
    for references, streams in (
        (SENTENCES, [SENTENCES]),
        ([list(pair) for pair in zip(SENTENCES, OTHER_SENTENCES, strict=True)], [SENTENCES, OTHER_SENTENCES]),
        (
            [[SENTENCES[0], OTHER_SENTENCES[0]], [SENTENCES[1]], [SENTENCES[2]]],
            [SENTENCES, [OTHER_SENTENCES[0], None, None]],
        ),
    ):
        oracle = sacrebleu.BLEU(**options)
        score = oracle.corpus_score(NEAR_SENTENCES, streams)
        result = one_metric("bleu", NEAR_SENTENCES, references, **options)
        assert 0 < score.score < 100
        assert result["bleu"] == score.score
        assert result["bleu_brevity_penalty"] == 100 * score.bp
        assert result["bleu_signature"] == str(oracle.get_signature())
    assert "nrefs:var" in result["bleu_signature"]
    assert f"version:{sacrebleu.__version__}" in result["bleu_signature"]


@pytest.mark.parametrize("options", [{}, {"lowercase": True}, {"word_order": 2}])
def test_chrf_equals_sacrebleu(options: dict) -> None:
    oracle = sacrebleu.CHRF(**options)
    streams = [SENTENCES, OTHER_SENTENCES]
    references = [list(pair) for pair in zip(*streams, strict=True)]
    score = oracle.corpus_score(NEAR_SENTENCES, streams)
    assert 0 < score.score < 100
    assert one_metric("chrf", NEAR_SENTENCES, references, **options) == {
        "chrf": score.score,
        "chrf_signature": str(oracle.get_signature()),
    }


def test_lower_casing_changes_what_it_should() -> None:
    upper = [text.upper() for text in SENTENCES]
    for name in ("bleu", "chrf", "wer", "cer"):
        plain, lowered = one_metric(name, upper, SENTENCES), one_metric(name, upper, SENTENCES, lowercase=True)
        assert lowered[name] == pytest.approx(0 if name in ("wer", "cer") else 100)
        assert plain[name] != pytest.approx(lowered[name])


def test_rouge_equals_rouge_score_and_takes_the_best_reference() -> None:
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    references = [list(pair) for pair in zip(SENTENCES, OTHER_SENTENCES, strict=True)]
    result = one_metric("rouge", NEAR_SENTENCES, references)
    for name in ("rouge1", "rouge2", "rougeL"):
        best = [
            max(scorer.score(text, prediction)[name].fmeasure for text in pair)
            for prediction, pair in zip(NEAR_SENTENCES, references, strict=True)
        ]
        assert result[name] == pytest.approx(100 * sum(best) / len(best))


def test_rouge_by_hand_in_scripts_its_own_tokenizer_drops() -> None:
    # Precision 2/3, recall 2/4 in unigrams; no bigram in common.
    options = {"tokenize": "whitespace"}
    result = one_metric("rouge", ["나는 학교에 간다"], ["나는 오늘 학교에 가요"], **options)
    assert result["rouge1"] == pytest.approx(100 * 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert result["rouge2"] == 0
    assert one_metric("rouge", ["나는 학교에 간다"], ["나는 오늘 학교에 가요"])["rouge1"] == 0


def test_rouge_stems_on_request() -> None:
    assert one_metric("rouge", ["cats running"], ["cat runs"])["rouge1"] == 0
    assert one_metric("rouge", ["cats running"], ["cat runs"], use_stemmer=True)["rouge1"] == 100


def meteor(matched: int, chunks: int, predicted: int, referred: int) -> float:
    """Of so many matched words in so many chunks, of texts of so many words."""
    precision, recall = matched / predicted, matched / referred
    return 100 * (1 - 0.5 * (chunks / matched) ** 3) * precision * recall / (0.9 * precision + 0.1 * recall)


def test_meteor_by_hand() -> None:
    """Lower-cased words that are equal or have a stem in common, in chunks; of references the best; the mean."""
    prediction, references = "The cats sat on a mat", ["Their cat was sitting there", "the cat sat on my mat"]
    assert one_metric("meteor", [prediction], [references])["meteor"] == pytest.approx(meteor(5, 2, 6, 6))
    plain = one_metric("meteor", [prediction], [references], stemmer="none")
    assert plain["meteor"] == pytest.approx(meteor(4, 3, 6, 6))
    assert plain["meteor_signature"].startswith("stem:none|syn:no|tok:treebank|version:nltk-")
    both = one_metric("meteor", [prediction, "b a"], [references[1], "a b"])["meteor"]
    assert both == pytest.approx((meteor(5, 2, 6, 6) + meteor(2, 2, 2, 2)) / 2)


def test_meteor_options() -> None:
    assert one_metric("meteor", ["häuser"], ["haus"])["meteor"] == 0
    assert one_metric("meteor", ["häuser"], ["haus"], stemmer="german")["meteor"] == meteor(1, 1, 1, 1)
    assert one_metric("meteor", ["end."], ["end"])["meteor"] == pytest.approx(meteor(1, 1, 2, 1))
    assert one_metric("meteor", ["end."], ["end"], tokenize="whitespace")["meteor"] == 0


# A WordNet of one noun with two words for it. Of each part of speech there is an index, the data and exceptions.
WORDNET = {
    "lexnames": "".join(f"{number:02}\tnoun.{number}\t1\n" for number in range(4)),
    "index.noun": "auto n 1 0 1 0 00000000\ncar n 1 0 1 0 00000000\n",
    "data.adj": "  1 WordNet 3.0 Copyright\n",
    "data.noun": "00000000 03 n 02 car 0 auto 0 000 | what one drives\n",
}


@pytest.mark.filterwarnings("ignore:The multilingual functions")
def test_meteor_with_synonyms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = LazyCorpusLoader("wordnet", WordNetCorpusReader, None)  # nltk's own may be loaded already
    monkeypatch.setattr("hf_rnn_seq2seq.metrics.meteor.meteor.wordnet", fresh)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match=r"synonyms=True needs nltk's WordNet, .*python -m nltk\.downloader wordnet"):
        one_metric("meteor", ["a car"], ["an auto"], synonyms=True)
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text(WORDNET.get(name, ""))
    (folder / "lexnames").write_text(WORDNET["lexnames"])
    (folder / "index.sense").write_text("")
    result = one_metric("meteor", ["the car"], ["the auto"], synonyms=True)
    assert result["meteor"] == pytest.approx(meteor(2, 1, 2, 2))
    assert "syn:wordnet" in result["meteor_signature"]
    assert one_metric("meteor", ["the car"], ["the auto"])["meteor"] == pytest.approx(meteor(1, 1, 2, 2))


@pytest.mark.parametrize("name", METRICS)
def test_loads_by_folder_without_network_and_equals_the_class(name: str) -> None:
    folder = Path(hf_rnn_seq2seq.metrics.__file__).parent / name
    loaded = evaluate.load(str(folder), keep_in_memory=True)
    assert loaded.compute(predictions=NEAR_SENTENCES, references=SENTENCES) == one_metric(
        name, NEAR_SENTENCES, SENTENCES
    )
    assert loaded.description
    assert loaded.citation


@pytest.mark.parametrize("name", METRICS)
def test_batches_and_single_examples_add_up_to_the_whole(name: str) -> None:
    references = [list(pair) for pair in zip(SENTENCES, OTHER_SENTENCES, strict=True)]
    metric = METRICS[name](keep_in_memory=True)
    metric.add_batch(predictions=NEAR_SENTENCES[:2], references=references[:2])
    metric.add(prediction=NEAR_SENTENCES[2], reference=references[2])
    assert metric.compute() == one_metric(name, NEAR_SENTENCES, references)


def test_several_metrics_share_one_dict() -> None:
    result = compute_metrics_for(METRICS, SENTENCES, SENTENCES, {"bleu": {"lowercase": True}})
    figures = {*SCORES, "rougeLsum", "wer", "cer", "symbol_error_rate", "exact_match"}
    assert figures | {"bleu_signature", "meteor_signature"} <= {*result}
    assert "case:lc" in result["bleu_signature"]
    assert all(isinstance(value, str) == name.endswith("_signature") for name, value in result.items())
    assert result["bleu"] == pytest.approx(100)
    assert result["wer"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "error", "message"),
    [
        ([], [], ValueError, "empty"),
        (["a"], ["a", "b"], ValueError, "1 predictions but 2 references"),
        ("ab", ["a", "b"], TypeError, "predictions must be a list"),
        (["a"], None, TypeError, "references must be a list"),
        (["a", 1], ["a", "b"], TypeError, r"predictions\[1\] must be a string, not int"),
        (["a"], [[]], ValueError, r"references\[0\] is an empty list"),
        (["a", "b"], ["a", None], TypeError, r"references\[1\] must be a string or a list of strings"),
        (["a"], [["a", None]], TypeError, r"references\[0\] must hold strings, not NoneType"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(predictions, references, error, message: str) -> None:
    for name in METRICS:
        with pytest.raises(error, match=message):
            one_metric(name, predictions, references)


def test_bad_names_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown metric 'blue': choose from sequence_error_rate, "):
        compute_metrics_for(["blue"], ["a"], ["a"])
    with pytest.raises(ValueError, match=r"options for metric 'bleu'.*asked for: chrf"):
        compute_metrics_for(["chrf"], ["a"], ["a"], {"bleu": {}})
    with pytest.raises(TypeError, match="smoothing"):
        one_metric("bleu", ["a"], ["a"], smoothing=1)
    with pytest.raises(ValueError, match="tokenize must be one of 13a, none"):
        one_metric("bleu", ["a"], ["a"], tokenize="flores200")
    with pytest.raises(ValueError, match="smooth_method must be one of none, floor"):
        one_metric("bleu", ["a"], ["a"], smooth_method="linear")
    with pytest.raises(ValueError, match="symbols must be one of whitespace, characters, not 'words'"):
        one_metric("symbol_error_rate", ["a"], ["a"], symbols="words")
    with pytest.raises(ValueError, match=r"stemmer must be one of porter, none, .*german.*, not 'klingon'"):
        one_metric("meteor", ["a"], ["a"], stemmer="klingon")
    with pytest.raises(ValueError, match="tokenize must be treebank or whitespace, not '13a'"):
        one_metric("meteor", ["a"], ["a"], tokenize="13a")
    with pytest.raises(ValueError, match="tokenize must be default or whitespace"):
        one_metric("rouge", ["a"], ["a"], tokenize="13a")
    with pytest.raises(ValueError, match="use_stemmer=True needs tokenize='default'"):
        one_metric("rouge", ["a"], ["a"], tokenize="whitespace", use_stemmer=True)
