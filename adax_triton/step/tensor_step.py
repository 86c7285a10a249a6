"""The tensors that one parameter's update reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.state.allocation import local_state_tensors
from adax_triton.state.dtensor import first_element_index, local_gradient, local_tensor, shard_process_groups
from adax_triton.state.memory_layout import flat_view, is_dense
from adax_triton.state.precision import precision_of
from adax_triton.update.quantization import GROUP


class TensorStep(NamedTuple):
    """Tensors and options for the update of one parameter.

    The tensors are real and on one device.

    param, grad, exp_avg, exp_avg_sq: see `update.reference.adax_update`. Moments are quantized if `states` is
        `"8bit_v16"` or `"8bit"`.
    scalar_row: row index in the scalar table.
    states: format of the moments, see `precision.STATES`. Default: `"float32"`.
    master: remainder or float32 copy of the master weights, see `precision.Precision`. Default: None.
    group_exponents: exponents of quantized moments, one per 32 elements. Default: None.
    stochastic: whether to round the parameter stochastically. Default: False.
    first_element: index of the first element in the full parameter, if this is a shard. Default: 0.
    process_groups: groups of the all-reduce for the gradient norm. Default: none.
    param_is_copy: whether `master` holds the float32 weights and `param` is only written. Default: False.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    scalar_row: int
    states: str = "float32"
    master: Tensor | None = None
    group_exponents: Tensor | None = None
    stochastic: bool = False
    first_element: int = 0
    process_groups: tuple[Any, ...] = ()
    param_is_copy: bool = False

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors `(param, grad, exp_avg, exp_avg_sq)`."""
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq

    @property
    def written(self) -> tuple[Tensor, ...]:
        """The tensors that the update writes: parameter, moments and master."""
        master = () if self.master is None else (self.master,)
        return self.param, self.exp_avg, self.exp_avg_sq, *master

    @property
    def needs_random_bits(self) -> bool:
        """Whether the update rounds stochastically."""
        return self.stochastic or self.states != "float32" or (self.master is not None and self.master.itemsize == 1)

    @property
    def is_plain(self) -> bool:
        """Whether moments are float32, without a master or stochastic rounding."""
        return self.states == "float32" and self.master is None and not self.stochastic

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> TensorStep:
        """Apply `function` to every tensor except `group_exponents`."""
        param, grad, exp_avg, exp_avg_sq = map(function, self.tensors)
        master = None if self.master is None else function(self.master)
        return self._replace(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, master=master)

    def part(self, start: int, end: int) -> TensorStep:
        """Return the step on elements `start` to `end` of 1-D tensors.

        For quantized moments `start` must be a multiple of `GROUP`.
        """
        exponents = self.group_exponents
        if exponents is not None:
            exponents = exponents.view(-1)[start // GROUP : -(-end // GROUP)]
        part = self.map_tensors(lambda tensor: tensor[start:end])
        return part._replace(first_element=self.first_element + start, group_exponents=exponents)

    def flattened(self) -> TensorStep:
        """Return the step on 1-D views in memory order; strides must match."""
        return self.map_tensors(flat_view)


def tensor_step(
    param: Tensor, grad: Tensor, state: Mapping[str, Any], scalar_row: int, group: Mapping[str, Any]
) -> TensorStep:
    """Return the update of one parameter on this rank's tensors."""
    tensors = local_state_tensors(state)
    master = tensors.get("master")
    step = TensorStep(
        local_tensor(param.detach()),
        local_gradient(grad, param),
        tensors["exp_avg"],
        tensors["exp_avg_sq"],
        scalar_row,
        precision_of(state).states,
        master,
        tensors.get("group_exponents"),
        group["weight_rounding"] == "stochastic" and master is None and param.dtype == torch.bfloat16,
        first_element_index(param),
        shard_process_groups(param),
    )
    return step.map_tensors(torch.view_as_real) if param.is_complex() else step


def with_matching_strides(step: TensorStep, copies: list[tuple[Tensor, Tensor]]) -> TensorStep:
    """Return the step on dense tensors with equal strides; copy where needed.

    A gradient with other strides is copied into the parameter's layout. All tensors are replaced by contiguous copies
    if the parameter is not dense, if its strides differ from the strides of its states, or if a tensor is lazily
    negated or conjugated.

    Args:
        step: the tensors.
        copies: receives (original, copy) for each copied tensor that the update writes.
    """
    tensors = (step.grad, *step.written)
    if any(tensor.is_neg() or tensor.is_conj() for tensor in tensors):
        return _contiguous(step, copies)
    if all(tensor.is_contiguous() for tensor in tensors):
        return step
    strides = step.param.stride()
    if is_dense(step.param) and all(tensor.stride() == strides for tensor in step.written):
        if step.grad.stride() != strides:
            grad = step.grad.new_empty_strided(step.grad.shape, strides)
            return step._replace(grad=grad.copy_(step.grad))
        return step
    return _contiguous(step, copies)


def _contiguous(step: TensorStep, copies: list[tuple[Tensor, Tensor]]) -> TensorStep:
    contiguous = step.map_tensors(lambda tensor: tensor.resolve_conj().resolve_neg().contiguous())
    for original, copy in zip(step.written, contiguous.written, strict=True):
        if copy is not original:
            copies.append((original, copy))
    return contiguous
