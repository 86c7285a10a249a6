"""Test that saved, copied and loaded optimizers continue bit for bit.

They also keep precision and share no memory.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from adax_triton import Adam, AdamW, AdaX, AdaXW

CLASSES = (AdaX, AdaXW, Adam, AdamW)
every_class = pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda each: each.__name__)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
STATES = ("exp_avg", "exp_avg_sq")


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in ((3, 5), (7,), ())]


def train(optimizer: Optimizer, steps: Iterable[int] = range(3)) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        optimizer.step()


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def states_of(optimizer: Optimizer, name: str) -> list[Tensor]:
    return [optimizer.state[param][name] for param in params_of(optimizer)]


def assert_equal_runs(left: Optimizer, right: Optimizer) -> None:
    for a, b in zip(params_of(left), params_of(right), strict=True):
        assert torch.equal(a, b)
        assert left.state[a]["step"] == right.state[b]["step"]
        assert all(torch.equal(left.state[a][name], right.state[b][name]) for name in STATES)


def test_load_after_the_model_was_cast(backend: torch.device) -> None:
    optimizer = AdaX(parameters(backend))
    train(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for param in params_of(optimizer):
        param.grad = None
        param.data = param.data.double()
    optimizer.load_state_dict(state_dict)
    for name in STATES:
        for state, key in zip(states_of(optimizer, name), state_dict["state"], strict=True):
            assert state.dtype == torch.float64
            assert torch.equal(state, state_dict["state"][key][name].double())
    train(optimizer)


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_file(optimizer: Optimizer) -> Optimizer:
    twin = type(optimizer)([Parameter(param.detach().clone()) for param in params_of(optimizer)], lr=0.7)
    twin.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    return twin


def through_pickle(optimizer: Optimizer) -> Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


COPIES: dict[str, Callable[[Optimizer], Optimizer]] = {
    "torch.save": through_file,
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
}


@every_class
def test_copies_continue_bit_for_bit(optimizer_class: type, backend: torch.device) -> None:
    optimizer = optimizer_class(parameters(backend), lr=0.01)
    train(optimizer, range(2))
    twins = [copied(optimizer) for copied in COPIES.values()]
    train(optimizer, range(2, 4))
    for twin in twins:
        train(twin, range(2, 4))
        assert_equal_runs(optimizer, twin)
        assert twin.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("method", COPIES)
def test_copy_is_independent_of_the_original(method: str, device: torch.device) -> None:
    optimizer = AdaXW(parameters(device))
    train(optimizer)
    twin = COPIES[method](optimizer)
    snapshot = copy.deepcopy(optimizer)
    train(twin)
    assert_equal_runs(optimizer, snapshot)


@pytest.mark.parametrize("method", ["trained", *COPIES])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {"states": "8bit_v16", "master_weights": "24bit"}), (torch.complex64, {})],
    ids=["float32", "8bit_v16", "complex"],
)
def test_each_state_tensor_has_its_own_memory(
    dtype: torch.dtype, options: dict[str, Any], method: str, native_cpu: torch.device
) -> None:
    weights = [torch.randn(64, 64), torch.randn(3, 5), torch.randn(5, 3).t()]
    optimizer = AdaX([Parameter(weight.to(native_cpu, dtype)) for weight in weights], **options)
    train(optimizer)
    if method != "trained":
        optimizer = COPIES[method](optimizer)
    states = [optimizer.state[param] for param in params_of(optimizer)]
    tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    assert len(tensors) >= 6
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loaded_states_keep_dtype_and_bits(dtype: torch.dtype, backend: torch.device) -> None:
    optimizer = AdaXW(parameters(backend, dtype))
    train(optimizer)
    twin = through_file(optimizer)
    expected = {torch.float64: torch.float64, torch.complex64: torch.complex64}.get(dtype, torch.float32)
    assert {state.dtype for name in STATES for state in states_of(twin, name)} == {expected}
    assert_equal_runs(optimizer, twin)


def test_states_of_float32_parameters_load_into_bfloat16_ones(device: torch.device) -> None:
    optimizer, twin = AdaX(parameters(device)), AdaX(parameters(device, torch.bfloat16))
    train(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    for name in STATES:
        for state, loaded in zip(states_of(optimizer, name), states_of(twin, name), strict=True):
            assert loaded.dtype == torch.float32 and torch.equal(state, loaded)


def test_load_copies_the_state_dict(device: torch.device) -> None:
    optimizer, twin = (AdaXW(parameters(device)) for _ in range(2))
    train(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    twin.load_state_dict(state_dict)
    train(twin, range(3, 5))
    for key, state in optimizer.state_dict()["state"].items():
        assert state_dict["state"][key]["step"] == state["step"] == 3
        assert all(torch.equal(state_dict["state"][key][name], state[name]) for name in STATES)


def test_own_states_load_in_another_order(device: torch.device) -> None:
    optimizer = AdaXW([Parameter(torch.full((3,), value, device=device)) for value in (1.0, 2.0)])
    train(optimizer, [0])
    optimizer.state[params_of(optimizer)[1]]["exp_avg"].mul_(2)
    before = [state.clone() for state in states_of(optimizer, "exp_avg")]
    saved = optimizer.state_dict()
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    optimizer.load_state_dict(saved)
    assert all(map(torch.equal, states_of(optimizer, "exp_avg"), before[::-1]))


def test_load_is_in_place(device: torch.device) -> None:
    optimizer, other = (AdaXW(parameters(device)) for _ in range(2))
    train(optimizer)
    train(other, range(3, 7))
    before = {name: states_of(optimizer, name) for name in STATES}
    optimizer.load_state_dict(other.state_dict())
    for name in STATES:
        for tensor, after, loaded in zip(before[name], states_of(optimizer, name), states_of(other, name), strict=True):
            assert tensor.data_ptr() == after.data_ptr() and torch.equal(tensor, loaded)


def test_load_drops_states_missing_in_the_checkpoint(device: torch.device) -> None:
    optimizer = AdaXW(parameters(device))
    fresh = copy.deepcopy(optimizer.state_dict())
    train(optimizer)
    optimizer.load_state_dict(fresh)
    assert not optimizer.state
    train(optimizer, [0])
    assert {optimizer.state[param]["step"] for param in params_of(optimizer)} == {1}


@pytest.mark.parametrize("step", [5, 5.0, torch.tensor(5.0), torch.tensor([5])], ids=repr)
def test_step_is_loaded_as_an_int(step: Any, device: torch.device) -> None:
    optimizer = AdaX(parameters(device))
    train(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = step
    optimizer.load_state_dict(state_dict)
    assert [(type(count), count) for count in states_of(optimizer, "step")] == [(int, 5)] * 3


@every_class
def test_groups_are_restored_and_missing_keys_get_defaults(optimizer_class: type, device: torch.device) -> None:
    params = parameters(device)
    groups = [{"params": params[:1], "eps": 0.5}, {"params": params[1:], "lr": 0.25, "betas": (0.7, 0.05)}]
    state_dict = optimizer_class(groups).state_dict()
    for group in state_dict["param_groups"]:
        del group["maximize"]
    twin = optimizer_class([{"params": params[:1]}, {"params": params[1:]}], maximize=True)
    twin.load_state_dict(state_dict)
    assert [group["eps"] for group in twin.param_groups] == [0.5, twin.defaults["eps"]]
    assert (twin.param_groups[1]["lr"], twin.param_groups[1]["betas"]) == (0.25, (0.7, 0.05))
    assert [group["maximize"] for group in twin.param_groups] == [False, False]


@pytest.mark.parametrize(("plain", "decoupled"), [(AdaX, AdaXW), (Adam, AdamW)])
def test_class_sets_decoupled_weight_decay(plain: type, decoupled: type, device: torch.device) -> None:
    params = parameters(device)
    into_plain, into_decoupled = plain(params), decoupled(params)
    into_decoupled.load_state_dict(plain(params).state_dict())
    into_plain.load_state_dict(decoupled(params).state_dict())
    # As in torch: AdaXW and AdamW are always decoupled; AdaX and Adam follow the checkpoint.
    assert into_decoupled.param_groups[0]["decoupled_weight_decay"]
    assert into_plain.param_groups[0]["decoupled_weight_decay"]


def test_hooks_see_and_replace_saved_and_loaded_state_dicts(device: torch.device) -> None:
    optimizer = AdaX(parameters(device))
    train(optimizer)
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": "kept"})
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == "kept"

    def double_exp_avg(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        states = {key: {**state, "exp_avg": state["exp_avg"] * 2} for key, state in given["state"].items()}
        return {**given, "state": states}

    twin, seen = AdaX(parameters(device)), []
    twin.register_load_state_dict_pre_hook(double_exp_avg)
    twin.register_load_state_dict_post_hook(lambda each: seen.extend(states_of(each, "exp_avg")))
    twin.load_state_dict(state_dict)
    for state, loaded in zip(states_of(optimizer, "exp_avg"), seen, strict=True):
        assert torch.equal(loaded, state * 2)
