"""Launch Triton kernels: launch shape, cache of compiled kernels, deferred launches."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class LaunchShape(NamedTuple):
    """Elements per program, warps per program, elements per thread."""

    chunk_size: int
    num_warps: int
    elements_per_thread: int


# 8 elements per thread, with 32 threads per warp (NVIDIA) or 64 (AMD). On an H200 the best other shape or register
# limit gains at most 3 % (bench/results/nvidia-h200-variants.json; its 5 % for "8bit" states were measured when that
# kernel needed more than 48 registers). The AMD shape is not timed. The generated code has no spills, no shared memory,
# and every data load before the first store (tests/gpu_code/test_code_audit.py).
_SHAPES = {"cuda": LaunchShape(2048, 8, 8), "hip": LaunchShape(2048, 4, 8)}


def launch_shape(backend: str) -> LaunchShape:
    """Return the launch shape for `"cuda"` or `"hip"`.

    Raises:
        ValueError: `backend` is unknown.
    """
    if backend not in _SHAPES:
        raise ValueError(f"Invalid backend: {backend!r}; expected one of {sorted(_SHAPES)}")
    return _SHAPES[backend]


def current_backend() -> str:
    """Return `"hip"` for PyTorch on ROCm, else `"cuda"`, also for the interpreter."""
    return "hip" if torch.version.hip else "cuda"


def chunk_size() -> int:
    """Return the number of elements per program and per table chunk."""
    return launch_shape(current_backend()).chunk_size


def is_interpreted() -> bool:
    """Return True if Triton was imported with `TRITON_INTERPRET=1`.

    Kernels then run on CPU tensors.
    """
    return bool(triton.knobs.runtime.interpret)


# (kernel, device, variant), alignment of the arguments -> (compiled kernel, compile-time arguments).
_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


class _DeferredLaunches(threading.local):
    launches: list[Callable[[], object]] | None = None


_deferred = _DeferredLaunches()


@contextlib.contextmanager
def deferred_launches() -> Iterator[list[Callable[[], object]]]:
    """Collect this thread's launches for the caller to run in order.

    Kernels are compiled while they are collected.

    If a compilation or an allocation fails, nothing has been launched yet.
    """
    launches = _deferred.launches = []
    try:
        yield launches
    finally:
        _deferred.launches = None


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    variant: Hashable,
    constants: Callable[[], dict[str, Any]],
    options: dict[str, int],
) -> None:
    """Launch a kernel on the current stream, or defer it.

    The stream is the current one of the arguments' device. See `deferred_launches`.

    The first launch of a variant caches the compiled kernel for the next ones. Triton's own
    launcher inspects every argument to look up the kernel, which takes longer than the launch.

    Args:
        kernel: a function decorated with `triton.jit`.
        programs: size of the grid.
        arguments: run-time arguments of the kernel, in order; the first is a tensor. A number must have a type
            annotation in the kernel and be listed in its `do_not_specialize`.
        variant: cache key of the compile-time arguments and options.
        constants: returns the compile-time arguments, by name and in order.
        options: compiler options, such as `num_warps`.
    """
    device = arguments[0].device
    if device.type != "cuda":
        _run_or_defer(device, kernel[(programs,)], arguments, {**constants(), **options})
    elif device.index == torch.cuda.current_device():
        _launch(kernel, programs, arguments, (kernel.fn, device.index, variant), constants, options)
    else:
        with torch.cuda.device(device):  # Triton launches on the current device
            _launch(kernel, programs, arguments, (kernel.fn, device.index, variant), constants, options)


def _launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    key: tuple[Any, int, Hashable],
    constants: Callable[[], dict[str, Any]],
    options: dict[str, int],
) -> None:
    # Alignment is part of the cache key: Triton compiles different code for addresses that are multiples of 16.
    aligned = tuple([argument.data_ptr() % 16 == 0 for argument in arguments if isinstance(argument, Tensor)])
    found = _compiled.get((key, aligned))
    if found is None:
        by_name = constants()
        found = kernel.warmup(*arguments, **by_name, **options, grid=(programs,)), tuple(by_name.values())
        _compiled[key, aligned] = found
    compiled, values = found
    stream = triton.runtime.driver.active.get_current_stream(key[1])
    # Indexing with the grid loads the code onto the device, if it is not there yet.
    run = compiled[(programs, 1, 1)]
    if _deferred.launches is None:
        run(*arguments, *values, stream=stream)
    else:
        _run_or_defer(arguments[0].device, run, (*arguments, *values), {"stream": stream})


def _run_or_defer(
    device: torch.device, run: Callable[..., object], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    if _deferred.launches is None:
        run(*arguments, **keywords)
    else:
        _deferred.launches.append(functools.partial(_run_on, device, functools.partial(run, *arguments, **keywords)))


def _run_on(device: torch.device, run: Callable[[], object]) -> None:
    with torch.cuda.device(-1 if device.index is None else device.index):
        run()
