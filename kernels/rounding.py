"""Device functions: random bits that depend on (seed, step, element) only, stochastic rounding, split master weights.

`adax_triton/update/rounding.py` has the same in PyTorch, with the reasons; the two give the same bits.
"""

import triton
import triton.language as tl


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
        # The compiler's own takes an instruction more for every second value.
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
def _quieted(values):
    # Adding to a NaN of all ones, a GPU's own, would carry over into -0.
    return tl.where(values != values, 0x7FC00000, bits_of(values))


@triton.jit
def _top_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_bfloat16(values, addend):
    """Round to bfloat16: stochastically with 16 random bits as addend, to nearest with 0x8000."""
    return _top_half(_quieted(values) + addend)


@triton.jit
def split_master(master, addend, REST: tl.constexpr):
    """Return the nearest bfloat16, ties away, and what it lacks.

    REST is int16, for the float32 bit by bit, or int8 for 24 bits of it, rounded with 8 random bits as addend.
    """
    bits = _quieted(master)
    if REST == tl.int16:
        rest = bits.to(tl.uint16)
    else:
        bits += addend
        rest = (bits >> 8).to(tl.uint8)
    return _top_half(bits + 0x8000), rest.to(REST, bitcast=True)


@triton.jit
def join_master(param, rest):
    """Return the float32 weights of parameters and their masters, where these still round to the parameters.

    Elsewhere somebody has set the parameter, and it is the weight.
    """
    weights = to_float32(param)
    if rest.dtype == tl.float32:
        return tl.where(rest.to(param.dtype) == param, rest, weights)
    else:
        low = rest.to(tl.int32).to(tl.uint32, bitcast=True)
        if rest.dtype == tl.int8:
            low = low << 8
        joined = from_bits(bits_of(weights) + low)
        # Any sum rounds to the parameter, except that it wraps around to a NaN next to a 0 or an infinity. Adding twice
        # takes as many instructions as a choice between sums, fewer of them for integers.
        return from_bits(bits_of(weights) + tl.where(joined != joined, 0, low))


@triton.jit
def differ(left, right):
    """Return where two stored values differ in any bit."""
    if left.dtype == tl.float32:
        return bits_of(left) != bits_of(right)
    elif left.dtype == tl.bfloat16:
        return left.to(tl.uint16, bitcast=True) != right.to(tl.uint16, bitcast=True)
    else:
        return left != right
