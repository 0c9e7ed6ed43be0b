"""The best word by a rough product and exact scores of the few that it leaves is the best by exact scores of all."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoding import count_packings, needs_int8, pack_at_once
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import CONFIGURATIONS, batch_of, name_of, ragged_batch, tiny_model
from torch import nn

from hf_rnn_seq2seq import RnnSeq2SeqEnsemble, packed_products, screening, step_products
from hf_rnn_seq2seq.best_words import BLOCK
from hf_rnn_seq2seq.heads import HeadInput, LinearHead
from hf_rnn_seq2seq.int8 import Int8Linear
from hf_rnn_seq2seq.packed_products import has_int8_products
from hf_rnn_seq2seq.screening import ADDING, Bfloat16Scores, Int8Scores, RoughScores, Screen, screen_of
from hf_rnn_seq2seq.step_products import StepLinear, packed_weights, shared_by_steps

LENGTHS = [5, 1, 3, 7, 2, 6, 4, 1]
HEADS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "embedding_size": 6},
    {"head_type": "deep"},
    {"head_type": "deep_tanh"},
]


KINDS = [Bfloat16Scores, pytest.param(Int8Scores, marks=needs_int8)]


@pytest.fixture(autouse=True)
def any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the same on all of them, however fast their products of rounded numbers are."""
    monkeypatch.setattr(screening, "rough_is_faster", lambda rows: True)
    monkeypatch.setattr(screening, "saved_by_int8", lambda rows, numel: 0.0)
    pack_at_once(monkeypatch)


