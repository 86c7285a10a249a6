"""How a kernel is launched: elements per program, warps, and the width of its accesses."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class LaunchShape(NamedTuple):
    """Elements per program, the warps that share them, and the elements each thread then has."""

    chunk_size: int
    num_warps: int
    elements_per_thread: int


# 8 elements per thread at 32 threads per warp (NVIDIA) and 64 (AMD). Chosen from generated code alone: no spills, no
# shared memory, every data load issued before the first store (tests/test_code_audit.py). Not yet timed on a GPU.
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
