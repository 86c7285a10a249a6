"""Compare telemetry with torch's norms and counts before and after a step.

Bound: sums add float32 squares, so the relative error of norms is at most 1e-5 against float64. Counts are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from adax_triton import Adam, AdamW, AdaX, AdaXW
from adax_triton.state.allocation import local_state_tensors
from adax_triton.state.memory_layout import is_dense
from adax_triton.step.telemetry import StepTelemetry, Telemetry
from adax_triton.update.quantized_update import load_master

CLASSES = (AdaX, AdaXW, Adam, AdamW)
STATES = ("float32", "bfloat16", "8bit_v16", "8bit")
WEIGHTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp16": (torch.float16, {}),
    "stochastic": (torch.bfloat16, {"weight_rounding": "stochastic"}),
    "24bit": (torch.bfloat16, {"master_weights": "24bit"}),
    "bf16 master": (torch.bfloat16, {"master_weights": "float32"}),
    "fp16 master": (torch.float16, {"master_weights": "float32"}),
}
# One chunk, empty, several chunks with a remainder, large enough for codes.
SHAPES = ((), (0,), (1,), (5, 7), (2049,), (4, 1027))


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    return [Parameter(values(*shape, seed=seed).to(device, dtype)) for seed, shape in enumerate(shapes)]


def set_gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    for index, param in enumerate(params):
        wide = torch.complex128 if param.is_complex() else torch.float64
        grad = values(*param.shape, seed=1000 * step + index, dtype=wide) * scale
        param.grad = grad.to(param.device, param.dtype)


def weights(optimizer: AdaX, param: Tensor) -> Tensor:
    """Return the stored weights including masters, in float64."""
    state = optimizer.state.get(param) or {}
    data = torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
    stored = data if data.dtype == torch.float64 else load_master(data, local_state_tensors(state).get("master"))
    return stored.double().cpu().clone()


def take(optimizer: AdaX, params: Sequence[Tensor]) -> dict[Tensor, list[Tensor]]:
    """Step; return [gradient, old weights, new weights] by parameter with a gradient."""
    trained = [param for param in params if param.grad is not None]
    before = [weights(optimizer, param) for param in trained]
    grads = [torch.view_as_real(param.grad) if param.is_complex() else param.grad for param in trained]
    grads = [grad.double().cpu().clone() for grad in grads]
    optimizer.step()
    found = zip(trained, grads, before, strict=True)
    return {param: [grad, old, weights(optimizer, param)] for param, grad, old in found}


def expected(triples: Sequence[Sequence[Tensor]], scale: float = 1.0) -> Telemetry:
    if not triples:
        return Telemetry(0.0, 0.0, 0.0, 0.0, 0.0, 0)
    grad, old, new = (torch.cat([tensor.flatten() for tensor in column]) for column in zip(*triples, strict=True))
    update = new - old
    norms = [float(tensor.norm()) for tensor in (grad / scale, update, new)]
    share = int((update == 0).sum()) / update.numel() if update.numel() else 0.0
    ratio = norms[1] / norms[2] if norms[2] else 0.0
    return Telemetry(*norms, ratio, share, int(grad.isfinite().logical_not().sum()))


def assert_close(found: Telemetry, truth: Telemetry) -> None:
    for name, value, true_value in zip(Telemetry._fields, found, truth, strict=True):
        if name in ("unchanged_share", "nonfinite_grads"):
            assert value == true_value, name
        else:
            assert value == pytest.approx(true_value, rel=1e-5, abs=1e-30, nan_ok=True), name


def check(
    optimizer: AdaX, params: Sequence[Tensor], names: Sequence[str], scale: float = 1.0, skipped: bool = False
) -> StepTelemetry:
    """Step, compare all telemetry with torch, and return it."""
    found_of = take(optimizer, params)
    found = optimizer.read_telemetry(per_parameter=True)
    assert repr(optimizer.read_telemetry()) == repr(found._replace(params={}))  # repr compares NaN as equal
    assert found.skipped is skipped
    assert sorted(found.params) == sorted(name for name, param in zip(names, params, strict=True) if param in found_of)
    for name, param in zip(names, params, strict=True):
        if param in found_of:
            assert_close(found.params[name], expected([found_of[param]], scale))
    assert len(found.groups) == len(optimizer.param_groups)
    for numbers, group in zip(found.groups, optimizer.param_groups, strict=True):
        assert_close(numbers, expected([found_of[param] for param in group["params"] if param in found_of], scale))
    return found


def positions(params: Sequence[Tensor], group: int = 0) -> list[str]:
    return [f"{group}.{position}" for position in range(len(params))]


# All formats of weights and of moments, but not all pairs.
PRECISIONS = [*zip(STATES * 2, WEIGHTS, strict=False), ("8bit", "fp32"), ("8bit", "24bit"), ("8bit_v16", "bf16 master")]


@pytest.mark.parametrize(("states", "name"), PRECISIONS)
def test_telemetry_equals_torch_in_each_precision(states: str, name: str, backend: torch.device) -> None:
    dtype, options = WEIGHTS[name]
    params = parameters(backend, dtype)
    optimizer = AdaXW(params, lr=1e-3, states=states, telemetry=True, **options)
    for step in range(2):
        set_gradients(params, step)
        assert check(optimizer, params, positions(params)).groups[0].update_norm > 0.0


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_telemetry_equals_torch_for_each_class(optimizer_class: type, backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7), (2049,)))
    optimizer = optimizer_class(params, telemetry=True)
    for step in range(2):
        set_gradients(params, step)
        check(optimizer, params, positions(params))


@pytest.mark.parametrize("rows", [2, 4])
def test_many_chunks_are_summed_in_rounds(rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("adax_triton.kernels.telemetry")
    monkeypatch.setattr(module, "ROWS_PER_PROGRAM", rows)
    params = parameters(device, torch.float32, ((0,), (2048 * 9,), (1,), (2048 * 17 + 3,), (2048 * 4,), (0,)))
    optimizer = AdaX(params, telemetry=True)
    for step in range(2):
        set_gradients(params, step)
        check(optimizer, params, positions(params))
    (plan,) = optimizer._plans.values()
    stages = [len(launch._sums._stages) for launch, _ in plan._launches]
    assert stages == [{2: 5, 4: 3}[rows]]


@pytest.mark.parametrize("path", ["native_cpu", "reference_cpu"])
def test_long_tensors_are_summed_in_parts_on_the_cpu(path: str, request: pytest.FixtureRequest) -> None:
    device = request.getfixturevalue(path)
    for numel in (32_769, 2**17, 2**17 + 33):
        params = parameters(device, torch.bfloat16, ((numel,),))
        optimizer = AdaX(params, states="8bit_v16", weight_rounding="stochastic", telemetry=True)
        set_gradients(params, 1)
        check(optimizer, params, ["0.0"])


def test_bfloat16_loses_tiny_updates_and_masters_keep_them(backend: torch.device) -> None:
    shares = {}
    for master in (None, "24bit", "float32"):
        # Weights away from 0 also lose updates if bfloat16 truncates, as in the interpreter.
        param = Parameter((0.5 + values(4099).abs()).to(backend, torch.bfloat16))
        optimizer = AdaX([param], lr=1e-4, master_weights=master, telemetry=True)
        for step in range(2):
            param.grad = -values(4099, seed=step).abs().to(param)
            shares[master] = check(optimizer, [param], ["0.0"]).groups[0].unchanged_share
    assert shares[None] == 1.0 and shares["24bit"] < 0.5 and shares["float32"] == 0.0


def test_zero_gradients_change_nothing_at_the_first_step(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7), (2049,)))
    optimizer = AdaX(params, weight_decay=0.0, telemetry=True)
    set_gradients(params, 0, scale=0.0)
    (group,) = check(optimizer, params, positions(params)).groups
    assert group[:2] == (0.0, 0.0) and group[3:] == (0.0, 1.0, 0)


def test_update_ratio_of_zero_parameters(backend: torch.device) -> None:
    params = [Parameter(torch.zeros(9, device=backend)), Parameter(torch.full((3,), 0.25, device=backend))]
    optimizer = AdaXW(params, lr=0.0, telemetry=True)
    params[0].grad, params[1].grad = torch.ones(9, device=backend), torch.zeros(3, device=backend)
    found = check(optimizer, params, positions(params))
    assert found.params["0.0"].update_ratio == 0.0
    shrunk = AdaXW([params[1]], lr=1.0, weight_decay=1.0, telemetry=True)
    shrunk.step()
    numbers = shrunk.read_telemetry().groups[0]
    assert numbers.param_norm == 0.0 and numbers.update_ratio == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_gradients_are_counted(value: float, backend: torch.device) -> None:
    params = parameters(backend, torch.bfloat16, ((5, 7), (2049,), (3,)))
    optimizer = AdaX(params, master_weights="24bit", telemetry=True)
    set_gradients(params, 0)
    for param, indices in zip(params, ([], [0, 2047, 2048], [1]), strict=True):
        for index in indices:
            param.grad.view(-1)[index] = value
    take(optimizer, params)
    found = optimizer.read_telemetry(per_parameter=True)
    assert [found.params[name].nonfinite_grads for name in positions(params)] == [0, 3, 1]
    assert found.groups[0].nonfinite_grads == 4
    assert not math.isfinite(found.groups[0].grad_norm) and math.isfinite(found.params["0.0"].grad_norm)


def test_telemetry_uses_parameter_names(backend: torch.device) -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)).to(backend)
    optimizer = AdaX(model.named_parameters(), telemetry=True)
    params = list(model.parameters())
    set_gradients(params, 0)
    check(optimizer, params, ["0.weight", "0.bias", "1.weight", "1.bias"])


def test_telemetry_of_groups_with_and_without_gradients(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7), (2049,), (3,), (4,), (1,)))
    groups = [{"params": params[:2]}, {"params": params[2:3], "lr": 0.1}, {"params": []}, {"params": params[3:]}]
    optimizer = AdaX(groups, telemetry=True)
    names = ["0.0", "0.1", "1.0", "3.0", "3.1"]
    for step in range(4):
        set_gradients(params, step)
        if step == 1:  # frozen at this step only
            params[0].grad = params[2].grad = None
        found = check(optimizer, params, names)
        assert found.groups[2] == expected([])
        assert (found.groups[1] == expected([])) is (step == 1)
    optimizer.add_param_group({"params": [Parameter(torch.ones(2, device=backend))]})
    assert optimizer.read_telemetry().groups == [*found.groups, expected([])]
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.read_telemetry(per_parameter=True) == StepTelemetry(False, [expected([])] * 5, {})


def test_mixed_dtypes_and_backends(backend: torch.device) -> None:
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
    params = []
    for dtype in kinds:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        params += [Parameter(values(*shape, dtype=wide).to(backend, dtype)) for shape in ((2049,), (5, 7))]
    optimizer = AdaXW([{"params": params[::2]}, {"params": params[1::2], "lr": 0.02}], telemetry=True)
    order = params[::2] + params[1::2]
    for step in range(2):
        set_gradients(order, step)
        check(optimizer, order, positions(params[::2]) + positions(params[1::2], 1))


def test_gradients_of_another_dtype(backend: torch.device) -> None:
    params = parameters(backend, torch.bfloat16, ((2049,), (5, 7)))
    optimizer = AdaX(params, master_weights="float32", telemetry=True)
    for param, dtype in zip(params, (torch.float32, torch.float64), strict=True):
        param.grad_dtype = dtype
        param.grad = values(*param.shape, seed=3).to(backend, dtype)
    found = take(optimizer, params)
    assert_close(optimizer.read_telemetry().groups[0], expected(list(found.values())))


def test_noncontiguous_and_transposed_parameters(backend: torch.device) -> None:
    gaps = values(70, 120).to(backend, torch.float32)[:, ::2].requires_grad_()
    transposed = values(100, 67).to(backend, torch.float32).t().requires_grad_()
    assert not is_dense(gaps)
    optimizer = AdaX([gaps, transposed], states="8bit_v16", telemetry=True)
    for step in range(2):
        set_gradients([gaps, transposed], step)
        check(optimizer, [gaps, transposed], ["0.0", "0.1"])


@pytest.mark.parametrize("limit", [1e-3, math.inf])
def test_gradient_norm_is_measured_before_clipping(limit: float, backend: torch.device) -> None:
    params = parameters(backend, torch.float32)
    optimizer = AdaX(params, max_grad_norm=limit, telemetry=True)
    for step in range(3):
        set_gradients(params, step, scale=30.0)
        found = check(optimizer, params, positions(params))
        assert found.groups[0].grad_norm == pytest.approx(float(optimizer.grad_norm), rel=1e-6)
    params[3].grad.fill_(math.nan)
    found = check(optimizer, params, positions(params), skipped=True)
    assert found.groups[0].update_norm == 0.0 and found.groups[0].unchanged_share == 1.0


def test_grad_scaler_gives_unscaled_norms_and_skipped_steps(backend: torch.device) -> None:
    params = parameters(backend, torch.float32, ((5, 7), (2049,), (0,)))
    params.append(Parameter(values(9).to(backend)))  # float64 has no kernel
    optimizer = AdaX(params, lr=0.01, telemetry=True, fused=True)
    scaler = torch.amp.GradScaler(backend.type, init_scale=1024.0, growth_interval=1)
    for step, infinite in enumerate((False, True, True, False, False)):
        scale = scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(sum((param.double() * values(*param.shape).to(backend)).sum() for param in params)).backward()
        if infinite:
            params[1].grad[2048] = math.inf
        before = [weights(optimizer, param) for param in params]
        grads = [param.grad.double().cpu() for param in params]
        scaler.step(optimizer)
        scaler.update()
        found = optimizer.read_telemetry(per_parameter=True)
        after = [weights(optimizer, param) for param in params]
        assert found.skipped is infinite
        for name, *triple in zip(positions(params), grads, before, after, strict=True):
            assert_close(found.params[name], expected([triple], scale))
        assert_close(found.groups[0], expected(list(zip(grads, before, after, strict=True)), scale))
        if infinite:
            assert found.groups[0][1:2] + found.groups[0][4:] == (0.0, 1.0, 1), step
