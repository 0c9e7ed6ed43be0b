"""
JoeyNMT 1.x to 2.x (Kreutzer et al. 2019), recurrent models.

Reads a model folder as `joeynmt train` leaves it: `config.yaml`, `best.ckpt` (else `latest.ckpt`), `src_vocab.txt`,
`trg_vocab.txt`, and the codes or SentencePiece models that the configuration names. Instead of the folder a `.ckpt`
may be given; the others are then looked for beside it. Files: `config`, `source_vocab`, `target_vocab`, and for each
side one of `source_codes`, `target_codes` (subword-nmt) and `source_sentencepiece`, `target_sentencepiece` (`.model`),
where they lie elsewhere.

Taken: LSTM and GRU, any number of layers, `attention` bahdanau and luong, `input_feeding` on and off, `init_hidden`
bridge, last and zero, `tied_embeddings`, `tied_softmax`; the embeddings' `scale` is multiplied into them (an output
layer that was tied to scaled embeddings then has a table of its own). `att_vector_layer` is `readout_type`
"affine_tanh"; the same first state for all layers, and for h and c of an LSTM, is the bridge "linear" or "affine" with
repeated rows. Text: levels word, char and bpe, `lowercase`, `normalize`.

Refused: transformers, an encoder in one direction (which JoeyNMT can build, but not run), other `activation`s than
tanh, `pretokenizer: moses`.

JoeyNMT's beam search is `joeynmt_length_penalty` of generate(), see `JoeynmtSearch`.
"""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from ..configuration_rnn_seq2seq import BridgeType, RnnSeq2SeqConfig
from ..tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from .base import ConversionError, ConversionOptions, Converted, check_files, read_torch
from .state_dicts import StateDict
from .vocabularies import (
    NORMAL,
    SPACE_MARK,
    UNIGRAM,
    SpecialTokens,
    character_backend,
    check_tokens,
    cutting_files,
    make_side,
    read_tokens,
    sentencepiece_backend,
    subword_nmt_backend,
    whitespace_backend,
)

FILES = (
    "config", "source_vocab", "target_vocab", "source_codes", "target_codes", "source_sentencepiece",
    "target_sentencepiece",
)  # fmt: skip
BRIDGES: dict[str, BridgeType] = {"bridge": "linear", "last": "affine"}  # anything else is zeros
SIDES = {"source": "src", "target": "trg"}
# Where nothing is said about the greatest length JoeyNMT takes one and a half times the longest source of a batch.
LENGTH_RATIO = 1.5

# A kind of pieces in a SentencePiece model.
UNUSED = 5

Settings = Mapping[str, Any]


def convert(path: Path, options: ConversionOptions) -> Converted:
    """
    Args:
        path: the model folder or a checkpoint.
        options: `files` as in the module's docstring.
    """
    check_files(options, FILES)
    folder = path if path.is_dir() else path.parent
    settings = _read_settings(Path(options.files.get("config", folder / "config.yaml")))
    data, testing = settings.get("data", {}), settings.get("testing", {})
    checkpoint = read_torch(_checkpoint(path), options.trust_pickle)
    if not isinstance(checkpoint, Mapping) or "model_state" not in checkpoint:
        raise ConversionError(f"{path} is no JoeyNMT checkpoint: it has no 'model_state'.")
    symbols = _Symbols(data.get("special_symbols", {}))
    vocabularies = {
        side: symbols.complete(read_tokens(_existing(options, f"{side}_vocab", folder / f"{short}_vocab.txt")))
        for side, short in SIDES.items()
    }
    notes = [
        "Further training drops other things out than JoeyNMT's: features before the output layer, where that drops "
        "what they are made of (`hidden_dropout`), and embeddings without what is fed back."
    ]
    weights = StateDict(checkpoint["model_state"], str(path))
    config, converted = _convert_model(weights, settings["model"], vocabularies, symbols)
    weights.finish()
    sides = [_side(side, tokens, symbols, data, options, folder, notes) for side, tokens in vocabularies.items()]
    return Converted(
        config=config,
        weights=converted,
        tokenizer=RnnSeq2SeqTokenizer(*sides),
        origin=f"JoeyNMT {settings['joeynmt_version']}" if "joeynmt_version" in settings else "JoeyNMT",
        notes=notes,
        generation=_generation(testing, data, symbols, vocabularies["target"], notes),
    )


