"""Replacement `step()` methods of ZeRO 1, ZeRO 2 and BF16_Optimizer.

They do the same as DeepSpeed's, in the same order, without the extra passes over gradients and weights. They are used
only if the hash of DeepSpeed's `step()` is in `VERIFIED_STEPS`: they were compared with that source.
"""

import ast
import copy
import functools
import hashlib
import inspect
import sys
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime import utils as runtime_utils  # as a module, because older versions lack some functions
from deepspeed.runtime.zero import stage_1_and_2
from torch import Tensor

from adax_triton.state.precision import PARAM_DTYPES
from adax_triton.step.external_grads import ExternalGrads

from .zero_methods import Zero12Methods

# Class name -> {`step_hash` of the class: the newest DeepSpeed that has it}.
VERIFIED_STEPS = {
    "DeepSpeedZeroOptimizer": {"2debb4f6bc7c9f6abd155e63b4ab3e2c195e97e854d74f152cd97af220e7d294": "0.19.8"},
    "BF16_Optimizer": {"67ae0c483bb4b2e26aac22cdd1d298861de0a61b39d36fd5c11fefa7a3b189ae": "0.19.8"},
}
_CLIP_EPS = 1e-6  # as in deepspeed.runtime.utils.clip_tensors_by_global_norm


@functools.cache
def methods_of(upstream: type) -> dict[str, ast.FunctionDef]:
    """Return {name: source} of the methods that a class itself defines.

    The result is empty if the module has no source. `inspect.signature` does not work here, because DeepSpeed's
    decorators hide signatures.
    """
    try:
        module = ast.parse(inspect.getsource(sys.modules[upstream.__module__]))
    except OSError:
        return {}
    (definition,) = (item for item in module.body if isinstance(item, ast.ClassDef) and item.name == upstream.__name__)
    return {item.name: item for item in definition.body if isinstance(item, ast.FunctionDef)}


def step_hash(upstream: type) -> str:
    """Return the SHA-256 of a class's `step`, without comments, docstring and formatting."""
    function = copy.deepcopy(methods_of(upstream)["step"])
    if ast.get_docstring(function) is not None:
        del function.body[0]
    return hashlib.sha256(ast.unparse(function).encode()).hexdigest()


def is_verified(upstream: type) -> bool:
    """Return whether the `step` of a DeepSpeed class is in `VERIFIED_STEPS`."""
    return "step" in methods_of(upstream) and step_hash(upstream) in VERIFIED_STEPS.get(upstream.__name__, {})


