"""What every format's converter takes and gives back, and the safe reading of checkpoints."""

import pickle
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..configuration_rnn_seq2seq import RnnSeq2SeqConfig
from ..modeling_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from ..tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer


class ConversionError(ValueError):
    """A checkpoint that cannot be converted: what is in the way, and what could be done."""


@dataclass
class ConversionOptions:
    """
    What a user may say beside the checkpoint.

    Args:
        trust_pickle: run the code that a checkpoint's pickle names. Only for files whose maker you trust.
        files: further files that a format needs, by name ("source_vocab", "target_codes", ...): each converter's
            docstring lists them.
    """

    trust_pickle: bool = False
    files: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.files = {name: Path(path) for name, path in self.files.items()}


@dataclass
class Converted:
    """
    A model of another toolkit as one of ours.

    Args:
        config: of the model.
        weights: its state dict; every parameter has to be there, tied ones under any of their names.
        tokenizer: with the toolkit's vocabularies.
        origin: toolkit and version, for the model card, as in "OpenNMT-py 3.5.1".
        notes: what a user of the model should know, a sentence each.
        generation: generation settings that the toolkit decodes with by default, as `{"num_beams": 5}`.
    """

    config: RnnSeq2SeqConfig
    weights: Mapping[str, torch.Tensor]
    tokenizer: RnnSeq2SeqTokenizer
    origin: str
    notes: Sequence[str] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> RnnSeq2SeqForConditionalGeneration:
        """The model, in evaluation mode. Raises [`ConversionError`] unless the weights are exactly its parameters."""
        model = RnnSeq2SeqForConditionalGeneration(self.config)
        missing, unexpected = model.load_state_dict(dict(self.weights), strict=False)
        given = {model.get_parameter(name).data_ptr() for name in self.weights if name not in unexpected}
        missing = [name for name in missing if model.get_parameter(name).data_ptr() not in given]
        if missing or unexpected:
            raise ConversionError(f"Weights without a value: {missing}; weights without a place: {list(unexpected)}.")
        for name, value in self.generation.items():  # `update` would leave out what transformers does not know
            setattr(model.generation_config, name, value)
        return model.eval()


def check_files(options: ConversionOptions, allowed: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Raises [`ConversionError`] for a file that is not `allowed`, one that is not there, and one that is missing."""
    for name, path in options.files.items():
        if name not in allowed:
            raise ConversionError(f"Unknown file {name!r}; this format takes {', '.join(allowed) or 'none'}.")
        if not Path(path).is_file():
            raise ConversionError(f"The file {name!r} is not there: {path}.")
    for name in needed:
        if name not in options.files:
            raise ConversionError(f"This checkpoint needs the file {name!r} (--file {name}=PATH).")


class StandIn:
    """An object of a class that is not there: its attributes alone."""

    def __init__(self, *arguments: object) -> None:
        pass


def read_torch(
    path: Path,
    trust_pickle: bool,
    allowed: Sequence[Callable[..., Any] | tuple[Callable[..., Any], str]] = (),
    stand_ins: Sequence[str] = (),
) -> Any:
    """
    A file of torch.save, its tensors on the CPU. Plain containers and tensors are read without running anything; so
    are the classes and functions `allowed`, which must be harmless, each with the name that it has in the file if that
    is another. More than that needs `trust_pickle`; objects of the packages `stand_ins` then become [`StandIn`]s,
    whether or not these are installed.
    """
    if trust_pickle:

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                return StandIn if module.split(".")[0] in stand_ins else super().find_class(module, name)

        module = types.ModuleType("pickle")
        vars(module).update(Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load())
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the class {found[1]}" if found else str(error).strip().splitlines()[-1]
        raise ConversionError(
            f"{path} holds more than tensors and plain values ({what}), and loading that runs code from the file. If "
            "you trust whoever made it, pass --trust-pickle (`trust_pickle=True`)."
        ) from error


# Logit of a word that is never to be generated: its probability is exactly zero, also in half precision.
NEVER = -1e4


def fit_vocabulary(converted: Converted) -> Converted:
    """
    Rows for the tokens that the tokenizer has beyond the toolkit's vocabulary (see `vocabularies`): their embeddings
    are the unknown token's, their logits [`NEVER`]. What the model does with text stays the toolkit's.
    """
    config, tokenizer = converted.config, converted.tokenizer
    weights = dict(converted.weights)
    notes = list(converted.notes)
    tables = {
        "source": ("model.encoder.embed_tokens.weight", config.source_size, tokenizer.source_tokenizer),
        "target": ("model.decoder.embed_tokens.weight", config.vocab_size, tokenizer.target_tokenizer),
    }
    for side, (name, size, half) in tables.items():
        extra = len(half) - size
        if extra == 0:
            continue
        if extra < 0 or half.unk_token_id is None:
            raise ConversionError(f"The {side} vocabulary has {len(half)} tokens, the model {size}.")
        if name in weights:
            weights[name] = _with_copies(weights[name], half.unk_token_id, extra)
        if side == "source" and not config.shared_vocabulary:
            config.source_vocab_size = len(half)
        elif side == "target":
            config.vocab_size = len(half)
            output = weights.get("head.output.weight")
            if output is not None:
                weights["head.output.weight"] = _with_copies(output, half.unk_token_id, extra)
            bias = weights["head.output.bias"]
            weights["head.output.bias"] = torch.cat((bias, bias.new_full((extra,), NEVER)))
        notes.append(
            f"{extra} pieces of words that the {side} tokenizer can cut text into are not in the original's "
            "vocabulary, which reads them as unknown. They have ids of their own behind it, with the unknown token's "
            "embedding" + ("; they are never generated." if side == "target" else ".")
        )
    return replace(converted, weights=weights, notes=notes)


def _with_copies(weight: torch.Tensor, row: int, count: int) -> torch.Tensor:
    return torch.cat((weight, weight[row].expand(count, -1)))
