"""Methods of DeepSpeed that do wrong to optimizers of this package while they train; others keep them as they are.

- `FP16_UnfusedOptimizer.initialize_optimizer_states` (stage 0 with bf16) steps on zero gradients, which would count as
  the first step of the schedule and decay the weights once more. Here it does not.
- `OneCycle` writes 0.99 over every `betas[1]`, of which AdaX has another idea. Here it cycles `betas[0]` alone.
- `offload_states` and `reload_states` at ZeRO 3 take nothing but FusedAdam. Here they move all states of the optimizer.
- Before 0.19.8, ZeRO 3 looks for gradients that are not finite in fp16 alone. Here it skips such steps in every dtype.
- Offload to NVMe takes other gradients than the model's where a large one starts within a sub-group at an element that
  file access cannot: files are read to aligned memory only. Here its part before the next such element stays in memory.
"""

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import offload_optimizer_states, reload_optimizer_states
from packaging.version import Version
from torch import Tensor

from adax_triton.moment_optimizer import MomentOptimizer

Method = Callable[..., Any]


def methods_to_repair() -> list[tuple[type, str, Callable[[Method], Method]]]:
    """Return (owner, method name, function that wraps the method), for `deepspeed.register`."""
    stage_3 = deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3
    unfused = deepspeed.runtime.fp16.unfused_optimizer.FP16_UnfusedOptimizer
    overflow = (stage_3, "_overflow_check_and_loss_scale_update", _check_every_dtype)
    return [
        *([overflow] if Version(deepspeed.__version__) < Version("0.19.8") else []),
        (unfused, "initialize_optimizer_states", _skip_zero_gradient_step),
        (deepspeed.runtime.lr_schedules.OneCycle, "_initialize_momentum", _keep_second_betas),
        (stage_3, "offload_states", _offload_own_states),
        (stage_3, "reload_states", _reload_own_states),
        (OptimizerSwapper, "_adjust_for_misaligned_lengths", _align_starts),
    ]


def _skip_zero_gradient_step(original: Method) -> Method:
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


def _check_every_dtype(original: Method) -> Method:
    @functools.wraps(original)
    def _overflow_check_and_loss_scale_update(self: Any) -> Any:
        if isinstance(self.optimizer, MomentOptimizer) and self.dtype != torch.float16:
            self.check_overflow()
        return original(self)

    return _overflow_check_and_loss_scale_update


def _keep_second_betas(original: Method) -> Method:
    @functools.wraps(original)
    def _initialize_momentum(
        self: Any,
        optimizer: torch.optim.Optimizer,
        cycle_min_mom: Any,
        cycle_max_mom: Any,
        decay_mom_rate: float,
        last_batch_iteration: int,
    ) -> None:
        second_betas = [group.get("betas", (None, None))[1] for group in optimizer.param_groups]
        original(self, optimizer, cycle_min_mom, cycle_max_mom, decay_mom_rate, last_batch_iteration)
        if isinstance(optimizer, MomentOptimizer):
            for name in ("min_moms", "max_moms"):
                pairs = zip(getattr(self, name), second_betas, strict=True)
                setattr(self, name, [(moms[0], beta2) for moms, beta2 in pairs])
            for group, beta2 in zip(optimizer.param_groups, second_betas, strict=True):
                group["betas"] = (group["betas"][0], beta2)

    return _initialize_momentum


def _offload_own_states(original: Method) -> Method:
    @functools.wraps(original)
    def offload_states(
        self: Any,
        include: Container[OffloadStateTypeEnum] | None = None,
        device: OffloadDeviceEnum = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        if isinstance(self.optimizer, MomentOptimizer):
            weights = include is None or OffloadStateTypeEnum.lp_params in include
            if weights and not all(param.requires_grad for param in self.module.parameters()):
                raise ValueError(
                    "offload_states with lp_params: at ZeRO 3 DeepSpeed cannot move the weights of a model with frozen "
                    "parameters; name the other states in include"
                )
            own = {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states} - self.offloaded_states
            moved = own if include is None else {kind for kind in own if kind in include}
            if OffloadStateTypeEnum.hp_params in moved:
                for partition in self.fp32_partitioned_groups_flat:
                    pinned = pin_memory and partition.device.type != "cpu"
                    copy = torch.empty_like(partition, device=device.value, pin_memory=pinned)
                    partition.data = copy.copy_(partition, non_blocking=non_blocking)
            if OffloadStateTypeEnum.optim_states in moved:
                offload_optimizer_states(self.optimizer, device.value, pin_memory, non_blocking)
            self.offloaded_states |= moved  # what DeepSpeed is not to move
        original(self, include, device, pin_memory, non_blocking)

    return offload_states


def _reload_own_states(original: Method) -> Method:
    @functools.wraps(original)
    def reload_states(self: Any, non_blocking: bool = False) -> None:
        offloaded = None
        if isinstance(self.optimizer, MomentOptimizer) and OffloadStateTypeEnum.optim_states in self.offloaded_states:
            device = get_accelerator().current_device_name()
            offloaded = reload_optimizer_states(self.optimizer, device, non_blocking)
            self.offloaded_states.remove(OffloadStateTypeEnum.optim_states)
        original(self, non_blocking)
        del offloaded  # until here, where the copies are done

    return reload_states


def _align_starts(original: Method) -> Method:
    @functools.wraps(original)
    def _adjust_for_misaligned_lengths(self: Any, tensors: Sequence[Tensor], offsets: Sequence[int]) -> Any:
        if not isinstance(self.optimizer, MomentOptimizer):
            return original(self, tensors, offsets)
        parts, starts = [], []
        for tensor, offset in zip(tensors, offsets, strict=True):
            head = min(-offset % self.numel_alignment, tensor.numel())
            for start, end in ((0, head), (head, tensor.numel())):
                if start < end:
                    parts.append(tensor[start:end])
                    starts.append(offset + start)
        return original(self, parts, starts)

    return _adjust_for_misaligned_lengths
