"""What the Trainer minimises: scheduled sampling, and losses beside the model's own with weights and starts."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal, cast, get_args

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from .configuration_rnn_seq2seq import REGULARIZATION
from .losses import coverage_loss
from .minimum_risk import Costs, MinimumRisk, minimum_risk_loss
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

SamplingSchedule = Literal["none", "constant", "linear", "exponential", "inverse_sigmoid"]
SamplingUnit = Literal["token", "sequence"]
SamplingMode = Literal["argmax", "sample", "gumbel"]
RiskCandidates = Literal["sample", "beam"]


def _start(what: str) -> Any:
    return field(default=0, metadata={"help": f"Updates made before {what} begins."})


@dataclass
class ObjectiveArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with scheduled sampling and weights of further losses.

    `label_smoothing_factor` is transformers'; here it is right for every kind of head as well, and evaluation leaves
    it out. With a weight of 0, the default, a loss is not computed. What has begun is logged apart, without its
    weight, as `token_loss` (the model's own), `label_smoothing_loss`, `coverage_loss`, `guided_alignment_loss`,
    `transition_penalty`, `unlikelihood_loss`, `r_drop_loss` and `risk`; `loss` is the weighted sum.
    """

    scheduled_sampling: SamplingSchedule = field(
        default="none",
        metadata={
            "help": "How the share of its own predictions that the decoder reads in training grows (Bengio et al. "
            "2015): not at all (none), constant, linear, exponential or inverse_sigmoid."
        },
    )
    scheduled_sampling_rate: float = field(
        default=0.25, metadata={"help": "The share of constant; where the other schedules end. From 0 to 1."}
    )
    scheduled_sampling_start: int = _start("--scheduled_sampling")
    scheduled_sampling_end: int | None = field(
        default=None, metadata={"help": "For linear: updates made when --scheduled_sampling_rate is reached."}
    )
    scheduled_sampling_k: float | None = field(
        default=None,
        metadata={
            "help": "k of exponential, 1 - k^i, between 0 and 1, and of inverse_sigmoid, 1 - k / (k + exp(i / k)), at "
            "least 1; i counts updates from --scheduled_sampling_start."
        },
    )
    scheduled_sampling_unit: SamplingUnit = field(
        default="token", metadata={"help": "Draw for each token, or for a whole sequence."}
    )
    scheduled_sampling_mode: SamplingMode = field(
        default="argmax",
        metadata={
            "help": "Read the most probable word (argmax), a word drawn (sample), or a mixture of all embeddings "
            "(gumbel: Goyal et al. 2017)."
        },
    )
    gumbel_temperature: float = field(
        default=1.0, metadata={"help": "Of --scheduled_sampling_mode gumbel: the lower, the nearer to one word."}
    )
    label_smoothing_start: int = _start("--label_smoothing_factor")
    coverage_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the coverage loss (See et al. 2017, eq. 12), which the model's configuration gets and "
            "keeps. By default its own."
        },
    )
    coverage_loss_start: int = _start("the coverage loss")
    guided_alignment_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the cross entropy between given word alignments (--train_alignment_file) and attention "
            "(Chen et al. 2016)."
        },
    )
    guided_alignment_start: int = _start("guided alignment")
    transition_penalty_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the expected -log p(next | previous) of a bigram model of the training targets, which "
            "keeps from transitions that never occur in them."
        },
    )
    transition_penalty_start: int = _start("the transition penalty")
    transition_penalty_smoothing: float = field(
        default=0.1, metadata={"help": "How often each transition counts as seen beside its true count (add-k)."}
    )
    transition_penalty_rows: int = field(
        default=1_000_000, metadata={"help": "The transitions of so many training rows, at most, are counted."}
    )
    unlikelihood_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the unlikelihood of the tokens before (Welleck et al. 2020), to repeat less."},
    )
    unlikelihood_start: int = _start("unlikelihood")
    r_drop_weight: float = field(
        default=0.0,
        metadata={
            "help": "alpha of R-Drop (Liang et al. 2021): how much two passes over a batch, each with a dropout of "
            "its own, have to agree. A step takes twice the time and memory."
        },
    )
    r_drop_start: int = _start("R-Drop")
    minimum_risk_weight: float = field(
        default=0.0, metadata={"help": "Weight of the expected cost of candidates (Shen et al. 2016)."}
    )
    minimum_risk_start: int = _start("minimum risk training")
    minimum_risk_cost: str = field(
        default="edit_distance",
        metadata={
            "help": "What a candidate costs: edit_distance (in tokens), bleu, chrf (1 minus the sentence's), or a "
            "function of the candidate's and the reference's text, as package.module.function."
        },
    )
    minimum_risk_candidates: RiskCandidates = field(
        default="sample", metadata={"help": "Candidates are samples, or the n best of a beam search (beam)."}
    )
    minimum_risk_count: int = field(
        default=10, metadata={"help": "How many candidates the model makes a sentence; equal ones count once."}
    )
    minimum_risk_gold: bool = field(default=True, metadata={"help": "Whether the label is a candidate, too."})
    minimum_risk_sharpness: float = field(
        default=0.005, metadata={"help": "alpha: candidates count by their probability to this power."}
    )
    minimum_risk_token_loss_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the model's own loss once minimum risk training has begun; the paper's is 0."},
    )

    def __post_init__(self) -> None:
        check_objective_arguments(self)
        super().__post_init__()


