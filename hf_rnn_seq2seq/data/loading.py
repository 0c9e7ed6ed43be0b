"""From the user's arguments to a `DatasetDict` with the string columns `source` and `target`."""

import hashlib
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from .alignments import add_alignment_lines
from .arguments import DEFAULT_SPLIT_PERCENTAGE, SPLITS, DataArguments
from .corpora import PACKAGED_CORPORA
from .readers import Columns, DataError, Row, read_file, read_records

# What the datasets on the Hub call their splits.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "development"),
    "test": ("test", "testing"),
}
# Part of each cache file's name: raise it whenever the same input would give other rows.
READER_VERSION = 1
ROWS_PER_BATCH = 10_000


def load_data(arguments: DataArguments, splits: Sequence[str] = SPLITS) -> datasets.DatasetDict:
    """The wanted splits, as far as there is data for them.

    Args:
        arguments: where the data is.
        splits: some of `train`, `validation`, `test`. Data that none of them needs is not read.

    Returns:
        A dataset for each split, with the string columns `source` and `target` (which a test split may lack) and,
        where `merge_references` asks for it, the list column `references` in validation and test, whose first element
        is `target`. Rows with an empty side are still there; [`prepare_data`] drops and counts them.

    Raises:
        DataError: for bad input, with the file and the line.
    """
    readers = split_readers(arguments)
    if not readers:
        raise DataError("No data: give --dataset_name or --train_file (for prediction alone, --test_file).")
    shares = split_shares(arguments, list(readers))
    needs_train = "train" in splits or any(split in splits for split in shares)
    data = {split: read() for split, read in readers.items() if (needs_train if split == "train" else split in splits)}
    if arguments.train_alignment_file is not None and "train" in data:
        data["train"] = add_alignment_lines(data["train"], Path(arguments.train_alignment_file))
    if shares and "train" in data:
        data |= split_by_source(data["train"], shares)
    if arguments.extra_train_files and "train" in data and "train" in splits:
        columns = columns_of(arguments, "train")
        extra = [read_path(Path(path), None, columns) for path in arguments.extra_train_files]
        data["train"] = datasets.concatenate_datasets([data["train"], *extra])
    limits = {
        "train": arguments.max_train_samples,
        "validation": arguments.max_eval_samples,
        "test": arguments.max_predict_samples,
    }
    result = datasets.DatasetDict()
    for split in SPLITS:
        if split in data and split in splits:
            dataset = data[split]
            if arguments.merge_references and split != "train" and "target" in dataset.column_names:
                dataset = merge_references(dataset)
            limit = limits[split]
            result[split] = dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
    return result


def split_readers(arguments: DataArguments) -> dict[str, Callable[[], datasets.Dataset]]:
    """For each split that has data of its own, a function that reads it."""
    name = arguments.dataset_name
    if name is None:
        given = [split for split in SPLITS if getattr(arguments, f"{split}_file") is not None]
        return {
            split: partial(
                read_path,
                Path(getattr(arguments, f"{split}_file")),
                getattr(arguments, f"{split}_target_file"),
                columns_of(arguments, split),
            )
            for split in given
        }
    if name in PACKAGED_CORPORA:
        return {"train": partial(read_packaged_corpus, name)}
    loaded = open_dataset(name, arguments.dataset_config_name, arguments.streaming)
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict(train=loaded)
    readers: dict[str, Callable[[], datasets.Dataset]] = {}
    for split, names in SPLIT_NAMES.items():
        for found in [other for other in names if other in loaded][:1]:
            columns = columns_of(arguments, split)
            readers[split] = partial(read_dataset, loaded[found], f"{name} ({found})", columns)
    if not readers:
        raise DataError(f"--dataset_name {name}: no train, validation or test split, only {', '.join(loaded)}.")
    return readers


def columns_of(arguments: DataArguments, split: str) -> Columns:
    return Columns(
        source=arguments.source_column,
        target=arguments.target_column,
        source_lang=arguments.source_lang,
        target_lang=arguments.target_lang,
        target_optional=split == "test",
    )


def read_packaged_corpus(name: str) -> datasets.Dataset:
    rows = PACKAGED_CORPORA[name]()
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = ""  # the generator's own error names what to install
    return cached_dataset(rows, name, version)


def read_path(path: Path, target_file: str | None, columns: Columns) -> datasets.Dataset:
    """A file, or two parallel ones, or a folder written by `save_to_disk`."""
    if path.is_dir():
        dataset = open_dataset(str(path), None)
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(f"{path}: a folder with several splits: give it as --dataset_name.")
        return read_dataset(dataset, str(path), columns)
    paths = [path] if target_file is None else [path, Path(target_file)]
    digests = []
    for each in paths:
        if each.is_file():  # otherwise the reader raises its own error
            with open(each, "rb") as file:
                digests.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return cached_dataset(read_file(path, columns, *paths[1:]), columns, *digests, "".join(path.suffixes).lower())


