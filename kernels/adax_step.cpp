// Fused AdaX update on the CPU: one call updates every tensor of an address table, as adax_step.py does on the GPU.
//
// Each variant is compiled with these macros, the macros of tables.definitions() and CHUNK_SIZE:
//     PARAM, GRAD     float32, bfloat16, float16 or float64
//     STATES          full_precision, bfloat16_moments, moments_8bit_v16 or moments_8bit
//     MASTER          no_master, int16_remainder, int8_remainder or float32_copy
//     STOCHASTIC, PARAM_IS_COPY, TELEMETRY    0 or 1
// The compiler vectorizes the loops over a group. It needs -ffp-contract=off, so that results match the reference.

#include "quantization.hpp"
#include "rounding.hpp"

namespace adax {

enum States { full_precision, bfloat16_moments, moments_8bit_v16, moments_8bit };
enum Master { no_master, int16_remainder, int8_remainder, float32_copy };

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
template <bool CHOICE, class A, class B> struct choose { using type = A; };
template <class A, class B> struct choose<false, A, B> { using type = B; };
template <bool CHOICE, class A, class B> using conditional_t = typename choose<CHOICE, A, B>::type;

constexpr States STATE_FORMAT = STATES;
constexpr Master MASTER_FORMAT = MASTER;
constexpr bool FLOAT64 = same<PARAM, float64>;
constexpr bool QUANTIZED = STATE_FORMAT == moments_8bit_v16 || STATE_FORMAT == moments_8bit;
constexpr bool HAS_REMAINDER = MASTER_FORMAT == int16_remainder || MASTER_FORMAT == int8_remainder;
constexpr bool NEEDS_RANDOM_BITS = STATE_FORMAT != full_precision || STOCHASTIC || MASTER_FORMAT == int8_remainder;

static_assert(MASTER_FORMAT == no_master || !(FLOAT64 || STOCHASTIC), "float64 and stochastic exclude a master");
static_assert(STATE_FORMAT == full_precision || !FLOAT64, "float64 parameters need float64 states");
static_assert(!STOCHASTIC || same<PARAM, bfloat16>, "stochastic rounding needs bfloat16 parameters");
static_assert(!HAS_REMAINDER || same<PARAM, bfloat16>, "int16 and int8 remainders need bfloat16 parameters");
static_assert(!PARAM_IS_COPY || MASTER_FORMAT == float32_copy, "a parameter that is a copy needs a float32 master");

typedef conditional_t<FLOAT64, double, float> compute_t;  // dtype of all arithmetic
// These are structs: a word type as template argument would lose its attributes (aligned, may_alias).
using full_dtype = conditional_t<FLOAT64, float64, float32>;
using moment_dtype = conditional_t<STATE_FORMAT == bfloat16_moments, bfloat16, full_dtype>;
using exp_avg_dtype = conditional_t<QUANTIZED, int8, moment_dtype>;
using exp_avg_sq_dtype = conditional_t<QUANTIZED, conditional_t<STATE_FORMAT == moments_8bit_v16, uint16, uint8>, moment_dtype>;
using exponents_dtype = conditional_t<STATE_FORMAT == moments_8bit_v16, uint8, uint16>;
using master_dtype =
    conditional_t<MASTER_FORMAT == int16_remainder, int16, conditional_t<MASTER_FORMAT == int8_remainder, int8, float32>>;

// ---- tables -------------------------------------------------------------------------------------------------------

struct Scalars {
    compute_t step_size, one_minus_beta1, exp_avg_sq_weight, eps, decay, l2, grad_factor;
    uint32_t key0, key1;
    bool skip;

    explicit Scalars(const compute_t* row)
        : step_size(row[STEP_SIZE_COLUMN]),
          one_minus_beta1(row[ONE_MINUS_BETA1_COLUMN]),
          exp_avg_sq_weight(row[EXP_AVG_SQ_WEIGHT_COLUMN]),
          eps(row[EPS_COLUMN]),
          decay(row[DECAY_COLUMN]),
          l2(row[L2_COLUMN]),
          grad_factor(row[GRAD_FACTOR_COLUMN]),
          skip(row[SKIP_COLUMN] != 0) {
        memcpy(&key0, row + RANDOM_KEY0_COLUMN, sizeof key0);
        memcpy(&key1, row + RANDOM_KEY1_COLUMN, sizeof key1);
    }
};

template <class DTYPE> typename DTYPE::word* pointer_to(const int64_t* row, int column, int64_t start) {
    return reinterpret_cast<typename DTYPE::word*>(row[column]) + start;
}

struct Pointers {
    PARAM::word* param;
    const GRAD::word* grad;
    exp_avg_dtype::word* exp_avg;
    exp_avg_sq_dtype::word* exp_avg_sq;
    master_dtype::word* master = nullptr;
    exponents_dtype::word* exponents = nullptr;

