"""Every field does something; every value has its class; impossible settings are refused by name."""

import dataclasses
import typing
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from models import (
    AXES,
    CONFIGURATIONS,
    IMPOSSIBLE_PAIRS,
    VOCABULARY,
    flat,
    name_of,
    ragged_batch,
    tiny_config,
    tiny_model,
)
from transformers import AutoConfig, PreTrainedConfig

from hf_rnn_seq2seq import RnnSeq2SeqConfig
from hf_rnn_seq2seq import configuration_rnn_seq2seq as configuration
from hf_rnn_seq2seq.attention import ATTENTIONS
from hf_rnn_seq2seq.bridges import BRIDGES
from hf_rnn_seq2seq.encoders import ENCODERS
from hf_rnn_seq2seq.heads import HEADS
from hf_rnn_seq2seq.normalizers import NORMALIZERS
from hf_rnn_seq2seq.recurrent_layers import CELLS
from hf_rnn_seq2seq.wirings import WIRINGS


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (configuration.CellType, CELLS),
        (configuration.EncoderType, ENCODERS),
        (configuration.BridgeType, BRIDGES),
        (configuration.AttentionType, ATTENTIONS),
        (configuration.WiringType, WIRINGS),
        (configuration.HeadType, HEADS),
        (configuration.NormalizerType, NORMALIZERS),
    ],
)
def test_every_value_has_its_class(values: Any, classes: dict[str, type]) -> None:
    assert list(typing.get_args(values)) == list(classes)


# Field: (a base that makes it matter, two values whose outputs differ).
CHANGES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "vocab_size": ({}, 13, 14),
    "source_vocab_size": ({}, None, 13),
    "embedding_size": ({}, 6, 7),
    "decoder_embedding_size": ({"source_vocab_size": 13}, 6, 7),
    "hidden_size": ({"encoder_hidden_size": 4}, 8, 10),
    "encoder_hidden_size": ({}, 4, 5),
    "encoder_layers": ({}, 1, 2),
    "decoder_layers": ({}, 1, 2),
    "cell_type": ({}, "lstm", "gru"),
    "decoder_cell_type": ({}, None, "rnn_tanh"),
    "bidirectional": ({"encoder_hidden_size": 4}, True, False),
    "encoder_residual": ({"encoder_layers": 2}, False, True),
    "encoder_transition_depth": ({}, 1, 2),
    "decoder_residual": ({"decoder_layers": 2}, False, True),
    "bridge_type": ({}, "linear", "mean"),
    "attention_type": ({}, "dot", "scaled_dot"),
    "attention_hidden_size": ({}, 8, 9),
    "wiring_type": ({}, "input_feeding", "bahdanau"),
    "readout_type": ({}, "tanh", "affine"),
    "encoder_type": ({"encoder_layers": 2}, "rnn", "gnmt"),
    "reverse_source": ({}, False, True),
    "residual_start": ({"encoder_layers": 3, "encoder_residual": True}, 2, 3),
    "encoder_heads": ({"encoder_type": "transformer"}, 2, 4),
    "encoder_ffn_size": ({"encoder_type": "transformer"}, 10, 12),
    "encoder_kernel_size": ({"encoder_type": "conv"}, 3, 5),
    "max_source_positions": ({"encoder_type": "conv"}, 16, 17),
    "attention_scoring": ({"attention_type": "local_p"}, "dot", "general"),
    "attention_normalizer": ({}, "softmax", "sparsemax"),
    "attention_heads": ({"attention_type": "multi_head"}, 1, 2),
    "attention_bias": ({}, False, True),
    "attention_coverage": ({}, False, True),
    "layer_norm": ({}, False, True),
    "attention_window": ({"attention_type": "local_m"}, 1, 2),
    "location_filters": ({"attention_type": "location"}, 2, 3),
    "location_kernel_size": ({"attention_type": "location"}, 3, 5),
    "monotonic_bias": ({"attention_type": "monotonic"}, -1, 0),
    "monotonic_noise": ({"attention_type": "monotonic"}, 0, 1),
    "decoder_self_attention": ({}, False, True),
    "decoder_transition_depth": ({"wiring_type": "conditional"}, 2, 3),
    "head_type": ({}, "linear", "deep"),
    "head_hidden_size": ({"head_type": "deep"}, 8, 9),
    "output_normalizer": ({}, "softmax", "sparsemax"),
    "coverage_loss_weight": ({}, 0, 1),
    "initializer_range": ({}, 0.1, 0.2),
    "tie_word_embeddings": ({}, False, True),
    # in training mode
    "dropout": ({"decoder_layers": 2}, 0, 0.5),
    "embedding_dropout": ({}, 0, 0.5),
    "output_dropout": ({}, 0, 0.5),
    "attention_dropout": ({}, 0, 0.5),
    "recurrent_dropout": ({}, 0, 0.5),
    "zoneout": ({}, 0, 0.5),
}
# The inherited fields that this class only gives defaults, which generate() and the losses read.
NOT_THE_NETWORK = {"use_cache", "is_encoder_decoder", "pad_token_id", "bos_token_id", "eos_token_id",
                   "decoder_start_token_id"}  # fmt: skip
