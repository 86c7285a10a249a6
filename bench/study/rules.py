"""Rules that the study compares: `w_t`, and whether m is bias-corrected.

All rules step the same kernel of `AdaXW`. A rule sets `second_moment` and `betas[1]`. Its optional correction of m is a
factor of the learning rate, because `m / (1 - b1^t)` is linear in m.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from adax_triton.update.coefficients import LARGEST_ADAX_BETA2, one_minus_power

BETA1 = 0.9


class Rule(NamedTuple):
    """A rule for `w_t`.

    Attributes:
        second_moment: the argument of `AdaXW`.
        beta2: function of (step, steps) that returns `betas[1]` of a step, counted from 1, of a run.
        corrected: divide m by `1 - b1^t`.
    """

    second_moment: str
    beta2: Callable[[int, int], float]
    corrected: bool = True


def _adax(horizon: float) -> Callable[[int, int], float]:
    """Return betas[1] of `"adax"` for `b2 T = horizon`."""
    return lambda step, steps: min(LARGEST_ADAX_BETA2, horizon / steps)


def _fraction(share: float) -> Callable[[int, int], float]:
    """Return betas[1] of `"adafactor"` for a memory of the last steps.

        w_t = k / (t + k - 1),    k = 1 / share

    v then averages over about the last `share` of the steps so far.
    """
    k = 1.0 / share

    def exponent(step: int, steps: int) -> float:
        return 1.0 if step == 1 else math.log1p((step - 1) / k) / math.log(step)

    return exponent


RULES: dict[str, Rule] = {
    "adax-1e-4": Rule("adax", lambda step, steps: 1e-4),
    "adax-1/T": Rule("adax", _adax(1.0)),
    "adax-3/T": Rule("adax", _adax(3.0)),
    "adax-10/T": Rule("adax", _adax(10.0)),
    "average": Rule("adax", lambda step, steps: 0.0),  # also AdaFactor's decay with c = 1
    "adafactor-0.8": Rule("adafactor", lambda step, steps: 0.8),
    "adafactor-0.5": Rule("adafactor", lambda step, steps: 0.5),
    "adam-0.95": Rule("adam", lambda step, steps: 0.95),
    "adam-0.99": Rule("adam", lambda step, steps: 0.99),
    "adam-0.999": Rule("adam", lambda step, steps: 0.999),
    "adam-10/T": Rule("adam", lambda step, steps: max(0.01, 1.0 - 10.0 / steps)),
    "fraction-1/4": Rule("adafactor", _fraction(1 / 4)),
    "fraction-1/16": Rule("adafactor", _fraction(1 / 16)),
    "adax-1e-4-uncorrected": Rule("adax", lambda step, steps: 1e-4, corrected=False),
    "adam-0.999-uncorrected": Rule("adam", lambda step, steps: 0.999, corrected=False),
}

REFERENCE = "adam-0.999"  # differences are taken from it

# Rules that the whole study runs at some horizons only, by index in `Problem.horizons`, to save time. `adax-1/T` and
# `adax-3/T` lie between rules that differ at the longer horizons. The `fraction` rules lose on the GPT and on words at
# the shortest one. One horizon shows the effect of the correction of m.
PARTIAL: dict[str, tuple[int, ...]] = {
    "adax-1/T": (1, 2),
    "adax-3/T": (1, 2),
    "fraction-1/4": (0,),
    "fraction-1/16": (0,),
    "adax-1e-4-uncorrected": (1,),
    "adam-0.999-uncorrected": (1,),
}


def step_settings(rule: Rule, step: int, steps: int, lr: float, weight_decay: float) -> dict[str, Any]:
    """Return the values of a parameter group for one step.

    Args:
        rule: the rule.
        step: t, counted from 1.
        steps: T, the horizon of the run.
        lr: learning rate of this step, before the correction of m.
        weight_decay: decoupled coefficient; a step decays by `lr * weight_decay` for each rule.
    """
    factor, has_correction = 1.0, rule.second_moment == "adam"
    if rule.corrected != has_correction:
        factor = one_minus_power(BETA1, step) ** (-1.0 if rule.corrected else 1.0)
    return {
        "lr": lr * factor,
        "betas": (BETA1, rule.beta2(step, steps)),
        "weight_decay": weight_decay / factor,
    }
