"""The optimizers AdaX, AdaXW, Adam and AdamW."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .moment_optimizer import MomentOptimizer
from .state.keywords import SharedOptions, check_keywords


class AdaX(MomentOptimizer):
    r"""AdaX: Adam with exponential long-term memory, and L2 weight decay.

    .. math::
        m_t &= m_{t-1} + (1 - \beta_1)(g_t - m_{t-1}) \\
        v_t &= v_{t-1} + w_t (g_t^2 - v_{t-1}), \qquad w_t = \beta_2 / ((1 + \beta_2)^t - 1) \\
        p_t &= p_{t-1} - lr \; m_t / (\sqrt{v_t} + \epsilon)

    Adam forgets old gradients at a fixed rate. In AdaX the coefficient of a new gradient, :math:`w_t`, falls to 0, so
    the effective learning rate of each parameter becomes constant. `v` is the paper's second moment divided by its
    bias factor. The updates are the same, but `v` stays bounded, while the paper's moment overflows float32 at step
    887k.

    `betas[1] * steps` decides how long the memory is. At 1e-4, `v` stops changing at step 115,847. For more than 10,000
    steps set `betas=(0.9, beta2_for_horizon(total_steps))`.

    Source: Li, Zhang, Wang, Luo 2020, arXiv:2004.09740, algorithm 1. The defaults are those of the authors' program.

    Args:
        params: tensors, named tensors or parameter groups; float32, bfloat16, float16, float64 or complex.
        lr: learning rate, >= 0; a number or a 1-element tensor, read at each step. Default: 1.5e-3.
        betas: (decay of the first moment, in [0, 1); growth rate of AdaX's memory, in [0, 0.1]). Adam's 0.999 is not a
            growth rate and raises. Default: (0.9, 1e-4).
        eps: added to the root of the second moment, >= 0. Default: 1e-12.
        weight_decay: coefficient, >= 0. Default: 5e-4.
        decoupled_weight_decay: if True, `p -= lr * weight_decay * p`; if False, `g += weight_decay * p`. Default:
            False.
        second_moment: the rule for `w_t`. `"adax"` as above. `"adam"`: `w_t = (1 - b2) / (1 - b2^t)` with a
            bias-corrected first moment, exactly Adam. `"adafactor"`: `w_t = t^-c` with `c = betas[1]`. The last two
            need their own `betas[1]`, such as 0.999 and 0.8. Default: `"adax"`.
        eps_placement: `"normalized"`: `sqrt(v) + eps`, as above. `"unnormalized"`: eps is added to the root of the raw
            moment, as in the authors' program; here that is `eps / sqrt((1 + b2)^t - 1)`. Default: `"normalized"`.
        maximize: maximize the objective. Default: False.
        states: precision of the moments. `"float32"`; `"bfloat16"`; `"8bit_v16"`: 8-bit m and 16-bit v; `"8bit"`:
            8-bit m and 8-bit v. In lower precision v is rounded stochastically; rounding to nearest would stop
            updating it too early. Tensors with fewer than 4096 elements keep float32. Default: `"float32"`.
        master_weights: extra bits for 16-bit parameters. `"float32"`: full float32 weights; the weights are then bit
            for bit those of float32 training. `"24bit"`: one extra byte for bfloat16, rounded stochastically. None:
            no extra bits. float32 parameters need none. Default: None.
        weight_rounding: rounding of bfloat16 parameters without master weights, `"nearest"` or `"stochastic"`.
            Default: `"nearest"`.
        seed: seed of stochastic rounding, in [0, 2^32). A random bit depends on the seed, the step and the index of
            the element in its parameter, and on nothing else. Default: 0.
        keep_float32: function of a parameter. If it returns True, the parameter has float32 states for any `states`.
            Not part of the state dict. Default: None.
        capturable: count steps on the GPU, so that a CUDA graph may capture `step()`. A float32 learning rate on the
            GPU is then read at each replay. Use numbers for betas. Default: False.
        max_grad_norm: clip the norm of all gradients to this, > 0. The result equals `torch.nn.utils.clip_grad_norm_`
            followed by a step, up to rounding errors, but `grad` is not changed. A step with a norm that is not
            finite is skipped. `inf` measures without clipping. Not part of the state dict. Default: None, the
            norm is not measured.
        error_if_nonfinite: raise instead of skipping the step; the host then waits for the norm. Needs
            `max_grad_norm`. Default: False.
        norm_process_group: process group whose ranks hold different shards of the gradients as plain tensors. DTensors
            need none. Needs `max_grad_norm`. Default: None, each rank has the whole gradients.
        telemetry: record norms and counts in each step, for `read_telemetry`. Default: False.
        fused: if True, the step divides the gradients by the scale of a `torch.amp.GradScaler` and skips overflows, so
            the scaler neither writes the gradients nor waits for the GPU. Frameworks that clip unscaled gradients then
            refuse the optimizer, as they refuse torch's fused AdamW. The update is one kernel with False too. Default:
            None, the scaler unscales. In a group it is ignored.
        foreach: accepted for code written for torch's AdamW; changes nothing. Default: None.
        amsgrad: as `foreach`; True raises. Default: False.
        differentiable: as `foreach`; True raises. Default: False.

    Raises:
        TypeError: an argument or a parameter has the wrong type; the message names it.
        ValueError: an argument is out of range; the message names it and its value.
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
        **options: Unpack[SharedOptions],
    ) -> None:
        check_keywords(options, type(self), AdaX)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            second_moment=second_moment,
            eps_placement=eps_placement,
            **options,
        )


