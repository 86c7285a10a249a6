"""Test that a step starts from weights that other code overwrote.

It must not start from the old masters.
"""

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

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # from numpy, in Triton's interpreter
BF16, FP16 = torch.bfloat16, torch.float16
KINDS = [(BF16, "float32"), (BF16, "24bit"), (FP16, "float32")]
every_kind = pytest.mark.parametrize(("dtype", "master_weights"), KINDS, ids=lambda value: str(value))
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
    """Return a parameter and its optimizer after three steps.

    Its masters have extra bits.
    """
    return copy.deepcopy(cached_original(dtype, master_weights, device, telemetry, backend_of(device, dtype) == TRITON))


@functools.cache
def cached_original(
    dtype: torch.dtype, master_weights: str, device: torch.device, telemetry: bool, uses_triton: bool
) -> tuple[Tensor, AdaXW]:
    assert (backend_of(device, dtype) == TRITON) == uses_triton
    param = nn.Parameter(normal(NUMEL, 0).to(device, dtype))
    optimizer = AdaXW([param], lr=LR, weight_decay=0.0, master_weights=master_weights, telemetry=telemetry)
    for seed in (1, 2, 3):
        take_step(param, optimizer, seed)
    return param, optimizer


def overwrite(param: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        param.copy_(value)


# Functions that overwrite weights, given the old ones.
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


@every_kind
@pytest.mark.parametrize("name", CHANGES)
def test_step_starts_from_the_overwritten_weights(
    dtype: torch.dtype, master_weights: str, name: str, backend: torch.device
) -> None:
    param, optimizer = trained(dtype, master_weights, backend)
    overwrite(param, CHANGES[name](param.detach()))
    given = param.detach().float()
    take_step(param, optimizer, 4)
    found = param.detach().float()
    assert torch.equal(found.isfinite(), given.isfinite())  # an infinite weight becomes inf - inf = NaN
    finite = given.isfinite()
    # AdaXW moves a weight by at most a few times lr. eps allows half a unit for the remainder and half for rounding.
    unit = torch.finfo(dtype).eps * given[finite].abs()
    assert bool(((found[finite] - given[finite]).abs() <= 10 * LR + unit).all())


@every_kind
def test_next_step_ignores_the_old_remainder(dtype: torch.dtype, master_weights: str, backend: torch.device) -> None:
    # Zeros need no remainder, so the two runs differ only if the first one uses its old remainder.
    param, optimizer = trained(dtype, master_weights, backend)
    overwrite(param, torch.zeros_like(param))
    take_step(param, optimizer, 4)
    expected, other = trained(dtype, master_weights, backend)
    overwrite(expected, torch.zeros_like(expected))
    other.state[expected]["master"].zero_()
    take_step(expected, other, 4)
    # A positive remainder adds up to half of the smallest subnormal number to zero.
    assert torch.allclose(param.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-38)


@every_kind
def test_weights_swapped_out_and_back_keep_their_masters(
    dtype: torch.dtype, master_weights: str, backend: torch.device
) -> None:
    (param, optimizer), (twin, other) = (trained(dtype, master_weights, backend) for _ in range(2))
    own = param.detach().clone()
    overwrite(param, torch.full_like(param, 0.25))  # as an evaluation with averaged weights does
    overwrite(param, own)
    for seed in (4, 5):
        take_step(param, optimizer, seed)
        take_step(twin, other, seed)
    assert torch.equal(param, twin)
    assert torch.equal(optimizer.state[param]["master"], other.state[twin]["master"])


@every_kind
def test_loaded_weights_are_exported_and_telemetry_starts_from_them(
    dtype: torch.dtype, master_weights: str, backend: torch.device
) -> None:
    param, optimizer = trained(dtype, master_weights, backend, telemetry=True)
    model = nn.ParameterDict({"weight": param})
    model.load_state_dict({"weight": torch.full((NUMEL,), 0.5, dtype=dtype)})
    exported = optimizer.master_state_dict(model)["weight"]
    assert bool(((exported - 0.5).abs() <= 0.25 * torch.finfo(dtype).eps).all())
    take_step(param, optimizer, 4)
    # The update is measured from 0.5, not from the old weights.
    assert optimizer.read_telemetry().groups[0].update_norm <= 10 * LR * math.sqrt(NUMEL)


@pytest.mark.parametrize("path", ["native_cpu", "reference_cpu"])
def test_float16_masters_equal_float32_weights(path: str, request: pytest.FixtureRequest) -> None:
    # The kernel compares the master cast to float16 with the parameter; a compiler must not skip that cast.
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


def all_bfloat16_values() -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)


REMAINDERS = {
    torch.int8: range(-128, 128),
    torch.int16: [*range(-(2**15), 2**15, 509), *range(-2, 3), 2**15 - 1, -(2**15) + 1],
}


@pytest.mark.parametrize("dtype", REMAINDERS, ids=str)
def test_every_weight_rounds_to_its_parameter(dtype: torch.dtype) -> None:
    params = all_bfloat16_values()
    not_nan = ~params.isnan()
    for remainder in REMAINDERS[dtype]:
        joined = join_master(params, torch.full((len(params),), remainder, dtype=dtype))
        assert torch.equal(joined.isnan(), ~not_nan)
        assert bool(joined[params.isfinite()].isfinite().all())
        # To nearest, ties away from zero.
        rounded = ((joined.view(torch.int32) + 0x8000) >> 16).to(torch.int16)
        assert torch.equal(rounded[not_nan], params.view(torch.int16)[not_nan]), remainder


def test_float32_master_is_used_only_where_it_rounds_to_the_parameter() -> None:
    params = torch.arange(-(2**15), 2**15).to(torch.int16).view(FP16)
    not_nan = ~params.isnan()
    for factor in (1.0, 1 + 2**-13, 1 - 2**-13, 1 + 2**-11, 1 - 2**-11, 1 - 2**-12, 1.5, -1.0, 0.0, math.nan, math.inf):
        master = params.float() * factor + (2**-26 if factor == 1.0 else 0.0)
        found = load_master(params, master)
        assert torch.equal(found.half()[not_nan], params[not_nan]) and bool(found[~not_nan].isnan().all())
        kept = (master.half() == params) & not_nan
        assert torch.equal(found[kept].view(torch.int32), master[kept].view(torch.int32))
        assert torch.equal(found[~kept & not_nan], params[~kept & not_nan].float())
    # Halfway to infinity, and just below.
    params = torch.full((4,), math.inf, dtype=FP16)
    master = torch.tensor([65520.0, 65519.996, 1e30, -65520.0])
    assert load_master(params, master.float()).tolist() == [65520.0, math.inf, float(master[2]), math.inf]
    # A low-precision copy is write-only, so its values do not matter.
    assert torch.equal(load_master(params, master, param_is_copy=True), master)
