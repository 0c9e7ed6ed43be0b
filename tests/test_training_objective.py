"""Further losses through the Trainer: their sum, starts and logs, and what each does to a model."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from forked import on_processes
from tiny_trainer import make_arguments
from transformers import default_data_collator

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.losses import coverage_loss
from hf_rnn_seq2seq.minimum_risk import (
    Costs,
)
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer


def make_trainer(folder: Path, rows: list[dict[str, Any]] | None = None, **arguments: Any) -> RnnSeq2SeqTrainer:
    """A tiny model and pairs in which the target is the source with one word in three replaced at random."""
    dropout = arguments.pop("output_dropout", 0)
    config_names = ("attention_type", "wiring_type", "head_type", "output_normalizer", "source_vocab_size")
    setting = {name: arguments.pop(name) for name in config_names if name in arguments}
    torch.manual_seed(0)
    if rows is None:
        sources = torch.randint(4, 13, (32, 4))
        noise = torch.where(torch.rand(32, 4) < 0.3, torch.randint(4, 13, (32, 4)), sources)
        rows = [
            {"input_ids": source, "labels": [*target, 2], "alignments": [[3 - t, t] for t in range(4)]}
            for source, target in zip(sources.tolist(), noise.tolist(), strict=True)
        ]
    config = RnnSeq2SeqConfig(
        vocab_size=13,
        embedding_size=8,
        hidden_size=16,
        dropout=0,
        embedding_dropout=0,
        output_dropout=dropout,
        **setting,
    )
    defaults = {
        "per_device_train_batch_size": 16,
        "max_steps": 12,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "logging_steps": 4,
        "save_strategy": "no",
        "predict_with_generate": False,
        "train_sampling_strategy": "random",
    }
    return RnnSeq2SeqTrainer(
        model=RnnSeq2SeqForConditionalGeneration(config),
        args=make_arguments(folder, **{**defaults, **arguments}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
    )


def logged(trainer: RnnSeq2SeqTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


EVERYTHING: dict[str, Any] = {
    "label_smoothing_factor": 0.1,
    "coverage_loss_weight": 0.5,
    "guided_alignment_weight": 0.3,
    "transition_penalty_weight": 0.2,
    "unlikelihood_weight": 0.4,
    "minimum_risk_weight": 0.1,
    "minimum_risk_count": 2,
}
NAMES = {
    "label_smoothing_factor": "label_smoothing_loss",
    "coverage_loss_weight": "coverage_loss",
    "guided_alignment_weight": "guided_alignment_loss",
    "transition_penalty_weight": "transition_penalty",
    "unlikelihood_weight": "unlikelihood_loss",
    "minimum_risk_weight": "risk",
}


def test_the_loss_is_the_weighted_sum_of_what_is_logged_apart(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, logging_steps=2, scheduled_sampling="constant", **EVERYTHING)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        total = entry["token_loss"] + sum(EVERYTHING[key] * entry[name] for key, name in NAMES.items())
        assert entry["loss"] == pytest.approx(total, abs=1e-4)
        assert all(entry[name] != 0 for name in NAMES.values())
    assert trainer.model.config.coverage_loss_weight == 0.5


def test_each_loss_begins_at_its_step(tmp_path: Path) -> None:
    starts = {"label_smoothing_start": 1, "coverage_loss_start": 2, "guided_alignment_start": 3}
    starts |= {"transition_penalty_start": 4, "unlikelihood_start": 5, "minimum_risk_start": 6}
    trainer = make_trainer(tmp_path, max_steps=7, logging_steps=1, **starts, **EVERYTHING)
    trainer.train()
    names = list(NAMES.values())
    for step, entry in enumerate(trainer.state.log_history[:7]):
        assert [name for name in names if name in entry] == names[:step]


def test_an_interval_is_averaged_over_the_updates_since_the_start(tmp_path: Path) -> None:
    apart = make_trainer(tmp_path / "a", max_steps=4, logging_steps=1, unlikelihood_weight=0.5, unlikelihood_start=1)
    together = make_trainer(
        tmp_path / "b", max_steps=4, logging_steps=4, unlikelihood_weight=0.5, unlikelihood_start=1
    )
    apart.train()
    together.train()
    values = logged(apart, "unlikelihood_loss")
    assert len(values) == 3
    assert logged(together, "unlikelihood_loss") == [pytest.approx(sum(values) / 3, abs=1e-5)]


def test_accumulated_batches_give_the_gradients_of_one(tmp_path: Path) -> None:
    """With targets of different lengths, padded; without samples, whose draws differ."""
    torch.manual_seed(1)
    rows = []
    for length in [1, 4, 2, 4]:
        labels = [*torch.randint(4, 13, (length,)).tolist(), *[-100] * (4 - length)]
        rows.append({"input_ids": torch.randint(4, 13, (4,)).tolist(), "labels": labels, "alignments": [[1, 0]]})
    settings = {**EVERYTHING, "minimum_risk_candidates": "beam"}
    results = []
    for size, accumulation in ((4, 1), (1, 4)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(tmp_path / str(size), rows, max_steps=1, logging_steps=1, **batch, **settings)
        trainer.train()
        results.append(trainer)
    first, second = (trainer.state.log_history[0] for trainer in results)
    for name in ("loss", "grad_norm", "token_loss", *NAMES.values()):
        assert first[name] == pytest.approx(second[name], rel=1e-4), name


NO_DROPOUT = 1e-12  # as good as none, but not refused


@pytest.mark.parametrize("normalizer", ["softmax", "sparsemax"])
def test_two_passes_without_dropout_are_as_one(tmp_path: Path, normalizer: str) -> None:
    """With all other losses but for samples, whose draws differ; in one batch, and in parts of unequal lengths."""
    rows = [
        {"input_ids": [4, 5 + n, 6], "labels": [*range(5, 5 + n), *[-100] * (4 - n)], "alignments": [[1, 0]]}
        for n in (1, 4, 2, 4)
    ]
    settings = {**EVERYTHING, "minimum_risk_candidates": "beam", "max_steps": 2, "logging_steps": 1}
    logs = []
    for weight, size in ((0.0, 4), (3.0, 4), (3.0, 1)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        model = {"output_normalizer": normalizer, "output_dropout": NO_DROPOUT}
        folder = tmp_path / f"{weight} {size}"
        trainer = make_trainer(folder, rows, r_drop_weight=weight, **batch, **model, **settings)
        trainer.train()
        logs.append(trainer.state.log_history[:2])
    for step, once in enumerate(logs[0]):
        for twice in (logs[1][step], logs[2][step]):
            assert twice["r_drop_loss"] == pytest.approx(0, abs=1e-6)
            for name in ("loss", "grad_norm", "token_loss", *NAMES.values()):
                assert twice[name] == pytest.approx(once[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("head", [{}, {"output_normalizer": "sparsemax"}, {"head_type": "pointer_generator"}], ids=str)
def test_r_drop_brings_passes_with_dropout_together(tmp_path: Path, head: dict[str, str]) -> None:
    distances = []
    for weight in (0.0, 5.0):
        trainer = make_trainer(
            tmp_path / str(weight), r_drop_weight=weight, r_drop_start=4, output_dropout=0.4, max_steps=40, **head
        )
        trainer.train()
        log = trainer.state.log_history
        assert ["r_drop_loss" in entry for entry in log[:2]] == [False, weight > 0]
        for entry in log[1:-1] if weight else []:
            assert entry["loss"] == pytest.approx(entry["token_loss"] + weight * entry["r_drop_loss"], abs=1e-4)
        batch = default_data_collator(list(trainer.train_dataset.remove_columns("alignments")))
        torch.manual_seed(0)
        with torch.no_grad():
            logits = [trainer.model.train()(**batch).logits for _ in range(8)]
        p = torch.stack([each.softmax(-1) if not head else each.exp() for each in logits])
        distances.append(p.std(0).sum(-1).mean().item())
    assert distances[1] < 0.8 * distances[0]


def log_with_everything(folder: Path, number: int) -> list[dict[str, float]]:
    rows = [
        {"input_ids": [4, 5 + n, 12 - n, 6], "labels": [*range(5, 5 + n), *[-100] * (4 - n)], "alignments": [[1, 0]]}
        for n in (1, 4, 2, 4, 3, 2, 4, 1)
    ]
    settings = {**EVERYTHING, "minimum_risk_candidates": "beam", "train_sampling_strategy": "sequential"}
    settings |= {"scheduled_sampling": "constant", "scheduled_sampling_rate": 1.0}
    settings |= {"r_drop_weight": 2.0, "output_dropout": NO_DROPOUT}
    settings |= {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 8 // number}
    trainer = make_trainer(folder / str(number), rows, **settings)
    assert trainer.args.world_size == number
    trainer.train()
    return trainer.state.log_history[:3]


def test_two_processes_log_what_one_logs(tmp_path: Path) -> None:
    """Every loss, with free running; targets of different lengths, so that the processes have unequal numbers."""
    alone = log_with_everything(tmp_path, 1)
    together, _ = on_processes(2, log_with_everything, tmp_path, 2)
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        assert all(two[name] == pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in one.items())


def test_zero_weights_change_no_bit(tmp_path: Path) -> None:
    zeros = {name: 0.0 for name in EVERYTHING if name.endswith("weight")}
    weights = []
    for name, arguments in (("a", {}), ("b", zeros)):
        trainer = make_trainer(tmp_path / name, max_steps=3, **arguments)
        trainer.train()
        assert set(trainer.state.log_history[0]).isdisjoint({*NAMES.values(), "token_loss"})
        weights.append(list(trainer.model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


@pytest.mark.parametrize("normalizer", ["softmax", "entmax15"])
def test_evaluation_is_by_the_plain_loss(tmp_path: Path, normalizer: str) -> None:
    trainer = make_trainer(tmp_path, output_normalizer=normalizer, **EVERYTHING)
    metrics = trainer.evaluate()
    trainer.model.config.coverage_loss_weight = 0.0
    batch = default_data_collator(list(trainer.eval_dataset.remove_columns("alignments")))
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(trainer.model.eval()(**batch).loss.item(), abs=1e-5)
    assert ("eval_perplexity" in metrics) == (normalizer == "softmax")


def test_the_coverage_loss_is_the_models_own(tmp_path: Path) -> None:
    """Its value is what the model adds of itself, and it falls."""
    trainer = make_trainer(tmp_path, coverage_loss_weight=10.0, logging_steps=1)
    batch = default_data_collator(list(trainer.train_dataset.remove_columns("alignments")))
    with torch.no_grad():
        output = trainer.model.eval()(**batch, output_attentions=True)
        trainer.model.config.coverage_loss_weight = 0.0
        plain = trainer.model(**batch).loss
    value = coverage_loss(output.cross_attentions[0], batch["labels"])
    torch.testing.assert_close(output.loss, plain + 10 * value)
    trainer.model.config.coverage_loss_weight = 10.0
    trainer.train()
    values = logged(trainer, "coverage_loss")
    assert values[0] == pytest.approx(value.item(), abs=0.02)  # of half of the rows
    assert values[-1] < 0.95 * values[0]


def entropy(trainer: RnnSeq2SeqTrainer) -> float:
    batch = default_data_collator(list(trainer.train_dataset.remove_columns("alignments")))
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits
    p = logits.softmax(-1) if trainer.model.config.output_normalizer == "softmax" else logits.exp()
    return -(p * p.clamp(min=1e-9).log()).sum(-1).mean().item()


@pytest.mark.parametrize("normalizer", ["softmax", "entmax15"])
def test_label_smoothing_raises_entropy(tmp_path: Path, normalizer: str) -> None:
    entropies = []
    for factor in (0.0, 0.4):
        trainer = make_trainer(tmp_path / str(factor), output_normalizer=normalizer, label_smoothing_factor=factor)
        trainer.train()
        entropies.append(entropy(trainer))
    assert entropies[1] > entropies[0] + 0.05


def test_guided_alignment_moves_attention_onto_the_links(tmp_path: Path) -> None:
    """The links run against the order of the words, which is no help to the model's own loss."""
    shares = []
    for weight in (0.0, 2.0):
        trainer = make_trainer(tmp_path / str(weight), guided_alignment_weight=weight, max_steps=20)
        trainer.train()
        batch = default_data_collator(list(trainer.train_dataset.remove_columns("alignments")))
        with torch.no_grad():
            weights = trainer.model.eval()(**batch, output_attentions=True).cross_attentions[0].mean(1)
        shares.append(weights[:, :4].flip(2).diagonal(dim1=1, dim2=2).mean().item())
    assert shares[1] > 0.6 > 0.4 > shares[0]


