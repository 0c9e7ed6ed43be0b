"""Training that is killed, stopped, or runs out of disk goes on from the last whole checkpoint, bit for bit."""

import contextlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from interrupted_run import SCRIPT, Run
from safetensors.torch import load_file
from tiny_trainer import make_trainer
from transformers import TrainerCallback

from hf_rnn_seq2seq.checkpoints import (
    CheckpointError,
    NonFiniteError,
    checkpoint_fault,
    delete_older,
    last_complete_checkpoint,
    set_aside_broken,
    write_whole,
    writing_to,
)
from hf_rnn_seq2seq.stopping import StopOnSignal

SOURCES = ["abc", "ca", "b", "bcab", "aa", "cc", "abcabc", "bb", "cab", "acb", "ccc", "ba", "a"]
# 13 rows, 7 batches of 2, 4 steps an epoch with accumulation over 2: 12 steps with dropout, 6 checkpoints.
FLAGS = shlex.split(
    "--hidden_size 8 --embedding_size 8 --dropout 0.3 --use_cpu --disable_tqdm true --report_to none "
    "--source_tokenizer_kind char --target_tokenizer_kind symbols --do_train --do_eval --do_predict "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --num_train_epochs 3 "
    "--save_strategy steps --save_steps 2 --save_total_limit 2 --eval_strategy steps --eval_steps 3 "
    "--learning_rate 0.01 --resume_from_checkpoint auto --metrics symbol_error_rate"
)
VARIANTS = {
    "lengths, moving average, adam": "--optim adam --ema_decay 0.9",
    "random, adadelta": "--optim adadelta --train_sampling_strategy random --data_seed 7",
    "best model, adamw": "--load_best_model_at_end --metric_for_best_model loss --eval_steps 2",
    "whole epochs, plateau": "--save_strategy epoch --eval_strategy epoch --metric_for_best_model loss "
    "--lr_scheduler_type reduce_lr_on_plateau --optim adagrad_da",
    "tokens, halving": "--max_tokens_per_batch 24 --lr_scheduler_type halving --lr_decay_start 1",
}
AVERAGED = "lengths, moving average, adam"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data, in which all runs are."""
    place = tmp_path_factory.mktemp("runs")
    (place / "all.tsv").write_text("".join(f"{each}\t{' '.join(each.upper())}\n" for each in SOURCES))
    return place


def flags_for(place: Path, name: str, variant: str = AVERAGED, more: str = "") -> list[str]:
    files = [f"--{split}_file={place / 'all.tsv'}" for split in ("train", "validation", "test")]
    return [*files, *FLAGS, "--output_dir", str(place / name), *shlex.split(f"{VARIANTS[variant]} {more}")]


@pytest.fixture(scope="module")
def uninterrupted(place):
    """The output folder of a run of a variant that nobody disturbs, made once."""
    folders: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in folders:
            name = f"uninterrupted-{len(folders)}"
            whole = Run(flags_for(place, name, variant), place)
            assert whole.end() == 0, whole.printed
            folders[variant] = place / name
        return folders[variant]

    return run


def assert_same(folder: Path, other: Path) -> None:
    """The same weights to the bit, the same figures and predictions."""
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name
    results, expected = (json.loads((each / "all_results.json").read_text()) for each in (folder, other))
    for name in expected:
        if name.startswith(("eval_", "predict_")) and not name.endswith(("_runtime", "_per_second", "_time")):
            assert results[name] == expected[name], name
    assert (folder / "generated_predictions.txt").read_text() == (other / "generated_predictions.txt").read_text()


def killed_in(phase: str, run: Run, times: int, seconds: float) -> bool:
    """Kill a run some time after a phase has begun for the n-th time; False if it ended, whole, before that."""
    reached = run.reach(phase, times)
    if reached:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.process.pid, signal.SIGKILL)
    code = run.end()
    assert code == 0 or (reached and code == -signal.SIGKILL), run.printed
    return code != 0


def kill_again_and_again(place: Path, name: str, variant: str, phases: list[str], seed: int) -> None:
    """Start the same command as often as there are phases, kill it in each, then let it come to its end."""
    rng = random.Random(seed)
    flags = flags_for(place, name, variant)
    # About, for one of each. With the optimizer there is more to write than can be written before the signal is there.
    seconds = {"training": 0.05, "saving": 0.15, "saving the optimizer": 0, "evaluation": 0.05}
    for phase in phases:
        for _ in range(10):
            if killed_in(phase, Run(flags, place), rng.randint(1, 3), rng.random() * seconds[phase]):
                break
            shutil.rmtree(place / name)  # it came to its end before: once more from the beginning
        else:
            pytest.fail(f"{phase}: no run could be killed in it")
        assert (place / name / "_unfinished").exists() or phase != "saving the optimizer"
        # Whatever has a checkpoint's name is whole.
        assert all(checkpoint_fault(each) is None for each in (place / name).glob("checkpoint-*"))
    last = Run(flags, place)
    assert last.end() == 0, last.printed


def test_deleting_takes_a_checkpoints_name_first(tmp_path, monkeypatch):
    """Interrupted while files go, what is left has no checkpoint's name; the last and the best stay."""
    for step in range(1, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "file").write_text("x")
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *arguments, **named: None)  # killed before it deletes anything
        delete_older(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_unfinished", "checkpoint-2", "checkpoint-5"]
    assert len(list((tmp_path / "_unfinished").iterdir())) == 3
    delete_older(tmp_path, None, None)
    delete_older(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_half_written_figures_begin_anew(half_done, place, uninterrupted):
    folder = half_done("half-written")
    for text in ("", '{"eval_loss": 1.'):
        (folder / "all_results.json").write_text(text)
        run = Run(flags_for(place, "half-written"), place)
        assert run.end() == 0, run.printed
        assert f"{folder / 'all_results.json'} is half-written and begins anew." in run.printed
        assert_same(folder, uninterrupted(AVERAGED))


def test_a_file_is_written_whole_or_stays(tmp_path, monkeypatch):
    write_whole(tmp_path / "run.json", "before")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_whole(tmp_path / "run.json", "after")
    assert (tmp_path / "run.json").read_text() == "before"
    write_whole(tmp_path / "run.json", "after")
    assert [path.name for path in tmp_path.iterdir() if path.read_text() == "after"] == ["run.json"]


def test_killed_three_times(place, uninterrupted):
    kill_again_and_again(place, "killed", AVERAGED, ["saving the optimizer", "evaluation", "training"], seed=0)
    assert_same(place / "killed", uninterrupted(AVERAGED))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments(place, uninterrupted, variant):
    """Twenty times in all."""
    rng = random.Random(variant)
    phases = [rng.choice(["training", "saving", "evaluation"]) for _ in range(4)]
    name = f"killed-{list(VARIANTS).index(variant)}"
    kill_again_and_again(place, name, variant, phases, seed=rng.randrange(1000))
    assert_same(place / name, uninterrupted(variant))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_the_same_command_goes_on(place, uninterrupted, number, code):
    name = f"stopped-{code}"
    run = Run(flags_for(place, name), place)
    assert run.reach("training", 13)  # of step 7 of 12, in the second epoch
    os.kill(run.process.pid, number)
    assert run.end() == code, run.printed
    last = last_complete_checkpoint(place / name)
    assert last.name not in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-12")
    assert f"Stopped by {number.name} after step {last.name[11:]}; to go on from {last}, run the same" in run.printed
    assert not (place / name / "model.safetensors").exists()
    assert Run(flags_for(place, name), place).end() == 0
    assert_same(place / name, uninterrupted(AVERAGED))


@pytest.mark.slow
def test_sigterm_at_the_end_of_an_epoch_and_in_an_evaluation(place, uninterrupted):
    """The evaluation at the end of the epoch counts, as the learning rate depends on it."""
    variant = "whole epochs, plateau"
    for phase, times in [("training", 7), ("evaluation", 1)]:
        name = f"stopped-in-{phase}"
        flags = flags_for(place, name, variant)
        run = Run(flags, place)
        assert run.reach(phase, times)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.end() == 143, run.printed
        assert run.printed.count("eval_loss") == 1  # an epoch that is broken off is not evaluated
        last = last_complete_checkpoint(place / name)
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        assert {entry["step"] for entry in history if "eval_loss" in entry} == {4}
        assert last.name == ("checkpoint-4" if phase == "training" else "checkpoint-5")
        assert Run(flags, place).end() == 0
        assert_same(place / name, uninterrupted(variant))


@pytest.mark.slow
def test_sigterm_to_two_processes(place):
    """torchrun hands the signal on; both save at the same step, and the same command ends where it would have."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29547"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(place / "cache")}
    for name in ("two", "two-stopped"):
        command = [*torchrun, str(SCRIPT), *flags_for(place, name, more="--num_train_epochs 40")]
        if name == "two-stopped":
            with open(place / "log", "w") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            while not list((place / name).glob("checkpoint-*")):
                assert process.poll() is None, (place / "log").read_text()
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 1  # torchrun's own; its processes end with 143
            printed = (place / "log").read_text()
            assert "Stopped by SIGTERM after step" in printed, printed
            last = last_complete_checkpoint(place / name)
            assert {"rng_state_0.pth", "rng_state_1.pth"} <= {each.name for each in last.iterdir()}
            assert json.loads((last / "trainer_state.json").read_text())["global_step"] < 160
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert_same(place / "two-stopped", place / "two")


@pytest.fixture(scope="module")
def half_done(place):
    """Copies of the output folder of a run that was killed after its second checkpoint."""
    run = Run(flags_for(place, "half"), place)
    assert run.reach("saving", 3)
    os.kill(run.process.pid, signal.SIGKILL)
    run.end()
    assert [each.name for each in sorted((place / "half").glob("checkpoint-*"))] == ["checkpoint-2", "checkpoint-4"]

    def copy(name: str) -> Path:
        shutil.copytree(place / "half", place / name)
        return place / name

    return copy


@pytest.mark.parametrize(
    ("name", "damage", "fault"),
    [
        ("trainer_state.json", "missing", "trainer_state.json: .*No such file"),
        ("trainer_state.json", "empty", "trainer_state.json: Expecting value"),
        ("trainer_state.json", "truncated", "trainer_state.json: "),
        ("config.json", "missing", "config.json: .*No such file"),
        ("tokenizer.json", "truncated", "tokenizer.json: "),
        ("model.safetensors", "missing", "model.safetensors is missing"),
        ("model.safetensors", "empty", "model.safetensors is broken: "),
        ("model.safetensors", "truncated", "model.safetensors is broken: "),
        ("training_weights.safetensors", "missing", "training_weights.safetensors is missing"),
        ("training_weights.safetensors", "truncated", "training_weights.safetensors is broken"),
        ("optimizer.pt", "missing", r"optimizer.pt is missing \(was it saved with --save_only_model\?\)"),
        ("optimizer.pt", "truncated", "optimizer.pt is broken: "),
        ("optimizer.pt", "overwritten", "optimizer.pt is broken: wrong checksum of"),
        ("scheduler.pt", "missing", "scheduler.pt is missing"),
        ("scheduler.pt", "empty", "scheduler.pt is broken: "),
        ("rng_state.pth", "missing", "rng_state.pth is missing"),
        ("rng_state.pth", "truncated", "rng_state.pth is broken"),
    ],
)
def test_broken_checkpoints_are_passed_over(half_done, tmp_path, caplog, name, damage, fault):
    folder = half_done(f"{tmp_path.name}-{damage}")
    path = folder / "checkpoint-4" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "overwritten":  # as a block that a power cut left unwritten
        half = len(content) // 2
        path.write_bytes(content[: half - 100] + bytes(200) + content[half + 100 :])
    else:
        path.write_bytes(b"" if damage == "empty" else content[: len(content) * 2 // 3])
    assert last_complete_checkpoint(folder) == folder / "checkpoint-2"
    assert caplog.text.count("is passed over") == 1
    assert re.search(f"checkpoint-4 is passed over: {fault}", caplog.text), caplog.text
    set_aside_broken(folder)
    assert sorted(each.name for each in folder.glob("*checkpoint-*")) == ["broken_checkpoint-4", "checkpoint-2"]


def test_a_broken_checkpoint_costs_no_whole_one(half_done, place, uninterrupted):
    """Of two kept, the broken one is no longer one; the run ends as if nothing had been."""
    folder = half_done("damaged")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    run = Run(flags_for(place, "damaged"), place)
    assert run.end() == 0, run.printed
    assert "checkpoint-4 is passed over: optimizer.pt is missing" in run.printed
    assert_same(folder, uninterrupted(AVERAGED))
    assert sorted(each.name for each in folder.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]


def test_full_disk(half_done, place, uninterrupted):
    """No file may grow beyond 8 KiB: the next checkpoint does not fit. With room again, all is well."""
    folder = half_done("full")
    flags = flags_for(place, "full")
    before = {path: path.read_bytes() for path in folder.glob("checkpoint-*/*")}
    run = Run(flags, place, file_limit=8 * 1024)
    assert run.end() == 1
    assert f"error: {folder / 'checkpoint-6'} can't be written: " in run.printed.splitlines()[-1]
    assert "File too large" in run.printed.splitlines()[-1]
    assert before == {path: path.read_bytes() for path in folder.glob("*checkpoint-*/*")}
    assert not (folder / "_unfinished").exists()
    assert Run(flags, place).end() == 0
    assert_same(folder, uninterrupted(AVERAGED))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small disk")
def test_full_disk_for_real(tmp_path):
    """Each file of a checkpoint in turn is the one that does not fit on a small memory disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        trainer = make_trainer(disk / "out", max_steps=1, save_steps=1)
        trainer.train()
        size = sum(path.stat().st_size for path in (disk / "out" / "checkpoint-1").iterdir())
        for part in (0, 0.2, 0.4, 0.6, 0.8):
            free = shutil.disk_usage(disk).free
            (disk / "filler").write_bytes(bytes(int(free - part * size)))
            trainer.state.global_step += 1
            with pytest.raises(CheckpointError, match=r"checkpoint-\d can't be written: .* MiB are free"):
                trainer._save_checkpoint(trainer.model, None)
            (disk / "filler").unlink()
            assert [path.name for path in (disk / "out").iterdir()] == ["checkpoint-1"]
            assert checkpoint_fault(disk / "out" / "checkpoint-1") is None
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("output", ["file/out", "/proc/out"])
def test_unwritable_output_folder(place, tmp_path, output):
    (tmp_path / "file").write_text("in the way")
    run = Run(flags_for(place, "x", more=f"--output_dir {tmp_path / output}"), place)
    assert run.end() == 1
    error = run.printed.splitlines()[-1]
    assert error.startswith(f"error: --output_dir {tmp_path / output}: can't be written to: "), error


def test_vanished_and_corrupt_data(half_done, place, uninterrupted):
    """Both are named, and the checkpoints stay; with the data back training goes on."""
    folder = half_done("data-gone")
    other = place / "moving.tsv"
    flags = [each.replace("all.tsv", "moving.tsv") for each in flags_for(place, "data-gone")]
    before = {path: path.read_bytes() for path in folder.glob("checkpoint-*/*")}
    run = Run(flags, place)
    assert run.end() == 1
    assert run.printed.splitlines()[-1].startswith(f"error: {other}"), run.printed
    content = (place / "all.tsv").read_bytes()
    other.write_bytes(content.replace(b"aa\tA A", b"aa\tA \xff"))
    run = Run(flags, place)
    assert run.end() == 1
    assert run.printed.splitlines()[-1].startswith(f"error: {other}, line 5"), run.printed
    assert before == {path: path.read_bytes() for path in folder.glob("checkpoint-*/*")}
    other.write_bytes(content)
    run = Run(flags, place)
    assert run.end() == 0, run.printed
    assert_same(folder, uninterrupted(AVERAGED))


class Poison(TrainerCallback):
    """Makes a weight NaN when the second step has been made: before it is saved, or after."""

    def __init__(self, after_saving: bool) -> None:
        self.after_saving = after_saving

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2 and not self.after_saving:
            model.get_decoder().get_input_embeddings().weight.data.fill_(math.nan)

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 2 and self.after_saving:
            model.get_decoder().get_input_embeddings().weight.data.fill_(math.nan)


@pytest.mark.parametrize("after_saving", [True, False])
def test_nan_ends_training(tmp_path, after_saving):
    """Before it is saved; what was saved before can be gone on from."""
    trainer = make_trainer(tmp_path, save_steps=1, learning_rate=0.01, lr_scheduler_type="constant")
    trainer.add_callback(Poison(after_saving))
    problem = "the loss is nan at step 3" if after_saving else "the weight .* has become NaN or infinite at step 2"
    last = tmp_path / f"checkpoint-{2 if after_saving else 1}"
    with pytest.raises(NonFiniteError, match=f"{problem}, with learning rate 0.01: .*good checkpoint is {last}"):
        trainer.train()
    whole = make_trainer(tmp_path / "whole", save_strategy="no", learning_rate=0.01, lr_scheduler_type="constant")
    whole.train()
    resumed = make_trainer(tmp_path, save_steps=1, learning_rate=0.01, lr_scheduler_type="constant")
    resumed.train(resume_from_checkpoint=str(last_complete_checkpoint(tmp_path)))
    for weight, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(weight, other)


def test_nan_may_be_allowed(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, save_steps=3, stop_on_nan=False)
    trainer.add_callback(Poison(after_saving=True))
    trainer.train()
    assert trainer.state.global_step == 4
    weights = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert not all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_diverged_run_says_so(place):
    run = Run(flags_for(place, "diverged", more="--learning_rate 1e38 --max_grad_norm 0"), place)
    assert run.end() == 1
    assert re.match(r"error: .* at step \d, with learning rate 9\.\d+e\+37: ", run.printed.splitlines()[-1])


def test_errors_while_writing_are_named(tmp_path):
    message = f"{tmp_path} can't be written: .*Is a directory.*MiB are free"
    with pytest.raises(CheckpointError, match=message), writing_to(tmp_path):
        tmp_path.write_text("")
    with pytest.raises(RuntimeError, match="something else"), writing_to(tmp_path):
        raise RuntimeError("something else")


def test_a_second_interrupt_is_taken_at_its_word():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun's, of the same Ctrl-C
        stop._since -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
