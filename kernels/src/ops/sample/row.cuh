// Reading a row of logits: the arithmetic of weights, the keys that order tokens, and the search for the likeliest.
// Part of cuda.cu, which says what it is for.
//
// The likeliest tokens are found by narrowing a range of keys, 2048 parts at a time, until its tokens fit into
// shared memory.
//
// Invariant: weights come from the CPU path's steps in its order, each rounded by itself, and are summed as whole
// numbers, whose order does not matter.
#pragma once

#include "../../cuda/device.cuh"

namespace {

using namespace cluster;

#ifdef CLUSTER_CUDA_EMULATION
constexpr int THREADS = 128;
#else
constexpr int THREADS = 512;
#endif
constexpr int BITS = 11, PARTS = 1 << BITS;
// Keys that are sorted in shared memory, and the most alternatives of a request (`MOST_TOP` in cuda.rs).
constexpr int SORTED = 1024;
// Stretches of tokens whose weights are summed apart, so that a draw looks into one.
constexpr int PIECES = 256;
// In a row: this token is ruled out. A NaN that no arithmetic makes.
constexpr uint32_t RULED_OUT = 0xfff0dead;
constexpr float LARGEST = 3.402823466e+38F;

// ---- Arithmetic, step by step as the CPU does it -------------------------------------------------

// Products and sums are rounded one by one; nvcc would join them.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }

// exp.rs.
__device__ __forceinline__ float exponential(float x) {
    constexpr float ROUND = 12582912.0F;
    const float y = x > 88.0F ? 88.0F : x;
    const float shifted = plus(times(y, 1.44269504088896340736F), ROUND);
    const float n = plus(shifted, -ROUND);
    const float r = plus(plus(y, -times(n, 0.6933594F)), -times(n, -2.1219444e-4F));
    float p = 1.0F / 720.0F;
    p = plus(times(p, r), 1.0F / 120.0F);
    p = plus(times(p, r), 1.0F / 24.0F);
    p = plus(times(p, r), 1.0F / 6.0F);
    p = plus(times(p, r), 0.5F);
    p = plus(times(p, r), 1.0F);
    p = plus(times(p, r), 1.0F);
    const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000U);
    return x < -87.0F ? 0.0F : times(p, power);
}

// A weight as a whole number: times 2^40, rounded to nearest even; NaN as 0.
__device__ __forceinline__ uint64_t whole(float weight) {
    return weight > 0.0F ? __float2ull_rn(weight * 1099511627776.0F) : 0;
}

__device__ __forceinline__ float finite(float logit) {
    return logit > -LARGEST ? (logit < LARGEST ? logit : LARGEST) : -LARGEST;
}

// Larger for a larger logit, and among equals for a smaller id.
__device__ __forceinline__ uint64_t key_of(float logit, uint32_t id) {
    const uint32_t bits = __float_as_uint(plus(logit, 0.0F));
    const uint32_t ordered = bits >> 31 ? ~bits : bits | uint32_t{1} << 31;
    return uint64_t{ordered} << 32 | uint32_t(~id);
}
__device__ __forceinline__ uint32_t id_of(uint64_t key) { return ~static_cast<uint32_t>(key); }
__device__ __forceinline__ float logit_of(uint64_t key) {
    const auto ordered = static_cast<uint32_t>(key >> 32);
    return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffff : ~ordered);
}

__device__ __forceinline__ uint64_t high_half(uint64_t a, uint64_t b) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

// ---- How logits are read -------------------------------------------------------------------------

// As they are; NaN comes after all others. The key, not the logit, says which token is the largest.
struct Raw {
    const float* row;
    uint32_t count;
    __device__ __forceinline__ uint32_t id(uint32_t i) const { return i; }
    __device__ __forceinline__ float load(uint32_t i) const { return row[i]; }
    __device__ __forceinline__ uint64_t key(float logit, uint32_t id) const {
        return logit == logit ? key_of(logit, id) : uint32_t(~id);
    }
};

// After the request's changes: finite, or minus infinity where ruled out.
struct Changed {
    const float* row;
    const uint32_t* allowed; // Ascending ids; null: all.
    uint32_t count;
    __device__ __forceinline__ uint32_t id(uint32_t i) const { return allowed ? allowed[i] : i; }
    __device__ __forceinline__ float load(uint32_t i) const {
        const float logit = row[id(i)];
        return __float_as_uint(logit) == RULED_OUT ? -INFINITY : finite(logit);
    }
    __device__ __forceinline__ uint64_t key(float logit, uint32_t id) const { return key_of(logit, id); }
};

