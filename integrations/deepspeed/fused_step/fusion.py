"""Choose which ZeRO passes are fused into the optimizer's step.

DeepSpeed makes several passes over gradients and weights: it checks for inf and NaN, computes the norm, concatenates,
casts, unscales and clips the gradients, steps, and casts the weights back. These passes move up to 78 bytes per
parameter. The optimizer step alone needs 28.

The fused step reads each gradient twice, in place and in its own dtype: once for norm and check, and once in the step.
The factor that unscales and clips stays on the device. The step also writes the weights in the model's dtype. See
docs/deepspeed-passes.md.

`fuse` sets `__class__` of an engine's ZeRO optimizer to a subclass, or sets its `step`. DeepSpeed's classes stay
unchanged. The default `"adax_triton": {"fuse": "auto"}` in the configuration fuses as much as possible; "off" fuses
nothing.
"""

import functools
import logging
from collections.abc import Mapping
from types import MethodType
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.utils.logging import log_dist

from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.state.allocation import local_state_tensors
from adax_triton.step.collect import group_counts_on_device

from .zero_methods import DelayedStateLinks, Zero3Methods, Zero12Methods
from .zero_steps import BF16Step, Zero12Step, is_verified, methods_of

SECTION = "adax_triton"
MODES = ("auto", "off")

# DeepSpeed methods that `zero_methods` replaces or calls, with their arguments.
_METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "DeepSpeedZeroOptimizer": {
        "unscale_and_clip_grads": ("grad_groups_flat", "total_norm"),
        "_optimizer_step": ("group_no",),
        "get_grad_norm_direct": ("gradients", "params", "norm_type"),
        "has_overflow": ("partition_gradients",),
        "has_overflow_partitioned_grads_serial": (),
    },
    "DeepSpeedZeroOptimizer_Stage3": {
        "unscale_and_clip_grads": ("sub_group_id", "total_norm"),
        "_optimizer_step": ("sub_group_id",),
        "get_grad_norm_direct": ("gradients", "params", "norm_type"),
        "has_overflow": ("partition_gradients",),
        "_prepare_fp32_grad_for_sub_group": ("sub_group_id",),
        "_reassign_or_swap_out_partitioned_parameters": ("sub_group_id",),
        "_unflatten_partitioned_parameters": ("sub_group_id",),
    },
}


class FusedStep(NamedTuple):
    """How much of an engine's step is fused.

    Fields:
        extent: "full", all passes around the step; "partial", some of them; "none".
        reason: why `extent` is not "full"; empty if it is.
    """

    extent: str
    reason: str


def fuse_mode(config: Mapping[str, Any]) -> str:
    """Return `fuse` of a DeepSpeed configuration: "auto", the default, or "off".

    Raises:
        ValueError: another value, or another key in the section "adax_triton".
    """
    section = config.get(SECTION, {})
    if not isinstance(section, Mapping) or set(section) - {"fuse"}:
        raise ValueError(f'{SECTION}={section!r} in the DeepSpeed configuration; expected {{"fuse": "auto" or "off"}}')
    mode = section.get("fuse", "auto")
    if mode not in MODES:
        raise ValueError(f'{SECTION}.fuse={mode!r} in the DeepSpeed configuration; expected "auto" or "off"')
    return str(mode)


