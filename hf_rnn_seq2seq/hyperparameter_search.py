"""Hyperparameter search with Optuna, through `Trainer.hyperparameter_search`.

The search space is a YAML file. Its keys are training arguments and fields of the model's configuration:

```yaml
learning_rate: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}
hidden_size: {type: int, low: 128, high: 512, step: 128}
cell_type: {type: categorical, choices: [lstm, gru]}
```
"""

import dataclasses
import difflib
import enum
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

import yaml
from torch import nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import HPSearchBackend, TrainOutput

from .arguments import ArgumentError, ScriptArguments, config_arguments, parse_arguments
from .data import DataError
from .trainer import RnnSeq2SeqTrainingArguments

if TYPE_CHECKING:
    import optuna

Value = bool | int | float | str
DimensionType = Literal["float", "int", "categorical"]

STUDY_NAME = "hf_rnn_seq2seq"
STUDY_FILE = "study.db"
RESULTS_FILE = "hp_search_results.json"
BEST_RECIPE_FILE = "best_recipe.yaml"

# What all trials share, or what only the whole process can have.
SHARED = {
    *("output_dir", "do_train", "do_eval", "do_predict", "metric_for_best_model", "greater_is_better"),
    *("load_best_model_at_end", "resume_from_checkpoint", "push_to_hub", "report_to", "bf16", "fp16", "use_cpu"),
    *("vocab_size", "source_vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"),
    "decoder_start_token_id",
}
NOT_IN_RECIPE = {"hp_search", "hp_trials", "hp_storage", "output_dir", "overwrite_output_dir", "hub_token"}


@dataclass(frozen=True)
class Dimension:
    """One hyperparameter and the values it may have.

    Args:
        name: a training argument or a field of the configuration.
        type: `float` and `int` have `low`, `high` (both included), `log` and `step`; `categorical` has `choices`.
        log: search evenly on a logarithmic scale; not with `step`.
    """

    name: str
    type: DimensionType
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()

    def suggest(self, trial: "optuna.trial.BaseTrial") -> Value:
        """This trial's value, the same each time it is asked for."""
        if self.type == "categorical":
            return cast(Value, trial.suggest_categorical(self.name, self.choices))
        if self.type == "int":
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def examples(self) -> tuple[Value, ...]:
        """Values that show whether all of them can be used."""
        if self.type == "categorical":
            return self.choices
        return (int(self.low), int(self.high)) if self.type == "int" else (self.low, self.high)


def read_search_space(path: str | Path, argv: Sequence[str]) -> list[Dimension]:
    """The dimensions in a YAML file.

    Args:
        argv: the command line to which a trial's values are added: a value that it can't be parsed with is refused.

    Raises:
        ArgumentError: naming the file, the key, the value and what is allowed.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(f"{path}: the search space can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ArgumentError(f"{path}: not a YAML file: {error}") from None
    if not isinstance(content, dict) or not content:
        raise ArgumentError(f"{path}: a search space is a mapping from names to dimensions, not {content!r}")
    known = {
        each.name for kind in (RnnSeq2SeqTrainingArguments, config_arguments()) for each in dataclasses.fields(kind)
    }
    space = []
    for name, entry in content.items():
        if name not in known or name in SHARED:
            near = difflib.get_close_matches(str(name), known - SHARED, n=3)
            raise ArgumentError(
                f"{path}, key {name!r}: must be a training argument or a field of the model's configuration, and not "
                "one that all trials share" + (f" (did you mean {' or '.join(near)}?)" if near else "")
            )
        space.append(read_dimension(path, name, entry))
    # Values may need each other: each is tried with the first of all the others.
    first = {dimension.name: dimension.examples()[0] for dimension in space}
    for dimension in space:
        for value in dimension.examples():
            try:
                trial_arguments(argv, {**first, dimension.name: value})
            except (ArgumentError, DataError) as error:
                raise ArgumentError(f"{path}, key {dimension.name!r}, value {value!r}: {error}") from error
    return space


def read_dimension(path: Path, name: str, entry: object) -> Dimension:
    def refuse(key: str, value: object, allowed: str) -> ArgumentError:
        return ArgumentError(f"{path}, key {name!r}: {key}={value!r}: must be {allowed}")

    if not isinstance(entry, dict):
        raise ArgumentError(f"{path}, key {name!r}: {entry!r}: must be a mapping with a `type`")
    kind: DimensionType = entry.get("type", "none")
    if kind not in get_args(DimensionType):
        raise refuse("type", entry.get("type"), f"one of {', '.join(get_args(DimensionType))}")
    allowed = {"choices"} if kind == "categorical" else {"low", "high", "log", "step"}
    for key in entry.keys() - allowed - {"type"}:
        raise ArgumentError(f"{path}, key {name!r}: {key!r}: a {kind} has {', '.join(sorted(allowed))}")
    if kind == "categorical":
        choices = entry.get("choices")
        if not isinstance(choices, list) or not choices or not all(isinstance(each, Value) for each in choices):
            raise refuse("choices", choices, "a list of texts, numbers, true and false")
        return Dimension(name, "categorical", choices=tuple(choices))

    def number(key: str) -> float:
        value = entry.get(key)
        try:  # YAML takes 1e-4, without a point, for a text
            converted = (
                float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
            )
        except ValueError:
            converted = math.nan
        if not math.isfinite(converted) or (kind == "int" and converted != int(converted)):
            raise refuse(key, value, "a whole number" if kind == "int" else "a number")
        return converted

    low, high, log = number("low"), number("high"), entry.get("log", False)
    step = None if entry.get("step") is None else number("step")
    if low >= high:
        raise refuse("high", entry["high"], f"above low={entry['low']!r}")
    if not isinstance(log, bool):
        raise refuse("log", log, "true or false")
    if log and low <= 0:
        raise refuse("low", entry["low"], "above 0 for log")
    if step is not None and (step <= 0 or log):
        raise refuse("step", entry["step"], "above 0, and not together with log")
    return Dimension(name, kind, low, high, log, step)


def trial_arguments(argv: Sequence[str], values: Mapping[str, Value]) -> ScriptArguments:
    """The arguments of a run with a trial's values in place of those of the command line and the recipe."""
    return parse_arguments([*argv, *(f"--{name}={value}" for name, value in values.items())])


