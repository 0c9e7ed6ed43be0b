"""Averages of checkpoints, against sums in float64."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from averaged_trainer import make_trainer, steps_of
from safetensors.torch import load_file, save_file
from scripts import load_script
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_rnn_seq2seq.weight_averaging import (
    AveragingError,
    average_checkpoints,
    average_models,
    averaged_weights,
    best_checkpoints,
    last_checkpoints,
)

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "average_checkpoints.py"


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> Path:
    """Five checkpoints of one training, each evaluated."""
    folder = tmp_path_factory.mktemp("training") / "out"
    steps = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 5}
    make_trainer(folder, **steps, predict_with_generate=False).train()
    return folder


@pytest.fixture
def copied(training, tmp_path) -> Path:
    return shutil.copytree(training, tmp_path / "out")


def logged(folder: Path, name: str) -> dict[int, float]:
    history = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


def rewrite(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


class TestCheckpoints:
    def test_mean_of_the_last(self, training, tmp_path):
        average_checkpoints(last_checkpoints(training, 3), tmp_path / "averaged")
        files = [load_file(training / f"checkpoint-{step}" / "model.safetensors") for step in (3, 4, 5)]
        averaged = load_file(tmp_path / "averaged" / "model.safetensors")
        assert averaged.keys() == files[0].keys()
        for name, weight in averaged.items():
            mean = sum(file[name].double() for file in files) / 3
            assert weight.dtype == torch.float32
            assert torch.equal(weight, mean.float()), name
        assert any(not torch.equal(averaged[name], files[-1][name]) for name in averaged)

    def test_the_folder_is_a_whole_model(self, training, tmp_path):
        folder = tmp_path / "averaged"
        average_checkpoints(last_checkpoints(training, 2), folder)
        written = {path.name for path in folder.iterdir()}
        model_files = {path.name for path in (training / "checkpoint-5").iterdir()}
        only_for_training = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
        assert written == model_files - only_for_training - {"training_args.json"} | {"averaged_from.json"}
        assert "modeling_rnn_seq2seq.py" in written
        assert [path.name for path in tmp_path.iterdir()] == ["averaged"]  # nothing is left of making it

        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        source, target = (side.get_input_embeddings() for side in (model.get_encoder(), model.get_decoder()))
        assert source.weight is target.weight is model.get_output_embeddings().weight
        expected = averaged_weights([training / f"checkpoint-{step}" for step in (4, 5)])
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
        old = AutoTokenizer.from_pretrained(training / "checkpoint-5")
        assert tokenizer(["abc"], text_target=["A B"]) == old(["abc"], text_target=["A B"])
        old_model = AutoModelForSeq2SeqLM.from_pretrained(training / "checkpoint-5")
        assert model.generation_config.to_dict() == old_model.generation_config.to_dict()

        record = json.loads((folder / "averaged_from.json").read_text())
        assert [entry["checkpoint"] for entry in record] == ["checkpoint-4", "checkpoint-5"]
        assert record[1]["metrics"]["eval_loss"] == logged(training, "eval_loss")[5]

    def test_best_by_the_metric_at_the_checkpoint(self, copied):
        losses = logged(copied, "eval_loss")
        order = sorted(losses, key=losses.get)
        assert len(set(losses.values())) == 5
        assert steps_of(best_checkpoints(copied, 3)) == order[:3]
        assert steps_of(best_checkpoints(copied, 3, "loss")) == order[:3]
        assert steps_of(best_checkpoints(copied, 2, greater_is_better=True)) == order[:2:-1]
        # Figures of which more is better, one of them equal to another, one of them none, one missing.
        for step, bleu in zip((1, 2, 3, 4), (5.0, 7.0, 7.0, float("nan")), strict=True):
            history = [{"step": step - 1, "eval_bleu": 99.0}, {"step": step, "eval_bleu": bleu}]
            rewrite(copied / f"checkpoint-{step}" / "trainer_state.json", log_history=history)
        rewrite(copied / "checkpoint-5" / "trainer_state.json", log_history=[{"step": 4, "eval_bleu": 99.0}])
        assert steps_of(best_checkpoints(copied, 3, "bleu")) == [3, 2, 1]
        with pytest.raises(AveragingError, match=r"there are 3 whole checkpoints in .* with eval_bleu at their step"):
            best_checkpoints(copied, 4, "bleu")

    def test_broken_checkpoints_are_passed_over(self, copied, caplog):
        weights = copied / "checkpoint-5" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        (copied / "checkpoint-3" / "trainer_state.json").unlink()
        (copied / "checkpoint-2" / "optimizer.pt").unlink()  # not needed
        assert steps_of(last_checkpoints(copied, 3)) == [1, 2, 4]
        assert [record.args[0].name for record in caplog.records] == ["checkpoint-3", "checkpoint-5"]
        with pytest.raises(AveragingError, match="4 checkpoints can't be averaged: there are 3 whole"):
            last_checkpoints(copied, 4)

    def test_steps_are_numbers(self, copied):
        """10 comes after 9."""
        (copied / "checkpoint-5").rename(copied / "checkpoint-10")
        rewrite(copied / "checkpoint-10" / "trainer_state.json", global_step=10)
        assert steps_of(last_checkpoints(copied, 2)) == [4, 10]

    @pytest.mark.parametrize("n", [0, -1])
    def test_not_a_number_of_checkpoints(self, training, n):
        with pytest.raises(AveragingError, match=f"at least 1, not {n}"):
            last_checkpoints(training, n)

    def test_no_folder(self, tmp_path):
        with pytest.raises(AveragingError, match="there are 0 whole checkpoints"):
            last_checkpoints(tmp_path / "nowhere", 1)

    def test_other_configuration(self, copied, tmp_path):
        rewrite(copied / "checkpoint-4" / "config.json", hidden_size=9)
        with pytest.raises(AveragingError, match=r"`hidden_size` is 8 in .*checkpoint-3 and 9 in .*checkpoint-4"):
            average_checkpoints(last_checkpoints(copied, 3), tmp_path / "averaged")
        assert not (tmp_path / "averaged").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda weight: {"model.a": weight.clone()},
                "The weight model.a is in .*checkpoint-5, but not in .*checkpoint-4",
            ),
            (lambda weight: {"bias": weight[:-1]}, r"The weight bias is \(\d+,\) torch.float32 in .*checkpoint-4, \("),
            (lambda weight: {"bias": weight.half()}, "torch.float32 in .*checkpoint-4, .* torch.float16 in"),
        ],
    )
    def test_other_weights(self, copied, tmp_path, change, message):
        path = copied / "checkpoint-5" / "model.safetensors"
        weights = load_file(path)
        name = next(name for name in sorted(weights) if weights[name].dim() == 1)
        changed = {key.replace("bias", name): value for key, value in change(weights[name]).items()}
        save_file(weights | changed, path, metadata={"format": "pt"})
        with pytest.raises(AveragingError, match=message.replace("bias", name)):
            average_checkpoints(last_checkpoints(copied, 2), tmp_path / "averaged")

    def test_double_precision_and_other_types(self, tmp_path):
        """In float32, 2**24 + 1 is 2**24."""
        paths = []
        for number in range(4):
            path = tmp_path / f"checkpoint-{number}"
            path.mkdir()
            values = {"half": torch.tensor([number * 0.1], dtype=torch.bfloat16), "count": torch.tensor([3])}
            values["large"] = torch.tensor([2.0**24 if number == 0 else 1.0])
            save_file(values, path / "model.safetensors")
            paths.append(path)
        averaged = averaged_weights(paths)
        assert averaged["large"].item() == 2**22 + 1  # of 2**22 + 0.75; sums in float32 give 2**22
        expected = sum(torch.tensor(n * 0.1, dtype=torch.bfloat16).double() for n in range(4)) / 4
        assert averaged["half"].dtype == torch.bfloat16
        assert averaged["half"].item() == expected.bfloat16().item()
        assert averaged["count"].tolist() == [3]
        save_file(
            load_file(paths[3] / "model.safetensors") | {"count": torch.tensor([4])}, paths[3] / "model.safetensors"
        )
        with pytest.raises(AveragingError, match="count can't be averaged"):
            averaged_weights(paths)

    def test_a_model_in_several_files(self, training, tmp_path):
        model = AutoModelForSeq2SeqLM.from_pretrained(training / "checkpoint-5")
        model.save_pretrained(tmp_path / "checkpoint-5", max_shard_size="2KB")
        assert len(list((tmp_path / "checkpoint-5").glob("*.safetensors"))) > 1
        whole = load_file(training / "checkpoint-5" / "model.safetensors")
        parts = averaged_weights([tmp_path / "checkpoint-5"])
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_nothing_is_overwritten_or_half_written(self, training, tmp_path, monkeypatch):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").touch()
        checkpoints = last_checkpoints(training, 2)
        with pytest.raises(AveragingError, match=r"mine is there and not an empty folder"):
            average_checkpoints(checkpoints, tmp_path / "mine")
        (tmp_path / "empty.partial").mkdir()  # of an interrupted run
        (tmp_path / "empty").mkdir()
        average_checkpoints(checkpoints, tmp_path / "empty")
        assert (tmp_path / "empty" / "model.safetensors").is_file()

        def full(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            average_checkpoints(checkpoints, tmp_path / "full")
        assert {path.name for path in tmp_path.iterdir()} == {"mine", "empty"}

    def test_mean_of_models(self, training, tmp_path):
        """One that is named twice counts twice."""
        paths = [training / f"checkpoint-{step}" for step in (1, 5)]
        average_models([paths[0], str(paths[1]), paths[1]], tmp_path / "averaged")
        files = [load_file(path / "model.safetensors") for path in paths]
        averaged = load_file(tmp_path / "averaged" / "model.safetensors")
        for name, weight in averaged.items():
            assert torch.equal(weight, ((files[0][name].double() + 2 * files[1][name].double()) / 3).float()), name
        assert any(not torch.equal(files[0][name], files[1][name]) for name in averaged)
        record = json.loads((tmp_path / "averaged" / "averaged_from.json").read_text())
        assert record == [{"model": "checkpoint-1"}, {"model": "checkpoint-5"}, {"model": "checkpoint-5"}]
        AutoTokenizer.from_pretrained(tmp_path / "averaged")

    def test_trainings_with_other_dropout(self, copied, tmp_path):
        """Their models compute the same, unlike those of another `zoneout`."""
        first, second = copied / "checkpoint-1", copied / "checkpoint-2"
        rewrite(second / "config.json", dropout=0.45, coverage_loss_weight=0.5)
        average_models([first, second], tmp_path / "averaged")
        averaged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "averaged")
        assert averaged.config.dropout == AutoConfig.from_pretrained(first).dropout != 0.45
        rewrite(second / "config.json", zoneout=0.1)
        with pytest.raises(AveragingError, match=r"`zoneout` is 0.0 in .*checkpoint-1 and 0.1 in .*checkpoint-2"):
            average_models([first, second], tmp_path / "wrong")

    def test_models_that_dont_belong_together(self, copied, tmp_path):
        first, second = copied / "checkpoint-1", copied / "checkpoint-2"
        with pytest.raises(AveragingError, match=r"out: there is no config.json"):
            average_models([first, copied], tmp_path / "averaged")
        vocabulary = second / "tokenizer.json"  # equal numbers, other words
        vocabulary.write_text(vocabulary.read_text().replace('"A":', '"E":'))
        with pytest.raises(AveragingError, match=r"checkpoint-2: the tokenizer has another vocabulary than .*-1"):
            average_models([first, second], tmp_path / "averaged")
        assert not (tmp_path / "averaged").exists()

    def test_script(self, training, tmp_path, capsys):
        script = load_script("average_checkpoints")
        script.main([str(training), "--last", "2", "--output_dir", str(tmp_path / "last")])
        assert "the mean of checkpoint-4, checkpoint-5" in capsys.readouterr().out
        best = ["--best", "2", "--metric", "perplexity", "--greater_is_better", "--output_dir", str(tmp_path / "best")]
        script.main([str(training), *best])
        record = json.loads((tmp_path / "best" / "averaged_from.json").read_text())
        perplexities = logged(training, "eval_perplexity")
        assert [entry["step"] for entry in record] == sorted(perplexities, key=perplexities.get)[:2:-1]
        models = [str(tmp_path / name) for name in ("last", "best")]
        script.main([*models, "--output_dir", str(tmp_path / "both")])
        assert f"the mean of {models[0]}, {models[1]}" in capsys.readouterr().out
        for wrong, message in {
            ("--last", "1", "--best", "1"): "not allowed with argument",
            (): "one folder is averaged with --last or --best",
            ("--last", "1", "--metric", "loss"): "are for --best",
            (models[0], "--metric", "loss"): "are for --best",
            (models[0], "--last", "1"): "not of 2 folders",
        }.items():
            with pytest.raises(SystemExit):
                script.main([str(training), *wrong, "--output_dir", str(tmp_path / "wrong")])
            assert message in capsys.readouterr().err

    def test_script_says_what_is_wrong(self, training, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["x", str(training), "--last", "9", "--output_dir", str(tmp_path / "x")])
        with pytest.raises(SystemExit, match=r"^error: 9 checkpoints can't be averaged: there are 5 whole"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
