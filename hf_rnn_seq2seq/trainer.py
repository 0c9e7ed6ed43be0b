"""Seq2SeqTrainer for recurrent models: defaults that suit them, exact evaluation, reproducible length grouping."""

import copy
import functools
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import safetensors
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import EvalLoopOutput, has_length, sort_checkpoints

from .model_card import write_model_card

# Ends of metric names of which less is better.
LOWER_IS_BETTER = ("loss", "perplexity", "error_rate", "wer", "cer")


@dataclass
class RnnSeq2SeqTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with defaults for recurrent models trained from scratch.

    transformers' defaults are for fine-tuning large Transformers: a learning rate of 5e-5 hardly moves an RNN, 3
    epochs of 8 rows a step are too few and too small for it, and generation metrics are off. `data_seed` becomes
    `seed`, without which a resumed run would see the data in another order than an uninterrupted one.
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate for the optimizer."})
    num_train_epochs: float = field(default=20.0, metadata={"help": "Number of training epochs to perform."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size per device for training."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size per device for evaluation."})
    predict_with_generate: bool = field(
        default=True, metadata={"help": "Whether to evaluate by generating, which all metrics but the loss need."}
    )
    use_cache: bool = field(
        default=True,
        metadata={
            "help": "The Trainer writes this into the model's configuration and so into checkpoints. Training "
            "itself makes no cache either way."
        },
    )
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={
            "help": "Sampler for training. A recurrent model takes a step a token, so batches of similar lengths save "
            "much of its time.",
            "choices": ["random", "sequential", "group_by_length", "batch_rebalance"],
        },
    )

    def __post_init__(self) -> None:
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(LOWER_IS_BETTER)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns at every evaluation
        super().__post_init__()


class LengthGroupedSampler(Sampler[int]):
    """Batches of similar lengths, in random order, as a function of the seed and the epoch alone.

    transformers' sampler of this name draws from the global random state, which a resumed run does not have at the
    same place, and gives batches from the longest to the shortest, over and over.

    Args:
        lengths: the length of each row.
        batch_size: rows that go through the model together (or are accumulated, or spread over the processes).
        seed: of the random order.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        # The last batch may be smaller and has to stay last.
        for place in [*torch.randperm(len(batches) - 1, generator=generator).tolist(), len(batches) - 1]:
            yield from batches[place]


class RnnSeq2SeqTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` whose evaluation is exact and leaves the model's generation settings alone.

    The evaluation loss is a mean over tokens, not over batches, and comes with `perplexity` unless labels are
    smoothed. With several processes, rows that are repeated to fill the last batch are left out of predictions and
    metrics; in the loss they count twice.

    `results` holds the figures of the last evaluation and prediction outside of training, for the model card.
    """

    model: PreTrainedModel
    args: Seq2SeqTrainingArguments
    results: dict[str, float]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        # What is handed in has lost the column of lengths, which the model has no use for.
        dataset = self.train_dataset
        column = self.args.length_column_name
        if (
            self.args.train_sampling_strategy != "group_by_length"
            or not isinstance(dataset, datasets.Dataset)
            or column not in dataset.column_names
        ):
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(list(dataset[column]), batch_size, seed=self.args.data_seed or self.args.seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        # transformers groups evaluation data by length as well, and returns predictions in that order, not the data's.
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def prediction_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: object,
    ) -> tuple[float | None, torch.Tensor | None, torch.Tensor | None]:
        # Without targets DataCollatorForSeq2Seq sets `labels` to None, which the inherited step takes for labels.
        inputs = {name: value for name, value in inputs.items() if value is not None}
        # The inherited step writes every default (`max_length: 20`, …) into the model's generation config, and each
        # checkpoint saved afterwards keeps them.
        generation_config = self.model.generation_config
        self.model.generation_config = copy.deepcopy(generation_config)
        try:
            loss, predictions, labels = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs
            )
        finally:
            self.model.generation_config = generation_config
        if loss is not None:
            tokens = (inputs["labels"] != -100).sum().to(self._loss_and_tokens)
            self._loss_and_tokens += torch.stack([loss * tokens, tokens])
        return loss, predictions, labels

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        # Seq2SeqTrainer sets a gather function that keeps the rows repeated to fill the last batch.
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        self._loss_and_tokens = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = output.metrics or {}  # never empty; the Trainer adds to this dict afterwards
        loss_sum, tokens = self.accelerator.reduce(self._loss_and_tokens, reduction="sum").tolist()
        if tokens > 0:
            loss = loss_sum / tokens
            metrics[f"{metric_key_prefix}_loss"] = loss
            config = self.model.config
            likelihood = getattr(config, "output_normalizer", "softmax") == "softmax"  # is the loss one, alone?
            likelihood = likelihood and getattr(config, "coverage_loss_weight", 0) == 0
            if self.args.label_smoothing_factor == 0 and likelihood:
                metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        if not self.is_in_train:
            self.results = {**getattr(self, "results", {}), **metrics}
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # The Trainer pickles its arguments, and pushes the pickle with the model. Nothing reads it: leave a text.
        folder = Path(output_dir or self.args.output_dir or ".")
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        (folder / "training_args.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` into the output folder: the model, its figures, how to load it, how it was trained.

        Args:
            language, license: for the card's metadata.
            tags: beside those that every model of this package gets.
            model_name: the title; by default the name of the output folder.
            finetuned_from: the model it was fine-tuned from, on the Hub.
            tasks: task types such as `translation`; by default `text2text-generation`.
            dataset_tags: names of the data on the Hub.
            dataset: what the data is called in the text.
            dataset_args: which part of it, as `en-de`.
        """
        if not self.is_world_process_zero():
            return
        write_model_card(
            Path(self.args.output_dir or ".") / "README.md",
            config=self.model.config,
            args=self.args,
            parameters=self.model.num_parameters(),
            steps=self.state.global_step,
            epochs=self.state.epoch or 0.0,
            results=getattr(self, "results", {}),
            language=language,
            license=license,
            tags=tags,
            model_name=model_name or Path(self.args.hub_model_id or self.args.output_dir or "model").name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
        )


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step from which training can go on, or None.

    Checkpoints aren't written atomically: an interrupted one is passed over, where
    `transformers.trainer_utils.get_last_checkpoint` would give it.
    """
    if not Path(folder).is_dir():
        return None
    checkpoints = [Path(path) for path in sort_checkpoints(str(folder))]
    return next((path for path in reversed(checkpoints) if checkpoint_fault(path) is None), None)


def checkpoint_fault(checkpoint: str | Path) -> str | None:
    """Why training can't go on from a checkpoint, or None if it can."""
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json: {error}"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is missing or broken (was it saved with --save_only_model?)"
    weights = list(checkpoint.glob("*.safetensors"))
    if not weights:
        return "there is no .safetensors file"
    for path in weights:
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            return f"{path.name}: {error}"
    return None
