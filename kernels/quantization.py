"""Quantize and dequantize moments to "8bit_v16" and "8bit", on the GPU.

`adax_triton/update/quantization.py` describes the formats. AXIS is the axis of a group's 32 elements: 1 in a tile of
(groups, 32), 0 in a tile of one group. u is m 2^(127 - E(v) // 2), about m / sqrt(v)
times a constant.
"""

import triton
import triton.language as tl

from . import tables
from .rounding import EXPONENT_BIAS, EXPONENT_SHIFT, INFINITY_BITS, QUIET_NAN, SMALLEST_NORMAL, bits_of, from_bits

GROUP = tl.constexpr(tables.GROUP)
V16_DROPPED_BITS = tl.constexpr(tables.V16_DROPPED_BITS)
MIN_FRACTION_BITS = tl.constexpr(tables.MIN_FRACTION_BITS)
FRACTION_MASK = tl.constexpr((1 << tables.SCALE_SHIFT - tables.FRACTION_SHIFT) - 1)
MAX_V_CODE = tl.constexpr(tables.MAX_V_CODE)
SCALE_ORIGIN = tl.constexpr(tables.SCALE_ORIGIN)
MIN_SCALE = tl.constexpr(tables.MIN_SCALE)
MAX_STORED_SCALE = tl.constexpr(tables.MAX_STORED_SCALE)
FRACTION_SHIFT = tl.constexpr(tables.FRACTION_SHIFT)
SCALE_SHIFT = tl.constexpr(tables.SCALE_SHIFT)
# Bits of twice the smallest normal number.
NEXT_EXPONENT = tl.constexpr(2 * SMALLEST_NORMAL.value)
LARGEST_FINITE = tl.constexpr(INFINITY_BITS.value - 1)
# Rounding offset, half a unit of a 7-bit code: a group whose largest code would round to 128 gets the next scale.
HALF_CODE = tl.constexpr(1 << EXPONENT_SHIFT.value - 7)
# 1.5 * 2^23: adding it rounds a float32 in (-2^22, 2^22) to an integer in the low bits of its pattern.
TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _code_offset(exponent, fraction):
    return tl.maximum(((exponent + 1) << fraction).to(tl.int32) - MAX_V_CODE, 0).to(tl.uint32)


@triton.jit
def _power_of_two(exponent):
    # Built as a float, because the compiler turns integer products by powers of two into shifts. Shifts run on the
    # integer unit, which is busy here; a multiplication runs on another unit and fuses with the next addition.
    return from_bits((exponent + EXPONENT_BIAS) << EXPONENT_SHIFT).to(tl.uint32)


@triton.jit
def dequantize_moments(exp_avg, exp_avg_sq, exponents, STATES: tl.constexpr):
    """Dequantize codes and uint32 exponent words to float32 moments."""
    code = exp_avg_sq.to(tl.uint32)
    if STATES == "8bit_v16":
        bits = code << V16_DROPPED_BITS
        root_bits = (code << V16_DROPPED_BITS - 1) + (exponents << EXPONENT_SHIFT)
    else:
        fraction = ((exponents >> FRACTION_SHIFT) & FRACTION_MASK) + MIN_FRACTION_BITS
        offset = _code_offset(exponents & 0xFF, fraction)
        root_shift = EXPONENT_SHIFT - 1 - fraction
        unit = _power_of_two(root_shift)
        bits = code * (unit + unit)
        dropped = EXPONENT_SHIFT - fraction
        bits += offset << dropped
        scale = (exponents >> SCALE_SHIFT) + MIN_SCALE
        root_bits = code * unit + ((offset << root_shift) + (scale << EXPONENT_SHIFT))
    return exp_avg.to(tl.float32) * from_bits(root_bits & INFINITY_BITS), from_bits(bits)


@triton.jit
def _fraction_bits(bits, largest, AXIS: tl.constexpr, SHIFT_FIRST: tl.constexpr):
    if SHIFT_FIRST:
        smallest = tl.min(bits >> EXPONENT_SHIFT, axis=AXIS, keep_dims=True)
    else:
        smallest = tl.min(bits, axis=AXIS, keep_dims=True) >> EXPONENT_SHIFT
    exponent_range = (largest >> EXPONENT_SHIFT) - smallest
    # 7 - floor(log2(exponent_range + 2)) fraction bits, at least 3.
    log2 = (bits_of((exponent_range + 2).to(tl.float32)) >> EXPONENT_SHIFT).to(tl.int32) - EXPONENT_BIAS
    return tl.maximum(7 - log2, MIN_FRACTION_BITS).to(tl.uint32)


