"""Settings of DeepSpeed under which an optimizer of this package would not run as written: refused, with the remedy."""

import inspect
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from adax_triton.integrations.deepspeed.checkpoints.load import refuse_lossy_checkpoints
from adax_triton.integrations.deepspeed.fused_step.choose import fuse_mode

from adax_triton import AdaX, AdaXW
from adax_triton.moment_optimizer import MomentOptimizer

from .optimizer_in_use import refuse_betas_of_adam

CONFIG_TYPES: dict[str, type[MomentOptimizer]] = {"adax": AdaX, "adaxw": AdaXW}

# What the optimizer does by itself elsewhere, and what does it here.
_DEEPSPEED_CONTROLS = {
    "max_grad_norm": "set gradient_clipping at the top level of the configuration instead of max_grad_norm",
    "error_if_nonfinite": "DeepSpeed skips such steps",
    "norm_process_group": "DeepSpeed measures the norm",
    "capturable": "DeepSpeed keeps step counts as numbers",
    "telemetry": "read the norm from engine.get_global_grad_norm()",
}
# What a sub-group of ZeRO 3 has in buffers while it is swapped in: partition, gradient and two moments.
_SWAPPED_TENSORS = 4


def check_config(config: Mapping[str, Any], client_optimizer: MomentOptimizer | None = None) -> None:
    """Refuse a DeepSpeed configuration that would not train with AdaX as written. Changes nothing.

    Configurations that name another optimizer pass.

    Args:
        config: The DeepSpeed configuration as a dictionary.
        client_optimizer: The optimizer object handed to `deepspeed.initialize`, which takes the place of the
            configuration's "optimizer" section.

    Raises:
        ValueError: The section has unknown `params` or values that the optimizer refuses, or a setting makes DeepSpeed
            step another optimizer, step on wrong gradients, or do other than what the setting says. The message names
            the setting and the remedy.
        TypeError: A value of `params` has the wrong type.
    """
    if client_optimizer is not None:
        _refuse_unforced_client_offload(type(client_optimizer).__name__, config)
        check_optimizer(config, client_optimizer)
        return
    section = config.get("optimizer") or {}
    optimizer_class = CONFIG_TYPES.get(str(section.get("type")).lower())
    if optimizer_class is None:
        return
    params = section.get("params") or {}
    _refuse_unknown_params(optimizer_class, params)
    _refuse_own_control(optimizer_class.__name__, params)
    refuse_betas_of_adam(optimizer_class.__name__, params)
    # The optimizer knows best what it takes; "auto" is filled in later, by the framework that wrote it.
    given = {key: value for key, value in params.items() if value != "auto"}
    check_optimizer(config, optimizer_class([torch.nn.Parameter(torch.zeros(1))], **given))


def check_optimizer(config: Mapping[str, Any], optimizer: MomentOptimizer) -> None:
    """Refuse what `check_config` refuses, of an optimizer that is there.

    Args:
        config: The DeepSpeed configuration as a dictionary.
        optimizer: The optimizer that DeepSpeed is to wrap.

    Raises:
        ValueError: A setting under which the optimizer would not train as written, with the remedy.
    """
    name, groups = type(optimizer).__name__, optimizer.param_groups
    capturable = any(group["capturable"] for group in groups)
    conditions = {**optimizer.options._asdict(), "max_grad_norm": optimizer.max_grad_norm, "capturable": capturable}
    _refuse_own_control(name, conditions)
    fuse_mode(config)
    _refuse_wrong_steps(name, config)
    _refuse_other_offload(name, config)
    _refuse_other_precision(name, config, groups)
    _refuse_torch_scheduler(name, config)
    refuse_lossy_checkpoints(name, config, [group["states"] for group in groups])


