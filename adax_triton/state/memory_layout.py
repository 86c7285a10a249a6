"""Checks of memory layout, and zeros with a layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one memory range without gaps.

    Elements must not overlap. Dimensions may be in any order.
    """
    if tensor.numel() == 0:
        return True
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    expected = 1
    for stride, size in dims:
        if stride != expected:
            return False
        expected *= size
    return True


def write_problem(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be updated in place, or None.

    The text also says what to do.
    """
    if tensor.layout != torch.strided:
        return f"has layout {tensor.layout}; make it dense"
    if tensor.is_conj():
        return "is a lazy conjugate; call resolve_conj() and use the result"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was created in inference mode; call clone() and use the result"
    if not tensor.is_contiguous() and _shares_memory(tensor):
        return "is expanded, so its elements share memory; call contiguous() and use the result"
    return storage_problem(tensor)


def storage_problem(tensor: Tensor) -> str | None:
    """Return an error text if the storage is too small, else None.

    For example, a framework may have freed it.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.numel() == 0:
        return None
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needed, available = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if available >= needed:
        return None
    return f"has {available} of {needed} bytes of memory; resize its storage before the step"


def _shares_memory(tensor: Tensor) -> bool:
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def flat_view(tensor: Tensor) -> Tensor:
    """Return a 1-D view of a dense tensor, in memory order."""
    return tensor.as_strided((tensor.numel(),), (1,))


def zeros_with_strides_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return new zeros with the shape and device of a tensor.

    They also have the strides if the tensor is dense (channels-last, transposed), so that flat index i is the same
    element in both. Otherwise they are contiguous.
    """
    if tensor.is_contiguous() or not is_dense(tensor):
        return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)
    return torch.zeros(tensor.numel(), dtype=dtype, device=tensor.device).as_strided(tensor.shape, tensor.stride())
