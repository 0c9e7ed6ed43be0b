"""Our own loops of generate() against transformers': the same ids, and rows that have ended cost nothing."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from decoding import count_packings, count_rows, pack_at_once
from hypothesis import given, settings
from hypothesis import strategies as st
from models import CONFIGURATIONS, batch_of, name_of, ragged_batch, tiny_model
from test_generation import MODES, Collecting
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, set_seed

from hf_rnn_seq2seq import RnnSeq2SeqEnsemble, RnnSeq2SeqForConditionalGeneration, step_products
from hf_rnn_seq2seq.decoding_steps import DecodingSteps
from hf_rnn_seq2seq.ended_rows import COPY_STEPS
from hf_rnn_seq2seq.modeling_rnn_seq2seq import RnnSeq2SeqLMOutput
from hf_rnn_seq2seq.packed_products import PACKED_SIZE
from hf_rnn_seq2seq.step_products import StepLinear, packed_weights, shared_by_steps

LENGTHS = [5, 1, 3, 7, 2, 6, 4, 1]

BEAMS: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 4},
    "all": {"num_beams": 3, "num_return_sequences": 3, "early_stopping": True},
    "never": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "short": {"num_beams": 2, "early_stopping": False, "length_penalty": -1.0},
    "no length penalty": {"num_beams": 5, "length_penalty": 0.0, "num_return_sequences": 2},
    "gnmt": {"num_beams": 3, "gnmt_length_penalty": 0.8, "num_return_sequences": 2},
    "opennmt": {"num_beams": 4, "opennmt_length_penalty": 0.7, "num_return_sequences": 2},
    "joeynmt": {"num_beams": 4, "joeynmt_length_penalty": 0.7, "num_return_sequences": 2},
    "yoyodyne": {"num_beams": 4, "yoyodyne_beam_search": True, "num_return_sequences": 2},
    "coverage": {"num_beams": 3, "coverage_penalty": 0.4},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.6},
    "words": {"num_beams": 3, "force_words_ids": [[5, 6]]},
    "several ends": {"num_beams": 3, "eos_token_id": [2, 5, 7]},
    "no end": {"num_beams": 2, "eos_token_id": None},
    "end is padding": {"num_beams": 3, "pad_token_id": 2},
    "own padding": {"num_beams": 3, "pad_token_id": 3},
    "forced": {"num_beams": 3, "forced_bos_token_id": 7, "forced_eos_token_id": 2},
    "sampling": {"num_beams": 3, "do_sample": True, "top_k": 6, "temperature": 0.8},
    "prompt": {"num_beams": 3, "decoder_input_ids": True},
    "time": {"num_beams": 3, "max_time": 1000.0},
}  # fmt: skip
SINGLE: dict[str, dict[str, Any]] = {
    "several ends": {"eos_token_id": [2, 5, 7]},
    "no end": {"eos_token_id": None},
    "end is padding": {"pad_token_id": 2},
    "own padding": {"pad_token_id": 3},
    "prompt": {"decoder_input_ids": True},
    "masked prompt": {"decoder_input_ids": True, "decoder_attention_mask": True},
    "prompt, sampling": {"decoder_input_ids": True, "do_sample": True, "num_return_sequences": 2},
    "time": {"max_time": 1000.0},
    "no cache": {"use_cache": False},
}  # fmt: skip
EVERY_MODE = {
    **{f"beams, {name}": options for name, options in BEAMS.items()},
    **{f"single, {name}": options for name, options in SINGLE.items()},
    **MODES,
}
THREE = [
    {"wiring_type": "output_only", "attention_type": "dot"},
    {"wiring_type": "input_feeding", "decoder_layers": 2, "zoneout": 0.1},
    {"wiring_type": "bahdanau", "cell_type": "gru", "source_vocab_size": 11, "head_type": "pointer_generator"},
]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows our loops have read a token for, step by step."""
    return count_rows(DecodingSteps, monkeypatch)


@contextmanager
def transformers_loops(model: Any) -> Iterator[None]:
    model._fast_generation = False
    try:
        yield
    finally:
        del model._fast_generation


