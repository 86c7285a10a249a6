// The fused update on a CPU: one call for any number of tensors, reached by address. The twin of adax_step.py.
//
// A variant is compiled from these definitions, in addition to those of tables.py and CHUNK_SIZE:
//     PARAM, GRAD     float32, bfloat16, float16 or float64
//     STATES          full, bfloat16_moments, moments_8bit_v16 or moments_8bit
//     MASTER          no_master, int16_rest, int8_rest or float32_copy
//     STOCHASTIC, PARAM_IS_COPY, TELEMETRY    0 or 1
// The loops over a group are written for the compiler to vectorise. It must not contract products and sums.

#include "quantization.hpp"
#include "rounding.hpp"

namespace adax {

enum States { full, bfloat16_moments, moments_8bit_v16, moments_8bit };
enum Master { no_master, int16_rest, int8_rest, float32_copy };

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;
template <bool CHOICE, class A, class B> struct choose { using type = A; };
template <class A, class B> struct choose<false, A, B> { using type = B; };
template <bool CHOICE, class A, class B> using either = typename choose<CHOICE, A, B>::type;

constexpr States KEPT = STATES;
constexpr Master MASTER_KEPT = MASTER;
constexpr bool FLOAT64 = same<PARAM, float64>, CODES = KEPT == moments_8bit_v16 || KEPT == moments_8bit;
constexpr bool HAS_REST = MASTER_KEPT == int16_rest || MASTER_KEPT == int8_rest;
constexpr bool RANDOM = KEPT != full || STOCHASTIC || MASTER_KEPT == int8_rest;

static_assert(!FLOAT64 || (KEPT == full && MASTER_KEPT == no_master), "float64 parameters have plain states");
static_assert(!STOCHASTIC || (same<PARAM, bfloat16> && MASTER_KEPT == no_master), "only bfloat16 without a master");
static_assert(!HAS_REST || same<PARAM, bfloat16>, "a remainder is that of bfloat16");
static_assert(!PARAM_IS_COPY || MASTER_KEPT == float32_copy, "the weight is the float32 master");

typedef either<FLOAT64, double, float> number;  // what the update is computed in
// Classes, because a template argument would lose the attributes of a word.
using full_dtype = either<FLOAT64, float64, float32>;
using moment_dtype = either<KEPT == bfloat16_moments, bfloat16, full_dtype>;
using exp_avg_dtype = either<CODES, int8, moment_dtype>;
using exp_avg_sq_dtype = either<CODES, either<KEPT == moments_8bit_v16, uint16, uint8>, moment_dtype>;
using exponents_dtype = either<KEPT == moments_8bit_v16, uint8, uint16>;
using master_dtype = either<MASTER_KEPT == int16_rest, int16, either<MASTER_KEPT == int8_rest, int8, float32>>;

// ---- tables -------------------------------------------------------------------------------------------------------

struct Scalars {
    number step_size, one_minus_beta1, exp_avg_sq_weight, eps, decay, l2, grad_factor;
    uint32_t key0, key1;
    bool skip;

    explicit Scalars(const number* row)
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

template <class DTYPE> typename DTYPE::word* array(const int64_t* row, int column, int64_t start) {
    return reinterpret_cast<typename DTYPE::word*>(row[column]) + start;
}

struct Arrays {
    PARAM::word* param;
    const GRAD::word* grad;
    exp_avg_dtype::word* exp_avg;
    exp_avg_sq_dtype::word* exp_avg_sq;
    master_dtype::word* master = nullptr;
    exponents_dtype::word* exponents = nullptr;

    Arrays(const int64_t* row, int64_t start)
        : param(array<PARAM>(row, PARAM_COLUMN, start)),
          grad(array<GRAD>(row, GRAD_COLUMN, start)),
          exp_avg(array<exp_avg_dtype>(row, EXP_AVG_COLUMN, start)),
          exp_avg_sq(array<exp_avg_sq_dtype>(row, EXP_AVG_SQ_COLUMN, start)) {
        if (MASTER_KEPT != no_master) master = array<master_dtype>(row, MASTER_COLUMN, start);
        if (CODES) exponents = array<exponents_dtype>(row, GROUP_EXPONENTS_COLUMN, start / GROUP);
    }
    void advance(int groups) {
        param += groups * GROUP, grad += groups * GROUP, exp_avg += groups * GROUP, exp_avg_sq += groups * GROUP;
        if (MASTER_KEPT != no_master) master += groups * GROUP;
        if (CODES) exponents += groups;
    }
};

// Lane by lane, so that the same bits come out whatever the width of the vectors.
struct Sums {
    number lanes[SUM_COLUMNS][GROUP];

