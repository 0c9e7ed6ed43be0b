"""Encoder bodies: from the embedded source to the memory that the decoder attends to.

Shapes: B batch, S source, E embedding, M memory width, L layers, N states a cell (an LSTM has two), H width of one
direction; S' what a body that shortens the source makes of S.
"""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .dropout import Dropout
from .recurrent_layers import CELLS, RecurrentLayer, State


class BodyOutput(NamedTuple):
    """What a body makes of an embedded source. Everything is zero at padding."""

    memory: torch.Tensor  # [B, S', M]
    final_state: torch.Tensor  # [B, L, N, M]; without recurrence the mean of the memory, [B, 1, 1, M]
    mask: torch.Tensor  # [B, S'], true at tokens
    layer_outputs: list[torch.Tensor]  # of every layer, [B, S', *]
    attentions: tuple[torch.Tensor, ...] = ()  # of every layer of self-attention, if asked for, [B, heads, S, S]
    memory_keys: torch.Tensor | None = None  # what attention scores where it is not the memory, [B, S, M]

    def flip(self) -> "BodyOutput":
        """The same with all positions in reverse order."""
        return self._replace(
            memory=self.memory.flip(1),
            mask=self.mask.flip(1),
            layer_outputs=[output.flip(1) for output in self.layer_outputs],
            attentions=tuple(weights.flip(-2, -1) for weights in self.attentions),
            memory_keys=None if self.memory_keys is None else self.memory_keys.flip(1),
        )


