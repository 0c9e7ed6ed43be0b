"""Reading source–target pairs from files, one reader a format, with errors that name the file and the line.

Every reader is a generator of `(source, target)` rows, where `target` is None in data without a target side, and
raises [`DataError`] for bad input. Nothing is held in memory but the current row.
"""

import codecs
import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Row = tuple[str, str | None]

FORMATS = {
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}


class DataError(ValueError):
    """Bad input data. The message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold the source and the target.

    Args:
        source, target: a column's name, or its number from 0 as a string in delimited files without a header. None
            means the columns named `source` and `target` where there are such names, else the columns 0 and 1.
        source_lang, target_lang: keys of a `translation` column of dicts, as in `{"translation": {"en": …, "de": …}}`.
        target_optional: data without the target column is allowed: the rows have None for a target. A target column
            that was asked for by name or number may still be missing only where there is no other but the source.
    """

    source: str | None = None
    target: str | None = None
    source_lang: str | None = None
    target_lang: str | None = None
    target_optional: bool = False

    def may_lack_target(self, width: int) -> bool:
        """Whether data of so many columns may be sources alone."""
        return self.target_optional and ((self.target is None and self.target_lang is None) or width == 1)


def file_format(path: Path) -> str | None:
    """The format that the file's name tells (`tsv`, `csv`, `jsonl`, `parquet`), or None; `.gz` is looked through."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None


def read_file(path: Path, columns: Columns, target_path: Path | None = None) -> Iterator[Row]:
    """The rows of one file, or of two parallel text files when `target_path` is given.

    Raises:
        DataError: for any input that is not what its format asks for.
    """
    for each in (path, target_path):
        if each is not None and not each.is_file():
            raise DataError(f"{each}: no such file.")
    if target_path is not None:
        return read_parallel(path, target_path)
    match file_format(path):
        case "tsv":
            return read_delimited(path, columns, split_tsv(path))
        case "csv":
            return read_delimited(path, columns, split_csv(path))
        case "jsonl":
            return read_records(path, "line", json_objects(path), columns)
        case "parquet":
            return read_records(path, "row", parquet_records(path), columns)
    if columns.target_optional:
        return ((line, None) for _, line in text_lines(path))
    raise DataError(
        f"{path}: the name does not tell the format: use one of {', '.join(FORMATS)} (each but .parquet may be "
        "followed by .gz), or give the other one of two parallel text files (--train_target_file, "
        "--validation_target_file, --test_target_file)."
    )


def raw_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) with their line ends. Only LF ends a line: U+2028 and its kin are text."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.startswith(codecs.BOM_UTF8):
                    line = line[len(codecs.BOM_UTF8) :]
                yield number, line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise DataError(f"{path}, line {number}: not UTF-8: byte 0x{found:02x} at offset {error.start}.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}, after line {number}: broken gzip: {error}.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}.") from None
    if number == 0:
        raise DataError(f"{path}, line 1: the file is empty.")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) without their line ends, LF or CRLF."""
    for number, line in raw_lines(path):
        yield number, line.removesuffix("\n").removesuffix("\r")


def read_parallel(path: Path, target_path: Path) -> Iterator[Row]:
    """Two text files whose lines correspond."""
    sources, targets = text_lines(path), text_lines(target_path)
    for source, target in itertools.zip_longest(sources, targets):
        if source is None or target is None:
            number = (source or target)[0]
            longer = number + sum(1 for _ in (targets if source is None else sources))
            lengths = (number - 1, longer) if source is None else (longer, number - 1)
            raise DataError(
                f"{path if source is None else target_path}, line {number}: missing: {path} has {lengths[0]} lines "
                f"and {target_path} has {lengths[1]}; parallel files need equally many."
            )
        yield source[1], target[1]


