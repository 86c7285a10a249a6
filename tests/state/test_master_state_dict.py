"""Test export and load of float32 weights with 16-bit parameters.

Oracle: training of float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adax_triton import AdaX
from adax_triton.state.allocation import local_state_tensors
from adax_triton.update.quantized_update import load_master


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TiedModel(nn.Module):
    """Model with tied, frozen and unoptimized weights, and float and integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(70, 64), nn.Linear(64, 70, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(64)
        self.frozen, self.unoptimized = (nn.Parameter(normal(5, seed=seed), requires_grad=seed > 3) for seed in (3, 4))


def make_model(device: torch.device, **options: Any) -> tuple[TiedModel, AdaX]:
    torch.manual_seed(0)
    model = TiedModel().to(device, torch.bfloat16)
    model.norm.running_mean.fill_(0.3)
    owned = [param for name, param in model.named_parameters() if name != "unoptimized"]
    return model, AdaX(owned, lr=0.01, states="8bit_v16", **options)


def step_model(model: TiedModel, optimizer: AdaX, steps: Iterable[int]) -> None:
    for step in steps:
        for param in (model.embed.weight, model.norm.weight, model.norm.bias):
            param.grad = normal(*param.shape, seed=step).to(param.device, param.dtype)
        optimizer.step()


@pytest.mark.parametrize("stepped", [False, True], ids=["before the first step", "after two"])
@pytest.mark.parametrize("target", ["float32", "24bit", None])
def test_master_state_dict_has_the_exact_weights(target: str | None, stepped: bool, native_cpu: torch.device) -> None:
    model, optimizer = make_model(native_cpu, master_weights="float32")
    step_model(model, optimizer, (1, 2) if stepped else ())
    exported = optimizer.master_state_dict(model)
    assert exported.keys() == model.state_dict().keys()
    assert torch.equal(exported["embed.weight"], exported["head.weight"])
    assert exported["norm.running_mean"].dtype == torch.bfloat16
    assert exported["norm.num_batches_tracked"].dtype == torch.int64
    for name, param in model.named_parameters():
        master = local_state_tensors(optimizer.state[param])["master"] if optimizer.state.get(param) else None
        assert exported[name].dtype == torch.float32
        assert torch.equal(exported[name], load_master(param.detach(), master))
    # float32 weights that bfloat16 cannot represent.
    given = {name: value.clone() for name, value in exported.items()}
    given["embed.weight"] = given["head.weight"] = normal(70, 64, seed=9)
    given["norm.weight"] = normal(64, seed=8)
    twin, other = make_model(native_cpu, master_weights=target)
    other.load_master_state_dict(twin, given)
    reloaded = other.master_state_dict(twin)
    unit = {"float32": 0.0, "24bit": 2.0**-16, None: 2.0**-8}[target]
    for name, value in given.items():
        assert bool(((reloaded[name].double() - value.double()).abs() <= unit * value.double().abs()).all()), name
        assert twin.state_dict()[name].dtype == model.state_dict()[name].dtype
    step_model(twin, other, [3])
    assert twin.head.weight is twin.embed.weight


def test_loaded_masters_continue_as_float32_weights(native_cpu: torch.device) -> None:
    given = normal(4100, seed=1)
    model = nn.ParameterDict({"weight": nn.Parameter(given.bfloat16())})
    optimizer = AdaX(model.parameters(), lr=0.01, states="8bit_v16", master_weights="float32")
    optimizer.load_master_state_dict(model, {"weight": given})
    plain = given.clone().requires_grad_()
    twin = AdaX([plain], lr=0.01, states="8bit_v16")
    for step in (1, 2, 3):
        model["weight"].grad = normal(4100, seed=10 + step).bfloat16()
        plain.grad = model["weight"].grad.float()
        optimizer.step()
        twin.step()
    assert torch.equal(optimizer.master_state_dict(model)["weight"], plain)


def contents(model: TiedModel, optimizer: AdaX) -> list[Any]:
    tensors = [*model.state_dict().values()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [tensor.reshape(-1).view(torch.uint8).tolist() for tensor in tensors]


MISMATCHES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "norm.bias": lambda given: given.pop("norm.bias"),
    "extra": lambda given: given.update(extra=torch.zeros(1)),
    "embed.weight": lambda given: given.update({"embed.weight": torch.zeros(70, 63)}),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatched_master_state_dict_changes_nothing(name: str, native_cpu: torch.device) -> None:
    model, optimizer = make_model(native_cpu, master_weights="float32")
    step_model(model, optimizer, (1, 2))
    before = contents(model, optimizer)
    given = {key: value + 1 for key, value in optimizer.master_state_dict(model).items()}
    MISMATCHES[name](given)
    with pytest.raises(ValueError, match=name):
        optimizer.load_master_state_dict(model, given)
    assert contents(model, optimizer) == before