def open_dataset(
    name: str, config_name: str | None, streaming: bool = False
) -> datasets.Dataset | datasets.DatasetDict | datasets.IterableDatasetDict:
    """A folder written by `save_to_disk`, or whatever `datasets.load_dataset` makes of the name."""
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "dataset_info.json").is_file():
            return datasets.load_from_disk(name)
        return datasets.load_dataset(name, config_name, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: can't be loaded as a dataset: {error}") from error


def read_dataset(
    dataset: datasets.Dataset | datasets.IterableDataset, name: str, columns: Columns
) -> datasets.Dataset:
    """The source and target columns of any dataset, checked to be strings; of a stream, in memory."""
    records = enumerate((record for batch in dataset.iter(ROWS_PER_BATCH) for record in batch_records(batch)), start=1)
    rows = read_records(name, "row", records, columns)
    if isinstance(dataset, datasets.Dataset):
        return cached_dataset(rows, columns, dataset._fingerprint)
    pairs = list(rows)
    sides: dict[str, list[str | None]] = {"source": [source for source, _ in pairs]}
    if pairs[0][1] is not None:  # then none of them is
        sides["target"] = [target for _, target in pairs]
    return datasets.Dataset.from_dict(sides)


def batch_records(batch: dict[str, list[object]]) -> Iterator[dict[str, object]]:
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def cached_dataset(rows: Iterable[Row], *key: object) -> datasets.Dataset:
    """The rows as a memory-mapped Arrow file in datasets' cache, written once for each key.

    The key has digests of the files' contents, so a changed file is never taken for the old one, and the same data
    gives the same fingerprint in every run, so that tokenized data is found again as well.
    """
    digest = hashlib.blake2b(repr((READER_VERSION, *key)).encode(), digest_size=16).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_rnn_seq2seq"
    path = folder / f"{digest}.arrow"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial_path = tempfile.mkstemp(dir=folder, suffix=".partial")
        os.close(handle)
        try:
            write_arrow(rows, partial_path)
            os.replace(partial_path, path)  # so that several processes may write at once
        finally:
            Path(partial_path).unlink(missing_ok=True)
    return datasets.Dataset.from_file(str(path))


def write_arrow(rows: Iterable[Row], path: str) -> None:
    rows = iter(rows)
    batch = list(islice(rows, ROWS_PER_BATCH))
    has_target = batch[0][1] is not None
    fields = ["source", "target"] if has_target else ["source"]
    schema = pa.schema([pa.field(name, pa.string()) for name in fields])
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch:
            columns = [pa.array([row[side] for row in batch], pa.string()) for side in range(len(fields))]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            batch = list(islice(rows, ROWS_PER_BATCH))


def split_shares(arguments: DataArguments, given: Sequence[str]) -> dict[str, float]:
    """Which share (0 to 1) of the training data becomes the validation and the test data."""
    if "train" not in given or arguments.streaming:
        return {}
    percentages = {
        "test": arguments.test_split_percentage,
        "validation": arguments.validation_split_percentage,
    }
    shares = {}
    for split, percentage in percentages.items():
        if split in given:
            if percentage:
                raise DataError(f"--{split}_split_percentage {percentage}: there is {split} data already.")
            continue
        if percentage is None:
            percentage = 0.0 if split == "test" and "validation" in given else DEFAULT_SPLIT_PERCENTAGE
        if percentage > 0:
            shares[split] = percentage / 100
    return shares


def split_by_source(dataset: datasets.Dataset, shares: dict[str, float]) -> dict[str, datasets.Dataset]:
    """Deal the rows out to `train` and the splits in `shares`, by a hash of the source alone.

    Rows with the same source always come to the same split, whatever else is in the data and however it is ordered.
    """
    points = np.fromiter(
        (source_point(source) for batch in dataset.iter(ROWS_PER_BATCH) for source in batch["source"]),
        dtype=np.float64,
        count=len(dataset),
    )
    bounds = np.cumsum(list(shares.values()))
    dealt = np.searchsorted(bounds, points, side="right")
    result = {}
    for place, split in enumerate([*shares, "train"]):
        result[split] = dataset.select(np.flatnonzero(dealt == place))
        if len(result[split]) == 0:
            raise DataError(
                f"Splitting {len(dataset)} rows left none for {split}: give a file for each split or other "
                "--validation_split_percentage and --test_split_percentage (0 for no split)."
            )
    return result


def source_point(source: str) -> float:
    """A point in [0, 1) that depends on the text alone, on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(source.encode("utf-8"), digest_size=6).digest(), "big") / 2**48


def merge_references(dataset: datasets.Dataset) -> datasets.Dataset:
    """One row for each distinct source, in the order of first appearance, with all its targets as `references`."""
    targets: dict[str, list[str]] = {}
    for batch in dataset.iter(ROWS_PER_BATCH):
        for source, target in zip(batch["source"], batch["target"], strict=True):
            references = targets.setdefault(source, [])
            if target.strip() and target not in references:
                references.append(target)
    return datasets.Dataset.from_dict(
        {
            "source": list(targets),
            "target": [references[0] if references else "" for references in targets.values()],
            "references": list(targets.values()),
        }
    )
