"""
Knowledge distillation: a model learns from what others, trained before, think of every word.

Shapes: B batch, T target, W words with a probability: the vocabulary, or more for a head that copies.
"""

import hashlib
from collections.abc import Sequence
from inspect import signature
from typing import Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel

from .ensemble import RnnSeq2SeqEnsemble, check_members
from .losses import IGNORED, entropy, reduce_loss
from .normalizers import NORMALIZERS
from .recurrent_base import tokens_to_last


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
        memory: how many bytes of what they said are kept, to be read again when a row comes back.

    Raises:
        ValueError: models or tokenizers that don't fit the student; names the teacher and what differs.
    """

    def __init__(
        self,
        names: Sequence[str],
        student: PreTrainedModel,
        tokenizer: Any,
        device: torch.device | str = "cpu",
        memory: int = 0,
    ):
        self.memory = RowMemory(memory)
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
        """
        log q of every word after the labels before it, [B, T, W]; `inputs` are the student's.

        Raises:
            ValueError: where there is a memory, for words that are copied (`copy_ids`).
        """
        known = signature(self.model.forward).parameters.keys() - {"labels"}  # of which it would make a loss
        read = {name: value for name, value in inputs.items() if name in known}
        if "decoder_input_ids" not in read:
            read["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(inputs["labels"])
        if self.memory.limit == 0:
            return self._log_q(read)
        if "copy_ids" in read:
            raise ValueError(
                "distillation_memory: words are copied from the source, so that every batch has others; leave it out."
            )
        return self._by_memory(read, inputs["labels"])

    def _by_memory(self, read: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """[`_log_q`], asked for of new rows alone; zeros behind a row's last label."""
        lengths = tokens_to_last(labels != IGNORED).tolist()
        keys = row_keys(read, lengths)
        new = [row for row, key in enumerate(keys) if key not in self.memory.rows]
        said: dict[int, torch.Tensor] = {}
        if new:
            index = torch.tensor(new, device=labels.device)
            some = {name: one[index] if isinstance(one, torch.Tensor) else one for name, one in read.items()}
            said = dict(zip(new, self._log_q(some), strict=True))
        rows = [said[row][:end] if row in said else self.memory.rows[keys[row]] for row, end in enumerate(lengths)]
        for row in new:
            self.memory.keep(keys[row], rows[row])
        log_q = rows[0].new_zeros(*labels.shape, rows[0].size(1), device=labels.device)
        for row, end in enumerate(lengths):
            log_q[row, :end] = rows[row]
        return log_q

    def _log_q(self, inputs: dict[str, Any]) -> torch.Tensor:
        return cast(torch.Tensor, self.model(**inputs, use_cache=False).logits)


class RowMemory:
    """
    What a teacher said of rows, [T, W] each, on the CPU.

    Args:
        limit: bytes; when they are used up, no more rows are kept.
    """

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self.rows: dict[bytes, torch.Tensor] = {}

    def keep(self, key: bytes, log_q: torch.Tensor) -> None:
        if key not in self.rows and self.used + log_q.nbytes <= self.limit:
            self.used += log_q.nbytes
            self.rows[key] = log_q.to("cpu", copy=True)


def row_keys(inputs: dict[str, Any], lengths: list[int]) -> list[bytes]:
    """
    A name for each row of a batch that is the same in every batch that it is in, however that is padded.

    Args:
        inputs: what a model reads: `decoder_input_ids` [B, T], and of the source [B, S] or [B, S, *]; also
            `attention_mask` [B, S] if there is one.
        lengths: of each row's labels.
    """
    mask = inputs.get("attention_mask")
    source_lengths = [None] * len(lengths) if mask is None else tokens_to_last(mask != 0).tolist()
    arrays = {
        name: (one.float() if one.is_floating_point() else one).numpy(force=True)  # numpy has no bfloat16
        for name, one in sorted(inputs.items())
        if isinstance(one, torch.Tensor)
    }
    keys = []
    for row, (target, source) in enumerate(zip(lengths, source_lengths, strict=True)):
        key = hashlib.blake2b(digest_size=16)
        for name, array in arrays.items():
            part = array[row][: target if name.startswith("decoder_") else source]
            key.update(repr((name, part.shape)).encode() + part.tobytes())
        keys.append(key.digest())
    return keys


def vocabularies(tokenizer: Any) -> list[dict[str, int]]:
    """Of both sides, which may be one."""
    sides = [getattr(tokenizer, side, tokenizer) for side in ("source_tokenizer", "target_tokenizer")]
    return [side.get_vocab() for side in sides]