# Only what a decoder reads after a copied word depends on it: tested by itself below.
ELSEWHERE = {"unk_token_id"}


def own_fields() -> set[str]:
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    declared = set(RnnSeq2SeqConfig.__annotations__)
    return declared | ({field.name for field in dataclasses.fields(RnnSeq2SeqConfig)} - inherited)


def test_no_field_is_forgotten() -> None:
    assert own_fields() == set(CHANGES) | NOT_THE_NETWORK | ELSEWHERE


@pytest.mark.parametrize("field", CHANGES)
def test_field_changes_the_output(field: str) -> None:
    base, one, other = CHANGES[field]
    no_dropout = {"dropout": 0, "embedding_dropout": 0, "output_dropout": 0}
    source, mask = ragged_batch([5, 3])
    seen = []
    for value in (one, other, one):
        model = tiny_model(**{**no_dropout, **base, field: value}).train()
        torch.manual_seed(3)
        out = model(source, attention_mask=mask, labels=source)
        seen.append(torch.cat((out.logits.flatten(), out.loss.to(out.logits).view(1))))
    assert torch.equal(seen[0], seen[2])
    assert seen[0].shape != seen[1].shape or not torch.allclose(seen[0], seen[1])


def test_unknown_word_is_what_a_decoder_reads_after_a_copied_one() -> None:
    source, _ = ragged_batch([4])
    copied = torch.tensor([[1, VOCABULARY + 2, 4]])
    batch = {"input_ids": source, "copy_ids": source, "decoder_input_ids": copied}
    for unknown in (3, 7):
        model = tiny_model(head_type="pointer_generator", source_vocab_size=VOCABULARY, unk_token_id=unknown)
        same = copied.masked_fill(copied >= VOCABULARY, unknown)
        assert torch.equal(model(**batch).logits, model(**{**batch, "decoder_input_ids": same}).logits)
        other = same.masked_fill(same == unknown, 8)
        assert not torch.allclose(model(**batch).logits, model(**{**batch, "decoder_input_ids": other}).logits)


def test_only_what_makes_no_sense_is_left_out_of_the_covering_set() -> None:
    pairs = {(a, name_of(flat({a: AXES[a][i]})), b, name_of(flat({b: AXES[b][j]}))) for a, i, b, j in IMPOSSIBLE_PAIRS}
    for setting in CONFIGURATIONS:
        tiny_config(**setting)
    for a, x, b, y in sorted(pairs):
        assert (
            (a == "attention" and b == "wiring" and y.startswith("context-none") and x != "none")
            or (a == "decoder_self_attention" and b == "wiring" and x == "True" and y.startswith("context-none"))
            or (a == "attention_normalizer" and b == "wiring" and x != "softmax" and y.startswith("context-none"))
            or (a == "attention" and b == "head" and x == "none" and y == "pointer_generator")
            or (a == "wiring" and b == "head" and x.startswith("context-none") and y == "pointer_generator")
            or (a == "encoder" and b == "head" and x.startswith("pyramidal") and y == "pointer_generator")
            or (a == "wiring" and b == "bridge_type" and x.startswith("context-none") and y in ("zeros", "learned"))
            or (a == "wiring" and b == "decoder_layers" and x in ("gnmt", "gnmt_v2") and y == "1")
        ), (a, x, b, y)


