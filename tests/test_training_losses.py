"""Further losses: values and gradients against plain loops in float64."""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCABULARY, batch_of, ragged_batch, tiny_model
from transformers import DataCollatorForSeq2Seq
from transformers.trainer_pt_utils import LabelSmoother

from hf_rnn_seq2seq.data import DataArguments, DataError, load_data, prepare_data
from hf_rnn_seq2seq.losses import smoothing_loss, token_loss
from hf_rnn_seq2seq.minimum_risk import (
    Costs,
    MinimumRisk,
    expected_costs,
    make_candidates,
    minimum_risk_loss,
    text_cost,
)
from hf_rnn_seq2seq.normalizers import NORMALIZERS
from hf_rnn_seq2seq.tokenizer_training import TokenizerArguments, build_tokenizer
from hf_rnn_seq2seq.training_losses import (
    AlignmentCollator,
    BigramModel,
    guided_alignment_loss,
    r_drop_loss,
    unlikelihood_loss,
)

LABELS = torch.tensor([[4, 5, 4, 4], [6, 2, -100, -100], [-100, 7, 5, 7]])
COUNT = 9  # labels that are not ignored


def scores_of(seed: int = 0, words: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, words, generator=generator, dtype=torch.float64).mul(2).requires_grad_()


def labelled() -> list[tuple[int, int]]:
    return [(b, t) for b in range(3) for t in range(4) if LABELS[b, t] != -100]


def same_values_and_gradients(found: torch.Tensor, wanted: torch.Tensor, leaf: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)
    pair = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*pair, atol=1e-10, rtol=0)


# Label smoothing.


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_smoothed_labels_have_the_gradient_p_minus_q(normalizer: str) -> None:
    scores, epsilon = scores_of(), 0.3
    loss = token_loss(scores, LABELS, normalizer) + epsilon * smoothing_loss(scores, LABELS, 8)
    (gradient,) = torch.autograd.grad(loss, scores)
    p = NORMALIZERS[normalizer](scores.detach(), None)
    expected = torch.zeros_like(p)
    for b, t in labelled():
        q = torch.full((8,), epsilon / 8, dtype=torch.float64)
        q[LABELS[b, t]] += 1 - epsilon
        expected[b, t] = (p[b, t] - q) / COUNT
    torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=0)  # cross entropy is in float32


