"""Recurrent cells. Each is one layer of one direction: `forward` runs a whole sequence the fastest way that the cell
has, `step` advances one token, both on the same weights and with the same result."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import initialization as init

from .activations import has_sigmoid_tanh, tanh
from .compiled_loop import scans
from .recurrent_base import RecurrentLayer, State, tokens_to_last
from .step_products import in_training_loop, linear, linear_pair

# At a padded step this pre-activation closes or opens a gate completely: sigmoid(+-1e4) is exactly 1 or 0 in every
# floating-point type, and 1e4 is still finite in float16.
SATURATED = 1e4


class KernelLayer(RecurrentLayer):
    """
    A cell of torch's. A subclass names the kernel for sequences, has the equations of a step, and says how a padded
    step is made to leave the state alone.
    """

    fused: Callable[..., tuple[torch.Tensor, ...]]
    sums = True  # is the sum of what x_t and h_{t-1} add to the gates all that `update` needs?

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

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight_ih, self.bias_ih)  # [..., num_gates * H]

    def cell(self, x: torch.Tensor, state: State, noise: State) -> State:
        return self.update(x, linear(self.drop(state[0], noise), self.weight_hh, self.bias_hh), state)

    def transition(self, x: torch.Tensor, state: State, noise: State) -> State:
        if self.sums:
            weights, biases = (self.weight_ih, self.weight_hh), (self.bias_ih, self.bias_hh)
            if in_training_loop(*weights, *biases):
                return self.update(linear_pair(x, self.drop(state[0], noise), weights, biases), None, state)
        return super().transition(x, state, noise)

    def update(self, from_x: torch.Tensor, from_h: torch.Tensor | None, state: State) -> State:
        """
        The new state, given what x_t and h_{t-1} add to the gates, [B, num_gates * H] each; or, of a cell that `sums`,
        the sum, to be overwritten, and `None`.
        """
        raise NotImplementedError

    def _forward_at_once(self, x: torch.Tensor, state: State, mask: torch.Tensor | None) -> tuple[torch.Tensor, State]:
        if scans(x.size(1)):  # torch.compile would take the kernel apart, into a copy of its equations for each step
            return self._forward_by_steps(x, state, mask)
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
        index = tokens_to_last(mask).view(-1, 1, 1).expand(-1, 1, outputs.size(-1))
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

    def update(self, from_x: torch.Tensor, from_h: torch.Tensor | None, state: State) -> State:
        c = state[1]
        if from_h is None:
            return LstmUpdate.apply(from_x, None, c)
        if torch.compiler.is_compiling():  # which makes one kernel of the equations
            return lstm_update(from_x + from_h, c)
        if from_x.is_cuda:
            return torch.ops.aten._thnn_fused_lstm_cell(from_x, from_h, c)[:2]
        if torch.is_grad_enabled():
            return LstmUpdate.apply(from_x, from_h, c)
        gates = from_x + from_h
        return lstm_update_by_sigmoids(gates, c) if has_sigmoid_tanh(gates) else lstm_update(gates, c)

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        # i = 0 and f = 1 keep c; h = o tanh(c) stays zero before the first token, since c is; after the last token it
        # is not read.
        one_gate = torch.full_like(bias[: self.hidden_size], SATURATED)
        return torch.cat((-one_gate, one_gate, 0 * one_gate, 0 * one_gate))


def lstm_update(gates: torch.Tensor, c: torch.Tensor) -> State:
    """h_t and c_t [B, H] from the gates' pre-activations [B, 4H] and c_{t-1} [B, H]."""
    i, f, g, o = gates.chunk(4, dim=1)
    c = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c


def lstm_update_by_sigmoids(gates: torch.Tensor, c: torch.Tensor) -> State:
    """[`lstm_update`] by tanh(x) = 1 - 2 sigmoid(-2x), see [`activations`]. It overwrites the gates."""
    size = c.size(1)
    gates[:, 2 * size : 3 * size].mul_(-2)
    i, f, g, o = gates.sigmoid_().chunk(4, dim=1)
    c = torch.addcmul(torch.addcmul(i, f, c), i, g, value=-2)  # f c + i (1 - 2 g)
    return torch.addcmul(o, o, torch.mul(c, -2).sigmoid_(), value=-2), c


