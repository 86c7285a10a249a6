"""Local shards, placements and process groups of DTensor parameters (FSDP2, tensor parallelism)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adax_triton.update.quantization import GROUP

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement


_placement = attrgetter("device_mesh", "placements")


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    if not is_traceable_wrapper_subclass(tensor):
        return None
    from torch.distributed.tensor import DTensor  # takes a second; programs that use DTensors have imported it

    return tensor if isinstance(tensor, DTensor) else None


def is_supported(tensor: Tensor) -> bool:
    """Return True for plain tensors and their DTensors, False for other wrapper subclasses."""
    return not is_traceable_wrapper_subclass(finished(local_tensor(tensor.detach())))


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or a plain tensor unchanged."""
    dtensor = _as_dtensor(tensor)
    return tensor if dtensor is None else dtensor.to_local()


class Shards:
    """Types and placements of tensors, to compare later lists with.

    Args:
        tensors: plain tensors and DTensors.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._types = list(map(type, tensors))
        self._sharded = list(map(is_dtensor, tensors))
        self._placements = list(map(_placement, compress(tensors, self._sharded)))

    def local_tensors(self, tensors: Sequence[Any]) -> list[Tensor] | None:
        """Return this rank's shards; None if a type, mesh or placement differs."""
        if list(map(type, tensors)) != self._types:
            return None
        if list(map(_placement, compress(tensors, self._sharded))) != self._placements:
            return None
        with torch.no_grad():  # to_local() then returns the shard itself
            return [
                tensor.to_local() if sharded else tensor for tensor, sharded in zip(tensors, self._sharded, strict=True)
            ]


def sharded_like(param: Tensor, shard: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a DTensor of this rank's shard, placed like the parameter.

    It has the parameter's mesh and placements.

    Args:
        param: a DTensor; for a plain parameter the shard is returned unchanged.
        shard: this rank's elements. The result shares their memory.
        shape: global shape of the result.
    """
    like = _as_dtensor(param)
    if like is None:
        return shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # DTensor.from_local would assume even shards and move the shard to the mesh's device; FSDP2 may have offloaded it
    # to the CPU.
    stride = torch.empty(shape, device="meta").stride()
    meta = TensorMeta(torch.Size(shape), stride, shard.dtype)
    return type(like)(shard, DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta), requires_grad=False)


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Redistribute a tensor to the mesh and placements of `like`.

    Both have the same shape.
    """
    given, wanted = _as_dtensor(tensor), _as_dtensor(like)
    if wanted is None:
        return tensor if given is None else given.full_tensor()
    if given is None:
        from torch.distributed.tensor import distribute_tensor

        # None: each rank has the full tensor and takes its shard from it. By default rank 0 would broadcast.
        return distribute_tensor(tensor, wanted.device_mesh, wanted.placements, src_data_rank=None)
    if given.device_mesh == wanted.device_mesh and given.placements == wanted.placements:
        return given
    return given.redistribute(wanted.device_mesh, wanted.placements)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return _as_dtensor(tensor) is not None


def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """Return this rank's shard of a gradient, redistributed to its parameter's placements."""
    dtensor, like = _as_dtensor(grad), _as_dtensor(param)
    if dtensor is not None and like is not None and dtensor.placements != like.placements:
        dtensor = dtensor.redistribute(like.device_mesh, like.placements)
    return finished(grad if dtensor is None else dtensor.to_local())


def finished(tensor: Tensor) -> Tensor:
    """Return the result of a pending collective, or a tensor unchanged."""
    return tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor


def first_element_index(param: Tensor) -> int:
    """Return the index of this rank's first element in the full parameter.

    If the parameter is sharded along dim 0, the shard's other elements follow it in the full parameter.
    """
    dtensor = _as_dtensor(param)
    if dtensor is None:
        return 0
    mesh = dtensor.device_mesh
    offsets = _offsets(dtensor.shape, mesh, dtensor.placements, mesh.get_rank())
    return sum(offset * stride for offset, stride in zip(offsets, dtensor.stride(), strict=True))


@functools.lru_cache(maxsize=4096)  # saves 30 us per parameter and step
def _offsets(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...], rank: int) -> tuple[int, ...]:
    # `rank` is part of the cache key: the meshes of two ranks compare equal.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(shape, mesh, placements)[1]


def shard_process_groups(param: Tensor) -> tuple[Any, ...]:
    """Return the process groups of the mesh dimensions that shard a parameter."""
    dtensor = _as_dtensor(param)
    if dtensor is None:
        return ()
    mesh, placements = dtensor.device_mesh, dtensor.placements
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def splits_code_groups(param: Tensor) -> bool:
    """Return whether sharding may split a group of 32 codes."""
    dtensor = _as_dtensor(param)
    if dtensor is None:
        return False
    if not dtensor.is_contiguous():  # the memory order of its shards is unknown
        return True
    placements = dtensor.placements
    if all(placement.is_replicate() for placement in placements):
        return False
    # is_shard(0) is False for the _StridedShard that FSDP2 with tensor parallelism uses, so read `dim`.
    by_rows = all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in placements)
    return not by_rows or dtensor.ndim < 2 or math.prod(dtensor.shape[1:]) % GROUP != 0
