"""
fairseq 0.6 to 0.12 (Ott et al. 2019), models of the class `lstm`.

Reads a checkpoint `*.pt`, or `checkpoint_best.pt` (else `checkpoint_last.pt`) of a folder, and the two dictionaries,
which are looked for beside it as `dict.SOURCE.txt` and `dict.TARGET.txt`. Files: `source_vocab`, `target_vocab` (the
dictionaries, if they lie elsewhere or the languages' names are not known), and for each side one of `source_codes`,
`target_codes` (subword-nmt) and `source_sentencepiece`, `target_sentencepiece` (`.model`); without them text is what
the dictionaries have, words or pieces between spaces.

Taken: the architectures `lstm`, `lstm_wiseman_iwslt_de_en`, `lstm_luong_wmt_en_de` and any of the same parts: one or
two directions, any number of layers, with and without attention, any widths (`encoder_hidden_proj` and
`encoder_cell_proj` are the bridge `layerwise`), shared embeddings. `additional_fc`, an affine map before the output
layer with nothing between, is multiplied into it. Refused: other architectures, `adaptive_loss`, a decoder without an
encoder.

A checkpoint's options are an `argparse.Namespace` (`args`, up to 0.9; from 0.10 on inside `cfg`), which is read
without running anything. 0.10 alone also wrote objects of omegaconf, which takes `trust_pickle`; of these only the
data is used, nothing of the packages needs to be installed.

fairseq's decoder starts with the end of sentence, and so does this one. Its beam search is transformers' with
`early_stopping=True`, see `generation`; but for a hypothesis of the greatest length, to which both add an end of
sentence: fairseq with its probability, transformers' `forced_eos_token_id` as if it were certain.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..configuration_rnn_seq2seq import BridgeType, RnnSeq2SeqConfig
from ..tokenization_rnn_seq2seq import RnnSeq2SeqTokenizer
from .base import ConversionError, ConversionOptions, Converted, StandIn, check_files, read_torch
from .state_dicts import StateDict
from .vocabularies import SpecialTokens, check_tokens, make_side, read_tokens, text_backend

FILES = (
    "source_vocab", "target_vocab", "source_codes", "target_codes", "source_sentencepiece", "target_sentencepiece",
)  # fmt: skip
ARCHITECTURES = ("lstm", "lstm_wiseman_iwslt_de_en", "lstm_luong_wmt_en_de")
# A dictionary begins with these, which its file leaves out.
SPECIALS = SpecialTokens(bos="<s>", pad="<pad>", eos="</s>", unk="<unk>")
BOS, PAD, EOS, UNK = range(4)


def convert(path: Path, options: ConversionOptions) -> Converted:
    """
    Args:
        path: the checkpoint or its folder.
        options: `files` as in the module's docstring.
    """
    check_files(options, FILES)
    if path.is_dir():
        found = [path / name for name in ("checkpoint_best.pt", "checkpoint_last.pt")]
        existing = [candidate for candidate in found if candidate.is_file()]
        if not existing:
            raise ConversionError(f"There is neither {found[0].name} nor {found[1].name} in {path}; name the file.")
        path = existing[0]
    checkpoint = read_torch(path, options.trust_pickle, [argparse.Namespace], stand_ins=("omegaconf", "fairseq"))
    args = _options(checkpoint, path)
    weights = StateDict(checkpoint["model"], str(path))
    dictionaries = _dictionaries(path, args, options)
    config, converted, notes = _convert_model(weights, args, dictionaries)
    weights.finish()
    sides = [
        make_side(text_backend(side, tokens, SPECIALS, options), SPECIALS, after=("</s>",))
        for side, tokens in zip(("source", "target"), dictionaries, strict=True)
    ]
    return Converted(
        config=config,
        weights=converted,
        tokenizer=RnnSeq2SeqTokenizer(*sides),
        origin="fairseq 0.10 or newer" if checkpoint.get("cfg") is not None else "fairseq before 0.10",
        notes=[
            *notes,
            "fairseq ends a hypothesis of the greatest length with an end of sentence, and its beam search counts the "
            "probability of that end; here it counts as certain (`forced_eos_token_id`).",
        ],
        # What fairseq-generate does if nothing is said.
        generation={
            "num_beams": 5,
            "length_penalty": 1.0,
            "early_stopping": True,
            "max_new_tokens": 201,
            "forced_eos_token_id": EOS,
            "min_new_tokens": 1,
            "suppress_tokens": [PAD],
        },
    )


def _options(checkpoint: Any, path: Path) -> Mapping[str, Any]:
    """The options of the model and, where they are kept apart, the task's."""
    if not isinstance(checkpoint, Mapping) or "model" not in checkpoint:
        raise ConversionError(f"{path} is no fairseq checkpoint: it has no 'model'.")
    configuration = _plain(checkpoint.get("cfg"))
    parts = [checkpoint.get("args")]
    if parts[0] is None and configuration is not None:
        parts = [configuration.get("task"), configuration.get("model"), {"criterion": configuration.get("criterion")}]
    if all(part is None for part in parts):
        raise ConversionError(f"{path} has no options, neither 'args' nor 'cfg'.")
    args: dict[str, Any] = {}
    for part in parts:
        found = vars(part) if isinstance(part, argparse.Namespace) else part
        args.update({name: value for name, value in dict(found or {}).items() if value is not None})
    architecture = args.get("arch", args.get("_name"))
    if architecture not in ARCHITECTURES:
        raise ConversionError(
            f"`arch` {architecture!r} cannot be represented; allowed: {', '.join(ARCHITECTURES)}, and an architecture "
            "of your own made of the same class is one of these once `arch` says so."
        )
    return args


