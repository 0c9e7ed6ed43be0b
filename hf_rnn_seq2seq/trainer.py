"""Seq2SeqTrainer for recurrent models: defaults that suit them, exact evaluation, whole checkpoints."""

import copy
import functools
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .batching import BatchingArguments, BatchingTrainer
from .checkpoints import CheckpointTrainer
from .host_memory import keep_for_training
from .matmul_precision import CHOICES, MatmulPrecision
from .model_card import ARGUMENTS_NAME, attention_plot, write_model_card
from .moving_average import TRAINING_WEIGHTS_NAME, MovingAverage, load_training_weights, save_training_weights
from .objective_arguments import ObjectiveArguments
from .optimization import OptimizationArguments, OptimizationTrainer
from .sharding import own_class, shard_tables_for
from .step_products import packed_weights
from .training_objective import ObjectiveTrainer
from .training_time import TrainingTime

# Ends of metric names of which less is better.
LOWER_IS_BETTER = ("loss", "perplexity", "error_rate", "wer", "cer")


# OptimizationArguments comes first: each base brings transformers' defaults, over which its own have to win.
@dataclass
class RnnSeq2SeqTrainingArguments(OptimizationArguments, ObjectiveArguments, BatchingArguments):
    """`Seq2SeqTrainingArguments` with defaults for recurrent models trained from scratch.

    transformers' defaults are for fine-tuning large Transformers: a learning rate of 5e-5 hardly moves an RNN, 3
    epochs of 8 rows a step are too few and too small for it, and generation metrics are off. `data_seed` becomes
    `seed`, without which a resumed run would see the data in another order than an uninterrupted one.
    """

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
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Keep an exponential moving average of the weights with this decay, as 0.999, and evaluate and "
            "save it instead of them; checkpoints keep both."
        },
    )
    ema_warmup: bool = field(
        default=True,
        metadata={"help": "Let the decay of --ema_decay after step t be at most (1 + t) / (10 + t)."},
    )
    float32_matmul_precision: str = field(
        default="auto",
        metadata={
            "help": "Precision of float32 matrix products while training, torch.set_float32_matmul_precision's. auto: "
            "medium where a measurement finds it faster at full precision, as on many CPUs, else what is set already.",
            "choices": list(CHOICES),
        },
    )
    keep_freed_memory: bool = field(
        default=True,
        metadata={
            "help": "On a CPU, with glibc: what a step frees stays with the process for the next one, up to 2 GB, "
            "instead of going back to the system page by page."
        },
    )
    stop_on_nan: bool = field(
        default=True,
        metadata={"help": "End training with an error at the first loss, or saving, that is NaN or infinite."},
    )

    def __post_init__(self) -> None:
        if self.data_seed is None:
            self.data_seed = self.seed
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith(LOWER_IS_BETTER)
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch warns at every evaluation
            if self.bf16 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                self.use_cpu = True  # otherwise bf16 is refused, and each of several processes would train alone
        super().__post_init__()
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be from 0 to less than 1, not {self.ema_decay}.")
        if self.float32_matmul_precision not in CHOICES:
            found = self.float32_matmul_precision
            raise ValueError(f"`float32_matmul_precision` must be one of {', '.join(CHOICES)}, not {found!r}.")


