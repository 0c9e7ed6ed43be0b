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
        self.before = 0.0  # this process began
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def state(self) -> dict[str, dict[str, float]]:
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.began = time.monotonic()
        self.before = saved_attributes(self, state).get("seconds", 0.0)
