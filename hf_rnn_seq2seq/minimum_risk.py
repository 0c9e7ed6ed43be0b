"""
Minimum risk training (Shen et al. 2016): the expected cost of a sentence's candidates is made small.

Shapes: B batch, K candidates, T target.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from rapidfuzz.distance import Levenshtein
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .losses import IGNORED, reduce_loss
from .training_losses import output_log_probabilities

# The cost of a candidate's text by a reference's.
TextCost = Callable[[str, str], float]

COSTS = ("edit_distance", "bleu", "chrf")
# What a model's encoder reads; the rest is for its decoder.
ENCODER_INPUTS = ("input_ids", "attention_mask", "inputs_embeds")


class MinimumRisk(NamedTuple):
    """
    Args:
        candidates: K, how many the model makes for each sentence.
        beam_search: whether they are the n best of a beam search, or samples.
        with_gold: whether the label is a candidate, too.
        sharpness: alpha.
    """

    candidates: int
    beam_search: bool
    with_gold: bool
    sharpness: float


def text_cost(name: str) -> TextCost:
    """
    `bleu` and `chrf`, 1 minus sacrebleu's sentence score (from 0 to 1), or a function of that kind by its place, as
    `package.module.function`.

    Raises:
        ValueError: there is no such function.
    """
    if name in ("bleu", "chrf"):
        from sacrebleu.metrics import BLEU, CHRF

        metric = BLEU(effective_order=True) if name == "bleu" else CHRF()
        return lambda candidate, reference: 1 - metric.sentence_score(candidate, [reference]).score / 100
    module, _, function = name.replace(":", ".").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"minimum_risk_cost={name!r}: {error}") from error
    if not callable(found):
        raise ValueError(
            f"minimum_risk_cost={name!r}: must be one of {', '.join(COSTS)}, or name a function of a candidate's and "
            "a reference's text as package.module.function"
        )
    return cast(TextCost, found)


class Costs:
    """
    What candidates cost: `edit_distance` in tokens (insertions, deletions and substitutions, special tokens left
    out), others on texts as `text_cost`. In these a word that was copied from outside of the vocabulary is the
    unknown one.

    Args:
        name: see above.
        tokenizer: makes texts of token ids.

    Raises:
        ValueError: an unknown cost, or no tokenizer for a cost of texts.
    """

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase | None):
        self.tokenizer = tokenizer
        self.cost = None if name == "edit_distance" else text_cost(name)
        if self.cost is not None and tokenizer is None:
            raise ValueError(f"minimum_risk_cost={name!r}: texts need the Trainer's `processing_class`, a tokenizer")

    def __call__(self, candidates: Sequence[Sequence[int]], label: Sequence[int], special: set[int]) -> list[float]:
        """Token ids of one sentence's candidates and of its label -> costs."""
        if self.cost is None or self.tokenizer is None:
            gold, *others = ([word for word in row if word not in special] for row in (label, *candidates))
            return [float(Levenshtein.distance(gold, other)) for other in others]
        rows = [list(label), *map(list, candidates)]
        gold_text, *texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [self.cost(text, gold_text) for text in texts]


def special_ids(model: PreTrainedModel) -> tuple[set[int], set[int]]:
    """Ids that end a sequence; these and the other special ones."""
    eos = model.config.eos_token_id
    ends = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    others = {model.config.pad_token_id, model.config.bos_token_id, model.config.decoder_start_token_id} - {None}
    return ends, ends | others


def make_candidates(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor, risk: MinimumRisk
) -> list[list[list[int]]]:
    """
    Each sentence's distinct candidates, without a start token and up to the first end of sequence.

    They may be half as long again as the batch's longest label. Dropout is off while they are made.
    """
    how: dict[str, Any] = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if risk.beam_search:
        how = {"do_sample": False, "num_beams": risk.candidates}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            sequences = cast(Any, model).generate(
                **inputs,
                **how,
                num_return_sequences=risk.candidates,
                max_length=labels.size(1) * 3 // 2 + 2,
                return_dict_in_generate=False,
            )
    finally:
        model.train(training)
        torch.clear_autocast_cache()  # of weights that were cast without a gradient
    ends, _ = special_ids(model)
    found: list[list[list[int]]] = []
    for number, (label, rows) in enumerate(
        zip(labels.tolist(), sequences.view(labels.size(0), risk.candidates, -1)[..., 1:].tolist(), strict=True)
    ):
        gold = [[word for word in label if word != IGNORED]] if risk.with_gold else []
        cut = [row[: next((i + 1 for i, word in enumerate(row) if word in ends), len(row))] for row in rows]
        found.append([])
        for row in (*gold, *cut):
            if row not in found[number]:
                found[number].append(row)
    return found


