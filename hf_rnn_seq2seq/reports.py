"""What a run leaves behind for people: predictions, attention plots, a summary."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import ScriptArguments
from .data import PACKAGED_CORPORA

SAMPLES_SHOWN = 5

# What these are called in work on pronunciation, where the symbols are phones and the sequences words.
ALIASES = {"symbol_error_rate": " (PER)", "sequence_error_rate": " (WER)"}


def write_predictions(output_dir: Path, test: datasets.Dataset, predictions: list[str]) -> None:
    """Write `generated_predictions.txt`, a line a row, and `.jsonl` with source, prediction and references."""
    columns = [name for name in ("source", "target", "references") if name in test.column_names]
    keys = {"source": "source", "target": "reference", "references": "references"}
    with (
        open(output_dir / "generated_predictions.txt", "w", encoding="utf-8") as text_file,
        open(output_dir / "generated_predictions.jsonl", "w", encoding="utf-8") as json_file,
    ):
        for row, prediction in zip(test.select_columns(columns), predictions, strict=True):
            text_file.write(" ".join(prediction.splitlines()) + "\n")
            line = {"source": row["source"], "prediction": prediction}
            line |= {keys[name]: row[name] for name in columns if name != "source"}
            json_file.write(json.dumps(line, ensure_ascii=False) + "\n")


def plot_attentions(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    predictions: np.ndarray | tuple[np.ndarray],
) -> None:
    """Heat maps for the given rows: the attention while the model reads its own prediction.

    Shown is the last attending layer, as a mean over its heads.

    Args:
        folder: gets `attention_000.png` and so on.
        rows: with the column `input_ids` and, if the model copies, `copy_ids`.
        predictions: the ids that were generated for these rows (and any after them), from the start token on.
    """
    from .plotting import save_attention_plots  # Matplotlib takes a second to import

    source_side = getattr(tokenizer, "source_tokenizer", tokenizer)
    target_side = getattr(tokenizer, "target_tokenizer", tokenizer)
    names = [name for name in ("input_ids", "copy_ids") if name in rows.column_names]
    maps, sources, targets = [], [], []
    for row, ids in zip(rows, predictions, strict=False):
        ids = ids[ids != -100].tolist()
        end = ids.index(tokenizer.eos_token_id, 1) if tokenizer.eos_token_id in ids[1:] else len(ids) - 1
        inputs = {name: torch.tensor([row[name]], device=model.device) for name in names}
        with torch.no_grad():
            output = model.eval()(
                **inputs, decoder_input_ids=torch.tensor([ids[:end]], device=model.device), output_attentions=True
            )
        maps.append(output.cross_attentions[-1][0].mean(dim=0).float().cpu())  # [T, S], mean over heads
        sources.append(source_side.convert_ids_to_tokens(row["input_ids"]))
        tokens = target_side.convert_ids_to_tokens(ids[1 : end + 1])
        # What was copied from outside the vocabulary is no token.
        known = zip(ids[1 : end + 1], tokens, strict=True)
        targets.append([str(tokenizer.decode([i], source_text=row["source"])) if t is None else t for i, t in known])
    save_attention_plots(folder, maps, sources, targets)


def model_card_arguments(args: ScriptArguments) -> dict[str, Any]:
    """What `RnnSeq2SeqTrainer.create_model_card` is told about the run."""
    data = args.data
    named = data.dataset_name is not None and data.dataset_name not in PACKAGED_CORPORA
    on_hub = named and not Path(data.dataset_name or "").exists()
    languages = [language for language in (data.source_lang, data.target_lang) if language]
    return {
        "language": languages or None,
        "tasks": "translation" if languages else "text2text-generation",
        "dataset": Path(data.dataset_name or data.train_file or "").name,
        "dataset_tags": data.dataset_name if on_hub else None,
        "dataset_args": data.dataset_config_name,
        "finetuned_from": args.run.model_name_or_path,
    }


def summary(
    args: ScriptArguments,
    results: dict[str, float | str],
    test: datasets.Dataset | None,
    predictions: list[str],
) -> str:
    """What a person wants to see at the end of a run."""
    output_dir = args.output_dir
    lines = ["", "=" * 100]
    for prefix, title in (("eval", "Validation"), ("predict", "Test")):
        figures = {name: results[f"{prefix}_{name}"] for name in shown_figures(results, prefix)}
        if figures:
            lines.append(
                f"{title}: "
                + ", ".join(f"{name}{ALIASES.get(name, '')} {value:.2f}" for name, value in figures.items())
            )
    if test is not None and predictions:
        lines.append("Samples:")
        for row, prediction in zip(test.select(range(min(SAMPLES_SHOWN, len(test)))), predictions, strict=False):
            lines.append(f"  source:     {row['source']}")
            lines.append(f"  prediction: {prediction}")
            if "target" in row:
                lines.append(f"  reference:  {' | '.join(row.get('references') or [row['target']])}")
            lines.append("")
        lines.append(f"Predictions: {output_dir / 'generated_predictions.txt'} and .jsonl")
        if (output_dir / "attention_plots").is_dir():
            lines.append(f"Attention plots: {output_dir / 'attention_plots'}")
    if args.training.do_train:
        lines.append(f"Model: {output_dir}")
    lines.append(f"All figures: {output_dir / 'all_results.json'}")
    return "\n".join(lines)


def shown_figures(results: dict[str, float | str], prefix: str) -> list[str]:
    names = [name.removeprefix(f"{prefix}_") for name in results if name.startswith(f"{prefix}_")]
    noise = ("runtime", "samples_per_second", "steps_per_second", "samples", "model_preparation_time")
    return [name for name in names if name not in noise and not isinstance(results[f"{prefix}_{name}"], str)]
