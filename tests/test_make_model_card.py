"""The card says what was run; its commands, run again, give its figures."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from interrupted_run import Run
from scripts import load_script
from transformers import AutoTokenizer

from hf_rnn_seq2seq import RnnSeq2SeqEnsemble
from hf_rnn_seq2seq.model_card import CardError

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "training_scripts" / "make_model_card.py"
SOURCES = ["abc", "ca", "b", "bcab", "aa", "cc", "abcabc", "bb", "cab", "acb"]
RECIPE = """\
train_file: ${LETTERS}/all.tsv
extra_train_files: ["${LETTERS}/more.tsv"]
validation_file: ${LETTERS}/all.tsv
hidden_size: 8
embedding_size: 8
source_tokenizer_kind: char
target_tokenizer_kind: symbols
max_source_length: 6
use_cpu: true
disable_tqdm: true
report_to: none
do_train: true
do_eval: true
num_train_epochs: 2
per_device_train_batch_size: 4
learning_rate: 0.02
metrics: [bleu, symbol_error_rate]
output_dir: out
"""
TRAIN = shlex.split("recipe.yaml --seed 3 --resume_from_checkpoint auto")
PREDICT = shlex.split(
    "recipe.yaml --do_train false --do_eval false --do_predict --model_name_or_path out --num_attention_plots 1 "
    "--num_beams 2 --test_file letters/all.tsv"
)
ENSEMBLE = shlex.split(
    "recipe.yaml --do_train false --do_eval --do_predict --ensemble out dot --test_file letters/all.tsv --num_beams 2 "
    "--num_attention_plots 1 "
    "--output_dir both"
)


@pytest.fixture(scope="module")
def make():
    return load_script("make_model_card").main


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working folder in which a model was trained, and then predicted with."""
    place = tmp_path_factory.mktemp("place")
    (place / "letters").mkdir()
    (place / "letters" / "all.tsv").write_text("".join(f"{each}\t{' '.join(each.upper())}\n" for each in SOURCES))
    (place / "letters" / "more.tsv").write_text("bca\tB C A\n")
    (place / "recipe.yaml").write_text(RECIPE)
    run(place, TRAIN)
    run(place, [*TRAIN, "--attention_type", "dot", "--output_dir", "dot"])
    run(place, PREDICT)
    return place


def run(place: Path, flags: list[str], code: int = 0) -> None:
    done = Run(flags, place, environment={"LETTERS": str(place / "letters")})
    assert done.end() == code, done.printed


@pytest.fixture
def folder(place, tmp_path) -> Path:
    shutil.copytree(place / "out", tmp_path / "out")
    return tmp_path / "out"


def test_the_commands_in_the_card_give_its_figures(make, place, tmp_path):
    make([str(place / "out"), "--output", str(place / "cards" / "letters.md")])
    text = (place / "cards" / "letters.md").read_text(encoding="utf-8")
    commands = re.search(r"```bash\n(.*?)```", text, flags=re.DOTALL)[1].splitlines()
    assert [shlex.split(command)[:2] for command in commands] == [["python", "training_scripts/run_seq2seq.py"]] * 2
    assert "with `LETTERS` set to where the data is" in text
    assert str(place) not in text
    shutil.copytree(place / "letters", tmp_path / "letters")
    shutil.copy(place / "recipe.yaml", tmp_path)
    for command in commands:
        run(tmp_path, shlex.split(command)[2:])
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    names = {"validation": "eval", "test": "predict"}
    figures = re.findall(r"^\| (validation|test) \| (\w+) \| ([\d.e+-]+) \|$", text, flags=re.MULTILINE)
    assert {("test", "bleu"), ("validation", "symbol_error_rate"), ("test", "loss")} <= {row[:2] for row in figures}
    for split, name, value in figures:
        assert f"{results[f'{names[split]}_{name}']:.4g}" == value
    data = ModelCard.load(place / "cards" / "letters.md").data
    written = {(result.dataset_split, result.metric_type): result.metric_value for result in data.eval_results}
    assert written["test", "bleu"] == pytest.approx(results["predict_bleu"], abs=1e-4)


