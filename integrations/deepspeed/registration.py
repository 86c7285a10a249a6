"""Register two optimizer types with DeepSpeed, and replace DeepSpeed methods.

The types need no patch: DeepSpeed looks a type up in its list of names and in `torch.optim`. The methods below are
replaced for optimizers of this package only; for others they call the original. Each entry describes the failure
without the replacement and names a test in `tests/` that detects it. Each was verified by running the test without the
replacement. A test compares the entries with `_replacements`.

DeepSpeedEngine._configure_optimizer
    ZeRO does not accept AdaX. Settings are not checked: fp16 at stage 0 silently steps on gradients that are too
    small. No step is fused.
    deepspeed_runs/test_deepspeed.py::test_engine_raises_for_a_setting
DeepSpeedEngine.save_checkpoint
    A killed run leaves an incomplete checkpoint, and the next run cannot continue.
    deepspeed_runs/test_deepspeed_kill.py::test_killed_run_continues_exactly
DeepSpeedEngine.load_checkpoint
    Silent: with NVMe offload the optimizer has no states, and small partitions keep their initial weights.
    deepspeed_runs/test_deepspeed_nvme.py::test_nvme_resume_continues_exactly
    Silent: load_optimizer_states=False keeps the initial master weights at ZeRO 0 in bf16, and load_module_only=True
    loads no weights at ZeRO 3.
    deepspeed_runs/test_deepspeed_features.py::test_weights_alone_continue_as_an_engine_built_on_them
DeepSpeedCPUAdam.add_param_group
    Silent: with optimizer offload, Accelerate steps Adam instead of the AdaX object that it is given.
    frameworks/test_huggingface.py::test_replaced_optimizer_or_betas_raise
FP16_UnfusedOptimizer.initialize_optimizer_states
    Silent: stage 0 in bf16 steps on zero gradients at the start. The weights are off by 4e-3 after four steps.
    deepspeed_runs/test_deepspeed.py::test_trajectory_matches_single_process
OneCycle._initialize_momentum
    Silent: the scheduler sets beta2 to 0.99. The weights are off by 3e-3 after four steps.
    deepspeed_runs/test_deepspeed_paths.py::test_step_uses_the_values_of_the_scheduler
DeepSpeedZeroOptimizer_Stage3.offload_states
    `engine.offload_states()` raises "Offloading is supported only for DeepSpeed FusedAdam".
    deepspeed_runs/test_deepspeed_paths.py::test_path_follows_single_process
DeepSpeedZeroOptimizer_Stage3.reload_states
    `engine.reload_states()` raises the same error.
    deepspeed_runs/test_deepspeed_paths.py::test_path_follows_single_process
DeepSpeedZeroOptimizer_Stage3._overflow_check_and_loss_scale_update, before 0.19.8
    Silent: one infinite gradient in bf16 makes the weights infinite or NaN.
    deepspeed_runs/test_deepspeed_paths.py::test_infinite_gradient_on_one_rank_skips_the_step
OptimizerSwapper._adjust_for_misaligned_lengths
    Silent: with NVMe offload, AdaX gets wrong gradients. The weights are off by 2e-2 after two steps.
    deepspeed_runs/test_deepspeed_nvme.py::test_nvme_resume_continues_exactly
ZeROOptimizer.load_hp_checkpoint_state_from_checkpoint_dir
    Loading a universal checkpoint at ZeRO 1 or 2 raises an IndexError on a rank that owns only padding of a group.
    deepspeed_runs/test_deepspeed_checkpoints.py::test_universal_checkpoint_continues_exactly
DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3
    Silent: loading a universal checkpoint at ZeRO 3 gives all groups the hyper-parameters of the first.
    deepspeed_runs/test_deepspeed_checkpoints.py::test_universal_checkpoint_continues_exactly
BF16_Optimizer.state_dict
    A checkpoint cannot be converted to a universal one: "narrow(): length must be non-negative".
    deepspeed_runs/test_deepspeed_checkpoints.py::test_universal_checkpoint_continues_exactly

Three modules patch individual objects instead of classes; their docstrings say why: `fused_step.zero_methods`,
`fused_step.zero_steps` and `checkpoints.rank_errors`. `integrations.huggingface` replaces one function of transformers.

Tested with DeepSpeed 0.19.1 and 0.19.8, see docs/deepspeed-acceptance.md. `register` raises for an older version:
with any optimizer, 0.19.0 decays frozen parameters at stage 0 in bf16, and ZeRO 1 and 2 of 0.18.9 fail in fp32 with
torch 2.13. It warns for a newer one.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from packaging.version import Version

from adax_triton.moment_optimizer import MomentOptimizer

from . import optimizer_in_use, patches
from .checkpoints import atomic_save, load, universal
from .config_checks import CONFIG_TYPES, check_config
from .fused_step.fusion import fuse

OLDEST_DEEPSPEED = "0.19.1"
NEWEST_DEEPSPEED = "0.19.8"

Method = Callable[..., Any]

# (class, method name, original method), in the order of replacement; empty when not registered.
_originals: list[tuple[type, str, Method]] = []


def register() -> None:
    """Make the types "AdaX" and "AdaXW" known to DeepSpeed.

    Idempotent; importing the package calls it. Warns if DeepSpeed is newer than the newest tested version.

    Raises:
        ImportError: DeepSpeed is older than the oldest tested version.
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
            other = getattr(torch.optim, name)
            raise RuntimeError(f"torch.optim.{name} already exists: {other!r}; remove it before this import")
    replacements = [(owner, name, getattr(owner, name), replace) for owner, name, replace in _replacements()]

    for owner, name, original, replace in replacements:
        setattr(owner, name, replace(original))
        _originals.append((owner, name, original))
    for name, optimizer_class in CONFIG_TYPES.items():
        deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS.append(name)
        setattr(torch.optim, name, optimizer_class)
    if Version(deepspeed.__version__) > Version(NEWEST_DEEPSPEED):
        warnings.warn(
            f"adax_triton.integrations.deepspeed is tested with deepspeed {OLDEST_DEEPSPEED} to {NEWEST_DEEPSPEED}, "
            f"found {deepspeed.__version__}; run `make acceptance DEEPSPEED={deepspeed.__version__}` to test it",
            stacklevel=2,
        )


