"""Register with DeepSpeed, unregister, and check the settings for which check_config raises."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from paths import TESTS

from adax_triton import AdaX, AdaXW

deepspeed = pytest.importorskip("deepspeed")
pytestmark = pytest.mark.deepspeed


# Replaced only for DeepSpeed before 0.19.8.
OLDER_VERSIONS = {"DeepSpeedZeroOptimizer_Stage3._overflow_check_and_loss_scale_update"}


@pytest.fixture
def adapter() -> Iterator[ModuleType]:
    """Register the adapter, and unregister it afterwards.

    No other test then runs with its patches.
    """
    from adax_triton.integrations import deepspeed as module

    module.register()
    yield module
    module.unregister()


def module_of(adapter: ModuleType) -> ModuleType:
    """Return the module registration.py."""
    return inspect.getmodule(adapter.register)


def deepspeed_contents(adapter: ModuleType) -> dict[str, Any]:
    """Return the contents of all classes and lists the adapter changes.

    The classes and lists are those of DeepSpeed and torch.
    """
    return {
        **{owner.__name__: dict(vars(owner)) for owner, _, _ in module_of(adapter)._replacements()},
        "names": list(deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS),
        "torch": dict(vars(torch.optim)),
    }


def config(optimizer_type: str = "AdaX", **sections: Any) -> dict[str, Any]:
    return {"train_batch_size": 1, "optimizer": {"type": optimizer_type, "params": {"lr": 1e-3}}, **sections}


def zero(stage: int = 2, **settings: Any) -> dict[str, Any]:
    return {"stage": stage, **settings}


def test_register_is_idempotent_and_unregister_restores_everything(adapter: ModuleType) -> None:
    registered = deepspeed_contents(adapter)
    adapter.register()
    assert deepspeed_contents(adapter) == registered
    adapter.unregister()
    original = deepspeed_contents(adapter)
    adapter.unregister()
    assert deepspeed_contents(adapter) == original
    for part, contents in registered.items():
        assert contents != original[part], f"{part} is listed here but not changed by register"
    assert not [name for name in original["names"] if "adax" in name]
    adapter.register()
    adapter.unregister()
    assert deepspeed_contents(adapter) == original


def test_register_raises_for_an_older_deepspeed_with_both_versions(
    adapter: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter.unregister()
    original = deepspeed_contents(adapter)
    monkeypatch.setattr(deepspeed, "__version__", "0.14.4")
    with pytest.raises(ImportError, match=rf">= {module_of(adapter).OLDEST_DEEPSPEED}, found 0\.14\.4"):
        adapter.register()
    assert deepspeed_contents(adapter) == original


def test_register_warns_once_for_a_newer_deepspeed(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter.unregister()
    monkeypatch.setattr(deepspeed, "__version__", "99.0.1")
    with pytest.warns(
        UserWarning, match=rf"to {module_of(adapter).NEWEST_DEEPSPEED}, found 99\.0\.1.*DEEPSPEED=99\.0\.1"
    ) as caught:
        adapter.register()
        adapter.register()
    assert len(caught) == 1


def test_register_does_not_replace_another_optimizer(adapter: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter.unregister()
    monkeypatch.setattr(torch.optim, "adaxw", torch.optim.SGD, raising=False)
    original = deepspeed_contents(adapter)
    with pytest.raises(RuntimeError, match=r"torch\.optim\.adaxw already exists"):
        adapter.register()
    assert deepspeed_contents(adapter) == original


@pytest.mark.parametrize("optimizer_type", ["AdaX", "adaxw", "ADAXW"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"zero_optimization": zero(0), "bf16": {"enabled": True}},
        {"zero_optimization": zero(1), "fp16": {"enabled": True}},
        {"zero_optimization": zero(3, offload_optimizer={"device": "cpu"}), "fp16": {"enabled": "auto"}},
        {"optimizer": {"type": "AdaX"}},
        {"adax_triton": {"fuse": "off"}},
        {"optimizer": {"type": "AdaX", "params": {"lr": "auto", "betas": [0.9, 1e-4], "second_moment": "adax"}}},
    ],
)
def test_check_config_accepts(adapter: ModuleType, optimizer_type: str, sections: dict[str, Any]) -> None:
    assert adapter.check_config(config(optimizer_type, **sections)) is None


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"fp16": {"enabled": True}}, ["fp16.enabled=true", "stage=0", "stage to 1"]),
    ({"zero_optimization": zero(zenflow={}), "bf16": {"enabled": True}}, ["zenflow", "Adam", "remove"]),
    (
        {"zero_optimization": zero(3, offload_optimizer={"device": "cpu", "super_offload": True})},
        ["super_offload=true", "Adam", "remove"],
    ),
    (
        {"zero_optimization": zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5})},
        ["ratio=0.5", "CPU Adam", "1.0"],
    ),
]


@pytest.mark.parametrize("optimizer_type", ["AdaX", "ADAXW"])
@pytest.mark.parametrize(("sections", "words"), REFUSED, ids=["fp16-stage-0", "zenflow", "super-offload", "ratio"])
def test_check_config_raises_with_the_remedy(
    adapter: ModuleType, optimizer_type: str, sections: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        adapter.check_config(config(optimizer_type, **sections))
    for word in words:
        assert word in str(caught.value)
    # Other optimizers pass.
    adapter.check_config(config("AdamW", **sections))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fuse": "on"}, r"adax_triton\.fuse='on'.*expected \"auto\" or \"off\""),
        ({"fused": "off"}, "adax_triton={'fused': 'off'}"),
        ("off", "adax_triton='off'"),
    ],
)
def test_check_config_raises_for_an_unknown_fuse_option(adapter: ModuleType, section: Any, message: str) -> None:
    for optimizer in (None, AdaX([torch.nn.Parameter(torch.ones(1))])):
        with pytest.raises(ValueError, match=message):
            adapter.check_config(config(adax_triton=section), optimizer)


@pytest.mark.parametrize("sections", [sections for sections, _ in REFUSED])
def test_check_config_raises_for_a_client_optimizer(adapter: ModuleType, sections: dict[str, Any]) -> None:
    optimizer = AdaX([torch.nn.Parameter(torch.ones(1))])
    forced = {"zero_force_ds_cpu_optimizer": False}
    with pytest.raises(ValueError, match="AdaX"):
        adapter.check_config({**sections, **forced}, optimizer)


@pytest.mark.parametrize(
    ("offload", "refused"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, True),
        ({"offload_optimizer": {"device": "nvme"}}, True),
        ({"offload_optimizer": {"device": "none"}}, False),
        ({}, False),
    ],
)
def test_check_config_names_the_flag_for_an_offloaded_client_optimizer(
    adapter: ModuleType, offload: dict[str, Any], refused: bool
) -> None:
    optimizer = AdaXW([torch.nn.Parameter(torch.ones(1))])
    settings = {"zero_optimization": zero(3, **offload)}
    adapter.check_config({**settings, "zero_force_ds_cpu_optimizer": False}, optimizer)
    if not refused:
        adapter.check_config(settings, optimizer)
        return
    with pytest.raises(ValueError, match=r'AdaXW.*"zero_force_ds_cpu_optimizer": false'):
        adapter.check_config(settings, optimizer)


@pytest.mark.parametrize(
    ("optimizer_type", "accepted"),
    [
        ("adax", "lr, betas, eps, weight_decay, decoupled_weight_decay, second_moment, eps_placement, maximize"),
        ("AdaXW", "lr, betas, eps, weight_decay, second_moment, eps_placement, maximize"),
    ],
)
def test_unknown_params_are_all_named_with_the_accepted_ones(
    adapter: ModuleType, optimizer_type: str, accepted: str
) -> None:
    settings = config(optimizer_type)
    settings["optimizer"]["params"] |= {"torch_adam": True, "betaz": [0.9, 1e-4], "params": []}
    with pytest.raises(ValueError) as caught:
        adapter.check_config(settings)
    assert "torch_adam, betaz, params; accepted keys: " + accepted in str(caught.value)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        ({"max_grad_norm": 1.0}, "gradient_clipping"),
        ({"max_grad_norm": 1.0, "error_if_nonfinite": True}, "gradient_clipping"),
        ({"capturable": True}, "step counts"),
        ({"telemetry": True}, "get_global_grad_norm"),
    ],
    ids=str,
)
@pytest.mark.parametrize("as_object", [False, True], ids=["config", "object"])
def test_options_that_need_all_gradients_at_once_raise(
    adapter: ModuleType, option: dict[str, Any], remedy: str, as_object: bool
) -> None:
    settings = config()
    optimizer = AdaX([torch.zeros(2, requires_grad=True)], **option) if as_object else None
    settings["optimizer"]["params"] |= {} if as_object else option
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.*AdaX.*{remedy}"):
        adapter.check_config(settings, optimizer)


def test_check_config_does_not_change_the_configuration(adapter: ModuleType) -> None:
    settings = config(zero_optimization=zero(2, cpu_offload=True), fp16={"enabled": True})
    before = repr(settings)
    adapter.check_config(settings)
    assert repr(settings) == before


def test_package_itself_does_not_import_deepspeed() -> None:
    code = "import sys, adax_triton; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd="/", check=False).returncode == 0


def test_unregister_restores_every_method(adapter: ModuleType) -> None:
    replaced = {(owner, name): vars(owner)[name] for owner, name, _ in module_of(adapter)._replacements()}
    adapter.unregister()
    for (owner, name), method in replaced.items():
        assert vars(owner)[name] is method.__wrapped__


def test_docstring_lists_the_replaced_methods_with_tests_that_exist(adapter: ModuleType) -> None:
    module = module_of(adapter)
    listed = re.findall(r"^(\w+\.\w+)[^\n]*\n((?:    .*\n)+)", module.__doc__, flags=re.MULTILINE)
    names = {name for name, _ in listed}
    assert {f"{owner.__name__}.{name}" for owner, name, _ in module._replacements()} | OLDER_VERSIONS == names
    for name, text in listed:
        file, test = re.search(r"(\w+/test_\w+\.py)::(test_\w+)", text).groups()
        functions = [node for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)]
        assert test in {function.name for function in functions}, name


NVME_OFFLOAD = {"offload_optimizer": {"device": "nvme", "nvme_path": "/swapped"}}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, ["elastic_checkpoint=true", "universal"]),
        ({"checkpoint": {"load_universal": True}}, ["load_universal=true", "stage=0", "to 1"]),
        (
            {"zero_optimization": {"stage": 3, **NVME_OFFLOAD}, "checkpoint": {"load_universal": True}},
            ["nvme", "load_universal=true", "cpu"],
        ),
        (
            {
                "zero_optimization": {"stage": 3, **NVME_OFFLOAD},
                "optimizer": {"type": "AdaX", "params": {"states": "8bit_v16"}},
            },
            ["nvme", "states='8bit_v16'", "float32"],
        ),
    ],
    ids=["elastic", "universal-z0", "nvme-universal", "nvme-8bit_v16"],
)
def test_settings_that_lose_a_checkpoint_raise(adapter: ModuleType, sections: dict[str, Any], words: list[str]) -> None:
    settings = config(**sections)
    with pytest.raises(ValueError) as caught:
        adapter.check_config(settings)
    for word in words:
        assert word in str(caught.value)
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], **settings["optimizer"].get("params", {})}]
    client = {**settings, "zero_force_ds_cpu_optimizer": False}
    with pytest.raises(ValueError, match=words[0]):
        adapter.check_config(client, AdaX(groups))


def test_settings_that_keep_a_checkpoint_are_accepted(adapter: ModuleType) -> None:
    for sections in (
        {"zero_optimization": {"stage": 3, **NVME_OFFLOAD}},
        {"zero_optimization": {"stage": 1}, "checkpoint": {"load_universal": True}},
        {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdaX", "params": {"states": "8bit_v16"}}},
    ):
        assert adapter.check_config(config(**sections)) is None