@pytest.mark.parametrize("field", ["zoneout"])
def test_field_changes_evaluation(field: str) -> None:
    source, _ = ragged_batch([4])
    seen = [tiny_model(**{field: value})(source, decoder_input_ids=source).logits for value in (0, 0.3)]
    assert not torch.allclose(*seen)


@pytest.mark.parametrize("field", ["dropout", "embedding_dropout", "output_dropout", "recurrent_dropout"])
def test_dropout_is_off_in_evaluation(field: str) -> None:
    source, _ = ragged_batch([4])
    seen = [
        tiny_model(**{field: value}, decoder_layers=2)(source, decoder_input_ids=source).logits for value in (0, 0.3)
    ]
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"cell_type": "rnn"}, ["cell_type", "rnn", "lstm"]),
        ({"attention_type": "bilinear"}, ["attention_type", "bilinear", "general"]),
        ({"hidden_size": 0}, ["hidden_size", "at least 1", "0"]),
        ({"decoder_layers": -1}, ["decoder_layers", "-1"]),
        ({"hidden_size": 7}, ["hidden_size", "even", "7", "encoder_hidden_size"]),
        ({"dropout": 1.0}, ["dropout", "[0, 1)", "1.0"]),
        ({"zoneout": -0.1}, ["zoneout", "-0.1"]),
        ({"hidden_size": 8.0}, ["hidden_size", "int"]),
        ({"attention_type": "dot", "encoder_hidden_size": 5}, ["dot", "10", "8", "general"]),
        ({"attention_type": "dot", "attention_hidden_size": 5}, ["attention_hidden_size", "dot"]),
        ({"attention_type": "none", "attention_dropout": 0.1}, ["attention_dropout", "none"]),
        ({"encoder_type": "gnmt", "bidirectional": False}, ["bidirectional", "gnmt"]),
        ({"encoder_type": "conv", "bidirectional": False}, ["bidirectional", "conv"]),
        ({"encoder_type": "gnmt", "encoder_residual": True}, ["encoder_residual", "gnmt"]),
        ({"encoder_type": "embedding", "encoder_layers": 2}, ["encoder_layers", "embedding"]),
        ({"encoder_type": "transformer", "encoder_heads": 3}, ["encoder_heads", "3", "8"]),
        ({"encoder_type": "conv", "encoder_kernel_size": 4}, ["encoder_kernel_size", "odd", "4"]),
        ({"location_kernel_size": 4}, ["location_kernel_size", "odd", "4"]),
        ({"residual_start": 1}, ["residual_start", "2", "1"]),
        ({"cell_type": "ssru", "recurrent_dropout": 0.1}, ["recurrent_dropout", "0.1", "ssru"]),
        ({"decoder_cell_type": "ssru", "recurrent_dropout": 0.1}, ["recurrent_dropout", "ssru"]),
        ({"attention_type": "multi_head", "attention_heads": 3}, ["attention_heads", "3", "8"]),
        ({"attention_heads": 2}, ["attention_heads", "multi_head", "additive"]),
        ({"attention_scoring": "dot"}, ["attention_scoring", "dot", "additive", "leave it out"]),
        ({"attention_type": "multi_head", "attention_scoring": "general"}, ["attention_scoring", "general", "dot"]),
        ({"attention_type": "local_p", "attention_scoring": "dot", "encoder_hidden_size": 5}, ["local_p", "10", "8"]),
        ({"attention_type": "dot", "wiring_type": "context_feeding"}, ["dot", "8", "16"]),
        ({"attention_type": "dot", "attention_bias": True}, ["attention_bias", "dot"]),
        ({"attention_type": "monotonic", "attention_bias": True}, ["attention_bias", "monotonic"]),
        ({"attention_type": "location", "attention_coverage": True}, ["attention_coverage", "location"]),
        ({"attention_type": "none", "attention_normalizer": "sparsemax"}, ["attention_normalizer", "none"]),
        ({"attention_type": "monotonic", "attention_normalizer": "entmax15"}, ["attention_normalizer", "monotonic"]),
        ({"attention_type": "none", "coverage_loss_weight": 0.5}, ["coverage_loss_weight", "none"]),
        ({"coverage_loss_weight": -1.0}, ["coverage_loss_weight", "-1.0"]),
        ({"wiring_type": "context"}, ["wiring_type", "context", "additive", "none"]),
        ({"wiring_type": "context", "attention_type": "none", "bridge_type": "zeros"}, ["context", "zeros"]),
        ({"wiring_type": "context", "attention_type": "none", "bridge_type": "learned"}, ["context", "learned"]),
        ({"layer_norm": True, "attention_type": "general"}, ["layer_norm", "additive", "general"]),
        ({"encoder_type": "conv", "encoder_transition_depth": 2}, ["encoder_transition_depth", "2", "conv"]),
        ({"encoder_transition_depth": 0}, ["encoder_transition_depth", "1", "0"]),
        ({"wiring_type": "gnmt"}, ["gnmt", "decoder_layers", "2", "1"]),
        ({"wiring_type": "gnmt_v2"}, ["gnmt_v2", "decoder_layers"]),
        ({"decoder_transition_depth": 3}, ["decoder_transition_depth", "3", "conditional", "input_feeding"]),
        ({"wiring_type": "conditional", "decoder_transition_depth": 1}, ["decoder_transition_depth", "1"]),
        ({"head_hidden_size": 5}, ["head_hidden_size", "linear"]),
        ({"head_type": "pointer_generator", "attention_type": "none"}, ["pointer_generator", "none"]),
        ({"head_type": "pointer_generator", "encoder_type": "pyramidal"}, ["pointer_generator", "pyramidal"]),
        ({"head_type": "pointer_generator", "output_normalizer": "sparsemax"}, ["output_normalizer", "sparsemax"]),
        ({"head_type": "pointer_generator", "unk_token_id": None}, ["unk_token_id", "None"]),
        ({"head_type": "pointer_generator", "unk_token_id": 13}, ["unk_token_id", "13"]),
        ({"decoder_embedding_size": 9}, ["decoder_embedding_size", "9", "source_vocab_size"]),
        ({"pad_token_id": 13}, ["pad_token_id", "13"]),
        ({"source_vocab_size": 5, "pad_token_id": 5}, ["pad_token_id", "5"]),
        ({"eos_token_id": [2, 99]}, ["eos_token_id", "99"]),
        ({"initializer_range": -1.0}, ["initializer_range", "-1.0"]),
        ({"hiden_size": 8}, ["hiden_size", "hidden_size"]),
        ({"encoder_layer": 2}, ["encoder_layer", "encoder_layers"]),
    ],
)
def test_impossible_settings_are_refused(setting: dict[str, Any], words: list[str]) -> None:
    errors = (ValueError, StrictDataclassClassValidationError, StrictDataclassFieldValidationError)
    with pytest.raises(errors) as refusal:
        tiny_config(**setting)
    for word in words:
        assert word in str(refusal.value)


def test_checked_again_when_saved(tmp_path: Any) -> None:
    config = tiny_config()
    config.hidden_size = 7
    with pytest.raises((ValueError, StrictDataclassClassValidationError), match="even"):
        config.save_pretrained(tmp_path)


def test_saved_and_loaded(tmp_path: Any) -> None:
    config = tiny_config(attention_type="general", source_vocab_size=11, encoder_residual=True, dropout=0)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is RnnSeq2SeqConfig
    assert all(getattr(loaded, name) == getattr(config, name) for name in own_fields())


def test_unknown_words_far_from_a_field_are_kept_as_transformers_does() -> None:
    assert tiny_config(my_note="x").my_note == "x"
