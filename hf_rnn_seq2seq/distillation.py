"""
Knowledge distillation: a model learns from what others, trained before, think of every word.

Shapes: B batch, T target, W words with a probability: the vocabulary, or more for a head that copies.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel

from .ensemble import RnnSeq2SeqEnsemble, check_members
from .losses import IGNORED, entropy, reduce_loss
from .normalizers import NORMALIZERS


def distillation_loss(
    scores: torch.Tensor,
    log_q: torch.Tensor,
    labels: torch.Tensor,
    normalizer: str = "softmax",
    temperature: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    How far the model is from its teacher after the same prefix (Hinton et al. 2015, section 2; word by word for
    sequences Kim & Rush 2016, section 3.1):

        tau^2 ((p - q)^T z / tau + H(p) - H(q)),  p = softmax(z / tau),  q = softmax((log q) / tau)

    which is tau^2 KL(q || p), their cross entropy but for the teacher's entropy, which no gradient comes from. tau^2
    keeps gradients, tau (p - q), as large as they are at tau = 1. With sparsemax or entmax15 for the softmax, and its
    own H, it is the Fenchel-Young loss with q for the label (Blondel et al. 2020, definition 2).

    Args:
        scores: z, [B, T, W].
        log_q: the teacher's log-probabilities, [B, T, W]; no gradient goes into them.
        labels: [B, T]; positions of -100 have no loss.
        normalizer: what makes probabilities of the model's scores, a key of `NORMALIZERS`.
        temperature: tau.
        num_items_in_batch: the loss is the mean over the labels, or if this is given the sum divided by it.
    """
    labelled = labels.to(scores.device) != IGNORED
    z, log_q = (
        each[labelled].to(torch.promote_types(each.dtype, torch.float32)) / temperature
        for each in (scores, log_q.detach())
    )  # [N, W]
    z = z - z.amax(-1, keepdim=True).detach()  # p - q sums to zero, so that this changes nothing
    with torch.no_grad():  # p maximises p^T z + H(p): no gradient comes through it
        p, q = NORMALIZERS[normalizer](z, None), torch.softmax(log_q, dim=-1)
        entropies = entropy(p, normalizer) - entropy(q, normalizer)
    # A word that neither gives any probability has no part in it, whatever its score.
    losses = temperature**2 * (((p - q) * z.masked_fill((p == 0) & (q == 0), 0)).sum(-1) + entropies)
    return reduce_loss(losses, torch.ones_like(losses, dtype=torch.bool), num_items_in_batch)


class Teacher:
    """
    Trained models whose probabilities are averaged, and that stay as they are.

    Args:
        names: their folders, or names on the Hub.
        student: the model to teach.
        tokenizer: the student's, if it is known: the teachers' must have the same vocabularies.
        device: where they compute.

    Raises:
        ValueError: models or tokenizers that don't fit the student; names the teacher and what differs.
    """

    def __init__(
        self, names: Sequence[str], student: PreTrainedModel, tokenizer: Any, device: torch.device | str = "cpu"
    ):
        self.model: Any = RnnSeq2SeqEnsemble.from_pretrained(list(names)).eval().requires_grad_(False)
        self.model.to(student.device)
        for name, member in zip(names, self.model.members, strict=True):
            try:
                check_members([cast(Any, student), member])
            except ValueError as error:
                raise ValueError(f"distillation_teachers: {name} does not fit the model. {error}") from None
            if tokenizer is not None and vocabularies(AutoTokenizer.from_pretrained(name)) != vocabularies(tokenizer):
                raise ValueError(
                    f"distillation_teachers: {name} has another vocabulary than the model; give both one tokenizer."
                )
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        """log q of every word after the labels before it, [B, T, W]; `inputs` are the student's."""
        known = signature(self.model.forward).parameters.keys() - {"labels"}  # of which it would make a loss
        read = {name: value for name, value in inputs.items() if name in known}
        if "decoder_input_ids" not in read:
            read["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        return cast(torch.Tensor, self.model(**read, use_cache=False).logits)


def vocabularies(tokenizer: Any) -> list[dict[str, int]]:
    """Of both sides, which may be one."""
    sides = [getattr(tokenizer, side, tokenizer) for side in ("source_tokenizer", "target_tokenizer")]
    return [side.get_vocab() for side in sides]
