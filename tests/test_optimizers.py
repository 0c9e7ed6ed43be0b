import io
import math
import re

import numpy as np
import pytest
import torch
from models import CONFIGURATIONS, tiny_config
from tiny_trainer import learning_rates, make_arguments, make_trainer
from torch import nn

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.arguments import ArgumentError, parse_arguments
from hf_rnn_seq2seq.optimizers import OPTIMIZERS, OPTIONS, AdagradDA, RMSpropDA, optimizer_class_and_options

NAMES = list(OPTIMIZERS)


class PlainAdam:
    """Kingma and Ba 2015, algorithm 1, with the gradient of an L2 penalty added to the gradient."""

    def __init__(self, beta1=0.9, beta2=0.999, eps=1e-8):
        self.beta1, self.beta2, self.eps, self.m, self.v, self.t = beta1, beta2, eps, 0.0, 0.0, 0

    def step(self, x, g, lr, decay):
        g = g + decay * x
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g**2
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return x - lr * m / (math.sqrt(v) + self.eps)


class PlainAdadelta:
    """Zeiler 2012, algorithm 1."""

    def __init__(self, rho=0.95, eps=1e-6):
        self.rho, self.eps, self.squares, self.moves = rho, eps, 0.0, 0.0

    def step(self, x, g, lr, decay):
        g = g + decay * x
        self.squares = self.rho * self.squares + (1 - self.rho) * g**2
        move = -math.sqrt(self.moves + self.eps) / math.sqrt(self.squares + self.eps) * g
        self.moves = self.rho * self.moves + (1 - self.rho) * move**2
        return x + lr * move


class PlainDualAveraging:
    """The minimiser of the objective in the docstring, by trying the objective where it can have its minimum."""

    def __init__(self, curvature, l1=0.0, center="initial"):
        self.curvature, self.l1, self.center = curvature, l1, center
        self.gradients, self.rates, self.c = [], [], None

    def step(self, x, g, lr, decay):
        if self.c is None:
            self.c = x if self.center == "initial" else 0.0
        self.gradients.append(g)
        self.rates.append(lr)
        z = sum(rate * gradient for rate, gradient in zip(self.rates, self.gradients, strict=True))
        total, h = sum(self.rates), self.curvature(self.gradients)

        def objective(x):
            return z * x + total * (self.l1 * abs(x) + decay / 2 * x**2) + h / 2 * (x - self.c) ** 2

        # Stationary points for x > 0 and for x < 0, and the kink.
        points = [(h * self.c - z - sign * total * self.l1) / (h + total * decay) for sign in (1, -1)]
        return min([points[0], points[1], 0.0], key=objective)


def adagrad_curvature(gradients, initial=0.1):
    return math.sqrt(initial + sum(g**2 for g in gradients))


def rmsprop_curvature(gradients, alpha=0.99, eps=1e-8):
    largest = 0.0
    for t in range(1, len(gradients) + 1):
        weights = [(1 - alpha) * alpha ** (t - i) for i in range(1, t + 1)]
        mean = sum(w * g**2 for w, g in zip(weights, gradients, strict=False)) / (1 - alpha**t)
        largest = max(largest, math.sqrt(t * mean) + eps)
    return largest


CASES = {
    "adam": ("adam", None, lambda: PlainAdam()),
    "adam-options": ("adam", "beta1=0.5, beta2=0.9, eps=1e-3", lambda: PlainAdam(0.5, 0.9, 1e-3)),
    "adadelta": ("adadelta", None, lambda: PlainAdadelta()),
    "adadelta-options": ("adadelta", "rho=0.5,eps=0.01", lambda: PlainAdadelta(0.5, 0.01)),
    "adagrad_da": ("adagrad_da", None, lambda: PlainDualAveraging(adagrad_curvature)),
    "adagrad_da-options": (
        "adagrad_da",
        "l1=0.3,initial_accumulator=0.5,center=zero",
        lambda: PlainDualAveraging(lambda g: adagrad_curvature(g, 0.5), 0.3, "zero"),
    ),
    "adagrad_da-l1": ("adagrad_da", "l1=0.3", lambda: PlainDualAveraging(adagrad_curvature, 0.3)),
    "rmsprop_da": ("rmsprop_da", None, lambda: PlainDualAveraging(rmsprop_curvature)),
    "rmsprop_da-options": (
        "rmsprop_da",
        "alpha=0.5,eps=0.1,l1=0.3,center=zero",
        lambda: PlainDualAveraging(lambda g: rmsprop_curvature(g, 0.5, 0.1), 0.3, "zero"),
    ),
}


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_a_plain_implementation(tmp_path, case, decay):
    """In float64, with a rate that changes, gradients of very different sizes, and some that are zero."""
    name, options, plain = CASES[case]
    args = make_arguments(tmp_path, optim=name, optim_args=options)
    cls, kwargs = optimizer_class_and_options(args)
    rng = np.random.default_rng(0)
    start = rng.normal(size=6)
    parameter = nn.Parameter(torch.tensor(start))
    optimizer = cls([{"params": [parameter], "weight_decay": decay}], **kwargs)
    each = [plain() for _ in start]
    expected = [float(x) for x in start]
    for step in range(20):
        gradient = rng.normal(size=6) * [10, 1, 0.1, 1e-4, 1, 0]
        gradient[4] *= step % 3 == 0
        lr = 0.2 / (1 + step)
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        expected = [one.step(x, float(g), lr, decay) for one, x, g in zip(each, expected, gradient, strict=True)]
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    if "l1=" in (options or ""):
        assert 0 < sum(x == 0 for x in expected) < 6  # the penalty was felt
        assert [x == 0 for x in parameter.tolist()] == [x == 0 for x in expected]


