"""Pretrained word vectors: files as word2vec, GloVe and fastText write them, what is refused, and a training."""

import gzip
import json
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scripts import load_script
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.arguments import ArgumentError
from hf_rnn_seq2seq.data import DataError
from hf_rnn_seq2seq.pretrained_embeddings import apply_pretrained_embeddings, load_pretrained_embeddings

WIDTH = 3


@pytest.fixture
def load(tmp_path):
    """Read the content of a file for a vocabulary."""

    def load(content: str, vocabulary, width: int = WIDTH):
        path = tmp_path / "vectors.txt"
        path.write_bytes(content.encode())
        return load_pretrained_embeddings(path, {token: row for row, token in enumerate(vocabulary)}, width)

    return load


def as_dict(found) -> dict[int, list[float]]:
    return dict(zip(found.ids.tolist(), found.vectors.tolist(), strict=True))


# Words without a space or line feed, but with what else str.split and str.splitlines would stumble over.
words = st.text(st.characters(exclude_characters=" \r\n", codec="utf-8"), min_size=1, max_size=6)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
vectors = st.lists(numbers, min_size=WIDTH, max_size=WIDTH)


@settings(max_examples=60)
@given(
    table=st.dictionaries(words | st.sampled_from(["dog", "Dog", "\u2028", "a\u00a0b", "5"]), vectors, min_size=1),
    others=st.lists(words, unique=True, max_size=4),
    header=st.booleans(),
    compressed=st.booleans(),
    ending=st.sampled_from(["\n", " \n", "\r\n"]),
    data=st.data(),
)
def test_any_file(tmp_path_factory, table, others, header, compressed, ending, data):
    """What was written is found again, bit for bit, for any part of the words and others."""
    lines = [f"{word} {' '.join(map(repr, vector))}{ending}" for word, vector in table.items()]
    content = ("".join([f"{len(lines)} {WIDTH}\n"] * header + lines)).encode()
    path = tmp_path_factory.mktemp("vectors") / "vectors"
    path.write_bytes(gzip.compress(content) if compressed else content)
    known = data.draw(st.lists(st.sampled_from(sorted(table)), unique=True))
    tokens = data.draw(st.permutations([*known, *(word for word in others if word not in known)]))
    vocabulary = {token: 2 * place for place, token in enumerate(tokens)}

    expected = {row: table.get(token, table.get(token.lower())) for token, row in vocabulary.items()}
    expected = {row: np.float32(vector).tolist() for row, vector in expected.items() if vector is not None}
    found = load_pretrained_embeddings(path, vocabulary, WIDTH)
    assert as_dict(found) == expected
    assert found.ids.tolist() == sorted(expected)
    assert found.vectors.dtype == torch.float32
    assert found.vectors.shape == (len(expected), WIDTH)
    assert found.coverage == (len(expected) / len(tokens) if tokens else 0)
    assert found.duplicates == 0
    assert found.lower_cased == sum(token not in table and token.lower() in table for token in tokens)


def test_words_with_spaces(load):
    found = load(". . . 1 2 3\nat name@domain.com 4 5 6\n. 7 8 9\n", [".", ". . .", "at name@domain.com", "name"])
    assert as_dict(found) == {0: [7, 8, 9], 1: [1, 2, 3], 2: [4, 5, 6]}


def test_exact_form_goes_before_lower_case(load):
    found = load("dog 1 1 1\nDog 2 2 2\ncat 3 3 3\nBIRD 4 4 4\n", ["Dog", "DOG", "Cat", "cat", "bird", "dog"])
    one, two, three = [1.0] * 3, [2.0] * 3, [3.0] * 3
    assert as_dict(found) == {0: two, 1: one, 2: three, 3: three, 5: one}
    assert found.lower_cased == 2
    assert found.coverage == 5 / 6
    assert found.figures() == {"found": 5, "coverage": 5 / 6, "lower_cased": 2, "duplicates": 0}
    assert str(found) == "vectors for 5 of 6 tokens (83.3%), 2 of them lower-cased, 0 duplicates left out"


def test_the_first_of_duplicates_counts(load):
    found = load("a 1 1 1\nb 2 2 2\na 3 3 3\nz 0 0 0\nz 0 0 0\na 4 4 4\n", ["a", "b"])
    assert as_dict(found) == {0: [1, 1, 1], 1: [2, 2, 2]}
    assert found.duplicates == 2  # nobody asked for z


def test_a_number_as_the_first_word(load):
    """Only two numbers are a header; three are a word and a vector of width two."""
    assert as_dict(load("5 3 1\n7 2 2\n", ["5", "7"], width=2)) == {0: [3, 1], 1: [2, 2]}


