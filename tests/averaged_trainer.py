"""A tiny trainer for the tests of averages."""

from pathlib import Path

import datasets
import torch
from transformers import DataCollatorForSeq2Seq

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer, RnnSeq2SeqTrainingArguments

SOURCES = ["abc", "ca", "b", "bcab", "aa", "cc", "abcabc"]
STEPS_AN_EPOCH = 4


def make_trainer(output_dir: Path, callbacks=None, tied: bool = True, **arguments) -> RnnSeq2SeqTrainer:
    """A trainer of a tiny model with dropout on `abc` → `A B C`; one vocabulary and tied weights, or neither."""
    targets = [" ".join(source.upper()) for source in SOURCES]
    kinds = TokenizerArguments(source_tokenizer_kind="char", target_tokenizer_kind="symbols")
    tokenizer = build_tokenizer(SOURCES, targets, kinds)
    rows = {"input_ids": tokenizer(SOURCES)["input_ids"], "labels": tokenizer(text_target=targets)["input_ids"]}
    torch.manual_seed(0)
    sizes = tokenizer.target_vocab_size, tokenizer.source_vocab_size
    config = RnnSeq2SeqConfig(
        vocab_size=max(sizes),
        source_vocab_size=None if tied else sizes[1],
        tie_word_embeddings=tied,
        embedding_size=8,
        hidden_size=8,
        dropout=0.1,
        embedding_dropout=0.1,
    )
    dataset = datasets.Dataset.from_dict(rows)
    model = RnnSeq2SeqForConditionalGeneration(config)
    defaults = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3, "generation_max_length": 8}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.05, "report_to": "none"}
    return RnnSeq2SeqTrainer(
        model=model,
        args=RnnSeq2SeqTrainingArguments(output_dir=str(output_dir), **defaults | arguments),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        callbacks=callbacks,
    )


def steps_of(checkpoints) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints]