def describe(engine: Any) -> dict[str, Any]:
    """Return an engine's fused step, state precision and classes.

    Args:
        engine: from `deepspeed.initialize`.

    Returns:
        optimizer, wrapper: class names of the optimizer and of DeepSpeed's wrapper.
        fused_step, reason: how much of the step is fused, and why not more; see `FusedStep`.
        states: the dtypes of each kind of state on this rank, sorted. Empty before the first step.
        state_bytes: bytes of these states on this rank.
        deepspeed: the version of DeepSpeed.

    Raises:
        ValueError: the engine's optimizer is not one of this package.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, MomentOptimizer):
        raise ValueError(f"describe(): the engine's optimizer is {type(optimizer).__name__}, not one of adax_triton")
    states: dict[str, set[str]] = {}
    count = 0
    for state in (state for key, state in optimizer.state.items() if isinstance(key, torch.Tensor)):
        for name, value in local_state_tensors(state).items():
            states.setdefault(name, set()).add(str(value.dtype).removeprefix("torch."))
            count += value.numel() * value.element_size()
    fused_step: FusedStep = engine.adax_fused_step
    return {
        "optimizer": type(optimizer).__name__,
        "wrapper": type(engine.optimizer).__name__,
        "fused_step": fused_step.extent,
        "reason": fused_step.reason,
        "states": {name: sorted(dtypes) for name, dtypes in states.items()},
        "state_bytes": count,
        "deepspeed": deepspeed.__version__,
    }


def fuse(wrapper: Any, config: Mapping[str, Any]) -> FusedStep:
    """Give a ZeRO optimizer the fused step that fits it.

    Changes the optimizer in place and logs the choice.

    Args:
        wrapper: DeepSpeed's optimizer that wraps AdaX, or the AdaX optimizer if it is not wrapped.
        config: the DeepSpeed configuration.
    """
    upstream: type = type(wrapper)
    if fuse_mode(config) == "off":
        mixin, fused_step = None, FusedStep("none", f'"{SECTION}": {{"fuse": "off"}} in the configuration')
    else:
        mixin, fused_step = _choose_mixin(wrapper)
        log_dist(
            f"adax_triton: fused step of {upstream.__name__}: {fused_step.extent}"
            + (f", because {fused_step.reason}" if fused_step.reason else ""),
            ranks=[0],
            level=logging.WARNING if fused_step.reason and upstream in _upstream_classes() else logging.INFO,
        )
    if mixin is None and upstream is _upstream_classes()[0]:
        mixin = DelayedStateLinks
    if mixin is BF16Step:  # on the instance, because pipelines look for the exact class
        wrapper.step = MethodType(BF16Step.step, wrapper)
    elif mixin is not None:
        wrapper.__class__ = _subclass(mixin, upstream)
    return fused_step


def _upstream_classes() -> tuple[type, type, type]:
    return (
        deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer,
        deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3,
        deepspeed.runtime.bf16_optimizer.BF16_Optimizer,
    )


@functools.cache
def _subclass(mixin: type, upstream: type) -> type:
    # Keep the upstream class name, because DeepSpeed and others compare class names.
    return type(upstream.__name__, (mixin, upstream), {"__module__": upstream.__module__})


def _choose_mixin(wrapper: Any) -> tuple[type | None, FusedStep]:
    zero_12, zero_3, bf16 = _upstream_classes()
    upstream = type(wrapper)
    if upstream not in (zero_12, zero_3, bf16):
        return None, FusedStep("none", f"{upstream.__name__} has no fused step")
    reason = _why_not_fused(wrapper) or _changed_method(upstream)
    if reason is not None:
        return None, FusedStep("none", reason)
    if upstream is zero_3:
        return Zero3Methods, FusedStep("full", "")
    if is_verified(upstream):
        return (Zero12Step if upstream is zero_12 else BF16Step), FusedStep("full", "")
    reason = f"{upstream.__name__}.step() of DeepSpeed {deepspeed.__version__} is not a verified version"
    return (Zero12Methods, FusedStep("partial", reason)) if upstream is zero_12 else (None, FusedStep("none", reason))


def _why_not_fused(wrapper: Any) -> str | None:
    """Return why a ZeRO optimizer's step cannot be fused, or None."""
    if getattr(wrapper, "torch_autocast_gradscaler", None) is not None:
        return "torch_autocast in fp16 steps through a GradScaler"
    if getattr(wrapper, "zenflow", False):
        return "zenflow has a step of its own"
    if getattr(wrapper, "swap_optimizer", False) or getattr(wrapper, "params_in_nvme_and_cpu", False):
        return "states or weights are offloaded to NVMe"
    masters = next(
        getattr(wrapper, name)
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition")
        if hasattr(wrapper, name)
    )
    other = {master.dtype for master in masters} - {torch.float32}
    if other:
        return f"the master weights are {other.pop()}"
    if any(map(group_counts_on_device, wrapper.optimizer.param_groups)):
        return "the learning rate is a tensor on the device"
    if isinstance(wrapper, deepspeed.runtime.bf16_optimizer.BF16_Optimizer):
        if wrapper.has_moe_layers:
            return "BF16_Optimizer has MoE layers"
        if wrapper.grad_acc_dtype != torch.float32:
            return f"BF16_Optimizer accumulates gradients in {wrapper.grad_acc_dtype}"
    return None


def _changed_method(upstream: type) -> str | None:
    """Return which method of a DeepSpeed class has changed, or None.

    A changed method is missing or takes other arguments than expected.
    """
    for name, expected in _METHODS.get(upstream.__name__, {}).items():
        method = methods_of(upstream).get(name)
        if method is None or tuple(argument.arg for argument in method.args.args)[1:] != expected:
            return f"{upstream.__name__}.{name} of DeepSpeed {deepspeed.__version__} has changed"
    return None
