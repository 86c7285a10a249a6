"""Checks that run once: conversions, masters, placements, meshes, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from sharding_runs import (
    DTYPES,
    SAVED_AT,
    Case,
    Model,
    Run,
    build,
    differ,
    differing,
    named,
    options,
    shard_as,
    train,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from adax_triton import AdaX


def check_conversion(case: Case, mesh: DeviceMesh) -> dict[str, list[str]]:
    """Check that a state dict of one mode loads into another."""
    source, target = case["source"], case["target"]
    loaded = []
    for run_mesh in (mesh, None):
        saved, run = train(build(source, run_mesh), range(SAVED_AT)), build(target, run_mesh)
        run[0].load_state_dict(saved[0].state_dict())
        run[1].load_state_dict(saved[1].state_dict())
        loaded.append(run)
    return {"loaded": differ(*loaded), "stepped": differ(*(train(run, [SAVED_AT]) for run in loaded))}


def check_masters(case: Case, mesh: DeviceMesh) -> dict[str, list[str]]:
    plain, sharded = (train(build(case, run_mesh), range(SAVED_AT)) for run_mesh in (None, mesh))
    weights = [run[1].master_state_dict(run[0]) for run in (sharded, plain)]
    results = {"exported": differing(*weights)}
    in_float32 = {str(tensor.dtype) for tensors in weights for tensor in tensors.values()}
    for name, source in zip(("sharded", "unsharded"), weights, strict=True):
        fresh, expected = build(case, mesh, seed=1), build(case, None, seed=1)
        fresh[1].load_master_state_dict(fresh[0], source)
        expected[1].load_master_state_dict(expected[0], weights[1])
        results[f"loaded from {name}"] = differ(fresh, expected)
        results[f"stepped from {name}"] = differ(train(fresh, [0]), train(expected, [0]))
    return {**results, "dtypes": sorted(in_float32 - {"torch.float32"})}


def run_and_twin(case: Case, full: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> tuple[Run, Run]:
    """Return a sharded and an unsharded model with one parameter."""
    runs = []
    for tensor in (distribute_tensor(full, mesh, placements, src_data_rank=None), full.clone()):
        model = nn.Module()
        model.weight = nn.Parameter(tensor)
        runs.append((model, AdaX(model.parameters(), **options(case), keep_float32=case.get("keep_float32"))))
    return runs[0], runs[1]


def example(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def check_columns(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Compare Shard(1) with the unsharded run.

    They are equal except for the random bits of rounding.
    """
    results: dict[str, Any] = {}
    for states, keep_float32 in (("float32", None), ("8bit_v16", lambda param: True), ("bfloat16", None)):
        run, twin = run_and_twin({"states": states, "keep_float32": keep_float32}, example(70, 67), mesh, [Shard(1)])
        train(run, range(3)), train(twin, range(3))
        results[states] = differ(run, twin)
    state, expected = run[1].state[run[0].weight], twin[1].state[twin[0].weight]
    ratio = state["exp_avg_sq"].full_tensor().float() / expected["exp_avg_sq"].float()
    return {**results, "largest ratio": float(ratio.max()), "smallest ratio": float(ratio.min())}


def check_transposed(case: Case, mesh: DeviceMesh) -> dict[str, list[str]]:
    run, twin = run_and_twin({}, example(96, 70).t(), mesh, [Shard(0)])
    return {"float32": differ(train(run, range(3)), train(twin, range(3)))}


