"""The wirings against the papers' equations, written plainly: one row and one token at a time, in float64."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from models import VOCABULARY, ragged_batch, tiny_config, tiny_model

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.wirings import WIRINGS

CLOSE = {"rtol": 0, "atol": 1e-10}
LENGTHS = [5, 1, 3]
TARGET = torch.tensor([[1, 4, 5, 6], [1, 7, 8, 3], [1, 9, 9, 4]])
LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1], [0, 1, 1, 1]])

Tensors = Mapping[str, torch.Tensor]
State = list[torch.Tensor]  # [h] or [h, c], each [H]


# The equations


def plain_cell(kind: str, p: Tensors, name: str, x: torch.Tensor, state: State, mask: torch.Tensor | None) -> State:
    """`mask`: recurrent dropout's, [H]."""
    h = state[0]
    from_x = p[f"{name}.weight_ih"] @ x + p[f"{name}.bias_ih"]
    from_h = p[f"{name}.weight_hh"] @ (h if mask is None else mask * h) + p[f"{name}.bias_hh"]
    n = len(h)
    if kind == "lstm":
        a = from_x + from_h
        i, f, g, o = a[:n].sigmoid(), a[n : 2 * n].sigmoid(), a[2 * n : 3 * n].tanh(), a[3 * n :].sigmoid()
        c = f * state[1] + i * g
        return [o * c.tanh(), c]
    r = (from_x[:n] + from_h[:n]).sigmoid()
    z = (from_x[n : 2 * n] + from_h[n : 2 * n]).sigmoid()
    candidate = (from_x[2 * n :] + r * from_h[2 * n :]).tanh()
    return [(1 - z) * candidate + z * h]


