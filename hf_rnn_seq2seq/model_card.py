"""The README.md beside a trained model: the Hub's metadata, figures, how to load it, how it was trained."""

import json
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from transformers import AutoConfig, PreTrainedConfig

from .version import __version__

RUN_RECORD_NAME = "run.json"  # what was run, by run_record.py
ARGUMENTS_NAME = "training_args.json"  # beside each model
RESULTS_NAME = "all_results.json"  # the figures of a run, named as the Trainer names them

TAGS = ["hf_rnn_seq2seq", "rnn", "seq2seq"]
# What the prefixes of the Trainer's figures mean to a reader.
SPLIT_OF_PREFIX = {"eval": "validation", "predict": "test", "test": "test"}
# What the Trainer puts among the figures, and is none.
NO_FIGURES = ("runtime", "samples_per_second", "steps_per_second", "samples", "model_preparation_time")
SIGNED = ("bleu", "chrf", "meteor")  # metrics that come with a signature
HYPERPARAMETERS = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "num_train_epochs",
    "label_smoothing_factor",
    "max_grad_norm",
    "weight_decay",
    "seed",
)
# Beside these, whatever of the configuration differs from its class's defaults is listed.
ARCHITECTURE = ("cell_type", "attention_type", "wiring_type", "encoder_layers", "decoder_layers", "hidden_size")

USAGE = """```python
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

name = "{name}"  # or the folder it lies in
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained(name, trust_remote_code=True)
inputs = tokenizer(["your source text"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True))
```

`trust_remote_code=True` is not needed where the package `hf_rnn_seq2seq` is installed and imported.
"""


class CardError(ValueError):
    """A card that would have to leave out what it should say."""


@dataclass(frozen=True)
class Variant:
    """A model to compare with the card's.

    Args:
        change: what is different in it.
        figures: its results, named as in `all_results.json`.
    """

    change: str
    figures: Mapping[str, float]


def write_model_card(
    path: Path,
    *,
    config: PreTrainedConfig,
    arguments: Mapping[str, object],
    parameters: int,
    steps: int,
    epochs: float,
    results: Mapping[str, float | str],
    model_name: str,
    record: Mapping[str, Any] | None = None,
    plot: str | None = None,
    variants: Sequence[Variant] = (),
    ensemble: Path | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
) -> None:
    """Write the card.

    Args:
        path: the README.md.
        config: the model's configuration.
        arguments: the training arguments, for the table of hyper-parameters.
        parameters: how many the model has.
        steps, epochs: how long it was trained.
        results: figures named as the Trainer names them (`eval_loss`, `predict_bleu`, `predict_bleu_signature`).
        model_name: the title.
        record: what `run.json` holds, if run_seq2seq.py trained the model.
        plot: an attention plot, as the card is to refer to it.
        variants: other models, whose figures go into a table.
        ensemble: output folder of run_seq2seq.py with `--ensemble`, whose figures go into another.
        Others: as `RnnSeq2SeqTrainer.create_model_card`.
    """
    task = (as_list(tasks) or ["text2text-generation"])[0]
    data_name = ", ".join(as_list(dataset)) or ", ".join(as_list(dataset_tags)) or "unnamed data"
    figures, signatures = figures_and_signatures(results)
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=sorted({*TAGS, str(config.model_type), *as_list(tags)}),
        language=language,
        license=license,
        base_model=finetuned_from,
        datasets=as_list(dataset_tags) or None,
        metrics=sorted({name for _, name, _ in figures if name not in ("loss", "perplexity")}) or None,
        model_name=model_name if figures else None,
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=(as_list(dataset_tags) or [data_name])[0],
                dataset_name=data_name,
                dataset_args={"name": ", ".join(as_list(dataset_args))} if dataset_args else None,
                dataset_split=split,
                metric_type=name,
                metric_value=round(value, 4),
            )
            for split, name, value in figures
        ]
        or None,
    )
    origin = f"fine-tuned from `{finetuned_from}`" if finetuned_from else "trained from random weights"
    given = {} if record is None else record["arguments"]
    hyperparameters = {name: plain(arguments[name]) for name in HYPERPARAMETERS if name in arguments} | given
    versions = library_versions() if record is None else record["versions"]
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {model_name}\n",
        f"A recurrent encoder-decoder ({config.model_type}, {parameters:,} parameters), {origin} on {data_name}, "
        f"with `hf_rnn_seq2seq` {versions.get('hf-rnn-seq2seq', __version__)}.\n",
        "## Figures\n",
        figures_table(figures) if figures else "It was not evaluated after training.\n",
        "Error rates, BLEU, chrF, METEOR and ROUGE are in percent.\n" if figures else "",
        table(("split", "made with", "signature"), signatures) if signatures else "",
        variants_table(results, variants) if variants else "",
        "" if ensemble is None else ensemble_section(ensemble),
        "" if record is None else reproduction(record),
        f"![Attention over a test source while its prediction is read]({plot})\n" if plot else "",
        f"## How to use\n\n{USAGE.format(name=arguments.get('hub_model_id') or model_name)}",
        "## Architecture\n",
        table(("field", "value"), list(architecture(config).items())),
        "## Training\n",
        "" if record is None else averaging(record),
        f"{steps:,} steps, {epochs:.4g} epochs" + ("" if record is None else duration(record, results)) + ".\n",
        table(("argument", "value"), list(hyperparameters.items())),
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n",
        "" if record is None else limits(config, record),
    ]
    path.write_text("\n".join(section for section in sections if section), encoding="utf-8")


