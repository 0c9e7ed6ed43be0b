import math
import re
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_trainer import learning_rates, make_arguments, make_trainer

from hf_rnn_seq2seq.arguments import parse_arguments
from hf_rnn_seq2seq.optimization import schedule_multiplier
from hf_rnn_seq2seq.schedules import (
    LUONG_SCHEMES,
    halving_multiplier,
    luong_start_and_interval,
    rnmt_plus_multiplier,
)


@pytest.fixture
def multiplier(tmp_path):
    """The multiplier of a schedule at each step of a training of `epochs` epochs of 4 steps."""

    def values(epochs: int, **arguments) -> list[float]:
        args = make_arguments(tmp_path, **arguments)
        at = schedule_multiplier(args, num_training_steps=4 * epochs, steps_per_epoch=4)
        return [at(step) for step in range(4 * epochs)]

    return values


def test_sutskever(multiplier):
    """2014, section 3.4: "After 5 epochs, we begun halving the learning rate every half epoch.\""""
    values = multiplier(7, lr_scheduler_type="halving", lr_decay_start=5, lr_decay_interval=0.5)
    assert values == [1] * 20 + [1 / 2] * 2 + [1 / 4] * 2 + [1 / 8] * 2 + [1 / 16] * 2


@pytest.mark.parametrize("start", [5, 8])
def test_luong(multiplier, start):
    """2015, section 4.1: after 5 epochs, or 8 with dropout, halved every epoch; a loop over epochs as there."""
    expected, rate = [], 1.0
    for epoch in range(1, 13):
        if epoch > start:
            rate *= 0.5
        expected += [rate] * 4
    assert multiplier(12, lr_scheduler_type="halving", lr_decay_start=start) == expected


def test_halving_by_steps_with_another_factor_and_a_warmup(multiplier):
    values = multiplier(
        3,
        lr_scheduler_type="halving",
        lr_decay_unit="steps",
        lr_decay_start=6,
        lr_decay_interval=2,
        lr_decay_factor=0.1,
        warmup_steps=4,
    )
    assert values == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 40))
def test_boundaries_are_exact_for_decimals(steps_per_epoch, start, interval):
    """A boundary at 0.3 epochs of 10 steps is at step 3, which 0.1 + 0.1 + 0.1 in floating point would miss."""
    args = make_arguments(
        "unused", lr_scheduler_type="halving", lr_decay_start=start / 10, lr_decay_interval=interval / 10
    )
    at = schedule_multiplier(args, num_training_steps=1000, steps_per_epoch=steps_per_epoch)
    for step in range(0, 300, 7):
        # In tenths of an epoch: whole numbers on both sides.
        times = sum(10 * step >= (start + k * interval) * steps_per_epoch for k in range(10 * step + 1))
        assert at(step) == 0.5**times


def nmt_schedule(scheme: str, num_train_steps: int, global_step: int) -> float:
    """tensorflow/nmt, nmt/model.py: _get_decay_info and the staircase tf.train.exponential_decay."""
    if scheme == "luong5":
        start_decay_step, decay_times = int(num_train_steps / 2), 5
    elif scheme == "luong10":
        start_decay_step, decay_times = int(num_train_steps / 2), 10
    else:
        start_decay_step, decay_times = int(num_train_steps * 2 / 3), 4
    decay_steps = int((num_train_steps - start_decay_step) / decay_times)
    if global_step < start_decay_step:
        return 1.0
    return 0.5 ** math.floor((global_step - start_decay_step) / decay_steps)


@pytest.mark.parametrize("scheme", LUONG_SCHEMES)
@pytest.mark.parametrize("epochs", [6, 15, 25])
def test_schemes_of_tf_nmt(multiplier, scheme, epochs):
    expected = [nmt_schedule(scheme, 4 * epochs, step) for step in range(4 * epochs)]
    assert multiplier(epochs, lr_scheduler_type=scheme) == expected
    assert min(expected) <= 0.125


def test_scheme_of_tf_nmt_for_fewer_steps_than_halvings():
    """There, it divides by zero."""
    start, interval = luong_start_and_interval("luong10", 6)
    values = [halving_multiplier(step, start=start, interval=interval, factor=0.5) for step in range(6)]
    assert values == [1, 1, 1, 1, 0.5, 0.25]


def rnmt_plus(t, n, p, s, e):
    return min(1 + t * (n - 1) / (n * p), n, n * (2 * n) ** ((s - n * t) / (e - s)))


