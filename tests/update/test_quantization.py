"""The codes of compact states. Oracles: float64 arithmetic on the formats' definitions, and the two writings' bits."""

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

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # numpy's, interpreting
each_format = pytest.mark.parametrize("8bit", [False, True], ids=["8bit_v16", "8bit"])
BLOCK_GROUPS = tl.constexpr(64)
WIDTH = tl.constexpr(32)


@triton.jit
def kernel(m_ptr, v_ptr, random_ptr, m_code_ptr, v_code_ptr, exponents_ptr, states: tl.constexpr):
    """Write the codes of moments, and over the moments what the codes decode to."""
    groups = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)[:, None]
    at = groups * WIDTH + tl.arange(0, WIDTH)[None, :]
    random = tl.load(random_ptr + at).to(tl.uint32, bitcast=True)
    m, v, exponents = on_device.quantize_moments(tl.load(m_ptr + at), tl.load(v_ptr + at), random, states, 1)
    tl.store(m_code_ptr + at, m)
    tl.store(v_code_ptr + at, v)
    tl.store(exponents_ptr + groups, exponents.to(tl.uint16).to(exponents_ptr.dtype.element_ty))
    m, v = on_device.dequantize_moments(m, v, exponents, states)
    tl.store(m_ptr + at, m)
    tl.store(v_ptr + at, v)