def test_what_the_card_says(make, place):
    make([str(place / "out"), "--output", str(place / "cards" / "letters.md")])
    text = (place / "cards" / "letters.md").read_text(encoding="utf-8")
    record = json.loads((place / "out" / "run.json").read_text())
    for words in (
        "| seed | 3 |",
        "| max_source_length | 6 |",
        "| test | 10 | all.tsv (",
        "| train | 10 | all.tsv (",  # one is longer than max_source_length, and more.tsv has one
        "), more.tsv (",
        f"cores of {record['hardware']['cpu']}, begun {record['started']}",
        "![Attention over a test source while its prediction is read](letters_attention.png)",
        "## Limits",
        "at most so many tokens: source 6.",
        "for the figures was found by greedy search (validation), 2 beams (test).",
    ):
        assert words in text
    assert re.search(r"^\| test \| bleu_signature \| .*tok:13a.* \|$", text, flags=re.MULTILINE)
    assert re.search(r"\d+ steps, 2 epochs in \d+ seconds, on ", text)
    assert (place / "cards" / "letters_attention.png").read_bytes().startswith(b"\x89PNG")
    own = (place / "out" / "README.md").read_text(encoding="utf-8")  # run_seq2seq.py's, before predictions were made
    assert "training_scripts/run_seq2seq.py recipe.yaml --seed 3\n" in own


def test_an_interrupted_run_has_the_time_of_all_its_parts(make, folder):
    for name, changed in (("run.json", {"resumed": True}), ("all_results.json", {"train_total_runtime": 98765.4})):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changed))
    make([str(folder), "--output", str(folder / "card.md")])
    said = "epochs in 98,765 seconds (it was interrupted, and resumed from a checkpoint), on "
    assert said in (folder / "card.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("predict_bleu", "no card without all_results.json: predict_bleu$"),
        ("eval_bleu_signature", "no card without all_results.json: eval_bleu_signature$"),
        ("predict_loss", "no card without all_results.json: predict_loss"),
        ("train_total_runtime", "no card without all_results.json: train_total_runtime$"),
        ("attention_plots", r"no card without attention_plots \(--num_attention_plots\)$"),
        ("run.json", "run.json: can't be read, which a card needs"),
        ("all_results.json", "all_results.json: can't be read, which a card needs"),
    ],
)
def test_refuses_when_something_is_missing(make, folder, name, message):
    results = json.loads((folder / "all_results.json").read_text())
    if results.pop(name, None) is not None:
        (folder / "all_results.json").write_text(json.dumps(results))
    elif (folder / name).is_dir():
        shutil.rmtree(folder / name)
    else:
        (folder / name).unlink()
    with pytest.raises(CardError, match=message):
        make([str(folder), "--output", str(folder / "card.md")])
    assert not (folder / "card.md").exists()


def test_a_run_that_did_not_predict(make, place):
    with pytest.raises(CardError, match=r"no card without figures of the test data \(--do_predict\), attention_plots"):
        make([str(place / "dot")])


