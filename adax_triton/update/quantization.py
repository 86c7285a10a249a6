"""Quantized states in PyTorch: 8-bit m, 16-bit or 8-bit v.

    v, "8bit_v16"  16 bits: the 8 exponent bits and the first 8 fraction bits of a float32, without the sign, which is 0
    v, "8bit"      8 bits: a float with 3 to 6 fraction bits. Codes count down from the largest exponent of the group. A
                   smaller range of exponents in the group leaves more fraction bits
    m              8 bits: u = m 2^(127 - E(v) // 2), in a power-of-two scale per group. E(v) is the exponent field
                   of v, so u is about m / sqrt(v), up to a factor of 2 and a constant scale

A group is 32 consecutive elements in memory. `kernels/quantization.py` implements the same formats in Triton.

v is rounded stochastically. `w_t` falls for as long as AdaX runs, and rounding to nearest would freeze v early. The
variance of the rounding noise is proportional to the spacing of the codes. The elements of most groups are similar, so
most groups get fine codes. u does not grow with the gradients, so one scale fits all elements of a group.

If v is 0, subnormal, infinite or NaN, the code of u is 0 and the group's scale ignores it. In "8bit" an infinite or NaN
v becomes the largest finite v of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import QUIET_NAN, addend_from_high_bits, bits_of, from_bits, signed_byte, signed_half

# The format; `kernels/tables.py` has the same constants.
GROUP = 32
_V16_DROPPED_BITS = 15  # low bits of a float32 v that "8bit_v16" drops
_MIN_FRACTION_BITS = 3
# Fraction bits of "8bit" -> largest range of exponents in a group that still fits in 8 bits. This includes rounding of
# the largest element up to the next exponent.
_MAX_EXPONENT_RANGE = {4: 13, 5: 5, 6: 1}
_MAX_V_CODE = 255
# A group has scale 0 if its largest u has this exponent field. That u then has a 7-bit code.
_SCALE_ORIGIN = 133
# "8bit" stores the scale minus this, in 6 bits. Smaller scales are raised to it: every update of such a group is
# below 1e-3 of the learning rate.
_MIN_SCALE = 48
_MAX_STORED_SCALE = 63
# Exponent word of "8bit": 8 bits for the largest exponent of v, 2 for the fraction bits, 6 for the scale.
_FRACTION_SHIFT, _SCALE_SHIFT = 8, 10
_FRACTION_MASK = 3

# Float32: the exponent is above the 23 fraction bits, with a bias of 127.
_EXPONENT_SHIFT, _EXPONENT_BIAS = 23, 127
# bits(2^-k) = _RECIPROCAL_BITS - bits(2^k)
_RECIPROCAL_BITS = 2 * _EXPONENT_BIAS << _EXPONENT_SHIFT
# Rounding offset, half a unit of a 7-bit code: a group whose largest code would round to 128 gets the next scale.
_HALF_CODE = 1 << _EXPONENT_SHIFT - 7
# 1.5 * 2^23: adding it rounds a float32 in (-2^22, 2^22) to an integer in the low bits of its pattern.
_TO_INTEGER = 12582912.0
_SMALLEST_NORMAL, _INFINITY = 0x00800000, 0x7F800000  # _INFINITY is also the mask of the exponent bits


def _largest_in_group(values: Tensor) -> Tensor:
    return values.amax(dim=-1, keepdim=True)


def quantize_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor | None, v_8bit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize both moments.

    Args:
        exp_avg: (groups, 32) float32; the last group is padded with zeros.
        exp_avg_sq: (groups, 32) float32, >= 0.
        random: (groups, 32) int32 random bits; the upper ones round v. None to round v to nearest, for values that
            are converted once.
        v_8bit: True for "8bit", False for "8bit_v16".

    Returns:
        Three int32 tensors to copy into tensors of the dtypes in parentheses:
        the codes of m (int8);
        the codes of v (uint8 for "8bit"; int16, with the bits of an unsigned word, for "8bit_v16");
        the exponent words, (groups,): the scale of u for "8bit_v16" (uint8), the packed word for "8bit" (int16).
    """
    bits = _canonical_bits(exp_avg_sq)
    exp_avg = torch.where((bits >= _SMALLEST_NORMAL) & (bits < _INFINITY), exp_avg, 0.0)
    if v_8bit:
        largest = _largest_in_group(torch.where(bits < _INFINITY, bits, -1))
        largest = torch.where(largest < 0, _INFINITY, largest)
        bits = bits.minimum(largest)
        fraction = _fraction_bits(bits, largest)
        dropped = _EXPONENT_SHIFT - fraction
        rounded = (bits + _rounding_addend(random, dropped)) >> dropped
        exponent = _largest_in_group(rounded) >> fraction
        offset = _code_offset(exponent, fraction)
        code = (rounded - offset).clamp_min(1)  # code 0 is reserved for moments that were never updated
        stored_bits, origin = (code + offset) << dropped, _SCALE_ORIGIN + _MIN_SCALE
    else:
        rounded = (bits + addend_from_high_bits(random, _V16_DROPPED_BITS)) >> _V16_DROPPED_BITS
        stored_bits, code, origin = rounded << _V16_DROPPED_BITS, signed_half(rounded), _SCALE_ORIGIN
    u = exp_avg * from_bits(_RECIPROCAL_BITS - _half_exponent(stored_bits))
    magnitude = bits_of(u) & 0x7FFFFFFF
    largest = _largest_in_group(torch.where(magnitude < _INFINITY, magnitude, 0))
    scale = ((largest + _HALF_CODE) >> _EXPONENT_SHIFT).clamp_min(origin)
    factor = from_bits((_SCALE_ORIGIN + _EXPONENT_BIAS - scale) << _EXPONENT_SHIFT)
    exp_avg_code = signed_byte(bits_of(u * factor + _TO_INTEGER))
    scale = scale - origin
    if not v_8bit:
        return exp_avg_code, code, scale.view(-1)
    word = scale.clamp_max(_MAX_STORED_SCALE) << _SCALE_SHIFT | (fraction - _MIN_FRACTION_BITS) << _FRACTION_SHIFT
    return exp_avg_code, code, signed_half(word | exponent).view(-1)


