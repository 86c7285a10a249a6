"""Random bits that depend on nothing but (seed, step, element), and what is rounded with them, in PyTorch.

The kernels have their own writing of this in `kernels/rounding.py`; the two give the same bits. Words of 32 bits are
held in int32, whose products and sums wrap around.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# The multipliers of lowbias32, https://github.com/skeeto/hash-prospector, a full-avalanche 32-bit mixer.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
QUIET_NAN = 0x7FC00000
_TOP_HALF = -0x10000


def random_key(seed: int, step: int) -> tuple[int, int]:
    """Return the two 32-bit words that choose the random bits of a step.

    Args:
        seed: in [0, 2^32).
        step: t, counted from 1.
    """
    return _mix(seed ^ _mix(step)), _mix(step + 0x9E3779B9 ^ _mix(~seed & _WORD))


def _mix(word: int) -> int:
    word &= _WORD
    for shift, multiplier in zip((16, 15), _MULTIPLIERS, strict=True):
        word = (word ^ word >> shift) * multiplier & _WORD
    return word ^ word >> 16


def _shift_right(words: Tensor, bits: int) -> Tensor:
    return (words >> bits) & (_WORD >> bits)


def random_bits(index: Tensor, key: tuple[int, int]) -> Tensor:
    """Return 32 random bits per element, as int32.

    Args:
        index: int32, the position of each element in its parameter, modulo 2^32.
        key: from `random_key`.
    """
    return mix_words(index, signed_word(key[0]), signed_word(key[1]))


def mix_words(words: Tensor, key0: int | Tensor, key1: int | Tensor) -> Tensor:
    """Return the random bits of int32 words under the two int32 words of a key, or of a key for each."""
    words = words ^ key0
    words = (words ^ _shift_right(words, 16)) * _MULTIPLIERS[0]
    words = words + key1
    words = (words ^ _shift_right(words, 15)) * _MULTIPLIERS[1]
    return words ^ _shift_right(words, 16)


def signed_word(word: int) -> int:
    """Return an integer modulo 2^32 as the int32 of the same bits."""
    word &= _WORD
    return word - (1 << 32) if word > 0x7FFFFFFF else word


def bits_of(values: Tensor) -> Tensor:
    """Return the bit patterns of float32 values as int32."""
    return values.view(torch.int32)


def from_bits(bits: Tensor) -> Tensor:
    """Return the float32 values of int32 bit patterns."""
    return bits.view(torch.float32)


def low_bits(random: Tensor | None, bits: int) -> Tensor | int:
    """Return the lowest random bits, or one half where there are none: adding either and cutting off rounds."""
    return 1 << (bits - 1) if random is None else random & ((1 << bits) - 1)


def high_bits(random: Tensor | None, bits: int) -> Tensor | int:
    """Return the highest random bits moved to the lowest place, or one half."""
    return 1 << (bits - 1) if random is None else _shift_right(random, 32 - bits)


def round_to_bfloat16(values: Tensor, addend: Tensor | int) -> Tensor:
    """Round float32 to bfloat16 stochastically, or to nearest with ties away from zero; NaN stays NaN.

    Args:
        values: float32.
        addend: 16 random bits per element, or 0x8000 for nearest.
    """
    return _top_half(_quieted(values) + addend)


def _quieted(values: Tensor) -> Tensor:
    # Adding to a NaN of all ones would carry over.
    return torch.where(values != values, QUIET_NAN, bits_of(values))


def _top_half(bits: Tensor) -> Tensor:
    return from_bits(bits & _TOP_HALF).to(torch.bfloat16)


def signed_byte(words: Tensor) -> Tensor:
    """Return the lowest byte of each word as a signed number; a cast to int8 may saturate where it is vectorised."""
    return ((words & 0xFF) ^ 0x80) - 0x80


def split_master(master: Tensor, addend: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """Split float32 master weights into bfloat16 parameters and what they lack.

    The parameter is the nearest bfloat16, ties away from zero. The rest is the signed low half of the word, and
    `join_master` gives the master back bit for bit; or with an addend its signed upper byte, and the master is rounded
    to 24 bits first. A NaN becomes a quiet one.

    Args:
        master: float32.
        addend: None for all 32 bits. For 24: 8 random bits per element, or 0x80 for nearest.

    Returns:
        The parameters, bfloat16, and the rest, int32 within the range of int16 or int8.
    """
    bits = _quieted(master)
    if addend is None:
        return _top_half(bits + 0x8000), ((bits & 0xFFFF) ^ 0x8000) - 0x8000
    bits = bits + addend
    return _top_half(bits + 0x8000), signed_byte(bits >> 8)


def join_master(param: Tensor, rest: Tensor) -> Tensor:
    """Return the float32 master weights of bfloat16 parameters and what they lack.

    Any sum of the two rounds to the parameter, except that it wraps around to a NaN where somebody has set a parameter
    to 0 next to a negative rest, or to infinity next to a positive one: there the parameter is the weight.

    Args:
        param: bfloat16.
        rest: from `split_master`, int8 or int16.
    """
    words, weights = rest.to(torch.int32), param.to(torch.float32)
    joined = from_bits(bits_of(weights) + (words << 8 if rest.dtype == torch.int8 else words))
    return torch.where(joined != joined, weights, joined)


def current_copy(param: Tensor, master: Tensor) -> Tensor:
    """Return float32 master weights where they round to their float16 parameters, which are the weights elsewhere.

    Args:
        param: float16.
        master: float32.
    """
    return torch.where(master.to(torch.float16) == param, master, param.to(torch.float32))
