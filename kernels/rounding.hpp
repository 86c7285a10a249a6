// Dtypes, random bits and rounding of the CPU kernel; the C++ version of rounding.py.

#pragma once

#include <cstdint>
#include <cstring>

namespace adax {

// Arrays may be unaligned and may alias.
typedef double f64 __attribute__((aligned(1), may_alias));
typedef float f32 __attribute__((aligned(1), may_alias));
typedef uint16_t u16 __attribute__((aligned(1), may_alias));
typedef int16_t i16 __attribute__((aligned(1), may_alias));

// Bit patterns of float. INFINITY_BITS are also all the exponent bits, which are above the 23 fraction bits.
constexpr uint32_t QUIET_NAN = 0x7FC00000, INFINITY_BITS = 0x7F800000, SMALLEST_NORMAL = 0x00800000;
constexpr int EXPONENT_SHIFT = 23, EXPONENT_BIAS = 127;
// Half of the last place that bfloat16 keeps: adding it and dropping 16 bits rounds to nearest, ties away from zero.
constexpr uint32_t HALF_BFLOAT16 = 0x8000;

template <class T> T largest_of(T left, T right) { return left > right ? left : right; }
template <class T> T smallest_of(T left, T right) { return left < right ? left : right; }

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline float root(float value) { return __builtin_sqrtf(value); }
inline double root(double value) { return __builtin_sqrt(value); }

// ---- dtypes: storage type and compute type ------------------------------------------------------------------------

struct float64 {
    typedef f64 word;
    static double decode(double value) { return value; }
    static double encode(double value) { return value; }
};

struct float32 {
    typedef f32 word;
    static float decode(float value) { return value; }
    static float encode(float value) { return value; }
};

struct bfloat16 {
    typedef u16 word;
    static float decode(uint16_t word) { return from_bits(uint32_t(word) << 16); }
    static uint16_t encode(float value) {  // to nearest even
        const uint32_t bits = bits_of(value);
        return uint16_t((value != value ? QUIET_NAN : bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
};

struct float16 {
    typedef u16 word;
    static float decode(uint16_t word) {
        const uint32_t magnitude = uint32_t(word & 0x7FFF) << 13, sign = uint32_t(word & 0x8000) << 16;
        // Decode a denormal as a normal float with the same fraction, then subtract the implied 1.
        const uint32_t denormal = bits_of(from_bits(magnitude + (113u << 23)) - from_bits(113u << 23));
        const uint32_t special = magnitude + (224u << 23), normal = magnitude + (112u << 23);
        return from_bits(sign | (magnitude < 1u << 23 ? denormal : magnitude >= 31u << 23 ? special : normal));
    }
    static uint16_t encode(float value) {  // to nearest even
        const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFF;
        // Adding 0.5 rounds a denormal into the low bits.
        const uint32_t denormal = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
        const uint32_t normal = (magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
        const uint32_t finite = magnitude < 113u << 23 ? denormal : normal;
        const uint32_t special = magnitude > INFINITY_BITS ? 0x7E00 : 0x7C00;
        return uint16_t((magnitude >= 0x477FF000 ? special : finite) | (bits >> 16 & 0x8000));
    }
};

struct int16 { typedef i16 word; };
struct uint16 { typedef u16 word; };
struct int8 { typedef signed char word; };
struct uint8 { typedef unsigned char word; };

// ---- rounding -----------------------------------------------------------------------------------------------------

inline uint32_t random_bits(uint32_t index, uint32_t key0, uint32_t key1) {
    uint32_t word = index ^ key0;
    word = (word ^ word >> 16) * 0x7FEB352D;
    word += key1;
    word = (word ^ word >> 15) * 0x846CA68B;
    return word ^ word >> 16;
}

// Every NaN becomes QUIET_NAN: an addend would overflow a NaN of all ones.
inline uint32_t canonical_bits(float value) { return value != value ? QUIET_NAN : bits_of(value); }

// Rounds stochastically with 16 random bits as addend, to nearest with HALF_BFLOAT16.
inline uint16_t round_to_bfloat16(float value, uint32_t addend) {
    return uint16_t((canonical_bits(value) + addend) >> 16);
}

}  // namespace adax
