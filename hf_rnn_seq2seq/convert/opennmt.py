"""OpenNMT-py 1.x to 3.x (Klein et al. 2017), recurrent models.

Reads a checkpoint `*.pt`, and for `save_format: safetensors` the `.safetensors` file beside it. Options and
vocabularies are inside.

Taken: `encoder_type` rnn and brnn, `rnn_type` LSTM and GRU, any number of layers, `bridge`; `global_attention` dot,
general, mlp and none, with softmax or sparsemax; `input_feed` 0 and 1; `share_embeddings`, `share_decoder_embeddings`.
Of `copy_attn` only what can be represented: with `reuse_copy_attn` and `global_attention` mlp, where the decoder's
output is affine in context and state, so that the copy gate, which reads this output, is one that reads the two. Of
`coverage_attn` the weight is left out: none of these versions of OpenNMT-py hands the coverage to its attention (it
serves the coverage loss alone).

Refused: other encoders and decoders, SRU, source features, context gates, position encodings, any other copy
attention, LoRA and quantised layers.

Text is what the original reads: words between spaces. Further files say how it makes them from plain text, for each
side one of `source_codes`, `target_codes` (subword-nmt) and `source_sentencepiece`, `target_sentencepiece` (`.model`).

A checkpoint of 3.x is read without running anything. One of 1.x or 2.x pickles objects of torchtext and OpenNMT-py
around its vocabularies, which takes `trust_pickle`; of these classes only the data is used, nothing of the packages
needs to be installed.

Beam search is the original's (`opennmt_length_penalty`; see `OpennmtSearch`), with the settings that its translate.py
has by default, but for `max_length_ratio` of 3.x, which bounds the output by the length of the source.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from ..configuration_rnn_seq2seq import AttentionType, RnnSeq2SeqConfig
from ..tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from .base import NEVER, ConversionError, ConversionOptions, Converted, StandIn, check_files, read_torch
from .state_dicts import StateDict
from .vocabularies import SpecialTokens, check_tokens, make_side, text_backend

UNK, PAD, BOS, EOS = "<unk>", "<blank>", "<s>", "</s>"
FILES = ("source_codes", "target_codes", "source_sentencepiece", "target_sentencepiece")

# What an option may be, where that is not anything; the first is its default.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "model_type": ("text",),
    "model_task": ("seq2seq",),
    "encoder_type": ("rnn", "brnn"),
    "decoder_type": ("rnn",),
    "rnn_type": ("LSTM", "GRU"),
    "global_attention": ("general", "dot", "mlp", "none", None),
    "global_attention_function": ("softmax", "sparsemax"),
    "context_gate": (None,),
    "position_encoding": (False,),
    "n_src_feats": (0,),
    "lora_layers": ([],),
    "lora_embedding": (False,),
    "quant_layers": ([],),
}
COVERAGE = "decoder.attn.linear_cover.weight"
SIDES = ("encoder", "decoder")
TABLE = "embeddings.make_embedding.emb_luts.0.weight"  # a side's embeddings, after `encoder.` and `decoder.`
ATTENTIONS: dict[str | None, AttentionType] = {
    "general": "general",
    "dot": "dot",
    "mlp": "additive",
    "none": "none",
    None: "none",
}


def convert(path: Path, options: ConversionOptions) -> Converted:
    """
    Args:
        path: the checkpoint.
        options: `files` may hold `source_codes`, `target_codes`, `source_sentencepiece`, `target_sentencepiece`.
    """
    check_files(options, FILES)
    checkpoint = read_torch(path, options.trust_pickle, [argparse.Namespace], stand_ins=("onmt", "torchtext"))
    if not isinstance(checkpoint, Mapping) or not {"opt", "vocab"} <= checkpoint.keys():
        raise ConversionError(f"{path} is no OpenNMT-py checkpoint: it has no 'opt' and 'vocab'.")
    model = _Model(StateDict(_weights(path, checkpoint), path.name), checkpoint["opt"])
    vocabulary = checkpoint["vocab"]
    plain = isinstance(vocabulary, Mapping) and isinstance(vocabulary.get("src"), list)
    if plain and "src_feats" in vocabulary:
        raise ConversionError("Source features (`n_src_feats`) cannot be represented.")
    tokens = {side: _tokens(vocabulary, side) for side in ("src", "tgt")}
    config = model.config(tokens)
    start = vocabulary.get("decoder_start_token", BOS) if plain else BOS
    if start not in tokens["tgt"]:
        raise ConversionError(f"`decoder_start_token` {start!r} is not in the target vocabulary.")
    config.decoder_start_token_id = tokens["tgt"].index(start)
    notes = [
        "Dropout of the decoder's output also falls on what is fed back in the original, here it does not; this is "
        "about further training alone.",
    ]
    transforms = [name for name in model.option("transforms", []) if name not in ("filtertoolong", "prefix", "suffix")]
    if transforms and not options.files:
        notes.append(
            f"The original was trained on text after its transforms {', '.join(transforms)}; so is its input."
        )
    return Converted(
        config=config,
        weights=model.converted(config),
        tokenizer=_tokenizer(tokens, options, model.copies, spaces_only=plain),
        origin="OpenNMT-py 3" if plain else "OpenNMT-py 1 or 2",
        notes=notes,
        # What translate.py does if nothing is said.
        generation={
            "num_beams": 5,
            "opennmt_length_penalty": 1.0 if plain else 0.0,
            "max_new_tokens": 250 if plain else 100,
        },
    )


def _weights(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All of the model's weights by their names; the generator's as `generator.weight`, ... in every version."""
    if "model" not in checkpoint:
        beside = path.with_suffix(".safetensors")
        if not beside.is_file():
            raise ConversionError(f"{path} holds no weights, and {beside.name} is not beside it.")
        return load_file(beside)
    if not checkpoint.get("generator"):
        raise ConversionError(f"{path} has no generator (a LoRA checkpoint holds differences alone).")
    generator = {f"generator.{name.removeprefix('0.')}": value for name, value in checkpoint["generator"].items()}
    return {**checkpoint["model"], **generator}


