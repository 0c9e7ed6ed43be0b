import copy
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from decoding import pack_at_once
from forked import on_processes
from transformers import DataCollatorForSeq2Seq

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration, step_products
from hf_rnn_seq2seq.checkpoints import checkpoint_fault, last_complete_checkpoint
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer, RnnSeq2SeqTrainingArguments

SOURCES = ["abc", "ca", "b", "bcab", "aa", "cc", "abcabc"]


@pytest.fixture
def make_trainer(tmp_path):
    """A trainer of a tiny model on `abc` → `A B C`."""

    def make(**arguments) -> RnnSeq2SeqTrainer:
        targets = [" ".join(source.upper()) for source in SOURCES]
        kinds = TokenizerArguments(source_tokenizer_kind="char", target_tokenizer_kind="symbols")
        tokenizer = build_tokenizer(SOURCES, targets, kinds)
        rows = datasets.Dataset.from_dict(
            {
                "input_ids": tokenizer(SOURCES)["input_ids"],
                "labels": tokenizer(text_target=targets)["input_ids"],
                "length": [2 * len(source) for source in SOURCES],
            }
        )
        torch.manual_seed(0)
        config = RnnSeq2SeqConfig(
            vocab_size=tokenizer.target_vocab_size,
            source_vocab_size=tokenizer.source_vocab_size,
            embedding_size=8,
            hidden_size=8,
        )
        model = RnnSeq2SeqForConditionalGeneration(config)
        args = RnnSeq2SeqTrainingArguments(
            **{
                "output_dir": str(tmp_path / "out"),
                "per_device_train_batch_size": 2,
                "per_device_eval_batch_size": 3,
                "use_cpu": True,
                "disable_tqdm": True,
                "generation_max_length": 8,
                **arguments,
            }
        )
        return RnnSeq2SeqTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        )

    return make


def test_evaluation_leaves_the_generation_config_alone(make_trainer):
    trainer = make_trainer()
    before = copy.deepcopy(trainer.model.generation_config.to_dict())
    generation_config = trainer.model.generation_config
    trainer.evaluate()
    trainer.predict(trainer.eval_dataset)
    assert trainer.model.generation_config is generation_config
    assert generation_config.to_dict() == before


def test_an_evaluation_packs_its_matrices_once(make_trainer, monkeypatch):
    packings = []
    monkeypatch.setattr(step_products, "can_be_packed", lambda weight: True)
    pack_at_once(monkeypatch)
    monkeypatch.setattr(step_products, "pack", lambda weight: packings.append(weight) or weight)
    monkeypatch.setattr(step_products, "packed_product", torch.nn.functional.linear)
    counts = []
    for batch_size in (7, 2):
        trainer = make_trainer(predict_with_generate=True, per_device_eval_batch_size=batch_size)
        predictions = trainer.predict(trainer.eval_dataset).predictions
        counts.append((len(packings), predictions.tolist()))
        packings.clear()
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


