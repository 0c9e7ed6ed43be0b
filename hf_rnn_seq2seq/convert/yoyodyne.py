"""
Yoyodyne: Lightning checkpoints (`.ckpt`) of soft-attention and pointer-generator models with a GRU or LSTM.

Checkpoints that the `yoyodyne` command writes hold the vocabularies and are read without running any code from the
file; so is everything but pickled Python objects, which other ways of training may leave in a checkpoint.

Files: `index` (the vocabularies where the checkpoint has none: JSON or YAML with `source_vocabulary`,
`target_vocabulary`, `features_vocabulary` and `tie_embeddings`), `config` (the YAML of the training, whose
`data: source_sep` and `target_sep` say how text is cut into symbols; without it a side whose symbols are all single
characters is read character by character, any other with spaces between its symbols).

The decoder attends with the top layer's last h, its context enters the bottom layer, and the output layer reads the
new h; a pointer-generator's also the context. That is the wiring `bahdanau_joined`, with the `learned` bridge for the
decoder's first state. The bias of the scoring vector, which softmax cancels, is left out; a projection of the
encoder's output (`decoder_input_size`) is multiplied into what reads it.

Refused are: models without attention (they divide by the padded length of the batch), features encoders, encoders that
are no GRU or LSTM, and all other architectures (transformers, transducers, hard attention).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..configuration_rnn_seq2seq import RnnSeq2SeqConfig
from ..tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from .base import ConversionError, ConversionOptions, Converted, StandIn, check_files, read_torch
from .vocabularies import SpecialTokens, character_backend, make_side, whitespace_backend

Weights = dict[str, torch.Tensor]

# Yoyodyne's symbols of its own, in the order of their ids.
SPECIAL = ["<P>", "<UNK>", "<S>", "<E>", "<SOURCE>", "<FEATURES>"]
SPECIAL_TOKENS = SpecialTokens(pad="<P>", unk="<UNK>", bos="<S>", eos="<E>")


def _index(state: dict[str, Any]) -> dict[str, Any]:
    """Takes the place of the one function that checkpoints name: the vocabularies as they are stored."""
    return state


INDEX = (_index, "yoyodyne.data.indexes._reconstruct_index")


def read_checkpoint(path: Path, trust_pickle: bool) -> dict[str, Any]:
    try:
        found = read_torch(path, False, (INDEX,))
    except ConversionError:
        if not trust_pickle:
            raise
        found = read_torch(path, True, stand_ins=("yoyodyne", "lightning", "pytorch_lightning"))
    if not isinstance(found, dict) or "state_dict" not in found:
        raise ConversionError(f"{path} is no Lightning checkpoint: it has no `state_dict`.")
    return found


# Vocabularies


def read_settings(path: Path) -> Any:
    """JSON or YAML of plain values; `!Index` is how Yoyodyne itself writes its index."""

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor("!Index", mapping)
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error


def read_index(hyperparameters: Mapping[str, Any], path: Path, options: ConversionOptions) -> dict[str, Any]:
    found = read_settings(options.files["index"]) if "index" in options.files else hyperparameters.get("index")
    if found is None or isinstance(found, StandIn):
        raise ConversionError(
            f"{path} does not hold the vocabularies: give them as `index`. In Yoyodyne's environment, `python -c "
            '"import sys, yaml; from yoyodyne.data.indexes import Index; '
            "yaml.safe_dump(Index.read('MODEL_DIR'), sys.stdout)\"` writes them."
        )
    missing = [name for name in ("source_vocabulary", "target_vocabulary", "tie_embeddings") if name not in found]
    if missing or not found["target_vocabulary"]:
        raise ConversionError(f"The index of {path} lacks {', '.join(missing or ['target_vocabulary'])}.")
    return found


def id_lists(index: Mapping[str, Any]) -> tuple[list[str], list[str], list[int]]:
    """The source's and the target's symbols, and the rows of the embedding table that the source's are."""
    source, target = own_symbols(index)
    if index["tie_embeddings"]:
        both = [*SPECIAL, *sorted({*source, *target})]
        return both, both, list(range(len(both)))
    first = len(SPECIAL) + len(target)
    rows = [*range(len(SPECIAL)), *range(first, first + len(source))]
    return [*SPECIAL, *source], [*SPECIAL, *target], rows