def test_the_transition_penalty_lowers_the_mass_of_unseen_transitions(tmp_path: Path) -> None:
    masses = []
    for weight in (0.0, 2.0):
        trainer = make_trainer(tmp_path / str(weight), transition_penalty_weight=weight)
        trainer.train()
        rows = list(trainer.train_dataset.remove_columns("alignments"))
        seen = torch.zeros(13, 13, dtype=torch.bool)
        for row in rows:
            words = [1, *row["labels"]]
            seen[words[:-1], words[1:]] = True
        batch = default_data_collator(rows)
        with torch.no_grad():
            p = trainer.model.eval()(**batch).logits.softmax(-1)
        previous = torch.cat((torch.ones(len(rows), 1, dtype=torch.long), batch["labels"][:, :-1]), dim=1)
        masses.append((p * ~seen[previous]).sum(-1).mean().item())
    assert masses[1] < 0.7 * masses[0]


def test_unlikelihood_lowers_repetition(tmp_path: Path) -> None:
    """Some targets repeat a word; without the loss the model gives words it has had before their share."""
    masses = []
    for weight in (0.0, 5.0):
        trainer = make_trainer(tmp_path / str(weight), unlikelihood_weight=weight)
        trainer.train()
        batch = default_data_collator(list(trainer.train_dataset.remove_columns("alignments")))
        with torch.no_grad():
            p = trainer.model.eval()(**batch).logits.softmax(-1)
        repeated = [
            p[b, t, list(set(row[:t]) - {row[t]})].sum().item()
            for b, row in enumerate(batch["labels"].tolist())
            for t in range(1, 5)
        ]
        masses.append(sum(repeated) / len(repeated))
    assert masses[1] < 0.6 * masses[0]


