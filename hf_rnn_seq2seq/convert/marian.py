"""
Marian (Junczys-Dowmunt et al. 2018): `model.npz` of the types `s2s`, `amun` and `nematus`.

Read are the archive, in which Marian keeps the model's configuration (`special:model.yml`), and the two vocabularies.

Files: `source_vocab`, `target_vocab` (`.yml`, a token a line, or a SentencePiece model `.spm`; if they are not given,
what `model.npz.decoder.yml` or `model.npz.yml` names), `source_codes`, `target_codes` (subword-nmt).

Taken are GRU and LSTM encoders and decoders (`gru`, `gru-nematus`, `lstm`), deep transition on both sides, stacked
encoders of `--enc-type` bidirectional (also with `--skip`) and bi-unidirectional (where its skip connections are those
of GNMT), further decoder layers, layer normalisation (not of LSTMs), and tied embeddings. The equations, read in the
published code, are also in tests/test_convert_marian.py; converted models were compared with those, never with Marian
itself.

What differs from Nematus (see that module, also for the zero vector that starts a sentence):

- The types `amun` and `gru` normalise all gates of a product together, with a gain alone, and add biases afterwards;
  `nematus` and `gru-nematus` do as Nematus does.
- Marian's normalisation adds 1e-9 to the variance and torch's 1e-5: the matrices before it are stored times 100, which
  is the same.
- The two directions of a stacked bidirectional encoder never meet below its top. Here each layer reads both, and the
  weights of the other direction are zero; further training would change them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from ..configuration_rnn_seq2seq import RnnSeq2SeqConfig
from ..tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from .base import NEVER, ConversionError, ConversionOptions, Converted, check_files
from .nematus import (
    FILES,
    Parameters,
    Weights,
    attention_weights,
    bridge_weights,
    decoder_weights,
    dictionary_tokens,
    encoder_weights,
    find_file,
    fitted,
    gru,
    head_weights,
    read_archive,
    shared_fields,
    side,
    special_tokens,
    with_pad,
)
from .vocabularies import make_side, sentencepiece_backend

CONFIG = "special:model.yml"
TYPES = ("s2s", "amun", "nematus")
CELLS = {"gru": "gru", "gru-nematus": "gru", "lstm": "lstm"}

# The only value of a setting that can be represented, which is also what a configuration without it means.
ALLOWED: dict[str, Any] = {
    "dec-cell-high-depth": 1,
    "right-left": False,
    "dec-attention-hops": 1,
    "dec-attention-heads": 1,
}


# Names. The types `amun` and `nematus` save cells under Nematus's names, which become `s2s`'s here. The maps of bridge
# and head have Nematus's names below, so those of `s2s` become these.

CELL_RENAMES: list[tuple[str, str]] = [
    (r"decoder_(U|Ux|W|Wx|b|bx)(_ln[sb])?", r"decoder_cell1_\1\2"),
    (r"decoder_(U|Ux|b|bx)_nl(_ln[sb])?", r"decoder_cell2_\1\2"),
    (r"decoder_Wc(x?)(_ln[sb])?", r"decoder_cell2_W\1\2"),
    (r"encoder(|_r)_(U|Ux|W|Wx|b|bx)(_ln[sb])?", r"encoder_bi\1_\2\3"),
    (r"encoder(|_r)_(gamma[12])", r"encoder_bi\1_\2"),
]
TRANSITION_RENAMES: list[tuple[str, str, int]] = [  # the last is what the number of a transition grows by
    (r"decoder_(U|Ux|b|bx)_nl_drt_(\d+)(_ln[sb])?", "decoder_cell{1}_{0}{2}", 2),
    (r"encoder_(U|Ux|b|bx)_drt_(\d+)(_ln[sb])?", "encoder_bi_cell{1}_{0}{2}", 1),
    (r"encoder_r_(U|Ux|b|bx)_drt_(\d+)(_ln[sb])?", "encoder_bi_r_cell{1}_{0}{2}", 1),
]
MAP_RENAMES: list[tuple[str, str]] = [
    (r"decoder_ff_state_(.+)", r"ff_state_\1"),
    (r"decoder_ff_logit_l1_(W|b|ln_s|ln_b)0", r"ff_logit_prev_\1"),
    (r"decoder_ff_logit_l1_(W|b|ln_s|ln_b)1", r"ff_logit_lstm_\1"),
    (r"decoder_ff_logit_l1_(W|b|ln_s|ln_b)2", r"ff_logit_ctx_\1"),
    (r"decoder_ff_logit_l1_(gamma\d)", r"ff_logit_l1_\1"),
    (r"decoder_ff_logit_l2_(W|Wt|b)", r"ff_logit_\1"),
    (r"encoder_Wemb", "Wemb"),
    (r"decoder_Wemb", "Wemb_dec"),
]


def renamed(name: str, kind: str) -> str:
    """A parameter's name in an archive of type `kind` -> that under which it is used here."""
    for pattern, template, more in TRANSITION_RENAMES if kind != "s2s" else []:
        found = re.fullmatch(pattern, name)
        if found:
            part, number, norm = found.groups(default="")
            return template.format(part, int(number) + more, norm)
    for pattern, replacement in [*(CELL_RENAMES if kind != "s2s" else []), *MAP_RENAMES]:
        new, count = re.subn(rf"^{pattern}$", replacement, name)
        if count:
            return new
    return name