def _plain(value: Any) -> Any:
    """Objects of omegaconf, as `read_torch` leaves them, as the dicts, lists and values that they stand for."""
    if isinstance(value, StandIn):
        value = vars(value).get("_content", vars(value).get("_val"))
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _dictionaries(path: Path, args: Mapping[str, Any], options: ConversionOptions) -> list[list[str]]:
    dictionaries = []
    for side, short in (("source", "src"), ("target", "tgt")):
        file = options.files.get(f"{side}_vocab")
        if file is None:
            names = [args.get(f"{side}_lang"), short]
            candidates = [path.parent / f"dict.{name}.txt" for name in names if name]
            file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise ConversionError(
                f"There is no {side} dictionary (dict.{args.get(f'{side}_lang') or 'LANGUAGE'}.txt) beside {path}; "
                f"pass it as the file {side}_vocab."
            )
        specials = [SPECIALS.bos, SPECIALS.pad, SPECIALS.eos, SPECIALS.unk]
        dictionaries.append([*(token for token in specials if token), *read_tokens(Path(file), counts=True)])
    return dictionaries


def _convert_model(
    weights: StateDict, args: Mapping[str, Any], dictionaries: list[list[str]]
) -> tuple[RnnSeq2SeqConfig, dict[str, torch.Tensor], list[str]]:
    for name, what in (
        ("decoder.adaptive_softmax.head.weight", "`criterion` adaptive_loss: an adaptive softmax"),
        ("decoder.adaptive_softmax.head.word_proj.weight", "`criterion` adaptive_loss: an adaptive softmax"),
    ):
        if name in weights:
            raise ConversionError(f"{what} cannot be represented.")
    source_size, embedding = weights.shape("encoder.embed_tokens.weight")
    target_size, target_embedding = weights.shape("decoder.embed_tokens.weight")
    for tokens, name, size in zip(dictionaries, ("source", "target"), (source_size, target_size), strict=True):
        check_tokens(tokens, name, size)
    hidden = weights.shape("decoder.layers.0.weight_hh")[1]
    encoder_hidden = weights.shape("encoder.lstm.weight_hh_l0")[1]
    bidirectional = "encoder.lstm.weight_ih_l0_reverse" in weights
    attends = "decoder.attention.input_proj.weight" in weights
    bridge: BridgeType = "layerwise" if "decoder.encoder_hidden_proj.weight" in weights else "last"
    shared = bool(args.get("share_all_embeddings", False))
    tied = shared or bool(args.get("share_decoder_input_output_embed", False))
    config = RnnSeq2SeqConfig(
        vocab_size=target_size,
        source_vocab_size=None if shared else source_size,
        embedding_size=embedding,
        decoder_embedding_size=None if shared else target_embedding,
        hidden_size=hidden,
        encoder_hidden_size=encoder_hidden,
        encoder_layers=weights.layers("encoder.lstm.weight_ih_l{}"),
        decoder_layers=weights.layers("decoder.layers.{}.weight_ih"),
        cell_type="lstm",
        bidirectional=bidirectional,
        bridge_type=bridge,
        attention_type="general" if attends else "none",
        wiring_type="input_feeding",
        tie_word_embeddings=tied,
        dropout=float(args.get("decoder_dropout_out", args.get("dropout", 0.1))),
        embedding_dropout=float(args.get("decoder_dropout_in", args.get("dropout", 0.1))),
        output_dropout=float(args.get("decoder_dropout_out", args.get("dropout", 0.1))),
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
        unk_token_id=UNK,
        decoder_start_token_id=EOS,
    )
    new = {
        "model.encoder.embed_tokens.weight": weights.take("encoder.embed_tokens.weight"),
        "model.decoder.embed_tokens.weight": weights.take("decoder.embed_tokens.weight"),
        **weights.take_encoder("encoder.lstm", config.encoder_layers, bidirectional),
        **weights.take_decoder("decoder.layers.{layer}.{part}", config.decoder_layers),
    }
    if shared and not torch.equal(*list(new.values())[:2]):
        raise ConversionError("`share_all_embeddings` is set, but the two embedding tables differ.")
    if bridge == "layerwise":
        for index, state in enumerate(("hidden", "cell")):
            for part in ("weight", "bias"):
                new[f"model.bridge.projections.{index}.{part}"] = weights.take(f"decoder.encoder_{state}_proj.{part}")
    if attends:
        # (W q)^T m = q^T (W^T m)
        wiring, attention = "model.decoder.wiring", weights.take("decoder.attention.input_proj.weight")
        new[f"{wiring}.attention.key_projection.weight"] = attention.t().contiguous()
        new[f"{wiring}.combine.0.weight"] = weights.take("decoder.attention.output_proj.weight")
    head, notes = _convert_head(weights, tied)
    return config, {**new, **head}, notes


def _convert_head(weights: StateDict, tied: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    """W (A x + a) + b, whose A and a need not be there, as W (A x) + (W a + b) or, untied, (W A) x + (W a + b)."""
    if tied:
        table = weights.take("decoder.embed_tokens.weight")
        bias = table.new_zeros(len(table))
    else:
        table, bias = weights.take("decoder.fc_out.weight"), weights.take("decoder.fc_out.bias")
    if "decoder.additional_fc.weight" not in weights:
        return {"head.output.bias": bias} | ({} if tied else {"head.output.weight": table}), []
    first, first_bias = weights.take("decoder.additional_fc.weight"), weights.take("decoder.additional_fc.bias")
    head = {"head.output.bias": (table.double() @ first_bias.double() + bias.double()).float()}
    if tied:
        return {**head, "head.projection.weight": first}, []
    note = "The original's `additional_fc` is multiplied into the output layer."
    return {**head, "head.output.weight": (table.double() @ first.double()).float()}, [note]
