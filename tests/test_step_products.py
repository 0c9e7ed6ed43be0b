"""Products inside the time loop: the values and gradients of plain ones, each weight's gradient in one product."""

import copy

import pytest
import torch
from models import CONFIGURATIONS, batch_of, tiny_model
from torch import nn
from torch.nn import functional as F

import hf_rnn_seq2seq.decoder
from hf_rnn_seq2seq.recurrent_layers import LSTM, LstmUpdate, lstm_update
from hf_rnn_seq2seq.step_products import StepLinear, linear, shared_by_steps


@pytest.fixture
def plain_loop(monkeypatch):
    """Call it, and the decoder's loop goes without `shared_by_steps`."""

    def switch_off():
        monkeypatch.setattr(hf_rnn_seq2seq.decoder, "shared_by_steps", lambda active=True: shared_by_steps(False))

    return switch_off


def gradients(model, batch, seed=0):
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_every_configuration_trains_as_with_plain_products(options, plain_loop):
    model = tiny_model(**options).train()
    torch.manual_seed(0)
    labels = torch.randint(4, model.config.vocab_size, (3, 5))
    labels[1, 3:] = -100
    batch = batch_of(model, torch.randint(4, 10, (3, 4))) | {"labels": labels}
    logits, found = gradients(model, batch)
    plain_loop()
    expected_logits, expected = gradients(model, batch)
    torch.testing.assert_close(logits, expected_logits, atol=1e-10, rtol=1e-10)
    assert {name for name, grad in found.items() if grad is None} == {n for n, g in expected.items() if g is None}
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(found[name], grad, atol=1e-10, rtol=1e-10, msg=name)


class Loop(nn.Module):
    """h_t = tanh(W [x_t; h_{t-1}] + b)"""

    def __init__(self, size=5):
        super().__init__()
        self.product = StepLinear(2 * size, size)

    def forward(self, x, active):
        h = x[:, 0] * 0
        with shared_by_steps(active):
            for x_t in x.unbind(1):
                h = torch.tanh(self.product(torch.cat((x_t, h), dim=-1)))
        return h


@pytest.fixture
def loop():
    torch.manual_seed(0)
    return Loop().double()


@pytest.fixture
def x():
    return torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)


def test_a_gradient_is_made_once(loop, x):
    calls = []
    loop.product.weight.register_hook(lambda grad: calls.append(grad))
    loop(x, True).sum().backward()
    accumulations = loop(x, True).grad_fn
    while accumulations is not None and type(accumulations).__name__ != "_ProductBackward":
        accumulations = accumulations.next_functions[0][0]
    assert accumulations is not None  # the graph holds our products, not torch's
    assert len(calls) == 1


def test_gradients_by_finite_differences(loop, x):
    weight, bias = loop.product.weight, loop.product.bias
    torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(loop, {"product.weight": w, "product.bias": b}, (x, True)),
        (x, weight, bias),
    )


def test_backward_twice_and_accumulation(loop, x):
    result = loop(x, True).sum()
    result.backward(retain_graph=True)
    once = loop.product.weight.grad.clone()
    result.backward()
    torch.testing.assert_close(loop.product.weight.grad, 2 * once)


def test_a_backward_pass_that_does_not_ask_for_the_weight_leaves_nothing_behind(loop, x):
    result = loop(x, True).sum()
    (of_x,) = torch.autograd.grad(result, [x], retain_graph=True)
    result.backward()
    weight_grad = loop.product.weight.grad.clone()
    loop.zero_grad()
    loop(x, False).sum().backward()
    torch.testing.assert_close(weight_grad, loop.product.weight.grad)
    torch.testing.assert_close(of_x * 2, x.grad)  # two backward passes reached x


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_weights(loop, x, frozen):
    for name in ("weight", "bias") if frozen == "both" else (frozen,):
        getattr(loop.product, name).requires_grad_(False)
    expected = copy.deepcopy(loop)
    loop(x, True).sum().backward()
    grad_x, x.grad = x.grad, None
    expected(x, False).sum().backward()
    torch.testing.assert_close(grad_x, x.grad)
    for found, plain in zip(loop.parameters(), expected.parameters(), strict=True):
        assert (found.grad is None) == (plain.grad is None)
        if found.grad is not None:
            torch.testing.assert_close(found.grad, plain.grad)


def test_under_autocast_as_torch_does_it(loop, x):
    loop, x = loop.float(), x.detach().float()
    results = []
    for active in (True, False):
        loop.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = loop(x, active)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert loop.product.weight.grad.dtype == torch.float32
        results.append((y.detach(), loop.product.weight.grad.clone()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(
        results[0][1], results[1][1], rtol=0.02, atol=0.02
    )  # sums in another order, in bfloat16


def test_second_derivatives_are_refused(loop, x):
    (grad,) = torch.autograd.grad(loop(x, True).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_outside_of_a_loop_it_is_the_plain_product(x):
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    with shared_by_steps(), torch.no_grad():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_lstm_update_is_its_equations():
    torch.manual_seed(0)
    parts = [torch.randn(3, size, dtype=torch.float64, requires_grad=True) for size in (16, 16, 4)]
    torch.autograd.gradcheck(LstmUpdate.apply, parts)
    for found, plain in zip(LstmUpdate.apply(*parts), lstm_update(parts[0] + parts[1], parts[2]), strict=True):
        torch.testing.assert_close(found, plain)
    strided = [part.detach().t().contiguous().t().requires_grad_() for part in parts]  # non-contiguous input
    torch.autograd.gradcheck(LstmUpdate.apply, strided)


def test_a_compiled_step_is_the_same():
    layer = LSTM(3, 4).double()
    layer.reset_weights()
    x, state = torch.randn(2, 3, dtype=torch.float64), tuple(torch.randn(2, 2, 4, dtype=torch.float64))
    compiled = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    for found, plain in zip(compiled(x, state), layer.step(x, state), strict=True):
        torch.testing.assert_close(found, plain)