def _refuse_unknown_params(optimizer_class: type[MomentOptimizer], params: Mapping[str, Any]) -> None:
    names = inspect.signature(optimizer_class).parameters
    accepted = [key for key in names if key not in ("params", *_DEEPSPEED_CONTROLS)]
    unknown = [key for key in params if key not in names or key == "params"]
    if unknown:
        raise ValueError(
            f"optimizer.params has unknown keys for {optimizer_class.__name__}: {', '.join(unknown)}; "
            f"accepted are: {', '.join(accepted)}"
        )


def _refuse_own_control(name: str, options: Mapping[str, Any]) -> None:
    """Refuse what needs all gradients of a step in one call: ZeRO calls the optimizer once per group or part of one."""
    for option, remedy in _DEEPSPEED_CONTROLS.items():
        value = options.get(option)
        if value is not None and value is not False:
            raise ValueError(f"{option}={value!r} is not offered for {name} under DeepSpeed; {remedy}")


def _refuse_unforced_client_offload(name: str, config: Mapping[str, Any]) -> None:
    offload = deepspeed.runtime.zero.config.get_zero_config(config).offload_optimizer
    if offload is not None and offload.device != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"zero_optimization.offload_optimizer.device={offload.device!r} makes DeepSpeed refuse an {name} object; "
            f'set "zero_force_ds_cpu_optimizer": false, or name the optimizer in the configuration'
        )


def _refuse_wrong_steps(name: str, config: Mapping[str, Any]) -> None:
    """Refuse the settings under which DeepSpeed runs a step other than that of the optimizer called `name`."""
    # DeepSpeed's own parsers know the defaults, the deprecated spellings and "auto".
    zero = deepspeed.runtime.zero.config.get_zero_config(config)
    fp16 = deepspeed.runtime.precision_config.get_float16_config(config)
    offload = zero.offload_optimizer
    if fp16.enabled and zero.stage == 0:
        raise ValueError(
            f"fp16.enabled=true with zero_optimization.stage=0 is not offered for {name}: DeepSpeed does not scale the "
            f"loss there yet divides the gradients by the scale; set zero_optimization.stage to 1"
        )
    if zero.zenflow is not None:
        raise ValueError(f"zero_optimization.zenflow would step Adam in place of {name}; remove it")
    if offload is not None and offload.super_offload:
        raise ValueError(
            f"zero_optimization.offload_optimizer.super_offload=true would step Adam in place of {name}; "
            f"remove it for plain CPU offload"
        )
    if offload is not None and offload.ratio < 1:
        raise ValueError(
            f"zero_optimization.offload_optimizer.ratio={offload.ratio} needs DeepSpeed's CPU Adam, not {name}; "
            f"set it to 1.0"
        )
    parsers = deepspeed.runtime.config
    scaled = parsers.get_torch_autocast_enabled(config) and parsers.get_torch_autocast_dtype(config) == torch.float16
    if scaled and zero.stage > 0 and parsers.get_gradient_clipping(config) != 0:
        raise ValueError(
            f"torch_autocast.dtype=float16 with gradient_clipping={parsers.get_gradient_clipping(config)}: under ZeRO "
            f"DeepSpeed clips what {name} gets before it takes the loss scale off; set gradient_clipping to 0, or the "
            "dtype to bfloat16"
        )


def _refuse_other_offload(name: str, config: Mapping[str, Any]) -> None:
    """Refuse offload to NVMe where DeepSpeed does another thing, or fails within the first steps."""
    zero = deepspeed.runtime.zero.config.get_zero_config(config)
    offload = zero.offload_optimizer
    if offload is None or offload.device != "nvme":
        return
    where = 'zero_optimization.offload_optimizer.device="nvme"'
    if zero.stage < 3:
        raise ValueError(
            f"{where} with zero_optimization.stage={zero.stage}: DeepSpeed would leave the states of {name} in memory; "
            'set the stage to 3, or the device to "cpu"'
        )
    # One sub-group is stepped while another one is read and a third is written.
    needed = _SWAPPED_TENSORS * (1 + offload.pipeline_read + offload.pipeline_write)
    if offload.buffer_count < needed:
        raise ValueError(
            f"{where} with buffer_count={offload.buffer_count}, pipeline_read={offload.pipeline_read} and "
            f"pipeline_write={offload.pipeline_write}: DeepSpeed would run out of buffers for {name} while it trains; "
            f"set buffer_count to {needed}"
        )


