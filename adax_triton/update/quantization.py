"""The compact states in PyTorch: 8-bit first moments, 16- and 8-bit second moments.

    v, "8bit_v16"     16 bits: the 8 exponent and the first 8 fraction bits of a float32, whose sign is always 0
    v, "8bit"   8 bits: exponent and 3 to 6 fraction bits, as many as its group of 32 has room for, counted down from
                  the group's largest exponent
    m             8 bits: u = m / 2^(E(v) // 2), nearly m over the root of v, in a group's power-of-two scale

v is rounded stochastically: `w_t` falls for as long as AdaX runs, and rounded to nearest v would stop changing early.
The noise that is left has a variance in proportion to the spacing of the codes, so a group whose elements are alike, as
most are, gets finer codes. u is of order one whatever the scale of the gradient, so elements of very different
gradients share a group's scale well. A group is 32 elements that follow each other in memory. The kernels have their
own writing in `kernels/quantization.py`.

Where v is no normal finite float32, u means nothing: its code is 0, and it does not count for the group's scale. In
"8bit" an infinite or NaN v becomes the largest finite v of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import QUIET_NAN, bits_of, from_bits, high_bits, signed_byte

GROUP = 32
_LOW_DROPPED = 15
# Fraction bits of "8bit", and the most octaves of v, beside the largest's own, that each leaves room for if rounding
# raises the largest to the next.
_MIN_FRACTION_BITS = 3
_OCTAVES = {4: 13, 5: 5, 6: 1}
# Adding it leaves a float32 in (-2^22, 2^22) rounded to the nearest integer, in the low bits of its pattern.
_TO_INTEGER = 12582912.0
# Exponent of a scale of 2^0; u keeps 7 bits below its group's largest. "8bit" has 6 bits for the scale, and takes
# them from where u lies: groups in which no step is 1e-3 of the learning rate are cut off below.
_SCALE_ORIGIN = 133
_LOWEST_SCALE = 48
_SMALLEST_NORMAL, _INFINITY = 0x00800000, 0x7F800000


def _largest_in_group(values: Tensor) -> Tensor:
    return values.amax(dim=-1, keepdim=True)


def quantize_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor | None, v_8bit: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of both moments and their groups' exponents.

    Args:
        exp_avg: (groups, 32) float32; a last group that is not full is filled up with zeros.
        exp_avg_sq: (groups, 32) float32, >= 0.
        random: (groups, 32) int32 random bits, of which the upper are used; None to round v to nearest, for values
            that will not be rounded again and again.
        lowest: 8-bit second moments.

    Returns:
        Codes of m, in the range of int8; of v, in that of uint8, or of int16 holding the bits of an unsigned word; and
        (groups,) exponents: the scale of u, in the range of uint8; or, for `v_8bit` and in that of int16, 6 bits of
        scale, 2 bits for the fraction bits of v, and 8 for its largest exponent. All int32, for copying into tensors of
        those dtypes.
    """
    bits = _quieted(bits_of(exp_avg_sq))
    exp_avg = torch.where((bits >= _SMALLEST_NORMAL) & (bits < _INFINITY), exp_avg, 0.0)
    if v_8bit:
        largest = _largest_in_group(torch.where(bits < _INFINITY, bits, -1))
        largest = torch.where(largest < 0, _INFINITY, largest)
        bits = bits.minimum(largest)
        fraction = _fraction_bits(bits, largest)
        dropped = 23 - fraction
        rounded = (bits + _to_drop(random, dropped)) >> dropped
        exponent = _largest_in_group(rounded) >> fraction
        start = _code_start(exponent, fraction)
        code = (rounded - start).clamp_min(1)  # 0 is a moment that no step has written
        stored_bits, origin = (code + start) << dropped, _SCALE_ORIGIN + _LOWEST_SCALE
    else:
        rounded = (bits + high_bits(random, _LOW_DROPPED)) >> _LOW_DROPPED
        stored_bits, code, origin = rounded << _LOW_DROPPED, _signed_word(rounded), _SCALE_ORIGIN
    direction = exp_avg * from_bits(0x7F000000 - _half_exponent(stored_bits))
    magnitude = bits_of(direction) & 0x7FFFFFFF
    largest = _largest_in_group(torch.where(magnitude < _INFINITY, magnitude, 0))
    # The addend raises the scale where the largest would be rounded to 128.
    scale = ((largest + 0x10000) >> 23).clamp_min(origin)
    exp_avg_code = signed_byte(bits_of(direction * from_bits((260 - scale) << 23) + _TO_INTEGER))
    scale = scale - origin
    if not v_8bit:
        return exp_avg_code, code, scale.view(-1)
    word = scale.clamp_max(63) << 10 | (fraction - _MIN_FRACTION_BITS) << 8 | exponent
    return exp_avg_code, code, _signed_word(word).view(-1)


def dequantize_moments(exp_avg: Tensor, exp_avg_sq: Tensor, group_exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 (groups, 32) moments of codes of the same shape, exactly; see `quantize_moments`.

    Args:
        exp_avg, exp_avg_sq, group_exponents: the codes; `exp_avg_sq` is uint8 for `"8bit"`, int16 for `"8bit_v16"`.
    """
    word = group_exponents.view(-1, 1).to(torch.int32)
    if exp_avg_sq.dtype == torch.uint8:
        fraction = ((word >> 8) & 3) + _MIN_FRACTION_BITS
        second = (exp_avg_sq.to(torch.int32) + _code_start(word & 0xFF, fraction)) << (23 - fraction)
        scale = ((word >> 10) & 63) + _LOWEST_SCALE
    else:
        second = (exp_avg_sq.to(torch.int32) & 0xFFFF) << _LOW_DROPPED
        scale = word
    first = exp_avg.to(torch.float32) * from_bits(_half_exponent(second) + (scale << 23))
    return first, from_bits(second)


def _quieted(bits: Tensor) -> Tensor:
    # Adding to a NaN of all ones would carry over. A negative pattern can only be a NaN's.
    return torch.where(bits < 0, QUIET_NAN, bits).clamp_max(QUIET_NAN)


def _fraction_bits(bits: Tensor, largest: Tensor) -> Tensor:
    octaves = (largest >> 23) - (bits.amin(dim=-1, keepdim=True) >> 23)
    fraction = torch.full_like(octaves, _MIN_FRACTION_BITS)
    for most in _OCTAVES.values():
        fraction += (octaves <= most).to(torch.int32)
    return fraction


def _to_drop(random: Tensor | None, dropped: Tensor) -> Tensor:
    # Of 32 random bits the upper; the sign is cleared by the mask.
    return (1 << dropped) >> 1 if random is None else (random >> (32 - dropped)) & ((1 << dropped) - 1)


def _signed_word(words: Tensor) -> Tensor:
    return (words ^ 0x8000) - 0x8000


def _half_exponent(bits: Tensor) -> Tensor:
    return (bits >> 1) & 0x7F800000


def _code_start(exponent: Tensor, fraction: Tensor) -> Tensor:
    return ((exponent + 1 << fraction) - 255).clamp_min(0)
