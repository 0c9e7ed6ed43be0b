"""Word vectors made elsewhere as the first weights of an embedding table: word2vec, GloVe and fastText text files.

All three have a word and its numbers on a line, divided by spaces. word2vec (Mikolov et al. 2013) and fastText
(Bojanowski et al. 2017) begin with a line of two numbers, how many words and how wide; GloVe (Pennington et al. 2014)
does not, and has a few words with spaces in them, which is why a line is read from its end. (A word that itself ends
with a space and a number would look like a vector that is too wide, and is refused as one.)
"""

import gzip
import itertools
import logging
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .data.readers import DataError

logger = logging.getLogger(__name__)

HEADER = re.compile(rb"(\d+) (\d+)")
NUMBER = re.compile(rb"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
NUMBER_CHARACTERS = b"0123456789+-.eE"


@dataclass(frozen=True)
class EmbeddingsFound:
    """Vectors for a part of a vocabulary.

    Args:
        ids: rows of the embedding table, ascending, [N].
        vectors: a vector for each of them, float32, [N, E].
        vocabulary_size: number of tokens that were looked for.
        lower_cased: how many of the N were found as their lower-cased form alone.
        duplicates: lines of words of the vocabulary that had come before; the first one counts.
    """

    ids: torch.Tensor
    vectors: torch.Tensor
    vocabulary_size: int
    lower_cased: int
    duplicates: int

    def figures(self) -> dict[str, float]:
        """What to report, by name."""
        return {
            "found": len(self.ids),
            "coverage": self.coverage,
            "lower_cased": self.lower_cased,
            "duplicates": self.duplicates,
        }

    def __str__(self) -> str:
        return (
            f"vectors for {len(self.ids):,} of {self.vocabulary_size:,} tokens ({self.coverage:.1%}), "
            f"{self.lower_cased:,} of them lower-cased, {self.duplicates:,} duplicates left out"
        )

    @property
    def coverage(self) -> float:
        """Share of the vocabulary that has a vector."""
        return len(self.ids) / self.vocabulary_size if self.vocabulary_size else 0.0

    def token_coverage(self, rows: Iterable[Sequence[int]], skip: Collection[int] = ()) -> float:
        """Share of the running tokens that have a vector.

        Args:
            rows: token ids, row by row.
            skip: ids that don't count either way, as those of special tokens.
        """
        found, skipped = set(self.ids.tolist()), set(skip)
        covered = total = 0
        for row in rows:
            counted = [token_id for token_id in row if token_id not in skipped]
            total += len(counted)
            covered += sum(token_id in found for token_id in counted)
        return covered / total if total else 0.0


def load_pretrained_embeddings(path: str | Path, tokenizer_vocab: Mapping[str, int], width: int) -> EmbeddingsFound:
    """Read the vectors of a vocabulary's tokens; no others are kept in memory.

    A token is looked for as the tokenizer spells it, then lower-cased.

    Args:
        path: a text file as word2vec, GloVe or fastText (`.vec`) write it, plain or gzip-compressed, in UTF-8.
        tokenizer_vocab: the tokens' ids, as from `tokenizer.get_vocab()`.
        width: of the embedding table, E.

    Raises:
        DataError: for a file that can't be read, vectors of another width, or text where a number should be (with
            the line), and for numbers that are not finite in a vector that would be kept.
    """
    path = Path(path)
    exact = {token.encode(): token_id for token, token_id in tokenizer_vocab.items()}
    lowered: dict[bytes, list[int]] = {}
    for token, token_id in tokenizer_vocab.items():
        if token.lower() != token:
            lowered.setdefault(token.lower().encode(), []).append(token_id)

    kept: dict[bytes, np.ndarray] = {}
    duplicates = 0
    for place, word, numbers in vector_lines(path, width):
        wanted = word in exact or word in lowered
        # Numbers that nobody wants are looked at, not converted: the usual file has millions of them.
        if wanted or b"".join(numbers).translate(None, NUMBER_CHARACTERS):
            vector = parse_vector(place, word, numbers)
            if word in kept:
                duplicates += 1
            elif wanted:
                kept[word] = vector

    found = {token_id: kept[word] for word, token_id in exact.items() if word in kept}
    lower_cased = {
        token_id: kept[word]
        for word, token_ids in lowered.items()
        if word in kept
        for token_id in token_ids
        if token_id not in found
    }
    found |= lower_cased
    ids = sorted(found)
    vectors = np.stack([found[token_id] for token_id in ids]) if ids else np.zeros((0, width), dtype=np.float32)
    return EmbeddingsFound(
        ids=torch.tensor(ids, dtype=torch.long),
        vectors=torch.from_numpy(vectors),
        vocabulary_size=len(tokenizer_vocab),
        lower_cased=len(lower_cased),
        duplicates=duplicates,
    )


def apply_pretrained_embeddings(found: EmbeddingsFound, embedding: nn.Embedding) -> None:
    """Copy vectors into their rows of a table, [V, E]; the other rows keep their weights, the padding row its zeros.

    `embedding.requires_grad_(False)` then freezes the table, the rows without a vector as well. That is a matter of
    one training: it is not saved with the model, so whoever trains a loaded model further has to say it again.

    Args:
        found: for this table's vocabulary.
        embedding: changed in place. What is tied to it (the output layer, the other side of a shared vocabulary)
            changes with it.
    """
    if len(found.ids) and int(found.ids[-1]) >= embedding.num_embeddings:
        raise ValueError(
            f"There is a vector for id {found.ids[-1]}, but the table has {embedding.num_embeddings} rows."
        )
    if found.vectors.size(1) != embedding.embedding_dim:
        raise ValueError(
            f"The vectors are {found.vectors.size(1)} wide, the embedding table is {embedding.embedding_dim}."
        )
    rows = torch.ones_like(found.ids, dtype=torch.bool)
    if embedding.padding_idx is not None:
        rows = found.ids != embedding.padding_idx
    with torch.no_grad():
        weight = embedding.weight
        weight[found.ids[rows].to(weight.device)] = found.vectors[rows].to(weight)


def vector_lines(path: Path, width: int) -> Iterator[tuple[str, bytes, list[bytes]]]:
    """A vector's place (for messages), its word and its numbers as text, `width` of them."""
    header: tuple[int, int] | None = None
    number = vectors = 0
    try:
        with open(path, "rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        # Lines of bytes, for only the line feed ends one: fastText's files have words with other line separators.
        with gzip.open(path, "rb") if is_gzip else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip(b" \r\n")
                place = f"{path}, line {number}"
                if number == 1 and (match := HEADER.fullmatch(line)):
                    header = int(match[1]), int(match[2])
                    check_width(place, header[1], width)
                elif line:
                    word, *numbers = line.rsplit(b" ", width)
                    last = word.rpartition(b" ")[2] if b" " in word else b""
                    if len(numbers) < width or NUMBER.fullmatch(last):
                        check_width(place, count_numbers(line), width)
                    vectors += 1
                    yield place, word, numbers
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: can't be read{f' after line {number}' if number else ''}: {error}") from error
    if vectors == 0:
        raise DataError(f"{path}: there are no vectors in it.")
    if header and header[0] != vectors:
        logger.warning("%s: the first line promises %d vectors, but there are %d.", path, header[0], vectors)


def check_width(place: str, found: int, width: int) -> None:
    if found != width:
        raise DataError(f"{place}: the vector is {found} wide, but the embeddings are {width}.")


def count_numbers(line: bytes) -> int:
    """How many numbers a line of a word and its vector ends with."""
    fields = line.split(b" ")[1:]
    return sum(1 for _ in itertools.takewhile(NUMBER.fullmatch, reversed(fields)))


def parse_vector(place: str, word: bytes, numbers: list[bytes]) -> np.ndarray:
    """float32, [E]."""
    text = word.decode(errors="replace")
    try:
        with np.errstate(over="ignore"):  # what is too large for float32 is refused below
            vector = np.array([float(number) for number in numbers], dtype=np.float32)
    except ValueError:
        bad = next(number for number in numbers if not NUMBER.fullmatch(number)).decode(errors="replace")
        raise DataError(f"{place}: {bad!r} in the vector of {text!r} is not a number.") from None
    if not np.isfinite(vector).all():
        bad = numbers[int(np.flatnonzero(~np.isfinite(vector))[0])].decode()
        raise DataError(f"{place}: {bad} in the vector of {text!r} is not a finite number.")
    return vector
