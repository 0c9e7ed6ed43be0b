"""Stopping a training from outside without losing what it did: SIGTERM and SIGINT."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """While it is entered, SIGTERM (a scheduler's pre-emption) or SIGINT (Ctrl-C) saves and ends training.

    The checkpoint is written after the optimiser step during which the signal came, or, if it came during an
    evaluation, after the step that follows it; then `trainer.train()` returns. Going on from there gives the weights
    that training without the interruption would have given. Several processes stop at the same step even if the signal
    reaches them at different moments, or only one of them.

    transformers' `enable_jit_checkpoint` would save between the backward pass and the optimiser's step, when dropout
    has been drawn already, and by a timer in each process on its own.

    ```python
    stop = StopOnSignal()
    trainer = RnnSeq2SeqTrainer(..., callbacks=[stop])
    with stop:
        trainer.train(resume_from_checkpoint=...)
    if stop.received is not None:
        sys.exit(stop.exit_code)
    ```

    A second SIGINT raises KeyboardInterrupt at once. A second SIGTERM changes nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None  # what all processes know of
        self._pending: signal.Signals | None = None  # what this one got
        self._since = 0.0
        self._saved_step = -1
        self._handlers: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells and schedulers report it: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + (self.received or 0)

    def __enter__(self) -> "StopOnSignal":
        self.received = self._pending = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python can't handle signals
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # torchrun hands on a Ctrl-C that its processes got from the terminal as well: that is no second one.
        if self._pending == signal.SIGINT == number and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
        if self._pending is None:
            self._pending, self._since = signal.Signals(number), time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # At the end of an epoch there may be an evaluation, which has to be in the checkpoint.
        if self._agree(args) and not at_end_of_epoch(state):
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not self._agree(args):
            return
        if not at_end_of_epoch(state):  # it was broken off: there is nothing to log or evaluate
            control.should_log = control.should_evaluate = False
        control.should_save = self._saved_step != state.global_step
        control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._agree(args)  # on how to go on after training

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        self._saved_step = state.global_step

    def _agree(self, args: TrainingArguments) -> bool:
        """Whether any process has got a signal up to now; all of them call this together."""
        number = int(self._pending or 0)
        if args.world_size > 1:
            highest = torch.tensor(number, device=args.device)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
            number = int(highest.item())
        self.received = signal.Signals(number) if number else None
        return self.received is not None


def at_end_of_epoch(state: TrainerState) -> bool:
    return state.epoch is not None and state.epoch > 0 and float(state.epoch).is_integer()
