"""Additive attention's scores in parts against the plain equation, and what is kept for the backward pass."""

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from hf_rnn_seq2seq import additive_scores as module
from hf_rnn_seq2seq import attention, content_attention
from hf_rnn_seq2seq.additive_scores import additive_scores, plain_additive_scores
from hf_rnn_seq2seq.step_products import LoopKeys, shared_by_steps
from tests.models import CONFIGURATIONS, batch_of, name_of, ragged_batch, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
Scores = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def draw(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_()


def tensors(
    batch: int, length: int, source: int, heads: int, width: int, seed: int = 0, **kwargs: Any
) -> list[torch.Tensor]:
    """Queries, keys, v."""
    torch.manual_seed(seed)
    size = heads * width
    return [draw(batch, length, size, **kwargs), draw(batch, source, size, **kwargs), draw(heads, width, **kwargs)]


def values_and_gradients(scores: Scores, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    found = scores(*inputs)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    return [found.detach(), *torch.autograd.grad((found * weight).sum() + found.sin().sum(), inputs)]


def assert_all_close(one: list[torch.Tensor], other: list[torch.Tensor], **tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, **tolerance)


@settings(max_examples=40)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 7),
    source=st.integers(1, 7),
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
    numbers=st.sampled_from([1, 30, 100, 10**6]),
    scale=st.sampled_from([0.01, 1.0, 6.0, 30.0]),
)
def test_equal_the_equation(
    batch: int, length: int, source: int, heads: int, width: int, numbers: int, scale: float
) -> None:
    inputs = tensors(batch, length, source, heads, width, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUMBERS_AT_ONCE", numbers)
        found = values_and_gradients(additive_scores, inputs)
        with torch.no_grad():
            torch.testing.assert_close(additive_scores(*inputs), found[0], **EXACT)
    assert_all_close(found, values_and_gradients(plain_additive_scores, inputs), **EXACT)


@pytest.mark.parametrize("length", [1, 4])
def test_takes_views(length: int) -> None:
    """Expanded and transposed arguments, and an expanded gradient, as sum() makes one."""
    torch.manual_seed(0)
    query = draw(1, length, 6)
    keys = draw(5, 3, 6)
    v = draw(3, 2)
    parts: list[list[torch.Tensor]] = []
    for scores in (additive_scores, plain_additive_scores):
        found = scores(query.expand(3, -1, -1), keys.transpose(0, 1), v.t())
        parts.append([found.detach(), *torch.autograd.grad(found.sum(), (query, keys, v))])
    assert_all_close(parts[0], parts[1], **EXACT)


@pytest.mark.parametrize("shape", [(2, 3, 4, 1, 5), (2, 1, 4, 1, 5), (2, 3, 4, 2, 3)])
def test_gradients_against_finite_differences(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(additive_scores, tensors(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 6])
def test_other_types_sum_in_float32(dtype: torch.dtype, length: int) -> None:
    inputs = tensors(3, length, 9, 1, 64, dtype=dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    scores, *gradients = values_and_gradients(additive_scores, inputs)
    expected, *wide_gradients = values_and_gradients(plain_additive_scores, wide)
    assert scores.dtype == torch.float32
    assert [g.dtype for g in gradients] == [dtype] * 3
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-5)
    tolerance = {"rtol": 2e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    assert_all_close([g.double() for g in gradients], wide_gradients, **tolerance)


def test_autocast_does_not_round_the_sums() -> None:
    query, keys, v = tensors(2, 5, 6, 1, 200, dtype=torch.float32)
    query, keys = (tensor.detach().bfloat16().requires_grad_() for tensor in (query, keys))
    outside = values_and_gradients(additive_scores, [query, keys, v])
    with torch.autocast("cpu", torch.bfloat16):
        inside = values_and_gradients(additive_scores, [query, keys, v])
        with torch.no_grad():
            torch.testing.assert_close(additive_scores(query, keys, v), outside[0])
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_extreme_arguments_neither_overflow_nor_lose_their_sum() -> None:
    """The hidden layer sees q + k: that both are large says nothing."""
    query = torch.tensor([[[300.0, -300.0, 1e30, 0.0]]], requires_grad=True)
    keys = torch.tensor([[[-299.5, 300.5, 1e30, -1e30]]], requires_grad=True)
    v = torch.ones(1, 4)
    found = additive_scores(query, keys, v)
    torch.testing.assert_close(found, plain_additive_scores(query, keys, v))
    found.sum().backward()
    expected = torch.tensor([1 - 0.5**2, 1 - 0.5**2, 0, 0])
    assert query.grad is not None
    torch.testing.assert_close(query.grad[0, 0, 2:], expected[2:])
    torch.testing.assert_close(query.grad[0, 0, :2], 1 - torch.tensor([0.5, 0.5]).tanh() ** 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest_key", [19.9, 20.1, 300.0, 1e30])
def test_extreme_arguments_of_several_queries(largest_key: float, dtype: torch.dtype) -> None:
    """Where exponentials of each would overflow, or cancel."""
    edges = [0.0, 1e-30, 0.3, 19.5, 39.0, 41.0, 44.5, 89.0, 299.5, 1e30, float("inf")]
    queries = torch.tensor([sign * edge for edge in edges for sign in (1, -1)], dtype=dtype)
    keys = torch.tensor([-largest_key, -19.7, -0.3, 0.0, 0.3, 19.7, largest_key], dtype=dtype)
    inputs = [queries.view(1, -1, 1), keys.view(1, -1, 1), torch.ones(1, 1, dtype=dtype)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    tolerance = EXACT if dtype == torch.float64 else {"rtol": 1e-5, "atol": 5e-7}
    found, expected = (values_and_gradients(scores, inputs) for scores in (additive_scores, plain_additive_scores))
    assert torch.isfinite(torch.cat([tensor.flatten() for tensor in found])).all()
    assert_all_close(found, expected, **tolerance)


def test_a_wrong_number_is_not_hidden() -> None:
    query, keys, v = (tensor.detach() for tensor in tensors(2, 6, 3, 1, 4))
    query[0, 1, 2], keys[1, 2, 3] = torch.nan, torch.nan
    assert torch.equal(additive_scores(query, keys, v).isnan(), plain_additive_scores(query, keys, v).isnan())


@pytest.mark.parametrize("length", [1, 40])
def test_only_its_arguments_are_kept(length: int) -> None:
    """For several queries their exponentials are in their place, and with the keys those of the keys."""
    query, keys, v = tensors(3, length, 5, 1, 6)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        additive_scores(query, keys, v)
    arguments = {tensor.data_ptr() for tensor in ((keys, v) if length > 1 else (query, keys, v))}
    assert arguments <= {tensor.data_ptr() for tensor in kept}
    others = [tensor for tensor in kept if tensor.data_ptr() not in arguments]
    assert [tensor.shape for tensor in others] == [query.shape, keys.shape] * (length > 1)


def test_steps_of_a_loop_share_what_is_made_of_the_keys() -> None:
    """Also where that can't be used, for the keys are too large; and other keys in the same loop have their own."""
    query, keys, v = tensors(2, 9, 5, 1, 6)
    large = (100 * keys).detach().requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), shared_by_steps():  # type: ignore[func-returns-value]
        steps = [
            torch.stack([additive_scores(query[:, t : t + 1], k, v, shared=True) for t in range(9)]).sum()
            for k in (keys, large)
        ]
    assert len({tensor.data_ptr() for tensor in kept if tensor.shape == keys.shape}) == 3
    inputs = [query, keys, large, v]
    expected = sum(plain_additive_scores(query, k, v).sum() for k in (keys, large))
    assert_all_close([sum(steps).detach()], [expected.detach()], **EXACT)
    assert_all_close(torch.autograd.grad(sum(steps), inputs), torch.autograd.grad(expected, inputs), **EXACT)


def test_inference_mode_leaves_nothing_behind() -> None:
    """Its tensors can't be written outside of it, so none may stay in the memory that all calls share."""
    inputs = tensors(2, 3, 4, 1, 5)
    module.scratch.memory = torch.empty(0)
    with torch.inference_mode():
        inside = additive_scores(*inputs)
    torch.testing.assert_close(values_and_gradients(additive_scores, inputs)[0], inside, **EXACT)


def test_threads_do_not_share_memory() -> None:
    inputs = [tensors(8, 6, 40, 1, 64, seed=seed) for seed in range(4)]
    expected = [plain_additive_scores(*one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: [additive_scores(*one) for _ in range(20)], inputs))
    for several, one in zip(found, expected, strict=True):
        for scores in several:
            torch.testing.assert_close(scores, one, **EXACT)


def test_no_gradient_where_none_is_wanted() -> None:
    query, keys, v = tensors(2, 3, 4, 1, 5)
    with torch.no_grad():
        assert not additive_scores(query, keys, v).requires_grad
    frozen = [query, keys.detach(), v.detach()]
    (gradient,) = torch.autograd.grad(additive_scores(*frozen).sum(), query)
    (expected,) = torch.autograd.grad(plain_additive_scores(query, keys, v).sum(), query)
    torch.testing.assert_close(gradient, expected, **EXACT)


def test_differentiating_twice_is_refused() -> None:
    inputs = tensors(2, 3, 4, 1, 5)
    scores = additive_scores(*inputs)
    with pytest.raises(RuntimeError, match="additive attention can't be differentiated twice"):
        torch.autograd.grad(scores.sum(), inputs[0], create_graph=True)


def test_compiles_without_a_break() -> None:
    inputs = tensors(2, 3, 4, 1, 5)
    torch._dynamo.reset()
    compiled = torch.compile(additive_scores, fullgraph=True, backend="aot_eager")
    assert_all_close(values_and_gradients(compiled, inputs), values_and_gradients(additive_scores, inputs), **EXACT)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant: bool) -> None:
    inputs = tensors(2, 3, 4, 1, 5)

    def checkpointed(*args: torch.Tensor) -> torch.Tensor:
        return checkpoint(additive_scores, *args, use_reentrant=use_reentrant)

    plain = values_and_gradients(additive_scores, inputs)
    found = checkpointed(*inputs)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    for tensor in inputs:
        tensor.grad = None
    ((found * weight).sum() + found.sin().sum()).backward()
    gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
    assert_all_close([found.detach(), *gradients], plain, **EXACT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [1, 6])
def test_on_a_gpu(length: int) -> None:
    inputs = tensors(3, length, 9, 2, 16)
    plain = values_and_gradients(plain_additive_scores, inputs)
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in inputs]
    found = additive_scores(*on_gpu)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape).cuda()
    gradients = torch.autograd.grad((found * weight).sum() + found.sin().sum(), on_gpu)
    assert_all_close([tensor.cpu() for tensor in (found.detach(), *gradients)], plain, **EXACT)


# In a loop over time


def looped(inputs: list[torch.Tensor], active: bool, steps: int = 4) -> torch.Tensor:
    """Each step's queries are made of the scores before. [B, heads, T, S]"""
    query, keys, v = inputs
    with shared_by_steps(active):
        for _ in range(steps):
            scores = additive_scores(query, keys, v, shared=True)
            query = query * scores.sum((1, 3)).tanh().unsqueeze(-1).to(query.dtype)
    return scores


@pytest.mark.parametrize("numbers", [1, 40, 10**6])
@pytest.mark.parametrize("length", [1, 3])
def test_steps_add_up_the_gradient_of_their_keys(length: int, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUMBERS_AT_ONCE", numbers)
    inputs = tensors(3, length, 5, 2, 4)
    calls: list[torch.Tensor] = []
    inputs[1].register_hook(calls.append)
    found = values_and_gradients(lambda *args: looped(list(args), True), inputs)
    assert len(calls) == 1
    assert_all_close(found, values_and_gradients(lambda *args: looped(list(args), False), inputs), **EXACT)


def test_steps_by_finite_differences_and_twice() -> None:
    inputs = tensors(2, 1, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda *args: looped(list(args), True), inputs)
    total = looped(inputs, True).sum()
    (of_query,) = torch.autograd.grad(total, inputs[:1], retain_graph=True)  # leaves nothing behind
    once = torch.autograd.grad(total, inputs, retain_graph=True)
    assert_all_close(list(once), list(torch.autograd.grad(total, inputs)), rtol=0, atol=0)
    torch.testing.assert_close(of_query, once[0])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_steps_with_a_frozen_part(frozen: int) -> None:
    results = []
    for active in (True, False):
        inputs = tensors(3, 1, 4, 1, 5)
        inputs[frozen].requires_grad_(False)
        looped(inputs, active).sum().backward()
        results.append([one.grad for one in inputs if one.grad is not None])
    assert len(results[0]) == 2
    assert_all_close(*results, **EXACT)


def records_of_loops() -> list[LoopKeys]:
    return [one for one in gc.get_objects() if isinstance(one, LoopKeys)]


@pytest.mark.parametrize("backward", [True, False])
def test_what_a_loop_made_of_its_keys_goes_with_its_result(backward: bool) -> None:
    """Not only when Python looks for garbage. Other tests' fixtures may hold results of their own."""
    inputs = tensors(3, 1, 4, 1, 5)
    gc.collect()
    others = records_of_loops()
    gc.disable()
    try:
        total = looped(inputs, True).sum()
        assert len(records_of_loops()) == len(others) + 1
        if backward:
            total.backward()
        del total
        assert len(records_of_loops()) == len(others)
    finally:
        gc.enable()


def test_steps_in_a_narrow_type_add_up_in_a_wide_one() -> None:
    """In bfloat16 itself a sum of 300 terms would have stopped growing."""
    query, keys, v = tensors(3, 1, 4, 1, 6, dtype=torch.bfloat16)
    (one,) = torch.autograd.grad(additive_scores(query, keys, v).sum(), [keys])
    with shared_by_steps():
        total = torch.stack([additive_scores(query, keys, v, shared=True) for _ in range(300)]).sum()
    (found,) = torch.autograd.grad(total, [keys])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), 300 * one.float(), rtol=0.01, atol=0)