class LstmUpdate(torch.autograd.Function):
    """
    [`lstm_update`] of from_x + from_h, whose backward pass is written out: a third of autograd's operations. Without
    from_h from_x is overwritten, which must be nobody else's.
    """

    @staticmethod
    def forward(
        ctx: Any, from_x: torch.Tensor, from_h: torch.Tensor | None, c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gates = from_x if from_h is None else from_x + from_h
        i, f, g, o = gates.chunk(4, dim=1)
        gates[:, : 2 * c.size(1)].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        new_c = torch.addcmul(f * c, i, g)
        tanh_c = torch.tanh(new_c)
        ctx.save_for_backward(gates, c, tanh_c)
        return o * tanh_c, new_c

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_h: torch.Tensor, grad_c: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        gates, c, tanh_c = ctx.saved_tensors
        i, f, g, o = gates.chunk(4, dim=1)
        grad_c = grad_c + torch.ops.aten.tanh_backward(grad_h * o, tanh_c)
        grad = torch.cat((grad_c * g, grad_c * c, grad_c * i, grad_h * tanh_c), dim=1)
        size = c.size(1)
        for part, backward in (
            (slice(2 * size), torch.ops.aten.sigmoid_backward),
            (slice(2 * size, 3 * size), torch.ops.aten.tanh_backward),
            (slice(3 * size, 4 * size), torch.ops.aten.sigmoid_backward),
        ):
            backward.grad_input(grad[:, part], gates[:, part], grad_input=grad[:, part])
        return grad, grad if ctx.needs_input_grad[1] else None, grad_c * f


class GRU(KernelLayer):
    r"""
    Gated recurrent unit (Cho et al. 2014), in the variant of cuDNN and torch, whose reset gate acts after the product:

        r, z = sigmoid(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        n = tanh(W_in x_t + b_in + r (W_hn h_{t-1} + b_hn)),  h_t = (1 - z) n + z h_{t-1}
    """

    num_gates = 3
    fused = torch.gru
    sums = False  # r stands before what h adds to n

    def update(self, from_x: torch.Tensor, from_h: torch.Tensor | None, state: State) -> State:
        assert from_h is not None
        return (gru_update(from_x, from_h, state[0]),)

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        one_gate = torch.full_like(bias[: self.hidden_size], SATURATED)
        return torch.cat((0 * one_gate, one_gate, 0 * one_gate))  # z = 1 keeps h


def gru_update(from_x: torch.Tensor, from_h: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """A GRU's new h [B, H], given what x_t and h_{t-1} add to r, z and n, [B, 3H] each, and h_{t-1}."""
    x_r, x_z, x_n = from_x.chunk(3, dim=1)
    h_r, h_z, h_n = from_h.chunk(3, dim=1)
    z = torch.sigmoid(x_z + h_z)
    n = tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return (1 - z) * n + z * h


class SimpleRNN(KernelLayer):
    r"""Elman's network (1990): h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)."""

    num_gates = 1

    def padding_gates(self, bias: torch.Tensor) -> torch.Tensor:
        return -bias  # act(0) = 0: h stays zero before the first token, and is not read after the last


class TanhRNN(SimpleRNN):
    """[`SimpleRNN`] with tanh (Elman 1990)."""

    fused = torch.rnn_tanh

    def update(self, from_x: torch.Tensor, from_h: torch.Tensor | None, state: State) -> State:
        return (tanh(from_x if from_h is None else from_x + from_h),)


class ReluRNN(SimpleRNN):
    """[`SimpleRNN`] with a rectifier (Le et al. 2015)."""

    fused = torch.rnn_relu

    def update(self, from_x: torch.Tensor, from_h: torch.Tensor | None, state: State) -> State:
        return (torch.relu(from_x if from_h is None else from_x + from_h),)


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
        return self.ih_norm(linear(x, self.weight_ih))  # [..., num_gates * H]

    def project_state(self, h: torch.Tensor, noise: State) -> torch.Tensor:
        """[B, H] -> [B, num_gates * H]"""
        return self.hh_norm(linear(self.drop(h, noise), self.weight_hh))


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


class JointNorm(GateNorm):
    """[`GateNorm`] that takes mean and variance over the units of several gates together: `groups` of them."""

    def __init__(self, groups: tuple[int, ...], hidden_size: int):
        super().__init__(sum(groups), hidden_size)
        self.sizes = [count * hidden_size for count in groups]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normalised = torch.cat([F.layer_norm(part, part.shape[-1:]) for part in x.split(self.sizes, dim=-1)], dim=-1)
        return torch.addcmul(self.bias, normalised, self.weight).to(x.dtype)


class MarianGRU(LayerNormGRU):
    """[`LayerNormGRU`] whose norms are over all three gates together (Marian: Junczys-Dowmunt et al. 2018)."""

    groups: tuple[int, ...] = (3,)

    def __init__(self, input_size: int, hidden_size: int, recurrent_dropout: float = 0.0, zoneout: float = 0.0):
        super().__init__(input_size, hidden_size, recurrent_dropout, zoneout)
        self.ih_norm = JointNorm(self.groups, hidden_size)
        self.hh_norm = JointNorm(self.groups, hidden_size)


class NematusGRU(MarianGRU):
    """
    [`LayerNormGRU`] whose norms are over r and z together and over n, each after a bias (Nematus: Sennrich et al.
    2017): N_ih(W_ih x_t + b_ih), N_hh(W_hh h_{t-1} + b_hh). So Ba et al. (2016) have it, but for that bias.
    """

    groups = (2, 1)

    def __init__(self, input_size: int, hidden_size: int, recurrent_dropout: float = 0.0, zoneout: float = 0.0):
        super().__init__(input_size, hidden_size, recurrent_dropout, zoneout)
        self.bias_ih = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(3 * hidden_size))

    def reset_weights(self) -> None:
        super().reset_weights()
        init.zeros_(self.bias_ih)
        init.zeros_(self.bias_hh)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        return self.ih_norm(linear(x, self.weight_ih, self.bias_ih))

    def project_state(self, h: torch.Tensor, noise: State) -> torch.Tensor:
        return self.hh_norm(linear(self.drop(h, noise), self.weight_hh, self.bias_hh))


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
        return linear(x, self.weight_ih)  # [..., 2H]

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
    "nematus_gru": NematusGRU,
    "marian_gru": MarianGRU,
    "ssru": SSRU,
}