def split_tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Numbered lists of cells. There is no quoting: a quote is a character like any other."""
    for number, line in text_lines(path):
        yield number, line.split("\t")


def split_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Numbered lists of cells, quoted as in RFC 4180; a record's number is that of its first line."""
    reader = csv.reader((line for _, line in raw_lines(path)), strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{path}, line {start}: bad CSV in the record that starts here: {error}.") from None
        yield start, cells


def read_delimited(path: Path, columns: Columns, records: Iterator[tuple[int, list[str]]]) -> Iterator[Row]:
    """The chosen two cells of each record. All records must be as wide as the first; a blank line is an empty row."""
    first_number, first = next(records, (1, []))
    source, target, has_header = find_columns(path, first_number, first, columns)
    width = len(first)
    rows = 0
    for number, cells in records if has_header else itertools.chain([(first_number, first)], records):
        rows += 1
        if len(cells) == width:
            yield cells[source], None if target is None else cells[target]
        elif not any(cells):
            yield "", None if target is None else ""
        else:
            raise DataError(
                f"{path}, line {number}: {len(cells)} columns, but line {first_number} has {width}: {preview(cells)}."
            )
    if rows == 0:
        raise DataError(f"{path}, line {first_number + 1}: no rows after the header.")


def find_columns(path: Path, number: int, first: list[str], columns: Columns) -> tuple[int, int | None, bool]:
    """The places of the source and target columns, and whether the first record is a header."""
    chosen = [name for name in (columns.source, columns.target) if name is not None]
    if chosen:
        has_header = not all(name.isdecimal() for name in chosen)
    else:
        has_header = {"source", "target"} <= set(first) or first == ["source"]
    if has_header:
        source_name, target_name = columns.source or "source", columns.target or "target"
        for name in (source_name,) if columns.may_lack_target(len(first)) else (source_name, target_name):
            if name not in first:
                raise unknown_column(path, f"line {number}", name, first)
        return first.index(source_name), first.index(target_name) if target_name in first else None, True
    source, target = int(columns.source or 0), int(columns.target or 1)
    for place in (source,) if columns.may_lack_target(len(first)) else (source, target):
        if place >= len(first):
            raise DataError(
                f"{path}, line {number}: no column {place}: the columns are numbered from 0 to {len(first) - 1}: "
                f"{preview(first)}."
            )
    return source, target if target < len(first) else None, False


def json_objects(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The numbered objects of a JSON lines file; blank lines are passed over."""
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: invalid JSON: {error}.") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: a JSON object is needed, not {preview(record)}.")
        yield number, record


def parquet_records(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The numbered rows (from 1) of a Parquet file."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=10_000):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}, after row {number}: broken Parquet: {error}.") from None


def read_records(
    path: Path | str, unit: str, records: Iterable[tuple[int, Mapping[str, object]]], columns: Columns
) -> Iterator[Row]:
    """Source and target of numbered records; `unit` says what the numbers count (`line`, `row`)."""
    number = None
    for number, record in records:
        where = f"{unit} {number}"
        source_name, target_name = columns.source or "source", columns.target or "target"
        if columns.source_lang is not None:
            if not isinstance(record.get("translation"), Mapping):
                raise DataError(
                    f"{path}, {where}: --source_lang and --target_lang need a column `translation` of dicts; the "
                    f"columns are {', '.join(record)}."
                )
            record = record["translation"]  # type: ignore[assignment]
            source_name, target_name = columns.source_lang, columns.target_lang or "target"
        source = string_value(path, where, record, source_name)
        if columns.may_lack_target(len(record)) and target_name not in record:
            yield source, None
        else:
            yield source, string_value(path, where, record, target_name)
    if number is None:
        raise DataError(f"{path}, {unit} 1: there are no rows.")


def string_value(path: Path | str, where: str, record: Mapping[str, object], name: str) -> str:
    if name not in record:
        raise unknown_column(path, where, name, list(record))
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"{path}, {where}: column {name!r} must be a string, not {preview(value)}.")
    try:
        value.encode("utf-8")  # JSON can escape half of a surrogate pair, which is no text
    except UnicodeEncodeError:
        raise DataError(f"{path}, {where}: column {name!r} has a lone surrogate: {preview(value)}.") from None
    return value


def unknown_column(path: Path | str, where: str, name: str, names: Sequence[str]) -> DataError:
    return DataError(f"{path}, {where}: unknown column {name!r}; the columns are {', '.join(map(repr, names))}.")


def preview(value: object) -> str:
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
