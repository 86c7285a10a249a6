"""The update on CPU tensors: the reference formula compiled into one vectorised, multi-threaded pass."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .compact import GROUP
from .reference import adax_update
from .schedule import StepScalars
from .stored import stored_update
from .tensor_step import TensorStep

# Below this, one pass over the tensor is cheaper than the call of a compiled function, and compiling never pays.
COMPILE_FROM_NUMEL = 32_768
# Elements that the uncompiled formula takes at a time: its temporaries then stay in cache, and never reach the tensor's
# size.
EAGER_CHUNK = 65_536
# No mask within the loop. And no fused multiply-adds, which would be others for every set of dtypes and for the ends of
# tensors: weights kept whole beside bfloat16 must be those of float32 bit for bit, and so must shards of any size.
COMPILE_OPTIONS: dict[str, str | int | bool | Callable[..., object]] = {
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_loop_tail_vec": False,
}
# Elements that small tensors are gathered into at most, and that codes are compiled for at a time: between the loops of
# that lie float32 temporaries.
GATHERED_NUMEL = 1 << 20

Update = Callable[..., None]


def _update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: Tensor, grad_as_it_is: bool
) -> None:
    arguments = dict(zip(StepScalars._fields, scalars, strict=True))
    if grad_as_it_is:
        arguments |= {"l2": 0.0, "grad_factor": 1.0}
    adax_update(param, grad, exp_avg, exp_avg_sq, **arguments)


def update_eager(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: StepScalars) -> None:
    """Apply one update by the reference formula, in place, without temporaries of the tensors' size.

    Args:
        param, grad, exp_avg, exp_avg_sq: (n,) contiguous, any float dtype, on one device.
        scalars: of this step.
    """
    for tensors in zip(*(tensor.split(EAGER_CHUNK) for tensor in (param, grad, exp_avg, exp_avg_sq)), strict=True):
        adax_update(*tensors, **scalars._asdict())


@functools.cache
def _compiled(function: types.FunctionType, dtypes: tuple[torch.dtype | None, ...]) -> Update:
    # Dynamo counts recompilations per code object and gives up after eight; each set of dtypes gets its own.
    name = "_".join([function.__name__, *(str(dtype).removeprefix("torch.") for dtype in dtypes)])
    twin = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(twin, dynamic=True, fullgraph=True, options=COMPILE_OPTIONS)


@functools.cache
def compiler_problem() -> str | None:
    """Return why CPU code cannot be compiled here, or None; found out once, by looking for the C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        return " ".join(str(error).split())
    return None


@functools.cache
def _warn_uncompiled(problem: str) -> None:
    warnings.warn(
        f"adax_triton steps CPU tensors with uncompiled PyTorch, several times slower: {problem}. "
        "Install a C++ compiler, such as g++, or name one in the environment variable CXX.",
        stacklevel=2,
    )


def _worth_compiling(param: Tensor) -> bool:
    if param.device.type != "cpu" or param.numel() < COMPILE_FROM_NUMEL or torch.compiler.is_compiling():
        return False
    problem = compiler_problem()
    if problem is not None:
        _warn_uncompiled(problem)
    return problem is None


def update_cpu(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scalars: StepScalars) -> None:
    """Apply one update to CPU tensors, in place; compiled for tensors of `COMPILE_FROM_NUMEL` elements and more.

    Args:
        param, grad, exp_avg, exp_avg_sq: (n,) contiguous, any float dtype.
        scalars: of this step.
    """
    if not _worth_compiling(param):
        return update_eager(param, grad, exp_avg, exp_avg_sq, scalars)
    tensors = (param, grad, exp_avg, exp_avg_sq)
    update = _compiled(_update, tuple(tensor.dtype for tensor in tensors))
    grad_as_it_is = scalars.l2 == 0.0 and scalars.grad_factor == 1.0
    # The scalars go in as a tensor: as Python numbers each new value would be compiled for.
    return update(*tensors, torch.tensor(scalars, dtype=exp_avg_sq.dtype, device="cpu"), grad_as_it_is)


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
    compiled = _worth_compiling(step.param)
    numel, chunk = step.param.numel(), GATHERED_NUMEL if compiled else EAGER_CHUNK
    whole = numel if step.group_exponents is None else numel // GROUP * GROUP
    for start in range(0, whole, chunk):
        _update_run(step, scalars, key, start, min(chunk, whole - start), compiled)
    if whole != numel:
        _update_padded(step, scalars, key, whole)


def _update_run(
    step: TensorStep, scalars: StepScalars, key: tuple[int, int], start: int, length: int, compiled: bool
) -> None:
    part = step.mapped(lambda tensor: tensor[start : start + length])
    exponents = part.group_exponents
    if exponents is not None:
        part = part.mapped(lambda tensor: tensor.view(-1, GROUP))
        exponents = exponents.view(-1)[start // GROUP : (start + length) // GROUP]
    # As 32-bit words that wrap around.
    words = torch.tensor([step.first_element + start, *key], dtype=torch.int64, device="cpu").to(torch.int32)
    words = words.to(part.param.device)
    tensors = (*part.tensors, part.master, exponents)
    if not compiled:
        return stored_update(*tensors, scalars, words, step.stochastic)
    # The compiler has no vectors of 16-bit integers: they go through copies of a chunk.
    wide = tuple(
        tensor.to(torch.int32) if tensor is not None and tensor.dtype == torch.int16 else tensor for tensor in tensors
    )
    update = _compiled(stored_update, (*(None if tensor is None else tensor.dtype for tensor in wide),))
    update(*wide, torch.tensor(scalars, dtype=torch.float32, device="cpu"), words, step.stochastic)
    for tensor, widened in zip(tensors, wide, strict=True):
        if tensor is not None and widened is not None and widened is not tensor:
            tensor.copy_(widened)


def _update_padded(step: TensorStep, scalars: StepScalars, key: tuple[int, int], start: int) -> None:
    rest = step.param.numel() - start
    tail = step.mapped(lambda tensor: pad(tensor[start:], (0, GROUP - rest)))
    assert step.group_exponents is not None
    tail = tail._replace(first_element=step.first_element + start, group_exponents=step.group_exponents.view(-1)[-1:])
    _update_run(tail, scalars, key, 0, GROUP, compiled=False)
    for original, padded in zip(step.written, tail.written, strict=True):
        original[start:].copy_(padded[:rest])
