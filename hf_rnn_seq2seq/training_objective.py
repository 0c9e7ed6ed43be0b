"""What the Trainer minimises: scheduled sampling, and losses beside the model's own with weights and starts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import Any, cast

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from .configuration_rnn_seq2seq import REGULARIZATION
from .distillation import Teacher, distillation_loss
from .losses import coverage_loss
from .minimum_risk import Costs, MinimumRisk, minimum_risk_loss
from .objective_arguments import LOSSES, ObjectiveArguments, sampling_probability
from .scheduled_sampling import ScheduledSampling
from .training_losses import (
    ALIGNMENTS,
    AlignmentCollator,
    BigramModel,
    guided_alignment_loss,
    output_log_probabilities,
    r_drop_loss,
    unlikelihood_loss,
)

# Losses that are made of the model's logits.
READ_SCORES = frozenset({"r_drop_loss", "distillation_loss"})  # what logits are made of
READ_LOGITS = READ_SCORES | {"transition_penalty", "unlikelihood_loss"}


class ObjectiveTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` that knows the objectives of [`ObjectiveArguments`]. Evaluation is by the plain loss."""

    model: PreTrainedModel
    args: Seq2SeqTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}  # since the last log: sum, and the step of the first
        self._bigrams: BigramModel | None = None
        self._costs: Costs | None = None
        if isinstance(self.args, ObjectiveArguments):
            self._prepare_objective(self.args)

    def _prepare_objective(self, args: ObjectiveArguments) -> None:
        config = self.model.config
        if args.coverage_loss_weight is not None:
            config.coverage_loss_weight = args.coverage_loss_weight
        attention, encoder = getattr(config, "attention_type", ""), getattr(config, "encoder_type", "")
        for name in ("coverage_loss_weight", "guided_alignment_weight"):
            if attention == "none" and getattr(args, name):
                raise ValueError(
                    f"{name}={getattr(args, name)!r}: the model has no attention (attention_type='none')."
                )
        if args.guided_alignment_weight > 0:
            if encoder == "pyramidal":
                raise ValueError(
                    f"guided_alignment_weight={args.guided_alignment_weight!r}: a 'pyramidal' encoder joins source "
                    "tokens, so that none can be attended to by itself."
                )
            self.data_collator = AlignmentCollator(self.data_collator)
        if args.r_drop_weight > 0 and not any(getattr(config, name, 1) for name in REGULARIZATION):
            raise ValueError(
                f"r_drop_weight={args.r_drop_weight!r}: without dropout two passes are the same; one of "
                f"{', '.join(REGULARIZATION)} must be above 0."
            )
        if args.minimum_risk_weight > 0:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("`minimum_risk_weight` is for weights that every process holds whole.")
            self._costs = Costs(args.minimum_risk_cost, cast(PreTrainedTokenizerBase | None, self.processing_class))
        if "smoothing" in signature(self.model.forward).parameters:
            self.label_smoother = None  # the model knows what its scores are, transformers' smoother does not

    @cached_property
    def _teacher(self) -> Teacher | None:
        """Not loaded before it is asked for: an evaluation needs none."""
        args = self.args
        if not isinstance(args, ObjectiveArguments) or args.distillation_weight == 0:
            return None
        names, memory = args.distillation_teachers or [], int(args.distillation_memory * 1e9)
        return Teacher(names, self.model, self.processing_class, args.device, memory)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._teacher  # noqa: B018  loaded now: in a step it might move the random numbers of a resumed training
        return super().train(*args, **kwargs)

    def _skips_logits(self, inputs: dict[str, Any]) -> bool:
        """Can the model be asked for its loss alone, if nothing but `compute_loss` may want its logits?"""
        can = "skip_logits" in signature(self.model.forward).parameters
        wanted = self.label_smoother is not None or self.compute_loss_func is not None
        return can and not wanted and inputs.get("labels") is not None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        guided = isinstance(self.args, ObjectiveArguments) and self.args.guided_alignment_weight > 0
        columns = self._signature_columns
        if guided and columns is not None and ALIGNMENTS not in columns:
            columns.append(ALIGNMENTS)  # or the Trainer would drop the column

    def _weights(self, args: ObjectiveArguments) -> dict[str, float]:
        """The weights of the losses that have begun, by their names in the logs."""
        found = {}
        for weight_name, start, name in LOSSES:
            weight = getattr(args, weight_name)
            if name == "coverage_loss":
                weight = getattr(self.model.config, weight_name, 0.0)
            if name == "label_smoothing_loss" and self.label_smoother is not None:
                continue
            if weight > 0 and self.state.global_step >= getattr(args, start):
                found[name] = float(weight)
        return found

    @contextmanager
    def _without_coverage_loss(self) -> Iterator[None]:
        """While this lasts, the model's own loss is the plain one of its tokens."""
        config = self.model.config
        weight = getattr(config, "coverage_loss_weight", 0.0)
        if weight > 0:
            config.coverage_loss_weight = 0.0
        try:
            yield
        finally:
            if weight > 0:
                config.coverage_loss_weight = weight

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The model's loss; in training, plus the weighted sum of those that have begun."""
        args, alignments = self.args, inputs.pop(ALIGNMENTS, None)
        if not (model.training and isinstance(args, ObjectiveArguments)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights, probability = self._weights(args), sampling_probability(args, self.state.global_step)
        options: dict[str, Any] = {}
        if probability > 0:
            unit, mode = args.scheduled_sampling_unit, args.scheduled_sampling_mode
            options["scheduled_sampling"] = ScheduledSampling(probability, unit, mode, args.gumbel_temperature)
        if "label_smoothing_loss" in weights:
            options["smoothing"] = weights["label_smoothing_loss"]
        if "coverage_loss" in weights or "guided_alignment_loss" in weights:
            options["output_attentions"] = True
        if self._skips_logits(inputs) and not READ_LOGITS.intersection(weights) and not return_outputs:
            options["skip_logits"] = True
        number, taught = num_items_in_batch, None
        if "distillation_loss" in weights:
            assert self._teacher is not None
            taught = self._teacher(inputs)
        if "r_drop_loss" in weights:  # all means are then over both passes
            inputs = {name: torch.cat((it, it)) if torch.is_tensor(it) else it for name, it in inputs.items()}
            alignments, taught = (None if it is None else torch.cat((it, it)) for it in (alignments, taught))
            number = None if number is None else 2 * number
        if READ_SCORES.intersection(weights) and "output_scores" in signature(self.model.forward).parameters:
            options["output_scores"] = True
        with self._without_coverage_loss():
            loss, outputs = super().compute_loss(model, {**inputs, **options}, True, number)
        if weights:
            scale = self._loss_scale(number)
            others = self._losses(weights, inputs, alignments, taught, outputs, number)
            smoothing = getattr(outputs, "smoothing_loss", None)
            token_loss = loss if smoothing is None else loss - options["smoothing"] * scale * smoothing
            own_weight = args.minimum_risk_token_loss_weight if "risk" in weights else 1.0
            total = loss if own_weight == 1 else own_weight * loss
            for name, value in others.items():
                total = total + weights[name] * scale * value
            self._record("token_loss", token_loss)
            for name, value in others.items() if smoothing is None else {**others, LOSSES[0][2]: smoothing}.items():
                self._record(name, scale * value)
            loss = total
        return (loss, outputs) if return_outputs else loss

    def _loss_scale(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """What the inherited method multiplies the loss by, so that the mean over the processes is their sum."""
        if not (self.args.average_tokens_across_devices and self.model_accepts_loss_kwargs):
            return 1
        if num_items_in_batch is None:
            return 1
        return self.accelerator.num_processes // self.get_tp_size() if self.args.n_gpu <= 1 else self.args.n_gpu

    def _losses(
        self,
        weights: dict[str, float],
        inputs: dict[str, Any],
        alignments: torch.Tensor | None,
        taught: torch.Tensor | None,
        outputs: Any,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> dict[str, torch.Tensor]:
        """
        The losses that have begun and that the model does not compute, without their weights. `taught` is what the
        teacher says of the inputs.
        """
        args, config, labels, found = self.args, self.model.config, inputs["labels"], {}
        assert isinstance(args, ObjectiveArguments)
        if "coverage_loss" in weights:
            attention, mask = outputs.cross_attentions[0], inputs.get("decoder_attention_mask")
            if mask is not None:  # no attention is paid at padding
                attention = attention * mask[:, None, :, None]
            found["coverage_loss"] = coverage_loss(attention, labels, num_items_in_batch)
        if "guided_alignment_loss" in weights:
            if alignments is None:
                raise ValueError(
                    f"guided_alignment_weight={args.guided_alignment_weight!r}: the training data has no column "
                    f"{ALIGNMENTS!r}, each row's links as pairs of a source and a target token's number."
                )
            attention = outputs.cross_attentions[0]
            found["guided_alignment_loss"] = guided_alignment_loss(attention, alignments, labels, num_items_in_batch)
        if "transition_penalty" in weights or "unlikelihood_loss" in weights:
            log_p = output_log_probabilities(outputs.logits, config)
        if "transition_penalty" in weights:
            found["transition_penalty"] = self._bigram_model(args).penalty(log_p, labels, num_items_in_batch)
        if "unlikelihood_loss" in weights:
            found["unlikelihood_loss"] = unlikelihood_loss(log_p, labels, num_items_in_batch)
        if READ_SCORES.intersection(weights):
            scores = outputs.scores if "scores" in outputs else outputs.logits
            normalizer = getattr(config, "output_normalizer", "softmax")
        if "r_drop_loss" in weights:
            found["r_drop_loss"] = r_drop_loss(scores, labels, normalizer, num_items_in_batch)
        if taught is not None:
            temperature = args.distillation_temperature
            found["distillation_loss"] = distillation_loss(
                scores, taught, labels, normalizer, temperature, num_items_in_batch
            )
        if "risk" in weights:
            assert self._costs is not None
            risk = MinimumRisk(
                candidates=args.minimum_risk_count,
                beam_search=args.minimum_risk_candidates == "beam",
                with_gold=args.minimum_risk_gold,
                sharpness=args.minimum_risk_sharpness,
            )
            encoder_inputs = {
                name: value
                for name, value in inputs.items()
                if name != "labels" and not name.startswith("decoder_") and isinstance(value, torch.Tensor)
            }
            # Not the wrapped model: two of its passes before a backward one are more than DDP allows.
            found["risk"] = minimum_risk_loss(
                self.model, encoder_inputs, labels, risk, self._costs, num_items_in_batch
            )
        return found

    def _bigram_model(self, args: ObjectiveArguments) -> BigramModel:
        """Counted when it is first needed, which after resuming may be at once."""
        if self._bigrams is None:
            config = self.model.config
            self._bigrams = BigramModel(
                target_rows(self.train_dataset, args.transition_penalty_rows),
                vocab_size=config.vocab_size,
                start_token_id=config.decoder_start_token_id,
                unk_token_id=getattr(config, "unk_token_id", None),
                smoothing=args.transition_penalty_smoothing,
                device=args.device,
            )
        return self._bigrams

    def _record(self, name: str, value: torch.Tensor) -> None:
        total, since = self._sums.get(name, (0.0, self.state.global_step))
        self._sums[name] = total + value.detach(), since

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        args, step = self.args, self.state.global_step
        if "loss" in logs and isinstance(args, ObjectiveArguments):
            if args.scheduled_sampling != "none":
                logs["sampling_probability"] = sampling_probability(args, step - 1)  # of the last update
            if self._sums:
                means = torch.stack([(total / (step - since)).float() for total, since in self._sums.values()])
                means = self.accelerator.reduce(means, reduction="mean")
                logs.update(zip(self._sums, means.tolist(), strict=True))
                self._sums = {}
        super().log(logs, start_time)

    def prediction_step(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: object,
    ) -> tuple[float | None, torch.Tensor | None, torch.Tensor | None]:
        inputs = {name: value for name, value in inputs.items() if name != ALIGNMENTS}
        if prediction_loss_only and self._skips_logits(inputs):
            inputs["skip_logits"] = True  # type: ignore[assignment]  # an argument of the model, if no tensor
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        with self._without_coverage_loss():
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )


def target_rows(dataset: Any, limit: int) -> Iterator[Sequence[int]]:
    """The labels of the first `limit` rows, without what is ignored."""
    rows: Iterable[dict[str, Any]] = dataset.select_columns(["labels"]) if isinstance(dataset, Dataset) else dataset
    for number, row in enumerate(rows):
        if number == limit:
            return
        yield [word for word in row["labels"] if word >= 0]