class _Symbols:
    """Special symbols: their spelling and ids, which every vocabulary has, and what stands behind them."""

    def __init__(self, settings: Settings):
        self.ids = {
            name: int(settings.get(f"{name}_id", default))
            for name, default in (("unk", 0), ("pad", 1), ("bos", 2), ("eos", 3))
        }
        self.tokens = {
            name: str(settings.get(f"{name}_token", default))
            for name, default in (("unk", "<unk>"), ("pad", "<pad>"), ("bos", "<s>"), ("eos", "</s>"))
        }
        separator = settings.get("sep_token")
        self.others = [*([separator] if separator else []), *(settings.get("lang_tags") or [])]
        self.special = SpecialTokens(**self.tokens)

    def complete(self, tokens: list[str]) -> list[str]:
        """A vocabulary file's tokens as JoeyNMT loads them."""
        found = list(dict.fromkeys([*self.tokens.values(), *self.others, *tokens]))
        for name, index in self.ids.items():
            if index >= len(found) or found[index] != self.tokens[name]:
                raise ConversionError(
                    f"`special_symbols` puts {name} {self.tokens[name]!r} at {index}, where the vocabulary has "
                    f"{found[index] if index < len(found) else None!r}."
                )
        return found


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConversionError(f"There is no configuration {path}; pass it as the file 'config'.")
    import yaml

    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not {"encoder", "decoder"} <= (settings.get("model") or {}).keys():
        raise ConversionError(f"{path} is no JoeyNMT configuration: it has no `model` with `encoder` and `decoder`.")
    return settings