# Cells


def lstm(p: Parameters, prefix: str) -> Weights:
    """Marian's gates are f i c o, torch's i f c o; one bias."""

    def ordered(rows: torch.Tensor) -> torch.Tensor:
        f, i, c, o = rows.chunk(4)
        return torch.cat((i, f, c, o))

    hh = ordered(p.matrix(f"{prefix}_U"))
    ih = ordered(p.matrix(f"{prefix}_W")) if f"{prefix}_W" in p else hh.new_zeros(len(hh), 0)
    bias = ordered(p.vector(f"{prefix}_b"))
    return {"weight_ih": ih, "weight_hh": hh, "bias_ih": bias, "bias_hh": torch.zeros_like(bias)}


def make_cell(p: Parameters, kind: str, prefix: str, layer_norm: bool, final: bool = False) -> Weights:
    """`final`: after attention, where a GRU's bias acts inside the reset gate's product."""
    if kind == "lstm":
        return lstm(p, prefix)
    names = {short: f"{prefix}_{short}" for short in ("U", "Ux", "W", "Wx", "b", "bx")}
    norm = None if not layer_norm else "nematus" if kind == "gru-nematus" else "marian"
    return gru(p, names, final, norm, (f"{prefix}_gamma1", f"{prefix}_gamma2"))


def ours(kind: str, layer_norm: bool) -> str:
    """Our name for a cell."""
    if not layer_norm:
        return CELLS[kind]
    return "nematus_gru" if kind == "gru-nematus" else "marian_gru"


def encoder_layers(p: Parameters, config: Mapping[str, Any], norm: bool) -> list[dict[str, list[Weights]]]:
    """The cells of every layer, by direction."""
    kind, depth = config.get("enc-cell", "gru"), int(config.get("enc-cell-depth", 1))
    stacked = config.get("enc-type", "bidirectional") == "bidirectional"
    found = []
    for level in range(1, int(config.get("enc-depth", 1)) + 1):
        layer: dict[str, list[Weights]] = {}
        if level > 1 and not stacked:
            layer["forward_layer"] = [make_cell(p, kind, f"encoder_l{level}_cell{j + 1}", norm) for j in range(depth)]
        else:
            for index, (name, prefix) in enumerate(
                (("forward_layer", "encoder_bi"), ("backward_layer", "encoder_bi_r"))
            ):
                cells = []
                for j in range(1, depth + 1):
                    where = prefix if level == 1 else f"{prefix}_l{level}"
                    cells.append(make_cell(p, kind, where if level == j == 1 else f"{where}_cell{j}", norm))
                if level > 1:  # it reads its own direction of the layer below: the first or second half
                    own = cells[0]["weight_ih"]
                    halves = (own, torch.zeros_like(own))
                    cells[0]["weight_ih"] = torch.cat(halves if index == 0 else halves[::-1], dim=1)
                layer[name] = cells
        found.append(layer)
    return found


