"""Word alignments of the training data, from a file in Pharaoh's format."""

from pathlib import Path

import datasets

from ..training_losses import ALIGNMENTS, check_links
from .readers import DataError, preview, text_lines

# The columns that carry a row's line until its tokens are known.
LINE, NUMBER = "alignment_line", "alignment_line_number"


def add_alignment_lines(dataset: datasets.Dataset, path: Path) -> datasets.Dataset:
    """Each row with its line of the file, whose lines correspond to the data's rows.

    Raises:
        DataError: a file that can't be read, or with another number of lines.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    lines = [line for _, line in text_lines(path)]
    if len(lines) != len(dataset):
        raise DataError(f"{path}: {len(lines)} lines for {len(dataset)} training rows; there must be one for each.")
    return dataset.add_column(LINE, lines).add_column(NUMBER, list(range(1, len(lines) + 1)))


def parse_alignments(dataset: datasets.Dataset, path: str | Path) -> datasets.Dataset:
    """Tokenized rows with the column `alignments` in place of their lines: pairs of token numbers, source first.

    A line is `0-0 1-2 2-1`, a link being the number of a source token, a dash and that of a target token, both from 0
    as in `input_ids` and `labels`: of the tokenizer's tokens, which are words only where the tokenizer is one of
    words. An empty line has no links.

    Raises:
        DataError: a link that is malformed or outside of its row, with the file and the line.
    """
    if LINE not in dataset.column_names:
        return dataset
    return dataset.map(
        parse_row, fn_kwargs={"path": str(path)}, remove_columns=[LINE, NUMBER], desc="Reading alignments"
    )


def parse_row(row: dict[str, list[int] | str | int], path: str) -> dict[str, list[list[int]]]:
    links = []
    for text in str(row[LINE]).split():
        pair = text.split("-")
        if len(pair) != 2 or not all(number.isascii() and number.isdecimal() for number in pair):
            raise DataError(f"{path}, line {row[NUMBER]}: {preview(text)} is no link; one looks like 0-2.")
        links.append([int(number) for number in pair])
    try:
        check_links(links, len(row["input_ids"]), len(row["labels"]))  # type: ignore[arg-type]
    except ValueError as error:
        raise DataError(f"{path}, line {row[NUMBER]}: {error}.") from None
    return {ALIGNMENTS: links}
