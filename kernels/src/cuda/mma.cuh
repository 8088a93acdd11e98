// Products of small tiles by tensor cores, and arithmetic on pairs of half-precision elements. `mma.sync` with f32 sums,
// which every device since sm_80 has. In emulation lanes of a warp exchange their parts through memory.
#pragma once

#include "device.cuh"

namespace cluster {

// ---- Pairs ---------------------------------------------------------------------------------------

// Both elements of one type, the first one in the low half; each result is rounded once.
#ifdef CLUSTER_CUDA_EMULATION
template <class T>
uint32_t pair_subtract(uint32_t a, uint32_t b, T* type) {
    float a0, a1, b0, b1;
    widen_pair(a, a0, a1, type);
    widen_pair(b, b0, b1, type);
    return narrow_pair(a0 - b0, a1 - b1, type);
}
template <class T>
uint32_t pair_multiply(uint32_t a, uint32_t b, T* type) {
    float a0, a1, b0, b1;
    widen_pair(a, a0, a1, type);
    widen_pair(b, b0, b1, type);
    return narrow_pair(a0 * b0, a1 * b1, type);
}
#else
__device__ __forceinline__ uint32_t pair_subtract(uint32_t a, uint32_t b, Bf16*) {
    const __nv_bfloat162 pair = __hsub2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pair_subtract(uint32_t a, uint32_t b, F16*) {
    const __half2 pair = __hsub2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pair_multiply(uint32_t a, uint32_t b, Bf16*) {
    const __nv_bfloat162 pair = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pair_multiply(uint32_t a, uint32_t b, F16*) {
    const __half2 pair = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const uint32_t&>(pair);
}
#endif

// ---- Tiles ---------------------------------------------------------------------------------------

// d += a · b, by all lanes of a warp. Of the 16 × 16 elements of `a` lane 4 * g + t holds, in pairs, columns
// 2t, 2t + 1 of rows g and g + 8, then columns 2t + 8, 2t + 9 of these; of the 16 × 8 of `b` rows 2t, 2t + 1 and then
// 2t + 8, 2t + 9 of column g; of the 16 × 8 of `d` columns 2t, 2t + 1 of row g and then of row g + 8.
#ifdef CLUSTER_CUDA_EMULATION
template <class T>
void tile_multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T* type) {
    struct Parts {
        uint32_t a[4], b[2];
    };
    // Blocks of an operating-system thread run one after the other, and have up to 32 warps.
    static thread_local Parts all[32][WARP_SIZE];
    const unsigned thread = threadIdx.x, lane = thread % WARP_SIZE;
    auto& warp = all[thread / WARP_SIZE];
    warp[lane] = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    __syncwarp();
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4, half = i / 2, column = lane % 4 * 2 + i % 2;
        for (unsigned part = 0; part < 2; ++part)
            for (unsigned t = 0; t < 4; ++t) {
                float a0, a1, b0, b1;
                widen_pair(warp[row * 4 + t].a[2 * part + half], a0, a1, type);
                widen_pair(warp[column * 4 + t].b[part], b0, b1, type);
                d[i] = d[i] + a0 * b0 + a1 * b1;
            }
    }
    __syncwarp();
}
#else
#define CLUSTER_TILE_MULTIPLY(type, name)                                                                       \
    __device__ __forceinline__ void tile_multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], type*) { \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, "           \
                     "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                            \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                       \
    }
CLUSTER_TILE_MULTIPLY(Bf16, "bf16")
CLUSTER_TILE_MULTIPLY(F16, "f16")
#endif

}  // namespace cluster
