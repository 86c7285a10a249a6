"""Random bits, stochastic rounding and split master weights, in PyTorch.

The random bits are a hash of (seed, step, element).

`kernels/rounding.py` implements the same functions in Triton, bit for bit. 32-bit words are held in int32, whose sums
and products wrap around.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# The multipliers of lowbias32, https://github.com/skeeto/hash-prospector, a full-avalanche 32-bit mixer.
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))
QUIET_NAN = 0x7FC00000
# Half of the last place that bfloat16 keeps: adding it and dropping 16 bits rounds to nearest, ties away from zero.
HALF_BFLOAT16 = 0x8000
_TOP_HALF = -0x10000


def random_key(seed: int, step: int) -> tuple[int, int]:
    """Return the key of a step's random bits, two 32-bit words.

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
    """Hash int32 words with a key of two int32 words.

    The key is the same for all words, or a tensor with one key per word.
    """
    words = words ^ key0
    words = (words ^ _shift_right(words, 16)) * _MULTIPLIERS[0]
    words = words + key1
    words = (words ^ _shift_right(words, 15)) * _MULTIPLIERS[1]
    return words ^ _shift_right(words, 16)


def signed_word(word: int) -> int:
    """Return an integer modulo 2^32, as the int32 with the same bits."""
    word &= _WORD
    return word - (1 << 32) if word > 0x7FFFFFFF else word


def bits_of(values: Tensor) -> Tensor:
    """Return the bit patterns of float32 values as int32."""
    return values.view(torch.int32)


def from_bits(bits: Tensor) -> Tensor:
    """Return the float32 values of int32 bit patterns."""
    return bits.view(torch.float32)


def addend_from_low_bits(random: Tensor | None, bits: int) -> Tensor | int:
    """Return the lowest `bits` random bits, to add before dropping `bits` bits.

    If `random` is None, return 2^(bits - 1), which rounds to nearest.
    """
    return 1 << (bits - 1) if random is None else random & ((1 << bits) - 1)


def addend_from_high_bits(random: Tensor | None, bits: int) -> Tensor | int:
    """Return the highest `bits` random bits, to add before dropping `bits` bits.

    If `random` is None, return 2^(bits - 1), which rounds to nearest.
    """
    return 1 << (bits - 1) if random is None else _shift_right(random, 32 - bits)


def round_to_bfloat16(values: Tensor, addend: Tensor | int) -> Tensor:
    """Round float32 to bfloat16, stochastically or to nearest; NaN stays NaN.

    To nearest, ties are rounded away from zero.

    Args:
        values: float32.
        addend: 16 random bits per element, or HALF_BFLOAT16 for nearest.
    """
    return _top_half(_canonical_bits(values) + addend)


def _canonical_bits(values: Tensor) -> Tensor:
    # Replace each NaN by QUIET_NAN: adding to a NaN of 0xFFFFFFFF would overflow.
    return torch.where(values != values, QUIET_NAN, bits_of(values))


def _top_half(bits: Tensor) -> Tensor:
    return from_bits(bits & _TOP_HALF).to(torch.bfloat16)


def signed_half(words: Tensor) -> Tensor:
    """Return the lower 16 bits of each word as a signed number."""
    return ((words & 0xFFFF) ^ 0x8000) - 0x8000


def signed_byte(words: Tensor) -> Tensor:
    """Return the lowest byte of each word as a signed number."""
    # A cast to int8 may saturate in vectorized code.
    return ((words & 0xFF) ^ 0x80) - 0x80


def split_master(master: Tensor, addend: Tensor | int | None) -> tuple[Tensor, Tensor]:
    """Split float32 master weights into bfloat16 parameters and integer remainders.

    The parameter is the nearest bfloat16, ties away from zero. Without an addend the remainder is the signed low half
    of the word, and `join_master` is exact. With an addend the master is first rounded to 24 bits, and the remainder is
    one signed byte. Every NaN becomes a quiet one.

    Args:
        master: float32.
        addend: None to keep all 32 bits. To keep 24: 8 random bits per element, or 0x80 for nearest.

    Returns:
        The parameters, bfloat16, and the remainders, int32 in the range of int16 or int8.
    """
    bits = _canonical_bits(master)
    if addend is None:
        return _top_half(bits + HALF_BFLOAT16), signed_half(bits)
    bits = bits + addend
    return _top_half(bits + HALF_BFLOAT16), signed_byte(bits >> 8)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 master weights of bfloat16 parameters and their remainders.

    The weight is the sum of both, and it rounds to the parameter. If the user has set the parameter to 0 or infinity,
    the sum may be NaN. Then the weight is the parameter.

    Args:
        param: bfloat16.
        remainder: from `split_master`, int8 or int16.
    """
    words, weights = remainder.to(torch.int32), param.to(torch.float32)
    joined = from_bits(bits_of(weights) + (words << 8 if remainder.dtype == torch.int8 else words))
    return torch.where(joined != joined, weights, joined)


def valid_master(param: Tensor, master: Tensor) -> Tensor:
    """Return each master if it rounds to its parameter, else the parameter.

    Args:
        param: float16.
        master: float32.
    """
    return torch.where(master.to(torch.float16) == param, master, param.to(torch.float32))
