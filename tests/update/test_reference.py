"""Check the reference update.

Oracle: the paper's algorithm with its growing raw moment, in float64 numpy.
"""

import numpy as np
import pytest
import torch

from adax_triton import AdaX, AdaXW, adax_update

STEPS = 2_000
SIZE = 64
LR, BETA1, BETA2, EPS, DECAY = 1.5e-3, 0.9, 1e-4, 1e-12, 0.05


def gradients() -> np.ndarray:
    random = np.random.default_rng(0)
    # Gradients of very different scales; weight 0 always has a gradient of 0.
    scale = 10.0 ** random.uniform(-8, 2, SIZE)
    scale[0] = 0.0
    return random.standard_normal((STEPS, SIZE)) * scale


def paper_weights(placement: str, decoupled: bool) -> np.ndarray:
    """Return the weights after the algorithm of arXiv:2004.09740.

    v grows by (1 + b2) per step and is divided by (1 + b2)^t - 1.

    `"normalized"` divides v and then adds eps to its root. `"unnormalized"` adds eps before it divides.
    """
    p = np.random.default_rng(1).standard_normal(SIZE)
    m, v = np.zeros(SIZE), np.zeros(SIZE)
    for t, g in enumerate(gradients(), start=1):
        if not decoupled:
            g = g + DECAY * p
        m = BETA1 * m + (1 - BETA1) * g
        v = (1 + BETA2) * v + BETA2 * g**2
        bias = np.expm1(t * np.log1p(BETA2))
        normalized = placement == "normalized"
        update = m / (np.sqrt(v / bias) + EPS) if normalized else np.sqrt(bias) * m / (np.sqrt(v) + EPS)
        p = (p - LR * DECAY * p if decoupled else p) - LR * update
    return p


@pytest.mark.parametrize("decoupled", [False, True], ids=["AdaX", "AdaXW"])
@pytest.mark.parametrize("placement", ["normalized", "unnormalized"])
def test_optimizer_equals_the_paper(placement: str, decoupled: bool) -> None:
    param = torch.from_numpy(np.random.default_rng(1).standard_normal(SIZE)).requires_grad_()
    optimizer_class = AdaXW if decoupled else AdaX
    optimizer = optimizer_class([param], lr=LR, weight_decay=DECAY, eps_placement=placement)
    for grad in torch.from_numpy(gradients()):
        param.grad = grad
        optimizer.step()
    np.testing.assert_allclose(param.detach().numpy(), paper_weights(placement, decoupled), rtol=0, atol=1e-12)


def test_eps_placement_matters() -> None:
    difference = np.abs(paper_weights("normalized", True) - paper_weights("unnormalized", True)).max()
    assert difference < 1e-3
    random = np.random.default_rng(2)
    tiny = torch.from_numpy(1e-12 * random.standard_normal(SIZE))
    weights = []
    for placement in ("normalized", "unnormalized"):
        param = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
        param.grad = tiny
        AdaX([param], eps_placement=placement).step()
        weights.append(param.detach())
    # At t = 1 the effective eps of the released program is eps / sqrt(b2), a hundred times the paper's.
    assert weights[0].abs().max() > 20 * weights[1].abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_first_update_is_minus_step_size_times_one_minus_beta1_times_the_sign(dtype: torch.dtype) -> None:
    param = torch.zeros(5, dtype=dtype)
    grad = torch.tensor([-4.0, -0.5, 0.25, 1.0, 3.0], dtype=dtype)
    exp_avg, exp_avg_sq = (
        torch.zeros(5, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for _ in "mv"
    )
    scalars = {"step_size": 1.0, "one_minus_beta1": 0.125, "exp_avg_sq_weight": 1.0, "eps": 0.0}
    adax_update(param, grad, exp_avg, exp_avg_sq, **scalars, decay=0.0, l2=0.0, grad_factor=1.0)
    assert torch.equal(param, -0.125 * grad.sign())
    assert torch.equal(exp_avg_sq, grad.to(exp_avg_sq.dtype) ** 2)


def test_normalised_moment_does_not_overflow_where_the_raw_one_does() -> None:
    assert np.expm1(900_000 * np.log1p(BETA2)) > np.finfo(np.float32).max
    param = torch.ones(3, requires_grad=True)
    optimizer = AdaX([param], weight_decay=0.0)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[param]["step"] = 900_000
    before = param.detach().clone()
    optimizer.step()
    assert torch.isfinite(param).all()
    assert (before - param.detach()).min() > 0.1 * optimizer.param_groups[0]["lr"]
