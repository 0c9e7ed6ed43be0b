"""Attention over the encoder's output. A kind of attention makes keys, once a source, and scores them.

Shapes: B batch, S source, T target, M memory width, Q query width, A additive attention's hidden width.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig

# How many numbers of additive attention's hidden layer, [B, T, S, A], may be held at once: 256 MB in float32.
MAX_ENERGIES = 2**26

# What attention carries from one target step to the next (nothing, for content-based attention); each [B, ...].
Alignment = tuple[torch.Tensor, ...]


class PreparedMemory(NamedTuple):
    """One source, made ready for any number of queries."""

    keys: torch.Tensor  # [B, S, *]
    values: torch.Tensor  # [B, S, M]
    mask: torch.Tensor  # [B, S], true at tokens


class Attention(nn.Module):
    """
    a_t = softmax(score(q_t, k_1..S)), c_t = sum_s a_ts m_s   (Bahdanau et al. 2015, eq. 5-6; Luong et al. 2015, eq. 7)

    `forward` takes any number of queries at once, so one step and a whole sequence are the same code.

    Args:
        config: the model's configuration; queries are `hidden_size` wide, the memory `memory_size`.
    """

    num_heads = 1
    feedback = False  # does a step need the alignment of the step before?

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.context_size = config.memory_size
        self.dropout = nn.Dropout(config.attention_dropout)

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        """What of the score depends on the memory alone: [B, S, M] -> [B, S, *]."""
        return memory

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Unnormalised scores: [B, T, Q], [B, S, *] -> [B, T, S]."""
        raise NotImplementedError

    def prepare(self, memory: torch.Tensor, mask: torch.Tensor) -> PreparedMemory:
        """`memory` [B, S, M], `mask` [B, S] true at tokens."""
        return PreparedMemory(self.make_keys(memory), memory, mask)

    def first_alignment(self, prepared: PreparedMemory) -> Alignment:
        return ()

    def forward(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, torch.Tensor, Alignment]:
        """Queries [B, T, Q] -> contexts [B, T, M], weights [B, heads, T, S], the next step's alignment."""
        mask = prepared.mask.unsqueeze(1)  # [B, 1, S]
        scores = self.score(query, prepared.keys)  # [B, T, S]
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # softmax in full precision
        weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)
        weights = (weights * mask).to(prepared.values.dtype)  # a source without tokens gets zeros, not an average
        context = torch.bmm(self.dropout(weights), prepared.values)  # [B, T, M]
        return context, weights.unsqueeze(1), alignment


class DotAttention(Attention):
    r"""score = q^T m (Luong et al. 2015, eq. 8, "dot"). Needs Q = M."""

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return torch.bmm(query, keys.transpose(1, 2))


class ScaledDotAttention(DotAttention):
    r"""score = q^T m / sqrt(Q) (Vaswani et al. 2017, eq. 1, without projections). Needs Q = M."""

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return super().score(query, keys) / math.sqrt(query.size(-1))


class GeneralAttention(DotAttention):
    r"""score = q^T W m (Luong et al. 2015, eq. 8, "general")."""

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.key_projection = nn.Linear(config.memory_size, config.hidden_size, bias=False)

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        return self.key_projection(memory)  # [B, S, Q]


class AdditiveAttention(Attention):
    r"""score = v^T tanh(W q + U m) (Bahdanau et al. 2015, appendix A.1.2)."""

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.query_projection = nn.Linear(config.hidden_size, config.attention_size, bias=False)
        self.key_projection = nn.Linear(config.memory_size, config.attention_size, bias=False)
        self.score_projection = nn.Linear(config.attention_size, 1, bias=False)

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        return self.key_projection(memory)  # [B, S, A]

    def score_vector(self) -> torch.Tensor:
        """v, [A]."""
        return self.score_projection.weight.squeeze(0)

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        projected, v = self.query_projection(query), self.score_vector()  # [B, T, A], [A]
        queries_at_once = max(MAX_ENERGIES // keys.numel(), 1)
        if queries_at_once >= projected.size(1):
            return self._energies(projected, keys, v)
        # Long sequences: [B, T, S, A] would not fit, so it is made in parts, and made again in the backward pass.
        parts = projected.split(queries_at_once, dim=1)
        return torch.cat([checkpoint(self._energies, part, keys, v, use_reentrant=False) for part in parts], dim=1)

    @staticmethod
    def _energies(projected: torch.Tensor, keys: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[B, T, A], [B, S, A], [A] -> [B, T, S]"""
        energies = torch.tanh(projected.unsqueeze(2) + keys.unsqueeze(1))  # [B, T, S, A]
        return energies @ v.to(energies.dtype)


class NormedAdditiveAttention(AdditiveAttention):
    r"""
    score = g v^T / |v| tanh(W q + U m + b): additive attention with weight normalisation of v (Salimans & Kingma
    2016) and a bias, known from tf/nmt and GNMT as "normed_bahdanau". g starts at 1/sqrt(A), b at 0, as there.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(1 / math.sqrt(config.attention_size)))
        self.bias = nn.Parameter(torch.zeros(config.attention_size))

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        return super().make_keys(memory) + self.bias

    def score_vector(self) -> torch.Tensor:
        v = super().score_vector()
        return self.scale * v / v.norm()


class NoAttention(Attention):
    """No attention: contexts of width zero, so that whoever concatenates one adds nothing, and no weights."""

    num_heads = 0

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.context_size = 0

    def forward(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, torch.Tensor, Alignment]:
        batch, length = query.shape[:2]
        context = query.new_zeros(batch, length, 0)
        return context, query.new_zeros(batch, 0, length, prepared.mask.size(1)), alignment


ATTENTIONS: dict[str, type[Attention]] = {
    "none": NoAttention,
    "dot": DotAttention,
    "scaled_dot": ScaledDotAttention,
    "general": GeneralAttention,
    "additive": AdditiveAttention,
    "normed_additive": NormedAdditiveAttention,
}
