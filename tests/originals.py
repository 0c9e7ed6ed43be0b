"""Running the scripts that train small models with other toolkits, where these are installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def make_original(script: str, package: str, variable: str, arguments: list[str], folder: Path) -> Path:
    """
    What `script` of this folder makes, in `folder` / "original". Skips the test unless this Python, or the one that
    the environment variable names, has `package`.
    """
    python = os.environ.get(variable, sys.executable)
    if subprocess.run(
        [python, "-c", f"import importlib.metadata as m; m.version({package!r})"], capture_output=True
    ).returncode:
        pytest.skip(f"{package} is not installed; {variable} may name a Python that has it")
    output = folder / "original"
    path = Path(__file__).with_name(script)
    done = subprocess.run([python, str(path), str(output), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def cut(rows: list[list[int]], eos: int) -> list[list[int]]:
    """Generated rows without their start token, each up to its end."""
    rows = [row[1:] for row in rows]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]