def unregister() -> None:
    """Undo `register`. Idempotent; engines that already exist keep working."""
    if not _originals:
        return
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    for name in CONFIG_TYPES:
        deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS.remove(name)
        delattr(torch.optim, name)


def _replacements() -> list[tuple[type, str, Callable[[Method], Method]]]:
    """Return (class, method name, function from the original method to its replacement)."""
    runtime = deepspeed.runtime
    engine = runtime.engine.DeepSpeedEngine
    stage_3 = runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    unfused = runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer
    zero = runtime.base_optimizer.ZeROOptimizer
    overflow = (stage_3, "_overflow_check_and_loss_scale_update", patches.check_overflow_in_every_dtype)
    return [
        (engine, "_configure_optimizer", _check_and_fuse),
        (engine, "save_checkpoint", atomic_save.save_atomically),
        (engine, "load_checkpoint", load.load_checked),
        (DeepSpeedCPUAdam, "add_param_group", optimizer_in_use.reject_adax_param_groups),
        (unfused, "initialize_optimizer_states", patches.skip_zero_gradient_step),
        (runtime.lr_schedules.OneCycle, "_initialize_momentum", patches.keep_beta2),
        (stage_3, "offload_states", patches.offload_adax_states),
        (stage_3, "reload_states", patches.reload_adax_states),
        *([overflow] if Version(deepspeed.__version__) < Version("0.19.8") else []),
        (OptimizerSwapper, "_adjust_for_misaligned_lengths", patches.align_gradient_starts),
        (zero, "load_hp_checkpoint_state_from_checkpoint_dir", universal.load_universal_stage_1_2),
        (stage_3, "load_hp_checkpoint_state_from_checkpoint_dir_stage3", universal.load_universal_stage_3),
        (runtime.bf16_optimizer.BF16_Optimizer, "state_dict", universal.save_own_paddings),
    ]


def _check_and_fuse(original: Method) -> Method:
    """Replace `DeepSpeedEngine._configure_optimizer`, which wraps the optimizer in ZeRO's."""

    @functools.wraps(original)
    def _configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        if callable(client_optimizer):
            built = client_optimizer(model_parameters)
            client_optimizer = built if isinstance(built, MomentOptimizer) else lambda _: built
        adax_classes = [type(client_optimizer)] if isinstance(client_optimizer, MomentOptimizer) else []
        if client_optimizer is None and self.optimizer_name() in CONFIG_TYPES:
            adax_classes = [CONFIG_TYPES[self.optimizer_name()]]
        if adax_classes:
            check_config(self._config._param_dict, client_optimizer)
        supported = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS  # DeepSpeed looks for the exact class
        supported.extend(adax_classes)
        try:
            original(self, client_optimizer, model_parameters)
        finally:
            for optimizer_class in adax_classes:
                supported.remove(optimizer_class)
        optimizer_in_use.log_optimizer_in_use(self)
        if isinstance(self.basic_optimizer, MomentOptimizer):
            self.adax_fused_step = fuse(self.optimizer, self._config._param_dict)

    return _configure_optimizer
