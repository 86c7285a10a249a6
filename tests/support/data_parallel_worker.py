"""Train with DDP, ZeroRedundancyOptimizer and FSDP1.

Oracles: torch's AdamW, and plain PyTorch.

Usage: as sharding_worker.py. A result lists the parts that differ, or gives the largest difference of weights.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import sharding_worker
import torch
import torch.distributed as dist
from sharding_runs import Case
from sharding_special import error_of
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, StateDictType
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adax_triton import AdamW, AdaXW

Run = tuple[nn.Module, Optimizer]
LOW: dict[str, Any] = {"lr": 1e-2, "states": "8bit_v16"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Model(nn.Module):
    """Two blocks; a layer that only odd batches use."""

    def __init__(self, with_unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.last = nn.Linear(33, 64), nn.Sequential(Block(), Block()), nn.Linear(64, 7)
        self.odd = nn.Linear(7, 7) if with_unused else None

    def forward(self, x: Tensor, step: int = 0) -> Tensor:
        out = self.last(self.blocks(self.first(x)))
        return self.odd(out) if self.odd is not None and step % 2 else out


def loss_of(model: nn.Module, step: int) -> Tensor:
    batch = torch.randn(5, 33, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
    dtype = next(model.parameters()).dtype
    return (model(batch.to(dtype), step).float() - 1).square().mean()


def train(run: Run, steps: Iterable[int], max_norm: float | None = None) -> Run:
    model, optimizer = run
    for step in steps:
        loss_of(model, step).backward()
        if max_norm is not None:
            model.clip_grad_norm_(max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    return run


def largest_difference(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    changes = [one.detach().float() - other.detach().float() for one, other in pairs]
    return float(torch.cat([change.flatten() for change in changes]).abs().max())  # a shard may be empty


def differing(left: nn.Module, right: nn.Module) -> list[str]:
    pairs = zip(left.named_parameters(), right.parameters(), strict=True)
    return [name for (name, one), other in pairs if not torch.equal(one, other)]


def both(train_with: Callable[[type[Optimizer]], nn.Module]) -> float:
    """Train with torch's AdamW and with AdamW; return the largest difference."""
    return largest_difference(train_with(torch.optim.AdamW), train_with(AdamW))