def test_smoothing_of_a_softmax_is_that_of_transformers() -> None:
    scores = scores_of()
    for number in (None, 20):
        expected = LabelSmoother(epsilon=0.2)({"logits": scores}, LABELS, num_items_in_batch=number)
        loss = token_loss(scores, LABELS, "softmax", number) + 0.2 * smoothing_loss(scores, LABELS, 8, number)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_smoothing_of_a_copying_head_leaves_out_slots_that_no_word_uses() -> None:
    model = tiny_model(head_type="pointer_generator", source_vocab_size=11)
    source = torch.tensor([[4, 5, 6, 7, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    copy_ids = torch.tensor([[VOCABULARY, 5, VOCABULARY + 2, VOCABULARY, VOCABULARY + 4]])  # the last one at padding
    labels = torch.tensor([[VOCABULARY, 5, 2]])
    output = model(input_ids=source, attention_mask=mask, copy_ids=copy_ids, labels=labels, smoothing=0.1)
    log_p = output.logits[0]
    real = [*range(VOCABULARY), VOCABULARY, VOCABULARY + 2]
    assert output.logits.size(-1) == VOCABULARY + 5
    expected = sum(log_p[t, labels[0, t]] - log_p[t, real].mean() for t in range(3)) / 3
    torch.testing.assert_close(output.smoothing_loss, expected, atol=1e-10, rtol=0)
    plain = model(input_ids=source, attention_mask=mask, copy_ids=copy_ids, labels=labels)
    assert plain.smoothing_loss is None
    torch.testing.assert_close(output.loss, plain.loss + 0.1 * expected, atol=1e-6, rtol=0)


# Guided alignment.


def attention(heads: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, heads, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    return scores, scores.softmax(-1)


def test_guided_alignment_is_the_cross_entropy_with_the_mean_of_the_heads() -> None:
    scores, weights = attention()
    links = [[(0, 0), (2, 0), (1, 2)], [(3, 1)], [(4, 3), (0, 1)]]  # source, target
    alignments = torch.zeros(3, 4, 5)
    plain = torch.zeros((), dtype=torch.float64)
    for b, pairs in enumerate(links):
        for s, t in pairs:
            alignments[b, t, s] = 1
        for t in range(4):
            places = [s for s, other in pairs if other == t]
            for s in places:
                plain = plain - torch.log((weights[b, 0, t, s] + weights[b, 1, t, s]) / 2) / len(places)
    alignments /= alignments.sum(-1, keepdim=True).clamp(min=1)
    same_values_and_gradients(guided_alignment_loss(weights, alignments, LABELS), plain / COUNT, scores)
    same_values_and_gradients(guided_alignment_loss(weights, alignments, LABELS, 30), plain / 30, scores)
    zero = torch.zeros(3, 1, 4, 5, requires_grad=True)
    guided_alignment_loss(zero, alignments, LABELS).backward()
    assert (zero.grad == 0).all()  # finite, and nothing to learn from


@pytest.mark.parametrize("side", ["right", "left"])
def test_collator_places_links_among_padding(side: str) -> None:
    def pad(row: list[int], length: int, value: int) -> torch.Tensor:
        missing = [value] * (length - len(row))
        return torch.tensor(row + missing if side == "right" else missing + row)

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.stack([pad(row["input_ids"], 4, 0) for row in features]),
            "attention_mask": torch.stack([pad([1] * len(row["input_ids"]), 4, 0) for row in features]),
            "labels": torch.stack([pad(row["labels"], 3, -100) for row in features]),
        }

    rows: list[dict[str, Any]] = [
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6], "alignments": [[0, 0], [3, 0], [1, 1]]},
        {"input_ids": [5, 6], "labels": [5, 6, 7], "alignments": [[1, 2]]},
        {"input_ids": [5], "labels": [5], "alignments": []},
    ]
    found = AlignmentCollator(collate)(rows)["alignments"]
    expected = torch.zeros(3, 3, 4)
    t, s = (0, 0) if side == "right" else (1, 2)
    expected[0, t, 0] = expected[0, t, 3] = 0.5
    expected[0, t + 1, 1] = 1
    expected[1, 2, s + 1] = 1
    assert torch.equal(found, expected)
    for link, said in (([2, 0], "source has 2 tokens"), ([0, 3], "target has 3 tokens"), ([-1, 0], "-1-0")):
        with pytest.raises(ValueError, match=said):
            AlignmentCollator(collate)([rows[0], {**rows[1], "alignments": [link]}])
    assert "alignments" not in AlignmentCollator(collate)([{k: rows[0][k] for k in ("input_ids", "labels")}])


def test_alignments_come_from_a_file(tmp_path: Path) -> None:
    """Through reading, splitting, tokenizing and the collator of the script."""
    (tmp_path / "train.tsv").write_text("".join(f"a{i} b\tx y{i} z\n" for i in range(8)), encoding="utf-8")
    path = tmp_path / "train.align"
    path.write_text("0-1 1-0\n" + "".join(f"{i % 2}-{i % 3}\n" for i in range(1, 7)) + "\n", encoding="utf-8")
    files: dict[str, Any] = {"train_file": str(tmp_path / "train.tsv"), "train_alignment_file": str(path)}
    arguments = DataArguments(**files, validation_split_percentage=30, test_split_percentage=0)
    data = load_data(arguments)
    kinds = TokenizerArguments(source_tokenizer_kind="symbols", target_tokenizer_kind="symbols")
    tokenizer = build_tokenizer(["b", *[f"a{i}" for i in range(8)]], ["x z", *[f"y{i}" for i in range(8)]], kinds)
    prepared = prepare_data(data, tokenizer, arguments, 99, 99).datasets["train"]
    assert 1 < len(prepared) < 8
    for row in prepared:
        number = int(row["source"][1])
        expected = {0: [[0, 1], [1, 0]], 7: []}.get(number, [[number % 2, number % 3]])
        assert row["alignments"] == expected
    rows = prepared.select_columns(["input_ids", "labels", "alignments"])
    batch = AlignmentCollator(DataCollatorForSeq2Seq(tokenizer))(list(rows))
    assert batch["alignments"].sum().item() == sum(len({t for _, t in row["alignments"]}) for row in prepared)
    whole = DataArguments(**files, validation_split_percentage=0, test_split_percentage=0)
    for line, said in (("0-9", "line 8: the link 0-9 is outside"), ("0:1", "line 8: '0:1' is no link")):
        path.write_text("0-0\n" * 7 + line + "\n", encoding="utf-8")
        with pytest.raises(DataError, match=said):
            prepare_data(load_data(whole), tokenizer, whole, 99, 99)
    path.write_text("0-0\n" * 7, encoding="utf-8")
    with pytest.raises(DataError, match="7 lines for 8 training rows"):
        load_data(arguments)
    with pytest.raises(DataError, match="train_alignment_file needs"):
        DataArguments(train_alignment_file=str(path))


# The transition penalty.


@settings(max_examples=40)
@given(
    targets=st.lists(st.lists(st.integers(2, 9), max_size=5), min_size=1, max_size=6).filter(any),
    smoothing=st.sampled_from([0.01, 1.0]),
    seed=st.integers(0, 100),
    wide=st.booleans(),
)
def test_transition_penalty_is_that_of_counting(
    targets: list[list[int]], smoothing: float, seed: int, wide: bool
) -> None:
    """Words 8 and 9 are outside of the vocabulary and count as 3."""

    def inside(word: int) -> int:
        return 3 if word >= 8 else word

    pairs: Counter[tuple[int, int]] = Counter()
    for row in targets:
        words = [1, *map(inside, row)]
        pairs.update(itertools.pairwise(words))
    scores = scores_of(seed, 10 if wide else 8)
    log_p, plain = scores.log_softmax(-1), torch.zeros((), dtype=torch.float64)
    for b, t in labelled():
        before = 1 if t == 0 or LABELS[b, t - 1] == -100 else inside(int(LABELS[b, t - 1]))
        total = sum(count for (v, _), count in pairs.items() if v == before)
        for word in range(log_p.size(-1)):
            p_next = (pairs[before, inside(word)] + smoothing) / (total + smoothing * 8)
            plain = plain - log_p[b, t, word].exp() * math.log(p_next)
    bigrams = BigramModel(targets, 8, 1, 3, smoothing)
    same_values_and_gradients(bigrams.penalty(log_p, LABELS), plain / COUNT, scores)
    same_values_and_gradients(bigrams.penalty(log_p, LABELS, torch.tensor(4)), plain / 4, scores)


def test_bigrams_of_many_rows_and_a_large_vocabulary() -> None:
    rows = [[word % 50_000 for word in range(start, start + 3)] for start in range(25_000)]
    bigrams = BigramModel(rows, 50_000, 1, 3, 0.5)
    assert len(bigrams.words) < 60_000  # not V^2
    p = torch.zeros(2, 50_000, dtype=torch.float64)
    p[0, 101], p[1, 7] = 1, 1
    found = bigrams.expected_penalty(p, torch.tensor([100, 100])).exp().reciprocal()
    torch.testing.assert_close(found, torch.tensor([2.5, 0.5], dtype=torch.float64) / (2 + 25_000))
    with pytest.raises(ValueError, match="no training targets"):
        BigramModel([], 8, 1, 3, 0.5)


# Unlikelihood.


def test_unlikelihood_is_that_of_sets() -> None:
    scores = scores_of()
    log_p, plain = scores.log_softmax(-1), torch.zeros((), dtype=torch.float64)
    for b, t in labelled():
        before = {int(word) for word in LABELS[b, :t] if word != -100} - {int(LABELS[b, t])}
        for word in before:
            plain = plain - torch.log(1 - log_p[b, t, word].exp())
    same_values_and_gradients(unlikelihood_loss(log_p, LABELS), plain / COUNT, scores)
    same_values_and_gradients(unlikelihood_loss(log_p, LABELS, 4), plain / 4, scores)
    certain = torch.full((1, 2, 8), -100.0).index_fill(2, torch.tensor([4]), 0.0)
    assert unlikelihood_loss(certain, torch.tensor([[4, 5]]), 1).item() == pytest.approx(-math.log(1e-5))


# R-Drop.


def negative_entropy(p: torch.Tensor, normalizer: str) -> torch.Tensor:
    """Omega(p) of the distribution whose argmax of p^T z - Omega(p) is the normaliser (Peters et al. 2019, eq. 3)."""
    if normalizer == "softmax":
        return (p * p.log()).sum()
    alpha = {"entmax15": 1.5, "sparsemax": 2.0}[normalizer]
    return (p**alpha - p).sum() / (alpha * (alpha - 1))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_r_drop_is_half_the_mean_divergence_of_both_directions(normalizer: str) -> None:
    scores = torch.cat([scores_of(seed) for seed in (0, 1)]).detach().requires_grad_()  # of both passes
    plain = torch.zeros((), dtype=torch.float64)
    for b, t in labelled():
        z_1, z_2 = scores[b, t], scores[3 + b, t]
        p_1, p_2 = (NORMALIZERS[normalizer](z, None) for z in (z_1, z_2))
        if normalizer == "softmax":
            both = (p_1 * (p_1 / p_2).log()).sum() + (p_2 * (p_2 / p_1).log()).sum()
        else:  # Omega*(z) + Omega(q) - q^T z, with Omega*(z) = p^T z - Omega(p)
            both = sum(
                p @ z - negative_entropy(p, normalizer) + negative_entropy(q, normalizer) - q @ z
                for p, z, q in ((p_1, z_1, p_2), (p_2, z_2, p_1))
            )
        plain = plain + both / 4
    labels = torch.cat((LABELS, LABELS))
    same_values_and_gradients(r_drop_loss(scores, labels, normalizer), plain / COUNT, scores)
    same_values_and_gradients(r_drop_loss(scores, labels, normalizer, 40), plain / 20, scores)


@pytest.mark.parametrize(
    "setting", [{}, {"output_normalizer": "sparsemax"}, {"head_type": "pointer_generator"}], ids=str
)
def test_scores_are_what_logits_are_made_of(setting: dict[str, Any]) -> None:
    model = tiny_model(**setting).eval()
    source, mask = ragged_batch([4, 1, 3])
    labels = torch.randint(4, VOCABULARY, (len(source), 3), generator=torch.Generator().manual_seed(0))
    output = model(source, attention_mask=mask, labels=labels, output_scores=True)
    p = NORMALIZERS[setting.get("output_normalizer", "softmax")](output.scores, None)
    logits = output.logits.softmax(-1) if not setting else output.logits.exp()
    torch.testing.assert_close(p, logits, atol=1e-10, rtol=0)
    assert model(source, attention_mask=mask, labels=labels).scores is None


# Minimum risk.


def test_expected_costs_are_those_of_the_formula() -> None:
    log_p = torch.tensor([[-1.0, -2.0, -7.0], [-3.0, -0.5, 9.0]], dtype=torch.float64, requires_grad=True)
    costs = torch.tensor([[0.0, 1.0, 4.0], [2.0, 3.0, 9.0]], dtype=torch.float64)
    there = torch.tensor([[True, True, True], [True, True, False]])
    rows = []
    for b, number in ((0, 3), (1, 2)):
        powers = [log_p[b, k].exp() ** 0.3 for k in range(number)]
        rows.append(sum(power * costs[b, k] for k, power in enumerate(powers)) / sum(powers))
    same_values_and_gradients(expected_costs(log_p, costs, there, 0.3).sum(), torch.stack(rows).sum(), log_p)


@pytest.mark.parametrize("setting", [{}, {"head_type": "pointer_generator", "source_vocab_size": 11}], ids=str)
@pytest.mark.parametrize("beam", [False, True])
def test_risk_is_the_expected_cost_over_the_candidates(
    setting: dict[str, Any], beam: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**setting).train()
    for name in ("dropout", "embedding_dropout", "output_dropout"):
        setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    source, mask = ragged_batch([4, 2, 3])
    inputs = batch_of(model, source, mask)
    labels = torch.tensor([[4, 5, 2], [6, 2, -100], [7, 8, 2]])
    risk = MinimumRisk(candidates=4, beam_search=beam, with_gold=True, sharpness=0.5)
    torch.manual_seed(2)
    candidates = make_candidates(model, inputs, labels, risk)
    assert model.training
    torch.manual_seed(2)
    found = minimum_risk_loss(model, inputs, labels, risk, Costs("edit_distance", None), 11)
    total = torch.zeros((), dtype=torch.float64)
    for b, rows in enumerate(candidates):
        gold = [word for word in labels[b].tolist() if word != -100]
        assert rows[0] == gold
        assert 1 < len(rows) <= 5
        assert len({tuple(row) for row in rows}) == len(rows)
        powers, costs = [], []
        for row in rows:
            assert 2 not in row[:-1]
            alone = {name: tensor[b : b + 1] for name, tensor in inputs.items()}
            log_p = model(**alone, labels=torch.tensor([row])).logits.log_softmax(-1)[0]
            powers.append(sum(log_p[t, word] for t, word in enumerate(row)).mul(0.5).exp())
            costs.append(edit_distance([w for w in row if w not in (0, 1, 2)], [w for w in gold if w != 2]))
        total = total + sum(q * cost for q, cost in zip(powers, costs, strict=True)) / sum(powers)
    torch.testing.assert_close(found, total / 11, atol=1e-10, rtol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found, parameters, allow_unused=True),
        torch.autograd.grad(total / 11, parameters, allow_unused=True),
        strict=True,
    ):
        if other is not None:
            torch.testing.assert_close(one, other, atol=1e-10, rtol=0)