def test_minimum_risk_lowers_the_expected_edit_distance(tmp_path: Path) -> None:
    """Of samples, after updates by the risk alone; before them comes what both trainings have in common."""
    distances = []
    for steps in (8, 20):
        trainer = make_trainer(
            tmp_path / str(steps),
            max_steps=steps,
            minimum_risk_weight=5.0,
            minimum_risk_start=8,
            minimum_risk_count=8,
            minimum_risk_sharpness=1.0,
            minimum_risk_token_loss_weight=0.0,
        )
        trainer.train()
        batch = default_data_collator(list(trainer.train_dataset.remove_columns("alignments")))
        labels = batch.pop("labels")
        torch.manual_seed(0)
        how = {"do_sample": True, "top_k": 0, "max_length": 8, "num_return_sequences": 20}
        samples = trainer.model.eval().generate(**batch, **how)[:, 1:].tolist()
        costs, special = Costs("edit_distance", None), {0, 1, 2}
        cut = [[*itertools.takewhile(lambda word: word != 2, row)] for row in samples]
        means = [costs(cut[20 * b : 20 * b + 20], label, special) for b, label in enumerate(labels.tolist())]
        distances.append(sum(map(sum, means)) / len(samples))
    assert distances[1] < distances[0] - 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"unlikelihood_weight": -1.0}, "unlikelihood_weight=-1.0: must be a number of at least 0"),
        ({"coverage_loss_weight": -1.0}, "coverage_loss_weight=-1.0"),
        ({"guided_alignment_start": -3}, "guided_alignment_start=-3"),
        ({"transition_penalty_smoothing": 0.0}, "transition_penalty_smoothing=0.0: must be above 0"),
        ({"transition_penalty_rows": 0}, "transition_penalty_rows=0"),
        ({"minimum_risk_candidates": "all"}, "minimum_risk_candidates='all': must be one of sample, beam"),
        ({"minimum_risk_count": 0}, "minimum_risk_count=0"),
        ({"minimum_risk_sharpness": 0.0}, "minimum_risk_sharpness=0.0"),
        ({"minimum_risk_weight": 1.0, "minimum_risk_cost": "blue"}, "minimum_risk_cost='blue'"),
        ({"minimum_risk_weight": 1.0, "minimum_risk_cost": "bleu"}, "minimum_risk_cost='bleu'"),
        ({"guided_alignment_weight": 1.0, "attention_type": "none"}, "guided_alignment_weight=1.0"),
        ({"coverage_loss_weight": 1.0, "attention_type": "none"}, "coverage_loss_weight=1.0"),
        ({"r_drop_weight": 1.0}, "r_drop_weight=1.0: without dropout two passes are the same"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_trainer(tmp_path, **arguments)


def test_guided_alignment_without_links_is_refused(tmp_path: Path) -> None:
    rows = [{"input_ids": [4, 5], "labels": [4, 2]}]
    with pytest.raises(ValueError, match="no column 'alignments'"):
        make_trainer(tmp_path, rows, guided_alignment_weight=1.0).train()