@pytest.mark.parametrize("predict_with_generate", [True, False])
def test_evaluation_loss_is_a_mean_over_tokens(make_trainer, predict_with_generate):
    trainer = make_trainer(predict_with_generate=predict_with_generate)
    metrics = trainer.evaluate()
    losses = []
    for row in trainer.eval_dataset:  # one row at a time: no padding, no batches
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).logits
        losses += torch.nn.functional.cross_entropy(logits[0].double(), labels[0], reduction="none").tolist()
    assert metrics["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))


def test_evaluation_is_by_the_plain_loss(make_trainer):
    plain, smoothed = make_trainer(), make_trainer(label_smoothing_factor=0.1, coverage_loss_weight=1.0)
    for name in ("eval_loss", "eval_perplexity"):
        assert smoothed.evaluate()[name] == plain.evaluate()[name]


def test_a_loss_that_is_no_likelihood_gives_no_perplexity(make_trainer):
    trainer = make_trainer(max_steps=1)
    config = {**trainer.model.config.to_dict(), "output_normalizer": "sparsemax"}
    trainer.model = RnnSeq2SeqForConditionalGeneration(RnnSeq2SeqConfig(**config))
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics
    assert "eval_perplexity" not in metrics


def test_predictions_keep_the_order_and_number_of_rows(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():  # an untrained model would predict the same for every source
        for parameter in trainer.model.parameters():
            parameter.mul_(6)
    together = trainer.processing_class.batch_decode(
        np.maximum(trainer.predict(trainer.eval_dataset).predictions, 0), skip_special_tokens=True
    )
    assert len(together) == len(SOURCES)
    assert len(set(together)) > len(SOURCES) / 2
    for source, prediction in zip(SOURCES, together, strict=True):
        alone = trainer.model.generate(**trainer.processing_class([source], return_tensors="pt"), max_length=8)
        assert trainer.processing_class.decode(alone[0], skip_special_tokens=True) == prediction


def test_a_saved_model_has_no_pickle(make_trainer, tmp_path):
    make_trainer().save_model(str(tmp_path / "saved"))
    files = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "training_args.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert json.loads((tmp_path / "saved" / "training_args.json").read_text())["per_device_train_batch_size"] == 2


def test_default_arguments(tmp_path):
    args = RnnSeq2SeqTrainingArguments(output_dir=str(tmp_path), seed=7)
    assert args.data_seed == 7
    assert args.predict_with_generate
    assert args.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("loss", False), ("symbol_error_rate", False), ("eval_wer", False), ("perplexity", False), ("bleu", True)],
)
def test_which_way_a_metric_is_better(tmp_path, metric, greater):
    args = RnnSeq2SeqTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric)
    assert args.greater_is_better is greater


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_resuming_equals_not_stopping(make_trainer, tmp_path, strategy):
    """Bit for bit, in the middle of the second epoch, with dropout."""
    common = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": strategy}
    whole = make_trainer(**common)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-6"  # 4 steps an epoch
    resumed = make_trainer(**common)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 12
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_broken_checkpoints_are_passed_over(make_trainer, tmp_path):
    out = tmp_path / "out"
    assert last_complete_checkpoint(out) is None
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=1)
    trainer.train()
    assert last_complete_checkpoint(out) == out / "checkpoint-4"
    (out / "checkpoint-4" / "trainer_state.json").write_text("{")
    assert "trainer_state.json" in checkpoint_fault(out / "checkpoint-4")
    (out / "checkpoint-3" / "optimizer.pt").unlink()
    assert "optimizer.pt" in checkpoint_fault(out / "checkpoint-3")
    weights = out / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in checkpoint_fault(out / "checkpoint-2")
    assert last_complete_checkpoint(out) == out / "checkpoint-1"


def test_model_card(make_trainer, tmp_path):
    from huggingface_hub import ModelCard

    trainer = make_trainer(max_steps=2)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.create_model_card(dataset="letters", tasks="translation", language=["en"], model_name="shouting")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert {"hf_rnn_seq2seq", "rnn_seq2seq"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "translation"
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures["loss"] == pytest.approx(loss, abs=1e-4)
    assert card.data.eval_results[0].dataset_name == "letters"
    assert "fine-tuned" not in card.text
    assert "trained from random weights on letters" in card.text
    assert "| hidden_size | 8 |" in card.text
    assert "runtime" not in card.text


def predict_on_two(folder: Path) -> None:
    texts = ["a" * (i % 5 + 1) for i in range(7)]
    tokenizer = build_tokenizer(texts, texts, TokenizerArguments(source_tokenizer_kind="char"))
    ids = tokenizer(texts)["input_ids"]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    torch.manual_seed(0)
    config = RnnSeq2SeqConfig(vocab_size=9, source_vocab_size=9, embedding_size=4, hidden_size=4)
    args = RnnSeq2SeqTrainingArguments(
        output_dir=str(folder), per_device_eval_batch_size=2, use_cpu=True, disable_tqdm=True, generation_max_length=6
    )
    assert args.world_size == 2, args.world_size
    trainer = RnnSeq2SeqTrainer(
        model=RnnSeq2SeqForConditionalGeneration(config),
        args=args,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    output = trainer.predict(rows)
    assert output.predictions.shape[0] == output.label_ids.shape[0] == 7, output.predictions.shape
    assert [(row > 0).sum() for row in output.label_ids] == [len(row) for row in ids]


def test_two_processes_predict_each_row_once(tmp_path):
    """The rows that fill up the last batch are not among the predictions."""
    on_processes(2, predict_on_two, tmp_path)


def test_a_resumed_run_has_the_time_of_all_its_parts(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=4, save_steps=2)
    for _ in range(2):  # neither what was before the training nor an earlier one is a part of it
        whole = trainer.train().metrics
        assert whole["train_total_runtime"] == whole["train_runtime"]
    path = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    seconds = state["stateful_callbacks"]["TrainingTime"]["attributes"]
    assert 0 < seconds["seconds"] < whole["train_runtime"]
    seconds["seconds"] = 5000
    path.write_text(json.dumps(state))
    rest = make_trainer(max_steps=4).train(resume_from_checkpoint=str(path.parent)).metrics
    assert rest["train_total_runtime"] == pytest.approx(5000 + rest["train_runtime"])