def check_objective_arguments(args: ObjectiveArguments) -> None:
    """Refuse what can't be, naming the field.

    Raises:
        ValueError: a field that is out of its range, or missing.
    """

    def check(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(args, name)!r}: must be {allowed}")

    for name, values in (
        ("scheduled_sampling", SamplingSchedule),
        ("scheduled_sampling_unit", SamplingUnit),
        ("scheduled_sampling_mode", SamplingMode),
        ("minimum_risk_candidates", RiskCandidates),
    ):
        check(name, getattr(args, name) in get_args(values), f"one of {', '.join(get_args(values))}")
    for name in vars(args):
        value = getattr(args, name)
        if name in LOSS_STARTS or name == "scheduled_sampling_start":
            check(name, value >= 0, "a number of updates of at least 0")
        if name in LOSS_WEIGHTS or name in ("coverage_loss_weight", "minimum_risk_token_loss_weight"):
            check(name, value is None or 0 <= value < math.inf, "a number of at least 0")
    check("scheduled_sampling_rate", 0 <= args.scheduled_sampling_rate <= 1, "from 0 to 1")
    k, schedule = args.scheduled_sampling_k, args.scheduled_sampling
    if schedule == "exponential":
        check("scheduled_sampling_k", k is not None and 0 < k < 1, "between 0 and 1 for 'exponential'")
    if schedule == "inverse_sigmoid":
        check("scheduled_sampling_k", k is not None and 1 <= k < math.inf, "at least 1 for 'inverse_sigmoid'")
    if schedule == "linear":
        end = args.scheduled_sampling_end
        after = f"above scheduled_sampling_start={args.scheduled_sampling_start} for 'linear'"
        check("scheduled_sampling_end", end is not None and end > args.scheduled_sampling_start, after)
    for name in ("gumbel_temperature", "transition_penalty_smoothing", "minimum_risk_sharpness"):
        check(name, 0 < getattr(args, name) < math.inf, "above 0")
    check("transition_penalty_rows", args.transition_penalty_rows >= 1, "at least 1")
    check("minimum_risk_count", args.minimum_risk_count >= 1, "at least 1")


def sampling_probability(args: ObjectiveArguments, step: int) -> float:
    """The share of own predictions after `step` updates, 1 - epsilon_i of Bengio et al. (2015, section 2.4).

    With i updates since the start, epsilon_i is 1 - c i (linear), k^i (exponential) or k / (k + exp(i / k)) (inverse
    sigmoid), and at least 1 - `scheduled_sampling_rate`. Before the start nothing is sampled.
    """
    schedule, rate, i = args.scheduled_sampling, args.scheduled_sampling_rate, step - args.scheduled_sampling_start
    if schedule == "none" or i < 0:
        return 0.0
    if schedule == "constant":
        return rate
    if schedule == "linear":
        assert args.scheduled_sampling_end is not None
        return rate * min(1.0, i / (args.scheduled_sampling_end - args.scheduled_sampling_start))
    assert args.scheduled_sampling_k is not None
    k = args.scheduled_sampling_k
    if schedule == "exponential":
        return min(rate, 1 - k**i)
    return min(rate, 1 / (1 + k * math.exp(-i / k)))


# Each further loss: its weight's field, its start's field, its name in the logs.
LOSSES = (
    ("label_smoothing_factor", "label_smoothing_start", "label_smoothing_loss"),
    ("coverage_loss_weight", "coverage_loss_start", "coverage_loss"),
    ("guided_alignment_weight", "guided_alignment_start", "guided_alignment_loss"),
    ("transition_penalty_weight", "transition_penalty_start", "transition_penalty"),
    ("unlikelihood_weight", "unlikelihood_start", "unlikelihood_loss"),
    ("r_drop_weight", "r_drop_start", "r_drop_loss"),
    ("minimum_risk_weight", "minimum_risk_start", "risk"),
)
READ_LOGITS = frozenset({"transition_penalty", "unlikelihood_loss", "r_drop_loss"})
LOSS_WEIGHTS = tuple(weight for weight, _, _ in LOSSES)
LOSS_STARTS = tuple(start for _, start, _ in LOSSES)


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
        number = num_items_in_batch
        if "r_drop_loss" in weights:  # all means are then over both passes
            inputs = {name: torch.cat((it, it)) if torch.is_tensor(it) else it for name, it in inputs.items()}
            alignments = None if alignments is None else torch.cat((alignments, alignments))
            number = None if number is None else 2 * number
            if "output_scores" in signature(self.model.forward).parameters:
                options["output_scores"] = True
        with self._without_coverage_loss():
            loss, outputs = super().compute_loss(model, {**inputs, **options}, True, number)
        if weights:
            scale = self._loss_scale(number)
            others = self._losses(weights, inputs, alignments, outputs, number)
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
        outputs: Any,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> dict[str, torch.Tensor]:
        """The losses that have begun and that the model does not compute, without their weights."""
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
        if "r_drop_loss" in weights:
            scores = outputs.scores if "scores" in outputs else outputs.logits
            normalizer = getattr(config, "output_normalizer", "softmax")
            found["r_drop_loss"] = r_drop_loss(scores, labels, normalizer, num_items_in_batch)
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
