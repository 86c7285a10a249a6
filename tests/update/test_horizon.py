"""Check when v freezes.

Oracles: the weights w_t, 60-digit decimal arithmetic, and the recursion in float32.
"""

import math
import random
from decimal import Decimal, getcontext
from typing import Any

import pytest
import torch

from adax_triton.update.coefficients import exp_avg_sq_weight
from adax_triton.update.horizon import FROZEN_WEIGHT, beta2_for_horizon, steps_until_frozen

getcontext().prec = 60
RANDOM = random.Random(0)
RATES = [0.0, 5e-324, 1e-320, 1e-300, 1e-18, 1e-12, 1e-9, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1]
RATES += [10.0 ** RANDOM.uniform(-16, -1) for _ in range(300)]
HORIZONS = [10**5, 10**6, 10**7, 10**8, 10**9, 115_846, 115_847, 2**30 - 1, 2**30]
HORIZONS += [int(10.0 ** RANDOM.uniform(5, 9)) for _ in range(50)]


@pytest.mark.parametrize(("beta2", "step"), [(1e-4, 115_847), (0.0, 2**30 + 1), (0.1, 195)])
def test_published_steps(beta2: float, step: int) -> None:
    assert steps_until_frozen(beta2) == step


@pytest.mark.parametrize("beta2", [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 0.1])
def test_frozen_step_equals_exact_arithmetic(beta2: float) -> None:
    exact = (1 + Decimal(beta2) * 2**30).ln() / (1 + Decimal(beta2)).ln()
    assert steps_until_frozen(beta2) == math.floor(exact) + 1


def test_frozen_step_is_the_first_one_below_the_threshold() -> None:
    for beta2 in RATES:
        step = steps_until_frozen(beta2)
        weight, weight_before = (exp_avg_sq_weight("adax", beta2, t) for t in (step, step - 1))
        assert weight < FROZEN_WEIGHT <= weight_before, beta2


def test_larger_beta2_freezes_no_later() -> None:
    steps = [steps_until_frozen(beta2) for beta2 in sorted(RATES)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize(
    ("total_steps", "beta2"),
    [(1, 1e-4), (400, 1e-4), (10_000, 1e-4), (20_000, 5e-5), (1_000_000, 1e-6), (10**12, 1e-12)],
)
def test_beta2_is_published_or_one_per_run(total_steps: int, beta2: float) -> None:
    assert beta2_for_horizon(total_steps) == beta2


def test_v_changes_until_the_last_step() -> None:
    for total_steps in (horizon for horizon in HORIZONS if horizon <= 600_000_000):
        assert steps_until_frozen(beta2_for_horizon(total_steps)) > total_steps, total_steps


def test_longer_runs_get_no_larger_beta2() -> None:
    rates = [beta2_for_horizon(total_steps) for total_steps in sorted(HORIZONS)]
    assert rates == sorted(rates, reverse=True)


def update_v(v: torch.Tensor, squares: torch.Tensor, weight: float) -> torch.Tensor:
    return v + (squares - v) * weight


@pytest.mark.parametrize("beta2", [1e-6, 1e-4, 1e-3, 0.1])
def test_float32_v_is_constant_from_the_frozen_step_on(beta2: float) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.cat(
        [
            torch.rand(100_000, generator=generator) * 10.0 ** torch.randint(-30, 30, (100_000,), generator=generator),
            torch.nextafter(torch.tensor([1.0, 2.0, 2.0**-90]), torch.tensor(0.0)),
            torch.tensor([1.0, 2.0**-90]),
        ]
    )
    ratios = torch.rand(v.shape, generator=generator) * 32.0
    ratios[-5:] = 32.0
    frozen = steps_until_frozen(beta2)
    for step in (frozen, frozen + 1, 2 * frozen):
        weight = exp_avg_sq_weight("adax", beta2, step)
        for squares in (v * ratios, v * 32.0, torch.zeros_like(v)):
            assert torch.equal(update_v(v, squares, weight), v)


@pytest.mark.parametrize("beta2", [1e-6, 1e-4, 1e-3, 0.1])
def test_float32_v_changes_before_the_frozen_step(beta2: float) -> None:
    v = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) + 0.01
    weight = exp_avg_sq_weight("adax", beta2, steps_until_frozen(beta2) // 2)
    assert bool((update_v(v, v * 32.0, weight) != v).all())


@pytest.mark.parametrize("beta2", [None, "1e-4", True, 1e-4 + 0j, (0.9, 1e-4), torch.tensor(1e-4)], ids=repr)
def test_error_names_a_beta2_that_is_not_a_number(beta2: Any) -> None:
    with pytest.raises(TypeError, match="beta2"):
        steps_until_frozen(beta2)


@pytest.mark.parametrize("beta2", [-1e-9, 0.11, 0.999, math.nan, math.inf])
def test_error_names_a_beta2_out_of_range(beta2: float) -> None:
    with pytest.raises(ValueError, match=f"beta2: {beta2}"):
        steps_until_frozen(beta2)


@pytest.mark.parametrize("total_steps", [None, "100", True, 1e5, 100.0], ids=repr)
def test_error_names_total_steps_that_are_not_an_int(total_steps: Any) -> None:
    with pytest.raises(TypeError, match="total_steps"):
        beta2_for_horizon(total_steps)


@pytest.mark.parametrize("total_steps", [0, -5])
def test_error_names_total_steps_out_of_range(total_steps: int) -> None:
    with pytest.raises(ValueError, match=f"total_steps: {total_steps}"):
        beta2_for_horizon(total_steps)
