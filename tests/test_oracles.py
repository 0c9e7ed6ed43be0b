"""The model in float64 against `oracles.py`, to 1e-10."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    ATTENTION_TYPES,
    Array,
    Step,
    attend,
    below,
    bridge,
    cell_step,
    cross_entropy,
    encode,
    new_state,
    oracle_logits,
    oracle_steps,
    to_numpy,
)

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.attention import ATTENTIONS
from hf_rnn_seq2seq.configuration_rnn_seq2seq import AttentionType
from hf_rnn_seq2seq.recurrent_layers import CELLS, RecurrentLayer

TOLERANCE = 1e-10
VOCABULARY = 11

SOURCES = [[4, 9, 3, 7, 2], [5], [8, 3, 10], [6, 6, 4, 2]]
TARGETS = [[1, 4, 8], [1, 3, 3, 9, 5], [1], [1, 10, 7, 4]]


def build(seed: int = 0, **fields: Any) -> RnnSeq2SeqForConditionalGeneration:
    """A small model in float64; every parameter random, biases and scales, too, so that none can be forgotten."""
    settings = {"vocab_size": VOCABULARY, "embedding_size": 4, "hidden_size": 6} | fields
    model = RnnSeq2SeqForConditionalGeneration(RnnSeq2SeqConfig(**settings)).double().eval()
    randomise(model, seed)
    return model


def config_of(model: RnnSeq2SeqForConditionalGeneration) -> RnnSeq2SeqConfig:
    assert isinstance(model.config, RnnSeq2SeqConfig)
    return model.config


def randomise(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def pad(rows: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask. Padding has a token's id, so that only the mask can tell that it is none."""
    width = max(map(len, rows)) + 1
    ids = torch.full((len(rows), width), 3)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        at = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        ids[row, at] = torch.tensor(tokens)
        mask[row, at] = 1
    return ids, mask


def close(actual: torch.Tensor, expected: Array | Sequence[Array]) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), np.asarray(expected), rtol=0, atol=TOLERANCE)


def compare_with_oracle(model: RnnSeq2SeqForConditionalGeneration, left: bool) -> None:
    """Logits, attention weights and layer outputs of a ragged batch against each row alone."""
    config = config_of(model)
    input_ids, attention_mask = pad(SOURCES, left)
    decoder_input_ids, decoder_attention_mask = pad(TARGETS, left)
    with torch.no_grad():
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            output_attentions=True,
            output_hidden_states=True,
        )
    expected = oracle_logits(model.state_dict(), config, SOURCES, TARGETS)
    weights = to_numpy(model.state_dict())
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        at, source_at = decoder_attention_mask[row].bool(), attention_mask[row].bool()
        close(output.logits[row, at], expected[row])
        steps: list[Step] = oracle_steps(weights, config, source, target)
        for layer in range(config.decoder_layers):
            close(output.decoder_hidden_states[layer + 1][row, at], [step.layer_outputs[layer] for step in steps])
        if config.attention_type != "none":
            assert output.cross_attentions[0].shape[1] == 1
            attention = output.cross_attentions[0][row, 0][at]
            close(attention[:, source_at], [step.attention for step in steps])
            assert not attention[:, ~source_at].any()
        else:
            assert output.cross_attentions == ()


# Cells

WITH_PRODUCT = [name for name in CELLS if name != "ssru"]  # with h_{t-1}, which recurrent dropout is for


def layer_of(cell_type: str, recurrent_dropout: float = 0.0, zoneout: float = 0.0, size: int = 5) -> RecurrentLayer:
    layer = CELLS[cell_type](3, size, recurrent_dropout, zoneout).double()
    randomise(layer, 1)
    return layer


