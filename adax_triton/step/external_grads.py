"""Update float32 weights from external gradients and write a low-precision copy.

ZeRO keeps float32 weights in addition to the model's 16-bit weights. A gradient is one or more 16-bit tensors, and ZeRO
needs the new weights in 16 bits. A separate cast, scaling and copy move more bytes than the update; here the update
does all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adax_triton.state.allocation import MOMENTS, is_new
from adax_triton.state.memory_layout import storage_problem, write_problem
from adax_triton.state.precision import PARAM_DTYPES, is_quantized
from adax_triton.state.step_counts import can_increment_on_device
from adax_triton.update.quantization import GROUP

from .collect import Collected, ParamWithGrad, check_state, group_counts_on_device
from .device_tables import is_capturing
from .gradient_handling import GradientHandling, check_one_element
from .tensor_step import TensorStep, tensor_step

_COPY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ExternalGrads(NamedTuple):
    """A parameter with external gradients and an optional low-precision copy.

    param: float32 and contiguous. It must be in one of the optimizer's groups at `step()`.
    grads: floating-point tensors on the same device. Concatenated, their elements are the gradient.
    low_precision_copy: receives the new weights, rounded to nearest; float32, bfloat16 or float16, contiguous, with the
        same number of elements and device. Default: None, no copy.
    """

    param: Tensor
    grads: Sequence[Tensor]
    low_precision_copy: Tensor | None = None


class ExternalStep(NamedTuple):
    """A step that updates only the parameters of `parts`."""

    parts: Sequence[ExternalGrads]
    grad_factor: Tensor | None  # factor of all gradients, 1 element; None means 1


def checked_external_grads(parts: Sequence[ExternalGrads], grad_factor: Tensor | None, telemetry: bool) -> ExternalStep:
    """Validate the arguments of `set_external_grads` and return them as a step.

    Raises:
        TypeError: a tensor has the wrong kind or dtype.
        ValueError: a tensor has the wrong size or device, a parameter occurs twice, or `telemetry` is set.
    """
    if telemetry:
        raise ValueError("set_external_grads() does not support telemetry=True; make the optimizer without telemetry")
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
                    f"parts[{index}].low_precision_copy: expected a contiguous tensor of {param.numel()} elements, got "
                    f"{_kind(low_precision_copy)}"
                )
        for name, tensor, dtypes in given:
            if tensor.dtype not in dtypes or tensor.layout != torch.strided:
                raise TypeError(
                    f"parts[{index}].{name}: expected a dense tensor of {', '.join(map(str, dtypes))}, got "
                    f"{_kind(tensor)}"
                )
            problem = storage_problem(tensor)
            if problem is not None:
                raise ValueError(f"parts[{index}].{name} {problem}")
            if tensor.device != param.device:
                raise ValueError(
                    f"parts[{index}].{name}: expected a tensor on {param.device}, as the parameter, got {tensor.device}"
                )
        count = sum(grad.numel() for grad in grads)
        if count != param.numel() or not grads:
            raise ValueError(
                f"parts[{index}].grads: expected {param.numel()} elements in all, as in the parameter, got {count}"
            )
    if len({id(part.param) for part in parts}) != len(parts):
        raise ValueError("parts: a parameter occurs twice; pass all its gradients in one ExternalGrads")
    return ExternalStep(parts, check_one_element(grad_factor, "grad_factor"))


def _kind(tensor: object) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)


def collect_external(
    parts: Sequence[ExternalGrads],
    handling: GradientHandling,
    group_of: Mapping[Tensor, int],
    param_groups: Sequence[Mapping[str, Any]],
    states: Mapping[Tensor, Mapping[str, Any]],
) -> Collected:
    """Validate the parameters of an external-gradient step. Nothing changes.

    Returns:
        The parameters; the host counts their steps.

    Raises:
        TypeError, ValueError: the step clips or has a GradScaler; a parameter is in no group or is device-counted; a
            state does not fit its parameter.
        RuntimeError: a CUDA graph is being captured.
    """
    if any(map(is_capturing, {part.param.device for part in parts})):
        raise RuntimeError("step(): set_external_grads() does not support CUDA graph capture; step outside the capture")
    if not handling.is_default:
        raise ValueError(
            "step(): set_external_grads() does not support max_grad_norm, grad_scale or found_inf; "
            "pass grad_factor instead"
        )
    for index, part in enumerate(parts):
        if part.param not in group_of:
            raise ValueError(f"parts[{index}].param is in none of the optimizer's groups; call add_param_group() first")
        group, state = param_groups[group_of[part.param]], states.get(part.param, {})
        if group_counts_on_device(group) or can_increment_on_device(state.get("step"), part.param):
            raise ValueError(
                f"parts[{index}].param: its steps are counted on the device; set_external_grads() needs "
                "capturable=False, a number or CPU tensor as lr, and no earlier steps with grad_scale or max_grad_norm"
            )
        if not is_new(state):
            check_state(state, part.param)
        problem = write_problem(part.param)
        if problem is not None:
            raise ValueError(f"parts[{index}].param {problem}")
    return Collected(params_with_external_grads(parts, group_of), False)


def params_with_external_grads(parts: Sequence[ExternalGrads], group_of: Mapping[Tensor, int]) -> list[ParamWithGrad]:
    """Convert external gradients to `ParamWithGrad`s. Every parameter must be in a group."""
    return [
        ParamWithGrad(part.param, group_of[part.param], tuple(part.grads), part.low_precision_copy, True)
        for part in parts
    ]


def tensor_steps(
    item: ParamWithGrad, state: dict[str, Any], scalar_row: int, group: Mapping[str, Any], norm_process_group: Any
) -> list[TensorStep]:
    """Return one `TensorStep` per gradient piece of a parameter.

    Args:
        item: the parameter with its gradients.
        state: its state. With external gradients, its moments are replaced by contiguous copies where needed.
        scalar_row: row index in the scalar table.
        group: the parameter's group.
        norm_process_group: process group that shards plain-tensor gradients, or None.
    """
    if not item.is_external:
        step = tensor_step(item.param, item.grads[0], state, scalar_row, group)
        if norm_process_group is not None and not step.process_groups:
            step = step._replace(process_groups=(norm_process_group,))
        return [step]
    for name in MOMENTS:
        state[name] = state[name].resolve_neg().contiguous()
    full_step = tensor_step(item.param, item.param, state, scalar_row, group).flattened()
    if item.low_precision_copy is not None:
        low_precision_copy = item.low_precision_copy.detach().view(-1)
        full_step = full_step._replace(param=low_precision_copy, master=full_step.param, param_is_copy=True)
    steps = []
    start = 0
    for grad in _pieces(item.grads, is_quantized(full_step.states)):
        steps.append(full_step.part(start, start + grad.numel())._replace(grad=grad))
        start += grad.numel()
    return steps


def _pieces(grads: Sequence[Tensor], in_groups: bool) -> list[Tensor]:
    """Merge adjacent gradients into as few 1-D views as possible."""
    pieces: list[Tensor] = []
    for grad in grads:
        flat = grad.detach().resolve_neg().reshape(-1)
        if pieces and _is_adjacent(pieces[-1], flat):
            pieces[-1] = pieces[-1].as_strided((pieces[-1].numel() + flat.numel(),), (1,))
        else:
            pieces.append(flat)
    if in_groups and any(piece.numel() % GROUP for piece in pieces[:-1]):
        return [torch.cat(pieces)]  # quantized states share an exponent per group, so pieces must not split groups
    return pieces


def _is_adjacent(first: Tensor, second: Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
    )
