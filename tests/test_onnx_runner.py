"""The runner of exported models: texts in, texts out, without torch and transformers."""

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model
from scripts import load_script

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from exported import exported

from hf_rnn_seq2seq import RnnSeq2SeqTokenizer
from hf_rnn_seq2seq.onnx_export import export_onnx
from hf_rnn_seq2seq.onnx_runner import RnnSeq2SeqRunner, SearchOptions
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer

WORDS = ["abc cab", "a", "", "bca bab </s> a", "Äb"]
# Copied words, known on either side, on none, and again.
NAMES = ["who is Ann Bob Ann now", "is Zoe", "is it", ""]

# An interpreter in which only the runner's own needs can be imported.
REFUSING = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "hf_rnn_seq2seq", "onnx", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make(folder: Path, copies: bool, **settings: Any) -> tuple[Any, RnnSeq2SeqTokenizer]:
    """A model whose tokenizer is in its export."""
    kind = "symbols" if copies else "char"
    source = ["who is here now", "is it"] if copies else ["abc"]
    target = ["now there is it"] if copies else ["x y z"]
    tokenizer = RnnSeq2SeqTokenizer(
        train_tokenizer(source, kind), train_tokenizer(target, "symbols"), copies_source=copies, **settings
    )
    model = tiny_model(
        source_vocab_size=tokenizer.source_vocab_size,
        vocab_size=len(tokenizer),
        head_type="pointer_generator" if copies else "linear",
        attention_type="dot",
    ).float()
    model.generation_config.max_length = 9
    if copies:
        torch.nn.init.constant_(model.head.gate.bias, -6.0)  # hardly anything else than copying
    export_onnx(model, folder, tokenizer=tokenizer)
    return model, tokenizer


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RnnSeq2SeqTokenizer, Path]:
    folder = tmp_path_factory.mktemp("words")
    return *make(folder, copies=False), folder


def texts_of(model: Any, tokenizer: RnnSeq2SeqTokenizer, sources: list[str], **options: Any) -> list[str]:
    """By transformers, each source by itself, so that no padding has a part in it."""
    found = []
    for source in sources:
        batch = tokenizer([source], return_tensors="pt")
        sequences = model.generate(**batch, **options)
        copied = {"source_texts": [source]} if "copy_ids" in batch else {}
        found += tokenizer.batch_decode(sequences, skip_special_tokens=True, **copied)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "num_return_sequences": 2, "gnmt_length_penalty": 0.8},
        {"num_beams": 3, "opennmt_length_penalty": 1.0},
    ],
    ids=str,
)
def test_texts_are_those_of_model_and_tokenizer(words: Any, options: dict[str, Any]) -> None:
    model, tokenizer, folder = words
    found = RnnSeq2SeqRunner(folder, threads=1)(WORDS, **options)
    assert [one.text for row in found for one in row] == texts_of(model, tokenizer, WORDS, **options)
    lengths = [len(tokenizer(source)["input_ids"]) for source in WORDS]
    for row, length in zip(found, lengths, strict=True):
        for one in row:
            assert one.attention.shape == (len(one.ids), max(lengths))
            np.testing.assert_allclose(one.attention[:, :length].sum(-1), 1, atol=1e-5)


def test_padding_on_the_left(words: Any, tmp_path: Path) -> None:
    model, tokenizer, folder = words
    other = shutil.copytree(folder, tmp_path / "left")
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    runner = RnnSeq2SeqRunner(other)
    found = runner(WORDS, num_beams=2)
    assert [row[0].text for row in found] == texts_of(model, tokenizer, WORDS, num_beams=2)
    assert runner.texts is not None
    assert runner.texts.encode(["abc", "a"]).attention_mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_words_that_only_copying_gives(side: str, tmp_path: Path) -> None:
    model, tokenizer = make(tmp_path, copies=True, truncation_side=side)
    runner = RnnSeq2SeqRunner(tmp_path)
    assert runner.texts is not None
    batch = runner.texts.encode(NAMES)
    wanted = tokenizer(NAMES, padding=True, return_tensors="np")
    for name in ("input_ids", "attention_mask", "copy_ids"):
        assert getattr(batch, name).tolist() == wanted[name].tolist()
    found = [row[0].text for row in runner(NAMES, num_beams=3)]
    assert found == texts_of(model, tokenizer, NAMES, num_beams=3)
    copied = {word for text in found for word in text.split()} & {"Ann", "Bob", "Zoe"}
    assert copied


