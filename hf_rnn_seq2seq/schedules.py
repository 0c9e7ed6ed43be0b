"""Learning-rate schedules beside those of transformers, by the name that `lr_scheduler_type` takes.

A schedule is a multiplier of `learning_rate`, a function of the number of updates made so far.
"""

import math
from fractions import Fraction

# tf/nmt's schemes (nmt/model.py, `_get_decay_info`): the share of training before the first interval, and into how
# many intervals the rest is divided. The rate is halved at the end of each.
LUONG_SCHEMES = {"luong5": (Fraction(1, 2), 5), "luong10": (Fraction(1, 2), 10), "luong234": (Fraction(2, 3), 4)}

SCHEDULES = ("halving", *LUONG_SCHEMES, "rnmt_plus")


def warmup_multiplier(step: int, warmup_steps: int) -> float:
    """From 0 to 1 in equal steps, as transformers' schedules with a warm-up begin."""
    return min(1.0, step / warmup_steps) if warmup_steps > 0 else 1.0


def halving_multiplier(
    step: int, *, start: Fraction | int, interval: Fraction | int, factor: float, warmup_steps: int = 0
) -> float:
    """Multiplied by `factor` at `start` and again after each `interval`.

    Sutskever et al. (2014, sec. 3.4): after 5 epochs, every half epoch. Luong et al. (2015, sec. 4.1): after 5 epochs
    (8 with dropout), every epoch.

    Args:
        step: updates made so far.
        start: the first step of the lower rate.
        interval: steps between one reduction and the next; it and `start` may lie between two steps.
        factor: 0.5 to halve.
        warmup_steps: of a linear warm-up before all that.
    """
    times = max(0, math.floor((step - start) / Fraction(interval)) + 1)
    return warmup_multiplier(step, warmup_steps) * factor**times


def luong_start_and_interval(scheme: str, num_training_steps: int) -> tuple[int, int]:
    """`start` and `interval` of [`halving_multiplier`], in steps, for a scheme of tf/nmt.

    There the rate is lowered for the first time an interval after the scheme's start.
    """
    before, times = LUONG_SCHEMES[scheme]
    first = int(num_training_steps * before)
    interval = max(1, (num_training_steps - first) // times)
    return first + interval, interval


def rnmt_plus_multiplier(
    step: int, *, replicas: int, warmup_steps: int, start: Fraction | int, end: Fraction | int
) -> float:
    """The schedule of RNMT+ (Chen et al. 2018), there with a `learning_rate` of 1e-4:

        lr = 1e-4 min(1 + t (n - 1) / (n p), n, n (2n)^((s - n t) / (e - s)))

    It rises from 1 to n, stays, and falls to 1/2 at n t = e (and on below it).

    Args:
        step: t, updates made so far.
        replicas: n, how many copies of the model share a step.
        warmup_steps: p; the rise takes n p steps. Without any it begins at n.
        start, end: s and e, where the fall begins and ends, in steps of a single replica: a step of all counts n.
    """
    rise = 1 + step * (replicas - 1) / (replicas * warmup_steps) if warmup_steps > 0 else math.inf
    # An exponent above 0 gives more than n, the second term of the minimum.
    exponent = min(0.0, float((start - replicas * step) / Fraction(end - start)))
    return min(rise, replicas * (2 * replicas) ** exponent)
