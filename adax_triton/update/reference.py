"""Reference update in PyTorch.

Tests compare the kernels with it. It also updates tensors that no kernel supports.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adax_update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_size: float | Tensor,
    one_minus_beta1: float | Tensor,
    exp_avg_sq_weight: float | Tensor,
    eps: float | Tensor,
    decay: float | Tensor,
    l2: float,
    grad_factor: float,
) -> None:
    """Apply one update to `param`, `exp_avg` and `exp_avg_sq`, in place.

        g' = grad_factor g + l2 p
        m <- m + (1 - b1) (g' - m)
        v <- v + w_t (g'^2 - v)
        p <- p - decay p - step_size m / (sqrt(v) + eps)

    v is normalised: the paper's raw moment divided by its bias factor. Li et al. 2020, arXiv:2004.09740, algorithm 1.

    Args:
        param: any shape, any float dtype and device.
        grad: the shape of `param`, any float dtype; read only.
        exp_avg: m; the shape of `param`, float.
        exp_avg_sq: v; the shape of `param`, float.
        step_size, one_minus_beta1, exp_avg_sq_weight, eps, decay, l2, grad_factor: the fields of
            `coefficients.StepScalars`, Python floats; all but the last two may be 0-d tensors.

    The arithmetic is float32, or float64 if `param` is float64.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    p, g, m, v = (tensor.to(dtype) for tensor in (param, grad, exp_avg, exp_avg_sq))
    if grad_factor != 1.0:
        g = g * grad_factor
    if l2 != 0.0:
        g = g + p * l2
    m = m + (g - m) * one_minus_beta1
    v = v + (g * g - v) * exp_avg_sq_weight
    p = p - (p * decay + m / (_root(v) + eps) * step_size)
    param.copy_(p)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


def _root(values: Tensor) -> Tensor:
    if values.device.type != "cpu" or values.dtype == torch.float64:
        return values.sqrt()
    # PyTorch's float32 root on a CPU is sometimes off by one unit in the last place.
    return values.double().sqrt().float()
