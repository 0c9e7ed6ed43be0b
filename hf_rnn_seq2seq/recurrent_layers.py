"""Recurrent cells. Each is one layer of one direction: `forward` runs a whole sequence through torch's fused kernel,
`step` advances one token, both on the same weights and with the same result."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

# What a cell carries from step to step, output first: (h,) or, for an LSTM, (h, c); each [B, H].
State = tuple[torch.Tensor, ...]

# At a padded step this pre-activation closes or opens a gate completely: sigmoid(+-1e4) is exactly 1 or 0 in every
# floating-point type, and 1e4 is still finite in float16.
SATURATED = 1e4


class RecurrentLayer(nn.Module):
    """
    One layer, one direction.

    A subclass names torch's kernels for its cell and says how a padded step is made to leave the state alone.

    Args:
        input_size: width D of the input.
        hidden_size: width H of the state.
        recurrent_dropout: variational dropout of h_{t-1} where it enters the gates (Gal & Ghahramani 2016).
        zoneout: probability that a unit of the state keeps its old value (Krueger et al. 2017).
    """

    num_gates: int
    num_states: int = 1
    fused: Callable[..., tuple[torch.Tensor, ...]]
    fused_cell: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]

    def __init__(self, input_size: int, hidden_size: int, recurrent_dropout: float = 0.0, zoneout: float = 0.0):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.recurrent_dropout, self.zoneout = recurrent_dropout, zoneout
        rows = self.num_gates * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))

    def initial_bias(self) -> torch.Tensor:
        """Value of `bias_ih` before training, [num_gates * H]."""
        return torch.zeros(self.num_gates * self.hidden_size)

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        """What a padded step adds to the gates' pre-activations, [num_gates * H], given b_ih + b_hh."""
        raise NotImplementedError

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

    def step(self, x: torch.Tensor, state: State, noise: State = ()) -> State:
        """
        One step: x [B, D], state of [B, H] -> state of [B, H], the first being the output.

        `noise` is `sample_noise`'s, the same for all steps of a sequence.
        """
        x, *old = self._cast(x, *state)
        weights = self._cast(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        new = self.cell(x, tuple(old), noise, weights)
        if self.zoneout == 0:
            return new
        # Krueger et al. 2017, eq. 2: in training some units keep their value, in use each moves by the expectation.
        if self.training:
            keep = [torch.rand_like(value) < self.zoneout for value in new]
            return tuple(torch.where(k, o, n) for k, o, n in zip(keep, old, new, strict=True))
        return tuple(torch.lerp(n, o, self.zoneout) for o, n in zip(old, new, strict=True))

    def cell(self, x: torch.Tensor, state: State, noise: State, weights: list[torch.Tensor]) -> State:
        h, *rest = state
        if noise:
            h = h * noise[0].to(h.dtype)
        new = type(self).fused_cell(x, (h, *rest) if rest else h, *weights)
        return (new,) if isinstance(new, torch.Tensor) else new

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
        if self.zoneout > 0 or (self.training and self.recurrent_dropout > 0):
            return self._forward_by_steps(x, state, mask)
        x, *state_list = self._cast(x, *state)
        w_ih, w_hh, b_ih, b_hh = self._cast(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        if mask is not None:
            # Padding rides along as one more input feature, whose weights hold the gates shut. Unlike packing this
            # needs no lengths on the CPU, no sorting, handles both sides, and can be compiled and exported.
            padding = ~mask.unsqueeze(-1)  # [B, T, 1]
            x = torch.cat((x.masked_fill(padding, 0), padding.to(x.dtype)), dim=-1)
            w_ih = torch.cat((w_ih, self.padding_gates(b_ih + b_hh).unsqueeze(1)), dim=1)
        first = [value.unsqueeze(0) for value in state_list]  # [1, B, H] each
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

    def _forward_by_steps(
        self, x: torch.Tensor, state: State, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, State]:
        """`forward` where a step needs what the fused kernels don't offer: recurrent dropout and zoneout."""
        noise = self.sample_noise(x)
        (x,) = self._cast(x)
        state = tuple(self._cast(*state))
        outputs = []
        for t, x_t in enumerate(x.unbind(1)):
            new = self.step(x_t, state, noise)
            if mask is not None:
                token = mask[:, t].unsqueeze(1)  # [B, 1]
                new = tuple(torch.where(token, n, o) for n, o in zip(new, state, strict=True))
                outputs.append(new[0] * token)
            else:
                outputs.append(new[0])
            state = new
        return torch.stack(outputs, dim=1), state


class LSTM(RecurrentLayer):
    r"""
    Long short-term memory (Hochreiter & Schmidhuber 1997, with forget gates: Gers et al. 2000).

        [i; f; g; o] = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g),  h_t = sigmoid(o) tanh(c_t)
    """

    num_gates = 4
    num_states = 2
    fused = torch.lstm
    fused_cell = torch.lstm_cell

    def initial_bias(self) -> torch.Tensor:
        # Forget gates start open (Jozefowicz et al. 2015).
        one_gate = torch.ones(self.hidden_size)
        return torch.cat((0 * one_gate, one_gate, 0 * one_gate, 0 * one_gate))

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        # i = 0 and f = 1 keep c; h = o tanh(c) stays zero before the first token, since c is; after the last token it
        # is not read.
        one_gate = torch.full_like(bias[: self.hidden_size], SATURATED)
        return torch.cat((-one_gate, one_gate, 0 * one_gate, 0 * one_gate))


class GRU(RecurrentLayer):
    r"""
    Gated recurrent unit (Cho et al. 2014), in the variant of cuDNN and torch, whose reset gate acts after the product:

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn)),  h_t = (1 - z) n + z h_{t-1}
    """

    num_gates = 3
    fused = torch.gru
    fused_cell = torch.gru_cell

    def cell(self, x: torch.Tensor, state: State, noise: State, weights: list[torch.Tensor]) -> State:
        if not noise:
            return super().cell(x, state, noise, weights)
        # Dropout is for the products only; the carried h stays whole. The fused cell can't tell the two apart.
        w_ih, w_hh, b_ih, b_hh = weights
        (h,) = state
        x_r, x_z, x_n = F.linear(x, w_ih, b_ih).chunk(3, dim=1)
        h_r, h_z, h_n = F.linear(h * noise[0].to(h.dtype), w_hh, b_hh).chunk(3, dim=1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        return ((1 - z) * n + z * h,)

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        one_gate = torch.full_like(bias[: self.hidden_size], SATURATED)
        return torch.cat((0 * one_gate, one_gate, 0 * one_gate))  # z = 1 keeps h


class SimpleRNN(RecurrentLayer):
    r"""Elman's network (1990): h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)."""

    num_gates = 1

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        return -bias  # act(0) = 0: h stays zero before the first token, and is not read after the last


class TanhRNN(SimpleRNN):
    """[`SimpleRNN`] with tanh."""

    fused = torch.rnn_tanh
    fused_cell = torch.rnn_tanh_cell


class ReluRNN(SimpleRNN):
    """[`SimpleRNN`] with a rectifier (Le et al. 2015)."""

    fused = torch.rnn_relu
    fused_cell = torch.rnn_relu_cell


CELLS: dict[str, type[RecurrentLayer]] = {"lstm": LSTM, "gru": GRU, "rnn_tanh": TanhRNN, "rnn_relu": ReluRNN}