    Pointers(const int64_t* row, int64_t start)
        : param(pointer_to<PARAM>(row, PARAM_COLUMN, start)),
          grad(pointer_to<GRAD>(row, GRAD_COLUMN, start)),
          exp_avg(pointer_to<exp_avg_dtype>(row, EXP_AVG_COLUMN, start)),
          exp_avg_sq(pointer_to<exp_avg_sq_dtype>(row, EXP_AVG_SQ_COLUMN, start)) {
        if (MASTER_FORMAT != no_master) master = pointer_to<master_dtype>(row, MASTER_COLUMN, start);
        if (QUANTIZED) exponents = pointer_to<exponents_dtype>(row, GROUP_EXPONENTS_COLUMN, start / GROUP);
    }
    void advance(int groups) {
        param += groups * GROUP, grad += groups * GROUP, exp_avg += groups * GROUP, exp_avg_sq += groups * GROUP;
        if (MASTER_FORMAT != no_master) master += groups * GROUP;
        if (QUANTIZED) exponents += groups;
    }
};

// One sum per lane, so that results do not depend on the vector width.
struct Sums {
    compute_t lanes[SUM_COLUMNS][GROUP];

    void add(int j, compute_t grad, compute_t before, compute_t after) {
        const compute_t update = after - before;
        lanes[GRAD_SQUARES_COLUMN][j] += grad * grad;
        lanes[UPDATE_SQUARES_COLUMN][j] += update * update;
        lanes[PARAM_SQUARES_COLUMN][j] += after * after;
        lanes[UNCHANGED_COLUMN][j] += update == 0 ? compute_t(1) : compute_t(0);
        lanes[NONFINITE_GRADS_COLUMN][j] += grad - grad != 0 ? compute_t(1) : compute_t(0);
    }
    void store(compute_t* row) const {
        for (int column = 0; column < SUM_COLUMNS; ++column) {
            double sum = 0;
            for (int j = 0; j < GROUP; ++j) sum += lanes[column][j];
            row[column] = compute_t(sum);
        }
    }
};

// ---- weights and master weights; see adax_triton/update/quantized_update.py ---------------------------------------

inline compute_t load_weight(const Pointers& a, int j, int32_t remainder) {
    if constexpr (PARAM_IS_COPY) {
        return a.master[j];
    } else if constexpr (MASTER_FORMAT == float32_copy) {
        const float weight = PARAM::decode(a.param[j]), master = a.master[j];
        return PARAM::decode(PARAM::encode(master)) == weight ? master : weight;
    } else if constexpr (HAS_REMAINDER) {
        const float weight = PARAM::decode(a.param[j]);
        const int shift = MASTER_FORMAT == int8_remainder ? 8 : 0;
        const float joined = from_bits(bits_of(weight) + (uint32_t(remainder) << shift));
        return joined != joined ? weight : joined;
    } else {
        return PARAM::decode(a.param[j]);
    }
}

// Stores a weight and returns it as load_weight will read it back.
inline compute_t store_weight(const Pointers& a, int j, compute_t weight, uint32_t random, int32_t& remainder) {
    if constexpr (HAS_REMAINDER) {
        const uint32_t bits = canonical_bits(weight) + (MASTER_FORMAT == int8_remainder ? random & 0xFF : 0);
        a.param[j] = uint16_t((bits + HALF_BFLOAT16) >> 16);
        remainder = int32_t(MASTER_FORMAT == int8_remainder ? bits >> 8 : bits);
        return from_bits(MASTER_FORMAT == int8_remainder ? bits & 0xFFFFFF00 : bits);
    } else if constexpr (STOCHASTIC) {
        const uint16_t rounded = round_to_bfloat16(weight, random & 0xFFFF);
        a.param[j] = rounded;
        return PARAM::decode(rounded);
    } else {
        const auto rounded = PARAM::encode(weight);
        a.param[j] = rounded;
        if constexpr (MASTER_FORMAT == no_master) return PARAM::decode(rounded);
        a.master[j] = weight;
        return weight;
    }
}

// ---- the update ---------------------------------------------------------------------------------------------------

inline void update(const Scalars& s, compute_t raw_grad, compute_t& weight, compute_t& exp_avg, compute_t& exp_avg_sq) {
    const compute_t scaled = raw_grad * s.grad_factor, regularised = scaled + weight * s.l2;
    const compute_t grad = s.l2 == 0 ? scaled : regularised;  // 0 * inf would be NaN
    exp_avg = exp_avg + (grad - exp_avg) * s.one_minus_beta1;
    exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * s.exp_avg_sq_weight;
    weight = weight - (weight * s.decay + exp_avg / (root(exp_avg_sq) + s.eps) * s.step_size);
}

struct DecodedGroups : Moments {
    int32_t remainder[BATCH * GROUP];
};

// Updates one group. Its 8-bit data is already decoded in group `g` of `decoded`: byte loads here would halve the vector
// width.
template <class POINTERS>
inline void update_group(const POINTERS a, const Scalars s, uint32_t index, DecodedGroups& decoded, int g, Sums& sums) {
#pragma omp simd
    for (int j = 0; j < GROUP; ++j) {
        const compute_t grad = compute_t(GRAD::decode(a.grad[j]));
        const compute_t before = load_weight(a, j, decoded.remainder[g * GROUP + j]);
        compute_t weight = before, exp_avg, exp_avg_sq;
        if constexpr (QUANTIZED) {
            exp_avg = decoded.exp_avg[g][j], exp_avg_sq = decoded.exp_avg_sq[g][j];
        } else {
            exp_avg = moment_dtype::decode(a.exp_avg[j]), exp_avg_sq = moment_dtype::decode(a.exp_avg_sq[j]);
        }
        update(s, grad, weight, exp_avg, exp_avg_sq);
        // The upper 16 random bits round exp_avg_sq, the lower 16 the parameter.
        const uint32_t random = NEEDS_RANDOM_BITS ? random_bits(index + uint32_t(j), s.key0, s.key1) : 0;
        const compute_t stored = store_weight(a, j, weight, random, decoded.remainder[g * GROUP + j]);
        if constexpr (QUANTIZED) {
            decoded.exp_avg[g][j] = exp_avg, decoded.exp_avg_sq[g][j] = exp_avg_sq, decoded.random_or_rounded[g][j] = random;
        } else if constexpr (STATE_FORMAT == bfloat16_moments) {
            a.exp_avg[j] = round_to_bfloat16(exp_avg, HALF_BFLOAT16);
            a.exp_avg_sq[j] = round_to_bfloat16(exp_avg_sq, random >> 16);
        } else {
            a.exp_avg[j] = exp_avg, a.exp_avg_sq[j] = exp_avg_sq;
        }
        if constexpr (TELEMETRY) sums.add(j, grad, before, stored);
    }
}

template <class POINTERS>
void update_groups(POINTERS a, const Scalars& s, uint32_t index, int64_t groups, Sums& sums) {
    DecodedGroups decoded;
    for (int64_t left = groups; left > 0; left -= BATCH) {
        const int count = int(smallest_of(left, int64_t(BATCH)));
        if constexpr (QUANTIZED) dequantize_moments(a.exp_avg, a.exp_avg_sq, a.exponents, count, decoded);
        if constexpr (HAS_REMAINDER) {
            for (int j = 0; j < count * GROUP; ++j) decoded.remainder[j] = a.master[j];
        }
        POINTERS group = a;
        for (int g = 0; g < count; ++g, index += GROUP, group.advance(1)) {
            update_group(group, s, index, decoded, g, sums);
        }
        if constexpr (HAS_REMAINDER) {
            for (int j = 0; j < count * GROUP; ++j) a.master[j] = master_dtype::word(decoded.remainder[j]);
        }
        if constexpr (QUANTIZED) quantize_moments(decoded, count, a.exp_avg, a.exp_avg_sq, a.exponents);
        a.advance(count);
    }
}

// Copy of fewer than 32 elements, padded with zeros. It replaces the pointer, and `store` writes the copy back.
template <class DTYPE> struct Padded {
    typedef typename DTYPE::word word;
    word* original;
    unsigned char copy[GROUP * sizeof(word)] = {};

    Padded(word*& pointer, int64_t count) : original(pointer) {
        if (pointer == nullptr) return;
        memcpy(copy, pointer, size_t(count) * sizeof(word));
        pointer = reinterpret_cast<word*>(copy);
    }
    void store(int64_t count) const {
        if (original != nullptr) memcpy(original, copy, size_t(count) * sizeof(word));
    }
};

// Adds `count` elements to the telemetry sums. `before` points to the old tensors, `after` to the new ones.
inline void add_sums(const Pointers& before, const Pointers& after, int64_t count, Sums& sums) {
    for (int j = 0; j < count; ++j) {
        const compute_t old_weight = load_weight(before, j, HAS_REMAINDER ? int32_t(before.master[j]) : 0);
        const compute_t weight = load_weight(after, j, HAS_REMAINDER ? int32_t(after.master[j]) : 0);
        sums.add(j, compute_t(GRAD::decode(before.grad[j])), old_weight, weight);
    }
}

// Updates the last group of a tensor if it has fewer than 32 elements: pads it with zeros.
__attribute__((noinline)) void update_partial_group(
    Pointers a, const Scalars& s, uint32_t index, int64_t count, Sums& sums) {
    const Pointers before = a;
    Padded<PARAM> param(a.param, count);
    Padded<exp_avg_dtype> exp_avg(a.exp_avg, count);
    Padded<exp_avg_sq_dtype> exp_avg_sq(a.exp_avg_sq, count);
    Padded<master_dtype> master(a.master, count);
    unsigned char grad[GROUP * sizeof(GRAD::word)] = {};
    memcpy(grad, a.grad, size_t(count) * sizeof(GRAD::word));
    a.grad = reinterpret_cast<const GRAD::word*>(grad);
    Sums unused = {};
    update_groups(a, s, index, 1, unused);
    if (TELEMETRY) add_sums(before, a, count, sums);
    param.store(count), exp_avg.store(count), exp_avg_sq.store(count), master.store(count);
}

// ---- chunks and threads -------------------------------------------------------------------------------------------

// The chunks of one thread. Each range has its own cache line, because any thread may write its `next`.
struct ChunkRange {
    alignas(64) int64_t next;
    int64_t end;
};

struct Job {
    const int64_t *tensors, *chunks;
    const void* scalars;
    void* results;
    void (*run)(const Job&, int64_t);
    ChunkRange* ranges;
    int range_count;

