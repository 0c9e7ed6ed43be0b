"""Weights in eight bits: what they are worth, that they come back from a folder, and where they are refused."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSeq2SeqLM

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration, RnnSeq2SeqInt8Config
from hf_rnn_seq2seq import int8 as int8_module
from hf_rnn_seq2seq.int8 import Int8Embedding, Int8Linear, quantize, quantize_rows
from hf_rnn_seq2seq.recurrent_layers import CELLS
from tests.models import CONFIGURATIONS, batch_of, name_of, ragged_batch, tiny_config, tiny_model
from tests.tiny_trainer import make_trainer

KERNEL_CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
LABELS = torch.tensor([[4, 5, 2, -100], [7, 2, -100, -100], [8, 9, 3, 2]])


def wide_model(**setting: Any) -> RnnSeq2SeqForConditionalGeneration:
    """Wide enough for its matrices to be the larger part of it, in float32."""
    torch.manual_seed(0)
    defaults = {"vocab_size": 300, "hidden_size": 64, "embedding_size": 32, "attention_type": "general"}
    return RnnSeq2SeqForConditionalGeneration(tiny_config(**{**defaults, **setting})).eval()


def eight_bits(folder: Path, **options: Any) -> RnnSeq2SeqForConditionalGeneration:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=RnnSeq2SeqInt8Config(**options)).eval()


def saved(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


# The matrices


@given(st.integers(1, 6), st.integers(1, 20), st.sampled_from([1e-30, 1e-3, 1.0, 1e5]), st.integers(0, 9))
def test_rows_are_within_half_a_step(rows: int, columns: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight = scale * torch.randn(rows, columns)
    numbers, scales = quantize_rows(weight)
    assert numbers.dtype == torch.int8
    assert (numbers.abs().amax(1) == 127).all()
    assert ((numbers * scales.unsqueeze(1) - weight).abs() <= 0.5001 * scales.unsqueeze(1)).all()


def test_rows_of_zeros_stay_zeros() -> None:
    numbers, scales = quantize_rows(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert (numbers[0] == 0).all()
    assert scales.isfinite().all()
    assert (numbers[0] * scales[0] == 0).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 40), (5, 40), (3, 4, 40)])
def test_products(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 30, bias=bias), torch.randn(shape)
    int8 = Int8Linear(linear.weight, linear.bias, loaded=True).eval()
    found, expected = int8(x), linear(x)
    assert found.shape == expected.shape
    # x is rounded to 255 steps (127 without VNNI), W to 254 each row.
    assert (found - expected).norm() / (expected - (linear.bias if bias else 0)).norm() < 0.03
    exact = F.linear(x, int8.weight * int8.weight_scale.unsqueeze(1), linear.bias)
    assert (found - exact).norm() < (found - expected).norm() * 1.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_have_the_type_of_what_comes_in(dtype: torch.dtype) -> None:
    linear = nn.Linear(8, 5)
    int8 = Int8Linear(linear.weight, linear.bias, loaded=True).eval()
    x = torch.randn(2, 8).to(dtype)
    assert int8(x).dtype == dtype
    torch.testing.assert_close(int8(x), int8(x.float()).to(dtype))


def test_nothing_in_gives_the_bias() -> None:
    linear = nn.Linear(0, 5)
    int8 = Int8Linear(linear.weight, linear.bias, loaded=True).eval()
    torch.testing.assert_close(int8(torch.empty(3, 0)), linear(torch.empty(3, 0)))
    linear = nn.Linear(4, 5)
    assert Int8Linear(linear.weight, linear.bias, loaded=True).eval()(torch.empty(0, 4)).shape == (0, 5)


def test_other_weights_are_packed_anew() -> None:
    one, other = (Int8Linear(torch.randn(6, 8), torch.randn(6), loaded=True).eval() for _ in range(2))
    x = torch.randn(2, 8)
    before = one(x)
    twin = copy.deepcopy(one)
    one.load_state_dict(other.state_dict())
    torch.testing.assert_close(one(x), other(x))
    torch.testing.assert_close(twin(x), before)


@pytest.mark.skipif(
    "onednn" not in torch.backends.quantized.supported_engines,
    reason="this build of torch has no oneDNN kernels for eight bits; x86 builds have",
)
def test_large_products_are_those_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.quantized, "engine", "x86")
    linear = Int8Linear(torch.randn(33, 40), torch.randn(33), loaded=True).eval()
    x = torch.randn(7, 40)
    plain = linear(x)
    assert list(linear.packed) == ["x86"]
    monkeypatch.setattr(int8_module, "ONEDNN_RESULTS", 7 * 33 - 1)
    torch.testing.assert_close(linear(x), plain)
    assert list(linear.packed) == ["x86", "onednn"]
    assert torch.backends.quantized.engine == "x86"


def test_embeddings() -> None:
    table = nn.Embedding(9, 16, padding_idx=0)
    int8 = Int8Embedding(table, loaded=True)
    ids = torch.tensor([[0, 3], [8, 1]])
    assert (int8(ids)[0, 0] == 0).all()
    torch.testing.assert_close(int8(ids), table(ids), rtol=0, atol=table.weight.abs().max().item() / 250)


@pytest.mark.parametrize("cell", KERNEL_CELLS)
def test_cells_step_as_they_run_through_a_sequence(cell: str) -> None:
    """One row, so that each step has a scale of its own in either case; in a sequence the inputs share one."""
    torch.manual_seed(0)
    layer = CELLS[cell](12, 16)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    plain = copy.deepcopy(layer)
    holder = nn.ModuleList([layer])
    quantize(holder, [], loaded=True)
    holder.eval()
    x, mask = torch.randn(3, 7, 12), torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 0, 0], [1] * 4 + [0] * 3]).bool()
    outputs, final = layer(x, None, mask)
    expected, expected_final = plain(x, None, mask)
    assert (outputs[1, :2] == 0).all()
    assert (outputs - expected).norm() / expected.norm() < 0.06
    assert all((a - b).norm() / b.norm() < 0.06 for a, b in zip(final, expected_final, strict=True))
    state = layer.zero_state(x)
    for x_t in x[0:1].unbind(1):
        state = layer.step(x_t, tuple(value[:1] for value in state))
    assert (state[0] - expected[0:1, -1]).norm() / expected[0, -1].norm() < 0.06


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 5, 6], [2, 0, 7], [1]])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_kernels_for_sequences_go_like_the_steps(
    cell: str, lengths: list[int], side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the scales, which the other rows of a step have a part in: here all are alike."""
    torch.manual_seed(1)
    layer = CELLS[cell](12, 16)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    quantize(nn.ModuleList([layer]), [], loaded=True)
    layer.eval()
    calls: list[str] = []

    def counted(name: str, operator: Any) -> Any:
        return lambda *arguments: (calls.append(name), operator(*arguments))[1]

    kernel = int8_module.KERNELS[type(layer).fused]
    watched = int8_module.Kernel(*(counted(name, operator) for name, operator in kernel._asdict().items()))
    monkeypatch.setitem(int8_module.KERNELS, type(layer).fused, watched)
    _, mask = ragged_batch(lengths, side)
    x = torch.randn(1, mask.size(1), 12).expand(len(lengths), -1, -1) * mask.unsqueeze(2)
    outputs, final = layer(x, None, mask.bool())
    expected, expected_final = layer._forward_by_steps(x, layer.zero_state(x), mask.bool())
    assert calls == ["whole" if mask.all() else "packed"]
    for found, wanted in zip((outputs, *final), (expected, *expected_final), strict=True):
        assert found.shape == wanted.shape
        assert (found - wanted).norm() <= 0.02 * wanted.norm()
    assert (outputs[mask == 0] == 0).all()
    assert not any(value[torch.tensor(lengths) == 0].any() for value in final)
    state = tuple(torch.randn_like(value) for value in final)
    outputs, final = layer(x, state)
    torch.testing.assert_close(outputs, layer._forward_by_steps(x, state, None)[0], rtol=0, atol=0.02)
    step = layer.step(x[:, 0], state)
    expected_step = layer._advance(layer.project(x[:, 0]), state, ())
    assert all((one - other).norm() <= 1e-5 * other.norm() for one, other in zip(step, expected_step, strict=True))
    assert calls[1:] == ["whole", "whole"]
    again = copy.deepcopy(layer)
    assert torch.equal(again.step(x[:, 0], state)[0], step[0])
    with torch.no_grad():
        again.product_hh.weight_scale = nn.Parameter(2 * again.product_hh.weight_scale, requires_grad=False)
    assert not torch.equal(again.step(x[:, 0], state)[0], step[0])
    assert torch.equal(layer.step(x[:, 0], state)[0], step[0])
    monkeypatch.setattr(int8_module, "KERNEL_ROWS", 1)  # without the kernel
    made = len(calls)
    for one, other in zip(layer.step(x[:, 0], state), step, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert len(calls) == made


# Models


@pytest.mark.parametrize("setting", CONFIGURATIONS[::6], ids=name_of)
def test_every_kind_of_model_stays_near(setting: dict[str, Any]) -> None:
    """Whatever is not covered works all the same, and what is covered is."""
    model = tiny_model(**setting).float()
    other = copy.deepcopy(model)
    quantize(other, [], loaded=True)
    source, mask = ragged_batch([5, 2, 4], "both")
    batch = {**batch_of(model, source, mask), "decoder_input_ids": LABELS.clamp(min=0)}
    with torch.no_grad():
        exact, near = model(**batch).logits.log_softmax(-1), other(**batch).logits.log_softmax(-1)
    assert near.shape == exact.shape
    assert near.isfinite().all()
    assert not torch.equal(exact, near)
    for module in other.modules():
        assert type(module) is not nn.Embedding
        assert not hasattr(module, "weight_hh") or "product_hh" not in dict(module.named_children())
    remaining = [name for name, module in other.named_modules() if isinstance(module, nn.Linear)]
    assert all(name.endswith("score_projection") for name in remaining)
    generated = other.generate(**batch_of(model, source, mask), max_new_tokens=4, num_beams=2)
    assert generated.size(0) == 3


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True, "source_vocab_size": 200, "decoder_layers": 2, "cell_type": "gru"},
        {"source_vocab_size": 200, "attention_type": "additive", "wiring_type": "input_feeding"},
        {"wiring_type": "conditional", "decoder_transition_depth": 3, "head_type": "deep", "cell_type": "ln_lstm"},
    ],
    ids=name_of,
)
def test_round_trip(setting: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(wide_model(**setting), tmp_path / "float")
    model = eight_bits(folder)
    again = AutoModelForSeq2SeqLM.from_pretrained(saved(model, tmp_path / "int8")).eval()
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"] == {
        "modules_to_not_convert": None,
        "quant_method": "rnn_seq2seq_int8",
    }
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    assert {p.data_ptr() for p in again.parameters()} == {
        dict(again.named_parameters())[n].data_ptr() for n, _ in again.named_parameters()
    }
    source, mask = ragged_batch([5, 2, 4])
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 6}
    assert torch.equal(model.generate(source, **options), again.generate(source, **options))
    assert isinstance(again.model.encoder.embed_tokens, Int8Embedding)
    if again.config.tie_word_embeddings:
        for name in ("weight", "weight_scale"):
            assert getattr(again.head.output, name) is getattr(again.model.decoder.embed_tokens, name)
    inner = AutoModel.from_pretrained(tmp_path / "int8")
    assert torch.equal(inner.encoder.embed_tokens.weight, again.model.encoder.embed_tokens.weight)
    third = AutoModelForSeq2SeqLM.from_pretrained(saved(again, tmp_path / "third"))
    assert torch.equal(third.head.output.weight, again.head.output.weight)