    void add(int j, number grad, number before, number after) {
        const number update = after - before;
        lanes[GRAD_SQUARES_COLUMN][j] += grad * grad;
        lanes[UPDATE_SQUARES_COLUMN][j] += update * update;
        lanes[PARAM_SQUARES_COLUMN][j] += after * after;
        lanes[UNCHANGED_COLUMN][j] += update == 0 ? number(1) : number(0);
        lanes[NONFINITE_GRADS_COLUMN][j] += grad - grad != 0 ? number(1) : number(0);
    }
    void store(number* row) const {
        for (int column = 0; column < SUM_COLUMNS; ++column) {
            double sum = 0;
            for (int j = 0; j < GROUP; ++j) sum += lanes[column][j];
            row[column] = number(sum);
        }
    }
};

// ---- weights and master weights; see adax_triton/update/quantized_update.py --------------------------------------------------------

inline number load_weight(const Arrays& a, int j, int32_t rest) {
    if constexpr (PARAM_IS_COPY) {
        return a.master[j];
    } else if constexpr (MASTER_KEPT == float32_copy) {
        const float weight = PARAM::decode(a.param[j]), master = a.master[j];
        return PARAM::decode(PARAM::encode(master)) == weight ? master : weight;
    } else if constexpr (HAS_REST) {
        const float weight = PARAM::decode(a.param[j]);
        const float joined = from_bits(bits_of(weight) + (uint32_t(rest) << (MASTER_KEPT == int8_rest ? 8 : 0)));
        return joined != joined ? weight : joined;
    } else {
        return PARAM::decode(a.param[j]);
    }
}

// Returns the weight that load_weight would return next.
inline number store_weight(const Arrays& a, int j, number weight, uint32_t random, int32_t& rest) {
    if constexpr (HAS_REST) {
        const uint32_t bits = quieted(weight) + (MASTER_KEPT == int8_rest ? random & 0xFF : 0);
        a.param[j] = uint16_t((bits + 0x8000) >> 16);
        rest = int32_t(MASTER_KEPT == int8_rest ? bits >> 8 : bits);
        return from_bits(MASTER_KEPT == int8_rest ? bits & 0xFFFFFF00 : bits);
    } else if constexpr (STOCHASTIC) {
        const uint16_t rounded = round_to_bfloat16(weight, random & 0xFFFF);
        a.param[j] = rounded;
        return PARAM::decode(rounded);
    } else {
        const auto rounded = PARAM::encode(weight);
        a.param[j] = rounded;
        if constexpr (MASTER_KEPT == no_master) return PARAM::decode(rounded);
        a.master[j] = weight;
        return weight;
    }
}

// ---- the update ---------------------------------------------------------------------------------------------------

inline void update(const Scalars& s, number given, number& weight, number& exp_avg, number& exp_avg_sq) {
    const number scaled = given * s.grad_factor, regularised = scaled + weight * s.l2;
    const number grad = s.l2 == 0 ? scaled : regularised;  // 0 times an infinite weight would be NaN
    exp_avg = exp_avg + (grad - exp_avg) * s.one_minus_beta1;
    exp_avg_sq = exp_avg_sq + (grad * grad - exp_avg_sq) * s.exp_avg_sq_weight;
    weight = weight - (weight * s.decay + exp_avg / (root(exp_avg_sq) + s.eps) * s.step_size);
}

struct Coded : Moments {
    int32_t rest[BATCH * GROUP];
};

// Updates one group. What is kept in bytes is in `coded`, at `g`: it would make the vectors of this loop short.
template <class ARRAYS>
inline void update_group(const ARRAYS a, const Scalars s, uint32_t index, Coded& coded, int g, Sums& sums) {
#pragma omp simd
    for (int j = 0; j < GROUP; ++j) {
        const number grad = number(GRAD::decode(a.grad[j])), before = load_weight(a, j, coded.rest[g * GROUP + j]);
        number weight = before, first, second;
        if constexpr (CODES) {
            first = coded.exp_avg[g][j], second = coded.exp_avg_sq[g][j];
        } else {
            first = moment_dtype::decode(a.exp_avg[j]), second = moment_dtype::decode(a.exp_avg_sq[j]);
        }
        update(s, grad, weight, first, second);
        // The second moment is rounded by the upper of its element's random bits, the parameter by the lower.
        const uint32_t random = RANDOM ? random_bits(index + uint32_t(j), s.key0, s.key1) : 0;
        const number stored = store_weight(a, j, weight, random, coded.rest[g * GROUP + j]);
        if constexpr (CODES) {
            coded.exp_avg[g][j] = first, coded.exp_avg_sq[g][j] = second, coded.random[g][j] = random;
        } else if constexpr (KEPT == bfloat16_moments) {
            a.exp_avg[j] = round_to_bfloat16(first, 0x8000);
            a.exp_avg_sq[j] = round_to_bfloat16(second, random >> 16);
        } else {
            a.exp_avg[j] = first, a.exp_avg_sq[j] = second;
        }
        if constexpr (TELEMETRY) sums.add(j, grad, before, stored);
    }
}

template <class ARRAYS>
void update_groups(ARRAYS a, const Scalars& s, uint32_t index, int64_t groups, Sums& sums) {
    Coded coded;
    for (int64_t left = groups; left > 0; left -= BATCH) {
        const int count = int(smallest_of(left, int64_t(BATCH)));
        if constexpr (CODES) decode(a.exp_avg, a.exp_avg_sq, a.exponents, count, coded);
        if constexpr (HAS_REST) {
            for (int j = 0; j < count * GROUP; ++j) coded.rest[j] = a.master[j];
        }
        ARRAYS group = a;
        for (int g = 0; g < count; ++g, index += GROUP, group.advance(1)) update_group(group, s, index, coded, g, sums);
        if constexpr (HAS_REST) {
            for (int j = 0; j < count * GROUP; ++j) a.master[j] = master_dtype::word(coded.rest[j]);
        }
        if constexpr (CODES) encode(coded, count, a.exp_avg, a.exp_avg_sq, a.exponents);
        a.advance(count);
    }
}

template <class DTYPE> struct Padded {
    typedef typename DTYPE::word word;
    word* original;
    unsigned char copy[GROUP * sizeof(word)] = {};

    Padded(word*& array, int64_t count) : original(array) {
        if (array == nullptr) return;
        memcpy(copy, array, size_t(count) * sizeof(word));
        array = reinterpret_cast<word*>(copy);
    }
    void store(int64_t count) const {
        if (original != nullptr) memcpy(original, copy, size_t(count) * sizeof(word));
    }
};

// Adds the sums of some elements before and after an update.
inline void add_sums(const Arrays& before, const Arrays& after, int64_t count, Sums& sums) {
    for (int j = 0; j < count; ++j) {
        const number old_weight = load_weight(before, j, HAS_REST ? int32_t(before.master[j]) : 0);
        const number weight = load_weight(after, j, HAS_REST ? int32_t(after.master[j]) : 0);
        sums.add(j, number(GRAD::decode(before.grad[j])), old_weight, weight);
    }
}

// Updates a last group that is not full, filled up with zeros.
__attribute__((noinline)) void update_rest(Arrays a, const Scalars& s, uint32_t index, int64_t count, Sums& sums) {
    const Arrays given = a;
    Padded<PARAM> param(a.param, count);
    Padded<exp_avg_dtype> exp_avg(a.exp_avg, count);
    Padded<exp_avg_sq_dtype> exp_avg_sq(a.exp_avg_sq, count);
    Padded<master_dtype> master(a.master, count);
    unsigned char grad[GROUP * sizeof(GRAD::word)] = {};
    memcpy(grad, a.grad, size_t(count) * sizeof(GRAD::word));
    a.grad = reinterpret_cast<const GRAD::word*>(grad);
    Sums unused = {};
    update_groups(a, s, index, 1, unused);
    if (TELEMETRY) add_sums(given, a, count, sums);
    param.store(count), exp_avg.store(count), exp_avg_sq.store(count), master.store(count);
}

// ---- chunks and threads -------------------------------------------------------------------------------------------

// Chunks of one thread, next to none that another one counts.
struct Part {
    alignas(64) int64_t next;
    int64_t end;
};

struct Job {
    const int64_t *tensors, *chunks;
    const void* scalars;
    void* results;
    void (*run)(const Job&, int64_t);
    Part* parts;
    int part_count;

