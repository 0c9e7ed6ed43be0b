"""Moving averages of the weights over the steps of training, against the recursion in float64."""

from pathlib import Path

import pytest
import torch
from averaged_trainer import STEPS_AN_EPOCH, make_trainer, steps_of
from forked import on_processes
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, TrainerCallback

from hf_rnn_seq2seq.moving_average import TRAINING_WEIGHTS_NAME, load_training_weights
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainingArguments
from hf_rnn_seq2seq.weight_averaging import (
    average_checkpoints,
    find_checkpoints,
    last_checkpoints,
)


class Recorder(TrainerCallback):
    """Keeps the weights before training and after each optimiser step, and each evaluation's figures."""

    def __init__(self):
        self.weights, self.metrics = [], []

    def keep(self, model):
        self.weights.append({name: weight.detach().clone() for name, weight in model.named_parameters()})

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.keep(model)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.keep(model)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.metrics.append(metrics)


def moving_averages(weights, decay, warmup):
    """The recursion, plainly, in float64; a list, one for each step from 0."""
    averages = [{name: weight.double() for name, weight in weights[0].items()}]
    for t, current in enumerate(weights[1:], start=1):
        d = min(decay, (1 + t) / (10 + t)) if warmup else decay
        averages.append({name: d * averages[-1][name] + (1 - d) * weight.double() for name, weight in current.items()})
    return averages


def assert_close(model_or_weights, expected):
    if isinstance(model_or_weights, torch.nn.Module):
        model_or_weights = dict(model_or_weights.named_parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(model_or_weights[name].double(), weight, rtol=1e-5, atol=1e-6, msg=name)


def weights_of_one_in_two(folder: Path) -> dict[str, list]:
    recorder = Recorder()
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"per_device_train_batch_size": 1, "max_steps": 4, "num_train_epochs": 3}
    trainer = make_trainer(folder, [recorder], ema_decay=0.7, **options)
    assert trainer.args.world_size == 2, trainer.args.world_size
    trainer.train()
    assert_close(trainer.model, moving_averages(recorder.weights, 0.7, True)[4])
    return {name: weight.tolist() for name, weight in trainer.model.state_dict().items()}


def equal(one, other) -> bool:
    return all(torch.equal(weight, other.get_parameter(name)) for name, weight in one.named_parameters())


