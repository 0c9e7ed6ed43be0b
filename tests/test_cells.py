"""The recurrent cells: the layer-normalised ones and the SSRU against plain loops over their papers' equations, and
what every cell promises (steps, padding, chunks, types, first weights)."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ragged_batch, tiny_config
from torch import Tensor

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.configuration_rnn_seq2seq import CELLS_WITH_MEMORY
from hf_rnn_seq2seq.recurrent_layers import CELLS, LinearRecurrence, RecurrentLayer

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
NEW = ["ln_lstm", "ln_gru", "ssru"]
SIZE, WIDTH = 4, 5  # H, D
# No padding, padding on the right, on the left, on both sides, and a row without a token.
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [0] * 3 + [1] * 3, [0, 1, 1, 1, 0, 0], [0] * 6]).bool()

Weights = dict[str, Tensor]


def layer_of(cell: str, recurrent_dropout: float = 0.0, zoneout: float = 0.0, width: int = WIDTH) -> RecurrentLayer:
    """In float64, with weights that make every part of the equations matter."""
    torch.manual_seed(1)
    layer = CELLS[cell](width, SIZE, recurrent_dropout, zoneout).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def draw(layer: RecurrentLayer, batch: int, length: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Inputs [B, T, D] and a first state, which want gradients."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, length, layer.input_size, generator=generator, dtype=torch.float64)
    state = torch.randn(layer.num_states, batch, SIZE, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), tuple(value.clone().requires_grad_() for value in state)


def score(outputs: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    """A scalar in which every output and every part of the final state counts differently."""
    weights = torch.arange(1, outputs.numel() + 1, dtype=outputs.dtype).view_as(outputs).cos()
    return (weights * outputs).sum() + sum((k + 2) * value.sin().sum() for k, value in enumerate(state))


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Zeros for what the loss does not depend on."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def assert_all_close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, **CLOSE)


# Plain loops over vectors, from the papers


def sigmoid(v: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-v))


def norm(v: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Ba et al. 2016, eq. 4, of one vector."""
    mean = v.sum() / len(v)
    variance = ((v - mean) ** 2).sum() / len(v)
    return gain * (v - mean) / torch.sqrt(variance + 1e-5) + bias


def normed_products(w: Weights, which: str, v: Tensor, gates: int) -> list[Tensor]:
    """For each gate, its product with `v`, normalised."""
    rows = [slice(k * SIZE, (k + 1) * SIZE) for k in range(gates)]
    gain, bias = w[f"{which}_norm.weight"], w[f"{which}_norm.bias"]
    return [norm(w[f"weight_{which}"][r] @ v, gain[r], bias[r]) for r in rows]


def plain_ln_lstm(w: Weights, x: Tensor, state: list[Tensor], dropped: Tensor) -> list[Tensor]:
    c = state[1]
    from_x, from_h = normed_products(w, "ih", x, 4), normed_products(w, "hh", dropped, 4)
    i, f, g, o = (a + b for a, b in zip(from_x, from_h, strict=True))
    c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
    return [sigmoid(o) * torch.tanh(norm(c, w["memory_norm.weight"], w["memory_norm.bias"])), c]