@pytest.mark.parametrize("center", ["initial", "zero"])
def test_adagrad_da_at_a_constant_rate_is_tensorflows(center):
    """The kernel of tensorflow/core/kernels/training_ops.cc (ApplyAdagradDA), which starts from weights of zero."""
    rng = np.random.default_rng(1)
    lr, l1, l2 = 0.3, 0.05, 0.02
    parameter = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = AdagradDA([parameter], lr=lr, l1=l1, weight_decay=l2, center=center)
    accumulator, squared = np.zeros(5), np.full(5, 0.1)
    for global_step in range(1, 21):
        grad = rng.normal(size=5)
        parameter.grad = torch.tensor(grad)
        optimizer.step()
        accumulator += grad
        squared += grad**2
        shrunk = np.sign(accumulator) * np.maximum(np.abs(accumulator) - l1 * global_step, 0)
        expected = -lr * shrunk / (l2 * global_step * lr + np.sqrt(squared))
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_rmsprop_da_without_decay_of_the_mean_is_adagrad_da():
    rng = np.random.default_rng(2)
    first = [nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in range(2)]
    ours = RMSpropDA([first[0]], lr=0.1, alpha=1 - 1e-9, eps=1e-12)
    adagrad = AdagradDA([first[1]], lr=0.1, initial_accumulator=1e-24)
    for _ in range(20):
        for parameter in first:
            parameter.grad = torch.tensor(rng.normal(size=4)) if parameter is first[0] else first[0].grad.clone()
        ours.step()
        adagrad.step()
        torch.testing.assert_close(first[0], first[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_weights_without_gradient_stay(tmp_path, name):
    cls, kwargs = optimizer_class_and_options(make_arguments(tmp_path, optim=name))
    unused, rows = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4, 3))
    optimizer = cls([{"params": [unused, rows], "weight_decay": 0.0}], **kwargs)
    before = unused.detach().clone(), rows.detach().clone()
    for _ in range(3):
        rows.grad = torch.randn(4, 3)
        rows.grad[1] = 0
        optimizer.step()
    assert torch.equal(unused, before[0])
    assert torch.equal(rows[1], before[1][1])
    assert not torch.isclose(rows[[0, 2, 3]], before[1][[0, 2, 3]]).any()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(tmp_path, name):
    """Bit for bit, from a file that is read without running any code, also with weights in bfloat16."""
    cls, kwargs = optimizer_class_and_options(make_arguments(tmp_path, optim=name))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.manual_seed(0)
        gradients = torch.randn(10, 3, 4, dtype=dtype)
        parameter = nn.Parameter(torch.randn(3, 4, dtype=dtype))
        optimizer = cls([{"params": [parameter], "weight_decay": 0.1}], **kwargs)
        for step, gradient in enumerate(gradients):
            if step == 5:
                buffer = io.BytesIO()
                torch.save((optimizer.state_dict(), parameter.detach()), buffer)
            parameter.grad = gradient
            optimizer.step()
        buffer.seek(0)
        state, value = torch.load(buffer, weights_only=True)
        resumed = nn.Parameter(value)
        optimizer = cls([{"params": [resumed], "weight_decay": 0.0}], **kwargs)
        optimizer.load_state_dict(state)
        for gradient in gradients[5:]:
            resumed.grad = gradient
            optimizer.step()
        assert torch.equal(resumed, parameter), dtype


