"""From text to token ids: what is dropped, what is refused, what the Trainer gets."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from .alignments import parse_alignments
from .arguments import DataArguments
from .readers import DataError, preview

KEPT, EMPTY, TOO_LONG = 0, 1, 2


@dataclass(frozen=True)
class DropCounts:
    """How many rows of one split were read, and how many of them were dropped for which reason."""

    read: int
    empty: int
    too_long: int

    def __str__(self) -> str:
        return (
            f"{self.empty + self.too_long} of {self.read} ({self.empty} with an empty side, {self.too_long} too long)"
        )


@dataclass(frozen=True)
class PreparedData:
    """Tokenized data.

    Args:
        datasets: for each split the columns `input_ids`, `labels` (unless the split has no target), `copy_ids` (if
            the tokenizer makes them), `alignments` (if there are any), `length` (source plus target, in tokens: what
            batches are grouped by), `source`, and `target` and `references` where there are any.
        drops: for each split what was dropped.
    """

    datasets: datasets.DatasetDict
    drops: dict[str, DropCounts]

    def drop_line(self) -> str:
        """One line for the user."""
        return "Dropped rows: " + "; ".join(f"{split} {counts}" for split, counts in self.drops.items()) + "."


def prepare_data(
    data: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    source_vocab_size: int,
    target_vocab_size: int,
) -> PreparedData:
    """Tokenize, drop what can't be used, and refuse what the model's embeddings have no row for.

    Rows with an empty (or blank) side are dropped, except from test data without targets, where line numbers should
    stay what they are. Rows longer than the maximum lengths are dropped from training and validation data only: a
    recurrent model takes sources of any length, and a score that leaves out the hardest test rows would flatter.

    Args:
        data: the result of [`load_data`].
        tokenizer: called as `tokenizer(sources, text_target=targets)`.
        arguments: the maximum lengths, and how many processes work.
        source_vocab_size, target_vocab_size: rows of the model's two embeddings.

    Raises:
        DataError: for a token id outside of the vocabulary, or a split of which nothing is left.
    """
    prepared, drops = datasets.DatasetDict(), {}
    for split, dataset in data.items():
        encoded = dataset.map(
            encode_batch,
            batched=True,
            fn_kwargs={
                "tokenizer": tokenizer,
                "vocab_sizes": (source_vocab_size, target_vocab_size),
                "max_lengths": None if split == "test" else (arguments.max_source_length, arguments.max_target_length),
            },
            num_proc=arguments.preprocessing_num_workers,
            desc=f"Tokenizing {split} data",
        )
        fate = np.asarray(encoded.with_format("numpy")["fate"][:])
        counts = np.bincount(fate, minlength=3)
        drops[split] = DropCounts(read=len(dataset), empty=int(counts[EMPTY]), too_long=int(counts[TOO_LONG]))
        if counts[KEPT] == 0:
            raise DataError(
                f"No {split} data is left: dropped {drops[split]}; the limits are --max_source_length "
                f"{arguments.max_source_length} and --max_target_length {arguments.max_target_length} tokens."
            )
        if counts[KEPT] < len(dataset):
            encoded = encoded.select(np.flatnonzero(fate == KEPT))
        encoded = parse_alignments(encoded, arguments.train_alignment_file or "")
        prepared[split] = encoded.remove_columns("fate")
    return PreparedData(prepared, drops)


def encode_batch(
    batch: dict[str, list[str]],
    tokenizer: PreTrainedTokenizerBase,
    vocab_sizes: tuple[int, int],
    max_lengths: tuple[int, int] | None,
) -> dict[str, list[list[int]] | list[int]]:
    """Token ids of a batch of rows, their lengths, and each row's fate: kept, empty or too long."""
    columns = ("source", "target") if "target" in batch else ("source",)
    sides = [batch[name] for name in columns]
    encoding = tokenizer(batch["source"], text_target=batch.get("target"))
    ids = [encoding[name] for name in ("input_ids", "labels")[: len(sides)]]
    copy_ids = encoding.get("copy_ids")
    if copy_ids is None:
        sizes = vocab_sizes
    elif len(tokenizer) == vocab_sizes[1]:
        sizes = vocab_sizes[0], vocab_sizes[1] + max(map(len, copy_ids))  # targets may hold words of the source
    else:
        raise DataError(
            f"The tokenizer numbers source words outside its vocabulary from {len(tokenizer)}, its size, but the "
            f"model's target vocabulary has {vocab_sizes[1]} ids: the tokenizer and the model don't belong together."
        )
    for name, texts, rows, size in zip(columns, sides, ids, sizes, strict=False):
        check_ids(name, texts, rows, size)
    fate = []
    for pair, rows in zip(zip(*sides, strict=True), zip(*ids, strict=True), strict=True):
        if len(pair) == 2 and not all(text.strip() for text in pair):
            fate.append(EMPTY)
        elif max_lengths and any(len(row) > limit for row, limit in zip(rows, max_lengths, strict=False)):
            fate.append(TOO_LONG)
        else:
            fate.append(KEPT)
    encoded: dict[str, list[list[int]] | list[int]] = {
        "input_ids": ids[0],
        "length": [sum(map(len, rows)) for rows in zip(*ids, strict=True)],
        "fate": fate,
    }
    if len(ids) == 2:
        encoded["labels"] = ids[1]
    if copy_ids is not None:
        encoded["copy_ids"] = copy_ids
    return encoded


def check_ids(side: str, texts: Sequence[str], rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse ids that an embedding would fail on, or that a GPU would fail on without saying which."""
    for text, row in zip(texts, rows, strict=True):
        if row and (min(row) < 0 or max(row) >= vocab_size):
            bad = next(token_id for token_id in row if not 0 <= token_id < vocab_size)
            raise DataError(
                f"The {side} {preview(text)} has the token id {bad}, but the model's {side} vocabulary has "
                f"{vocab_size} ids (0 to {vocab_size - 1}): the tokenizer and the model don't belong together."
            )
