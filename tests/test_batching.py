import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from forked import on_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.batching import LengthBatchSampler, StreamedBatches, row_lengths
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer, RnnSeq2SeqTrainingArguments

LETTERS = "abcdefgh"


def make_lengths(rows: int, longest: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(1, longest, (rows, 2))


def make_texts(rows: int) -> tuple[list[str], list[str]]:
    """Sources of 3 to 9 letters, the first two of which no other has, and shorter targets."""
    rng = np.random.default_rng(1)
    sources = [
        LETTERS[i % 8] + LETTERS[i // 8] + "".join(rng.choice(list(LETTERS), rng.integers(1, 8))) for i in range(rows)
    ]
    return sources, [source[: rng.integers(1, len(source))].upper() for source in sources]


class WatchedTrainer(RnnSeq2SeqTrainer):
    """Keeps what its model is given; runs out of memory beyond so many positions of both sides, with padding."""

    positions_in_memory = 10**9

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen = [*getattr(self, "seen", []), (inputs["input_ids"].clone(), inputs["labels"].clone())]
        if inputs["input_ids"].numel() + inputs["labels"].numel() > self.positions_in_memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate more than there is.")
        return super().training_step(model, inputs, num_items_in_batch)


def token_trainer(folder, rows: int = 37, compute_metrics=None, dropout=0.1, **arguments) -> WatchedTrainer:
    sources, targets = make_texts(rows)
    tokenizer = build_tokenizer(sources, targets, TokenizerArguments(source_tokenizer_kind="char"))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    encoded = {
        "input_ids": tokenizer(sources)["input_ids"],
        "labels": tokenizer(text_target=targets)["input_ids"],
    }
    torch.manual_seed(0)
    model = RnnSeq2SeqForConditionalGeneration(
        RnnSeq2SeqConfig(
            vocab_size=len(tokenizer),
            source_vocab_size=tokenizer.source_vocab_size,
            embedding_size=4,
            hidden_size=6,
            embedding_dropout=dropout,
            output_dropout=dropout,
        )
    )
    defaults = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "generation_max_length": 5}
    defaults |= {"output_dir": str(folder), "per_device_train_batch_size": 8}
    dataset = datasets.Dataset.from_dict(encoded)
    return WatchedTrainer(
        model=model,
        args=RnnSeq2SeqTrainingArguments(**{**defaults, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics,
    )


def padded_tokens(lengths: np.ndarray, batch: list[int]) -> int:
    return len(batch) * int(lengths[batch].max(0).sum())


@settings(max_examples=60)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=4, max_size=70),
    batch_size=st.integers(1, 6),
    max_tokens=st.none() | st.integers(1, 80),
    accumulation_steps=st.integers(1, 3),
    world_size=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_on_one_process(lengths, batch_size, max_tokens, accumulation_steps, world_size, epoch):
    lengths = np.array(lengths)
    ranks = [
        LengthBatchSampler(lengths, batch_size, max_tokens, 3, accumulation_steps, world_size, rank)
        for rank in range(world_size)
    ]
    sizes = [len(sampler) for sampler in ranks]
    for sampler in ranks:
        sampler.set_epoch(epoch)
    batches = [list(sampler) for sampler in ranks]
    assert [len(each) for each in batches] == sizes == [sizes[0]] * world_size
    rows = sorted(row for each in batches for batch in each for row in batch)
    if all(len(batch) == 1 for each in batches for batch in each):
        assert set(rows) == set(range(len(lengths)))
        assert len(rows) - len(lengths) < world_size * (1 if max_tokens else accumulation_steps + 1)
    else:
        assert rows == list(range(len(lengths)))
    for batch in (batch for each in batches for batch in each):
        if max_tokens is None:
            assert 1 <= len(batch) <= batch_size
        else:
            assert len(batch) == 1 or padded_tokens(lengths, batch) <= max_tokens


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_global_batches_do_not_depend_on_the_number_of_processes(accumulation_steps):
    lengths = make_lengths(203)
    alone = LengthBatchSampler(lengths, 12 * accumulation_steps, seed=1)
    three = [
        list(LengthBatchSampler(lengths, 4, None, 1, accumulation_steps, world_size=3, rank=rank)) for rank in range(3)
    ]
    for step, rows in enumerate(alone):
        here = slice(step * accumulation_steps, (step + 1) * accumulation_steps)
        assert sorted(rows) == sorted(row for each in three for batch in each[here] for row in batch)


@pytest.mark.parametrize("max_tokens", [None, 600])
def test_batches_have_little_padding_and_a_random_order(max_tokens):
    lengths = make_lengths(4000)
    sampler = LengthBatchSampler(lengths, 16, max_tokens, seed=1)
    batches = list(sampler)
    padded = sum(padded_tokens(lengths, batch) for batch in batches)
    assert 1 - lengths.sum() / padded < 0.25  # at random it is 0.48
    longest = [int(lengths[batch, 0].max()) for batch in batches[:-1]]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
    assert batches == list(LengthBatchSampler(lengths, 16, max_tokens, seed=1))
    assert batches != list(LengthBatchSampler(lengths, 16, max_tokens, seed=2))
    sampler.set_epoch(1)
    assert batches != list(sampler)
    assert {tuple(sorted(batch)) for batch in batches} != {tuple(sorted(batch)) for batch in sampler}


def test_leaving_out_the_last_batch():
    batches = list(LengthBatchSampler(make_lengths(23), 5, drop_last=True))
    assert [len(batch) for batch in batches] == [5] * 4


def test_more_processes_than_rows():
    with pytest.raises(ValueError, match="2 training rows can't be dealt out to 3 processes"):
        LengthBatchSampler(make_lengths(2), 5, world_size=3)


def test_lengths_of_rows():
    rows = {"input_ids": [[1, 2], [3]], "labels": [[1], [2, 3, 4]]}
    assert row_lengths(datasets.Dataset.from_dict(rows)).tolist() == [[2, 1], [1, 3]]
    assert row_lengths(datasets.Dataset.from_dict(rows).select([1])).tolist() == [[1, 3]]
    assert row_lengths(datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})).tolist() == [[2, 0], [1, 0]]
    assert row_lengths([{"input_ids": torch.ones(4), "labels": torch.ones(2)}]).tolist() == [[4, 2]]
    assert row_lengths(datasets.Dataset.from_dict({"text": ["a"]})) is None


