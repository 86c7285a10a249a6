"""The compact states in PyTorch: 8-bit first moments, 16- and 8-bit second moments.

    v, "low"     16 bits: the 8 exponent and the first 8 fraction bits of a float32, whose sign is always 0
    v, "lowest"   8 bits: exponent and 3 fraction bits, counted down from the largest of a group of 32
    m             8 bits: u = m / 2^(E(v) // 2), nearly m over the root of v, in a group's power-of-two scale

v is rounded stochastically: `w_t` falls for as long as AdaX runs, and rounded to nearest v would stop changing early. u
is of order one whatever the scale of the gradient, so elements of very different gradients share a group's scale well.
A group is 32 elements that follow each other in memory. The kernels have their own writing in `kernels/compact.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rounding import bits_of, from_bits, high_bits

GROUP = 32
_LOW_DROPPED = 15
_LOWEST_DROPPED = 20
# Adding it leaves a float32 in (-2^22, 2^22) rounded to the nearest integer, in the low bits of its pattern.
_TO_INTEGER = 12582912.0
# Exponent of a scale of 2^0; u keeps 7 bits below its group's largest.
_SCALE_ORIGIN = 133


def _largest_in_group(values: Tensor) -> Tensor:
    return values.amax(dim=-1, keepdim=True)


def encode(exp_avg: Tensor, exp_avg_sq: Tensor, random: Tensor | None, lowest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of both moments and their groups' exponents.

    Args:
        exp_avg: (groups, 32) float32; a last group that is not full is filled up with zeros.
        exp_avg_sq: (groups, 32) float32, >= 0.
        random: (groups, 32) int32 random bits, of which the upper are used; None to round v to nearest, for values
            that will not be rounded again and again.
        lowest: 8-bit second moments.

    Returns:
        `exp_avg`, int8; `exp_avg_sq`, int16 (the bits of an unsigned word) or uint8; `group_exponents`, (groups,)
        uint8 or, for `lowest`, int16, with the scale of u in the upper byte and the largest exponent of v in the lower.
    """
    if lowest:
        rounded = (bits_of(exp_avg_sq) + high_bits(random, _LOWEST_DROPPED)) >> _LOWEST_DROPPED
        # NaN has the largest pattern; adding to it may have turned the sign.
        rounded = torch.where(rounded < 0, 0x7FF, rounded)
        exponent = _largest_in_group(rounded) >> 3
        start = _code_start(exponent)
        code = (rounded - start).clamp_min(1)  # 0 is a moment that no step has written
        stored_bits, exp_avg_sq_code = (code + start) << _LOWEST_DROPPED, code.to(torch.uint8)
    else:
        rounded = (bits_of(exp_avg_sq) + high_bits(random, _LOW_DROPPED)) >> _LOW_DROPPED
        rounded = torch.where(rounded < 0, 0xFFFF, rounded)
        exponent = None
        stored_bits, exp_avg_sq_code = rounded << _LOW_DROPPED, rounded.to(torch.int16)
    direction = exp_avg * from_bits(0x7F000000 - _half_exponent(stored_bits))
    largest = bits_of(direction) & 0x7FFFFFFF
    # The addend raises the scale where the largest would be rounded to 128.
    scale = ((_largest_in_group(largest) + 0x10000) >> 23).clamp_min(_SCALE_ORIGIN)
    exp_avg_code = bits_of(direction * from_bits((260 - scale) << 23) + _TO_INTEGER).to(torch.int8)
    scale = scale - _SCALE_ORIGIN
    if exponent is None:
        return exp_avg_code, exp_avg_sq_code, scale.to(torch.uint8).view(-1)
    return exp_avg_code, exp_avg_sq_code, (scale << 8 | exponent).to(torch.int16).view(-1)


def decode(exp_avg: Tensor, exp_avg_sq: Tensor, group_exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 (groups, 32) moments of codes of the same shape, exactly; see `encode`."""
    exponents = group_exponents.view(-1, 1).to(torch.int32)
    if exp_avg_sq.dtype == torch.uint8:
        start = _code_start(exponents & 0xFF)
        second = (exp_avg_sq.to(torch.int32) + start) << _LOWEST_DROPPED
        scale = exponents >> 8
    else:
        second = (exp_avg_sq.to(torch.int32) & 0xFFFF) << _LOW_DROPPED
        scale = exponents
    first = exp_avg.to(torch.float32) * from_bits(_half_exponent(second) + (scale << 23))
    return first, from_bits(second)


def _half_exponent(bits: Tensor) -> Tensor:
    return (bits >> 1) & 0x7F800000


def _code_start(exponent: Tensor) -> Tensor:
    return ((exponent + 1 << 3) - 255).clamp_min(0)