class TestMovingAverage:
    @pytest.mark.parametrize("warmup", [True, False])
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_a_training(self, tmp_path, warmup, tied, accumulation):
        recorder = Recorder()
        trainer = make_trainer(
            tmp_path / "out", [recorder], tied, ema_decay=0.7, ema_warmup=warmup, max_steps=6,
            gradient_accumulation_steps=accumulation, save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.train()
        assert len(recorder.weights) == 7
        averages = moving_averages(recorder.weights, 0.7, warmup)
        assert not torch.allclose(*(next(iter(each.values())) for each in averages[2:4]), rtol=1e-3)
        assert_close(trainer.model, averages[6])
        trainer.save_model()
        assert_close(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out"), averages[6])
        assert not (tmp_path / "out" / TRAINING_WEIGHTS_NAME).exists()
        # A checkpoint is the averaged model, and holds the training's weights beside it.
        checkpoint = tmp_path / "out" / "checkpoint-3"
        loaded = AutoModelForSeq2SeqLM.from_pretrained(checkpoint)
        assert_close(loaded, averages[3])
        load_training_weights(loaded, checkpoint)
        assert all(torch.equal(loaded.get_parameter(name), weight) for name, weight in recorder.weights[3].items())

    def test_without_warmup_the_first_weights_stay_long(self, tmp_path):
        moved = {}
        for warmup in (True, False):
            recorder = Recorder()
            trainer = make_trainer(tmp_path, [recorder], ema_decay=0.999, ema_warmup=warmup, max_steps=3)
            trainer.train()
            name = "model.encoder.embed_tokens.weight"
            first, last = recorder.weights[0][name], recorder.weights[-1][name]
            moved[warmup] = ((trainer.model.get_parameter(name) - first).norm() / (last - first).norm()).item()
        assert moved[True] > 0.5
        assert moved[False] < 0.01

    def test_it_changes_neither_training_nor_its_randomness(self, tmp_path):
        without, with_average = Recorder(), Recorder()
        steps = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2}
        plain = make_trainer(tmp_path, [without], **steps)
        plain.train()
        averaging = make_trainer(tmp_path, [with_average], **steps, ema_decay=0.9)
        averaging.train()
        for one, other in zip(without.weights, with_average.weights, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(torch.equal(without.weights[-1][n], weight) for n, weight in plain.model.named_parameters())
        assert not equal(plain.model, averaging.model)

    def test_evaluation_and_prediction_use_the_average(self, tmp_path):
        recorder = Recorder()
        steps = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 4}
        trainer = make_trainer(tmp_path, [recorder], ema_decay=0.8, **steps)
        trainer.train()
        plain = make_trainer(tmp_path)
        averages = moving_averages(recorder.weights, 0.8, True)
        for average, weights, metrics in zip(averages, recorder.weights, recorder.metrics, strict=True):
            losses = []
            for values in (average, weights):
                plain.model.load_state_dict({name: value.float() for name, value in values.items()}, strict=False)
                losses.append(plain.evaluate()["eval_loss"])
            assert metrics["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
            if weights is not recorder.weights[0]:
                assert abs(losses[1] - losses[0]) > 1e-3
        predicted = trainer.predict(trainer.eval_dataset).metrics["test_loss"]
        assert predicted == pytest.approx(recorder.metrics[-1]["eval_loss"], rel=1e-6)

    def test_the_best_averaged_model_is_loaded(self, tmp_path):
        recorder = Recorder()
        steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4}
        trainer = make_trainer(
            tmp_path, [recorder], ema_decay=0.5, load_best_model_at_end=True, greater_is_better=True,
            metric_for_best_model="loss", save_total_limit=2, learning_rate=0.01, **steps,
        )  # fmt: skip
        trainer.train()  # the worst loss is the first evaluation's
        losses = [metrics["eval_loss"] for metrics in recorder.metrics]
        assert max(losses) == losses[0]
        assert trainer.state.best_global_step == 1
        assert_close(trainer.model, moving_averages(recorder.weights, 0.5, True)[1])
        assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-6)

    @pytest.mark.parametrize("save_at", [2, STEPS_AN_EPOCH])
    def test_resuming_equals_not_stopping(self, tmp_path, save_at):
        common = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": save_at, "ema_decay": 0.8}
        whole = make_trainer(tmp_path / "out", **common)
        whole.train()
        resumed = make_trainer(tmp_path / "again", **common)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{save_at}"))
        assert resumed.state.global_step == 2 * STEPS_AN_EPOCH
        assert equal(whole.model, resumed.model)
        last = f"checkpoint-{2 * STEPS_AN_EPOCH}"
        for name in ("model.safetensors", TRAINING_WEIGHTS_NAME):
            one, other = (load_file(folder / last / name) for folder in (tmp_path / "out", tmp_path / "again"))
            assert all(torch.equal(one[key], other[key]) for key in one)

    def test_resuming_without_and_beginning_with_it(self, tmp_path):
        """The weights that training goes on with are the same, whether their average is kept before or after."""
        common = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": STEPS_AN_EPOCH}
        plain, averaging = (tmp_path / name / f"checkpoint-{STEPS_AN_EPOCH}" for name in ("plain", "averaging"))
        whole = make_trainer(tmp_path / "plain", **common)
        whole.train()
        make_trainer(tmp_path / "averaging", **common, ema_decay=0.9).train()
        resumed = make_trainer(tmp_path / "resumed", **common)
        resumed.train(resume_from_checkpoint=str(averaging))
        assert equal(whole.model, resumed.model)
        recorder = Recorder()
        late = make_trainer(tmp_path / "late", [recorder], **common, ema_decay=0.9)
        late.train(resume_from_checkpoint=str(plain))
        first = AutoModelForSeq2SeqLM.from_pretrained(plain)
        assert all(torch.equal(recorder.weights[0][name], weight) for name, weight in first.named_parameters())
        expected = {name: weight.double() for name, weight in recorder.weights[0].items()}
        for t, weights in enumerate(recorder.weights[1:], start=STEPS_AN_EPOCH + 1):
            d = min(0.9, (1 + t) / (10 + t))
            expected = {name: d * expected[name] + (1 - d) * weight.double() for name, weight in weights.items()}
        assert_close(late.model, expected)

    def test_a_second_training_begins_anew(self, tmp_path):
        recorder = Recorder()
        trainer = make_trainer(tmp_path, [recorder], ema_decay=0.5, max_steps=2)
        trainer.train()
        after_first = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
        assert all(torch.equal(recorder.weights[3][name], weight) for name, weight in after_first.items())
        assert_close(trainer.model, moving_averages(recorder.weights[3:], 0.5, True)[-1])

    def test_an_error_in_evaluation_leaves_the_weights_as_they_were(self, tmp_path):
        recorder = Recorder()
        trainer = make_trainer(tmp_path, [recorder], ema_decay=0.5, eval_strategy="steps", eval_steps=2, max_steps=4)

        def broken(prediction):
            raise RuntimeError("no metric")

        trainer.compute_metrics = broken
        with pytest.raises(RuntimeError, match="no metric"):
            trainer.train()
        assert all(torch.equal(recorder.weights[2][n], weight) for n, weight in trainer.model.named_parameters())

    def test_a_model_alone_has_no_training_weights(self, tmp_path):
        make_trainer(
            tmp_path, ema_decay=0.5, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True
        ).train()
        assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()
        assert not (tmp_path / "checkpoint-1" / TRAINING_WEIGHTS_NAME).exists()

    def test_averages_of_checkpoints_are_of_the_moving_average(self, tmp_path):
        recorder = Recorder()
        steps = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
        make_trainer(tmp_path / "out", [recorder], ema_decay=0.5, **steps).train()
        average_checkpoints(last_checkpoints(tmp_path / "out", 2), tmp_path / "averaged")
        _, _, one, other = moving_averages(recorder.weights, 0.5, True)
        averaged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "averaged")
        assert_close(averaged, {name: (one[name] + other[name]) / 2 for name in one})
        assert steps_of(find_checkpoints(tmp_path / "out")) == [1, 2, 3]

    @pytest.mark.parametrize("decay", [1.0, -0.1, 2.0])
    def test_refused_decays(self, tmp_path, decay):
        with pytest.raises(ValueError, match=f"`ema_decay` must be from 0 to less than 1, not {decay}"):
            RnnSeq2SeqTrainingArguments(output_dir=str(tmp_path), ema_decay=decay)

    def test_half_precision_weights_are_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, ema_decay=0.9, max_steps=1)
        trainer.model.bfloat16()
        with pytest.raises(ValueError, match="`ema_decay` needs weights in float32"):
            trainer.train()

    def test_training_weights_of_another_model(self, tmp_path):
        trainer = make_trainer(tmp_path, ema_decay=0.9, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        other = make_trainer(tmp_path, tied=False).model
        with pytest.raises(ValueError, match=r"checkpoint-1: the weight .* is in the model, but not in training_w"):
            load_training_weights(other, tmp_path / "checkpoint-1")

    def test_two_processes_have_one_average(self, tmp_path):
        one, other = on_processes(2, weights_of_one_in_two, tmp_path)
        assert one == other