def edit_distance(a: list[int], b: list[int]) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(edit_distance(a[1:], b) + 1, edit_distance(a, b[1:]) + 1, edit_distance(a[1:], b[1:]) + (a[0] != b[0]))


def length_difference(candidate: str, reference: str) -> float:
    return float(abs(len(candidate) - len(reference)))


class Spelling:
    """A tokenizer as far as costs need one: ids are code points."""

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(chr(word) for word in row if word > 2) for row in rows]


def test_costs_of_texts() -> None:
    from sacrebleu import sentence_bleu, sentence_chrf

    texts, gold = ["the cat sat on the mat", "a cat", ""], "the cat sat on a mat"
    ids = [[*map(ord, text), 2] for text in texts]
    for name, function in (("bleu", sentence_bleu), ("chrf", sentence_chrf)):
        found = Costs(name, Spelling())(ids, [*map(ord, gold), 2], {2})  # type: ignore[arg-type]
        assert found == pytest.approx([1 - function(text, [gold]).score / 100 for text in texts])
        assert text_cost(name)(gold, gold) == pytest.approx(0)
    own = f"{__name__}.length_difference"
    assert Costs(own, Spelling())(ids, [*map(ord, gold), 2], {2}) == [2, 15, 20]  # type: ignore[arg-type]
    for name, said in (("blue", "edit_distance, bleu, chrf"), ("math.pie", "pie"), ("math.pi", "function")):
        with pytest.raises(ValueError, match=said):
            text_cost(name)
    with pytest.raises(ValueError, match="processing_class"):
        Costs("chrf", None)
