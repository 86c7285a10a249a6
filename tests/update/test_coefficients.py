"""Check the scalars of a step.

Oracle: the closed forms in 60-digit decimal arithmetic.
"""

import math
from decimal import MAX_EMAX, MIN_EMIN, Decimal, getcontext

import pytest

from adax_triton.update.coefficients import effective_eps, exp_avg_sq_weight, step_scalars

getcontext().prec, getcontext().Emax, getcontext().Emin = 60, MAX_EMAX, MIN_EMIN
STEPS = [1, 2, 3, 10, 1_000, 110_000, 887_272, 1_000_000, 7_000_000, 123_456_789, 1_000_000_000]


def exact_weight(rule: str, beta2: float, step: int) -> Decimal:
    b2 = Decimal(beta2)
    if rule == "adax":
        return b2 / ((1 + b2) ** step - 1)
    if rule == "adam":
        return (1 - b2) / (1 - b2**step)
    return Decimal(step) ** -b2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("rule", "beta2"),
    [("adax", 1e-4), ("adax", 1e-8), ("adax", 0.1), ("adam", 0.999), ("adam", 0.5), ("adafactor", 0.8)],
)
def test_weight_equals_closed_form(rule: str, beta2: float, step: int) -> None:
    exact = exact_weight(rule, beta2, step)
    weight = exp_avg_sq_weight(rule, beta2, step)
    if exact < Decimal("1e-300"):
        assert 0.0 <= weight < 1e-299
    else:
        # The exponential turns the rounding error of t log1p(b2) into a relative error, which grows with t.
        tolerance = Decimal(4e-16) * (1 + step * Decimal(math.log1p(beta2) if rule == "adax" else 0))
        assert abs(Decimal(weight) / exact - 1) < tolerance


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("step", STEPS[:6])
def test_adam_has_the_weight_of_adax_with_a_negative_rate(beta2: float, step: int) -> None:
    exact = exact_weight("adax", beta2 - 1, step)
    assert exp_avg_sq_weight("adam", beta2, step) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(
    "rule_beta2", [("adax", 1e-4), ("adax", 0.0), ("adam", 0.999), ("adam", 0.0), ("adafactor", 0.8)]
)
def test_weight_falls_from_one_and_stays_finite_to_a_billion_steps(rule_beta2: tuple[str, float]) -> None:
    steps = [1, 2, 5, 100, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9]
    weights = [exp_avg_sq_weight(*rule_beta2, step) for step in steps]
    assert weights[0] == 1.0
    assert all(math.isfinite(weight) and weight >= 0.0 for weight in weights)
    assert weights == sorted(weights, reverse=True)


def test_weight_without_growth_is_the_plain_average() -> None:
    assert exp_avg_sq_weight("adax", 0.0, 250) == 1 / 250
    assert exp_avg_sq_weight("adax", 1e-12, 250) == pytest.approx(1 / 250, rel=1e-9)


@pytest.mark.parametrize("step", [1, 2, 1_000, 110_000, 7_000_000])
def test_unnormalized_eps_is_eps_over_the_root_of_the_bias_factor(step: int) -> None:
    exact = Decimal(1e-12) / ((1 + Decimal(1e-4)) ** step - 1).sqrt()
    smallest = Decimal(2) ** -63
    assert effective_eps(1e-12, "unnormalized", "adax", 1e-4, step) == pytest.approx(
        float(max(exact, smallest)), rel=1e-13
    )
    exact = Decimal(1e-8) / (1 - Decimal(0.999) ** step).sqrt()
    assert effective_eps(1e-8, "unnormalized", "adam", 0.999, step) == pytest.approx(float(exact), rel=1e-13)


def test_eps_is_at_least_the_resolution_of_the_root_unless_it_is_zero() -> None:
    assert effective_eps(1e-12, "unnormalized", "adax", 1e-4, 10**9) == 2.0**-63
    assert effective_eps(0.0, "unnormalized", "adax", 1e-4, 10**9) == 0.0


def test_weight_decay_is_decoupled_or_part_of_the_gradient() -> None:
    common = {
        "step": 3,
        "lr": 0.5,
        "betas": (0.9, 1e-4),
        "eps": 1e-12,
        "weight_decay": 0.25,
        "second_moment": "adax",
        "eps_placement": "normalized",
    }
    coupled = step_scalars(decoupled_weight_decay=False, maximize=False, **common)
    decoupled = step_scalars(decoupled_weight_decay=True, maximize=True, **common)
    assert (coupled.decay, coupled.l2, coupled.grad_factor) == (0.0, 0.25, 1.0)
    assert (decoupled.decay, decoupled.l2, decoupled.grad_factor) == (0.125, 0.0, -1.0)


def test_only_adam_corrects_the_first_moment() -> None:
    common = {
        "step": 2,
        "lr": 1.0,
        "eps": 0.0,
        "weight_decay": 0.0,
        "decoupled_weight_decay": False,
        "eps_placement": "normalized",
        "maximize": False,
    }
    assert step_scalars(betas=(0.5, 0.999), second_moment="adam", **common).step_size == pytest.approx(1 / 0.75)
    assert step_scalars(betas=(0.5, 1e-4), second_moment="adax", **common).step_size == 1.0
    assert step_scalars(betas=(0.5, 0.8), second_moment="adafactor", **common).step_size == 1.0


@pytest.mark.parametrize(("step", "rule"), [(0, "adax"), (-3, "adam"), (5, "adagrad")])
def test_error_names_the_bad_step_or_rule(step: int, rule: str) -> None:
    with pytest.raises(ValueError, match=str(step) if step < 1 else rule):
        exp_avg_sq_weight(rule, 1e-4, step)