def test_blank_lines_are_passed_over(load):
    assert as_dict(load("a 1 1 1\n\nb 2 2 2\n\n", ["a", "b"])) == {0: [1, 1, 1], 1: [2, 2, 2]}


def test_a_header_that_promises_more(load, caplog):
    assert len(load("9 3\na 1 1 1\n", ["a"]).ids) == 1
    assert "the first line promises 9 vectors, but there are 1" in caplog.text


def test_token_coverage(load):
    found = load("a 1 1 1\nb 2 2 2\n", ["</s>", "a", "b", "c"])
    assert found.token_coverage([[1, 3, 0], [2, 2, 0]]) == 3 / 6
    assert found.token_coverage([[1, 3, 0], [2, 2, 0]], skip=[0]) == 3 / 4
    assert found.token_coverage([[0]], skip=[0]) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a 1 2\n", "line 1: the vector is 2 wide, but the embeddings are 3"),
        ("a 1 2 3 4\n", "line 1: the vector is 4 wide, but the embeddings are 3"),
        ("a 1 2 3\nb 1 2 3\nz 1 2\n", "line 3: the vector is 2 wide"),
        ("a 1 2 3\nz -1 2e-3 .3 4.\n", "line 2: the vector is 4 wide"),
        ("a 1 2 3\nb\n", "line 2: the vector is 0 wide"),
        ("2 300\na 1 2 3\n", "line 1: the vector is 300 wide"),
        ("1 3\na 1 2\n", "line 2: the vector is 2 wide"),
        ("a 1 2 3\nb 1 two 3\n", "line 2: 'two' in the vector of 'b' is not a number"),
        ("a 1 2 3\nz 1 2 0x3\n", "line 2: '0x3' in the vector of 'z' is not a number"),  # that nobody asked for
        ("a 1 nan 3\n", "line 1: nan in the vector of 'a' is not a finite number"),
        ("z 1 2 -inf\n", "line 1: -inf in the vector of 'z' is not a finite number"),
        ("a 1 2 1e39\n", "line 1: 1e39 in the vector of 'a' is not a finite number"),
        ("", "there are no vectors in it"),
        ("0 3\n", "there are no vectors in it"),
    ],
)
def test_refused_files(load, tmp_path, content, message):
    with pytest.raises(DataError) as error:
        load(content, ["a", "b"])
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "vectors.txt"))


