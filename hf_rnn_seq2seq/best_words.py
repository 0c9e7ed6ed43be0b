"""
The best words of a large vocabulary.

The best one is numpy's to find on a CPU. The several best are found by blocks of neighbouring words: one quick pass
over all of it finds each block's best score, and only the blocks with the best of these are searched. No words but
theirs get a log-probability.

Shape letters: b sources, N beams a source, rows are b * N, K candidates a source, V vocabulary, D words a block.
"""

import torch

from .normalizers import LOG2_E

# D: of 16 to 128 the fastest, at 5 beams and vocabularies of 8,000 and 32,000.
BLOCK = 64
# For fewer numbers than this a single search is as fast. (On a CPU; on others it was not measured.)
WORTH_BLOCKS = 2**16
# How many exponentials are made and added up at a time, such that caches hold them.
PIECE = 2**20
# Between -60 and 60 exponentials of float32 have room for a sum over any vocabulary, with nothing taken off first.
ROOM = 60.0


def best_words(scores: torch.Tensor) -> torch.Tensor:
    """`scores.argmax(1)`, the first of equal ones, [rows, V] -> [rows]."""
    if scores.is_cpu and scores.dtype in (torch.float32, torch.float64):
        # numpy searches with vector instructions, three to six times as fast as torch on two cores.
        return torch.from_numpy(scores.detach().numpy().argmax(axis=1))
    return scores.argmax(dim=1)


def best_continuations(
    log_probs: torch.Tensor, running_scores: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The K best of score(beam) + log p(word | beam), best first.

    Of continuations with exactly equal scores it may choose others than one search over all.

    Args:
        log_probs: [b * N, V].
        running_scores: [b, N].
        kept: K.

    Returns:
        Their scores [b, K], and their places in a source's N * V continuations [b, K].
    """
    maxima = _maxima(log_probs) if _worth_blocks(log_probs, kept) else None
    return _search(log_probs, maxima, running_scores, kept)


def most_probable_continuations(
    logits: torch.Tensor, running_scores: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `best_continuations` of log p = log softmax(logits), as logits [b * N, V]; all in float32.

    log p is a logit less one number of its row, log sum_w exp(logit_w), so a row's order is that of its logits.
    """
    if not _worth_blocks(logits, kept):
        return best_continuations(torch.log_softmax(logits, dim=-1, dtype=torch.float32), running_scores, kept)
    maxima = _maxima(logits).float()
    return _search(logits, maxima, running_scores - _log_sums(logits, maxima).view_as(running_scores), kept)


def _search(
    scores: torch.Tensor, maxima: torch.Tensor | None, offsets: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The K best of offset(beam) + score(word), in the type of the offsets [b, N].

    Args:
        scores: [b * N, V].
        maxima: each block's, where the search is to go by blocks.
        kept: K.
    """
    if maxima is not None:
        best, places = _by_blocks(scores, maxima, offsets, kept)
        if not best[:, -1].isneginf().any():  # else words without a probability, which all tie, are among the best
            return best, places
    all_scores = scores.reshape(*offsets.shape, -1).to(offsets.dtype) + offsets[:, :, None]
    best, places = all_scores.flatten(1).topk(kept)
    return best, places


def _log_sums(logits: torch.Tensor, maxima: torch.Tensor) -> torch.Tensor:
    """log sum_w exp(logit_w), [rows, V] -> [rows] in float32; `maxima` of each row, [rows, *]."""
    highest = maxima.amax(1)
    if not bool((highest.abs() <= ROOM).all()):
        return torch.logsumexp(logits.float(), dim=1)
    pieces = logits.split(max(1, PIECE // logits.size(1)))
    return torch.cat([(piece.float() * LOG2_E).exp2_().sum(1) for piece in pieces]).log()


def _by_blocks(
    scores: torch.Tensor, maxima: torch.Tensor, offsets: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    (sources, beams), vocabulary = offsets.shape, scores.size(1)
    blocks = maxima.size(1)
    maxima = maxima.view(sources, beams, blocks) + offsets[:, :, None]
    chosen = maxima.flatten(1).topk(kept).indices  # the K best words lie in these blocks, [b, K]
    beam, words = chosen // blocks, _words(chosen % blocks)
    places = (beam[:, :, None] * vocabulary + words.clamp(max=vocabulary - 1)).flatten(1)
    found = scores.reshape(sources, -1).gather(1, places).to(offsets.dtype)
    candidates = found.view_as(words) + offsets.gather(1, beam)[:, :, None]
    candidates = candidates.masked_fill(words >= vocabulary, -torch.inf).flatten(1)
    best, where = candidates.topk(kept)
    return best, places.gather(1, where)


def _worth_blocks(scores: torch.Tensor, kept: int) -> bool:
    return scores.is_cpu and scores.numel() >= WORTH_BLOCKS and scores.size(1) >= BLOCK * kept


def _maxima(scores: torch.Tensor) -> torch.Tensor:
    """Each block's best score, [rows, V] -> [rows, V / D rounded up]."""
    whole = scores.size(1) // BLOCK * BLOCK
    maxima = scores[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    if whole == scores.size(1):
        return maxima
    return torch.cat((maxima, scores[:, whole:].amax(1, keepdim=True)), dim=1)


def _words(blocks: torch.Tensor) -> torch.Tensor:
    """The words of blocks, [...] -> [..., D]; in the last one they may go beyond the vocabulary."""
    return blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=blocks.device)
