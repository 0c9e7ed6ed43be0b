import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import AXES, tiny_model
from torch import nn

from hf_rnn_seq2seq.dropout import STEPS, Dropout, dropout_noise, random_mask

CPU = torch.device("cpu")


@given(shape=st.lists(st.integers(0, 9), max_size=3).map(tuple), p=st.floats(0, 1, exclude_max=True))
def test_noise_is_zero_or_one_value(shape, p):
    noise = dropout_noise(shape, p, torch.empty(0, dtype=torch.float64))
    assert noise.shape == shape
    assert noise.dtype == torch.float64
    assert set(noise.flatten().tolist()) <= {0.0, 1 / (1 - p)}


@pytest.mark.parametrize("p", [2**-16, 0.1, 0.35, 0.5, 0.9, 1 - 2**-16])
def test_shares_are_the_probability(p):
    """Of each of a draw's four numbers by itself, and of all pairs of them, within five standard deviations."""
    torch.manual_seed(0)
    mask = random_mask((2**20, 4), p, CPU)
    spread = 5 * math.sqrt(p * (1 - p) / len(mask))
    share = round(p * STEPS) / STEPS
    assert (mask.double().mean(0) - share).abs().max() < spread
    for first in range(4):
        for second in range(first):
            both = (mask[:, first] & mask[:, second]).double().mean().item()
            assert abs(both - share**2) < 5 * math.sqrt(share**2 * (1 - share**2) / len(mask)) + 1e-9
    following = (mask[:-1] & mask[1:]).double().mean().item()  # of one draw and the next
    assert abs(following - share**2) < spread


def test_certainty():
    assert not random_mask((5, 3), 0.0, CPU).any()
    assert random_mask((5, 3), 1.0, CPU).all()


def test_dropout_and_its_gradient_are_the_noise():
    x = torch.randn(7, 5, 3, dtype=torch.float64).transpose(0, 1).requires_grad_()
    layer = Dropout(0.3)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    noise = dropout_noise(x.shape, 0.3, x)
    assert noise.unique().tolist() == [0, 1 / (1 - 0.3)]
    assert torch.equal(y, x * noise)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, noise)
    assert not torch.equal(layer(x), y)


def test_what_drops_nothing_or_everything():
    x = torch.randn(4, 6)
    assert torch.equal(Dropout(0.4).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), 0 * x)
    assert torch.equal(Dropout(1e-6)(x), x * (1 / (1 - 1e-6)))  # less than half of 2^-16
    assert torch.equal(Dropout(1 - 1e-6)(x), 0 * x)
    half = Dropout(0.5)(torch.ones(64, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert set(half.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("encoder", AXES["encoder"], ids=str)
def test_every_dropout_of_a_model_is_ours(encoder):
    found = [module for module in tiny_model(**encoder).modules() if isinstance(module, nn.Dropout)]
    assert len(found) >= 4
    assert all(type(module) is Dropout for module in found)