def both(model: Any, batch: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids by our loops and by transformers'."""
    rows = len(batch["input_ids"])
    if options.get("decoder_input_ids") is True:
        prompt = torch.tensor([[1, 4 + row % 3, 5] for row in range(rows)])
        options["decoder_input_ids"] = prompt
        if options.get("decoder_attention_mask") is True:
            options["decoder_attention_mask"] = (torch.arange(3) >= torch.arange(rows)[:, None] % 3).long()
    results = []
    for ours in (True, False):
        set_seed(1)
        arguments = {"max_new_tokens": 8, **batch, **options}
        if ours:
            results.append(model.generate(**arguments))
        else:
            with transformers_loops(model):
                results.append(model.generate(**arguments))
    return results[0], results[1]


@pytest.mark.parametrize("index", range(len(CONFIGURATIONS)), ids=[name_of(setting) for setting in CONFIGURATIONS])
def test_every_model_generates_the_same_ids(index: int, read: list[int]) -> None:
    """Each with one set of the options that all have to work."""
    setting = CONFIGURATIONS[index]
    model = tiny_model(seed=index, **setting)
    batch = batch_of(model, *ragged_batch(LENGTHS, ("left", "right", "both")[index % 3]))
    modes = list(EVERY_MODE.values())
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, modes[index % len(modes)]):
        if options.get("coverage_penalty") and setting["attention_type"] == "none":
            continue
        ours, theirs = both(model, batch, **options)
        assert torch.equal(ours, theirs), options
    assert read


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_every_mode_generates_the_same_ids(mode: str) -> None:
    first = list(EVERY_MODE).index(mode) % len(THREE)
    for seed in (first, first + 1):
        model = tiny_model(seed=seed, **THREE[seed % len(THREE)])
        ours, theirs = both(model, batch_of(model, *ragged_batch(LENGTHS, seed=seed)), **EVERY_MODE[mode])
        assert torch.equal(ours, theirs)


@settings(max_examples=10)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
    beams=st.integers(1, 6),
    early_stopping=st.sampled_from([True, False, "never"]),
    length_penalty=st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0]),
    max_new_tokens=st.integers(1, 30),
)
def test_any_batch_generates_the_same_ids(
    lengths: list[int],
    seed: int,
    beams: int,
    early_stopping: bool | str,
    length_penalty: float,
    max_new_tokens: int,
) -> None:
    model = tiny_model(seed=seed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams, "num_return_sequences": beams}
    if beams > 1:
        options |= {"early_stopping": early_stopping, "length_penalty": length_penalty}
    else:
        del options["num_return_sequences"]
    ours, theirs = both(model, batch_of(model, *ragged_batch(lengths, seed=seed)), **options)
    assert torch.equal(ours, theirs)


def test_beams_are_cut_to_what_is_returned() -> None:
    """A search may go on after the hypothesis that is returned, and the longest of the batch, has ended."""
    widths = set()
    for seed in range(8):
        model = tiny_model(seed=seed)
        model.head.output.bias.data[model.config.eos_token_id] += 1.5  # else none ends
        ours, theirs = both(model, batch_of(model, *ragged_batch([4, 2])), num_beams=4, max_new_tokens=20)
        assert torch.equal(ours, theirs)
        widths.add(ours.size(1))
    assert len(widths) > 2


@pytest.mark.parametrize("average", ["probabilities", "log_probabilities"])
@pytest.mark.parametrize(
    "options", [{}, BEAMS["all"], BEAMS["coverage"], BEAMS["prompt"], {"do_sample": True}], ids=str
)
def test_ensembles_generate_the_same_ids(options: dict[str, Any], average: Any, read: list[int]) -> None:
    members = [
        tiny_model(seed=1),
        tiny_model(seed=2, wiring_type="gnmt_v2", decoder_layers=2, attention_type="local_m"),
    ]
    model = RnnSeq2SeqEnsemble(members, average)
    ours, theirs = both(model, batch_of(members[0], *ragged_batch(LENGTHS)), **options)
    assert torch.equal(ours, theirs)
    plain = not {"coverage_penalty", "num_beam_groups", "force_words_ids"} & set(options)
    assert bool(read) == plain


