"""Patch the DeepSpeed methods that break AdaX training; `registration` lists the failures.

Each function takes the original method and returns its replacement. Other optimizers keep the original.
"""

import functools
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
from deepspeed.runtime.zero.offload_states import offload_optimizer_states, reload_optimizer_states
from torch import Tensor

from adax_triton.moment_optimizer import MomentOptimizer

Method = Callable[..., Any]


def skip_zero_gradient_step(original: Method) -> Method:
    """Replace `FP16_UnfusedOptimizer.initialize_optimizer_states`, which steps on zero gradients (stage 0, bf16)."""

    @functools.wraps(original)
    def initialize_optimizer_states(self: Any) -> None:
        if not isinstance(self.optimizer, MomentOptimizer):
            original(self)
            return
        # DeepSpeed takes this step to create the states. AdaX creates them in its first step. Only clear the gradients,
        # as that step does.
        for group in (*self.fp16_groups, *self.fp32_groups):
            for param in group:
                param.grad = None

    return initialize_optimizer_states


def check_overflow_in_every_dtype(original: Method) -> Method:
    """Replace `_overflow_check_and_loss_scale_update` of ZeRO 3.

    Before DeepSpeed 0.19.8 it looks for inf in fp16 only.
    """

    @functools.wraps(original)
    def _overflow_check_and_loss_scale_update(self: Any) -> Any:
        if isinstance(self.optimizer, MomentOptimizer) and self.dtype != torch.float16:
            self.check_overflow()
        return original(self)

    return _overflow_check_and_loss_scale_update


def keep_beta2(original: Method) -> Method:
    """Replace `OneCycle._initialize_momentum`, which sets every `betas[1]` to 0.99; AdaX needs its own."""

    @functools.wraps(original)
    def _initialize_momentum(
        self: Any,
        optimizer: torch.optim.Optimizer,
        cycle_min_mom: Any,
        cycle_max_mom: Any,
        decay_mom_rate: float,
        last_batch_iteration: int,
    ) -> None:
        own = [group.get("betas", (None, None))[1] for group in optimizer.param_groups]
        original(self, optimizer, cycle_min_mom, cycle_max_mom, decay_mom_rate, last_batch_iteration)
        if isinstance(optimizer, MomentOptimizer):
            for name in ("min_moms", "max_moms"):
                pairs = zip(getattr(self, name), own, strict=True)
                setattr(self, name, [(beta1, beta2) for (beta1, _), beta2 in pairs])
            for group, beta2 in zip(optimizer.param_groups, own, strict=True):
                group["betas"] = (group["betas"][0], beta2)

    return _initialize_momentum


def offload_adax_states(original: Method) -> Method:
    """Replace `DeepSpeedZeroOptimizer_Stage3.offload_states`, which moves the states of FusedAdam only."""

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
                    "parameters; pass include= without lp_params"
                )
            moved_here = {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states} - self.offloaded_states
            moved = moved_here if include is None else {kind for kind in moved_here if kind in include}
            if OffloadStateTypeEnum.hp_params in moved:
                for partition in self.fp32_partitioned_groups_flat:
                    pinned = pin_memory and partition.device.type != "cpu"
                    copy = torch.empty_like(partition, device=device.value, pin_memory=pinned)
                    partition.data = copy.copy_(partition, non_blocking=non_blocking)
            if OffloadStateTypeEnum.optim_states in moved:
                offload_optimizer_states(self.optimizer, device.value, pin_memory, non_blocking)
            self.offloaded_states |= moved  # DeepSpeed then leaves these alone
        original(self, include, device, pin_memory, non_blocking)

    return offload_states


def reload_adax_states(original: Method) -> Method:
    """Replace `DeepSpeedZeroOptimizer_Stage3.reload_states`, the inverse of `offload_states`."""

    @functools.wraps(original)
    def reload_states(self: Any, non_blocking: bool = False) -> None:
        offloaded = None
        if isinstance(self.optimizer, MomentOptimizer) and OffloadStateTypeEnum.optim_states in self.offloaded_states:
            device = get_accelerator().current_device_name()
            offloaded = reload_optimizer_states(self.optimizer, device, non_blocking)
            self.offloaded_states.remove(OffloadStateTypeEnum.optim_states)
        original(self, non_blocking)
        del offloaded  # kept until here, because the copies from it may be asynchronous

    return reload_states


def align_gradient_starts(original: Method) -> Method:
    """Replace `OptimizerSwapper._adjust_for_misaligned_lengths`, which splits gradients for files on NVMe.

    DeepSpeed reads files only into aligned memory. It aligns the end of a gradient but not its start. Here the part
    before the first aligned element stays in memory.
    """

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
