"""Check the quantized states.

Oracles: the formats in float64, and the bits of PyTorch against those of Triton.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adax_triton.update.quantization import GROUP, dequantize_moments, quantize_moments
from adax_triton.update.rounding import random_bits, random_key

pytest.importorskip("triton")

import triton
import triton.language as tl
from adax_triton.kernels import quantization as on_device

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of the interpreter
each_format = pytest.mark.parametrize("v_8bit", [False, True], ids=["8bit_v16", "8bit"])
BLOCK_GROUPS = tl.constexpr(64)
WIDTH = tl.constexpr(32)


@triton.jit
def kernel(
    m_ptr, v_ptr, random_ptr, m_code_ptr, v_code_ptr, exponents_ptr, states: tl.constexpr, shift_first: tl.constexpr
):
    """Write the codes of moments, and their dequantized values over the moments."""
    groups = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    offsets = groups * WIDTH + tl.arange(0, WIDTH)[None, :]
    random = tl.load(random_ptr + offsets).to(tl.uint32, bitcast=True)
    m, v = tl.load(m_ptr + offsets), tl.load(v_ptr + offsets)
    m, v, exponents = on_device.quantize_moments(m, v, random, states, 1, shift_first)
    tl.store(m_code_ptr + offsets, m)
    tl.store(v_code_ptr + offsets, v)
    tl.store(exponents_ptr + groups, exponents.to(tl.uint16).to(exponents_ptr.dtype.element_ty))
    m, v = on_device.dequantize_moments(m, v, exponents, states)
    tl.store(m_ptr + offsets, m)
    tl.store(v_ptr + offsets, v)


def wide_moments(groups: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return m and v of groups with random scales.

    v differs from its group's scale by at most `spread` powers of two.
    """
    rng = np.random.default_rng(seed)
    scale = rng.uniform(-100, 100, (groups, 1))
    exponent = np.clip(scale + rng.uniform(-spread, spread, (groups, GROUP)), -124, 125)
    v = np.exp2(exponent) * rng.uniform(1, 2, (groups, GROUP))
    m = rng.standard_normal((groups, GROUP)) * np.sqrt(v)
    return torch.from_numpy(m).float(), torch.from_numpy(v).float()


