"""AdaX and AdaXW as optimizer types of a DeepSpeed configuration.

Importing this module registers them; DeepSpeed has no plugin mechanism, so the import has to come before
`deepspeed.initialize`:

    import adax_triton.integrations.deepspeed

    config = {"optimizer": {"type": "AdaX", "params": {"lr": 1.5e-3}}, ...}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

The type is read in any letter case, and `params` takes the keyword arguments of `adax_triton.AdaX` or `AdaXW`. An
optimizer object or callable passed to `deepspeed.initialize` gets the same checks and repairs.

DeepSpeed resolves an unknown type through its list of names and `torch.optim`; the entries made there need no patch.
Three methods are wrapped, for optimizers of this package only, and those of `deepspeed_repairs`, `deepspeed_in_use` and
`deepspeed_checkpoints`:

- `DeepSpeedEngine._do_sanity_check` and `_do_optimizer_sanity_check` first call `check_config`, and the latter admits
  the optimizer's class, a subclass too, to ZeRO;
- `DeepSpeedEngine._configure_optimizer` then has the passes around the step fused with it, see `deepspeed_fuse`.

Run with DeepSpeed 0.19.1 and 0.19.8, see docs/deepspeed-acceptance.md. Older versions are refused: whatever the
optimizer, 0.19.0 decays frozen parameters at stage 0 with bf16, and under torch 2.13 the ZeRO 1 and 2 of 0.18.9 fail in
fp32. Newer ones get a warning.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from adax_triton.integrations.deepspeed.checkpoints.from_adam import switching_optimizer
from adax_triton.integrations.deepspeed.checkpoints.load import checkpoint_methods_to_wrap
from adax_triton.integrations.deepspeed.fused_step.choose import describe, fuse_after_building
from packaging.version import Version

from adax_triton.moment_optimizer import MomentOptimizer

from .config_checks import CONFIG_TYPES, check_config, check_optimizer
from .optimizer_in_use import log_optimizer_in_use, replacement_to_wrap
from .patches import methods_to_repair

__all__ = ["check_config", "describe", "register", "switching_optimizer", "unregister"]

OLDEST_DEEPSPEED = "0.19.1"
NEWEST_DEEPSPEED = "0.19.8"

# (owner, method name, the method before wrapping), in the order of wrapping; empty when not registered.
_originals: list[tuple[type, str, Callable[..., Any]]] = []


def register() -> None:
    """Make the types "AdaX" and "AdaXW" known to DeepSpeed. Idempotent; importing this module calls it.

    Warns where DeepSpeed is newer than the newest version this adapter was run with.

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
    for name in CONFIG_TYPES:
        if hasattr(torch.optim, name):
            raise RuntimeError(f"torch.optim.{name} already exists: {getattr(torch.optim, name)!r}")
    wrapped = [(owner, name, getattr(owner, name), wrap) for owner, name, wrap in _methods_to_wrap()]

    for owner, name, original, wrap in wrapped:
        setattr(owner, name, wrap(original))
        _originals.append((owner, name, original))
    for name, optimizer_class in CONFIG_TYPES.items():
        deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS.append(name)
        setattr(torch.optim, name, optimizer_class)
    if Version(deepspeed.__version__) > Version(NEWEST_DEEPSPEED):
        warnings.warn(
            f"adax_triton.integrations.deepspeed was run with deepspeed {OLDEST_DEEPSPEED} to {NEWEST_DEEPSPEED}, "
            f"found {deepspeed.__version__}; `make acceptance DEEPSPEED={deepspeed.__version__}` runs it on that",
            stacklevel=2,
        )


def unregister() -> None:
    """Take back everything `register` did. Idempotent; engines that already exist keep working."""
    if not _originals:
        return
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    for name in CONFIG_TYPES:
        deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS.remove(name)
        delattr(torch.optim, name)


def _methods_to_wrap() -> list[tuple[type, str, Callable[[Callable[..., Any]], Callable[..., Any]]]]:
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    return [
        (engine, "_do_sanity_check", _check_before_building),
        (engine, "_do_optimizer_sanity_check", _check_before_wrapping),
        (engine, "_configure_optimizer", fuse_after_building),
        replacement_to_wrap(),
        *methods_to_repair(),
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
        log_optimizer_in_use(self, basic_optimizer)
        if not isinstance(basic_optimizer, MomentOptimizer):
            return original(self, basic_optimizer)
        check_optimizer(self._config._param_dict, basic_optimizer)
        admitted = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS  # DeepSpeed looks for the exact class
        admitted.append(type(basic_optimizer))
        try:
            return original(self, basic_optimizer)
        finally:
            admitted.remove(type(basic_optimizer))

    return _do_optimizer_sanity_check


register()
