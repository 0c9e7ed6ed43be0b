"""The arguments of what the Trainer minimises: scheduled sampling, and losses with weights and starts."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import Seq2SeqTrainingArguments

SamplingSchedule = Literal["none", "constant", "linear", "exponential", "inverse_sigmoid"]
SamplingUnit = Literal["token", "sequence"]
SamplingMode = Literal["argmax", "sample", "gumbel"]
RiskCandidates = Literal["sample", "beam"]


def _start(what: str) -> Any:
    return field(default=0, metadata={"help": f"Updates made before {what} begins."})


# Each further loss: its weight's field, its start's field, its name in the logs.
LOSSES = (
    ("label_smoothing_factor", "label_smoothing_start", "label_smoothing_loss"),
    ("coverage_loss_weight", "coverage_loss_start", "coverage_loss"),
    ("guided_alignment_weight", "guided_alignment_start", "guided_alignment_loss"),
    ("transition_penalty_weight", "transition_penalty_start", "transition_penalty"),
    ("unlikelihood_weight", "unlikelihood_start", "unlikelihood_loss"),
    ("r_drop_weight", "r_drop_start", "r_drop_loss"),
    ("distillation_weight", "distillation_start", "distillation_loss"),
    ("minimum_risk_weight", "minimum_risk_start", "risk"),
)
LOSS_WEIGHTS = tuple(weight for weight, _, _ in LOSSES)
LOSS_STARTS = tuple(start for _, start, _ in LOSSES)


@dataclass
class ObjectiveArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with scheduled sampling and weights of further losses.

    `label_smoothing_factor` is transformers'; here it is right for every kind of head as well, and evaluation leaves
    it out. With a weight of 0, the default, a loss is not computed. What has begun is logged apart, without its
    weight, as `token_loss` (the model's own), `label_smoothing_loss`, `coverage_loss`, `guided_alignment_loss`,
    `transition_penalty`, `unlikelihood_loss`, `r_drop_loss`, `distillation_loss` and `risk`; `loss` is the weighted
    sum.
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
    distillation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence from --distillation_teachers' probabilities of every word, after the "
            "same tokens (word-level knowledge distillation: Kim & Rush 2016)."
        },
    )
    distillation_start: int = _start("distillation")
    distillation_teachers: list[str] | None = field(
        default=None,
        metadata={"help": "Folders or names on the Hub of trained models, whose probabilities are averaged."},
    )
    distillation_temperature: float = field(
        default=1.0,
        metadata={"help": "Both sides' logits are divided by it: above 1, unlikely words count for more."},
    )
    distillation_memory: float = field(
        default=0.0,
        metadata={
            "help": "So many GB of what the teachers said are kept, in each process: of rows that come back they are "
            "not asked again. For small vocabularies; a row takes its labels times the vocabulary times four bytes."
        },
    )
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
    for name in (
        "gumbel_temperature",
        "transition_penalty_smoothing",
        "distillation_temperature",
        "minimum_risk_sharpness",
    ):
        check(name, 0 < getattr(args, name) < math.inf, "above 0")
    check("distillation_memory", 0 <= args.distillation_memory < math.inf, "0 or more")
    if args.distillation_weight > 0:
        check("distillation_teachers", bool(args.distillation_teachers), "at least one model for distillation_weight")
    else:
        check("distillation_teachers", not args.distillation_teachers, "left out without distillation_weight")
        check("distillation_memory", args.distillation_memory == 0, "left out without distillation_weight")
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
