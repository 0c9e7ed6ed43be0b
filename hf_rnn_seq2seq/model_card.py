"""The README.md beside a trained model: the Hub's metadata, figures, how to load it, how it was trained."""

import platform
from pathlib import Path

import tokenizers
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedConfig, Seq2SeqTrainingArguments

from .version import __version__

TAGS = ["hf_rnn_seq2seq", "rnn", "seq2seq"]
# What the prefixes of the Trainer's figures mean to a reader.
SPLIT_OF_PREFIX = {"eval": "validation", "predict": "test", "test": "test"}
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


def as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def write_model_card(
    path: Path,
    *,
    config: PreTrainedConfig,
    args: Seq2SeqTrainingArguments,
    parameters: int,
    steps: int,
    epochs: float,
    results: dict[str, float],
    model_name: str,
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
        args: the training arguments, for the table of hyper-parameters.
        parameters: how many the model has.
        steps, epochs: how long it was trained.
        results: figures named as the Trainer names them (`eval_loss`, `predict_bleu`).
        model_name: the title.
        Others: as `RnnSeq2SeqTrainer.create_model_card`.
    """
    task = (as_list(tasks) or ["text2text-generation"])[0]
    data_name = ", ".join(as_list(dataset)) or ", ".join(as_list(dataset_tags)) or "unnamed data"
    figures = []
    for key, value in results.items():
        prefix, _, name = key.partition("_")
        if prefix in SPLIT_OF_PREFIX and isinstance(value, (int, float)):
            figures.append((SPLIT_OF_PREFIX[prefix], name, value))
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
    architecture = {name: getattr(config, name) for name in ARCHITECTURE if hasattr(config, name)}
    defaults = type(config)()
    own = [name for name in type(config).__annotations__ if hasattr(defaults, name)]
    architecture |= {name: getattr(config, name) for name in own if getattr(config, name) != getattr(defaults, name)}
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n",
        f"# {model_name}\n",
        f"A recurrent encoder-decoder ({config.model_type}, {parameters:,} parameters), {origin} on {data_name}, "
        f"with `hf_rnn_seq2seq` {__version__}.\n",
        "## Figures\n",
        table(("split", "figure", "value"), [(s, n, f"{v:.4g}") for s, n, v in figures])
        if figures
        else "It was not evaluated after training.\n",
        "Error rates, BLEU, chrF and ROUGE are in percent.\n" if figures else "",
        f"## How to use\n\n{USAGE.format(name=args.hub_model_id or model_name)}",
        "## Architecture\n",
        table(("field", "value"), list(architecture.items())),
        "## Training\n",
        f"{steps:,} steps, {epochs:.4g} epochs.\n",
        table(("argument", "value"), [(name, plain(getattr(args, name))) for name in HYPERPARAMETERS]),
        f"transformers {transformers.__version__}, torch {torch.__version__}, tokenizers {tokenizers.__version__}, "
        f"Python {platform.python_version()}.\n",
    ]
    path.write_text("\n".join(section for section in sections if section), encoding="utf-8")


def plain(value: object) -> object:
    """The value of an enumeration's member, anything else as it is."""
    return getattr(value, "value", value)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)
