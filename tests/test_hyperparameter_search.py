import json
import math
import os
import subprocess
import sys
from pathlib import Path

import datasets
import optuna
import pytest
import yaml
from scripts import load_script
from transformers import AutoConfig

from hf_rnn_seq2seq.arguments import ArgumentError, parse_arguments
from hf_rnn_seq2seq.hyperparameter_search import (
    BEST_RECIPE_FILE,
    RESULTS_FILE,
    Dimension,
    HyperparameterSearchTrainer,
    read_search_space,
)

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "run_seq2seq.py"
SOURCES = ["abc", "ca", "b", "bcab", "aa", "cc", "abcabc", "bb", "cab", "acb"]
SPACE = """
learning_rate: {type: float, low: 1e-4, high: 1.0e-2, log: true}
hidden_size: {type: int, low: 4, high: 12, step: 4}
cell_type: {type: categorical, choices: [lstm, gru]}
label_smoothing_factor: {type: float, low: 0, high: 0.2, step: 0.1}
tie_word_embeddings: {type: categorical, choices: [true, false]}
"""


@pytest.fixture(scope="module")
def script():
    return load_script("run_seq2seq")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def flags(tmp_path) -> list[str]:
    data = write(tmp_path / "all.tsv", "".join(f"{source}\t{' '.join(source.upper())}\n" for source in SOURCES))
    flags = [f"--{split}_file={data}" for split in ("train", "validation")]
    flags += ["--source_tokenizer_kind", "char", "--target_tokenizer_kind", "symbols", "--embedding_size", "8"]
    flags += ["--use_cpu", "--disable_tqdm", "true", "--report_to", "none", "--do_train", "--max_steps", "4"]
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    return [*flags, "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize("metric", ["loss", "symbol_error_rate"])
def test_a_search(script, flags, tmp_path, capsys, metric):
    flags += ["--hp_search", write(tmp_path / "space.yaml", SPACE), "--metric_for_best_model", metric]
    flags += ["--load_best_model_at_end", "--learning_rate", "0.5"]
    results = script.main([*flags, "--hp_trials", "2"])
    out = tmp_path / "out"
    content = json.loads((out / RESULTS_FILE).read_text())
    assert (content["metric"], content["direction"]) == (f"eval_{metric}", "minimize")
    first = content["trials"]
    assert [trial["number"] for trial in first] == [0, 1]
    assert first[0]["values"] != first[1]["values"]
    for trial in first:
        assert set(trial["values"]) == set(yaml.safe_load(SPACE))
        # What was tried is what was trained, and the value is the best of the trial's evaluations.
        checkpoint = out / f"run-{trial['number']}" / "checkpoint-4"
        config = AutoConfig.from_pretrained(checkpoint)
        assert all(
            getattr(config, name) == trial["values"][name]
            for name in ("hidden_size", "cell_type", "tie_word_embeddings")
        )
        args = json.loads((checkpoint / "training_args.json").read_text())
        assert args["learning_rate"] == trial["values"]["learning_rate"]
        assert args["label_smoothing_factor"] == trial["values"]["label_smoothing_factor"]
        history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        assert trial[f"eval_{metric}"] == min(entry[f"eval_{metric}"] for entry in history if "eval_loss" in entry)
    best = min(first, key=lambda trial: trial[f"eval_{metric}"])
    assert results == {"search_trials": 2, "best_trial": best["number"], f"best_eval_{metric}": best[f"eval_{metric}"]}
    assert content["best_trial"] == best["number"]
    table = capsys.readouterr().out.split("trial  state")[1].splitlines()
    assert table[0].split()[1:] == list(yaml.safe_load(SPACE))
    assert table[1].split()[:2] == [str(best["number"]), "complete"]

    # The study goes on: the first two trials stay as they are.
    script.main([*flags, "--hp_trials", "3"])
    trials = json.loads((out / RESULTS_FILE).read_text())["trials"]
    assert trials[:2] == first
    assert len(trials) == 3
    assert trials[2]["values"] not in [trial["values"] for trial in first]
    assert script.main([*flags, "--hp_trials", "3"])["search_trials"] == 3
    assert len(optuna.load_study(study_name=None, storage=f"sqlite:///{out / 'study.db'}").trials) == 3

    recipe = yaml.safe_load((out / BEST_RECIPE_FILE).read_text())
    best = min(trials, key=lambda trial: trial[f"eval_{metric}"])
    assert recipe.items() >= best["values"].items()
    assert not {"hp_search", "hp_trials", "output_dir"} & set(recipe)
    if metric == "loss":  # the recipe gives what the trial gave
        script.main([str(out / BEST_RECIPE_FILE), "--output_dir", str(tmp_path / "again"), "--do_eval"])
        figures = json.loads((tmp_path / "again" / "all_results.json").read_text())
        assert figures["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-6)


def test_another_study_is_not_gone_on_with(script, flags, tmp_path):
    storage = ["--hp_storage", str(tmp_path / "other" / "my.db"), "--hp_trials", "1"]
    space = write(tmp_path / "space.yaml", "hidden_size: {type: int, low: 4, high: 8, step: 4}")
    script.main([*flags, *storage, "--hp_search", space])
    assert (tmp_path / "other" / "my.db").is_file()
    write(tmp_path / "space.yaml", "hidden_size: {type: int, low: 4, high: 16, step: 4}")
    with pytest.raises(ArgumentError, match=r"other/my\.db: the study there is another"):
        script.main([*flags, *storage, "--hp_search", space])


def test_no_trial_comes_to_a_value(script, flags, tmp_path):
    space = write(tmp_path / "space.yaml", "hidden_size: {type: int, low: 5, high: 7, step: 2}")  # must be even
    with pytest.raises(ArgumentError, match=r"space\.yaml: none of 2 trials came to a value"):
        script.main([*flags, "--hp_trials", "2", "--hp_search", space])


def test_values_that_do_not_go_together_fail_one_trial(flags, tmp_path, capsys):
    text = """
        lr_decay_start: {type: categorical, choices: [5, 15]}
        lr_decay_end: {type: categorical, choices: [20, 10]}
    """
    argv = [*flags, "--lr_scheduler_type", "rnmt_plus", "--lr_decay_unit", "steps"]
    argv += ["--lr_decay_start", "5", "--lr_decay_end", "20"]
    space = read_search_space(write(tmp_path / "space.yaml", text), argv)
    searcher = HyperparameterSearchTrainer(parse_arguments(argv), argv, space, make_trainer=None)
    searcher.train(trial=optuna.trial.FixedTrial({"lr_decay_start": 15, "lr_decay_end": 10}, number=7))
    assert math.isnan(searcher.objective)
    assert "Trial 7 can't be run: {'lr_decay_start': 15, 'lr_decay_end': 10}" in capsys.readouterr().out


def test_dimensions(flags, tmp_path):
    assert read_search_space(write(tmp_path / "space.yaml", SPACE), flags) == [
        Dimension("learning_rate", "float", 1e-4, 1e-2, log=True),
        Dimension("hidden_size", "int", 4, 12, step=4),
        Dimension("cell_type", "categorical", choices=("lstm", "gru")),
        Dimension("label_smoothing_factor", "float", 0, 0.2, step=0.1),
        Dimension("tie_word_embeddings", "categorical", choices=(True, False)),
    ]
    values = {"learning_rate": 2e-3, "hidden_size": 8, "cell_type": "gru"}
    trial = optuna.trial.FixedTrial({**values, "label_smoothing_factor": 0.1, "tie_word_embeddings": True})
    for dimension in read_search_space(tmp_path / "space.yaml", flags):
        value = dimension.suggest(trial)
        assert value == trial.params[dimension.name]
        assert isinstance(value, {"int": int, "float": float}.get(dimension.type, (str, bool)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", r"space\.yaml: a search space is a mapping from names to dimensions, not \[1, 2\]"),
        ("a: {", r"space\.yaml: not a YAML file"),
        ("!!python/name:os.system {}", r"space\.yaml: not a YAML file: could not determine a constructor"),
        ("hiden_size: {type: int}", r"key 'hiden_size': must be .*did you mean .*hidden_size"),
        ("train_file: {type: categorical, choices: [a]}", "key 'train_file': must be a training argument or"),
        ("output_dir: {type: categorical, choices: [a]}", "not one that all trials share"),
        ("vocab_size: {type: int, low: 1, high: 2}", "not one that all trials share"),
        ("hidden_size: 8", r"key 'hidden_size': 8: must be a mapping"),
        ("hidden_size: {type: integer}", "type='integer': must be one of float, int, categorical"),
        ("hidden_size: {low: 1, high: 2}", "type=None: must be one of float, int, categorical"),
        ("hidden_size: {type: int, low: 4, high: 8, steps: 2}", "'steps': a int has high, log, low, step"),
        ("hidden_size: {type: int, low: 4.5, high: 8}", "low=4.5: must be a whole number"),
        ("hidden_size: {type: int, low: 4}", "high=None: must be a whole number"),
        ("hidden_size: {type: int, low: 8, high: 4}", "high=4: must be above low=8"),
        ("learning_rate: {type: float, low: 0, high: 1, log: true}", "low=0: must be above 0 for log"),
        ("learning_rate: {type: float, low: x, high: 1}", "low='x': must be a number"),
        ("learning_rate: {type: float, low: 1, high: 2, log: 1}", "log=1: must be true or false"),
        ("learning_rate: {type: float, low: 1, high: 2, log: true, step: 1}", "step=1: must be above 0, and not"),
        ("cell_type: {type: categorical, choices: []}", r"choices=\[\]: must be a list of texts, numbers"),
        ("cell_type: {type: categorical, choices: [[1]]}", r"choices=\[\[1\]\]: must be a list of texts, numbers"),
        ("cell_type: {type: categorical, choices: [lstm, gruu]}", "key 'cell_type', value 'gruu': "),
        ("max_grad_norm: {type: categorical, choices: [1.0, none]}", "key 'max_grad_norm', value 'none': "),
        ("ema_decay: {type: float, low: 0.5, high: 1.5}", "key 'ema_decay', value 1.5: .*less than 1"),
    ],
)
def test_refused_search_spaces(flags, tmp_path, text, message):
    with pytest.raises(ArgumentError, match=message):
        read_search_space(write(tmp_path / "space.yaml", text), flags)


def test_a_search_space_that_is_not_there(flags, tmp_path):
    with pytest.raises(ArgumentError, match=r"nowhere\.yaml: the search space can't be read: No such file"):
        read_search_space(tmp_path / "nowhere.yaml", flags)


@pytest.mark.parametrize("more", [["--resume_from_checkpoint", "True"], ["--do_train", "False", "--do_eval"]])
def test_what_a_search_does_not_go_with(script, flags, more):
    with pytest.raises(ArgumentError, match=r"--hp_search needs --do_train|need --model_name_or_path"):
        script.main([*flags, "--hp_search", "space.yaml", *more])


@pytest.mark.slow
def test_two_processes_search_together(flags, tmp_path):
    space = write(tmp_path / "space.yaml", "hidden_size: {type: int, low: 4, high: 8, step: 4}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*command, *flags, "--hp_search", space, "--hp_trials", "2", "--ddp_find_unused_parameters", "False"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trial  state") == 1
    trials = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "complete"]
    assert (tmp_path / "out" / "run-1" / "checkpoint-4" / "rng_state_1.pth").is_file()  # there were two