@pytest.mark.parametrize("setting", CONFIGURATIONS, ids=name_of)
def test_steps_give_the_logits_of_forward(setting: dict[str, Any]) -> None:
    """Through repetition, reordering and dropping, in float64 to 1e-10."""
    model = tiny_model(**setting)
    batch = batch_of(model, *ragged_batch([5, 1, 3], "left"))
    tokens = torch.tensor([[1, 4, 5, 6, 7], [1, 8, 3, 9, 10], [1, 6, 6, 12, 4]])
    with torch.no_grad():
        encoded = model.get_encoder()(batch["input_ids"], attention_mask=batch["attention_mask"])
        arguments = {"encoder_outputs": encoded, "copy_ids": batch.get("copy_ids")}
        first = model(**arguments, decoder_input_ids=tokens[:, :1], use_cache=True)
        steps = DecodingSteps(model, first.past_key_values, encoded, batch.get("copy_ids"))
        expected = model(**arguments, decoder_input_ids=tokens).logits
        torch.testing.assert_close(steps(tokens[:, 1]), expected[:, 1], rtol=0, atol=1e-10)
        steps.repeat(2)
        steps.reorder(torch.tensor([1, 0, 2, 2, 5, 4]))
        twice = tokens.repeat_interleave(2, dim=0)
        torch.testing.assert_close(steps(twice[:, 2]), expected.repeat_interleave(2, dim=0)[:, 2], rtol=0, atol=1e-10)
        steps.select(torch.tensor([5, 5, 0, 1]))
        sources = [2, 2, 0, 0]
        torch.testing.assert_close(steps(tokens[sources, 3]), expected[sources, 3], rtol=0, atol=1e-10)
        steps.select(torch.tensor([3, 2]))
        torch.testing.assert_close(steps(tokens[[0, 0], 4]), expected[[0, 0], 4], rtol=0, atol=1e-10)
        assert steps.prepared.mask.size(0) == (2 if steps.state.alignment else 1)  # else beams share a memory


# What ends is dropped


def lengths_of(rows: torch.Tensor) -> list[int]:
    """Tokens up to the first end, or all."""
    return [row.index(2) + 1 if 2 in row else len(row) for row in rows[:, 1:].tolist()]


def test_rows_that_have_ended_are_not_read(read: list[int]) -> None:
    model = tiny_model(seed=4)
    batch = batch_of(model, *ragged_batch([1, 2, 3, 4, 5, 6, 7, 8] * 4))
    lengths = lengths_of(model.generate(**batch, max_new_tokens=12))
    assert len(set(lengths)) > 3
    rows, wasted, expected = lengths, 0, []
    for step in range(1, max(lengths)):
        running = [length for length in rows if length > step]
        wasted += len(rows) - len(running)
        if len(running) < len(rows) and wasted >= COPY_STEPS * len(running):
            rows, wasted = running, 0
        expected.append(len(rows))
    assert read == expected
    assert len(set(read)) > 3