def test_the_file_is_small(tmp_path: Path) -> None:
    folder = saved(wide_model(hidden_size=256, embedding_size=128, vocab_size=1000), tmp_path / "float")
    saved(eight_bits(folder), tmp_path / "int8")
    sizes = [(path / "model.safetensors").stat().st_size for path in (tmp_path / "int8", folder)]
    assert sizes[0] <= 0.3 * sizes[1]
    with safe_open(tmp_path / "int8" / "model.safetensors", "pt") as file:
        assert file.get_slice("head.output.weight").get_dtype() == "I8"


def test_other_processes_load_it(tmp_path: Path) -> None:
    folder = saved(eight_bits(saved(wide_model(), tmp_path / "float")), tmp_path / "int8")
    code = (
        "import sys, torch, hf_rnn_seq2seq\n"
        "from transformers import AutoModelForSeq2SeqLM\n"
        "model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "print(model.head.output.weight.dtype, model.generate(torch.tensor([[4, 5]]), max_new_tokens=3).shape[0])\n"
    )
    found = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["torch.int8", "1"]
    assert "arning" not in found.stderr


def test_what_is_named_stays_in_floating_point(tmp_path: Path) -> None:
    folder = saved(wide_model(), tmp_path / "float")
    model = eight_bits(folder, modules_to_not_convert=["head.output", "decoder.embed_tokens"])
    again = AutoModelForSeq2SeqLM.from_pretrained(saved(model, tmp_path / "int8"))
    for one in (model, again):
        assert isinstance(one.head.output, nn.Linear)
        assert isinstance(one.model.decoder.embed_tokens, nn.Embedding)
        assert isinstance(one.model.encoder.embed_tokens, Int8Embedding)
    assert torch.equal(again.head.output.weight, model.head.output.weight)


