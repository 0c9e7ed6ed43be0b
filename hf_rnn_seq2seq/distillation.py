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
from .losses import IGNORED, reduce_loss


def distillation_loss(
    log_p: torch.Tensor,
    log_q: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    How far the model is from its teacher after the same prefix (Hinton et al. 2015, section 2; word by word for
    sequences Kim & Rush 2016, section 3.1):

        tau^2 KL(q' || p') = tau^2 sum_w q'(w) (log q'(w) - log p'(w)),  p' = p^(1 / tau) / Z, q' likewise

    That is their cross entropy but for the teacher's entropy, which no gradient comes from; tau^2 keeps gradients as
    large as they are at tau = 1.

    Args:
        log_p: the model's log-probabilities [B, T, W].
        log_q: the teacher's, [B, T, W]; no gradient goes into them.
        labels: [B, T]; positions of -100 have no loss.
        temperature: tau.
        num_items_in_batch: the loss is the mean over the labels, or if this is given the sum divided by it.
    """
    labelled = labels.to(log_p.device) != IGNORED
    dtype = torch.promote_types(log_p.dtype, torch.float32)
    log_p, log_q = (
        torch.log_softmax(each[labelled].to(dtype) / temperature, dim=-1) for each in (log_p, log_q.detach())
    )  # [N, W]
    q = log_q.exp()
    # A word without any probability has no part in it, as q log q = 0.
    losses = temperature**2 * (torch.xlogy(q, q) - (q * log_p).masked_fill(q == 0, 0)).sum(-1)
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
        normalizer = getattr(student.config, "output_normalizer", "softmax")
        if normalizer != "softmax":
            raise ValueError(
                f"distillation_weight: with output_normalizer={normalizer!r} words have no probability at all, for "
                "which the divergence is infinite; it is for 'softmax'."
            )
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
        known = signature(self.model.forward).parameters
        output = self.model(**{name: value for name, value in inputs.items() if name in known})
        return cast(torch.Tensor, output.logits)


def vocabularies(tokenizer: Any) -> list[dict[str, int]]:
    """Of both sides, which may be one."""
    sides = [getattr(tokenizer, side, tokenizer) for side in ("source_tokenizer", "target_tokenizer")]
    return [side.get_vocab() for side in sides]
