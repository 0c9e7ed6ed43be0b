"""Training, evaluation and generation on several processes against the same on one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_worker
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from forked import on_processes

SCRIPTS = Path(__file__).parent.parent / "training_scripts"
TWO_AND_THREE = [2, pytest.param(3, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def one(folder) -> dict[str, Any]:
    """On one process, in this one; what else it leaves is the checkpoints."""
    functions = {name: process_worker.FUNCTIONS[name] for name in ("train", "evaluate")}
    return {name: function(str(folder), 1, 0) for name, function in functions.items()}


@pytest.fixture(scope="module")
def results(folder, one):
    """What each process returned, by the number of processes, launched once for each number."""
    cache: dict[int, dict[str, list[Any]]] = {}

    def on(number: int) -> dict[str, list[Any]]:
        if number not in cache:
            if number == 3:
                on(2)  # for its checkpoints
            calls = "evaluate", "shard", "train:1,2", "fsdp"
            on_processes(number, process_worker.main, str(folder), str(number), *calls)
            cache[number] = {
                name: [json.loads((folder / f"{name}-on-{number}-{rank}.json").read_text()) for rank in range(number)]
                for name in ("train", "evaluate", "shard", "fsdp")
            }
        return cache[number]

    return on


def assert_same_course(run: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, gradient norms, learning rates and metrics of every step that both have, and the last weights."""
    by_step = {(entry["step"], *entry): entry for entry in expected["log"]}
    assert run["log"]
    for entry in run["log"]:
        assert entry == pytest.approx(by_step[(entry["step"], *entry)], rel=1e-4)
    for name, weight in run["weights"].items():
        for row, expected_row in zip(weight, expected["weights"][name], strict=True):
            assert row == pytest.approx(expected_row, abs=1e-4)


@pytest.mark.parametrize("number", TWO_AND_THREE)
@pytest.mark.parametrize("run", process_worker.RUNS)
def test_same_course_as_on_one_process(one, results, run, number):
    """With clipping, accumulation, smoothing, a moving average, halving; rows are no multiple of the global batch."""
    first, *others = [process[run] for process in results(number)["train"]]
    assert len(first["log"]) == len(one["train"][run]["log"]) >= process_worker.STEPS_PER_EPOCH
    assert_same_course(first, one["train"][run])
    for other in others:
        assert other["weights"] == first["weights"]  # bit for bit
        assert other["log"] == first["log"]