def test_training_by_tokens_logs_the_padding(tmp_path):
    trainer = token_trainer(tmp_path, max_tokens_per_batch=60, num_train_epochs=2, logging_steps=3)
    metrics = trainer.train().metrics
    shares = []
    for source, target in trainer.seen:
        assert len(source) == 1 or source.numel() + target.numel() <= 60
        shares.append(((source == 0).sum() + (target == -100).sum(), source.numel() + target.numel()))
    assert len({len(source) for source, _ in trainer.seen}) > 1
    first = next(entry["padding_share"] for entry in trainer.state.log_history if "padding_share" in entry)
    assert first == pytest.approx(float(sum(p for p, _ in shares[:3]) / sum(n for _, n in shares[:3])))
    overall = float(sum(p for p, _ in shares) / sum(n for _, n in shares))
    assert metrics["train_padding_share"] == pytest.approx(overall)
    assert 0 < overall < 0.2


def test_token_batches_accumulate_to_the_whole_batch(tmp_path):
    """One update from all rows: the same weights however they were batched, as the loss is a mean over tokens."""
    common = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "lr_scheduler_type": "constant", "dropout": 0.0}
    at_once = token_trainer(tmp_path / "a", per_device_train_batch_size=37, **common)
    at_once.train()
    parts = token_trainer(tmp_path / "b", max_tokens_per_batch=60, gradient_accumulation_steps=99, **common)
    parts.train()
    assert len(parts.seen) > 3
    for name, weight in at_once.model.named_parameters():
        torch.testing.assert_close(parts.model.get_parameter(name), weight, rtol=1e-5, atol=1e-6, msg=name)