class AdaXW(AdaX):
    """AdaX with decoupled weight decay, which its authors recommend; replaces `torch.optim.AdamW`.

    `AdaX` with `decoupled_weight_decay=True` and other defaults; `AdaX` describes update, states and errors.

    Source: Li et al. 2020, arXiv:2004.09740, algorithm 2 (AdaX-W).

    Args:
        params: see `AdaX`.
        lr: learning rate, >= 0. Default: 5e-3.
        betas: see `AdaX`. Default: (0.9, 1e-4).
        eps: see `AdaX`. Default: 1e-12.
        weight_decay: decoupled coefficient, >= 0: `p -= lr * weight_decay * p`. Default: 5e-2.
        second_moment: see `AdaX`. Default: `"adax"`.
        eps_placement: see `AdaX`. Default: `"normalized"`.
        maximize, states, master_weights, weight_rounding, seed, keep_float32: see `AdaX`.
        capturable, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry: see `AdaX`.
        fused, foreach, amsgrad, differentiable: see `AdaX`.

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
        **options: Unpack[SharedOptions],
    ) -> None:
        check_keywords(options, type(self), AdaXW)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay=True,
            second_moment=second_moment,
            eps_placement=eps_placement,
            **options,
        )


class Adam(MomentOptimizer):
    r"""Adam on AdaX's kernel, with the results and defaults of `torch.optim.Adam`.

    Use it to compare the two rules on the same kernel.

    .. math::
        w_t = (1 - \beta_2) / (1 - \beta_2^t), \qquad
        p_t = p_{t-1} - lr \; \frac{m_t}{1 - \beta_1^t} / (\sqrt{v_t} + \epsilon)

    `v` is torch's `exp_avg_sq` divided by `1 - betas[1]^step`. The rest is as in `AdaX`.

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.

    Args:
        params: see `AdaX`.
        lr: learning rate, >= 0. Default: 1e-3.
        betas: decay of the first and of the second moment, each in [0, 1). Default: (0.9, 0.999).
        eps: added to the root of the bias-corrected second moment, >= 0. Default: 1e-8.
        weight_decay: coefficient, >= 0. Default: 0.
        decoupled_weight_decay: if True, `p -= lr * weight_decay * p`; if False, `g += weight_decay * p`. Default:
            False.
        maximize, states, master_weights, weight_rounding, seed, keep_float32: see `AdaX`.
        capturable, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry: see `AdaX`.
        fused, foreach, amsgrad, differentiable: see `AdaX`.

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
        **options: Unpack[SharedOptions],
    ) -> None:
        check_keywords(options, type(self), Adam)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            second_moment="adam",
            eps_placement="normalized",
            **options,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay: results and defaults of `torch.optim.AdamW`.

    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.

    Args:
        params: see `AdaX`.
        lr: learning rate, >= 0. Default: 1e-3.
        betas: decay of the first and of the second moment, each in [0, 1). Default: (0.9, 0.999).
        eps: see `Adam`. Default: 1e-8.
        weight_decay: decoupled coefficient, >= 0: `p -= lr * weight_decay * p`. Default: 1e-2.
        maximize, states, master_weights, weight_rounding, seed, keep_float32: see `AdaX`.
        capturable, max_grad_norm, error_if_nonfinite, norm_process_group, telemetry: see `AdaX`.
        fused, foreach, amsgrad, differentiable: see `AdaX`.

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
        **options: Unpack[SharedOptions],
    ) -> None:
        check_keywords(options, type(self), AdamW)
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=True, **options)
