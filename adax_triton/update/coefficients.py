"""Scalars of one optimizer step, in float64 Python floats.

Every rule is one recursion on the normalised second moment, `v += w_t (g^2 - v)` with `w_1 = 1`. The rules differ in
`w_t`, and in the bias correction of m:

    adax       w_t = b2 / ((1 + b2)^t - 1)   m               Li et al. 2020, arXiv:2004.09740, algorithm 1
    adam       w_t = (1 - b2) / (1 - b2^t)   m / (1 - b1^t)  Kingma & Ba 2015, arXiv:1412.6980
    adafactor  w_t = t^-c, c = b2            m               Shazeer & Stern 2018, arXiv:1804.04235, section 7.2

The powers are computed as `expm1(t log1p(b2))`. A float32 power is wrong by 0.6 % after 350k steps, and the growing
factor of AdaX overflows float32 at step 887k.
"""

from __future__ import annotations

import math
from typing import NamedTuple

SECOND_MOMENTS = ("adax", "adam", "adafactor")
# Keys of a parameter group that `step_scalars` takes.
COEFFICIENT_KEYS = (
    *("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay"),
    *("second_moment", "eps_placement", "maximize"),
)
EPS_PLACEMENTS = ("normalized", "unnormalized")
LARGEST_ADAX_BETA2 = 0.1  # the usual decays of Adam and AdaFactor lie above it

# For x above this, exp(x) - 1 == exp(x) in float64. exp(x) overflows from 710 on; exp(-x) does not overflow.
_EXPM1_IS_EXP = 100.0
# Square root of float32's smallest normal number. GPUs flush a smaller sqrt(v) to 0, and m / (0 + eps) would then be
# huge for a smaller eps. An eps that underflows to 0 would give 0 / 0 = NaN for weights without gradients.
_SMALLEST_EPS = 2.0**-63
# Constants of `DeviceCoefficients`.
_SATURATED_RATE = 1024.0  # 1 - exp(-rate t) == 1 in float64
_NO_GROWTH = 2.0**-1000  # AdaX's w_t is 1/t for this b2


class StepScalars(NamedTuple):
    """Scalars of one step, in the order of the kernel's scalar row.

    `m += one_minus_beta1 (g' - m)`, `v += exp_avg_sq_weight (g'^2 - v)`,
    `p -= decay p + step_size m / (sqrt(v) + eps)`, with `g' = grad_factor g + l2 p`.
    """

    step_size: float  # lr, or lr / (1 - b1^t) for adam
    one_minus_beta1: float  # 1 - b1
    exp_avg_sq_weight: float  # w_t
    eps: float  # added to sqrt(v)
    decay: float  # lr * weight_decay if decoupled, else 0
    l2: float  # weight_decay if it is part of the gradient, else 0
    grad_factor: float  # -1 to maximize, else 1


class DeviceCoefficients(NamedTuple):
    """Constants of a group from which a GPU computes any step's scalars.

    The order is that of the kernel's table.

    With `B(rate) = 1 - exp(-rate t)`, each field of `StepScalars` is one closed form of t for all rules:

        step_size          lr / B(bias_rate)
        exp_avg_sq_weight  w_t = w_factor t^-w_power exp(-w_exponent t) / B(w_rate)
        eps                max(eps + unnormalized_eps sqrt(w_t), smallest_eps)
        decay              lr * decoupled_decay
    """

    lr: float  # used if the group's lr is a number, not a GPU tensor
    bias_rate: float  # adam -log b1
    one_minus_beta1: float
    w_factor: float  # adax b2, adam 1 - b2, adafactor 1
    w_power: float  # adafactor c
    w_exponent: float  # adax log(1 + b2)
    w_rate: float  # adax log(1 + b2), adam -log b2
    eps: float  # eps if normalized, else 0
    unnormalized_eps: float  # eps / sqrt(w_factor) if unnormalized, else 0
    smallest_eps: float  # 0 if the user's eps is 0
    decoupled_decay: float  # weight_decay if decoupled, else 0
    l2: float  # weight_decay if it is part of the gradient, else 0
    grad_sign: float  # -1 to maximize, else 1
    seed: float  # of the random bits; float64 holds it exactly


def exp_avg_sq_weight(second_moment: str, beta2: float, step: int) -> float:
    """Return `w_t`, the weight of the newest squared gradient in v.

    Args:
        second_moment: `"adax"`, `"adam"` or `"adafactor"`.
        beta2: the rule's parameter; for `"adax"`, 0 is the limit `w_t = 1/t`, the plain average.
        step: t, counted from 1.

    Returns:
        `w_t` in [0, 1]. It may underflow to 0; no intermediate value overflows.

    Raises:
        ValueError: `second_moment` is unknown, or `step < 1`.
    """
    if step < 1:
        raise ValueError(f"Invalid step: {step}; steps are counted from 1")
    if step == 1:
        return 1.0
    if second_moment == "adax":
        if beta2 == 0.0:
            return 1.0 / step
        growth = step * math.log1p(beta2)
        return beta2 * math.exp(-growth) if growth > _EXPM1_IS_EXP else beta2 / math.expm1(growth)
    if second_moment == "adam":
        return (1.0 - beta2) / one_minus_power(beta2, step)
    if second_moment == "adafactor":
        return step**-beta2
    raise _unknown_rule(second_moment)