# In a model

ADDITIVE = [
    setting
    for setting in CONFIGURATIONS
    if "additive" in (setting["attention_type"], setting.get("attention_scoring"))
    or setting["attention_type"] in ("normed_additive", "location")
    or setting["decoder_self_attention"]
]


@pytest.mark.parametrize("setting", ADDITIVE[::3], ids=name_of)
def test_models_are_as_with_the_equation(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients; a row without tokens is among the sources."""
    model = tiny_model(**setting)
    source, mask = ragged_batch([5, 2, 4], "both")
    mask[1] = 0
    labels = torch.tensor([[4, 5, 2, -100], [7, 2, -100, -100], [8, 9, 3, 2]])
    batch = {**batch_of(model, source, mask), "labels": labels}
    seen = []
    for plain in (False, True):
        if plain:
            for user in (attention, content_attention):
                monkeypatch.setattr(
                    user, "additive_scores", lambda *tensors, shared=False: plain_additive_scores(*tensors)
                )
        other = copy.deepcopy(model)
        loss = other(**batch).loss
        loss.backward()
        seen.append([loss.detach(), *(p.grad for p in other.parameters() if p.grad is not None)])
    # A sparse head's support, and cross entropy in float32, leave some room.
    assert_all_close(seen[0], seen[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "setting",
    [
        {"attention_type": "additive"},
        {"attention_type": "additive", "attention_coverage": True},
        {"attention_type": "location"},
        {"attention_type": "normed_additive"},
        {"attention_type": "multi_head", "attention_heads": 2, "attention_scoring": "additive"},
        {"attention_type": "multi_head", "attention_heads": 2},
        {"attention_type": "general"},
    ],
    ids=name_of,
)
@pytest.mark.parametrize("wiring", ["input_feeding", "output_only"])
def test_no_hidden_layer_is_kept(setting: dict[str, Any], wiring: str) -> None:
    """Of what a model keeps for the backward pass, little has the source's length more than once a step."""
    model = tiny_model(**setting, wiring_type=wiring, hidden_size=64)
    source = torch.randint(3, 11, (2, 90))
    sizes: dict[int, int] = {}  # by storage, so that what is kept twice counts once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    totals = []
    for length in (5, 25):
        kept: list[torch.Tensor] = []  # so that no address is used again
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(source, labels=torch.full((2, length), 4))
        totals.append(sum(sizes.values()))
    hidden = 2 * 90 * 64 * 8  # of one step, in bytes
    assert (totals[1] - totals[0]) / 20 < hidden / 2
