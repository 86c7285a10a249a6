"""Raise if DeepSpeed would ignore or replace AdaX's settings.

Each error says what to change.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch

from adax_triton import AdaX, AdaXW
from adax_triton.moment_optimizer import MomentOptimizer

from .checkpoints.load import check_checkpoint_settings
from .fused_step.fusion import fuse_mode
from .optimizer_in_use import check_betas

CONFIG_TYPES: dict[str, type[MomentOptimizer]] = {"adax": AdaX, "adaxw": AdaXW}

# Options that DeepSpeed does not support, and what to do instead. Most need all gradients in one call, but ZeRO calls
# `optimizer.step()` once per group or sub-group.
_NOT_UNDER_DEEPSPEED = {
    "max_grad_norm": "set gradient_clipping at the top level of the configuration (in Lightning: "
    "Trainer(gradient_clip_val=...)) instead of max_grad_norm",
    "error_if_nonfinite": "remove it; DeepSpeed skips steps with gradients that are not finite",
    "norm_process_group": "DeepSpeed measures the norm",
    "capturable": "remove it; DeepSpeed keeps step counts on the CPU",
    "telemetry": "read the norm from engine.get_global_grad_norm()",
}
# Buffers of a ZeRO 3 sub-group while it is swapped in: partition, gradient and two moments.
_SWAPPED_TENSORS = 4


def check_config(config: Mapping[str, Any], client_optimizer: MomentOptimizer | None = None) -> None:
    """Raise for a configuration that would not train with AdaX as written.

    Changes nothing. Configurations with another optimizer pass.

    Args:
        config: the DeepSpeed configuration as a dictionary.
        client_optimizer: the optimizer object given to `deepspeed.initialize`; replaces the section "optimizer".
            Default: None.

    Raises:
        ValueError: `params` has unknown keys or values. Or a setting makes DeepSpeed run another optimizer or use
            wrong gradients, or DeepSpeed ignores it.
        TypeError: a value of `params` has the wrong type.
    """
    if client_optimizer is not None:
        _check_client_offload(type(client_optimizer).__name__, config)
        _check_settings(config, client_optimizer)
        return
    section = config.get("optimizer") or {}
    optimizer_class = CONFIG_TYPES.get(str(section.get("type")).lower())
    if optimizer_class is None:
        return
    params = section.get("params") or {}
    _check_keys(optimizer_class, params)
    _check_options(optimizer_class.__name__, params)
    check_betas(optimizer_class.__name__, params)
    # The optimizer checks its own values. Accelerate or the Trainer replaces "auto" later.
    given = {key: value for key, value in params.items() if value != "auto"}
    _check_settings(config, optimizer_class([torch.nn.Parameter(torch.zeros(1))], **given))


def _check_settings(config: Mapping[str, Any], optimizer: MomentOptimizer) -> None:
    name, groups = type(optimizer).__name__, optimizer.param_groups
    capturable = any(group["capturable"] for group in groups)
    options = {**optimizer.options._asdict(), "max_grad_norm": optimizer.max_grad_norm, "capturable": capturable}
    _check_options(name, options)
    fuse_mode(config)
    _check_step_settings(name, config)
    _check_nvme_offload(name, config)
    _check_precision(name, config, groups)
    _check_scheduler(name, config)
    check_checkpoint_settings(name, config, [group["states"] for group in groups])


def _check_keys(optimizer_class: type[MomentOptimizer], params: Mapping[str, Any]) -> None:
    names = inspect.signature(optimizer_class).parameters
    accepted = [key for key in names if key not in ("params", *_NOT_UNDER_DEEPSPEED)]
    unknown = [key for key in params if key not in names or key == "params"]
    if unknown:
        raise ValueError(
            f"optimizer.params has unknown keys for {optimizer_class.__name__}: {', '.join(unknown)}; "
            f"accepted keys: {', '.join(accepted)}"
        )


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    for option, remedy in _NOT_UNDER_DEEPSPEED.items():
        value = options.get(option)
        if value is not None and value is not False:
            raise ValueError(f"{option}={value!r}: {name} does not support it under DeepSpeed; {remedy}")


def _check_client_offload(name: str, config: Mapping[str, Any]) -> None:
    offload = deepspeed.runtime.zero.config.get_zero_config(config).offload_optimizer
    if offload is not None and offload.device != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"zero_optimization.offload_optimizer.device={offload.device!r}: with optimizer offload DeepSpeed does "
            f'not accept an {name} object; set "zero_force_ds_cpu_optimizer": false, or name the optimizer in the '
            "configuration (in Lightning: DeepSpeedStrategy(config={...}))"
        )


def _check_step_settings(name: str, config: Mapping[str, Any]) -> None:
    """Raise if DeepSpeed would run another optimizer or use wrong gradients."""
    # DeepSpeed's own parsers know the defaults, the deprecated spellings and "auto".
    zero = deepspeed.runtime.zero.config.get_zero_config(config)
    fp16 = deepspeed.runtime.precision_config.get_float16_config(config)
    offload = zero.offload_optimizer
    if fp16.enabled and zero.stage == 0:
        raise ValueError(
            f"fp16.enabled=true with zero_optimization.stage=0: DeepSpeed unscales the gradients of {name} but "
            "never scales the loss; set zero_optimization.stage to 1"
        )
    if zero.zenflow is not None:
        raise ValueError(f"zero_optimization.zenflow steps Adam instead of {name}; remove it")
    if offload is not None and offload.super_offload:
        raise ValueError(
            f"zero_optimization.offload_optimizer.super_offload=true steps Adam instead of {name}; "
            "remove it for plain CPU offload"
        )
    if offload is not None and offload.ratio < 1:
        raise ValueError(
            f"zero_optimization.offload_optimizer.ratio={offload.ratio} needs DeepSpeed's CPU Adam instead of {name}; "
            "set it to 1.0"
        )
    parsers = deepspeed.runtime.config
    scaled = parsers.get_torch_autocast_enabled(config) and parsers.get_torch_autocast_dtype(config) == torch.float16
    if scaled and zero.stage > 0 and parsers.get_gradient_clipping(config) != 0:
        raise ValueError(
            f"torch_autocast.dtype=float16 with gradient_clipping={parsers.get_gradient_clipping(config)}: under ZeRO "
            f"DeepSpeed clips the gradients of {name} before it divides them by the loss scale; set gradient_clipping "
            "to 0, or the dtype to bfloat16"
        )


def _check_nvme_offload(name: str, config: Mapping[str, Any]) -> None:
    """Raise if DeepSpeed ignores NVMe offload or fails within the first steps."""
    zero = deepspeed.runtime.zero.config.get_zero_config(config)
    offload = zero.offload_optimizer
    if offload is None or offload.device != "nvme":
        return
    where = 'zero_optimization.offload_optimizer.device="nvme"'
    if zero.stage < 3:
        raise ValueError(
            f"{where} with zero_optimization.stage={zero.stage}: DeepSpeed keeps the states of {name} in memory; set "
            'the stage to 3, or the device to "cpu"'
        )
    # While one sub-group is stepped, the next one may be read and the previous one written.
    needed = _SWAPPED_TENSORS * (1 + offload.pipeline_read + offload.pipeline_write)
    if offload.buffer_count < needed:
        raise ValueError(
            f"{where} with buffer_count={offload.buffer_count}, pipeline_read={offload.pipeline_read} and "
            f"pipeline_write={offload.pipeline_write}: {name} needs more buffers; set buffer_count to {needed}"
        )


def _check_precision(name: str, config: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise if DeepSpeed would keep masters or states in another precision."""
    zero = deepspeed.runtime.zero.config.get_zero_config(config)
    fp16 = deepspeed.runtime.precision_config.get_float16_config(config)
    bf16 = deepspeed.runtime.precision_config.get_bfloat16_config(config)
    offloaded = zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
    if fp16.fp16_master_weights_and_grads:
        raise ValueError(
            f"fp16.fp16_master_weights_and_grads=true needs DeepSpeed's CPU Adam instead of {name}; remove it, or "
            "train in bf16 with bf16.bf16_master_weights_and_grads=true and bf16.bf16_optimizer_states=true"
        )
    if not bf16.bf16_master_weights_and_grads:
        _check_double_masters(name, config, groups)
        return
    where = "bf16.bf16_master_weights_and_grads=true"
    if offloaded or not bf16.bf16_optimizer_states:
        raise ValueError(
            f"{where} with optimizer offload or without bf16.bf16_optimizer_states=true needs DeepSpeed's CPU Adam "
            f"instead of {name}; remove the offload and set bf16.bf16_optimizer_states to true"
        )
    if zero.stage == 0 or (zero.stage == 1 and _accumulates_in_float32(config)):
        raise ValueError(
            f"{where} with zero_optimization.stage={zero.stage}: DeepSpeed still keeps float32 master weights; "
            "set the stage to 2"
        )
    if "float32" in [group["states"] for group in groups]:
        raise ValueError(
            f'bf16.bf16_optimizer_states=true with states="float32" of {name}: set "states" in optimizer.params to '
            '"bfloat16", "8bit_v16" or "8bit"'
        )