def test_the_loss_is_near_with_and_without_logits(tmp_path: Path) -> None:
    model = wide_model()
    int8 = eight_bits(saved(model, tmp_path))
    source, mask = ragged_batch([5, 2, 4])
    with torch.no_grad():
        losses = [
            one(source, attention_mask=mask, labels=LABELS, skip_logits=skip).loss
            for one in (model, int8)
            for skip in (False, True)
        ]
    assert losses[2].item() == pytest.approx(losses[0].item(), rel=0.01)
    assert losses[3].item() == pytest.approx(losses[2].item(), rel=0.01)
    assert losses[2] != losses[0]


# Refusals


def test_training_is_refused(tmp_path: Path) -> None:
    model = eight_bits(saved(wide_model(), tmp_path / "float"))
    source, _ = ragged_batch([5, 2, 4])
    model.train()
    with pytest.raises(RuntimeError, match=r"\(`RnnSeq2SeqInt8Config`\) are for decoding and can't be trained"):
        model(source, labels=LABELS)
    model.eval()
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(source, labels=LABELS).loss.backward()
    trainer = make_trainer(tmp_path / "trainer")
    with pytest.raises(ValueError, match="quantized"):
        type(trainer)(model=model, args=trainer.args, train_dataset=trainer.train_dataset)


def test_other_refusals(tmp_path: Path) -> None:
    folder = saved(wide_model(), tmp_path / "float")
    with pytest.raises(ValueError, match=r"`modules_to_not_convert`: the model has no module 'decoder.head'"):
        eight_bits(folder, modules_to_not_convert=["decoder.head"])
    with pytest.raises(ValueError, match=r"must be a list of names, got 'head'"):
        RnnSeq2SeqInt8Config(modules_to_not_convert="head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`modules_to_not_convert` alone, not bits"):
        RnnSeq2SeqInt8Config(bits=4)
    with pytest.raises(ValueError, match=r"`device_map` must not name 'cuda:0'"):
        AutoModelForSeq2SeqLM.from_pretrained(
            folder, quantization_config=RnnSeq2SeqInt8Config(), device_map={"": "cuda:0"}
        )
    with pytest.raises(RuntimeError, match="for a CPU, the input is on meta"):
        Int8Linear(torch.ones(2, 3), None, loaded=True).eval()(torch.ones(1, 3, device="meta"))
    model = eight_bits(folder)
    with pytest.raises(TypeError, match="Int8Embedding"):
        model.resize_token_embeddings(310)
