"""Which rows make a batch: rows of similar lengths, by number or by tokens, on one process or many, also streamed."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import datasets
import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, SequentialSampler
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import EvalLoopOutput, has_length
from transformers.utils import logging

logger = logging.get_logger(__name__)

# So many batches' rows are drawn at random, sorted by length and cut: more waste less padding and are less random.
BATCHES_SORTED_TOGETHER = 50
LABELS = "labels"
EVALUATED = ("predictions", "label_ids", "inputs", "losses")  # the parts of an EvalPrediction


@dataclass
class BatchingArguments(Seq2SeqTrainingArguments):
    """What batches are made of."""

    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Batches of as many rows as fit into so many tokens, padding included: rows x (longest source + "
            "longest target), on each device and for each forward pass. Takes the place of "
            "--per_device_train_batch_size. A longer row makes a batch of its own."
        },
    )
    shuffle_buffer_size: int = field(
        default=10_000,
        metadata={
            "help": "Streamed training data is shuffled within so many rows, on each process and data-loader worker; "
            "0 keeps its order."
        },
    )

    def __post_init__(self) -> None:
        if self.max_tokens_per_batch is not None:
            if self.max_tokens_per_batch < 1:
                raise ValueError(f"max_tokens_per_batch={self.max_tokens_per_batch}: must be at least 1")
            if self.train_sampling_strategy != "group_by_length":
                raise ValueError(
                    f"max_tokens_per_batch={self.max_tokens_per_batch}: train_sampling_strategy must be "
                    f"'group_by_length', not {str(self.train_sampling_strategy)!r}"
                )
        if self.shuffle_buffer_size < 0:
            raise ValueError(f"shuffle_buffer_size={self.shuffle_buffer_size}: must be at least 0")
        super().__post_init__()


def row_lengths(rows: object, source: str = "input_ids") -> np.ndarray | None:
    """Source and target lengths [rows, 2]; the target's is 0 where there are no labels. None without a source.

    Args:
        rows: a `datasets.Dataset`, or any other dataset or list of mappings.
        source: the source's column.
    """
    if isinstance(rows, datasets.Dataset):
        if source not in rows.column_names:
            return None
        columns = [name for name in (source, LABELS) if name in rows.column_names]
        tables = rows.select_columns(columns).with_format("arrow").iter(10_000)
        parts = [np.stack([pc.list_value_length(table[name]).to_numpy() for name in columns], 1) for table in tables]
        lengths = np.concatenate(parts) if parts else np.zeros((0, len(columns)), dtype=np.int64)
        return np.pad(lengths, ((0, 0), (0, 2 - len(columns))))
    try:
        return np.array([(len(row[source]), len(row.get(LABELS, ()))) for row in rows])  # type: ignore[attr-defined]
    except (KeyError, TypeError, AttributeError):
        return None


def order_by_lengths(lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places [rows] of rows sorted by source and target length, rows of equal lengths in random order.

    Targets go up for one source length and down for the next, so that neighbours are similar on both sides also where
    the source gets longer.
    """
    source, target = lengths.T
    place = np.unique(source, return_inverse=True)[1]
    return np.lexsort((rng.random(len(lengths)), np.where(place % 2, -target, target), source))


def cuts_by_tokens(lengths: np.ndarray, max_tokens: int) -> list[int]:
    """Where to cut rows of these lengths [rows, 2] into batches of at most so many padded tokens: each batch's end."""
    ends, start, longest_source, longest_target = [], 0, 0, 0
    for place, (source, target) in enumerate(lengths.tolist()):
        longest_source, longest_target = max(longest_source, source), max(longest_target, target)
        if place > start and (place + 1 - start) * (longest_source + longest_target) > max_tokens:
            ends.append(place)
            start, longest_source, longest_target = place, source, target
    return [*ends, len(lengths)]