def expected_costs(log_p: torch.Tensor, costs: torch.Tensor, there: torch.Tensor, sharpness: float) -> torch.Tensor:
    """
    sum_y Q(y) cost(y), Q(y) = P(y)^alpha / sum_y' P(y')^alpha (Shen et al. 2016, section 3).

    Args:
        log_p: log P of the candidates, [B, K].
        costs: [B, K].
        there: false where a sentence has fewer than K candidates, [B, K].
        sharpness: alpha.

    Returns:
        [B].
    """
    q = torch.softmax((sharpness * log_p).masked_fill(~there, -torch.inf), dim=-1)
    return (q * costs).sum(-1)


def repeated(tensors: Mapping[str, torch.Tensor], numbers: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows [B, ..] of what there is, each so many times, [sum of numbers, ..]."""
    return {name: tensor.repeat_interleave(numbers, dim=0) for name, tensor in tensors.items()}


def minimum_risk_loss(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    labels: torch.Tensor,
    risk: MinimumRisk,
    costs: Costs,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    The sum of the sentences' expected costs divided by the number of labels: as in Shen et al. (2016) each
    sentence counts alike, and the sum of -log P(y | x), the usual loss, is divided by the same. With the edit
    distance it is an expected error rate.

    A candidate that was cut off at its greatest length has the probability of what there is of it.

    Args:
        model: makes and scores the candidates.
        inputs: what its encoder reads, with B rows each.
        labels: [B, T].
        risk: which candidates, and alpha.
        costs: of a candidate.
        num_items_in_batch: the number of labels in all of an accumulated batch.
    """
    candidates = make_candidates(model, inputs, labels, risk)
    _, special = special_ids(model)
    numbers = torch.tensor([len(rows) for rows in candidates], device=labels.device)
    flat = pad_sequence(
        [torch.tensor(row, dtype=torch.long) for rows in candidates for row in rows],
        batch_first=True,
        padding_value=IGNORED,
    ).to(labels.device)  # the sentences' candidates one after another, [sum of numbers, T]
    # A source is encoded once, however many candidates it has.
    encoder_inputs = {name: inputs[name] for name in ENCODER_INPUTS if name in inputs}
    encoded = cast(Any, model).get_encoder()(**encoder_inputs, output_hidden_states=False, output_attentions=False)
    others = {name: tensor for name, tensor in inputs.items() if name not in ENCODER_INPUTS}
    shifted = cast(Any, model).prepare_decoder_input_ids_from_labels(flat)
    outputs = model(
        **repeated(others, numbers),
        encoder_outputs=type(encoded)(**repeated(encoded, numbers)),
        decoder_input_ids=shifted,
        use_cache=False,
    )
    log_p = output_log_probabilities(outputs.logits, model.config)
    words = log_p.gather(2, flat.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(flat == IGNORED, 0)

    there = torch.arange(int(numbers.max()), device=labels.device) < numbers.unsqueeze(1)  # [B, K]
    sentence_log_p = words.new_zeros(there.shape).masked_scatter(there, words.sum(-1))
    gold = [[word for word in label if word != IGNORED] for label in labels.tolist()]
    cost = [torch.tensor(costs(rows, label, special)) for rows, label in zip(candidates, gold, strict=True)]
    cost_matrix = pad_sequence(cost, batch_first=True).to(sentence_log_p)
    risks = expected_costs(sentence_log_p, cost_matrix, there, risk.sharpness)  # [B]
    count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return reduce_loss(risks, (labels != IGNORED).any(-1), count)
