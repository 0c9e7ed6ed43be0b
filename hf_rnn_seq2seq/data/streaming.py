"""Training data that is never in memory as a whole: read, tokenized and dealt out while training goes on."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments
from .corpora import PACKAGED_CORPORA
from .loading import SPLIT_NAMES, columns_of, load_data, open_dataset
from .preparation import KEPT, encode_batch
from .readers import Columns, DataError, read_file, read_records

TEXT = datasets.Features({"source": datasets.Value("string"), "target": datasets.Value("string")})


def load_streamed_data(arguments: DataArguments, splits: list[str]) -> datasets.DatasetDict:
    """As [`load_data`], but of the training data only the first `tokenizer_train_samples` rows.

    Raises:
        DataError: for bad input; in the training data, as far as it has been read.
    """
    data = datasets.DatasetDict()
    if "train" in splits:
        rows = list(stream_train_data(arguments).take(arguments.tokenizer_train_samples))
        data["train"] = datasets.Dataset.from_list(rows, features=TEXT)
    if others := [split for split in splits if split != "train"]:
        data.update(load_data(arguments, others))
    return data


def stream_train_data(arguments: DataArguments, num_shards: int = 1) -> datasets.IterableDataset:
    """The training data's rows, with the string columns `source` and `target`.

    Args:
        arguments: where the data is.
        num_shards: how many readers there will be. A file is dealt out to them line by line: each reads all of it, and
            nothing is read twice by the same one. Data on the Hub, or in a folder, has the shards that it has.
    """
    columns = columns_of(arguments, "train")
    if arguments.dataset_name is None and arguments.train_file is None:
        raise DataError("There is no train data: give --train_file or --dataset_name.")
    if arguments.train_file is not None and not Path(arguments.train_file).is_dir():
        return datasets.IterableDataset.from_generator(
            read_shares,
            features=TEXT,
            gen_kwargs={
                "shares": list(range(num_shards)),
                "of": num_shards,
                "path": Path(arguments.train_file),
                "columns": columns,
                "target_path": None if arguments.train_target_file is None else Path(arguments.train_target_file),
            },
        )
    name = arguments.train_file or arguments.dataset_name or ""
    if name in PACKAGED_CORPORA:
        raise DataError(f"--streaming: --dataset_name {name} is a package that is in memory as it is.")
    loaded = open_dataset(name, arguments.dataset_config_name, streaming=True)
    if isinstance(loaded, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        found = next((split for split in SPLIT_NAMES["train"] if split in loaded), None)
        if found is None:
            raise DataError(f"{name}: no train split, only {', '.join(loaded)}.")
        loaded = loaded[found]
    if isinstance(loaded, datasets.Dataset):  # written by `save_to_disk`: memory-mapped
        loaded = loaded.to_iterable_dataset(num_shards=min(num_shards, len(loaded)))
    return loaded.map(
        checked_row,
        with_indices=True,
        fn_kwargs={"name": name, "columns": columns},
        remove_columns=loaded.column_names,
        features=TEXT,
    )


def read_shares(
    shares: list[int], of: int, path: Path, columns: Columns, target_path: Path | None
) -> Iterator[dict[str, str | None]]:
    """Of a file's rows those whose number from 0, modulo `of`, is one of `shares`."""
    for share in shares:
        for source, target in islice(read_file(path, columns, target_path), share, None, of):
            yield {"source": source, "target": target}


def checked_row(record: dict[str, object], number: int, name: str, columns: Columns) -> dict[str, str | None]:
    """The source and the target of a record, checked to be strings."""
    source, target = next(read_records(name, "row (of one reader's share)", [(number + 1, record)], columns))
    return {"source": source, "target": target}


def tokenize_stream(
    rows: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    source_vocab_size: int,
    target_vocab_size: int,
) -> datasets.IterableDataset:
    """What the model gets of each row, as [`prepare_data`] makes it; rows that it would drop are left out.

    Args:
        rows: the result of [`stream_train_data`].
        tokenizer, arguments, source_vocab_size, target_vocab_size: as for [`prepare_data`].
    """
    return rows.map(
        encode_kept,
        batched=True,
        remove_columns=list(TEXT),
        fn_kwargs={
            "tokenizer": tokenizer,
            "vocab_sizes": (source_vocab_size, target_vocab_size),
            "max_lengths": (arguments.max_source_length, arguments.max_target_length),
        },
    )


def encode_kept(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    vocab_sizes: tuple[int, int],
    max_lengths: tuple[int, int],
) -> dict[str, list[list[int]] | list[int]]:
    """Token ids of the rows of a batch that are neither empty on a side nor too long."""
    encoded = encode_batch(batch, tokenizer, vocab_sizes, max_lengths)
    kept = [fate == KEPT for fate in encoded.pop("fate")]
    return {
        name: [value for value, is_kept in zip(values, kept, strict=True) if is_kept]  # type: ignore[misc]
        for name, values in encoded.items()
    }