def error_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def check_errors(case: Case, mesh: DeviceMesh) -> dict[str, str]:
    low = {"states": "8bit_v16"}
    kept = {"states": "8bit_v16", "keep_float32": lambda param: True}
    results = {}
    for name, full, placement in (
        ("columns", example(64, 128), Shard(1)),
        ("rows of 50", example(128, 50), Shard(0)),
        ("one dimension", example(8192), Shard(0)),
        ("transposed", example(64, 128).t(), Shard(0)),
    ):
        results[name] = error_of(lambda full=full, placement=placement: run_and_twin(low, full, mesh, [placement]))
        results[f"{name}, kept"] = error_of(lambda w=full, p=placement: train(run_and_twin(kept, w, mesh, [p])[0], [0]))
    for name, full in (("small", example(50, 50)), ("replicated", example(70, 67))):
        run, twin = run_and_twin(low, full, mesh, [Shard(1) if name == "small" else Replicate()])
        results[name] = str(differ(train(run, [0]), train(twin, [0])))
    run, twin = run_and_twin({}, example(8, 8), mesh, [Shard(0)])
    run[0].weight.grad, twin[0].weight.grad = torch.ones(8, 8), shard_as(torch.ones(8, 8), run[0].weight)
    results["plain gradient"], results["sharded gradient"] = error_of(run[1].step), error_of(twin[1].step)
    _, source = run_and_twin(low, example(64, 128), mesh, [Replicate()])
    columns, _ = run_and_twin({}, example(64, 128), mesh, [Shard(1)])
    train(source, [0])
    results["codes into columns"] = error_of(lambda: columns[1].load_state_dict(source[1].state_dict()))
    return results


def check_gradients(case: Case, mesh: DeviceMesh) -> dict[str, list[str]]:
    """Check gradients with other placements than their parameter."""
    results = {}
    for name in ("partial", "replicated"):
        run, twin = run_and_twin({"states": "8bit_v16"}, example(67, 64), mesh, [Shard(0)])
        for step in range(3):
            # bfloat16 values make the sum over the ranks exact.
            grad = (example(67, 64) * 2.0**step).bfloat16().float()
            share = grad * [0.25, 0.75][dist.get_rank()] if name == "partial" else grad
            placement = Partial() if name == "partial" else Replicate()
            run[0].weight.grad = DTensor.from_local(share, mesh, [placement], run_check=False)
            twin[0].weight.grad = grad
            run[1].step(), twin[1].step()
        results[name] = differ(run, twin)
    return results


def check_backward(case: Case, mesh: DeviceMesh) -> dict[str, list[str]]:
    """Check FSDP2 forward and backward; the unsharded model gets the gathered gradients."""
    run, twin = build(case, mesh), build(case, None)
    losses = []
    for _ in range(3):
        tokens = torch.arange(8) * 7 % 67 + dist.get_rank()
        loss = run[0](tokens).float().square().mean()
        loss.backward()
        losses.append(float(loss))
        for param, other in zip(named(run).values(), named(twin).values(), strict=True):
            other.grad = param.grad.full_tensor()
        for _, optimizer in (run, twin):
            optimizer.step()
            optimizer.zero_grad()
    return {"steps": differ(run, twin), "losses": [] if losses[0] > losses[1] > losses[2] else [str(losses)]}


def check_meshes(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Check HSDP and FSDP2 with tensor parallelism on four ranks."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    twin = train(build(case, None), range(3))
    results = {"HSDP": differ(train(build(case, grid), range(3)), twin)}
    torch.manual_seed(0)
    model = Model().to(DTYPES[case["dtype"]])
    parallelize_module(model, grid["inner"], {"hidden": ColwiseParallel()})
    fully_shard(model, mesh=grid["outer"])
    run = model, AdaX(model.parameters(), **options(case))
    results["FSDP2 with tensor parallelism"] = differ(train(run, range(3)), twin)
    results["strided"] = [type(placement).__name__ for placement in model.hidden.weight.placements]
    torch.manual_seed(0)
    rows = Model().to(DTYPES[case["dtype"]])
    parallelize_module(rows, grid["inner"], {"hidden": RowwiseParallel()})
    fully_shard(rows, mesh=grid["outer"])
    results["rows"] = error_of(lambda: AdaX(rows.parameters(), **options(case)))
    return results


CHECKS = {
    "conversion": check_conversion,
    "masters": check_masters,
    "columns": check_columns,
    "transposed": check_transposed,
    "errors": check_errors,
    "gradients": check_gradients,
    "backward": check_backward,
    "meshes": check_meshes,
}
