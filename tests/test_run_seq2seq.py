import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from scripts import load_script
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_rnn_seq2seq import RnnSeq2SeqConfig
from hf_rnn_seq2seq.arguments import ArgumentError, config_helps, parse_arguments
from hf_rnn_seq2seq.data import DataError

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "run_seq2seq.py"
RECIPES = sorted((SCRIPT.parent / "recipes").glob("*.yaml"))
SOURCES = ["abc", "ca", "b", "bcab", "aa", "cc", "abcabc", "bb", "cab", "acb"]
SMALL = ["--hidden_size", "8", "--embedding_size", "8", "--use_cpu", "--disable_tqdm", "true"]
KINDS = ["--source_tokenizer_kind", "char", "--target_tokenizer_kind", "symbols"]


@pytest.fixture(scope="module")
def script():
    return load_script("run_seq2seq")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "all.tsv"
    path.write_text("".join(f"{source}\t{' '.join(source.upper())}\n" for source in SOURCES), encoding="utf-8")
    return path


def train_flags(data: Path, output_dir: Path) -> list[str]:
    files = [f"--{split}_file={data}" for split in ("train", "validation", "test")]
    return [*files, *SMALL, *KINDS, "--output_dir", str(output_dir), "--do_train"]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, str]:
    """The output folder and what was printed, of everything at once in a process of its own."""
    output_dir = tmp_path_factory.mktemp("trained") / "out"
    flags = ["--do_eval", "--do_predict", "--max_steps", "2", "--num_attention_plots", "2", "--num_beams", "2"]
    flags += ["--metrics", "symbol_error_rate", "bleu", "--report_to", "tensorboard", "--logging_steps", "1"]
    flags += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"]
    flags += ["--load_best_model_at_end", "--metric_for_best_model", "symbol_error_rate"]
    flags += ["--early_stopping_patience", "3"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *train_flags(data, output_dir), *flags],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_DATASETS_CACHE": str(output_dir.parent / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output_dir, done.stdout


