"""Check and load DeepSpeed checkpoints.

Also restores the state that DeepSpeed does not load.
"""

import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch

from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.state.allocation import MOMENTS

from .atomic_save import checkpoint_to_load
from .rank_errors import raise_on_every_rank
from .universal import allowing_saved_classes, partitions_in_groups, read_optimizer_file, restore_frozen_and_buffers


def check_checkpoint_settings(name: str, config: Mapping[str, Any], states: Sequence[str]) -> None:
    """Raise if DeepSpeed cannot save or load the states with these settings.

    Args:
        name: class name of the optimizer, for messages.
        config: the DeepSpeed configuration.
        states: the option `states` of each parameter group.

    Raises:
        ValueError: with the setting and what to change.
    """
    zero = deepspeed.runtime.zero.config.get_zero_config(config)
    universal = (config.get("checkpoint") or {}).get("load_universal", False)
    if zero.elastic_checkpoint and zero.stage > 0:
        raise ValueError(
            f"zero_optimization.elastic_checkpoint=true: DeepSpeed cannot load such checkpoints of {name}; remove it. "
            "To change the number of ranks, convert to a universal checkpoint"
        )
    if universal and zero.stage == 0:
        raise ValueError(
            "checkpoint.load_universal=true with zero_optimization.stage=0: DeepSpeed loads neither weights nor "
            "states; set the stage to 1"
        )
    if zero.offload_optimizer is None or zero.offload_optimizer.device != "nvme" or zero.stage < 3:
        return  # below ZeRO 3 DeepSpeed offloads to the CPU
    where = 'zero_optimization.offload_optimizer.device="nvme"'
    if universal:
        raise ValueError(f'{where} with checkpoint.load_universal=true: states are not loaded; set the device to "cpu"')
    other = sorted({kept for kept in states if kept != "float32"})
    if other:
        raise ValueError(
            f"{where} with states={other[0]!r}: DeepSpeed swaps states as float32, which corrupts other dtypes; "
            'set states="float32" for this optimizer, or the device to "cpu"'
        )


