"""Mixins that override methods of DeepSpeed's ZeRO optimizers.

They call DeepSpeed's methods with small tensors instead of gradients:

- norms, where DeepSpeed computes the norm of all gradients or looks for inf and NaN;
- a tensor with one 1.0, where DeepSpeed unscales and clips gradients. DeepSpeed turns it into the factor that the step
  applies.

DeepSpeed itself still reduces the norm over ranks, model-parallel groups and experts.

Without these classes the training is right but moves more bytes per parameter: 74 instead of 30 at ZeRO 1 and 2, 70
instead of 30 at ZeRO 3 (bf16), see docs/deepspeed-passes.md. Tests: deepspeed_runs/test_deepspeed_passes.py for the
bytes, test_deepspeed_fused_step.py for the numbers. Override all methods of a class or
none. One class also fixes an error:

DelayedStateLinks._lazy_init_hp_params_optimizer_state
    `safe_get_full_optimizer_state` raises or hangs for parameters of the second group.
    deepspeed_runs/test_deepspeed_fused_step.py::test_states_are_linked_to_the_parameters_of_all_groups
"""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adax_triton.state.precision import PARAM_DTYPES
from adax_triton.step.external_grads import ExternalGrads

_Wrapper: Any = object  # DeepSpeed's class, which follows the mixin


class DelayedStateLinks(_Wrapper):
    """Link parameters to states once every group has states.

    For ZeRO 1 and 2. DeepSpeed links them after the first group's step, when the other groups have no states.
    """

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        if all(self.optimizer.state.get(master) for master in self.single_partition_of_fp32_groups):
            super()._lazy_init_hp_params_optimizer_state()


class SingleNormPass(_Wrapper):
    """Read gradients once for their norms and for the finiteness check."""

    _norms_by_group: dict[int, list[Tensor]] | None = None

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
        """Return the global norm that DeepSpeed computes from single gradients' norms."""
        if norm_type == 2:
            group = next((index for index, each in self.averaged_gradients.items() if each is gradients), -1)
            norms = (self._norms_by_group or {}).pop(group, None)
            gradients = _norms(gradients) if norms is None else norms
        return super().get_grad_norm_direct(gradients, params, norm_type)

    def _measure_norms(self) -> Tensor:
        """Keep and return the norms of this rank's gradients, shape (gradients,)."""
        groups = sorted(self.averaged_gradients.items())
        self._norms_by_group = {index: _norms(gradients) for index, gradients in groups if gradients is not None}
        norms = [norm for found in self._norms_by_group.values() for norm in found]
        return torch.stack(norms) if norms else torch.zeros(1)


def _norms(gradients: Iterable[Tensor]) -> list[Tensor]:
    gradients = list(gradients)
    # ZeRO 1 also keeps zero gradients of frozen integer parameters.
    read = [each.detach() if each.dtype in PARAM_DTYPES else each.detach().double() for each in gradients]
    norms = list(torch._foreach_norm(read, 2, dtype=torch.float64))
    for norm, gradient in zip(norms, gradients, strict=True):
        if getattr(gradient, "_zero_padding", False):
            norm._zero_padding = True  # type: ignore[attr-defined]  # ZeRO 1 and 2 leave it out of the norm
    return norms


class Zero12Methods(SingleNormPass, DelayedStateLinks):
    """ZeRO 1 and 2 with DeepSpeed's own `step()`, in fewer passes.

    Gradients are read once for check and norm. No pass unscales and clips them.
    """

    _external_grads: ExternalGrads | None = None

    def has_overflow_partitioned_grads_serial(self) -> Tensor:
        """Return whether a gradient of this rank is not finite.

        The result has shape (1,). The norms are kept.
        """
        return ~self._measure_norms().isfinite().all().reshape(1)

    def unscale_and_clip_grads(self, grad_groups_flat: Sequence[Tensor], total_norm: Tensor | None) -> None:
        """Get DeepSpeed's unscale-and-clip factor by scaling a 1.

        The step applies it to the gradients.
        """
        (flat,) = grad_groups_flat
        self._grad_factor = torch.ones(1, dtype=torch.float32, device=flat.device)
        super().unscale_and_clip_grads([self._grad_factor], total_norm)

    def _optimizer_step(self, group_no: int) -> None:
        master = self.single_partition_of_fp32_groups[group_no]
        self.optimizer.set_external_grads(
            [self._external_grads or ExternalGrads(master, [master.grad])], self._grad_factor
        )
        self._external_grads = None
        super()._optimizer_step(group_no)


