"""Train and checkpoint with FSDP2 as torchtitan does.

Oracles: torch's AdamW, and one process.

Usage: as sharding_worker.py. A result lists what differs, or gives the largest difference of weights.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sharding_worker
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fsdp2_containers import InBackwardContainer, OptimizersContainer
from sharding_runs import Case, differing, gathered
from sharding_special import error_of
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from adax_triton import AdamW, AdaXW, GradientRelease

Run = tuple[nn.Module, Optimizer]
MODES: dict[str, dict[str, Any]] = {
    "float32": {},
    "8bit_v16": {"states": "8bit_v16"},
    "8bit, 24bit": {"states": "8bit", "master_weights": "24bit"},
    "bfloat16, float32": {"states": "bfloat16", "master_weights": "float32"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sharded": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True, "cpu_offload": True},
    "broadcast": {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
}
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Two blocks, a tied and a frozen weight."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.blocks = nn.Embedding(67, 64), nn.ModuleList([Block(), Block()])
        self.norm, self.out = nn.LayerNorm(64), nn.Linear(64, 67, bias=False)
        self.out.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.1)
        self.frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x.to(self.norm.weight.dtype)))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices decay, vectors do not."""
    params = list(model.parameters())
    return [
        {"params": [param for param in params if param.ndim > 1], "weight_decay": 0.1},
        {"params": [param for param in params if param.ndim == 1], "weight_decay": 0.0},
    ]


def shard(model: Model, mesh: DeviceMesh, case: Case) -> None:
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": case.get("reshard_after_forward", True)}
    if case.get("offload"):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if case.get("mixed") else {}
    for block in model.blocks:
        if case.get("compile"):
            block.compile(backend="aot_eager")
        output = {"output_dtype": torch.float32} if low else {}
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**low, **output), **options)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**low), **options)


def build(case: Case, mesh: DeviceMesh | None, optimizer_class: type[Optimizer] = AdaXW, seed: int = 0) -> Run:
    model = Model(seed)
    mode = MODES[case.get("mode", "float32")]
    if "master_weights" in mode:
        model.to(torch.bfloat16)
    if mesh is not None:
        shard(model, mesh, case)
    return model, optimizer_class(groups(model), lr=case.get("lr", 1e-3), **mode)


def backward(model: nn.Module, step: int) -> None:
    tokens = torch.randint(0, 67, (4, 8), generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
    nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), (tokens * 7 % 67).flatten()).backward()


def train(run: Run, steps: Iterable[int], schedule: LambdaLR | None = None) -> Run:
    """Accumulate two batches per step, clip, step."""
    model, optimizer = run
    for step in steps:
        for half in range(2):
            model.set_requires_gradient_sync(half == 1)
            backward(model, 2 * step + half)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    return run


def tensors_of(run: Run) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, param in run[0].named_parameters():
        found[name] = param
        found |= {f"{name}/{part}": torch.as_tensor(value) for part, value in run[1].state.get(param, {}).items()}
    return found


def differ(run: Run, other: Run) -> list[str]:
    return differing(tensors_of(run), tensors_of(other))