@pytest.mark.parametrize("number", [1, *TWO_AND_THREE])
@pytest.mark.parametrize("run", process_worker.RUNS)
def test_every_row_comes_once_an_epoch(one, results, run, number):
    processes = [one["train"]] if number == 1 else results(number)["train"]
    steps = one["train"][run]["rows"]
    together = {
        step: sorted(row for process in processes for row in process[run]["rows"].get(step, [])) for step in steps
    }
    assert together == {step: sorted(rows) for step, rows in steps.items()}
    per_epoch = process_worker.STEPS_PER_EPOCH
    for first in range(1, len(steps), per_epoch):
        epoch = [row for step in range(first, first + per_epoch) for row in together[str(step)]]
        assert sorted(epoch) == list(range(process_worker.ROWS))


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [(1, 2), (2, 2), (2, 1), pytest.param(1, 3, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("run", ["lengths", "random"])
def test_checkpoints_of_any_number_of_processes(folder, one, results, run, saved_on, resumed_on):
    """Saved in the middle of the second epoch, with a moving average in one case."""
    if resumed_on == 1:
        results(saved_on)
        resumed = process_worker.resume(str(folder), 1, 0, run, str(saved_on))
    else:
        resumed = results(resumed_on)["train"][0][f"{run} from {saved_on}"]
    assert min(map(int, resumed["rows"])) == process_worker.SAVED_AT + 1
    assert_same_course(resumed, one["train"][run])


@pytest.mark.parametrize("number", TWO_AND_THREE)
def test_same_predictions_and_figures(one, results, number):
    expected = one["evaluate"]
    assert len(set(expected["greedy"])) > 12
    assert expected["greedy"] != expected["beams"]
    for process in results(number)["evaluate"]:  # all of them know the metrics: each looks for the best checkpoint
        for name in ("greedy", "beams", "labels"):
            assert process[name] == expected[name]
        for name in ("greedy metrics", "beams metrics", "loss alone", "loss of one row"):
            figures = {key: value for key, value in expected[name].items() if not key.endswith(("time", "second"))}
            assert any("perplexity" in key for key in figures)
            assert {key: process[name][key] for key in figures} == pytest.approx(figures, rel=1e-5)


@pytest.mark.parametrize("number", TWO_AND_THREE)
def test_the_first_process_alone_writes(folder, results, number):
    results(number)
    for run in ("lengths", "random"):
        written = folder / f"{run}-on-{number}"
        assert {"model.safetensors", "tokenizer.json", "README.md"} <= {
            path.name for path in (written / "rank0").iterdir()
        }
        for rank in range(1, number):
            files = {path.name for path in (written / f"rank{rank}").rglob("*") if path.is_file()}
            assert files == {f"rng_state_{rank}.pth"}


@pytest.mark.parametrize("number", TWO_AND_THREE)
@pytest.mark.parametrize("name", process_worker.SHARDED)
def test_sharded_model(results, name, number):
    """By FSDP2: shards, trains to the same weights, generates, and saves a model that anyone can load."""
    processes = [process[name] for process in results(number)["shard"]]
    parameters = processes[0]["parameters"]
    assert sum(process["own parameters"] for process in processes) == parameters
    for process in processes:
        assert process["own parameters"] < 1.2 * parameters / number  # small tensors don't divide evenly
        assert process["same ids"]
    assert processes[0]["moved"] > 0.01
    assert processes[0]["error"] < 1e-6
    assert "modeling_rnn_seq2seq.py" in processes[0]["code"]
    assert not any("fsdp" in text.lower() for text in processes[0]["code"] + processes[0]["classes"])


@pytest.mark.parametrize("number", TWO_AND_THREE)
def test_sharded_model_in_the_trainer(one, results, number):
    """Trains, evaluates by generating, saves, resumes; made to take this way on the CPU as it would on GPUs."""
    expected = one["train"]["lengths"]
    first, *_ = processes = results(number)["fsdp"]
    for process in processes:
        assert process["own parameters"] < 1.2 * first["parameters"] / number
        assert process["evaluated"]["eval_cer"] == pytest.approx(expected["log"][-1]["eval_cer"])
        assert_same_course(process, expected)
        assert_same_course({"log": process["log again"], "weights": {}}, expected)
    assert first["steps again"][0] == process_worker.SAVED_AT + 1
    assert not any("fsdp" in name for name in first["code"])


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict[int, tuple[Path, str]]:
    """run_seq2seq.py on one process and on two by Accelerate's configuration for CPUs: output folder, printed text."""
    folder, root = tmp_path_factory.mktemp("scripts"), SCRIPTS.parent
    words = ["".join("abc"[row // 3**place % 3] for place in range(1 + row % 5)) for row in range(40)]
    data = folder / "all.tsv"
    data.write_text("".join(f"{word}\t{' '.join(word.upper())}\n" for word in dict.fromkeys(words)), encoding="utf-8")
    flags = [f"--{split}_file={data}" for split in ("train", "validation", "test")]
    flags += ["--source_tokenizer_kind", "unigram", "--target_tokenizer_kind", "symbols"]
    flags += ["--hidden_size", "8", "--embedding_size", "8", "--embedding_dropout", "0", "--output_dropout", "0"]
    flags += ["--do_train", "--do_eval", "--do_predict", "--max_steps", "8", "--learning_rate", "0.02"]
    flags += [
        "--num_beams",
        "2",
        "--metrics",
        "symbol_error_rate",
        "--num_attention_plots",
        "1",
        "--logging_steps",
        "1",
    ]
    flags += ["--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "4", "--save_steps", "4"]
    flags += ["--load_best_model_at_end", "--metric_for_best_model", "symbol_error_rate", "--disable_tqdm", "true"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [str(SCRIPTS / "accelerate_configs" / "cpu.yaml"), "--num_processes", "2", "--main_process_port", "0"]
    results = {}
    for number, command in ((1, [sys.executable]), (2, launcher)):
        command = [*command, str(SCRIPTS / "run_seq2seq.py"), *flags, "--output_dir", str(folder / f"out{number}")]
        command += ["--per_device_train_batch_size", str(12 // number)]
        environment = {**os.environ, "HF_HOME": str(folder / f"home{number}"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        results[number] = (folder / f"out{number}", done.stdout)
    return results


def test_script_on_two_processes(scripts):
    (one_folder, one_text), (two_folder, two_text) = scripts[1], scripts[2]
    assert json.loads((two_folder / "run.json").read_text())["processes"] == 2
    one_results, two_results = (
        json.loads((path / "all_results.json").read_text()) for path in (one_folder, two_folder)
    )
    kept = [name for name in one_results if not name.endswith(("runtime", "second", "time", "padding_share", "flos"))]
    assert {"train_loss", "eval_loss", "eval_symbol_error_rate", "predict_loss"} <= set(kept)
    assert {name: two_results[name] for name in kept} == pytest.approx(
        {name: one_results[name] for name in kept}, rel=1e-4
    )
    for name in (
        "generated_predictions.txt",
        "generated_predictions.jsonl",
        "tokenizer.json",
        "source_tokenizer.json",
    ):
        assert (two_folder / name).read_bytes() == (one_folder / name).read_bytes()
    assert len((two_folder / "generated_predictions.txt").read_text().splitlines()) == two_results["predict_samples"]
    # Said once, not by each process, and tokenized once: the second process finds what the first one cached.
    assert two_text.count("Data: ") == two_text.count("All figures: ") == two_text.count("'train_runtime'") == 1
    assert len(two_text.splitlines()) == len(one_text.splitlines())
    cached = [len(list((folder.parent / f"home{number}").rglob("*.arrow"))) for number, (folder, _) in scripts.items()]
    assert cached[0] == cached[1] > 0


@pytest.mark.parametrize("path", sorted((SCRIPTS / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_configuration(path):
    """Accelerate knows all its keys."""
    config = load_config_from_file(str(path))
    assert config.num_processes == {"one_gpu": 1, "several_nodes": 16}.get(path.stem, 2)
    assert set(config.fsdp_config) <= set(vars(launch_command_parser().parse_args(["script.py"])))
    if path.stem == "fsdp":  # what tests/process_worker.py runs, and test_sharded_model_in_the_trainer on the CPU
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_auto_wrap_policy"] == "NO_WRAP"
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"] is False


def launch_on_gpu(folder: Path, config: str, number: int, *calls: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += [
        "--config_file",
        str(SCRIPTS / "accelerate_configs" / f"{config}.yaml"),
        "--num_processes",
        str(number),
    ]
    command += [process_worker.__file__, str(folder), str(number), *calls]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return [json.loads((folder / f"gpu-on-{number}-{rank}.json").read_text()) for rank in range(number)]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "compiled"])
def test_precision_on_a_gpu(one, folder, precision):
    """Mixed precision follows the course in float32 from afar, a compiled model closely."""
    (result,) = launch_on_gpu(folder, "one_gpu", 1, f"gpu:{precision}")
    tolerance = 1e-3 if precision == "compiled" else 0.05
    expected = [entry["loss"] for entry in one["train"]["lengths"]["log"] if "loss" in entry]
    assert [entry["loss"] for entry in result["log"] if "loss" in entry] == pytest.approx(expected, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("config", ["several_gpus", "fsdp"])
def test_two_processes_on_gpus(one, folder, config):
    """Of one card, if there are no two: then over gloo, as NCCL wants a card for each process."""
    if config == "fsdp" and torch.cuda.device_count() < 2:
        pytest.skip("FSDP over NCCL needs two CUDA devices")
    first, second = launch_on_gpu(folder, config, 2, f"gpu:{config}")
    assert_same_course(first, one["train"]["lengths"])
    assert second["weights"] == first["weights"]