def dequantize_moments(exp_avg: Tensor, exp_avg_sq: Tensor, group_exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Dequantize both moments to float32, without error.

    Args:
        exp_avg: (groups, 32) int8 codes.
        exp_avg_sq: (groups, 32) codes, uint8 for "8bit" or int16 for "8bit_v16".
        group_exponents: (groups,) exponent words.

    Returns:
        m and v, (groups, 32) float32.
    """
    word = group_exponents.view(-1, 1).to(torch.int32)
    if exp_avg_sq.dtype == torch.uint8:
        fraction = ((word >> _FRACTION_SHIFT) & _FRACTION_MASK) + _MIN_FRACTION_BITS
        offset = _code_offset(word & 0xFF, fraction)
        second = (exp_avg_sq.to(torch.int32) + offset) << (_EXPONENT_SHIFT - fraction)
        scale = ((word >> _SCALE_SHIFT) & _MAX_STORED_SCALE) + _MIN_SCALE
    else:
        second = (exp_avg_sq.to(torch.int32) & 0xFFFF) << _V16_DROPPED_BITS
        scale = word
    first = exp_avg.to(torch.float32) * from_bits(_half_exponent(second) + (scale << _EXPONENT_SHIFT))
    return first, from_bits(second)


def _canonical_bits(values: Tensor) -> Tensor:
    # Replace each NaN by QUIET_NAN: adding to a NaN of 0xFFFFFFFF would overflow. v >= 0, so negative bits are a NaN.
    bits = bits_of(values)
    return torch.where(bits < 0, QUIET_NAN, bits).clamp_max(QUIET_NAN)


def _fraction_bits(bits: Tensor, largest: Tensor) -> Tensor:
    exponent_range = (largest >> _EXPONENT_SHIFT) - (bits.amin(dim=-1, keepdim=True) >> _EXPONENT_SHIFT)
    fraction = torch.full_like(exponent_range, _MIN_FRACTION_BITS)
    for limit in _MAX_EXPONENT_RANGE.values():
        fraction += (exponent_range <= limit).to(torch.int32)
    return fraction


def _rounding_addend(random: Tensor | None, dropped: Tensor) -> Tensor:
    # The upper random bits, or half of the dropped range; the mask clears the sign bits of the arithmetic shift.
    return (1 << dropped) >> 1 if random is None else (random >> (32 - dropped)) & ((1 << dropped) - 1)


def _half_exponent(bits: Tensor) -> Tensor:
    return (bits >> 1) & _INFINITY


def _code_offset(exponent: Tensor, fraction: Tensor) -> Tensor:
    return ((exponent + 1 << fraction) - _MAX_V_CODE).clamp_min(0)