def test_table_of_variants(make, place, folder, tmp_path):
    rows = [{"change": "twice as wide", "figures": {"eval_bleu": 12.5}}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    make([str(folder), "--variants", str(place / "dot"), "--axes_table", str(tmp_path / "rows.json")])
    text = (folder / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## What helps") :].split("\n\n")[1].splitlines()
    assert table[0].startswith("| changed | validation bleu | validation bleu_brevity_penalty | validation loss |")
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| this model",
        "| `attention_type` dot",
        "| twice as wide",
    ]
    assert table[4] == "| twice as wide | 12.5 |" + " – |" * (table[0].count("|") - 3)
    with pytest.raises(CardError, match="there is nothing different from"):
        make([str(folder), "--variants", str(place / "out")])
    (tmp_path / "rows.json").write_text('[{"changed": "x"}]')
    with pytest.raises(CardError, match=r"rows.json: must be a list of \{\"change\""):
        make([str(folder), "--axes_table", str(tmp_path / "rows.json")])
    (tmp_path / "rows.json").write_text('[{"change": "x", "figures": {"eval_wer": 1}}]')
    with pytest.raises(CardError, match="no figure in common"):
        make([str(folder), "--axes_table", str(tmp_path / "rows.json")])


def test_an_ensemble_beside_it(make, place, folder, tmp_path):
    run(place, ENSEMBLE)
    make([str(place / "out"), "--ensemble", str(place / "both"), "--output", str(tmp_path / "card.md")])
    section = re.search(r"## Ensemble\n.*?(?=\n## )", (tmp_path / "card.md").read_text("utf-8"), flags=re.DOTALL)[0]
    results = json.loads((place / "both" / "all_results.json").read_text())
    for split, prefix in (("validation", "eval"), ("test", "predict")):
        for name in ("bleu", "symbol_error_rate"):
            assert f"| {split} | {name} | {results[f'{prefix}_{name}']:.4g} |" in section
    assert "loss" not in section
    commands = re.search(r"```bash\n(.*?)```", section, flags=re.DOTALL)[1].splitlines()
    flags = [shlex.split(command)[2:] for command in commands]
    assert flags == [TRAIN[:3], PREDICT, [*TRAIN[:3], "--attention_type", "dot", "--output_dir", "dot"], ENSEMBLE]
    model = RnnSeq2SeqEnsemble.from_pretrained([place / "out", place / "dot"])
    tokenizer = AutoTokenizer.from_pretrained(place / "out")
    ids = model.generate(**tokenizer(SOURCES, return_tensors="pt", padding=True), num_beams=2)
    written = (place / "both" / "generated_predictions.txt").read_text("utf-8").splitlines()
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == written
    with pytest.raises(CardError, match=r"out: not made by run_seq2seq\.py with --ensemble"):
        make([str(place / "out"), "--ensemble", str(place / "out"), "--output", str(tmp_path / "card.md")])


def test_the_mean_of_trainings(make, place, tmp_path, monkeypatch):
    """It has a card like a training's, whose commands are those of all."""
    monkeypatch.chdir(place)
    run(place, [*TRAIN, "--seed", "4", "--output_dir", "other"])
    average = ["out", "other", "other", "--output_dir", "mean"]
    load_script("average_checkpoints").main(average)
    left = json.loads((place / "mean" / "all_results.json").read_text())
    trained = [json.loads((place / name / "all_results.json").read_text()) for name in ("out", "other")]
    assert left["train_total_runtime"] == sum(each["train_total_runtime"] for each in trained)
    assert not [name for name in left if name.startswith(("eval_", "predict_"))]  # those of other weights
    with pytest.raises(CardError, match=r"no card without figures of the test data"):
        make(["mean", "--output", str(tmp_path / "card.md")])
    evaluate = [*PREDICT, "--model_name_or_path", "mean", "--output_dir", "mean"]
    run(place, evaluate)
    make(["mean", "--output", str(tmp_path / "card.md")])
    text = (tmp_path / "card.md").read_text("utf-8")
    commands = re.search(r"```bash\n(.*?)```", text, flags=re.DOTALL)[1].splitlines()
    flags = [shlex.split(command)[1:] for command in commands]
    assert ["training_scripts/average_checkpoints.py", *average] in flags
    assert flags[-1] == ["training_scripts/run_seq2seq.py", *evaluate]
    assert ["training_scripts/run_seq2seq.py", *TRAIN[:3], "--seed", "4", "--output_dir", "other"] in flags
    results = json.loads((place / "mean" / "all_results.json").read_text())
    assert f"| test | bleu | {results['predict_bleu']:.4g} |" in text
    assert "| validation | " not in text
    assert "The weights are the mean of those of `out`, `other`, `other`." in text
    assert f"in {results['train_total_runtime']:,.0f} seconds" in text

    (place / "other" / "run.json").unlink()  # not run_seq2seq.py's
    load_script("average_checkpoints").main([*average[:-1], "bare"])
    assert not (place / "bare" / "run.json").exists()


def test_the_script_ends_with_an_error(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'run.json'}: can't be read")
