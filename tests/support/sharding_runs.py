"""Model, training and comparison of runs for the sharding tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from adax_triton import AdaX

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAVED_AT, STEPS = 2, 4
Case = dict[str, Any]
Run = tuple[nn.Module, AdaX]


class Model(nn.Module):
    """Model with uneven, empty and quantized shards of two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(67, 96)
        self.hidden = nn.Linear(96, 64)
        self.cube = nn.Parameter(torch.randn(33, 4, 32))
        self.row = nn.Parameter(torch.randn(1, 4096))  # quantized; rank 0 has all of it
        self.out = nn.Linear(33, 3)
        self.gain = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(self.embed(tokens))).view(-1, 2, 32).sum(1) @ self.cube.sum(1).t()
        return self.out(x) * self.gain + self.row.mean()


def options(case: dict[str, Any]) -> dict[str, Any]:
    names = ("states", "master_weights", "weight_rounding")
    return {"lr": 1e-2, "weight_decay": 1e-2, "seed": 7} | {name: case[name] for name in names if name in case}


def build(case: dict[str, Any], mesh: DeviceMesh | None, seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model = Model().to(DTYPES[case["dtype"]])
    if mesh is not None:
        fully_shard(model.hidden, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, AdaX(model.parameters(), **options(case))


def full_gradient(param: Tensor, index: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(param.shape, generator=generator).to(param.dtype)


def train(run: Run, steps: Iterable[int]) -> Run:
    for step in steps:
        for index, param in enumerate(run[1].param_groups[0]["params"]):
            grad = full_gradient(param, index, step)
            param.grad = shard_as(grad, param) if isinstance(param, DTensor) else grad
        run[1].step()
    return run


def named(run: Run) -> dict[str, Tensor]:
    """Return the optimizer's parameters by name; a deepcopied optimizer has its own."""
    names = [name for name, _ in run[0].named_parameters()]
    return dict(zip(names, run[1].param_groups[0]["params"], strict=True))


def shard_as(tensor: Tensor, like: DTensor) -> DTensor:
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    return tensor.detach().full_tensor()


def tensors_of(run: Run) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, param in named(run).items():
        found[name] = param
        for part, value in run[1].state[param].items():
            if part == "step":
                found[f"{name}/{part}"] = torch.tensor(int(value))
                continue
            assert type(value) is type(param.data), (name, part)
            found[f"{name}/{part}"] = value
            assert getattr(value, "placements", 0) == getattr(param, "placements", 0)
    return found


def differing(tensors: dict[str, Tensor], expected: dict[str, Tensor], gather: bool = False) -> list[str]:
    """Return names of missing tensors and of different dtypes, shapes, bits.

    Args:
        tensors: sharded or plain tensors by name.
        expected: sharded or plain tensors by name.
        gather: compare full tensors on each rank. Default: False, this rank's shards, which is faster.
    """
    wrong = sorted(set(tensors) ^ set(expected))
    for name in sorted(set(tensors) & set(expected)):
        ours, theirs = tensors[name], expected[name]
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            wrong.append(name)
            continue
        if gather or not isinstance(ours, DTensor):
            ours, theirs = gathered(ours), gathered(theirs)
        else:
            ours, theirs = (
                tensor if isinstance(tensor, DTensor) else shard_as(tensor, ours) for tensor in (ours, theirs)
            )
            ours, theirs = ours.detach().to_local(), theirs.detach().to_local()
        if ours.shape != theirs.shape or not torch.equal(bits(ours), bits(theirs)):
            wrong.append(name)
    return wrong


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def differ(run: Run, expected: Run, gather: bool = False) -> list[str]:
    return differing(tensors_of(run), tensors_of(expected), gather)
