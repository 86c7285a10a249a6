"""Steady steps neither synchronize nor allocate.

Launches do nothing here, so only the host's operations are recorded. test_cuda_graphs.py checks real steps on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from adax_triton import AdaXW
from adax_triton.step import reuse_check

original_guards = reuse_check.tensor_guards
SHAPES = ((5, 7), (4097,), ())
SCALED = {"grad_scale": 1024.0, "found_inf": 0.0}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16, stochastic": {"dtype": torch.bfloat16, "states": "bfloat16", "weight_rounding": "stochastic"},
    "8bit": {"dtype": torch.bfloat16, "states": "8bit", "master_weights": "24bit"},
    "scaled": SCALED,
    "clipping": {"max_grad_norm": 1.0},
    "8bit, clipping": {"dtype": torch.bfloat16, "states": "8bit", "master_weights": "24bit", "max_grad_norm": 1.0},
    "telemetry": {"telemetry": True},
    "capturable": {"capturable": True},
    "all": {"capturable": True, "telemetry": True, "max_grad_norm": 1.0, **SCALED},
}
# In-place operations and views.
WRITING = {"copy_", "cat"}
VIEWS = {"select", "slice", "view", "detach"}
OF_TORCH = {"_record_function_enter_new", "_record_function_exit"}  # around every optimizer's step


class Watch(TorchDispatchMode):
    """Records the operations within a block, and those that return new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.allocating: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.operations.add(name)
        if name not in OF_TORCH and storages(result) - storages((args, kwargs)):
            self.allocating.append(name)
        return result


def storages(tree: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def build(device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[AdaXW, list[Parameter]]:
    scaler = {name: torch.tensor(options.pop(name), device=device) for name in SCALED if name in options}
    params = [Parameter(torch.ones(shape, dtype=dtype, device=device)) for shape in SHAPES]
    optimizer = AdaXW(params, lr=0.01, **options)
    for name, value in scaler.items():
        setattr(optimizer, name, value)
    return optimizer, params


def give_gradients(params: Sequence[Parameter], gradients: Sequence[Tensor | None]) -> None:
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient


@pytest.fixture(autouse=True)
def nothing_is_launched(launchers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in launchers.items():
        monkeypatch.setattr(f"adax_triton.kernels.{module}.{name}", lambda *args: None)


class GuardsWithoutModes:
    """Run tensor guards outside dispatch modes, because they reject tensors under `Watch`."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._guards = original_guards(tensors)

    def check(self, *tensors: Any) -> bool:
        with _disable_current_modes():
            return bool(self._guards.check(*tensors))


@pytest.fixture(autouse=True)
def only_the_step_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse_check, "tensor_guards", GuardsWithoutModes)
    # The frozen warning reads a CPU count directly. On a GPU it reads a finished asynchronous copy.
    monkeypatch.setattr("adax_triton.step.frozen_warning._INITIAL_COUNT_READS", 0)


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on tensor reads that do not dispatch. Other reads dispatch `_local_scalar_dense`."""

    def read(*args: Any) -> None:
        raise AssertionError("a step read a tensor on the host")

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(Tensor, name, read)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, test_cuda_graphs.py asks torch's allocator")
@pytest.mark.parametrize("gradients", ["same", "fresh"])
@pytest.mark.parametrize("mode", MODES)
def test_steady_steps_neither_read_nor_allocate(mode: str, gradients: str, device: torch.device) -> None:
    optimizer, params = build(device, **MODES[mode])
    sets = [[torch.ones_like(param) for param in params] for _ in range(2 if gradients == "fresh" else 1)]
    for step in range(2):
        give_gradients(params, sets[step % len(sets)])
        optimizer.step()
    watch = Watch()
    for step in range(3):
        give_gradients(params, sets[step % len(sets)])
        with watch:
            optimizer.step()
    assert watch.operations <= WRITING | VIEWS | OF_TORCH
    assert watch.allocating == []


@pytest.mark.parametrize("mode", MODES)
def test_steps_of_changing_parameters_do_not_read(mode: str, device: torch.device) -> None:
    optimizer, params = build(device, **MODES[mode])
    watch = Watch()
    for step in range(4):
        give_gradients(
            params, [torch.ones_like(param) if index != step else None for index, param in enumerate(params)]
        )
        with watch:
            optimizer.step()
    assert not watch.operations & {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item"}
