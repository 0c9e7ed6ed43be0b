"""Attention that goes by position, too: by where it looked before, or by where in the source it ought to look.

Positions are counted from each row's first token, so that padding on the left changes nothing.

Shapes: B batch, S source, T target, A additive attention's hidden width, K filters.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .content_attention import (
    AdditiveAttention,
    Alignment,
    Attention,
    DotAttention,
    GeneralAttention,
    NormedAdditiveAttention,
    PreparedMemory,
    ScaledDotAttention,
    Trace,
)
from .recurrent_layers import LinearRecurrence
from .step_products import StepLinear


class Location(Trace):
    """
    f_t = F * a_{t-1}, a convolution with K filters, of which V f_ts is added (Chorowski et al. 2015, section 2.1).
    Padding before and after the tokens changes nothing; between them it would be a place like any other.
    """

    feedback = True

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.filters = nn.Parameter(torch.empty(config.location_filters, 1, config.location_kernel_size))  # F
        self.projection = nn.Linear(config.location_filters, config.attention_size, bias=False)

    def reset_weights(self) -> None:
        init.xavier_uniform_(self.filters)

    def forward(self, keys: torch.Tensor, alignment: Alignment) -> torch.Tensor:
        (previous,) = alignment
        previous = previous.unsqueeze(1).to(self.filters.dtype)
        features = F.conv1d(previous, self.filters, padding="same")  # [B, K, S]; beyond the ends there is no weight
        return keys + self.projection(features.transpose(1, 2))

    def update(self, alignment: Alignment, weights: torch.Tensor) -> Alignment:
        return (weights,)


class LocationAttention(AdditiveAttention):
    r"""
    score = v^T tanh(W q + U m + V f) (Chorowski et al. 2015), f as in `Location`; with `attention_bias` + b, as in the
    paper.
    """

    def make_trace(self, config: RnnSeq2SeqConfig) -> Trace:
        return Location(config)


# What scores within a window; `config.scoring` names it.
SCORINGS: dict[str, type[Attention]] = {
    "dot": DotAttention,
    "scaled_dot": ScaledDotAttention,
    "general": GeneralAttention,
    "additive": AdditiveAttention,
}


class LocalAttention(Attention):
    """
    Attention in a window [p_t - D, p_t + D] around a position p_t (Luong et al. 2015, section 3.2). What of it lies
    outside the source is cut off. Scores are those of `config.scoring`.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.half_width = config.attention_window
        self.scoring = SCORINGS[config.scoring](config)

    def make_keys(self, memory: torch.Tensor) -> torch.Tensor:
        return self.scoring.make_keys(memory)

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return self.scoring.score(query, keys)

    def weigh_around(
        self, centre: torch.Tensor, query: torch.Tensor, prepared: PreparedMemory
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For p_t [B, T]: weights, zero outside the window, and every position's distance from p_t; [B, 1, T, S]."""
        position = prepared.mask.cumsum(1) - 1  # [B, S]
        distance = position[:, None, None] - centre[:, None, :, None]
        window = (distance.abs() <= self.half_width) & prepared.mask[:, None, None]
        return self.normalize(self.score(query, prepared.keys), window), distance


class LocalMAttention(LocalAttention):
    """
    p_t = t, the target position, counted from 0 ("local-m": Luong et al. 2015, section 3.2). Past the source's end the
    window stays at the last token, so that it is never empty; the paper says nothing of that case.
    """

    def first_alignment(self, prepared: PreparedMemory) -> Alignment:
        return (prepared.mask.new_zeros(prepared.mask.size(0), 1, dtype=torch.long),)  # t

    def weigh(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, Alignment]:
        (t,) = alignment
        last = prepared.mask.sum(1, keepdim=True) - 1
        centre = torch.minimum(t + torch.arange(query.size(1), device=t.device), last)  # [B, T]
        weights, _ = self.weigh_around(centre, query, prepared)
        return weights, (t + query.size(1),)


class LocalPAttention(LocalAttention):
    r"""
    p_t = L sigmoid(v_p^T tanh(W_p q)), a_ts = normalize(score)_s exp(-(s - p_t)^2 / (2 sigma^2)), sigma = D / 2
    ("local-p": Luong et al. 2015, eq. 9-10), where L is the row's number of tokens and s counts from 0. Deviation: the
    weights are scaled to sum to one again, which the product with the Gaussian does not.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.position_projection = StepLinear(config.query_size, config.hidden_size, bias=False)
        self.position_score = StepLinear(config.hidden_size, 1, bias=False)

    def weigh(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, Alignment]:
        share = self.position_score(torch.tanh(self.position_projection(query))).squeeze(-1)  # [B, T]
        share = torch.sigmoid(share.to(torch.promote_types(share.dtype, torch.float32)))
        centre = prepared.mask.sum(1, keepdim=True) * share
        weights, distance = self.weigh_around(centre, query, prepared)
        weights = weights * torch.exp(-2 * (distance / self.half_width) ** 2)  # at least e^-2 within the window
        total = weights.sum(-1, keepdim=True)
        return weights / total.masked_fill(total == 0, 1), alignment  # zero in a row without tokens


class MonotonicAttention(NormedAdditiveAttention):
    r"""
    score = g v^T / |v| tanh(W q + U m + b) + r, p = sigmoid(score)   (Raffel et al. 2017, section 2.4)

    p_ts is the probability that a reader who goes through the source and never back stops at s. In training the
    weights are those expected (eq. 13-14), with noise on the scores that teaches it to be decided:

        q_ts = (1 - p_t,s-1) q_t,s-1 + a_{t-1},s,  a_ts = p_ts q_ts

    computed in parallel by `LinearRecurrence`. In evaluation, its loss included, it stops at the first s with
    p_ts > 1/2 from where it stopped last (section 2.2), which is the same recurrence with p rounded. The first step
    starts at the row's first token.

    The weights sum to at most one: the rest is the probability of not having stopped. In evaluation they are all zero,
    and so is the context, once the reader has run through the source; from then on that stays so, as in the paper.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.feedback = True
        self.noise, self.first_offset = config.monotonic_noise, config.monotonic_bias
        self.offset = nn.Parameter(torch.tensor(float(config.monotonic_bias)))  # r

    def reset_weights(self) -> None:
        super().reset_weights()
        init.constant_(self.offset, self.first_offset)

    def score(self, query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return super().score(query, keys) + self.offset

    def first_alignment(self, prepared: PreparedMemory) -> Alignment:
        first = prepared.mask & (prepared.mask.cumsum(1) == 1)
        return (first.to(torch.promote_types(prepared.values.dtype, torch.float32)),)

    def weigh(
        self, query: torch.Tensor, prepared: PreparedMemory, alignment: Alignment
    ) -> tuple[torch.Tensor, Alignment]:
        (previous,) = alignment  # [B, S]
        scores = self.score(query, prepared.keys)[:, 0, 0].to(previous.dtype)
        if self.training:
            scores = scores + self.noise * torch.randn_like(scores)
            stop, go_on = torch.sigmoid(scores), torch.sigmoid(-scores)
        else:
            stop, go_on = (scores > 0).to(previous.dtype), (scores <= 0).to(previous.dtype)
        stop, go_on = stop * prepared.mask, go_on.masked_fill(~prepared.mask, 1)  # padding is passed over
        passing = F.pad(go_on, (1, -1))  # 1 - p_t,s-1
        nowhere = previous.new_zeros(previous.size(0), 1)  # q_t0
        arrived = LinearRecurrence.apply(passing.unsqueeze(-1), previous.unsqueeze(-1), nowhere).squeeze(-1)  # q_t
        weights = stop * arrived
        return weights[:, None, None], (weights,)
