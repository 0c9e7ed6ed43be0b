"""The source side: embeddings, encoder bodies, their output type, and the bridge to the decoder's first state.

Shapes: B batch, S source, E embedding, M memory width, L encoder layers, N states a cell (an LSTM has two).
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .recurrent_layers import CELLS, State


@dataclass
class RnnSeq2SeqEncoderOutput(ModelOutput):
    """
    The encoder's output. Every tensor is batch-first and a field of its own, because generate() repeats just those
    for its beams; the first three are always there, so that the tuple form is unambiguous.

    Args:
        last_hidden_state: the memory, [B, S, M]; zero at padding.
        final_state: each layer's state after the last token, directions side by side, [B, L, N, M].
        memory_mask: true where `last_hidden_state` is to be attended to, [B, S]. An encoder that shortens the source
            returns the shortened mask.
        hidden_states: embeddings and the output of every layer, if asked for.
        attentions: none in a recurrent encoder.
    """

    # A ModelOutput's fields need defaults; these three are always given.
    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]
    final_state: torch.Tensor = None  # type: ignore[assignment]
    memory_mask: torch.Tensor = None  # type: ignore[assignment]
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class EncoderLayer(GradientCheckpointingLayer):
    """One recurrent layer of the encoder, in one direction or both (Schuster & Paliwal 1997)."""

    def __init__(self, config: RnnSeq2SeqConfig, input_size: int):
        super().__init__()
        cell = CELLS[config.cell_type]
        size = config.encoder_direction_size
        directions = ["forward_layer", "backward_layer"] if config.bidirectional else ["forward_layer"]
        self.directions = nn.ModuleDict(
            {name: cell(input_size, size, config.recurrent_dropout, config.zoneout) for name in directions}
        )

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, S, D], mask [B, S] -> outputs [B, S, M], final state [B, N, M]."""
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


class RnnEncoder(nn.Module):
    """
    Stacked recurrent layers, with dropout between them and optionally residual connections from the second on. These
    change the outputs, and so the memory; the final states stay each layer's own.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        widths = [config.embedding_size] + [config.memory_size] * (config.encoder_layers - 1)
        self.layers = nn.ModuleList([EncoderLayer(config, width) for width in widths])
        self.dropout = nn.Dropout(config.dropout)
        self.residual = config.encoder_residual

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[RnnSeq2SeqEncoderOutput, list[torch.Tensor]]:
        """Embedded source [B, S, E], mask [B, S] or `None` if all are tokens -> output, every layer's output."""
        finals, outputs = [], []
        for index, layer in enumerate(self.layers):
            source = x if index == 0 else self.dropout(x)
            output, final = layer(source, mask)
            x = output + x if self.residual and index > 0 else output
            outputs.append(x)
            finals.append(final)
        tokens = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        final_state = torch.stack(finals, dim=1)  # [B, L, N, M]
        return RnnSeq2SeqEncoderOutput(last_hidden_state=x, final_state=final_state, memory_mask=tokens), outputs


ENCODERS: dict[str, type[RnnEncoder]] = {"rnn": RnnEncoder}


class RnnSeq2SeqEncoder(nn.Module):
    """Source embeddings and an encoder body: what `model.get_encoder()` returns."""

    main_input_name = "input_ids"

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.source_size, config.embedding_size, config.pad_token_id)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.body = ENCODERS[config.encoder_type](config)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> RnnSeq2SeqEncoderOutput:
        """
        Args:
            input_ids: source ids, [B, S].
            attention_mask: 1 at tokens and 0 at padding, which may stand on either side, [B, S].
            inputs_embeds: embedded source instead of ids, [B, S, E].
            output_attentions: generate() hands it to every encoder; a recurrent one has no attentions to return.
            output_hidden_states: return embeddings and every layer's output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        expected = inputs_embeds.shape[:2]
        if attention_mask is not None and attention_mask.shape != expected:
            raise ValueError(
                f"`attention_mask` must have the source's shape [batch, source length] = {tuple(expected)}, "
                f"got {tuple(attention_mask.shape)}."
            )
        x = self.embedding_dropout(inputs_embeds)
        output, layer_outputs = self.body(x, None if attention_mask is None else attention_mask.to(torch.bool))
        if output_hidden_states if output_hidden_states is not None else self.config.output_hidden_states:
            output.hidden_states = (inputs_embeds, *layer_outputs)
        return output


class Bridge(nn.Module):
    """
    The decoder's first state from the encoder's output. Here: zeros, so that the decoder learns of the source by
    attention alone.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.num_layers, self.hidden_size = config.decoder_layers, config.hidden_size
        self.num_states = CELLS[config.decoder_cell].num_states

    def forward(self, output: RnnSeq2SeqEncoderOutput) -> tuple[State, ...]:
        """One state a decoder layer, bottom first; tensors [B, H]."""
        return self._split(self.states(output))

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        """All decoder layers' states in one tensor, [B, L, N, H] in the decoder's sizes."""
        memory = output.last_hidden_state
        return memory.new_zeros(memory.size(0), self.num_layers, self.num_states, self.hidden_size)

    def _split(self, states: torch.Tensor) -> tuple[State, ...]:
        return tuple(tuple(layer.unbind(1)) for layer in states.unbind(1))


class LastBridge(Bridge):
    """
    The encoder's final states, layer by layer (Sutskever et al. 2014, section 2).

    With unequal depths, decoder layer l takes encoder layer min(l, L_encoder - 1). Where the widths differ a matrix
    without bias, the same for all layers, maps one to the other. An LSTM decoder behind an encoder without cell
    states starts with c = 0; a decoder without cell states takes h alone.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.source_layers = [min(layer, config.encoder_layers - 1) for layer in range(config.decoder_layers)]
        equal = config.memory_size == config.hidden_size
        self.projection = nn.Identity() if equal else nn.Linear(config.memory_size, config.hidden_size, bias=False)

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        states = self.projection(output.final_state[:, self.source_layers, : self.num_states])
        missing = self.num_states - states.size(2)
        return nn.functional.pad(states, (0, 0, 0, missing))


class LinearBridge(Bridge):
    """
    tanh(W h + b) of the top encoder layer's final h (Bahdanau et al. 2015, appendix A.2.2, who take the backward
    direction alone); every layer and state has rows of W of its own.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.projection = nn.Linear(config.memory_size, self.num_layers * self.num_states * self.hidden_size)

    def summary(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        """[B, M]"""
        return output.final_state[:, -1, 0]

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        states = torch.tanh(self.projection(self.summary(output)))
        return states.view(-1, self.num_layers, self.num_states, self.hidden_size)


class MeanBridge(LinearBridge):
    """tanh(W mean_s(m_s) + b) over the tokens' memory (Sennrich et al. 2017, Nematus, section 3)."""

    def summary(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        mask = output.memory_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)  # [B, S, 1]
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)


BRIDGES: dict[str, type[Bridge]] = {
    "zeros": Bridge,
    "last": LastBridge,
    "mean": MeanBridge,
    "linear": LinearBridge,
}
