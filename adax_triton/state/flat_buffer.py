"""Contiguous storage for many tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Elements. Every tensor of a buffer starts on a multiple, so that states of 1 byte and up are read 128 bits at a time.
ALIGNMENT = 128


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory without gap or overlap, in whatever order of dimensions."""
    if tensor.numel() == 0:
        return True
    dims = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    expected = 1
    for stride, size in dims:
        if stride != expected:
            return False
        expected *= size
    return True


def why_not_writable(tensor: Tensor) -> str | None:
    """Return why a tensor cannot be updated in place, with what to do, or None."""
    if tensor.layout != torch.strided:
        return f"is {tensor.layout}; make it dense"
    if tensor.is_conj():
        return "is conjugated when it is read; set it to its resolve_conj()"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode; set it to its clone()"
    if not tensor.is_contiguous() and _shares_memory(tensor):
        return "has elements that share memory, as an expanded tensor; set it to its contiguous()"
    return storage_problem(tensor)


def storage_problem(tensor: Tensor) -> str | None:
    """Return what a tensor lacks of its storage, which others may have freed, with what to do, or None."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.numel() == 0:
        return None
    last = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    needed, held = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    return f"has {held} of {needed} bytes of memory; resize its storage before the step" if held < needed else None


def _shares_memory(tensor: Tensor) -> bool:
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += (size - 1) * stride
    return False


def flat_view(tensor: Tensor) -> Tensor:
    """Return the 1-D view of a dense tensor's elements in the order in which they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


class FlatBuffer:
    """One contiguous, zeroed tensor and a view into it for each of a list of tensors.

    A view has the shape of its tensor, and its strides too where the tensor is dense (channels-last, transposed): the
    same flat index is then the same element in both. Between views lie at most `ALIGNMENT - 1` elements that nothing
    writes.

    Args:
        tensors: models for the shapes, strides and the device; all on one device.
        dtype: element type of the buffer. Default: that of the tensors, which must then agree.

    Attributes:
        data: (total,) the storage.
        views: one view per tensor, in order.
        numel: elements in the views, without the padding.

    Raises:
        ValueError: the tensors are on several devices, or of several dtypes with none given.
    """

    def __init__(self, tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> None:
        tensors = list(tensors)
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise ValueError(f"tensors: a flat buffer lies on one device, got {sorted(map(str, devices))}")
        dtypes = {tensor.dtype for tensor in tensors} if dtype is None else {dtype}
        if len(dtypes) > 1:
            raise ValueError(
                f"tensors: a flat buffer has one dtype, got {sorted(map(str, dtypes))}; name one with dtype="
            )
        padded = (-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors)
        *offsets, total = itertools.accumulate(padded, initial=0)
        self.data = torch.zeros(total, dtype=next(iter(dtypes), None), device=next(iter(devices), None))
        self.views = [self._view(tensor, offset) for tensor, offset in zip(tensors, offsets, strict=True)]
        self.numel = sum(tensor.numel() for tensor in tensors)

    def _view(self, tensor: Tensor, offset: int) -> Tensor:
        run = self.data[offset : offset + tensor.numel()]
        return run.as_strided(tensor.shape, tensor.stride()) if is_dense(tensor) else run.view(tensor.shape)

    @classmethod
    def flatten(cls, params: Iterable[Tensor]) -> FlatBuffer:
        """Move parameters into one buffer, in place: each keeps its values and becomes a view of the storage.

        No optimizer of this package needs it; it is for those who want to copy, send or offload all weights at once.

        Args:
            params: tensors of one device and dtype; their `data` is replaced.

        Raises:
            ValueError: several devices or dtypes.
        """
        params = list(params)
        buffer = cls(params)
        for param, view in zip(params, buffer.views, strict=True):
            view.copy_(param.detach())
            param.data = view
        return buffer
