"""
Random masks, and dropout by them, for CPUs: torch's own dropout takes one random number of 64 bits for each entry, and
with that a tenth of what a small model trains.
"""

import math

import torch
from torch import nn

STEPS = 2**16  # of probability: a draw of 64 bits is four numbers


def random_mask(shape: tuple[int, ...], probability: float, device: torch.device) -> torch.Tensor:
    """Bool, of `shape`: each entry true with `probability` to the nearest 2^-16, independent of the others."""
    below = round(probability * STEPS)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.rand(shape, device=device) < below / STEPS
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[:count].view(shape)
    if below == STEPS:  # which is no number of their type
        return torch.ones_like(numbers, dtype=torch.bool)
    return numbers < below - STEPS // 2


def dropout_noise(shape: tuple[int, ...], p: float, like: torch.Tensor) -> torch.Tensor:
    """
    What dropout multiplies with (Srivastava et al. 2014): 0 with probability p, else 1 / (1 - p).

    Args:
        shape: of the noise.
        p: probability of an entry to be dropped, to the nearest 2^-16, below 1.
        like: a tensor of the noise's device and type.
    """
    return random_mask(shape, 1 - p, like.device).to(like.dtype).mul_(1 / (1 - p))


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, on a CPU by [`dropout_noise`]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not (self.training and 0 < self.p < 1):
            return super().forward(x)
        return x * dropout_noise(x.shape, self.p, x)
