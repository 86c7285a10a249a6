// Quantizes and dequantizes moments on the CPU, as quantization.py does on the GPU; the formats are described in
// adax_triton/update/quantization.py. u is m 2^(127 - E(v) // 2), about m / sqrt(v) times a constant.
//
// Groups are processed in batches of 16, one stage after the other for the whole batch. The CPU can then overlap the
// computations of the maxima of different groups.

#pragma once

#include "rounding.hpp"

namespace adax {

constexpr int BATCH = 16;  // groups
constexpr uint32_t MAX_DROPPED = EXPONENT_SHIFT - MIN_FRACTION_BITS, MAX_SCALE = MAX_STORED_SCALE;
constexpr uint32_t FRACTION_MASK = (1u << (SCALE_SHIFT - FRACTION_SHIFT)) - 1;
// Rounding offset, half a unit of a 7-bit code: a group whose largest code would round to 128 gets the next scale.
constexpr uint32_t HALF_CODE = 1u << (EXPONENT_SHIFT - 7);
// 1.5 * 2^23: adding it rounds a float in (-2^22, 2^22) to an integer in the low bits of its pattern.
constexpr float TO_INTEGER = 12582912.0f;
// bits(2^-k) = RECIPROCAL_BITS - bits(2^k)
constexpr uint32_t RECIPROCAL_BITS = 2u * EXPONENT_BIAS << EXPONENT_SHIFT;

// Moments of a batch of groups, before and after the update.
struct Moments {
    float exp_avg[BATCH][GROUP], exp_avg_sq[BATCH][GROUP];
    uint32_t random_or_rounded[BATCH][GROUP];  // random bits, then the rounded bits of exp_avg_sq
};

inline uint32_t code_offset(uint32_t exponent, uint32_t fraction) {
    return uint32_t(largest_of(int32_t((exponent + 1) << fraction) - MAX_V_CODE, 0));
}

// The bits of exp_avg_sq are (code + offset) << dropped, with an unsigned code.
template <class V_CODE>
void dequantize_group(
    const int8::word* exp_avg_codes, const typename V_CODE::word* exp_avg_sq_codes, uint32_t offset, uint32_t dropped,
    uint32_t scale, float* exp_avg, float* exp_avg_sq) {
#pragma omp simd
    for (int j = 0; j < GROUP; ++j) {
        const uint32_t bits = (uint32_t(exp_avg_sq_codes[j]) + offset) << dropped;
        exp_avg_sq[j] = from_bits(bits);
        const float unit = from_bits((bits >> 1 & INFINITY_BITS) + (scale << EXPONENT_SHIFT));
        exp_avg[j] = float(int32_t(exp_avg_codes[j])) * unit;
    }
}

// "8bit_v16"
inline void dequantize_moments(
    const int8::word* exp_avg, const uint16::word* exp_avg_sq, const uint8::word* exponents, int groups, Moments& m) {
    for (int g = 0; g < groups; ++g) {
        dequantize_group<uint16>(
            exp_avg + g * GROUP, exp_avg_sq + g * GROUP, 0, V16_DROPPED_BITS, exponents[g], m.exp_avg[g],
            m.exp_avg_sq[g]);
    }
}

// "8bit"
inline void dequantize_moments(
    const int8::word* exp_avg, const uint8::word* exp_avg_sq, const uint16::word* exponents, int groups, Moments& m) {
    for (int g = 0; g < groups; ++g) {
        const uint32_t word = exponents[g], fraction = (word >> FRACTION_SHIFT & FRACTION_MASK) + MIN_FRACTION_BITS;
        const uint32_t offset = code_offset(word & 0xFF, fraction), scale = (word >> SCALE_SHIFT) + MIN_SCALE;
        dequantize_group<uint8>(
            exp_avg + g * GROUP, exp_avg_sq + g * GROUP, offset, EXPONENT_SHIFT - fraction, scale, m.exp_avg[g],
            m.exp_avg_sq[g]);
    }
}

// Returns 2^(127 - E(v) // 2) from the stored bits of v; E is the exponent field. exp_avg times it is u.
inline float inverse_root(uint32_t stored_bits) {
    return from_bits(RECIPROCAL_BITS - (stored_bits >> 1 & INFINITY_BITS));
}

inline int32_t largest_magnitude(const float* u) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < GROUP; ++j) {
        const int32_t magnitude = int32_t(bits_of(u[j]) & 0x7FFFFFFF);
        largest = largest_of(largest, magnitude < int32_t(INFINITY_BITS) ? magnitude : 0);
    }
    return largest;
}

// Quantizes u, which m.exp_avg holds, and writes the groups' scales.
inline void quantize_u(
    const Moments& m, const int32_t* largest, int groups, uint32_t origin, int8::word* codes, uint32_t* scales) {
    for (int g = 0; g < groups; ++g) {
        scales[g] = largest_of((uint32_t(largest[g]) + HALF_CODE) >> EXPONENT_SHIFT, origin);
    }
    for (int g = 0; g < groups; ++g) {
        const float factor = from_bits((SCALE_ORIGIN + EXPONENT_BIAS - scales[g]) << EXPONENT_SHIFT);
#pragma omp simd
        for (int j = 0; j < GROUP; ++j) {
            codes[g * GROUP + j] = int8::word(bits_of(m.exp_avg[g][j] * factor + TO_INTEGER));
        }
        scales[g] -= origin;
    }
}

