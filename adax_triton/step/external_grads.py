"""Steps of float32 weights from gradients that lie beside them, which also write the weights in another dtype.

Who keeps float32 weights beside those of the model, as ZeRO does, has gradients in the model's dtype, in pieces, and
wants the new weights in that dtype. A cast, a scaling and a copy around a step move more bytes than the step itself;
here they are part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adax_triton.state.allocation import MOMENTS, is_new
from adax_triton.state.flat_buffer import storage_problem, why_not_writable
from adax_triton.state.precision import PARAM_DTYPES, is_quantized
from adax_triton.state.step_counts import is_on_device
from adax_triton.update.quantization import GROUP

from .collect import Collected, ParamWithGrad, check_state, needs_device
from .conditions import StepConditions, check_one_element
from .device_tables import is_capturing
from .tensor_step import TensorStep, tensor_step

_COPY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExternalGrads(NamedTuple):
    """A parameter, and what its step reads and writes beside it.

    param: float32 and contiguous; in a group of the optimizer when it steps.
    grads: tensors on its device, of float dtypes; their elements, one tensor after another, are the gradient.
    image: set to the new weights, rounded to nearest; float32, bfloat16 or float16, contiguous, of as many elements, on
        the same device. None for none.
    """

    param: Tensor
    grads: Sequence[Tensor]
    low_precision_copy: Tensor | None = None


class ExternalStep(NamedTuple):
    """A step of these parameters and no others; the factor of all their gradients, one element, or None for 1."""

    parts: Sequence[ExternalGrads]
    grad_factor: Tensor | None


def checked_external_grads(parts: Sequence[ExternalGrads], grad_factor: Tensor | None, telemetry: bool) -> ExternalStep:
    """Return what was given as a step.

    Raises:
        TypeError: a tensor of the wrong kind or dtype.
        ValueError: one of the wrong size or device, a parameter that is given twice, or telemetry.
    """
    if telemetry:
        raise ValueError("set_external_grads(): not offered with telemetry=True, whose sums are of whole gradients")
    for index, (param, grads, low_precision_copy) in enumerate(parts):
        plain = type(param) in (Tensor, nn.Parameter) and param.is_contiguous() and not param.is_neg()
        if not plain or param.dtype != torch.float32:
            raise TypeError(f"parts[{index}].param: expected a contiguous float32 tensor, got {_kind(param)}")
        given: list[tuple[str, Tensor, tuple[torch.dtype, ...]]] = [
            (f"grads[{position}]", grad, PARAM_DTYPES) for position, grad in enumerate(grads)
        ]
        if low_precision_copy is not None:
            given.append(("low_precision_copy", low_precision_copy, _COPY_DTYPES))
            if low_precision_copy.numel() != param.numel() or not low_precision_copy.is_contiguous():
                raise ValueError(
                    f"parts[{index}].low_precision_copy: {_kind(low_precision_copy)}; expected a contiguous tensor "
                    f"of {param.numel()} elements"
                )
        for name, tensor, dtypes in given:
            if tensor.dtype not in dtypes or tensor.layout != torch.strided:
                raise TypeError(
                    f"parts[{index}].{name}: {_kind(tensor)}; expected one of {', '.join(map(str, dtypes))}"
                )
            problem = storage_problem(tensor)
            if problem is not None:
                raise ValueError(f"parts[{index}].{name}: {problem}")
            if tensor.device != param.device:
                raise ValueError(f"parts[{index}].{name}: on {tensor.device} for a parameter on {param.device}")
        count = sum(grad.numel() for grad in grads)
        if count != param.numel() or not grads:
            raise ValueError(f"parts[{index}].grads: {count} elements for a parameter of {param.numel()}")
    if len({id(part.param) for part in parts}) != len(parts):
        raise ValueError("parts: a parameter is given twice")
    return ExternalStep(parts, check_one_element(grad_factor, "grad_factor"))


def _kind(tensor: object) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)


def collect_external(
    parts: Sequence[ExternalGrads],
    conditions: StepConditions,
    group_of: Mapping[Tensor, int],
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
) -> Collected:
    """Return the parameters of a step, which the host counts; nothing changes.

    Raises:
        ValueError: clipping or a gradient scaler; a parameter in no group; a group or state whose steps the device
            counts; a state that does not fit.
        RuntimeError: a CUDA graph is being captured.
    """
    if any(map(is_capturing, {part.param.device for part in parts})):
        raise RuntimeError("step(): set_external_grads() does not support CUDA graph capture; step outside the capture")
    if not conditions.is_default:
        raise ValueError(
            "step(): set_external_grads() does not support max_grad_norm, grad_scale or found_inf; "
            "pass grad_factor instead"
        )
    for index, part in enumerate(parts):
        if part.param not in group_of:
            raise ValueError(f"parts[{index}].param: in none of the optimizer's groups")
        group, state = param_groups[group_of[part.param]], states.get(part.param, {})
        if needs_device(group) or is_on_device(state.get("step"), part.param):
            raise ValueError(
                f"parts[{index}].param: its steps are counted on the device; set_external_grads() needs "
                "capturable=False, a number as the learning rate, and no earlier steps with grad_scale or max_grad_norm"
            )
        if not is_new(state):
            check_state(state, part.param)
        problem = why_not_writable(part.param)
        if problem is not None:
            raise ValueError(f"parts[{index}].param: {problem}")
    return Collected(params_with_external_grads(parts, group_of), False)


def params_with_external_grads(parts: Sequence[ExternalGrads], group_of: Mapping[Tensor, int]) -> list[ParamWithGrad]:
    """Return the parameters of parts, all of them in groups, as a step takes them."""
    return [
        ParamWithGrad(part.param, group_of[part.param], tuple(part.grads), part.low_precision_copy, True)
        for part in parts
    ]


def tensor_steps(
    one: ParamWithGrad, state: dict[str, Any], scalar_row: int, group: Mapping[str, Any], norm_process_group: Any
) -> list[TensorStep]:
    """Return the tensors of one parameter's step: one piece for each external gradient, else one.

    Args:
        one: the parameter.
        state: its state; moments that are not contiguous are made so for external gradients.
        scalar_row: of the table of scalars.
        group: the parameter's.
        norm_process_group: over which the gradients of parameters that are no DTensors are sharded, or None.
    """
    if not one.is_external:
        step = tensor_step(one.param, one.grads[0], state, scalar_row, group)
        if norm_process_group is not None and not step.process_groups:
            step = step._replace(process_groups=(norm_process_group,))
        return [step]
    for name in MOMENTS:
        state[name] = state[name].resolve_neg().contiguous()
    whole = tensor_step(one.param, one.param, state, scalar_row, group).flattened()
    if one.low_precision_copy is not None:
        whole = whole._replace(param=one.low_precision_copy.detach().view(-1), master=whole.param, param_is_copy=True)
    steps = []
    start = 0
    for grad in _pieces(one.grads, is_quantized(whole.states)):
        steps.append(whole.part(start, start + grad.numel())._replace(grad=grad))
        start += grad.numel()
    return steps


def _pieces(grads: Sequence[Tensor], in_groups: bool) -> list[Tensor]:
    """Return the gradient in as few 1-D tensors as reading it in place allows."""
    pieces: list[Tensor] = []
    for grad in grads:
        flat = grad.detach().resolve_neg().reshape(-1)
        if pieces and _follows(pieces[-1], flat):
            pieces[-1] = pieces[-1].as_strided((pieces[-1].numel() + flat.numel(),), (1,))
        else:
            pieces.append(flat)
    if in_groups and any(piece.numel() % GROUP for piece in pieces[:-1]):
        return [torch.cat(pieces)]  # codes have one exponent per group
    return pieces


def _follows(first: Tensor, second: Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
    )
