"""Copying source words, in and outside the vocabulary: the model and generate(); and the output side of the model."""

from typing import Any

import pytest
import torch
from models import VOCABULARY, ragged_batch, tiny_model
from transformers.trainer_pt_utils import LabelSmoother

from hf_rnn_seq2seq import RnnSeq2SeqForConditionalGeneration
from hf_rnn_seq2seq.losses import coverage_loss, log_probabilities, token_loss

LENGTHS = [6, 2, 4]


def make_model(**setting: Any) -> RnnSeq2SeqForConditionalGeneration:
    return tiny_model(head_type="pointer_generator", **setting)


def copying_batch(side: str = "right") -> dict[str, torch.Tensor]:
    """Source ids below 11, of two vocabularies; some words are outside the target's, one of them twice."""
    source, mask = ragged_batch(LENGTHS, side)
    copy_ids = source.clone()
    for row in range(len(LENGTHS)):
        first = int(mask[row].argmax())
        copy_ids[row, first] = VOCABULARY
        copy_ids[row, first + LENGTHS[row] - 1] = VOCABULARY
        if LENGTHS[row] > 3:
            copy_ids[row, first + 1] = VOCABULARY + 1
    return {"input_ids": source, "attention_mask": mask, "copy_ids": copy_ids}


def row_of(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    keep = batch["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, keep] for name, tensor in batch.items()}


TARGET = torch.tensor([[4, VOCABULARY, VOCABULARY + 1, 5], [VOCABULARY, 6, 2, 9], [8, VOCABULARY + 1, 3, 2]])

# Of each kind that there is of them: attention that sums to one and that does not, with and without feedback.
KINDS: list[dict[str, Any]] = [
    {},
    {"wiring_type": "output_only", "attention_type": "general", "decoder_layers": 2},
    {"wiring_type": "bahdanau", "attention_type": "multi_head", "attention_heads": 2},
    {"wiring_type": "context_feeding", "attention_coverage": True},
    {"attention_type": "local_p"},
    {"attention_type": "monotonic"},
    {"attention_normalizer": "sparsemax"},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_probabilities_sum_to_one(kind: dict[str, Any]) -> None:
    model = make_model(source_vocab_size=11, **kind)
    logits = model(**copying_batch(), decoder_input_ids=TARGET).logits
    assert logits.shape == (3, 4, VOCABULARY + max(LENGTHS))
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("kind", KINDS[:4], ids=str)
def test_a_row_does_not_depend_on_its_batch(kind: dict[str, Any], side: str) -> None:
    model = make_model(source_vocab_size=11, **kind)
    batch = copying_batch(side)
    at_padding = torch.randint(0, VOCABULARY + 6, batch["copy_ids"].shape)
    batch["copy_ids"] = batch["copy_ids"].where(batch["attention_mask"].bool(), at_padding)  # any id will do
    logits = model(**batch, decoder_input_ids=TARGET).logits
    for row, length in enumerate(LENGTHS):
        alone = model(**row_of(batch, row), decoder_input_ids=TARGET[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row, :, : VOCABULARY + length], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["right", "left"])
def test_one_vocabulary_copies_its_input(side: str) -> None:
    model = make_model()
    source, mask = ragged_batch(LENGTHS, side)
    target = TARGET.clamp(max=VOCABULARY - 1)
    logits = model(source, mask, decoder_input_ids=target).logits
    assert logits.shape[-1] == VOCABULARY
    extended = model(source, mask, decoder_input_ids=target, copy_ids=source).logits
    torch.testing.assert_close(extended[..., :VOCABULARY], logits, rtol=0, atol=1e-12)
    assert (extended[..., VOCABULARY:] < -87).all()


def test_the_decoder_reads_the_unknown_word_for_what_is_outside() -> None:
    model = make_model(source_vocab_size=11, unk_token_id=7)
    batch = copying_batch()
    outside = model(**batch, decoder_input_ids=TARGET).logits
    unknown = model(**batch, decoder_input_ids=TARGET.where(TARGET < VOCABULARY, 7)).logits
    assert torch.equal(outside, unknown)
    labels = torch.cat((TARGET[:, 1:], torch.full((3, 1), -100)), dim=1)
    from_labels = model(**batch, labels=labels)
    shifted = torch.cat((torch.ones_like(labels[:, :1]), labels[:, :-1]), dim=1)
    assert torch.equal(from_labels.logits, model(**batch, decoder_input_ids=shifted).logits)
    chosen = from_labels.logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = -chosen[labels != -100].mean()
    torch.testing.assert_close(from_labels.loss.double(), expected, rtol=1e-5, atol=0)


def test_step_is_sequence() -> None:
    model, batch = make_model(source_vocab_size=11), copying_batch()
    whole = model(**batch, decoder_input_ids=TARGET).logits
    cache, steps = None, []
    for token in TARGET.unbind(1):
        output = model(**batch, decoder_input_ids=token.unsqueeze(1), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-10)


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "processors": {
        "num_beams": 2,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_length": 3,
        "bad_words_ids": [[5], [4, 6]],
        "renormalize_logits": True,
    },
}


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_generate_returns_extended_ids(search: str) -> None:
    model, batch = make_model(source_vocab_size=11), copying_batch("left")
    options = {**SEARCHES[search], "max_new_tokens": 7}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(**batch, **options, use_cache=use_cache))
    assert torch.equal(*found)
    assert (found[0] >= VOCABULARY).any(), "this search has copied nothing, and tests nothing"
    assert (found[0] < VOCABULARY + 2).all()
    if "do_sample" not in options:
        n = options.get("num_return_sequences", 1)
        for row in range(3):
            alone = model.generate(**row_of(batch, row), **options)
            assert torch.equal(alone, found[0][row * n : (row + 1) * n, : alone.size(1)])


@pytest.mark.parametrize(("beams", "normalize"), [(1, False), (1, True), (3, False)])
def test_transition_scores_of_an_extended_vocabulary(beams: int, normalize: bool) -> None:
    model, batch = make_model(source_vocab_size=11), copying_batch()
    options: dict[str, Any] = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0}
    output = model.generate(**batch, **options, max_new_tokens=5, return_dict_in_generate=True, output_scores=True)
    beam_indices = output.beam_indices if beams > 1 else None
    scores = model.compute_transition_scores(output.sequences, output.scores, beam_indices, normalize)
    repeated = {name: tensor.repeat_interleave(beams, dim=0) for name, tensor in batch.items()}
    log_p = model(**repeated, decoder_input_ids=output.sequences[:, :-1]).logits
    expected = log_p.gather(-1, output.sequences[:, 1:].unsqueeze(-1)).squeeze(-1)
    before_end = (output.sequences[:, :-1] == 2).cumsum(1) == 0
    totals = (expected * before_end).sum(1)
    torch.testing.assert_close(scores.sum(1) if beams == 1 else output.sequences_scores, totals.to(scores))
    if beams == 1:
        torch.testing.assert_close(scores * before_end, (expected * before_end).to(scores))
    assert model.config.vocab_size == VOCABULARY


