"""What one step frees stays for the next: no page is asked for anew."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from hf_rnn_seq2seq.host_memory import keep_for_training

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="only glibc's allocator is told what to keep; runs where Python is linked with it",
)

# How many pages are asked for, after `before`, while tensors of 30 MB in all, or one of 50, are made and freed a few
# times.
COUNT = """
import resource, sys
import torch
torch.set_num_threads(1)
{before}
def faults(size):
    tensors = []
    for number in range(6):
        if number == 3:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(size // 4) for _ in range(max(1, 30_000_000 // size))]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
print(faults({size}))
"""


def faults(before: str, size: int) -> int:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", COUNT.format(before=before, size=size)]
    environment = {**kept, "PYTHONPATH": str(Path(__file__).parents[1])}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return int(output.split()[-1])


def test_pieces_of_some_megabytes_are_kept_for_steps() -> None:
    size = 10_000_000
    kept = faults("from hf_rnn_seq2seq.host_memory import keep_for_steps; keep_for_steps(torch.device('cpu'))", size)
    assert kept < 100 < faults("", size)


TRAIN = """
from pathlib import Path
from tests.tiny_trainer import make_trainer
make_trainer(Path({folder!r}), max_steps=1, save_strategy="no", keep_freed_memory={keep}).train()
"""


def test_training_keeps_large_pieces_unless_told_otherwise(tmp_path: Path) -> None:
    size = 50_000_000
    kept, given_back = (faults(TRAIN.format(folder=str(tmp_path), keep=keep), size) for keep in (True, False))
    assert kept < 100 < given_back


def test_the_users_own_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not keep_for_training()