// For scores: NaN as minus infinity, plus infinity as the largest number; all 0 where no logit is finite.
struct Scored {
    const float* row;
    uint32_t count;
    bool flat;
    __device__ __forceinline__ uint32_t id(uint32_t i) const { return i; }
    __device__ __forceinline__ float load(uint32_t i) const {
        const float logit = row[i];
        if (flat) return 0.0F;
        return logit == logit ? (logit < LARGEST ? logit : LARGEST) : -INFINITY;
    }
    __device__ __forceinline__ uint64_t key(float logit, uint32_t id) const { return key_of(logit, id); }
};

// Calls `f(id, logit)` for every token, the tokens divided among the threads. Several loads are on their way at once.
template <uint32_t AT_ONCE, class View, class F>
__device__ __forceinline__ void each(const View& view, F f) {
    for (uint32_t base = threadIdx.x; base < view.count; base += AT_ONCE * THREADS) {
        float logits[AT_ONCE];
#pragma unroll
        for (uint32_t j = 0; j < AT_ONCE; ++j) {
            const uint32_t i = base + j * THREADS;
            logits[j] = i < view.count ? view.load(i) : 0.0F;
        }
#pragma unroll
        for (uint32_t j = 0; j < AT_ONCE; ++j) {
            const uint32_t i = base + j * THREADS;
            if (i < view.count) f(view.id(i), logits[j]);
        }
    }
}

// ---- A block's memory and reductions ---------------------------------------------------------------

struct Shared {
    uint64_t sums[PARTS]; // Weights of the parts of a range.
    uint64_t sorted[SORTED];
    uint64_t pieces[PIECES];
    uint64_t scratch[WARP_SIZE];
    uint32_t counts[PARTS]; // Tokens of the parts.
    uint64_t before;        // What comes before the place that was found.
    uint32_t found;
    uint32_t gathered;
};

