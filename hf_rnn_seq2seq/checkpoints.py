"""Checkpoints that appear whole or not at all, and what is wrong with those that are not whole."""

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union, cast

import safetensors
import torch
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback, TrainerState
from transformers.trainer_utils import sort_checkpoints

from .model_card import ARGUMENTS_NAME, RESULTS_NAME
from .moving_average import TRAINING_WEIGHTS_NAME

if TYPE_CHECKING:
    import optuna

Trial: TypeAlias = Union["optuna.Trial", dict[str, object], None]
logger = logging.getLogger(__name__)

# Where a checkpoint is while it is written. What begins with _ is not pushed to the Hub.
UNFINISHED_NAME = "_unfinished"
BROKEN_PREFIX = "broken_"


class CheckpointError(RuntimeError):
    """A model or checkpoint that could not be written."""


class NonFiniteError(ArithmeticError):
    """A loss or weights that are NaN or infinite."""


def last_complete_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step from which training can go on, or None.

    Broken ones are passed over with a warning that names what is wrong, where
    `transformers.trainer_utils.get_last_checkpoint` would give them.
    """
    for path in reversed(checkpoint_folders(folder)):
        if (fault := checkpoint_fault(path)) is None:
            return path
        logger.warning("%s is passed over: %s", path, fault)
    return None


def checkpoint_folders(folder: str | Path) -> list[Path]:
    """All checkpoints in a training's output folder, in order of their steps."""
    return [Path(path) for path in sort_checkpoints(str(folder))] if Path(folder).is_dir() else []


def saved_attributes(callback: TrainerCallback, state: TrainerState) -> dict[str, Any]:
    """The attributes that `state()` of a callback of this class left in the checkpoint that is resumed, if any."""
    saved = cast(dict[str, Any], state.stateful_callbacks or {}).get(type(callback).__name__)
    return saved["attributes"] if saved else {}


