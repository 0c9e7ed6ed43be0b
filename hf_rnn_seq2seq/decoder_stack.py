"""The decoder's recurrent layers: over one token or a sequence, all of them or some.

Shapes: B batch, T target, D input, H hidden.
"""

import torch
from torch import nn

from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .dropout import Dropout
from .recurrent_layers import CELLS, RecurrentLayer, State


def make_layer(config: RnnSeq2SeqConfig, width: int) -> RecurrentLayer:
    """A recurrent layer of the decoder whose input is `width` wide."""
    return CELLS[config.decoder_cell](width, config.hidden_size, config.recurrent_dropout, config.zoneout)


class DecoderStack(nn.Module):
    """
    Unidirectional recurrent layers with dropout between them and optional residual connections. A residual connection
    changes what a layer hands up, never its own state.

    Args:
        config: the model's configuration.
        widths: of every layer's input, bottom first.
    """

    layers: list[RecurrentLayer]

    def __init__(self, config: RnnSeq2SeqConfig, widths: list[int]):
        super().__init__()
        self.layers = nn.ModuleList([make_layer(config, width) for width in widths])  # type: ignore[assignment]
        self.dropout = Dropout(config.dropout)
        self.residual_start = config.residual_start - 1 if config.decoder_residual else len(widths)

    def forward(
        self,
        x: torch.Tensor,
        states: tuple[State, ...],
        noise: tuple[State, ...],
        extra: torch.Tensor | None = None,
        first: int = 0,
        end: int | None = None,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[State, ...]]:
        """
        The layers from `first` to before `end` (all of them by default). A single token takes the cells' step, more
        take the fused kernels.

        Args:
            x: what enters the lowest of them, [B, T, D].
            states: of all layers of the stack.
            noise: each layer's `sample_noise`, for steps; a sequence draws its own.
            extra: joins the input of each of these layers, behind dropout and beside residual connections,
                [B, T, D'].

        Returns:
            The outputs of each of them, [B, T, H], and their last states.
        """
        outputs = []
        new_states = []
        for index in range(first, len(self.layers) if end is None else end):
            inputs = x if index == 0 else self.dropout(x)
            if extra is not None:
                inputs = torch.cat((inputs, extra.to(inputs.dtype)), dim=-1)
            if x.size(1) == 1:
                state = self.layers[index].step(inputs.squeeze(1), states[index], noise[index])
                y = state[0].unsqueeze(1)
            else:
                y, state = self.layers[index](inputs, states[index])
            x = x + y if index >= self.residual_start else y
            outputs.append(x)
            new_states.append(state)
        return tuple(outputs), tuple(new_states)
