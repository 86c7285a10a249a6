"""Random bits, stochastic rounding and split master weights, on the GPU.

`adax_triton/update/rounding.py` explains the functions and implements them in PyTorch, bit for bit.
"""

import triton
import triton.language as tl

# Bit patterns of float32.
EXPONENT_SHIFT = tl.constexpr(23)  # the exponent is above the 23 fraction bits
EXPONENT_BIAS = tl.constexpr(127)
SMALLEST_NORMAL = tl.constexpr(0x00800000)
INFINITY_BITS = tl.constexpr(0x7F800000)  # all exponent bits, too
QUIET_NAN = tl.constexpr(0x7FC00000)
# Half of the last place that bfloat16 keeps: adding it and dropping 16 bits rounds to nearest, ties away from zero.
HALF_BFLOAT16 = tl.constexpr(0x8000)


@triton.jit
def bits_of(values):
    """Return the bit patterns of float32 values as uint32."""
    return values.to(tl.uint32, bitcast=True)


@triton.jit
def from_bits(bits):
    """Return the float32 values of uint32 patterns."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def to_float32(values):
    """Return values of any float dtype as float32."""
    if values.dtype == tl.bfloat16:
        # Triton's own conversion takes one more instruction for every two values.
        return from_bits(values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    else:
        return values.to(tl.float32)


@triton.jit
def random_bits(index, key0: tl.uint32, key1: tl.uint32):
    """Return 32 random bits for each uint32 index."""
    words = index ^ key0
    words = (words ^ (words >> 16)) * 0x7FEB352D
    words += key1
    words = (words ^ (words >> 15)) * 0x846CA68B
    return words ^ (words >> 16)


@triton.jit
def _canonical_bits(values):
    # Every NaN becomes QUIET_NAN. A GPU's NaN is 0x7FFFFFFF: an addend would overflow it into -0.
    return tl.where(values != values, QUIET_NAN, bits_of(values))


@triton.jit
def _top_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_bfloat16(values, addend):
    """Round float32 to bfloat16.

    addend: 16 random bits to round stochastically, or HALF_BFLOAT16 to round to nearest.
    """
    return _top_half(_canonical_bits(values) + addend)


@triton.jit
def split_master(master, addend, REMAINDER_DTYPE: tl.constexpr):
    """Split float32 weights into the nearest bfloat16 and a remainder.

    Ties are rounded away from zero.

    REMAINDER_DTYPE is int16 to keep all 32 bits, or int8 to keep 24 bits, rounded with 8 random bits as addend.
    """
    bits = _canonical_bits(master)
    if REMAINDER_DTYPE == tl.int16:
        remainder = bits.to(tl.uint16)
    else:
        bits += addend
        remainder = (bits >> 8).to(tl.uint8)
    return _top_half(bits + HALF_BFLOAT16), remainder.to(REMAINDER_DTYPE, bitcast=True)


@triton.jit
def join_master(param, master):
    """Return the master if it rounds to its parameter, else the parameter.

    `master` is a float32 copy, or a remainder from `split_master`. If it does not round to the parameter, the user has
    set the parameter.
    """
    weights = to_float32(param)
    if master.dtype == tl.float32:
        return tl.where(master.to(param.dtype) == param, master, weights)
    else:
        low_bits = master.to(tl.int32).to(tl.uint32, bitcast=True)
        if master.dtype == tl.int8:
            low_bits = low_bits << 8
        joined = from_bits(bits_of(weights) + low_bits)
        # If the parameter is 0 or infinity, the sum may be NaN; the weight is then the parameter. Adding again takes as
        # many instructions as a select, and fewer of them are integer instructions.
        return from_bits(bits_of(weights) + tl.where(joined != joined, 0, low_bits))


@triton.jit
def differ(left, right):
    """Return which pairs of stored values differ in any bit."""
    if left.dtype == tl.float32:
        return bits_of(left) != bits_of(right)
    elif left.dtype == tl.bfloat16:
        return left.to(tl.uint16, bitcast=True) != right.to(tl.uint16, bitcast=True)
    else:
        return left != right
