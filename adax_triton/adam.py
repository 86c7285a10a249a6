"""Adam and AdamW on the kernel of AdaX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .control import ProgramOptions
from .moment_optimizer import MomentOptimizer


class Adam(MomentOptimizer):
    r"""Adam on AdaX's kernel, with the numbers and defaults of `torch.optim.Adam`, to compare rules and not programs.

    .. math::
        w_t = (1 - \beta_2) / (1 - \beta_2^t), \qquad
        p_t = p_{t-1} - lr \; \frac{m_t}{1 - \beta_1^t} / (\sqrt{v_t} + \epsilon)

    `v` is torch's `exp_avg_sq` over `1 - betas[1]^step`; the rest is as in `AdaX`.

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.

    Args:
        params: see `AdaX`.
        lr: learning rate, >= 0. Default: 1e-3.
        betas: decay of the first and of the second moment, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the root of the bias-corrected second moment, >= 0. Default: 1e-8.
        weight_decay: decay coefficient, >= 0, added to the gradient as L2. Default: 0.
        decoupled_weight_decay: take the decay from the weights instead. Default: False.
        maximize: follow the gradient up. Default: False.
        states, master_weights, weight_rounding, seed, keep_float32: see `AdaX`.
        capturable, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry: see `AdaX`.

    Raises:
        TypeError, ValueError: as `AdaX`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        states: str = "float32",
        master_weights: str | None = None,
        weight_rounding: str = "nearest",
        seed: int = 0,
        keep_float32: Callable[[Tensor], bool] | None = None,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        norm_process_group: Any = None,
        telemetry: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "second_moment": "adam",
            "eps_placement": "normalized",
            "maximize": maximize,
            "states": states,
            "master_weights": master_weights,
            "weight_rounding": weight_rounding,
            "seed": seed,
            "capturable": capturable,
        }
        options = ProgramOptions(keep_float32, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry)
        super().__init__(params, defaults, options)


class AdamW(Adam):
    """AdamW on AdaX's kernel, with the numbers and defaults of `torch.optim.AdamW`: `Adam` with decoupled weight decay.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.

    Args:
        params: see `AdaX`.
        lr: learning rate, >= 0. Default: 1e-3.
        betas: decay of the first and of the second moment, each in [0, 1). Default: (0.9, 0.999).
        eps: see `Adam`. Default: 1e-8.
        weight_decay: decoupled decay coefficient, >= 0. Default: 1e-2.
        maximize: follow the gradient up. Default: False.
        states, master_weights, weight_rounding, seed, keep_float32: see `AdaX`.
        capturable, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry: see `AdaX`.

    Raises:
        TypeError, ValueError: as `AdaX`.
    """

    _is_decoupled = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        states: str = "float32",
        master_weights: str | None = None,
        weight_rounding: str = "nearest",
        seed: int = 0,
        keep_float32: Callable[[Tensor], bool] | None = None,
        capturable: bool = False,
        max_grad_norm: float | None = None,
        error_if_nonfinite: bool = False,
        norm_process_group: Any = None,
        telemetry: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=True,
            maximize=maximize,
            states=states,
            master_weights=master_weights,
            weight_rounding=weight_rounding,
            seed=seed,
            keep_float32=keep_float32,
            capturable=capturable,
            max_grad_norm=max_grad_norm,
            error_if_nonfinite=error_if_nonfinite,
            norm_process_group=norm_process_group,
            telemetry=telemetry,
        )
