"""Attention, and the kinds of it that go by content alone: by what query and memory are, not by where anything is.

A kind of attention makes keys and values, once a source, and weighs them for any number of queries.

Shapes: B batch, S source, T target, M memory width, Q query width, A additive attention's hidden width, or that of all
heads' queries together; `heads` attention heads.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init

from .additive_scores import additive_scores
from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .dropout import Dropout
from .normalizers import NORMALIZERS
from .recurrent_layers import GateNorm
from .step_products import StepLinear, memory_product

# What attention carries from one target step to the next (nothing, by content alone); each [B, ...].
Alignment = tuple[torch.Tensor, ...]


class PreparedMemory(NamedTuple):
    """One source, made ready for any number of queries."""

    keys: torch.Tensor  # [B, S, *], or as several heads want them
    values: torch.Tensor  # [B, S, *], of several heads [B, heads, S, D]
    mask: torch.Tensor  # [B, S], true at tokens

    def map(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> "PreparedMemory":
        """The same source with `fn` applied to every tensor."""
        return PreparedMemory(*(fn(tensor) for tensor in self))


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, heads * D] -> [B, heads, L, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def dot_scores(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """q^T k: [B, T, D], [B, S, D] -> [B, 1, T, S]."""
    return memory_product(query, keys, transposed=True).unsqueeze(1)


class Attention(nn.Module):
    """
    a_t = normalize(score(q_t, k_1..S)), c_t = sum_s a_ts v_s   (Bahdanau et al. 2015, eq. 5-6; Luong et al. 2015,
    eq. 7), where the values are the memory itself unless a kind projects them.

    `forward` takes any number of queries at once, so one step and a whole sequence are the same code; but with
    `feedback` only one.

    Args:
        config: the model's configuration; queries are `query_size` wide, the memory `memory_size`.
    """

    num_heads = 1
    feedback = False  # does a step need the alignment of the step before?

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.context_size = config.memory_size
        self.normalize = NORMALIZERS[config.attention_normalizer]
        self.dropout = Dropout(config.attention_dropout)

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        """What of the score depends on the memory alone: [B, S, M] -> [B, S, *]."""
        return memory

    def make_values(self, memory: torch.Tensor) -> torch.Tensor:
        """What is averaged: [B, S, M] -> [B, S, *]."""
        return memory

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Unnormalised scores: [B, T, Q], [B, S, *] -> [B, heads, T, S]."""
        raise NotImplementedError

    def prepare(
        self, memory: torch.Tensor, mask: torch.Tensor, memory_keys: torch.Tensor | None = None
    ) -> PreparedMemory:
        """`memory` [B, S, M], `mask` [B, S] true at tokens, and what is scored where it is not the memory."""
        keys = self.make_keys(memory if memory_keys is None else memory_keys)
        return PreparedMemory(keys, self.make_values(memory), mask)

    def first_alignment(self, prepared: PreparedMemory) -> Alignment:
        """The alignment before the first step."""
        return ()

    def weigh(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, Alignment]:
        """Weights [B, heads, T, S] in at least float32, zero at padding, and the next step's alignment."""
        scores = self.score(query, prepared.keys)
        return self.normalize(scores, prepared.mask[:, None, None]), alignment

    def average(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The one head's average: [B, 1, T, S], [B, S, *] -> [B, T, *]."""
        return memory_product(self.dropout(weights).squeeze(1), values)

    def forward(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, torch.Tensor, Alignment]:
        """
        Queries [B, T, Q] -> contexts [B, T, C], weights [B, heads, T, S], the next step's alignment.

        Without an alignment, N beams of each source may share its memory: queries [B * N, 1, Q], a source's side by
        side, are N queries to it, and what comes back is by beams again.
        """
        if self.feedback and query.size(1) != 1:
            raise ValueError(f"This attention waits for its last weights: one query at a time, got {query.size(1)}.")
        rows, sources = query.size(0), prepared.mask.size(0)
        if rows != sources:
            query = query.reshape(sources, rows // sources, -1)
        weights, alignment = self.weigh(query, prepared, alignment)
        weights = weights.to(prepared.values.dtype)
        context = self.average(weights, prepared.values)
        if rows != sources:
            context, weights = context.reshape(rows, 1, -1), weights.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return context, weights, alignment


class DotAttention(Attention):
    r"""score = q^T m (Luong et al. 2015, eq. 8, "dot"). Needs Q = M."""

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return dot_scores(query, keys)


class ScaledDotAttention(DotAttention):
    r"""score = q^T m / sqrt(Q) (Vaswani et al. 2017, eq. 1, without projections). Needs Q = M."""

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return super().score(query, keys) / math.sqrt(query.size(-1))


class GeneralAttention(DotAttention):
    r"""score = q^T W m (Luong et al. 2015, eq. 8, "general")."""

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.key_projection = nn.Linear(config.memory_size, config.query_size, bias=False)

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        return self.key_projection(memory)  # [B, S, Q]


class Trace(nn.Module):
    """
    What additive attention remembers of where it has looked, and adds inside its tanh. Here: nothing. With `feedback`
    the alignment is one tensor, [B, S], zeros before the first step.
    """

    feedback = False

    def forward(self, keys: torch.Tensor, alignment: Alignment) -> torch.Tensor:
        """Keys [B, S, A] as the next query is to find them."""
        return keys

    def update(self, alignment: Alignment, weights: torch.Tensor) -> Alignment:
        """After a step with these weights, [B, S]."""
        return alignment


class Coverage(Trace):
    """
    cov_t = sum_{t' < t} a_t', of which w_c cov_ts is added (See et al. 2017, eq. 10-11; Tu et al. 2016). w_c has A
    parameters.
    """

    feedback = True

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.projection = nn.Linear(1, config.attention_size, bias=False)

    def forward(self, keys: torch.Tensor, alignment: Alignment) -> torch.Tensor:
        (coverage,) = alignment
        return keys + self.projection(coverage.unsqueeze(-1).to(keys.dtype))

    def update(self, alignment: Alignment, weights: torch.Tensor) -> Alignment:
        (coverage,) = alignment
        return (coverage + weights,)


class AdditiveAttention(Attention):
    r"""
    score = v^T tanh(W q + U m) (Bahdanau et al. 2015, appendix A.1.2)

    and with `attention_bias` v^T tanh(W q + U m + b), with `attention_coverage` v^T tanh(W q + U m + w_c cov), with
    `layer_norm` v^T tanh(N_q(W q) + N_m(U m + b)).
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        size = config.attention_size
        self.query_projection = StepLinear(config.query_size, size, bias=False)
        self.key_projection = nn.Linear(config.memory_size, size, bias=config.attention_bias)
        self.score_projection = nn.Linear(size, 1, bias=False)
        self.query_norm, self.key_norm = (GateNorm(1, size) if config.layer_norm else nn.Identity() for _ in "qm")
        self.trace = self.make_trace(config)
        self.feedback = self.trace.feedback

    def make_trace(self, config: RnnSeq2SeqConfig) -> Trace:
        return Coverage(config) if config.attention_coverage else Trace()

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        return self.key_norm(self.key_projection(memory))  # [B, S, A]

    def score_vector(self) -> torch.Tensor:
        """v, [1, A]."""
        return self.score_projection.weight

    def project_query(self, query: torch.Tensor) -> torch.Tensor:
        """[B, T, Q] -> [B, T, A]"""
        return self.query_norm(self.query_projection(query))

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return additive_scores(self.project_query(query), keys, self.score_vector(), shared=True)

    def first_alignment(self, prepared: PreparedMemory) -> Alignment:
        dtype = torch.promote_types(prepared.values.dtype, torch.float32)
        return (torch.zeros_like(prepared.mask, dtype=dtype),) if self.feedback else ()

    def weigh(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, Alignment]:
        if self.feedback:
            # Every step has keys of its own, which would otherwise be kept for the backward pass. The projection is
            # not to run again there: it belongs to the loop (see step_products.py).
            scores = checkpoint(
                self.traced_score,
                self.project_query(query),
                prepared.keys,
                alignment,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            scores = self.score(query, prepared.keys)
        weights = self.normalize(scores, prepared.mask[:, None, None])
        return weights, self.trace.update(alignment, weights[:, 0, 0])

    def traced_score(self, projected: torch.Tensor, keys: torch.Tensor, alignment: Alignment) -> torch.Tensor:
        """`score` of a projected query [B, T, A], with keys as the trace leaves them."""
        return additive_scores(projected, self.trace(keys, alignment), self.score_vector())


class NormedAdditiveAttention(AdditiveAttention):
    r"""
    score = g v^T / |v| tanh(W q + U m + b): additive attention with weight normalisation of v (Salimans & Kingma
    2016) and a bias, known from tf/nmt and GNMT as "normed_bahdanau". g starts at 1/sqrt(A), b at 0, as there.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.scale = nn.Parameter(torch.tensor(1 / math.sqrt(config.attention_size)))
        self.bias = nn.Parameter(torch.zeros(config.attention_size))

    def reset_weights(self) -> None:
        init.constant_(self.scale, self.bias.numel() ** -0.5)
        init.zeros_(self.bias)

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        return super().make_keys(memory) + self.bias

    def score_vector(self) -> torch.Tensor:
        v = super().score_vector()
        return self.scale * v / v.norm()


class DotHeads(nn.Module):
    """score_h = q_h^T k_h"""

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.heads = config.attention_heads

    def lay_out(self, keys: torch.Tensor) -> torch.Tensor:
        """Once a source, as the products want it: [B, S, A] -> [B, heads, D, S]."""
        return split_heads(keys, self.heads).transpose(2, 3).contiguous()

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[B, T, A], `lay_out`'s keys -> [B, heads, T, S]"""
        return memory_product(split_heads(query, self.heads), keys)


class ScaledDotHeads(DotHeads):
    """score_h = q_h^T k_h / sqrt(A / heads) (Vaswani et al. 2017, eq. 1)"""

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return super().forward(query, keys) / math.sqrt(query.size(-1) // self.heads)


class AdditiveHeads(nn.Module):
    """score_h = v_h^T tanh(q_h + k_h) (Chen et al. 2018, section 4.1)"""

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.score_projection = nn.Linear(  # a row for each head's v
            config.attention_size // config.attention_heads, config.attention_heads, bias=False
        )

    def lay_out(self, keys: torch.Tensor) -> torch.Tensor:
        """[B, S, A], as it is."""
        return keys

    def forward(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[B, T, A], [B, S, A] -> [B, heads, T, S]"""
        return additive_scores(query, keys, self.score_projection.weight, shared=True)


HEAD_SCORINGS: dict[str, type[DotHeads] | type[AdditiveHeads]] = {
    "dot": DotHeads,
    "scaled_dot": ScaledDotHeads,
    "additive": AdditiveHeads,
}


class MultiHeadAttention(Attention):
    r"""
    c = W^O [c_1; ...; c_heads], c_h = attention(W_h^Q q, W_h^K m, W_h^V m)   (Vaswani et al. 2017, section 3.2.2)

    The heads share A evenly; they score by `config.scoring`. The projections have no bias, but W^K under additive
    scoring with `attention_bias`. The context is A wide.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        size = config.attention_size
        self.num_heads = config.attention_heads
        self.query_projection = StepLinear(config.query_size, size, bias=False)
        self.key_projection = nn.Linear(config.memory_size, size, bias=config.attention_bias)
        self.value_projection = nn.Linear(config.memory_size, size, bias=False)
        self.output_projection = StepLinear(size, size, bias=False)
        self.context_size = size
        self.scoring = HEAD_SCORINGS[config.scoring](config)

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        return self.scoring.lay_out(self.key_projection(memory))

    def make_values(self, memory: torch.Tensor) -> torch.Tensor:
        # Contiguous, or every step would copy it for its product, and keep the copy for the backward pass.
        return split_heads(self.value_projection(memory), self.num_heads).contiguous()

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.scoring(self.query_projection(query), keys)

    def average(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        contexts = memory_product(self.dropout(weights), values)  # [B, heads, T, D]
        return self.output_projection(contexts.transpose(1, 2).flatten(2))
