"""How the Trainer gets its optimiser, its parameter groups and its learning-rate schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Literal, cast, get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from transformers.optimization import get_reduce_on_plateau_schedule
from transformers.trainer_utils import SchedulerType, has_length
from transformers.training_args import OptimizerNames

from .optimizers import DEFAULT_LEARNING_RATE, LEARNING_RATES, OPTIMIZERS, optimizer_class_and_options
from .schedules import (
    LUONG_SCHEMES,
    SCHEDULES,
    halving_multiplier,
    luong_start_and_interval,
    rnmt_plus_multiplier,
)

LrDecayUnit = Literal["epochs", "steps"]

OPTIMIZER_CHOICES = [*OPTIMIZERS, *(each.value for each in OptimizerNames)]
SCHEDULE_CHOICES = [*SCHEDULES, *(each.value for each in SchedulerType)]


@dataclass
class OptimizationArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with more values of `optim` and `lr_scheduler_type` and what those need.

    `warmup_steps` also holds for the schedules added here, and `adam_beta1`, `adam_beta2`, `adam_epsilon` for `adam`.
    `max_grad_norm` clips the norm of the whole gradient, 1 by default as in Bahdanau et al. (2015); Sutskever et al.
    (2014) and Luong et al. (2015) clip at 5.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": f"The initial learning rate. By default {DEFAULT_LEARNING_RATE}, or with --optim "
            + ", ".join(f"{name} {rate}" for name, rate in LEARNING_RATES.items())
            + "."
        },
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "The optimizer: adam (weight decay as an L2 penalty), adadelta, adagrad_da and rmsprop_da (dual "
            "averaging), and all of transformers'. Their further options go into --optim_args, as rho=0.95,eps=1e-6.",
            "choices": OPTIMIZER_CHOICES,
        },
    )
    weight_decay_of_embeddings: bool = field(
        default=True,
        metadata={"help": "Whether weight decay holds for embeddings too; it never does for biases and norms."},
    )
    lr_scheduler_type: str = field(
        default="linear",
        metadata={
            "help": "The learning rate's schedule: halving (see --lr_decay_start), tf/nmt's luong5, luong10 and "
            "luong234, rnmt_plus, and all of transformers'.",
            "choices": SCHEDULE_CHOICES,
        },
    )
    lr_decay_factor: float = field(
        default=0.5,
        metadata={
            "help": "What halving, luong5, luong10, luong234 and reduce_lr_on_plateau multiply the learning rate by."
        },
    )
    lr_decay_start: float | None = field(
        default=None,
        metadata={
            "help": "After so many --lr_decay_unit halving lowers the learning rate first. For rnmt_plus: s of its "
            "formula, in steps of a single replica if the unit is steps."
        },
    )
    lr_decay_interval: float = field(
        default=1.0,
        metadata={"help": "After each so many --lr_decay_unit more, halving lowers the learning rate again."},
    )
    lr_decay_end: float | None = field(
        default=None, metadata={"help": "For rnmt_plus: e of its formula, measured as --lr_decay_start."}
    )
    lr_decay_unit: LrDecayUnit = field(
        default="epochs", metadata={"help": "What --lr_decay_start, --lr_decay_interval and --lr_decay_end count."}
    )
    lr_replicas: int | None = field(
        default=None, metadata={"help": "For rnmt_plus: n of its formula; by default the number of processes."}
    )
    lr_patience: int = field(
        default=0,
        metadata={
            "help": "For reduce_lr_on_plateau: evaluations in a row without a better --metric_for_best_model that "
            "leave the learning rate alone; the next one lowers it."
        },
    )

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("optim", self.optim, OPTIMIZER_CHOICES),
            ("lr_scheduler_type", self.lr_scheduler_type, SCHEDULE_CHOICES),
            ("lr_decay_unit", self.lr_decay_unit, list(get_args(LrDecayUnit))),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")
        check_schedule_arguments(self)
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES.get(self.optim, DEFAULT_LEARNING_RATE)
        optim, schedule = self.optim, self.lr_scheduler_type
        # transformers makes members of its enums of these two, which our names are not.
        if optim in OPTIMIZERS:
            self.optim = OptimizerNames.ADAMW_TORCH
        if schedule in SCHEDULES:
            self.lr_scheduler_type = SchedulerType.CONSTANT
        super().__post_init__()
        if optim in OPTIMIZERS:
            self.optim = optim
            optimizer_class_and_options(self)  # raises for an option in `optim_args` that there is not
        if schedule in SCHEDULES:
            self.lr_scheduler_type = schedule


def check_schedule_arguments(args: OptimizationArguments) -> None:
    """Refuse what the schedule can't work with, naming the field.

    Raises:
        ValueError: a field that is out of its range, or missing.
    """
    schedule = args.lr_scheduler_type

    def refuse(name: str, allowed: str) -> None:
        raise ValueError(f"{name}={getattr(args, name)!r}: lr_scheduler_type={schedule!r} needs {allowed}")

    if not 0 < args.lr_decay_factor < 1:
        refuse("lr_decay_factor", "a number between 0 and 1")
    if args.lr_patience < 0:
        refuse("lr_patience", "a number of at least 0")
    if args.lr_replicas is not None and args.lr_replicas < 1:
        refuse("lr_replicas", "a number of at least 1, or None for the number of processes")
    if not 0 < args.lr_decay_interval < math.inf:
        refuse("lr_decay_interval", f"a number of {args.lr_decay_unit} above 0")
    if schedule not in ("halving", "rnmt_plus"):
        return
    if args.lr_decay_start is None or not 0 <= args.lr_decay_start < math.inf:
        refuse("lr_decay_start", f"a number of {args.lr_decay_unit} of at least 0")
    elif schedule == "rnmt_plus" and not (
        args.lr_decay_end is not None and args.lr_decay_start < args.lr_decay_end < math.inf
    ):
        refuse("lr_decay_end", f"a number of {args.lr_decay_unit} above lr_decay_start={args.lr_decay_start!r}")


def schedule_multiplier(
    args: OptimizationArguments, num_training_steps: int, steps_per_epoch: int | None
) -> Callable[[int], float]:
    """For a schedule of ours: what `learning_rate` is multiplied by, from the number of updates made so far.

    Args:
        args: the training's arguments.
        num_training_steps: updates in all.
        steps_per_epoch: updates in an epoch, None where the data has no length.

    Raises:
        ValueError: epochs are asked for and the data has no length.
    """
    schedule, warmup_steps = args.lr_scheduler_type, args.get_warmup_steps(num_training_steps)
    if schedule in LUONG_SCHEMES:
        start, interval = luong_start_and_interval(schedule, num_training_steps)
        return partial(
            halving_multiplier,
            start=start,
            interval=interval,
            factor=args.lr_decay_factor,
            warmup_steps=warmup_steps,
        )
    if args.lr_decay_unit == "epochs" and steps_per_epoch is None:
        raise ValueError("lr_decay_unit='epochs': the training data has no length; must be 'steps'")
    replicas = args.lr_replicas or args.world_size
    unit = 1 if args.lr_decay_unit == "steps" else (steps_per_epoch or 1)

    def steps(count: float | None) -> Fraction:
        return Fraction(str(count)) * unit  # of the decimal that was written: 0.1 epochs of 10 steps are exactly 1

    if schedule == "halving":
        return partial(
            halving_multiplier,
            start=steps(args.lr_decay_start),
            interval=steps(args.lr_decay_interval),
            factor=args.lr_decay_factor,
            warmup_steps=warmup_steps,
        )
    scale = 1 if args.lr_decay_unit == "steps" else replicas  # an epoch is so many more steps of a single replica
    return partial(
        rnmt_plus_multiplier,
        replicas=replicas,
        warmup_steps=warmup_steps,
        start=steps(args.lr_decay_start) * scale,
        end=steps(args.lr_decay_end) * scale,
    )


class OptimizationTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` that knows the optimisers and schedules of [`OptimizationArguments`]."""

    model: PreTrainedModel
    args: Seq2SeqTrainingArguments
    _steps_per_epoch: int | None = None

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[type[torch.optim.Optimizer], dict[str, object]]:
        if args.optim in OPTIMIZERS:
            return optimizer_class_and_options(args)
        return Seq2SeqTrainer.get_optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters that weight decay holds for: matrices and filters, not biases, norms and single scales."""
        names = [name for name in super().get_decay_parameter_names(model) if not name.endswith((".scale", ".offset"))]
        if isinstance(self.args, OptimizationArguments) and not self.args.weight_decay_of_embeddings:
            embeddings = {
                f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
            }
            return [name for name in names if name not in embeddings]
        return names

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and "l1" in optimizer.defaults:
            # The L1 penalty is a decay as well; the Trainer knows of `weight_decay` only.
            module = self.model if model is None else model
            decayed = {id(module.get_parameter(name)) for name in self.get_decay_parameter_names(module)}
            for group in optimizer.param_groups:
                if not any(id(parameter) in decayed for parameter in group["params"]):
                    group["l1"] = 0.0
        return optimizer

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: DataLoader
    ) -> tuple[int, int, int, int, int, int | None, int]:
        values = super().set_initial_training_values(args, dataloader)
        # Where the data has no length, this is the number of steps of the whole training.
        self._steps_per_epoch = values[1] if has_length(dataloader) else None
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        args, optimizer = self.args, optimizer or self.optimizer
        if self.lr_scheduler is not None or optimizer is None or not isinstance(args, OptimizationArguments):
            return super().create_scheduler(num_training_steps, optimizer)
        if args.lr_scheduler_type in SCHEDULES:
            multiplier = schedule_multiplier(args, num_training_steps, self._steps_per_epoch)
            self.lr_scheduler = LambdaLR(optimizer, multiplier)
        elif args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
            options: dict[str, object] = {
                "mode": "max" if args.greater_is_better else "min",
                "factor": args.lr_decay_factor,
                "patience": args.lr_patience,
            }
            if isinstance(args.lr_scheduler_kwargs, dict):
                options |= args.lr_scheduler_kwargs
            self.lr_scheduler = get_reduce_on_plateau_schedule(optimizer, **options)
        else:
            return super().create_scheduler(num_training_steps, optimizer)
        self._created_lr_scheduler = True
        return cast(LRScheduler, self.lr_scheduler)
