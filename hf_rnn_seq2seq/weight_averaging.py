"""One model from several: the mean of their weights.

Of the checkpoints of a training (Junczys-Dowmunt et al. 2016, section 3); those of a training with `ema_decay` hold
its moving average as their model, which is then what is averaged. Or of trained models (Wortsman et al. 2022, "Model
soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time", section 2:
the uniform soup), whose trainings began with the same weights, or one with the other's: between models that each began
by chance there is no mean that is any good.
"""

import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.trainer_utils import sort_checkpoints

from .checkpoints import checkpoint_fault
from .configuration_rnn_seq2seq import TRAINING_ONLY
from .distillation import vocabularies
from .trainer import LOWER_IS_BETTER

logger = logging.getLogger(__name__)

AVERAGED_FROM_NAME = "averaged_from.json"
# What says how a model was written or trained, not what it computes: trainings that differ in their dropout make good
# soups. (By its zoneout a model weighs old and new states in evaluation, too.)
NOT_COMPARED = {"transformers_version", *TRAINING_ONLY} - {"zoneout"}


class AveragingError(ValueError):
    """Models that are too few, or that don't belong together, or a folder that can't be written to."""


@dataclass(frozen=True)
class Checkpoint:
    """
    Args:
        path: its folder.
        step: of the training, at which it was written.
        metrics: the figures of the evaluation at this step, as `eval_loss`; empty if there was none.
    """

    path: Path
    step: int
    metrics: dict[str, float]


def find_checkpoints(folder: str | Path) -> list[Checkpoint]:
    """The checkpoints of a training, in order of their steps; half-written ones are passed over with a warning.

    Args:
        folder: the training's `output_dir`.
    """
    found = []
    for path in map(Path, sort_checkpoints(str(folder)) if Path(folder).is_dir() else ()):
        if fault := checkpoint_fault(path, to_resume=False):
            logger.warning("%s is passed over: %s", path, fault)
            continue
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        step = state["global_step"]
        metrics: dict[str, float] = {}
        for entry in state["log_history"]:
            if entry.get("step") == step:
                figures = {name: value for name, value in entry.items() if name.startswith("eval_")}
                metrics |= {name: value for name, value in figures.items() if isinstance(value, int | float)}
        found.append(Checkpoint(path, step, metrics))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def last_checkpoints(folder: str | Path, n: int) -> list[Checkpoint]:
    """The last n checkpoints of a training, in order. `AveragingError` if there are fewer."""
    found = find_checkpoints(folder)
    check_number(n, found, f"whole checkpoints in {folder}")
    return found[-n:]


def best_checkpoints(
    folder: str | Path, n: int, metric: str = "eval_loss", greater_is_better: bool | None = None
) -> list[Checkpoint]:
    """The n best checkpoints of a training, the best first; of equal ones the later.

    Args:
        folder: the training's `output_dir`.
        n: how many.
        metric: a figure of the evaluation at a checkpoint's step, with or without `eval_`.
        greater_is_better: by default true, but for losses, perplexity and error rates.

    Raises:
        AveragingError: for fewer than n with such a figure.
    """
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    if greater_is_better is None:
        greater_is_better = not name.endswith(LOWER_IS_BETTER)
    found = find_checkpoints(folder)
    known = sorted({key for checkpoint in found for key in checkpoint.metrics})
    rated = [checkpoint for checkpoint in found if math.isfinite(checkpoint.metrics.get(name, math.nan))]
    check_number(
        n, rated, f"whole checkpoints in {folder} with {name} at their step (of {len(found)}; figures: {known})"
    )
    sign = -1 if greater_is_better else 1
    return sorted(rated, key=lambda checkpoint: (sign * checkpoint.metrics[name], -checkpoint.step))[:n]


def check_number(n: int, found: Sequence[Checkpoint], what: str) -> None:
    if n < 1:
        raise AveragingError(f"The number of checkpoints to average must be at least 1, not {n}.")
    if len(found) < n:
        raise AveragingError(f"{n} checkpoints can't be averaged: there are {len(found)} {what}.")


def average_checkpoints(checkpoints: Sequence[Checkpoint], output_dir: str | Path) -> None:
    """[`average_models`] of the checkpoints of a training, each said with its step and metrics."""
    record = [
        {"checkpoint": checkpoint.path.name, "step": checkpoint.step, "metrics": checkpoint.metrics}
        for checkpoint in checkpoints
    ]
    average_models([checkpoint.path for checkpoint in checkpoints], output_dir, record)