def draw(layer: RecurrentLayer, batch: int, size: int = 5) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """An input and a state."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    state = torch.randn(layer.num_states, batch, size, generator=generator, dtype=torch.float64)
    return x, tuple(state.unbind())


@pytest.mark.parametrize("zoneout", [0.0, 0.3])
@pytest.mark.parametrize("cell_type", list(CELLS))
def test_cell_step(cell_type: str, zoneout: float) -> None:
    rate = 0.5 if cell_type in WITH_PRODUCT else 0.0
    layer = layer_of(cell_type, recurrent_dropout=rate, zoneout=zoneout).eval()  # evaluation drops nothing
    x, state = draw(layer, 4)
    actual = layer.step(x, state, layer.sample_noise(x))
    weights = to_numpy(layer.state_dict())
    for row in range(4):
        expected = cell_step(cell_type, weights, x[row].numpy(), [s[row].numpy() for s in state], zoneout)
        assert len(actual) == len(expected)
        for tensor, array in zip(actual, expected, strict=True):
            close(tensor[row], array)


@pytest.mark.parametrize("cell_type", WITH_PRODUCT)
def test_recurrent_dropout_of_one_step(cell_type: str) -> None:
    """A given mask reaches every gate, but neither the memory cell nor the state that a GRU carries over."""
    layer = layer_of(cell_type, recurrent_dropout=0.5).train()
    x, state = draw(layer, 4)
    mask = torch.tensor([[0, 2, 2, 0, 2], [2, 2, 0, 0, 0], [0, 0, 0, 0, 0], [2, 2, 2, 2, 2]]).double()
    actual = layer.step(x, state, (mask,))
    weights = to_numpy(layer.state_dict())
    for row in range(4):
        old = [s[row].numpy() for s in state]
        expected = new_state(cell_type, weights, x[row].numpy(), old, mask[row].numpy())
        for tensor, array in zip(actual, expected, strict=True):
            close(tensor[row], array)


def test_recurrent_dropout_mask_is_inverted_and_has_the_right_share() -> None:
    layer = layer_of("lstm", recurrent_dropout=0.3).train()
    torch.manual_seed(0)
    (mask,) = layer.sample_noise(torch.zeros(2000, 3, dtype=torch.float64))
    kept = mask != 0
    assert mask.shape == (2000, 5)
    close(mask[kept], np.full(int(kept.sum()), 1 / 0.7))
    assert abs(kept.double().mean() - 0.7) < 5 * (0.3 * 0.7 / 10_000) ** 0.5


@pytest.mark.parametrize("cell_type", WITH_PRODUCT)
def test_recurrent_dropout_holds_one_mask_a_sequence(cell_type: str) -> None:
    """Every row of a training pass is the run under one of the 2^H constant masks, and rows differ in theirs."""
    size = 3
    layer = layer_of(cell_type, recurrent_dropout=0.5, size=size).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()  # a rectified unit that is always 0 would not show its mask
    xs = torch.randn(40, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).abs()
    torch.manual_seed(0)
    outputs, _ = layer.forward(xs)
    weights = to_numpy(layer.state_dict())
    found = set()
    for row in range(40):
        for bits in itertools.product([0.0, 2.0], repeat=size):
            state = [np.zeros(size) for _ in range(layer.num_states)]
            run = []
            for x in xs[row].numpy():
                state = new_state(cell_type, weights, x, state, np.array(bits))
                run.append(state[0])
            if np.allclose(outputs[row].detach().numpy(), run, rtol=0, atol=TOLERANCE):
                found.add(bits)
                break
        else:
            pytest.fail(f"row {row} is no run under a constant mask")
    assert len(found) > 4


@pytest.mark.parametrize(
    ("cell_type", "recurrent_dropout"), [*((name, 0.0) for name in CELLS), *((name, 0.5) for name in WITH_PRODUCT)]
)
def test_zoneout_in_training_keeps_old_or_takes_new(cell_type: str, recurrent_dropout: float) -> None:
    batch, zoneout = 400, 0.3
    layer = layer_of(cell_type, recurrent_dropout, zoneout).train()
    x, state = draw(layer, batch)
    torch.manual_seed(0)
    noise = layer.sample_noise(x)
    assert len(noise) == (1 if recurrent_dropout else 0)
    actual = [tensor.detach().numpy() for tensor in layer.step(x, state, noise)]
    weights = to_numpy(layer.state_dict())
    kept = np.zeros((layer.num_states, batch, 5), dtype=bool)
    for row in range(batch):
        old = [s[row].numpy() for s in state]
        new = new_state(cell_type, weights, x[row].numpy(), old, noise[0][row].numpy() if noise else None)
        for which in range(layer.num_states):
            is_old = np.abs(actual[which][row] - old[which]) <= TOLERANCE
            is_new = np.abs(actual[which][row] - new[which]) <= TOLERANCE
            assert (is_old ^ is_new).all()
            kept[which, row] = is_old
    for one in kept:
        assert abs(one.mean() - zoneout) < 5 * (zoneout * (1 - zoneout) / one.size) ** 0.5
    if layer.num_states == 2:  # h and c are kept independently of each other
        assert abs((kept[0] & kept[1]).mean() - zoneout**2) < 5 * (0.09 * 0.91 / kept[0].size) ** 0.5


@pytest.mark.parametrize("cell_type", ["gru", "rnn_tanh", "rnn_relu", "ln_gru"])
def test_zoneout_draws_anew_at_every_step(cell_type: str) -> None:
    """Seen from outside for the cells whose output is their whole state."""
    layer = layer_of(cell_type, zoneout=0.5).train()
    xs = torch.randn(60, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = torch.randn(60, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.manual_seed(0)
    outputs, _ = layer.forward(xs, (start,))
    states = [start.numpy(), *outputs.detach().numpy().transpose(1, 0, 2)]
    weights = to_numpy(layer.state_dict())
    kept = np.zeros((3, 60, 5), dtype=bool)
    for t, row in itertools.product(range(3), range(60)):
        old = states[t][row]
        (new,) = new_state(cell_type, weights, xs[row, t].numpy(), [old])
        is_old = np.abs(states[t + 1][row] - old) <= TOLERANCE
        assert (is_old | (np.abs(states[t + 1][row] - new) <= TOLERANCE)).all()
        kept[t, row] = is_old
    if cell_type != "rnn_relu":  # a rectifier's 0 after 0 is both old and new
        for first, second in itertools.combinations(kept, 2):
            assert 0.35 < (first == second).mean() < 0.65


# Encoder, bridge, attention


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("zoneout", [0.0, 0.2])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell_type", list(CELLS))
def test_encoder(cell_type: str, bidirectional: bool, residual: bool, zoneout: float, left: bool) -> None:
    model = build(
        cell_type=cell_type,
        bidirectional=bidirectional,
        encoder_residual=residual,
        encoder_layers=3,
        encoder_hidden_size=5,
        zoneout=zoneout,
    )
    input_ids, attention_mask = pad(SOURCES, left)
    output = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
    assert torch.equal(output.memory_mask, attention_mask.bool())
    weights = to_numpy(model.state_dict())
    for row, source in enumerate(SOURCES):
        expected = encode(weights, config_of(model), source)
        tokens = attention_mask[row].bool()
        close(output.last_hidden_state[row, tokens], expected.memory)
        assert not output.last_hidden_state[row, ~tokens].any()
        close(output.final_state[row], [np.stack(final) for final in expected.final])
        for tensor, array in zip(output.hidden_states, expected.outputs, strict=True):
            close(tensor[row, tokens], array)


@pytest.mark.parametrize("cells", [("lstm", "lstm"), ("lstm", "gru"), ("gru", "lstm"), ("rnn_tanh", "rnn_relu")])
@pytest.mark.parametrize("depths", [(1, 1), (2, 2), (3, 2), (1, 3)])
@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("bridge_type", ["zeros", "last", "mean", "linear"])
def test_bridge(bridge_type: str, width: int | None, depths: tuple[int, int], cells: tuple[str, str]) -> None:
    model = build(
        bridge_type=bridge_type,
        encoder_hidden_size=width,
        encoder_layers=depths[0],
        decoder_layers=depths[1],
        cell_type=cells[0],
        decoder_cell_type=cells[1],
        encoder_residual=True,
    )
    input_ids, attention_mask = pad(SOURCES, left=True)
    actual = model.model.bridge(model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask))
    weights = to_numpy(model.state_dict())
    for row, source in enumerate(SOURCES):
        expected = bridge(weights, config_of(model), encode(weights, config_of(model), source))
        assert [len(states) for states in actual] == [len(states) for states in expected]
        for states, arrays in zip(actual, expected, strict=True):
            for tensor, array in zip(states, arrays, strict=True):
                close(tensor[row], array)


@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
def test_attention(attention_type: AttentionType) -> None:
    """Several queries at a time, tokens at either end and padding between and around them."""
    width = None if "dot" in attention_type else 5
    fields: dict[str, Any] = {"attention_hidden_size": 3} if "additive" in attention_type else {}
    fields |= {"hidden_size": 6, "encoder_hidden_size": width, "bidirectional": width is not None}
    config = RnnSeq2SeqConfig(attention_type=attention_type, **fields)
    attention = ATTENTIONS[attention_type](config).double().eval()
    randomise(attention, 1)
    generator = torch.Generator().manual_seed(2)
    memory = torch.randn(3, 4, config.memory_size, generator=generator, dtype=torch.float64)
    queries = torch.randn(3, 2, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0]]).bool()
    prepared = attention.prepare(memory, mask)
    contexts, probabilities, _ = attention(queries, prepared, attention.first_alignment(prepared))
    weights = to_numpy(attention.state_dict())
    for row, t in itertools.product(range(3), range(2)):
        context, expected = attend(
            weights, attention_type, queries[row, t].numpy(), list(memory[row, mask[row]].numpy())
        )
        close(contexts[row, t], context)
        if attention_type == "none":
            assert probabilities.shape[1] == 0
        else:
            close(probabilities[row, 0, t, mask[row]], expected)
            assert not probabilities[row, 0, t, ~mask[row]].any()


# Wirings, heads, loss


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("depth_and_residual", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("attention_type", ATTENTION_TYPES)
@pytest.mark.parametrize("wiring_type", ["output_only", "input_feeding", "bahdanau"])
def test_wiring(wiring_type: str, attention_type: str, depth_and_residual: tuple[int, bool], left: bool) -> None:
    depth, residual = depth_and_residual
    model = build(
        wiring_type=wiring_type, attention_type=attention_type, decoder_layers=depth, decoder_residual=residual
    )
    compare_with_oracle(model, left)


@pytest.mark.parametrize("vocabularies", [{}, {"source_vocab_size": 13, "decoder_embedding_size": 6}])
@pytest.mark.parametrize("tied", [False, True])
def test_head(tied: bool, vocabularies: dict[str, int]) -> None:
    """Tied with a projection (embeddings of 4, features of 6) and without one (both 6)."""
    model = build(tie_word_embeddings=tied, **vocabularies)
    has_projection = "projection.weight" in below(model.state_dict(), "head")
    assert has_projection == (tied and not vocabularies)
    compare_with_oracle(model, left=True)


@pytest.mark.parametrize("num_items", [None, 17])
def test_loss(num_items: int | None) -> None:
    """To float32: transformers' loss function casts the logits to it whatever the model's type."""
    model = build()
    labels = [[4, 8, 2, -100, -100], [3, -100, 9, 5, 2], [-100, -100, -100, -100, -100], [7, 2, -100, -100, -100]]
    # The decoder reads the start token (1), then the labels but the last, with padding (0) for -100.
    read = [[1, *(0 if label == -100 else label for label in row[:-1])] for row in labels]
    input_ids, attention_mask = pad(SOURCES, left=False)
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=torch.tensor(labels),
        num_items_in_batch=num_items,
    )
    logits = oracle_logits(model.state_dict(), config_of(model), SOURCES, read)
    close(output.logits, np.stack(logits))
    assert output.loss.item() == pytest.approx(cross_entropy(logits, labels, num_items), rel=1e-6)


# Everything with everything

AXES: dict[str, list[object]] = {
    "cell_type": ["lstm", "gru", "rnn_tanh", "rnn_relu"],
    "decoder_cell_type": [None, "lstm", "gru", "rnn_tanh", "rnn_relu"],
    "encoder_layers": [1, 2, 3],
    "decoder_layers": [1, 2, 3],
    "bidirectional": [True, False],
    "encoder_residual": [False, True],
    "decoder_residual": [False, True],
    "bridge_type": ["zeros", "last", "mean", "linear"],
    "attention_type": ["none", "dot", "scaled_dot", "general", "additive", "normed_additive"],
    "wiring_type": ["output_only", "input_feeding", "bahdanau"],
    "encoder_hidden_size": [None, 5],
    "attention_hidden_size": [None, 3],
    "embedding_size": [4, 6],
    "source_vocab_size": [None, 13],
    "decoder_embedding_size": [None, 5],
    "tie_word_embeddings": [False, True],
    "zoneout": [0.0, 0.3],
}


def allowed(fields: dict[str, object]) -> bool:
    """What the configuration refuses: unequal widths under dot products, sizes of things that aren't there."""
    attention = str(fields["attention_type"])
    return (
        not (attention in ("dot", "scaled_dot") and fields["encoder_hidden_size"] is not None)
        and not ("additive" not in attention and fields["attention_hidden_size"] is not None)
        and not (fields["source_vocab_size"] is None and fields["decoder_embedding_size"] is not None)
    )