# The archive


def read_config(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, Any]:
    if CONFIG not in arrays:
        raise ConversionError(f"{path} has no {CONFIG!r}: it is not Marian's, or from before its version 1.0.")
    text = np.asarray(arrays[CONFIG]).astype(np.uint8).tobytes().rstrip(b"\0").decode("utf-8")
    config = yaml.safe_load(text)
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: {CONFIG!r} is no configuration.")
    return config


def check_config(config: Mapping[str, Any]) -> None:
    kind = config.get("type")
    if kind not in TYPES:
        raise ConversionError(f"`type`={kind!r} cannot be represented; allowed are {', '.join(TYPES)}.")
    for name, allowed in ALLOWED.items():
        if config.get(name, allowed) != allowed:
            raise ConversionError(f"`{name}`={config[name]!r} cannot be represented; allowed is {allowed!r}.")
    for name in ("enc-cell", "dec-cell"):
        cell = config.get(name, "gru")
        if cell not in CELLS:
            raise ConversionError(f"`{name}`={cell!r} cannot be represented; allowed are {', '.join(CELLS)}.")
        if cell == "lstm" and config.get("layer-normalization"):
            raise ConversionError(
                f"`layer-normalization` with `{name}`='lstm' cannot be represented: it is over all gates together."
            )
    encoder, depth, skip = config.get("enc-type", "bidirectional"), int(config.get("enc-depth", 1)), config.get("skip")
    possible = {
        "bidirectional": True,
        "bi-unidirectional": depth <= 2 or bool(skip),  # GNMT's has skip connections from the third layer on
        "alternating": depth == 1,
    }
    if not possible.get(encoder, False):
        raise ConversionError(
            f"`enc-type`={encoder!r} with `enc-depth`={depth} and `skip`={bool(skip)} cannot be represented; allowed "
            "are 'bidirectional' with any depth, and 'bi-unidirectional' up to 2 or with `skip`."
        )


def spm_side(path: Path, size: int) -> PreTrainedTokenizerFast:
    """A SentencePiece model in the place of a vocabulary."""
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        proto = import_protobuf().ModelProto()
    except ImportError as error:
        raise ConversionError(f"Reading {path} needs a package: pip install sentencepiece protobuf.") from error
    proto.ParseFromString(path.read_bytes())
    tokens = fitted([piece.piece for piece in proto.pieces], size)
    specials = special_tokens(tokens, ("<unk>",))
    assert specials.eos is not None
    return make_side(sentencepiece_backend(tokens, path, specials), specials, after=(specials.eos,))


def named_vocabularies(path: Path) -> list[str | None]:
    """What the configurations that Marian writes beside a model name."""
    for ending in (".decoder.yml", ".yml"):
        file = path.with_name(path.name + ending)
        if file.is_file():
            found = yaml.safe_load(file.read_text(encoding="utf-8")).get("vocabs")
            if found:
                return [str(found[0]), str(found[-1])]
    return [None, None]