@pytest.mark.parametrize(
    ("name", "lr"), [("adam", 0.05), ("adadelta", 30.0), ("adagrad_da", 1.0), ("rmsprop_da", 1.0)]
)
def test_minimum_of_a_quadratic(tmp_path, name, lr):
    cls, kwargs = optimizer_class_and_options(make_arguments(tmp_path, optim=name, learning_rate=lr))
    x = nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    scale, minimum = torch.tensor([1.0, 5.0, 0.2]), torch.tensor([1.0, 1.0, -1.0])
    optimizer = cls([x], **kwargs)

    def closure():
        optimizer.zero_grad()
        loss = (scale * (x - minimum) ** 2).sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(800):
        last = optimizer.step(closure).item()
    assert last < 1e-6 * first


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_at_the_default_rate(tmp_path, name):
    trainer = make_trainer(tmp_path, optim=name, num_train_epochs=80, logging_steps=500, save_strategy="no")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, OPTIMIZERS[name])
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


def test_adam_takes_the_arguments_named_for_it_and_is_fused(tmp_path):
    args = make_arguments(tmp_path, optim="adam", adam_beta1=0.8, adam_beta2=0.98, adam_epsilon=1e-9)
    cls, kwargs = optimizer_class_and_options(args)
    assert cls is torch.optim.Adam
    assert kwargs == {"lr": 1e-3, "betas": (0.8, 0.98), "eps": 1e-9, "fused": True, "amsgrad": False}
    args = make_arguments(tmp_path, optim="adam", adam_beta1=0.8, optim_args="beta1=0.7,amsgrad=true")
    kwargs = optimizer_class_and_options(args)[1]
    assert kwargs["betas"] == (0.7, 0.999)
    assert kwargs["amsgrad"] is True


def test_options_of_each_optimizer_are_its_parameters(tmp_path):
    for name, options in OPTIONS.items():
        text = ",".join(f"{key}={value}" for key, value in options.items())
        cls, kwargs = optimizer_class_and_options(make_arguments(tmp_path, optim=name, optim_args=text))
        cls([nn.Parameter(torch.zeros(1))], **kwargs)


def test_default_learning_rates(tmp_path):
    defaults = {"adam": 1e-3, "adadelta": 1.0, "adagrad_da": 0.1, "rmsprop_da": 0.03, "sgd": 1e-3}
    for name, rate in defaults.items():
        assert make_arguments(tmp_path, optim=name).learning_rate == rate
        assert make_arguments(tmp_path, optim=name, learning_rate=0.5).learning_rate == 0.5