def set_aside_broken(folder: str | Path) -> None:
    """Rename the broken checkpoints after the last whole one.

    Otherwise they would count as the newest where the Trainer deletes old checkpoints, and it would delete whole ones.
    """
    for path in reversed(checkpoint_folders(folder)):
        if checkpoint_fault(path) is None:
            return
        aside = path.with_name(BROKEN_PREFIX + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        logger.warning("%s is set aside as %s", path, aside.name)


def checkpoint_fault(checkpoint: str | Path, to_resume: bool = True) -> str | None:
    """Why training can't go on from a checkpoint, or None if it can.

    Args:
        checkpoint: its folder.
        to_resume: False asks for a whole model alone, as `--save_only_model` leaves it.

    Returns:
        The file that is missing or broken, and how.
    """
    checkpoint = Path(checkpoint)
    contents: dict[str, object] = {}
    for path in [checkpoint / "trainer_state.json", checkpoint / "config.json", *sorted(checkpoint.glob("*.json"))]:
        try:
            contents[path.name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"{path.name}: {error}"
    state = contents["trainer_state.json"]
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        return "trainer_state.json has no global_step"

    index = contents.get("model.safetensors.index.json")
    shards = (
        set(index["weight_map"].values())
        if isinstance(index, dict) and "weight_map" in index
        else {"model.safetensors"}
    )
    for name in sorted(shards):
        if fault := safetensors_fault(checkpoint / name):
            return fault
    if not to_resume:
        return None

    arguments = contents.get(ARGUMENTS_NAME)
    averaged = isinstance(arguments, dict) and arguments.get("ema_decay") is not None
    if averaged and (fault := safetensors_fault(checkpoint / TRAINING_WEIGHTS_NAME)):
        return fault
    names = ["optimizer.pt", "scheduler.pt", *(path.name for path in sorted(checkpoint.glob("rng_state*.pth")))]
    if len(names) == 2:
        return "rng_state.pth is missing"
    if (checkpoint / "scaler.pt").exists():
        names.append("scaler.pt")
    return next((fault for name in names if (fault := torch_file_fault(checkpoint / name))), None)


def safetensors_fault(path: Path) -> str | None:
    """What is wrong with a safetensors file, whose header says how long it is."""
    try:
        with safetensors.safe_open(path, framework="pt"):
            return None
    except (OSError, safetensors.SafetensorError) as error:
        return f"{path.name} is missing" if not path.exists() else f"{path.name} is broken: {error}"


def torch_file_fault(path: Path) -> str | None:
    """What is wrong with a file that `torch.save` wrote: a ZIP archive with a checksum of each part."""
    if not path.is_file():
        hint = " (was it saved with --save_only_model?)" if path.name == "optimizer.pt" else ""
        return f"{path.name} is missing{hint}"
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return f"{path.name} is broken: {error}"
    return None if bad is None else f"{path.name} is broken: wrong checksum of {bad}"


@contextmanager
def writing_to(path: str | Path) -> Iterator[None]:
    """Turn what a full disk or an unwritable folder raises into an error that names it.

    Raises:
        CheckpointError: with the path, the reason and the space that is left.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        # torch.save raises no better than this.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} can't be written: {reason}{space_left(Path(path))}") from error


def write_whole(path: Path, text: str) -> None:
    """All of it or, after an interruption, what was there before."""
    part = path.with_name(f"_{path.name}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def remove_broken_json(path: Path) -> None:
    """A file that an interruption has left half-written."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        logger.warning("%s is half-written and begins anew.", path)
        path.unlink()


def space_left(path: Path) -> str:
    for folder in (path, *path.parents):
        if folder.is_dir():
            return f" ({shutil.disk_usage(folder).free / 2**20:,.1f} MiB are free there)"
    return ""


def sync(*paths: Path) -> None:
    """Have files, or folders' lists of names, written to the disk itself, where a power cut can't take them."""
    for path in paths if os.name == "posix" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def align(model: nn.Module) -> None:
    """Move weights in main memory to where a new tensor would lie.

    `from_pretrained` leaves them where they are in the mapped file, at any address. How a product's sum is split up
    depends on the address: a training that goes on would differ in the last bit from one that was never interrupted.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def delete_older(run_dir: Path, limit: int | None, best: str | None) -> None:
    """
    transformers' `rotate_checkpoints`, by time: at most `limit` checkpoints stay, the last and the best among them.
    Each is renamed before its files go, so that there is never half of one under a checkpoint's name.
    """
    checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
    if not limit or limit < 0 or len(checkpoints) <= limit:
        return
    kept = {checkpoints[-1], *([] if best is None else [str(Path(best))])}
    others = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
    unfinished = run_dir / UNFINISHED_NAME
    for checkpoint in others[: len(checkpoints) - max(limit, len(kept))]:
        unfinished.mkdir(exist_ok=True)
        Path(checkpoint).rename(unfinished / Path(checkpoint).name)
    shutil.rmtree(unfinished, ignore_errors=True)


class CheckpointTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` that keeps the last good checkpoint whatever happens.

    A checkpoint is written into `_unfinished`, then renamed, and only then are older ones deleted. A loss that is NaN
    or infinite ends training before it gets into the weights, and weights that are so are not saved.
    """

    model: PreTrainedModel
    args: Seq2SeqTrainingArguments
    _unfinished: str | None = None  # stands in for the output folder while a checkpoint is written

    def _get_output_dir(self, trial: Trial) -> str:
        return self._unfinished or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Trial) -> None:
        if self._stops_on_nan():
            self._check_weights()
        run_dir = Path(self._get_output_dir(trial))
        unfinished = run_dir / UNFINISHED_NAME
        written, whole = (folder / f"checkpoint-{self.state.global_step}" for folder in (unfinished, run_dir))
        try:
            with writing_to(whole):
                if self.args.should_save:
                    shutil.rmtree(unfinished, ignore_errors=True)  # an interrupted run's
                self.accelerator.wait_for_everyone()
                self._unfinished = str(unfinished)
                super()._save_checkpoint(model, trial)
                self._unfinished = None
                self.accelerator.wait_for_everyone()  # each process writes its own random state
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(whole)
                if self.args.should_save:
                    self.state.save_to_json(str(written / "trainer_state.json"))
                    # The model's code lies elsewhere as well, and would be half of the time.
                    sync(*(path for path in written.rglob("*") if path.suffix != ".py"), written)
                    if whole.exists():  # of a run that has been here before
                        whole.rename(unfinished / "before")
                    written.rename(whole)
                    shutil.rmtree(unfinished)
                    sync(run_dir)
                self.accelerator.wait_for_everyone()
        except CheckpointError:
            shutil.rmtree(unfinished, ignore_errors=True)  # a full disk has better use for the space
            raise
        finally:
            self._unfinished = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(whole))
        if self.args.should_save:
            delete_older(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # it goes on in the background, and needs the name that stays
            super()._push_from_checkpoint(checkpoint_folder)

    def save_metrics(self, split: str, metrics: dict[str, float | str], combined: bool = True) -> None:
        """transformers', which reads what is in all_results.json: a half-written one begins anew."""
        if combined and self.is_world_process_zero():  # which alone writes it
            assert self.args.output_dir is not None
            remove_broken_json(Path(self.args.output_dir) / RESULTS_NAME)
        super().save_metrics(split, metrics, combined)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        align(self.model)
        return super().create_optimizer(model)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._stops_on_nan() and not torch.isfinite(loss):
            raise NonFiniteError(self._nan_message(f"the loss is {loss.item()}", self.state.global_step + 1))
        return loss

    def _stops_on_nan(self) -> bool:
        return bool(getattr(self.args, "stop_on_nan", True))

    def _check_weights(self) -> None:
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                what = f"the weight {name} has become NaN or infinite"
                raise NonFiniteError(self._nan_message(what, self.state.global_step))

    def _nan_message(self, what: str, step: int) -> str:
        last = last_complete_checkpoint(self.args.output_dir or ".")
        whole = "There is no checkpoint" if last is None else f"The last good checkpoint is {last}"
        return (
            f"{what} at step {step}, with learning rate {self._get_learning_rate():g}: lower it, or --max_grad_norm, "
            f"or look for what is odd in the data. {whole}."
        )