def take(kind: type[RoughScores], monkeypatch: pytest.MonkeyPatch) -> None:
    """All lasting screens are of this kind."""
    monkeypatch.setattr(screening, "saved_by_int8", lambda rows, numel: float(kind is Int8Scores))


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Screens everything, anywhere; how many rows every search was for, with a minus where it gave up."""
    monkeypatch.setattr(screening, "WORTH_SCREENING", 0)
    monkeypatch.setattr(screening, "has_bfloat16_products", lambda: True)
    rows: list[int] = []
    search = Screen._search

    def count(self: Screen, x: torch.Tensor, rough_scores: RoughScores) -> torch.Tensor | None:
        found = search(self, x, rough_scores)
        rows.append(-len(x) if found is None else len(x))
        return found

    monkeypatch.setattr(Screen, "_search", count)
    yield rows  # noqa: PT022  the patch is undone after it


@settings(max_examples=150)
@given(
    rows=st.integers(1, 6),
    vocabulary=st.integers(1, 300),
    width=st.integers(1, 40),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    twins=st.integers(0, 20),
    distance=st.sampled_from([0.0, 1e-4, 1e-2]),
    bias=st.sampled_from([None, 0.1, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_no_other_word_is_better(
    rows: int, vocabulary: int, width: int, scale: float, twins: int, distance: float, bias: float | None, seed: int
) -> None:
    """In float64, with words that are as good or almost so among them."""
    torch.manual_seed(seed)
    weight = torch.randn(vocabulary, width)
    originals, copies = torch.randint(0, vocabulary, (2, twins))
    weight[copies] = weight[originals] + distance * torch.randn(twins, width)
    b = None if bias is None else bias * torch.randn(vocabulary)
    x = scale * torch.randn(rows, width)
    screen = Screen(weight, b)
    kinds = (Bfloat16Scores, Int8Scores) if has_int8_products() else (Bfloat16Scores,)
    scores = x.double() @ weight.double().T + (0 if b is None else b.double())
    rounding = 1e-6 * (x.double().norm(dim=1) * weight.norm(dim=1).max() + (0 if b is None else b.abs().max()))
    for found in (*(screen._search(x, kind(weight, b)) for kind in kinds), screen.best(x)):
        if found is not None:
            best = scores.gather(1, found[:, None])[:, 0]
            assert found.shape == (rows,)
            assert (best >= scores.amax(1) - rounding).all()


@pytest.mark.parametrize("kind", KINDS)
@example(rows=1, vocabulary=62, width=1, one_way=False, seed=2061)  # nothing is lost but to adding the bias
@settings(max_examples=60)
@given(
    rows=st.integers(1, 4),
    vocabulary=st.integers(1, 100),
    width=st.integers(1, 600),
    one_way=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rough_scores_are_not_off_by_more(
    kind: type[RoughScores], rows: int, vocabulary: int, width: int, one_way: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, bias, x = torch.randn(vocabulary, width), torch.randn(vocabulary), torch.randn(rows, width)
    if one_way:  # all numbers are rounded away from zero, by almost as much as can be
        up = 1 + 2.0**-8 + 2.0**-20
        weight, x = weight.sign().abs() * up, x.sign().abs() * up
        if kind is Int8Scores:  # by almost half of a step, but for one number that sets the step
            weight, x = 126.49 * weight / up, 126.49 * x / up
            weight[:, 0], x[:, 0] = 127.0, 127.0
    scores, errors = kind(weight, bias)(x)
    off = (scores[:, :vocabulary] - (x.double() @ weight.double().T + bias)).abs()
    allowed = errors.expand(rows, scores.size(1) // BLOCK).repeat_interleave(BLOCK, dim=1)[:, :vocabulary]
    assert (off <= allowed + ADDING * scores[:, :vocabulary].abs()).all()
    exact = kind is Int8Scores and width == 1  # the one number that sets the step
    assert not one_way or exact or (off > allowed / 4).all()


def test_where_the_rough_scores_mislead() -> None:
    """Two words whose order is another one in bfloat16, because of what W or x loses by rounding."""
    up, down = 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-8 - 2.0**-20  # are rounded to 1 + 2^-7 and to 1
    zeros, ones = torch.zeros(8, 64), torch.ones(1, 64)
    weights = zeros.clone()
    weights[7], weights[3] = up, down
    weights[3, 0] = 1.25
    inputs = torch.tensor([up, down]).repeat(32)[None]
    of_inputs = zeros.clone()
    of_inputs[7, ::2], of_inputs[3, 1::2] = 1, 1 + 1e-4
    # One word's three roundings all go up, the other's all down: their distance is more than a single error.
    u, little = 2.0**-8, 2.0**-20
    of_all, their_inputs, bias = torch.zeros(8, 2), torch.zeros(1, 2), torch.full((8,), -10.0)
    of_all[7, 0], their_inputs[0, 0] = 1 + 15 * u + little, 1 + 17 * u + little
    of_all[3, 1], their_inputs[0, 1] = 1 + 17 * u - little, 1 + 15 * u - little
    bias[7], bias[3] = 0, 1e-4
    (rough,), error = Bfloat16Scores(of_all, bias)(their_inputs)
    assert rough[7] - rough[3] > error
    for weight, x, b in ((weights, ones, None), (of_inputs, inputs, None), (of_all, their_inputs, bias)):
        screen = Screen(weight, b)
        assert nn.functional.linear(x, weight, b).argmax(1).tolist() == [3]
        rough_scores = Bfloat16Scores(weight, b)
        assert rough_scores(x)[0].argmax(1).tolist() == [7]
        found = screen._search(x, rough_scores)
        assert found is not None
        assert found.tolist() == [3]


@needs_int8
def test_where_whole_numbers_mislead() -> None:
    """Two words whose order is another one in eight bits, because of what W or x loses by rounding."""
    weight, x = torch.zeros(8, 65), torch.zeros(1, 65)
    x[0], weight[3, 0], weight[7, 0] = 1.0, 127.0, 127.0  # a step of W is 1
    weight[3, 1:], weight[7, 1:] = 0.49, 0.51
    weight[3, 0] += 3.0  # so its steps are a bit longer, and all the others become zeros
    other, y = torch.zeros(8, 65), torch.full((1, 65), 0.51)
    y[0, 0], y[0, 33:] = 127.0, 0.49
    other[7, 1:33], other[3, 33:], other[3, 0] = 1.0, 1.0, 0.01
    for w, inputs in ((weight, x), (other, y)):
        rough_scores = Int8Scores(w, None)
        exact = (inputs.double() @ w.double().T)[0]
        rough = rough_scores(inputs)[0][0]
        assert (exact[7] - exact[3]) * (rough[7] - rough[3]) < 0
        found = Screen(w, None)._search(inputs, rough_scores)
        assert found is not None
        assert found.tolist() == [int(exact.argmax())]


def test_where_adding_the_bias_misleads() -> None:
    """b + w x is halfway between two numbers by the rounded w, below by w: then it is the first word's b."""
    odd, half = 1 + 2.0**-23, 2.0**-24
    weight, bias, x = torch.zeros(64, 1), torch.zeros(64), torch.ones(1, 1)
    weight[7], bias[3], bias[7] = half * (1 - 2.0**-9 + 2.0**-20), odd, odd
    rough_scores = Bfloat16Scores(weight, bias)
    (rough,), _ = rough_scores(x)
    assert rough[7] > rough[3]
    found = Screen(weight, bias)._search(x, rough_scores)
    assert found is not None
    assert found.tolist() == (x @ weight.T + bias).argmax(1).tolist() == [3]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("banned", [-1e9, -torch.inf])
def test_words_that_the_bias_forbids(banned: float, kind: type[RoughScores]) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(1000, 16), torch.randn(1000), torch.randn(5, 16)
    bias[(x @ weight.T).argmax(1)] = banned
    found = Screen(weight, bias)._search(x, kind(weight, bias))
    assert found is not None
    assert torch.equal(found, (x @ weight.T + bias).argmax(1))