def _check_double_masters(name: str, config: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    for group in groups:
        if _has_wrapper(config) and (group["master_weights"] is not None or group["weight_rounding"] != "nearest"):
            raise ValueError(
                f"master_weights={group['master_weights']!r}, weight_rounding={group['weight_rounding']!r} of {name}: "
                "DeepSpeed keeps float32 master weights itself; remove both options, or set "
                "bf16.bf16_master_weights_and_grads and bf16.bf16_optimizer_states to true"
            )


def _accumulates_in_float32(config: Mapping[str, Any]) -> bool:
    dtype = (config.get("data_types") or {}).get("grad_accum_dtype")
    return dtype is not None and deepspeed.runtime.config.DtypeEnum(dtype).value == torch.float32


def _has_wrapper(config: Mapping[str, Any]) -> bool:
    """Return whether DeepSpeed wraps the optimizer in one of its own."""
    precisions = deepspeed.runtime.precision_config
    return (
        deepspeed.runtime.zero.config.get_zero_config(config).stage > 0
        or precisions.get_float16_config(config).enabled
        or precisions.get_bfloat16_config(config).enabled
    )


def _check_scheduler(name: str, config: Mapping[str, Any]) -> None:
    schedules = deepspeed.runtime.lr_schedules
    kind = (config.get("scheduler") or {}).get("type")
    if kind is None or hasattr(schedules, kind) or not hasattr(torch.optim.lr_scheduler, kind):
        return
    if _has_wrapper(config):
        raise ValueError(
            f"scheduler.type={kind!r}: torch's schedulers do not take DeepSpeed's wrapper of {name}; pass "
            f"lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.{kind}(optimizer, ...) to deepspeed.initialize, "
            f"or use one of {', '.join(schedules.VALID_LR_SCHEDULES)}"
        )