def test_unreadable_files(tmp_path):
    whole = gzip.compress(b"".join(b"w%d 1 2 3\n" % number for number in range(10_000)))
    path = tmp_path / "broken.gz"
    for content in (whole[: len(whole) // 2], whole[:-8] + b"x" * 8, whole[:2000] + b"xyz" * 50 + whole[2150:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"broken.gz: can't be read"):
            load_pretrained_embeddings(path, {"w1": 0}, 3)
    with pytest.raises(DataError, match=r"nowhere: can't be read: .*No such file"):
        load_pretrained_embeddings(tmp_path / "nowhere", {}, 3)
    with pytest.raises(DataError, match="can't be read"):
        load_pretrained_embeddings(tmp_path, {}, 3)


def test_memory_holds_the_vocabulary_alone(tmp_path):
    path = tmp_path / "large.vec"
    row = " ".join(["0.125"] * 100)
    with path.open("w") as file:
        file.writelines(f"word{number} {row}\n" for number in range(20_000))  # 8 MB as float32, 12 MB as text
    tracemalloc.start()
    found = load_pretrained_embeddings(path, {f"word{number}": number for number in range(0, 20_000, 1000)}, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.ids) == 20
    assert peak < 1e6


def test_apply(load):
    torch.manual_seed(0)
    table = nn.Embedding(5, WIDTH, padding_idx=0)
    before = table.weight.detach().clone()
    found = load("<pad> 9 9 9\nb 1 2 3\nd 4 5 6\n", ["<pad>", "a", "b", "c", "d"])
    apply_pretrained_embeddings(found, table)
    assert table.weight[2].tolist() == [1, 2, 3]
    assert table.weight[4].tolist() == [4, 5, 6]
    assert table.weight[0].tolist() == [0, 0, 0]
    assert torch.equal(table.weight[[1, 3]], before[[1, 3]])
    half = nn.Embedding(5, WIDTH, dtype=torch.bfloat16)
    apply_pretrained_embeddings(found, half)
    assert half.weight[0].tolist() == [9, 9, 9]
    with pytest.raises(ValueError, match="for id 4, but the table has 4 rows"):
        apply_pretrained_embeddings(found, nn.Embedding(4, WIDTH))
    with pytest.raises(ValueError, match="3 wide, the embedding table is 2"):
        apply_pretrained_embeddings(found, nn.Embedding(5, 2))


def test_what_is_tied_changes_too(load):
    config = RnnSeq2SeqConfig(vocab_size=5, embedding_size=WIDTH, hidden_size=4, tie_word_embeddings=True)
    model = RnnSeq2SeqForConditionalGeneration(config)
    apply_pretrained_embeddings(load("b 1 2 3\n", ["<pad>", "a", "b"]), model.get_input_embeddings())
    for part in (model.get_encoder().get_input_embeddings(), model.get_decoder().get_input_embeddings(),
                 model.get_output_embeddings()):  # fmt: skip
        assert part.weight[2].tolist() == [1, 2, 3]


# The script.

SOURCES = ["abc", "ca", "b", "bcab", "aa", "cc", "abcabc", "bb", "cab", "acb"]


@pytest.fixture(scope="module")
def script():
    return load_script("run_seq2seq")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    """Data, and vectors for a part of the letters of both sides."""
    data, source, target = (tmp_path / name for name in ("all.tsv", "source.vec", "target.txt.gz"))
    data.write_text("".join(f"{letters}\t{' '.join(letters.upper())}\n" for letters in SOURCES), encoding="utf-8")
    source.write_text("3 4\na 1 1 1 1 \nb 2 2 2 2 \nz 0 0 0 0 \n")
    target.write_bytes(gzip.compress(b"A 1 2 3 4 5\nb -1 -1 -1 -1 -1\nA 0 0 0 0 0\n"))
    return {"data": str(data), "source": str(source), "target": str(target), "out": str(tmp_path / "out")}


def flags(files, *more: str, output_dir: str | None = None) -> list[str]:
    widths = ["--hidden_size", "8", "--embedding_size", "4", "--use_cpu", "--disable_tqdm", "true"]
    small = ["--validation_split_percentage", "0", "--test_split_percentage", "0"]
    small += ["--report_to", "none", "--per_device_train_batch_size", "5"]
    kinds = ["--source_tokenizer_kind", "char", "--target_tokenizer_kind", "symbols"]
    out = ["--output_dir", output_dir or files["out"], "--do_train"]
    return [f"--train_file={files['data']}", *widths, *small, *kinds, *out, *more]


def tables(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Both sides' tokens and embeddings, as saved."""
    tokenizer, weights = AutoTokenizer.from_pretrained(folder), load_file(Path(folder) / "model.safetensors")
    names = {"source": "model.encoder.embed_tokens.weight", "target": "model.decoder.embed_tokens.weight"}
    sides = []
    for side, name in names.items():
        vocabulary = getattr(tokenizer, f"{side}_tokenizer").get_vocab()
        sides.append({token: weights[name][row] for token, row in vocabulary.items()})
    return sides[0], sides[1]


BOTH = ["--decoder_embedding_size", "5", "--save_strategy", "steps", "--save_steps", "2"]


def test_a_training_from_both_sides(script, files, capsys):
    given = ["--source_embeddings_file", files["source"], "--target_embeddings_file", files["target"]]
    results = script.main(flags(files, *given, *BOTH, "--freeze_source_embeddings", "--max_steps", "4"))
    source, target = tables(files["out"])
    assert source["a"].tolist() == [1] * 4
    assert source["b"].tolist() == [2] * 4
    assert source["<pad>"].tolist() == [0] * 4
    assert target["<pad>"].tolist() == [0] * 5
    # The target's embeddings were trained, from where the vectors had put them.
    assert target["A"].tolist() != [1, 2, 3, 4, 5]
    torch.testing.assert_close(target["A"], torch.tensor([1.0, 2, 3, 4, 5]), atol=0.01, rtol=0)
    torch.testing.assert_close(target["B"], torch.full((5,), -1.0), atol=0.01, rtol=0)

    printed = capsys.readouterr().out
    letters = "".join(SOURCES)
    covered = sum(letter in "ab" for letter in letters) / len(letters)
    for side, table, others in (("Source", source, 0), ("Target", target, 1)):
        assert (
            f"{side} embeddings: vectors for 2 of {len(table)} tokens ({2 / len(table):.1%}), {others} of them "
            f"lower-cased, {others} duplicates left out; {covered:.1%} of the training data's tokens."
        ) in printed
    saved = json.loads((Path(files["out"]) / "all_results.json").read_text())
    for figures in (results, saved):
        assert figures["source_embeddings_coverage"] == 2 / len(source)
        assert figures["source_embeddings_token_coverage"] == covered
        assert figures["target_embeddings_found"] == 2
        assert figures["target_embeddings_lower_cased"] == 1
        assert figures["target_embeddings_duplicates"] == 1
    # Freezing is no property of the model.
    assert all(weight.requires_grad for weight in AutoModelForSeq2SeqLM.from_pretrained(files["out"]).parameters())


def test_resuming_stays_frozen_and_equals_not_stopping(script, files, tmp_path):
    given = ["--source_embeddings_file", files["source"], "--freeze_source_embeddings", *BOTH, "--max_steps", "4"]
    script.main(flags(files, *given))
    other = str(tmp_path / "other")
    checkpoint = f"{files['out']}/checkpoint-2"
    script.main(flags(files, *given, "--resume_from_checkpoint", checkpoint, output_dir=other))
    one, two = (load_file(Path(folder) / "model.safetensors") for folder in (files["out"], other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert tables(other)[0]["a"].tolist() == [1] * 4


def test_other_rows_keep_their_first_weights(script, files, tmp_path):
    """With a learning rate of 0: those of a training without the file."""
    common = ["--max_steps", "1", "--learning_rate", "0"]
    script.main(flags(files, *common))
    script.main(flags(files, *common, "--source_embeddings_file", files["source"], output_dir=str(tmp_path / "with")))
    without, given = tables(files["out"]), tables(str(tmp_path / "with"))
    assert {token for token, row in given[0].items() if not torch.equal(row, without[0][token])} == {"a", "b"}
    assert all(torch.equal(row, without[1][token]) for token, row in given[1].items())


def test_one_shared_vocabulary(script, files, tmp_path):
    data = tmp_path / "words.tsv"
    data.write_text("".join(f"{letters}\t{letters[::-1]}\n" for letters in SOURCES), encoding="utf-8")
    shared = flags({**files, "data": str(data)}, "--max_steps", "2")
    shared = [flag.replace("symbols", "char") for flag in shared] + ["--shared_vocabulary"]
    script.main([*shared, "--source_embeddings_file", files["source"], "--freeze_source_embeddings"])
    weights = load_file(Path(files["out"]) / "model.safetensors")
    (table,) = (weights[name] for name in weights if name.endswith("embed_tokens.weight"))
    assert table[AutoTokenizer.from_pretrained(files["out"]).get_vocab()["b"]].tolist() == [2] * 4
    with pytest.raises(ArgumentError, match="are for two vocabularies; this model has one"):
        script.main([*shared, "--target_embeddings_file", files["target"], "--overwrite_output_dir"])


def test_freezing_a_saved_model(script, files, tmp_path):
    script.main(flags(files, "--max_steps", "1"))
    before = tables(files["out"])
    fine_tuned = str(tmp_path / "fine_tuned")
    more = ["--model_name_or_path", files["out"], "--freeze_target_embeddings", "--max_steps", "2"]
    script.main(flags(files, *more, "--learning_rate", "0.1", output_dir=fine_tuned))
    after = tables(fine_tuned)
    assert all(torch.equal(row, after[1][token]) for token, row in before[1].items())
    assert not all(torch.equal(row, after[0][token]) for token, row in before[0].items())


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--source_embeddings_file", "nowhere.vec"], ArgumentError, "nowhere.vec: no such file"),
        (["--freeze_target_embeddings"], ArgumentError, "needs --target_embeddings_file or --model_name_or_path"),
        (["--source_embeddings_file", "SOURCE", "--embedding_size", "5"], DataError, r"source.vec, line 1: .* 4 wide"),
        (["--target_embeddings_file", "TARGET"], DataError, r"target.txt.gz, line 1: the vector is 5 wide"),
        (
            ["--source_embeddings_file", "OTHER"],
            ArgumentError,
            "no vector for any of the vocabulary's tokens, .* like",
        ),
        (["--source_embeddings_file", "SOURCE", "--model_name_or_path", "x"], ArgumentError, "is for a new model"),
    ],
)
def test_refused_runs(script, files, tmp_path, more, error, message):
    (tmp_path / "other.vec").write_text("x 1 2 3 4\n")
    paths = {"SOURCE": files["source"], "TARGET": files["target"], "OTHER": str(tmp_path / "other.vec")}
    with pytest.raises(error, match=message):
        script.main(flags(files, *[paths.get(flag, flag) for flag in more]))
    assert not list(Path(files["out"]).glob("**/*.safetensors"))
