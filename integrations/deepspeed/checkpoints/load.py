"""DeepSpeed checkpoints of this package's optimizers: refusals, and what DeepSpeed leaves out when it saves and loads.

A checkpoint is saved whole or not at all, and one that is not whole is never loaded: see `deepspeed_complete`. With
NVMe offload `DeepSpeedEngine.load_checkpoint` leaves the optimizer without states, and small sub-groups with their
initial weights; here both are restored. A checkpoint of another precision would replace the loss scaler; here the
engine's stays. For universal checkpoints see `deepspeed_universal`. All of it is for optimizers of this package only.
"""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import deepspeed
import torch

from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.state.allocation import MOMENTS

from .atomic_save import complete_tag, save_whole
from .failures import failing_together
from .universal import (
    Method,
    allowing_saved_classes,
    load_every_group,
    load_every_group_at_stage_3,
    partitions_in_groups,
    read_optimizer_file,
    restore_frozen_and_buffers,
    save_paddings_of_the_rank,
)


def checkpoint_methods_to_wrap() -> list[tuple[type, str, Callable[[Method], Method]]]:
    """Return (owner, method name, function that wraps the method), for `deepspeed.register`."""
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    zero = deepspeed.runtime.base_optimizer.ZeROOptimizer
    stage_3 = deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    bf16 = deepspeed.runtime.bf16_optimizer.BF16_Optimizer
    return [
        (engine, "save_checkpoint", save_whole),
        (engine, "load_checkpoint", _restore_what_is_left_out),
        (zero, "load_hp_checkpoint_state_from_checkpoint_dir", load_every_group),
        (stage_3, "load_hp_checkpoint_state_from_checkpoint_dir_stage3", load_every_group_at_stage_3),
        (bf16, "state_dict", save_paddings_of_the_rank),
    ]


def refuse_lossy_checkpoints(name: str, config: Mapping[str, Any], states: Sequence[str]) -> None:
    """Refuse the settings under which DeepSpeed cannot save or load what the optimizer called `name` keeps.

    Args:
        name: of the optimizer, for messages.
        config: the DeepSpeed configuration.
        states: the `states` of every parameter group.

    Raises:
        ValueError: naming the setting and the remedy.
    """
    zero = deepspeed.runtime.zero.config.get_zero_config(config)
    universal = (config.get("checkpoint") or {}).get("load_universal", False)
    if zero.elastic_checkpoint and zero.stage > 0:
        raise ValueError(
            f"zero_optimization.elastic_checkpoint=true: DeepSpeed cannot load such checkpoints of {name}; remove it, "
            f"and go through a universal checkpoint to change the number of ranks"
        )
    if universal and zero.stage == 0:
        raise ValueError(
            "checkpoint.load_universal=true with zero_optimization.stage=0: DeepSpeed would load neither weights nor "
            "states; set the stage to 1"
        )
    if zero.offload_optimizer is None or zero.offload_optimizer.device != "nvme" or zero.stage < 3:
        return  # below ZeRO 3 DeepSpeed offloads to the CPU
    where = 'zero_optimization.offload_optimizer.device="nvme"'
    if universal:
        raise ValueError(f'{where} with checkpoint.load_universal=true: DeepSpeed would not load the states; set "cpu"')
    other = sorted({kept for kept in states if kept != "float32"})
    if other:
        raise ValueError(
            f"{where} with states={other[0]!r}: DeepSpeed swaps states as float32 and would change them; set "
            'states="float32" for this optimizer, or "cpu"'
        )


def _restore_what_is_left_out(original: Method) -> Method:
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
        options = (load_module_strict, states, schedulers, load_module_only, custom_load_fn)
        with allowing_saved_classes():  # for TORCH_FORCE_WEIGHTS_ONLY_LOAD=1
            if not isinstance(self.basic_optimizer, MomentOptimizer):
                return original(self, load_dir, tag, *options)
            with failing_together(self) as meet:
                tag = complete_tag(self, load_dir, tag, meet)
                _refuse_other_layout(self, load_dir, tag)
                if not states and self.zero_optimization_partition_weights():
                    _refuse_weights_of_another_tag(load_dir, tag)
                own_scaler = getattr(self.optimizer, "loss_scaler", None)
                loaded = original(self, load_dir, tag, *options)
                if loaded[0] is not None and self.zero_optimization():
                    _restore(self, loaded[0], states and not load_module_only)
                    _keep_loss_scaler(self.optimizer, own_scaler)
        return loaded

    return load_checkpoint


