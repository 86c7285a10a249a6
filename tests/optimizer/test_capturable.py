"""Steps with device coefficients equal host ones and replay without host work.

Without a GPU, the fixture `recording` replaces the CUDA graph; test_cuda_graphs.py tests real graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tensor_bits import bits, contents
from torch import Tensor
from torch.nn import Parameter

from adax_triton import AdamW, AdaX, AdaXW

SHAPES = ((5, 7), (4097,), ())
MODES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 states, stochastic": {"dtype": torch.bfloat16, "states": "bfloat16", "weight_rounding": "stochastic"},
    "8bit_v16, fp16 master": {"dtype": torch.float16, "states": "8bit_v16", "master_weights": "float32"},
    "8bit, 24bit": {"dtype": torch.bfloat16, "states": "8bit", "master_weights": "24bit"},
}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
KINDS: dict[str, dict[str, Any]] = {
    **MODES,
    "clipping": {"max_grad_norm": 5.0},
    "telemetry": {"telemetry": True, "max_grad_norm": 5.0},
    "8bit, 24bit, clipping": {**MODES["8bit, 24bit"], "max_grad_norm": 5.0},
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def build(device: torch.device, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[AdaX, list[Parameter]]:
    params = parameters(device, dtype)
    return AdaXW(params, **{"lr": 0.01, "seed": 5, **options}), params


def set_gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """Write gradients into the existing tensors."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(torch.randn(param.shape, generator=generator) * scale)


def train(optimizer: AdaX, params: Sequence[Tensor], steps: Sequence[int]) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


@each_mode
def test_device_coefficients_equal_host_coefficients(mode: dict[str, Any], device: torch.device) -> None:
    # Bit for bit: float64 scalars that agree to 1e-15 almost always round to the same float32.
    (optimizer, params), (twin, twins) = build(device, **mode, capturable=True), build(device, **mode)
    train(optimizer, params, range(2))
    train(twin, twins, range(2))
    assert contents(optimizer) == contents(twin)


@pytest.mark.parametrize("optimizer_class", [AdaX, AdamW], ids=lambda cls: cls.__name__)
def test_step_counts_are_device_tensors(optimizer_class: type, device: torch.device) -> None:
    params = parameters(device)
    optimizer = optimizer_class(params, capturable=True)
    train(optimizer, params, range(2))
    params[0].grad = None
    optimizer.step()
    counts = [optimizer.state[param]["step"] for param in params]
    assert [(count.shape, count.dtype, count.device.type) for count in counts] == [((), torch.int64, device.type)] * 3
    assert [int(count) for count in counts] == [2, 3, 3]
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [2, 3, 3]


def test_changed_lr_tensor_is_used(device: torch.device) -> None:
    lr = torch.tensor(0.5, device=device)
    (optimizer, params), (twin, twins) = build(device, lr=lr, capturable=True), build(device, lr=0.5)
    for step, number in enumerate((0.5, 0.0, 0.125)):  # exact in float32
        lr.fill_(number)
        twin.param_groups[0]["lr"] = number
        train(optimizer, params, [step])
        train(twin, twins, [step])
    assert contents(optimizer) == contents(twin)


def test_lr_on_the_device_must_be_float32(device: torch.device) -> None:
    lr = torch.tensor(0.5, dtype=torch.float64, device=device)
    params = [*parameters(device), *parameters(device, torch.float64)]  # float64 has no kernel
    optimizer = AdaX(params, lr=lr, max_grad_norm=1.0)
    set_gradients(params, 0)
    before = [bits(param) for param in params]
    with pytest.raises(TypeError, match=r"Invalid type of lr: .*float32, got torch\.float64"):
        optimizer.step()
    assert [bits(param) for param in params] == before
    assert len(optimizer.state) == 0


def test_load_state_dict_writes_the_lr_tensor_in_place(device: torch.device) -> None:
    lr = torch.tensor(0.5, device=device)
    optimizer, _ = build(device, lr=lr, capturable=True)
    source, others = build(device, lr=0.125)
    train(source, others, [0])
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr == 0.125


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"capturable": True}], ids=repr)
def test_step_ignores_the_default_device(options: dict[str, Any], device: torch.device) -> None:
    params = [*parameters(device), *([] if "capturable" in options else parameters(device, torch.float64))]
    optimizer = AdaX(params, states="8bit_v16", keep_float32=lambda param: param.dtype == torch.float64, **options)
    before = [bits(param) for param in params]
    for step in range(2):
        set_gradients(params, step)
        with torch.device("meta"):
            optimizer.step()
    assert [bits(param) for param in params] != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_capturable_without_a_kernel_raises(dtype: torch.dtype, native_cpu: torch.device) -> None:
    optimizer, params = build(native_cpu, dtype, capturable=True)
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['capturable'\] is True, .* {dtype} on cpu"):
        optimizer.step()
    assert [bits(param) for param in params] == [bits(param) for param in parameters(native_cpu, dtype)]
    assert len(optimizer.state) == 0


def test_capturable_with_a_float64_parameter_raises(device: torch.device) -> None:
    params = [*parameters(device), *parameters(device, torch.float64)]
    optimizer = AdaX(params, capturable=True)
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['capturable'\]"):
        optimizer.step()
    assert len(optimizer.state) == 0


