"""Interrupted or failed steps change everything or nothing.

Oracle: the same steps undisturbed, bit for bit.
Some tests let the build of the native kernel fail, as without a compiler or disk space.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from adax_triton import AdaXW, GradientRelease
from adax_triton.step import backend as backend_module
from adax_triton.step.backend import uses_triton
from adax_triton.step.cpu_kernel import CpuKernelError, KernelVariant
from adax_triton.step.external_grads import ExternalGrads
from adax_triton.step.launch import NativeLaunch, TritonLaunch

Sizes = tuple[tuple[int, torch.dtype], ...]
# Tensors of several chunks and of one chunk, for the native kernel.
NATIVE_SIZES: Sizes = ((50_000, torch.float32), (40_001, torch.bfloat16), (10, torch.float32), (33_000, torch.float32))
# For Triton's kernel, small enough for the interpreter.
TRITON_SIZES = ((5_000, torch.float32), (401, torch.bfloat16), (10, torch.float32))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "8bit_v16": {"states": "8bit_v16", "master_weights": "24bit"},
    "device": {"capturable": True},
    "telemetry": {"telemetry": True},
}
each_mode = pytest.mark.parametrize("mode", ["plain", "8bit_v16", "telemetry"])


def build(
    sizes: Sizes = NATIVE_SIZES, device: torch.device | str = "cpu", **options: Any
) -> tuple[AdaXW, list[Parameter]]:
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(size, generator=generator).to(device, dtype)) for size, dtype in sizes]
    return AdaXW(params, lr=1e-2, **options), params


def give_gradients(params: list[Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def tensors_of(optimizer: AdaXW, params: list[Parameter]) -> list[Tensor]:
    """Return copies of all weights, states and counts."""
    states = [torch.as_tensor(value) for param in params for value in optimizer.state[param].values()]
    return [tensor.detach().clone() for tensor in (*params, *states)]


def trained(mode: str = "plain", sizes: Sizes = NATIVE_SIZES, device: torch.device | str = "cpu") -> list[list[Tensor]]:
    """Return the tensors after one step, after two and after three."""
    optimizer, params = build(sizes, device, **OPTIONS[mode])
    found = []
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
        found.append(tensors_of(optimizer, params))
    return found


# On a CPU each kernel has its own sizes, so the arguments identify the kernel in the cache.
undisturbed = functools.cache(trained)


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.fixture
def failing_bfloat16_build(monkeypatch: pytest.MonkeyPatch, native_cpu: torch.device) -> None:
    """Let the native build fail for bfloat16 parameters, and reset the warning."""
    original = backend_module.cpu_kernel

    def fail(variant: KernelVariant) -> Any:
        if variant.param_dtype == torch.bfloat16:
            raise CpuKernelError("no space left")
        return original(variant)

    monkeypatch.setattr(backend_module, "_warned", [])
    monkeypatch.setattr(backend_module, "cpu_kernel", fail)
    monkeypatch.setattr(backend_module, "_failed", set())


def act_before_second_call(function: Callable[..., Any], act: Callable[[], None]) -> Callable[..., Any]:
    """Wrap `function` so that `act` runs before its second call."""
    calls = []

    def replacement(*args: Any, **keywords: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            act()
        return function(*args, **keywords)

    return replacement


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def interrupts_raise() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt: a background process may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@each_mode
def test_interrupt_waits_for_the_step(mode: str, backend: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, sizes = (
        (TritonLaunch, TRITON_SIZES) if uses_triton(torch.empty(1, device=backend)) else (NativeLaunch, NATIVE_SIZES)
    )
    optimizer, params = build(sizes, backend, **OPTIONS[mode])
    give_gradients(params, 0)
    optimizer.step()  # on a GPU, a first step calls `run` also to compile
    give_gradients(params, 1)
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "run", act_before_second_call(owner.run, interrupt))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert signal.getsignal(signal.SIGINT) is before
    assert equal(tensors_of(optimizer, params), undisturbed(mode, sizes, backend)[1])
    give_gradients(params, 2)
    optimizer.step()
    assert equal(tensors_of(optimizer, params), undisturbed(mode, sizes, backend)[2])


def test_interrupt_while_compiling_changes_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adax_triton.step.plan.needs_compilation", lambda launches: True)
    optimizer, params = build(TRITON_SIZES, device)
    give_gradients(params, 0)
    weights = [param.detach().clone() for param in params]
    with monkeypatch.context() as patch:
        patch.setattr(TritonLaunch, "run", act_before_second_call(TritonLaunch.run, interrupt))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert equal(weights, [param.detach() for param in params])
    optimizer.step()
    assert equal(tensors_of(optimizer, params), undisturbed("plain", TRITON_SIZES, device)[0])


def test_interrupt_waits_for_a_step_with_external_gradients(
    native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [Parameter(torch.ones(40_000)) for _ in range(2)]
    optimizer = AdaXW(params)
    low_precision_copies = None, torch.empty(40_000, dtype=torch.bfloat16)  # so that there are two launches
    optimizer.set_external_grads(
        [
            ExternalGrads(param, [torch.ones(40_000)], low_precision_copy)
            for param, low_precision_copy in zip(params, low_precision_copies, strict=True)
        ]
    )
    monkeypatch.setattr(NativeLaunch, "run", act_before_second_call(NativeLaunch.run, interrupt))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert torch.equal(*params) and float(params[0].detach()[0]) < 1.0
    assert [optimizer.state[param]["step"] for param in params] == [1, 1]


def test_interrupt_waits_for_the_step_of_a_released_gradient(
    native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    param = Parameter(torch.ones(10))
    optimizer = AdaXW([param])
    GradientRelease(optimizer)
    run = NativeLaunch.run

    def interrupted(*args: Any) -> None:
        run(*args)
        interrupt()

    monkeypatch.setattr(NativeLaunch, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (param * 2.0).sum().backward()
    assert float(param.detach()[0]) < 1.0 and optimizer.state[param]["step"] == 1


def test_other_threads_and_ignored_interrupts_are_unaffected(native_cpu: torch.device) -> None:
    def step() -> None:
        optimizer, params = build()
        give_gradients(params, 0)
        optimizer.step()

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        step()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@each_mode
def test_a_failed_build_for_one_dtype_falls_back_to_the_same_bits(
    mode: str, native_cpu: torch.device, request: pytest.FixtureRequest
) -> None:
    expected = undisturbed(mode)
    request.getfixturevalue("failing_bfloat16_build")
    with pytest.warns(UserWarning, match="no space left") as caught:
        found = trained(mode)
    assert len([warning for warning in caught if "adax_triton" in str(warning.message)]) == 1
    assert all(map(equal, found, expected))


def test_a_warning_raised_as_error_comes_before_the_first_write(
    native_cpu: torch.device, request: pytest.FixtureRequest
) -> None:
    expected = undisturbed()
    request.getfixturevalue("failing_bfloat16_build")
    optimizer, params = build()
    give_gradients(params, 0)
    weights = [param.detach().clone() for param in params]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "adax_triton")
        with pytest.raises(UserWarning, match="no space left"):
            optimizer.step()
    assert equal(weights, [param.detach() for param in params])
    assert [optimizer.state[param]["step"] for param in params] == [0] * len(params)
    optimizer.step()
    assert equal(tensors_of(optimizer, params), expected[0])


class PassThroughMode(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


def test_dispatch_modes_change_no_bits(native_cpu: torch.device) -> None:
    expected = undisturbed()
    with PassThroughMode():
        found = trained()
    assert all(map(equal, found, expected))


def test_compilation_in_another_thread_changes_no_bits(
    native_cpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed()
    # torch has one such flag for all threads.
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    assert all(map(equal, trained(), expected))


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="no CUDA"))],
)
@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit_v16", "8bit"])
@pytest.mark.parametrize("master_weights", [None, "24bit", "float32"])
def test_pytorch_updates_fake_tensors(device: str, states: str, master_weights: str | None) -> None:
    options = {"states": states, "master_weights": master_weights, "telemetry": device == "cpu"}
    with FakeTensorMode(allow_non_fake_inputs=False):
        dtype = torch.bfloat16 if master_weights else torch.float32
        params = [Parameter(torch.ones(size, dtype=dtype, device=device)) for size in ((200, 200), (5,))]
        params.append(Parameter(torch.ones(6, 4, dtype=dtype, device=device).as_strided((6, 2), (4, 2))))
        optimizer = AdaXW(params, max_grad_norm=1.0 if states == "8bit_v16" else None, **options)
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
    assert [optimizer.state[param]["step"] for param in params] == [2, 2, 2]
    assert {optimizer.state[param]["exp_avg"].device.type for param in params} == {device}


def fail() -> None:
    raise RuntimeError("ptxas failed")


@pytest.mark.parametrize("mode", ["plain", "device", "telemetry"])
def test_a_failed_compilation_changes_nothing(mode: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from adax_triton.kernels import adax_step

    monkeypatch.setattr("adax_triton.step.plan.needs_compilation", lambda launches: True)
    optimizer, params = build(TRITON_SIZES, device, **OPTIONS[mode])
    give_gradients(params, 0)
    weights = [param.detach().clone() for param in params]
    with monkeypatch.context() as patch:
        patch.setattr(adax_step, "launch", act_before_second_call(adax_step.launch, fail))
        with pytest.raises(RuntimeError, match="ptxas failed"):
            optimizer.step()
    assert equal(weights, [param.detach() for param in params])
    assert [int(optimizer.state[param]["step"]) for param in params] == [0] * len(params)
    optimizer.step()
    give_gradients(params, 1)
    optimizer.step()
    monkeypatch.undo()
    assert equal(tensors_of(optimizer, params), undisturbed(mode, TRITON_SIZES, device)[1])


class FakeKernel:
    """Records compilations, loads and launches in order."""

    def __init__(self, events: list[str]) -> None:
        self.fn = object()
        self._events = events

    def warmup(self, *args: Any, grid: tuple[int], **constants: Any) -> FakeKernel:
        self._events.append("compiled")
        return self

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        self._events.append("loaded")
        return lambda *args, stream: self._events.append(f"launched {grid[0]} {args[1:]} on {stream}")


def test_deferred_launches_are_compiled_and_loaded_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from adax_triton.kernels import launch as launch_module

    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_stream=lambda index: "s"))
    fake_triton = types.SimpleNamespace(runtime=types.SimpleNamespace(driver=driver))
    monkeypatch.setattr(launch_module, "triton", fake_triton)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(launch_module, "_compiled", {})
    events: list[str] = []
    kernel, table = FakeKernel(events), types.SimpleNamespace(device=torch.device("cuda", 0))

    def launch(programs: int) -> None:
        launch_module.launch(kernel, programs, (table, 7), "variant", lambda: {"SIZE": 4}, {"num_warps": 8})

    with pytest.raises(RuntimeError), launch_module.deferred_launches():
        launch(9)
        raise RuntimeError
    assert events == ["compiled", "loaded"]
    with launch_module.deferred_launches() as deferred:
        launch(1)
        launch(2)
    assert events == ["compiled", *["loaded"] * 3]
    for run in deferred:
        run()
    assert events[4:] == ["launched 1 (7, 4) on s", "launched 2 (7, 4) on s"]
    launch(3)
    assert events[6:] == ["loaded", "launched 3 (7, 4) on s"]
