"""From what the decoder made to scores over the target vocabulary.

Shapes: B batch, S source, T target, F features, C context, Q query, E embedding, V vocabulary.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .recurrent_layers import GateNorm
from .step_products import StepLinear


class HeadInput(NamedTuple):
    """All that a head may read."""

    features: torch.Tensor  # [B, T, F]
    # Only for a head that copies:
    weights: torch.Tensor | None = None  # attention's, [B, heads, T, S]
    gate_input: torch.Tensor | None = None  # [B, T, C + Q + E]
    copy_ids: torch.Tensor | None = None  # the target id of every source position, [B, S]
    extra_ids: int = 0  # how many ids beyond the vocabulary `copy_ids` may hold


class Head(nn.Module):
    """
    Args:
        config: the model's configuration.
        features_size: width F of the decoder's features.
        gate_size: width of `gate_input`.
    """

    raw = False  # are the features to be the parts themselves, [c; s; x]?
    copies = False  # does it copy from the source?
    output: nn.Linear  # to the vocabulary; tied to the target embedding by `tie_word_embeddings`

    def __init__(self, config: RnnSeq2SeqConfig, features_size: int, gate_size: int):
        super().__init__()

    def forward(self, inputs: HeadInput) -> torch.Tensor:
        """Scores [B, T, V]; of a head that copies log-probabilities [B, T, V + `extra_ids`]."""
        raise NotImplementedError


class LinearHead(Head):
    """
    scores = W x + b. With `tie_word_embeddings` W is the target embedding (Press & Wolf 2017), and a matrix without
    bias first brings the features to the embedding's width where the two differ.
    """

    def __init__(self, config: RnnSeq2SeqConfig, features_size: int, gate_size: int):
        super().__init__(config, features_size, gate_size)
        width = config.target_embedding_size if config.tie_word_embeddings else features_size
        self.projection = nn.Identity() if width == features_size else StepLinear(features_size, width, bias=False)
        self.output = StepLinear(width, config.vocab_size)

    def forward(self, inputs: HeadInput) -> torch.Tensor:
        return self.output(self.before_output(inputs))

    def before_output(self, inputs: HeadInput) -> torch.Tensor:
        """What the output layer reads, [B, T, *]."""
        return self.projection(inputs.features)


class DeepHead(LinearHead):
    """
    A maxout layer before the output layer (Bahdanau et al. 2015, A.2.2; Goodfellow et al. 2013):

        u = U_o s + V_o E y + C_o c,  t_j = max(u_2j-1, u_2j),  scores = W_o t + b

    U_o, V_o and C_o are one matrix on [c; s; x], without a bias as in the paper; b, which the paper does not have, is
    the other heads'.
    """

    raw = True

    def __init__(self, config: RnnSeq2SeqConfig, features_size: int, gate_size: int):
        super().__init__(config, config.head_size, gate_size)
        self.maxout = StepLinear(features_size, 2 * config.head_size, bias=False)

    def before_output(self, inputs: HeadInput) -> torch.Tensor:
        pairs = self.maxout(inputs.features).unflatten(-1, (-1, 2))  # [B, T, head_size, 2]
        return self.projection(pairs.amax(-1))


class DeepTanhHead(LinearHead):
    """
    A hidden layer as wide as the embeddings or as `head_hidden_size` says (Sennrich et al. 2017, Nematus, eq. 5-6):

        t = tanh(W_c c + W_s s + W_x x + b),  scores = W_o t + b_o

    and with `layer_norm` t = tanh(N_c(W_c c + b_c) + N_s(W_s s + b_s) + N_x(W_x x + b_x)).
    """

    raw = True

    def __init__(self, config: RnnSeq2SeqConfig, features_size: int, gate_size: int):
        super().__init__(config, config.head_size, gate_size)
        own = config.hidden_size + config.target_embedding_size  # what of [c; s; x] is not c
        parts = [features_size - own, config.hidden_size, config.target_embedding_size]
        self.widths = parts if config.layer_norm else [features_size]
        self.hidden = nn.ModuleList([StepLinear(width, config.head_size) for width in self.widths])
        self.norm = GateNorm(len(self.widths), config.head_size) if config.layer_norm else nn.Identity()

    def before_output(self, inputs: HeadInput) -> torch.Tensor:
        parts = inputs.features.split(self.widths, dim=-1)
        mapped = torch.cat([layer(part) for layer, part in zip(self.hidden, parts, strict=True)], dim=-1)
        added = self.norm(mapped).unflatten(-1, (len(self.widths), -1)).sum(-2)
        return self.projection(torch.tanh(added))


class PointerGeneratorHead(LinearHead):
    """
    A mixture of generating a word and copying one from the source (See et al. 2017, eq. 8-9):

        p_gen = sigmoid(w^T [c; s; x] + b),  P(w) = p_gen P_vocab(w) + (1 - p_gen) sum_{i: w_i = w} a_i

    with P_vocab = softmax(scores) and a the mean of attention's heads. Returned are logarithms, log P(w), in float32
    or wider; of a word beyond the vocabulary without attention that of the smallest normal float32, -87.3.

    Deviation: weights that do not sum to one (a window's, a monotonic alignment's, those of an empty source) leave
    their share to P_vocab, so that P always sums to one.
    """

    copies = True

    def __init__(self, config: RnnSeq2SeqConfig, features_size: int, gate_size: int):
        super().__init__(config, features_size, gate_size)
        self.gate = StepLinear(gate_size, 1)

    def forward(self, inputs: HeadInput) -> torch.Tensor:
        assert inputs.copy_ids is not None
        assert inputs.weights is not None
        scores = super().forward(inputs)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        tiny = torch.finfo(torch.float32).tiny
        gate = self.gate(inputs.gate_input).to(dtype)  # [B, T, 1]
        attention = inputs.weights.to(dtype).mean(1)  # [B, T, S]

        unused = 1 - attention.sum(-1, keepdim=True)
        unused = unused.where(unused > 8 * torch.finfo(inputs.weights.dtype).eps, tiny)  # less than that is rounding
        log_copy = F.logsigmoid(-gate)
        log_generate = torch.logaddexp(F.logsigmoid(gate), log_copy + unused.log())
        log_p = log_generate + F.log_softmax(scores.to(dtype), dim=-1)  # [B, T, V]
        log_p = F.pad(log_p, (0, inputs.extra_ids), value=math.log(tiny))

        # Only the source's words change. Each is dealt with at its first position, so a repeated one changes once.
        first = self.first_positions(inputs.copy_ids, log_p.size(-1)).unsqueeze(1).expand_as(attention)
        mass = torch.zeros_like(attention).scatter_add(2, first, attention)  # [B, T, S]; 0 at later positions
        ids = inputs.copy_ids.unsqueeze(1).expand_as(attention)
        generated = log_p.gather(2, ids)
        mixed = torch.logaddexp(generated, log_copy + mass.clamp_min(tiny).log())
        return log_p.scatter_add(2, ids, torch.where(mass > 0, mixed - generated, 0))

    @staticmethod
    def first_positions(ids: torch.Tensor, size: int) -> torch.Tensor:
        """Where in its row each id stands for the first time: ids [B, S], all below `size` -> [B, S]."""
        positions = torch.arange(ids.size(1), device=ids.device).expand_as(ids)
        first = positions.new_full((ids.size(0), size), ids.size(1)).scatter_reduce(1, ids, positions, "amin")
        return first.gather(1, ids)


HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "deep": DeepHead,
    "deep_tanh": DeepTanhHead,
    "pointer_generator": PointerGeneratorHead,
}


def check_copy_ids(
    config: RnnSeq2SeqConfig, copy_ids: torch.Tensor | None, source_ids: torch.Tensor | None, weights: torch.Tensor
) -> tuple[torch.Tensor | None, int]:
    """
    `HeadInput`'s last two.

    Args:
        config: the model's configuration.
        copy_ids: what a user gave, which may go beyond the vocabulary by S, [B, S].
        source_ids: what the encoder read, [B, S], `None` if it was given embeddings.
        weights: attention's, [B, heads, T, S].

    Raises:
        ValueError: they are missing or of another shape.
    """
    if not HEADS[config.head_type].copies:
        return None, 0
    if copy_ids is None:
        if config.shared_vocabulary and source_ids is not None:
            return source_ids, 0
        raise ValueError(
            f"`config.head_type`={config.head_type!r} needs `copy_ids`, the target id of every source position, where "
            "there are two vocabularies or no `input_ids`; a RnnSeq2SeqTokenizer with `copies_source=True` makes them."
        )
    expected = (weights.size(0), weights.size(3))
    if copy_ids.shape != expected:
        raise ValueError(
            f"`copy_ids` must have the source's shape [batch, source length] = {expected}, "
            f"got {tuple(copy_ids.shape)}."
        )
    return copy_ids, expected[1]
