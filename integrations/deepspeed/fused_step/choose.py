"""Fewer passes around a step under DeepSpeed's ZeRO, for optimizers of this package only.

DeepSpeed checks gradients, measures them, joins, casts, unscales and clips them, steps, and casts the weights back: up
to 78 bytes per parameter, of which the step is 28. Here gradients are read once for norm and check together, then by
the step as they lie, in their dtype; the factor that unscales and clips reaches the step on the device; and the step
writes the weights in the model's dtype. See `docs/deepspeed-passes.md`.

An engine's ZeRO optimizer gets another class when it has been built, no class of DeepSpeed's changes. In the
configuration, `"adax_triton": {"fuse": "off"}` leaves it as it is; the default is "auto", which fuses what it can.
"""

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.utils.logging import log_dist

from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.state.allocation import local_state_tensors
from adax_triton.step.collect import needs_device

from .zero_methods import LateLinks, Zero3Hooks, Zero12Hooks
from .zero_steps import BF16Step, Zero12Step, is_verified, methods_of

SECTION = "adax_triton"
MODES = ("auto", "off")

# The methods that the hooks stand in for, and what they take.
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


class Fusion(NamedTuple):
    """How far an engine's step is fused.

    tier: "full", the passes around the step are part of it; "hooks", some are; "none".
    reason: why not "full"; empty if it is.
    """

    tier: str
    reason: str


def fuse_mode(config: Mapping[str, Any]) -> str:
    """Return what a DeepSpeed configuration says of `fuse`: "auto", the default, or "off".

    Raises:
        ValueError: another value, or another key in its section.
    """
    section = config.get(SECTION, {})
    if not isinstance(section, Mapping) or set(section) - {"fuse"}:
        raise ValueError(f'{SECTION}={section!r} in the DeepSpeed configuration; expected {{"fuse": "auto" or "off"}}')
    mode = section.get("fuse", "auto")
    if mode not in MODES:
        raise ValueError(f'{SECTION}.fuse={mode!r} in the DeepSpeed configuration; expected "auto" or "off"')
    return str(mode)


def describe(engine: Any) -> dict[str, Any]:
    """Return how a DeepSpeed engine steps an optimizer of this package.

    Args:
        engine: from `deepspeed.initialize`.

    Returns:
        `optimizer` and `wrapper`, names of classes; `tier` and `reason`, see `Fusion`; `states`, the dtypes of each
        kind of state on this rank, and `state_bytes`, their bytes, both empty before the first step; `deepspeed`, its
        version.

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
    fusion: Fusion = engine.adax_fusion
    return {
        "optimizer": type(optimizer).__name__,
        "wrapper": type(engine.optimizer).__name__,
        "tier": fusion.tier,
        "reason": fusion.reason,
        "states": {name: sorted(dtypes) for name, dtypes in states.items()},
        "state_bytes": count,
        "deepspeed": deepspeed.__version__,
    }


def fuse_after_building(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `DeepSpeedEngine._configure_optimizer`, which builds the ZeRO optimizer around ours."""

    @functools.wraps(original)
    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        original(self, client_optimizer, model_parameters)
        if isinstance(self.basic_optimizer, MomentOptimizer):
            self.adax_fusion = _fuse(self.optimizer, fuse_mode(self._config._param_dict))

    return _configure_optimizer


def _fuse(wrapper: Any, mode: str) -> Fusion:
    name = type(wrapper).__name__
    if mode == "off":
        mixin, fusion = None, Fusion("none", f'"{SECTION}": {{"fuse": "off"}} in the configuration')
    else:
        mixin, fusion = _choose(wrapper)
        log_dist(
            f"adax_triton: fused step of {name}: {fusion.tier}" + (f", for {fusion.reason}" if fusion.reason else ""),
            ranks=[0],
            level=logging.WARNING if fusion.reason and type(wrapper) in _upstream_classes() else logging.INFO,
        )
    upstream: type = type(wrapper)
    if mixin is None and upstream is _upstream_classes()[0]:
        mixin = LateLinks
    if mixin is not None:
        wrapper.__class__ = _fused_class(mixin, upstream)
    return fusion


def _upstream_classes() -> tuple[type, type, type]:
    return (
        deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer,
        deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3,
        deepspeed.runtime.bf16_optimizer.BF16_Optimizer,
    )


@functools.cache
def _fused_class(mixin: type, upstream: type) -> type:
    # Of upstream's name, by which DeepSpeed and others may ask what they have.
    return type(upstream.__name__, (mixin, upstream), {"__module__": upstream.__module__})


def _choose(wrapper: Any) -> tuple[type | None, Fusion]:
    zero_12, zero_3, bf16 = _upstream_classes()
    upstream = type(wrapper)
    if upstream not in (zero_12, zero_3, bf16):
        return None, Fusion("none", f"{upstream.__name__} has no fused step")
    reason = _obstacle(wrapper) or _unknown_method(upstream)
    if reason is not None:
        return None, Fusion("none", reason)
    if upstream is zero_3:
        return Zero3Hooks, Fusion("full", "")
    if is_verified(upstream):
        return (Zero12Step if upstream is zero_12 else BF16Step), Fusion("full", "")
    reason = f"{upstream.__name__}.step() of DeepSpeed {deepspeed.__version__} is none of those that were verified"
    return (Zero12Hooks, Fusion("hooks", reason)) if upstream is zero_12 else (None, Fusion("none", reason))


def _obstacle(wrapper: Any) -> str | None:
    """Return what about a ZeRO optimizer of a known class keeps its step from being fused, or None."""
    if getattr(wrapper, "torch_autocast_gradscaler", None) is not None:
        return "torch_autocast with fp16 steps through a GradScaler"
    if getattr(wrapper, "zenflow", False):
        return "zenflow steps by itself"
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
    if any(map(needs_device, wrapper.optimizer.param_groups)):
        return "the learning rate is a tensor on the device"
    if isinstance(wrapper, deepspeed.runtime.bf16_optimizer.BF16_Optimizer):
        if wrapper.has_moe_layers:
            return "BF16_Optimizer with MoE layers"
        if wrapper.grad_acc_dtype != torch.float32:
            return f"BF16_Optimizer accumulates gradients in {wrapper.grad_acc_dtype}"
    return None


def _unknown_method(upstream: type) -> str | None:
    for name, expected in _METHODS.get(upstream.__name__, {}).items():
        method = methods_of(upstream).get(name)
        if method is None or tuple(argument.arg for argument in method.args.args)[1:] != expected:
            return f"{upstream.__name__}.{name} of DeepSpeed {deepspeed.__version__} is not the method it was"
    return None
