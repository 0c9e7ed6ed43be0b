"""Knowledge distillation: the loss by its definition, what it does to a student, and teachers that don't fit."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import tiny_model
from test_training_objective import NO_DROPOUT, make_trainer
from transformers import DataCollatorForSeq2Seq

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.distillation import Teacher, distillation_loss
from hf_rnn_seq2seq.losses import token_loss
from hf_rnn_seq2seq.normalizers import NORMALIZERS
from hf_rnn_seq2seq.tokenizer_training import train_tokenizer
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer

LABELS = torch.tensor([[4, 5, -100], [7, -100, -100], [8, 9, 3]])
SIZES = {"vocab_size": 13, "embedding_size": 8, "hidden_size": 16, "dropout": 0, "embedding_dropout": 0}


def scores_of(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(3, 3, 10, dtype=torch.float64, generator=generator)).requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.5])
@pytest.mark.parametrize("number", [None, 40])
def test_the_loss_by_its_definition(temperature: float, number: int | None) -> None:
    student, teacher = scores_of(0), scores_of(1).detach()
    teacher[0, 1, 4:] = -torch.inf  # words without any probability
    plain = torch.zeros((), dtype=torch.float64)
    for b, t in (LABELS != -100).nonzero().tolist():
        p, q = ((each[b, t] / temperature).softmax(-1) for each in (student, teacher))
        for word in range(10):
            if q[word] > 0:
                plain = plain + temperature**2 * q[word] * (q[word] / p[word]).log()
    expected = plain / (number or 6)
    found = distillation_loss(student, teacher.log_softmax(-1), LABELS, "softmax", temperature, number)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(one, student)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert (gradients[0][LABELS == -100] == 0).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_of_a_gold_word_it_is_the_models_own_loss(normalizer: str) -> None:
    scores, gold = scores_of(0), LABELS.clamp(min=0)
    log_q = torch.full_like(scores, -torch.inf).scatter(2, gold.unsqueeze(2), 0.0)
    own = token_loss(scores.flatten(0, 1), LABELS.flatten(), normalizer)
    found = distillation_loss(scores, log_q, LABELS, normalizer)
    torch.testing.assert_close(found, own.double(), rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(one, scores)[0] for one in (found, own)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nothing_is_lost_on_a_student_that_knows_all(normalizer: str, temperature: float) -> None:
    """And its gradient is that of the loss, by finite differences."""
    scores = scores_of(0)
    p = NORMALIZERS[normalizer](scores.detach() / temperature, None)
    log_q = p.log() * temperature
    loss = distillation_loss(scores, log_q, LABELS, normalizer, temperature)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(loss, scores)[0].abs().max() < 1e-12
    other = scores_of(1).log_softmax(-1)
    assert torch.autograd.gradcheck(
        lambda z: distillation_loss(z, other, LABELS, normalizer, temperature), scores, atol=1e-4
    )


def teacher_folder(folder: Path, seed: int = 1, **setting: Any) -> str:
    """A model whose words have clearly different probabilities."""
    torch.manual_seed(seed)
    model = RnnSeq2SeqForConditionalGeneration(RnnSeq2SeqConfig(**{**SIZES, **setting}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    return str(folder)


def distance(trainer: RnnSeq2SeqTrainer, teacher: Teacher) -> float:
    rows = Dataset.from_list(list(trainer.train_dataset)).remove_columns("alignments")
    batch = {name: torch.tensor(rows[name]) for name in rows.column_names}
    with torch.no_grad():
        scores = trainer.model.eval()(**batch, output_scores=True).scores
    return float(distillation_loss(scores, teacher(batch), batch["labels"], trainer.model.config.output_normalizer))


@pytest.mark.parametrize("head", [{}, {"output_normalizer": "sparsemax"}, {"head_type": "pointer_generator"}], ids=str)
def test_a_student_comes_near_its_teachers(tmp_path: Path, head: dict[str, str]) -> None:
    """From the step on at which distillation begins the loss is the sum of both; teachers stay as they are."""
    names = [teacher_folder(tmp_path / f"teacher {seed}", seed, **head) for seed in (1, 2)]
    distances = []
    for weight in (0.0, 4.0):
        options = {"distillation_teachers": names, "distillation_start": 4} if weight else {}
        trainer = make_trainer(tmp_path / str(weight), distillation_weight=weight, max_steps=40, **options, **head)
        if weight:
            before = copy.deepcopy(trainer._teacher.model.state_dict())
        trainer.train()
        log = trainer.state.log_history
        assert ["distillation_loss" in entry for entry in log[:2]] == [False, weight > 0]
        for entry in log[1:-1] if weight else []:
            total = entry["token_loss"] + weight * entry["distillation_loss"]
            assert entry["loss"] == pytest.approx(total, abs=1e-4)
        distances.append(distance(trainer, Teacher(names, trainer.model, None)))
    assert distances[1] < 0.5 * distances[0]
    after = trainer._teacher.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not trainer._teacher.model.training
    assert len(list(trainer.model.parameters())) == sum(
        len(group["params"]) for group in trainer.optimizer.param_groups
    )


def test_temperature_and_two_passes(tmp_path: Path) -> None:
    """R-Drop's two passes, without dropout, leave the loss as it is; the temperature does not."""
    name = teacher_folder(tmp_path / "teacher")
    logs = []
    for number, options in enumerate(({}, {"r_drop_weight": 2.0}, {"distillation_temperature": 3.0})):
        settings = {"distillation_weight": 1.5, "distillation_teachers": [name], "output_dropout": NO_DROPOUT}
        trainer = make_trainer(tmp_path / str(number), max_steps=2, logging_steps=1, **settings, **options)
        trainer.train()
        logs.append([(entry["loss"], entry["distillation_loss"]) for entry in trainer.state.log_history[:2]])
    for once, twice in zip(logs[0], logs[1], strict=True):
        assert twice == pytest.approx(once, rel=1e-4)
    assert logs[2][0][1] != pytest.approx(logs[0][0][1], rel=0.05)


