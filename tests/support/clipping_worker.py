"""Compare clipping on several ranks with one process, bit for bit.

Usage: as sharding_worker.py. Gradients are small integers; their squares have the same float sum in any order.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import sharding_worker
import torch
import torch.distributed as dist
from sharding_runs import Case, Run, build, differ, named, shard_as
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from adax_triton import AdaX

LIMIT = 100.0  # norms are near 200, and near 20 at the steps of small gradients
STEPS = range(2)


def full_gradient(param: Tensor, index: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    grad = torch.randint(-2, 3, param.shape, generator=generator)
    return (grad * (step != 1) + (torch.rand(param.shape, generator=generator) < 0.02)).to(param.dtype)


def set_gradients(run: Run, step: int, nan: bool = False) -> None:
    """Set gradients; with `nan`, the first element (on rank 0) is NaN."""
    for index, param in enumerate(run[1].param_groups[0]["params"]):
        grad = full_gradient(param, index, step)
        if nan and index == 0:
            grad.view(-1)[0] = torch.nan
        param.grad = shard_as(grad, param) if isinstance(param, DTensor) else grad


def train(run: Run, steps: Iterable[int] = STEPS) -> list[float]:
    """Step and return the gradient norms."""
    norms = []
    for step in steps:
        set_gradients(run, step)
        run[1].step()
        norms.append(float(run[1].grad_norm))
    return norms


def manual_shards(mesh: DeviceMesh | None) -> Run:
    """Build sharded (rows, columns, uneven), replicated and plain parameters."""
    model = nn.Module()
    placements = {
        "rows": [Shard(0)],
        "columns": [Shard(1)],
        "uneven": [Shard(0)],
        "replica": [Replicate()],
        "plain": [],
    }
    for index, (name, placement) in enumerate(placements.items()):
        full = torch.randn(33 if name == "uneven" else 64, 64, generator=torch.Generator().manual_seed(index))
        sharded = mesh is not None and placement
        tensor = distribute_tensor(full, mesh, placement, src_data_rank=None) if sharded else full
        setattr(model, name, nn.Parameter(tensor))
    return model, AdaX(model.parameters(), lr=1e-2)


def check_dtensors(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    runs = (manual_shards(mesh), manual_shards(None)) if case.get("manual") else (build(case, mesh), build(case, None))
    for _, optimizer in runs:
        optimizer.max_grad_norm = LIMIT
    norms = [train(run) for run in runs]
    results: dict[str, Any] = {"norms": norms, "differing": differ(*runs)}
    before = [(name, tensor.detach().clone()) for name, tensor in named(runs[0]).items()]
    set_gradients(runs[0], 3, nan=True)
    runs[0][1].step()
    results["skipped"] = all(torch.equal(local(tensor), local(named(runs[0])[name])) for name, tensor in before)
    results["norm"] = str(float(runs[0][1].grad_norm))
    results["more"] = [train(run, [4]) for run in runs]
    return {**results, "differing after": differ(*runs)}


def local(tensor: Tensor) -> Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def plain_params() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((70, 67), (7,), (64, 64), (), (33, 3))
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def twin() -> tuple[list[nn.Parameter], Run]:
    params = plain_params()
    return params, (nn.ParameterList(params), AdaX(params, lr=1e-2, max_grad_norm=LIMIT))


def check_zero(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Check ZeRO-1: each rank's optimizer has a part of the parameters."""
    params, (expected, run) = plain_params(), twin()
    optimizer = ZeroRedundancyOptimizer(
        params, optimizer_class=AdaX, lr=1e-2, max_grad_norm=LIMIT, norm_process_group=dist.group.WORLD
    )
    norms: list[list[float]] = [[], train(run)]
    for step in STEPS:
        for index, param in enumerate(params):
            param.grad = full_gradient(param, index, step)
        optimizer.step()
        norms[0].append(float(optimizer.optim.grad_norm))
    return {"norms": norms, "differing": differing_indices(params, expected)}


def check_unequal_parts(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Check ranks with different parameters; with "idle" only rank 0 has any."""
    params, (expected, run) = plain_params(), twin()
    rank = dist.get_rank()
    mine = range(rank, len(params), 2) if not case.get("idle") else range(len(params) if rank == 0 else 0)
    # An optimizer needs at least one parameter; this one has no gradient.
    frozen = nn.Parameter(torch.ones(3))
    optimizer = AdaX(
        [*(params[index] for index in mine), frozen], lr=1e-2, max_grad_norm=LIMIT, norm_process_group=dist.group.WORLD
    )
    norms: list[list[float]] = [[], train(run)]
    for step in STEPS:
        for index in mine:
            params[index].grad = full_gradient(params[index], index, step)
        optimizer.step()
        norms[0].append(float(optimizer.grad_norm))
    results: dict[str, Any] = {
        "norms": norms,
        "differing": differing_indices([params[index] for index in mine], [expected[index] for index in mine]),
    }
    before = [params[index].detach().clone() for index in mine]
    for index in mine:
        params[index].grad = full_gradient(params[index], index, 3)
        if index == 0:
            params[0].grad[69, 66] = torch.nan
    optimizer.step()
    results["skipped"] = differing_indices([params[index] for index in mine], before) == []
    return {**results, "norm": str(float(optimizer.grad_norm))}


def differing_indices(params: list[nn.Parameter], expected: Iterable[Tensor]) -> list[int]:
    pairs = enumerate(zip(params, expected, strict=True))
    return [index for index, (param, other) in pairs if not torch.equal(param, other)]


if __name__ == "__main__":
    sharding_worker.CHECKS.update(
        {"dtensors": check_dtensors, "zero": check_zero, "unequal parts": check_unequal_parts}
    )
    sharding_worker.main(*sys.argv[1:])