def figures_and_signatures(
    results: Mapping[str, float | str],
) -> tuple[list[tuple[str, str, float]], list[tuple[str, str, str]]]:
    """Of results named as the Trainer names them: split, name and value of each."""
    figures, signatures = [], []
    for key, value in results.items():
        prefix, _, name = key.partition("_")
        if prefix not in SPLIT_OF_PREFIX or name in NO_FIGURES:
            continue
        if isinstance(value, str):
            signatures.append((SPLIT_OF_PREFIX[prefix], name, value))
        else:
            figures.append((SPLIT_OF_PREFIX[prefix], name, value))
    return figures, signatures


def figures_table(figures: Iterable[tuple[str, str, float]]) -> str:
    return table(("split", "figure", "value"), [(split, name, f"{value:.4g}") for split, name, value in figures])


def write_card_of_run(
    output_dir: Path,
    path: Path,
    plot: str | None = None,
    variants: Sequence[Variant] = (),
    ensemble: Path | None = None,
) -> None:
    """Write the card of a model that run_seq2seq.py trained, from what it left in its output folder.

    Args:
        output_dir: of the run.
        path: of the card.
        plot, variants, ensemble: as for [`write_model_card`].

    Raises:
        CardError: a file is missing or broken.
    """
    record, arguments = read_json(output_dir / RUN_RECORD_NAME), read_json(output_dir / ARGUMENTS_NAME)
    state = read_json(output_dir / "trainer_state.json")
    write_model_card(
        path,
        config=AutoConfig.from_pretrained(output_dir),
        arguments={**arguments, "world_size": record["processes"]},
        parameters=record["parameters"],
        steps=state["global_step"],
        epochs=state["epoch"],
        results=read_json(output_dir / RESULTS_NAME),
        model_name=Path(arguments.get("hub_model_id") or output_dir.resolve()).name,
        record=record,
        plot=plot,
        variants=variants,
        ensemble=ensemble,
        **record["card"],
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CardError(f"{path}: can't be read, which a card needs: {error}") from error
    if not isinstance(content, dict):
        raise CardError(f"{path}: a JSON object is needed, not {type(content).__name__}")
    return content


def what_is_missing(output_dir: Path) -> list[str]:
    """What a run has not left behind that a card has to say: figures, their signatures, the attention plot.

    Raises:
        CardError: a file is missing or broken.
    """
    record, results = read_json(output_dir / RUN_RECORD_NAME), read_json(output_dir / RESULTS_NAME)
    missing = [f"all_results.json: {name}" for name in ("train_total_runtime", "train_loss") if name not in results]
    for split, prefix in (("validation", "eval"), ("test", "predict")):
        if split == "test" and split not in record["data"]:
            missing.append("figures of the test data (--do_predict)")
        elif split in record["data"] and f"{prefix}_loss" in results:
            for metric in record["metrics"]:
                names = [metric, f"{metric}_signature"] if metric in SIGNED else [metric]
                missing += [
                    f"all_results.json: {prefix}_{name}" for name in names if f"{prefix}_{name}" not in results
                ]
        elif split == "test":
            missing.append("all_results.json: predict_loss")
    config = read_json(output_dir / "config.json")
    if config.get("attention_type") != "none" and attention_plot(output_dir) is None:
        missing.append("attention_plots (--num_attention_plots)")
    return missing


def attention_plot(output_dir: Path) -> Path | None:
    """The first of a run's plots, if it has any."""
    return min((output_dir / "attention_plots").glob("*.png"), default=None)


def variant_of(output_dir: Path, other: Path) -> Variant:
    """Another run, and what of its configuration and arguments is not as in this one's.

    Raises:
        CardError: nothing is, or a file is missing or broken.
    """
    values = []
    for folder in (output_dir, other):
        config, record = AutoConfig.from_pretrained(folder), read_json(folder / RUN_RECORD_NAME)
        fields = {name: getattr(config, name) for name in type(config).__annotations__ if hasattr(config, name)}
        values.append({**fields, **record["arguments"]})
    ours, theirs = values
    changed = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if not changed:
        raise CardError(f"{other}: there is nothing different from {output_dir} in it to compare")
    results = read_json(other / RESULTS_NAME)
    figures = {name: value for name, value in results.items() if isinstance(value, int | float)}
    return Variant(", ".join(f"`{name}` {theirs.get(name, 'default')}" for name in changed), figures)


def read_variants(path: Path) -> list[Variant]:
    """The file of `--axes_table`: a list of `{"change": "...", "figures": {"eval_bleu": 38.1}}`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [
            Variant(str(row["change"]), {name: float(value) for name, value in row["figures"].items()}) for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CardError(
            f'{path}: must be a list of {{"change": "...", "figures": {{"eval_bleu": 38.1}}}}: {error!r}'
        ) from error


def variants_table(results: Mapping[str, float | str], variants: Sequence[Variant]) -> str:
    """A row for the card's model, then one for each variant; a column for each figure that one of these has, too."""
    names = [
        name
        for name, value in results.items()
        if name.partition("_")[0] in SPLIT_OF_PREFIX
        and name.partition("_")[2] not in NO_FIGURES
        and not isinstance(value, str)
        and any(name in variant.figures for variant in variants)
    ]
    for variant in variants:
        if not any(name in variant.figures for name in names):
            raise CardError(f"{variant.change}: no figure in common with the card's model")
    titles = [f"{SPLIT_OF_PREFIX[prefix]} {rest}" for prefix, _, rest in (name.partition("_") for name in names)]
    rows = [("this model", results), *((variant.change, variant.figures) for variant in variants)]
    lines = [
        (change, *(f"{figures[name]:.4g}" if name in figures else "–" for name in names)) for change, figures in rows
    ]
    return "## What helps\n\n" + table(("changed", *titles), lines)


def ensemble_section(folder: Path) -> str:
    """The figures of an ensemble, and the commands that train its members and give them."""
    record = read_json(folder / RUN_RECORD_NAME)
    if "members" not in record:
        raise CardError(f"{folder}: not made by run_seq2seq.py with --ensemble")
    figures, _ = figures_and_signatures(read_json(folder / RESULTS_NAME))
    # Its loss is that of averaged probabilities, another function than a member's loss may be.
    figures = [figure for figure in figures if figure[1] != "loss"]
    commands = list(dict.fromkeys([*record["members"]["commands"], *record["commands"]]))
    return (
        f"## Ensemble\n\n{record['members']['count']} models that differ as these commands do, their probabilities "
        "averaged:\n\n" + figures_table(figures) + "\n```bash\n" + "\n".join(commands) + "\n```\n"
    )


def reproduction(record: Mapping[str, Any]) -> str:
    """The data and the commands."""
    lines = []
    for split, data in record["data"].items():
        files = ", ".join(f"{file['name']} ({(file['sha256'] or 'a folder')[:16]})" for file in data["files"])
        rows = "streamed" if data["rows"] is None else f"{data['rows']:,}"
        lines.append((split, rows, ", ".join(name for name in (data.get("dataset"), files) if name)))
    variables = record["environment"]
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in variables.items() if value is not None
    )
    folders = [f"`{name}`" for name, value in variables.items() if value is None]
    return (
        "## Data and commands\n\n"
        + table(("split", "rows used", "file (SHA-256) or data set"), lines)
        + "\nThese commands give the figures above"
        + (f", with {' and '.join(folders)} set to where the data is" if folders else "")
        + (f", in {record['processes']} processes" if record["processes"] > 1 else "")
        + ". On the same hardware with the same versions and number of threads "
        + f"({record['hardware']['threads']}, as `OMP_NUM_THREADS` sets it) they do so to the last digit on a CPU.\n\n"
        + "```bash\n"
        + exports
        + "\n".join(record["commands"])
        + "\n```\n"
    )


