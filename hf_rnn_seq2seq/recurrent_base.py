"""What every recurrent cell has in common: one step, a sequence step by step, recurrent dropout, zoneout, padding."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

from .compiled_loop import Step, Tensors, scan_steps, scans
from .dropout import dropout_noise, random_mask

# What a cell carries from step to step, output first: (h,) or, for a cell with a memory, (h, c); each [B, H].
State = tuple[torch.Tensor, ...]


def tokens_to_last(mask: torch.Tensor) -> torch.Tensor:
    """How many positions there are up to the last that is in the mask, [B, T] -> [B]: 0 for a row of padding."""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(dim=1)


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
        return (dropout_noise((x.size(0), self.hidden_size), self.recurrent_dropout, x),)

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

    def transition(self, x: torch.Tensor, state: State, noise: State) -> State:
        """`cell`, given x_t [B, D] itself."""
        return self.cell(self.project(x), state, noise)

    @staticmethod
    def drop(h: torch.Tensor, noise: State) -> torch.Tensor:
        """h [B, H] as it enters the gates."""
        return h * noise[0].to(h.dtype) if noise else h

    def step(self, x: torch.Tensor, state: State, noise: State = ()) -> State:
        """
        One step: x [B, D], state of [B, H] -> state of [B, H], the first being the output.

        `noise` is `sample_noise`'s, the same for all steps of a sequence.
        """
        x, *state_list = self._cast(x, *state)
        old = tuple(state_list)
        return self._zone_out(self.transition(x, old, noise), old)

    def _advance(self, x: torch.Tensor, old: State, noise: State) -> State:
        """`step` of what `project` made of x."""
        return self._zone_out(self.cell(x, old, noise), old)

    def _zone_out(self, new: State, old: State) -> State:
        if self.zoneout == 0:
            return new
        # Krueger et al. 2017, eq. 2: in training some units keep their value, in use each moves by the expectation.
        if self.training:
            keep = [random_mask(value.shape, self.zoneout, value.device) for value in new]
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
        inputs = [self.project(x), *([] if mask is None else [mask.unsqueeze(-1)])]  # [B, T, *], and [B, T, 1]

        def step(old: Tensors, inputs: Tensors) -> Step:
            new = self._advance(inputs[0], tuple(old), noise)
            if len(inputs) == 1:
                return new, new[:1]
            new = tuple(torch.where(inputs[1], n, o) for n, o in zip(new, old, strict=True))
            return new, (new[0] * inputs[1],)

        if scans(x.size(1)):
            last, (h,) = scan_steps(step, state, inputs)
            return h, tuple(last)
        outputs = []
        for inputs_t in zip(*(one.unbind(1) for one in inputs), strict=True):
            new, (h,) = step(state, inputs_t)
            state = tuple(new)
            outputs.append(h)
        return torch.stack(outputs, dim=1), state