class HyperparameterSearchTrainer(Seq2SeqTrainer):
    """What `Trainer.hyperparameter_search` calls for each trial; the trials have trainers of their own.

    So whatever a trainer makes of its arguments when it is constructed is made of the trial's.

    Args:
        args: the arguments that all trials start from.
        argv: the command line they came from.
        space: what differs between trials.
        make_trainer: a new trainer with a new model for a trial's arguments.
    """

    def __init__(
        self,
        args: ScriptArguments,
        argv: Sequence[str],
        space: Sequence[Dimension],
        make_trainer: Callable[[ScriptArguments], Trainer],
    ) -> None:
        # Neither trained nor evaluated itself: the model and the data are what the Trainer refuses to be without.
        super().__init__(args=args.training, model_init=lambda: nn.Identity(), eval_dataset=[])  # type: ignore
        self.argv = argv
        self.space = space
        self.make_trainer = make_trainer

    objective: float

    def values(self, trial: "optuna.trial.BaseTrial") -> dict[str, Value]:
        return {dimension.name: dimension.suggest(trial) for dimension in self.space}

    def train(  # type: ignore[override]
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: "optuna.Trial | None" = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput | None:
        """Run one trial; `objective` is NaN, which Optuna takes for a failure, if its values don't go together."""
        assert trial is not None
        values = self.values(trial)
        try:
            trainer = self.make_trainer(trial_arguments(self.argv, values))
        except ValueError as error:
            print(f"Trial {trial.number} can't be run: {values}: {error}", flush=True)
            self.objective = math.nan
            return None
        # So it reports its evaluations, and saves into run-<number>.
        trainer.hp_search_backend = HPSearchBackend.OPTUNA  # type: ignore[assignment]
        trainer.hp_space, trainer.hp_name = (lambda trial: {}), None
        trainer.compute_objective = self.compute_objective
        output = trainer.train(trial=trial)
        best = trainer.state.best_metric if trainer.args.load_best_model_at_end else None
        if best is None and (best := getattr(trainer, "objective", None)) is None:
            best = self.compute_objective(trainer.evaluate())
        self.objective = best
        return output


def search_hyperparameters(
    args: ScriptArguments, argv: Sequence[str], make_trainer: Callable[[ScriptArguments], Trainer]
) -> dict[str, float | str]:
    """Run trials until there are `--hp_trials` of them in the study, and write what came out.

    The metric is `metric_for_best_model` (or the loss) of a trial's last evaluation, or of its best with
    `load_best_model_at_end`. Trials that do worse than the median of those before are stopped early (on one process).
    `output_dir` gets `hp_search_results.json`, and `best_recipe.yaml` with all that was given and the best values.

    Args:
        args: the run's arguments; `run.hp_search` is the search space's file.
        argv: the command line they came from.
        make_trainer: a new trainer with a new model for a trial's arguments.

    Returns:
        The number of finished trials, the best one's number and value.

    Raises:
        ArgumentError: a search space that can't be used, a study of another one, or no trial with a value.
    """
    try:
        import optuna
    except ImportError:
        raise ArgumentError("--hp_search needs the package `optuna`: pip install 'hf-rnn-seq2seq[train]'") from None
    run, training = args.run, args.training
    space = read_search_space(run.hp_search or "", argv)
    metric = "eval_" + (training.metric_for_best_model or "loss").removeprefix("eval_")
    direction: Literal["minimize", "maximize"] = "maximize" if training.greater_is_better else "minimize"
    storage = run.hp_storage or str(args.output_dir / STUDY_FILE)
    if "://" not in storage:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{storage}"
    identity = {"metric": metric, "direction": direction, "space": [dataclasses.asdict(each) for each in space]}

    with training.main_process_first(desc="opening the study"):
        study = optuna.create_study(storage=storage, study_name=STUDY_NAME, direction=direction, load_if_exists=True)
        before = study.user_attrs.get("searched")
        if before is None:
            study.set_user_attr("searched", json.dumps(identity))
        elif before != json.dumps(identity):
            raise ArgumentError(
                f"--hp_storage {storage}: the study there is another: it searched {before}, and this would be "
                f"{json.dumps(identity)}; give another --hp_storage"
            )
        missing = run.hp_trials - len(finished(study))
        seed = training.seed + len(study.trials)  # a study that goes on must not draw the first values again
    if missing > 0:
        searcher = HyperparameterSearchTrainer(args, argv, space, make_trainer)
        try:
            searcher.hyperparameter_search(
                hp_space=searcher.values,  # type: ignore[arg-type]
                compute_objective=lambda metrics: metrics[metric],
                n_trials=missing,
                direction=direction,
                backend="optuna",
                storage=storage,
                study_name=STUDY_NAME,
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=seed),
                # Only the main process has the study, so only it would stop.
                pruner=optuna.pruners.MedianPruner() if training.world_size == 1 else optuna.pruners.NopPruner(),
            )
        except ValueError:
            if finished(study):
                raise
            # transformers asked Optuna for the best of no trials
    with training.main_process_first(desc="writing down the last trial"):
        done = finished(study)
    if not any(trial.value is not None for trial in done):
        raise ArgumentError(f"--hp_search {run.hp_search}: none of {len(study.trials)} trials came to a value")
    best, value = study.best_trial, study.best_value
    results: dict[str, float | str] = {"search_trials": len(done), "best_trial": best.number}
    results[f"best_{metric}"] = value
    if training.process_index == 0:
        write_results(args, study, metric, direction)
        print(results_table(study, metric), flush=True)
    return results