def _refuse_other_layout(engine: Any, load_dir: str, tag: str | None) -> None:
    """Refuse a checkpoint whose files are those of another kind of engine, which DeepSpeed would not say."""
    latest = os.path.join(load_dir, "latest_universal" if engine.load_universal_checkpoint() else "latest")
    if tag is None and os.path.isfile(latest):
        with open(latest) as file:
            tag = file.read().strip()
    folder = os.path.join(load_dir, str(tag))
    if not os.path.isdir(folder):
        return  # DeepSpeed says so itself
    at_stage_3 = engine.zero_optimization_partition_weights()
    saved_at_stage_3 = any(name.startswith("zero_pp_rank_0_mp") and "model" in name for name in os.listdir(folder))
    if at_stage_3 != saved_at_stage_3:
        raise ValueError(
            f"{folder} was saved {'at' if saved_at_stage_3 else 'below'} ZeRO 3, and DeepSpeed cannot load it "
            f"{'at' if at_stage_3 else 'below'} that; set zero_optimization.stage as it was, or take the weights "
            "alone, by zero_to_fp32"
        )
    nvme = engine.zero_nvme_offload_optimizer()
    saved_from_nvme = os.path.isdir(os.path.join(folder, "offloaded_tensors"))
    if nvme != saved_from_nvme:
        raise ValueError(
            f"{folder} was saved {'with' if saved_from_nvme else 'without'} optimizer offload to NVMe, and DeepSpeed "
            f"cannot load it {'with' if nvme else 'without'} that; set zero_optimization.offload_optimizer as it was"
        )
    if nvme:
        _refuse_other_file_names(engine, folder)


def _refuse_weights_of_another_tag(load_dir: str, tag: str | None) -> None:
    """Refuse what DeepSpeed would take silently from the checkpoint that `latest` names, whatever the tag."""
    latest = os.path.join(load_dir, "latest")
    named = None
    if os.path.isfile(latest):
        with open(latest) as file:
            named = file.read().strip()
    if tag is not None and tag != named:
        raise ValueError(
            f"load_optimizer_states=False at ZeRO 3 makes DeepSpeed load the weights of the checkpoint that {latest} "
            f"names, {named!r}, not of {tag!r}; write that into it, or load the states, too"
        )


def _refuse_other_file_names(engine: Any, folder: str) -> None:
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    saved = os.listdir(os.path.join(folder, "offloaded_tensors", f"rank{rank:02d}"))
    for partition_id in engine.optimizer.optimizer_swapper.swap_params_info:
        if f"{partition_id}.tensor.swp" not in saved:
            raise ValueError(
                f"{folder} has no file of partition {partition_id}: DeepSpeed numbers parameters as a process creates "
                "them under ZeRO 3; create models and engines in the order of the run that saved, with its "
                "zero_optimization.sub_group_size and number of ranks"
            )


def _restore(engine: Any, path: str, load_states: bool) -> None:
    """Restore what DeepSpeed has left out.

    Args:
        engine: that has loaded a checkpoint with ZeRO.
        path: the file of model states that it has read.
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
    """Put an engine's own scaler back, unless both it and the checkpoint's adapt their scale.

    A constant scale is the configuration's; that of a bfloat16 checkpoint, 1, would take fp16's place for good.
    """
    if own is not None and not (own.dynamic and zero.loss_scaler.dynamic):
        zero.loss_scaler = own
        zero.dynamic_loss_scale = own.dynamic


def _restore_partitions(zero: Any, saved: Mapping[str, Any], load_states: bool) -> None:
    """Restore what DeepSpeed's load under NVMe offload leaves out; the swapped files are in place already.

    Args:
        zero: the ZeRO 3 optimizer.
        saved: what it saved on this rank. Tensors that were swapped out are empty.
        load_states: whether to load states and hyper-parameters, too.
    """
    swapped = zero.optimizer_swapper.swap_params_info
    zero.optimizer_swapper.purge_state()
    for info in swapped.values():
        info.release_memory()  # a pipelined swapper leaves the tensors on buffers that others use
    if load_states:
        with partitions_in_groups(zero):
            zero.optimizer.load_state_dict(_emptied(saved["optimizer_state_dict"], zero.optimizer, swapped))
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
                moment.ds_id = f"{name}-{partition.ds_id}"  # the swapper's name of the file
            swapped[partition.ds_id].add_state_tensors(moments)


def _emptied(saved: Mapping[str, Any], optimizer: MomentOptimizer, swapped: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose tensors of swapped partitions are as empty as those; their values are in files."""
    states = dict(saved["state"])
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=False):
        for key, partition in zip(group["params"], own["params"], strict=False):
            if states.get(key) and partition.ds_id in swapped:
                states[key] = {**states[key], **{name: torch.empty(0) for name in MOMENTS}}
    return {**saved, "state": states}