def test_refusals() -> None:
    batch = copying_batch()
    plain = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "decoder_input_ids": TARGET}
    two = make_model(source_vocab_size=11)
    with pytest.raises(ValueError, match=r"needs `copy_ids`.*two vocabularies.*copies_source=True"):
        two(**plain)
    with pytest.raises(ValueError, match=r"needs `copy_ids`"):
        two.generate(batch["input_ids"])
    with pytest.raises(ValueError, match=r"`copy_ids` must have the source's shape .* = \(3, 6\), got \(3, 5\)"):
        two(**plain, copy_ids=batch["copy_ids"][:, 1:])
    one = make_model()
    embeds = one.get_encoder().get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match=r"needs `copy_ids`.*no `input_ids`"):
        one(inputs_embeds=embeds, decoder_input_ids=TARGET)
    given = one(inputs_embeds=embeds, decoder_input_ids=TARGET, copy_ids=batch["copy_ids"]).logits
    read = one(batch["input_ids"], decoder_input_ids=TARGET, copy_ids=batch["copy_ids"]).logits
    assert torch.equal(given, read)
    linear = tiny_model(source_vocab_size=11)
    with pytest.raises(ValueError, match=r"`copy_ids` is for a head that copies.*'linear'"):
        linear(**plain, copy_ids=batch["copy_ids"])


def test_bfloat16_and_gradients() -> None:
    model, batch = make_model(source_vocab_size=11), copying_batch()
    exact = model(**batch, labels=TARGET).loss
    low = model.bfloat16()(**batch, labels=TARGET)
    assert low.logits.dtype == torch.float32
    torch.testing.assert_close(low.loss, exact, rtol=0.1, atol=0.1)
    low.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.head.gate.weight.grad.abs().sum() > 0


