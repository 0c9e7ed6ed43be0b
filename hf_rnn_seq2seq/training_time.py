"""How long a training has taken in all, however often it was interrupted."""

import time

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .checkpoints import saved_attributes


class TrainingTime(TrainerCallback, ExportableState):
    """
    Checkpoints keep the seconds up to them. What came between the last one and an interruption is not counted, as it
    is done again.
    """

    def __init__(self) -> None:
        self.before = 0.0  # this process began to train
        self.began: float | None = None

    def forget(self) -> None:
        """Before a training: the Trainer asks for the state at its start, too; what came before is no part."""
        self.before, self.began = 0.0, None

    def state(self) -> dict[str, dict[str, float]]:
        here = 0.0 if self.began is None else time.monotonic() - self.began
        return {"args": {}, "attributes": {"seconds": self.before + here}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.before = saved_attributes(self, state).get("seconds", 0.0)
        self.began = time.monotonic()