def test_invalid_capturable_raises(device: torch.device) -> None:
    with pytest.raises(TypeError, match="Invalid type of capturable: expected True or False, got 1"):
        AdaX(parameters(device), capturable=1)
    optimizer = AdaX(parameters(device), max_grad_norm=1.0, error_if_nonfinite=True)
    with pytest.raises(ValueError, match="Invalid error_if_nonfinite: True with capturable=True"):
        optimizer.add_param_group({"params": parameters(device), "capturable": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("capturable", [True, False], ids=["into capturable", "into host coefficients"])
@pytest.mark.parametrize("mode", [MODES["fp32"], MODES["8bit, 24bit"]], ids=["fp32", "8bit, 24bit"])
def test_state_dict_loads_between_capturable_and_not(
    mode: dict[str, Any], capturable: bool, device: torch.device
) -> None:
    source, params = build(device, **mode, capturable=not capturable)
    train(source, params, range(2))
    target, others = build(device, **mode, capturable=capturable)
    train(target, others, range(1))
    counts = [target.state[param]["step"] for param in others]
    target.load_state_dict(source.state_dict())
    assert target.param_groups[0]["capturable"] is capturable
    if capturable:  # a graph would read these addresses
        assert all(target.state[param]["step"] is count for param, count in zip(others, counts, strict=True))
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    train(source, params, [2])
    train(target, others, [2])
    assert contents(source) == contents(target)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs of its own")
@each_kind
def test_replay_equals_steps(kind: dict[str, Any], device: torch.device, recording: Any) -> None:
    lrs = [torch.tensor(0.01), torch.tensor(0.01)]
    (optimizer, params), (twin, twins) = (build(device, **kind, lr=lr, capturable=True) for lr in lrs)
    train(optimizer, params, [0])
    set_gradients(params, 1)
    with recording:
        optimizer.step()
    train(twin, twins, [0, 1])
    for step in (2, 3):
        for lr in lrs:
            lr.fill_(0.01 * step)
        set_gradients(params, step)
        recording.replay()
        train(twin, twins, [step])
        assert contents(optimizer) == contents(twin)
        assert optimizer.grad_norm == twin.grad_norm
        if "telemetry" in kind:
            assert optimizer.read_telemetry(per_parameter=True) == twin.read_telemetry(per_parameter=True)
    for trained, own in ((optimizer, params), (twin, twins)):
        train(trained, own, [4])
    assert contents(optimizer) == contents(twin)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has graphs of its own")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_replay_skips_steps_with_infinite_gradients(device: torch.device, recording: Any) -> None:
    options = {"max_grad_norm": 5.0, "capturable": True, "fused": True}
    (optimizer, params), (twin, twins) = build(device, **options), build(device, **options)
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))

    def set_scaled_gradients(own: Sequence[Tensor], scale: torch.amp.GradScaler, step: int) -> None:
        set_gradients(own, step, float(scale.scale(torch.ones(()))))
        if step in (3, 5):
            own[1].grad[4096] = torch.inf

    def step_and_update(scale: torch.amp.GradScaler, stepped: AdaX) -> None:
        scale.step(stepped)
        scale.update()

    for step in range(7):
        set_scaled_gradients(params, scaler, step)
        set_scaled_gradients(twins, other, step)
        step_and_update(other, twin)
        if step == 0:
            step_and_update(scaler, optimizer)
        elif step == 1:
            with recording:
                step_and_update(scaler, optimizer)
        else:
            recording.replay()
        assert contents(optimizer) == contents(twin)
    assert [state["step"] for state in optimizer.state_dict()["state"].values()] == [5] * 3
    assert scaler.get_scale() == other.get_scale() == 2.0**8


@pytest.fixture
def launches(launchers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """Triton's specialization keys of all launches: integers, types of floats, dtypes, alignment."""
    seen: set[tuple[Any, ...]] = set()

    def recorder(name: str) -> Callable[..., None]:
        return lambda *args: seen.add((name, *map(specialization, args)))

    def specialization(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return arg.dtype, arg.data_ptr() % 16 == 0
        return float if isinstance(arg, float) else arg

    for module, name in launchers.items():
        monkeypatch.setattr(f"adax_triton.kernels.{module}.{name}", recorder(name))
    return seen


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_changing_hyperparameters_do_not_recompile(
    capturable: bool, max_grad_norm: float | None, device: torch.device, launches: set[tuple[Any, ...]]
) -> None:
    optimizer, params = build(device, capturable=capturable, max_grad_norm=max_grad_norm)
    set_gradients(params, 0)
    known = None
    for step in range(1000):
        optimizer.param_groups[0].update(lr=float(step % 48), weight_decay=step % 3 / 2, seed=step)
        if max_grad_norm is not None:
            optimizer.max_grad_norm = float(1 + step % 32)
        optimizer.step()
        known = known or set(launches)
    assert launches == known
    assert {name for name, *_ in launches} >= {"adax_step"} | (
        {"grad_norm_partials", "prepare_step"} if max_grad_norm else set()
    )
