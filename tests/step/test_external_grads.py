"""Steps with external gradients. Oracle: cast, scale, `step()` with `grad`, copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adax_triton import AdaX, AdaXW, ExternalGrads
from adax_triton.step.backend import TRITON, backend_of

SIZES = [1, 31, 700, 33, 3]  # pieces of a gradient that split groups of 32 elements
STEPS = 3


def pieces(sizes: list[int], dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


def cast_like_the_kernel(weights: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16 and weights.device.type == "cpu" and backend_of(weights.device, dtype) == TRITON:
        # Triton's interpreter truncates. A GPU rounds.
        return (weights.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
    return weights.to(dtype)


def pair(numel: int, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    start = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device)
    return nn.Parameter(start.clone()), nn.Parameter(start.clone())


def step_both(
    optimizers: tuple[AdaX, AdaX],
    params: tuple[nn.Parameter, nn.Parameter],
    grads: list[Tensor],
    low_precision_copy: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    optimizers[0].set_external_grads([ExternalGrads(params[0], grads, low_precision_copy)], factor)
    optimizers[0].step()
    full = torch.cat([grad.flatten() for grad in grads]).float()
    params[1].grad = full if factor is None else full * factor
    optimizers[1].step()


def assert_same(optimizers: tuple[AdaX, AdaX], params: tuple[nn.Parameter, nn.Parameter]) -> None:
    state, expected = (
        optimizer.state[param] | {"param": param.detach()} for optimizer, param in zip(optimizers, params, strict=True)
    )
    assert state["step"] == expected["step"] == STEPS
    for key, value in expected.items():
        assert key == "step" or torch.equal(state[key], value), key


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("copy_dtype", [torch.bfloat16, torch.float16, torch.float32, None], ids=str)
def test_equals_cast_scaling_step_and_copy(
    backend: torch.device, copy_dtype: torch.dtype | None, grad_dtype: torch.dtype
) -> None:
    params = pair(sum(SIZES), backend)
    optimizers = AdaXW([params[0]], lr=1e-2, weight_decay=0.1), AdaXW([params[1]], lr=1e-2, weight_decay=0.1)
    low_precision_copy = None if copy_dtype is None else torch.zeros(sum(SIZES), dtype=copy_dtype, device=backend)
    for step in range(STEPS):
        multiplier = None if step == 0 else torch.tensor(0.37 / step, device=backend)
        step_both(optimizers, params, pieces(SIZES, grad_dtype, backend, step), low_precision_copy, multiplier)
        if low_precision_copy is not None:
            assert torch.equal(low_precision_copy, cast_like_the_kernel(params[1].detach(), low_precision_copy.dtype))
    assert_same(optimizers, params)


@pytest.mark.parametrize("states", ["bfloat16", "8bit_v16", "8bit"])
def test_equals_the_oracle_with_low_memory_states(backend: torch.device, states: str) -> None:
    sizes = [4096, 33, 77]
    params = pair(sum(sizes), backend)
    optimizers = AdaX([params[0]], lr=1e-2, states=states), AdaX([params[1]], lr=1e-2, states=states)
    low_precision_copy = torch.zeros(sum(sizes), dtype=torch.float16, device=backend)
    for step in range(STEPS):
        step_both(optimizers, params, pieces(sizes, torch.float16, backend, step), low_precision_copy)
    assert_same(optimizers, params)
    assert torch.equal(low_precision_copy, params[1].half())


def test_large_and_small_pieces_equal_the_oracle(native_cpu: torch.device) -> None:
    sizes = [32_773, 3, 9, 32_768]
    params = pair(sum(sizes), native_cpu)
    optimizers = AdaX([params[0]], lr=1e-2, weight_decay=0.1), AdaX([params[1]], lr=1e-2, weight_decay=0.1)
    low_precision_copy = torch.zeros(sum(sizes), dtype=torch.bfloat16)
    for step in range(STEPS):
        step_both(
            optimizers, params, pieces(sizes, torch.bfloat16, native_cpu, step), low_precision_copy, torch.tensor(0.3)
        )
    assert_same(optimizers, params)
    assert torch.equal(low_precision_copy, params[1].bfloat16())


def test_adjacent_pieces_and_pieces_of_other_shapes_and_dtypes(backend: torch.device) -> None:
    params = pair(40, backend)
    optimizers = AdaXW([params[0]], lr=1e-2), AdaXW([params[1]], lr=1e-2)
    for step in range(STEPS):
        memory, tail = pieces([40, 8], torch.bfloat16, backend, step)
        transposed = tail.view(2, 4).t().float()
        grads = [memory[:20], memory[20:28].view(2, 4), memory[4:8], transposed]
        step_both(optimizers, params, grads)
    assert_same(optimizers, params)


def test_steady_steps_reuse_their_plan_and_read_moved_gradients(
    backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = pair(48, backend)
    optimizers = AdaXW([params[0]], lr=1e-2), AdaXW([params[1]], lr=1e-2)
    planned: list[Any] = []
    original = optimizers[0]._new_plan
    monkeypatch.setattr(
        optimizers[0], "_new_plan", lambda *given, **options: planned.append(given) or original(*given, **options)
    )
    memory, low_precision_copy = torch.empty(96, device=backend), torch.empty(48, dtype=torch.float16, device=backend)
    for step in range(STEPS - 1):
        memory.copy_(pieces([96], torch.float32, backend, step)[0])
        # Adjacent pieces are read as one.
        step_both(optimizers, params, [memory[:20], memory[20:48]], low_precision_copy)
    assert len(planned) == 1
    step_both(optimizers, params, [memory[:20], memory[60:88]], low_precision_copy)  # no longer adjacent
    assert len(planned) == 2
    assert_same(optimizers, params)


def test_groups_and_other_gradients_are_independent(backend: torch.device) -> None:
    (first, expected_first), (second, expected_second), (third, _) = (pair(50, backend) for _ in range(3))
    third.grad = torch.ones_like(third)
    before = third.detach().clone()
    groups = [{"params": [first], "lr": 1e-3}, {"params": [second], "weight_decay": 0.5}, {"params": [third]}]
    optimizer = AdaXW(groups, lr=1e-2)
    oracle = AdaXW([{"params": [expected_first], "lr": 1e-3}, {"params": [expected_second], "weight_decay": 0.5}], 1e-2)
    grads = pieces([50, 20, 30], torch.float16, backend, 0)
    factor = torch.tensor(0.1, dtype=torch.float64)  # on the CPU, with another dtype
    optimizer.set_external_grads([ExternalGrads(second, grads[1:]), ExternalGrads(first, grads[:1])], factor)
    optimizer.step()
    expected_first.grad = grads[0].float() * factor.float().to(backend)
    expected_second.grad = torch.cat(grads[1:]).float() * factor.float().to(backend)
    oracle.step()
    assert torch.equal(first, expected_first)
    assert torch.equal(second, expected_second)
    assert torch.equal(third, before)
    optimizer.step()  # external gradients apply to one step only; this step uses `grad`
    assert not torch.equal(third, before)
    assert optimizer.state[first]["step"] == 1


def test_autograd_sees_that_the_weights_changed(backend: torch.device) -> None:
    param, _ = pair(8, backend)
    product = (param * param).sum()
    optimizer = AdaX([param])
    optimizer.set_external_grads(
        [ExternalGrads(param, [torch.ones(8, device=backend)], torch.zeros(8, device=backend))]
    )
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


PARAM = nn.Parameter(torch.zeros(6))
GRAD = torch.zeros(6)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([ExternalGrads(nn.Parameter(GRAD.half()), [GRAD])], TypeError, "contiguous float32 tensor, got torch.float16"),
        ([ExternalGrads(nn.Parameter(torch.zeros(3, 2).t()), [GRAD])], TypeError, "contiguous float32 tensor"),
        ([ExternalGrads(PARAM, [GRAD[:5]])], ValueError, "expected 6 elements in all, .* got 5"),
        ([ExternalGrads(PARAM, [])], ValueError, "expected 6 elements in all, .* got 0"),
        ([ExternalGrads(PARAM, [GRAD.int()])], TypeError, r"grads\[0\]: expected .* got torch.int32"),
        ([ExternalGrads(PARAM, [torch.zeros(6, device="meta")])], ValueError, "expected a tensor on cpu, .* got meta"),
        ([ExternalGrads(PARAM, [GRAD], GRAD.double())], TypeError, "low_precision_copy: expected .* got torch.float64"),
        ([ExternalGrads(PARAM, [GRAD], GRAD[:4])], ValueError, "contiguous tensor of 6 elements"),
        ([ExternalGrads(PARAM, [GRAD]), ExternalGrads(PARAM, [GRAD])], ValueError, "occurs twice"),
    ],
)
def test_invalid_arguments_raise(parts: list[ExternalGrads], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdaX([PARAM]).set_external_grads(parts)


def test_a_factor_of_several_elements_raises() -> None:
    with pytest.raises(TypeError, match="grad_factor"):
        AdaX([PARAM]).set_external_grads([ExternalGrads(PARAM, [GRAD])], torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"telemetry": True}, "telemetry"),
        ({"capturable": True}, "counted on the device"),
        ({"in_no_group": True}, "in none of the optimizer's groups"),
    ],
)
def test_unsupported_options_raise_before_anything_changes(options: dict[str, Any], message: str) -> None:
    in_no_group = options.pop("in_no_group", False)
    optimizer = AdaX([nn.Parameter(torch.zeros(6)) if in_no_group else PARAM], **options)
    with pytest.raises(ValueError, match=message):
        optimizer.set_external_grads([ExternalGrads(PARAM, [GRAD + 1])])
        optimizer.step()
    assert not optimizer.state
    assert not PARAM.any()
