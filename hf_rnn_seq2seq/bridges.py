"""From the encoder's output to the decoder's first state.

Shapes: B batch, S source, M memory width, L layers, N states a cell (an LSTM has two), H hidden.
"""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .encoders import RnnSeq2SeqEncoderOutput
from .recurrent_layers import CELLS, GateNorm, State


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

    With unequal depths, decoder layer l takes encoder layer min(l, L_encoder - 1); of an encoder without recurrence
    all take the mean of its memory. Where the widths differ a matrix without bias, the same for all layers, maps one
    to the other. An LSTM decoder behind an encoder without cell states starts with c = 0; a decoder without cell
    states takes h alone.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.source_layers = [min(layer, config.final_layers - 1) for layer in range(config.decoder_layers)]
        equal = config.memory_size == config.hidden_size
        self.projection = nn.Identity() if equal else nn.Linear(config.memory_size, config.hidden_size, bias=False)

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        states = self.projection(output.final_state[:, self.source_layers, : self.num_states])
        missing = self.num_states - states.size(2)
        return nn.functional.pad(states, (0, 0, 0, missing))


class LinearBridge(Bridge):
    """
    tanh(W h + b) of the top encoder layer's final h (Bahdanau et al. 2015, appendix A.2.2, who take the backward
    direction alone), which without recurrence is the mean of its memory; every layer and state has rows of W of its
    own, and with `layer_norm` a norm of its own, tanh(N(W h + b)).
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        count = self.num_layers * self.num_states
        self.projection = nn.Linear(config.memory_size, count * self.hidden_size)
        self.norm = GateNorm(count, self.hidden_size) if config.layer_norm else nn.Identity()

    def summary(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        """[B, M]"""
        return output.final_state[:, -1, 0]

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        return torch.tanh(self.mapped(output))

    def mapped(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        """[B, L, N, H], before the tanh."""
        states = self.norm(self.projection(self.summary(output)))
        return states.view(-1, self.num_layers, self.num_states, self.hidden_size)


class AffineBridge(LinearBridge):
    """[`LinearBridge`] without its tanh: W h + b (JoeyNMT's `init_hidden: last`, where W selects and b is zero)."""

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        return self.mapped(output)


class MeanBridge(LinearBridge):
    """tanh(W mean_s(m_s) + b) over the tokens' memory (Sennrich et al. 2017, Nematus, section 3)."""

    def summary(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        mask = output.memory_mask.unsqueeze(-1).to(output.last_hidden_state.dtype)  # [B, S, 1]
        return (output.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)


class DenseBridge(Bridge):
    """
    relu(W_n [f_1n; ...; f_Ln] + b_n) of all encoder layers' final states, for each of the decoder's n states one map
    to all its layers (See et al. 2017, whose `reduce_states` has one layer on both sides; OpenNMT's dense bridge).

    A decoder's cell with more states than the encoder's takes the encoder's last one for the rest.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.source_states = [min(state, config.encoder_cells - 1) for state in range(self.num_states)]
        width = config.final_layers * config.memory_size
        self.projections = nn.ModuleList(
            [nn.Linear(width, self.num_layers * self.hidden_size) for _ in self.source_states]
        )

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        states = [
            torch.relu(projection(output.final_state[:, :, source].flatten(1)))  # [B, L * M] -> [B, L * H]
            for projection, source in zip(self.projections, self.source_states, strict=True)
        ]
        return torch.stack(states, dim=1).unflatten(2, (self.num_layers, -1)).transpose(1, 2)


class LayerwiseBridge(Bridge):
    """
    W_n f_ln + b_n of the encoder's final states f, layer by layer as in [`LastBridge`], with one affine map for all h
    and one for all c (fairseq's `lstm` where the widths differ).

    A decoder's cell with more states than the encoder's takes the encoder's last one for the rest.
    """

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.source_layers = [min(layer, config.final_layers - 1) for layer in range(config.decoder_layers)]
        self.source_states = [min(state, config.encoder_cells - 1) for state in range(self.num_states)]
        self.projections = nn.ModuleList(
            [nn.Linear(config.memory_size, config.hidden_size) for _ in self.source_states]
        )

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        final = output.final_state[:, self.source_layers]  # [B, L, N, M], the decoder's L
        states = [
            projection(final[:, :, source])
            for projection, source in zip(self.projections, self.source_states, strict=True)
        ]
        return torch.stack(states, dim=2)


class LearnedBridge(Bridge):
    """A first state for every layer that is the same for every source, and learnt (Yoyodyne). It starts at zero."""

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        self.initial = nn.Parameter(torch.empty(self.num_layers, self.num_states, self.hidden_size))

    def reset_weights(self) -> None:
        init.zeros_(self.initial)

    def states(self, output: RnnSeq2SeqEncoderOutput) -> torch.Tensor:
        memory = output.last_hidden_state
        return self.initial.to(memory.dtype).expand(memory.size(0), -1, -1, -1)


BRIDGES: dict[str, type[Bridge]] = {
    "zeros": Bridge,
    "last": LastBridge,
    "mean": MeanBridge,
    "linear": LinearBridge,
    "affine": AffineBridge,
    "layerwise": LayerwiseBridge,
    "dense": DenseBridge,
    "learned": LearnedBridge,
}