def token_mask(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`mask`, or where there is none, true for all of x [B, S, *]: [B, S]."""
    return x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask


def zero_padding(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """x [B, S, *] with zeros where `mask` [B, S] is false."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def first_token(mask: torch.Tensor) -> torch.Tensor:
    """Where each row's first token stands, [B, 1]; 0 in a row without tokens."""
    return mask.int().argmax(dim=1, keepdim=True)


def token_positions(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Positions in x [B, S, *] counted from each row's first token, [B, S] or, the same for all rows, [1, S]."""
    positions = torch.arange(x.size(1), device=x.device).unsqueeze(0)
    return positions if mask is None else (positions - first_token(mask)).clamp(min=0)


def mean_state(memory: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of the memory [B, S, M], which is zero at padding, over the tokens: [B, 1, 1, M]."""
    if mask is None:
        mean = memory.mean(1)
    else:
        mean = memory.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(memory.dtype)
    return mean[:, None, None]


class EncoderBody(nn.Module):
    """What all bodies have in common."""

    shortens = False  # is a memory position made of several source positions?

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool = False) -> BodyOutput:
        """
        Args:
            x: the embedded source, [B, S, E].
            mask: true at tokens, [B, S], with padding on either side; `None` if all are tokens.
            output_attentions: return the weights of a body that has self-attention.
        """
        raise NotImplementedError


class DeepTransition(nn.Module):
    """
    A recurrent layer whose step goes through several cells, the first with the input (Pascanu et al. 2014; Miceli
    Barone et al. 2017): s <- RNN_1(x_t, s), s <- RNN_k(s) for the others.
    """

    def __init__(self, cells: list[RecurrentLayer]):
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, x: torch.Tensor, state: None, mask: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        """As of a [`RecurrentLayer`] that starts from zeros: x [B, T, D], mask [B, T] -> [B, T, H], the last state."""
        cells: list[RecurrentLayer] = list(self.cells)  # type: ignore[arg-type]  # a ModuleList has no element type
        noises = [cell.sample_noise(x) for cell in cells]
        current, outputs = cells[0].zero_state(x), []
        for t, x_t in enumerate(zero_padding(x, mask).unbind(1)):
            new = current
            for cell, noise in zip(cells, noises, strict=True):
                new = cell.step(x_t, new, noise)
                x_t = x_t[:, :0]  # the cells after the first have no input
            if mask is not None:
                new = tuple(torch.where(mask[:, t, None], n, o) for n, o in zip(new, current, strict=True))
            current = new
            outputs.append(current[0])
        return zero_padding(torch.stack(outputs, dim=1), mask), current


class EncoderLayer(GradientCheckpointingLayer):
    """
    One recurrent layer of the encoder, in one direction or both (Schuster & Paliwal 1997), with
    `encoder_transition_depth` above 1 a [`DeepTransition`].
    """

    def __init__(self, config: RnnSeq2SeqConfig, input_size: int, bidirectional: bool):
        super().__init__()
        size = config.encoder_direction_size
        widths = [input_size] + [0] * (config.encoder_transition_depth - 1)
        self.directions = nn.ModuleDict()
        for name in ["forward_layer", "backward_layer"] if bidirectional else ["forward_layer"]:
            cells = [CELLS[config.cell_type](w, size, config.recurrent_dropout, config.zoneout) for w in widths]
            self.directions[name] = DeepTransition(cells) if len(cells) > 1 else cells[0]

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, S, D], mask [B, S] -> outputs [B, S, H or 2H], final state [B, N, H or 2H]."""
        outputs, finals = [], []
        for name, layer in self.directions.items():
            if name == "forward_layer":
                output, final = layer(x, None, mask)
            else:  # flipping padding and all is right: a layer takes padding on either side
                output, final = layer(x.flip(1), None, None if mask is None else mask.flip(1))
                output = output.flip(1)
            outputs.append(output)
            finals.append(torch.stack(final, dim=1))  # [B, N, H]
        return torch.cat(outputs, dim=-1), torch.cat(finals, dim=-1)


class RnnEncoder(EncoderBody):
    """
    Stacked recurrent layers in one direction or both (Schuster & Paliwal 1997), with dropout between them and optional
    residual connections. These change the outputs, and so the memory; the final states stay each layer's own.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(self.make_layers(config))
        self.dropout = Dropout(config.dropout)
        self.residual_start = self.first_residual(config)

    def make_layers(self, config: RnnSeq2SeqConfig) -> list[EncoderLayer]:
        """Bottom first."""
        widths = [config.embedding_size] + [config.memory_size] * (config.encoder_layers - 1)
        return [EncoderLayer(config, width, config.bidirectional) for width in widths]

    def first_residual(self, config: RnnSeq2SeqConfig) -> int:
        """The first layer, counted from 0, whose input is added to its output."""
        return config.residual_start - 1 if config.encoder_residual else config.encoder_layers

    def final_state(self, finals: list[torch.Tensor]) -> torch.Tensor:
        """Every layer's final state [B, N, M], bottom first -> [B, L, N, M]."""
        return torch.stack(finals, dim=1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool = False) -> BodyOutput:
        finals, outputs = [], []
        for index, layer in enumerate(self.layers):
            inputs = x if index == 0 else self.dropout(x)
            output, final = layer(inputs, mask)
            x = output + x if index >= self.residual_start else output
            outputs.append(x)
            finals.append(final)
        return BodyOutput(x, self.final_state(finals), token_mask(x, mask), outputs)


class GnmtEncoder(RnnEncoder):
    """
    The first layer in both directions, the others forwards only, with residual connections from the third on (Wu et
    al. 2016, sections 3.1-3.2 and figure 1). Every direction is `encoder_direction_size` wide.

    Of the first layer's final states the backward direction's is handed on, as in tf/nmt, which is as wide as the
    other layers'; if there is no other layer, both.
    """

    def make_layers(self, config: RnnSeq2SeqConfig) -> list[EncoderLayer]:
        size = config.encoder_direction_size
        layers = [EncoderLayer(config, config.embedding_size, bidirectional=True)]
        for index in range(1, config.encoder_layers):
            layers.append(EncoderLayer(config, 2 * size if index == 1 else size, bidirectional=False))
        return layers

    def first_residual(self, config: RnnSeq2SeqConfig) -> int:
        return 2

    def final_state(self, finals: list[torch.Tensor]) -> torch.Tensor:
        bottom, *upper = finals  # [B, N, 2H], then [B, N, H]
        if upper:
            _, bottom = bottom.chunk(2, dim=-1)
        return torch.stack([bottom, *upper], dim=1)


class PyramidalEncoder(RnnEncoder):
    """
    Every layer after the first reads its input's neighbouring steps in pairs (Chan et al. 2016, eq. 5):

        h^l = RNN_l([h^{l-1}_1; h^{l-1}_2], [h^{l-1}_3; h^{l-1}_4], ...)

    so that L layers leave ceil(S / 2^(L-1)) of S tokens; an odd last step is joined with zeros. Pairs are counted
    from each row's first token: rows are moved to the left before the first joining, and so is their padding to the
    right in memory and mask.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.shortens = config.encoder_layers > 1

    def make_layers(self, config: RnnSeq2SeqConfig) -> list[EncoderLayer]:
        widths = [config.embedding_size] + [2 * config.memory_size] * (config.encoder_layers - 1)
        return [EncoderLayer(config, width, config.bidirectional) for width in widths]

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool = False) -> BodyOutput:
        finals, outputs = [], []
        for index, layer in enumerate(self.layers):
            if index == 1 and mask is not None:
                x, mask = self.move_left(x, mask)
            if index > 0:
                x, mask = self.join(self.dropout(x), mask)
            x, final = layer(x, mask)
            outputs.append(x)
            finals.append(final)
        return BodyOutput(x, self.final_state(finals), token_mask(x, mask), outputs)

    @staticmethod
    def move_left(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns every row of x [B, S, M] and mask [B, S] round until its first token stands first."""
        length = mask.size(1)
        source = (torch.arange(length, device=x.device) + first_token(mask)) % length  # [B, S]
        return x.gather(1, source.unsqueeze(-1).expand_as(x)), mask.gather(1, source)

    @staticmethod
    def join(x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, S, M], zero at padding -> [B, ceil(S/2), 2M]; mask [B, S] -> [B, ceil(S/2)]."""
        odd = x.size(1) % 2
        x = F.pad(x, (0, 0, 0, odd)).unflatten(1, (-1, 2)).flatten(2)
        return x, None if mask is None else F.pad(mask, (0, odd)).unflatten(1, (-1, 2)).any(-1)


# First weights are asked of the module that holds the parameters: transformers passes by one that has none of its own.


class Convolution(nn.Conv1d):
    """torch's, which starts as Xavier-uniform."""

    def reset_weights(self) -> None:
        init.xavier_uniform_(self.weight)
        init.zeros_(self.bias)  # type: ignore[arg-type]  # a convolution may have none; this one has


class LayerNorm(nn.LayerNorm):
    """torch's, which starts as the bare normalisation."""

    def reset_weights(self) -> None:
        init.ones_(self.weight)
        init.zeros_(self.bias)


class ConvLayer(GradientCheckpointingLayer):
    """tanh(conv(x) + x): the residual connection ends before the tanh (Gehring et al. 2017, section 3.2)."""

    def __init__(self, config: RnnSeq2SeqConfig, dropout: float):
        super().__init__()
        kernel = config.encoder_kernel_size
        self.dropout = Dropout(dropout)
        self.conv = Convolution(config.memory_size, config.memory_size, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """x [B, S, M], zero at padding as it is beyond the borders, mask [B, S] -> [B, S, M]."""
        convolved = self.conv(self.dropout(x).transpose(1, 2)).transpose(1, 2)
        return zero_padding(torch.tanh(convolved + x), mask)


class ConvEncoder(EncoderBody):
    """
    Two stacks of convolutions over word and position embeddings (Gehring et al. 2017, "A convolutional encoder model
    for neural machine translation", section 3.2):

        e_s = w_s + l_s,  score(q, CNN-a(e)_s),  c = sum_s a_s CNN-c(e)_s

    CNN-a makes `memory_keys`, CNN-c the memory. Positions are counted from each row's first token.

    Deviations: both stacks are `encoder_layers` deep and equally wide, where the paper's CNN-c may be shallower and
    stays as wide as the embeddings; if the embeddings are not as wide as the encoder, one affine map for both stacks
    makes them so, and CNN-a's output is not mapped back. All layers have residual connections; the authors' code
    leaves out each stack's last. `dropout` is on the convolutions' inputs after the first layer, where they have none.
    `embedding_dropout` is on the word embeddings alone. Without attention there is no CNN-a.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        embedding, width = config.embedding_size, config.memory_size
        self.position_embedding = nn.Embedding(config.max_source_positions, embedding)
        self.projection = nn.Identity() if embedding == width else nn.Linear(embedding, width)
        dropouts = [0.0] + [config.dropout] * (config.encoder_layers - 1)
        self.layers = nn.ModuleList([ConvLayer(config, dropout) for dropout in dropouts])  # CNN-c
        scored = dropouts if config.attention_type != "none" else []
        self.key_layers = nn.ModuleList([ConvLayer(config, dropout) for dropout in scored])  # CNN-a

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool = False) -> BodyOutput:
        longest = self.position_embedding.num_embeddings
        if x.size(1) > longest:
            raise ValueError(
                f"The source is {x.size(1)} positions long, padding included, but `max_source_positions`={longest} is "
                "the longest that this 'conv' encoder has positions for."
            )
        x = x + self.position_embedding(token_positions(x, mask))
        x = zero_padding(self.projection(x), mask)
        memory, keys = x, x
        outputs = []
        for layer in self.layers:
            memory = layer(memory, mask)
            outputs.append(memory)
        for layer in self.key_layers:
            keys = layer(keys, mask)
        return BodyOutput(
            memory,
            mean_state(memory, mask),
            token_mask(memory, mask),
            outputs,
            memory_keys=keys if len(self.key_layers) else None,
        )


def sinusoids(positions: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """
    sin(p / 10000^(2i/M)) at 2i and cos of the same at 2i + 1 (Vaswani et al. 2017, section 3.5): positions [B, S] ->
    [B, S, M].
    """
    exact = torch.promote_types(dtype, torch.float32)  # neighbouring positions look alike in half precision
    even = torch.arange(0, width, 2, device=positions.device, dtype=exact)
    angles = positions.unsqueeze(-1) * torch.exp(even * (-math.log(10000) / width))  # [B, S, M/2]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width].to(dtype)


class SelfAttention(nn.Module):
    """Multi-head attention of the source to itself (Vaswani et al. 2017, section 3.2.2), without biases."""

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.heads, width = config.encoder_heads, config.memory_size
        self.query_projection = nn.Linear(width, width, bias=False)
        self.key_projection = nn.Linear(width, width, bias=False)
        self.value_projection = nn.Linear(width, width, bias=False)
        self.output_projection = nn.Linear(width, width, bias=False)

    def forward(
        self, x: torch.Tensor, visible: torch.Tensor | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, S, M], `visible` [B, 1, 1, S], true at what may be attended to -> [B, S, M], [B, heads, S, S]."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, S, M / heads]
            for projection in (self.query_projection, self.key_projection, self.value_projection)
        )
        weights = None
        if output_attentions:  # torch's kernel keeps its weights to itself
            scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            if visible is not None:
                scores = scores.masked_fill(~visible, -math.inf)
            weights = torch.softmax(scores, dim=-1).to(value.dtype)
            mixed = weights @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        return self.output_projection(mixed.transpose(1, 2).flatten(2)), weights


class TransformerLayer(GradientCheckpointingLayer):
    """
    Self-attention, then a feed-forward network (Vaswani et al. 2017, sections 3.1-3.3), each with the norm in front
    and a residual connection around (Chen et al. 2018):

        y = x + attention(norm(x)),  z = y + W_2 relu(W_1 norm(y) + b_1) + b_2
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        width = config.memory_size
        inner = 4 * width if config.encoder_ffn_size is None else config.encoder_ffn_size
        self.attention_norm, self.ffn_norm = LayerNorm(width), LayerNorm(width)
        self.attention = SelfAttention(config)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, visible: torch.Tensor | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, S, M], `visible` [B, 1, 1, S] -> [B, S, M], weights [B, heads, S, S] if asked for."""
        attended, weights = self.attention(self.attention_norm(x), visible, output_attentions)
        x = x + self.dropout(attended)
        return x + self.dropout(self.ffn(self.ffn_norm(x))), weights


class TransformerEncoder(EncoderBody):
    """
    Layers of self-attention over embeddings times sqrt(E) plus sinusoidal positions, and a last norm (Vaswani et al.
    2017, with the norm first: Chen et al. 2018). Positions are counted from each row's first token.

    Deviations: embeddings that are not as wide as the encoder pass an affine map before positions are added;
    `embedding_dropout` is on the embeddings without the positions; attention has no biases, and its weights no
    dropout.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        embedding, width = config.embedding_size, config.memory_size
        self.scale = math.sqrt(embedding)
        self.projection = nn.Identity() if embedding == width else nn.Linear(embedding, width)
        self.layers = nn.ModuleList([TransformerLayer(config) for _ in range(config.encoder_layers)])
        self.norm = LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool = False) -> BodyOutput:
        x = self.projection(x * self.scale)
        x = zero_padding(x + sinusoids(token_positions(x, mask), x.size(-1), x.dtype), mask)
        visible = None
        if mask is not None:
            # A row without tokens looks at all its padding, whose softmax is finite; its result is made zero below.
            visible = (mask | ~mask.any(1, keepdim=True))[:, None, None]  # [B, 1, 1, S]
        outputs, attentions = [], []
        for layer in self.layers:
            x, weights = layer(x, visible, output_attentions)
            x = zero_padding(x, mask)
            outputs.append(x)
            if weights is not None:
                attentions.append(weights if mask is None else weights * mask[:, None, None])
        memory = outputs[-1] = zero_padding(self.norm(x), mask)
        return BodyOutput(
            memory,
            mean_state(memory, mask),
            token_mask(memory, mask),
            outputs,
            tuple(attentions),
        )


class EmbeddingEncoder(EncoderBody):
    """No encoder beyond the embeddings: they are the memory, and the output of its one layer."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None, output_attentions: bool = False) -> BodyOutput:
        memory = zero_padding(x, mask)
        return BodyOutput(memory, mean_state(memory, mask), token_mask(memory, mask), [memory])


ENCODERS: dict[str, type[EncoderBody]] = {
    "rnn": RnnEncoder,
    "gnmt": GnmtEncoder,
    "pyramidal": PyramidalEncoder,
    "conv": ConvEncoder,
    "transformer": TransformerEncoder,
    "embedding": EmbeddingEncoder,
}
