"""The wirings: who feeds whom in one step of the decoder.

Shapes: B batch, S source, T target, E embedding, H hidden, M memory, C context, Q query, F features; `heads` attention
heads.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from .activations import Tanh
from .attention import Attention, PreparedMemory, make_attention
from .cache_rnn_seq2seq import DecoderState
from .configuration_rnn_seq2seq import RnnSeq2SeqConfig
from .decoder_stack import DecoderStack, make_layer
from .heads import HEADS
from .recurrent_layers import CELLS, RecurrentLayer, State
from .step_products import StepLinear


class StepOutput(NamedTuple):
    """What a wiring makes of T tokens: of one, where a step waits for the one before."""

    features: torch.Tensor  # [B, T, F]
    weights: torch.Tensor  # [B, heads, T, S]
    gate_input: torch.Tensor  # [B, T, C + Q + E] for a head that copies, else [B, T, 0]
    layer_outputs: tuple[torch.Tensor, ...]  # bottom first, [B, T, H] each


class Wiring(nn.Module):
    """
    Attend after the recurrence, feed nothing back (`output_only`; Luong et al. 2015, eq. 5, without input feeding):

        s_t = RNN(x_t, s_{t-1}),  c_t = attention(s_t),  features_t = tanh(W [c_t; s_t])

    and features_t = s_t without attention (Sutskever et al. 2014). Nothing waits for the step before but the
    recurrence itself, so one call does a whole sequence.

    Before a head that takes the parts themselves (`raw`), features_t = [c_t; s_t; x_t] in every wiring.
    """

    feedback = False  # does step t need what came out of step t-1, beside the recurrent state?
    # Beside the top layer's output, are c_t and x_t among what features are made of?
    reads_context = True
    reads_input = False

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__()
        head = HEADS[config.head_type]
        self.raw, self.copies = head.raw, head.copies
        self.reads_context = head.raw or self.reads_context
        self.reads_input = head.raw or self.reads_input
        self.attention: Attention = make_attention(config)
        self.context_size = self.context_width(config)
        width = config.hidden_size
        width += self.context_size if self.reads_context else 0
        width += config.target_embedding_size if self.reads_input else 0
        combine = nn.Identity() if head.raw else self.make_combine(config, width)
        if config.readout_type != "tanh" and not isinstance(combine, nn.Sequential):
            raise ValueError(
                f"`readout_type`={config.readout_type!r} is for a wiring that maps context and state to features; "
                f"{config.wiring_type!r} with `head_type`={config.head_type!r} and `attention_type`="
                f"{config.attention_type!r} does not: leave it out."
            )
        self.features_size = width if isinstance(combine, nn.Identity) else config.hidden_size
        self.gate_size = self.context_size + config.query_size + config.target_embedding_size if head.copies else 0
        self.stack = DecoderStack(config, self.layer_widths(config))
        self.combine = combine

    def context_width(self, config: RnnSeq2SeqConfig) -> int:
        """Width C of c_t."""
        return self.attention.context_size

    def layer_widths(self, config: RnnSeq2SeqConfig) -> list[int]:
        """Width of each layer's input, bottom first."""
        return [config.target_embedding_size] + [config.hidden_size] * (config.decoder_layers - 1)

    def make_combine(self, config: RnnSeq2SeqConfig, width: int) -> nn.Module:
        """From what `read_out` joins, `width` wide, to features as wide as the decoder; or an identity."""
        if self.context_size == 0 and not self.reads_input:
            return nn.Identity()
        linear = StepLinear(width, config.hidden_size, bias=config.readout_type != "tanh")
        return nn.Sequential(linear, nn.Identity() if config.readout_type == "affine" else Tanh())

    def output(
        self,
        x: torch.Tensor,
        outputs: tuple[torch.Tensor, ...],
        query: torch.Tensor,
        context: torch.Tensor,
        weights: torch.Tensor,
    ) -> StepOutput:
        """What x [B, T, E] became: every layer's outputs [B, T, H]; attention's query, context and weights."""
        # What a head that copies decides by: See et al. 2017, eq. 8.
        gate_input = torch.cat((context, query, x.to(query.dtype)), dim=-1) if self.copies else query[..., :0]
        return StepOutput(self.read_out(context, outputs[-1], x), weights, gate_input, outputs)

    def read_out(self, context: torch.Tensor, s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Features [B, T, F] from the context [B, T, C], the decoder's state [B, T, H] and x [B, T, E]."""
        parts = [s]
        if self.reads_context:
            parts.insert(0, context)
        if self.reads_input:
            parts.append(x.to(s.dtype))
        return self.combine(torch.cat(parts, dim=-1))

    @property
    def sequential(self) -> bool:
        """Must training step through time, too?"""
        return self.feedback or self.attention.feedback

    def first_state(self, layers: tuple[State, ...], prepared: PreparedMemory) -> DecoderState:
        """The state before the first token, given the bridge's."""
        alignment = self.attention.first_alignment(prepared)
        return DecoderState(layers, alignment=alignment, noise=self.sample_noise(layers[0][0]))

    def sample_noise(self, x: torch.Tensor) -> tuple[State, ...]:
        """Every recurrent layer's mask for one pass over a sequence; `x`: [B, ...]."""
        return tuple(layer.sample_noise(x) for layer in self.stack.layers)

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        """x [B, T, E], all of a sequence or, where that is `sequential`, one token: T = 1."""
        outputs, layers = self.stack(x, state.layers, state.noise)
        query = outputs[-1]
        context, weights, alignment = self.attention(query, prepared, state.alignment)
        output = self.output(x, outputs, query, context, weights)
        return output, replace(state, layers=layers, alignment=alignment)


class InputFeeding(Wiring):
    """
    The attentional vector enters the next step (Luong et al. 2015, section 3.3):

        s_t = RNN([x_t; features_{t-1}], s_{t-1}),  c_t = attention(s_t),  features_t = tanh(W [c_t; s_t])

    with features_0 = 0. Without attention s_t itself is fed back.
    """

    feedback = True

    def layer_widths(self, config: RnnSeq2SeqConfig) -> list[int]:
        bottom, *upper = super().layer_widths(config)
        return [bottom + self.features_size, *upper]

    def first_state(self, layers: tuple[State, ...], prepared: PreparedMemory) -> DecoderState:
        h = layers[0][0]
        return replace(super().first_state(layers, prepared), feed=(h.new_zeros(h.size(0), self.features_size),))

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        (feed,) = state.feed
        inputs = torch.cat((x, feed.unsqueeze(1).to(x.dtype)), dim=-1)
        outputs, layers = self.stack(inputs, state.layers, state.noise)
        query = outputs[-1]
        context, weights, alignment = self.attention(query, prepared, state.alignment)
        output = self.output(x, outputs, query, context, weights)
        return output, replace(state, layers=layers, feed=(output.features.squeeze(1),), alignment=alignment)


class ContextFeeding(Wiring):
    """
    The context is merged into the next step's input (Vinyals et al. 2015, "Grammar as a foreign language", by
    TensorFlow's `attention_decoder`; See et al. 2017, by their code):

        x'_t = W [x_t; c_{t-1}] + b,  s_t = RNN(x'_t, s_{t-1}),  c_t = attention(s_t),  features_t = W [c_t; s_t] + b

    with c_0 = 0 and x' as wide as x. Attention's query is the top layer's whole state, [c; h] of an LSTM; features
    are made of its output alone, by a map without tanh (See et al., eq. 4, the inner one). x' takes x's place in all
    that follows, so also in what a head that copies decides by (eq. 8).
    """

    feedback = True

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        width = config.target_embedding_size
        self.merge = StepLinear(width + self.context_size, width)

    def make_combine(self, config: RnnSeq2SeqConfig, width: int) -> nn.Module:
        return StepLinear(width, config.hidden_size)

    def first_state(self, layers: tuple[State, ...], prepared: PreparedMemory) -> DecoderState:
        h = layers[0][0]
        return replace(super().first_state(layers, prepared), feed=(h.new_zeros(h.size(0), self.context_size),))

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        (feed,) = state.feed
        x = self.merge(torch.cat((x, feed.unsqueeze(1).to(x.dtype)), dim=-1))
        outputs, layers = self.stack(x, state.layers, state.noise)
        query = torch.cat(layers[-1][::-1], dim=-1).unsqueeze(1)  # [B, 1, Q]; a state is (h, c)
        context, weights, alignment = self.attention(query, prepared, state.alignment)
        output = self.output(x, outputs, query, context, weights)
        return output, replace(state, layers=layers, feed=(context.squeeze(1),), alignment=alignment)


class BahdanauWiring(Wiring):
    """
    Attention by the previous state, whose context enters the recurrence (Bahdanau et al. 2015, eq. 4-6 and A.1.2):

        c_t = attention(s_{t-1}),  s_t = RNN([x_t; c_t], s_{t-1}),  features_t = tanh(W [c_t; s_t; x_t])

    where attention's query s_{t-1} is the top layer's h. The features are the readout of Nematus (Sennrich et al.
    2017, eq. 5), as wide as the other wirings'; without attention, tanh(W [s_t; x_t]). Before the `deep` head they
    are Bahdanau's own parts, [c_t; s_{t-1}; x_t] (A.2.2).
    """

    feedback = True
    reads_input = True

    def layer_widths(self, config: RnnSeq2SeqConfig) -> list[int]:
        bottom, *upper = super().layer_widths(config)
        return [bottom + self.context_size, *upper]

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        query = state.layers[-1][0].unsqueeze(1)  # s_{t-1}, [B, 1, H]
        context, weights, alignment = self.attention(query, prepared, state.alignment)
        outputs, layers = self.stack(torch.cat((x, context.to(x.dtype)), dim=-1), state.layers, state.noise)
        output = self.output(x, outputs, query, context, weights)
        if self.raw:
            output = output._replace(features=self.read_out(context, query, x))
        return output, replace(state, layers=layers, alignment=alignment)


class JoinedBahdanauWiring(BahdanauWiring):
    """
    [`BahdanauWiring`] with nothing between the new state and the head (Yoyodyne's soft attention): features_t =
    [c_t; s_t], joined and not mapped. What a head that copies decides by is [c_t; s_t; x_t]; the `deep` heads read
    what they read behind [`BahdanauWiring`].
    """

    reads_input = False

    def make_combine(self, config: RnnSeq2SeqConfig, width: int) -> nn.Module:
        return nn.Identity()

    def output(
        self,
        x: torch.Tensor,
        outputs: tuple[torch.Tensor, ...],
        query: torch.Tensor,
        context: torch.Tensor,
        weights: torch.Tensor,
    ) -> StepOutput:
        return super().output(x, outputs, outputs[-1], context, weights)


class ContextWiring(Wiring):
    """
    No attention: one vector c of the source enters every step and the output (Cho et al. 2014, A.1.2):

        s_0 = tanh(V c),  s_t = RNN([x_t; c], s_{t-1}),  features_t = tanh(W [c; s_t; x_t])

    c is the h that the bridge makes for the top layer; what else it makes is not read. V has rows for every layer and
    state tensor, an LSTM's c among them; c enters the bottom layer.

    Deviations: Cho et al.'s reset gate also closes what c gives to the candidate state, here it closes the recurrent
    part alone; their maxout in the output is the `deep` head, before which features_t = [c; s_t; x_t].
    """

    reads_input = True

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        num_states = config.decoder_layers * CELLS[config.decoder_cell].num_states
        self.initial = nn.Linear(config.hidden_size, num_states * config.hidden_size, bias=False)

    def context_width(self, config: RnnSeq2SeqConfig) -> int:
        return config.hidden_size

    def layer_widths(self, config: RnnSeq2SeqConfig) -> list[int]:
        bottom, *upper = super().layer_widths(config)
        return [bottom + self.context_size, *upper]

    def first_state(self, layers: tuple[State, ...], prepared: PreparedMemory) -> DecoderState:
        c = layers[-1][0]  # [B, H]
        values = iter(torch.tanh(self.initial(c)).split(c.size(-1), dim=-1))
        layers = tuple(tuple(next(values) for _ in layer) for layer in layers)
        return replace(super().first_state(layers, prepared), feed=(c,))

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        (c,) = state.feed
        context = c.unsqueeze(1).expand(-1, x.size(1), -1)  # [B, T, H]
        outputs, layers = self.stack(torch.cat((x, context.to(x.dtype)), dim=-1), state.layers, state.noise)
        query = outputs[-1]
        _, weights, alignment = self.attention(query, prepared, state.alignment)  # none: weights of no heads
        output = self.output(x, outputs, query, context, weights)
        return output, replace(state, layers=layers, alignment=alignment)


class ConditionalWiring(Wiring):
    """
    Attention between two transitions of the bottom layer, cGRU or cLSTM (Firat & Cho 2016; Sennrich et al. 2017,
    Nematus, section 2):

        s'_t = RNN_1(x_t, s_{t-1}),  c_t = attention(s'_t),  s_t = RNN_2(c_t, s'_t),
        features_t = tanh(W [c_t; s_t; x_t])

    With `decoder_transition_depth` above 2, further cells without input follow, s <- RNN_k(s) (deep transition: Miceli
    Barone et al. 2017). A cell's whole state, (h, c) of an LSTM, goes through all of them and on to the next step.
    Further layers stand on top, s_t in features being the top one's, as Nematus stacks them. Every transition has a
    recurrent dropout mask of its own. Without attention RNN_2, too, has no input.
    """

    feedback = True
    reads_input = True
    transitions: list[RecurrentLayer]

    def __init__(self, config: RnnSeq2SeqConfig):
        super().__init__(config)
        widths = [self.context_size] + [0] * (config.decoder_transition_depth - 2)
        self.transitions = nn.ModuleList([make_layer(config, width) for width in widths])  # type: ignore[assignment]

    def sample_noise(self, x: torch.Tensor) -> tuple[State, ...]:
        return (*super().sample_noise(x), *(cell.sample_noise(x) for cell in self.transitions))

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        (query,), (bottom,) = self.stack(x, state.layers, state.noise, end=1)
        context, weights, alignment = self.attention(query, prepared, state.alignment)
        inputs = context.squeeze(1)
        for cell, noise in zip(self.transitions, state.noise[len(state.layers) :], strict=True):
            bottom = cell.step(inputs, bottom, noise)
            inputs = inputs[:, :0]  # the transitions after the first of these have none
        s = bottom[0].unsqueeze(1)  # [B, 1, H]
        upper_outputs, upper = self.stack(s, state.layers, state.noise, first=1)
        outputs = (s, *upper_outputs)
        output = self.output(x, outputs, query, context, weights)
        return output, replace(state, layers=(bottom, *upper), alignment=alignment)


class GnmtWiring(Wiring):
    """
    The bottom layer's last output attends, for all layers (Wu et al. 2016, eq. 4-6 and figure 1; "gnmt" in tf/nmt):

        c_t = attention(s^1_{t-1}),  s^1_t = RNN_1([x_t; c_t], s^1_{t-1}),  s^l_t = RNN_l([s^{l-1}_t; c_t], s^l_{t-1})

    and features_t = s^L_t, with nothing between the top layer and the head. s^1_0 is the bridge's. A residual
    connection adds s^{l-1}_t, without the context.
    """

    feedback = True
    reads_context = False

    def layer_widths(self, config: RnnSeq2SeqConfig) -> list[int]:
        return [width + self.context_size for width in super().layer_widths(config)]

    def make_combine(self, config: RnnSeq2SeqConfig, width: int) -> nn.Module:
        return nn.Identity()

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        query = state.layers[0][0].unsqueeze(1)  # s^1_{t-1}, [B, 1, H]
        context, weights, alignment = self.attention(query, prepared, state.alignment)
        outputs, layers = self.stack(x, state.layers, state.noise, extra=context)
        output = self.output(x, outputs, query, context, weights)
        return output, replace(state, layers=layers, alignment=alignment)


class RnmtPlusWiring(GnmtWiring):
    """
    [`GnmtWiring`] whose context also reaches the softmax layer (Chen et al. 2018, RNMT+, section 4): features_t =
    [c_t; s^L_t], joined and not mapped. The same c_t, attention(s^1_{t-1}), goes everywhere; the paper leaves open
    which step's it is.
    """

    reads_context = True


class GnmtV2Wiring(Wiring):
    """
    The bottom layer's present output attends, for the layers above (GNMT v2 of NVIDIA's DeepLearningExamples):

        s^1_t = RNN_1(x_t, s^1_{t-1}),  c_t = attention(s^1_t),  s^l_t = RNN_l([s^{l-1}_t; c_t], s^l_{t-1})

    and features_t = s^L_t. Nothing is fed back, so that a whole sequence takes one call: the bottom layer, attention
    for all steps, the layers above.

    Deviations: "gnmt_v2" in tf/nmt (Luong, Brevdo & Zhao 2017) also feeds c_{t-1} to the bottom layer; NVIDIA's
    dropout is on every layer's input, the context included, here it is between layers as in every wiring.
    """

    reads_context = False

    def layer_widths(self, config: RnnSeq2SeqConfig) -> list[int]:
        bottom, *upper = super().layer_widths(config)
        return [bottom, *(width + self.context_size for width in upper)]

    def make_combine(self, config: RnnSeq2SeqConfig, width: int) -> nn.Module:
        return nn.Identity()

    def forward(
        self, x: torch.Tensor, state: DecoderState, prepared: PreparedMemory
    ) -> tuple[StepOutput, DecoderState]:
        (query,), bottom = self.stack(x, state.layers, state.noise, end=1)
        context, weights, alignment = self.attention(query, prepared, state.alignment)
        upper_outputs, upper = self.stack(query, state.layers, state.noise, extra=context, first=1)
        outputs = (query, *upper_outputs)
        output = self.output(x, outputs, query, context, weights)
        return output, replace(state, layers=bottom + upper, alignment=alignment)


WIRINGS: dict[str, type[Wiring]] = {
    "output_only": Wiring,
    "input_feeding": InputFeeding,
    "context_feeding": ContextFeeding,
    "bahdanau": BahdanauWiring,
    "bahdanau_joined": JoinedBahdanauWiring,
    "context": ContextWiring,
    "conditional": ConditionalWiring,
    "gnmt": GnmtWiring,
    "gnmt_v2": GnmtV2Wiring,
    "rnmt_plus": RnmtPlusWiring,
}
