"""Products inside the time loop: the values and gradients of plain ones, each weight's gradient in one product."""

import copy
import gc

import pytest
import torch
from models import CONFIGURATIONS, batch_of, tiny_model
from torch import nn
from torch.nn import functional as F

import hf_rnn_seq2seq.decoder
from hf_rnn_seq2seq.recurrent_layers import LSTM, LstmUpdate, lstm_update
from hf_rnn_seq2seq.step_products import StepLinear, Waiting, linear, memory_product, shared_by_steps


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


def names_in_graph(tensor):
    """Of all nodes of its backward pass."""
    seen, nodes = set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


def test_a_gradient_is_made_once(loop, x):
    calls = []
    loop.product.weight.register_hook(lambda grad: calls.append(grad))
    loop(x, True).sum().backward()
    assert "_ProductBackward" in names_in_graph(loop(x, True))  # our products, not torch's
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


class Reader(nn.Module):
    """An LSTM that reads what it finds: q_t = h_t, a_t = softmax(q_t M^T), x_{t+1} = a_t M."""

    def __init__(self, size=4):
        super().__init__()
        self.layer = LSTM(size, size)
        self.layer.reset_weights()

    def forward(self, memory, active, steps=5):
        """memory [B, S, D] -> the sum of what was found, [B, 1, D]."""
        x, state, total = memory[:, 0], self.layer.zero_state(memory), 0
        with shared_by_steps(active):
            for _ in range(steps):
                state = self.layer.step(x, state)
                weights = memory_product(state[0].unsqueeze(1), memory, transposed=True).softmax(-1)
                found = memory_product(weights, memory)
                x, total = found.squeeze(1), total + found
        return total


@pytest.fixture
def reader():
    torch.manual_seed(0)
    return Reader().double()


@pytest.fixture
def memory():
    return torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)


def test_a_step_of_an_lstm_and_of_attention_is_ours(reader, memory):
    ours, plain = names_in_graph(reader(memory, True)), names_in_graph(reader(memory, False))
    assert {"_ProductPairBackward", "_MemoryProductBackward"} <= ours - plain
    calls = []
    for parameter in reader.parameters():
        parameter.register_hook(lambda grad: calls.append(grad))
    reader(memory, True).sum().backward()
    assert len(calls) == 4  # once each, not once a step


@pytest.mark.parametrize("backward", [True, False])
def test_what_a_loop_made_goes_with_its_result(reader, memory, backward):
    """Not only when Python looks for garbage."""

    def records():
        return [one for one in gc.get_objects() if isinstance(one, Waiting) and id(one) not in others]

    gc.collect()
    others: set[int] = set()  # of other tests
    others = {id(one) for one in records()}
    gc.disable()
    try:
        total = reader(memory, True).sum()
        assert len(records()) == 3  # of the LSTM's weights, and of the memory in two products
        if backward:
            total.backward()
        del total
        assert records() == []
    finally:
        gc.enable()


def test_gradients_of_a_step_by_finite_differences(reader, memory):
    names, parameters = zip(*reader.named_parameters(), strict=True)
    torch.autograd.gradcheck(
        lambda m, *values: torch.func.functional_call(reader, dict(zip(names, values, strict=True)), (m, True)),
        (memory, *parameters),
    )


@pytest.mark.parametrize("frozen", [(), ("weight_ih",), ("bias_hh",), ("weight_hh", "bias_ih"), "all", "memory"])
def test_a_step_with_frozen_parts(reader, memory, frozen):
    for name, parameter in reader.layer.named_parameters():
        parameter.requires_grad_(frozen != "all" and name not in frozen)
    if frozen == "memory":
        memory.requires_grad_(False)
    expected, results = copy.deepcopy(reader), []
    for model, active in ((reader, True), (expected, False)):
        memory.grad = None
        model(memory, active).sum().backward()
        results.append([memory.grad, *(parameter.grad for parameter in model.parameters())])
    for found, plain in zip(*results, strict=True):
        assert (found is None) == (plain is None)
        if found is not None:
            torch.testing.assert_close(found, plain)


def test_a_step_twice_and_only_by_the_memory(reader, memory):
    total = reader(memory, True).sum()
    (alone,) = torch.autograd.grad(total, [memory], retain_graph=True)
    total.backward(retain_graph=True)
    once = [memory.grad.clone(), *(parameter.grad.clone() for parameter in reader.parameters())]
    torch.testing.assert_close(alone, once[0])
    total.backward()
    for grad, first in zip([memory.grad, *(parameter.grad for parameter in reader.parameters())], once, strict=True):
        torch.testing.assert_close(grad, 2 * first)


def test_a_step_under_autocast(reader, memory):
    reader, memory, results = reader.float(), memory.detach().float().requires_grad_(), []
    for active in (True, False):
        memory.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            total = reader(memory, active)
        assert total.dtype == torch.bfloat16
        total.float().sum().backward()
        assert memory.grad.dtype == torch.float32
        results.append((total.detach().float(), memory.grad))
    for found, plain in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=0.05, atol=0.05)  # sums in another order, in bfloat16


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
