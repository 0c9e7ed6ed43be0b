"""A trainer of a tiny model, for the tests of optimisers and schedules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import EvalPrediction, default_data_collator

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer, RnnSeq2SeqTrainingArguments


def make_arguments(folder: Path, **arguments: Any) -> RnnSeq2SeqTrainingArguments:
    defaults = {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return RnnSeq2SeqTrainingArguments(**{**defaults, **arguments})


def make_trainer(
    folder: Path, compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None, **arguments: Any
) -> RnnSeq2SeqTrainer:
    """A trainer of a tiny model that reverses strings of four symbols: 12 rows, 3 batches an epoch."""
    torch.manual_seed(0)
    sources = torch.randint(3, 9, (12, 4))
    rows = Dataset.from_dict({"input_ids": sources.tolist(), "labels": sources.flip(1).tolist()})
    config = RnnSeq2SeqConfig(vocab_size=9, embedding_size=8, hidden_size=8, dropout=0.1)
    defaults = {"per_device_train_batch_size": 4, "predict_with_generate": False, "logging_steps": 1}
    defaults["train_sampling_strategy"] = "random"  # in the same order again after resuming
    return RnnSeq2SeqTrainer(
        model=RnnSeq2SeqForConditionalGeneration(config),
        args=make_arguments(folder, **{**defaults, **arguments}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
    )


def learning_rates(trainer: RnnSeq2SeqTrainer) -> list[float]:
    """The learning rate of each update made."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
