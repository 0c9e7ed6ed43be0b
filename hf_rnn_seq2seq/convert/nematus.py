"""
Nematus (Sennrich et al. 2017): `model.npz` of its Theano versions, and what its TensorFlow versions' script
`theano_tf_convert` writes.

Read are the archive, its configuration (`model.npz.json` beside it) and the two dictionaries that this names.

Files: `config` (the JSON file, if it lies elsewhere), `source_vocab`, `target_vocab` (dictionaries, `.json` or
`.yml`), `source_codes`, `target_codes` (subword-nmt; without them the model takes text that is cut already).

Taken are models of a GRU encoder and a conditional GRU decoder: deep transition on both sides, further decoder layers,
layer normalisation, tied embeddings. The equations, read in the published code, are also in
tests/plain_nematus.py; converted models were compared with that, never with Nematus itself, which no present Python
runs. Refused by name is what these equations do not have, such as several encoder layers or source factors.

Three things that Nematus has and transformers has not:

- The first target "word" is a zero vector. Here it is that of `<pad>`, which is put into both vocabularies behind
  Nematus's own two, so that all other ids are larger by one than Nematus's; its logit is -10000.
- Where a bias acts inside the reset gate's product, as in the transitions after attention, it is `bias_hh`; where it
  acts outside of it, `bias_ih`.
- The constant `c_tt`, added to all attention scores alike, changes nothing and is left out.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from ..configuration_rnn_seq2seq import RnnSeq2SeqConfig
from ..tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from .base import NEVER, ConversionError, ConversionOptions, Converted, check_files
from .vocabularies import (
    SpecialTokens,
    make_side,
    read_dictionary,
    read_tokens,
    subword_nmt_backend,
    whitespace_backend,
)

Weights = dict[str, torch.Tensor]

FILES = ("source_vocab", "target_vocab", "source_codes", "target_codes")
# Where `<pad>` is put: behind the end of sentence and the unknown word.
PAD_ID = 2
# Marian's layer normalisation adds 1e-9 to the variance, torch's and Nematus's 1e-5: the same for x times this.
MARIAN_SCALE = 100.0


class Parameters:
    """The arrays of an archive, each of which has to be used."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], unused: Iterable[str] = ()):
        self.arrays = arrays
        self.left = set(arrays) - set(unused)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def take(self, name: str) -> torch.Tensor:
        """As it is there."""
        if name not in self.arrays:
            raise ConversionError(f"The archive has no parameter {name!r}.")
        self.left.discard(name)
        found = self.arrays[name]
        if not np.issubdtype(found.dtype, np.floating):
            raise ConversionError(f"The parameter {name!r} must hold floating-point numbers, it is {found.dtype}.")
        tensor = torch.from_numpy(np.array(found))
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def vector(self, name: str) -> torch.Tensor:
        """Marian's vectors are matrices of one row."""
        return self.take(name).flatten()

    def matrix(self, name: str) -> torch.Tensor:
        """Of a product x W, as torch keeps it: [O, I]."""
        return self.take(name).t().contiguous()

    def check_all_used(self) -> None:
        if self.left:
            raise ConversionError(
                f"Parameters that cannot be represented: {', '.join(sorted(self.left))}. Known are the parameters of "
                "a bidirectional encoder, a conditional decoder with one attention, and a deep output."
            )


