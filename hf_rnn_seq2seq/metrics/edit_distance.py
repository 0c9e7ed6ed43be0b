"""Edit distance between sequences of symbols, for the error rates."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from rapidfuzz.distance import Levenshtein

SymbolKind = Literal["whitespace", "characters"]


class Errors(NamedTuple):
    """Edits that turn a reference into a prediction, and the length of that reference."""

    substitutions: int
    deletions: int
    insertions: int
    reference_length: int

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions


def split_symbols(text: str, symbols: SymbolKind) -> Sequence[str]:
    """The symbols of a text: what stands between white space, or every code point (white space included).

    Raises:
        ValueError: `symbols` is neither.
    """
    if symbols == "whitespace":
        return text.split()
    if symbols == "characters":
        return text
    raise ValueError(f"symbols must be one of {', '.join(get_args(SymbolKind))}, not {symbols!r}")


def nearest_reference_errors(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> Errors:
    """Errors against the reference with the fewest edits (Levenshtein distance); among equals, the longest counts."""
    distances = [Levenshtein.distance(reference, prediction) for reference in references]
    nearest = min(range(len(references)), key=lambda i: (distances[i], -len(references[i])))
    edits = [edit.tag for edit in Levenshtein.editops(references[nearest], prediction)]
    return Errors(
        substitutions=edits.count("replace"),
        deletions=edits.count("delete"),
        insertions=edits.count("insert"),
        reference_length=len(references[nearest]),
    )


def sum_errors(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> Errors:
    """Sums over a corpus of what `nearest_reference_errors` finds for each example.

    The sum of reference lengths is at least 1, so that a rate stays finite where all references are empty: it is then
    0 if the predictions are empty too, else 100 % for each symbol inserted.
    """
    substitutions, deletions, insertions, length = (
        sum(column)
        for column in zip(
            *(nearest_reference_errors(*example) for example in zip(predictions, references, strict=True)), strict=True
        )
    )
    return Errors(substitutions, deletions, insertions, max(length, 1))
