"""Every field does something; every value has its class; impossible settings are refused by name."""

import dataclasses
import typing
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from models import ragged_batch, tiny_config, tiny_model
from transformers import AutoConfig, PreTrainedConfig

from hf_rnn_seq2seq import RnnSeq2SeqConfig
from hf_rnn_seq2seq import configuration_rnn_seq2seq as configuration
from hf_rnn_seq2seq.attention import ATTENTIONS
from hf_rnn_seq2seq.decoder import WIRINGS
from hf_rnn_seq2seq.encoders import BRIDGES, ENCODERS
from hf_rnn_seq2seq.heads import HEADS
from hf_rnn_seq2seq.recurrent_layers import CELLS


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (configuration.CellType, CELLS),
        (configuration.EncoderType, ENCODERS),
        (configuration.BridgeType, BRIDGES),
        (configuration.AttentionType, ATTENTIONS),
        (configuration.WiringType, WIRINGS),
        (configuration.HeadType, HEADS),
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
    "decoder_residual": ({"decoder_layers": 2}, False, True),
    "bridge_type": ({}, "linear", "mean"),
    "attention_type": ({}, "dot", "scaled_dot"),
    "attention_hidden_size": ({}, 8, 9),
    "wiring_type": ({}, "input_feeding", "bahdanau"),
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
# Axes with one value so far: nothing to change it to.
ONE_VALUE = {"encoder_type", "head_type"}


def own_fields() -> set[str]:
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    declared = set(RnnSeq2SeqConfig.__annotations__)
    return declared | ({field.name for field in dataclasses.fields(RnnSeq2SeqConfig)} - inherited)


def test_no_field_is_forgotten() -> None:
    assert own_fields() == set(CHANGES) | NOT_THE_NETWORK | ONE_VALUE
    for values in ONE_VALUE:
        hint = RnnSeq2SeqConfig.__annotations__[values]
        assert len(typing.get_args(hint)) == 1


@pytest.mark.parametrize("field", CHANGES)
def test_field_changes_the_output(field: str) -> None:
    base, one, other = CHANGES[field]
    no_dropout = {"dropout": 0, "embedding_dropout": 0, "output_dropout": 0}
    source, mask = ragged_batch([5, 3])
    seen = []
    for value in (one, other, one):
        model = tiny_model(**{**no_dropout, **base, field: value}).train()
        torch.manual_seed(3)
        seen.append(model(source, attention_mask=mask, decoder_input_ids=source).logits)
    assert torch.equal(seen[0], seen[2])
    assert seen[0].shape != seen[1].shape or not torch.allclose(seen[0], seen[1])


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
