"""The update on CPU tensors: the reference formula compiled into one vectorised, multi-threaded pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .compact import GROUP
from .compiled import ANY, Program, compiled_program, may_compile
from .reference import adax_update
from .schedule import StepScalars
from .stored import StoredDtypes, scalar_arguments, stored_update
from .tensor_step import TensorStep

# Below this, one pass over the tensor is cheaper than the call of a compiled function, and compiling never pays.
COMPILE_FROM_NUMEL = 32_768
# Elements that the uncompiled formula takes at a time: its temporaries then stay in cache, and never reach the tensor's
# size.
EAGER_CHUNK = 65_536
# Elements that small tensors are gathered into at most.
GATHERED_NUMEL = 1 << 20
# The compiler has no vectors of 16-bit integers, and takes those of 8 bits from memory eight at a time, which costs it
# more than all arithmetic: they go through copies, of so many elements at a time that these stay in cache, as do the
# float32 temporaries that lie between the loops of codes.
_WIDENED = (torch.int8, torch.uint8, torch.int16)
WIDENED_NUMEL = 1 << 17
# Elements of one call at most: their indices are words of 32 bits.
_MOST_NUMEL = 1 << 30


def _update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, grad_as_it_is: bool
) -> None:
    adax_update(param, grad, exp_avg, exp_avg_sq, **scalar_arguments(scalars, grad_as_it_is))


def update_eager(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: StepScalars) -> None:
    """Apply one update by the reference formula, in place, without temporaries of the tensors' size.

    Args:
        param, grad, exp_avg, exp_avg_sq: (n,) contiguous, any float dtype, on one device.
        scalars: of this step.
    """
    for tensors in zip(*(tensor.split(EAGER_CHUNK) for tensor in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        adax_update(*tensors, **scalars._asdict())


def _worth_compiling(param: Tensor) -> bool:
    return param.device.type == "cpu" and param.numel() >= COMPILE_FROM_NUMEL and may_compile()


def prepare_update(step: TensorStep, scalars: StepScalars) -> None:
    """Compile what `update_cpu` or `update_stored` would compile for this step."""
    if _worth_compiling(step.param):
        if step.is_plain:
            _plain_program(step.tensors, scalars)
        else:
            _stored_program(step, scalars)


def prepare_small_updates(tensors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], scalars: StepScalars) -> None:
    """Compile what `update_small_cpu` would compile for these tensors."""
    if sum(quad[0].numel() for quad in tensors) >= COMPILE_FROM_NUMEL and may_compile():
        _plain_program(tensors[0], scalars)


def update_cpu(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: StepScalars) -> None:
    """Apply one update to CPU tensors, in place; compiled for tensors of `COMPILE_FROM_NUMEL` elements and more.

    Args:
        param, grad, exp_avg, exp_avg_sq: (n,) contiguous, any float dtype.
        scalars: of this step.
    """
    tensors = (param, grad, exp_avg, exp_avg_sq)
    program = _plain_program(tensors, scalars) if _worth_compiling(param) else None
    if program is None:
        return update_eager(*tensors, scalars)
    program(*tensors, _scalar_tensor(scalars, exp_avg_sq.dtype))


def _plain_program(tensors: tuple[Tensor, Tensor, Tensor, Tensor], scalars: StepScalars) -> Program | None:
    inputs = (*((tensor.dtype, (ANY,)) for tensor in tensors), (tensors[3].dtype, (len(scalars),)))
    return compiled_program(_update, inputs, (_takes_grad_as_it_is(scalars),))


@functools.lru_cache(maxsize=64)
def _scalar_tensor(scalars: StepScalars, dtype: torch.dtype) -> Tensor:
    # As Python numbers each new value would be compiled for.
    return torch.tensor(scalars, dtype=dtype, device="cpu")


def _takes_grad_as_it_is(scalars: StepScalars) -> bool:
    return scalars.l2 == 0.0 and scalars.grad_factor == 1.0


def update_small_cpu(tensors: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], scalars: StepScalars) -> None:
    """Apply one update to many small CPU tensors, in place, through contiguous copies of `GATHERED_NUMEL` at a time.

    A call costs some 0.2 ms however small its tensors; biases and norms of a model would spend most of a step on calls.

    Args:
        tensors: (param, grad, exp_avg, exp_avg_sq) of each, (n,) contiguous; each of the four of one dtype throughout.
        scalars: of this step, the same for all.
    """
    batch: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    room = GATHERED_NUMEL
    for quad in tensors:
        if batch and quad[0].numel() > room:
            _update_gathered(batch, scalars)
            batch, room = [], GATHERED_NUMEL
        batch.append(quad)
        room -= quad[0].numel()
    if batch:
        _update_gathered(batch, scalars)


def _update_gathered(batch: list[tuple[Tensor, Tensor, Tensor, Tensor]], scalars: StepScalars) -> None:
    if len(batch) == 1:
        return update_cpu(*batch[0], scalars)
    params, grads, exp_avgs, exp_avg_sqs = zip(*batch, strict=True)
    param, exp_avg, exp_avg_sq = torch.cat(params), torch.cat(exp_avgs), torch.cat(exp_avg_sqs)
    update_cpu(param, torch.cat(grads), exp_avg, exp_avg_sq, scalars)
    sizes = [tensor.numel() for tensor in params]
    for originals, updated in ((params, param), (exp_avgs, exp_avg), (exp_avg_sqs, exp_avg_sq)):
        for original, part in zip(originals, updated.split(sizes), strict=True):
            original.copy_(part)


def update_stored(step: TensorStep, scalars: StepScalars, key: tuple[int, int]) -> None:
    """Apply one update to a tensor whose states or weights are not kept in full, in place.

    Compiled on the CPU for tensors of `COMPILE_FROM_NUMEL` elements and more. Temporaries stay within one chunk.

    Args:
        step: on 1-D contiguous tensors.
        scalars: of this step.
        key: of this step, see `rounding.random_key`.
    """
    program = _stored_program(step, scalars) if _worth_compiling(step.param) else None
    numel, exponents = step.param.numel(), step.group_exponents
    chunk = EAGER_CHUNK
    if program is not None:
        in_parts = any(tensor.dtype in _WIDENED for tensor in step.written)
        chunk = WIDENED_NUMEL if in_parts else _MOST_NUMEL
    whole = numel if exponents is None else numel // GROUP * GROUP
    for start in range(0, whole, chunk):
        _update_run(step, scalars, key, start, min(chunk, whole - start), program)
    if whole != numel:
        _update_padded(step, scalars, key, whole)


def _stored_program(step: TensorStep, scalars: StepScalars) -> Program | None:
    shape = (ANY,) if step.group_exponents is None else (ANY, GROUP)
    inputs = (
        *((None if tensor is None else (_wide_dtype(tensor), shape)) for tensor in (*step.tensors, step.master)),
        None if step.group_exponents is None else (_wide_dtype(step.group_exponents), (ANY,)),
        (torch.float32, (len(scalars),)),
        (torch.int32, (3,)),  # the words of `_update_run`
    )
    stored = StoredDtypes(None if step.master is None else step.master.dtype, step.exp_avg_sq.dtype)
    constants = (step.stochastic, _takes_grad_as_it_is(scalars), stored, step.param_is_copy)
    return compiled_program(stored_update, inputs, constants)


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.int32 if tensor.dtype in _WIDENED else tensor.dtype


def _update_run(
    step: TensorStep, scalars: StepScalars, key: tuple[int, int], start: int, length: int, program: Program | None
) -> None:
    part = step.mapped(lambda tensor: tensor[start : start + length])
    exponents = part.group_exponents
    if exponents is not None:
        part = part.mapped(lambda tensor: tensor.view(-1, GROUP))
        exponents = exponents.view(-1)[start // GROUP : (start + length) // GROUP]
    # As 32-bit words that wrap around.
    words = torch.tensor([step.first_element + start, *key], dtype=torch.int64, device="cpu").to(torch.int32)
    tensors = (*part.tensors, part.master, exponents)
    if program is None:
        return stored_update(
            *tensors, scalars, words.to(part.param.device), step.stochastic, param_is_copy=step.param_is_copy
        )
    wide = tuple(None if tensor is None else tensor.to(_wide_dtype(tensor)) for tensor in tensors)
    program(*wide, _scalar_tensor(scalars, torch.float32), words)
    for tensor, widened in zip(tensors, wide, strict=True):
        if tensor is not None and widened is not None and widened is not tensor:
            tensor.copy_(widened)


def _update_padded(step: TensorStep, scalars: StepScalars, key: tuple[int, int], start: int) -> None:
    rest = step.param.numel() - start
    tail = step.mapped(lambda tensor: pad(tensor[start:], (0, GROUP - rest)))
    assert step.group_exponents is not None
    tail = tail._replace(first_element=step.first_element + start, group_exponents=step.group_exponents.view(-1)[-1:])
    _update_run(tail, scalars, key, 0, GROUP, program=None)
    for original, padded in zip(step.written, tail.written, strict=True):
        original[start:].copy_(padded[:rest])
