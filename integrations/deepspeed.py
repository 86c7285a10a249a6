"""AdaX and AdaXW as optimizer types of a DeepSpeed configuration.

Importing this module registers them; DeepSpeed has no plugin mechanism, so the import has to come before
`deepspeed.initialize`:

    import adax_triton.integrations.deepspeed

    config = {"optimizer": {"type": "AdaX", "params": {"lr": 1.5e-3}}, ...}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

The type is read in any letter case, and `params` takes the keyword arguments of `adax_triton.AdaX` or `AdaXW`. An
optimizer object or callable passed to `deepspeed.initialize` gets the same checks and repairs.

DeepSpeed resolves an unknown type through its list of names and `torch.optim`, and admits optimizers to ZeRO by their
exact class; the entries made there need no patch. Three methods are wrapped, for optimizers of this package only, and
those of `deepspeed_checkpoints` and `deepspeed_in_use`:

- `DeepSpeedEngine._do_sanity_check` and `_do_optimizer_sanity_check` first call `check_config`;
- `FP16_UnfusedOptimizer.initialize_optimizer_states` (stage 0 with bf16) skips its step on zero gradients, which would
  count as the first step of the schedule and decay the weights once more.

Run with DeepSpeed 0.19.1 and 0.19.8. Older versions are refused: whatever the optimizer, 0.19.0 decays frozen
parameters at stage 0 with bf16, and under torch 2.13 the ZeRO 1 and 2 of 0.18.9 fail in fp32.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from packaging.version import Version

from adax_triton import Adam, AdamW, AdaX, AdaXW
from adax_triton.moment_optimizer import MomentOptimizer

from .deepspeed_checkpoints import checkpoint_methods_to_wrap, refuse_lossy_checkpoints
from .deepspeed_in_use import log_optimizer_in_use, refuse_betas_of_adam, replacement_to_wrap
from .deepspeed_switch import switching_optimizer

__all__ = ["check_config", "register", "switching_optimizer", "unregister"]

OLDEST_DEEPSPEED = "0.19.1"

_CONFIG_TYPES: dict[str, type[MomentOptimizer]] = {"adax": AdaX, "adaxw": AdaXW}
_ZERO_CLASSES: tuple[type[MomentOptimizer], ...] = (AdaX, AdaXW, Adam, AdamW)

# What the optimizer does by itself elsewhere, and what does it here.
_DEEPSPEED_CONTROLS = {
    "max_grad_norm": "set gradient_clipping at the top level of the configuration instead of max_grad_norm",
    "error_if_nonfinite": "DeepSpeed skips such steps",
    "norm_process_group": "DeepSpeed measures the norm",
    "capturable": "DeepSpeed keeps step counts as numbers",
    "telemetry": "read the norm from engine.get_global_grad_norm()",
}

# (owner, method name, the method before wrapping), in the order of wrapping; empty when not registered.
_originals: list[tuple[type, str, Callable[..., Any]]] = []


def register() -> None:
    """Make the types "AdaX" and "AdaXW" known to DeepSpeed. Idempotent; importing this module calls it.

    Raises:
        ImportError: DeepSpeed is older than the oldest version this adapter was run with.
        RuntimeError: `torch.optim` already has another object under one of the names.
    """
    if _originals:
        return
    if Version(deepspeed.__version__) < Version(OLDEST_DEEPSPEED):
        raise ImportError(
            f"adax_triton.integrations.deepspeed needs deepspeed >= {OLDEST_DEEPSPEED}, found {deepspeed.__version__}"
        )
    for name in _CONFIG_TYPES:
        if hasattr(torch.optim, name):
            raise RuntimeError(f"torch.optim.{name} already exists: {getattr(torch.optim, name)!r}")
    wrapped = [(owner, name, getattr(owner, name), wrap) for owner, name, wrap in _methods_to_wrap()]

    for owner, name, original, wrap in wrapped:
        setattr(owner, name, wrap(original))
        _originals.append((owner, name, original))
    for name, optimizer_class in _CONFIG_TYPES.items():
        deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS.append(name)
        setattr(torch.optim, name, optimizer_class)
    deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.extend(_ZERO_CLASSES)


def unregister() -> None:
    """Take back everything `register` did. Idempotent; engines that already exist keep working."""
    if not _originals:
        return
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    for name in _CONFIG_TYPES:
        deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS.remove(name)
        delattr(torch.optim, name)
    for optimizer_class in _ZERO_CLASSES:
        deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.remove(optimizer_class)


def check_config(config: Mapping[str, Any], client_optimizer: MomentOptimizer | None = None) -> None:
    """Refuse a DeepSpeed configuration that would not train with AdaX as written. Changes nothing.

    Configurations that name another optimizer pass.

    Args:
        config: The DeepSpeed configuration as a dictionary.
        client_optimizer: The optimizer object handed to `deepspeed.initialize`, which takes the place of the
            configuration's "optimizer" section.

    Raises:
        ValueError: The section has unknown `params`, or a setting makes DeepSpeed step another optimizer or step on
            wrong gradients. The message names the setting and the remedy.
    """
    if client_optimizer is None:
        section = config.get("optimizer") or {}
        optimizer_class = _CONFIG_TYPES.get(str(section.get("type")).lower())
        if optimizer_class is None:
            return
        params = section.get("params") or {}
        _refuse_unknown_params(optimizer_class, params)
        name = optimizer_class.__name__
        _refuse_own_control(name, params)
        refuse_betas_of_adam(name, params)
        states = [str((section.get("params") or {}).get("states", "float32"))]
    else:
        name = type(client_optimizer).__name__
        _refuse_own_control(name, _options_of(client_optimizer))
        states = [group["states"] for group in client_optimizer.param_groups]
        _refuse_unforced_client_offload(name, config)
    _refuse_wrong_steps(name, config)
    refuse_lossy_checkpoints(name, config, states)


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
        if options.get(option):
            raise ValueError(f"{option}={options[option]!r} is not offered for {name} under DeepSpeed; {remedy}")


def _options_of(optimizer: MomentOptimizer) -> dict[str, Any]:
    capturable = any(group["capturable"] for group in optimizer.param_groups)
    return {**optimizer.options._asdict(), "max_grad_norm": optimizer.max_grad_norm, "capturable": capturable}


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


def _methods_to_wrap() -> list[tuple[type, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    unfused = deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer
    return [
        (engine, "_do_sanity_check", _check_before_building),
        (engine, "_do_optimizer_sanity_check", _check_before_wrapping),
        (unfused, "initialize_optimizer_states", _skip_zero_gradient_step),
        replacement_to_wrap(),
        *checkpoint_methods_to_wrap(),
    ]


def _check_before_building(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _do_sanity_check(self: Any) -> None:
        client_optimizer = self.client_optimizer
        if client_optimizer is None or isinstance(client_optimizer, MomentOptimizer):
            check_config(self._config._param_dict, client_optimizer)
        original(self)

    return _do_sanity_check


def _check_before_wrapping(original: Callable[..., Any]) -> Callable[..., Any]:
    # A callable given as client optimizer shows what it builds only here.
    @functools.wraps(original)
    def _do_optimizer_sanity_check(self: Any, basic_optimizer: torch.optim.Optimizer) -> Any:
        if isinstance(basic_optimizer, MomentOptimizer):
            name = type(basic_optimizer).__name__
            _refuse_own_control(name, _options_of(basic_optimizer))
            _refuse_wrong_steps(name, self._config._param_dict)
            states = [group["states"] for group in basic_optimizer.param_groups]
            refuse_lossy_checkpoints(name, self._config._param_dict, states)
        log_optimizer_in_use(self, basic_optimizer)
        return original(self, basic_optimizer)

    return _do_optimizer_sanity_check


def _skip_zero_gradient_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def initialize_optimizer_states(self: Any) -> None:
        if not isinstance(self.optimizer, MomentOptimizer):
            original(self)
            return
        # The step's only purpose is to create the states, which ours does lazily; clearing gradients is kept.
        for group in (*self.fp16_groups, *self.fp32_groups):
            for param in group:
                param.grad = None

    return initialize_optimizer_states


register()
