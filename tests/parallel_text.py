"""Text for the scripts that train small models with other toolkits; needs nothing but Python."""

import argparse
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class ParallelText(NamedTuple):
    """Sentences, in lists of equal length."""

    train_source: list[str]
    train_target: list[str]
    test_source: list[str]
    test_target: list[str]

    def write(self, folder: Path) -> None:
        """train.src, train.tgt, test.src and test.tgt, a sentence a line."""
        for name, lines in zip(("train.src", "train.tgt", "test.src", "test.tgt"), self, strict=True):
            (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def made_up(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Sentences of words of one and two letters, and the same backwards."""
    draw = random.Random(seed)
    words = [a + b for a in "abcdefg" for b in ("", "x", "y")]
    sources = [[draw.choice(words) for _ in range(draw.randint(2, 7))] for _ in range(count)]
    return [" ".join(words) for words in sources], [" ".join(words[::-1]) for words in sources]


def arguments(description: str | None, configurations: Iterable[str], steps: str) -> argparse.ArgumentParser:
    """What every script takes: `output`, `configuration`, the number of steps under the toolkit's name, and text."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("configuration", choices=configurations)
    parser.add_argument(f"--{steps}", type=int, default=100)
    parser.add_argument("--test-sentences", type=int, default=50)
    for name in ("--source", "--target", "--test-source", "--test-target"):
        parser.add_argument(name, type=Path)
    return parser


def read(options: argparse.Namespace) -> ParallelText:
    """What the arguments name; without files, sentences of made-up words and the same backwards."""
    if options.source is None:
        return ParallelText(*made_up(2000, seed=0), *made_up(options.test_sentences, seed=1))
    files = (options.source, options.target, options.test_source, options.test_target)
    texts = [path.read_text(encoding="utf-8").split("\n") for path in files]
    texts = [[" ".join(line.split()) for line in lines if line.strip()] for lines in texts]
    return ParallelText(*texts[:2], *(lines[: options.test_sentences] for lines in texts[2:]))
