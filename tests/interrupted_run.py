"""run_seq2seq.py in processes of their own that can be killed."""

import os
import resource
import runpy
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import datasets
import torch
from forked import CONTEXT, SCRIPT, start

import hf_rnn_seq2seq.trainer as trainer_module

PHASES = {
    "training": "training_step",
    "saving": "_save_checkpoint",
    "saving the optimizer": "_save_optimizer_and_scheduler",
    "evaluation": "prediction_step",
}


class Run:
    """The script with some flags, begun at once.

    Args:
        flags: the command line behind the script's name.
        place: the working folder, which also gets the cache of data and, as `log`, what is printed.
        environment: variables to set.
        file_limit: the size in bytes beyond which no file can grow.
    """

    def __init__(
        self,
        flags: list[str],
        place: Path,
        environment: dict[str, str] | None = None,
        file_limit: int | None = None,
    ) -> None:
        self.place = place
        self.phases, sender = CONTEXT.Pipe(duplex=False)
        self.process = start(run_script, flags, str(place), sender, environment or {}, file_limit)
        sender.close()

    def reach(self, phase: str, times: int = 1) -> bool:
        """Wait until a phase begins for the n-th time; False if the process ends before."""
        try:
            while times > 0:
                times -= self.phases.recv() == phase
        except EOFError:
            return False
        return True

    def end(self) -> int:
        """Wait for the exit code; minus the signal's number if a signal killed it."""
        try:
            while True:
                self.phases.recv()
        except EOFError:
            self.process.join()
        return self.process.exitcode

    @property
    def printed(self) -> str:
        return (self.place / "log").read_text(encoding="utf-8")


def run_script(
    flags: list[str], place: str, phases: Connection, environment: dict[str, str], file_limit: int | None
) -> None:
    os.chdir(place)
    os.environ |= environment
    datasets.config.HF_DATASETS_CACHE = Path(place) / "cache"
    output = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # so that lines of both come in the order of printing
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    for phase, name in PHASES.items():
        method = getattr(trainer_module.RnnSeq2SeqTrainer, name)
        setattr(trainer_module.RnnSeq2SeqTrainer, name, announced(method, phase, phases))
    sys.argv = [str(SCRIPT), *flags]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def announced(method: Callable, phase: str, phases: Connection) -> Callable:
    """The method, which first tells the parent process that it is being called."""

    def call(*args: object, **kwargs: object) -> object:
        phases.send(phase)
        return method(*args, **kwargs)

    return call
