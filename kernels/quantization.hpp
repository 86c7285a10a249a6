// The codes of compact states; formats and reasons are in adax_triton/update/quantization.py. The twin of quantization.py.
//
// Groups are taken many at a time, and each stage for all of them before the next: what one group waits for, such as
// its largest element, is then found while others are worked on.

#pragma once

#include "rounding.hpp"

namespace adax {

constexpr int BATCH = 16;  // groups

// Moments of some groups, before and after the update, and the random bits of their elements.
struct Moments {
    float exp_avg[BATCH][GROUP], exp_avg_sq[BATCH][GROUP];
    uint32_t random[BATCH][GROUP];
};

inline uint32_t code_start(uint32_t exponent, uint32_t fraction) {
    return uint32_t(largest_of(int32_t((exponent + 1) << fraction) - 255, 0));
}

// Codes of exp_avg_sq are unsigned: (code + start) << dropped are the bits of a float32.
template <class SECOND>
void decode_group(
    const int8::word* first, const typename SECOND::word* second, uint32_t start, uint32_t dropped, uint32_t scale,
    float* exp_avg, float* exp_avg_sq) {
#pragma omp simd
    for (int j = 0; j < GROUP; ++j) {
        const uint32_t bits = (uint32_t(second[j]) + start) << dropped;
        exp_avg_sq[j] = from_bits(bits);
        exp_avg[j] = float(int32_t(first[j])) * from_bits((bits >> 1 & 0x7F800000) + (scale << 23));
    }
}

inline void decode(
    const int8::word* first, const uint16::word* second, const uint8::word* exponents, int groups, Moments& m) {
    for (int g = 0; g < groups; ++g) {
        decode_group<uint16>(first + g * GROUP, second + g * GROUP, 0, 15, exponents[g], m.exp_avg[g], m.exp_avg_sq[g]);
    }
}

inline void decode(
    const int8::word* first, const uint8::word* second, const uint16::word* exponents, int groups, Moments& m) {
    for (int g = 0; g < groups; ++g) {
        const uint32_t word = exponents[g], fraction = (word >> 8 & 3) + 3;
        const uint32_t start = code_start(word & 0xFF, fraction), scale = (word >> 10) + 48;
        decode_group<uint8>(
            first + g * GROUP, second + g * GROUP, start, 23 - fraction, scale, m.exp_avg[g], m.exp_avg_sq[g]);
    }
}

// What exp_avg is stored over: nearly the root of exp_avg_sq, of which these are the stored bits.
inline float inverse_root(uint32_t stored_bits) { return from_bits(0x7F000000 - (stored_bits >> 1 & 0x7F800000)); }

inline int32_t largest_magnitude(const float* directions) {
    int32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int j = 0; j < GROUP; ++j) {
        const int32_t magnitude = int32_t(bits_of(directions[j]) & 0x7FFFFFFF);
        largest = largest_of(largest, magnitude < int32_t(INFINITY_BITS) ? magnitude : 0);
    }
    return largest;
}

// Stores exp_avg, over the root of exp_avg_sq by now, in the scales of the groups, and returns these.
inline void encode_directions(
    const Moments& m, const int32_t* largest, int groups, uint32_t origin, int8::word* first, uint32_t* scales) {
    for (int g = 0; g < groups; ++g) {
        // The addend raises the scale where the largest would be rounded to 128.
        scales[g] = largest_of((uint32_t(largest[g]) + 0x10000) >> 23, origin);
    }
    for (int g = 0; g < groups; ++g) {
        const float factor = from_bits((260 - scales[g]) << 23);
#pragma omp simd
        for (int j = 0; j < GROUP; ++j) {
            // The addend leaves the nearest integer in the low bits of the pattern.
            first[g * GROUP + j] = int8::word(bits_of(m.exp_avg[g][j] * factor + 12582912.0f));
        }
        scales[g] -= origin;
    }
}

inline bool is_normal(uint32_t bits) { return bits - SMALLEST_NORMAL < INFINITY_BITS - SMALLEST_NORMAL; }