def test_rnmt_plus(multiplier):
    """The formula of the paper for its 32 replicas; it rises, stays and falls to 1/2 at n t = e."""
    n, p, s, e = 32, 5, 12800, 25600
    values = [rnmt_plus_multiplier(t, replicas=n, warmup_steps=p, start=s, end=e) for t in range(1000)]
    assert values == pytest.approx([rnmt_plus(t, n, p, s, e) for t in range(1000)], rel=1e-12)
    assert values[0] == 1
    assert values[160:401] == [32.0] * 241
    assert values[159] < 32 > values[401]
    assert values[800] == pytest.approx(0.5)
    arguments = {"lr_scheduler_type": "rnmt_plus", "lr_replicas": 3, "warmup_steps": 2}
    values = multiplier(10, lr_decay_start=30, lr_decay_end=90, lr_decay_unit="steps", **arguments)
    assert values == pytest.approx([rnmt_plus(t, 3, 2, 30, 90) for t in range(40)])
    # An epoch of 4 steps of all replicas is 12 steps of a single one.
    values = multiplier(10, lr_decay_start=2.5, lr_decay_end=7.5, **arguments)
    assert values == pytest.approx([rnmt_plus(t, 3, 2, 30, 90) for t in range(40)])


def test_rnmt_plus_of_one_process_and_without_warmup(multiplier):
    values = multiplier(10, lr_scheduler_type="rnmt_plus", lr_decay_start=2, lr_decay_end=4)
    assert values == pytest.approx([min(1, 2 ** ((8 - t) / 8)) for t in range(40)])
    values = multiplier(4, lr_scheduler_type="rnmt_plus", lr_replicas=8, lr_decay_start=2, lr_decay_end=4)
    assert values[:9] == [8.0] * 9
    # An exponent that would overflow is of no account.
    assert rnmt_plus_multiplier(0, replicas=8, warmup_steps=0, start=10**6, end=10**6 + 1) == 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"lr_scheduler_type": "halving", "lr_decay_start": 1}, [1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4]),
        (
            {"lr_scheduler_type": "halving", "lr_decay_start": 1, "lr_decay_interval": 0.5},
            [1, 1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 8, 1 / 16],
        ),
        (
            {"lr_scheduler_type": "halving", "lr_decay_start": 4, "lr_decay_interval": 3, "lr_decay_unit": "steps"},
            [1, 1, 1, 1, 1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4],
        ),
        ({"lr_scheduler_type": "luong234"}, [1, 1, 1, 1, 1, 1, 1, 1 / 2, 1 / 4]),
        (
            {
                "lr_scheduler_type": "rnmt_plus",
                "lr_replicas": 2,
                "warmup_steps": 1,
                "lr_decay_start": 1,
                "lr_decay_end": 2,
            },
            [rnmt_plus(t, 2, 1, 6, 12) for t in range(9)],
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 4},
            [0, 1 / 4, 1 / 2, 3 / 4, 1, *(math.sqrt(4 / t) for t in range(5, 9))],
        ),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, [0, 1 / 2, *[1] * 7]),
        ({}, [(9 - t) / 9 for t in range(9)]),
    ],
)
def test_training_follows_the_schedule(tmp_path, arguments, expected):
    trainer = make_trainer(tmp_path, learning_rate=0.01, num_train_epochs=3, save_strategy="no", **arguments)
    trainer.train()
    assert learning_rates(trainer) == pytest.approx([0.01 * value for value in expected])


def test_an_epoch_of_accumulated_batches(tmp_path):
    """Three batches, two to an update: two updates an epoch."""
    trainer = make_trainer(
        tmp_path,
        learning_rate=1.0,
        num_train_epochs=3,
        gradient_accumulation_steps=2,
        lr_scheduler_type="halving",
        lr_decay_start=1,
    )
    trainer.train()
    assert learning_rates(trainer) == [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]