def load_checked(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replace `DeepSpeedEngine.load_checkpoint`.

    It raises on every rank if the checkpoint is incomplete or was saved with another ZeRO stage or offload. After
    DeepSpeed's load it restores missing state, master weights and the engine's loss scaler.
    """

    @functools.wraps(original)
    def load_checkpoint(
        self: Any,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., Any] | None = None,
    ) -> Any:
        states, schedulers = load_optimizer_states, load_lr_scheduler_states
        if isinstance(self.basic_optimizer, MomentOptimizer) and load_module_only and _weights_come_with_states(self):
            states = False
        options = (load_module_strict, states, schedulers, load_module_only, custom_load_fn)
        with allowing_saved_classes():  # for TORCH_FORCE_WEIGHTS_ONLY_LOAD=1
            if not isinstance(self.basic_optimizer, MomentOptimizer):
                return original(self, load_dir, tag, *options)
            with raise_on_every_rank(self) as gather:
                tag = checkpoint_to_load(self, load_dir, tag, gather)
                _check_layout(self, load_dir, tag)
                if not states and self.zero_optimization_partition_weights():
                    _check_latest_is(tag, load_dir)
                own_scaler = getattr(self.optimizer, "loss_scaler", None)
                loaded = original(self, load_dir, tag, *options)
                if loaded[0] is not None and self.zero_optimization():
                    _restore(self, loaded[0], states and not load_module_only)
                    _keep_loss_scaler(self.optimizer, own_scaler)
                elif loaded[0] is not None and not states and hasattr(self.optimizer, "refresh_fp32_params"):
                    self.optimizer.refresh_fp32_params()  # DeepSpeed keeps the initial master weights at ZeRO 0
        return loaded

    return load_checkpoint


def _weights_come_with_states(engine: Any) -> bool:
    """Return whether DeepSpeed loads weights from the files of states.

    At ZeRO 3 it does, unless it is told to load no states. A load of the weights alone would then load nothing.
    """
    from_states = engine.zero_optimization_partition_weights() and not engine.zero_nvme_offload_optimizer()
    return bool(from_states and not engine.load_universal_checkpoint())


def _check_layout(engine: Any, load_dir: str, tag: str | None) -> None:
    """Raise unless checkpoint and engine agree on ZeRO 3 and NVMe offload."""
    if tag is None:
        tag = _latest(load_dir, "latest_universal" if engine.load_universal_checkpoint() else "latest")
    folder = os.path.join(load_dir, str(tag))
    if not os.path.isdir(folder):
        return  # DeepSpeed raises
    at_stage_3 = engine.zero_optimization_partition_weights()
    # With node-local storage a folder has the files of its own node's ranks.
    saved_at_stage_3 = any(re.fullmatch(r"zero_pp_rank_\d+_mp_.*model_states\.pt", name) for name in os.listdir(folder))
    if at_stage_3 != saved_at_stage_3:
        raise ValueError(
            f"{folder} was saved {'at' if saved_at_stage_3 else 'below'} ZeRO 3, and DeepSpeed cannot load it "
            f"{'at' if at_stage_3 else 'below'} ZeRO 3; set zero_optimization.stage as in the run that saved it, or "
            "load the weights alone with zero_to_fp32"
        )
    nvme = engine.zero_nvme_offload_optimizer()
    saved_from_nvme = os.path.isdir(os.path.join(folder, "offloaded_tensors"))
    if nvme != saved_from_nvme:
        raise ValueError(
            f"{folder} was saved {'with' if saved_from_nvme else 'without'} optimizer offload to NVMe, but this "
            f"run is configured {'with' if nvme else 'without'} NVMe offload; set zero_optimization.offload_optimizer "
            "as in the run that saved the checkpoint"
        )
    if nvme:
        _check_swapped_files(engine, folder)


def _check_latest_is(tag: str | None, load_dir: str) -> None:
    """Raise if `latest` does not name the tag.

    Without states, DeepSpeed loads ZeRO 3 weights from the checkpoint that `latest` names.
    """
    latest = _latest(load_dir, "latest")
    if tag is not None and tag != latest:
        raise ValueError(
            f"load_optimizer_states=False or load_module_only=True at ZeRO 3: DeepSpeed takes the weights from what "
            f"{os.path.join(load_dir, 'latest')} names, {latest!r}, not from {tag!r}; write {tag!r} into that file, or "
            "load the states, too"
        )


def _latest(load_dir: str, name: str) -> str | None:
    """Return the tag in a file such as `latest`, or None.

    Returns None if there is no file.
    """
    path = Path(load_dir, name)
    return path.read_text().strip() if path.is_file() else None


def _check_swapped_files(engine: Any, folder: str) -> None:
    """Raise if a checkpoint lacks the file of a swapped partition.

    Checks the partitions that this rank swaps to NVMe.
    """
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    saved = os.listdir(os.path.join(folder, "offloaded_tensors", f"rank{rank:02d}"))
    for partition_id in engine.optimizer.optimizer_swapper.swap_params_info:
        if f"{partition_id}.tensor.swp" not in saved:
            raise ValueError(
                f"{folder} has no file of partition {partition_id}. DeepSpeed numbers parameters in the order in which "
                "a process creates them: create models and engines as in the run that saved it, with the same "
                "zero_optimization.sub_group_size and number of ranks"
            )


def _restore(engine: Any, path: str, load_states: bool) -> None:
    """Restore state that DeepSpeed does not load.

    Applies to NVMe offload and to universal checkpoints.

    Args:
        engine: the engine with ZeRO, after DeepSpeed's load.
        path: the file of model states that DeepSpeed has read.
        load_states: whether to load states and hyper-parameters, too.
    """
    nvme = engine.zero_nvme_offload_optimizer()
    if not nvme and not engine.load_universal_checkpoint():
        return
    at_stage_3 = engine.zero_optimization_partition_weights()
    if at_stage_3:
        engine.optimizer.checkpoint_event_prologue()
    if nvme:
        folder, tag = os.path.split(os.path.dirname(path))
        saved = read_optimizer_file(engine._get_zero_ckpt_name(folder, tag))["optimizer_state_dict"]
        _restore_partitions(engine.optimizer, saved, load_states)
    else:
        restore_frozen_and_buffers(engine, path)
    if at_stage_3:
        engine.optimizer.checkpoint_event_epilogue()


def _keep_loss_scaler(zero: Any, own: Any) -> None:
    """Restore the engine's own loss scaler unless both scalers are dynamic.

    DeepSpeed loads the scaler of the checkpoint. A constant scale must come from the configuration. The constant 1 of a
    bfloat16 checkpoint would replace the dynamic scale of fp16 for the rest of the run.
    """
    if own is not None and not (own.dynamic and zero.loss_scaler.dynamic):
        zero.loss_scaler = own
        zero.dynamic_loss_scale = own.dynamic


def _restore_partitions(zero: Any, saved: Mapping[str, Any], load_states: bool) -> None:
    """Restore states and small partitions under NVMe offload.

    DeepSpeed restores only the swapped files.

    Args:
        zero: the ZeRO 3 optimizer.
        saved: its state dict of this rank. Tensors that were swapped out are empty.
        load_states: whether to load states and hyper-parameters, too.
    """
    swapped = zero.optimizer_swapper.swap_params_info
    zero.optimizer_swapper.purge_state()
    for info in swapped.values():
        info.release_memory()  # a pipelined swapper leaves the tensors in shared buffers
    if load_states:
        with partitions_in_groups(zero):
            zero.optimizer.load_state_dict(_without_swapped(saved["optimizer_state_dict"], zero.optimizer, swapped))
        zero.loss_scaler = saved["loss_scaler"]
        zero.dynamic_loss_scale = saved["dynamic_loss_scale"]
        zero.overflow = saved["overflow"]
    partitions = zip(zero.fp32_partitioned_groups_flat, saved["fp32_flat_groups"], strict=True)
    for sub_group_id, (partition, saved_partition) in enumerate(partitions):
        if not zero._swappable_optimizer_subgroup(sub_group_id):
            partition.data.copy_(saved_partition)
            zero._reassign_or_swap_out_partitioned_parameters(sub_group_id)
        elif load_states and zero.optimizer.state[partition]:
            moments = [zero.optimizer.state[partition][name] for name in MOMENTS]
            for name, moment in zip(MOMENTS, moments, strict=True):
                moment.ds_id = f"{name}-{partition.ds_id}"  # the swapper names the file by it
            swapped[partition.ds_id].add_state_tensors(moments)


def _without_swapped(
    saved: Mapping[str, Any], optimizer: MomentOptimizer, swapped: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a state dict with empty moments for swapped partitions.

    Their values are in files.
    """
    states = dict(saved["state"])
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        for key, partition in zip(group["params"], own["params"], strict=False):
            if states.get(key) and partition.ds_id in swapped:
                states[key] = {**states[key], **{name: torch.empty(0) for name in MOMENTS}}
    return {**saved, "state": states}
