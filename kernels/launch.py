"""How a kernel is launched: elements per program, warps, and the width of its accesses."""

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
    """Elements per program, the warps that share them, and the elements each thread then has."""

    chunk_size: int
    num_warps: int
    elements_per_thread: int


# 8 elements per thread at 32 threads per warp (NVIDIA) and 64 (AMD). On an H200 no other shape and no register cap is
# more than 3 % faster in any mode (bench/results/nvidia-h200-variants.json). AMD's was never timed. Generated code has
# no spills, no shared memory, and every data load before the first store (tests/gpu_code/test_code_audit.py).
_SHAPES = {"cuda": LaunchShape(2048, 8, 8), "hip": LaunchShape(2048, 4, 8)}


def launch_shape(backend: str) -> LaunchShape:
    """Return the launch shape for `"cuda"` or `"hip"`.

    Raises:
        ValueError: no kernel has been audited for this backend.
    """
    if backend not in _SHAPES:
        raise ValueError(f"Invalid backend: {backend!r}; expected one of {sorted(_SHAPES)}")
    return _SHAPES[backend]


def current_backend() -> str:
    """Return the backend this PyTorch was built for; the interpreter launches as on CUDA."""
    return "hip" if torch.version.hip else "cuda"


def chunk_size() -> int:
    """Return the elements one program updates; chunk tables are built for it."""
    return launch_shape(current_backend()).chunk_size


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (`TRITON_INTERPRET=1` when Triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


# Triton's compiled kernels, with their compile-time arguments, by what they were compiled for.
_compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


class _Held(threading.local):
    launches: list[Callable[[], object]] | None = None


_held = _Held()


@contextlib.contextmanager
def deferred_launches() -> Iterator[list[Callable[[], object]]]:
    """Have this thread's launches compile their kernels and wait in a list; the caller calls each, in order.

    Compiling may fail, and so may allocations between launches. Nothing has been launched by then.
    """
    launches = _held.launches = []
    try:
        yield launches
    finally:
        _held.launches = None


def launch(
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    variant: Hashable,
    constants: Callable[[], dict[str, Any]],
    options: dict[str, int],
) -> None:
    """Launch a kernel on the current stream of its arguments' device, or hold the launch, see `deferred_launches`.

    Triton looks at every argument at every launch to find the compiled kernel, which takes longer than the launch
    itself. Here the first launch of a variant leaves the compiled kernel for the next ones.

    Args:
        kernel: a function of `triton.jit`.
        programs: how many run.
        arguments: of the kernel, in order; the first is a tensor. Numbers must be typed and not specialized.
        variant: names the compile-time arguments and options.
        constants: returns the compile-time arguments, by name and in order.
        options: of the compiler, such as `num_warps`.
    """
    device = arguments[0].device
    if device.type != "cuda":
        _start(device, kernel[(programs,)], arguments, {**constants(), **options})
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
    # Code for addresses that are multiples of 16 would be wrong for others.
    aligned = tuple([argument.data_ptr() % 16 == 0 for argument in arguments if isinstance(argument, Tensor)])
    found = _compiled.get((key, aligned))
    if found is None:
        values = constants()
        found = kernel.warmup(*arguments, **values, **options, grid=(programs,)), tuple(values.values())
        _compiled[key, aligned] = found
    compiled, others = found
    stream = triton.runtime.driver.active.get_current_stream(key[1])
    # To be subscribed loads the code onto the device, if it is not there yet.
    run = compiled[(programs, 1, 1)]
    if _held.launches is None:
        run(*arguments, *others, stream=stream)
    else:
        _start(arguments[0].device, run, (*arguments, *others), {"stream": stream})


def _start(
    device: torch.device, run: Callable[..., object], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    if _held.launches is None:
        run(*arguments, **keywords)
    else:
        _held.launches.append(functools.partial(_run_on, device, functools.partial(run, *arguments, **keywords)))


def _run_on(device: torch.device, run: Callable[[], object]) -> None:
    with torch.cuda.device(-1 if device.index is None else device.index):
        run()
