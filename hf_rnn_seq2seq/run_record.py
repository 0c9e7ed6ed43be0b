"""`run.json`: what was run, on which data and machine, so that a model card can say how to get the same figures."""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .arguments import ScriptArguments
from .checkpoints import write_whole
from .data import PACKAGED_CORPORA, SPLITS
from .model_card import ARGUMENTS_NAME, RESULTS_NAME, RUN_RECORD_NAME
from .reports import model_card_arguments

PACKAGES = ("hf-rnn-seq2seq", "torch", "transformers", "tokenizers", "datasets", "accelerate", "sacrebleu")
# Which say nothing about the model that comes out.
NOT_LISTED = ("output_dir", "resume_from_checkpoint", "overwrite_output_dir", "disable_tqdm", "report_to", "run_name")


def write_run_record(
    args: ScriptArguments, argv: Sequence[str], rows: Mapping[str, int], model: PreTrainedModel, resumed: bool
) -> None:
    """Write `run.json` into the output folder. A run that does not begin a training adds to what is there.

    Args:
        args, argv: of run_seq2seq.py.
        rows: how many of each split are used; a split that is streamed is not there.
        model: to be trained, evaluated or predicted with.
        resumed: whether training goes on from a checkpoint.
    """
    path = args.output_dir / RUN_RECORD_NAME
    begins = args.training.do_train and not resumed
    earlier = {} if begins or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))
    commands = earlier.get("commands", [])
    command = shlex.join(["python", "training_scripts/run_seq2seq.py", *without_resuming(argv)])
    record = {**earlier, "commands": commands if command in commands else [*commands, command]}
    record["data"] = {**earlier.get("data", {}), **data_record(args, rows)}
    beams = args.run.num_beams or model.generation_config.num_beams or 1
    evaluated = [("validation", args.training.do_eval), ("test", args.training.do_predict)]
    for name, value in (("num_beams", beams), ("generation_options", args.run.generation_options)):
        record[name] = {**earlier.get(name, {}), **{split: value for split, done in evaluated if done}}
    record["environment"] = {**earlier.get("environment", {}), **recipe_variables(args)}
    if args.training.do_train:
        record |= {
            "started": earlier.get("started", datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")),
            "resumed": resumed,
            "processes": args.training.world_size,
            "hardware": hardware(),
            "versions": versions(),
            "parameters": model.num_parameters(),
            "metrics": args.run.metrics,
            "arguments": listed_arguments(args),
            "card": model_card_arguments(args),
        }
    if args.run.ensemble is not None:
        members = [Path(folder) / RUN_RECORD_NAME for folder in args.run.ensemble]
        made = [json.loads(member.read_text(encoding="utf-8"))["commands"] for member in members if member.is_file()]
        record["members"] = {"count": len(members), "commands": [command for each in made for command in each]}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def write_average_record(
    output_dir: Path, trainings: Sequence[Path], names: Sequence[str], argv: Sequence[str]
) -> None:
    """
    Write what a card needs beside a mean of weights: the last training's record and what it left, all trainings'
    commands and seconds. Its figures come from run_seq2seq.py with this `output_dir`.

    Args:
        output_dir: the averaged model's.
        trainings: output folders of run_seq2seq.py, or of averages; nothing is written if one is of something else.
        names: what the weights are the mean of.
        argv: of average_checkpoints.py.
    """
    trainings = list(dict.fromkeys(trainings))
    needed = (RUN_RECORD_NAME, RESULTS_NAME, ARGUMENTS_NAME, "trainer_state.json")
    if not all((folder / name).is_file() for folder in trainings for name in needed):
        return
    records, results = (
        [json.loads((folder / name).read_text(encoding="utf-8")) for folder in trainings] for name in needed[:2]
    )
    commands = [command for record in records for command in record["commands"]]
    commands.append(shlex.join(["python", "training_scripts/average_checkpoints.py", *argv]))
    record = {**records[-1], "commands": list(dict.fromkeys(commands)), "averaged": list(names)}
    record |= {"data": {"train": record["data"]["train"]}, "num_beams": {}, "generation_options": {}}
    figures = {name: value for name, value in results[-1].items() if name == "epoch" or name.startswith("train_")}
    figures["train_total_runtime"] = sum(each["train_total_runtime"] for each in results)
    for name, content in ((RUN_RECORD_NAME, record), (RESULTS_NAME, figures)):
        write_whole(output_dir / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for name in needed[2:]:
        shutil.copyfile(trainings[-1] / name, output_dir / name)


def without_resuming(argv: Sequence[str]) -> list[str]:
    """The flags without what a run that was interrupted got in addition: it is one command all the same."""
    kept: list[str] = []
    flags = iter(argv)
    for flag in flags:
        name = flag.split("=")[0].replace("-", "_")
        if name == "__resume_from_checkpoint":
            if "=" not in flag:
                next(flags, None)
        elif name != "__overwrite_output_dir":
            kept.append(flag)
    return kept


def data_record(args: ScriptArguments, rows: Mapping[str, int]) -> dict[str, dict[str, object]]:
    """For each split that is used: its rows, and the names and SHA-256 of its files or the name of the data set."""
    data = args.data
    record: dict[str, dict[str, object]] = {}
    for split in SPLITS:
        # What has no file of its own is split off the training data.
        origin = split if getattr(data, f"{split}_file") is not None else "train"
        paths = [getattr(data, name) for name in (f"{origin}_file", f"{origin}_target_file")]
        if split == "train":
            paths += data.extra_train_files or []
        files = [Path(path) for path in paths if path is not None]
        if split in rows or (split == "train" and args.training.do_train):
            record[split] = {
                "rows": rows.get(split),
                "files": [{"name": path.name, "sha256": sha256(path)} for path in files],
            }
            if data.dataset_name is not None:
                name = data.dataset_name
                packaged = f"{name} {importlib.metadata.version(name)}" if name in PACKAGED_CORPORA else None
                record[split]["dataset"] = packaged or Path(name).name
    return record


def sha256(path: Path) -> str | None:
    """Of a file; None for a folder."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe_variables(args: ScriptArguments) -> dict[str, str | None]:
    """The environment variables that the recipe takes; None for the path of something on this machine."""
    if args.recipe is None:
        return {}
    values = {name: os.environ.get(name, "") for name in re.findall(r"\$\{(\w+)\}", args.recipe.read_text("utf-8"))}
    return {name: None if os.sep in value else value for name, value in values.items()}


def listed_arguments(args: ScriptArguments) -> dict[str, object]:
    """What was given of the training's, the data's and the tokenizers' arguments but for switches, paths and names."""
    values: dict[str, object] = {}
    for group in (args.data, args.tokenizer, args.training):
        for each in dataclasses.fields(group):
            hidden = each.name in NOT_LISTED or each.name.startswith(("do_", "hub_", "push_", "logging_"))
            if each.name in args.given and not hidden and not each.name.endswith(("_file", "_files", "_name", "_dir")):
                value = getattr(group, each.name)
                values[each.name] = getattr(value, "value", value)
    return values


def hardware() -> dict[str, object]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"cpu": cpu_name(), "cores": cores, "threads": torch.get_num_threads(), "gpus": devices}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines: Iterable[str] = info.read_text(encoding="utf-8").splitlines() if info.is_file() else ()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # it is imported from its source
    return {**found, "torch": torch.__version__}
