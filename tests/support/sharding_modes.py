"""Checks for all modes: sharded steps, copies, checkpoints equal the unsharded run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharding_runs import SAVED_AT, STEPS, Case, Run, build, differ, differing, tensors_of, train
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def check_copies(case: Case, mesh: DeviceMesh, halfway: Run, end: Run) -> dict[str, list[str]]:
    twin = halfway[0], copy.deepcopy(halfway[1])
    loaded = build(case, mesh, seed=1)
    loaded[0].load_state_dict(halfway[0].state_dict())
    loaded[1].load_state_dict(halfway[1].state_dict())
    remaining = range(SAVED_AT, STEPS)
    return {
        "deepcopy": differ(train(twin, remaining), end),
        "state_dict": differ(train(loaded, remaining), end),
    }


def check_unsharded_state_dicts(case: Case, mesh: DeviceMesh, halfway: Run, end: Run) -> dict[str, list[str]]:
    """Check that sharded runs load unsharded state dicts, and vice versa."""
    plain = train(build(case, None), range(SAVED_AT))
    direct, unsharded = build(case, mesh, seed=1), build(case, None, seed=1)
    set_model_state_dict(direct[0], get_model_state_dict(plain[0]), options=FULL)
    direct[1].load_state_dict(plain[1].state_dict())
    unsharded[0].load_state_dict(plain[0].state_dict())
    unsharded[1].load_state_dict(halfway[1].state_dict())
    remaining = range(SAVED_AT, STEPS)
    return {
        "from unsharded": differ(train(direct, remaining), end),
        "into unsharded": differ(train(unsharded, remaining), end),
        "torch gathers": check_torch_gathers(halfway, plain),
        "torch distributes": check_torch_distributes(build(case, mesh, seed=1), plain, end),
    }


def check_torch_gathers(halfway: Run, plain: Run) -> list[str]:
    def parts(saved: dict[str, Any]) -> dict[str, Tensor]:
        named = {f"{name}/{part}": value for name, state in saved.items() for part, value in state.items()}
        return {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in named.items()}

    saved = get_optimizer_state_dict(*halfway, options=FULL).get("state", {})
    if dist.get_rank() > 0:  # only rank 0 has the state dict
        return list(saved)
    return differing(parts(saved), parts(get_optimizer_state_dict(*plain)["state"]))


def check_torch_distributes(run: Run, plain: Run, end: Run) -> list[str]:
    set_model_state_dict(run[0], get_model_state_dict(plain[0]), options=FULL)
    set_optimizer_state_dict(*run, optim_state_dict=get_optimizer_state_dict(*plain), options=FULL)
    return differ(train(run, range(SAVED_AT, STEPS)), end)


def checkpoint_of(run: Run) -> dict[str, Any]:
    return {"model": get_model_state_dict(run[0]), "optim": get_optimizer_state_dict(*run)}


def load_checkpoint(folder: Path, run: Run) -> Run:
    contents = checkpoint_of(run)
    dcp.load(contents, checkpoint_id=folder, no_dist=not dist.is_initialized())
    set_model_state_dict(run[0], contents["model"])
    set_optimizer_state_dict(*run, optim_state_dict=contents["optim"])
    return run


def check_without_shards(case: Case, folder: Path) -> list[str]:
    """Load the checkpoint of two ranks without a process group."""
    loaded = load_checkpoint(folder / case["name"], build(case, None, seed=1))
    return differ(train(loaded, range(SAVED_AT, STEPS)), train(build(case, None), range(STEPS)))


def check_mode(case: Case, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    steps = range(case.get("steps", STEPS))
    end, sharded = (train(build(case, run_mesh), steps) for run_mesh in (None, mesh))
    results: dict[str, Any] = {"trajectory": differ(sharded, end, gather=True), "parts": sorted(tensors_of(end))}
    start = dict(build(case, None)[0].named_parameters())
    results["still"] = [name for name, param in end[0].named_parameters() if torch.equal(param, start[name])]
    saved = folder / case["name"]
    if not case["checkpoints"]:
        return results
    if dist.get_world_size() > 2:
        loaded = load_checkpoint(saved, build(case, mesh, seed=1))
        return {**results, "resharded": differ(train(loaded, range(SAVED_AT, STEPS)), end)}
    halfway = train(build(case, mesh), range(SAVED_AT))
    dcp.save(checkpoint_of(halfway), checkpoint_id=saved)
    loaded = load_checkpoint(saved, build(case, mesh, seed=1))
    results["checkpoint"] = differ(train(loaded, range(SAVED_AT, STEPS)), end)
    if not case["copies"]:
        return results
    results |= check_copies(case, mesh, halfway, end)
    return results | check_unsharded_state_dicts(case, mesh, halfway, end)
