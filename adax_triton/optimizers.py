"""The optimizers AdaX, AdaXW, Adam and AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from adax_triton.step.conditions import OptimizerOptions

from .moment_optimizer import MomentOptimizer


class AdaX(MomentOptimizer):
    r"""AdaX: Adam with exponential long-term memory; the weight decay is L2, part of the gradient.

    .. math::
        m_t &= m_{t-1} + (1 - \beta_1)(g_t - m_{t-1}) \\
        v_t &= v_{t-1} + w_t (g_t^2 - v_{t-1}), \qquad w_t = \beta_2 / ((1 + \beta_2)^t - 1) \\
        p_t &= p_{t-1} - lr \; m_t / (\sqrt{v_t} + \epsilon)

    Adam forgets old gradients at a fixed rate; here the weight of a new one, :math:`w_t`, falls towards 0, so the step
    size of each weight settles. `v` is the paper's second moment over its bias factor: the same numbers, bounded, where
    the raw moment overflows float32 at step 887k. What matters is `betas[1] * steps`: at 1e-4, `v`
    no longer changes from step 115,847 on, so take `beta2_for_horizon(total_steps)` for long runs.

    Source: Li, Zhang, Wang, Luo 2020, arXiv:2004.09740, algorithm 1, and the program released with it, whose defaults
    these are.

    Args:
        params: tensors, named tensors or parameter groups, of float32, bfloat16, float16, float64 or complex dtype.
        lr: learning rate, >= 0; a number or a 1-element tensor, read at every step. Default: 1.5e-3.
        betas: decay of the first moment, in [0, 1), and the parameter of the rule: the growth rate of AdaX's memory, in
            [0, 0.1], not Adam's 0.999. Default: (0.9, 1e-4).
        eps: added to the root of the second moment, >= 0. Default: 1e-12.
        weight_decay: decay coefficient, >= 0. Default: 5e-4.
        decoupled_weight_decay: take the decay from the weights, `p -= lr * weight_decay * p`, instead of adding it to
            the gradient. Default: False.
        second_moment: `"adax"`; `"adam"`, `w_t = (1 - b2) / (1 - b2^t)` with the first moment bias-corrected, exactly
            Adam; or `"adafactor"`, `w_t = t^-c` with `c = betas[1]`. The latter two want their own `betas[1]`, such as
            0.999 and 0.8. Default: `"adax"`.
        eps_placement: `"normalized"`, `sqrt(v) + eps` as above; or `"unnormalized"`, as the released PyTorch program
            has it, eps beside the root of the raw moment, that is `eps / sqrt((1 + b2)^t - 1)` here. Default:
            `"normalized"`.
        maximize: follow the gradient up. Default: False.
        states: how the moments are kept: `"float32"`; `"bfloat16"`; `"8bit_v16"`, 8-bit m and 16-bit v; `"8bit"`,
            8-bit m and 8-bit v. Below float32, v is rounded stochastically; rounded to nearest it would stop
            changing early. Tensors of fewer than 4096 elements keep float32. Default: `"float32"`.
        master_weights: beside 16-bit parameters, keep what they lack of the weight: `"float32"`, all of it, so that
            training is bit for bit that of float32 weights; `"24bit"`, for bfloat16, one byte of it, rounded
            stochastically; None, nothing. Float32 parameters need none. Default: None.
        weight_rounding: how bfloat16 parameters without a master are rounded, `"nearest"` or `"stochastic"`. Default:
            `"nearest"`.
        seed: in [0, 2^32). All random bits depend on it, on the step and on the element's index in its parameter, and
            on nothing else. Default: 0.
        keep_float32: a function of a parameter that says whether its states are kept in float32 whatever `states` is.
            It is no part of the state dict. Default: none are.
        capturable: schedule the step on the device, so that a CUDA graph may capture it; a learning rate on the device,
            float32, is read at each replay. Betas should then be numbers. Default: False.
        max_grad_norm: scale the gradients, all of the step together, so that their norm does not exceed this, > 0; as
            `torch.nn.utils.clip_grad_norm_` and a step, to rounding, but `grad` is left as it is. A step whose norm is
            not finite is skipped. No part of the state dict. Default: None, the norm is not measured.
        error_if_nonfinite: raise instead of skipping; the host then waits for the norm. Default: False.
        norm_process_group: over which gradients are sharded that are no DTensors (theirs is known), each rank having
            other elements. Default: None, they are whole.
        telemetry: have each step take norms and counts for `read_telemetry`, within its own pass. Default: False.

    Raises:
        TypeError: an argument or a parameter of the wrong type; the message names it.
        ValueError: an argument out of range; the message names it and its value.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.5e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 1e-4),
        eps: float = 1e-12,
        weight_decay: float = 5e-4,
        *,
        decoupled_weight_decay: bool = False,
        second_moment: str = "adax",
        eps_placement: str = "normalized",
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
            "second_moment": second_moment,
            "eps_placement": eps_placement,
            "maximize": maximize,
            "states": states,
            "master_weights": master_weights,
            "weight_rounding": weight_rounding,
            "seed": seed,
            "capturable": capturable,
        }
        options = OptimizerOptions(keep_float32, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry)
        super().__init__(params, defaults, options)


class AdaXW(AdaX):
    """AdaX with decoupled weight decay, `p -= lr * weight_decay * p`: the variant its authors recommend.

    Takes the place of `torch.optim.AdamW`. Everything but the defaults is `AdaX` with `decoupled_weight_decay=True`;
    update, states and errors are described there.

    Source: Li et al. 2020, arXiv:2004.09740, algorithm 2 (AdaX-W).

    Args:
        params: see `AdaX`.
        lr: learning rate, >= 0. Default: 5e-3.
        betas: see `AdaX`. Default: (0.9, 1e-4).
        eps: see `AdaX`. Default: 1e-12.
        weight_decay: decoupled decay coefficient, >= 0. Default: 5e-2.
        second_moment: see `AdaX`. Default: `"adax"`.
        eps_placement: see `AdaX`. Default: `"normalized"`.
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
        lr: float | Tensor = 5e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 1e-4),
        eps: float = 1e-12,
        weight_decay: float = 5e-2,
        *,
        second_moment: str = "adax",
        eps_placement: str = "normalized",
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
            second_moment=second_moment,
            eps_placement=eps_placement,
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
        options = OptimizerOptions(keep_float32, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry)
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
