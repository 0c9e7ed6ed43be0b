"""Scheduled sampling: the decoder's inputs against a plain loop, its schedules, and training with it."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from models import VOCABULARY, batch_of, ragged_batch, tiny_model
from tiny_trainer import make_arguments, make_trainer
from transformers import default_data_collator

from hf_rnn_seq2seq import RnnSeq2SeqConfig, RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.objective_arguments import sampling_probability
from hf_rnn_seq2seq.scheduled_sampling import OwnInputs, ScheduledSampling
from hf_rnn_seq2seq.trainer import RnnSeq2SeqTrainer

LENGTHS = [5, 2, 4]
LABELS = torch.tensor([[4, 5, 6, 7, 2], [8, 2, -100, -100, -100], [9, 9, 3, 2, -100]])

# Every wiring, head and normaliser, attention with and without a memory of its own, and cells of both kinds.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"wiring_type": "output_only", "attention_type": "dot", "decoder_layers": 2, "cell_type": "gru"},
    {"wiring_type": "output_only", "decoder_self_attention": True},
    {"wiring_type": "context_feeding", "head_type": "pointer_generator", "source_vocab_size": 11},
    {"wiring_type": "bahdanau", "head_type": "deep", "output_normalizer": "entmax15"},
    {"wiring_type": "context", "attention_type": "none"},
    {"wiring_type": "conditional", "attention_coverage": True, "output_normalizer": "sparsemax"},
    {"wiring_type": "gnmt", "decoder_layers": 2, "tie_word_embeddings": True},
    {"wiring_type": "gnmt_v2", "decoder_layers": 2, "attention_type": "monotonic", "cell_type": "ssru"},
    {"wiring_type": "rnmt_plus", "attention_type": "multi_head", "attention_heads": 2},
]


def make_batch(model: RnnSeq2SeqForConditionalGeneration, side: str = "right") -> dict[str, torch.Tensor]:
    return batch_of(model, *ragged_batch(LENGTHS, side))


def words_read(ids: torch.Tensor) -> torch.Tensor:
    return ids.masked_fill(ids >= VOCABULARY, 3)


def label_inputs() -> torch.Tensor:
    return torch.cat((torch.ones(3, 1, dtype=torch.long), LABELS[:, :-1]), dim=1).clamp(min=0)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["argmax", "sample", "gumbel"])
def test_without_own_predictions_it_is_teacher_forcing_bit_by_bit(setting: dict[str, Any], mode: str) -> None:
    model = tiny_model(**setting).train()
    results = []
    for sampling in (None, ScheduledSampling(0.0, mode=mode)):
        torch.manual_seed(0)
        model.zero_grad()
        output = model(**make_batch(model), labels=LABELS, scheduled_sampling=sampling)
        output.loss.backward()
        results.append([output.loss, output.logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_free_running_reads_what_greedy_generation_reads(setting: dict[str, Any], side: str) -> None:
    model = tiny_model(**setting)
    batch = make_batch(model, side)
    greedy = model.generate(**batch, max_length=6, min_length=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    labels = torch.full((3, 5), 5)
    logits = model(**batch, labels=labels, scheduled_sampling=ScheduledSampling(1.0)).logits
    assert torch.equal(logits.argmax(-1), greedy[:, 1:])
    forced = model(**batch, decoder_input_ids=greedy[:, :-1]).logits
    torch.testing.assert_close(logits, forced, atol=1e-10, rtol=0)
    assert not torch.equal(logits, model(**batch, labels=labels).logits)


class Spy:
    """Keeps which inputs were replaced, and by which embedding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.made: list[OwnInputs] = []
        self.read: list[torch.Tensor] = []
        init, embed = OwnInputs.__init__, OwnInputs.embed

        def keep_chosen(own: OwnInputs, *args: Any) -> None:
            init(own, *args)
            self.made.append(own)

        def keep_read(own: OwnInputs, *args: Any) -> torch.Tensor:
            self.read.append(embed(own, *args))
            return self.read[-1]

        monkeypatch.setattr(OwnInputs, "__init__", keep_chosen)
        monkeypatch.setattr(OwnInputs, "embed", keep_read)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", ["argmax", "sample", "gumbel"])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_mixed_inputs_give_what_feeding_them_gives(
    setting: dict[str, Any], mode: str, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients are those of teacher forcing on the mixed embeddings."""
    model, spy = tiny_model(**setting), Spy(monkeypatch)
    torch.manual_seed(3)
    sampling = ScheduledSampling(0.5, unit, mode, 0.7)
    output = model(**make_batch(model), labels=LABELS, scheduled_sampling=sampling)
    (own,) = spy.made
    chosen = own.chosen.clone()
    chosen[:, 0] = False
    assert chosen.any()
    assert not chosen[label_inputs() == 0].any()
    if unit == "sequence":
        rows = [
            {bool(c) for c, word in zip(r[1:], w[1:], strict=True) if word != 0}
            for r, w in zip(chosen, label_inputs(), strict=True)
        ]
        assert all(len(row) == 1 for row in rows)
    table = model.model.decoder.embed_tokens
    read = torch.cat((torch.zeros_like(spy.read[0]), *spy.read), dim=1)
    mixed = torch.where(chosen.unsqueeze(-1), read, table(words_read(label_inputs())))
    expected = model(**make_batch(model), decoder_inputs_embeds=mixed, labels=LABELS)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-10, rtol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, wanted = (
        torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        for loss in (output.loss, expected.loss)
    )
    for one, other in zip(found, wanted, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    if mode != "gumbel":
        distances = (read[:, 1:, None] - table.weight).abs().sum(-1)
        words = distances.argmin(-1)
        assert distances.gather(2, words.unsqueeze(-1)).max() == 0
        if mode == "argmax":
            assert torch.equal(words[chosen[:, 1:]], words_read(output.logits.argmax(-1))[:, :-1][chosen[:, 1:]])


@pytest.mark.parametrize(
    "setting",
    [{}, {"output_normalizer": "entmax15"}, {"head_type": "pointer_generator", "source_vocab_size": 11}],
    ids=str,
)
def test_gumbel_mixture_is_that_of_the_formula(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, spy = tiny_model(**setting), Spy(monkeypatch)
    noise: list[torch.Tensor] = []
    exponential = torch.Tensor.exponential_

    def keep(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        noise.append(exponential(tensor, *args, **kwargs).clone())
        return tensor

    monkeypatch.setattr(torch.Tensor, "exponential_", keep)
    output = model(
        **make_batch(model), labels=LABELS, scheduled_sampling=ScheduledSampling(0.5, mode="gumbel", temperature=0.3)
    )
    log_p = output.logits.log_softmax(-1) if model.config.output_normalizer == "softmax" else output.logits
    table = model.model.decoder.embed_tokens.weight
    wide = table[torch.tensor([*range(VOCABULARY), *[3] * (log_p.size(-1) - VOCABULARY)])]
    for t, read in enumerate(spy.read):
        gumbel = -torch.log(noise[t][:, 0])
        for row in range(3):
            score = (log_p[row, t] + gumbel[row]) / 0.3
            weights = (score - score.max()).exp()
            expected = (weights / weights.sum()) @ wide
            torch.testing.assert_close(read[row, 0], expected, atol=1e-10, rtol=0)


def test_gradients_flow_back_through_a_mixture_only() -> None:
    """The second step's loss changes the first step's scores only where the second reads a mixture of words."""
    model = tiny_model()
    inputs = {"input_ids": torch.tensor([[4, 5]]), "decoder_input_ids": torch.tensor([[1, 4]])}
    for mode in ("argmax", "sample", "gumbel"):
        torch.manual_seed(0)
        sampling = ScheduledSampling(1.0, mode=mode)
        output = model(**inputs, labels=torch.tensor([[-100, 5]]), scheduled_sampling=sampling)
        (gradient,) = torch.autograd.grad(output.loss, model.head.output.bias)
        of_second_step = output.logits[0, 1].softmax(-1) - torch.eye(VOCABULARY, dtype=torch.float64)[5]
        assert torch.allclose(gradient, of_second_step, atol=1e-6) == (mode != "gumbel")


def test_samples_follow_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, spy = tiny_model(), Spy(monkeypatch)
    source = torch.tensor([[4, 5, 6]]).expand(4000, 3)
    labels = torch.tensor([[4, 5]]).repeat(4000, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(input_ids=source, labels=labels, scheduled_sampling=ScheduledSampling(1.0, mode="sample"))
    table = model.model.decoder.embed_tokens.weight
    words = (spy.read[0] - table).abs().sum(-1).argmin(-1)
    shares = torch.bincount(words, minlength=VOCABULARY) / 4000
    torch.testing.assert_close(shares.double(), output.logits[0, 0].softmax(-1), atol=0.03, rtol=0)


def test_share_of_own_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, spy = tiny_model(wiring_type="output_only"), Spy(monkeypatch)
    source, labels = torch.full((2000, 2), 4), torch.full((2000, 3), 5)
    for unit in ("token", "sequence"):
        with torch.no_grad():
            model(input_ids=source, labels=labels, scheduled_sampling=ScheduledSampling(0.3, unit))
        chosen = spy.made[-1].chosen
        assert chosen.double().mean().item() == pytest.approx(0.3, abs=0.03)
        assert (chosen.all(1) | ~chosen.any(1)).all() == (unit == "sequence")


def test_a_start_token_after_padding_is_never_replaced() -> None:
    """Rows padded on the left, with a mask, give what they give alone."""
    model = tiny_model()
    source = torch.tensor([[4, 5, 6]])
    ids, mask = torch.tensor([[0, 0, 1, 4, 5]]), torch.tensor([[0, 0, 1, 1, 1]])
    sampling = ScheduledSampling(1.0)
    padded = model(input_ids=source, decoder_input_ids=ids, decoder_attention_mask=mask, scheduled_sampling=sampling)
    alone = model(input_ids=source, decoder_input_ids=ids[:, 2:], scheduled_sampling=sampling)
    torch.testing.assert_close(padded.logits[:, 2:], alone.logits, atol=1e-10, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", ["argmax", "gumbel"])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, mode: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(dropout=0.0, embedding_dropout=0.3, output_dropout=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        sampling = ScheduledSampling(0.5, mode=mode)
        model(**make_batch(model), labels=LABELS, scheduled_sampling=sampling).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["argmax", "sample", "gumbel"])
@pytest.mark.parametrize("head", ["linear", "deep", "pointer_generator"])
def test_under_autocast_every_weight_has_a_gradient(mode: str, head: str) -> None:
    """Autocast keeps cast weights for a pass: one that was cast without a gradient would have none in the loss."""
    model = tiny_model(head_type=head).float().train()
    gradients = []
    for sampling in (None, ScheduledSampling(0.5, mode=mode)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**make_batch(model), labels=LABELS, scheduled_sampling=sampling).loss
        loss.backward()
        gradients.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        assert loss.isfinite()
    assert gradients[0] <= gradients[1]


def test_it_compiles() -> None:
    model = tiny_model(wiring_type="output_only")
    batch = make_batch(model)
    compiled = torch.compile(model, backend="eager")
    for probability in (1.0, 0.0):
        sampling = ScheduledSampling(probability)
        expected = model(**batch, labels=LABELS, scheduled_sampling=sampling).logits
        torch.testing.assert_close(compiled(**batch, labels=LABELS, scheduled_sampling=sampling).logits, expected)


def test_schedules(tmp_path: Path) -> None:
    def share(step: int, **arguments: Any) -> float:
        settings = {f"scheduled_sampling_{name}": value for name, value in arguments.items()}
        settings["scheduled_sampling"] = settings.pop("scheduled_sampling_schedule")
        return sampling_probability(make_arguments(tmp_path, **settings), step)

    assert share(10**6, schedule="none", rate=1.0) == 0
    assert [share(step, schedule="constant", rate=0.3, start=5) for step in (0, 4, 5, 99)] == [0, 0, 0.3, 0.3]
    linear = {"schedule": "linear", "rate": 0.5, "start": 10, "end": 20}
    assert [share(step, **linear) for step in (9, 10, 15, 20, 30)] == [0, 0, 0.25, 0.5, 0.5]
    for step in (0, 1, 50, 400):
        exponential = share(step, schedule="exponential", k=0.99, rate=1.0)
        assert exponential == pytest.approx(1 - 0.99**step)
        sigmoid = share(step, schedule="inverse_sigmoid", k=30.0, rate=1.0)
        assert sigmoid == pytest.approx(1 - 30 / (30 + math.exp(step / 30)))
    assert share(10**6, schedule="exponential", k=0.99, rate=0.4) == 0.4
    assert share(10**6, schedule="inverse_sigmoid", k=30.0, rate=0.4) == 0.4
    assert share(107, schedule="exponential", k=0.9, rate=1.0, start=100) == pytest.approx(1 - 0.9**7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scheduled_sampling": "cosine"}, ["scheduled_sampling='cosine'", "inverse_sigmoid"]),
        ({"scheduled_sampling_unit": "word"}, ["scheduled_sampling_unit='word'", "token, sequence"]),
        ({"scheduled_sampling_mode": "max"}, ["scheduled_sampling_mode='max'", "gumbel"]),
        ({"scheduled_sampling_rate": 1.1}, ["scheduled_sampling_rate=1.1", "from 0 to 1"]),
        ({"scheduled_sampling_start": -1}, ["scheduled_sampling_start=-1", "at least 0"]),
        ({"scheduled_sampling": "linear"}, ["scheduled_sampling_end=None", "linear"]),
        ({"scheduled_sampling": "exponential", "scheduled_sampling_k": 1.0}, ["scheduled_sampling_k=1.0", "0 and 1"]),
        ({"scheduled_sampling": "inverse_sigmoid"}, ["scheduled_sampling_k=None", "at least 1"]),
        ({"gumbel_temperature": 0.0}, ["gumbel_temperature=0.0", "above 0"]),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, arguments: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(said[0])) as error:
        make_arguments(tmp_path, **arguments)
    assert said[1] in str(error.value)


def test_the_trainer_samples_by_the_step_and_logs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    schedule = {"scheduled_sampling": "linear", "scheduled_sampling_end": 4, "scheduled_sampling_rate": 1.0}
    trainer = make_trainer(tmp_path, max_steps=6, gradient_accumulation_steps=2, **schedule)
    trainer.train()
    logged = [entry["sampling_probability"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0, 0.25, 0.5, 0.75, 1, 1]
    # Epochs of three batches: every second update is of one batch, the others of two.
    assert [own.sampling.probability for own in spy.made] == [0.25, 0.5, 0.5, 0.75, 1, 1, 1]
    made = len(spy.made)
    trainer.evaluate()
    assert len(spy.made) == made  # training alone samples


def test_training_with_none_is_that_without(tmp_path: Path) -> None:
    """A schedule that has not begun changes no bit of the weights."""
    weights = []
    for name, arguments in (("a", {}), ("b", {"scheduled_sampling": "constant", "scheduled_sampling_start": 99})):
        trainer = make_trainer(tmp_path / name, max_steps=4, **arguments)
        trainer.train()
        weights.append([p.detach() for p in trainer.model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def counting_trainer(folder: Path, **arguments: Any) -> RnnSeq2SeqTrainer:
    """Each word follows from the one before and its place, so that a wrong word read leads astray."""
    torch.manual_seed(0)
    rows = []
    for word in torch.randint(3, 13, (64,)).tolist():
        labels = [word]
        for step in range(1, 6):
            labels.append(3 + (labels[-1] * 3 + step) % 10)
        rows.append({"input_ids": [word, 3], "labels": labels})
    config = RnnSeq2SeqConfig(
        vocab_size=13, embedding_size=12, hidden_size=16, dropout=0, embedding_dropout=0, output_dropout=0
    )
    defaults = {"per_device_train_batch_size": 16, "max_steps": 40, "learning_rate": 0.02, "save_strategy": "no"}
    return RnnSeq2SeqTrainer(
        model=RnnSeq2SeqForConditionalGeneration(config),
        args=make_arguments(folder, **{**defaults, **arguments}),
        train_dataset=Dataset.from_list(rows),
        data_collator=default_data_collator,
    )


def free_running_loss(trainer: RnnSeq2SeqTrainer) -> float:
    batch = default_data_collator(list(trainer.train_dataset))
    model = trainer.model.eval()
    with torch.no_grad():
        return model(**batch, scheduled_sampling=ScheduledSampling(1.0)).loss.item()


def test_training_narrows_the_gap_to_free_running(tmp_path: Path) -> None:
    teacher = counting_trainer(tmp_path / "teacher")
    teacher.train()
    own = counting_trainer(
        tmp_path / "own",
        scheduled_sampling="linear",
        scheduled_sampling_end=20,
        scheduled_sampling_rate=0.8,
    )
    own.train()
    assert free_running_loss(own) < free_running_loss(teacher)