class RnnSeq2SeqTrainer(ObjectiveTrainer, OptimizationTrainer, BatchingTrainer, CheckpointTrainer):
    """`Seq2SeqTrainer` whose evaluation is exact and leaves the model's generation settings alone.

    The evaluation loss is a mean over tokens, not over batches, without any loss that training adds, and comes with
    `perplexity`. With several processes, rows that are repeated to fill the last batch count for nothing: not in the
    predictions, not in metrics and losses, and not in training (unless `average_tokens_across_devices` is off).

    For the model card `results` holds the figures of the last evaluation and prediction outside of training, and
    `run_record` what `run.json` does, if run_seq2seq.py trains.
    """

    model: PreTrainedModel
    args: Seq2SeqTrainingArguments
    results: dict[str, float | str]
    run_record: dict[str, Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.training_time = TrainingTime()
        self.add_callback(self.training_time)
        self.moving_average: MovingAverage | None = None
        if isinstance(self.args, RnnSeq2SeqTrainingArguments) and self.args.ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("`ema_decay` is for weights that every process holds whole, not FSDP or DeepSpeed.")
            self.moving_average = MovingAverage(self.args.ema_decay, self.args.ema_warmup)
            self.add_callback(self.moving_average)
        if isinstance(self.args, RnnSeq2SeqTrainingArguments):
            self.add_callback(MatmulPrecision(self.args.float32_matmul_precision))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As everywhere in transformers; `train_total_runtime` adds the parts before a resumption."""
        own = self.args if isinstance(self.args, RnnSeq2SeqTrainingArguments) else None
        if own is not None and own.keep_freed_memory and own.device.type == "cpu":
            keep_for_training()
        self.training_time.forget()
        before = torch.get_float32_matmul_precision()
        try:
            output = super().train(*args, **kwargs)
        finally:
            torch.set_float32_matmul_precision(before)
        output.metrics["train_total_runtime"] = round(self.training_time.before + output.metrics["train_runtime"], 4)
        return output

    def _averaged(self) -> AbstractContextManager[None]:
        """While this lasts, and if there is a moving average, the model has it for its weights."""
        return nullcontext() if self.moving_average is None else self.moving_average.in_place_of_weights(self.model)

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        shard = dataloader.batch_sampler
        if isinstance(shard, BatchSamplerShard) and not hasattr(shard, "set_epoch"):
            # When it resumes within an epoch, the Trainer tells the epoch to the shard, which would not pass it on.
            sampler = getattr(shard.batch_sampler, "sampler", shard.batch_sampler)
            shard.set_epoch = getattr(sampler, "set_epoch", lambda epoch: None)
        return dataloader

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        shard_tables_for(self.accelerator, self.model)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, torch.Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.average_tokens_across_devices and self.accelerator.gradient_state.end_of_dataloader:
            own = rows_of_last_batch(cast(DataLoader, self.callback_handler.train_dataloader))
            if own is not None and batches and batches[-1].get("labels") is not None:
                batches[-1]["labels"][own:] = -100
                num_items = self._get_num_items_in_batch(batches, device)
        return batches, num_items

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
        # The loss is to be the mean over this process's own tokens, which are counted below.
        across_devices, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        if self._rows_of_last_batch is not None and self.accelerator.gradient_state.end_of_dataloader:
            labels = inputs.get("labels")
            if labels is not None:
                labels[self._rows_of_last_batch :] = -100
        try:
            loss, predictions, labels = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs
            )
        finally:
            self.model.generation_config = generation_config
            self.args.average_tokens_across_devices = across_devices
        if loss is not None:
            tokens = (inputs["labels"] != -100).sum().to(self._loss_and_tokens)
            loss_sum = torch.where(tokens > 0, loss * tokens, 0)  # without tokens the loss may be NaN
            self._loss_and_tokens += torch.stack([loss_sum, tokens])
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
        self._rows_of_last_batch = rows_of_last_batch(dataloader)
        with self._averaged(), packed_weights():
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        metrics = output.metrics or {}  # never empty; the Trainer adds to this dict afterwards
        loss_sum, tokens = self.accelerator.reduce(self._loss_and_tokens, reduction="sum").tolist()
        if tokens > 0:
            loss = loss_sum / tokens
            metrics[f"{metric_key_prefix}_loss"] = loss
            likelihood = getattr(self.model.config, "output_normalizer", "softmax") == "softmax"  # is the loss one?
            if self.label_smoother is None and likelihood:
                metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss) if loss < 700 else math.inf
        if not self.is_in_train:
            self.results = {**getattr(self, "results", {}), **metrics}
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, with a moving average the averaged one; a checkpoint gets the training's weights, too."""
        with self._averaged():
            super().save_model(output_dir, _internal_call)
        if self.moving_average is None or self.moving_average.average is None or not self.args.should_save:
            return
        if _internal_call and output_dir is not None and not self.args.save_only_model:  # a checkpoint
            save_training_weights(self.model, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if (Path(resume_from_checkpoint) / TRAINING_WEIGHTS_NAME).is_file():  # the model just loaded is an average
            if self.moving_average is not None:
                self.moving_average.resume(self.model)
            load_training_weights(self.model, Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        with own_class(self.model):
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # The Trainer pickles its arguments, and pushes the pickle with the model. Nothing reads it: leave a text.
        folder = Path(output_dir or self.args.output_dir or ".")
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        (folder / ARGUMENTS_NAME).write_text(self.args.to_json_string(), encoding="utf-8")

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
        folder = Path(self.args.output_dir or ".")
        plot = attention_plot(folder)
        write_model_card(
            folder / "README.md",
            config=self.model.config,
            arguments={**self.args.to_dict(), "world_size": self.args.world_size},
            parameters=self.model.num_parameters(),
            steps=self.state.global_step,
            epochs=self.state.epoch or 0.0,
            results=getattr(self, "results", {}),
            record=self.run_record,
            plot=None if plot is None or self.run_record is None else plot.relative_to(folder).as_posix(),
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


def rows_of_last_batch(dataloader: DataLoader) -> int | None:
    """How many rows of this process's last batch are its own; None if all are.

    Accelerate gives each process the same number of batches of the same size. What is missing at the end it takes from
    the beginning, so that some rows come twice.
    """
    sampler = dataloader.batch_sampler
    if not isinstance(sampler, BatchSamplerShard) or sampler.batch_size is None or sampler.drop_last:
        return None
    rest = len(dataloader.dataset) % (sampler.batch_size * sampler.num_processes)  # type: ignore[arg-type]
    if rest == 0:
        return None
    return min(max(rest - sampler.batch_size * sampler.process_index, 0), sampler.batch_size)
