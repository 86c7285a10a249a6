"""Compare clipping inside the step with torch.nn.utils.clip_grad_norm_ and an unclipped step.

Oracle: the same steps in float64, clipped by torch. The error may be twice that of torch's clipping in the parameters'
precision, plus two units in the last place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from tensor_bits import bits
from torch import Tensor
from torch.nn import Parameter

from adax_triton import AdaX, AdaXW

SHAPES = ((5, 7), (), (0,), (2049,), (3, 2, 1))
KINDS = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp16": [torch.float16],
    "fp64": [torch.float64],
    "complex": [torch.complex64],
    # PyTorch steps some of these and the kernel the others; all use one norm.
    "mixed": [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128],
}
each_kind = pytest.mark.parametrize("dtypes", KINDS.values(), ids=KINDS)
alike_and_mixed = pytest.mark.parametrize("dtypes", [KINDS["bf16"], KINDS["mixed"]], ids=["bf16", "mixed"])
# Gradient scale of each step; a limit clips only some steps.
SIZES = (1.0, 30.0, 0.01, 0.0, 3.0)


def values(index: int, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(SHAPES[index], generator=generator, dtype=wide)


def parameters(device: torch.device, dtypes: Sequence[torch.dtype]) -> list[Parameter]:
    found = []
    for index in range(len(SHAPES)):
        dtype = dtypes[index % len(dtypes)]
        found.append(Parameter(values(index, 99, dtype).to(device, dtype)))
    return found


def in_float64(params: Sequence[Tensor]) -> list[Parameter]:
    wide = [param.detach().to(torch.complex128 if param.is_complex() else torch.float64) for param in params]
    return [Parameter(param.clone()) for param in wide]


def set_gradients(params: Sequence[Tensor], like: Sequence[Tensor], step: int) -> None:
    """Set the gradients of `like`, converted to the dtypes of `params`."""
    for index, (param, model) in enumerate(zip(params, like, strict=True)):
        grad = values(index, step, model.dtype) * SIZES[step]
        param.grad = grad.to(param.device, model.dtype).to(param.dtype)


def two_groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 0.05, "maximize": True}]


def moved(optimizer: AdaX, params: Iterable[Tensor]) -> list[Tensor]:
    """Return parameters and moments in float64.

    Moments, unlike parameters, show errors of small gradients.
    """
    wide = torch.complex128
    return [
        tensor.detach().cpu().to(wide)
        for param in params
        for tensor in (param, optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"])
    ]


def contents(optimizer: AdaX) -> list[tuple[str, Any]]:
    """Return (name, bits) of all parameters, gradients and states."""
    found: list[tuple[str, Any]] = []
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        found += [("param", bits(param)), ("grad", None if param.grad is None else bits(param.grad))]
        found += [(name, bits(torch.as_tensor(value))) for name, value in optimizer.state[param].items()]
    return found


@pytest.mark.parametrize(
    ("dtypes", "limit"),
    [*((dtypes, 5.0) for dtypes in KINDS.values()), (KINDS["bf16"], 1e-3), (KINDS["mixed"], 1e-3)],
    ids=[*KINDS, "bf16, all clipped", "mixed, all clipped"],
)
def test_clipped_steps_are_as_accurate_as_torch(dtypes: list[torch.dtype], limit: float, backend: torch.device) -> None:
    ours, by_torch = parameters(backend, dtypes), parameters(backend, dtypes)
    exact = in_float64(ours)
    optimizer = AdaXW(two_groups(ours), lr=0.01, max_grad_norm=limit)
    references = [(AdaXW(two_groups(params), lr=0.01), params) for params in (by_torch, exact)]
    for step in range(len(SIZES)):
        set_gradients(ours, ours, step)
        optimizer.step()
        for reference, params in references:
            set_gradients(params, ours, step)
            norm = torch.nn.utils.clip_grad_norm_(params, limit)
            reference.step()
        # `norm` is torch's norm of the float64 gradients.
        assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-6, abs=0.0)
    results = [moved(*pair) for pair in ((optimizer, ours), *references)]
    for mine, theirs, truth in zip(*results, strict=True):
        if truth.numel():
            unit = torch.finfo(torch.float32).eps * float(truth.abs().max())
            assert float((mine - truth).abs().max()) <= 2 * float((theirs - truth).abs().max()) + 2 * unit
    if limit < 1.0:  # all steps are clipped
        assert not torch.equal(results[0][1], moved(*unclipped(backend, dtypes))[1])


def unclipped(device: torch.device, dtypes: list[torch.dtype]) -> tuple[AdaX, list[Parameter]]:
    params = parameters(device, dtypes)
    optimizer = AdaXW(two_groups(params), lr=0.01)
    for step in range(len(SIZES)):
        set_gradients(params, params, step)
        optimizer.step()
    return optimizer, params


@alike_and_mixed
def test_clipping_does_not_change_gradients(dtypes: list[torch.dtype], backend: torch.device) -> None:
    params = parameters(backend, dtypes)
    optimizer = AdaX(two_groups(params), max_grad_norm=1e-3)
    set_gradients(params, params, 1)
    before = [bits(param.grad) for param in params]
    optimizer.step()
    assert [bits(param.grad) for param in params] == before


@alike_and_mixed
def test_zero_gradients_are_not_clipped(dtypes: list[torch.dtype], backend: torch.device) -> None:
    params, twins = parameters(backend, dtypes), parameters(backend, dtypes)
    optimizer, twin = AdaX(params, lr=0.01, max_grad_norm=1e-3), AdaX(twins, lr=0.01)
    for stepped, own in ((optimizer, params), (twin, twins)):
        set_gradients(own, own, SIZES.index(0.0))
        stepped.step()
    assert float(optimizer.grad_norm) == 0.0
    assert all(torch.equal(param, other) for param, other in zip(params, twins, strict=True))
    assert {int(optimizer.state[param]["step"]) for param in params} == {1}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@alike_and_mixed
@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_nonfinite_norm_skips_the_step(dtypes: list[torch.dtype], value: float, backend: torch.device) -> None:
    params = parameters(backend, dtypes)
    optimizer = AdaX(two_groups(params), lr=0.01, max_grad_norm=1.0)
    set_gradients(params, params, 0)
    optimizer.step()
    for index in (1, 3):  # in "mixed": float64 (PyTorch) and complex64 (kernel)
        set_gradients(params, params, 1)
        params[index].grad.view(-1)[-1] = value
        before = contents(optimizer)
        optimizer.step()
        assert contents(optimizer) == before
        assert not optimizer.grad_norm.isfinite()
    set_gradients(params, params, 1)
    optimizer.step()
    assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {2}


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@alike_and_mixed
def test_error_if_nonfinite_raises_before_anything_changes(dtypes: list[torch.dtype], backend: torch.device) -> None:
    params = parameters(backend, dtypes)
    optimizer = AdaX(two_groups(params), lr=0.01, max_grad_norm=1.0, error_if_nonfinite=True)
    set_gradients(params, params, 0)
    optimizer.step()
    params[3].grad[7] = math.nan
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match="norm of the gradients is not finite"):
        optimizer.step()
    assert contents(optimizer) == before
    set_gradients(params, params, 1)
    optimizer.step()
    assert contents(optimizer) != before


def test_error_if_nonfinite_raises_if_only_the_sum_overflows(
    backend: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adax_triton.step.launch.native_kernel", lambda _: None)  # plain PyTorch, one square per tensor
    params = [Parameter(torch.ones(3, dtype=torch.float64, device=backend)) for _ in range(2)]
    for param in params:
        param.grad = torch.full_like(param, 7e153)  # a sum of squares of 1.5e308 for each
    optimizer = AdaX(params, lr=0.01, max_grad_norm=1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="norm of the gradients is not finite"):
        optimizer.step()
    params[1].grad = None
    optimizer.step()
    assert optimizer.grad_norm == math.inf  # 1.2e154 overflows float32
    assert not torch.equal(params[0], torch.ones_like(params[0]))


def test_limit_may_change_between_steps(backend: torch.device) -> None:
    limits = (1.0, 0.5, None, 100.0, 0.5)
    params, twins = (parameters(backend, KINDS["mixed"]) for _ in range(2))
    optimizer, saved = AdaX(params, lr=0.01, max_grad_norm=limits[0]), None
    for step, limit in enumerate(limits):
        optimizer.max_grad_norm = limit
        set_gradients(params, params, step)
        optimizer.step()
        assert (optimizer.grad_norm is None) == (limit is None)
        twin = AdaX(twins, lr=0.01, max_grad_norm=limit)  # a new one for each step
        if saved is not None:
            twin.load_state_dict(saved)
        set_gradients(twins, twins, step)
        twin.step()
        saved = twin.state_dict()
        assert [bits(param) for param in params] == [bits(param) for param in twins]


def test_infinite_limit_only_measures_the_norm(backend: torch.device) -> None:
    params, twins = (parameters(backend, KINDS["fp32"]) for _ in range(2))
    optimizer, twin = AdaX(params, lr=0.01, max_grad_norm=math.inf), AdaX(twins, lr=0.01)
    for step in range(len(SIZES)):
        for stepped, own in ((optimizer, params), (twin, twins)):
            set_gradients(own, own, step)
            stepped.step()
        expected = torch.nn.utils.get_total_norm([param.grad.double() for param in params])
        assert float(optimizer.grad_norm) == pytest.approx(float(expected), rel=1e-6)
    assert [bits(param) for param in params] == [bits(param) for param in twins]


def test_next_step_does_not_overwrite_the_norm(backend: torch.device) -> None:
    params = parameters(backend, KINDS["mixed"])
    optimizer, norms = AdaX(params, max_grad_norm=1.0), []
    for step in range(3):
        set_gradients(params, params, step)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert len({float(norm) for norm in norms}) == 3
    assert {(norm.shape, norm.dtype) for norm in norms} == {(torch.Size(()), torch.float32)}


def test_scaled_gradients_are_clipped_like_unscaled_ones(backend: torch.device) -> None:
    # GradScaler rejects complex gradients, and bfloat16 on a GPU. float16 gradients must not overflow.
    params, twins = (parameters(backend, [torch.float32, torch.float64, torch.float16]) for _ in range(2))
    optimizer, twin = (AdaX(group, lr=0.01, max_grad_norm=5.0, fused=True) for group in (params, twins))
    scaler = torch.amp.GradScaler(backend.type, init_scale=2.0**3)
    for step in range(len(SIZES)):
        set_gradients(params, params, step)
        set_gradients(twins, twins, step)
        for param in params:
            param.grad *= float(scaler.scale(torch.ones((), device=backend)))
        scaler.step(optimizer)
        scaler.update()
        twin.step()
        assert torch.equal(optimizer.grad_norm, twin.grad_norm)
    assert without_gradients(optimizer) == without_gradients(twin)


def without_gradients(optimizer: AdaX) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in contents(optimizer) if name != "grad"]


@pytest.mark.parametrize("value", [0, 0.0, -1.0, -math.inf, math.nan])
def test_limit_out_of_range_raises(value: float, backend: torch.device) -> None:
    params = parameters(backend, KINDS["fp32"])
    with pytest.raises(ValueError, match=f"Invalid max_grad_norm: {value}"):
        AdaX(params, max_grad_norm=value)
    optimizer = AdaX(params)
    set_gradients(params, params, 0)
    optimizer.step()
    before = contents(optimizer)
    optimizer.max_grad_norm = value
    with pytest.raises(ValueError, match=f"Invalid max_grad_norm: {value}"):
        optimizer.step()
    assert contents(optimizer) == before


@pytest.mark.parametrize("value", ["1", True, torch.tensor(1.0), 1j], ids=repr)
def test_limit_of_the_wrong_type_raises(value: Any, backend: torch.device) -> None:
    params = parameters(backend, KINDS["fp32"])
    with pytest.raises(TypeError, match="Invalid type of max_grad_norm: "):
        AdaX(params, max_grad_norm=value)
    optimizer = AdaX(params)
    optimizer.max_grad_norm = value
    with pytest.raises(TypeError, match="Invalid type of max_grad_norm: "):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"error_if_nonfinite": True}, ValueError, "Invalid max_grad_norm: None"),
        ({"norm_process_group": object()}, ValueError, "Invalid max_grad_norm: None"),
        ({"max_grad_norm": 1.0, "error_if_nonfinite": 1}, TypeError, "error_if_nonfinite"),
        ({"max_grad_norm": 1.0, "error_if_nonfinite": None}, TypeError, "error_if_nonfinite"),
        ({"max_grad_norm": 1.0, "error_if_nonfinite": True, "capturable": True}, ValueError, "error_if_nonfinite"),
    ],
)
def test_inconsistent_options_raise(options: dict[str, Any], error: type, name: str) -> None:
    with pytest.raises(error, match=name):
        AdaX([torch.zeros(3, requires_grad=True)], **options)


def test_limit_is_copied_but_not_saved(backend: torch.device) -> None:
    params = parameters(backend, KINDS["fp32"])
    optimizer = AdaX(params, max_grad_norm=2.0)
    set_gradients(params, params, 0)
    optimizer.step()
    optimizer.max_grad_norm = 3.0
    saved = optimizer.state_dict()
    assert not {"max_grad_norm", "error_if_nonfinite", "norm_process_group"} & set(saved["param_groups"][0])
    other = AdaX(parameters(backend, KINDS["fp32"]), max_grad_norm=4.0)
    other.load_state_dict(saved)
    assert (other.max_grad_norm, copy.deepcopy(optimizer).max_grad_norm) == (4.0, 3.0)
    assert copy.deepcopy(optimizer).grad_norm is None