def finished(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """The trials that ran to their end or were stopped early."""
    import optuna

    return study.get_trials(states=(optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED))


def write_results(args: ScriptArguments, study: "optuna.Study", metric: str, direction: str) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    trials = [
        {"number": each.number, "state": each.state.name.lower(), metric: each.value, "values": each.params}
        for each in study.trials
    ]
    content = {"metric": metric, "direction": direction, "best_trial": study.best_trial.number, "trials": trials}
    (args.output_dir / RESULTS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    recipe = {**recipe_of(args), **study.best_params}
    head = f"# Trial {study.best_trial.number} of a search: {metric} {study.best_value:.6g}. Give --output_dir.\n"
    text = yaml.safe_dump(recipe, sort_keys=True, allow_unicode=True)
    (args.output_dir / BEST_RECIPE_FILE).write_text(head + text, encoding="utf-8")


def recipe_of(args: ScriptArguments) -> dict[str, object]:
    """What was given by flag or recipe, as a recipe."""
    values: dict[str, object] = dict(args.config)
    for part in (args.training, args.tokenizer, args.data, args.run):
        values |= vars(part)
    recipe = {name: values[name] for name in sorted(args.given - NOT_IN_RECIPE)}
    recipe = {name: value for name, value in recipe.items() if value is not None and value != []}  # as by default
    return {name: value.value if isinstance(value, enum.Enum) else value for name, value in recipe.items()}


def results_table(study: "optuna.Study", metric: str) -> str:
    """A line for each trial, the best first."""
    sign = -1 if study.direction.name == "MAXIMIZE" else 1
    names = list(dict.fromkeys(name for trial in study.trials for name in trial.params))
    rows = [["trial", "state", metric, *names]]
    for trial in sorted(study.trials, key=lambda each: math.inf if each.value is None else sign * each.value):
        value = "" if trial.value is None else f"{trial.value:.6g}"
        texts = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (trial.params.get(n, "") for n in names)]
        rows.append([str(trial.number), trial.state.name.lower(), value, *texts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)
