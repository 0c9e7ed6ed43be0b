"""Embeddings of one and two vocabularies, saving and loading, types, devices, compiling, first weights."""

from typing import Any

import pytest
import torch
from models import CONFIGURATIONS, VOCABULARY, batch_of, name_of, ragged_batch, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForSeq2SeqLM

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqModel
from hf_rnn_seq2seq.step_products import StepLinear

CLOSE = {"rtol": 0, "atol": 1e-10}
LENGTHS = [5, 1, 3]
TARGET = torch.tensor([[1, 4, 5, 6], [1, 7, 8, 3], [1, 9, 9, 4]])


# Embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", ["head", "no head"])
def test_resizing_one_vocabulary(tied: bool, cls: str) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    model = model if cls == "head" else model.model
    old = model.get_input_embeddings().weight.clone()
    returned = model.resize_token_embeddings(VOCABULARY + 4, mean_resizing=False)
    assert returned is model.get_input_embeddings()
    assert model.config.vocab_size == VOCABULARY + 4
    assert torch.equal(model.get_input_embeddings().weight[:VOCABULARY], old)
    assert model.get_decoder().get_input_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.tensor([[VOCABULARY + 3, 4]])
    out = model(ids, decoder_input_ids=ids)
    if cls == "head":
        assert out.logits.shape[-1] == VOCABULARY + 4
        assert (model.get_output_embeddings().weight is returned.weight) == tied
        assert type(model.get_output_embeddings()) is StepLinear  # else its products are slower
    with pytest.raises(ValueError, match="one vocabulary"):
        model.resize_source_token_embeddings(20)


@pytest.mark.parametrize("tied", [True, False])
def test_resizing_two_vocabularies(tied: bool, tmp_path: Any) -> None:
    model = tiny_model(source_vocab_size=11, tie_word_embeddings=tied)
    target = model.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    source = model.resize_source_token_embeddings(14, mean_resizing=False)
    assert (model.config.vocab_size, model.config.source_vocab_size) == (VOCABULARY + 2, 14)
    assert (target.num_embeddings, source.num_embeddings) == (VOCABULARY + 2, 14)
    assert model.get_input_embeddings() is source
    assert model.get_decoder().get_input_embeddings() is target
    assert (model.get_output_embeddings().weight is target.weight) == tied
    assert type(model.get_output_embeddings()) is StepLinear
    out = model(torch.tensor([[13]]), decoder_input_ids=torch.tensor([[VOCABULARY + 1]]))
    assert out.logits.shape[-1] == VOCABULARY + 2
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    again_out = again(torch.tensor([[13]]), decoder_input_ids=torch.tensor([[VOCABULARY + 1]]))
    torch.testing.assert_close(again_out.logits, out.logits, **CLOSE)


def test_setting_embeddings() -> None:
    model = tiny_model()
    new = torch.nn.Embedding(VOCABULARY, 6).double()
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert model.get_decoder().get_input_embeddings() is new
    output = torch.nn.Linear(8, VOCABULARY).double()
    model.set_output_embeddings(output)
    assert model.get_output_embeddings() is output
    two = tiny_model(source_vocab_size=VOCABULARY)
    two.set_input_embeddings(new)
    assert two.get_decoder().get_input_embeddings() is not new


# Files and types


@pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)
def test_saved_and_loaded(setting: dict[str, Any], tmp_path: Any) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    batch = batch_of(model, source, mask)
    expected = model(**batch, decoder_input_ids=TARGET)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is RnnSeq2SeqForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(
        loaded(**batch, decoder_input_ids=TARGET).logits, expected.logits, rtol=1e-12, atol=1e-12
    )
    assert (loaded.get_output_embeddings().weight is loaded.get_decoder().embed_tokens.weight) == setting[
        "tie_word_embeddings"
    ]


@pytest.mark.parametrize("setting", CONFIGURATIONS[::10], ids=name_of)
def test_the_model_without_its_head_loads(setting: dict[str, Any], tmp_path: Any) -> None:
    model = tiny_model(**setting)
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is RnnSeq2SeqModel
    source, mask = ragged_batch(LENGTHS)
    features = body(source, attention_mask=mask, decoder_input_ids=TARGET).last_hidden_state
    expected = model.model(source, mask, TARGET).last_hidden_state
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)
def test_half_precision(setting: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = RnnSeq2SeqForConditionalGeneration(tiny_config(**setting)).eval()
    source, mask = ragged_batch(LENGTHS)
    batch = batch_of(model, source, mask)
    expected = model(**batch, labels=TARGET)
    with torch.autocast("cpu", dtype):
        cast = model(**batch, labels=TARGET)
    cast.loss.backward()
    torch.testing.assert_close(cast.loss, expected.loss, rtol=0.02, atol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    half = model.to(dtype)(**batch, labels=TARGET)
    log_probabilities = setting["head_type"] == "pointer_generator" or model.config.output_normalizer != "softmax"
    assert half.logits.dtype == (torch.float32 if log_probabilities else dtype)
    torch.testing.assert_close(half.loss, expected.loss, rtol=0.02, atol=0.02)
    half_ids = model.generate(**batch, max_new_tokens=4, num_beams=2)
    assert half_ids.shape[0] == 3


def test_device_map_auto(tmp_path: Any) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, device_map="auto")
    source, _ = ragged_batch([3])
    source = source.to(loaded.device)
    expected = model.generate(source.cpu(), max_new_tokens=5)
    assert torch.equal(loaded.generate(source, max_new_tokens=5).cpu(), expected)


def test_forward_and_step_compile_without_a_break() -> None:
    model = tiny_model().float()
    source, mask = ragged_batch([4, 2])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(source, attention_mask=mask, labels=TARGET[:2])
    assert torch.allclose(compiled(source, attention_mask=mask, labels=TARGET[:2]).logits, expected.logits, atol=1e-5)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = RnnSeq2SeqForConditionalGeneration(
        tiny_config(vocab_size=500, hidden_size=64, embedding_size=64, attention_type="normed_additive")
    )
    assert model.get_input_embeddings().weight[1:].std().item() == pytest.approx(0.1, rel=0.05)
    assert (model.get_input_embeddings().weight[0] == 0).all()
    layer = model.model.decoder.wiring.stack.layers[0]
    for gate in layer.weight_hh.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(64), rtol=0, atol=1e-5)
    assert layer.bias_ih.view(4, 64).tolist() == [[0.0] * 64, [1.0] * 64, [0.0] * 64, [0.0] * 64]
    assert (layer.bias_hh == 0).all()
    attention = model.model.decoder.wiring.attention
    assert attention.scale.item() == pytest.approx(64**-0.5)
    assert (attention.bias == 0).all()