def own_symbols(index: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Of source and target texts. Where the target has others, Yoyodyne writes the source's in braces."""
    source, target = sorted(index["source_vocabulary"]), sorted(index["target_vocabulary"])
    return source if index["tie_embeddings"] else [symbol[1:-1] for symbol in source], target


def separators(options: ConversionOptions) -> dict[str, str | None]:
    """How the two sides are cut into symbols, if the training's configuration is there: "" is by characters."""
    if "config" not in options.files:
        return {"source": None, "target": None}
    data = (read_settings(options.files["config"]) or {}).get("data") or {}
    return {"source": data.get("source_sep", ""), "target": data.get("target_sep", "")}


def side(
    symbols: Sequence[str], own: Sequence[str], separator: str | None, name: str
) -> tuple[PreTrainedTokenizerFast, str]:
    """
    A tokenizer, and how it cuts text. `symbols` are in the order of ids, `own` those that this side's texts had.
    """
    if separator is None:
        separator = "" if all(len(symbol) == 1 for symbol in own) else " "
    if separator not in ("", " "):
        raise ConversionError(f"`{name}_sep`={separator!r} cannot be represented; allowed are '' and ' '.")
    backend: Tokenizer
    if separator:
        backend, note = whitespace_backend(symbols, SPECIAL_TOKENS.unk), "with a space between symbols"
    else:
        backend, note = character_backend(symbols, SPECIAL_TOKENS.unk), "character by character"
    before = ("<S>",) if name == "source" else ()
    return make_side(backend, SPECIAL_TOKENS, before, ("<E>",)), f"the {name} {note}"


# Weights


def cell(weights: Weights, prefix: str, ending: str) -> Weights:
    """A layer and direction of torch's own, whose gates are ours."""
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return {part: weights.pop(f"{prefix}.{part}_{ending}") for part in parts}


def count_layers(weights: Weights, prefix: str) -> int:
    layers = 0
    while f"{prefix}.weight_hh_l{layers}" in weights:
        layers += 1
    return layers


def cell_type(weights: Weights, prefix: str, what: str) -> str:
    name = f"{prefix}.weight_hh_l0"
    if name not in weights:
        raise ConversionError(f"{what} is no GRU or LSTM, which cannot be represented.")
    rows, columns = weights[name].shape
    return {3: "gru", 4: "lstm"}[rows // columns]


def check_architecture(weights: Weights) -> None:
    for prefix, reason in (
        ("features_encoder.", "a features encoder"),
        ("features_attention.", "a features encoder"),
        ("expert", "a transducer"),
    ):
        if any(name.startswith(prefix) for name in weights):
            raise ConversionError(f"The checkpoint has {reason}, which cannot be represented.")
    if "decoder.h0" not in weights or "classifier.weight" not in weights:
        raise ConversionError("The checkpoint is of no soft-attention or pointer-generator model with a GRU or LSTM.")
    if "decoder.attention.M.weight" not in weights:
        raise ConversionError(
            "The model has no attention: its context is divided by the batch's padded length, which cannot be "
            "represented."
        )


def model_weights(weights: Weights, rows: Sequence[int], shared: bool) -> Weights:
    """Ours; takes what it uses out of `weights`."""
    found: Weights = {}
    for layer in range(count_layers(weights, "source_encoder.module")):
        for direction, ending in (("forward_layer", f"l{layer}"), ("backward_layer", f"l{layer}_reverse")):
            if f"source_encoder.module.weight_hh_{ending}" in weights:
                where = f"model.encoder.body.layers.{layer}.directions.{direction}."
                found |= {where + n: v for n, v in cell(weights, "source_encoder.module", ending).items()}
    wiring = "model.decoder.wiring."
    layers = count_layers(weights, "decoder.module")
    for layer in range(layers):
        found |= {
            f"{wiring}stack.layers.{layer}.{n}": v for n, v in cell(weights, "decoder.module", f"l{layer}").items()
        }
    states = [weights.pop(name) for name in ("decoder.h0", "decoder.c0") if name in weights]
    found["model.bridge.initial"] = torch.stack(states).expand(layers, -1, -1)

    hidden = len(states[0])
    both = weights.pop("decoder.attention.M.weight")  # on [encoding; h]
    keys, query = both[:, :-hidden], both[:, -hidden:]
    key_bias = weights.pop("decoder.attention.M.bias")
    bottom = f"{wiring}stack.layers.0."
    if "source_projection.weight" in weights:  # P m + p in place of m, of which attention's weights sum to one
        p, p_bias = weights.pop("source_projection.weight").double(), weights.pop("source_projection.bias").double()
        key_bias = (key_bias.double() + keys.double() @ p_bias).to(key_bias)
        keys = (keys.double() @ p).to(keys)
        w = found[bottom + "weight_ih"]  # on [x; context]
        of_x, of_context = w[:, : -p.size(0)], w[:, -p.size(0) :].double()
        found[bottom + "weight_ih"] = torch.cat((of_x, (of_context @ p).to(w)), dim=1)
        found[bottom + "bias_ih"] = (found[bottom + "bias_ih"].double() + of_context @ p_bias).to(w)
    found |= {
        f"{wiring}attention.query_projection.weight": query,
        f"{wiring}attention.key_projection.weight": keys,
        f"{wiring}attention.key_projection.bias": key_bias,
        f"{wiring}attention.score_projection.weight": weights.pop("decoder.attention.V.weight"),
    }
    del weights["decoder.attention.V.bias"]

    output = weights.pop("classifier.weight")
    memory = keys.size(1)
    if "generation_probability.bias" in weights:
        output = torch.cat((output[:, hidden:], output[:, :hidden]), dim=1)  # from [h; context] to [context; h]
        gate = [weights.pop(f"generation_probability.W_{name}.weight") for name in ("attention", "hs", "emb")]
        found["head.gate.weight"] = torch.cat(gate, dim=1)
        found["head.gate.bias"] = weights.pop("generation_probability.bias")
    else:
        output = torch.cat((output.new_zeros(len(output), memory), output), dim=1)
    found["head.output.weight"] = output
    found["head.output.bias"] = weights.pop("classifier.bias")

    table = weights.pop("embeddings.weight")
    found["model.decoder.embed_tokens.weight"] = table[: len(output)]
    if not shared:
        found["model.encoder.embed_tokens.weight"] = table[list(rows)]
    if weights:
        raise ConversionError(f"Parameters that cannot be represented: {', '.join(sorted(weights))}.")
    return {name: value.contiguous() for name, value in found.items()}


def convert(path: Path, options: ConversionOptions) -> Converted:
    check_files(options, ("index", "config"))
    checkpoint = read_checkpoint(path, options.trust_pickle)
    hyperparameters = checkpoint.get("hyper_parameters", {})
    original: Weights = dict(checkpoint["state_dict"])
    check_architecture(original)
    index = read_index(hyperparameters, path, options)
    source, target, rows = id_lists(index)
    shared = bool(index["tie_embeddings"])
    copies = "generation_probability.bias" in original
    for what, expected, there in (
        ("embeddings", len(source) if shared else len(source) + len(target) - len(SPECIAL), "embeddings.weight"),
        ("output layer", len(target), "classifier.weight"),
    ):
        if len(original[there]) != expected:
            raise ConversionError(
                f"The index has {expected} symbols for the {what}, which have {len(original[there])}."
            )
    if copies and not shared:
        raise ConversionError(
            "A pointer-generator without `tie_embeddings` cannot be represented: it has ids of two kinds."
        )

    encoder_cell = cell_type(original, "source_encoder.module", "The source encoder")
    decoder_cell = "lstm" if "decoder.c0" in original else "gru"
    size = original["source_encoder.module.weight_hh_l0"].size(1)
    layers = [count_layers(original, prefix) for prefix in ("source_encoder.module", "decoder.module")]
    bidirectional = "source_encoder.module.weight_hh_l0_reverse" in original
    hidden = len(original["decoder.h0"])
    weights = model_weights(original, rows, shared)

    known, own = separators(options), own_symbols(index)
    source_side, source_note = side(source, own[0], known["source"], "source")
    target_side, target_note = side(target, own[1], known["target"], "target")
    tokenizer = RnnSeq2SeqTokenizer(source_side, target_side)
    dropout = float(hyperparameters.get("decoder_dropout", 0.0))
    config = RnnSeq2SeqConfig(
        vocab_size=len(target),
        source_vocab_size=None if shared else len(source),
        embedding_size=weights["model.decoder.embed_tokens.weight"].size(1),
        hidden_size=hidden,
        encoder_hidden_size=size,
        encoder_layers=layers[0],
        decoder_layers=layers[1],
        cell_type=encoder_cell,  # type: ignore[arg-type]
        decoder_cell_type=decoder_cell,  # type: ignore[arg-type]
        bidirectional=bidirectional,
        bridge_type="learned",
        attention_type="additive",
        attention_bias=True,
        wiring_type="bahdanau_joined",
        head_type="pointer_generator" if copies else "linear",
        dropout=dropout,
        embedding_dropout=dropout,
        output_dropout=0.0 if copies else dropout,
        pad_token_id=0,
        unk_token_id=1,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
    )
    said = "as its configuration says" if "config" in options.files else "as its symbols suggest"
    notes = [
        f"Text is read, {said}, {source_note}, and {target_note}.",
        "Yoyodyne decodes greedily unless told otherwise; with `num_beams` this model searches as it does with beams "
        "(`yoyodyne_beam_search`).",
    ]
    generation = {
        "max_new_tokens": int(hyperparameters.get("max_target_length", 128)),
        "num_beams": int(hyperparameters.get("beam_width", 1)),
        "yoyodyne_beam_search": True,
    }
    return Converted(config, weights, tokenizer, "Yoyodyne", notes, generation)