@pytest.mark.parametrize(
    "options",
    [
        {"early_stopping": True},
        {"opennmt_length_penalty": 0.7},
        {"joeynmt_length_penalty": 0.7},
        {"yoyodyne_beam_search": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sources_that_are_done_are_not_read(options: dict[str, Any], read: list[int]) -> None:
    model = tiny_model(seed=4)
    batch = batch_of(model, *ragged_batch([1, 2, 3, 4, 5, 6, 7, 8]))
    alone = []
    for row in range(8):
        read.clear()
        one = {name: value[row : row + 1] for name, value in batch.items()}
        model.generate(**one, max_new_tokens=12, num_beams=3, **options)
        alone.append(len(read))
    assert len(set(alone)) > 3
    read.clear()
    four_times = {name: value.repeat(4, 1) for name, value in batch.items()}
    model.generate(**four_times, max_new_tokens=12, num_beams=3, **options)
    needed = [3 * 4 * sum(steps >= step for steps in alone) for step in range(1, max(alone) + 1)]
    for rows, least in zip(read, needed, strict=True):
        assert least <= rows <= (1 + COPY_STEPS) * least + 3
    assert sum(read) < 1.2 * sum(needed)
    assert sum(read) < 0.8 * len(read) * read[0]  # what it would be if none left


def test_sampling_draws_for_every_row(read: list[int]) -> None:
    model = tiny_model(seed=4)
    model.generate(**batch_of(model, *ragged_batch(LENGTHS)), max_new_tokens=12, do_sample=True)
    assert set(read) == {len(LENGTHS)}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_all_ends_in_the_first_step(options: dict[str, Any], read: list[int]) -> None:
    model = tiny_model()
    model.head.output.bias.data[2] = 1e3
    ours, theirs = both(model, batch_of(model, *ragged_batch(LENGTHS)), **options)
    assert torch.equal(ours, theirs)
    assert ours.tolist() == [[1, 2]] * len(LENGTHS)
    assert not read or options.get("num_beams")


class Odd(LogitsProcessor):
    """Looks at which row it is, so no row may be missing."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        assert len(scores) % len(LENGTHS) == 0
        return scores + torch.arange(len(scores))[:, None] % 3 * torch.linspace(0, 1, scores.size(1))


class Sevens(StoppingCriteria):
    """Stops every row in whose batch there are many sevens."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), int((input_ids == 7).sum()) > len(input_ids))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_what_looks_at_the_whole_batch_sees_it(options: dict[str, Any], read: list[int]) -> None:
    for seed in range(2):
        model = tiny_model(seed=seed)
        batch = batch_of(model, *ragged_batch(LENGTHS))
        for extra in (
            {"logits_processor": LogitsProcessorList([Odd()])},
            {"stopping_criteria": StoppingCriteriaList([Sevens()])},
            {"prefix_allowed_tokens_fn": lambda row, ids: [2, 3 + row % 3, 6, 7, 8 + row % 4]},
            {"encoder_no_repeat_ngram_size": 2},
        ):
            read.clear()
            ours, theirs = both(model, batch, **extra, **options)
            assert torch.equal(ours, theirs)
            assert set(read) <= {len(LENGTHS) * options.get("num_beams", 1)}


# Where transformers' own loops are left in charge


class Louder(RnnSeq2SeqForConditionalGeneration):
    """Another forward pass, of which our steps know nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> RnnSeq2SeqLMOutput:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.flip(-1)  # type: ignore[union-attr]
        return output


def test_whatever_else_is_wanted_goes_by_transformers_loops(read: list[int]) -> None:
    model = tiny_model(seed=1)
    batch = batch_of(model, *ragged_batch([4]))
    free = {"max_new_tokens": 4, **batch}
    model.generate(**free)
    assert read
    read.clear()
    first = model.generate(**free, return_dict_in_generate=True, output_scores=True, output_hidden_states=True)
    assert len(first.scores) == len(first.decoder_hidden_states) > 0
    model.generate(**free, num_beams=2, return_dict_in_generate=True, output_attentions=True)
    model.generate(**free, streamer=Collecting())
    model.generate(**free, decoder_input_ids=first.sequences, past_key_values=first.past_key_values)
    model.generate(**free, use_cache=False)
    seen: list[int] = []
    hook = model.model.decoder.register_forward_hook(lambda *_: seen.append(1))
    model.generate(**free)
    hook.remove()
    assert seen
    model.train()
    model.generate(**free)
    model.eval()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as `torch.compile(model.forward)` would be
    model.generate(**free)
    del model.forward
    other = copy.deepcopy(model)
    other.__class__ = Louder
    assert not torch.equal(
        other.generate(**free), model.generate(**{**free, "return_dict_in_generate": True}).sequences
    )
    assert not read
    model.generate(**free)
    assert read


# Packed products


@pytest.fixture(params=[True, False, None], ids=["packed", "plain", "by rows"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What measurements say, on any machine."""
    pack_at_once(monkeypatch, lambda dtype, rows: rows > 2 if request.param is None else request.param)


@pytest.fixture
def always_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_at_once(monkeypatch)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("packs")
def test_packed_products_equal_plain_ones(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    torch.manual_seed(0)
    layer = StepLinear(517, 509, bias=bias).to(dtype)
    small = StepLinear(5, 7, bias=bias).to(dtype)
    assert layer.weight.numel() >= PACKED_SIZE > small.weight.numel()
    for shape in ((1, 517), (6, 1, 517), (0, 517), (2, 3, 517)):
        x = torch.randn(shape, dtype=dtype)
        expected = F.linear(x, layer.weight, layer.bias)
        with torch.no_grad(), shared_by_steps(packed=True):
            for product in (layer(x), layer(x), layer(x.transpose(0, -1).contiguous().transpose(0, -1))):
                assert product.dtype == dtype
                torch.testing.assert_close(product, expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(small(x[..., :5]), F.linear(x[..., :5], small.weight, small.bias))


def test_packing_waits_until_it_would_have_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call; for many calls it is done at once. Where packed products are slower, never."""
    pack_at_once(monkeypatch, lambda dtype, rows: rows != 3)
    monkeypatch.setattr(step_products, "packing_repaid", lambda dtype, rows: 0.3 * rows)
    packings = count_packings(monkeypatch)
    layer = StepLinear(512, 512)
    made: list[list[int]] = []
    for rows in ([1] * 5, [2, 2, 2], [3, 1, 3, 1, 4, 3], [3] * 9):
        for around in (shared_by_steps(packed=True), packed_weights()):
            made.append([])
            packings.clear()
            with torch.no_grad(), around, shared_by_steps(packed=True):
                for number in rows:
                    x = torch.randn(number, 512)
                    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4)
                    made[-1].append(len(packings))
    assert made == [
        [0, 0, 0, 1, 1],
        [1, 1, 1, 1, 1],
        [0, 1, 1],
        [1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 1, 1, 1, 1, 1],
        [0] * 9,
        [0] * 9,
    ]


@pytest.mark.usefixtures("packs")
def test_packed_weights_are_those_of_the_call() -> None:
    """Nothing is kept from one call of generate() to the next."""
    model = tiny_model(hidden_size=256, embedding_size=16).float()
    assert model.model.decoder.wiring.stack.layers[0].weight_hh.numel() >= PACKED_SIZE
    batch = batch_of(model, *ragged_batch(LENGTHS))
    for scale in (1.0, -0.5, 0.3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        ours, theirs = both(model, batch, num_beams=2)
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("always_packs")
def test_packed_for_many_calls() -> None:
    """Once for all calls inside, and with the model's present weights at each entry."""
    model = tiny_model(hidden_size=256, embedding_size=16).float()
    batch = batch_of(model, *ragged_batch(LENGTHS))
    expected = []
    for scale in (1.0, -0.5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        with model.packed(), pytest.MonkeyPatch.context() as patch:
            packings = count_packings(patch)
            for options in ({}, {"num_beams": 2}, {}):
                ours, theirs = both(model, batch, **options)
                assert torch.equal(ours, theirs)
            once = len(packings)
            alone, _ = both(model, {name: value[:1] for name, value in batch.items()})
            assert len(packings) == once > 0
            # A gradient goes its usual way.
            loss = model(**batch, labels=ours[:, 1:].contiguous()).loss
            assert len(torch.autograd.grad(loss, list(model.head.parameters()))) == 2
            assert len(packings) == once
        expected.append(alone)
    assert expected[0].tolist() != expected[1].tolist()


@pytest.mark.usefixtures("always_packs")
def test_what_is_kept_packed_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they change: in place, by other memory, by another parameter; and a copy packs for itself."""
    model: Any = tiny_model(hidden_size=256, embedding_size=16).float()
    batch = batch_of(model, *ragged_batch(LENGTHS))
    packings = count_packings(monkeypatch)

    def packed_now(model: Any) -> int:
        before = len(packings)
        with model.packed(keep=True):
            ids = model.generate(**batch, max_new_tokens=8, num_beams=2)
        now = len(packings) - before
        assert torch.equal(model.generate(**batch, max_new_tokens=8, num_beams=2), ids)
        return now

    layer = model.model.decoder.wiring.stack.layers[0]
    first = packed_now(model)
    assert first >= 2
    assert packed_now(model) == 0
    with torch.no_grad():
        layer.weight_hh.mul_(-0.5)
    assert packed_now(model) == 1
    layer.weight_hh.data = layer.weight_hh.data * -2
    assert packed_now(model) == 1
    layer.weight_hh = torch.nn.Parameter(layer.weight_hh.detach().flip(0))
    assert packed_now(model) == 1
    assert packed_now(model) == 0
    assert packed_now(copy.deepcopy(model)) == first
    assert packed_now(pickle.loads(pickle.dumps(model))) == first
    assert packed_now(model) == 0