def halve_largest(ends: list[int], multiple: int) -> list[int]:
    """Cut the largest batches in two until the number of batches is a multiple, or each is a single row."""
    while len(ends) % multiple:
        sizes = np.diff([0, *ends])
        largest = int(sizes.argmax())
        if sizes[largest] == 1:
            break
        ends = [*ends[:largest], ends[largest] - int(sizes[largest]) // 2, *ends[largest:]]
    return ends


class LengthBatchSampler(BatchRebalanceSampler):
    """This process's batches of rows of similar lengths, in random order that follows from seed and epoch alone.

    In each epoch every row comes once, on one process (only where all batches are single rows, some come twice so that
    every process gets equally many). All processes have the same number of batches, the same in every epoch, and at
    the same time batches of similar lengths, so that none waits long for another.

    With `batch_size`, a global batch of `batch_size * accumulation_steps * world_size` rows has the same rows however
    it is spread over processes and accumulated. With `max_tokens` the batches differ in their number of rows.

    The base class only tells the Trainer that the batches have been dealt out to the processes already.

    Args:
        lengths: [rows, 2], of source and target.
        batch_size: rows of a batch; smaller only at the end of an epoch.
        max_tokens: in place of it, rows x (longest source + longest target) of a batch is at most this; a row that is
            longer is a batch of its own.
        seed: of the order.
        accumulation_steps: batches of one process for one update.
        world_size, rank: how many processes there are, and which one this is.
        drop_last: leave out the last, smaller global batch (with `batch_size` only).

    Raises:
        ValueError: fewer rows than processes.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        max_tokens: int | None = None,
        seed: int = 0,
        accumulation_steps: int = 1,
        world_size: int = 1,
        rank: int = 0,
        drop_last: bool = False,
    ) -> None:
        if len(lengths) < world_size:
            raise ValueError(f"{len(lengths)} training rows can't be dealt out to {world_size} processes.")
        self.row_lengths = lengths
        self.rows_per_batch = batch_size  # as `batch_size`, Accelerate would take it for every batch's size
        self.seed = seed
        self.world_size = world_size
        self.rank = rank
        self.epoch = 0
        self.ends: list[int] | None = None
        if max_tokens is not None:
            # Rows of equal lengths change places from epoch to epoch, so the cuts stay where they are.
            in_order = lengths[order_by_lengths(lengths, np.random.default_rng(0))]
            self.ends = halve_largest(cuts_by_tokens(in_order, max_tokens), world_size)
            self.number = -(-len(self.ends) // world_size)
            warn_of_long_rows(lengths, max_tokens, rank)
            return
        self.global_rows = batch_size * accumulation_steps * world_size
        self.whole, rest = divmod(len(lengths), self.global_rows)
        if 0 < rest < world_size and not drop_last:  # too few for all processes: share out one global batch more
            self.whole, rest = self.whole - 1, rest + self.global_rows
        self.rest = 0 if drop_last else rest
        self.number = self.whole * accumulation_steps + -(-self.rest // (batch_size * world_size))

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        for batches in self._by_rows(rng) if self.ends is None else self._by_tokens(rng, self.ends):
            for batch in batches[self.rank :: self.world_size]:
                yield batch.tolist()

    def _by_rows(self, rng: np.random.Generator) -> Iterator[list[np.ndarray]]:
        order = rng.permutation(len(self.row_lengths))
        span = BATCHES_SORTED_TOGETHER * self.global_rows
        for start in range(0, len(order), span):
            part = order[start : start + span]
            order[start : start + span] = part[order_by_lengths(self.row_lengths[part], rng)]
        for place in rng.permutation(self.whole) * self.global_rows:
            yield np.split(order[place : place + self.global_rows], self.global_rows // self.rows_per_batch)
        if self.rest:
            rows = order[self.whole * self.global_rows :]
            batches = self.world_size * -(-self.rest // (self.rows_per_batch * self.world_size))
            yield [part if len(part) else order[:1] for part in np.array_split(rows, batches)]

    def _by_tokens(self, rng: np.random.Generator, ends: list[int]) -> Iterator[list[np.ndarray]]:
        batches = np.split(order_by_lengths(self.row_lengths, rng), ends[:-1])
        batches += batches[: -len(batches) % self.world_size]
        for place in rng.permutation(self.number) * self.world_size:
            yield batches[place : place + self.world_size]


def warn_of_long_rows(lengths: np.ndarray, max_tokens: int, rank: int) -> None:
    longer = lengths.sum(1) > max_tokens
    if longer.any() and rank == 0:
        logger.warning(
            f"{longer.sum():,} of {len(lengths):,} training rows are longer (source + target: up to "
            f"{lengths.sum(1).max():,}) than max_tokens_per_batch={max_tokens:,}; each is a batch of its own."
        )


class StreamedBatches(IterableDataset):
    """This process's batches of a stream, without end: when its rows are through, the next epoch of them begins.

    The Trainer would let processes with fewer rows go on to the next epoch while others wait for them for ever.

    Args:
        rows: with the columns that the model gets. Its shards are dealt out to the processes and their data-loader
            workers, or the rows themselves to the processes if the number of shards is no multiple of theirs.
        batch_size, max_tokens: as for [`LengthBatchSampler`].
        by_length: whether rows of similar lengths go together.
        buffer_size: rows among which `datasets` shuffles; 0 for none.
        seed: of the order, which is another in each epoch.
        world_size, rank: how many processes there are, and which one this is.
        source: the source's column.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        batch_size: int,
        max_tokens: int | None = None,
        by_length: bool = True,
        buffer_size: int = 0,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        source: str = "input_ids",
    ) -> None:
        self.rows = split_dataset_by_node(rows, rank, world_size)
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.by_length = by_length
        self.buffer_size = buffer_size
        self.seed = seed
        self.source = source

    def __iter__(self) -> Iterator[list[Mapping[str, Sequence]]]:
        for epoch in itertools.count():
            # Shuffled anew, as `set_epoch` would set the epoch of all workers, who do not come to its end together.
            seed = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
            rows = self.rows.shuffle(seed=int(seed), buffer_size=self.buffer_size) if self.buffer_size else self.rows
            rng = np.random.default_rng((self.seed, epoch))
            stream = iter(rows)
            pool = list(itertools.islice(stream, self.batch_size * BATCHES_SORTED_TOGETHER))
            if not pool:
                return  # a worker without a shard
            while pool:
                yield from self._batches(pool, rng)
                pool = list(itertools.islice(stream, self.batch_size * BATCHES_SORTED_TOGETHER))

    def _batches(
        self, pool: list[Mapping[str, Sequence]], rng: np.random.Generator
    ) -> Iterator[list[Mapping[str, Sequence]]]:
        lengths = row_lengths(pool, self.source) if self.by_length else None
        if lengths is None:
            order, ends = np.arange(len(pool)), [*range(self.batch_size, len(pool), self.batch_size), len(pool)]
        elif self.max_tokens is None:
            order = order_by_lengths(lengths, rng)
            ends = [*range(self.batch_size, len(pool), self.batch_size), len(pool)]
        else:
            order = order_by_lengths(lengths, rng)
            ends = cuts_by_tokens(lengths[order], self.max_tokens)
        batches = np.split(order, ends[:-1])
        for place in range(len(batches)) if lengths is None else rng.permutation(len(batches)):
            yield [pool[row] for row in batches[place]]


