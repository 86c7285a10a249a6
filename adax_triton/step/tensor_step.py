"""One tensor's share of a step: what it reads and writes, in whatever memory it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adax_triton.state.allocation import local_state_tensors
from adax_triton.state.dtensor import first_element, local_gradient, local_tensor, shard_process_groups
from adax_triton.state.flat_buffer import flat_view, is_dense
from adax_triton.state.precision import precision_of
from adax_triton.update.quantization import GROUP


class TensorStep(NamedTuple):
    """The tensors of one parameter, real and on one device.

    param, grad, exp_avg, exp_avg_sq: as in the update; the moments as codes where `states` is `"8bit_v16"` or `"8bit"`.
    scalar_row: the row of the step's scalars.
    states: how the moments are kept, see `precision.STATES`.
    master: what `param` lacks to be a float32 master weight, or the master copy; see `precision.Precision`.
    group_exponents: of the codes.
    stochastic: round the parameter itself stochastically.
    first_element: its index in the whole parameter, of which this may be a shard.
    param_is_copy: `master` holds the float32 weights, and `param` is only written, whatever it holds.
    process_groups: over which the squares of the gradient are summed for its norm.
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
        """The four tensors that every update has, in the order of every update."""
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq

    @property
    def written(self) -> tuple[Tensor, ...]:
        """The tensors that a step writes element by element: all of `mapped` but the gradient."""
        master = () if self.master is None else (self.master,)
        return self.param, self.exp_avg, self.exp_avg_sq, *master

    @property
    def draws_bits(self) -> bool:
        """Whether a step of these tensors rounds stochastically."""
        return self.stochastic or self.states != "float32" or (self.master is not None and self.master.itemsize == 1)

    @property
    def is_plain(self) -> bool:
        """Whether the tensors are stored as they are computed with, but for the rounding of a cast."""
        return self.states == "float32" and self.master is None and not self.stochastic

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TensorStep:
        """Return this step on what `function` makes of each tensor but the group exponents."""
        param, grad, exp_avg, exp_avg_sq = map(function, self.tensors)
        master = None if self.master is None else function(self.master)
        return self._replace(param=param, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, master=master)

    def part(self, start: int, end: int) -> TensorStep:
        """Return this step on a range of the elements of 1-D tensors; beside codes it starts with a group of them."""
        exponents = self.group_exponents
        if exponents is not None:
            exponents = exponents.view(-1)[start // GROUP : -(-end // GROUP)]
        part = self.mapped(lambda tensor: tensor[start:end])
        return part._replace(first_element=self.first_element + start, group_exponents=exponents)

    def flattened(self) -> TensorStep:
        """Return this step on 1-D views in the order of memory; the tensors must be laid out alike."""
        return self.mapped(flat_view)


def tensor_step(
    param: Tensor, grad: Tensor, state: Mapping[str, Any], scalar_row: int, group: Mapping[str, Any]
) -> TensorStep:
    """Return one parameter's share of a step, on the tensors of this rank."""
    numbers = local_state_tensors(state)
    master = numbers.get("master")
    step = TensorStep(
        local_tensor(param.detach()),
        local_gradient(grad, param),
        numbers["exp_avg"],
        numbers["exp_avg_sq"],
        scalar_row,
        precision_of(state).states,
        master,
        numbers.get("group_exponents"),
        group["weight_rounding"] == "stochastic" and master is None and param.dtype == torch.bfloat16,
        first_element(param),
        shard_process_groups(param),
    )
    return step.mapped(torch.view_as_real) if param.is_complex() else step


def with_matching_strides(step: TensorStep, copies: list[tuple[Tensor, Tensor]]) -> TensorStep:
    """Return the step on dense tensors in which elements of equal indices lie at equal distances from the start.

    Dense tensors of equal strides are so already. A gradient that is not is copied into the parameter's layout. For a
    parameter with gaps, or of another layout than its states, contiguous copies of all take their places, and `copies`
    gets the pairs to copy back. So does a tensor that is negated or conjugated only when it is read.
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
    contiguous = step.mapped(lambda tensor: tensor.resolve_conj().resolve_neg().contiguous())
    for original, copy in zip(step.written, contiguous.written, strict=True):
        if copy is not original:
            copies.append((original, copy))
    return contiguous
