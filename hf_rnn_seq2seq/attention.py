"""Every kind of attention by its name, and attention to the decoder's own past beside it.

Shapes: B batch, S source, T target, P past target steps, M memory width, Q query width, A additive attention's hidden
width.
"""

import torch
from torch import nn

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .content_attention import (
    AdditiveAttention,
    Alignment,
    Attention,
    DotAttention,
    GeneralAttention,
    MultiHeadAttention,
    NormedAdditiveAttention,
    PreparedMemory,
    ScaledDotAttention,
    additive_scores,
)
from .position_attention import LocalMAttention, LocalPAttention, LocationAttention, MonotonicAttention
from .step_products import StepLinear


class NoAttention(Attention):
    """
    No attention (Sutskever et al. 2014): contexts of width zero, so that whoever concatenates one adds nothing, and no
    weights.
    """

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


class DecoderSelfAttention(Attention):
    r"""
    Attention to the source and, beside it, to the decoder's own past:

        score_tt' = v^T tanh(W q_t + U q_t'),  a_t = normalize(score_t1..t-1),  c'_t = sum_t' a_tt' q_t',  c'_1 = 0

    (intra-attention: Cheng et al. 2016, eq. 5-7; within the decoder: Paulus et al. 2018, eq. 6-8, who score by a
    bilinear form). The context is [c_t; c'_t]; the weights are those over the source.

    The past grows by a step each time: after the source attention's alignment come its keys [B, P, A], its values
    [B, P, Q] and its mask [B, P], false where a row stood still.

    Args:
        source: attention to the source.
        config: the model's configuration.
    """

    def __init__(self, source: Attention, config: RnnSeq2SeqConfig):
        super().__init__(config)
        size = config.attention_size
        self.source = source
        self.num_heads, self.feedback = source.num_heads, source.feedback
        self.context_size = source.context_size + config.query_size
        self.query_projection = StepLinear(config.query_size, size, bias=False)
        self.key_projection = nn.Linear(config.query_size, size, bias=False)
        self.score_projection = nn.Linear(size, 1, bias=False)

    def prepare(
        self, memory: torch.Tensor, mask: torch.Tensor, memory_keys: torch.Tensor | None = None
    ) -> PreparedMemory:
        return self.source.prepare(memory, mask, memory_keys)

    def first_alignment(self, prepared: PreparedMemory) -> Alignment:
        batch, dtype = prepared.mask.size(0), prepared.values.dtype
        widths = (self.key_projection.out_features, self.key_projection.in_features)
        keys, values = (prepared.mask.new_zeros(batch, 0, width, dtype=dtype) for width in widths)
        return (*self.source.first_alignment(prepared), keys, values, prepared.mask.new_zeros(batch, 0))

    def forward(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, torch.Tensor, Alignment]:
        *source_alignment, keys, values, mask = alignment
        context, source_weights, new_alignment = self.source(query, prepared, tuple(source_alignment))

        past = values.size(1)
        keys = torch.cat((keys, self.key_projection(query)), dim=1)  # [B, P + T, A]
        values = torch.cat((values, query), dim=1)  # [B, P + T, Q]
        mask = torch.cat((mask, mask.new_ones(query.shape[:2])), dim=1)
        earlier = mask.new_ones(query.size(1), mask.size(1)).tril(past - 1)  # strictly: no query sees itself
        scores = additive_scores(self.query_projection(query), keys, self.score_projection.weight)
        weights = self.normalize(scores, (mask.unsqueeze(1) & earlier).unsqueeze(1))  # [B, 1, T, P + T]
        own_context = self.dropout(weights.to(values.dtype)).squeeze(1) @ values  # which grow: no `average`

        context = torch.cat((context, own_context.to(context.dtype)), dim=-1)
        return context, source_weights, (*new_alignment, keys, values, mask)


ATTENTIONS: dict[str, type[Attention]] = {
    "none": NoAttention,
    "dot": DotAttention,
    "scaled_dot": ScaledDotAttention,
    "general": GeneralAttention,
    "additive": AdditiveAttention,
    "normed_additive": NormedAdditiveAttention,
    "multi_head": MultiHeadAttention,
    "location": LocationAttention,
    "local_m": LocalMAttention,
    "local_p": LocalPAttention,
    "monotonic": MonotonicAttention,
}


def make_attention(config: RnnSeq2SeqConfig) -> Attention:
    """What `config` describes."""
    attention = ATTENTIONS[config.attention_type](config)
    return DecoderSelfAttention(attention, config) if config.decoder_self_attention else attention