    const int64_t* row(int64_t i) const { return tensors + (chunks[i] >> CHUNK_BITS) * TENSOR_COLUMNS; }
    int64_t start(int64_t i) const { return (chunks[i] & ((int64_t(1) << CHUNK_BITS) - 1)) * CHUNK_SIZE; }
    int64_t elements(int64_t i) const { return smallest_of(row(i)[NUMEL_COLUMN] - start(i), int64_t(CHUNK_SIZE)); }
};

void step_chunk(const Job& job, int64_t i) {
    const int64_t *row = job.row(i), start = job.start(i), count = job.elements(i), groups = count / GROUP;
    const Scalars scalars(static_cast<const number*>(job.scalars) + row[SCALAR_ROW_COLUMN] * SCALAR_COLUMNS);
    Arrays arrays(row, start);
    const uint32_t index = uint32_t(row[FIRST_ELEMENT_COLUMN] + start);
    Sums sums;
    if (TELEMETRY) sums = {};
    if (!scalars.skip) {
        update_groups(arrays, scalars, index, groups, sums);
        arrays.advance(int(groups));
        const int64_t rest = count % GROUP;
        if (rest > 0) update_rest(arrays, scalars, index + uint32_t(groups * GROUP), rest, sums);
    } else if (TELEMETRY) {
        for (int64_t left = count; left > 0; left -= GROUP, arrays.advance(1)) {
            add_sums(arrays, arrays, smallest_of(left, int64_t(GROUP)), sums);
        }
    }
    if (TELEMETRY) sums.store(static_cast<number*>(job.results) + i * SUM_COLUMNS);
}

void square_chunk(const Job& job, int64_t i) {
    const GRAD::word* grad = array<GRAD>(job.row(i), GRAD_COLUMN, job.start(i));
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

// Of the OpenMP runtime that PyTorch has loaded. One that is linked in might be a second, with threads of its own.
static void (*run_in_parallel)(void (*)(void*), void*, unsigned, unsigned);
static int (*thread_number)();

void take_chunks(void* data) {
    const Job& job = *static_cast<const Job*>(data);
    const int own = thread_number();
    // A thread that is through with its part goes on with what others have left.
    for (int k = 0; k < job.part_count; ++k) {
        Part& part = job.parts[(own + k) % job.part_count];
        for (int64_t i; (i = __atomic_fetch_add(&part.next, 1, __ATOMIC_RELAXED)) < part.end;) job.run(job, i);
    }
}

constexpr int MOST_PARTS = 512;
// Elements: fewer are done before a second thread wakes up; and what finding a chunk costs.
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
    Part parts[MOST_PARTS];
    job.parts = parts;
    job.part_count = smallest_of(threads, MOST_PARTS);
    int64_t chunk = 0, before = 0;
    for (int k = 0; k < job.part_count; ++k) {
        parts[k].next = chunk;
        const bool last = k + 1 == job.part_count;
        for (; chunk < chunk_count && (last || before < total / job.part_count * (k + 1)); ++chunk) {
            before += job.elements(chunk) + CHUNK_COST;
        }
        parts[k].end = chunk;
    }
    run_in_parallel(take_chunks, &job, unsigned(job.part_count), 0);
}

}  // namespace adax

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Takes GOMP_parallel and omp_get_thread_num of an OpenMP runtime, whose threads share the work of later calls. Without
// them the calling thread does it.
EXPORTED void use_openmp(void (*parallel)(void (*)(void*), void*, unsigned, unsigned), int (*number)()) {
    adax::run_in_parallel = parallel;
    adax::thread_number = number;
}

// Updates every tensor of a table in place; see adax_step in adax_step.py. Scalars and sums are float32, or float64 for
// float64 parameters. A variant with telemetry writes chunk_sums, (chunks, SUM_COLUMNS).
EXPORTED void adax_step(
    const int64_t* tensors, const int64_t* chunks, int64_t chunk_count, const void* scalars, void* chunk_sums,
    int threads) {
    adax::Job job = {tensors, chunks, scalars, chunk_sums, adax::step_chunk, nullptr, 0};
    adax::run_chunks(job, chunk_count, threads);
}

// Writes the sum of the squares of each chunk's gradients into partials, (chunks,).
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