def test_transformers_optimizers_still_work(tmp_path):
    for name, cls in {
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "adamw_torch": torch.optim.AdamW,
    }.items():
        assert type(make_trainer(tmp_path, optim=name).create_optimizer()) is cls
    assert type(make_trainer(tmp_path).create_optimizer()) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optim": "adamm"}, "optim='adamm': must be one of adam, adadelta, adagrad_da, rmsprop_da, adamw_torch"),
        (
            {"optim": "adam", "optim_args": "rho=0.9"},
            "optim_args: 'rho=0.9' is no option of optim='adam'; there are beta1",
        ),
        ({"optim": "adadelta", "optim_args": "rho=high"}, "optim_args: 'rho=high': must be a number"),
        ({"optim": "adam", "optim_args": "amsgrad=1"}, "optim_args: 'amsgrad=1': must be true or false"),
    ],
)
def test_refusals(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_arguments(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (AdagradDA, {"lr": -1.0}, "lr=-1.0: must be at least 0"),
        (AdagradDA, {"l1": -1.0}, "l1=-1.0: must be at least 0"),
        (AdagradDA, {"weight_decay": math.inf}, "weight_decay=inf: must be"),
        (AdagradDA, {"initial_accumulator": 0.0}, "initial_accumulator=0.0: must be above 0"),
        (RMSpropDA, {"center": "mean"}, "center='mean': must be one of initial, zero"),
        (RMSpropDA, {"alpha": 1.0}, "alpha=1.0: must be at least 0 and below 1"),
        (RMSpropDA, {"eps": 0.0}, "eps=0.0: must be above 0"),
    ],
)
def test_refusals_of_dual_averaging(cls, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cls([nn.Parameter(torch.zeros(1))], **options)


def test_which_parameters_decay(tmp_path):
    """In every kind of model: matrices and filters do; vectors (biases, norms) and scalars (scales) don't."""
    trainer = make_trainer(tmp_path)
    without = make_trainer(tmp_path, weight_decay_of_embeddings=False)
    for setting in CONFIGURATIONS:
        model = RnnSeq2SeqForConditionalGeneration(tiny_config(**setting))
        parameters = dict(model.named_parameters())
        expected = {name for name, parameter in parameters.items() if parameter.dim() >= 2}
        decayed = set(trainer.get_decay_parameter_names(model))
        assert decayed & set(parameters) == expected, setting
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        rest = set(without.get_decay_parameter_names(model)) & set(parameters)
        assert rest == {name for name in expected if id(parameters[name]) not in embeddings}, setting


def test_penalties_of_the_parameter_groups(tmp_path):
    trainer = make_trainer(tmp_path, optim="adagrad_da", optim_args="l1=1e-4", weight_decay=0.01)
    decayed, rest = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], decayed["l1"]) == (0.01, 1e-4)
    assert (rest["weight_decay"], rest["l1"]) == (0.0, 0.0)
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() < 2 for parameter in rest["params"])
    assert len(decayed["params"]) + len(rest["params"]) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_whole_gradient_is_clipped_by_norm(tmp_path, accumulation):
    """One step of plain gradient descent at rate 1 is as long as the limit, however many batches it sums over."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}
    settings |= {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 12 // accumulation}
    moves = []
    for limit in (0.01, 1e6):
        trainer = make_trainer(tmp_path, max_grad_norm=limit, **settings)
        for module in trainer.model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
        trainer.model.config.dropout = 0.0
        before = nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
        trainer.train()
        moves.append(nn.utils.parameters_to_vector(trainer.model.parameters()).detach() - before)
        norm = trainer.state.log_history[0]["grad_norm"]
    clipped, whole = moves
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-4)
    assert whole.norm().item() == pytest.approx(norm, rel=1e-4)
    assert norm > 0.02
    assert torch.nn.functional.cosine_similarity(clipped, whole, dim=0) > 0.9


@pytest.mark.parametrize(
    ("optim", "schedule"),
    [
        ("adam", {"lr_scheduler_type": "halving", "lr_decay_start": 1, "lr_decay_interval": 0.5}),
        ("adadelta", {"lr_scheduler_type": "luong5"}),
        ("adagrad_da", {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 3}),
        (
            "rmsprop_da",
            {
                "lr_scheduler_type": "rnmt_plus",
                "lr_replicas": 4,
                "warmup_steps": 1,
                "lr_decay_start": 2,
                "lr_decay_end": 3,
            },
        ),
        (
            "adam",
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2, "lr_patience": 1},
        ),
    ],
)
def test_resuming_equals_not_stopping(tmp_path, optim, schedule):
    """Bit for bit, weights, optimiser and learning rates, in the middle of an epoch."""
    common = {"optim": optim, **schedule, "num_train_epochs": 4, "save_strategy": "steps", "save_steps": 5}
    common |= {"weight_decay": 0.01}
    if schedule["lr_scheduler_type"] == "reduce_lr_on_plateau":
        common |= {"learning_rate": 3.0}  # the loss rises
    whole = make_trainer(tmp_path, **common)
    whole.train()
    resumed = make_trainer(tmp_path, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    rates = learning_rates(whole)
    assert len(rates) == 12
    assert len(set(rates)) > 1
    assert len(set(rates[5:])) > 1
    assert rates == learning_rates(resumed)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    saved = torch.load(tmp_path / "checkpoint-5" / "optimizer.pt", weights_only=True)
    assert saved["state"]
    first, second = whole.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for index, state in first["state"].items():
        for name, value in state.items():
            other = second["state"][index][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_flags_and_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output_dir: x\noptim: adadelta\noptim_args: rho=0.95,eps=1e-6\nmax_grad_norm: 1.0\n")
    training = parse_arguments([str(recipe)]).training
    assert (training.optim, training.optim_args, training.learning_rate) == ("adadelta", "rho=0.95,eps=1e-6", 1.0)
    flags = ["--optim", "rmsprop_da", "--optim_args", "alpha=0.9", "--no_weight_decay_of_embeddings"]
    training = parse_arguments([str(recipe), *flags]).training
    assert (training.optim, training.optim_args) == ("rmsprop_da", "alpha=0.9")
    assert training.weight_decay_of_embeddings is False
    assert training.to_dict()["optim"] == "rmsprop_da"
    with pytest.raises(ArgumentError, match=r"--optim: invalid choice: 'adamm' .choose from .*adadelta"):
        parse_arguments([str(recipe), "--optim", "adamm"])
    with pytest.raises(ArgumentError, match=r"optim_args: 'alpha=0.9' is no option of optim='adam'"):
        parse_arguments([str(recipe), "--optim", "adam", "--optim_args", "alpha=0.9"])
