"""tanh by the sigmoid, whose kernel in torch is four times as fast on a CPU, where nothing is to be differentiated."""

import torch
from torch import nn

# For fewer numbers than this more calls take longer.
WORTH_CALLS = 2**14


def has_sigmoid_tanh(x: torch.Tensor) -> bool:
    """
    Is tanh(x) = 1 - 2 sigmoid(-2x) to be taken? It is as far off as the last digit of 1, so not in 16 bits; and a
    compiler makes better of tanh itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.is_cpu and x.dtype in (torch.float32, torch.float64)


def tanh(x: torch.Tensor) -> torch.Tensor:
    """tanh(x), [...]"""
    if not has_sigmoid_tanh(x) or x.numel() < WORTH_CALLS:
        return torch.tanh(x)
    return torch.mul(x, -2).sigmoid_().mul_(-2).add_(1)


class Tanh(nn.Module):
    """`nn.Tanh` by [`tanh`]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return tanh(x)