def test_the_first_of_equal_words() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000, 16)
    weight[[30, 31, 500, 999]] = 9.0
    x = torch.ones(2, 16)
    assert Screen(weight, None).best(x).tolist() == [30, 30]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_left_to_exact_scores(
    value: float, kind: type[RoughScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    take(kind, monkeypatch)
    weight, x = torch.randn(1000, 16), torch.randn(3, 16)
    expected = (x @ weight.T).argmax(1)
    x[1, 0] = value
    screen = Screen(weight, None, lasting=True)
    assert torch.equal(screen.best(x), (x @ weight.T).argmax(1))
    assert not screen.is_useful
    x[1, 0] = 0.0
    assert torch.equal(screen.best(x)[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_screen_serves_every_mode_and_number_of_rows(
    kind: type[RoughScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    take(kind, monkeypatch)
    weight, x = torch.randn(1000, 16), torch.randn(9, 16)
    expected = (x @ weight.T).argmax(1)
    monkeypatch.setattr(packed_products, "PACKED_SIZE", 0)
    torch.set_default_dtype(torch.float64)
    try:
        screen = Screen(weight, None, lasting=True)
        for rows in (3, 9, 1):
            for mode in (torch.inference_mode, torch.no_grad):
                with mode():
                    assert torch.equal(screen.best(x[:rows]), expected[:rows])
    finally:
        torch.set_default_dtype(torch.float32)
    assert screen.is_useful
    made = {type(one) for one in vars(screen).values()}
    assert made & {Bfloat16Scores, Int8Scores} == {kind}
    assert screen.bfloat16_scores.weight is None or screen.bfloat16_scores.packed is None


def test_given_up_the_output_layer_is_packed_once(searched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_products, "PACKED_SIZE", 0)
    layer = StepLinear(16, 5000)
    x = torch.randn(3, 16)
    with torch.no_grad(), shared_by_steps(packed=True):
        layer.weight.fill_(0.5)
        screen = screen_of(layer)
        assert screen is not None
        for _ in range(3):
            assert torch.equal(screen.best(x), layer(x).argmax(1))
        weights = step_products.loop_weights()
        assert weights is not None
        assert list(weights) == [id(layer.weight)]
        assert searched == [-3]
        again = screen_of(layer)  # by the next call, where this lasts
        assert again is screen
        assert torch.equal(again.best(x), layer(x).argmax(1))
    assert searched == [-3, -3]


def test_a_screen_of_a_weight_that_has_changed_is_another_one(searched: list[int]) -> None:
    layer = StepLinear(16, 1000)
    x = torch.randn(3, 16)
    with torch.no_grad(), packed_weights():
        for scale in (1.0, -1.0):
            layer.weight.mul_(scale)
            with shared_by_steps(packed=True):
                screen = screen_of(layer)
                assert screen is not None
                assert torch.equal(screen.best(x), layer(x).argmax(1))
    assert searched == [3, 3]


def test_too_many_candidates_end_the_search(searched: list[int]) -> None:
    torch.manual_seed(0)
    screen = Screen(torch.full((5000, 16), 0.5), None)
    for _ in range(2):
        assert screen.best(torch.randn(2, 16)).tolist() == [0, 0]
    assert searched == [-2]
    # All in one block, too.
    weight = torch.randn(5000, 16)
    weight[64:128] = 9.0
    assert Screen(weight, None)._search(torch.ones(4, 16), Bfloat16Scores(weight, None)) is None


def sharp_model(**setting: Any) -> Any:
    """Whose best words are far from the others."""
    model = tiny_model(**setting).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize(
    ("packed", "kind"),
    [(False, Bfloat16Scores), (True, Bfloat16Scores), pytest.param(True, Int8Scores, marks=needs_int8)],
)
def test_greedy_search_gives_the_same_ids(
    head: dict[str, Any],
    packed: bool,
    kind: type[RoughScores],
    searched: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take(kind, monkeypatch)
    model = sharp_model(**head)
    batch = batch_of(model, *ragged_batch(LENGTHS))
    expected = generate(model, batch, screens=False)
    if packed:
        with model.packed():
            assert torch.equal(generate(model, batch), expected)
            beams = generate(model, batch, num_beams=3)
            assert torch.equal(generate(model, batch), expected)
        assert torch.equal(beams, generate(model, batch, num_beams=3))
    else:
        assert torch.equal(generate(model, batch), expected)
    assert sum(one > 0 for one in searched) >= 2


def generate(model: Any, batch: dict[str, Any], screens: bool = True, **options: Any) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        if not screens:
            patch.setattr(screening, "WORTH_SCREENING", 2**62)
        return model.generate(**batch, **{"max_new_tokens": 10, **options})


@pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)
def test_every_model_generates_the_same_ids(setting: dict[str, Any], searched: list[int]) -> None:
    model = tiny_model(**setting).float()
    batch = batch_of(model, *ragged_batch(LENGTHS))
    expected = generate(model, batch, screens=False)
    assert searched == []
    assert torch.equal(generate(model, batch), expected)
    softmax = model.config.head_type != "pointer_generator" and model.config.output_normalizer == "softmax"
    assert bool(searched) == (softmax and expected.size(1) > 2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True},
        {"repetition_penalty": 1.5},
        {"min_new_tokens": 3},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_where_scores_are_wanted_all_are_made(options: dict[str, Any], searched: list[int]) -> None:
    model = tiny_model().float()
    generate(model, batch_of(model, *ragged_batch(LENGTHS)), **options)
    assert searched == []


def test_other_weights_have_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screening, "WORTH_SCREENING", 100)
    monkeypatch.setattr(screening, "has_bfloat16_products", lambda: True)
    layer = StepLinear(10, 10)
    assert screen_of(layer) is None  # outside of a loop
    with torch.no_grad(), shared_by_steps(packed=True):
        screen = screen_of(layer)
        assert isinstance(screen, Screen)
        assert screen_of(layer) is screen
        assert screen_of(StepLinear(9, 11)) is None
        assert screen_of(nn.Linear(10, 10)) is None
        assert screen_of(StepLinear(10, 10).double()) is None
        assert screen_of(StepLinear(10, 10).bfloat16()) is None
        assert screen_of(Int8Linear(layer.weight, layer.bias, loaded=True)) is None
        assert screen_of(nn.utils.parametrizations.weight_norm(StepLinear(10, 10))) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert screen_of(layer) is None
        monkeypatch.setattr(screening, "has_bfloat16_products", lambda: False)
        monkeypatch.setattr(screening, "has_int8_products", lambda: False)
        assert screen_of(StepLinear(10, 10)) is None
    monkeypatch.undo()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not screening.has_bfloat16_products()
        assert not has_int8_products()


def test_whole_numbers_are_for_what_lasts_and_saves_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(1000, 16)
    monkeypatch.setattr(screening, "has_bfloat16_products", lambda: False)
    monkeypatch.setattr(screening, "has_int8_products", lambda: True)
    monkeypatch.setattr(screening, "Int8Scores", lambda *tensors: "int8")
    enough = screening.SEARCH_SECONDS / 16000
    monkeypatch.setattr(screening, "saved_by_int8", lambda rows, numel: (rows - 3.5) * numel * enough)
    assert [Screen(weight, None, lasting=True).rough_scores(rows) for rows in (1, 4, 5)] == [None, None, "int8"]
    assert Screen(weight, None).rough_scores(5) is None
    monkeypatch.setattr(screening, "has_int8_products", lambda: False)
    assert Screen(weight, None, lasting=True).rough_scores(5) is None


def test_rows_whose_rough_scores_are_no_faster_are_scored_exactly(
    searched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(1000, 16), torch.randn(8, 16)
    monkeypatch.setattr(screening, "rough_is_faster", lambda rows: rows <= 3)
    screen = Screen(weight, None)
    for rows in (8, 4):
        assert torch.equal(screen.best(x[:rows]), (x[:rows] @ weight.T).argmax(1))
    assert "bfloat16_scores" not in vars(screen)  # nothing is made for what may never be used
    for rows in (3, 8, 1):
        assert torch.equal(screen.best(x[:rows]), (x[:rows] @ weight.T).argmax(1))
    assert searched == [3, 1]


class Contrary(LinearHead):
    """A head of somebody's own, whose worst word is the best one."""

    def forward(self, inputs: HeadInput) -> torch.Tensor:
        return -super().forward(inputs)


def test_another_head_has_no_screen(searched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().float()
    batch = batch_of(model, *ragged_batch(LENGTHS))
    usual = generate(model, batch)
    assert searched
    searched.clear()
    monkeypatch.setattr(model.head, "__class__", Contrary)
    assert not torch.equal(generate(model, batch), usual)
    assert searched == []


def test_ensembles_score_all_words(searched: list[int]) -> None:
    members = [tiny_model(seed=seed).float() for seed in (0, 1)]
    batch = batch_of(members[0], *ragged_batch(LENGTHS))
    generate(RnnSeq2SeqEnsemble(members).eval(), batch)
    assert searched == []


def test_an_output_layer_with_a_screen_is_not_packed(monkeypatch: pytest.MonkeyPatch, searched: list[int]) -> None:
    """But where its scores are wanted after all, once for many calls."""
    monkeypatch.setattr(packed_products, "PACKED_SIZE", 0)
    packings = count_packings(monkeypatch)
    model = sharp_model()
    batch = batch_of(model, *ragged_batch(LENGTHS))
    generate(model, batch)
    screened = len(packings)
    assert searched
    generate(model, batch, screens=False)
    assert len(packings) - screened == screened + 1
