"""The benchmarks run, and print and save a figure for all who take part. No speed is tested."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from models import tiny_model
from scripts import load_script

from hf_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer

SMALL = ["--hidden", "8", "--embedding", "4", "--source_vocab", "20", "--target_vocab", "20", "--threads", "1"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    record = json.loads(path.read_text())
    assert record["machine"]["threads"] == 1
    return record["rows"]


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", *SMALL, "--updates", "1", "--rounds", "1", "--batch_size", "2", "--attention", "general"]
    load_script("benchmark").main([*command, "--output", str(tmp_path / "train.json")])
    rows = rows_of(tmp_path / "train.json")
    names = [row["name"] for row in rows]
    assert names[0] == "ours"
    products = ["matrix products alone, highest", "matrix products alone, medium", "products, cross entropy and Adam"]
    assert names[-5:] == [*products, "matrix products alone, bf16", "products, cross entropy and Adam, bf16"]
    assert all(row["median"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert "OpenNMT-py: left out, no --opennmt_python" in printed


def test_lengths_are_those_asked_for() -> None:
    for length in (12.2, 50.0):
        batches = load_script("benchmark").captions(10, 64, 100, 90, length)
        assert [len(batch["source"]) for batch in batches] == [64] * 10
        for side, words in (("source", 100), ("target", 90)):
            rows = [row for batch in batches for row in batch[side]]
            assert abs(sum(map(len, rows)) / len(rows) - length) < 0.05 * length
            assert {id for row in rows for id in row} == set(range(4, words))


def test_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("benchmark")
    monkeypatch.setattr(script, "SCALES", {"source length": (2, 4), "width": (4, 8), "vocabulary": (20, 40)})
    script.main(["scaling", *SMALL, "--output", str(tmp_path / "scaling.json")])
    rows = rows_of(tmp_path / "scaling.json")
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("source length", 2), ("source length", 4), ("width", 4), ("width", 8), ("vocabulary", 20), ("vocabulary", 40),
    ]  # fmt: skip
    assert all(row["seconds"]["ours"] > 0 for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def save_model_and_source(folder: Path) -> None:
    """`model`, with its tokenizer, and `source`, three lines."""
    tokenizer = RnnSeq2SeqTokenizer(train_tokenizer(["abc"], "char"), train_tokenizer(["x y z"], "symbols"))
    model = tiny_model(source_vocab_size=tokenizer.source_vocab_size, vocab_size=len(tokenizer)).float()
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "source").write_text("abc\nb\nca\n", encoding="utf-8")


def test_decoding_in_every_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_and_source(tmp_path)
    (tmp_path / "target").write_text("x y z\ny\nz x\n", encoding="utf-8")
    files = [f"--{name}={tmp_path / name}" for name in ("model", "source", "target")]
    command = ["decode", *files, "--threads", "1", "--rounds", "1", f"--output={tmp_path / 'decode.json'}"]
    pytest.importorskip("onnxruntime")
    script = load_script("benchmark")
    main, loaded = script.main, script.LOADED
    main(command)
    rows = rows_of(tmp_path / "decode.json")
    limits = [row for row in rows if row["name"] in script.DECODING_LIMITS]
    assert len(limits) == 4 * 3
    assert all(figure > 0 for row in limits for figure in row["all"])
    rows = [row for row in rows if row not in limits]
    assert [(row["batch_size"], row["beams"]) for row in rows[:: len(loaded)]] == [
        (1, 1), (1, 5), (64, 1), (64, 5),
    ]  # fmt: skip
    assert {row["name"] for row in rows} == set(loaded)
    assert {"ours", "ours, packed", "ours, ONNX Runtime, int8"} < set(loaded)
    assert all(row["same_output"] == 1 for row in rows if "bf16" not in row["name"] and "int8" not in row["name"])
    assert "BLEU" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="decode needs --source, and either --model or"):
        main(["decode", *files, "--opennmt_model", "model.pt", "--opennmt_python", sys.executable])


def test_decoding_with_larger_vocabularies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model_and_source(tmp_path)
    command = ["vocabulary", f"--source={tmp_path / 'source'}", "--threads", "1", "--rounds", "1"]
    main = load_script("benchmark").main
    main([*command, f"--model={tmp_path / 'model'}", f"--output={tmp_path / 'vocabulary.json'}"])
    rows = rows_of(tmp_path / "vocabulary.json")
    assert [(row["times"], row["batch_size"], row["name"]) for row in rows[::3]] == [
        (1, 1, "all words"), (1, 64, "screened"), (4, 64, "all words"), (16, 1, "screened"),
    ]  # fmt: skip
    assert all(row["same_output"] == 1 for row in rows[1::2])
    assert "16 times the vocabulary" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="vocabulary needs --model and --source"):
        main(command)


@pytest.mark.slow
def test_compiling(tmp_path: Path) -> None:
    sizes = ["--batch_size", "2", "--length", "5", "--vocab", "50", "--width", "16", "--rounds", "2"]
    command = [*sizes, "--wirings", "output_only", "--output", str(tmp_path / "compile.json")]
    load_script("benchmark_compile").main(command)
    figures = json.loads((tmp_path / "compile.json").read_text())["figures"]
    assert set(figures) == {"output_only training", "output_only decoding"}
    training = figures["output_only training"]
    assert [training[f"step_{index}_graphs"] for index in range(3)] == [1, 2, 2]
    assert training["ratio"] > 0


def test_the_gpus_benchmark_on_the_cpu(tmp_path: Path) -> None:
    sizes = ["--batch_size", "2", "--length", "3", "--vocab", "20", "--width", "8", "--rounds", "1", "--repeats", "1"]
    load_script("benchmark_gpu").main([*sizes, "--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    figures = json.loads((tmp_path / "gpu.json").read_text())["figures"]
    timed = {name: figure for name, figure in figures.items() if "seconds" in figure}
    assert len(timed) == 8
    assert all(figure["tokens_per_second"] > 0 for figure in timed.values())
    ratio = figures["GNMT v2 / plain loop"]["ratio"]
    assert ratio == timed["train plain loop"]["seconds"] / timed["train GNMT v2"]["seconds"]