def largest_difference(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    # Unlike max(), the maximum of a tensor is NaN if a value is.
    return float(torch.stack([(gathered(one) - gathered(other)).detach().abs().max() for one, other in pairs]).max())


def check_training(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Compare with torch's AdamW, and with an unsharded model bit for bit."""
    if case.get("hsdp"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    runs = [build(case, mesh, optimizer_class) for optimizer_class in (torch.optim.AdamW, AdamW)]
    for run in runs:
        train(run, range(3), LambdaLR(run[1], lambda step: min(1.0, (step + 1) / 3)))
    sharded, twin = build({**case, "mode": "8bit_v16"}, mesh), build({"mode": "8bit_v16"}, None)
    for step in range(3):
        backward(sharded[0], step)
        for param, other in zip(sharded[0].parameters(), twin[0].parameters(), strict=True):
            other.grad = None if param.grad is None else gathered(param.grad).clone()
        for _, optimizer in (sharded, twin):
            optimizer.step()
            optimizer.zero_grad()
    return {"torch": largest_difference(runs[0][0], runs[1][0]), "differing": differ(sharded, twin)}


def check_options(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Load with each option, saved before and after the first step."""
    results = {}
    for name, options in OPTIONS.items():
        for done in (0, 2):
            run = train(build(case, mesh), range(done))
            weights, states = get_state_dict(*run, options=StateDictOptions(**options))
            if options.get("full_state_dict") and "broadcast_from_rank0" not in options:  # only rank 0 has it
                saved = [(weights, states)]
                dist.broadcast_object_list(saved)
                weights, states = saved[0]
            # A loaded dictionary shares memory with the run.
            weights, states = copy.deepcopy((weights, states))
            loaded = build(case, mesh, seed=1)
            # set_state_dict would deadlock with broadcast_from_rank0, where the other ranks have nothing.
            set_model_state_dict(loaded[0], weights, options=StateDictOptions(**options))
            set_optimizer_state_dict(*loaded, optim_state_dict=states, options=StateDictOptions(**options))
            results[f"{name} after {done} steps"] = differ(loaded, run)
            results[f"{name} after {done} steps, resumed"] = differ(*(train(one, [2]) for one in (loaded, run)))
    return results


def check_first_step(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Save before the first step, with this AdamW and with torch's."""
    runs = [build(case, mesh, optimizer_class) for optimizer_class in (torch.optim.AdamW, AdamW)]
    for run in runs:
        get_optimizer_state_dict(*run)
    untouched = build(case, mesh)[0]
    kept = [largest_difference(run[0], untouched) for run in runs]
    counts = [sorted({int(state["step"]) for state in run[1].state.values()}) for run in runs]
    return {"kept": kept, "counts": counts, "torch": largest_difference(*(train(run, range(3))[0] for run in runs))}


def check_without_state(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Load a flat state dict that lacks the state of a parameter."""
    run, loaded = train(build(case, mesh), range(2)), build(case, mesh)
    del run[1].state[run[0].norm.bias]
    loaded[0].load_state_dict(run[0].state_dict())
    states = copy.deepcopy(get_optimizer_state_dict(*run, options=FLAT))
    set_optimizer_state_dict(*loaded, optim_state_dict=states, options=FLAT)
    return {"differing": differ(loaded, run), "resumed": differ(*(train(one, [2]) for one in (loaded, run)))}


def check_containers(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Check torchtitan's containers: two model parts, hooks, flat checkpoints, steps in backward."""

    def parts() -> tuple[nn.Module, list[nn.Module]]:
        torch.manual_seed(0)
        halves: list[nn.Module] = [nn.ModuleDict({name: Block()}) for name in ("first", "second")]
        for half in halves:
            fully_shard(half[next(iter(half))], mesh=mesh)
        return nn.Sequential(*(half[next(iter(half))] for half in halves)), halves

    def loop(whole: nn.Module, container: Optimizer, steps: Iterable[int]) -> None:
        for step in steps:
            batch = torch.randn(5, 64, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            (whole(batch) - 1).square().mean().backward()
            container.step()
            container.zero_grad()

    mode, results = MODES[case["mode"]], {}
    ends = []
    for container_class in (OptimizersContainer, InBackwardContainer):
        whole, halves = parts()
        container, calls = container_class(halves, AdaXW, {"lr": 1e-2, **mode}), []
        container.register_step_pre_hook(lambda *given, calls=calls: calls.append(1))
        schedules = [LambdaLR(optimizer, lambda step: 0.5) for optimizer in container.optimizers]
        loop(whole, container, range(2))
        dcp.save({"optim": container}, checkpoint_id=case["folder"] / container_class.__name__)
        again, other_halves = parts()
        again.load_state_dict(whole.state_dict())
        resumed = container_class(other_halves, AdaXW, {"lr": 1e-3, **mode})
        dcp.load({"optim": resumed}, checkpoint_id=case["folder"] / container_class.__name__)
        loop(whole, container, [2])
        loop(again, resumed, [2])
        ends.append(dict(whole.named_parameters()))
        results[container_class.__name__] = differing(dict(again.named_parameters()), ends[-1])
        results[f"{container_class.__name__} hooks"] = [] if sum(calls) == 3 and schedules else [str(calls)]
    whole, _ = parts()
    optimizer = AdaXW(whole.parameters(), lr=5e-3, **mode)  # the schedule halves it
    GradientRelease(optimizer)
    loop(whole, optimizer, range(3))
    results["released"] = differing(dict(whole.named_parameters()), ends[0])
    return {**results, "in backward": differing(ends[1], ends[0])}


def checkpoint_of(run: Run) -> dict[str, Any]:
    return {"optim": get_optimizer_state_dict(*run, options=FLAT)}


def load(run: Run, folder: Path) -> Run:
    contents = checkpoint_of(run)
    dcp.load(contents, checkpoint_id=folder)
    set_optimizer_state_dict(*run, optim_state_dict=contents["optim"], options=FLAT)
    return run


def check_precision(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Load a checkpoint of another precision: an error, then as docs/checkpoints.md does."""
    saved = train(build({"mode": case["saved"]}, mesh), range(2))
    folder = case["folder"] / case["name"]
    dcp.save(checkpoint_of(saved), checkpoint_id=folder)
    wanted = build(case, mesh)
    wanted[0].load_state_dict(saved[0].state_dict())
    before = copy.deepcopy(tensors_of(wanted))
    error = "loaded"
    try:
        load(wanted, folder)
    except BaseException as problem:  # torch's CheckpointException is not an Exception
        error = " ".join(str(problem).split())
    # The states of the first step of `_init_optim_state`.
    kept = [name for name in differing(before, tensors_of(wanted)) if "/" not in name]
    results = check_in_memory(case, mesh, saved)
    source, expected = load(build({"mode": case["saved"]}, mesh), folder), build(case, mesh)
    wanted[1].load_state_dict(source[1].state_dict())
    expected[0].load_state_dict(saved[0].state_dict())
    expected[1].load_state_dict(saved[1].state_dict())
    return {**results, "error": error, "kept": kept, "converted": differ(train(wanted, [2]), train(expected, [2]))}


def check_in_memory(case: Case, mesh: DeviceMesh, saved: Run) -> dict[str, Any]:
    """Load state dicts of another precision, which are converted or refused."""
    expected = build(case, mesh)
    expected[0].load_state_dict(saved[0].state_dict())
    expected[1].load_state_dict(saved[1].state_dict())
    results = {}
    for name in ("sharded", "flat", "full"):
        options = StateDictOptions(**{**OPTIONS[name], "cpu_offload": False})
        states = copy.deepcopy(get_optimizer_state_dict(*saved, options=options))
        loaded = build(case, mesh)
        loaded[0].load_state_dict(saved[0].state_dict())
        problem = error_of(
            lambda run=loaded, states=states, options=options: set_optimizer_state_dict(
                *run, optim_state_dict=states, options=options
            )
        )
        results[name] = problem if problem != "accepted" else str(differ(loaded, expected))
    return results


def check_ranks(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Save a flat checkpoint on two ranks, load it on four."""
    folder = case["folder"] / f"ranks {case['mode']}"
    if dist.get_world_size() == 2:
        run = train(build(case, mesh), range(2))
        dcp.save(checkpoint_of(run), checkpoint_id=folder)
        full = {name: gathered(tensor) for name, tensor in tensors_of(run).items()}
        if dist.get_rank() == 0:
            torch.save(full, folder / "full.pt")
        return {}
    loaded = {name: gathered(tensor) for name, tensor in tensors_of(load(build(case, mesh), folder)).items()}
    states = {name: tensor for name, tensor in torch.load(folder / "full.pt").items() if "/" in name}
    return {"differing": differing({name: loaded[name] for name in states}, states)}


CHECKS = {
    "training": check_training,
    "options": check_options,
    "first step": check_first_step,
    "containers": check_containers,
    "without state": check_without_state,
    "precision": check_precision,
    "ranks": check_ranks,
}

if __name__ == "__main__":
    folder = Path(sys.argv[3])
    sharding_worker.CHECKS.update(
        {
            name: lambda case, mesh, check=check: check({**case, "folder": folder}, mesh)
            for name, check in CHECKS.items()
        }
    )
    sharding_worker.main(*sys.argv[1:])