def _tokens(vocabulary: Any, side: str) -> list[str]:
    """A side's tokens in the order of their ids, whatever version wrote them."""
    if not isinstance(vocabulary, Mapping):
        vocabulary = dict(vocabulary)  # of the first versions: pairs
    found = vocabulary.get(side)
    if isinstance(found, StandIn) and hasattr(found, "fields"):  # a TextMultiField: words, then features
        if len(found.fields) > 1:
            raise ConversionError(f"Features of words ({found.fields[1][0]!r}) cannot be represented.")
        found = found.fields[0][1]
    found = getattr(found, "vocab", found)  # a torchtext Field's
    tokens = getattr(found, "itos", found)  # a torchtext Vocab's
    if not isinstance(tokens, list):
        raise ConversionError(
            f"The checkpoint's {side!r} vocabulary is a {type(found).__name__}, not a list of tokens."
        )
    return tokens


class _Model:
    """The original's weights and options."""

    def __init__(self, weights: StateDict, opt: Any):
        self.weights, self.opt = weights, opt
        for name, allowed in ALLOWED.items():
            value = self.option(name, allowed[0])
            if value not in allowed:
                raise ConversionError(
                    f"`{name}` {value!r} cannot be represented; allowed: {', '.join(map(repr, allowed))}."
                )
        if any(".emb_luts.1." in name for name in weights.left):
            raise ConversionError("Features of words (a second embedding table) cannot be represented.")
        self.attention = self.option("global_attention", "general")
        self.copies = bool(self.option("copy_attn", False))
        self.feeds = bool(self.option("input_feed", 1))
        # With input feeding a list of cells, else one torch LSTM or GRU.
        self.decoder_layer = "decoder.rnn.layers.{layer}.{part}" if self.feeds else "decoder.rnn.{part}_l{layer}"
        if self.copies and (not self.option("reuse_copy_attn", False) or self.attention != "mlp"):
            raise ConversionError(
                "`copy_attn` can be represented with `reuse_copy_attn` and `global_attention` mlp only; here they are "
                f"{self.option('reuse_copy_attn', False)!r} and {self.attention!r}. A pointer_generator copies by the "
                "decoder's one attention, and its gate is a sigmoid of a linear map of context, state and input; "
                "OpenNMT-py's gate is one of the decoder's output, which has a tanh inside unless attention is mlp."
            )

    def option(self, name: str, default: Any) -> Any:
        return getattr(self.opt, name, default)

    def config(self, tokens: Mapping[str, list[str]]) -> RnnSeq2SeqConfig:
        shape = self.weights.shape
        (sources, source_width), (targets, target_width) = (shape(f"{side}.{TABLE}") for side in SIDES)
        check_tokens(tokens["src"], "source", sources)
        check_tokens(tokens["tgt"], "target", targets)
        shared = bool(self.option("share_embeddings", False))
        if shared and tokens["src"] != tokens["tgt"]:
            raise ConversionError("`share_embeddings` is set, but the two vocabularies differ.")
        dropout = self.option("dropout", 0.3)
        dropout = float(dropout[0] if isinstance(dropout, list) else dropout)
        ids = {name: tokens["tgt"].index(name) for name in (UNK, PAD, BOS, EOS) if name in tokens["tgt"]}
        if len(ids) < 4:
            raise ConversionError(f"The target vocabulary lacks one of {UNK}, {PAD}, {BOS}, {EOS}.")
        return RnnSeq2SeqConfig(
            vocab_size=len(tokens["tgt"]),
            source_vocab_size=None if shared else len(tokens["src"]),
            embedding_size=source_width,
            decoder_embedding_size=None if shared else target_width,
            hidden_size=shape(self.decoder_layer.format(part="weight_hh", layer=0))[1],
            encoder_hidden_size=shape("encoder.rnn.weight_hh_l0")[1],
            encoder_layers=self.weights.layers("encoder.rnn.weight_hh_l{}"),
            decoder_layers=self.weights.layers(self.decoder_layer.format(part="weight_hh", layer="{}")),
            cell_type="lstm" if self.option("rnn_type", "LSTM") == "LSTM" else "gru",
            bidirectional="encoder.rnn.weight_ih_l0_reverse" in self.weights,
            bridge_type="dense" if self.option("bridge", False) else "last",
            attention_type=ATTENTIONS[self.attention],
            attention_bias=self.attention == "mlp",
            attention_normalizer="softmax"
            if ATTENTIONS[self.attention] == "none"
            else self.option("global_attention_function", "softmax"),
            wiring_type="input_feeding" if self.feeds else "output_only",
            readout_type="affine" if self.attention == "mlp" else "tanh",
            head_type="pointer_generator" if self.copies else "linear",
            tie_word_embeddings=bool(self.option("share_decoder_embeddings", False)),
            dropout=dropout,
            embedding_dropout=dropout,
            output_dropout=dropout,
            pad_token_id=ids[PAD],
            bos_token_id=ids[BOS],
            eos_token_id=ids[EOS],
            decoder_start_token_id=ids[BOS],
            unk_token_id=ids[UNK],
        )

    def converted(self, config: RnnSeq2SeqConfig) -> dict[str, torch.Tensor]:
        """Our names and weights. Raises [`ConversionError`] if one of the original's is left over."""
        take = self.weights.take
        new = {f"model.{side}.embed_tokens.weight": take(f"{side}.{TABLE}") for side in SIDES}
        if config.shared_vocabulary and not torch.equal(*new.values()):
            raise ConversionError("`share_embeddings` is set, but the two embedding tables differ.")
        new.update(self.weights.take_encoder("encoder.rnn", config.encoder_layers, config.bidirectional))
        new.update(self.weights.take_decoder(self.decoder_layer, config.decoder_layers))
        if config.bridge_type == "dense":
            new.update(self.bridge(config))
        if config.attention_type != "none":
            new.update(self.attention_weights())
            if COVERAGE in self.weights:
                take(COVERAGE)
        generator = "generator.linear" if self.copies else "generator"
        new["head.output.weight"] = take(f"{generator}.weight")
        new["head.output.bias"] = take(f"{generator}.bias")
        if self.copies:
            weight, bias = (new[f"model.decoder.wiring.combine.0.{part}"] for part in ("weight", "bias"))
            new.update(self.gate(weight, bias, config.target_embedding_size))
            assert config.pad_token_id is not None
            new["head.output.bias"][config.pad_token_id] = NEVER  # minus infinity there
        self.weights.finish()
        return new

    def bridge(self, config: RnnSeq2SeqConfig) -> dict[str, torch.Tensor]:
        """
        relu(W f + b). With two directions the original reshapes [2 * layers * h] to two rows of [layers * h], which
        go through the same W: one map of both with W twice on its diagonal.
        """
        take = self.weights.take
        rows = config.decoder_layers * config.hidden_size
        new = {}
        for state in range(config.encoder_cells):
            times = 1 + config.bidirectional
            weight, bias = take(f"encoder.bridge.{state}.weight"), take(f"encoder.bridge.{state}.bias")
            new[f"model.bridge.projections.{state}.weight"] = torch.block_diag(*[weight] * times)[:rows]
            new[f"model.bridge.projections.{state}.bias"] = bias.repeat(times)[:rows]
        return new

    def attention_weights(self) -> dict[str, torch.Tensor]:
        take = self.weights.take
        ours, theirs = "model.decoder.wiring.attention", "decoder.attn"
        new = {"model.decoder.wiring.combine.0.weight": take(f"{theirs}.linear_out.weight")}
        if self.attention == "general":  # (W q)^T m = q^T (W^T m)
            new[f"{ours}.key_projection.weight"] = take(f"{theirs}.linear_in.weight").t().contiguous()
        elif self.attention == "mlp":
            new["model.decoder.wiring.combine.0.bias"] = take(f"{theirs}.linear_out.bias")
            new[f"{ours}.query_projection.weight"] = take(f"{theirs}.linear_query.weight")
            new[f"{ours}.key_projection.weight"] = take(f"{theirs}.linear_context.weight")
            new[f"{ours}.key_projection.bias"] = take(f"{theirs}.linear_query.bias")
            new[f"{ours}.score_projection.weight"] = take(f"{theirs}.v.weight")
        return new

    def gate(self, combine: torch.Tensor, bias: torch.Tensor, width: int) -> dict[str, torch.Tensor]:
        """
        The original copies with sigmoid(w (W [c; s] + b) + b'), and we generate with sigmoid(u [c; s; x] + d): so
        u = [-w W, 0] and d = -(w b + b'). `width` is x's.
        """
        take = self.weights.take
        w, b = take("generator.linear_copy.weight"), take("generator.linear_copy.bias")
        return {
            "head.gate.weight": torch.cat((-w @ combine, w.new_zeros(1, width)), dim=1),
            "head.gate.bias": -(w @ bias + b),
        }


def _tokenizer(
    tokens: Mapping[str, list[str]], options: ConversionOptions, copies: bool, spaces_only: bool
) -> RnnSeq2SeqTokenizer:
    def side(name: str, key: str, ends: bool) -> PreTrainedTokenizerFast:
        own = tokens[key]
        # The source of 1.x and 2.x has no begin and end.
        specials = SpecialTokens(pad=PAD, bos=BOS if BOS in own else None, eos=EOS if EOS in own else None, unk=UNK)
        backend = text_backend(name, own, specials, options, spaces_only)
        return make_side(backend, specials, after=(EOS,) if ends else ())

    source, target = side("source", "src", ends=False), side("target", "tgt", ends=True)
    try:
        return RnnSeq2SeqTokenizer(source, target, copies_source=copies)
    except ValueError as error:
        raise ConversionError(f"The two vocabularies do not go together: {error}.") from error