def test_source_of_nothing_but_padding_is_not_copied() -> None:
    model, batch = make_model(source_vocab_size=11).train(), copying_batch()
    batch["attention_mask"][1] = 0
    output = model(**batch, labels=TARGET.clamp(max=VOCABULARY - 1))
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64), rtol=0, atol=1e-10)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# The output side of the model: normaliser and coverage.


@pytest.mark.parametrize("normalizer", ["sparsemax", "entmax15"])
@pytest.mark.parametrize("head_type", ["linear", "deep"])
def test_other_normalizers_give_their_loss_and_log_probabilities(normalizer: str, head_type: str) -> None:
    model = tiny_model(head_type=head_type, output_normalizer=normalizer)
    scores = tiny_model(head_type=head_type)
    source, mask = ragged_batch(LENGTHS)
    labels = TARGET.clamp(max=VOCABULARY - 1).index_fill(1, torch.tensor([3]), -100)
    raw = scores(source, mask, labels=labels).logits
    output = model(source, mask, labels=labels, num_items_in_batch=5)
    torch.testing.assert_close(output.logits, log_probabilities(raw, normalizer))
    assert output.logits.requires_grad
    torch.testing.assert_close(output.loss, token_loss(raw, labels, normalizer, 5))
    torch.testing.assert_close(output.logits.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(
            model(source, mask, decoder_input_ids=labels.clamp(min=0)).logits.exp().sum(),
            12.0 * torch.ones((), dtype=torch.float64),
        )


def test_softmax_keeps_the_models_loss_function() -> None:
    model, batch = make_model(source_vocab_size=11), copying_batch()
    seen = {}

    def loss_function(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **options: Any) -> torch.Tensor:
        seen.update(options, vocab_size=vocab_size)
        return logits.sum() * 0 + 5

    model.loss_function = loss_function
    assert model(**batch, labels=TARGET, num_items_in_batch=7).loss == 5
    assert seen == {"vocab_size": VOCABULARY + 6, "num_items_in_batch": 7}


@pytest.mark.parametrize("setting", [{"head_type": "pointer_generator"}, {"output_normalizer": "entmax15"}], ids=str)
def test_coverage_loss_is_added(setting: dict[str, Any]) -> None:
    batch = copying_batch()
    if "head_type" not in setting:
        del batch["copy_ids"]
    labels = TARGET.clamp(max=VOCABULARY - 1)
    without = tiny_model(source_vocab_size=11, **setting)(**batch, labels=labels, output_attentions=True)
    model = tiny_model(source_vocab_size=11, coverage_loss_weight=0.5, **setting)
    added = model(**batch, labels=labels).loss - without.loss
    coverage = coverage_loss(without.cross_attentions[0], labels)
    assert coverage > 0.1
    torch.testing.assert_close(added.double(), coverage / 2, rtol=1e-5, atol=1e-6)


def test_no_coverage_builds_up_before_the_first_token() -> None:
    model, batch = make_model(source_vocab_size=11, coverage_loss_weight=1.0), copying_batch()
    ids = torch.cat((torch.ones(3, 1, dtype=torch.long), TARGET[:, :-1]), dim=1)
    plain = model(**batch, decoder_input_ids=ids, labels=TARGET).loss
    pad = torch.zeros(3, 2, dtype=torch.long)
    padded = model(
        **batch,
        decoder_input_ids=torch.cat((pad, ids), dim=1),
        decoder_attention_mask=torch.cat((pad, torch.ones_like(ids)), dim=1),
        labels=torch.cat((pad - 100, TARGET), dim=1),
    ).loss
    torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize("extended", [False, True], ids=["one vocabulary", "extended"])
def test_label_smoothing(extended: bool) -> None:
    """transformers' smoother sees log-probabilities, all finite, over the extended vocabulary."""
    model, batch = make_model(), copying_batch()
    labels = TARGET if extended else TARGET.clamp(max=VOCABULARY - 1)
    if not extended:
        del batch["copy_ids"]
    outputs = model(**batch, decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels))
    loss = LabelSmoother(epsilon=0.1)(outputs, labels)
    log_p = outputs.logits
    expected = 0.9 * -log_p.gather(-1, labels.unsqueeze(-1)).mean() + 0.1 * -log_p.mean()
    torch.testing.assert_close(loss, expected)