def averaging(record: Mapping[str, Any]) -> str:
    if "averaged" not in record:
        return ""
    names = ", ".join(f"`{name}`" for name in record["averaged"])
    return f"The weights are the mean of those of {names}. Of the last training, but with the seconds of all:\n"


def duration(record: Mapping[str, Any], results: Mapping[str, float | str]) -> str:
    hardware = record["hardware"]
    seconds = results.get("train_total_runtime")
    time = f" in {seconds:,.0f} seconds" if isinstance(seconds, int | float) else ""
    if record["resumed"]:
        time += " (it was interrupted, and resumed from a checkpoint)"
    cores = f"{hardware['cores']} cores of {hardware['cpu']}"
    gpus = ", ".join(hardware["gpus"])
    return f"{time}, on {gpus + ' with ' if gpus else ''}{cores}, begun {record['started']}"


def limits(config: PreTrainedConfig, record: Mapping[str, Any]) -> str:
    given = record["arguments"]
    options = record.get("generation_options", {})
    searches = [
        " ".join(["greedy search" if n == 1 else f"{n} beams", *options.get(split, []), f"({split})"])
        for split, n in record["num_beams"].items()
    ]
    lines = [
        "One training run: another seed gives other figures.",
        "It knows the language, domain and symbols of its training data, and no others; what is outside of its "
        f"vocabulary ({config.vocab_size:,} target tokens) it "
        + ("can only copy." if getattr(config, "head_type", "") == "pointer_generator" else "can't write."),
    ]
    if searches:
        lines.append(f"What was generated for the figures was found by {', '.join(searches)}.")
    longest = [f"{side} {given[name]}" for side in ("source", "target") if (name := f"max_{side}_length") in given]
    if longest:
        lines.append(f"It was trained on rows of at most so many tokens: {', '.join(longest)}.")
    return "## Limits\n\n" + "".join(f"- {line}\n" for line in lines)


def architecture(config: PreTrainedConfig) -> dict[str, object]:
    """The main fields, and whatever differs from the configuration's defaults."""
    defaults = type(config)()
    own = [name for name in type(config).__annotations__ if hasattr(defaults, name)]
    fields = {name: getattr(config, name) for name in ARCHITECTURE if hasattr(config, name)}
    return fields | {name: getattr(config, name) for name in own if getattr(config, name) != getattr(defaults, name)}


def library_versions() -> dict[str, str]:
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
        "Python": platform.python_version(),
    }


def as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def plain(value: object) -> object:
    """The value of an enumeration's member, anything else as it is."""
    return getattr(value, "value", value)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---" for _ in head], *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)