struct Plus {
    __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a + b; }
};
struct Larger {
    __device__ __forceinline__ uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

// Over the block; 0 is neutral for both operations. Begins and ends with `scratch` free.
template <class Combine>
__device__ __forceinline__ uint64_t reduce(uint64_t value, Shared& shared, Combine combine) {
    const uint32_t lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
#pragma unroll
    for (int by = WARP_SIZE / 2; by > 0; by /= 2) value = combine(value, __shfl_xor_sync(ALL_LANES, value, by));
    if (lane == 0) shared.scratch[warp] = value;
    __syncthreads();
    value = lane < THREADS / WARP_SIZE ? shared.scratch[lane] : 0;
#pragma unroll
    for (int by = WARP_SIZE / 2; by > 0; by /= 2) value = combine(value, __shfl_xor_sync(ALL_LANES, value, by));
    __syncthreads();
    return value;
}

__device__ __forceinline__ uint64_t warp_inclusive(uint64_t value) {
    const uint32_t lane = threadIdx.x % WARP_SIZE;
#pragma unroll
    for (int by = 1; by < WARP_SIZE; by *= 2) {
        const uint64_t other = __shfl_up_sync(ALL_LANES, value, by);
        if (lane >= static_cast<uint32_t>(by)) value += other;
    }
    return value;
}

// The first i below `n` at which the running sum of `measure(i)` reaches `target`, which is above 0; `n` where it never
// does. `shared.before` is the sum before it.
template <class Measure>
__device__ __forceinline__ uint32_t first_to_reach(uint64_t target, uint32_t n, Shared& shared, Measure measure) {
    const uint32_t lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE;
    const uint32_t each = (n + THREADS - 1) / THREADS, start = threadIdx.x * each;
    const uint32_t end = start + each < n ? start + each : n;
    uint64_t own = 0;
    for (uint32_t i = start; i < end; ++i) own += measure(i);
    uint64_t running = warp_inclusive(own);
    if (lane == WARP_SIZE - 1) shared.scratch[warp] = running;
    if (threadIdx.x == 0) shared.found = n;
    __syncthreads();
    for (uint32_t other = 0; other < warp; ++other) running += shared.scratch[other];
    if (running >= target && running - own < target) {
        running -= own;
        uint32_t i = start;
        for (;; ++i) {
            const uint64_t next = running + measure(i);
            if (next >= target) break;
            running = next;
        }
        shared.found = i;
        shared.before = running;
    }
    __syncthreads();
    return shared.found;
}

// ---- The likeliest -------------------------------------------------------------------------------

// Adds to a number in shared memory, in two halves: a device has no such operation on 64 bits. The halves are
// a number only after the next barrier.
__device__ __forceinline__ void add(uint64_t& sum, uint64_t value) {
    auto* halves = reinterpret_cast<uint32_t*>(&sum);
    const auto low = static_cast<uint32_t>(value);
    const uint32_t carry = atomicAdd(&halves[0], low) + low < low;
    atomicAdd(&halves[1], static_cast<uint32_t>(value >> 32) + carry);
}

// What takes part: tokens whose key is at least `cut`, with their weights.
struct Weights {
    float max, factor, min_p;
    uint64_t cut;
    __device__ __forceinline__ uint64_t operator()(float logit) const {
        const float weight = exponential(times(plus(logit, -max), factor));
        return weight < min_p ? 0 : whole(weight);
    }
};

// Everything weighs the same.
struct Even {
    uint64_t cut;
    __device__ __forceinline__ uint64_t operator()(float) const { return 1; }
};

// Sorts the `count` gathered keys, the largest first.
__device__ __forceinline__ void sort(Shared& shared, uint32_t count) {
    uint32_t size = 1;
    while (size < count) size *= 2;
    for (uint32_t i = count + threadIdx.x; i < size; i += THREADS) shared.sorted[i] = 0;
    __syncthreads();
    for (uint32_t run = 2; run <= size; run *= 2)
        for (uint32_t by = run / 2; by > 0; by /= 2) {
            for (uint32_t i = threadIdx.x; i < size; i += THREADS) {
                const uint32_t other = i ^ by;
                if (other <= i) continue;
                const uint64_t a = shared.sorted[i], b = shared.sorted[other];
                if ((a < b) == ((i & run) == 0)) {
                    shared.sorted[i] = b;
                    shared.sorted[other] = a;
                }
            }
            __syncthreads();
        }
}

// Puts the keys from `low` to `high` that take part into shared memory, the largest first, and says how many.
template <class View, class Weigh>
__device__ __forceinline__ uint32_t gather(const View& view, const Weigh& weigh, uint64_t low, uint64_t high, Shared& shared) {
    if (threadIdx.x == 0) shared.gathered = 0;
    __syncthreads();
    each<8>(view, [&](uint32_t id, float logit) {
        const uint64_t key = view.key(logit, id);
        if (key < low || key > high || weigh(logit) == 0) return;
        const uint32_t at = atomicAdd(&shared.gathered, 1U);
        if (at < SORTED) shared.sorted[at] = key;
    });
    __syncthreads();
    const uint32_t count = shared.gathered < SORTED ? shared.gathered : SORTED;
    sort(shared, count);
    return count;
}

// The largest key for which the keys from it up to `high` count (or, `BY_WEIGHT`, weigh) `target` or more; 0 where
// all from `low` do not. `target` is above 0.
template <bool BY_WEIGHT, class View, class Weigh>
__device__ __forceinline__ uint64_t select(const View& view, const Weigh& weigh, uint64_t low, uint64_t high, uint64_t target,
                                           Shared& shared) {
    low = low > weigh.cut ? low : weigh.cut;
    for (;;) {
        const int width = 64 - __clzll(static_cast<long long>(high - low));
        const int shift = width > BITS ? width - BITS : 0;
        const auto parts = static_cast<uint32_t>((high - low) >> shift) + 1;
        for (uint32_t i = threadIdx.x; i < parts; i += THREADS) {
            shared.sums[i] = 0;
            shared.counts[i] = 0;
        }
        __syncthreads();
        each<8>(view, [&](uint32_t id, float logit) {
            const uint64_t key = view.key(logit, id);
            if (key < low || key > high) return;
            const uint64_t weight = weigh(logit);
            if (weight == 0) return;
            const auto part = static_cast<uint32_t>((key - low) >> shift);
            atomicAdd(&shared.counts[part], 1U);
            if (BY_WEIGHT) add(shared.sums[part], weight);
        });
        __syncthreads();
        const uint32_t place = first_to_reach(target, parts, shared, [&](uint32_t i) -> uint64_t {
            return BY_WEIGHT ? shared.sums[parts - 1 - i] : shared.counts[parts - 1 - i];
        });
        if (place == parts) return 0;
        const uint32_t part = parts - 1 - place, count = shared.counts[part];
        target -= shared.before;
        low += uint64_t{part} << shift;
        const uint64_t last = low + ((uint64_t{1} << shift) - 1);
        high = last < high ? last : high;
        // All have read what the next round, or gathering, changes.
        __syncthreads();
        if (low == high) return low;
        if (count <= SORTED) break;
    }
    const uint32_t count = gather(view, weigh, low, high, shared);
    const uint32_t place = first_to_reach(target, count, shared, [&](uint32_t i) -> uint64_t {
        return BY_WEIGHT ? weigh(logit_of(shared.sorted[i])) : 1;
    });
    const uint64_t key = shared.sorted[place];
    __syncthreads();
    return key;
}

}  // namespace