def pairs(fields: dict[str, object]) -> set[tuple[str, object, str, object]]:
    return {(a, fields[a], b, fields[b]) for a, b in itertools.combinations(AXES, 2)}


def pairwise() -> list[dict[str, object]]:
    """Sixty configurations, among them every pair of values that some sampled configuration holds, chosen greedily."""
    rng = np.random.default_rng(0)
    samples = [{name: values[rng.integers(len(values))] for name, values in AXES.items()} for _ in range(3000)]
    pool = [(fields, pairs(fields)) for fields in samples if allowed(fields)]
    missing = {pair for _, held in pool for pair in held}
    chosen: list[dict[str, object]] = []
    while missing:
        best, held = max(pool[:400], key=lambda item: len(item[1] & missing))
        if not held & missing:  # what is left is rare: look for it among all
            best, held = max(pool, key=lambda item: len(item[1] & missing))
        chosen.append(best)
        missing -= held
    return chosen + [fields for fields, _ in pool[: 60 - len(chosen)]]


CONFIGURATIONS = pairwise()


def test_every_possible_pair_of_values_is_tried() -> None:
    tried = {pair for fields in CONFIGURATIONS for pair in pairs(fields)}
    attentions, sized = AXES["attention_type"], ("additive", "normed_additive")
    impossible: set[tuple[str, object, str, object]] = {
        ("attention_type", a, "encoder_hidden_size", 5) for a in ("dot", "scaled_dot")
    }
    impossible |= {("attention_type", a, "attention_hidden_size", 3) for a in attentions if a not in sized}
    impossible |= {("source_vocab_size", None, "decoder_embedding_size", 5)}
    everything = {
        (a, x, b, y) for a, b in itertools.combinations(AXES, 2) for x, y in itertools.product(AXES[a], AXES[b])
    }
    assert everything - tried == impossible


@pytest.mark.parametrize("index", range(len(CONFIGURATIONS)))
def test_whole_model(index: int) -> None:
    compare_with_oracle(build(seed=index, **CONFIGURATIONS[index]), left=index % 2 == 0)