def _checkpoint(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("best.ckpt", "latest.ckpt"):
        if (path / name).is_file():
            return path / name
    raise ConversionError(f"There is neither best.ckpt nor latest.ckpt in {path}; name the checkpoint itself.")


def _existing(options: ConversionOptions, name: str, *places: Path) -> Path:
    """The file that the user gave, else the first of `places` that is there."""
    given = options.files.get(name)
    found = Path(given) if given is not None else next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConversionError(f"There is no {' or '.join(map(str, places))}; pass it as the file {name!r}.")
    return found


def _convert_model(
    weights: StateDict, model: Settings, vocabularies: Mapping[str, list[str]], symbols: _Symbols
) -> tuple[RnnSeq2SeqConfig, dict[str, torch.Tensor]]:
    encoder, decoder = model["encoder"], model["decoder"]
    for side, part in (("encoder", encoder), ("decoder", decoder)):
        if part.get("type") == "transformer" or f"{side}.rnn.weight_hh_l0" not in weights:
            raise ConversionError(f"`{side}.type` {part.get('type')!r} cannot be represented; allowed: 'recurrent'.")
    if "encoder.rnn.weight_hh_l0_reverse" not in weights:
        raise ConversionError("`encoder.bidirectional` False cannot be represented; JoeyNMT itself cannot run it.")
    activation = decoder.get("activation", "tanh")
    if activation != "tanh":
        raise ConversionError(f"`decoder.activation` {activation!r} cannot be represented; allowed: 'tanh'.")
    embedding = weights.shape("src_embed.lut.weight")
    target_embedding = weights.shape("trg_embed.lut.weight")
    for name, size in (("source", embedding[0]), ("target", target_embedding[0])):
        check_tokens(vocabularies[name], name, size)
    hidden = weights.shape("decoder.rnn.weight_hh_l0")[1]
    shared = bool(model.get("tied_embeddings", False))
    scaled = {side: bool(model[side]["embeddings"].get("scale", False)) for side in ("encoder", "decoder")}
    if shared:
        scaled["decoder"] = scaled["encoder"]
    tied = bool(model.get("tied_softmax", False)) and not scaled["decoder"]
    embedding_dropout = decoder["embeddings"].get("dropout", decoder.get("dropout", 0.0))
    config = RnnSeq2SeqConfig(
        vocab_size=target_embedding[0],
        source_vocab_size=None if shared else embedding[0],
        embedding_size=embedding[1],
        decoder_embedding_size=None if shared else target_embedding[1],
        hidden_size=hidden,
        encoder_hidden_size=weights.shape("encoder.rnn.weight_hh_l0")[1],
        encoder_layers=weights.layers("encoder.rnn.weight_ih_l{}"),
        decoder_layers=weights.layers("decoder.rnn.weight_ih_l{}"),
        cell_type=_cell(weights, "encoder"),
        decoder_cell_type=_cell(weights, "decoder"),
        bridge_type=BRIDGES.get(decoder.get("init_hidden", "bridge"), "zeros"),
        attention_type="additive" if "decoder.attention.query_layer.weight" in weights else "general",
        wiring_type="input_feeding" if decoder.get("input_feeding", True) else "output_only",
        readout_type="affine_tanh",
        tie_word_embeddings=tied,
        dropout=float(decoder.get("dropout", 0.0)),
        embedding_dropout=float(embedding_dropout),
        output_dropout=float(decoder.get("hidden_dropout", 0.0)),
        unk_token_id=symbols.ids["unk"],
        pad_token_id=symbols.ids["pad"],
        bos_token_id=symbols.ids["bos"],
        eos_token_id=symbols.ids["eos"],
        decoder_start_token_id=symbols.ids["bos"],
    )
    tables = {
        side: weights.take(f"{name}_embed.lut.weight") * (math.sqrt(size) if scaled[side] else 1.0)
        for side, name, size in (("encoder", "src", embedding[1]), ("decoder", "trg", target_embedding[1]))
    }
    if shared and not torch.equal(tables["encoder"], tables["decoder"]):
        raise ConversionError("`tied_embeddings` is set, but the two embedding tables differ.")
    new = {
        **{f"model.{side}.embed_tokens.weight": table for side, table in tables.items()},
        **weights.take_encoder("encoder.rnn", config.encoder_layers, bidirectional=True),
        **weights.take_decoder("decoder.rnn.{part}_l{layer}", config.decoder_layers),
        **_convert_bridge(weights, config),
        **_convert_attention(weights, config),
        "head.output.bias": torch.zeros(target_embedding[0]),
    }
    output = weights.take("decoder.output_layer.weight")
    if not tied:
        new["head.output.weight"] = output
    elif not torch.equal(output, tables["decoder"]):
        raise ConversionError("`tied_softmax` is set, but the output layer is not the target embedding.")
    return config, new


def _cell(weights: StateDict, side: str) -> Any:
    """By the number of gates."""
    rows, width = weights.shape(f"{side}.rnn.weight_hh_l0")
    return {3: "gru", 4: "lstm"}[rows // width]


def _convert_bridge(weights: StateDict, config: RnnSeq2SeqConfig) -> dict[str, torch.Tensor]:
    """All layers, and h and c of an LSTM, start the same: with repeated rows."""
    times = config.decoder_layers * (2 if config.decoder_cell == "lstm" else 1)
    if config.bridge_type == "zeros":
        return {}
    if config.bridge_type == "linear":
        weight, bias = weights.take("decoder.bridge_layer.weight"), weights.take("decoder.bridge_layer.bias")
    else:  # the top layer's final h: of both directions, or where that is too wide of the forward one
        weight, bias = torch.eye(config.hidden_size, config.memory_size), torch.zeros(config.hidden_size)
        if config.memory_size not in (config.hidden_size, 2 * config.hidden_size):
            raise ConversionError(
                f"`init_hidden: last` needs an encoder as wide as the decoder or twice so: {config.memory_size} and "
                f"{config.hidden_size}."
            )
    return {
        "model.bridge.projection.weight": weight.repeat(times, 1),
        "model.bridge.projection.bias": bias.repeat(times),
    }


def _convert_attention(weights: StateDict, config: RnnSeq2SeqConfig) -> dict[str, torch.Tensor]:
    wiring, theirs = "model.decoder.wiring", "decoder.attention"
    new = {f"{wiring}.attention.key_projection.weight": weights.take(f"{theirs}.key_layer.weight")}
    if config.attention_type == "additive":
        new[f"{wiring}.attention.query_projection.weight"] = weights.take(f"{theirs}.query_layer.weight")
        new[f"{wiring}.attention.score_projection.weight"] = weights.take(f"{theirs}.energy_layer.weight")
    # [s; c] there, [c; s] here
    combine = weights.take("decoder.att_vector_layer.weight")
    new[f"{wiring}.combine.0.weight"] = combine.roll(config.memory_size, dims=1)
    new[f"{wiring}.combine.0.bias"] = weights.take("decoder.att_vector_layer.bias")
    return new


def _generation(
    testing: Settings, data: Settings, symbols: _Symbols, target: list[str], notes: list[str]
) -> dict[str, Any]:
    """What `joeynmt test` does with this configuration."""
    never = [symbols.tokens["bos"], symbols.tokens["pad"], *symbols.others]
    if not testing.get("generate_unk", True):
        never.append(symbols.tokens["unk"])
    length = int(testing.get("max_output_length") or -1)
    if length < 0:
        longest = data.get("max_sent_length") or _of_side(data, "source").get("max_length") or 100
        length = math.ceil(LENGTH_RATIO * int(longest))
        notes.append(
            f"JoeyNMT's outputs are at most {LENGTH_RATIO} times as long as the longest source of a batch; here "
            f"`max_new_tokens` is {length}."
        )
    for name in ("repetition_penalty", "no_repeat_ngram_size"):
        if testing.get(name, -1) > 0:
            notes.append(
                f"`{name}` {testing[name]} of JoeyNMT's beam search, which leaves special tokens out, is not set."
            )
    return {
        "num_beams": int(testing.get("beam_size", 1)),
        "joeynmt_length_penalty": max(float(testing.get("alpha", testing.get("beam_alpha", -1))), 0.0),
        "max_new_tokens": length,
        "min_new_tokens": int(testing.get("min_output_length", 1)),
        "suppress_tokens": sorted(target.index(token) for token in never if token in target),
    }


def _of_side(data: Settings, side: str) -> Settings:
    """What the configuration says about a side's text: in 2.x for each side, in 1.x for both."""
    found = data.get(SIDES[side])
    if isinstance(found, Mapping):
        return found
    level = data.get("level", "word")
    return {**data, "level": "word" if level == "bpe" else level}  # 1.x reads pieces of words that were cut before


def _side(
    side: str,
    tokens: list[str],
    symbols: _Symbols,
    data: Settings,
    options: ConversionOptions,
    folder: Path,
    notes: list[str],
) -> PreTrainedTokenizerFast:
    text = _of_side(data, side)
    cutting = text.get("tokenizer_cfg") or {}
    if str(cutting.get("pretokenizer", "none")).lower() != "none":
        raise ConversionError(
            f"`pretokenizer` {cutting['pretokenizer']!r} of the {side} side cannot be represented. Give a `config` "
            "without it; the model then takes text that this pretokenizer has cut."
        )
    codes, pieces = cutting_files(side, options)
    level = text.get("level", "word")
    if level == "bpe" and codes is None and pieces is None:
        kind = text.get("tokenizer_type", text.get("bpe_type", "sentencepiece"))
        name, key = ("codes", "codes") if kind == "subword-nmt" else ("sentencepiece", "model_file")
        if key not in cutting:
            raise ConversionError(f"The {side} side is cut by {kind}; pass the file {side}_{name!r}.")
        named = Path(cutting[key])
        found = _existing(options, f"{side}_{name}", folder / named.name, named)
        codes, pieces = (found, None) if name == "codes" else (None, found)
    backend: Tokenizer
    if codes is not None:
        backend = subword_nmt_backend(tokens, codes, symbols.special, cutting.get("separator", "@@"))
        _note_unknown_pieces(side, backend, tokens, notes)
    elif pieces is not None:
        with tempfile.TemporaryDirectory() as place:
            backend = sentencepiece_backend(tokens, _restricted(pieces, tokens, Path(place)), symbols.special)
        _note_unknown_pieces(side, backend, tokens, notes)
    elif level == "char":
        backend = character_backend(tokens, symbols.special.unk, space=SPACE_MARK)
    else:
        backend = whitespace_backend(tokens, symbols.special.unk, spaces_only=True)
    if text.get("normalize", False):
        _normalize(backend)
        notes.append(
            f"JoeyNMT takes spaces before ?!,.: out of its output (`normalize` of the {side} side); here not."
        )
    return make_side(
        backend,
        symbols.special,
        after=(symbols.tokens["eos"],),
        lowercase=bool(text.get("lowercase", False)),
        unicode_normalization="NFKC" if text.get("normalize", False) else None,
    )


def _restricted(model: Path, tokens: list[str], place: Path) -> Path:
    """
    A SentencePiece model that cuts text into no longer piece than the vocabulary has, as JoeyNMT tells it to
    (`SetVocabulary`). One of type bpe would have to cut such pieces again, and is left as it is.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(model.read_bytes())
    except Exception:  # the error is `sentencepiece_backend`'s
        return model
    if proto.trainer_spec.model_type != UNIGRAM:
        return model
    known = set(tokens)
    for piece in proto.pieces:
        if piece.type == NORMAL and len(piece.piece) > 1 and piece.piece not in known:
            piece.type = UNUSED
    path = place / model.name
    path.write_bytes(proto.SerializeToString())
    return path


def _note_unknown_pieces(side: str, backend: Tokenizer, tokens: list[str], notes: list[str]) -> None:
    extra = backend.get_vocab_size() - len(tokens)
    if extra:
        notes.append(
            f"JoeyNMT cuts a piece of a word that its vocabulary lacks into smaller ones; here each of {extra} such "
            f"pieces of the {side} side is unknown."
        )


def _normalize(backend: Tokenizer) -> None:
    """`unicode_normalize` after NFKC, and `remove_extra_spaces`."""
    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(before, after) for before, after in (("’", "'"), ("“", '"'), ("”", '"'), ("\u200b", ""))
    ]
    steps += [normalizers.Replace(Regex("[ \u3000]+"), " "), normalizers.Replace(Regex(" (?=[?!,.:])"), "")]
    steps.append(normalizers.Strip())
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