class Zero12Step(Zero12Methods):
    """ZeRO 1 and 2: the step reads gradient pieces in place.

    It writes the weights in the model's dtype.
    """

    def step(self, closure: Any = None) -> None:
        """Do the same as DeepSpeed's step, which also ignores `closure`."""
        self.micro_step_id = stage_1_and_2.INITIAL_MICRO_STEP_ID
        self._wait_for_offload_copies()
        if self.cpu_offload:
            self._offload_accumulated_param_ids: set[int] = set()
        scale = self.loss_scale
        norm = self._norm_if_finite()
        self._update_scale(self.overflow)
        if self.overflow:
            self._drop_step()
            return
        if norm is not None:
            self._global_grad_norm = norm / scale
        for index in range(len(self.bit16_groups)):
            self._step_group(index, norm)
        if self.cpu_offload:
            self.reset_cpu_buffers()
        self.timers(stage_1_and_2.OPTIMIZER_ALLGATHER_TIMER).start()
        runtime_utils.all_gather_dp_groups(
            groups_flat=self.bit16_groups_flat,
            partitioned_param_groups=self.parallel_partitioned_bit16_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )
        self.timers(stage_1_and_2.OPTIMIZER_ALLGATHER_TIMER).stop()
        for index in range(len(self.bit16_groups)):
            self._update_model_bit16_weights(index)
        self.timers.log(stage_1_and_2.OPTIMIZER_TIMERS)

    def _norm_if_finite(self) -> Tensor | None:
        if not self.compute_grad_norm:
            self._global_grad_norm = None
        self.overflow: bool = False
        if self.check_grad_overflow:
            self.check_overflow(partition_gradients=self.partition_gradients)
        if self.overflow or not self.compute_grad_norm:
            return None
        norm: Tensor = self.scaled_global_norm()
        if self.dtype != torch.bfloat16 or self.check_grad_overflow:
            self.overflow = runtime_utils.is_invalid_grad_norm(norm)
        return norm

    def _drop_step(self) -> None:
        if self.compute_grad_norm:
            self._global_grad_norm = float("inf")
        self.zero_grad(set_to_none=True)
        self._release_preflattened_grad_buffers()
        if self.cpu_offload:
            self.reset_cpu_buffers()
        else:
            for index in self.averaged_gradients:
                self.averaged_gradients[index] = self.all_grad_tensors[index] = None
        for timer in stage_1_and_2.OPTIMIZER_TIMERS:
            self.timers(timer).start()
            self.timers(timer).stop()

    def _step_group(self, index: int, norm: Tensor | None) -> None:
        self.timers(stage_1_and_2.OPTIMIZER_GRADIENTS_TIMER).start()
        master = self.single_partition_of_fp32_groups[index]
        rank = comm.get_rank(group=self.real_dp_process_group[index])
        model_weights = self.parallel_partitioned_bit16_groups[index][rank]
        if self.cpu_offload:
            weights_out, gradients = self.param_buffer_of_bit16_for_cpu_offload_groups[index], [master.grad]
        else:
            self.free_grad_in_param_list(self.params_not_in_partition[index])
            weights_out, gradients = model_weights, self._gradient_pieces(index, master)
        self._external_grads = ExternalGrads(master, gradients, weights_out)
        self.unscale_and_clip_grads([master], norm)
        self.timers(stage_1_and_2.OPTIMIZER_GRADIENTS_TIMER).stop()
        self.timers(stage_1_and_2.OPTIMIZER_STEP_TIMER).start()
        self._optimizer_step(index)
        if self.cpu_offload:
            model_weights.data.copy_(weights_out.data, non_blocking=True)
        else:
            self.free_grad_in_param_list(self.params_in_partition[index])
            self.all_grad_tensors[index] = None
        self._release_preflattened_grad_buffers(index)
        self.averaged_gradients[index] = None
        self.timers(stage_1_and_2.OPTIMIZER_STEP_TIMER).stop()

    def _gradient_pieces(self, index: int, master: Tensor) -> list[Tensor]:
        flat = self._get_preflattened_grad_partition(index)
        given = list(self.averaged_gradients[index]) if flat is None else [flat]
        pieces = [piece if piece.dtype in PARAM_DTYPES else piece.to(master.dtype) for piece in given]
        missing = master.numel() - sum(piece.numel() for piece in pieces)
        if missing > 0:  # the last partition is padded
            pieces.append(torch.zeros(missing, dtype=pieces[0].dtype if pieces else master.dtype, device=master.device))
        return pieces


class BF16Step:
    """BF16_Optimizer: the step clips gradients and also writes bfloat16 weights."""

    @torch.no_grad()
    def step(self: Any, closure: Any = None) -> None:
        """Do DeepSpeed's step.

        Raises:
            NotImplementedError: a closure is given.
        """
        if closure is not None:
            raise NotImplementedError(f"{type(self).__name__} does not support a closure; call engine.step()")
        self.overflow = False
        gradients, _ = self.get_grads_for_norm()
        norm = runtime_utils.get_global_norm_of_tensors(input_tensors=gradients, mpu=self.mpu, norm_type=self.norm_type)
        self._global_grad_norm = norm
        if runtime_utils.is_invalid_grad_norm(norm):
            self.overflow = True
            self._global_grad_norm = float("inf")
            self.clear_hp_grads()
            self.clear_lp_grads()
            return
        factor = (self.clip_grad / (norm + _CLIP_EPS)).clamp(max=1.0) if self.clip_grad > 0.0 else None
        parts = zip(
            self.fp32_groups_flat_partition,
            self.fp32_groups_gradient_flat_partition,
            self.bf16_partitioned_groups,
            self.real_dp_process_group,
            strict=True,
        )
        self.optimizer.set_external_grads(
            [
                ExternalGrads(master, [gradient], partitions[comm.get_rank(group=group)])
                for master, gradient, partitions, group in parts
            ],
            factor,
        )
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        runtime_utils.all_gather_dp_groups(
            groups_flat=self.bf16_groups_flat,
            partitioned_param_groups=self.bf16_partitioned_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )
        self.clear_hp_grads()