class Zero3Methods(SingleNormPass):
    """ZeRO 3: the step reads the reduced gradients in place.

    It writes the weights in the model's dtype.
    """

    grad_partitions_flat_buffer: Tensor
    _external_grads: ExternalGrads | None = None
    _staging: Tensor | None = None

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """Return DeepSpeed's result, computed from norms.

        The norms replace DeepSpeed's buffer of all gradients.
        """
        accelerator = get_accelerator()
        buffer = self.grad_partitions_flat_buffer
        self.grad_partitions_flat_buffer = (
            torch.stack(_norms([buffer])) if self.offload_optimizer else self._measure_norms().to(buffer.device)
        )
        if not accelerator.resolves_data_dependency():  # DeepSpeed reads it on a stream of its own
            self.reduce_and_partition_stream.wait_stream(accelerator.current_stream())
        try:
            return super().has_overflow(partition_gradients)
        finally:
            self.grad_partitions_flat_buffer = buffer

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        gradients = self.averaged_gradients[sub_group_id]
        if not get_accelerator().is_synchronized_device():
            for gradient in filter(get_accelerator().on_accelerator, gradients):
                gradient.record_stream(get_accelerator().current_stream())
        master = self.fp32_partitioned_groups_flat[sub_group_id]
        self._external_grads = ExternalGrads(master, gradients, self._low_precision_copy(sub_group_id))
        self.averaged_gradients[sub_group_id] = None

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor | None) -> None:
        """Get DeepSpeed's unscale-and-clip factor by scaling a 1.

        The step applies it to the gradients.
        """
        master = self.fp32_partitioned_groups_flat[sub_group_id]
        stand_in = SimpleNamespace(grad=torch.ones(1, dtype=torch.float32, device=master.device))
        self.fp32_partitioned_groups_flat[sub_group_id] = stand_in
        try:
            super().unscale_and_clip_grads(sub_group_id, total_norm)
        finally:
            self.fp32_partitioned_groups_flat[sub_group_id] = master
        self._grad_factor = stand_in.grad

    def _optimizer_step(self, sub_group_id: int) -> None:
        master = self.fp32_partitioned_groups_flat[sub_group_id]
        # With offload DeepSpeed has no separate gradients to prepare.
        grads = self._external_grads or ExternalGrads(master, [master.grad], self._low_precision_copy(sub_group_id))
        self._external_grads = None
        self.optimizer.set_external_grads([grads], self._grad_factor)
        super()._optimizer_step(sub_group_id)

    def _low_precision_copy(self, sub_group_id: int) -> Tensor | None:
        """Return the tensor for the new weights in the model's dtype.

        None if the model trains the master weights directly.
        """
        master, flat = self.fp32_partitioned_groups_flat[sub_group_id], self.fp16_partitioned_groups_flat[sub_group_id]
        if flat.device == master.device:
            return None if flat.data_ptr() == master.data_ptr() else flat
        if self._staging is None:
            most = max(part.numel() for part in self.fp16_partitioned_groups_flat)
            self._staging = torch.empty(most, dtype=flat.dtype, device=master.device)
            if self.offload_optimizer_pin_memory:
                self._staging = get_accelerator().pin_memory(self._staging)
        return self._staging[: flat.numel()]

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        flat, weights_out = self.fp16_partitioned_groups_flat[sub_group_id], self._low_precision_copy(sub_group_id)
        if weights_out is not None and weights_out is not flat:
            flat.data.copy_(weights_out)
        self._unflatten_partitioned_parameters(sub_group_id)
