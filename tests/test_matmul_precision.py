"""The precision of float32 products: measured before it is changed, and put back."""

import logging
import time

import pytest
import torch
from tiny_trainer import make_arguments, make_trainer
from transformers import TrainerCallback

from hf_rnn_seq2seq import matmul_precision
from hf_rnn_seq2seq.matmul_precision import gain_of_bfloat16, gain_of_medium
from hf_rnn_seq2seq.timing import fastest_seconds


@pytest.fixture(autouse=True)
def highest():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


class PrecisionOfSteps(TrainerCallback):
    def __init__(self):
        self.seen = set()

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.add(torch.get_float32_matmul_precision())


def train(folder, resume=None, **arguments):
    """The precisions that a training's steps have seen."""
    trainer = make_trainer(folder, **{"max_steps": 2, **arguments})
    steps = PrecisionOfSteps()
    trainer.add_callback(steps)
    trainer.train(resume_from_checkpoint=resume)
    return steps.seen


def measure(monkeypatch, error, gain):
    monkeypatch.setattr(matmul_precision, "gain_of_medium", lambda rows, width: (error, gain))
    monkeypatch.setattr(matmul_precision, "LEAST_PRODUCT", 0)


@pytest.mark.parametrize(
    ("error", "gain", "chosen"),
    [(4e-7, 1.8, "medium"), (4e-7, 1.02, "highest"), (3e-3, 1.8, "highest")],
    ids=["faster and exact", "no faster", "inexact"],
)
def test_auto_goes_by_error_and_time(monkeypatch, tmp_path, error, gain, chosen):
    measure(monkeypatch, error, gain)
    assert train(tmp_path) == {chosen}
    assert torch.get_float32_matmul_precision() == "highest"  # put back


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_a_named_one_is_not_measured(monkeypatch, tmp_path, precision):
    monkeypatch.setattr(matmul_precision, "gain_of_medium", None)
    assert train(tmp_path, float32_matmul_precision=precision) == {precision}
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_resumed_run_keeps_what_was_chosen(monkeypatch, tmp_path):
    measure(monkeypatch, 4e-7, 1.8)
    train(tmp_path, save_steps=1)
    measure(monkeypatch, 4e-7, 1.0)
    assert train(tmp_path, resume=str(tmp_path / "checkpoint-1")) == {"medium"}


def test_small_products_are_not_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(matmul_precision, "gain_of_medium", None)
    assert train(tmp_path) == {"highest"}


def test_the_measurement_is_one():
    error, gain = gain_of_medium(64, 128)
    assert 0 < error < 0.02  # float32 or bfloat16, not zero: the products were made
    assert 0.01 < gain < 100
    assert torch.get_float32_matmul_precision() == "highest"


def test_bfloat16_is_measured_as_well():
    assert 0.01 < gain_of_bfloat16(64, 128) < 100


def test_the_fastest_of_turns_counts_without_the_first():
    waits = {"a": iter([0.0, *[0.02] * 14, 0.003]), "b": iter([0.0, *[0.001] * 15])}
    turns = []

    def contestant(name):
        turns.append(name)
        time.sleep(next(waits[name]))

    a, b = fastest_seconds(lambda: contestant("a"), lambda: contestant("b"))
    assert 0.003 <= a < 0.02
    assert b >= 0.001
    assert turns == ["a", "b"] * 16


@pytest.mark.parametrize(("gain", "warned"), [(0.5, True), (1.5, False)])
def test_bf16_that_is_slower_is_warned_of(monkeypatch, tmp_path, caplog, gain, warned):
    monkeypatch.setattr(matmul_precision, "gain_of_bfloat16", lambda rows, width: gain)
    monkeypatch.setattr(logging.getLogger("hf_rnn_seq2seq"), "propagate", True)
    train(tmp_path / "float32")
    assert "bfloat16" not in caplog.text
    train(tmp_path / "bf16", bf16=True)
    assert ("products in bfloat16 take 2.0 times as long" in caplog.text) == warned


def test_auto_leaves_a_users_choice_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(matmul_precision, "gain_of_medium", None)
    torch.set_float32_matmul_precision("high")
    assert train(tmp_path) == {"high"}
    assert torch.get_float32_matmul_precision() == "high"


def test_it_is_put_back_after_an_error(tmp_path):
    trainer = make_trainer(tmp_path, float32_matmul_precision="medium")
    trainer.train_dataset = [{"input_ids": [1, 2]}]
    with pytest.raises(ValueError, match="labels"):
        trainer.train()
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_argument_is_checked(tmp_path):
    with pytest.raises(ValueError, match=r"`float32_matmul_precision` must be one of .*, not 'low'"):
        make_arguments(tmp_path, float32_matmul_precision="low")