def _refuse_other_precision(name: str, config: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    """Refuse masters and states that DeepSpeed keeps in another precision than is asked for."""
    zero = deepspeed.runtime.zero.config.get_zero_config(config)
    fp16 = deepspeed.runtime.precision_config.get_float16_config(config)
    bf16 = deepspeed.runtime.precision_config.get_bfloat16_config(config)
    offloaded = zero.offload_optimizer is not None and zero.offload_optimizer.device != "none"
    if fp16.fp16_master_weights_and_grads:
        raise ValueError(
            f"fp16.fp16_master_weights_and_grads=true needs DeepSpeed's CPU Adam, not {name}; remove it, or train in "
            "bf16 with bf16.bf16_master_weights_and_grads=true and bf16.bf16_optimizer_states=true"
        )
    if not bf16.bf16_master_weights_and_grads:
        _refuse_masters_beside_masters(name, config, groups)
        return
    where = "bf16.bf16_master_weights_and_grads=true"
    if offloaded or not bf16.bf16_optimizer_states:
        raise ValueError(
            f"{where} with optimizer offload or without bf16.bf16_optimizer_states=true needs DeepSpeed's CPU Adam, "
            f"not {name}; remove the former and set the latter"
        )
    if zero.stage == 0 or (zero.stage == 1 and _accumulates_in_float32(config)):
        raise ValueError(
            f"{where} with zero_optimization.stage={zero.stage}: DeepSpeed would keep float32 masters all the same; "
            "set the stage to 2"
        )
    if "float32" in [group["states"] for group in groups]:
        raise ValueError(
            f'bf16.bf16_optimizer_states=true with states="float32" of {name}: set "states" in optimizer.params to '
            '"bfloat16", "8bit_v16" or "8bit"'
        )


def _refuse_masters_beside_masters(name: str, config: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
    for group in groups:
        if _is_wrapped(config) and (group["master_weights"] is not None or group["weight_rounding"] != "nearest"):
            raise ValueError(
                f"master_weights={group['master_weights']!r}, weight_rounding={group['weight_rounding']!r} of {name}: "
                "DeepSpeed hands it float32 masters of its own; remove them, or set bf16.bf16_master_weights_and_grads "
                "and bf16.bf16_optimizer_states to true"
            )


def _accumulates_in_float32(config: Mapping[str, Any]) -> bool:
    dtype = (config.get("data_types") or {}).get("grad_accum_dtype")
    return dtype is not None and deepspeed.runtime.config.DtypeEnum(dtype).value == torch.float32


def _is_wrapped(config: Mapping[str, Any]) -> bool:
    precisions = deepspeed.runtime.precision_config
    return (
        deepspeed.runtime.zero.config.get_zero_config(config).stage > 0
        or precisions.get_float16_config(config).enabled
        or precisions.get_bfloat16_config(config).enabled
    )


def _refuse_torch_scheduler(name: str, config: Mapping[str, Any]) -> None:
    schedules = deepspeed.runtime.lr_schedules
    kind = (config.get("scheduler") or {}).get("type")
    if kind is None or hasattr(schedules, kind) or not hasattr(torch.optim.lr_scheduler, kind):
        return
    if _is_wrapped(config):
        raise ValueError(
            f"scheduler.type={kind!r}: DeepSpeed hands torch's schedulers its wrapper of {name}, which they refuse; "
            f"pass lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.{kind}(optimizer, ...) to "
            f"deepspeed.initialize, or take one of {', '.join(schedules.VALID_LR_SCHEDULES)}"
        )
