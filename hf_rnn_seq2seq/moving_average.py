"""An exponential moving average of the weights, kept while they are trained and evaluated in their place."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# Beside an averaged `model.safetensors`: the weights to train on with.
TRAINING_WEIGHTS_NAME = "training_weights.safetensors"


class MovingAverage(TrainerCallback):
    """Averages a model's weights over the steps of training (Polyak & Juditsky 1992, with exponential weights):

        a_0 = w_0,  a_t = d_t a_{t-1} + (1 - d_t) w_t  after optimiser step t,

    where d_t is the decay or, while that is smaller, (1 + t) / (10 + t), as in TensorFlow's
    `ExponentialMovingAverage`: otherwise the first weights, which nobody trained, would count for 1 / (1 - decay)
    steps. When training ends, the model gets the average as its weights, unless it was given the best checkpoint's.

    Every process of a distributed run computes the same from the same weights. Sharded weights are refused.

    Args:
        decay: d, from 0 to less than 1; 0.999 averages over some thousand steps.
        warmup: whether d_t is smaller at first.
    """

    def __init__(self, decay: float, warmup: bool = True) -> None:
        self.decay = decay
        self.warmup = warmup
        self.average: list[torch.Tensor] | None = None  # in the order of model.parameters(), while training
        self._resumed: list[torch.Tensor] | None = None

    def on_train_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        for name, weight in model.named_parameters():
            if weight.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"`ema_decay` needs weights in float32, too fine for it is {weight.dtype} ({name}): train with "
                    "`bf16=True` or `fp16=True`, which keep them in float32, not on a model loaded in half precision."
                )
        self.average = self._resumed or copies(model)
        self._resumed = None

    def on_step_end(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        t = state.global_step
        decay = min(self.decay, (1 + t) / (10 + t)) if self.warmup else self.decay
        weights = [weight.detach() for weight in model.parameters()]
        assert self.average is not None  # training has begun
        get_ema_multi_avg_fn(decay)(self.average, weights, t)

    def on_train_end(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel,
        **kwargs: object,
    ) -> None:
        best_was_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
        if self.average is not None and not best_was_loaded:
            fill(model, self.average)
        self.average = None

    @contextmanager
    def in_place_of_weights(self, model: PreTrainedModel) -> Iterator[None]:
        """While training, let the model have the average for its weights; otherwise leave it alone."""
        if self.average is None:
            yield
            return
        weights = copies(model)
        fill(model, self.average)
        try:
            yield
        finally:
            fill(model, weights)

    def resume(self, model: PreTrainedModel) -> None:
        """Go on from the average that a checkpoint's model is, when training begins next."""
        self._resumed = copies(model)


def copies(model: nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


@torch.no_grad()
def fill(model: nn.Module, values: list[torch.Tensor]) -> None:
    """Give a model's parameters other values, in place: who holds a reference to a parameter keeps a valid one."""
    for weight, value in zip(model.parameters(), values, strict=True):
        weight.copy_(value)


def save_training_weights(model: nn.Module, folder: Path) -> None:
    """Write the weights that training goes on with into a checkpoint whose model is their average."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    save_file(weights, folder / TRAINING_WEIGHTS_NAME, metadata={"format": "pt"})


def load_training_weights(model: nn.Module, folder: Path) -> None:
    """Read them back. `ValueError` for a file of another model."""
    weights = load_file(folder / TRAINING_WEIGHTS_NAME)
    parameters = dict(model.named_parameters())
    for name in parameters.keys() ^ weights.keys():
        there, absent = (
            (TRAINING_WEIGHTS_NAME, "the model") if name in weights else ("the model", TRAINING_WEIGHTS_NAME)
        )
        raise ValueError(f"{folder}: the weight {name} is in {there}, but not in {absent}.")
    fill(model, [weights[name] for name in parameters])