def check_ddp(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Compare DDP with torch's AdamW, and bit for bit without DDP."""
    unused = case["options"].get("find_unused_parameters", False)

    def build() -> nn.Module:
        return DistributedDataParallel(Model(unused), **case["options"])

    def accumulated(optimizer_class: type[Optimizer]) -> nn.Module:
        model = build()
        optimizer = optimizer_class(model.parameters(), lr=1e-3)
        for step in range(4):
            if not case["options"].get("static_graph"):
                with model.no_sync():
                    loss_of(model, step + 10).backward()
            train((model, optimizer), [step])
        return model

    model, twin = build(), Model(unused)
    optimizers = [AdaXW(one.parameters(), **LOW, max_grad_norm=0.1) for one in (model, twin)]
    for step in range(4):
        loss_of(model, step).backward()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = None if param.grad is None else param.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        optimizers[0].zero_grad(set_to_none=step % 2 == 0)
    return {"torch": both(accumulated), "differing": differing(model, twin)}


def check_ways(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Check communication hooks, `join`, PostLocalSGDOptimizer and optimizers in backward."""

    def hooked(optimizer_class: type[Optimizer]) -> nn.Module:
        model = DistributedDataParallel(Model(), gradient_as_bucket_view=True)
        model.register_comm_hook(None, fp16_compress_hook)
        return train((model, optimizer_class(model.parameters(), lr=1e-3)), range(3))[0]

    def joined(optimizer_class: type[Optimizer]) -> nn.Module:
        model = DistributedDataParallel(Model())
        with model.join():
            return train((model, optimizer_class(model.parameters(), lr=1e-3)), range(2 + dist.get_rank()))[0]

    def local_sgd(optimizer_class: type[Optimizer]) -> nn.Module:
        averager = PeriodicModelAverager(period=2, warmup_steps=1)
        model = Model()
        optimizer = PostLocalSGDOptimizer(optimizer_class(model.parameters(), lr=1e-3), averager)
        train((model, optimizer), range(2))
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return train((model, optimizer), range(2, 4))[0]

    def in_backward(optimizer_class: type[Optimizer]) -> nn.Module:
        model = Model()
        _apply_optimizer_in_backward(optimizer_class, model.parameters(), {"lr": 1e-3})
        for step in range(3):
            loss_of(model, step).backward()
        return model

    found: dict[str, Any] = {one.__name__: both(one) for one in (hooked, joined, local_sgd, in_backward)}
    model = DistributedDataParallel(Model())
    found["fused optimizer"] = error_of(lambda: model._register_fused_optim(AdaXW, lr=1e-3))
    overlapped = {"optimizer_class": AdaXW, "overlap_with_ddp": True, "lr": 1e-3}
    found["overlap"] = error_of(lambda: ZeroRedundancyOptimizer(model.parameters(), **overlapped))
    return found


def states_differ(left: dict[Any, Any], right: dict[Any, Any]) -> list[str]:
    names = [(key, name) for key, state in right.items() for name in state]
    if {key: list(state) for key, state in left.items()} != {key: list(state) for key, state in right.items()}:
        return ["keys"]
    same = (torch.equal(torch.as_tensor(left[key][name]), torch.as_tensor(right[key][name])) for key, name in names)
    return [f"{key}/{name}" for (key, name), equal in zip(names, same, strict=True) if not equal]


def check_zero(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    """Check ZeroRedundancyOptimizer: it equals DDP with one optimizer, bit for bit."""

    def build(**options: Any) -> Run:
        model = DistributedDataParallel(Model())
        return model, ZeroRedundancyOptimizer(
            model.parameters(), AdaXW, parameters_as_bucket_view=case["bucket_view"], **options
        )

    def redundant(optimizer_class: type[Optimizer]) -> nn.Module:
        model = DistributedDataParallel(Model())
        options = {"parameters_as_bucket_view": case["bucket_view"], "lr": 1e-3}
        return train((model, ZeroRedundancyOptimizer(model.parameters(), optimizer_class, **options)), range(3))[0]

    results: dict[str, Any] = {"torch": both(redundant)}
    for states in ("float32", "8bit_v16"):
        model, optimizer = train(build(lr=1e-2, states=states), range(3))
        twin = DistributedDataParallel(Model())
        plain = AdaXW(twin.parameters(), lr=1e-2, states=states)
        train((twin, plain), range(3))
        optimizer.consolidate_state_dict()
        saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(saved)
        results[f"{states} saved"] = states_differ(saved[0]["state"], plain.state_dict()["state"])
        # A loaded state keeps the precision of the checkpoint: ZeroRedundancyOptimizer bypasses `load_state_dict`.
        loaded = {f"{states} into {target}": build(lr=1e-3, states=target) for target in ("float32", "8bit_v16")}
        for copied, sharded in loaded.values():
            copied.load_state_dict(model.state_dict())
            sharded.load_state_dict(copy.deepcopy(saved[0]))
        train((twin, plain), range(3, 5))
        results |= {name: differing(train(run, range(3, 5))[0], twin) for name, run in loaded.items()}
    return results


def build_fsdp1(
    case: Case, optimizer_class: type[Optimizer], dtype: torch.dtype = torch.float32, **options: Any
) -> Run:
    model = FullyShardedDataParallel(
        Model().to(dtype),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=case["use_orig_params"],
        sharding_strategy=ShardingStrategy[case["strategy"]],
        mixed_precision=MixedPrecision(**options.pop("precision", {})),
        device_id=torch.device("cpu"),
    )
    return model, optimizer_class(model.parameters(), **{"lr": 1e-3, **options})


def check_fsdp1(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    def clipped(optimizer_class: type[Optimizer]) -> nn.Module:
        return train(build_fsdp1(case, optimizer_class), range(3), max_norm=0.1)[0]

    def scaled(optimizer_class: type[Optimizer]) -> nn.Module:
        low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        model, optimizer = build_fsdp1(case, optimizer_class, precision=low)
        scaler = ShardedGradScaler(device="cpu", init_scale=1024.0)
        for step in range(3):
            infinite = step == 1 and dist.get_rank() == 0  # all ranks skip
            scaler.scale(loss_of(model, step) * (torch.inf if infinite else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 512.0
        return model

    results: dict[str, Any] = {"clipped": both(clipped), "scaled": both(scaled)}
    for dtype in (torch.float32, torch.bfloat16):
        run = train(build_fsdp1(case, AdaXW, dtype), range(2))
        # A dictionary shares memory with the model.
        weights, states = copy.deepcopy(get_state_dict(*run))
        with FullyShardedDataParallel.state_dict_type(run[0], StateDictType.SHARDED_STATE_DICT):
            sharded = copy.deepcopy(FullyShardedDataParallel.optim_state_dict(*run))
        others = [build_fsdp1(case, AdaXW, dtype) for _ in range(2)]
        set_state_dict(*others[0], model_state_dict=weights, optim_state_dict=states)
        others[1][0].load_state_dict(run[0].state_dict())
        with FullyShardedDataParallel.state_dict_type(others[1][0], StateDictType.SHARDED_STATE_DICT):
            others[1][1].load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(*others[1], sharded))
        end = train(run, range(2, 4))[0]
        ways = zip(("get_state_dict", "optim_state_dict"), others, strict=True)
        results |= {f"{way} {dtype}": differing(train(other, range(2, 4))[0], end) for way, other in ways}
    return results


def check_fsdp1_errors(case: Case, mesh: DeviceMesh) -> dict[str, Any]:
    refused: dict[str, dict[str, Any]] = {
        "8bit": {"states": "8bit"},
        "bfloat16": {"states": "bfloat16"},
        "master": {"master_weights": "24bit", "dtype": torch.bfloat16},
        "norm": {"max_grad_norm": 0.5},
    }
    found = {name: error_of(lambda given=given: build_fsdp1(case, AdaXW, **given)) for name, given in refused.items()}
    model, optimizer = build_fsdp1(case, AdaXW)
    loss_of(model, 0).backward()
    optimizer.max_grad_norm = 0.5
    found["norm set later"] = error_of(optimizer.step)
    grouped = build_fsdp1(case, AdaXW, max_grad_norm=0.1, norm_process_group=dist.group.WORLD)
    found["norm of a group"] = largest_difference(
        train(grouped, range(2))[0], train(build_fsdp1(case, AdaXW), range(2), max_norm=0.1)[0]
    )
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # of FSDP1
    sharding_worker.CHECKS.update(
        {
            "ddp": check_ddp,
            "ways": check_ways,
            "zero": check_zero,
            "fsdp1": check_fsdp1,
            "fsdp1 errors": check_fsdp1_errors,
        }
    )
    sharding_worker.main(*sys.argv[1:])
