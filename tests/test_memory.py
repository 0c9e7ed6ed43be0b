"""How much memory training and decoding take at their peak, each measured in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("peak_memory.py")


def peak(*options: str | int) -> float:
    """MB above what the model and, in training, its gradients take."""
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.match(r"(\d+) MB", output)
    assert found is not None, output
    return float(found[1])


@pytest.mark.slow
def test_a_large_vocabulary_is_scored_in_parts() -> None:
    """100,000 words, 64 x 50 positions: all logits once are 1.28 GB, and a plain pass holds them several times."""
    work = ("--vocabulary", 100_000, "--batch", 64, "--target", 50, "--hidden", 128)
    fast = ("--attention", "general", "--wiring", "output_only")
    assert peak(*work, *fast) < 2000 < peak(*work, *fast, "--all-logits")


@pytest.mark.slow
def test_a_thousand_by_a_thousand_with_additive_attention() -> None:
    work = ("--source", 1000, "--batch", 8, "--hidden", 512, "--vocabulary", 8000)
    peaks = [peak(*work, "--target", target) for target in (250, 500, 1000)]
    assert peaks[-1] < 3000
    steps = (peaks[1] - peaks[0]) / 250, (peaks[2] - peaks[1]) / 500
    assert steps[1] < 1.5 * steps[0] + 0.2  # MB a step: linear in T
    assert max(steps) < 2  # the hidden layer of additive attention would be 16


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 5])
def test_decoding_takes_no_more_for_long_outputs(beams: int) -> None:
    """What grows is ids, a few bytes a token."""
    work = ("--work", "generate", "--batch", 16, "--beams", beams, "--hidden", 128, "--vocabulary", 2000)
    short, long = (peak(*work, "--target", target) for target in (20, 400))
    assert long < short + 10