def test_resuming_by_tokens_equals_not_stopping(tmp_path):
    """Bit for bit, in the middle of the second epoch, with accumulation and dropout."""
    options = {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    options |= {"save_strategy": "steps", "save_steps": 3, "data_seed": 5}
    whole = token_trainer(tmp_path, **options)
    whole.train()
    per_epoch = whole.state.max_steps // 3
    assert per_epoch < 6 < 2 * per_epoch
    resumed = token_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert len(resumed.seen) < len(whole.seen)
    for name, weight in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight), name


@pytest.mark.parametrize("options", [{"per_device_train_batch_size": 11}, {"max_tokens_per_batch": 200}])
def test_finding_what_fits_into_memory(tmp_path, options):
    options = options | {"auto_find_batch_size": True, "num_train_epochs": 1, "save_strategy": "epoch"}
    trainer = token_trainer(tmp_path, **options)
    trainer.positions_in_memory = 150
    trainer.train()
    last = [source.numel() + target.numel() for source, target in trainer.seen[-trainer.state.max_steps :]]
    assert 100 < max(last) <= 150 < max(source.numel() + target.numel() for source, target in trainer.seen)
    assert sum(len(source) for source, _ in trainer.seen[-trainer.state.max_steps :]) == 37
    resumed = token_trainer(tmp_path, **(options | {"num_train_epochs": 2}))
    resumed.positions_in_memory = 150
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{trainer.state.max_steps}"))
    assert max(source.numel() + target.numel() for source, target in resumed.seen) == max(last)  # found at once


def test_rows_longer_than_the_limit(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logger = logging.getLogger("hf_rnn_seq2seq.batching")
    logger.addHandler(caplog.handler)
    lengths = np.array([[3, 2], [30, 9], [4, 4], [20, 20]])
    batches = list(LengthBatchSampler(lengths, 8, max_tokens=20))
    logger.removeHandler(caplog.handler)
    assert sorted(map(sorted, batches)) == [[0, 2], [1], [3]]
    assert "2 of 4 training rows are longer (source + target: up to 40)" in caplog.text


def test_evaluation_is_sorted_and_its_results_are_not(tmp_path):
    """Batches hold rows of similar lengths; metrics and predictions get them in the data's order."""
    given_to_metrics = []

    def compute_metrics(output):
        given_to_metrics.append(output)
        return {"rows": len(output.predictions)}

    options = {"per_device_eval_batch_size": 5, "include_for_metrics": ["inputs", "loss"]}
    trainer = token_trainer(tmp_path, compute_metrics=compute_metrics, **options)
    with torch.no_grad():  # an untrained model would predict the same for every source
        for parameter in trainer.model.parameters():
            parameter.mul_(8)
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_eval_dataloader()]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 3
    output = trainer.predict(trainer.eval_dataset)
    seen = given_to_metrics[0]
    for row, example in enumerate(trainer.eval_dataset):
        for labels in (output.label_ids[row], seen.label_ids[row]):
            assert labels[labels > 0].tolist() == example["labels"]
        assert seen.inputs[row][seen.inputs[row] > 0].tolist() == example["input_ids"]
        alone = trainer.model.generate(torch.tensor([example["input_ids"]]), max_length=5)[0]
        for predicted in (output.predictions[row], seen.predictions[row]):
            assert predicted[predicted > 0].tolist() == alone[alone > 0].tolist()
    assert len({tuple(row) for row in output.predictions.tolist()}) > 5
    assert output.metrics["test_rows"] == 37


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0: must be at least 1"),
        (
            {"max_tokens_per_batch": 9, "train_sampling_strategy": "random"},
            "train_sampling_strategy must be 'group_by_length', not 'random'",
        ),
        ({"shuffle_buffer_size": -1}, "shuffle_buffer_size=-1: must be at least 0"),
    ],
)
def test_refused_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        RnnSeq2SeqTrainingArguments(output_dir=str(tmp_path), **arguments)


