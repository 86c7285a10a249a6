"""Test that other code can read, replace, extend, save and load states.

The access works as with torch's optimizers.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from adax_triton import AdamW, AdaXW
from adax_triton.moment_optimizer import MomentOptimizer
from adax_triton.state.precision import STATES

SHAPES = ((4096,), (41, 100), (3, 5), ())
MODES = [(states, master_weights) for states in STATES for master_weights in (None, "24bit", "float32")]
# Each format of moments and each format of masters once, not all pairs.
STEPPED_MODES = [("float32", None), ("bfloat16", "float32"), ("8bit_v16", "24bit"), ("8bit", None), ("8bit", "24bit")]


def parameters(
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors.append(torch.randn(2, 32, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last))
    return [nn.Parameter(tensor.to(device or "cpu", dtype)) for tensor in tensors]


def train(optimizer: MomentOptimizer, steps: list[int]) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param)
        optimizer.step()


def assert_equal_steps(left: MomentOptimizer, right: MomentOptimizer) -> None:
    for optimizer in (left, right):
        train(optimizer, [7, 8])
    pairs = zip(left.param_groups[0]["params"], right.param_groups[0]["params"], strict=True)
    assert all(torch.equal(first, other) for first, other in pairs)


@pytest.mark.parametrize(("states", "master_weights"), MODES)
def test_state_dict_holds_the_state_tensors(states: str, master_weights: str | None, native_cpu: torch.device) -> None:
    params = parameters(shapes=(*SHAPES, (2, 32, 64), (2048, 2)))
    optimizer = AdaXW(params, states=states, master_weights=master_weights)
    train(optimizer, [1])
    for state, saved in zip(optimizer.state.values(), optimizer.state_dict()["state"].values(), strict=True):
        assert state.keys() == saved.keys() and type(saved.pop("step")) is int
        for name, tensor in saved.items():
            assert tensor is state[name]
            # Collectives cannot send int8 or int16, and in-place loaders could mistake them for floats.
            assert tensor.is_floating_point() or tensor.dtype == torch.uint8
            assert tensor.is_floating_point() or tensor.shape[-1] in (1, 2)


@pytest.mark.parametrize(("states", "master_weights"), STEPPED_MODES)
def test_saved_states_can_be_assigned(states: str, master_weights: str | None, backend: torch.device) -> None:
    optimizers = [
        AdaXW(parameters(device=backend), states=states, master_weights=master_weights, lr=0.01) for _ in range(2)
    ]
    for optimizer in optimizers:
        train(optimizer, [1])
    left, right = optimizers
    saved = copy.deepcopy(left.state_dict()["state"])
    for param, index in zip(right.param_groups[0]["params"], saved, strict=True):
        right.state[param] = saved[index]  # as ZeroRedundancyOptimizer does
    assert_equal_steps(left, right)


def test_foreign_keys_are_kept_in_steps_and_checkpoints(backend: torch.device) -> None:
    params = parameters(torch.float32, backend)
    optimizer = AdaXW(params, states="8bit_v16")
    for param in params:
        optimizer.state[param]["slow"] = param.detach().clone()  # before the first step creates a state
        optimizer.state[param]["note"] = 5
    optimizer.state["scheduler"] = {"scale": torch.ones(1), "step": 3}
    optimizer.state["count"] = 7
    train(optimizer, [1, 2])
    twin = AdaXW(parameters(torch.float32, backend), states="8bit")
    train(twin, [1])
    saved = copy.deepcopy(optimizer.state_dict())
    twin.load_state_dict(saved)
    assert torch.equal(twin.state["scheduler"]["scale"], torch.ones(1)) and twin.state["scheduler"]["step"] == 3
    assert twin.state["count"] == 7
    for param, other in zip(params, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[param]["slow"], twin.state[other]["slow"])
        assert twin.state[other]["note"] == 5 and twin.state[other]["step"] == 2
    train(twin, [4])
    twin.load_state_dict({**saved, "state": {key: saved["state"][key] for key in range(len(params))}})
    assert "count" not in twin.state


@pytest.mark.parametrize("saving", STATES)
def test_in_place_load_is_correct_or_raises(saving: str, native_cpu: torch.device, tmp_path: Path) -> None:
    def build(states: str) -> tuple[nn.Module, AdaXW]:
        torch.manual_seed(0)
        model = nn.Linear(64, 128, bias=False)
        return model, AdaXW(model.parameters(), lr=0.01, states=states)

    model, optimizer = build(saving)
    train(optimizer, [1, 2, 3])
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    loaded = []
    for loading in STATES:
        other, twin = build(loading)
        other.load_state_dict(model.state_dict())
        template = {"optimizer": get_optimizer_state_dict(other, twin)}
        try:
            dcp.load(template, checkpoint_id=tmp_path)
        except (dcp.api.CheckpointException, RuntimeError) as error:
            assert "exp_avg" in str(error) or "group_exponents" in str(error)
            continue
        set_optimizer_state_dict(other, twin, optim_state_dict=template["optimizer"])
        expected = build(loading)[1]
        expected.load_state_dict(optimizer.state_dict())
        loaded.append(loading)
        (found,), (wanted,) = twin.state.values(), expected.state.values()
        for name in wanted:
            assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(wanted[name])), (loading, name)
    floats = ["float32", "bfloat16"]
    assert loaded == (floats if saving in floats else [saving])


MEMORY_FORMATS = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "first dim last": lambda tensor: tensor.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
}


@pytest.mark.parametrize(("states", "master_weights"), STEPPED_MODES)
def test_strides_may_change_before_loading_and_between_steps(
    states: str, master_weights: str | None, backend: torch.device
) -> None:
    def build(memory_format: str) -> AdaXW:
        tensor = MEMORY_FORMATS[memory_format](torch.randn(4, 32, 2, 16, generator=torch.Generator().manual_seed(0)))
        param = nn.Parameter(tensor.to(backend, torch.bfloat16))
        return AdaXW([param], lr=0.01, states=states, master_weights=master_weights)

    for before in MEMORY_FORMATS:
        optimizer = build(before)
        train(optimizer, [1])
        (param,) = optimizer.param_groups[0]["params"]
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        for after in MEMORY_FORMATS.keys() - {before}:
            file.seek(0)
            twin = build(after)
            (other,) = twin.param_groups[0]["params"]
            other.data.copy_(param.detach())
            twin.load_state_dict(torch.load(file))
            switched = copy.deepcopy(optimizer)
            (third,) = switched.param_groups[0]["params"]
            third.data = MEMORY_FORMATS[after](third.data)
            for each in (twin, switched):
                train(each, [3])
            # Random bits follow the memory order of float states, so stochastic roundings differ.
            tolerance = {"rtol": 2.0**-6, "atol": 1e-3} if states == "bfloat16" else {"rtol": 2.0**-7, "atol": 1e-5}
            torch.testing.assert_close(other, third, **tolerance)
        train(optimizer, [3])
        torch.testing.assert_close(other, param, **tolerance)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "group_exponents"])
def test_non_contiguous_codes_raise(name: str, backend: torch.device) -> None:
    param = nn.Parameter(torch.ones(64, 96, device=backend))
    optimizer = AdaXW([param], states="8bit")
    train(optimizer, [1])
    codes = optimizer.state[param][name]
    optimizer.state[param][name] = codes.transpose(0, 1).contiguous().transpose(0, 1)
    before = param.detach().clone()
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=rf"{name}.*strides"):
        optimizer.step()
    assert torch.equal(param, before)


def test_shared_step_count_is_counted_per_parameter(device: torch.device) -> None:
    params = parameters(torch.float32, device)
    optimizer = AdaXW(params, capturable=True)
    train(optimizer, [1])
    shared = torch.tensor(5, device=device)
    for state in optimizer.state.values():
        state["step"] = shared
    train(optimizer, [2, 3])
    assert [int(state["step"]) for state in optimizer.state.values()] == [7] * len(params)
    assert int(shared) in (5, 7)


def state_with_exp_avg(tensor: Tensor) -> dict[str, Any]:
    return {"step": 1, "exp_avg": tensor, "exp_avg_sq": torch.zeros(3)}


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3).half(), torch.zeros(2), torch.zeros(3, dtype=torch.int64), None, 3.0]
)
def test_bad_state_raises(tensor: Any, backend: torch.device) -> None:
    param = nn.Parameter(torch.ones(3, device=backend))
    optimizer = AdaXW([param])
    optimizer.state[param] = state_with_exp_avg(tensor)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.step()
    assert torch.equal(param, torch.ones_like(param))


def set_gradients(params: list[nn.Parameter]) -> None:
    for index, param in enumerate(params):
        param.grad = torch.full_like(param, index + 1.0)


BAD_CHECKPOINTS: dict[str, Any] = {
    "lr": lambda saved: saved["param_groups"][0].update(lr=None),
    "'lr'": lambda saved: saved["param_groups"][0].pop("lr"),
    "betas": lambda saved: saved["param_groups"][0].update(betas="x"),
    "exp_avg": lambda saved: saved["state"][1].update(exp_avg=saved["state"][1]["exp_avg"].to("meta")),
    "exp_avg_sq": lambda saved: saved["state"][1].update(exp_avg_sq=saved["state"][1]["exp_avg_sq"].to_sparse()),
    "complex": lambda saved: saved["state"][1].update(exp_avg=saved["state"][1]["exp_avg"].to(torch.complex64)),
}


@pytest.mark.parametrize("word", BAD_CHECKPOINTS)
def test_bad_checkpoint_changes_nothing(word: str, backend: torch.device) -> None:
    params = [nn.Parameter(torch.ones(8, device=backend)) for _ in range(2)]
    optimizer = AdaXW(params, lr=torch.tensor(0.1))
    set_gradients(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["step"] = 55
    BAD_CHECKPOINTS[word](saved)
    with pytest.raises((TypeError, ValueError), match=word):
        optimizer.load_state_dict(saved)
    assert [optimizer.state[param]["step"] for param in params] == [1, 1]
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_next_to_masters_load_into_float32_parameters(dtype: torch.dtype, backend: torch.device) -> None:
    half = nn.Parameter(torch.ones(80, 80, dtype=dtype, device=backend))
    optimizer = AdamW([half], master_weights="float32")
    set_gradients([half])
    optimizer.step()
    full = nn.Parameter(half.detach().float())
    other = AdamW([full])
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[full]["exp_avg"], optimizer.state[half]["exp_avg"])
    assert "master" not in other.state[full]


def test_user_hooks_run_last(backend: torch.device) -> None:
    param = nn.Parameter(torch.ones(8, device=backend))
    optimizer = AdaXW([param], max_grad_norm=1.0)
    set_gradients([param])
    optimizer.step()
    optimizer.register_state_dict_post_hook(lambda _, saved: {"wrapped": saved})
    saved = optimizer.state_dict()
    assert list(saved) == ["wrapped"] and type(saved["wrapped"]["state"][0]["step"]) is int


def test_state_with_only_foreign_keys_loads(backend: torch.device) -> None:
    params = [nn.Parameter(torch.ones(8, device=backend)) for _ in range(2)]
    optimizer = AdaXW(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.state[params[1]]["note"] = 5
    twins = [nn.Parameter(torch.ones(8, device=backend)) for _ in range(2)]
    twin = AdaXW(twins)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state[twins[1]] == {"note": 5} and twin.state[twins[0]]["step"] == 1
    set_gradients(twins)
    twin.step()
    assert [twin.state[param]["step"] for param in twins] == [2, 1]