def plain_attention(kind: str, p: Tensors, query: torch.Tensor, memory: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """query [Q], memory [S, M] -> context [M], weights [S]; empty without attention."""
    if kind == "none":
        return memory.new_zeros(0), memory.new_zeros(0)
    scores = []
    for m in memory:
        if kind == "general":
            scores.append(query @ p["attention.key_projection.weight"] @ m)
        else:
            inner = p["attention.query_projection.weight"] @ query + p["attention.key_projection.weight"] @ m
            scores.append(p["attention.score_projection.weight"][0] @ inner.tanh())
    e = torch.stack(scores)
    a = (e - e.max()).exp()
    a = a / a.sum()
    return sum((w * m for w, m in zip(a, memory, strict=True)), torch.zeros_like(memory[0])), a


class Plain(NamedTuple):
    features: torch.Tensor  # [T, F]
    logits: torch.Tensor  # [T, V]; empty unless the head is `linear`
    weights: torch.Tensor  # [T, S]
    gate_input: torch.Tensor  # [T, C + Q + E]
    outputs: torch.Tensor  # [T, L, H]


def plain_decoder(
    parameters: Tensors,
    config: RnnSeq2SeqConfig,
    memory: torch.Tensor,
    bridge: list[State],
    tokens: list[int],
    noise: list[torch.Tensor] | None = None,
) -> Plain:
    """memory [S, M], the bridge's state of every layer, what the decoder reads; a dropout mask [H] a cell."""
    prefix = "model.decoder.wiring."
    p = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
    wiring, cell, depth = config.wiring_type, config.decoder_cell, config.decoder_layers
    raw = config.head_type == "deep"
    masks: list[Any] = [None] * 10 if noise is None else noise
    join = torch.cat

    def attend(query: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return plain_attention(config.attention_type, p, query, memory)

    def layer(index: int, x: torch.Tensor) -> None:
        """Advances one layer of the stack."""
        states[index] = plain_cell(cell, p, f"stack.layers.{index}", x, states[index], masks[index])

    def up(x: torch.Tensor, context: torch.Tensor) -> list[torch.Tensor]:
        """The layers above the bottom one, whose output is x; all outputs."""
        found = [x]
        for index in range(1, depth):
            layer(index, join([x, context]))
            residual = config.decoder_residual and index + 1 >= config.residual_start
            x = states[index][0] + x if residual else states[index][0]
            found.append(x)
        return found

    states = [list(state) for state in bridge]
    nothing = memory.new_zeros(0)
    if wiring == "context":  # Cho et al. 2014, A.1.2
        c = bridge[-1][0]
        values = (p["initial.weight"] @ c).tanh().split(config.hidden_size)
        size = len(bridge[0])
        states = [list(values[index * size : (index + 1) * size]) for index in range(depth)]
    fed_back = memory.new_zeros(memory.shape[1] if config.attention_type != "none" else 0)

    rows = []
    for token in tokens:
        x = parameters["model.decoder.embed_tokens.weight"][token]
        if wiring == "context_feeding":  # See et al. 2017, their code
            x = p["merge.weight"] @ join([x, fed_back]) + p["merge.bias"]
            layer(0, x)
            outputs = up(states[0][0], nothing)
            s = outputs[-1]
            query = join([states[-1][1], states[-1][0]]) if cell == "lstm" else states[-1][0]
            c, a = attend(query)
            fed_back = c
            features = join([c, s, x]) if raw else p["combine.weight"] @ join([c, s]) + p["combine.bias"]
        elif wiring == "bahdanau_joined":  # Yoyodyne's soft attention; its gate sees the new state
            previous = states[-1][0]
            c, a = attend(previous)
            layer(0, join([x, c]))
            outputs = up(states[0][0], nothing)
            s = query = outputs[-1]
            features = join([c, previous, x]) if raw else join([c, s])  # the former is Bahdanau's, A.2.2
        elif wiring == "context":
            a = nothing
            layer(0, join([x, c]))
            outputs = up(states[0][0], nothing)
            s = query = outputs[-1]
            features = join([c, s, x]) if raw else (p["combine.0.weight"] @ join([c, s, x])).tanh()
        elif wiring == "conditional":  # Sennrich et al. 2017, section 2; Miceli Barone et al. 2017
            layer(0, x)
            query = states[0][0]
            c, a = attend(query)
            for k in range(config.decoder_transition_depth - 1):
                name = f"transitions.{k}"
                states[0] = plain_cell(cell, p, name, c if k == 0 else nothing, states[0], masks[depth + k])
            outputs = up(states[0][0], nothing)
            s = outputs[-1]
            features = join([c, s, x]) if raw else (p["combine.0.weight"] @ join([c, s, x])).tanh()
        elif wiring == "gnmt_v2":
            layer(0, x)
            query = states[0][0]
            c, a = attend(query)
            outputs = up(states[0][0], c)
            s = features = outputs[-1]
            features = join([c, s, x]) if raw else s
        else:  # Wu et al. 2016, eq. 4-6; Chen et al. 2018
            query = states[0][0]
            c, a = attend(query)
            layer(0, join([x, c]))
            outputs = up(states[0][0], c)
            s = outputs[-1]
            features = join([c, s, x]) if raw else join([c, s]) if wiring == "rnmt_plus" else s
        logits = nothing
        if config.head_type == "linear":
            logits = parameters["head.output.weight"] @ features + parameters["head.output.bias"]
        rows.append((features, logits, a, join([c, query, x]), torch.stack(outputs)))
    return Plain(*(torch.stack(column) for column in zip(*rows, strict=True)))


# Settings

CHECKED = ("context_feeding", "bahdanau_joined", "context", "conditional", "gnmt", "gnmt_v2", "rnmt_plus")
SETTINGS: list[dict[str, Any]] = [
    {"wiring_type": wiring, "cell_type": cell, "attention_type": attention, "decoder_layers": depth}
    for wiring, cell, attention, depth in itertools.product(
        CHECKED,
        ("lstm", "gru"),
        ("none", "additive", "general"),
        (1, 2, 3),
    )
    if not (wiring == "context" and attention != "none") and not (wiring in ("gnmt", "gnmt_v2") and depth == 1)
]
for _index, _setting in enumerate(SETTINGS):  # what goes with everything, spread over these
    if _setting["decoder_layers"] == 3:
        _setting.update(decoder_residual=True, residual_start=2 + _index % 2)
    if _setting["wiring_type"] == "conditional":
        _setting["decoder_transition_depth"] = 2 + (_index + _setting["decoder_layers"]) % 3
    if _index % 4 == 0:
        _setting["encoder_hidden_size"] = 5  # a memory of 10, the decoder being 8 wide
FEW = SETTINGS[1::5]
ONE_EACH = [next(setting for setting in FEW if setting["wiring_type"] == wiring) for wiring in CHECKED]


def name_of(setting: dict[str, Any]) -> str:
    return "-".join(str(value) for value in setting.values())


every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
some_settings = pytest.mark.parametrize("setting", FEW, ids=name_of)


def test_settings_spread() -> None:
    for settings in (SETTINGS, FEW):
        assert len({setting["wiring_type"] for setting in settings}) == 7
        for name in ("cell_type", "attention_type", "decoder_layers", "residual_start"):
            assert {setting.get(name) for setting in settings} == {setting.get(name) for setting in SETTINGS}
    assert {setting.get("decoder_transition_depth") for setting in SETTINGS} == {None, 2, 3, 4}


def plain_rows(
    model: RnnSeq2SeqForConditionalGeneration,
    mask: torch.Tensor,
    target_mask: torch.Tensor,
    source: torch.Tensor,
    noise: tuple[tuple[torch.Tensor, ...], ...] | None = None,
) -> list[Plain]:
    """Every row of a batch alone and without padding; encoder and bridge are the model's own."""
    parameters = dict(model.named_parameters(remove_duplicate=False))  # one embedding table has two names
    encoded = model.get_encoder()(source, mask)
    bridge = model.model.bridge(encoded)
    rows = []
    for row in range(len(source)):
        memory = encoded.last_hidden_state[row, mask[row].bool()]
        states = [[value[row] for value in layer] for layer in bridge]
        tokens = TARGET[row, target_mask[row].bool()].tolist()
        masks = None if noise is None else [value[row] for (value,) in noise]
        rows.append(plain_decoder(parameters, model.config, memory, states, tokens, masks))
    return rows


@every_setting
@pytest.mark.parametrize("padded", [False, True], ids=["all tokens", "left-padded"])
def test_values_and_gradients(setting: dict[str, Any], padded: bool) -> None:
    """Without a mask those without feedback take the sequence at once; with one all go step by step."""
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS, "left")
    target_mask = LEFT if padded else torch.ones_like(LEFT)
    out = model(
        source,
        attention_mask=mask,
        decoder_input_ids=TARGET,
        decoder_attention_mask=LEFT if padded else None,
        output_attentions=True,
        output_hidden_states=True,
    )
    expected = plain_rows(model, mask, target_mask, source)
    actual_loss = expected_loss = torch.zeros((), dtype=torch.float64)
    coefficients = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for row, plain in enumerate(expected):
        at = target_mask[row].bool()
        torch.testing.assert_close(out.logits[row, at], plain.logits, **CLOSE)
        outputs = torch.stack(out.decoder_hidden_states[1:], dim=2)[row, at]  # [T, L, H]
        torch.testing.assert_close(outputs, plain.outputs, **CLOSE)
        if setting["attention_type"] != "none":
            (weights,) = out.cross_attentions
            torch.testing.assert_close(weights[row, 0][at][:, mask[row].bool()], plain.weights, **CLOSE)
        actual_loss = actual_loss + (out.logits[row, at] * coefficients[at]).sum()
        expected_loss = expected_loss + (plain.logits * coefficients[at]).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    actual = torch.autograd.grad(actual_loss, parameters)
    for name, one, other in zip(names, actual, torch.autograd.grad(expected_loss, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        # The width of an input may be zero; and of the bridge's states `context` reads one alone.
        assert one.numel() == 0 or one.any(), name


COPYING = [{**setting, "attention_type": "additive"} for setting in FEW if setting["wiring_type"] != "context"]


@pytest.mark.parametrize(
    ("setting", "head"),
    [(setting, "deep") for setting in FEW] + [(setting, "pointer_generator") for setting in COPYING],
    ids=lambda value: value if isinstance(value, str) else name_of(value),
)
def test_what_heads_read(setting: dict[str, Any], head: str) -> None:
    """[c; s; x] before `deep`, and [c; query; x] for the pointer-generator's gate."""
    model = tiny_model(**setting, head_type=head)
    source, mask = ragged_batch(LENGTHS)
    out = model.model(source, attention_mask=mask, decoder_input_ids=TARGET)
    for row, plain in enumerate(plain_rows(model, mask, torch.ones_like(LEFT), source)):
        torch.testing.assert_close(out.last_hidden_state[row], plain.features, **CLOSE)
        if head == "pointer_generator":
            torch.testing.assert_close(out.gate_input[row], plain.gate_input, **CLOSE)
        else:
            assert out.gate_input is None


@some_settings
def test_recurrent_dropout_masks(setting: dict[str, Any]) -> None:
    """Every cell, each transition among them, has one mask of its own for the whole sequence."""
    rates = dict.fromkeys(("dropout", "embedding_dropout", "output_dropout"), 0.0)
    model = tiny_model(**setting, **rates, recurrent_dropout=0.5)
    model.model.decoder.train()
    source, mask = ragged_batch(LENGTHS)
    ones = torch.ones_like(LEFT)
    out = model(source, attention_mask=mask, decoder_input_ids=TARGET, decoder_attention_mask=ones, use_cache=True)
    noise = out.past_key_values.state.noise
    cells = setting["decoder_layers"] + setting.get("decoder_transition_depth", 1) - 1
    assert len(noise) == cells
    assert len({tuple(value.flatten().tolist()) for (value,) in noise}) == cells
    for row, plain in enumerate(plain_rows(model, mask, ones, source, noise)):
        torch.testing.assert_close(out.logits[row], plain.logits, **CLOSE)


# One call, steps, cache


@pytest.mark.parametrize("wiring", WIRINGS)
def test_calls_of_a_sequence(wiring: str) -> None:
    """All tokens at once where nothing is fed back, a call a token elsewhere."""
    attention = "none" if wiring == "context" else "general"
    model = tiny_model(wiring_type=wiring, decoder_layers=2, attention_type=attention)
    source, _ = ragged_batch([4, 4, 4])
    lengths: list[int] = []
    model.model.decoder.wiring.register_forward_hook(lambda module, args, output: lengths.append(args[0].size(1)))
    model(source, decoder_input_ids=TARGET)
    at_once = wiring in ("output_only", "context", "gnmt_v2")
    assert lengths == ([4] if at_once else [1, 1, 1, 1])
    assert model.model.decoder.wiring.feedback == (not at_once)


@every_setting
def test_steps_equal_the_sequence(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting, zoneout=0.2)
    source, mask = ragged_batch(LENGTHS)
    whole = model(source, attention_mask=mask, decoder_input_ids=TARGET)
    cache, logits = None, []
    for part in (TARGET[:, :1], TARGET[:, 1:3], TARGET[:, 3:]):
        out = model(source, attention_mask=mask, decoder_input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **CLOSE)
    assert cache is not None
    for one, other in zip(cache.state.tensors(), whole.past_key_values.state.tensors(), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@some_settings
@pytest.mark.parametrize("beams", [1, 4])
def test_cached_equals_uncached(setting: dict[str, Any], beams: int) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    cached, uncached = (
        model.generate(
            source,
            attention_mask=mask,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=6,
            use_cache=use_cache,
            output_scores=True,
            return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# Training


@some_settings
def test_gradient_checkpointing_changes_nothing(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting, recurrent_dropout=0.3, zoneout=0.1).train()
    source, mask = ragged_batch(LENGTHS)
    gradients = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.zero_grad()
        torch.manual_seed(3)
        model(source, attention_mask=mask, labels=TARGET).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(gradient is not None for gradient in gradients[-1])
    for plain, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain, **CLOSE)


@some_settings
def test_bfloat16(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    exact = model(source, attention_mask=mask, decoder_input_ids=TARGET).logits
    for pure in (False, True):
        half = model.to(torch.bfloat16 if pure else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            logits = half(source, attention_mask=mask, decoder_input_ids=TARGET).logits
        assert logits.dtype == torch.bfloat16
        assert (logits.double() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("setting", ONE_EACH, ids=lambda setting: setting["wiring_type"])
def test_compiles_without_a_break(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting)
    source, mask = ragged_batch(LENGTHS)
    encoded = model.get_encoder()(source, mask)
    whole = model(encoder_outputs=encoded, decoder_input_ids=TARGET).logits

    def run(ids: torch.Tensor, cache: Any) -> Any:
        out = model(encoder_outputs=encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        return out.logits, out.past_key_values

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    first, cache = compiled(TARGET[:, :3], None)
    last, _ = compiled(TARGET[:, 3:], cache)
    torch.testing.assert_close(torch.cat((first, last), 1), whole, **CLOSE)


# Counts


def test_context_feeding_has_the_parameters_of_see2017() -> None:
    """Of their code: one LSTM of 256, words of 128, a bidirectional encoder of 2 x 256."""
    model = RnnSeq2SeqForConditionalGeneration(
        RnnSeq2SeqConfig(
            vocab_size=50,
            wiring_type="context_feeding",
            hidden_size=256,
            embedding_size=128,
            encoder_hidden_size=256,
            attention_hidden_size=512,
            attention_bias=True,
        )
    )
    wiring = model.model.decoder.wiring

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert wiring.context_size == 512
    assert count(wiring.merge) == (128 + 512) * 128 + 128
    assert count(wiring.combine) == (256 + 512) * 256 + 256
    assert wiring.stack.layers[0].input_size == 128
    assert wiring.gate_size == 0
    # W_h, W_s with b_attn, v
    assert count(wiring.attention) == 512 * 512 + 512 * 512 + 512 + 512
    copying = tiny_config(
        wiring_type="context_feeding",
        head_type="pointer_generator",
        hidden_size=256,
        embedding_size=128,
        encoder_hidden_size=256,
    )
    assert WIRINGS["context_feeding"](copying).gate_size == 512 + 512 + 128


@pytest.mark.parametrize(
    ("wiring", "widths", "features"),
    [
        ("context_feeding", [6, 8, 8], 8),
        ("context", [6 + 8, 8, 8], 8),
        ("conditional", [6, 8, 8], 8),
        ("gnmt", [6 + 10, 8 + 10, 8 + 10], 8),
        ("gnmt_v2", [6, 8 + 10, 8 + 10], 8),
        ("rnmt_plus", [6 + 10, 8 + 10, 8 + 10], 10 + 8),
    ],
)
def test_widths(wiring: str, widths: list[int], features: int) -> None:
    """Decoder of 8, words of 6, memory of 10."""
    attention = "none" if wiring == "context" else "additive"
    config = tiny_config(wiring_type=wiring, attention_type=attention, encoder_hidden_size=5, decoder_layers=3)
    built = WIRINGS[wiring](config)
    assert [layer.input_size for layer in built.stack.layers] == widths
    assert built.features_size == features