def gru(
    p: Parameters,
    names: Mapping[str, str],
    bias_inside: bool,
    norm: str | None = None,
    gammas: tuple[str, str] = ("", ""),
) -> Weights:
    """
    One cell: its parameters U, Ux, W, Wx, b and bx under `names`; without input it has no W and Wx, in some versions
    of Nematus no b and bx.

    Args:
        p: the archive.
        names: of the parameters, by the short name.
        bias_inside: does bx act inside the reset gate's product, and b within the norm of the state's part?
        norm: "nematus" or "marian".
        gammas: names of Marian's gains, of the input's part and the state's.
    """
    hh = torch.cat((p.matrix(names["U"]), p.matrix(names["Ux"])))  # [3H, H]
    size = hh.size(1)
    has_input = names["W"] in p
    ih = torch.cat((p.matrix(names["W"]), p.matrix(names["Wx"]))) if has_input else hh.new_zeros(3 * size, 0)
    zeros, ones = hh.new_zeros(3 * size), hh.new_ones(3 * size)
    bias = torch.cat((p.vector(names["b"]), p.vector(names["bx"]))) if names["b"] in p else zeros
    inside, outside = (bias, zeros) if bias_inside else (zeros, bias)
    if norm is None:
        return {"weight_ih": ih, "weight_hh": hh, "bias_ih": outside, "bias_hh": inside}
    if norm == "marian":  # all biases come after the norms
        return {
            "weight_ih": MARIAN_SCALE * ih,
            "weight_hh": MARIAN_SCALE * hh,
            "ih_norm.weight": p.vector(gammas[0]) if has_input else ones,
            "ih_norm.bias": outside,
            "hh_norm.weight": p.vector(gammas[1]),
            "hh_norm.bias": inside,
        }

    def both(first: str, second: str, ending: str) -> torch.Tensor:
        return torch.cat((p.vector(names[first] + ending), p.vector(names[second] + ending)))

    return {
        "weight_ih": ih,
        "weight_hh": hh,
        "bias_ih": outside if has_input else zeros,
        "bias_hh": inside,
        # Without input there is nothing to normalise on that side: what is added there comes after the norm.
        "ih_norm.weight": both("W", "Wx", "_lns") if has_input else ones,
        "ih_norm.bias": both("W", "Wx", "_lnb") if has_input else outside,
        "hh_norm.weight": both("U", "Ux", "_lns"),
        "hh_norm.bias": both("U", "Ux", "_lnb"),
    }


def affine(
    p: Parameters, weight: str, bias: str | None, norm: str | None, nematus: str, marian: str
) -> tuple[torch.Tensor, ...]:
    """
    An affine map with its norm: matrix, bias and, if there is one, the norm's gain and bias.

    `nematus` is the name of Nematus's gain with a star in place of its last letter (`s`, or `b` for the bias),
    `marian` that of Marian's gain.
    """
    w = p.matrix(weight)
    b = w.new_zeros(w.size(0)) if bias is None else p.vector(bias)
    if norm is None:
        return w, b
    if norm == "marian":
        return MARIAN_SCALE * w, torch.zeros_like(b), p.vector(marian), b
    return w, b, p.vector(nematus.replace("*", "s")), p.vector(nematus.replace("*", "b"))


def attention_weights(p: Parameters, norm: str | None) -> Weights:
    prefix = "model.decoder.wiring.attention."
    query = affine(p, "decoder_W_comb_att", None, norm, "decoder_W_comb_att_ln*", "decoder_att_gamma2")
    key = affine(p, "decoder_Wc_att", "decoder_b_att", norm, "decoder_Wc_att_ln*", "decoder_att_gamma1")
    found = {
        "query_projection.weight": query[0],
        "key_projection.weight": key[0],
        "key_projection.bias": key[1],
        "score_projection.weight": p.matrix("decoder_U_att"),
    }
    if norm is not None:
        found |= {"query_norm.weight": query[2], "query_norm.bias": query[3]}
        found |= {"key_norm.weight": key[2], "key_norm.bias": key[3]}
    return {prefix + name: value for name, value in found.items()}


def bridge_weights(p: Parameters, norm: str | None, states: int) -> Weights:
    """Every state, of all layers, starts as the same vector: the map's rows, once each."""
    weight, bias, *rest = affine(p, "ff_state_W", "ff_state_b", norm, "ff_state_ln_*", "ff_state_gamma")
    found = {"projection.weight": weight.repeat(states, 1), "projection.bias": bias.repeat(states)}
    for name, value in zip(("norm.weight", "norm.bias"), rest, strict=False):
        found[name] = value.repeat(states)
    return {f"model.bridge.{name}": value for name, value in found.items()}


