"""
The best word of a large vocabulary without exact scores of all its words.

Which word has the greatest score z_v = w_v . x + b_v? A product of rounded numbers gives every score up to a known
error, in less time: in bfloat16, which a CPU with instructions for it makes in half the time for few rows and on some
CPUs for any; or of whole numbers of eight bits, in a quarter of the time for many rows, once the matrix has been
prepared for it. Few words can then still be the best; of these the scores are made exactly. So the answer is that of
exact scores: the error's bound always holds.

Shape letters: R rows, H width, V vocabulary, D words a block, C blocks, P candidates of all rows.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from .best_words import BLOCK, best_words
from .int8 import quantize_rows
from .packed_products import (
    Int8Product,
    can_be_packed,
    has_int8_products,
    onednn_is_on,
    pack,
    packed_product,
    rough_is_faster,
    saved_by_int8,
)
from .step_products import StepLinear, linear, loop_weights, version_of

# A number rounded to bfloat16, which keeps 8 bits of it, is off by at most this part.
ROUNDING = 2.0**-8
# Adding b in float32, to a rough score and to the exact one, may lose this part of the score; half of it, in truth.
ADDING = 2.0**-22
# A matrix with fewer numbers is not worth the search for candidates.
WORTH_SCREENING = 2**20
# More candidates a row, or a larger part of the vocabulary, cost as much as exact scores of all words.
MOST_CANDIDATES = 8
MOST_OF_VOCABULARY = 1 / 32
# Seconds that a product of whole numbers has to save, as all around it takes as long.
SEARCH_SECONDS = 3e-4
# So many rows of a matrix are rounded at a time, to stay in the processor's cache.
ROUNDED_ROWS = 512


class Bfloat16Scores:
    """
    W x + b by a product in bfloat16, and how far off it may be.

    Args:
        weight: W in float32, [V, H].
        bias: b, [V].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.bias = padded_bias(weight, bias)
        rounded = weight.new_zeros((len(self.bias), weight.size(1)), dtype=torch.bfloat16)
        rounded[: len(weight)] = weight
        self.packed = pack(rounded) if can_be_packed(rounded) else None
        self.weight = rounded if self.packed is None else None  # only one of them is needed
        error = 3 * ROUNDING + 3 * ROUNDING**2 + ROUNDING**3  # (1 + u)^3 - 1
        self.error = (error + weight.size(1) * 2**-22) * weight.norm(dim=1).amax().item()
        self.room = weight.new_empty(0)  # new memory at every step would cost more than the scores do

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Scores of x [R, H] in float32, [R, V rounded up to whole blocks], which the next call overwrites; and the most
        by which those of a row are off, [R, 1].

        Rounding w, x and their product, each by a part of u = `ROUNDING` at most, changes it by no more than
        ((1 + u)^3 - 1) sum_h |w_h x_h|, where the sum is at most |w| |x| (Cauchy and Schwarz). The rest is for what
        summing H products in float32 may lose, here and in exact scores: 2 H 2^-23 |w| |x|. What adding b loses is
        left to whoever knows the score, see `ADDING`.
        """
        rounded = x.bfloat16()
        if self.packed is not None:
            products = packed_product(rounded, self.packed)
        else:
            assert self.weight is not None
            products = F.linear(rounded, self.weight)
        if self.room.numel() < products.numel():
            with torch.inference_mode(False):  # a tensor that can be written to in other modes, too
                self.room = torch.empty(products.numel(), dtype=torch.float32, device=x.device)
        scores = torch.add(products, self.bias, out=self.room[: products.numel()].view_as(products))
        return scores, x.norm(dim=1, keepdim=True) * self.error


class Int8Scores:
    """
    W x + b by a product of whole numbers of eight bits, and how far off it may be.

    Args:
        weight: W in float32, [V, H].
        bias: b, [V].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.bias = padded_bias(weight, bias)
        size = len(self.bias)
        whole = weight.new_zeros((size, weight.size(1)), dtype=torch.int8)
        scale, norm, lost = weight.new_ones(size), weight.new_zeros(size), weight.new_zeros(size)
        for start in range(0, len(weight), ROUNDED_ROWS):
            part = weight[start : start + ROUNDED_ROWS]
            rows = slice(start, start + len(part))
            whole[rows], scale[rows] = quantize_rows(part)
            rounded = whole[rows] * scale[rows].unsqueeze(1)
            norm[rows], lost[rows] = rounded.norm(dim=1), (part - rounded).norm(dim=1)
        self.product = Int8Product(whole, scale, self.bias)
        # What each block's errors are made of, [2, C].
        lost += (weight.size(1) + 8) * 2**-22 * norm
        self.factors = torch.stack((lost, norm)).unflatten(1, (-1, BLOCK)).amax(2)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Scores of x [R, H] in float32, [R, V rounded up to whole blocks], and the most by which those of a row and a
        block are off, [R, C].

        With W' and x' for what is left of W and x, w . x - w' . x' = (w - w') . x + w' . (x - x'), which is at most
        |w - w'| |x| + |w'| |x - x'|; all four are known. The rest is for rounding in float32, here and in exact
        scores, as of [`Bfloat16Scores`].
        """
        scale = max(x.abs().amax().item(), torch.finfo(torch.float32).tiny * 127) / 127
        whole = (x / scale).round_()
        scores = self.product((whole + 128).to(torch.uint8), scale)
        sizes = torch.stack((x, x.sub(whole, alpha=scale))).norm(dim=2)  # [2, R]
        return scores, sizes.t() @ self.factors


RoughScores = Bfloat16Scores | Int8Scores


def padded_bias(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """b, or zeros, and behind it -inf until the last block is a whole one, [V rounded up]."""
    return F.pad(weight.new_zeros(len(weight)) if bias is None else bias, (0, -len(weight) % BLOCK), value=-torch.inf)


class Screen:
    """
    Args:
        weight: W in float32, [V, H].
        bias: b, [V].
        lasting: is it for many calls, so that much may be prepared?
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, lasting: bool = False):
        self.original = self.weight = weight
        self.bias = bias
        self.version = version_of(weight)
        self.lasting = lasting
        self.is_useful = True  # until one batch has too many candidates; the next call tries again

    @functools.cached_property
    def bfloat16_scores(self) -> Bfloat16Scores:
        return Bfloat16Scores(self.weight, self.bias)

    @functools.cached_property
    def int8_scores(self) -> Int8Scores:
        return Int8Scores(self.weight, self.bias)

    def rough_scores(self, rows: int) -> RoughScores | None:
        """The quickest for so many rows; `None` where exact scores are made as fast."""
        if self.lasting and has_int8_products() and saved_by_int8(rows, self.weight.numel()) > SEARCH_SECONDS:
            return self.int8_scores
        return self.bfloat16_scores if has_bfloat16_products() and rough_is_faster(rows) else None

    def best(self, x: torch.Tensor) -> torch.Tensor:
        """`argmax_v (W x + b)_v`, the first of equal ones: [R, H] -> [R]."""
        rough_scores = self.rough_scores(len(x)) if self.is_useful else None
        if rough_scores is not None:
            found = self._search(x, rough_scores)
            if found is not None:
                return found
            self.is_useful = False
        return best_words(linear(x, self.weight, self.bias))

    def _search(self, x: torch.Tensor, rough_scores: RoughScores) -> torch.Tensor | None:
        """`None` where too many words are candidates, or something is not a number."""
        number, vocabulary = len(x), len(self.weight)
        most = max(MOST_CANDIDATES * number, vocabulary * MOST_OF_VOCABULARY)
        scores, errors = rough_scores(x)
        rough = scores.unflatten(1, (-1, BLOCK))  # [R, C, D]
        maxima = rough.amax(2)
        errors = errors + ADDING * maxima.amax(1, keepdim=True).abs()  # scores far below the highest don't matter
        # What is less is not the best one, [R, 1].
        thresholds = (maxima - errors).amax(1, keepdim=True)
        errors = errors.expand_as(maxima)
        rows, blocks = (maxima + errors >= thresholds).nonzero().unbind(1)
        if len(rows) > most:
            return None
        within = rough[rows, blocks] + errors[rows, blocks].unsqueeze(1) >= thresholds[rows]
        places, offsets = within.nonzero().unbind(1)  # [P]
        rows, words = rows[places], blocks[places] * BLOCK + offsets
        if torch.equal(rows, torch.arange(number, device=rows.device)):  # one each
            return words
        if len(rows) > most:
            return None
        exact = (self.weight[words] * x[rows]).sum(1) + rough_scores.bias[words]
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
        weights.screens[id(weight)] = Screen(weight, layer.bias, weights.lasting)
    screen: Screen = weights.screens[id(weight)]
    screen.is_useful = True
    return screen


def _gains(weight: torch.Tensor) -> bool:
    if not weight.is_cpu or weight.dtype != torch.float32 or weight.numel() < WORTH_SCREENING:
        return False
    return not torch.is_autocast_enabled("cpu") and (has_bfloat16_products() or has_int8_products())


def has_bfloat16_products() -> bool:
    """Whether oneDNN makes them by the CPU's own instructions; without these they are slower than in float32."""
    return onednn_is_on() and bool(torch.cpu.get_capabilities().get("avx512_bf16"))