def convert(path: Path, options: ConversionOptions) -> Converted:
    check_files(options, FILES)
    arrays = read_archive(path)
    config = read_config(path, arrays)
    check_config(config)
    kind = str(config["type"])
    if kind == "nematus":
        config = {"enc-cell": "gru-nematus", "dec-cell": "gru-nematus"} | config
    p = Parameters({renamed(name, kind): value for name, value in arrays.items()}, {CONFIG, "decoder_c_tt", "uidx"})

    norm = bool(config.get("layer-normalization"))
    as_nematus = "nematus" in (kind, config.get("original-type"))
    maps = None if not norm else "nematus" if as_nematus else "marian"
    cell, layers = config.get("dec-cell", "gru"), int(config.get("dec-depth", 1))
    transitions = int(config.get("dec-cell-base-depth", 2))
    base = [make_cell(p, cell, f"decoder_cell{i}", norm, i > 1) for i in range(1, transitions + 1)]
    high = [make_cell(p, cell, f"decoder_l{level}_cell1", norm) for level in range(2, layers + 1)]
    states = layers * (2 if cell == "lstm" else 1)

    weights = encoder_weights(encoder_layers(p, config, norm)) | decoder_weights(base, high)
    weights |= attention_weights(p, maps) | bridge_weights(p, maps, states) | head_weights(p, maps)
    source_table = p.take("Wemb")
    one_table = "Wemb_dec" not in p
    target_table = source_table if one_table else p.take("Wemb_dec")
    tied = bool(config.get("tied-embeddings") or config.get("tied-embeddings-all"))
    weights["model.decoder.embed_tokens.weight"] = with_pad(target_table)
    if not one_table:
        weights["model.encoder.embed_tokens.weight"] = with_pad(source_table)
    if not tied:
        output = p.take("ff_logit_Wt") if "ff_logit_Wt" in p else p.matrix("ff_logit_W")
        weights["head.output.weight"] = with_pad(output)
    weights["head.output.bias"] = with_pad(p.vector("ff_logit_b"), NEVER)
    p.check_all_used()

    halves = []
    for name, table, file in zip(
        ("source", "target"), (source_table, target_table), named_vocabularies(path), strict=True
    ):
        vocabulary, size = find_file(options, f"{name}_vocab", path, file), len(table) + 1
        if vocabulary.suffix == ".spm":
            halves.append(spm_side(vocabulary, size))
        else:
            halves.append(side(fitted(dictionary_tokens(vocabulary), size), options.files.get(f"{name}_codes")))
    tokenizer = RnnSeq2SeqTokenizer(halves[0], halves[1])

    depth, skip = int(config.get("enc-depth", 1)), bool(config.get("skip"))
    unidirectional = config.get("enc-type") == "bi-unidirectional" and depth > 1
    fields = shared_fields(weights, tokenizer)
    if unidirectional:
        fields["encoder_hidden_size"] = weights["model.decoder.wiring.attention.key_projection.weight"].size(1)
    found = RnnSeq2SeqConfig(
        source_vocab_size=None if one_table else len(source_table) + 1,
        encoder_type="gnmt" if unidirectional else "rnn",
        encoder_layers=depth,
        encoder_residual=skip and depth > 1 and not unidirectional,
        encoder_transition_depth=int(config.get("enc-cell-depth", 1)),
        decoder_layers=layers,
        decoder_residual=skip and layers > 1,
        cell_type=ours(config.get("enc-cell", "gru"), norm),  # type: ignore[arg-type]
        decoder_cell_type=ours(cell, norm),  # type: ignore[arg-type]
        layer_norm=norm,
        decoder_transition_depth=transitions,
        tie_word_embeddings=tied,
        **fields,
    )
    notes = [
        "Ids are Marian's up to 1, and larger by one from 2 on, where <pad> is, whose embedding starts a sentence.",
        "The unknown word is never generated, as by Marian without --allow-unk.",
    ]
    if depth > 1 and not unidirectional:
        notes.append(
            "The encoder's directions do not read each other below the top layer: those weights are zero, and further "
            "training would change them."
        )
    generation = {"num_beams": 12, "length_penalty": 0.0, "suppress_tokens": [tokenizer.unk_token_id]}
    origin = f"Marian {config.get('version', '')}".strip() + f", type {kind}"
    return Converted(found, weights, tokenizer, origin, notes, generation)
