"""Weights that somebody sets between two steps: the next step starts from them, whatever the master says."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adax_triton import AdaXW
from adax_triton.step.backend import TRITON, backend_of
from adax_triton.update.quantized_update import load_master
from adax_triton.update.rounding import join_master

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, interpreting
BF16, FP16 = torch.bfloat16, torch.float16
KINDS = [(BF16, "float32"), (BF16, "24bit"), (FP16, "float32")]
each_kind = pytest.mark.parametrize(("dtype", "master_weights"), KINDS, ids=lambda value: str(value))
NUMEL = 4096 + 7
LR = 1e-3


def normal(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def take_step(param: Tensor, optimizer: AdaXW, seed: int) -> None:
    param.grad = normal(param.numel(), seed).to(param.device, param.dtype)
    optimizer.step()


def trained(
    dtype: torch.dtype, master_weights: str, device: torch.device, telemetry: bool = False
) -> tuple[Tensor, AdaXW]:
    """Return a parameter after three steps, with masters that no longer are its own values."""
    return copy.deepcopy(original(dtype, master_weights, device, telemetry, backend_of(device, dtype) == TRITON))


@functools.cache
def original(
    dtype: torch.dtype, master_weights: str, device: torch.device, telemetry: bool, by_kernel: bool
) -> tuple[Tensor, AdaXW]:
    assert (backend_of(device, dtype) == TRITON) == by_kernel
    param = nn.Parameter(normal(NUMEL, 0).to(device, dtype))
    optimizer = AdaXW([param], lr=LR, weight_decay=0.0, master_weights=master_weights, telemetry=telemetry)
    for seed in (1, 2, 3):
        take_step(param, optimizer, seed)
    return param, optimizer


def set_from_outside(param: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        param.copy_(value)


# What others do to weights: each a function of the weights before.
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "-zero": lambda weights: -torch.zeros_like(weights),
    "NaN": lambda weights: torch.full_like(weights, math.nan),
    "inf": lambda weights: torch.full_like(weights, math.inf),
    "-inf": lambda weights: torch.full_like(weights, -math.inf),
    "other sign": torch.neg,
    "other binade": lambda weights: 4 * weights,
    "next to zero": lambda weights: torch.full_like(weights, torch.finfo(weights.dtype).smallest_normal),
    "largest": lambda weights: torch.full_like(weights, torch.finfo(weights.dtype).max),
    "clamp": lambda weights: weights.clamp(min=0),
    "mask": lambda weights: weights * (torch.arange(len(weights), device=weights.device) % 2),
    "average": lambda weights: 0.9 * weights + 0.1,
}


@each_kind
@pytest.mark.parametrize("name", CHANGES)
def test_step_starts_from_what_was_set(
    dtype: torch.dtype, master_weights: str, name: str, backend: torch.device
) -> None:
    param, optimizer = trained(dtype, master_weights, backend)
    set_from_outside(param, CHANGES[name](param.detach()))
    given = param.detach().float()
    take_step(param, optimizer, 4)
    found = param.detach().float()
    assert torch.equal(found.isfinite(), given.isfinite())  # of an infinity, the decay makes inf - inf
    others = given.isfinite()
    # A step of AdaXW moves a weight by a few times lr at most; a unit for what the master adds and one for rounding.
    unit = torch.finfo(dtype).eps * given[others].abs()
    assert bool(((found[others] - given[others]).abs() <= 10 * LR + unit).all())


@each_kind
def test_next_step_is_that_of_a_parameter_that_always_was_so(
    dtype: torch.dtype, master_weights: str, backend: torch.device
) -> None:
    # Values without a remainder of their own, far from the old ones: only the old remainder could tell them apart.
    param, optimizer = trained(dtype, master_weights, backend)
    set_from_outside(param, torch.zeros_like(param))
    take_step(param, optimizer, 4)
    expected, other = trained(dtype, master_weights, backend)
    set_from_outside(expected, torch.zeros_like(expected))
    other.state[expected]["master"].zero_()
    take_step(expected, other, 4)
    # To half a unit of the smallest subnormal number, which a positive remainder adds to zero.
    assert torch.allclose(param.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-38)


@each_kind
def test_weights_swapped_out_and_back_lose_nothing(
    dtype: torch.dtype, master_weights: str, backend: torch.device
) -> None:
    (param, optimizer), (twin, other) = (trained(dtype, master_weights, backend) for _ in range(2))
    own = param.detach().clone()
    set_from_outside(param, torch.full_like(param, 0.25))  # an average, for an evaluation
    set_from_outside(param, own)
    for seed in (4, 5):
        take_step(param, optimizer, seed)
        take_step(twin, other, seed)
    assert torch.equal(param, twin)
    assert torch.equal(optimizer.state[param]["master"], other.state[twin]["master"])


@each_kind
def test_loaded_weights_are_exported_and_counted_by_telemetry(
    dtype: torch.dtype, master_weights: str, backend: torch.device
) -> None:
    param, optimizer = trained(dtype, master_weights, backend, telemetry=True)
    model = nn.ParameterDict({"weight": param})
    model.load_state_dict({"weight": torch.full((NUMEL,), 0.5, dtype=dtype)})
    exported = optimizer.master_state_dict(model)["weight"]
    assert bool(((exported - 0.5).abs() <= 0.25 * torch.finfo(dtype).eps).all())
    take_step(param, optimizer, 4)
    # 0.5 moved by lr or so, not from the old weights to there.
    assert optimizer.read_telemetry().groups[0].update_norm <= 10 * LR * math.sqrt(NUMEL)


@pytest.mark.parametrize("path", ["native_cpu", "reference_cpu"])
def test_float16_master_counts_where_the_parameter_is_its_rounding(path: str, request: pytest.FixtureRequest) -> None:
    # The comparison needs the cast to float16, which a compiler that fuses it into float32 would leave out.
    request.getfixturevalue(path)
    numel = 32_773
    full = normal(numel, 0).requires_grad_()
    half = full.detach().half().requires_grad_()
    optimizers = AdaXW([full], lr=LR), AdaXW([half], lr=LR, master_weights="float32")
    full.data.copy_(half)
    for seed in (1, 2, 3):
        half.grad = normal(numel, seed).half()
        full.grad = half.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(optimizers[1].state[half]["master"], full)
    assert not torch.equal(half.float(), full)


def all_params() -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)


RESTS = {
    torch.int8: range(-128, 128),
    torch.int16: [*range(-(2**15), 2**15, 509), *range(-2, 3), 2**15 - 1, -(2**15) + 1],
}


@pytest.mark.parametrize("dtype", RESTS, ids=str)
def test_every_parameter_next_to_any_rest_is_the_weight_or_its_rounding(dtype: torch.dtype) -> None:
    params = all_params()
    number = ~params.isnan()
    for rest in RESTS[dtype]:
        joined = join_master(params, torch.full((len(params),), rest, dtype=dtype))
        assert torch.equal(joined.isnan(), ~number)
        assert bool(joined[params.isfinite()].isfinite().all())
        # To nearest, ties away from zero.
        rounded = ((joined.view(torch.int32) + 0x8000) >> 16).to(torch.int16)
        assert torch.equal(rounded[number], params.view(torch.int16)[number]), rest


def test_float32_master_counts_only_where_it_rounds_to_the_parameter() -> None:
    params = torch.arange(-(2**15), 2**15).to(torch.int16).view(FP16)
    number = ~params.isnan()
    for factor in (1.0, 1 + 2**-13, 1 - 2**-13, 1 + 2**-11, 1 - 2**-11, 1 - 2**-12, 1.5, -1.0, 0.0, math.nan, math.inf):
        master = params.float() * factor + (2**-26 if factor == 1.0 else 0.0)
        found = load_master(params, master)
        assert torch.equal(found.half()[number], params[number]) and bool(found[~number].isnan().all())
        kept = (master.half() == params) & number
        assert torch.equal(found[kept].view(torch.int32), master[kept].view(torch.int32))
        assert torch.equal(found[~kept & number], params[~kept & number].float())
    # Halfway to infinity, and just below.
    params = torch.full((4,), math.inf, dtype=FP16)
    master = torch.tensor([65520.0, 65519.996, 1e30, -65520.0])
    assert load_master(params, master.float()).tolist() == [65520.0, math.inf, float(master[2]), math.inf]
    # An image is only written: what it holds means nothing.
    assert torch.equal(load_master(params, master, param_is_copy=True), master)
