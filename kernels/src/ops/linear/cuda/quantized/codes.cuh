// How codes of quantised weights lie in memory, and what they stand for. The same words as in quantized/mod.rs.
//
// Columns go in stretches of 64 bytes, of which each of four lanes holds 16 in a row: a *unit*. A lane takes its
// columns in portions of eight that lie side by side. Of 8-bit codes a unit is 16 columns; of 4-bit codes it is four
// portions that are 32 columns apart, so that a portion of all four lanes is 32 columns, the smallest group there is.
// In a word of 4-bit codes those of even place are the low half's nibbles and those of odd place the high half's, so that
// one mask takes out a pair.
//
// Values are exact in half precision, whichever it is. Invariant: no conversion needs a table or a branch.
#pragma once

#include "../../../../cuda/mma.cuh"

namespace cluster::quantized {

constexpr int PORTION = 8;

__device__ __forceinline__ uint32_t word_of(const uint4& unit, int index) {
    const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
    return words[index];
}

// Bits of 1024 and of 128: numbers of the size at which an element's last bit is 1.
__device__ __forceinline__ uint32_t unit_pair(F16*) { return 0x64006400; }
__device__ __forceinline__ uint32_t unit_pair(Bf16*) { return 0x43004300; }

struct Int4 {
    static constexpr int STRETCH = 128, PORTIONS = 4, PORTIONS_PER_CHUNK = 1;
    static constexpr bool HAS_ZEROS = true;

    // The column of a portion's first code in its stretch.
    static __device__ __forceinline__ int column(int lane, int portion) { return 32 * portion + 8 * lane; }

    // What `pairs` subtracts for a zero point.
    template <class T>
    static __device__ __forceinline__ uint32_t zero_pair(uint32_t zero, T* type) {
        return unit_pair(type) + zero * 0x00010001;
    }

    // Code less zero of a portion, in pairs.
    template <class T>
    static __device__ __forceinline__ void pairs(const uint4& unit, int portion, uint32_t zero_pair,
                                                 uint32_t (&values)[4], T* type) {
        const uint32_t word = word_of(unit, portion);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            values[i] = pair_subtract((word >> 4 * i & 0x000f000f) | unit_pair(type), zero_pair, type);
    }
};

// What 8-bit codes share.
template <class Pairs>
struct Bytes {
    static constexpr int STRETCH = 64, PORTIONS = 2, PORTIONS_PER_CHUNK = 2;
    static constexpr bool HAS_ZEROS = false;

    static __device__ __forceinline__ int column(int lane, int portion) { return 16 * lane + 8 * portion; }

    template <class T>
    static __device__ __forceinline__ uint32_t zero_pair(uint32_t, T*) {
        return 0;
    }

    template <class T>
    static __device__ __forceinline__ void pairs(const uint4& unit, int portion, uint32_t, uint32_t (&values)[4],
                                                 T* type) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t word = word_of(unit, 2 * portion + i);
            values[2 * i] = Pairs::template pair<0>(word, type);
            values[2 * i + 1] = Pairs::template pair<1>(word, type);
        }
    }
};

struct Int8Pairs {
    // 1024 + 128 + code in each half, less 1152.
    template <int HALF>
    static __device__ __forceinline__ uint32_t pair(uint32_t word, F16* type) {
        const uint32_t spread = __byte_perm(word ^ 0x80808080, 0x64646464, HALF == 0 ? 0x4140 : 0x4342);
        return pair_subtract(spread, 0x64806480, type);
    }
    // As f32, since 7 bits do not hold 128 + code.
    template <int HALF>
    static __device__ __forceinline__ uint32_t pair(uint32_t word, Bf16* type) {
        const uint32_t biased = word ^ 0x80808080;
        const float low = __uint_as_float(__byte_perm(biased, 0x4b000000, 0x7440 + 2 * HALF));
        const float high = __uint_as_float(__byte_perm(biased, 0x4b000000, 0x7441 + 2 * HALF));
        return narrow_pair(low - 8388736.0F, high - 8388736.0F, type);
    }
};

struct Fp8Pairs {
    // Exponent and mantissa where those of the wider type are; what the exponents' biases differ by is a factor.
    template <int HALF>
    static __device__ __forceinline__ uint32_t pair(uint32_t word, F16* type) {
        const uint32_t spread = __byte_perm(word, 0, HALF == 0 ? 0x1404 : 0x3424);
        return pair_multiply((spread & 0x80008000) | (spread & 0x7f007f00) >> 1, 0x5c005c00, type);
    }
    template <int HALF>
    static __device__ __forceinline__ uint32_t pair(uint32_t word, Bf16* type) {
        const uint32_t spread = __byte_perm(word, 0, HALF == 0 ? 0x1404 : 0x3424);
        return pair_multiply((spread & 0x80008000) | (spread & 0x7f007f00) >> 4, 0x7b807b80, type);
    }
};

using Int8 = Bytes<Int8Pairs>;
using Fp8 = Bytes<Fp8Pairs>;

// Calls `f` with the Tag of the codes that the caller's number stands for (`quantized::Code`).
template <class F>
int by_code(int code, F&& f) {
    switch (code) {
        case 0: return f(Tag<Int4>{});
        case 1: return f(Tag<Int8>{});
        case 2: return f(Tag<Fp8>{});
        default: return cudaErrorInvalidValue;
    }
}

// A section's weights: `codes: [outputs, columns]`, `scales` and `zeros: [groups, outputs]`, and the group of each chunk.
struct Weights {
    const uint4* codes;
    const void* scales;
    const uint8_t* zeros;
    const uint32_t* chunk_groups;
    // 0 for f32, 2 for F16.
    int scale_element;
    int outputs, columns;

    template <class Codes>
    __device__ __forceinline__ int64_t units_per_row() const {
        return columns / Codes::STRETCH * 4;
    }
    __device__ __forceinline__ float scale(uint32_t group, int output) const {
        return load_one(scales, static_cast<int64_t>(group) * outputs + output, scale_element);
    }
    template <class Codes, class T>
    __device__ __forceinline__ uint32_t zero_pair(uint32_t group, int output, T* type) const {
        if constexpr (!Codes::HAS_ZEROS) return 0;
        return Codes::zero_pair(zeros[static_cast<int64_t>(group) * outputs + output], type);
    }
};

}  // namespace cluster::quantized
