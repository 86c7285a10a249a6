"""Invalid arguments raise an error that names argument and value; nothing changes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.two_tensor import TwoTensor

from adax_triton import Adam, AdamW, AdaX, AdaXW

CLASSES = (AdaX, AdaXW, Adam, AdamW)
every_class = pytest.mark.parametrize("optimizer_class", CLASSES, ids=lambda cls: cls.__name__)


def trained(optimizer_class: type, device: torch.device, **options: Any) -> Optimizer:
    """Return an optimizer after two steps, with gradients for a third."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator).to(device)) for shape in ((3, 5), (7,))]
    optimizer = optimizer_class(params, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
    return optimizer


def contents(optimizer: Optimizer) -> list[Any]:
    """Return bits of parameters, states and options; repr makes NaN equal."""
    found: list[Any] = []
    for index, group in enumerate(optimizer.param_groups):
        found.extend((index, name, repr(value)) for name, value in sorted(group.items()) if name != "params")
        for param in group["params"]:
            found.append(param.detach().cpu().numpy().tobytes())
            for name, value in sorted(optimizer.state.get(param, {}).items()):
                is_tensor = isinstance(value, torch.Tensor)
                memory = (value.data_ptr(), value.dtype, value.shape) if is_tensor else ()
                found.append((name, memory, value.cpu().numpy().tobytes() if is_tensor else value))
    return [*found, len(optimizer.state)]


def check_raises(optimizer: Optimizer, action: Callable[[], Any], error: type, words: list[str]) -> None:
    before = contents(optimizer)
    with pytest.raises(error) as caught:
        action()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert contents(optimizer) == before


ARGUMENTS: list[tuple[dict[str, Any], type, list[str]]] = [
    ({"lr": -1}, ValueError, ["learning rate", "-1"]),
    ({"lr": math.nan}, ValueError, ["learning rate", "nan"]),
    ({"lr": math.inf}, ValueError, ["learning rate", "inf"]),
    ({"lr": "0.1"}, TypeError, ["lr", "'0.1'"]),
    ({"lr": None}, TypeError, ["lr", "None"]),
    ({"lr": True}, TypeError, ["lr", "True"]),
    ({"lr": torch.tensor([0.1, 0.1])}, ValueError, ["lr", "(2,)"]),
    ({"lr": torch.tensor(-0.5)}, ValueError, ["learning rate", "-0.5"]),
    ({"eps": -1e-3}, ValueError, ["epsilon", "-0.001"]),
    ({"eps": math.nan}, ValueError, ["epsilon", "nan"]),
    ({"eps": "tiny"}, TypeError, ["eps", "'tiny'"]),
    ({"weight_decay": -0.25}, ValueError, ["weight_decay", "-0.25"]),
    ({"weight_decay": math.inf}, ValueError, ["weight_decay", "inf"]),
    ({"weight_decay": [0.1]}, TypeError, ["weight_decay", "[0.1]"]),
    ({"betas": (1.0, 0.05)}, ValueError, ["index 0", "1.0"]),
    ({"betas": (-0.5, 0.05)}, ValueError, ["index 0", "-0.5"]),
    ({"betas": (math.nan, 0.05)}, ValueError, ["index 0", "nan"]),
    ({"betas": (0.9, -0.25)}, ValueError, ["index 1", "-0.25"]),
    ({"betas": (0.9, math.nan)}, ValueError, ["index 1", "nan"]),
    ({"betas": (0.9, 1.0)}, ValueError, ["index 1", "1.0"]),
    ({"betas": 0.9}, TypeError, ["betas", "0.9"]),
    ({"betas": (0.9,)}, ValueError, ["betas", "(0.9,)"]),
    ({"betas": (0.9, 0.05, 0.05)}, ValueError, ["betas", "(0.9, 0.05, 0.05)"]),
    ({"betas": ("0.9", 0.05)}, TypeError, ["betas[0]", "'0.9'"]),
    ({"betas": (0.9, None)}, TypeError, ["betas[1]", "None"]),
    ({"betas": (0.9, torch.tensor(0.05))}, ValueError, ["betas", "0.9", "tensor(0.05"]),
    ({"maximize": "yes"}, TypeError, ["maximize", "'yes'"]),
]


@every_class
@pytest.mark.parametrize(("options", "error", "words"), ARGUMENTS, ids=[str(case[0]) for case in ARGUMENTS])
def test_bad_argument_raises_an_error_that_names_it(
    optimizer_class: type, options: dict[str, Any], error: type, words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        optimizer_class([Parameter(torch.zeros(2))], **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


OTHER_RULE: list[tuple[type, dict[str, Any], list[str]]] = [
    (AdaX, {"betas": (0.9, 0.999)}, ["index 1", "0.999", "Adam"]),
    (AdaXW, {"betas": (0.9, 0.999)}, ["index 1", "0.999", "Adam"]),
    (Adam, {"betas": (0.9, 1e-4)}, ["index 1", "0.0001", "AdaX"]),
    (AdamW, {"betas": (0.9, 1e-4)}, ["index 1", "0.0001", "AdaX"]),
    (AdaX, {"second_moment": "adam"}, ["index 1", "0.0001", "AdaX"]),
    (AdaX, {"second_moment": "adafactor"}, ["index 1", "0.0001", "AdaX"]),
    (AdaXW, {"second_moment": "adafactor", "betas": (0.9, 1.5)}, ["index 1", "1.5"]),
    (AdaX, {"second_moment": "rmsprop"}, ["second_moment", "'rmsprop'", "adafactor"]),
    (AdaX, {"eps_placement": "inside"}, ["eps_placement", "'inside'", "unnormalized"]),
    (AdaX, {"eps_placement": "unnormalized", "betas": (0.9, 0.0)}, ["eps_placement", "'unnormalized'", "betas[1]=0.0"]),
    (
        AdaX,
        {"eps_placement": "unnormalized", "second_moment": "adafactor", "betas": (0.9, 0.8)},
        ["eps_placement", "'unnormalized'", "adafactor"],
    ),
]


@pytest.mark.parametrize(("optimizer_class", "options", "words"), OTHER_RULE)
def test_value_for_another_rule_raises(optimizer_class: type, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        optimizer_class([Parameter(torch.zeros(2))], **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_tensor_subclass_that_wraps_tensors_raises() -> None:
    wrapper = TwoTensor(torch.zeros(2), torch.zeros(2))  # a subclass like FSDP2's DTensor
    with pytest.raises(TypeError, match=r"params\[0\].*TwoTensor"):
        AdaXW([Parameter(wrapper)])


def test_gradient_that_wraps_tensors_raises(native_cpu: torch.device) -> None:
    param = Parameter(torch.zeros(2))
    optimizer = AdaXW([param])
    param.grad = TwoTensor(torch.ones(2), torch.ones(2))
    with pytest.raises(TypeError, match="grad is a TwoTensor, which wraps other tensors"):
        optimizer.step()
    assert len(optimizer.state[param]) == 0


KEYWORDS: list[tuple[type, str, str]] = [
    (AdaXW, "max_norm", r"AdaXW\(\).*'max_norm'; did you mean 'max_grad_norm'\?"),
    (AdaX, "state", r"AdaX\(\).*'state'; did you mean 'states'\?"),
    (AdaXW, "decoupled_weight_decay", r"AdaXW\(\).*always decouples weight decay; remove it, or use AdaX$"),
    (AdamW, "decoupled_weight_decay", r"AdamW\(\).*always decouples weight decay; remove it, or use Adam$"),
    (Adam, "second_moment", r"Adam\(\).*'second_moment'; it accepts lr, betas, eps, weight_decay, decoupled"),
]


@pytest.mark.parametrize(("optimizer_class", "keyword", "message"), KEYWORDS)
def test_unknown_keyword_raises_an_error_that_names_the_class(
    optimizer_class: type, keyword: str, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        optimizer_class([Parameter(torch.zeros(2))], **{keyword: True})


def test_unknown_keyword_of_a_subclass_names_the_subclass() -> None:
    class Scheduled(AdaXW):
        def __init__(self, params: Any, warmup: int = 0, **options: Any) -> None:
            super().__init__(params, **options)

    with pytest.raises(
        TypeError, match=r"^Scheduled\(\) got an unexpected keyword argument 'warm'; did you mean 'warmup'"
    ):
        Scheduled([Parameter(torch.zeros(2))], warm=1)
    with pytest.raises(TypeError, match="did you mean 'weight_decay'"):
        Scheduled([Parameter(torch.zeros(2))], weight_dcay=1)
    with pytest.raises(TypeError, match=r"AdaX$"):
        Scheduled([Parameter(torch.zeros(2))], decoupled_weight_decay=True)


TORCH_KEYWORDS: list[tuple[str, Any, type[Exception], str]] = [
    ("amsgrad", True, ValueError, "Invalid amsgrad: True; AMSGrad is not supported"),
    ("differentiable", True, ValueError, "Invalid differentiable: True; autograd cannot differentiate"),
    ("amsgrad", 1, TypeError, "Invalid type of amsgrad: expected True or False, got 1"),
    ("fused", "yes", TypeError, "Invalid type of fused: expected True or False, got 'yes'"),
    ("foreach", 0.0, TypeError, "Invalid type of foreach: expected True or False, got 0.0"),
]


@pytest.mark.parametrize("in_group", [False, True], ids=["argument", "group"])
@pytest.mark.parametrize(("keyword", "value", "error", "message"), TORCH_KEYWORDS)
def test_keyword_of_torch_that_would_change_the_update_raises(
    keyword: str, value: Any, error: type[Exception], message: str, in_group: bool
) -> None:
    group, options = {"params": [Parameter(torch.zeros(2))]}, {keyword: value}
    with pytest.raises(error, match=message):
        AdaXW([{**group, **options}]) if in_group else AdaXW([group], **options)


@pytest.mark.parametrize("optimizer_class", [AdaX, AdaXW, Adam, AdamW])
def test_keywords_of_torch_that_change_nothing_are_accepted(optimizer_class: type, native_cpu: torch.device) -> None:
    off = {"amsgrad": False, "foreach": False, "differentiable": False, "fused": None}
    on = {"amsgrad": False, "foreach": True, "differentiable": False, "fused": True}
    params = [Parameter(torch.ones(5)) for _ in range(4)]
    plain, *others = (
        optimizer_class([params[0]]),
        optimizer_class([params[1]], **off),
        optimizer_class([params[2]], **on),
        optimizer_class([{"params": [params[3]], **on}]),
    )
    for param, optimizer in zip(params, (plain, *others), strict=True):
        param.grad = torch.arange(5.0)
        optimizer.step()
        assert torch.equal(param, params[0])
        assert optimizer.param_groups[0].keys() == plain.param_groups[0].keys()


GROUPS: list[tuple[dict[str, Any], type, list[str]]] = [
    ({"params": [Parameter(torch.zeros(2))], "lr": -3.0}, ValueError, ["learning rate", "-3.0"]),
    ({"params": [Parameter(torch.zeros(2))], "betas": (2.0, 0.05)}, ValueError, ["index 0", "2.0"]),
    ({"params": ["weight"]}, TypeError, ["params[0]", "str"]),
]


@pytest.mark.parametrize(("group", "error", "words"), GROUPS, ids=[" ".join(case[2]) for case in GROUPS])
def test_bad_group_is_not_added(group: dict[str, Any], error: type, words: list[str], device: torch.device) -> None:
    optimizer = trained(AdaXW, device)
    check_raises(optimizer, lambda: optimizer.add_param_group(group), error, words)


@pytest.mark.parametrize("optimizer_class", [AdaXW, AdamW])
def test_decoupled_classes_reject_groups_with_l2_decay(optimizer_class: type) -> None:
    param = Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"decoupled_weight_decay: False.*use Ada(X|m)$"):
        optimizer_class([{"params": [param], "decoupled_weight_decay": False}])
    optimizer = optimizer_class([{"params": [param], "decoupled_weight_decay": True}])
    with pytest.raises(ValueError, match="decoupled_weight_decay"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], "decoupled_weight_decay": False})
    assert len(optimizer.param_groups) == 1


def swap_data(optimizer: Optimizer) -> None:
    param = optimizer.param_groups[0]["params"][1]
    param.data = param.data.new_zeros(9)  # the gradient keeps its old shape; p.grad = ... would raise


def swap_data_and_gradient(optimizer: Optimizer) -> None:
    param = optimizer.param_groups[0]["params"][1]
    param.data, param.grad = param.data.new_zeros(9), None
    param.grad = torch.ones_like(param)


def cast_state(optimizer: Optimizer) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    state["exp_avg_sq"] = state["exp_avg_sq"].bfloat16().double()


def set_in_group(**values: Any) -> Callable[[Optimizer], None]:
    return lambda optimizer: optimizer.param_groups[0].update(values)


STEPS: dict[str, tuple[Callable[[Optimizer], None], type, list[str]]] = {
    "gradient's shape": (swap_data, ValueError, ["grad", "(7,)", "(9,)"]),
    "state's shape": (swap_data_and_gradient, ValueError, ["exp_avg", "(7,)", "(9,)"]),
    "state's dtype": (cast_state, ValueError, ["exp_avg_sq", "float64", "float32"]),
    "lr's type": (set_in_group(lr="fast"), TypeError, ["lr", "'fast'"]),
    "lr's size": (set_in_group(lr=torch.ones(3)), ValueError, ["lr", "(3,)"]),
    "another rule's betas": (set_in_group(betas=[0.9, 0.999]), ValueError, ["param_groups[0]", "index 1", "0.999"]),
    "one beta": (set_in_group(betas=(0.9,)), ValueError, ["param_groups[0]", "betas", "(0.9,)"]),
    "beta's type": (set_in_group(betas=(0.9, "much")), TypeError, ["betas[1]", "'much'"]),
    "betas of bool": (set_in_group(betas=(False, False)), TypeError, ["betas[0]", "False"]),
    "betas that cannot be hashed": (set_in_group(betas={}), TypeError, ["pair of numbers", "{}"]),
    "one tensor beta": (set_in_group(betas=(torch.tensor(0.9), 1e-4)), ValueError, ["both floats or both Tensors"]),
    "betas without a bias": (
        set_in_group(betas=(0.9, 0.0), eps_placement="unnormalized"),
        ValueError,
        ["param_groups[0]", "betas[1]=0.0"],
    ),
    "unknown rule": (set_in_group(second_moment="rmsprop"), ValueError, ["second_moment", "'rmsprop'"]),
}


@pytest.mark.parametrize("case", STEPS)
def test_bad_step_changes_nothing(case: str, backend: torch.device) -> None:
    corrupt, error, words = STEPS[case]
    optimizer = trained(AdaXW, backend)
    corrupt(optimizer)
    check_raises(optimizer, optimizer.step, error, words)


ADVICE = [
    (
        torch.optim.AdamW,
        AdaXW,
        {},
        r"load adax_from_adam\(from_torch_adam\(state_dict\)\) instead, or convert its file",
    ),
    (torch.optim.Adam, AdamW, {}, r"load from_torch_adam\(state_dict\) instead, or convert"),
    (torch.optim.AdamW, AdaXW, {"second_moment": "adafactor", "betas": (0.9, 0.8)}, "with second_moment='adam'$"),
    (torch.optim.SGD, AdaXW, {}, "only state dicts of Adam, AdamW and the authors' AdaX can be converted$"),
    (torch.optim.NAdam, AdaX, {}, "only state dicts of Adam, AdamW and the authors' AdaX can be converted$"),
]


@pytest.mark.parametrize(("theirs", "ours", "options", "advice"), ADVICE)
def test_state_dict_of_another_program_names_a_conversion_that_exists(
    theirs: type, ours: type, options: dict[str, Any], advice: str
) -> None:
    param = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=advice):
        ours([param], **options).load_state_dict(theirs([param]).state_dict())


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda state_dict: state_dict["state"][1].pop(name)


def with_state(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state_dict: state_dict["state"][1].update(values)


LOADS: dict[str, tuple[Callable[[dict[str, Any]], Any], type, list[str]]] = {
    "no state": (lambda saved: saved.pop("state"), ValueError, ["state_dict", "'state'"]),
    "no groups": (lambda saved: saved.pop("param_groups"), ValueError, ["state_dict", "'param_groups'"]),
    "missing key": (without("exp_avg"), ValueError, ["['state'][1]", "exp_avg_sq", "step"]),
    "unknown key": (with_state(group_exponents=torch.ones(7)), ValueError, ["['state'][1]", "group_exponents"]),
    "wrong shape": (with_state(exp_avg_sq=torch.ones(3)), ValueError, ["[1]['exp_avg_sq']", "(3,)", "(7,)"]),
    "not a tensor": (with_state(exp_avg=[0.0] * 7), TypeError, ["[1]['exp_avg']", "list"]),
    "half a step": (with_state(step=1.5), TypeError, ["[1]['step']", "1.5"]),
    "negative step": (with_state(step=-1), TypeError, ["[1]['step']", "-1"]),
    "NaN step": (with_state(step=math.nan), TypeError, ["[1]['step']", "nan"]),
    "string step": (with_state(step="two"), TypeError, ["[1]['step']", "'two'"]),
    "another rule": (
        lambda saved: saved["param_groups"][0].update(second_moment="adafactor"),
        ValueError,
        ["['param_groups'][0]", "'adafactor'"],
    ),
    "more groups": (lambda saved: saved["param_groups"].append({"params": []}), ValueError, ["parameter groups"]),
    "fewer params": (lambda saved: saved["param_groups"][0]["params"].pop(), ValueError, ["size"]),
}


@pytest.mark.parametrize("case", LOADS)
def test_bad_state_dict_changes_nothing(case: str, device: torch.device) -> None:
    corrupt, error, words = LOADS[case]
    optimizer = trained(AdaXW, device)
    state_dict = copy.deepcopy(optimizer.state_dict())
    corrupt(state_dict)
    check_raises(optimizer, lambda: optimizer.load_state_dict(state_dict), error, words)


@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
@every_class
def test_state_dict_of_torch_raises(optimizer_class: type, stepped: bool, device: torch.device) -> None:
    optimizer, theirs = trained(optimizer_class, device), trained(torch.optim.AdamW, device)
    state_dict = theirs.state_dict()
    if not stepped:
        state_dict["state"] = {}
    words = ["['param_groups'][0]", "'second_moment'", "exp_avg_sq"]
    check_raises(optimizer, lambda: optimizer.load_state_dict(state_dict), ValueError, words)


def test_state_dict_of_another_rule_raises(device: torch.device) -> None:
    optimizer, adam = trained(AdaX, device), trained(Adam, device)
    check_raises(optimizer, lambda: optimizer.load_state_dict(adam.state_dict()), ValueError, ["'adam'", "'adax'"])