def plain_ln_gru(w: Weights, x: Tensor, state: list[Tensor], dropped: Tensor) -> list[Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = normed_products(w, "ih", x, 3), normed_products(w, "hh", dropped, 3)
    new = 1 - sigmoid(x_z + h_z)  # Ba et al.'s z
    return [(1 - new) * state[0] + new * torch.tanh(x_n + sigmoid(x_r + h_r) * h_n)]


def plain_ssru(w: Weights, x: Tensor, state: list[Tensor], dropped: Tensor) -> list[Tensor]:
    f = sigmoid(w["weight_ih"][:SIZE] @ x + w["bias_f"])
    c = f * state[1] + (1 - f) * (w["weight_ih"][SIZE:] @ x)
    return [torch.where(c > 0, c, 0 * c), c]


PLAIN: dict[str, Callable[[Weights, Tensor, list[Tensor], Tensor], list[Tensor]]] = {
    "ln_lstm": plain_ln_lstm,
    "ln_gru": plain_ln_gru,
    "ssru": plain_ssru,
}


def plain_run(
    cell: str, w: Weights, x: Tensor, first: tuple[Tensor, ...], noise: Tensor | None = None, zoneout: float = 0.0
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Row by row, step by step; `noise` [B, H] multiplies h where it enters a product, zoneout is its expectation."""
    rows, finals = [], []
    for row, xs in enumerate(x):
        state, outputs = [value[row] for value in first], []
        for x_t in xs:
            dropped = state[0] if noise is None else noise[row] * state[0]
            new = PLAIN[cell](w, x_t, state, dropped)
            state = [zoneout * old + (1 - zoneout) * one for old, one in zip(state, new, strict=True)]
            outputs.append(state[0])
        rows.append(torch.stack(outputs))
        finals.append(state)
    return torch.stack(rows), tuple(torch.stack(values) for values in zip(*finals, strict=True))


@pytest.mark.parametrize("zoneout", [0.0, 0.3])
@pytest.mark.parametrize("cell", NEW)
def test_values_and_gradients_are_those_of_the_equations(cell: str, zoneout: float) -> None:
    layer = layer_of(cell, zoneout=zoneout).eval()
    x, first = draw(layer, batch=3, length=5)
    actual = layer(x, first)
    weights = dict(layer.named_parameters())
    expected = plain_run(cell, weights, x, first, zoneout=zoneout)
    assert_all_close(actual, expected)
    inputs = (*weights.values(), x, *first)
    found = gradients(score(*actual), *inputs)
    assert_all_close(found, gradients(score(*expected), *inputs))
    h = len(weights) + 1
    idle = [] if cell != "ssru" or zoneout else [h]  # an SSRU's step does not read h
    assert [k for k, gradient in enumerate(found) if (gradient == 0).all()] == idle


@pytest.mark.parametrize("cell", ["ln_lstm", "ln_gru"])
def test_recurrent_dropout_enters_the_products_alone(cell: str) -> None:
    """One mask a sequence, before the product; neither c nor what a GRU carries over is dropped."""
    layer = layer_of(cell, recurrent_dropout=0.5).train()
    x, first = draw(layer, batch=6, length=4)
    torch.manual_seed(3)
    (noise,) = layer.sample_noise(x)
    assert set(noise.unique().tolist()) == {0.0, 2.0}
    torch.manual_seed(3)
    actual = layer(x, first)
    weights = dict(layer.named_parameters())
    expected = plain_run(cell, weights, x, first, noise)
    assert_all_close(actual, expected)
    inputs = (*weights.values(), x, *first)
    assert_all_close(gradients(score(*actual), *inputs), gradients(score(*expected), *inputs))
    assert_all_close(layer.eval()(x, first), plain_run(cell, weights, x, first))


@pytest.mark.parametrize("cell", NEW)
def test_zoneout_in_training_keeps_old_or_takes_new(cell: str) -> None:
    layer = layer_of(cell, zoneout=0.3).train()
    x, first = draw(layer, batch=300, length=1)
    torch.manual_seed(3)
    zoned = layer(x, first)[1]
    new = plain_run(cell, dict(layer.named_parameters()), x, first)[1]
    kept = []
    for z, o, n in zip(zoned, first, new, strict=True):
        is_old, is_new = (z - o).abs() < 1e-12, (z - n).abs() < 1e-12
        assert (is_old ^ is_new).all()
        kept.append(is_old)
        assert abs(is_old.double().mean() - 0.3) < 5 * math.sqrt(0.21 / is_old.numel())
    assert len(kept) == 1 or 0.3 < (kept[0] == kept[1]).double().mean() < 0.85  # h and c each for itself


def test_ssru_refuses_recurrent_dropout() -> None:
    with pytest.raises(ValueError, match=r"`recurrent_dropout`=0.1.*no recurrent matrix"):
        CELLS["ssru"](3, 4, recurrent_dropout=0.1)


@pytest.mark.parametrize("cell", NEW)
def test_gradcheck(cell: str) -> None:
    layer = layer_of(cell)
    x = torch.randn(5, 6, WIDTH, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given_weights = dict(zip(names, weights, strict=True))
        outputs, state = torch.func.functional_call(layer, given_weights, (x, None, MASK))
        return outputs, *state

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


# The scan


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_gradcheck_of_the_scan(length: int) -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, length, 3).double(), torch.randn(2, length, 3).double()
    inputs = [value.requires_grad_() for value in (a, b, torch.randn(2, 3).double())]
    assert torch.autograd.gradcheck(LinearRecurrence.apply, inputs)
    assert torch.autograd.gradgradcheck(LinearRecurrence.apply, inputs)


@settings(max_examples=40)
@given(length=st.integers(1, 140), seed=st.integers(0, 1000))
def test_scan_equals_the_loop(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(2, length, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, length, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    c = first = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    steps = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        c = a_t * c + b_t
        steps.append(c)
    expected, actual = torch.stack(steps, dim=1), LinearRecurrence.apply(a, b, first)
    assert_all_close(actual, expected)
    inputs = (a, b, first)
    assert_all_close(gradients(score(actual, ()), *inputs), gradients(score(expected, ()), *inputs))


@pytest.mark.parametrize("scale", [1.0, 1e4])  # the latter shuts and opens gates completely
def test_ssru_over_a_long_sequence(scale: float) -> None:
    layer = layer_of("ssru")
    x, first = draw(layer, batch=2, length=2000)
    x = (scale * x).detach().requires_grad_()
    weights = list(layer.parameters())
    scanned, looped = layer(x, first), layer._forward_by_steps(x, first, None)
    torch.testing.assert_close(scanned, looped, rtol=1e-10, atol=1e-10 * scale)
    for one, other in zip(*(gradients(score(*run), x, *weights) for run in (scanned, looped)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10 * scale)
    layer.float()
    x = x.detach().float().requires_grad_()
    single = layer(x, tuple(value.detach().float() for value in first))
    torch.testing.assert_close(single[0].double(), scanned[0], rtol=1e-4, atol=1e-4 * scale)
    single[0].sum().backward()
    for value in (x, *layer.parameters()):
        assert value.grad is not None
        assert value.grad.isfinite().all()


# What every cell promises


def test_cells_with_memory_are_those_of_two_states() -> None:
    assert set(CELLS_WITH_MEMORY) == {name for name, cell in CELLS.items() if cell.num_states == 2}
    assert {cell.num_states for cell in CELLS.values()} == {1, 2}


@pytest.mark.parametrize("zoneout", [0.0, 0.2])
@pytest.mark.parametrize("cell", CELLS)
def test_steps_chunks_and_the_whole_are_equal(cell: str, zoneout: float) -> None:
    layer = layer_of(cell, zoneout=zoneout).eval()
    x, first = draw(layer, batch=3, length=7)
    inputs = (*layer.parameters(), x, *first)
    whole, final = layer(x, first)
    expected = gradients(score(whole, final), *inputs)
    for lengths in ([1] * 7, [3, 1, 3]):
        state, parts = first, []
        for part in x.split(lengths, dim=1):
            outputs, state = layer(part, state)
            parts.append(outputs)
        assert_all_close((torch.cat(parts, dim=1), state), (whole, final))
        assert_all_close(gradients(score(torch.cat(parts, dim=1), state), *inputs), expected)
    state, steps = first, []
    for x_t in x.unbind(1):
        state = layer.step(x_t, state)
        steps.append(state[0])
    assert_all_close((torch.stack(steps, dim=1), state), (whole, final))
    assert_all_close(gradients(score(torch.stack(steps, dim=1), state), *inputs), expected)


@pytest.mark.parametrize("zoneout", [0.0, 0.2])
@pytest.mark.parametrize("cell", CELLS)
def test_padding_on_either_side_changes_nothing(cell: str, zoneout: float) -> None:
    """What stands at padding reaches neither values nor gradients, even if it is not a number."""
    layer = layer_of(cell, zoneout=zoneout).eval()
    x, _ = draw(layer, batch=len(MASK), length=MASK.size(1))
    padded = x.detach().masked_fill(~MASK.unsqueeze(-1), float("nan")).requires_grad_()
    outputs, final = layer(padded, None, MASK)
    assert (outputs[~MASK] == 0).all()
    assert all((value[-1] == 0).all() for value in final)  # the row without tokens
    rows, finals = [], []
    for row in range(len(MASK) - 1):
        output, state = layer(x[row : row + 1, MASK[row]])
        rows.append(output[0])
        finals.append(torch.cat(state))
        assert_all_close(outputs[row, MASK[row]], output[0])
        assert_all_close(torch.stack([value[row] for value in final]), finals[-1])
    weights = tuple(layer.parameters())
    alone = score(torch.cat(rows), tuple(torch.stack(finals).unbind(1)))
    together = score(outputs[MASK], tuple(value[:-1] for value in final))
    *of_weights, of_x = gradients(together, *weights, padded)
    assert (of_x[~MASK] == 0).all()
    assert_all_close([*of_weights, of_x[MASK]], [*(g := gradients(alone, *weights, x))[:-1], g[-1][MASK]])


@pytest.mark.parametrize("cell", CELLS)
def test_no_mask_with_a_state(cell: str) -> None:
    layer = layer_of(cell)
    x, first = draw(layer, batch=len(MASK), length=MASK.size(1))
    with pytest.raises(ValueError, match="starts from zeros"):
        layer(x, first, MASK)


@pytest.mark.parametrize("cell", NEW)
def test_the_loop_equals_the_fast_way(cell: str) -> None:
    layer = layer_of(cell)
    x, first = draw(layer, batch=len(MASK), length=MASK.size(1))
    inputs = (*layer.parameters(), x)
    for state, mask in ((first, None), (layer.zero_state(x), MASK)):
        fast = layer(x, None if mask is not None else state, mask)
        loop = layer._forward_by_steps(x, state, mask)
        assert_all_close(fast, loop)
        assert_all_close(gradients(score(*fast), *inputs), gradients(score(*loop), *inputs))


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16_weights", "autocast"])
@pytest.mark.parametrize("cell", CELLS)
def test_in_bfloat16(cell: str, autocast: bool) -> None:
    """Of one type everywhere, near the result in float64, with gradients in the weights' type."""
    layer = layer_of(cell)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(0.5)
    x, _ = draw(layer, batch=len(MASK), length=MASK.size(1))
    expected, _ = layer(x, None, MASK)
    layer.to(torch.float32 if autocast else torch.bfloat16)
    x = x.detach().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs, state = layer(x, None, MASK)
        stepped = layer.step(x[:, 0], layer.zero_state(x))
        looped, after = layer._forward_by_steps(x, layer.zero_state(x), MASK)
    for value in (outputs, looped, *state, *stepped, *after):
        assert value.dtype == torch.bfloat16
    for value in (outputs, looped):
        assert (value.double() - expected).abs().max() < 0.05 * max(1, expected.abs().max())
    outputs.float().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("cell", CELLS)
def test_a_transition_without_input(cell: str) -> None:
    """A width of 0 is an input of zeros, from the first weights on."""
    layer = CELLS[cell](0, SIZE)
    layer.reset_weights()
    layer = layer_of(cell, width=0)
    other = layer_of(cell)
    other.load_state_dict({**layer.state_dict(), "weight_ih": other.weight_ih})
    x, state = draw(layer, batch=3, length=1)
    assert_all_close(layer.step(x[:, 0], state), other.step(torch.zeros(3, WIDTH).double(), state))
    sum(value.sum() for value in layer.step(x[:, 0], state)).backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("cell", NEW)
def test_first_weights(cell: str) -> None:
    torch.manual_seed(0)
    layer = CELLS[cell](WIDTH, SIZE)
    layer.reset_weights()
    weights = dict(layer.named_parameters())
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            assert (weight == 1).all()
        elif name == "weight_hh":
            for gate in weight.split(SIZE):
                torch.testing.assert_close(gate @ gate.T, torch.eye(SIZE))
        elif name == "weight_ih":
            assert weight.abs().max() <= math.sqrt(6 / (SIZE + WIDTH))
            assert weight.std() > 0.5 * math.sqrt(2 / (SIZE + WIDTH))
        else:
            open_gate = 1 if (cell, name) == ("ln_lstm", "ih_norm.bias") else 0
            expected = torch.zeros_like(weight)
            expected[open_gate * SIZE : 2 * open_gate * SIZE] = 1
            assert torch.equal(weight, expected), name
    for weight in weights.values():
        torch.nn.init.constant_(weight, 7)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # what transformers marks as loaded
    layer.reset_weights()
    assert all((weight == 7).all() for weight in weights.values())


@pytest.mark.parametrize("cell", CELLS)
def test_a_step_compiles_without_graph_breaks(cell: str) -> None:
    torch._dynamo.reset()
    layer = layer_of(cell).eval()
    x, state = draw(layer, batch=2, length=6)
    compiled = torch.compile(layer.step, fullgraph=True, backend="eager")
    assert_all_close(compiled(x[:, 0], state), layer.step(x[:, 0], state))


def test_a_scan_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    layer = layer_of("ssru")
    x, _ = draw(layer, batch=len(MASK), length=MASK.size(1))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    inputs = (*layer.parameters(), x)
    actual, expected = compiled(x, None, MASK), layer(x, None, MASK)
    assert_all_close(actual, expected)
    assert_all_close(gradients(score(*actual), *inputs), gradients(score(*expected), *inputs))


@pytest.mark.parametrize("cells", [("ln_lstm", None), ("ln_gru", None), ("ln_lstm", "ssru")])
def test_a_model_learns_and_generates(cells: tuple[str, str | None]) -> None:
    torch.manual_seed(0)
    config = tiny_config(
        cell_type=cells[0], decoder_cell_type=cells[1], hidden_size=32, embedding_size=16, encoder_layers=2,
        dropout=0.0, embedding_dropout=0.0, output_dropout=0.0,
    )  # fmt: skip
    model = RnnSeq2SeqForConditionalGeneration(config)
    source, mask = ragged_batch([5, 4, 3, 5], side="both")
    labels = torch.full((4, 6), -100)
    for row, (ids, keep) in enumerate(zip(source, mask.bool(), strict=True)):  # reverse the source
        target = torch.cat((ids[keep].flip(0), torch.tensor([config.eos_token_id])))
        labels[row, : len(target)] = target
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(source, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    model.eval()
    for beams in (1, 3):
        output = model.generate(source, attention_mask=mask, num_beams=beams, max_new_tokens=6)[:, 1:]
        for row, target in enumerate(labels):
            expected = target[target >= 0]
            assert torch.equal(output[row, : len(expected)], expected)