def average_models(
    models: Sequence[str | Path], output_dir: str | Path, record: Sequence[Mapping[str, object]] | None = None
) -> None:
    """Write the model whose weights are the mean of the models', in their type, summed up in float64.

    The folder gets all that `save_pretrained` writes, the first model's tokenizer, generation settings and
    configuration, and `averaged_from.json`, a list of the models. It appears as a whole or not at all.

    Args:
        models: folders of one model's weights; the configurations (but for what only training needs, as `dropout`),
            the tokenizers' vocabularies, the names of the weights, their shapes and types must be equal. A folder that
            is named twice counts twice.
        output_dir: a folder that isn't there yet, or is empty.
        record: what the list says of each, by default its folder's name.

    Raises:
        AveragingError: naming the first difference, or if `output_dir` holds something.
    """
    paths, output_dir = [Path(model) for model in models], Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise AveragingError(f"{output_dir} is there and not an empty folder: choose another.")
    if not paths:
        raise AveragingError("There is nothing to average.")
    check_configurations(paths)
    tokenizer = common_tokenizer(paths)
    weights = averaged_weights(paths)

    model = AutoModelForSeq2SeqLM.from_pretrained(paths[0])
    result = model.load_state_dict(weights, strict=False)
    # What is tied to another weight is not in the files.
    missing = set(result.missing_keys) - set(model.all_tied_weights_keys)
    if missing or result.unexpected_keys:
        raise AveragingError(
            f"{paths[0]}: the weights are not those of its configuration's model: missing are {sorted(missing)}, "
            f"unexpected {result.unexpected_keys}."
        )
    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # an interrupted run's
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        said = [{"model": path.name} for path in paths] if record is None else record
        (partial / AVERAGED_FROM_NAME).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_configurations(paths: Sequence[Path]) -> None:
    """Refuse models whose `config.json` is missing or differs, naming the first field that does."""
    for path in paths:
        if not (path / "config.json").is_file():
            raise AveragingError(f"{path}: there is no config.json; a folder with a saved model is wanted.")
    configs = [json.loads((path / "config.json").read_text(encoding="utf-8")) for path in paths]
    for path, config in zip(paths[1:], configs[1:], strict=True):
        for name in sorted(configs[0].keys() | config.keys()):
            first, other = configs[0].get(name), config.get(name)
            if name not in NOT_COMPARED and first != other:
                raise AveragingError(
                    f"These are not weights of one model: `{name}` is {first!r} in {paths[0]} and {other!r} in {path}."
                )


def common_tokenizer(paths: Sequence[Path]) -> PreTrainedTokenizerBase:
    """The first's; the others' must have its vocabularies, or equal numbers would be other words."""
    tokenizer = AutoTokenizer.from_pretrained(paths[0])
    for path in paths[1:]:
        if vocabularies(AutoTokenizer.from_pretrained(path)) != vocabularies(tokenizer):
            raise AveragingError(f"{path}: the tokenizer has another vocabulary than that of {paths[0]}.")
    return tokenizer


def averaged_weights(paths: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The mean of each weight over models, in its own type. Whole numbers and truth values must be equal."""
    first = read_weights(paths[0])
    sums = {name: weight.double() if weight.is_floating_point() else weight for name, weight in first.items()}
    for path in paths[1:]:
        weights = read_weights(path)
        for name in sorted(first.keys() ^ weights.keys()):
            there, absent = (path, paths[0]) if name in weights else (paths[0], path)
            raise AveragingError(f"The weight {name} is in {there}, but not in {absent}.")
        for name, weight in weights.items():
            if weight.shape != first[name].shape or weight.dtype != first[name].dtype:
                raise AveragingError(
                    f"The weight {name} is {tuple(first[name].shape)} {first[name].dtype} in {paths[0]}, "
                    f"{tuple(weight.shape)} {weight.dtype} in {path}."
                )
            if weight.is_floating_point():
                sums[name] += weight
            elif not torch.equal(weight, sums[name]):
                raise AveragingError(
                    f"{name} can't be averaged, being no float, and differs in {paths[0]} and {path}."
                )
    return {
        name: (sums[name] / len(paths)).to(weight.dtype) if weight.is_floating_point() else weight
        for name, weight in first.items()
    }


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a model that `save_pretrained` wrote, in one file or several."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
    if not weights:
        raise AveragingError(f"{folder}: there is no model.safetensors.")
    return weights
