"""Flat buffers, and checks of memory layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Elements. Each view starts at a multiple of this, so that even 1-byte states are read 128 bits at a time.
ALIGNMENT = 128


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


class FlatBuffer:
    """Allocate one zeroed buffer with one view for each given tensor.

    A view has the shape of its tensor. It also has the strides if the tensor is dense (channels-last, transposed), so
    that flat index i is the same element in the view and in the tensor. Up to `ALIGNMENT - 1` unused elements
    separate two views.

    Args:
        tensors: templates for shape, strides and device; all on one device.
        dtype: dtype of the buffer. Default: the dtype of the tensors, which must then be the same.

    Attributes:
        data: (total,) the buffer.
        views: one view per tensor, in order.
        numel: number of elements in the views, without padding.

    Raises:
        ValueError: the tensors are on several devices, or have several dtypes and `dtype` is not given.
    """

    def __init__(self, tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
        tensors = list(tensors)
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ValueError(f"tensors: expected one device, got {sorted(map(str, devices))}")
        dtypes = {tensor.dtype for tensor in tensors} if dtype is None else {dtype}
        if len(dtypes) > 1:
            raise ValueError(f"tensors: expected one dtype, got {sorted(map(str, dtypes))}; pass dtype=...")
        padded = (-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors)
        *offsets, total = itertools.accumulate(padded, initial=0)
        self.data = torch.zeros(total, dtype=next(iter(dtypes), None), device=next(iter(devices), None))
        self.views = [self._view(tensor, offset) for tensor, offset in zip(tensors, offsets, strict=True)]
        self.numel = sum(tensor.numel() for tensor in tensors)

    def _view(self, tensor: Tensor, offset: int) -> Tensor:
        flat = self.data[offset : offset + tensor.numel()]
        return flat.as_strided(tensor.shape, tensor.stride()) if is_dense(tensor) else flat.view(tensor.shape)
