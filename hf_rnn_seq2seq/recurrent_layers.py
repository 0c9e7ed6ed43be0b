"""Recurrent cells. Each is one layer of one direction: `forward` runs a whole sequence the fastest way that the cell
has, `step` advances one token, both on the same weights and with the same result."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

# What a cell carries from step to step, output first: (h,) or, for a cell with a memory, (h, c); each [B, H].
State = tuple[torch.Tensor, ...]

# At a padded step this pre-activation closes or opens a gate completely: sigmoid(+-1e4) is exactly 1 or 0 in every
# floating-point type, and 1e4 is still finite in float16.
SATURATED = 1e4


class RecurrentLayer(nn.Module):
    """
    One layer, one direction.

    A subclass says what one step computes, and may know a faster way through a sequence than step by step.

    Args:
        input_size: width D of the input; 0 for a transition without one.
        hidden_size: width H of the state.
        recurrent_dropout: variational dropout of h_{t-1} where it enters the gates (Gal & Ghahramani 2016).
        zoneout: probability that a unit of the state keeps its old value (Krueger et al. 2017).
    """

    num_gates: int
    num_states: int = 1
    forget_gate: int | None = None  # which of the gates, if one of them starts open

    def __init__(self, input_size: int, hidden_size: int, recurrent_dropout: float = 0.0, zoneout: float = 0.0):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.recurrent_dropout, self.zoneout = recurrent_dropout, zoneout
        self.weight_ih = nn.Parameter(torch.empty(self.num_gates * hidden_size, input_size))

    def reset_weights(self) -> None:
        """First values; leaves alone what was loaded from a checkpoint."""
        self._reset_gates(self.weight_ih, init.xavier_uniform_)

    def _reset_gates(self, weight: torch.Tensor, initialise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if not getattr(weight, "_is_hf_initialized", False):  # the mark is not carried over to views
            for gate in weight.chunk(self.num_gates):  # a packed matrix is several matrices
                initialise(gate)

    def initial_bias(self) -> torch.Tensor:
        """The input's part of the gates' bias before training, [num_gates * H]."""
        bias = torch.zeros(self.num_gates, self.hidden_size)
        if self.forget_gate is not None:
            bias[self.forget_gate] = 1.0  # Jozefowicz et al. 2015
        return bias.flatten()

    def zero_state(self, x: torch.Tensor) -> State:
        return tuple(x.new_zeros(x.size(0), self.hidden_size) for _ in range(self.num_states))

    def sample_noise(self, x: torch.Tensor) -> State:
        """The dropout mask of h for one pass over a sequence: ([B, H],), or () when there is none. `x`: [B, ...]."""
        if not (self.training and self.recurrent_dropout > 0):
            return ()
        keep = 1 - self.recurrent_dropout
        return (torch.bernoulli(x.new_full((x.size(0), self.hidden_size), keep)) / keep,)

    def _cast(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Everything in the one type that the kernels want: autocast's inside autocast, else the weights'."""
        device_type = self.weight_ih.device.type
        dtype = self.weight_ih.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        return [tensor.to(dtype) for tensor in tensors]

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """
        What `cell` takes of the input, which no state has a part in: x [B, D], or [B, T, D] for all steps at once.
        Here x itself.
        """
        return x

    def cell(self, x: torch.Tensor, state: State, noise: State) -> State:
        """The equations of one step: `project`'s of one token, state of [B, H] -> state of [B, H]."""
        raise NotImplementedError

    @staticmethod
    def drop(h: torch.Tensor, noise: State) -> torch.Tensor:
        """h [B, H] as it enters the gates."""
        return h * noise[0].to(h.dtype) if noise else h

    def step(self, x: torch.Tensor, state: State, noise: State = ()) -> State:
        """
        One step: x [B, D], state of [B, H] -> state of [B, H], the first being the output.

        `noise` is `sample_noise`'s, the same for all steps of a sequence.
        """
        x, *old = self._cast(x, *state)
        return self._advance(self.project(x), tuple(old), noise)

    def _advance(self, x: torch.Tensor, old: State, noise: State) -> State:
        """`cell` with zoneout."""
        new = self.cell(x, old, noise)
        if self.zoneout == 0:
            return new
        # Krueger et al. 2017, eq. 2: in training some units keep their value, in use each moves by the expectation.
        if self.training:
            keep = [torch.rand_like(value) < self.zoneout for value in new]
            return tuple(torch.where(k, o, n) for k, o, n in zip(keep, old, new, strict=True))
        return tuple(torch.lerp(n, o, self.zoneout) for o, n in zip(old, new, strict=True))

    def forward(
        self, x: torch.Tensor, state: State | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        """
        A whole sequence: x [B, T, D] -> outputs [B, T, H] and the final state.

        With `mask` [B, T] (true at tokens) padding on either side leaves the state alone and outputs are zero there;
        the state must then start at zero (`state=None`).
        """
        if mask is not None and state is not None:
            raise ValueError("`mask` is for a layer that starts from zeros: pass no `state` with it.")
        if state is None:
            state = self.zero_state(x)
        if mask is not None:  # whatever stands at padding, no gradient is to see it
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        if self.zoneout > 0 or (self.training and self.recurrent_dropout > 0):
            return self._forward_by_steps(x, state, mask)
        return self._forward_at_once(x, state, mask)

    def _forward_at_once(self, x: torch.Tensor, state: State, mask: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        """`forward` without recurrent dropout and zoneout, for a cell that then need not go step by step."""
        return self._forward_by_steps(x, state, mask)

    def _forward_by_steps(
        self, x: torch.Tensor, state: State, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        """`forward` by `step`'s own code, with the input's part done for all steps before."""
        noise = self.sample_noise(x)
        (x,) = self._cast(x)
        state = tuple(self._cast(*state))
        outputs = []
        for t, x_t in enumerate(self.project(x).unbind(1)):
            new = self._advance(x_t, state, noise)
            if mask is not None:
                token = mask[:, t].unsqueeze(1)  # [B, 1]
                new = tuple(torch.where(token, n, o) for n, o in zip(new, state, strict=True))
                outputs.append(new[0] * token)
            else:
                outputs.append(new[0])
            state = new
        return torch.stack(outputs, dim=1), state


class KernelLayer(RecurrentLayer):
    """A cell of torch's. A subclass names the kernels and says how a padded step is made to leave the state alone."""

    fused: Callable[..., tuple[torch.Tensor, ...]]
    fused_cell: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]

    def __init__(self, input_size: int, hidden_size: int, recurrent_dropout: float = 0.0, zoneout: float = 0.0):
        super().__init__(input_size, hidden_size, recurrent_dropout, zoneout)
        rows = self.num_gates * hidden_size
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    def reset_weights(self) -> None:
        super().reset_weights()
        self._reset_gates(self.weight_hh, init.orthogonal_)
        init.copy_(self.bias_ih, self.initial_bias().to(self.bias_ih))
        init.zeros_(self.bias_hh)

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        """What a padded step adds to the gates' pre-activations, [num_gates * H], given b_ih + b_hh."""
        raise NotImplementedError

    def _weights(self) -> list[torch.Tensor]:
        return self._cast(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)

    def cell(self, x: torch.Tensor, state: State, noise: State) -> State:
        h, *rest = state
        h = self.drop(h, noise)
        new = type(self).fused_cell(x, (h, *rest) if rest else h, *self._weights())
        return (new,) if isinstance(new, torch.Tensor) else new

    def _forward_at_once(self, x: torch.Tensor, state: State, mask: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        x, *state_list = self._cast(x, *state)
        w_ih, w_hh, b_ih, b_hh = self._weights()
        if mask is not None:
            # Padding rides along as one more input feature, whose weights hold the gates shut. Unlike packing this
            # needs no lengths on the CPU, no sorting, handles both sides, and can be compiled and exported.
            padding = ~mask.unsqueeze(-1)  # [B, T, 1]
            x = torch.cat((x, padding.to(x.dtype)), dim=-1)
            w_ih = torch.cat((w_ih, self.padding_gates(b_ih + b_hh).unsqueeze(1)), dim=1)
        first = [value.unsqueeze(0).contiguous() for value in state_list]  # [1, B, H] each; cuDNN takes no views
        outputs, *last = type(self).fused(
            x,
            first if self.num_states > 1 else first[0],
            [w_ih, w_hh, b_ih, b_hh],
            True,  # has biases
            1,  # layers
            0.0,  # dropout between layers
            self.training,
            False,  # one direction
            True,  # batch first
        )
        final = tuple(value.squeeze(0) for value in last)
        if mask is not None:
            outputs = outputs.masked_fill(padding, 0)
            final = (self._last_output(outputs, state_list[0], mask), *final[1:])
        return outputs, final

    @staticmethod
    def _last_output(outputs: torch.Tensor, first: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """h after the last token of each row, [B, H]; a row without tokens keeps its first state."""
        steps = torch.arange(1, mask.size(1) + 1, device=mask.device)
        last = (mask * steps).amax(dim=1)  # [B], 0 for a row of padding
        index = last.view(-1, 1, 1).expand(-1, 1, outputs.size(-1))
        return torch.cat((first.unsqueeze(1), outputs), dim=1).gather(1, index).squeeze(1)


class LSTM(KernelLayer):
    r"""
    Long short-term memory (Hochreiter & Schmidhuber 1997, with forget gates: Gers et al. 2000).

        [i; f; g; o] = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),  h_t = sigmoid(o) tanh(c_t)
    """

    num_gates = 4
    num_states = 2
    forget_gate = 1
    fused = torch.lstm
    fused_cell = torch.lstm_cell

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        # i = 0 and f = 1 keep c; h = o tanh(c) stays zero before the first token, since c is; after the last token it
        # is not read.
        one_gate = torch.full_like(bias[: self.hidden_size], SATURATED)
        return torch.cat((-one_gate, one_gate, 0 * one_gate, 0 * one_gate))


class GRU(KernelLayer):
    r"""
    Gated recurrent unit (Cho et al. 2014), in the variant of cuDNN and torch, whose reset gate acts after the product:

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn)),  h_t = (1 - z) n + z h_{t-1}
    """

    num_gates = 3
    fused = torch.gru
    fused_cell = torch.gru_cell

    def cell(self, x: torch.Tensor, state: State, noise: State) -> State:
        if not noise:
            return super().cell(x, state, noise)
        # Dropout is for the products only; the carried h stays whole. The fused cell can't tell the two apart.
        w_ih, w_hh, b_ih, b_hh = self._weights()
        (h,) = state
        return (gru_update(F.linear(x, w_ih, b_ih), F.linear(self.drop(h, noise), w_hh, b_hh), h),)

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        one_gate = torch.full_like(bias[: self.hidden_size], SATURATED)
        return torch.cat((0 * one_gate, one_gate, 0 * one_gate))  # z = 1 keeps h


def gru_update(from_x: torch.Tensor, from_h: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """A GRU's new h [B, H], given what x_t and h_{t-1} add to r, z and n, [B, 3H] each, and h_{t-1}."""
    x_r, x_z, x_n = from_x.chunk(3, dim=1)
    h_r, h_z, h_n = from_h.chunk(3, dim=1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (1 - z) * n + z * h


class SimpleRNN(KernelLayer):
    r"""Elman's network (1990): h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)."""

    num_gates = 1

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        return -bias  # act(0) = 0: h stays zero before the first token, and is not read after the last


class TanhRNN(SimpleRNN):
    """[`SimpleRNN`] with tanh (Elman 1990)."""

    fused = torch.rnn_tanh
    fused_cell = torch.rnn_tanh_cell


class ReluRNN(SimpleRNN):
    """[`SimpleRNN`] with a rectifier (Le et al. 2015)."""

    fused = torch.rnn_relu
    fused_cell = torch.rnn_relu_cell


class GateNorm(nn.Module):
    """
    Layer normalisation (Ba et al. 2016, eq. 3-4) of each gate's H units by themselves, every unit with a gain
    (`weight`) and a bias: [..., num_gates * H] -> the same shape.
    """

    def __init__(self, num_gates: int, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.weight = nn.Parameter(torch.empty(num_gates * hidden_size))
        self.bias = nn.Parameter(torch.empty(num_gates * hidden_size))

    def reset_weights(self) -> None:
        init.ones_(self.weight)
        init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = x.unflatten(-1, (-1, self.hidden_size))
        normalised = F.layer_norm(gates, (self.hidden_size,)).flatten(-2)
        # autocast normalises in float32; what comes after is in the type of the products again
        return torch.addcmul(self.bias, normalised, self.weight).to(x.dtype)


class LayerNormLayer(RecurrentLayer):
    """
    A cell whose products with x_t and with h_{t-1} are normalised before they are added:

        N_ih(W_ih x_t),  N_hh(W_hh h_{t-1})

    N being layer normalisation with gains and biases of its own (Ba et al. 2016, eq. 20-22), computed for each gate by
    itself, as in RNMT+ (Chen et al. 2018). Deviations from Ba et al.: they take mean and variance
    over all gates that share a product (the gates of an LSTM; r and z of a GRU), and have one more bias in eq. 20,
    which the normalisations' own biases make redundant.
    """

    def __init__(self, input_size: int, hidden_size: int, recurrent_dropout: float = 0.0, zoneout: float = 0.0):
        super().__init__(input_size, hidden_size, recurrent_dropout, zoneout)
        self.weight_hh = nn.Parameter(torch.empty(self.num_gates * hidden_size, hidden_size))
        self.ih_norm = GateNorm(self.num_gates, hidden_size)
        self.hh_norm = GateNorm(self.num_gates, hidden_size)

    def reset_weights(self) -> None:
        super().reset_weights()
        self._reset_gates(self.weight_hh, init.orthogonal_)
        for norm in self.children():
            norm.reset_weights()  # type: ignore[operator]
        init.copy_(self.ih_norm.bias, self.initial_bias().to(self.ih_norm.bias))

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.ih_norm(F.linear(x, self.weight_ih))  # [..., num_gates * H]

    def project_state(self, h: torch.Tensor, noise: State) -> torch.Tensor:
        """[B, H] -> [B, num_gates * H]"""
        return self.hh_norm(F.linear(self.drop(h, noise), self.weight_hh))


class LayerNormLSTM(LayerNormLayer):
    r"""
    Layer-normalised LSTM (Ba et al. 2016, eq. 20-22; see [`LayerNormLayer`]):

        [i; f; g; o] = N_ih(W_ih x_t) + N_hh(W_hh h_{t-1})
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),  h_t = sigmoid(o) tanh(N_c(c_t))

    The memory is normalised where it enters h_t; c_{t-1} is carried over as it is.
    """

    num_gates = 4
    num_states = 2
    forget_gate = 1

    def __init__(self, input_size: int, hidden_size: int, recurrent_dropout: float = 0.0, zoneout: float = 0.0):
        super().__init__(input_size, hidden_size, recurrent_dropout, zoneout)
        self.memory_norm = GateNorm(1, hidden_size)

    def cell(self, x: torch.Tensor, state: State, noise: State) -> State:
        h, c = state
        i, f, g, o = (x + self.project_state(h, noise)).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(self.memory_norm(c)), c


class LayerNormGRU(LayerNormLayer):
    r"""
    Layer-normalised GRU (Ba et al. 2016, supplementary material; see [`LayerNormLayer`]):

        r, z = sigmoid(N_ih(W_ih x_t) + N_hh(W_hh h_{t-1}))
        n = tanh(N_in(W_in x_t) + r N_hn(W_hn h_{t-1})),  h_t = (1 - z) n + z h_{t-1}

    with z for what is kept, as in [`GRU`]; theirs is what is new, 1 - z. The carried h_{t-1} is not normalised.
    """

    num_gates = 3

    def cell(self, x: torch.Tensor, state: State, noise: State) -> State:
        (h,) = state
        return (gru_update(x, self.project_state(h, noise), h),)


class LinearRecurrence(torch.autograd.Function):
    """
    c_t = a_t c_{t-1} + b_t for all t at once: a, b [B, T, H] and c_0 [B, H] -> c [B, T, H].

    A parallel scan in ceil(log2 T) doublings (Hillis & Steele 1986), which only multiplies and adds: with a in [0, 1]
    nothing can overflow. The gradient with respect to b_t obeys the same recurrence from the end, so the backward pass
    is one more scan and keeps a and c alone (Martin & Cundy 2018).
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        b = torch.cat((torch.addcmul(b[:, :1], a[:, :1], first.unsqueeze(1)), b[:, 1:]), dim=1)
        c = LinearRecurrence.scan(a, b)
        ctx.save_for_backward(a, c, first)
        return c

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a, c, first = ctx.saved_tensors
        following = F.pad(a[:, 1:], (0, 0, 0, 1))  # a_{t+1}
        grad_b = LinearRecurrence.scan(following.flip(1), grad.flip(1)).flip(1)
        previous = torch.cat((first.unsqueeze(1), c[:, :-1]), dim=1)  # c_{t-1}
        return grad_b * previous, grad_b, grad_b[:, 0] * a[:, 0]

    @staticmethod
    def scan(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """From c_0 = 0: a, b [B, T, H] -> c [B, T, H]."""
        # Before each doubling b_t is what the last `length` steps up to t add to c_t, and a_t, of which only those
        # with t >= length are kept, the factor by which they decay what was there before.
        length, a = 1, a[:, 1:]
        while length < b.size(1):
            b = torch.cat((b[:, :length], torch.addcmul(b[:, length:], a, b[:, :-length])), dim=1)
            a = a[:, length:] * a[:, :-length]
            length *= 2
        return b


class SSRU(RecurrentLayer):
    r"""
    Simpler simple recurrent unit (Kim et al. 2019):

        f_t = sigmoid(W_f x_t + b_f),  c_t = f_t c_{t-1} + (1 - f_t) W x_t,  h_t = relu(c_t)

    There is no recurrent matrix, nor anything else by which h_{t-1} enters a step, so whole sequences need no loop.
    `weight_ih` is [W_f; W].

    Raises:
        ValueError: with `recurrent_dropout`, which would have nothing to drop.
    """

    num_gates = 2
    num_states = 2

    def __init__(self, input_size: int, hidden_size: int, recurrent_dropout: float = 0.0, zoneout: float = 0.0):
        if recurrent_dropout > 0:
            raise ValueError(
                f"`recurrent_dropout`={recurrent_dropout}: an SSRU has no recurrent matrix; it must be 0."
            )
        super().__init__(input_size, hidden_size, recurrent_dropout, zoneout)
        self.bias_f = nn.Parameter(torch.empty(hidden_size))

    def reset_weights(self) -> None:
        super().reset_weights()
        init.zeros_(self.bias_f)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight_ih)  # [..., 2H]

    def recurrence(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """a and b of c_t = a c_{t-1} + b from `project`'s [..., 2H]: [..., H] each."""
        f, value = x.chunk(2, dim=-1)
        f = torch.sigmoid(f + self.bias_f.to(f.dtype))
        return f, (1 - f) * value

    def cell(self, x: torch.Tensor, state: State, noise: State) -> State:
        a, b = self.recurrence(x)
        c = torch.addcmul(b, a, state[1])
        return torch.relu(c), c

    def _forward_at_once(self, x: torch.Tensor, state: State, mask: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        x, _, c = self._cast(x, *state)
        a, b = self.recurrence(self.project(x))  # [B, T, H]
        if mask is not None:
            padding = ~mask.unsqueeze(-1)  # [B, T, 1]
            a, b = a.masked_fill(padding, 1), b.masked_fill(padding, 0)
        memory = LinearRecurrence.apply(a, b, c)
        outputs = torch.relu(memory)
        final = (outputs[:, -1], memory[:, -1])  # padding after the last token has carried c along
        return outputs if mask is None else outputs.masked_fill(padding, 0), final


CELLS: dict[str, type[RecurrentLayer]] = {
    "lstm": LSTM,
    "gru": GRU,
    "rnn_tanh": TanhRNN,
    "rnn_relu": ReluRNN,
    "ln_lstm": LayerNormLSTM,
    "ln_gru": LayerNormGRU,
    "ssru": SSRU,
}
