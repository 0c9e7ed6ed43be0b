"""The target side: the stack of recurrent layers, the wirings (who feeds whom in one step) and the only time loop.

Shapes: B batch, S source, T target, E embedding, H hidden, M memory, F features; `heads` attention heads.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .attention import ATTENTIONS, Attention, PreparedMemory
from .cache_rnn_seq2seq import DecoderState
from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .recurrent_layers import CELLS, RecurrentLayer, State


class StepOutput(NamedTuple):
    """What a wiring makes of one token; what its `parallel` makes of T tokens has a T axis after the batch's."""

    features: torch.Tensor  # [B, F]
    weights: torch.Tensor  # [B, heads, S]; in `parallel` [B, heads, T, S]
    layer_outputs: tuple[torch.Tensor, ...]  # bottom first, [B, H] each


WiringCall = Callable[[torch.Tensor, DecoderState, PreparedMemory], tuple[StepOutput, DecoderState]]


class DecoderStack(nn.Module):
    """
    Unidirectional recurrent layers with dropout between them and optional residual connections. A residual connection
    changes what a layer hands up, never its own state.
    """

    layers: list[RecurrentLayer]

    def __init__(self, config: RnnSeq2SeqConfig, input_size: int):
        super().__init__()
        cell = CELLS[config.decoder_cell]
        widths = [input_size] + [config.hidden_size] * (config.decoder_layers - 1)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            [cell(width, config.hidden_size, config.recurrent_dropout, config.zoneout) for width in widths]
        )
        self.dropout = nn.Dropout(config.dropout)
        self.residual = config.decoder_residual

    def sample_noise(self, x: torch.Tensor) -> tuple[State, ...]:
        return tuple(layer.sample_noise(x) for layer in self.layers)

    def step(
        self, x: torch.Tensor, states: tuple[State, ...], noise: tuple[State, ...]
    ) -> tuple[list[torch.Tensor], tuple[State, ...]]:
        """x [B, D] -> every layer's output [B, H], the new states."""
        outputs: list[torch.Tensor] = []
        new_states = []
        for index, layer in enumerate(self.layers):
            state = layer.step(x if index == 0 else self.dropout(x), states[index], noise[index] if noise else ())
            x = self._output(index, x, state[0])
            outputs.append(x)
            new_states.append(state)
        return outputs, tuple(new_states)

    def forward(self, x: torch.Tensor, states: tuple[State, ...]) -> tuple[list[torch.Tensor], tuple[State, ...]]:
        """x [B, T, D] -> every layer's outputs [B, T, H], the last states."""
        outputs: list[torch.Tensor] = []
        new_states = []
        for index, layer in enumerate(self.layers):
            y, state = layer(x if index == 0 else self.dropout(x), states[index])
            x = self._output(index, x, y)
            outputs.append(x)
            new_states.append(state)
        return outputs, tuple(new_states)

    def _output(self, index: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y if self.residual and index > 0 else y


class Wiring(nn.Module):
    """
    Attend after the recurrence, feed nothing back (`output_only`; Luong et al. 2015, eq. 5, without input feeding):

        s_t = RNN(x_t, s_{t-1}),  c_t = attention(s_t),  features_t = tanh(W [c_t; s_t])

    and features_t = s_t without attention (Sutskever et al. 2014). Nothing waits for the step before but the
    recurrence itself, so `parallel` does a sequence in one fused call.
    """

    feedback = False  # does step t need what came out of step t-1, beside the recurrent state?

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.attention: Attention = ATTENTIONS[config.attention_type](config)
        self.features_size = config.hidden_size
        self.stack = DecoderStack(config, config.target_embedding_size + self.input_extra(config))
        self.combine = self.make_combine(config)

    def input_extra(self, config: RnnSeq2SeqConfig) -> int:
        """Width of what enters the bottom layer beside the embedding."""
        return 0

    def make_combine(self, config: RnnSeq2SeqConfig) -> nn.Module:
        """The map from [context; state] to features."""
        if self.attention.context_size == 0:
            return nn.Identity()
        width = self.attention.context_size + config.hidden_size
        return nn.Sequential(nn.Linear(width, config.hidden_size, bias=False), nn.Tanh())

    @property
    def sequential(self) -> bool:
        """Must training step through time, too?"""
        return self.feedback or self.attention.feedback

    def first_state(self, layers: tuple[State, ...], prepared: PreparedMemory) -> DecoderState:
        """The state before the first token, given the bridge's."""
        noise = self.stack.sample_noise(layers[0][0]) if self.training else ()
        return DecoderState(layers, (), self.attention.first_alignment(prepared), noise)

    def step(self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory) -> tuple[StepOutput, DecoderState]:
        """One token: x [B, E]."""
        outputs, layers = self.stack.step(x, state.layers, state.noise)
        context, weights, alignment = self.attention(outputs[-1].unsqueeze(1), prepared, state.alignment)
        features = self.combine(torch.cat((context.squeeze(1), outputs[-1]), dim=-1))
        step = StepOutput(features, weights.squeeze(2), tuple(outputs))
        return step, replace(state, layers=layers, alignment=alignment)

    def parallel(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        """All tokens at once: x [B, T, E]. Only without feedback."""
        outputs, layers = self.stack(x, state.layers)
        context, weights, alignment = self.attention(outputs[-1], prepared, state.alignment)
        features = self.combine(torch.cat((context, outputs[-1]), dim=-1))
        return StepOutput(features, weights, tuple(outputs)), replace(state, layers=layers, alignment=alignment)


class InputFeeding(Wiring):
    """
    The attentional vector enters the next step (Luong et al. 2015, section 3.3):

        s_t = RNN([x_t; features_{t-1}], s_{t-1}),  c_t = attention(s_t),  features_t = tanh(W [c_t; s_t])

    with features_0 = 0. Without attention s_t itself is fed back.
    """

    feedback = True

    def input_extra(self, config: RnnSeq2SeqConfig) -> int:
        return self.features_size

    def first_state(self, layers: tuple[State, ...], prepared: PreparedMemory) -> DecoderState:
        h = layers[0][0]
        return replace(super().first_state(layers, prepared), feed=(h.new_zeros(h.size(0), self.features_size),))

    def step(self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory) -> tuple[StepOutput, DecoderState]:
        (feed,) = state.feed
        step, state = super().step(torch.cat((x, feed.to(x.dtype)), dim=-1), state, prepared)
        return step, replace(state, feed=(step.features,))


class BahdanauWiring(Wiring):
    """
    Attention by the previous state, whose context enters the recurrence (Bahdanau et al. 2015, eq. 4-6 and A.1.2):

        c_t = attention(s_{t-1}),  s_t = RNN([x_t; c_t], s_{t-1}),  features_t = tanh(W [c_t; s_t; x_t])

    where attention's query s_{t-1} is the top layer's h. The features are the readout of Nematus (Sennrich et al.
    2017, eq. 5), as wide as the other wirings', in place of Bahdanau's maxout; without attention, tanh(W [s_t; x_t]).
    """

    feedback = True

    def input_extra(self, config: RnnSeq2SeqConfig) -> int:
        return self.attention.context_size

    def make_combine(self, config: RnnSeq2SeqConfig) -> nn.Module:
        width = self.attention.context_size + config.hidden_size + config.target_embedding_size
        return nn.Sequential(nn.Linear(width, config.hidden_size, bias=False), nn.Tanh())

    def step(self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory) -> tuple[StepOutput, DecoderState]:
        previous = state.layers[-1][0]  # [B, H]
        context, weights, alignment = self.attention(previous.unsqueeze(1), prepared, state.alignment)
        context = context.squeeze(1)
        outputs, layers = self.stack.step(torch.cat((x, context), dim=-1), state.layers, state.noise)
        features = self.combine(torch.cat((context, outputs[-1], x), dim=-1))
        step = StepOutput(features, weights.squeeze(2), tuple(outputs))
        return step, replace(state, layers=layers, alignment=alignment)


WIRINGS: dict[str, type[Wiring]] = {
    "output_only": Wiring,
    "input_feeding": InputFeeding,
    "bahdanau": BahdanauWiring,
}


class RnnSeq2SeqDecoder(nn.Module):
    """Target embeddings, a wiring, and the loop over time."""

    _gradient_checkpointing_func: Callable[..., Any]  # set by transformers

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.target_embedding_size, config.pad_token_id)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.wiring = WIRINGS[config.wiring_type](config)
        self.output_dropout = nn.Dropout(config.output_dropout)
        self.gradient_checkpointing = False

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory, mask: torch.Tensor | None = None
    ) -> tuple[StepOutput, DecoderState]:
        """
        Every way to run the model comes through here: teacher forcing with T tokens, generation with one.

        Args:
            x: embedded target tokens, [B, T, E].
            state: the state before the first of them.
            prepared: the source, as `wiring.attention.prepare` makes it.
            mask: true at tokens, [B, T]; the state passes over the rest unchanged.

        Returns:
            features [B, T, F], attention weights [B, heads, T, S], every layer's outputs [B, T, H]; the last state.
        """
        x = self.embedding_dropout(x)
        if x.size(1) > 1 and mask is None and not self.wiring.sequential:
            output, state = self._run(self.wiring.parallel, x, state, prepared)
        else:
            steps = []
            for t, x_t in enumerate(x.unbind(1)):
                step, new_state = self._run(self.wiring.step, x_t, state, prepared)
                state = new_state if mask is None else new_state.where(mask[:, t], state)
                steps.append(step)
            output = StepOutput(
                features=torch.stack([step.features for step in steps], dim=1),
                weights=torch.stack([step.weights for step in steps], dim=2),
                layer_outputs=tuple(
                    torch.stack(outputs, dim=1) for outputs in zip(*(s.layer_outputs for s in steps), strict=True)
                ),
            )
        return output._replace(features=self.output_dropout(output.features)), state

    def _run(
        self, fn: WiringCall, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        """`fn(x, state, prepared)`, whose intermediate results are recomputed in the backward pass if asked for."""
        if not (self.gradient_checkpointing and self.training):
            return fn(x, state, prepared)
        size = len(state.tensors())

        # Re-entrant checkpointing sees only tensors that are arguments and results of their own.
        def flat(x: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            output, new = fn(x, state.replace_tensors(list(tensors[:size])), PreparedMemory(*tensors[size:]))
            return (*new.tensors(), output.features, output.weights, *output.layer_outputs)

        results = self._gradient_checkpointing_func(flat, x, *state.tensors(), *prepared)
        features, weights, *layer_outputs = results[size:]
        return StepOutput(features, weights, tuple(layer_outputs)), state.replace_tensors(list(results[:size]))