inline void encode(Moments& m, int groups, int8::word* first, uint16::word* second, uint8::word* exponents) {
    int32_t largest[BATCH];
    uint32_t scales[BATCH];
    for (int g = 0; g < groups; ++g) {
#pragma omp simd
        for (int j = 0; j < GROUP; ++j) {
            const uint32_t bits = smallest_of(bits_of(m.exp_avg_sq[g][j]), QUIET_NAN);
            const uint32_t rounded = (bits + (m.random[g][j] >> 17)) >> 15;
            second[g * GROUP + j] = uint16_t(rounded);
            m.exp_avg[g][j] = (is_normal(bits) ? m.exp_avg[g][j] : 0.0f) * inverse_root(rounded << 15);
        }
    }
    for (int g = 0; g < groups; ++g) largest[g] = largest_magnitude(m.exp_avg[g]);
    encode_directions(m, largest, groups, 133, first, scales);
    for (int g = 0; g < groups; ++g) exponents[g] = uint8_t(scales[g]);
}

// Finds the bits of exp_avg_sq, at most the largest finite one, and how many of them each group drops.
inline void find_dropped(Moments& m, int groups, int32_t* largest, uint32_t* dropped) {
    int32_t smallest[BATCH];
    for (int g = 0; g < groups; ++g) {
        int32_t most = -1, least = INT32_MAX;
#pragma omp simd reduction(max : most) reduction(min : least)
        for (int j = 0; j < GROUP; ++j) {
            const int32_t bits = int32_t(smallest_of(bits_of(m.exp_avg_sq[g][j]), QUIET_NAN));
            most = largest_of(most, bits < int32_t(INFINITY_BITS) ? bits : -1);
            least = smallest_of(least, bits);
        }
        largest[g] = most, smallest[g] = least;
    }
    for (int g = 0; g < groups; ++g) {
        largest[g] = largest[g] < 0 ? int32_t(INFINITY_BITS) : largest[g];
        const int32_t octaves = (largest[g] >> 23) - (smallest_of(smallest[g], largest[g]) >> 23);
        dropped[g] = 20u - (octaves <= 13) - (octaves <= 5) - (octaves <= 1);
    }
}

inline void encode(Moments& m, int groups, int8::word* first, uint8::word* second, uint16::word* exponents) {
    int32_t largest[BATCH];
    uint32_t dropped[BATCH], top[BATCH], starts[BATCH], scales[BATCH];
    find_dropped(m, groups, largest, dropped);
    for (int g = 0; g < groups; ++g) {
        const uint32_t limit = uint32_t(largest[g]), low_bits = dropped[g];
        int32_t most = 0;
#pragma omp simd reduction(max : most)
        for (int j = 0; j < GROUP; ++j) {
            const uint32_t bits = bits_of(m.exp_avg_sq[g][j]);
            const uint32_t rounded = (smallest_of(bits, limit) + (m.random[g][j] >> (32 - low_bits))) >> low_bits;
            m.exp_avg[g][j] = is_normal(bits) ? m.exp_avg[g][j] : 0.0f;
            m.random[g][j] = rounded;
            most = largest_of(most, int32_t(rounded));
        }
        top[g] = uint32_t(most);
    }
    for (int g = 0; g < groups; ++g) {
        top[g] >>= 23 - dropped[g];
        starts[g] = code_start(top[g], 23 - dropped[g]);
    }
    for (int g = 0; g < groups; ++g) {
        const int32_t start = int32_t(starts[g]);
        const uint32_t low_bits = dropped[g];
#pragma omp simd
        for (int j = 0; j < GROUP; ++j) {
            const int32_t code = largest_of(int32_t(m.random[g][j]) - start, 1);  // 0 was written by no step
            second[g * GROUP + j] = uint8_t(code);
            m.exp_avg[g][j] *= inverse_root(uint32_t(code + start) << low_bits);
        }
    }
    for (int g = 0; g < groups; ++g) largest[g] = largest_magnitude(m.exp_avg[g]);
    encode_directions(m, largest, groups, 133 + 48, first, scales);
    for (int g = 0; g < groups; ++g) {
        exponents[g] = uint16_t(smallest_of(scales[g], 63u) << 10 | (20 - dropped[g]) << 8 | top[g]);
    }
}

}  // namespace adax