def head_weights(p: Parameters, norm: str | None) -> Weights:
    """But the output layer's matrix, which may be tied."""
    maps = [
        affine(p, f"ff_logit_{part}_W", f"ff_logit_{part}_b", norm, f"ff_logit_{part}_ln_*", f"ff_logit_l1_gamma{n}")
        for part, n in (("ctx", 2), ("lstm", 1), ("prev", 0))
    ]
    if norm is None:
        joined = torch.cat([weight for weight, _ in maps], dim=1)
        return {"head.hidden.0.weight": joined, "head.hidden.0.bias": torch.stack([bias for _, bias in maps]).sum(0)}
    found = {"head.norm.weight": torch.cat([one[2] for one in maps])}
    found["head.norm.bias"] = torch.cat([one[3] for one in maps])
    for index, (weight, bias, _, _) in enumerate(maps):
        found |= {f"head.hidden.{index}.weight": weight, f"head.hidden.{index}.bias": bias}
    return found


def with_pad(table: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """A row or number more, for `<pad>`."""
    return torch.cat((table[:PAD_ID], torch.full_like(table[:1], value), table[PAD_ID:]))


def place(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}.{name}": value for name, value in weights.items()}


def encoder_weights(layers: Sequence[Mapping[str, Sequence[Weights]]]) -> Weights:
    """The cells of every layer, by direction; the second and further ones are transitions."""
    found: Weights = {}
    for index, directions in enumerate(layers):
        for direction, cells in directions.items():
            where = f"model.encoder.body.layers.{index}.directions.{direction}"
            for depth, cell in enumerate(cells):
                found |= place(f"{where}.cells.{depth}" if len(cells) > 1 else where, cell)
    return found


def decoder_weights(base: Sequence[Weights], high: Sequence[Weights]) -> Weights:
    """The bottom layer's transitions, and the layers above."""
    first, *others = base
    found = place("model.decoder.wiring.stack.layers.0", first)
    for index, cell in enumerate(others):
        found |= place(f"model.decoder.wiring.transitions.{index}", cell)
    for index, cell in enumerate(high, start=1):
        found |= place(f"model.decoder.wiring.stack.layers.{index}", cell)
    return found


# Vocabularies


def fitted(tokens: Sequence[str], size: int) -> list[str]:
    """`size` tokens, `<pad>` among them: those beyond are unknown to the model, missing ones were never seen."""
    found = [*tokens[: size - 1]]
    found += [f"<unused {index}>" for index in range(len(found), size - 1)]
    pad = "<pad>"
    while pad in found:
        pad = f"<{pad}>"
    return [*found[:PAD_ID], pad, *found[PAD_ID:]]


def dictionary_tokens(path: Path) -> list[str]:
    """A dictionary, or a token a line."""
    return read_dictionary(path) if path.suffix in (".json", ".yml", ".yaml") else read_tokens(path)


def special_tokens(tokens: Sequence[str], unknown: Sequence[str]) -> SpecialTokens:
    """`unknown`: how the unknown word may be written; else it is the second word."""
    return SpecialTokens(
        pad=tokens[PAD_ID], eos=tokens[0], unk=next((token for token in unknown if token in tokens), tokens[1])
    )


def side(tokens: Sequence[str], codes: Path | None) -> PreTrainedTokenizerFast:
    specials = special_tokens(tokens, ("<UNK>",))
    assert specials.eos is not None
    if codes is not None:
        backend = subword_nmt_backend(tokens, codes, specials)
    else:
        backend = whitespace_backend(tokens, specials.unk)
    return make_side(backend, specials, after=(specials.eos,))


def find_file(options: ConversionOptions, name: str, near: Path, named: str | None) -> Path:
    """A file that the user gave, or that a configuration names: as it says, or beside the model."""
    if name in options.files:
        return options.files[name]
    if named is not None:
        for place_ in (Path(named), near.parent / named, near.parent / Path(named).name):
            if place_.is_file():
                return place_
    where = f": {named!r} is not there" if named else ""
    raise ConversionError(f"The {name.replace('_', ' ')} of {near} is missing{where}. Give it as `{name}`.")


def read_archive(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of numbers in a `.npz` file; nothing pickled is opened."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = {}
            for name in archive.files:
                try:
                    found[name] = archive[name]
                except ValueError as error:
                    if name not in ("history_errs", "zipped_params"):  # Python objects that say nothing of the model
                        raise ConversionError(f"{path}: {name!r} is no array of numbers.") from error
            return found
    except (OSError, ValueError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"{path} is no .npz archive: {error}.") from error


# Nematus itself


def cell_names(prefix: str, suffix: str = "", after_attention: bool = False) -> dict[str, str]:
    """Of a cell's parameters; `suffix` is a transition's."""
    spelt = {"U": "U", "Ux": "Ux", "b": "b", "bx": "bx", "W": "W", "Wx": "Wx"}
    if after_attention:
        spelt = {"U": "U_nl", "Ux": "Ux_nl", "b": "b_nl", "bx": "bx_nl", "W": "Wc", "Wx": "Wcx"}
    return {short: f"{prefix}_{name}{suffix}" for short, name in spelt.items()}


def read_config(path: Path, options: ConversionOptions) -> dict[str, Any]:
    """The configuration under its Theano names, with what older versions did not write."""
    file = options.files.get("config", path.with_name(path.name + ".json"))
    if not file.is_file():
        raise ConversionError(
            f"The configuration {file} is missing; give it as `config`. (Nematus's oldest models have a pickle in its "
            "place; write its dictionary as JSON.)"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    # Of the TensorFlow version, unless it was started from a Theano model.
    config.setdefault("theano_compat", "embedding_size" not in config)
    for new, old in (
        ("embedding_size", "dim_word"),
        ("state_size", "dim"),
        ("source_vocab_size", "n_words_src"),
        ("target_vocab_size", "n_words"),
        ("use_layer_norm", "layer_normalisation"),
    ):
        if old not in config and new in config:
            config[old] = config[new]
    if "n_words_src" not in config and "source_vocab_sizes" in config:
        config["n_words_src"] = config["source_vocab_sizes"][0]
    return config


# The only value of a setting that can be represented, which is also what a configuration without it means.
ALLOWED: dict[str, Any] = {
    "model_type": "rnn",
    "encoder": "gru",
    "decoder": "gru_cond",
    "decoder_deep": "gru",
    "enc_depth": 1,
    "dec_high_recurrence_transition_depth": 1,
    "dec_deep_context": False,
    "enc_recurrence_transition_deep_input": False,
    "dec_base_recurrence_transition_deep_context": False,
    "factors": 1,
    "output_depth": 1,
    "softmax_mixture_size": 1,
    "output_hidden_activation": "tanh",
    "weight_normalisation": False,
}


def check_config(config: Mapping[str, Any]) -> None:
    for name, allowed in ALLOWED.items():
        value = config.get(name, allowed)
        matters = name != "decoder_deep" or config.get("dec_depth", 1) > 1
        if value != allowed and matters:
            raise ConversionError(f"`{name}`={value!r} cannot be represented; allowed is {allowed!r}.")
    if config.get("use_dropout") and float(config.get("model_version", 0)) < 0.1 and config["theano_compat"]:
        raise ConversionError(
            "`use_dropout` with a `model_version` before 0.1: such models scale their activations when they are used, "
            "which cannot be represented."
        )


def convert(path: Path, options: ConversionOptions) -> Converted:
    check_files(options, ("config", *FILES))
    config = read_config(path, options)
    check_config(config)
    arrays = read_archive(path)
    other = {"history_errs", "uidx", "decoder_c_tt", *(name for name in arrays if name.startswith("adam"))}
    p = Parameters(arrays, other)
    norm = "nematus" if config.get("layer_normalisation") else None
    theano = bool(config["theano_compat"])

    transitions = int(config.get("enc_recurrence_transition_depth", 1))
    directions = {
        ours: [gru(p, cell_names(theirs, f"_drt_{j}" if j else ""), False, norm) for j in range(transitions)]
        for ours, theirs in (("forward_layer", "encoder"), ("backward_layer", "encoder_r"))
    }
    depth = int(config.get("dec_base_recurrence_transition_depth", 2))
    base = [gru(p, cell_names("decoder"), False, norm)]
    for index in range(depth - 1):
        base.append(gru(p, cell_names("decoder", f"_drt_{index}" if index else "", True), True, norm))
    layers = int(config.get("dec_depth", 1))
    high = [gru(p, cell_names(f"decoder_{level}"), not theano, norm) for level in range(2, layers + 1)]

    weights = encoder_weights([directions]) | decoder_weights(base, high)
    weights |= attention_weights(p, norm) | bridge_weights(p, norm, layers) | head_weights(p, norm)
    source_table = p.take("Wemb")
    one_table = bool(config.get("tie_encoder_decoder_embeddings"))
    target_table = source_table if one_table else p.take("Wemb_dec")
    tied = bool(config.get("tie_decoder_embeddings"))
    weights["model.decoder.embed_tokens.weight"] = with_pad(target_table)
    if not one_table:
        weights["model.encoder.embed_tokens.weight"] = with_pad(source_table)
    if not tied:
        weights["head.output.weight"] = with_pad(p.matrix("ff_logit_W"))
    weights["head.output.bias"] = with_pad(p.vector("ff_logit_b"), NEVER)
    p.check_all_used()

    dictionaries = config.get("dictionaries", [None, None])
    sizes = [len(source_table) + 1, len(target_table) + 1]
    halves = []
    for index, name in enumerate(("source", "target")):
        tokens = dictionary_tokens(find_file(options, f"{name}_vocab", path, dictionaries[-1 if index else 0]))
        halves.append(side(fitted(tokens, sizes[index]), options.files.get(f"{name}_codes")))
    tokenizer = RnnSeq2SeqTokenizer(halves[0], halves[1])
    ours = RnnSeq2SeqConfig(
        source_vocab_size=None if one_table else sizes[0],
        encoder_transition_depth=transitions,
        decoder_layers=layers,
        decoder_residual=layers > 1,
        dropout=config.get("dropout_hidden") or 0.0,
        embedding_dropout=config.get("dropout_embedding") or 0.0,
        cell_type="nematus_gru" if norm else "gru",
        layer_norm=norm is not None,
        decoder_transition_depth=depth,
        tie_word_embeddings=tied,
        **shared_fields(weights, tokenizer),
    )
    notes = [
        "Ids are Nematus's up to 1, and larger by one from 2 on, where <pad> is, whose embedding starts a sentence.",
        "The source ends with the end of sentence, as in Nematus; its words are separated by spaces.",
    ]
    generation = {"num_beams": 5, "length_penalty": 0.0, "max_new_tokens": int(config.get("translation_maxlen", 200))}
    era = "Theano" if theano else "TensorFlow"
    return Converted(ours, weights, tokenizer, f"Nematus ({era})", notes, generation)


def shared_fields(weights: Mapping[str, torch.Tensor], tokenizer: RnnSeq2SeqTokenizer) -> dict[str, Any]:
    """What all these models have in common, and the sizes that the weights tell."""
    table = weights["model.decoder.embed_tokens.weight"]
    source = weights.get("model.encoder.embed_tokens.weight", table)
    keys = weights["model.decoder.wiring.attention.key_projection.weight"]
    return {
        "vocab_size": len(table),
        "embedding_size": source.size(1),
        "decoder_embedding_size": None if source.size(1) == table.size(1) else table.size(1),
        "hidden_size": weights["model.decoder.wiring.attention.query_projection.weight"].size(1),
        "encoder_hidden_size": keys.size(1) // 2,
        "attention_type": "additive",
        "attention_hidden_size": keys.size(0),
        "attention_bias": True,
        "wiring_type": "conditional",
        "bridge_type": "mean",
        "head_type": "deep_tanh",
        "head_hidden_size": weights["head.hidden.0.weight"].size(0),
        "output_dropout": 0.0,
        "pad_token_id": PAD_ID,
        "bos_token_id": None,
        "eos_token_id": 0,
        "decoder_start_token_id": PAD_ID,
        "unk_token_id": tokenizer.unk_token_id,
    }
