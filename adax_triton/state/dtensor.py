"""Parameters that are shards of a larger tensor: PyTorch's DTensor, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adax_triton.update.quantization import GROUP

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement


def _as_dtensor(tensor: Tensor) -> DTensor | None:
    if not is_traceable_wrapper_subclass(tensor):
        return None
    from torch.distributed.tensor import DTensor  # takes a second, and only who shards has it loaded already

    return tensor if isinstance(tensor, DTensor) else None


def is_supported(tensor: Tensor) -> bool:
    """Whether the elements can be reached: of plain tensors and DTensors, not of other wrappers."""
    return not is_traceable_wrapper_subclass(tensor) or _as_dtensor(tensor) is not None


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank: the tensor itself unless it is a DTensor."""
    sharded = _as_dtensor(tensor)
    return tensor if sharded is None else sharded.to_local()


def sharded_like(param: Tensor, shard: Tensor, shape: Sequence[int]) -> Tensor:
    """Return this rank's shard as a tensor that is sharded as a parameter is; the shard itself beside a plain one.

    Args:
        param: gives the mesh and the placements.
        shard: what lies on this rank; its memory is shared.
        shape: of the whole.
    """
    whole = _as_dtensor(param)
    if whole is None:
        return shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    # Not by from_local: that takes the whole for a multiple of the shard, wrong when shards are uneven, and moves the
    # shard to the device of the mesh, wrong for parameters that FSDP2 offloads to the CPU.
    stride = torch.empty(shape, device="meta").stride()
    meta = TensorMeta(torch.Size(shape), stride, shard.dtype)
    return type(whole)(shard, DTensorSpec(whole.device_mesh, whole.placements, tensor_meta=meta), requires_grad=False)


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor, or one sharded otherwise, as a tensor that is sharded as another of its shape is."""
    given, wanted = _as_dtensor(tensor), _as_dtensor(like)
    if wanted is None:
        return tensor if given is None else given.full_tensor()
    if given is None:
        from torch.distributed.tensor import distribute_tensor

        # Every rank has the whole and cuts out its own part; by default rank 0 would send it.
        return distribute_tensor(tensor, wanted.device_mesh, wanted.placements, src_data_rank=None)
    if given.device_mesh == wanted.device_mesh and given.placements == wanted.placements:
        return given
    return given.redistribute(wanted.device_mesh, wanted.placements)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return _as_dtensor(tensor) is not None


def local_gradient(grad: Tensor, param: Tensor) -> Tensor:
    """Return this rank's part of a gradient, after bringing it into the placements of its parameter."""
    sharded, whole = _as_dtensor(grad), _as_dtensor(param)
    if sharded is not None and whole is not None and sharded.placements != whole.placements:
        sharded = sharded.redistribute(whole.device_mesh, whole.placements)
    return grad if sharded is None else sharded.to_local()


def first_element(param: Tensor) -> int:
    """Return the index, in the whole parameter, of the first element on this rank.

    The rest follow it there if the parameter is sharded by rows, along its first dimension.
    """
    whole = _as_dtensor(param)
    if whole is None:
        return 0
    mesh = whole.device_mesh
    offsets = _offsets(whole.shape, mesh, whole.placements, mesh.get_rank())
    return sum(offset * stride for offset, stride in zip(offsets, whole.stride(), strict=True))


@functools.lru_cache(maxsize=4096)  # 30 us, for each parameter at each step
def _offsets(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...], rank: int) -> tuple[int, ...]:
    # The rank, which decides the result, is no part of what makes two meshes equal.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(shape, mesh, placements)[1]


def shard_process_groups(param: Tensor) -> tuple[Any, ...]:
    """Return the process groups over which a parameter is sharded, not replicated; none for a plain tensor."""
    whole = _as_dtensor(param)
    if whole is None:
        return ()
    mesh, placements = whole.device_mesh, whole.placements
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def splits_groups(param: Tensor) -> bool:
    """Whether a parameter is sharded so that groups of codes may lie on two ranks, or on none."""
    whole = _as_dtensor(param)
    if whole is None:
        return False
    if not whole.is_contiguous():  # in what order its shards lie in memory is up to who made it
        return True
    if all(placement.is_replicate() for placement in whole.placements):
        return False
    # Not by is_shard(0), which leaves out the strided shards of FSDP2 over tensor parallelism.
    by_rows = all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in whole.placements)
    return not by_rows or whole.ndim < 2 or math.prod(whole.shape[1:]) % GROUP != 0