@pytest.mark.parametrize(
    ("arguments", "scores", "expected"),
    [
        # Less is better, each worse or equal evaluation halves.
        ({"greater_is_better": False}, [5, 4, 4, 3, 6, 7], [1, 1, 1, 1 / 2, 1 / 2, 1 / 4]),
        # More is better.
        ({"greater_is_better": True}, [5, 4, 4, 6, 7, 8], [1, 1, 1 / 2, 1 / 4, 1 / 4, 1 / 4]),
        # One bad evaluation is borne.
        ({"greater_is_better": False, "lr_patience": 1}, [5, 6, 4, 5, 5, 5], [1, 1, 1, 1, 1, 1 / 2]),
        ({"greater_is_better": False, "lr_decay_factor": 0.1}, [5, 6, 4, 5, 5, 5], [1, 1, 0.1, 0.1, 0.01, 0.001]),
        # What lr_scheduler_kwargs say goes before.
        (
            {"greater_is_better": False, "lr_scheduler_kwargs": {"factor": 0.2}},
            [5, 6, 7, 4, 3, 2],
            [1, 1, 0.2, *[0.04] * 3],
        ),
    ],
)
def test_plateau(tmp_path, arguments, scores, expected):
    """The rates of the updates, each of which is followed by an evaluation."""
    coming = iter(scores)
    trainer = make_trainer(
        tmp_path,
        compute_metrics=lambda prediction: {"score": next(coming)},
        learning_rate=1.0,
        max_steps=6,
        lr_scheduler_type="reduce_lr_on_plateau",
        metric_for_best_model="score",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        **arguments,
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx(expected)


def test_a_second_training_begins_the_schedule_anew(tmp_path):
    trainer = make_trainer(
        tmp_path, learning_rate=1.0, num_train_epochs=2, lr_scheduler_type="halving", lr_decay_start=1
    )
    for _ in range(2):
        trainer.optimizer = None
        trainer.train()
        assert learning_rates(trainer) == [1, 1, 1, 1 / 2, 1 / 2, 1 / 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"lr_scheduler_type": "halve"},
            "lr_scheduler_type='halve': must be one of halving, luong5, luong10, luong234, rnmt",
        ),
        (
            {"lr_scheduler_type": "halving"},
            "lr_decay_start=None: lr_scheduler_type='halving' needs a number of epochs",
        ),
        ({"lr_scheduler_type": "halving", "lr_decay_start": -1.0}, "lr_decay_start=-1.0: "),
        ({"lr_scheduler_type": "halving", "lr_decay_start": math.nan}, "lr_decay_start=nan: "),
        ({"lr_scheduler_type": "halving", "lr_decay_start": 1, "lr_decay_interval": 0}, "lr_decay_interval=0: "),
        (
            {"lr_scheduler_type": "halving", "lr_decay_start": 1, "lr_decay_unit": "hours"},
            "lr_decay_unit='hours': must be one of epochs, steps",
        ),
        (
            {"lr_scheduler_type": "luong5", "lr_decay_factor": 2.0},
            "lr_decay_factor=2.0: lr_scheduler_type='luong5' needs a number between 0 and 1",
        ),
        (
            {"lr_scheduler_type": "rnmt_plus", "lr_decay_start": 3},
            "lr_decay_end=None: lr_scheduler_type='rnmt_plus' needs a number of epochs above lr_decay_start=3",
        ),
        ({"lr_scheduler_type": "rnmt_plus", "lr_decay_start": 3, "lr_decay_end": 3}, "lr_decay_end=3: "),
        (
            {"lr_scheduler_type": "rnmt_plus", "lr_decay_start": 3, "lr_decay_end": 4, "lr_replicas": 0},
            "lr_replicas=0: ",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "lr_patience": -1},
            "lr_patience=-1: ",
        ),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_arguments(tmp_path, **arguments)


def test_epochs_need_data_with_a_length(tmp_path):
    make = partial(make_trainer, tmp_path, max_steps=4, lr_scheduler_type="halving", lr_decay_start=1)
    trainer = make()
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    with pytest.raises(ValueError, match="lr_decay_unit='epochs': the training data has no length; must be 'steps'"):
        trainer.train()
    trainer = make(lr_decay_unit="steps", learning_rate=1.0)
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    trainer.train()
    assert learning_rates(trainer) == [1, 1 / 2, 1 / 4, 1 / 8]


def test_flags_and_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output_dir: x\noptim: sgd\nlearning_rate: 1.0\nmax_grad_norm: 5.0\nlr_scheduler_type: halving\n"
        "lr_decay_start: 8\n"
    )
    training = parse_arguments([str(recipe)]).training
    assert (training.lr_scheduler_type, training.lr_decay_start, training.lr_decay_interval) == ("halving", 8, 1)
    training = parse_arguments([str(recipe), "--lr_scheduler_type", "luong10"]).training
    assert training.lr_scheduler_type == training.to_dict()["lr_scheduler_type"] == "luong10"
    flags = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch", "--lr_patience", "2"]
    training = parse_arguments([str(recipe), *flags]).training
    assert (training.lr_scheduler_type, training.lr_patience) == ("reduce_lr_on_plateau", 2)
