"""Methods in place of those of DeepSpeed's ZeRO optimizers; each class is a mixin before the optimizer's own.

What DeepSpeed computes on whole gradients is left to it, on stand-ins of one element: norms in place of gradients, and
a 1 in place of a gradient to be scaled. All that it does across ranks, for model parallelism and for experts remains
its own that way, whatever the version.
"""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from adax_triton.state.precision import PARAM_DTYPES
from adax_triton.step.external_grads import ExternalGrads

_Wrapper: Any = object  # what the mixins come before


class LateLinks(_Wrapper):
    """ZeRO 1 and 2: parameters are linked to their states when all groups have some, not after the first one's step."""

    def _lazy_init_hp_params_optimizer_state(self) -> None:
        if all(self.optimizer.state.get(master) for master in self.single_partition_of_fp32_groups):
            super()._lazy_init_hp_params_optimizer_state()


class OneRead(_Wrapper):
    """Gradients are read once for their norms, from which it follows too whether all are finite."""

    # By the identity of a list of gradients, which is kept with it until the norm is taken.
    _measured: dict[int, tuple[Any, list[Tensor]]] | None = None

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
        """As DeepSpeed's, of norms in place of gradients."""
        if norm_type == 2:
            measured = (self._measured or {}).pop(id(gradients), None)
            gradients = _norms(gradients) if measured is None else measured[1]
        return super().get_grad_norm_direct(gradients, params, norm_type)

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """As DeepSpeed's; what was measured of gradients that are dropped goes with them."""
        found: bool = super().has_overflow(partition_gradients)
        if found:
            self._measured = None
        return found

    def _measure(self) -> Tensor:
        lists = [self.averaged_gradients[index] for index in sorted(self.averaged_gradients)]
        self._measured = {id(gradients): (gradients, _norms(gradients)) for gradients in lists if gradients is not None}
        norms = [norm for _, found in self._measured.values() for norm in found]
        return torch.stack(norms) if norms else torch.zeros(1)


def _norms(gradients: Iterable[Tensor]) -> list[Tensor]:
    gradients = list(gradients)
    # ZeRO 1 has gradients of frozen integers too, which are 0.
    read = [each.detach() if each.dtype in PARAM_DTYPES else each.detach().double() for each in gradients]
    norms = list(torch._foreach_norm(read, 2, dtype=torch.float64))
    for norm, gradient in zip(norms, gradients, strict=True):
        if getattr(gradient, "_zero_padding", False):
            norm._zero_padding = True  # type: ignore[attr-defined]  # ZeRO 1 and 2 have it count for no parameter
    return norms


class Zero12Hooks(OneRead, LateLinks):
    """ZeRO 1 and 2 with a `step()` of DeepSpeed's: one read for check and norm, and no pass to unscale and clip."""

    _part: ExternalGrads | None = None

    def has_overflow_partitioned_grads_serial(self) -> Tensor:
        """As DeepSpeed's, by the norms, which are kept."""
        return ~self._measure().isfinite().all().reshape(1)

    def unscale_and_clip_grads(self, grad_groups_flat: Sequence[Tensor], total_norm: Tensor | None) -> None:
        """Have DeepSpeed scale a 1 in place of the gradient: the factor that the step then multiplies by."""
        (flat,) = grad_groups_flat
        self._grad_factor = torch.ones(1, dtype=torch.float32, device=flat.device)
        super().unscale_and_clip_grads([self._grad_factor], total_norm)

    def _optimizer_step(self, group_no: int) -> None:
        master = self.single_partition_of_fp32_groups[group_no]
        self.optimizer.set_external_grads([self._part or ExternalGrads(master, [master.grad])], self._grad_factor)
        self._part = None
        super()._optimizer_step(group_no)


class Zero3Hooks(OneRead):
    """ZeRO 3: the step reads gradients where they were reduced to, and writes the weights in the model's dtype."""

    grad_partitions_flat_buffer: Tensor
    _part: ExternalGrads | None = None
    _staging: Tensor | None = None

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """As DeepSpeed's, which looks through a buffer of all gradients, by norms, which are kept."""
        accelerator = get_accelerator()
        buffer = self.grad_partitions_flat_buffer
        self.grad_partitions_flat_buffer = (
            torch.stack(_norms([buffer])) if self.offload_optimizer else self._measure().to(buffer.device)
        )
        if not accelerator.resolves_data_dependency():  # DeepSpeed looks at it on a stream of its own
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
        self._part = ExternalGrads(
            self.fp32_partitioned_groups_flat[sub_group_id], gradients, self._written_beside(sub_group_id)
        )
        self.averaged_gradients[sub_group_id] = None

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor | None) -> None:
        """Have DeepSpeed scale a 1 in place of the gradient: the factor that the step then multiplies by."""
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
        part = self._part or ExternalGrads(master, [master.grad], self._written_beside(sub_group_id))  # offloaded
        self._part = None
        self.optimizer.set_external_grads([part], self._grad_factor)
        super()._optimizer_step(sub_group_id)

    def _written_beside(self, sub_group_id: int) -> Tensor | None:
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
        flat, written = self.fp16_partitioned_groups_flat[sub_group_id], self._written_beside(sub_group_id)
        if written is not None and written is not flat:
            flat.data.copy_(written)
        self._unflatten_partitioned_parameters(sub_group_id)
