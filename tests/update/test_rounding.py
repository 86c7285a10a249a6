"""Check random bits, rounding and split masters.

Oracles: Python's integers, and PyTorch's casts.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from adax_triton.update.rounding import (
    addend_from_low_bits,
    join_master,
    mix_words,
    random_bits,
    random_key,
    round_to_bfloat16,
    split_master,
)

pytest.importorskip("triton")

import triton
import triton.language as tl
from adax_triton.kernels import rounding as on_device

WORD = 2**32
INDEXES = [0, 1, 2, 31, 32, 65535, 65536, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1]
SEEDS_AND_STEPS = [(0, 1), (0, 2), (1, 1), (2**31, 7), (2**32 - 1, 10**6), (5, 2**33 + 3)]
ALL_ONES = 0x7FFFFFFF  # the NaN that NVIDIA GPUs compute
SPECIALS = [0, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, ALL_ONES, 1, 0x7FFFFF, 0x800000, 0x3F808000, 0x3F818000]
BLOCK = tl.constexpr(4096)


@triton.jit
def random_bits_kernel(index_ptr, key_ptr, found_ptr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key0, key1 = tl.load(key_ptr).to(tl.uint32, bitcast=True), tl.load(key_ptr + 1).to(tl.uint32, bitcast=True)
    found = on_device.random_bits(tl.load(index_ptr + offsets).to(tl.uint32, bitcast=True), key0, key1)
    tl.store(found_ptr + offsets, found.to(tl.int32, bitcast=True))


@triton.jit
def round_kernel(values_ptr, addend_ptr, found_ptr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    addend = tl.load(addend_ptr + offsets).to(tl.uint32, bitcast=True)
    tl.store(found_ptr + offsets, on_device.round_to_bfloat16(tl.load(values_ptr + offsets), addend))


@triton.jit
def split_kernel(master_ptr, addend_ptr, param_ptr, remainder_ptr, joined_ptr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    addend = tl.load(addend_ptr + offsets).to(tl.uint32, bitcast=True)
    param, remainder = on_device.split_master(tl.load(master_ptr + offsets), addend, remainder_ptr.dtype.element_ty)
    tl.store(param_ptr + offsets, param)
    tl.store(remainder_ptr + offsets, remainder)
    tl.store(joined_ptr + offsets, on_device.join_master(param, remainder))


def floats(patterns: np.ndarray | list[int]) -> Tensor:
    return torch.from_numpy(np.asarray(patterns, dtype=np.uint32).view(np.int32).copy()).view(torch.float32)


def patterns(values: Tensor) -> np.ndarray:
    return values.cpu().view(torch.int32).numpy().view(np.uint32).astype(np.int64)


def many_floats(count: int = 2**18) -> Tensor:
    """Return floats near every rounding boundary, then random bit patterns.

    The boundary floats cover every sign and exponent.
    """
    edges = [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7FFF, 0x8000, 0x8001, 0xFF7F, 0xFF80, 0xFFFF, 0x10000, 0x18000]
    edges += [0x7FFFFF - edge for edge in edges]
    grid = np.add.outer(np.arange(512, dtype=np.int64) << 23, edges).ravel()
    drawn = np.random.default_rng(0).integers(0, WORD, count - len(grid) - 2 * len(SPECIALS))
    signed = [special + sign for special in SPECIALS for sign in (0, 1 << 31)]
    return floats(np.concatenate([signed, grid, drawn]))


def drawn_bits(count: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(2**bits, (count,), generator=generator, dtype=torch.int32)


def split(master: Tensor, addend: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return parameters and remainders, checked to fit their stored dtype."""
    param, remainder = split_master(master, addend)
    dtype = torch.int16 if addend is None else torch.int8
    assert torch.equal(remainder.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max), remainder)
    return param, remainder.to(dtype)


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Check that all bits are equal, except those of NaNs.

    PyTorch's casts return various NaNs.
    """
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[found.itemsize]
    nan = expected.isnan()
    assert found.dtype == expected.dtype and torch.equal(found.cpu().isnan(), nan)
    assert torch.equal(found.cpu()[~nan].view(kind), expected[~nan].view(kind))


# Random bits


def lowbias32(word: int) -> int:
    """Return the hash lowbias32 of a word."""
    word ^= word >> 16
    word = word * 0x7FEB352D % WORD
    word ^= word >> 15
    word = word * 0x846CA68B % WORD
    return word ^ word >> 16


def integer_random_bits(index: int, seed: int, step: int) -> int:
    first = lowbias32(seed ^ lowbias32(step % WORD))
    second = lowbias32((step + 0x9E3779B9) % WORD ^ lowbias32(WORD - 1 - seed))
    word = index ^ first
    word = (word ^ word >> 16) * 0x7FEB352D % WORD
    word = (word + second) % WORD
    word = (word ^ word >> 15) * 0x846CA68B % WORD
    return word ^ word >> 16


def bits(seed: int, step: int, count: int = 10**6) -> np.ndarray:
    return patterns(random_bits(torch.arange(count, dtype=torch.int32), random_key(seed, step)).view(torch.float32))


@pytest.mark.parametrize(("seed", "step"), SEEDS_AND_STEPS)
def test_random_bits_equal_integer_arithmetic(seed: int, step: int, device: torch.device) -> None:
    expected = [integer_random_bits(index, seed, step) for index in INDEXES]
    index = torch.zeros(BLOCK.value, dtype=torch.int32)
    index[: len(INDEXES)] = torch.tensor(INDEXES).to(torch.int32)
    key = torch.tensor(random_key(seed, step)).to(torch.int32)
    found = torch.empty_like(index, device=device)
    random_bits_kernel[(1,)](index.to(device), key.to(device), found)
    for words in (random_bits(index, random_key(seed, step)), random_bits(index, key), found.cpu()):
        assert [word % WORD for word in words[: len(INDEXES)].tolist()] == expected


@pytest.mark.parametrize(("seed", "step"), [(0, 1), (1, 1), (12345, 100_000)])
def test_random_bits_are_uniform(seed: int, step: int) -> None:
    words = bits(seed, step)
    count = len(words)
    z_of_mean = (words.mean() - (WORD - 1) / 2) / (WORD / math.sqrt(12 * count))
    assert abs(z_of_mean) < 5
    for shift in (0, 8, 16, 24):
        observed = np.bincount(words >> shift & 0xFF, minlength=256)
        chi_square = ((observed - count / 256) ** 2).sum() / (count / 256)
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    for bit in range(32):
        assert abs((words >> bit & 1).sum() - count / 2) < 5 * math.sqrt(count) / 2


def correlation_z(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.corrcoef(left, right)[0, 1] * math.sqrt(len(left)))


@pytest.mark.parametrize("mask_and_shift", [(0xFFFF, 0), (0xFFFF, 16), (1, 0), (1, 31)], ids=str)
def test_random_bits_are_uncorrelated(mask_and_shift: tuple[int, int]) -> None:
    mask, shift = mask_and_shift
    words = bits(0, 1) >> shift & mask
    others = {f"element {lag} further": np.roll(words, lag) for lag in (1, 2, 32, 4096)}
    others |= {f"step {step}": bits(0, step) >> shift & mask for step in (2, 3, 257)}
    others |= {f"seed {seed}": bits(seed, 1) >> shift & mask for seed in (1, 2, 2**31)}
    others["the other half"] = bits(0, 1) >> (16 if shift == 0 else 0) & mask
    assert {name: z for name, other in others.items() if abs(z := correlation_z(words, other)) > 5} == {}


@pytest.mark.parametrize("element", [0, 4097])
def test_random_bits_of_one_element_are_uniform_over_the_steps(element: int) -> None:
    count = 100_000
    keys = torch.tensor([random_key(0, step) for step in range(1, count + 1)]).to(torch.int32).T
    words = patterns(mix_words(torch.full((count,), element, dtype=torch.int32), *keys).view(torch.float32))
    for shift in (0, 24):
        observed = np.bincount(words >> shift & 0xFF, minlength=256)
        chi_square = ((observed - count / 256) ** 2).sum() / (count / 256)
        assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)
    for lag in (1, 2, 7):
        assert abs(correlation_z(words[lag:], words[:-lag])) < 5


def test_keys_of_seeds_and_steps_differ() -> None:
    keys = [random_key(seed, step) for seed in range(200) for step in range(1, 201)]
    assert len(set(keys)) == len(keys)
    # Swapping a seed and a step gives another key.
    assert random_key(3, 5) != random_key(5, 3)


# Rounding to bfloat16


@pytest.mark.parametrize(
    "pattern", [0x3F800001, 0x3F80FFFF, 0xC2345678, 0x00001234, 0x7F7F4000, 0x3F808000, 0x4015AAAA]
)
def test_probability_of_rounding_up_is_the_dropped_fraction(pattern: int) -> None:
    found = round_to_bfloat16(floats([pattern]).expand(2**16), torch.arange(2**16, dtype=torch.int32))
    low, high = pattern >> 16, (pattern >> 16) + 1
    words = found.view(torch.int16).to(torch.int32) & 0xFFFF
    assert int((words == high).sum()) == pattern & 0xFFFF and int((words == low).sum()) == 2**16 - (pattern & 0xFFFF)


def test_stochastic_rounding_of_one_value_is_unbiased_over_elements_and_steps() -> None:
    value, count = 1.0 + 0.3 * 2**-7, 2**18
    random = [random_bits(torch.arange(count, dtype=torch.int32), random_key(0, step)) for step in (1, 2, 3, 4)]
    rounded = torch.cat(
        [round_to_bfloat16(torch.full((count,), value), addend_from_low_bits(words, 16)) for words in random]
    )
    ups = (rounded.double() - 1.0).sum().item() * 2**7
    share = (value - 1.0) * 2**7
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(ups - share * 4 * count) < 5 * math.sqrt(share * (1 - share) * 4 * count)


@pytest.mark.parametrize("nearest", [False, True], ids=["stochastic", "nearest"])
def test_rounding_equals_the_kernel_and_keeps_bfloat16_values(nearest: bool, device: torch.device) -> None:
    values = many_floats()
    addend = torch.full((len(values),), 0x8000, dtype=torch.int32) if nearest else drawn_bits(len(values), 16)
    found = round_to_bfloat16(values, addend)
    by_kernel = torch.empty_like(found, device=device)
    round_kernel[(len(values) // BLOCK.value,)](values.to(device), addend.to(device), by_kernel)
    assert_same_bits(by_kernel, found)
    assert torch.equal(found.isnan(), values.isnan())
    fits = ~values.isnan() & ((values.view(torch.int32) & 0xFFFF) == 0)
    assert torch.equal(found[fits].float(), values[fits])  # includes infinities and both zeros
    if nearest:
        tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
        by_torch = values.to(torch.bfloat16)
        assert torch.equal(found[~tie & ~values.isnan()], by_torch[~tie & ~values.isnan()])
        tie &= ~values.isnan()
        assert bool((found[tie].double().abs() > values[tie].double().abs()).all())
    else:
        finite = values.isfinite()
        below = patterns(values) >> 16
        words = found.view(torch.int16).numpy().astype(np.int64) & 0xFFFF
        assert set((words - below)[finite.numpy()].tolist()) == {0, 1}


# Split masters


def test_split_of_32_bits_is_exact_and_rounds_the_parameter_to_nearest(device: torch.device) -> None:
    master = many_floats()
    param, remainder = split(master, None)
    joined = join_master(param, remainder)
    nan = master.isnan()
    assert torch.equal(joined[~nan].view(torch.int32), master[~nan].view(torch.int32))
    assert bool(param[nan].isnan().all()) and bool(joined[nan].isnan().all())
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(param[~nan & ~tie], master.to(torch.bfloat16)[~nan & ~tie])
    assert_kernel_split_equals(master, torch.zeros(len(master), dtype=torch.int32), param, remainder, joined, device)


@pytest.mark.parametrize("nearest", [False, True], ids=["stochastic", "nearest"])
def test_split_of_24_bits_rounds_to_an_adjacent_value(nearest: bool, device: torch.device) -> None:
    master = many_floats()
    addend = torch.full((len(master),), 0x80, dtype=torch.int32) if nearest else drawn_bits(len(master), 8)
    param, remainder = split(master, addend)
    joined = join_master(param, remainder)
    nan = master.isnan()
    assert bool(param[nan].isnan().all()) and bool(joined[nan].isnan().all())
    before, after = patterns(master)[~nan.numpy()], patterns(joined)[~nan.numpy()]
    up = (before % 256) + addend.numpy()[~nan.numpy()] >= 256
    assert np.array_equal(after, before - before % 256 + 256 * up)
    tie = (joined.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(param[~nan & ~tie], joined.to(torch.bfloat16)[~nan & ~tie])
    assert_kernel_split_equals(master, addend, param, remainder, joined, device)


def test_24_bit_rounding_is_unbiased_exactly() -> None:
    master = floats([0x3F800000 + low for low in (0, 1, 100, 128, 255)]).view(-1, 1).expand(-1, 256)
    joined = join_master(*split(master.contiguous(), torch.arange(256, dtype=torch.int32)))
    assert torch.equal(joined.double().mean(dim=1), master[:, 0].double())


def assert_kernel_split_equals(
    master: Tensor, addend: Tensor, param: Tensor, remainder: Tensor, joined: Tensor, device: torch.device
) -> None:
    found = [torch.empty_like(tensor, device=device) for tensor in (param, remainder, joined)]
    split_kernel[(len(master) // BLOCK.value,)](master.to(device), addend.to(device), *found)
    for tensor, expected in zip(found, (param, remainder, joined), strict=True):
        assert_same_bits(tensor, expected)
