"""
The best continuations of beams, without a sum and a search over the whole vocabulary.

Shape letters: b sources, N beams a source, K candidates a source, V vocabulary, D words a block.
"""

import torch

# D: of 16 to 128 the fastest, at 5 beams and vocabularies of 8,000 and 32,000.
BLOCK = 64
# For fewer numbers than this a single search is as fast. (On a CPU; on others it was not measured.)
WORTH_BLOCKS = 2**16


def best_continuations(
    log_probs: torch.Tensor, running_scores: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The K best of score(beam) + log p(word | beam), best first.

    In a large vocabulary the K best words lie in the K blocks of neighbouring words whose best words are the best, so
    one quick pass finds blocks and only K of them are searched. Of continuations with exactly equal scores it may
    choose others than one search over all.

    Args:
        log_probs: [b * N, V].
        running_scores: [b, N].
        kept: K.

    Returns:
        Their scores [b, K], and their places in a source's N * V continuations [b, K].
    """
    sources, beams = running_scores.shape
    vocabulary = log_probs.size(1)
    flat = log_probs.reshape(sources, beams * vocabulary)
    if log_probs.is_cpu and log_probs.numel() >= WORTH_BLOCKS and vocabulary >= BLOCK * kept:
        best, places = _by_blocks(log_probs, flat, running_scores, kept)
        if not best[:, -1].isneginf().any():  # else words without a probability, which all tie, are among the best
            return best, places
    scores = flat.view(sources, beams, vocabulary) + running_scores[:, :, None]
    best, places = scores.flatten(1).topk(kept)
    return best, places


def _by_blocks(
    log_probs: torch.Tensor, flat: torch.Tensor, running_scores: torch.Tensor, kept: int
) -> tuple[torch.Tensor, torch.Tensor]:
    (sources, beams), vocabulary = running_scores.shape, log_probs.size(1)
    whole = vocabulary // BLOCK * BLOCK
    maxima = log_probs[:, :whole].unflatten(1, (-1, BLOCK)).amax(2)
    if whole < vocabulary:
        maxima = torch.cat((maxima, log_probs[:, whole:].amax(1, keepdim=True)), dim=1)
    blocks = maxima.size(1)
    maxima = maxima.view(sources, beams, blocks) + running_scores[:, :, None]
    chosen = maxima.flatten(1).topk(kept).indices  # [b, K]
    beam = chosen // blocks
    words = (chosen % blocks * BLOCK)[:, :, None] + torch.arange(BLOCK, device=chosen.device)  # [b, K, D]
    places = (beam[:, :, None] * vocabulary + words.clamp(max=vocabulary - 1)).flatten(1)
    scores = flat.gather(1, places).view_as(words) + running_scores.gather(1, beam)[:, :, None]
    scores = scores.masked_fill(words >= vocabulary, -torch.inf).flatten(1)
    best, where = scores.topk(kept)
    return best, places.gather(1, where)
