"""Compare gradient release with `step()` under FSDP2; check that DDP raises.

Usage, once per rank: RANK=... python gradient_release_worker.py FOLDER

Writes FOLDER/RANK.json: {check: error or ""}.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from adax_triton import AdaXW
from adax_triton.gradient_release import GradientRelease


def sharded(released: bool) -> tuple[nn.Module, AdaXW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 32), nn.Tanh(), nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 64, bias=False))
    for layer in (model[2], model[4], model):
        fully_shard(layer)
    optimizer = AdaXW(model.parameters(), states="8bit_v16", lr=0.1, keep_float32=lambda param: param.ndim < 2)
    if released:
        GradientRelease(optimizer)
    return model, optimizer


def batch(step: int) -> Tensor:
    return torch.randn(5, 9, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def shards(optimizer: AdaXW) -> list[Tensor]:
    """Return this rank's shards of weights, states and step counts, in order."""
    params = optimizer.param_groups[0]["params"]
    values = [value for param in params for value in (param.detach(), *optimizer.state[param].values())]
    return [value.to_local() if isinstance(value, DTensor) else torch.as_tensor(value) for value in values]


def differing(left: AdaXW, right: AdaXW) -> str:
    pairs = list(zip(shards(left), shards(right), strict=True))
    count = sum(not torch.equal(a, b) for a, b in pairs)
    return f"{count} of {len(pairs)} differ" if count else ""


def check_fsdp2() -> str:
    (model, optimizer), (twin, plain) = sharded(True), sharded(False)
    for step in range(3):
        model(batch(step)).square().sum().backward()
        if any(param.grad is not None for param in model.parameters()):
            return "a gradient is left"
        optimizer.step()
        twin(batch(step)).square().sum().backward()
        plain.step()
        plain.zero_grad()
    return differing(optimizer, plain)


def check_accumulation() -> str:
    (model, optimizer), (twin, plain) = sharded(True), sharded(False)
    for run in (model, twin):
        for step in range(2):
            run.set_requires_gradient_sync(step == 1)
            run(batch(step)).square().sum().backward()
    plain.step()
    return differing(optimizer, plain)


def check_twice() -> str:
    optimizers = []
    for released in (False, True):
        torch.manual_seed(0)
        shared = nn.Linear(9, 9)
        model = nn.Sequential(nn.Linear(9, 9), shared, nn.Tanh(), shared)
        for layer in (shared, model):
            fully_shard(layer)
        optimizers.append(AdaXW(model.parameters()))
        if released:
            GradientRelease(optimizers[-1])
        for step in range(2):
            model(batch(step)).square().sum().backward()
            optimizers[-1].step()
            optimizers[-1].zero_grad()
    return differing(*optimizers)


def check_ddp() -> str:
    for as_views in (False, True):
        model = DistributedDataParallel(nn.Linear(9, 3), gradient_as_bucket_view=as_views)
        GradientRelease(AdaXW(model.parameters()))
        try:
            model(batch(0)).sum().backward()
        except RuntimeError as error:
            if "DistributedDataParallel" not in str(error):
                return str(error)
        else:
            return "nothing raised"
    return ""


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    checks = {
        "fsdp2": check_fsdp2,
        "accumulation": check_accumulation,
        "twice": check_twice,
        "ddp": check_ddp,
    }
    found = {name: check() for name, check in checks.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), Path(sys.argv[1]))