def wide_moments(groups: int, spread: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return moments of groups whose scales lie anywhere, and whose elements lie `spread` octaves about their scale."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(-100, 100, (groups, 1))
    octave = np.clip(scale + rng.uniform(-spread, spread, (groups, GROUP)), -124, 125)
    v = np.exp2(octave) * rng.uniform(1, 2, (groups, GROUP))
    m = rng.standard_normal((groups, GROUP)) * np.sqrt(v)
    return torch.from_numpy(m).float(), torch.from_numpy(v).float()


def awkward_moments(groups: int = 256) -> tuple[Tensor, Tensor]:
    """Return wide moments strewn with zeros, subnormals, the largest float, infinities and NaNs of both signs."""
    m, v = (torch.cat(parts) for parts in zip(*(wide_moments(groups // 4, 10.0**k, k) for k in range(4)), strict=True))
    generator = torch.Generator().manual_seed(0)
    specials = torch.tensor([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001])
    for values, signed in ((m, True), (v, False)):
        chosen = specials.to(torch.int32)[torch.randint(len(specials), values.shape, generator=generator)]
        if signed:
            chosen = chosen ^ (torch.randint(2, values.shape, generator=generator, dtype=torch.int32) << 31)
        strewn = torch.rand(values.shape, generator=generator) < 0.1
        values[strewn] = chosen.view(torch.float32)[strewn]
    m[:8], v[:8] = 0.0, 0.0
    v[8, 3] = -math.nan  # what a CPU makes of inf - inf
    return m, v


def coded(m: Tensor, v: Tensor, random: Tensor | None, v_8bit: bool) -> list[Tensor]:
    """Return the codes in the dtypes in which states store them."""
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


def by_kernel(m: Tensor, v: Tensor, random: Tensor, v_8bit: bool, device: torch.device) -> list[Tensor]:
    """Return on the CPU the moments that the codes of moments decode to, then these codes."""
    dtypes = (torch.int8, torch.uint8, torch.uint16) if v_8bit else (torch.int8, torch.uint16, torch.uint8)
    shapes = (m.shape, v.shape, m.shape[:1])
    codes = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    decoded = [values.to(device, copy=True) for values in (m, v)]
    kernel[(len(m) // BLOCK_GROUPS.value,)](*decoded, random.to(device), *codes, "8bit" if v_8bit else "8bit_v16")
    return [tensor.cpu() for tensor in (*decoded, *codes)]


@each_format
def test_kernels_encode_and_decode_to_the_same_bits(v_8bit: bool, device: torch.device) -> None:
    m, v = awkward_moments()
    random = draws(m.shape)
    m_code, *others = coded(m, v, random, v_8bit)
    *decoded, found, found_v, found_exponents = by_kernel(m, v, random, v_8bit, device)
    # A NaN's code is the end of its payload, which a GPU's product replaces by its own.
    assert torch.equal(found[~m.isnan()], m_code[~m.isnan()])
    for codes, expected in zip((found_v, found_exponents), others, strict=True):
        assert_same_bits(codes, expected)
    for values, expected in zip(decoded, dequantize_moments(found, found_v, found_exponents), strict=True):
        # The interpreter's product of a NaN has the other sign.
        assert torch.equal(values.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


NO_NUMBERS = [0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, -0x400000, -1]
NO_NORMALS = [*NO_NUMBERS, 0, 1, 0x7FFFFF]
STRUCK = torch.arange(GROUP) == 9


def struck_moments(moment: int, pattern: int) -> tuple[Tensor, Tensor]:
    """Return moments of which one element of each group has the bits of `pattern`, its m and v otherwise ordinary."""
    moments = wide_moments(64, 3.0)
    moments[moment].view(torch.int32)[:, STRUCK] = pattern
    return moments


@each_format
@pytest.mark.parametrize("pattern", NO_NUMBERS, ids=hex)
@pytest.mark.parametrize("moment", [0, 1], ids=["exp_avg", "exp_avg_sq"])
def test_infinity_and_nan_do_nothing_to_their_group(
    moment: int, pattern: int, v_8bit: bool, device: torch.device
) -> None:
    m, v = struck_moments(moment, pattern)
    random = draws(m.shape)
    largest = v.where(~STRUCK, 0.0).amax(dim=1, keepdim=True)
    expected = coded(m.where(~STRUCK, 0.0), v.where(~STRUCK, largest) if moment == 1 else v, random, v_8bit)
    for found in (coded(m, v, random, v_8bit), by_kernel(m, v, random, v_8bit, device)[2:]):
        assert_same_bits(found[2], expected[2])
        for codes, alike in zip(found[:2], expected[:2], strict=True):
            assert_same_bits(codes[:, ~STRUCK], alike[:, ~STRUCK])
        first, second = dequantize_moments(*found)
        if moment == 1:
            assert not first[:, STRUCK].any()
            # "8bit" has no infinities within its groups' ranges.
            assert torch.equal(second.isfinite(), ~STRUCK.expand(64, GROUP) | v_8bit)
            assert not v_8bit or torch.equal(found[1], expected[1].view(found[1].dtype))


@each_format
@pytest.mark.parametrize("pattern", [0, 1, 0x7FFFFF], ids=hex)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_first_moment_over_a_vanished_second_one_does_nothing_to_its_group(
    size: float, pattern: int, v_8bit: bool, device: torch.device
) -> None:
    moments = struck_moments(1, pattern)
    moments[0][:, STRUCK] = size
    expected, random = (moments[0].where(~STRUCK, 0.0), moments[1]), draws(moments[0].shape)
    for found in (coded(*moments, random, v_8bit), by_kernel(*moments, random, v_8bit, device)[2:]):
        for codes, alike in zip(found, coded(*expected, random, v_8bit), strict=True):
            assert_same_bits(codes, alike)
        m, v = dequantize_moments(*found)
        assert not m[:, STRUCK].any() and bool(
            (v[:, STRUCK] <= 1.01 * 2.0**-126 + moments[1].amax(1, True) * 2.0**-30).all()
        )
        # And a group in which v is normal is what the others are, to a unit of their largest.
        error = (m - expected[0]).abs() / v.sqrt().clamp_min(1e-30)
        assert bool((error[:, ~STRUCK] < 2.0**-4).all())


@each_format
def test_smallest_and_largest_normal_second_moments_count(v_8bit: bool, device: torch.device) -> None:
    for bits in (0x800000, 0x7F7FFFFF):
        v = torch.full((64, GROUP), bits, dtype=torch.int32).view(torch.float32)
        m = torch.linspace(-1.0, 1.0, GROUP).expand(64, GROUP) * v.sqrt()
        nearest = torch.zeros(m.shape, dtype=torch.int32)
        for found in (coded(m, v, nearest, v_8bit), by_kernel(m, v, nearest, v_8bit, device)[2:]):
            decoded, _ = dequantize_moments(*found)
            assert bool(((decoded - m).abs() <= v.sqrt() * 2.0**-6).all())


@each_format
@pytest.mark.parametrize("pattern", NO_NORMALS, ids=hex)
def test_group_without_a_normal_second_moment_has_no_direction(
    pattern: int, v_8bit: bool, device: torch.device
) -> None:
    m, _ = wide_moments(64, 3.0)
    v, random = torch.full(m.shape, pattern, dtype=torch.int32).view(torch.float32), draws(m.shape)
    for found in (coded(m, v, random, v_8bit), by_kernel(m, v, random, v_8bit, device)[2:]):
        assert not found[0].any()
        decoded, again = dequantize_moments(*found)
        assert not decoded.any()
        if pattern in NO_NUMBERS:
            assert not again.isfinite().any()
        else:
            assert bool((again < 2.0**-124).all())
    for one, other in zip(coded(m, v, random, v_8bit), by_kernel(m, v, random, v_8bit, device)[2:], strict=True):
        assert_same_bits(other, one)


def fraction_bits(v: Tensor, v_8bit: bool) -> Tensor:
    """Return the fraction bits of each group: of "8bit", as many as the octaves that its elements span leave."""
    _, exponents = torch.frexp(v)
    octaves = exponents.amax(dim=1, keepdim=True) - exponents.amin(dim=1, keepdim=True)
    return 3 + sum((octaves <= most).int() for most in (13, 5, 1)) if v_8bit else torch.full_like(octaves, 8)


def neighbours(v: Tensor, v_8bit: bool) -> tuple[Tensor, Tensor]:
    """Return in float64 the numbers that the codes have below and above normal numbers."""
    fraction, exponent = torch.frexp(v.double())
    unit = torch.ldexp(torch.ones_like(fraction), exponent - 1 - fraction_bits(v, v_8bit))
    below = (v.double() / unit).floor() * unit
    return below, below + unit


@each_format
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0, 14.0])
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "stochastic"])
def test_second_moment_becomes_one_of_its_two_neighbours(v_8bit: bool, spread: float, random: bool) -> None:
    m, v = wide_moments(512, spread)
    _, found = dequantize_moments(*coded(m, v, draws(v.shape) if random else None, v_8bit))
    below, above = neighbours(v, v_8bit)
    assert bool(((found.double() == below) | (found.double() == above)).all())
    if not random:
        assert bool(((found.double() - v).abs() <= (above - below) / 2).all())


@pytest.mark.parametrize("octaves", range(33))
def test_no_finer_codes_are_taken_than_a_group_has_room_for(octaves: int) -> None:
    # All but the smallest are as large as their octave has, so that every rounding up goes to the next.
    v = torch.full((64, GROUP), 2.0 - 2**-20)
    v[:, 9] = 2.0**-octaves
    v[:, 10] = 1.999 * 2.0**-octaves
    _, found = dequantize_moments(*coded(torch.zeros_like(v), v, draws(v.shape), v_8bit=True))
    below, above = neighbours(v, v_8bit=True)
    if octaves < 30:
        assert bool(((found.double() == below) | (found.double() == above)).all())
    assert float(found.min()) > 0 and float(found.max()) == 2.0


@each_format
def test_first_moment_is_off_by_half_a_unit_of_its_group_at_most(v_8bit: bool) -> None:
    m, v = wide_moments(512, 14.0)
    m[::3, 5] *= 50.0  # now and then one element sets the scale of the rest
    found, second = dequantize_moments(*coded(m, v, draws(v.shape), v_8bit))
    # The unit is one of 128 parts of the group's largest m / 2^k, k the rounded down half of v's exponent, and the
    # next power of two where the largest would become code 128.
    _, exponent = torch.frexp(second.double())
    root = torch.exp2(torch.floor((exponent - 1 + 127).double() / 2))
    largest = (m.double() / root).abs().amax(dim=1, keepdim=True)
    unit = torch.exp2(torch.floor(torch.log2(largest)) - 6)
    unit = torch.where(largest < 127.5 * unit, unit, 2 * unit)
    assert bool(((found.double() - m).abs() <= unit / 2 * root).all())
    codes = coded(m, v, draws(v.shape), v_8bit)[0].to(torch.int32)
    # No code is wasted: the largest uses the last of its bits.
    assert int(codes.min()) >= -127 and bool((codes.abs().amax(dim=1) >= 64).all())


@each_format
def test_first_moment_at_the_edge_of_its_range_does_not_wrap_around(v_8bit: bool) -> None:
    ratios = torch.tensor([1.984375, 1.99, 1.992187, 1.9921875, 1.9999999, 1.0]).repeat_interleave(2)
    m = torch.zeros(len(ratios), GROUP)
    m[:, 3] = ratios * torch.tensor([1.0, -1.0]).repeat(6)
    v = torch.ones_like(m)
    found, _ = dequantize_moments(*coded(m, v, draws(v.shape), v_8bit))
    assert bool(((found - m).abs() <= 2.0**-6).all())


@each_format
def test_codes_of_encoded_codes_are_themselves(v_8bit: bool) -> None:
    m, v = (torch.cat(parts) for parts in zip(wide_moments(256, 14.0), wide_moments(256, 40.0, 1), strict=True))
    m[:4], v[:4] = 0.0, 0.0
    m[4:8, ::2], v[4:8, ::2] = 0.0, 0.0
    codes = coded(m, v, draws(v.shape), v_8bit)
    for again in (
        coded(*dequantize_moments(*codes), None, v_8bit),
        coded(*dequantize_moments(*codes), draws(v.shape, 2), v_8bit),
    ):
        assert all(torch.equal(left, right) for left, right in zip(codes, again, strict=True))


@each_format
@pytest.mark.parametrize("octaves", [0, 4, 10, 25])
@pytest.mark.parametrize("value", [1.0 + 1e-4, 1.0 + 0.61 * 2**-3, 1.999, 3e-30, 1.7e30])
def test_stochastic_second_moment_is_unbiased(v_8bit: bool, octaves: int, value: float) -> None:
    v = torch.full((2**11, GROUP), value)
    v[:, 0] *= 2.0**-octaves
    _, found = dequantize_moments(*coded(torch.zeros_like(v), v, draws(v.shape), v_8bit))
    below, above = (float(edge[0, 1]) for edge in neighbours(v, v_8bit))
    share, found, count = (float(v[0, 1]) - below) / (above - below), found[:, 1:].double(), v[:, 1:].numel()
    ups = (found == above).sum().item()
    assert abs(ups - share * count) < 5 * math.sqrt(share * (1 - share) * count)
    assert ups + (found == below).sum().item() == count


@each_format
def test_growth_past_a_power_of_two_stays_unbiased(v_8bit: bool) -> None:
    # The largest of a group grows from just under 2 to over 2 by less than its code can show in one step.
    groups, steps, growth = 2**11, 60, 0.002
    v = torch.full((groups, GROUP), 0.01)
    v[:, 7] = 1.9375 if v_8bit else 1.99609375
    truth = float(v[0, 7])
    for step in range(1, steps + 1):
        v[:, 7] += growth
        _, v = dequantize_moments(*coded(torch.zeros_like(v), v, draws(v.shape, step), v_8bit))
    truth += steps * growth
    spread = float(v[:, 7].std()) / math.sqrt(groups)
    assert spread > 0
    assert abs(float(v[:, 7].double().mean()) - truth) < 5 * spread
    assert float(v[:, 7].max()) > 2.0


@each_format
@pytest.mark.parametrize("spread", [5.0, 14.0, 60.0])
def test_second_moment_that_was_never_decodes_to_zero(v_8bit: bool, spread: float) -> None:
    m, v = wide_moments(512, spread)
    assert float(v.min()) >= 2.0**-126
    for step in range(1, 9):
        _, code, _ = codes = coded(m, v, draws(v.shape, step), v_8bit)
        _, found = dequantize_moments(*codes)
        assert float(found.min()) >= 2.0**-126 and int(words_of(code).min()) > 0


def test_range_of_a_group_is_31_octaves_and_what_is_below_rises_to_its_end() -> None:
    v = torch.exp2(-torch.arange(64.0)).view(2, 32)  # 1 to 2^-31, and a group of 2^-32 to 2^-63
    v[1, 0] = 1.0
    _, found = dequantize_moments(*coded(torch.zeros_like(v), v, None, v_8bit=True))
    smallest = 2.0**-31 * 1.25  # code 1 of 255, eight to the octave
    assert torch.equal(found[0, :31], v[0, :31])
    assert float(found[0, 31]) == smallest
    assert found[1].tolist() == [1.0] + [smallest] * 31


@each_format
def test_elements_without_gradient_beside_large_ones_do_not_move(v_8bit: bool) -> None:
    m, v = wide_moments(512, 3.0)
    m[:, ::4], v[:, ::4] = 0.0, 0.0
    for step in range(1, 6):
        m_code, _, _ = codes = coded(m, v, draws(v.shape, step), v_8bit)
        m, v = dequantize_moments(*codes)
        assert not m_code[:, ::4].any() and not m[:, ::4].any()
        assert bool(torch.isfinite(v).all())


@each_format
def test_zero_codes_decode_to_zero_and_zeros_of_lowest_have_code_1(v_8bit: bool) -> None:
    zeros = torch.zeros(4, GROUP)
    codes = coded(zeros, zeros, draws(zeros.shape), v_8bit)
    assert [int(words_of(code).max()) for code in codes[:2]] == [0, 1 if v_8bit else 0]
    found = dequantize_moments(*codes)
    assert not found[0].any() and float(found[1].max()) < 2.0**-126
    blank = [torch.zeros_like(code) for code in codes]  # as they are created, before the first step
    assert all(not moment.any() for moment in dequantize_moments(*blank))


@each_format
def test_codes_are_in_the_range_that_states_store(v_8bit: bool) -> None:
    m, v = awkward_moments()
    m_code, v_code, exponents = quantize_moments(m, v, draws(v.shape), v_8bit)
    ranges = (
        [(-128, 127), (1, 255), (-(2**15), 2**15 - 1)] if v_8bit else [(-128, 127), (-(2**15), 2**15 - 1), (0, 255)]
    )
    for codes, (least, most) in zip((m_code, v_code, exponents), ranges, strict=True):
        assert least <= int(codes.min()) and int(codes.max()) <= most
    assert exponents.shape == (len(m),)
    if v_8bit:
        # The largest of a group is in the upper octave of the codes, or at the lower end of all floats.
        _, finite = wide_moments(256, 14.0)
        _, code, exponents = quantize_moments(torch.zeros_like(finite), finite, None, v_8bit)
        octave = torch.frexp(finite.amax(dim=1))[1] - 1 + 127
        assert bool(((exponents & 0xFF) - octave).abs().max() <= 1)
        assert bool((code.amax(dim=1) >= 255 - 2 ** fraction_bits(finite, v_8bit).view(-1))[octave > 32].all())
