"""When AdaX's second moment freezes, and the beta2 for a run.

In `v += w_t (g^2 - v)` the weight `w_t = b2 / ((1 + b2)^t - 1)` falls towards 0. From some step on a float32 v no
longer changes, so the step size of each weight is fixed.
"""

from __future__ import annotations

from bisect import bisect_left
from numbers import Real

from .coefficients import LARGEST_ADAX_BETA2, exp_avg_sq_weight

# Below this w_t a float32 v does not change, even if g^2 is 32 v: |w_t (g^2 / v - 1)| < 31 * 2^-30 < 2^-25, and half a
# unit in the last place of v is 2^-25 v or more.
FROZEN_WEIGHT = 2.0**-30

_PUBLISHED_BETA2 = 1e-4
# w_t <= 1/t for every b2, with equality for b2 = 0, so w_t reaches FROZEN_WEIGHT at this step or earlier.
_LAST_STEP = 2**30


def steps_until_frozen(beta2: float) -> int:
    """Return the first step at which a float32 v no longer changes.

        min { t : b2 / ((1 + b2)^t - 1) < 2^-30 },   close to   log(1 + b2 2^30) / log(1 + b2)

    This holds for squared gradients up to 32 v. Larger squared gradients change v for some more steps.

    Args:
        beta2: AdaX's `betas[1]`, the growth rate per step, in [0, 0.1]; 0 is the limit `w_t = 1/t`.

    Returns:
        A step, counted from 1: 115,847 for the published 1e-4, and 2^30 + 1 for 0. float64 states change for longer.

    Raises:
        TypeError: `beta2` is not a number.
        ValueError: `beta2` is out of range.

    Source: `w_t` from Li et al. 2020, arXiv:2004.09740, algorithm 1; the threshold follows from float32's 24 bits.
    """
    if not isinstance(beta2, Real) or isinstance(beta2, bool):
        raise TypeError(f"Invalid type of beta2: expected a number, got {beta2!r}")
    rate = float(beta2)
    if not 0.0 <= rate <= LARGEST_ADAX_BETA2:
        raise ValueError(
            f"Invalid beta2: {beta2}; expected 0 <= beta2 <= {LARGEST_ADAX_BETA2}. AdaX's betas[1] is the growth rate "
            f"of its memory, 1e-4 by default"
        )
    steps = range(1, _LAST_STEP + 1)
    return 1 + bisect_left(steps, True, key=lambda step: exp_avg_sq_weight("adax", rate, step) < FROZEN_WEIGHT)


def beta2_for_horizon(total_steps: int) -> float:
    """Return the beta2 for a run of known length.

        min(1e-4, 1 / T),   T = total_steps

    `w_t` depends on t through `(1 + b2)^t`, about `exp(b2 t)`, so mainly `b2 T` matters: a run 10 times longer with
    `b2 / 10` averages over the same fraction of the run. In docs/study.md `b2 T` of 1 and 3 end within the noise of the
    plain average, and 10 ends higher on a sparse embedding. v then changes until the last step of runs of up to 600
    million steps.

    Args:
        total_steps: optimizer steps of the whole run, restarts included, >= 1.

    Returns:
        A value for AdaX's `betas[1]`: the published 1e-4 up to 10,000 steps, less for more steps.

    Raises:
        TypeError: `total_steps` is not an int.
        ValueError: `total_steps < 1`.

    Source: docs/study.md; 1e-4 from Li et al. 2020, arXiv:2004.09740.
    """
    if not isinstance(total_steps, int) or isinstance(total_steps, bool):
        raise TypeError(f"Invalid type of total_steps: expected an int, got {total_steps!r}")
    if total_steps < 1:
        raise ValueError(f"Invalid total_steps: {total_steps}; expected total_steps >= 1")
    return min(_PUBLISHED_BETA2, 1.0 / total_steps)
