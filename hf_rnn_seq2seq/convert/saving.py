"""A converted model as a folder that `from_pretrained` loads."""

import shutil
from pathlib import Path

from huggingface_hub import ModelCardData

from ..model_card import TAGS, USAGE, architecture, table
from ..version import __version__
from .base import ConversionError, Converted

CARD = """{metadata}
# {title}

A recurrent encoder-decoder that was trained with {origin} and converted with hf_rnn_seq2seq {version} from
`{checkpoint}`. Weights, vocabulary and what they compute are the original's.

{notes}## How to load it

{usage}
## Architecture

{architecture}
"""


def save(converted: Converted, folder: Path, checkpoint: str) -> None:
    """
    Writes model, tokenizer, generation configuration and a model card (README.md), all of them or nothing.

    Args:
        converted: what to save.
        folder: is made, or is there and empty.
        checkpoint: the name of the original, for the card.

    Raises:
        ConversionError: something lies in the folder already, or the weights are not the model's.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConversionError(f"{folder} is there already and not an empty folder.")
    model = converted.model()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        raise ConversionError(f"{partial} is there already, of a conversion that was cut off: remove it.")
    try:
        model.save_pretrained(partial)
        converted.tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card(converted, folder.name, checkpoint), encoding="utf-8")
        if folder.exists():
            folder.rmdir()  # empty, as seen above
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def card(converted: Converted, title: str, checkpoint: str) -> str:
    """The text of README.md. No licence is in its metadata: the original's maker says which."""
    metadata = ModelCardData(library_name="transformers", tags=[*TAGS, "converted"])
    notes = "".join(f"- {note}\n" for note in converted.notes)
    rows = [(f"`{name}`", value) for name, value in architecture(converted.config).items()]
    return CARD.format(
        metadata=f"---\n{metadata.to_yaml()}\n---\n",
        title=title,
        origin=converted.origin,
        version=__version__,
        checkpoint=checkpoint,
        notes=f"{notes}\n" if notes else "",
        usage=USAGE.format(name=title),
        architecture=table(["field", "value"], rows),
    )
