"""Choose the kernel: Triton (GPU), native (CPU) or plain PyTorch."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from .cpu_kernel import CpuKernel, CpuKernelError, KernelVariant, build_problem, cpu_kernel, instruction_set

TRITON, NATIVE, REFERENCE = "triton", "native", "reference"
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def backend_of(device: torch.device, param_dtype: torch.dtype, param: Tensor | None = None) -> str:
    """Return `TRITON`, `NATIVE` or `REFERENCE` for a parameter.

    CPU tensors use Triton only if the variable TRITON_INTERPRET is set.

    Args:
        device: device of the parameter.
        param_dtype: its dtype; for a complex parameter, the dtype of its real part.
        param: the parameter. A fake tensor has no memory, so it gets `REFERENCE`. Default: None, which means a real
            tensor.

    Raises:
        RuntimeError: the parameter needs Triton, which is not installed.
    """
    if param is not None and is_fake(param):
        return REFERENCE
    if param_dtype in _TRITON_DTYPES and (device.type == "cuda" or (device.type == "cpu" and _interpreting())):
        if not has_triton():
            other = "unset TRITON_INTERPRET" if device.type == "cpu" else "train on the CPU"
            raise RuntimeError(
                f"A parameter on {device} needs Triton, which is not installed; run `pip install triton`, or {other}"
            )
        return TRITON
    return NATIVE if device.type == "cpu" else REFERENCE


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def uses_triton(param: Tensor) -> bool:
    """Return whether the Triton kernel updates a parameter."""
    return backend_of(param.device, param.dtype.to_real(), param) == TRITON


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor, or a DTensor's local tensor, is a FakeTensor."""
    return type(tensor) not in (Tensor, nn.Parameter) and fake_tensor.is_fake(tensor)


def explain_backend(device: torch.device, param_dtype: torch.dtype) -> tuple[str, str]:
    """Return the backend for a device and dtype, and the reason."""
    try:
        backend = backend_of(device, param_dtype)
    except RuntimeError as error:
        return TRITON, f"absent: {error}"
    if backend == TRITON:
        interpreted = ", in the interpreter because TRITON_INTERPRET is set" if device.type == "cpu" else ""
        return backend, f"the fused kernel{interpreted}"
    if backend == REFERENCE:
        return backend, f"uncompiled PyTorch: the kernel does not support {param_dtype} on {device.type}"
    problem = build_problem()
    if problem is not None:
        return REFERENCE, "uncompiled PyTorch, because there is no native kernel; see the self-check"
    return backend, f"the fused kernel, compiled for {instruction_set()}"


_failed: set[KernelVariant] = set()
_warned: list[str] = []


def native_kernel(variant: KernelVariant) -> CpuKernel | None:
    """Return the native kernel, or None if it cannot be built.

    Warns once if it cannot be built.
    """
    if variant in _failed:
        return None
    try:
        return cpu_kernel(variant)
    except CpuKernelError as error:
        problem = str(error)
    _failed.add(variant)
    if not _warned:
        _warned.append(problem)
        warnings.warn(
            f"adax_triton updates CPU tensors with uncompiled PyTorch, several times slower: {problem}", stacklevel=8
        )
    return None


def _interpreting() -> bool:
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        return False
    if not has_triton():
        return True  # `backend_of` raises
    from adax_triton.kernels.launch import is_interpreted

    return is_interpreted()