    const int64_t* row(int64_t i) const { return tensors + (chunks[i] >> CHUNK_BITS) * TENSOR_COLUMNS; }
    int64_t start(int64_t i) const { return (chunks[i] & ((int64_t(1) << CHUNK_BITS) - 1)) * CHUNK_SIZE; }
    int64_t elements(int64_t i) const { return smallest_of(row(i)[NUMEL_COLUMN] - start(i), int64_t(CHUNK_SIZE)); }
};

void step_chunk(const Job& job, int64_t i) {
    const int64_t *row = job.row(i), start = job.start(i), count = job.elements(i), groups = count / GROUP;
    const Scalars scalars(static_cast<const compute_t*>(job.scalars) + row[SCALAR_ROW_COLUMN] * SCALAR_COLUMNS);
    Pointers pointers(row, start);
    const uint32_t index = uint32_t(row[FIRST_ELEMENT_COLUMN] + start);
    Sums sums;
    if (TELEMETRY) sums = {};
    if (!scalars.skip) {
        update_groups(pointers, scalars, index, groups, sums);
        pointers.advance(int(groups));
        const int64_t left = count % GROUP;
        if (left > 0) update_partial_group(pointers, scalars, index + uint32_t(groups * GROUP), left, sums);
    } else if (TELEMETRY) {
        for (int64_t left = count; left > 0; left -= GROUP, pointers.advance(1)) {
            add_sums(pointers, pointers, smallest_of(left, int64_t(GROUP)), sums);
        }
    }
    if (TELEMETRY) sums.store(static_cast<compute_t*>(job.results) + i * SUM_COLUMNS);
}

void square_chunk(const Job& job, int64_t i) {
    const GRAD::word* grad = pointer_to<GRAD>(job.row(i), GRAD_COLUMN, job.start(i));
    double lanes[GROUP] = {};
    int64_t left = job.elements(i);
    for (; left >= GROUP; left -= GROUP, grad += GROUP) {
#pragma omp simd
        for (int j = 0; j < GROUP; ++j) lanes[j] += double(GRAD::decode(grad[j])) * double(GRAD::decode(grad[j]));
    }
    for (int j = 0; j < left; ++j) lanes[j] += double(GRAD::decode(grad[j])) * double(GRAD::decode(grad[j]));
    double sum = 0;
    for (int j = 0; j < GROUP; ++j) sum += lanes[j];
    static_cast<double*>(job.results)[i] = sum;
}

// These functions are those of the OpenMP runtime that PyTorch loaded. Linking OpenMP might load a second runtime, with
// more threads.
static void (*run_in_parallel)(void (*)(void*), void*, unsigned, unsigned);
static int (*thread_number)();

void take_chunks(void* data) {
    const Job& job = *static_cast<const Job*>(data);
    const int thread = thread_number();
    // A thread that has finished its own range takes chunks of the other ranges.
    for (int k = 0; k < job.range_count; ++k) {
        ChunkRange& range = job.ranges[(thread + k) % job.range_count];
        for (int64_t i; (i = __atomic_fetch_add(&range.next, 1, __ATOMIC_RELAXED)) < range.end;) job.run(job, i);
    }
}

constexpr int MAX_RANGES = 512;
// Both count elements. Below PARALLEL_FROM one thread is faster, because waking a second one takes longer. CHUNK_COST is
// the cost of looking up a chunk.
constexpr int64_t PARALLEL_FROM = 32768, CHUNK_COST = 64;

void run_chunks(Job& job, int64_t chunk_count, int threads) {
    int64_t total = 0;
    if (threads > 1 && run_in_parallel != nullptr) {
        for (int64_t i = 0; i < chunk_count; ++i) total += job.elements(i) + CHUNK_COST;
    }
    if (total < PARALLEL_FROM) {
        for (int64_t i = 0; i < chunk_count; ++i) job.run(job, i);
        return;
    }
    ChunkRange ranges[MAX_RANGES];
    job.ranges = ranges;
    job.range_count = smallest_of(threads, MAX_RANGES);
    int64_t chunk = 0, before = 0;
    for (int k = 0; k < job.range_count; ++k) {
        ranges[k].next = chunk;
        const bool last = k + 1 == job.range_count;
        for (; chunk < chunk_count && (last || before < total / job.range_count * (k + 1)); ++chunk) {
            before += job.elements(chunk) + CHUNK_COST;
        }
        ranges[k].end = chunk;
    }
    run_in_parallel(take_chunks, &job, unsigned(job.range_count), 0);
}

}  // namespace adax

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Sets GOMP_parallel and omp_get_thread_num of an OpenMP runtime; its threads run later calls. Without them the calling
// thread does all the work.
EXPORTED void use_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*number_of_thread)()) {
    adax::run_in_parallel = parallel;
    adax::thread_number = number_of_thread;
}

// Updates every tensor of a table in place; see adax_step in adax_step.py. Scalars and sums are float32, or float64 for
// float64 parameters. A variant with telemetry writes chunk_sums, (chunk_count, SUM_COLUMNS).
EXPORTED void adax_step(
    const int64_t* tensors, const int64_t* chunks, int64_t chunk_count, const void* scalars, void* chunk_sums,
    int threads) {
    adax::Job job = {tensors, chunks, scalars, chunk_sums, adax::step_chunk, nullptr, 0};
    adax::run_chunks(job, chunk_count, threads);
}

// Writes the sum of squares of each chunk's gradients to partials, (chunk_count,).
EXPORTED void sum_of_squares(
    const int64_t* tensors, const int64_t* chunks, int64_t chunk_count, double* partials, int threads) {
    adax::Job job = {tensors, chunks, nullptr, partials, adax::square_chunk, nullptr, 0};
    adax::run_chunks(job, chunk_count, threads);
}

EXPORTED const char* instruction_set() {
#if defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__x86_64__)
    return "baseline x86-64";
#elif defined(__ARM_FEATURE_SVE)
    return "SVE";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "baseline";
#endif
}