def test_several_teachers_are_averaged(tmp_path: Path) -> None:
    names = [teacher_folder(tmp_path / str(seed), seed) for seed in (1, 2)]
    student = tiny_model(**SIZES)
    inputs = {
        "input_ids": torch.tensor([[4, 5, 6], [7, 8, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[4, 5, 2], [6, 2, -100]]),
        "something_else": torch.tensor([1, 2]),
    }
    both, *each = (Teacher(some, student, None)(inputs).exp() for some in (names, names[:1], names[1:]))
    assert both.shape == (2, 3, 13)
    assert not both.requires_grad
    torch.testing.assert_close(both, (each[0] + each[1]) / 2)


def text_batch(rows: list[tuple[list[int], list[int]]], left: int = 0, right: int = 0) -> dict[str, torch.Tensor]:
    """Rows of source and labels, with so many more columns of padding."""

    def padded(sides: list[list[int]], pad: int, before: int) -> torch.Tensor:
        width = max(map(len, sides)) + right
        return torch.tensor([[pad] * before + side + [pad] * (width - len(side)) for side in sides])

    sources, labels = (list(side) for side in zip(*rows, strict=True))
    there = padded([[1] * len(source) for source in sources], 0, left)
    return {"input_ids": padded(sources, 0, left), "attention_mask": there, "labels": padded(labels, -100, 0)}


ROWS = [([4, 5, 6], [4, 5, 2]), ([7], [6, 2]), ([8, 9, 4, 5], [7, -100, 8, 2]), ([4, 5, 6], [4, 6, 2]), ([4], [2])]


def test_a_memory_says_what_the_teachers_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever batch a row comes back in: the teachers are asked once for each."""
    names = [teacher_folder(tmp_path / str(seed), seed) for seed in (1, 2)]
    student = tiny_model(**SIZES)
    plain, remembering = (Teacher(names, student, None, memory=memory) for memory in (0, 10**6))
    asked = []
    ask = remembering._log_q
    monkeypatch.setattr(remembering, "_log_q", lambda read: asked.append(len(read["input_ids"])) or ask(read))
    for rows, padding, new in (
        (ROWS[:2], {}, 2),
        (ROWS[1:4], {"right": 2}, 2),
        (ROWS[::-1], {"right": 1}, 1),
        (ROWS, {}, 0),
        (ROWS[:1], {"left": 1}, 1),  # the source's own padding is taken as it is
        (ROWS[:1] * 2, {}, 0),
    ):
        asked.clear()
        batch = text_batch(rows, **padding)
        found, labelled = remembering(batch), batch["labels"] != -100
        assert sum(asked) == new
        assert found.shape == (*labelled.shape, 13)
        torch.testing.assert_close(found[labelled], plain(batch)[labelled], rtol=1e-5, atol=1e-6)
    assert len(remembering.memory.rows) == 6


def test_a_memory_tells_rows_apart_by_all_that_is_read(tmp_path: Path) -> None:
    name, student = teacher_folder(tmp_path / "teacher"), tiny_model(**SIZES)
    plain, remembering = (Teacher([name], student, None, memory=memory) for memory in (0, 10**6))
    batch = text_batch(ROWS[:1])
    decoder_input_ids = student.prepare_decoder_input_ids_from_labels(batch["labels"])
    for given in (
        batch,
        {**batch, "decoder_input_ids": decoder_input_ids},  # as a collator gives them
        {**batch, "decoder_input_ids": decoder_input_ids + 1},
        {**batch, "input_ids": batch["input_ids"] + 1},
        {**batch, "attention_mask": torch.tensor([[1, 0, 1]])},
    ):
        torch.testing.assert_close(remembering(given), plain(given))
    assert len(remembering.memory.rows) == 4  # the first two are one


def test_a_memory_keeps_to_its_limit(tmp_path: Path) -> None:
    name, student = teacher_folder(tmp_path / "teacher"), tiny_model(**SIZES)
    small = Teacher([name], student, None, memory=7 * 13 * 4)  # seven words
    batch = text_batch(ROWS)
    small(text_batch([ROWS[0], ROWS[0]]))
    for _ in range(2):
        found = small(batch)
        torch.testing.assert_close(found[2], Teacher([name], student, None)(batch)[2])
        kept = [len(row) for row in small.memory.rows.values()]
        assert kept == [3, 2, 1]  # the third row has four, the fourth three, the fifth one
        assert small.memory.used == sum(one.nbytes for one in small.memory.rows.values()) <= small.memory.limit
        # No row holds the batch that it came from.
        assert all(one.untyped_storage().nbytes() == one.nbytes for one in small.memory.rows.values())


def test_training_with_a_memory(tmp_path: Path) -> None:
    """With what the collator gives: every row is asked for in the first epoch alone."""
    name = teacher_folder(tmp_path / "teacher")
    logs, asked, tokenizer = [], [], train_tokenizer(["abcdefghi"], "char")
    for memory in (0.0, 1e-3):
        settings = {"distillation_weight": 2.0, "distillation_teachers": [name], "distillation_memory": memory}
        trainer = make_trainer(tmp_path / str(memory), num_train_epochs=3, max_steps=-1, logging_steps=1, **settings)
        rows = trainer.train_dataset.remove_columns("alignments")
        rows = rows.map(lambda row: {"labels": [label for label in row["labels"] if label != -100]})
        trainer.train_dataset, trainer.data_collator = rows, DataCollatorForSeq2Seq(tokenizer, model=trainer.model)
        asked.append(0)

        def count(*_: Any) -> None:
            asked[-1] += 1

        trainer._teacher.model.register_forward_pre_hook(count)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history[:-1]])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert asked == [6, 2]


def test_a_memory_is_refused_where_words_are_copied(tmp_path: Path) -> None:
    name = teacher_folder(tmp_path / "teacher", head_type="pointer_generator")
    teacher = Teacher([name], tiny_model(**SIZES, head_type="pointer_generator"), None, memory=1000)
    batch = text_batch(ROWS)
    assert teacher(batch).size(2) == 13
    with pytest.raises(ValueError, match="distillation_memory: words are copied"):
        teacher({**batch, "copy_ids": batch["input_ids"]})


def test_teachers_are_for_training_alone(tmp_path: Path) -> None:
    """Who evaluates a taught model by its recipe need not have them."""
    absent = str(tmp_path / "absent")
    trainer = make_trainer(tmp_path / "out", distillation_weight=1.0, distillation_teachers=[absent])
    assert math.isfinite(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    with pytest.raises(OSError, match="absent"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    fits = teacher_folder(tmp_path / "fits")
    other = teacher_folder(tmp_path / "other", vocab_size=17)
    student = tiny_model(**SIZES)
    said = f"distillation_teachers: {other} does not fit the model. "
    with pytest.raises(ValueError, match=re.escape(said) + ".*`vocab_size`, got 13, 17"):
        Teacher([other], student, None)
    tokenizers = [train_tokenizer([letters], "char") for letters in ("abcdefgh", "abcdefgi")]
    tokenizers[0].save_pretrained(fits)
    Teacher([fits], student, tokenizers[0])
    with pytest.raises(ValueError, match=re.escape(f"{fits} has another vocabulary")):
        Teacher([fits], student, tokenizers[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"distillation_weight": 1.0}, "distillation_teachers=None: must be at least one model"),
        ({"distillation_teachers": ["x"]}, "distillation_teachers=['x']: must be left out without"),
        ({"distillation_weight": math.nan}, "distillation_weight=nan: must be a number of at least 0"),
        ({"distillation_temperature": 0.0}, "distillation_temperature=0.0: must be above 0"),
        ({"distillation_memory": 1.0}, "distillation_memory=1.0: must be left out without"),
        ({"distillation_memory": math.nan}, "distillation_memory=nan: must be 0 or more"),
        ({"distillation_start": -1}, "distillation_start=-1: must be a number of updates"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make_trainer(tmp_path, **arguments)