def _unknown_rule(second_moment: str) -> ValueError:
    return ValueError(f"Invalid second_moment: {second_moment!r}; expected one of {SECOND_MOMENTS}")


def one_minus_power(beta: float, step: int) -> float:
    """Return `1 - beta^step` for `0 <= beta < 1` without cancellation."""
    return 1.0 if beta == 0.0 else -math.expm1(step * math.log(beta))


def effective_eps(eps: float, eps_placement: str, second_moment: str, beta2: float, step: int) -> float:
    """Return the eps added to the root of the normalised v.

    `"normalized"` is `sqrt(v) + eps`. `"unnormalized"` is the released AdaX program, which adds eps to the root of the
    raw moment `V = v * factor_t` and then divides: `eps / sqrt(factor_t)`, with `factor_t = (1+b2)^t - 1` for AdaX and
    `1 - b2^t` for Adam. A nonzero eps is at least 1.08e-19, the smallest nonzero sqrt(v) of a GPU in float32.

    Args:
        eps: as the user gave it.
        eps_placement: `"normalized"` or `"unnormalized"`.
        second_moment, beta2, step: see `exp_avg_sq_weight`.
    """
    if eps == 0.0:
        return 0.0
    if eps_placement == "unnormalized":
        if second_moment == "adax":
            growth = step * math.log1p(beta2)
            root = math.exp(-0.5 * growth) if growth > _EXPM1_IS_EXP else 1.0 / math.sqrt(math.expm1(growth))
        else:
            root = 1.0 / math.sqrt(one_minus_power(beta2, step))
        eps *= root
    return max(eps, _SMALLEST_EPS)


def step_scalars(
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    second_moment: str,
    eps_placement: str,
    maximize: bool,
) -> StepScalars:
    """Return the scalars of one step of a parameter group.

    Args:
        step: t, counted from 1.
        lr: learning rate of this step.
        betas: b1, and b2 or the other parameter of the rule.
        eps: as the user gave it; see `effective_eps`.
        weight_decay: coefficient; `p -= lr * weight_decay * p` when decoupled, else added to the gradient as L2.
        decoupled_weight_decay: True for decoupled, False for L2.
        second_moment: the rule, see `exp_avg_sq_weight`.
        eps_placement: see `effective_eps`.
        maximize: ascend the gradient instead of descending.

    Raises:
        ValueError: `second_moment` is unknown, or `step < 1`.
    """
    beta1, beta2 = betas
    return StepScalars(
        step_size=lr / one_minus_power(beta1, step) if second_moment == "adam" else lr,
        one_minus_beta1=1.0 - beta1,
        exp_avg_sq_weight=exp_avg_sq_weight(second_moment, beta2, step),
        eps=effective_eps(eps, eps_placement, second_moment, beta2, step),
        decay=lr * weight_decay if decoupled_weight_decay else 0.0,
        l2=0.0 if decoupled_weight_decay else weight_decay,
        grad_factor=-1.0 if maximize else 1.0,
    )


def device_coefficients(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool,
    second_moment: str,
    eps_placement: str,
    maximize: bool,
    seed: int,
) -> DeviceCoefficients:
    """Return the step-independent constants of a parameter group that `validate_group` has accepted.

    Args:
        lr: learning rate if the group's lr is a number; unused if it is a GPU tensor.
        betas: b1, and b2 or the other parameter of the rule.
        eps: as the user gave it; see `effective_eps`.
        weight_decay, decoupled_weight_decay: see `step_scalars`.
        second_moment: the rule, see `exp_avg_sq_weight`.
        eps_placement: see `effective_eps`.
        maximize: ascend the gradient instead of descending.
        seed: seed of the group's random bits, in [0, 2^32).

    Raises:
        ValueError: `second_moment` is unknown.
    """
    beta1, beta2 = betas
    factor, power, exponent, rate = _weight_terms(second_moment, beta2)
    normalized = eps_placement == "normalized"
    return DeviceCoefficients(
        lr=lr,
        bias_rate=_decay_rate(beta1) if second_moment == "adam" else _SATURATED_RATE,
        one_minus_beta1=1.0 - beta1,
        w_factor=factor,
        w_power=power,
        w_exponent=exponent,
        w_rate=rate,
        eps=eps if normalized else 0.0,
        unnormalized_eps=0.0 if normalized else eps / math.sqrt(factor),
        smallest_eps=_SMALLEST_EPS if eps > 0.0 else 0.0,
        decoupled_decay=weight_decay if decoupled_weight_decay else 0.0,
        l2=0.0 if decoupled_weight_decay else weight_decay,
        grad_sign=-1.0 if maximize else 1.0,
        seed=float(seed),
    )


def _weight_terms(second_moment: str, beta2: float) -> tuple[float, float, float, float]:
    if second_moment == "adax":
        growth = beta2 or _NO_GROWTH
        return growth, 0.0, math.log1p(growth), math.log1p(growth)
    if second_moment == "adam":
        return 1.0 - beta2, 0.0, 0.0, _decay_rate(beta2)
    if second_moment == "adafactor":
        return 1.0, beta2, 0.0, _SATURATED_RATE
    raise _unknown_rule(second_moment)


def _decay_rate(beta: float) -> float:
    return -math.log(beta) if beta > 0.0 else _SATURATED_RATE
