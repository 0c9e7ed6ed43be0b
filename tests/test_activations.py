"""tanh by the sigmoid: where it is taken, and that it is tanh."""

import pytest
import torch

from hf_rnn_seq2seq import activations
from hf_rnn_seq2seq.activations import WORTH_CALLS, Tanh, has_sigmoid_tanh, tanh
from hf_rnn_seq2seq.recurrent_layers import CELLS, lstm_update, lstm_update_by_sigmoids

TOLERANCES = {torch.float32: 2.5e-7, torch.float64: 5e-16}


@pytest.fixture
def numbers():
    """From far below to far above, and what is neither."""
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-30, 200.0, -200.0], dtype=torch.float64)
    return torch.cat((ends, torch.linspace(-20, 20, WORTH_CALLS, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_is_tanh(numbers, dtype, monkeypatch):
    x = numbers.to(dtype)
    before = x.clone()
    with torch.no_grad():
        found = Tanh()(x)
    torch.testing.assert_close(found, torch.tanh(x), atol=TOLERANCES[dtype], rtol=0, equal_nan=True)
    assert not torch.equal(found.nan_to_num(), torch.tanh(x).nan_to_num())  # it is the other way that was taken
    assert found[0] == 0
    assert (found[~found.isnan()].abs() <= 1).all()
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    monkeypatch.setattr(activations, "WORTH_CALLS", 2 * WORTH_CALLS)
    with torch.no_grad():
        assert torch.equal(tanh(x).nan_to_num(), torch.tanh(x).nan_to_num())


def test_training_and_sixteen_bits_have_tanh_itself(numbers):
    for x in (numbers.bfloat16(), numbers.half()):
        with torch.no_grad():
            assert not has_sigmoid_tanh(x)
            assert torch.equal(tanh(x).nan_to_num(), torch.tanh(x).nan_to_num())
    x = numbers[8:].clone().requires_grad_()
    assert not has_sigmoid_tanh(x)
    tanh(x).sum().backward()
    torch.testing.assert_close(x.grad, 1 - torch.tanh(x.detach()) ** 2)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_an_lstm_by_sigmoids(dtype):
    torch.manual_seed(0)
    gates, c = 5 * torch.randn(7, 48, dtype=dtype), 3 * torch.randn(7, 12, dtype=dtype)
    expected = lstm_update(gates, c)
    before = c.clone()
    for found, plain in zip(lstm_update_by_sigmoids(gates.clone(), c), expected, strict=True):
        torch.testing.assert_close(found, plain, atol=20 * TOLERANCES[dtype], rtol=0)
    assert torch.equal(c, before)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_steps_without_and_with_a_gradient(cell, monkeypatch):
    monkeypatch.setattr(activations, "WORTH_CALLS", 0)
    torch.manual_seed(0)
    layer = CELLS[cell](3, 4).double().eval()
    layer.reset_weights()
    x, state = torch.randn(5, 3, dtype=torch.float64), torch.randn(layer.num_states, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        found = layer.step(x, tuple(state))
    for one, other in zip(found, layer.step(x, tuple(state)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=0)
