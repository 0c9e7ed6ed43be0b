"""
Losses that training may add to the model's own: guided alignment, a transition penalty, unlikelihood, R-Drop.

Like those in `losses.py` each is a mean over the labels or, if `num_items_in_batch` is given, the sum divided by it;
labels of -100 have no part in it. All are in float32, or float64 for such inputs.

Shapes: B batch, S source, T target, V vocabulary, W words with a probability: V, or more for a head that copies.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice

import numpy as np
import torch
from transformers import PreTrainedConfig

from .losses import IGNORED, log_probabilities, reduce_loss
from .normalizers import NORMALIZERS

ALIGNMENTS = "alignments"  # the data's column, and what the collator makes of it
ROWS_AT_ONCE = 10_000


def output_log_probabilities(logits: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """log p of every word, [B, T, W], from the model's `logits`, which are that already but for a softmax head."""
    if getattr(config, "output_normalizer", "softmax") == "softmax":
        return log_probabilities(logits, "softmax")
    return logits


# Guided alignment.


def guided_alignment_loss(
    weights: torch.Tensor,
    alignments: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    Cross entropy between given word alignments and attention (Chen et al. 2016, "Guided alignment training"):

        -sum_s A_ts log a_ts

    where a is the mean of attention's heads. A step without a link has no loss. A weight of exactly zero, as
    sparsemax, a window or a hard alignment gives it, has a finite loss and no gradient.

    Args:
        weights: attention weights [B, heads, T, S].
        alignments: A, [B, T, S], each row summing to one, or zero where a target token has no link.
        labels: [B, T].
        num_items_in_batch: see the head of this file.
    """
    dtype = torch.promote_types(weights.dtype, torch.float32)
    log_a = weights.to(dtype).mean(1).clamp(min=torch.finfo(torch.float32).tiny).log()
    losses = -(alignments.to(log_a) * log_a).sum(-1)
    return reduce_loss(losses, labels.to(losses.device) != IGNORED, num_items_in_batch)


def check_links(links: Sequence[Sequence[int]], source_length: int, target_length: int) -> None:
    """
    Raises:
        ValueError: a link that isn't a pair, or points outside of the row's tokens.
    """
    for link in links:
        if len(link) != 2:
            raise ValueError(f"the link {list(link)!r} is no pair of a source and a target token's number")
        for side, place, length in zip(("source", "target"), link, (source_length, target_length), strict=True):
            if not 0 <= place < length:
                raise ValueError(
                    f"the link {link[0]}-{link[1]} is outside of the row: its {side} has {length} tokens, numbered "
                    f"from 0 to {length - 1}"
                )


class AlignmentCollator:
    """
    A collator that also batches the column `alignments`: of each row the links, (source token, target token), numbers
    from 0 as in `input_ids` and `labels`. They become A of `guided_alignment_loss`, [B, T, S], with equal shares
    where a target token has several links. Padding on either side is allowed for.

    Args:
        collator: what batches all the rest.
    """

    def __init__(self, collator: Callable[[list[dict[str, object]]], dict[str, torch.Tensor]]):
        self.collator = collator

    def __call__(self, features: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        if ALIGNMENTS not in features[0]:
            return self.collator(features)
        links: list[list[tuple[int, int]]] = [row[ALIGNMENTS] for row in features]  # type: ignore[misc]
        batch = self.collator([{k: v for k, v in row.items() if k != ALIGNMENTS} for row in features])
        source = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
        target = (batch["labels"] != IGNORED).int()
        alignments = torch.zeros(*target.shape, source.size(1))
        for row, pairs in enumerate(links):
            check_links(pairs, int(source[row].sum()), int(target[row].sum()))
            if pairs:
                s, t = torch.tensor(pairs).unbind(1)
                alignments[row, t + target[row].argmax(), s + source[row].argmax()] = 1
        batch[ALIGNMENTS] = alignments / alignments.sum(-1, keepdim=True).clamp(min=1)
        return batch


# The transition penalty.


class BigramModel:
    """
    p(w | v) = (c(v, w) + k) / (c(v) + k V), of how often w follows v in the training targets (add-k smoothing).

    Kept are only pairs that occur, so that V may be large.

    Args:
        targets: the targets' token ids, without a start token. Ids from V on count as `unk_token_id`.
        vocab_size: V.
        start_token_id: what comes before the first token.
        unk_token_id: see `targets`; needed only if there are such ids.
        smoothing: k.
        device: where the penalty is computed.

    Raises:
        ValueError: there are no targets.
    """

    def __init__(
        self,
        targets: Iterable[Sequence[int]],
        vocab_size: int,
        start_token_id: int,
        unk_token_id: int | None,
        smoothing: float,
        device: torch.device | str = "cpu",
    ):
        self.vocab_size, self.start, self.unk = vocab_size, start_token_id, unk_token_id or 0
        pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)  # pair v, w is v V + w
        rows = iter(targets)
        while chunk := list(islice(rows, ROWS_AT_ONCE)):
            words = np.fromiter(chain.from_iterable([start_token_id, *row] for row in chunk), np.int64)
            words[words >= vocab_size] = self.unk
            within = np.ones(len(words), dtype=bool)
            within[np.cumsum([len(row) + 1 for row in chunk]) - 1] = False  # no row's last token is before another's
            found = (words[:-1] * vocab_size + words[1:])[within[:-1]]
            pairs, place = np.unique(np.concatenate((pairs, found)), return_inverse=True)
            counts = np.bincount(place, np.concatenate((counts, np.ones_like(found))), len(pairs)).astype(np.int64)
        if len(pairs) == 0:
            raise ValueError("transition_penalty_weight: there are no training targets to count transitions in.")
        total = np.bincount(pairs // vocab_size, counts, vocab_size)  # c(v)
        first = np.searchsorted(pairs, np.arange(vocab_size + 1) * vocab_size)  # of v's pairs
        self.first = torch.from_numpy(first).to(device)
        self.words = torch.from_numpy(pairs % vocab_size).to(device)
        # -log p(w | v) = unseen(v) - gain(v, w), the latter zero for pairs that don't occur.
        self.gains = torch.from_numpy(np.log1p(counts / smoothing)).to(device)
        self.unseen = torch.from_numpy(np.log(total + smoothing * vocab_size) - np.log(smoothing)).to(device)

    def expected_penalty(self, p: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """sum_w p(w) (-log p(w | previous)): p [N, V] and previous tokens [N] -> [N]."""
        first = self.first[previous]
        lengths = self.first[previous + 1] - first
        row = torch.repeat_interleave(lengths)  # of each pair that is looked at; there are P of them
        place = torch.arange(len(row), device=row.device) + (first - lengths.cumsum(0) + lengths)[row]  # [P]
        gains = p[row, self.words[place]] * self.gains[place].to(p.dtype)
        return self.unseen[previous].to(p.dtype) - torch.zeros_like(p[:, 0]).index_add(0, row, gains)

    def penalty(
        self, log_p: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """
        The model's expected cost under this one, sum_w p_t(w) (-log p(w | y_{t-1})), a scalar: least where all mass
        is on what often follows the label before, great where it is on what never does.

        Args:
            log_p: the model's log-probabilities [B, T, W]. Words from V on count as the unknown one.
            labels: y, [B, T].
            num_items_in_batch: see the head of this file.
        """
        labels = labels.to(log_p.device)
        labelled = labels != IGNORED
        words = labels.masked_fill(labels >= self.vocab_size, self.unk)
        start = torch.full_like(words[:, :1], self.start)
        previous = torch.cat((start, words[:, :-1]), dim=1)
        previous = previous.masked_fill(previous == IGNORED, self.start)  # after padding on the left
        p = log_p[labelled].exp()  # [N, W]
        if p.size(-1) > self.vocab_size:
            unk = torch.tensor([self.unk], device=p.device)
            outside = p[:, self.vocab_size :].sum(-1, keepdim=True)
            p = p[:, : self.vocab_size].index_add(1, unk, outside)
        losses = self.expected_penalty(p, previous[labelled])
        return reduce_loss(losses, torch.ones_like(losses, dtype=torch.bool), num_items_in_batch)


# Unlikelihood.


def unlikelihood_loss(
    log_p: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """
    Unlikelihood of repeating oneself, on the level of tokens (Welleck et al. 2020, section 5.1):

        -sum_{c in C_t} log(1 - p(c | y_<t)),  C_t = {y_1, ..., y_{t-1}} \\ {y_t}

    where 1 - p counts as 1e-5 if it is less, as in the authors' code.

    Args:
        log_p: the model's log-probabilities [B, T, W].
        labels: y, [B, T].
        num_items_in_batch: see the head of this file.
    """
    labels = labels.to(log_p.device)
    labelled = labels != IGNORED
    words = labels.masked_fill(~labelled, 0)
    batch, length = labels.shape
    earlier = torch.ones(length, length, dtype=torch.bool, device=labels.device).tril(-1)  # [t, j]: j < t
    earlier = earlier & labelled.unsqueeze(1)  # [B, T, T]
    same = words.unsqueeze(2) == words.unsqueeze(1)
    first = ~(earlier & same).any(-1)  # a word that occurs several times is one candidate, [B, T]
    candidates = earlier & first.unsqueeze(1) & ~same
    p = log_p.gather(2, words.unsqueeze(1).expand(batch, length, length)).exp()  # of y_j at step t
    losses = -((1 - p).clamp(min=1e-5).log() * candidates).sum(-1)
    return reduce_loss(losses, labelled, num_items_in_batch)


# R-Drop.


def r_drop_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    normalizer: str,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    How far apart two passes over the same rows are, each with a dropout of its own (Liang et al. 2021, eq. 2):

        (KL(p_1 || p_2) + KL(p_2 || p_1)) / 4 = (p_1 - p_2)^T (z_1 - z_2) / 4

    where z are scores and p their softmax. With sparsemax or entmax15 for it the right side is the sum of both passes'
    Fenchel-Young losses (Blondel et al. 2020), each with the other's p for its label. The paper's loss, of both
    passes, is twice the mean of theirs that the Trainer has; so half of its eq. 2 is taken, and alpha, the weight, is
    the paper's.

    Args:
        scores: z of the first pass, then of the second, [2 B, T, W].
        labels: of both, [2 B, T].
        normalizer: a key of `NORMALIZERS`.
        num_items_in_batch: see the head of this file; the labels of both passes count.
    """
    labelled = labels.to(scores.device) != IGNORED
    z_1, z_2 = scores.to(torch.promote_types(scores.dtype, torch.float32))[labelled].chunk(2)  # [N, W]
    p_1, p_2 = (NORMALIZERS[normalizer](z, None) for z in (z_1, z_2))
    losses = ((p_1 - p_2) * (z_1 - z_2)).sum(-1) / 4
    return reduce_loss(losses.repeat(2), torch.ones_like(losses, dtype=torch.bool).repeat(2), num_items_in_batch)