def test_predictions_are_in_order(trained):
    output_dir, _ = trained
    rows = [json.loads(line) for line in (output_dir / "generated_predictions.jsonl").open(encoding="utf-8")]
    assert [row["source"] for row in rows] == SOURCES
    assert [row["reference"] for row in rows] == [" ".join(source.upper()) for source in SOURCES]
    texts = (output_dir / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert texts == [row["prediction"] for row in rows]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(output_dir), AutoTokenizer.from_pretrained(output_dir)
    for source, text in zip(SOURCES, texts, strict=True):
        ids = model.generate(**tokenizer([source], return_tensors="pt"))
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text


def test_what_a_run_leaves_behind(trained):
    output_dir, printed = trained
    results = json.loads((output_dir / "all_results.json").read_text())
    assert {"train_loss", "eval_bleu", "eval_perplexity", "predict_symbol_error_rate"} <= set(results)
    assert "tok:" in results["predict_bleu_signature"]
    plots = sorted(path.name for path in (output_dir / "attention_plots").iterdir())
    assert plots == ["attention_000.png", "attention_001.png"]
    card = (output_dir / "README.md").read_text(encoding="utf-8")
    assert f"| test | symbol_error_rate | {results['predict_symbol_error_rate']:.4g} |" in card
    assert "fine-tuned" not in card
    assert list(output_dir.rglob("events.out.tfevents*"))
    assert (output_dir / "modeling_rnn_seq2seq.py").is_file()
    generation = json.loads((output_dir / "generation_config.json").read_text())
    assert generation["max_length"] == 7 * 3 // 2 + 1  # the longest target is six symbols and </s>
    assert generation["num_beams"] == 2
    assert json.loads((output_dir / "config.json").read_text())["use_cache"] is True
    for text in [
        "Dropped rows: train 0 of 10",
        "Test: loss",
        "reference:  A B C",
        str(output_dir / "attention_plots"),
    ]:
        assert text in printed


def test_a_saved_model_predicts_without_targets(script, trained, tmp_path):
    (tmp_path / "new.txt").write_text("ab\n\nunknown ß\n", encoding="utf-8")
    flags = ["--model_name_or_path", str(trained[0]), "--do_predict", "--test_file", str(tmp_path / "new.txt")]
    results = script.main([*flags, "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    assert results["predict_samples"] == 3
    assert not any("error_rate" in name for name in results)
    rows = [json.loads(line) for line in (tmp_path / "out" / "generated_predictions.jsonl").open(encoding="utf-8")]
    assert [row["source"] for row in rows] == ["ab", "", "unknown ß"]
    assert "reference" not in rows[0]


def test_fine_tuning(script, trained, data, tmp_path):
    flags = [f"--train_file={data}", f"--validation_file={data}", "--model_name_or_path", str(trained[0]), "--use_cpu"]
    flags += ["--output_dir", str(tmp_path / "out"), "--do_train", "--max_steps", "1"]
    with pytest.raises(ArgumentError, match=r"--hidden_size 16: the model of .* has 8"):
        script.main([*flags, "--hidden_size", "16"])
    script.main([*flags, "--hidden_size", "8", "--dropout", "0.4", "--tokenizer_lowercase"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dropout"] == 0.4
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (trained[0] / "tokenizer.json").read_text()


def test_resuming_equals_not_stopping(script, data, tmp_path):
    flags = [*train_flags(data, tmp_path / "out"), "--per_device_train_batch_size", "2", "--num_train_epochs", "2"]
    flags += ["--save_strategy", "steps", "--save_steps", "3"]
    with pytest.raises(ArgumentError, match="there is no complete checkpoint"):
        script.main([*flags, "--resume_from_checkpoint", "True"])
    script.main(flags)
    whole = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").state_dict()
    with pytest.raises(ArgumentError, match=r"isn't empty.*--overwrite_output_dir"):
        script.main(flags)
    for checkpoint in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / "out" / checkpoint / "optimizer.pt").unlink()  # as if interrupted
    script.main([*flags, "--resume_from_checkpoint", "True"])
    resumed = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").state_dict()
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 10
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    script.main([*flags, "--overwrite_output_dir", "--save_strategy", "no"])
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_shared_vocabulary_smoothing_and_several_references(script, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{source}\t{source}\n{source}\t{source[::-1]}\n" for source in SOURCES), encoding="utf-8")
    flags = [
        *train_flags(path, tmp_path / "out"),
        "--do_eval",
        "--do_predict",
        "--merge_references",
        "--max_steps",
        "1",
    ]
    flags = [flag for flag in flags if flag not in KINDS]
    flags += ["--source_tokenizer_kind", "char", "--shared_vocabulary", "--label_smoothing_factor", "0.1"]
    flags += ["--attention_type", "none", "--num_attention_plots", "1"]
    flags += ["--metrics", "symbol_error_rate", "bleu", "meteor", "--bleu_tokenize", "none", "--bleu_lowercase"]
    flags += ["--meteor_stemmer", "german", "--meteor_tokenize", "whitespace"]
    flags += ["--error_rate_symbols", "characters", "--max_predict_samples", "4", "--max_eval_samples", "3"]
    flags += ["--num_beams", "2"]
    flags += ["--generation_options", "min_new_tokens=6", "coverage_penalty=0", "length_penalty=0.5"]
    results = script.main(flags)
    assert (results["train_samples"], results["eval_samples"], results["predict_samples"]) == (20, 3, 4)
    assert not (tmp_path / "out" / "attention_plots").exists()  # there is nothing to draw
    assert "case:lc" in results["predict_bleu_signature"]
    assert "tok:none" in results["predict_bleu_signature"]
    assert results["predict_meteor_signature"].startswith("stem:german|syn:no|tok:whitespace|")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["source_vocab_size"] is None
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    expected = {"num_beams": 2, "min_new_tokens": 6, "coverage_penalty": 0, "length_penalty": 0.5}
    assert expected.items() <= generation.items()
    texts = (tmp_path / "out" / "generated_predictions.txt").read_text(encoding="utf-8").splitlines()
    assert all(len(text) >= 5 for text in texts)  # an end of sequence is a token, too
    assert "2 beams min_new_tokens=6 coverage_penalty=0 length_penalty=0.5 (test)" in (
        tmp_path / "out" / "README.md"
    ).read_text("utf-8")
    row = json.loads((tmp_path / "out" / "generated_predictions.jsonl").open(encoding="utf-8").readline())
    assert row["references"] == ["abc", "cba"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to do"),
        (["--do_eval"], "need --model_name_or_path or --ensemble"),
        (["--do_train", "--ensemble", "a", "b"], "--ensemble is for --do_eval and --do_predict, without --do_train"),
        (["--do_eval", "--ensemble", "a", "--model_name_or_path", "a"], "without --do_train and --model_name_or_path"),
        (["--do_train", "--bleu_tokenize", "words"], "--bleu_tokenize words: unknown; there are 13a, none"),
        (["--do_train", "--metrics", "blue"], "--metrics blue: unknown; there are sequence_error_rate"),
        (["--do_train", "--generation_options", "lenght_penalty=0"], "did you mean length_penalty"),
        (["--do_train", "--generation_options", "num_beams=4"], "it is a flag of its own, --num_beams"),
        (["--do_train", "--generation_options", "length_penalty=0"], "length_penalty=0: needs --num_beams greater"),
        (
            ["--do_train", "--num_beams", "2", "--generation_options", "early_stopping=perhaps"],
            "perhaps: .*early_stopping",
        ),
        (
            ["--do_train", "--num_beams", "2", "--generation_options", "coverage_penalty=x"],
            "coverage_penalty=x: .*coverage_penalty",
        ),
        (["--do_train", "--meteor_stemmer", "klingon"], "--meteor_stemmer klingon: unknown; there are porter, none"),
        (["--do_train", "--metrics", "bleu", "--metric_for_best_model", "chrf"], "there are loss, perplexity, bleu"),
        (["--do_train", "--early_stopping_patience", "2"], "needs --metric_for_best_model"),
        (["--do_train", "--resume_from_checkpoint", "nowhere"], "can't be resumed from: trainer_state.json"),
        (["--do_train", "--dropout", "1.5"], "the model's configuration: .*dropout"),
        (["--do_train", "--source_tokenizer_size", "2"], "tokenizer"),
        (
            ["--do_train", "--attention_type", "none", "--guided_alignment_weight", "1"],
            "guided_alignment_weight=1.0: the model has no attention",
        ),
    ],
)
def test_refusals(script, data, tmp_path, flags, message):
    files = [f"--train_file={data}", "--output_dir", str(tmp_path / "out"), *SMALL, "--test_split_percentage", "0"]
    with pytest.raises(ArgumentError, match=message):
        script.main([*files, "--validation_split_percentage", "0", *flags])


def test_missing_splits_and_bad_lines_stop_before_training(script, data, tmp_path):
    flags = [*train_flags(data, tmp_path / "out"), "--do_eval"]
    without = [flag for flag in flags if not flag.startswith("--validation_file")]
    with pytest.raises(DataError, match="There is no validation data: give --validation_file"):
        script.main([*without, "--validation_split_percentage", "0"])
    bad = tmp_path / "bad.tsv"
    bad.write_text("a\tA\nb\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *train_flags(bad, tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {bad}, line 2: 1 columns")
    assert not (tmp_path / "out").exists()


def test_every_field_of_the_configuration_is_a_flag(tmp_path):
    """Other than by default, for each field."""
    other = {"int": "3", "float": "0.25", "bool": "true"}
    for field in dataclasses.fields(RnnSeq2SeqConfig):
        if field.name not in RnnSeq2SeqConfig.__annotations__:
            continue
        choices = [c for c in getattr(field.type, "__args__", ()) if isinstance(c, str)]
        for member in getattr(field.type, "__args__", ()):
            choices += [c for c in getattr(member, "__args__", ()) if isinstance(c, str)]
        kind = next((name for name in ("float", "int", "bool") if name in str(field.type)), "")
        value = choices[-1] if choices else other[kind]
        args = parse_arguments(["--output_dir", str(tmp_path), f"--{field.name}", value])
        assert field.name in args.given
        if field.name not in ("use_cache", "coverage_loss_weight"):  # the Trainer copies these into the configuration
            assert str(args.config[field.name]).lower() == value
            assert args.config.keys() == {field.name}


def test_a_preset_and_what_changes_it(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--train_file", "x.tsv", "--preset", "kann2016_med", "--hidden_size", "50"]
    config = parse_arguments(flags).config
    assert (config["hidden_size"], config["embedding_size"], config["wiring_type"]) == (50, 300, "bahdanau")
    with pytest.raises(ArgumentError, match="--preset kann: there is no such preset; there are: sutskever2014"):
        parse_arguments([*flags, "--preset", "kann"])


def test_configuration_helps_come_from_its_docstring():
    helps = config_helps()
    assert helps["hidden_size"].startswith("Width H of the decoder's layers")
    assert helps["encoder_layers"] == helps["decoder_layers"] == "Number of layers."


def test_recipe_and_overrides(tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output_dir: outputs/x\ntrain_file: ${SOME_FOLDER}/train.tsv\nlearning_rate: 1e-2\nhidden_size: 64\n"
        "metrics: [bleu, chrf]\ndo_train: true\nbidirectional: false\nmax_train_samples: null\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    monkeypatch.delenv("SOME_FOLDER", raising=False)
    with pytest.raises(ArgumentError, match="key 'train_file': the environment variable SOME_FOLDER isn't set"):
        parse_arguments([str(recipe)])
    assert parse_arguments([str(recipe), "--train_file=x.tsv"]).data.train_file == "x.tsv"
    monkeypatch.setenv("SOME_FOLDER", "some folder")
    args = parse_arguments([str(recipe), "--learning_rate", "1e-3", "--hidden-size", "32", "--metrics", "wer"])
    assert args.data.train_file == "some folder/train.tsv"
    assert args.training.learning_rate == 1e-3
    assert args.config == {"hidden_size": 32, "bidirectional": False}
    assert args.run.metrics == ["wer"]
    assert args.training.do_train is True
    assert args.training.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hiden_size: 3\n", "unknown argument --hiden_size=3 .did you mean --hidden_size"),
        ("- a\n", "a recipe is a mapping"),
        ("a: [\n", "not a YAML file"),
        ("hidden_size: wide\n", "--hidden_size.*invalid int value: 'wide'"),
        ("attention_type: dots\n", "invalid choice: 'dots' .choose from 'none', 'dot'"),
        ("!!python/object/apply:os.system [ls]\n", "not a YAML file"),
    ],
)
def test_bad_recipes(tmp_path, content, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(ArgumentError, match=message):
        parse_arguments([str(recipe), "--output_dir", "x"])


def test_unknown_flags():
    with pytest.raises(ArgumentError, match=r"unknown argument --learning_rat .did you mean --learning_rate"):
        parse_arguments(["--output_dir", "x", "--learning_rat", "3"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_parse(recipe, tmp_path, monkeypatch):
    for name in ("SIGMORPHON_DATA", "SIGMORPHON_LANGUAGE", "MULTI30K_DATA"):
        monkeypatch.setenv(name, "x")
    args = parse_arguments([str(recipe)])
    assert args.given == set(yaml.safe_load(recipe.read_text()))
    RnnSeq2SeqConfig(**args.config)
    head = recipe.read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert "# Paper: " in head
    assert f"recipes/{recipe.name}" in head
