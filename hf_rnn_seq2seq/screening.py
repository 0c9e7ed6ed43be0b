"""
The best word of a large vocabulary without exact scores of all its words.

Which word has the greatest score z_v = w_v . x + b_v? A product in bfloat16, which a CPU with instructions for it
makes in half the time for few rows and on some CPUs for any, gives every score up to a known error. Few words can then
still be the best; of these the scores are made exactly. So the answer is that of exact scores: the error's bound
always holds.

Shape letters: R rows, H width, V vocabulary, D words a block, C blocks with candidates, P candidates of all rows.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from .best_words import BLOCK, best_words
from .packed_products import can_be_packed, pack, packed_product, rough_is_faster
from .step_products import StepLinear, linear, loop_weights, version_of

# A number rounded to bfloat16, which keeps 8 bits of it, is off by at most this part.
ROUNDING = 2.0**-8
# A matrix with fewer numbers is not worth the search for candidates.
WORTH_SCREENING = 2**20
# More candidates a row, or a larger part of the vocabulary, cost as much as exact scores of all words.
MOST_CANDIDATES = 8
MOST_OF_VOCABULARY = 1 / 32


class RoughScores:
    """
    W x + b by a product in bfloat16, and how far off it may be.

    Args:
        weight: W in float32, [V, H].
        bias: b, [V].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        filling = -len(weight) % BLOCK  # of the last block
        rounded = weight.new_zeros((len(weight) + filling, weight.size(1)), dtype=torch.bfloat16)
        rounded[: len(weight)] = weight
        self.bias = F.pad(weight.new_zeros(len(weight)) if bias is None else bias, (0, filling), value=-torch.inf)
        self.packed = pack(rounded) if can_be_packed(rounded) else None
        self.weight = rounded if self.packed is None else None  # only one of them is needed
        error = 3 * ROUNDING + 3 * ROUNDING**2 + ROUNDING**3  # (1 + u)^3 - 1
        self.error = (error + weight.size(1) * 2**-22) * weight.norm(dim=1).amax().item()
        self.room = weight.new_empty(0)  # new memory at every step would cost more than the scores do

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, H] -> [R, V rounded up to whole blocks] in float32; the next call overwrites them."""
        rounded = x.bfloat16()
        if self.packed is not None:
            products = packed_product(rounded, self.packed)
        else:
            assert self.weight is not None
            products = F.linear(rounded, self.weight)
        if self.room.numel() < products.numel():
            with torch.inference_mode(False):  # a tensor that can be written to in other modes, too
                self.room = torch.empty(products.numel(), dtype=torch.float32, device=x.device)
        return torch.add(products, self.bias, out=self.room[: products.numel()].view_as(products))

    def errors(self, x: torch.Tensor) -> torch.Tensor:
        """
        The most by which a row's scores are off, [R, 1].

        Rounding w, x and their product, each by a part of u = `ROUNDING` at most, changes it by no more than
        ((1 + u)^3 - 1) sum_h |w_h x_h|, where the sum is at most |w| |x| (Cauchy and Schwarz). The rest is for what
        summing H products in float32 may lose, here and in exact scores: 2 H 2^-23 |w| |x|.
        """
        return x.norm(dim=1, keepdim=True) * self.error


class Screen:
    """
    Args:
        weight: W in float32, [V, H].
        bias: b, [V].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.original = self.weight = weight
        self.bias = bias
        self.version = version_of(weight)
        self.is_useful = True  # until one batch has too many candidates

    @functools.cached_property
    def rough_scores(self) -> RoughScores:
        return RoughScores(self.weight, self.bias)

    def best(self, x: torch.Tensor) -> torch.Tensor:
        """`argmax_v (W x + b)_v`, the first of equal ones: [R, H] -> [R]."""
        if self.is_useful and rough_is_faster(len(x)):
            found = self._search(x)
            if found is not None:
                return found
            self.is_useful = False
        return best_words(linear(x, self.weight, self.bias))

    def _search(self, x: torch.Tensor) -> torch.Tensor | None:
        """`None` where too many words are candidates, or something is not a number."""
        number, vocabulary = len(x), len(self.weight)
        most = max(MOST_CANDIDATES * number, vocabulary * MOST_OF_VOCABULARY)
        rough = self.rough_scores(x).unflatten(1, (-1, BLOCK))  # [R, V / D rounded up, D]
        maxima = rough.amax(2)
        # What is less is not the best one, [R, 1].
        thresholds = maxima.amax(1, keepdim=True) - 2 * self.rough_scores.errors(x)
        rows, blocks = (maxima >= thresholds).nonzero().unbind(1)  # [C]
        if len(rows) > most:
            return None
        places, offsets = (rough[rows, blocks] >= thresholds[rows]).nonzero().unbind(1)  # [P]
        rows, words = rows[places], blocks[places] * BLOCK + offsets
        if torch.equal(rows, torch.arange(number, device=rows.device)):  # one each
            return words
        if len(rows) > most:
            return None
        exact = (self.weight[words] * x[rows]).sum(1) + self.rough_scores.bias[words]
        best = exact.new_full((number,), -torch.inf).scatter_reduce(0, rows, exact, "amax")
        words = words.where(exact >= best[rows], vocabulary)
        first = words.new_full((number,), vocabulary).scatter_reduce(0, rows, words, "amin")
        return None if (first == vocabulary).any() else first


def screen_of(layer: nn.Module) -> Screen | None:
    """
    The output layer's screen for as long as its weights are shared by steps without gradients (`shared_by_steps`,
    `packed_weights`); `None` where exact scores are made as fast.
    """
    weights = loop_weights()
    if weights is None or type(layer) is not StepLinear:  # adapters and quantised layers have other weights, too
        return None
    weight = layer.weight
    if type(weight) is not nn.Parameter or not _gains(weight):
        return None
    if id(weight) not in weights.screens:
        weights.screens[id(weight)] = Screen(weight, layer.bias)
    return weights.screens[id(weight)]


def _gains(weight: torch.Tensor) -> bool:
    if not weight.is_cpu or weight.dtype != torch.float32 or weight.numel() < WORTH_SCREENING:
        return False
    return not torch.is_autocast_enabled("cpu") and has_bfloat16_products()


def has_bfloat16_products() -> bool:
    """Whether oneDNN makes them by the CPU's own instructions; without these they are slower than in float32."""
    onednn = torch.backends.mkldnn
    usable = onednn.is_available() and bool(onednn.enabled)
    return usable and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