@pytest.mark.parametrize("max_tokens", [None, 200])
def test_streamed_batches(max_tokens):
    lengths = make_lengths(300)
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": [[place] * source for place, (source, _) in enumerate(lengths)],
            "labels": [[1] * target for _, target in lengths],
        }
    ).to_iterable_dataset(num_shards=3)
    batches = iter(StreamedBatches(rows, 8, max_tokens, buffer_size=200, seed=1))
    epochs: list[list[list[int]]] = [[], []]
    for epoch in epochs:
        while sum(map(len, epoch)) < 300:
            epoch.append([row["input_ids"][0] for row in next(batches)])
        assert sorted(place for batch in epoch for place in batch) == list(range(300))
        padded = sum(padded_tokens(lengths, batch) for batch in epoch)
        assert 1 - lengths.sum() / padded < 0.25  # at random it is 0.45
        for batch in epoch:
            assert len(batch) <= 8 if max_tokens is None else padded_tokens(lengths, batch) <= 200
    assert epochs[0] != epochs[1]
    again = iter(StreamedBatches(rows, 8, max_tokens, buffer_size=200, seed=1))
    assert [[row["input_ids"][0] for row in next(again)] for _ in epochs[0]] == epochs[0]


def train_and_resume(folder: Path) -> dict[str, list]:
    options = {"max_tokens_per_batch": 60, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}
    options |= {"data_seed": 5, "per_device_eval_batch_size": 4, "logging_steps": 1}
    options |= {"ddp_find_unused_parameters": False}
    whole = token_trainer(folder / "run", **options)
    assert whole.args.world_size == 2, whole.args.world_size
    whole.train()
    per_epoch = whole.state.max_steps // 3
    seen = [source.tolist() for source, _ in whole.seen]
    step = 2 * per_epoch - 1
    resumed = token_trainer(folder / "run", **options)
    resumed.train(resume_from_checkpoint=str(folder / "run" / f"checkpoint-{step}"))
    for name, weight in whole.model.named_parameters():
        assert torch.equal(resumed.model.get_parameter(name), weight), name
    assert [source.tolist() for source, _ in resumed.seen] == seen[step:]
    output = resumed.predict(resumed.eval_dataset)
    if whole.args.process_index == 0:
        resumed.model.save_pretrained(folder / "model")
    return {
        "epochs": [seen[start : start + per_epoch] for start in range(0, 3 * per_epoch, per_epoch)],
        "labels": output.label_ids.tolist(),
        "predictions": output.predictions.tolist(),
        "shares": [entry["padding_share"] for entry in whole.state.log_history if "padding_share" in entry],
    }


def test_two_processes(tmp_path):
    """Every row once an epoch, resuming in a later epoch bit for bit, predictions in the order of one process."""
    ranks = on_processes(2, train_and_resume, tmp_path)
    trainer = token_trainer(tmp_path / "one", per_device_eval_batch_size=4)
    rows = sorted(trainer.train_dataset["input_ids"])
    orders = []
    for epoch in range(3):
        batches = [batch for rank in ranks for batch in rank["epochs"][epoch]]
        orders.append([[token for token in row if token] for batch in batches for row in batch])
        assert sorted(orders[-1]) == rows
    assert orders[0] != orders[1]
    assert ranks[0]["shares"] == ranks[1]["shares"]
    trainer.model.load_state_dict(type(trainer.model).from_pretrained(tmp_path / "model").state_dict())
    alone = trainer.predict(trainer.eval_dataset)
    for rank in ranks:
        assert [[i for i in row if i > 0] for row in rank["labels"]] == trainer.eval_dataset["labels"][:]
        assert rank["predictions"] == alone.predictions.tolist()