@triton.jit
def quantize_moments(exp_avg, exp_avg_sq, random, STATES: tl.constexpr, AXIS: tl.constexpr, SHIFT_FIRST: tl.constexpr):
    """Quantize float32 moments to m codes, v codes and exponent words.

    The upper random bits round v. SHIFT_FIRST changes only the machine code of "8bit". With it, the kernel of an int8
    master takes 48 registers instead of 52 with Triton 3.6, so that 40 instead of 32 warps run: 5 % faster on an H200.
    Without a master the kernel would take 63 instead of 48 with Triton 3.7, and with telemetry 73 instead of 72 on AMD.
    """
    # Add one to the exponent. The bits are then SMALLEST_NORMAL for 0, NEXT_EXPONENT or more for normal numbers, and
    # negative for inf and NaN.
    wrapped = (bits_of(exp_avg_sq) + SMALLEST_NORMAL).to(tl.int32, bitcast=True)
    exp_avg = tl.where(wrapped >= NEXT_EXPONENT, exp_avg, 0.0)
    if STATES == "8bit_v16":
        # Every NaN becomes QUIET_NAN. A GPU's NaN is 0x7FFFFFFF: an addend would overflow it.
        bits = tl.minimum(bits_of(exp_avg_sq), QUIET_NAN)
        rounded = (bits + (random >> (32 - V16_DROPPED_BITS))) >> V16_DROPPED_BITS
        inverse = LARGEST_FINITE - (rounded << V16_DROPPED_BITS - 1)
        exp_avg_code, scale = _quantize_u(exp_avg, inverse, SCALE_ORIGIN, AXIS)
        return exp_avg_code, rounded.to(tl.uint16), scale
    else:
        # Infinities and NaNs become the group's largest finite v, or an infinity if it has none.
        largest = (tl.max(wrapped, axis=AXIS, keep_dims=True) - SMALLEST_NORMAL).to(tl.uint32, bitcast=True)
        largest = tl.minimum(largest, INFINITY_BITS)
        bits = tl.minimum(bits_of(exp_avg_sq), largest)
        fraction = _fraction_bits(bits, largest, AXIS, SHIFT_FIRST)
        dropped = EXPONENT_SHIFT - fraction
        rounded = tl.umulhi(bits + (random >> (32 - dropped)), _power_of_two(32 - dropped))
        exponent = tl.max(rounded, axis=AXIS, keep_dims=True) >> fraction
        offset = _code_offset(exponent, fraction)
        # Code 0 is reserved for moments that were never updated.
        code = tl.maximum((rounded - offset).to(tl.int32), 1).to(tl.uint32)
        root_shift = EXPONENT_SHIFT - 1 - fraction
        inverse = (LARGEST_FINITE - (offset << root_shift)) + code * (0 - _power_of_two(root_shift))
        exp_avg_code, scale = _quantize_u(exp_avg, inverse, SCALE_ORIGIN + MIN_SCALE, AXIS)
        code = code.to(tl.uint8)
        word = (tl.minimum(scale, MAX_STORED_SCALE) << SCALE_SHIFT) | ((fraction - MIN_FRACTION_BITS) << FRACTION_SHIFT)
        return exp_avg_code, code, word | exponent


@triton.jit
def _quantize_u(exp_avg, inverse, ORIGIN: tl.constexpr, AXIS: tl.constexpr):
    # `inverse` is LARGEST_FINITE minus half the bits of v. Its exponent field is that of 2^(127 - E(v) // 2): the
    # fraction bits of LARGEST_FINITE are all ones, so the subtraction borrows nothing from the exponent.
    u = exp_avg * from_bits(inverse & INFINITY_BITS)
    # The shift drops the sign. Adding one exponent wraps inf and NaN to small values, so the maximum ignores them.
    largest = tl.max((bits_of(u) << 1) + NEXT_EXPONENT, axis=AXIS, keep_dims=True) >> 1
    scale = tl.maximum((largest + HALF_CODE) >> EXPONENT_SHIFT, ORIGIN + 1)
    factor_bits = (SCALE_ORIGIN + EXPONENT_BIAS + 1 - scale) << EXPONENT_SHIFT
    code = u * from_bits(factor_bits) + TO_INTEGER
    return bits_of(code).to(tl.uint8).to(tl.int8, bitcast=True), scale - (ORIGIN + 1)