def awkward_moments(groups: int = 256) -> tuple[Tensor, Tensor]:
    """Return moments, 10 % of them special values.

    The special values are zeros, subnormals, the largest float, infinities and NaNs of both signs.
    """
    m, v = (torch.cat(parts) for parts in zip(*(wide_moments(groups // 4, 10.0**k, k) for k in range(4)), strict=True))
    generator = torch.Generator().manual_seed(0)
    specials = torch.tensor([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001])
    for values, signed in ((m, True), (v, False)):
        chosen = specials.to(torch.int32)[torch.randint(len(specials), values.shape, generator=generator)]
        if signed:
            chosen = chosen ^ (torch.randint(2, values.shape, generator=generator, dtype=torch.int32) << 31)
        replaced = torch.rand(values.shape, generator=generator) < 0.1
        values[replaced] = chosen.view(torch.float32)[replaced]
    m[:8], v[:8] = 0.0, 0.0
    v[8, 3] = -math.nan  # the NaN of inf - inf on a CPU
    return m, v


def stored_codes(m: Tensor, v: Tensor, random: Tensor | None, v_8bit: bool) -> list[Tensor]:
    """Quantize, and return the codes in the dtypes of stored states."""
    dtypes = (torch.int8, torch.uint8, torch.int16) if v_8bit else (torch.int8, torch.int16, torch.uint8)
    return [codes.to(dtype) for codes, dtype in zip(quantize_moments(m, v, random, v_8bit), dtypes, strict=True)]


def draws(shape: tuple[int, ...] | torch.Size, step: int = 1) -> Tensor:
    return random_bits(torch.arange(math.prod(shape), dtype=torch.int32), random_key(0, step)).view(shape)


def words_of(codes: Tensor) -> Tensor:
    """Return unsigned codes as int64."""
    return codes.to(torch.int64) & (2 ** (8 * codes.itemsize) - 1)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[found.itemsize]
    assert torch.equal(found.cpu().view(kind).view(-1), expected.contiguous().view(kind).view(-1))


def by_kernel(
    m: Tensor, v: Tensor, random: Tensor, v_8bit: bool, device: torch.device, shift_first: bool = False
) -> list[Tensor]:
    """Return the kernel's dequantized moments and codes, on the CPU."""
    dtypes = (torch.int8, torch.uint8, torch.uint16) if v_8bit else (torch.int8, torch.uint16, torch.uint8)
    shapes = (m.shape, v.shape, m.shape[:1])
    codes = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    dequantized = [values.to(device, copy=True) for values in (m, v)]
    states = "8bit" if v_8bit else "8bit_v16"
    kernel[(len(m) // BLOCK_GROUPS.value,)](*dequantized, random.to(device), *codes, states, shift_first)
    return [tensor.cpu() for tensor in (*dequantized, *codes)]


@pytest.mark.parametrize("shift_first", [False, True])
@each_format
def test_kernel_and_pytorch_give_the_same_bits(v_8bit: bool, shift_first: bool, device: torch.device) -> None:
    m, v = awkward_moments()
    random = draws(m.shape)
    m_code, *others = stored_codes(m, v, random, v_8bit)
    *dequantized, found, found_v, found_exponents = by_kernel(m, v, random, v_8bit, device, shift_first)
    # The code of a NaN depends on its payload, and GPUs replace payloads.
    assert torch.equal(found[~m.isnan()], m_code[~m.isnan()])
    for codes, expected in zip((found_v, found_exponents), others, strict=True):
        assert_same_bits(codes, expected)
    for values, expected in zip(dequantized, dequantize_moments(found, found_v, found_exponents), strict=True):
        # The interpreter multiplies NaNs to the other sign.
        assert torch.equal(values.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


NOT_FINITE = [0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1]
NOT_NORMAL = [*NOT_FINITE, 0, 1, 0x7FFFFF]
REPLACED = torch.arange(GROUP) == 9


def moments_with_pattern(moment: int, pattern: int) -> tuple[Tensor, Tensor]:
    """Return moments with the bits `pattern` in one element per group.

    `moment` is 0 to replace m, or 1 to replace v.
    """
    moments = wide_moments(64, 3.0)
    moments[moment].view(torch.int32)[:, REPLACED] = pattern
    return moments


@each_format
@pytest.mark.parametrize("pattern", NOT_FINITE, ids=hex)
@pytest.mark.parametrize("moment", [0, 1], ids=["exp_avg", "exp_avg_sq"])
def test_infinity_and_nan_do_not_affect_their_group(
    moment: int, pattern: int, v_8bit: bool, device: torch.device
) -> None:
    m, v = moments_with_pattern(moment, pattern)
    random = draws(m.shape)
    largest = v.where(~REPLACED, 0.0).amax(dim=1, keepdim=True)
    expected = stored_codes(m.where(~REPLACED, 0.0), v.where(~REPLACED, largest) if moment == 1 else v, random, v_8bit)
    for found in (stored_codes(m, v, random, v_8bit), by_kernel(m, v, random, v_8bit, device)[2:]):
        assert_same_bits(found[2], expected[2])
        for codes, others in zip(found[:2], expected[:2], strict=True):
            assert_same_bits(codes[:, ~REPLACED], others[:, ~REPLACED])
        first, second = dequantize_moments(*found)
        if moment == 1:
            assert not first[:, REPLACED].any()
            # "8bit" stores no infinities next to finite numbers.
            assert torch.equal(second.isfinite(), ~REPLACED.expand(64, GROUP) | v_8bit)
            assert not v_8bit or torch.equal(found[1], expected[1].view(found[1].dtype))


@each_format
@pytest.mark.parametrize("pattern", [0, 1, 0x7FFFFF], ids=hex)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_m_with_a_zero_or_subnormal_v_does_not_affect_its_group(
    size: float, pattern: int, v_8bit: bool, device: torch.device
) -> None:
    moments = moments_with_pattern(1, pattern)
    moments[0][:, REPLACED] = size
    expected, random = (moments[0].where(~REPLACED, 0.0), moments[1]), draws(moments[0].shape)
    for found in (stored_codes(*moments, random, v_8bit), by_kernel(*moments, random, v_8bit, device)[2:]):
        for codes, others in zip(found, stored_codes(*expected, random, v_8bit), strict=True):
            assert_same_bits(codes, others)
        m, v = dequantize_moments(*found)
        assert not m[:, REPLACED].any() and bool(
            (v[:, REPLACED] <= 1.01 * 2.0**-126 + moments[1].amax(1, True) * 2.0**-30).all()
        )
        # The other elements are exact to one unit of their group's code.
        error = (m - expected[0]).abs() / v.sqrt().clamp_min(1e-30)
        assert bool((error[:, ~REPLACED] < 2.0**-4).all())


@each_format
def test_smallest_and_largest_normal_v_keep_their_m(v_8bit: bool, device: torch.device) -> None:
    for bits in (0x800000, 0x7F7FFFFF):
        v = torch.full((64, GROUP), bits, dtype=torch.int32).view(torch.float32)
        m = torch.linspace(-1.0, 1.0, GROUP).expand(64, GROUP) * v.sqrt()
        nearest = torch.zeros(m.shape, dtype=torch.int32)
        for found in (stored_codes(m, v, nearest, v_8bit), by_kernel(m, v, nearest, v_8bit, device)[2:]):
            dequantized, _ = dequantize_moments(*found)
            assert bool(((dequantized - m).abs() <= v.sqrt() * 2.0**-6).all())


@each_format
@pytest.mark.parametrize("pattern", NOT_NORMAL, ids=hex)
def test_group_without_a_normal_v_has_m_of_zero(pattern: int, v_8bit: bool, device: torch.device) -> None:
    m, _ = wide_moments(64, 3.0)
    v, random = torch.full(m.shape, pattern, dtype=torch.int32).view(torch.float32), draws(m.shape)
    for found in (stored_codes(m, v, random, v_8bit), by_kernel(m, v, random, v_8bit, device)[2:]):
        assert not found[0].any()
        dequantized_m, dequantized_v = dequantize_moments(*found)
        assert not dequantized_m.any()
        if pattern in NOT_FINITE:
            assert not dequantized_v.isfinite().any()
        else:
            assert bool((dequantized_v < 2.0**-124).all())
    pairs = zip(by_kernel(m, v, random, v_8bit, device)[2:], stored_codes(m, v, random, v_8bit), strict=True)
    for found, expected in pairs:
        assert_same_bits(found, expected)


def fraction_bits(v: Tensor, v_8bit: bool) -> Tensor:
    """Return the fraction bits of each group.

    Those of "8bit" depend on the range of exponents in the group.
    """
    _, exponents = torch.frexp(v)
    exponent_range = exponents.amax(dim=1, keepdim=True) - exponents.amin(dim=1, keepdim=True)
    if v_8bit:
        return 3 + sum((exponent_range <= limit).int() for limit in (13, 5, 1))
    return torch.full_like(exponent_range, 8)


def neighbours(v: Tensor, v_8bit: bool) -> tuple[Tensor, Tensor]:
    """Return the storable numbers around each normal number, in float64."""
    fraction, exponent = torch.frexp(v.double())
    unit = torch.ldexp(torch.ones_like(fraction), exponent - 1 - fraction_bits(v, v_8bit))
    below = (v.double() / unit).floor() * unit
    return below, below + unit


@each_format
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0, 14.0])
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "stochastic"])
def test_v_is_rounded_to_one_of_its_two_neighbours(v_8bit: bool, spread: float, random: bool) -> None:
    m, v = wide_moments(512, spread)
    _, found = dequantize_moments(*stored_codes(m, v, draws(v.shape) if random else None, v_8bit))
    below, above = neighbours(v, v_8bit)
    assert bool(((found.double() == below) | (found.double() == above)).all())
    if not random:
        assert bool(((found.double() - v).abs() <= (above - below) / 2).all())


@pytest.mark.parametrize("exponent_range", range(33))
def test_fraction_bits_fit_the_exponent_range(exponent_range: int) -> None:
    # Just below a power of two, so that rounding up goes to the next exponent.
    v = torch.full((64, GROUP), 2.0 - 2**-20)
    v[:, 9] = 2.0**-exponent_range
    v[:, 10] = 1.999 * 2.0**-exponent_range
    _, found = dequantize_moments(*stored_codes(torch.zeros_like(v), v, draws(v.shape), v_8bit=True))
    below, above = neighbours(v, v_8bit=True)
    if exponent_range < 30:
        assert bool(((found.double() == below) | (found.double() == above)).all())
    assert float(found.min()) > 0 and float(found.max()) == 2.0


@each_format
def test_error_of_m_is_at_most_half_a_unit_of_its_group(v_8bit: bool) -> None:
    m, v = wide_moments(512, 14.0)
    m[::3, 5] *= 50.0  # in some groups one element sets the scale of all
    found, second = dequantize_moments(*stored_codes(m, v, draws(v.shape), v_8bit))
    # The unit is 1/64 of the power of two below the group's largest m / root, with root = 2^k and k half the exponent
    # of v, rounded down. It is doubled if the largest would become code 128.
    _, exponent = torch.frexp(second.double())
    root = torch.exp2(torch.floor((exponent - 1 + 127).double() / 2))
    largest = (m.double() / root).abs().amax(dim=1, keepdim=True)
    unit = torch.exp2(torch.floor(torch.log2(largest)) - 6)
    unit = torch.where(largest < 127.5 * unit, unit, 2 * unit)
    assert bool(((found.double() - m).abs() <= unit / 2 * root).all())
    codes = stored_codes(m, v, draws(v.shape), v_8bit)[0].to(torch.int32)
    # The largest code of each group uses all 7 bits.
    assert int(codes.min()) >= -127 and bool((codes.abs().amax(dim=1) >= 64).all())


@each_format
def test_largest_m_does_not_wrap_around(v_8bit: bool) -> None:
    ratios = torch.tensor([1.984375, 1.99, 1.992187, 1.9921875, 1.9999999, 1.0]).repeat_interleave(2)
    m = torch.zeros(len(ratios), GROUP)
    m[:, 3] = ratios * torch.tensor([1.0, -1.0]).repeat(6)
    v = torch.ones_like(m)
    found, _ = dequantize_moments(*stored_codes(m, v, draws(v.shape), v_8bit))
    assert bool(((found - m).abs() <= 2.0**-6).all())


@each_format
def test_quantizing_dequantized_codes_returns_the_codes(v_8bit: bool) -> None:
    m, v = (torch.cat(parts) for parts in zip(wide_moments(256, 14.0), wide_moments(256, 40.0, 1), strict=True))
    m[:4], v[:4] = 0.0, 0.0
    m[4:8, ::2], v[4:8, ::2] = 0.0, 0.0
    codes = stored_codes(m, v, draws(v.shape), v_8bit)
    for again in (
        stored_codes(*dequantize_moments(*codes), None, v_8bit),
        stored_codes(*dequantize_moments(*codes), draws(v.shape, 2), v_8bit),
    ):
        assert all(torch.equal(left, right) for left, right in zip(codes, again, strict=True))


@each_format
@pytest.mark.parametrize("exponent_range", [0, 4, 10, 25])
@pytest.mark.parametrize("value", [1.0 + 1e-4, 1.0 + 0.61 * 2**-3, 1.999, 3e-30, 1.7e30])
def test_stochastic_rounding_of_v_is_unbiased(v_8bit: bool, exponent_range: int, value: float) -> None:
    v = torch.full((2**11, GROUP), value)
    v[:, 0] *= 2.0**-exponent_range
    _, found = dequantize_moments(*stored_codes(torch.zeros_like(v), v, draws(v.shape), v_8bit))
    below, above = (float(edge[0, 1]) for edge in neighbours(v, v_8bit))
    share, found, count = (float(v[0, 1]) - below) / (above - below), found[:, 1:].double(), v[:, 1:].numel()
    ups = (found == above).sum().item()
    assert abs(ups - share * count) < 5 * math.sqrt(share * (1 - share) * count)
    assert ups + (found == below).sum().item() == count


@each_format
def test_growth_past_a_power_of_two_stays_unbiased(v_8bit: bool) -> None:
    # Each step grows the group's largest v by less than the spacing of its codes, from just under 2 to over 2.
    groups, steps, growth = 2**11, 60, 0.002
    v = torch.full((groups, GROUP), 0.01)
    v[:, 7] = 1.9375 if v_8bit else 1.99609375
    truth = float(v[0, 7])
    for step in range(1, steps + 1):
        v[:, 7] += growth
        _, v = dequantize_moments(*stored_codes(torch.zeros_like(v), v, draws(v.shape, step), v_8bit))
    truth += steps * growth
    spread = float(v[:, 7].std()) / math.sqrt(groups)
    assert spread > 0
    assert abs(float(v[:, 7].double().mean()) - truth) < 5 * spread
    assert float(v[:, 7].max()) > 2.0


@each_format
@pytest.mark.parametrize("spread", [5.0, 14.0, 60.0])
def test_normal_v_never_becomes_zero(v_8bit: bool, spread: float) -> None:
    m, v = wide_moments(512, spread)
    assert float(v.min()) >= 2.0**-126
    for step in range(1, 9):
        _, code, _ = codes = stored_codes(m, v, draws(v.shape, step), v_8bit)
        _, found = dequantize_moments(*codes)
        assert float(found.min()) >= 2.0**-126 and int(words_of(code).min()) > 0


def test_v_below_the_range_of_its_group_becomes_the_smallest_code() -> None:
    v = torch.exp2(-torch.arange(64.0)).view(2, 32)  # 1 to 2^-31, and a group of 2^-32 to 2^-63
    v[1, 0] = 1.0
    _, found = dequantize_moments(*stored_codes(torch.zeros_like(v), v, None, v_8bit=True))
    smallest = 2.0**-31 * 1.25  # code 1 of 255, with 8 codes per power of two
    assert torch.equal(found[0, :31], v[0, :31])
    assert float(found[0, 31]) == smallest
    assert found[1].tolist() == [1.0] + [smallest] * 31


@each_format
def test_zero_m_next_to_large_ones_stays_zero(v_8bit: bool) -> None:
    m, v = wide_moments(512, 3.0)
    m[:, ::4], v[:, ::4] = 0.0, 0.0
    for step in range(1, 6):
        m_code, _, _ = codes = stored_codes(m, v, draws(v.shape, step), v_8bit)
        m, v = dequantize_moments(*codes)
        assert not m_code[:, ::4].any() and not m[:, ::4].any()
        assert bool(torch.isfinite(v).all())


@each_format
def test_zero_codes_are_zero_and_a_zero_v_of_8bit_has_code_1(v_8bit: bool) -> None:
    zeros = torch.zeros(4, GROUP)
    codes = stored_codes(zeros, zeros, draws(zeros.shape), v_8bit)
    assert [int(words_of(code).max()) for code in codes[:2]] == [0, 1 if v_8bit else 0]
    found = dequantize_moments(*codes)
    assert not found[0].any() and float(found[1].max()) < 2.0**-126
    blank = [torch.zeros_like(code) for code in codes]  # a new state, before the first step
    assert all(not moment.any() for moment in dequantize_moments(*blank))


@each_format
def test_codes_fit_the_dtypes_of_stored_states(v_8bit: bool) -> None:
    m, v = awkward_moments()
    m_code, v_code, exponents = quantize_moments(m, v, draws(v.shape), v_8bit)
    ranges = (
        [(-128, 127), (1, 255), (-(2**15), 2**15 - 1)] if v_8bit else [(-128, 127), (-(2**15), 2**15 - 1), (0, 255)]
    )
    for codes, (least, most) in zip((m_code, v_code, exponents), ranges, strict=True):
        assert least <= int(codes.min()) and int(codes.max()) <= most
    assert exponents.shape == (len(m),)
    if v_8bit:
        # A group's largest v has a code with the highest exponent, unless v is near the smallest float.
        _, finite = wide_moments(256, 14.0)
        _, code, exponents = quantize_moments(torch.zeros_like(finite), finite, None, v_8bit)
        exponent = torch.frexp(finite.amax(dim=1))[1] - 1 + 127
        assert bool(((exponents & 0xFF) - exponent).abs().max() <= 1)
        assert bool((code.amax(dim=1) >= 255 - 2 ** fraction_bits(finite, v_8bit).view(-1))[exponent > 32].all())