inline bool is_normal(uint32_t bits) { return bits - SMALLEST_NORMAL < INFINITY_BITS - SMALLEST_NORMAL; }

// "8bit_v16"
inline void quantize_moments(
    Moments& m, int groups, int8::word* exp_avg, uint16::word* exp_avg_sq, uint8::word* exponents) {
    int32_t largest[BATCH];
    uint32_t scales[BATCH];
    for (int g = 0; g < groups; ++g) {
#pragma omp simd
        for (int j = 0; j < GROUP; ++j) {
            const uint32_t bits = smallest_of(bits_of(m.exp_avg_sq[g][j]), QUIET_NAN);
            const uint32_t rounded = (bits + (m.random_or_rounded[g][j] >> (32 - V16_DROPPED_BITS))) >> V16_DROPPED_BITS;
            exp_avg_sq[g * GROUP + j] = uint16_t(rounded);
            m.exp_avg[g][j] = (is_normal(bits) ? m.exp_avg[g][j] : 0.0f) * inverse_root(rounded << V16_DROPPED_BITS);
        }
    }
    for (int g = 0; g < groups; ++g) largest[g] = largest_magnitude(m.exp_avg[g]);
    quantize_u(m, largest, groups, SCALE_ORIGIN, exp_avg, scales);
    for (int g = 0; g < groups; ++g) exponents[g] = uint8_t(scales[g]);
}

// Finds each group's largest finite v, or infinity if there is none, and the number of low bits that its codes drop.
inline void find_dropped_bits(Moments& m, int groups, int32_t* largest, uint32_t* dropped) {
    int32_t smallest[BATCH];
    for (int g = 0; g < groups; ++g) {
        int32_t max_bits = -1, min_bits = INT32_MAX;
#pragma omp simd reduction(max : max_bits) reduction(min : min_bits)
        for (int j = 0; j < GROUP; ++j) {
            const int32_t bits = int32_t(smallest_of(bits_of(m.exp_avg_sq[g][j]), QUIET_NAN));
            max_bits = largest_of(max_bits, bits < int32_t(INFINITY_BITS) ? bits : -1);
            min_bits = smallest_of(min_bits, bits);
        }
        largest[g] = max_bits, smallest[g] = min_bits;
    }
    for (int g = 0; g < groups; ++g) {
        largest[g] = largest[g] < 0 ? int32_t(INFINITY_BITS) : largest[g];
        const int32_t range = (largest[g] >> EXPONENT_SHIFT) - (smallest_of(smallest[g], largest[g]) >> EXPONENT_SHIFT);
        // Exponent ranges that leave room for 4, 5 and 6 fraction bits.
        dropped[g] = MAX_DROPPED - (range <= 13) - (range <= 5) - (range <= 1);
    }
}

// "8bit"
inline void quantize_moments(
    Moments& m, int groups, int8::word* exp_avg, uint8::word* exp_avg_sq, uint16::word* exponents) {
    int32_t largest[BATCH];
    uint32_t dropped[BATCH], top_exponents[BATCH], offsets[BATCH], scales[BATCH];
    find_dropped_bits(m, groups, largest, dropped);
    for (int g = 0; g < groups; ++g) {
        const uint32_t limit = uint32_t(largest[g]), low_bits = dropped[g];
        int32_t max_rounded = 0;
#pragma omp simd reduction(max : max_rounded)
        for (int j = 0; j < GROUP; ++j) {
            const uint32_t bits = bits_of(m.exp_avg_sq[g][j]);
            const uint32_t rounded = (smallest_of(bits, limit) + (m.random_or_rounded[g][j] >> (32 - low_bits))) >> low_bits;
            m.exp_avg[g][j] = is_normal(bits) ? m.exp_avg[g][j] : 0.0f;
            m.random_or_rounded[g][j] = rounded;
            max_rounded = largest_of(max_rounded, int32_t(rounded));
        }
        top_exponents[g] = uint32_t(max_rounded);
    }
    for (int g = 0; g < groups; ++g) {
        top_exponents[g] >>= EXPONENT_SHIFT - dropped[g];
        offsets[g] = code_offset(top_exponents[g], EXPONENT_SHIFT - dropped[g]);
    }
    for (int g = 0; g < groups; ++g) {
        const int32_t offset = int32_t(offsets[g]);
        const uint32_t low_bits = dropped[g];
#pragma omp simd
        for (int j = 0; j < GROUP; ++j) {
            // Code 0 is reserved for moments that were never updated.
            const int32_t code = largest_of(int32_t(m.random_or_rounded[g][j]) - offset, 1);
            exp_avg_sq[g * GROUP + j] = uint8_t(code);
            m.exp_avg[g][j] *= inverse_root(uint32_t(code + offset) << low_bits);
        }
    }
    for (int g = 0; g < groups; ++g) largest[g] = largest_magnitude(m.exp_avg[g]);
    quantize_u(m, largest, groups, SCALE_ORIGIN + MIN_SCALE, exp_avg, scales);
    for (int g = 0; g < groups; ++g) {
        exponents[g] = uint16_t(
            smallest_of(scales[g], MAX_SCALE) << SCALE_SHIFT | (MAX_DROPPED - dropped[g]) << FRACTION_SHIFT |
            top_exponents[g]);
    }
}

}  // namespace adax