def test_where_nothing_else_can_be_imported(words: Any) -> None:
    """The file in the folder, run as a script by an interpreter that refuses torch and transformers."""
    model, tokenizer, folder = words
    command = [sys.executable, "-c", REFUSING, "onnx_runner.py", ".", "--num_beams", "2", "--threads", "1"]
    done = subprocess.run(
        [*command, "--batch_size", "2"],
        cwd=folder,
        input="\n".join(WORDS),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == texts_of(model, tokenizer, WORDS, num_beams=2)


@pytest.mark.slow
def test_in_an_environment_with_nothing_else(words: Any, tmp_path: Path) -> None:
    """A new virtual environment with numpy, onnxruntime and tokenizers from the package index."""
    model, tokenizer, folder = words
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    constraints = str(Path(__file__).parent.parent / "constraints.txt")
    install = [python, "-m", "pip", "install", "-q", "-c", constraints, "numpy", "onnxruntime", "tokenizers"]
    subprocess.run(install, check=True)
    for name in ("torch", "transformers"):
        assert subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode != 0
    command = [python, "onnx_runner.py", ".", "--num_beams", "2", "--num_return_sequences", "2"]
    done = subprocess.run(command, cwd=folder, input="\n".join(WORDS), capture_output=True, text=True, check=True)
    wanted = texts_of(model, tokenizer, WORDS, num_beams=2, num_return_sequences=2)
    assert done.stdout.split("\n")[:-1] == wanted


def test_options_come_from_the_folder_and_from_the_call(words: Any, tmp_path: Path) -> None:
    _, _, folder = words
    other = shutil.copytree(folder, tmp_path / "other")
    file = other / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "num_beams": 3, "max_new_tokens": 4, "do_sample": False, "top_k": 50}))
    runner = RnnSeq2SeqRunner(other)
    assert runner.defaults == {"num_beams": 3, "max_length": 9, "max_new_tokens": 4}
    assert {len(one.ids) for row in runner(["abc"], num_return_sequences=3) for one in row} <= {1, 2, 3, 4}
    assert len(runner(["abc"], num_return_sequences=3)[0]) == 3
    assert all(len(row[0].ids) <= 2 for row in runner(WORDS, max_length=3))
    file.write_text(json.dumps({**settings, "repetition_penalty": 1.3}))
    with pytest.raises(ValueError, match=r"generation_config.json asks for `repetition_penalty`=1.3"):
        RnnSeq2SeqRunner(other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "`num_beams` must be a whole number of at least 1, got 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"`num_return_sequences` \(3\) must be at most `num_beams` \(2"),
        ({"early_stopping": "always"}, "`early_stopping` must be True, False or 'never', got 'always'"),
        ({"max_length": 1}, "`max_length` must be at least 2"),
        (
            {"gnmt_length_penalty": 0.5, "length_penalty": 0.7},
            "`length_penalty`=0.7 and `gnmt_length_penalty`=0.5 exclude",
        ),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


def test_refused_inputs(words: Any, tmp_path: Path) -> None:
    runner = RnnSeq2SeqRunner(words[2])
    with pytest.raises(TypeError, match="must be a list of strings"):
        runner("abc")
    with pytest.raises(TypeError, match="unknown option `beams`; there are num_beams, "):
        runner(["abc"], beams=3)
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \(1, 2\), got \(2, 1\)"):
        runner.generate(np.ones((1, 2)), np.ones((2, 1)))
    with pytest.raises(ValueError, match="`copy_ids` is for a head that copies, not 'linear'"):
        runner.generate(np.ones((1, 2)), copy_ids=np.ones((1, 2)))
    assert runner([]) == []
    without_tokenizer = RnnSeq2SeqRunner(exported()[1])
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json: pass ids to `generate`"):
        without_tokenizer(["abc"])
    with pytest.raises(FileNotFoundError, match=r"has no encoder_model\.onnx"):
        RnnSeq2SeqRunner(tmp_path)


def test_benchmark_times_all_who_take_part(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer, folder = words
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "saved")
    (tmp_path / "words.txt").write_text("abc\n\nba\nc\n", encoding="utf-8")
    sizes = ["--batch_sizes", "1", "2", "--num_beams", "2", "--rounds", "2", "--threads", str(torch.get_num_threads())]
    command = [str(tmp_path / "saved"), str(folder), str(tmp_path / "words.txt"), *sizes]
    main = load_script("benchmark_onnx").main
    main([*command, "--lines", "3", "--output", str(tmp_path / "times.json")])
    records = json.loads((tmp_path / "times.json").read_text())["records"]
    contestants = ["pytorch", "generate, float32", "runner, float32"]
    assert [(one["batch_size"], one["contestant"]) for one in records] == [(n, c) for n in (1, 2) for c in contestants]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(records)
    for one in records:
        assert len(one["seconds"]) == 2
        assert one["milliseconds_per_line"] > 0
        assert (one["speed_ratio"] == 1) == (one["contestant"] == "pytorch")
    with pytest.raises(SystemExit, match="has 3 lines, too few"):
        main([*command, "--lines", "4"])
