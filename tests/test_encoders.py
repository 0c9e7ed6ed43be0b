"""Every encoder against a plain implementation that reads one sentence at a time."""

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, ragged_batch, tiny_config, tiny_model
from plain_encoders import BODIES, plain, tiny_encoder
from safetensors.torch import save_file

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.configuration_rnn_seq2seq import EncoderType
from hf_rnn_seq2seq.encoders import ENCODERS, RnnSeq2SeqEncoderOutput

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-10}
TARGET = torch.tensor([[1, 4, 5, 6], [1, 7, 8, 3], [1, 9, 9, 4]])

RECURRENT = [name for name in BODIES if BODIES[name]["encoder_type"] in ("rnn", "gnmt", "pyramidal")]
# Every body with an LSTM, the recurrent ones with a GRU, too.
SETTINGS = {f"{name}-lstm": {**body, "cell_type": "lstm"} for name, body in BODIES.items()}
SETTINGS |= {f"{name}-gru": {**BODIES[name], "cell_type": "gru"} for name in RECURRENT}

every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
every_body = pytest.mark.parametrize("setting", BODIES.values(), ids=BODIES)
both_orders = pytest.mark.parametrize("reverse", [False, True], ids=["forwards", "reversed"])


def padded(lengths: list[int], starts: list[int], width: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random embeddings [B, S, E], at padding as well, and the mask."""
    x = torch.randn(len(lengths), width, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        mask[row, start : start + length] = 1
    return x, mask


def objective(memory: torch.Tensor, final_state: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
    """Any function that is zero at zeros and whose gradient differs everywhere."""
    total = memory.sin().sum() + (final_state + final_state**2).sum()
    return total if keys is None else total + (keys**3).sum()


@every_setting
@both_orders
def test_equals_the_plain_implementation(setting: dict[str, Any], reverse: bool) -> None:
    """Values and gradients; padding on both sides holds anything, and one row is nothing but padding."""
    encoder = tiny_encoder(**setting, reverse_source=reverse)
    config = encoder.config
    lengths = [6, 1, 0, 5, 4]
    x, mask = padded(lengths, [1, 6, 0, 2, 0], 7, config.embedding_size)
    x.requires_grad_()
    out = encoder(inputs_embeds=x, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    objective(out.last_hidden_state, out.final_state, out.memory_keys).backward()
    body = dict(encoder.body.named_parameters())
    gradients = {name: parameter.grad for name, parameter in body.items()}
    assert x.grad is not None
    input_gradient = x.grad.clone()
    assert (input_gradient[~mask.bool()] == 0).all()

    encoder.zero_grad()
    x.grad = None
    total = torch.zeros((), dtype=torch.float64)
    assert len(out.hidden_states) == 1 + config.encoder_layers
    for row, length in enumerate(lengths):
        tokens, places = mask[row].bool(), out.memory_mask[row]
        for tensor in (out.last_hidden_state, out.memory_keys, *out.hidden_states[1:]):
            if tensor is not None and tensor.shape[1] == len(places):
                assert (tensor[row][~places] == 0).all()
        if length == 0:
            assert not places.any()
            assert (out.final_state[row] == 0).all()
            continue
        expected = plain(config, body, list(x[row][tokens].unbind(0)))
        memory = torch.stack(expected.memory)
        keys = None if expected.keys is None else torch.stack(expected.keys)
        torch.testing.assert_close(out.last_hidden_state[row][places], memory, **CLOSE)
        torch.testing.assert_close(out.final_state[row], expected.final_state, **CLOSE)
        if keys is None:
            assert out.memory_keys is None
        else:
            torch.testing.assert_close(out.memory_keys[row][places], keys, **CLOSE)
        for hidden, layer in zip(out.hidden_states[1:], expected.layers, strict=True):
            shown = hidden[row][tokens] if hidden.shape[1] == 7 else hidden[row][hidden[row].abs().sum(-1) > 0]
            torch.testing.assert_close(shown, torch.stack(layer), **CLOSE)
        for weights, one in zip(out.attentions or [], expected.attentions or [], strict=True):
            assert (weights[row][..., ~tokens] == 0).all()
            torch.testing.assert_close(weights[row][:, tokens][..., tokens], one, **CLOSE)
        total = total + objective(memory, expected.final_state, keys)
    total.backward()
    torch.testing.assert_close(input_gradient, x.grad, **CLOSE)
    for name, parameter in body.items():
        torch.testing.assert_close(gradients[name], parameter.grad, **CLOSE, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("name", [*BODIES, "rnn_residual-gru", "pyramidal-gru"])
@both_orders
@settings(max_examples=6)
@given(data=st.data())
def test_padding_changes_nothing(name: str, reverse: bool, data: st.DataObject) -> None:
    """Wherever a sentence stands in the batch, it is read as if it were alone, without a mask."""
    encoder = tiny_encoder(**(SETTINGS | BODIES)[name], reverse_source=reverse)
    width = data.draw(st.integers(1, 8))
    lengths = data.draw(st.lists(st.integers(0, width), min_size=1, max_size=4))
    starts = [data.draw(st.integers(0, width - length)) for length in lengths]
    x, mask = padded(lengths, starts, width, encoder.config.embedding_size)
    with torch.no_grad():
        together = encoder(inputs_embeds=x, attention_mask=mask)
        for row in [row for row, length in enumerate(lengths) if length]:
            alone = encoder(inputs_embeds=x[row : row + 1, mask[row].bool()])
            assert alone.memory_mask.all()
            places = together.memory_mask[row]
            assert (together.last_hidden_state[row][~places] == 0).all()
            torch.testing.assert_close(together.last_hidden_state[row][places], alone.last_hidden_state[0], **CLOSE)
            torch.testing.assert_close(together.final_state[row], alone.final_state[0], **CLOSE)
            if alone.memory_keys is not None:
                torch.testing.assert_close(together.memory_keys[row][places], alone.memory_keys[0], **CLOSE)


@every_setting
def test_sizes_are_the_configuration_s(setting: dict[str, Any]) -> None:
    encoder = tiny_encoder(**setting)
    config = encoder.config
    source, mask = ragged_batch([5, 1, 3])
    out = encoder(source, mask, output_hidden_states=True)
    length = math.ceil(5 / 2 ** (config.encoder_layers - 1)) if config.encoder_type == "pyramidal" else 5
    assert out.last_hidden_state.shape == (3, length, config.memory_size)
    assert out.final_state.shape == (3, config.final_layers, config.encoder_cells, config.memory_size)
    assert out.memory_mask.shape == (3, length)
    assert out.memory_mask.dtype == torch.bool
    assert len(out.hidden_states) == 1 + config.encoder_layers
    torch.testing.assert_close(out.hidden_states[0], encoder.embed_tokens(source))
    torch.testing.assert_close(out.hidden_states[-1], out.last_hidden_state)
    assert encoder(source, mask).hidden_states is None
    assert encoder(source, mask).attentions is None
    attentions = encoder(source, mask, output_attentions=True).attentions
    if config.encoder_type == "transformer":
        assert len(attentions) == config.encoder_layers
        sums = attentions[0].sum(-1)[mask.bool().unsqueeze(1).expand(-1, config.encoder_heads, -1)]
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:
        assert attentions is None


def test_the_dict_is_the_literal() -> None:
    assert tuple(ENCODERS) == get_args(EncoderType)


@every_body
def test_reversed_source(setting: dict[str, Any]) -> None:
    """A reversed sentence read from its end is the sentence; what comes out stands in the order of what was given."""
    plainly, backwards = tiny_encoder(**setting), tiny_encoder(**setting, reverse_source=True)
    source, mask = ragged_batch([6, 2, 3], "both")
    one = plainly(source, mask, output_hidden_states=True, output_attentions=True)
    other = backwards(source.flip(1), mask.flip(1), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(other.final_state, one.final_state, **CLOSE)
    for name in ("last_hidden_state", "memory_mask", "memory_keys"):
        if name in one:
            torch.testing.assert_close(other[name].flip(1), one[name], **CLOSE)
    for hidden, expected in zip(other.hidden_states, one.hidden_states, strict=True):
        torch.testing.assert_close(hidden.flip(1), expected, **CLOSE)
    for weights, expected in zip(other.attentions or (), one.attentions or (), strict=True):
        torch.testing.assert_close(weights.flip(-2, -1), expected, **CLOSE)
    if one.source_ids is not None:
        assert other.source_ids.equal(source.flip(1))
    if setting["encoder_type"] != "embedding":  # whose layer looks at one word at a time
        assert not torch.allclose(backwards(source, mask).last_hidden_state, one.last_hidden_state)


@every_body
def test_source_ids(setting: dict[str, Any]) -> None:
    """There where a memory position is a source position, whatever the length happens to be."""
    encoder = tiny_encoder(**setting)
    shortens = setting["encoder_type"] == "pyramidal" and setting.get("encoder_layers", 1) > 1
    for length in (1, 4):
        source, mask = ragged_batch([length, 1])
        found = encoder(source, mask).source_ids
        assert found is None if shortens else found.equal(source)
        assert encoder(inputs_embeds=encoder.embed_tokens(source)).source_ids is None


@both_orders
def test_pyramidal_mask_is_halved_upwards(reverse: bool) -> None:
    encoder = tiny_encoder(**BODIES["pyramidal"], reverse_source=reverse)  # 3 layers: two halvings
    source, mask = ragged_batch([9, 8, 5, 4, 3, 1, 0], "left")
    found = encoder(source, mask).memory_mask
    expected = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert found.equal(expected.flip(1) if reverse else expected)  # rows stand on the side where they were begun


@every_body
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(setting: dict[str, Any], reentrant: bool) -> None:
    model = tiny_model(**setting, dropout=0.3).train()
    source, mask = ragged_batch([5, 0, 3], "both")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(5)
        model(source, attention_mask=mask, labels=TARGET).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


@every_body
def test_dropout(setting: dict[str, Any]) -> None:
    """It acts in training, between layers or on sublayers, and leaves zeros at padding."""
    encoder = tiny_encoder(**setting, dropout=0.5, embedding_dropout=0.0).train()
    source, mask = ragged_batch([5, 3], "left")
    first, second = encoder(source, mask), encoder(source, mask)
    assert (first.last_hidden_state[~first.memory_mask] == 0).all()
    acts = encoder.config.encoder_layers > 1 or setting["encoder_type"] == "transformer"
    assert torch.equal(first.last_hidden_state, second.last_hidden_state) != acts
    if first.memory_keys is not None:
        assert torch.equal(first.memory_keys, second.memory_keys) != acts


@pytest.mark.parametrize("silent", ["attention.output_projection", "ffn.2"])
def test_both_sublayers_have_dropout(silent: str) -> None:
    encoder = tiny_encoder(**BODIES["transformer_equal"], dropout=0.5, embedding_dropout=0.0).train()
    for parameter in encoder.body.layers[0].get_submodule(silent).parameters():
        torch.nn.init.zeros_(parameter)
    source, mask = ragged_batch([5, 3])
    assert not torch.equal(encoder(source, mask).last_hidden_state, encoder(source, mask).last_hidden_state)


def test_a_source_of_padding_has_finite_gradients() -> None:
    """In self-attention, above all, whose softmax has nothing to choose from."""
    for setting in BODIES.values():
        for output_attentions in (False, True):
            encoder = tiny_encoder(**setting).train()
            source, mask = ragged_batch([4, 4])
            out = encoder(source, 0 * mask, output_attentions=output_attentions)
            for tensor in (out.last_hidden_state, out.final_state, out.memory_keys, *(out.attentions or ())):
                assert tensor is None or (tensor == 0).all()
            (out.last_hidden_state.sum() + out.final_state.sum()).backward()
            for parameter in encoder.parameters():
                assert parameter.grad is None or parameter.grad.isfinite().all()


def test_refusals() -> None:
    encoder = tiny_encoder(**BODIES["conv"])
    encoder(torch.full((1, 9), 4))
    message = r"source is 10 positions long.*`max_source_positions`=9"
    with pytest.raises(ValueError, match=message):
        encoder(torch.full((1, 10), 4))
    with pytest.raises(ValueError, match=message):
        encoder(inputs_embeds=torch.zeros(1, 10, 6).double())
    for setting, message in (
        ({"encoder_type": "transformer"}, "`encoder_heads`=8 must divide the encoder's width 12"),
        ({"encoder_type": "conv", "encoder_kernel_size": 4}, "`encoder_kernel_size` must be odd.*4"),
        ({"encoder_type": "gnmt", "bidirectional": False}, "`bidirectional`=False.*'gnmt'"),
        ({"encoder_type": "gnmt", "encoder_residual": True}, "`encoder_residual`.*'gnmt'"),
        ({"encoder_type": "embedding", "encoder_layers": 2}, "'embedding' has no layers"),
    ):
        with pytest.raises(StrictDataclassClassValidationError, match=message):
            tiny_config(hidden_size=12, **setting)


def test_conv_without_attention_has_one_stack() -> None:
    """Nothing is scored, so nothing makes keys: no parameter is left without a gradient."""
    model = tiny_model(**BODIES["conv"], attention_type="none").train()
    source, mask = ragged_batch([5, 1, 3])
    assert model.get_encoder()(source, mask).memory_keys is None
    model(source, attention_mask=mask, labels=TARGET).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_conv_attends_by_its_keys() -> None:
    """Scores come from CNN-a, what is averaged from CNN-c."""
    model = tiny_model(**BODIES["conv"])
    source, mask = ragged_batch([5, 1, 3])
    out = model.get_encoder()(source, mask)
    calls = {"decoder_input_ids": TARGET, "output_attentions": True}
    plainly = model(encoder_outputs=out, **calls)
    torch.testing.assert_close(plainly.logits, model(source, attention_mask=mask, **calls).logits, **CLOSE)
    other_keys = RnnSeq2SeqEncoderOutput(**{**out, "memory_keys": out.memory_keys.flip(1)})
    other_memory = RnnSeq2SeqEncoderOutput(**{**out, "last_hidden_state": out.last_hidden_state * 2})
    first = plainly.cross_attentions[0][:, :, 0]
    assert not torch.allclose(model(encoder_outputs=other_keys, **calls).cross_attentions[0][:, :, 0], first)
    torch.testing.assert_close(model(encoder_outputs=other_memory, **calls).cross_attentions[0][:, :, 0], first)


@every_body
def test_tuple_form(setting: dict[str, Any]) -> None:
    """Every field has its place, so that a tuple means the same as the output."""
    model = tiny_model(**setting)
    source, mask = ragged_batch([5, 1, 3])
    found = model.get_encoder()(source, mask, return_dict=False)
    assert isinstance(found, tuple)
    expected = model(source, attention_mask=mask, decoder_input_ids=TARGET).logits
    torch.testing.assert_close(model(encoder_outputs=found, decoder_input_ids=TARGET).logits, expected, **CLOSE)


@pytest.mark.parametrize("encoder_type", ["conv", "transformer"])
def test_first_weights(encoder_type: str, tmp_path: Path) -> None:
    """Norms start as the identity, convolutions as Xavier-uniform, biases at zero; also where a file lacks them."""
    config = tiny_config(encoder_type=encoder_type, encoder_layers=2)
    fresh = RnnSeq2SeqForConditionalGeneration(config)
    layer_weights = [name for name in fresh.state_dict() if ".encoder.body." in name]
    save_file(
        {k: v.clone() for k, v in fresh.state_dict().items() if k not in layer_weights}, tmp_path / "model.safetensors"
    )
    config.save_pretrained(tmp_path)
    lacking = RnnSeq2SeqForConditionalGeneration.from_pretrained(tmp_path)
    for model in (fresh, lacking):
        found = set()
        for module in model.get_encoder().body.modules():
            if isinstance(module, torch.nn.LayerNorm):
                assert (module.weight == 1).all()
            elif isinstance(module, torch.nn.Conv1d):
                bound = math.sqrt(6 / (2 * 8 * 3))
                assert 0.9 * bound < module.weight.abs().max() <= bound
            elif isinstance(module, torch.nn.Embedding):
                assert 0.09 < module.weight.std() < 0.11
            if getattr(module, "bias", None) is not None:
                assert (module.bias == 0).all()
                found.add(type(module).__name__)
        assert found == ({"Convolution", "Linear"} if encoder_type == "conv" else {"LayerNorm", "Linear"})


@every_body
def test_save_and_load(setting: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(**setting)
    model.save_pretrained(tmp_path)
    loaded, report = RnnSeq2SeqForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values())
    source, mask = ragged_batch([5, 1, 3], "left")
    for name in ("last_hidden_state", "final_state"):
        one, other = (m.get_encoder()(source, mask)[name] for m in (model, loaded))
        torch.testing.assert_close(other, one, rtol=0, atol=0)


@every_body
@pytest.mark.parametrize("source_vocab_size", [None, 11], ids=["one", "two"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beam"])
def test_generate(setting: dict[str, Any], source_vocab_size: int | None, search: dict[str, Any]) -> None:
    """A batch padded on either side gives what its sentences give alone."""
    model = tiny_model(**setting, source_vocab_size=source_vocab_size, reverse_source=source_vocab_size is None)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **search}
    source, mask = ragged_batch([5, 1, 4], "both", ids=source_vocab_size or VOCABULARY)
    together = model.generate(source, attention_mask=mask, **options).view(3, -1, 7)
    for row in range(3):
        ids = source[row : row + 1, mask[row].bool()]
        assert model.generate(ids, **options).equal(together[row])


@every_body
def test_bfloat16(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting).bfloat16()
    source, mask = ragged_batch([5, 0, 3], "left")
    low = model(source, attention_mask=mask, decoder_input_ids=TARGET).logits
    high = tiny_model(**setting)(source, attention_mask=mask, decoder_input_ids=TARGET).logits
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), high, rtol=0.1, atol=0.3)
    model = tiny_model(**setting).float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(source, attention_mask=mask, labels=TARGET).loss
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# In the ordinary run the loop over time is compiled by the pyramid alone; whole models with "rnn" are in test_compile.
TO_COMPILE = [pytest.param(name, marks=pytest.mark.slow) if name in ("rnn", "gnmt") else name for name in ENCODERS]


@pytest.mark.parametrize("encoder_type", TO_COMPILE)
def test_compiles_as_one_graph(encoder_type: str) -> None:
    torch._dynamo.reset()
    encoder = tiny_encoder(**BODIES[encoder_type], reverse_source=True)
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for source, mask in (ragged_batch([5, 1, 3]), ragged_batch([8, 0, 3], "left")):
        one, other = encoder(source, mask), compiled(source, mask)
        for name in ("last_hidden_state", "final_state", "memory_mask"):
            torch.testing.assert_close(other[name], one[name], **CLOSE)