class LengthSortedSampler(Sampler[int]):
    """Rows from the longest to the shortest: little padding, and what does not fit into memory fails at once."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.order = np.lexsort((lengths[:, 1], lengths[:, 0]))[::-1]

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())


def evaluation_order(dataloader: DataLoader) -> np.ndarray | None:
    """The order that a [`LengthSortedSampler`] gives an evaluation's rows, or None if there is no such sampler."""
    sampler = dataloader.batch_sampler
    while sampler is not None and not isinstance(sampler, LengthSortedSampler):
        sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
    return None if sampler is None else sampler.order


def reorder(values: object, places: np.ndarray) -> object:
    """Rows of an array, or of each array in tuples, lists and dicts of them."""
    if isinstance(values, np.ndarray):
        return values[places]
    if isinstance(values, Mapping):
        return {name: reorder(value, places) for name, value in values.items()}
    if isinstance(values, (tuple, list)):
        return type(values)(reorder(value, places) for value in values)
    return values


class BatchingTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` with batches of rows of similar lengths, which also logs how much of them is padding.

    `padding_share` in the logs is the share of padded positions, sources and targets together, in the batches since
    the log before; `train_padding_share` that of all of them.

    Training data may be a `datasets.IterableDataset` of tokenized rows; then `max_steps` says when training ends, and
    checkpoints and evaluations can't go by epochs.
    """

    args: Seq2SeqTrainingArguments

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        # Since the last log, and in all: positions in batches, and how many of them are padding.
        self._positions = torch.zeros(2, dtype=torch.long)
        self._padded = torch.zeros(2, dtype=torch.long, device=self.args.device)

    @property
    def _source_column(self) -> str:
        return getattr(self.model, "main_input_name", "input_ids")

    @property
    def _max_tokens(self) -> int | None:
        """The limit of a batch, lowered as the batch size is where `auto_find_batch_size` had to."""
        if not isinstance(self.args, BatchingArguments) or self.args.max_tokens_per_batch is None:
            return None
        return max(1, self.args.max_tokens_per_batch * self._train_batch_size // self.args.per_device_train_batch_size)

    def get_train_dataloader(self) -> DataLoader:
        args, rows = self.args, self.train_dataset
        if isinstance(rows, datasets.IterableDataset):
            batches = StreamedBatches(
                rows,
                self._train_batch_size,
                self._max_tokens,
                by_length=args.train_sampling_strategy == "group_by_length",
                buffer_size=args.shuffle_buffer_size if isinstance(args, BatchingArguments) else 0,
                seed=args.seed if args.data_seed is None else args.data_seed,
                world_size=args.world_size,
                rank=args.process_index,
                source=self._source_column,
            )
            # Not prepared by Accelerate, which would deal out once more what is this process's share already.
            return DataLoader(
                batches,
                batch_size=None,
                collate_fn=self._get_collator_with_removed_columns(self.data_collator, description="Training"),
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
                multiprocessing_context=args.dataloader_multiprocessing_context,
                prefetch_factor=args.dataloader_prefetch_factor,
            )
        dataloader = super().get_train_dataloader()
        inner = getattr(dataloader.batch_sampler, "batch_sampler", None)
        if isinstance(inner, LengthBatchSampler):  # wrapped, as with several processes
            # When it resumes, the Trainer tells the epoch to the wrapper, which would not pass it on.
            dataloader.batch_sampler.set_epoch = inner.set_epoch  # type: ignore[union-attr]
        return dataloader

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        grouped = args.train_sampling_strategy == "group_by_length" and dataset is not None and has_length(dataset)
        lengths = row_lengths(dataset, self._source_column) if grouped else None
        if lengths is None:
            if self._max_tokens is not None:
                raise ValueError(f"max_tokens_per_batch: there is no column {self._source_column!r} to be measured.")
            return super()._get_train_sampler(train_dataset)
        return LengthBatchSampler(
            lengths,
            self._train_batch_size,
            self._max_tokens,
            seed=args.seed if args.data_seed is None else args.data_seed,
            accumulation_steps=args.gradient_accumulation_steps,
            world_size=args.world_size,
            rank=args.process_index,
            drop_last=args.dataloader_drop_last,
        )

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        if eval_dataset is None or not has_length(eval_dataset):
            return None
        in_batches = self.args.batch_eval_metrics or not self.args.eval_do_concat_batches
        lengths = None if in_batches else row_lengths(eval_dataset, self._source_column)
        # transformers' own grouping by length returns predictions in that order, not the data's.
        return SequentialSampler(eval_dataset) if lengths is None else LengthSortedSampler(lengths)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        order, compute_metrics = evaluation_order(dataloader), self.compute_metrics
        if order is None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        places = np.argsort(order)  # where each row of the data came

        def metrics_in_order(output: EvalPrediction) -> dict[str, float]:
            assert compute_metrics is not None
            for name in EVALUATED:
                setattr(output, name, reorder(getattr(output, name), places))
            return compute_metrics(EvalPrediction(output.predictions, output.label_ids, output.inputs, output.losses))

        self.compute_metrics = None if compute_metrics is None else metrics_in_order
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self.compute_metrics = compute_metrics
        predictions, label_ids = reorder(output.predictions, places), reorder(output.label_ids, places)
        return output._replace(predictions=predictions, label_ids=label_ids)  # type: ignore[arg-type]

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        for tensor, padding in ((inputs.get("attention_mask"), 0), (inputs.get(LABELS), -100)):
            if tensor is not None:
                self._positions += tensor.numel()
                self._padded += tensor.eq(padding).sum().to(self._padded.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for place, (figure, name) in enumerate((("loss", "padding_share"), ("train_loss", "train_padding_share"))):
            if figure in logs:
                counts = torch.stack([self._positions[place].to(self._padded.device), self._padded[place]])
                positions, padded = self.accelerator.reduce(counts, reduction="sum").tolist()
                self._positions[place] = self._padded[place] = 0
                if positions:
                    logs[name] = padded / positions
        super().log(logs, start_time)
