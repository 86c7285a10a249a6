"""Device functions: the codes of compact states; formats and reasons are in `adax_triton/update/quantization.py`.

A tile has its groups of 32 elements along AXIS: the second of a block of groups, or the only one of a single group.
"""

import triton
import triton.language as tl

from . import tables
from .rounding import bits_of, from_bits

GROUP = tl.constexpr(tables.GROUP)


@triton.jit
def _code_start(exponent, fraction):
    return tl.maximum(((exponent + 1) << fraction).to(tl.int32) - 255, 0).to(tl.uint32)


@triton.jit
def _power_of_two(exponent):
    # By way of a float: the compiler makes shifts of products with what it knows to be a power of two. Shifts share
    # their units with most of this kernel's instructions, and a product takes a sum along.
    return from_bits((exponent + 127) << 23).to(tl.uint32)


@triton.jit
def dequantize_moments(exp_avg, exp_avg_sq, exponents, STATES: tl.constexpr):
    """Return float32 moments of the codes "8bit_v16" or "8bit" and their groups' uint32 exponents."""
    code = exp_avg_sq.to(tl.uint32)
    if STATES == "8bit_v16":
        bits = code << 15
        half = (code << 14) + (exponents << 23)
    else:
        fraction = ((exponents >> 8) & 3) + 3
        start = _code_start(exponents & 0xFF, fraction)
        unit = _power_of_two(22 - fraction)
        bits = code * (unit + unit) + (start << (23 - fraction))
        scale = (exponents >> 10) + 48
        half = code * unit + ((start << (22 - fraction)) + (scale << 23))
    return exp_avg.to(tl.float32) * from_bits(half & 0x7F800000), from_bits(bits)


@triton.jit
def _fraction_bits(bits, largest, AXIS: tl.constexpr):
    octaves = (largest >> 23) - (tl.min(bits, axis=AXIS, keep_dims=True) >> 23)
    # One bit fewer for every doubling of octaves + 2.
    doublings = (bits_of((octaves + 2).to(tl.float32)) >> 23).to(tl.int32) - 127
    return tl.maximum(7 - doublings, 3).to(tl.uint32)


@triton.jit
def quantize_moments(exp_avg, exp_avg_sq, random, STATES: tl.constexpr, AXIS: tl.constexpr):
    """Return the codes of float32 moments, the second rounded by the upper random bits, and their groups' exponents."""
    # 0x00800000 for a 0, from 0x01000000 on for normal numbers; infinities and NaNs wrap around, to less than a 0.
    raised = (bits_of(exp_avg_sq) + 0x00800000).to(tl.int32, bitcast=True)
    exp_avg = tl.where(raised >= 0x01000000, exp_avg, 0.0)
    if STATES == "8bit_v16":
        # Makes NaNs of any payload and sign the quiet one: adding to all ones, a GPU's own, would carry over.
        bits = tl.minimum(bits_of(exp_avg_sq), 0x7FC00000)
        rounded = (bits + (random >> 17)) >> 15
        direction, scale = _encode_direction(exp_avg, 0x7F7FFFFF - (rounded << 14), 133, AXIS)
        return direction, rounded.to(tl.uint16), scale
    else:
        # What is not finite is stored as the group's largest finite number, or as an infinity where it has none.
        largest = (tl.max(raised, axis=AXIS, keep_dims=True) - 0x00800000).to(tl.uint32, bitcast=True)
        largest = tl.minimum(largest, 0x7F800000)
        bits = tl.minimum(bits_of(exp_avg_sq), largest)
        fraction = _fraction_bits(bits, largest, AXIS)
        dropped = 23 - fraction
        rounded = tl.umulhi(bits + (random >> (32 - dropped)), _power_of_two(32 - dropped))
        exponent = tl.max(rounded, axis=AXIS, keep_dims=True) >> fraction
        start = _code_start(exponent, fraction)
        # 0 is a moment that no step has written
        code = tl.maximum((rounded - start).to(tl.int32), 1).to(tl.uint32)
        inverse = (0x7F7FFFFF - (start << (22 - fraction))) + code * (0 - _power_of_two(22 - fraction))
        direction, scale = _encode_direction(exp_avg, inverse, 133 + 48, AXIS)
        return direction, code.to(tl.uint8), (tl.minimum(scale, 63) << 10) | ((fraction - 3) << 8) | exponent


@triton.jit
def _encode_direction(exp_avg, inverse, ORIGIN: tl.constexpr, AXIS: tl.constexpr):
    # 0x7F7FFFFF less half the bits of v, whose exponent is that of 2^-(E(v) // 2): all ones below it, none is borrowed.
    direction = exp_avg * from_bits(inverse & 0x7F800000)
    # Without signs and raised by an exponent: infinities and NaNs wrap around, to less than a 0.
    largest = tl.max((bits_of(direction) << 1) + 0x01000000, axis=AXIS, keep_dims=True) >> 1
    # The addend raises the scale where the largest would be rounded to 128.
    scale = tl.maximum((largest + 0x10000) >> 23, ORIGIN + 1)
    # The second addend leaves the nearest integer in the low bits of the pattern.
    code = direction * from_bits((261 - scale) << 23) + 12582912.0
    return bits_of(code).to(tl.uint8).to(tl.int8, bitcast=True), scale - (ORIGIN + 1)
