// What every kernel shares: element types and their conversions, 16-byte accesses, reductions over a warp
// or a block, and how a kernel is launched. Compiled by nvcc for devices and, where
// CLUSTER_CUDA_EMULATION is defined, by g++ for tests without one (emulation.h).
//
// It knows no operation. Arithmetic is in f32: elements are widened when loaded and rounded to nearest even when
// stored. A launcher never throws, allocates or waits; it returns 0 or a cudaError_t.
#pragma once

#ifdef CLUSTER_CUDA_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#define CLUSTER_DYNAMIC_SHARED(type, name)                                   \
    extern __shared__ __align__(128) unsigned char cluster_dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(cluster_dynamic_shared)
#define CLUSTER_CHECK_ALIGNED(at, bytes)
#endif

#include <type_traits>

// An expression: launches `kernel` (in parentheses where its template arguments hold a comma) and says what
// became of it.
#define CLUSTER_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    (::cluster::launch(kernel, dim3(grid), dim3(block), shared_bytes, stream, __VA_ARGS__))

namespace cluster {

constexpr int WARP_SIZE = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

// ---- Elements ------------------------------------------------------------------------------------

// Bits only: the same type on devices and in emulation.
struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

__host__ __device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(Bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }

#ifdef CLUSTER_CUDA_EMULATION

inline float widen(F16 value) {
    const uint32_t sign = uint32_t{value.bits} >> 15 << 31, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) return (sign ? -1.0F : 1.0F) * static_cast<float>(fraction) * 0x1p-24F;
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

inline uint16_t bf16_bits(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t f16_bits(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Subnormal: adding 0.5 puts the units of 2^-24 into the last bits, and the processor rounds.
        const float sum = __uint_as_float(magnitude) + 0.5F;
        return static_cast<uint16_t>(sign | (__float_as_uint(sum) - 0x3f000000));
    }
    // A carry out of the fraction raises the exponent, up to infinity, as it should.
    const uint32_t rounded = magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | rounded >> 13);
}

// Two elements as a device stores them: the first one in the low half.
inline uint32_t narrow_pair(float low, float high, Bf16*) { return bf16_bits(low) | uint32_t{bf16_bits(high)} << 16; }
inline uint32_t narrow_pair(float low, float high, F16*) { return f16_bits(low) | uint32_t{f16_bits(high)} << 16; }

#else

__device__ __forceinline__ float widen(F16 value) { return __half2float(__ushort_as_half(value.bits)); }

__device__ __forceinline__ uint32_t narrow_pair(float low, float high, Bf16*) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t narrow_pair(float low, float high, F16*) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
}

#endif

__device__ __forceinline__ void widen_pair(uint32_t pair, float& low, float& high, Bf16*) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xffff0000);
}
__device__ __forceinline__ void widen_pair(uint32_t pair, float& low, float& high, F16*) {
    low = widen(F16{static_cast<uint16_t>(pair)});
    high = widen(F16{static_cast<uint16_t>(pair >> 16)});
}

// `value` rounded to T.
template <class T>
__device__ __forceinline__ T narrow(float value) {
    return T{static_cast<uint16_t>(narrow_pair(value, 0.0F, static_cast<T*>(nullptr)))};
}
template <>
__device__ __forceinline__ float narrow<float>(float value) {
    return value;
}

// ---- Accesses ------------------------------------------------------------------------------------

// Elements in 16 bytes.
template <class T>
constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

// The bits of N elements, which are all of 16 bytes or one: loaded first, so that several loads are on their
// way before the first one is used, and widened when needed.
template <class T, int N>
struct Packed {
    static_assert(N == VECTOR<T>, "16 bytes or one element");
    uint4 bits;

    __device__ __forceinline__ static Packed load(const T* at) {
        CLUSTER_CHECK_ALIGNED(at, 16);
        return {*reinterpret_cast<const uint4*>(at)};
    }
    __device__ __forceinline__ void store(T* at) const {
        CLUSTER_CHECK_ALIGNED(at, 16);
        *reinterpret_cast<uint4*>(at) = bits;
    }

    __device__ __forceinline__ void widen_to(float (&values)[N]) const {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(words[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                widen_pair(words[i], values[2 * i], values[2 * i + 1], static_cast<T*>(nullptr));
        }
    }

    __device__ __forceinline__ static Packed from(const float (&values)[N]) {
        uint32_t words[4];
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) words[i] = __float_as_uint(values[i]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i] = narrow_pair(values[2 * i], values[2 * i + 1], static_cast<T*>(nullptr));
        }
        return {make_uint4(words[0], words[1], words[2], words[3])};
    }
};

template <class T>
struct Packed<T, 1> {
    T element;

    __device__ __forceinline__ static Packed load(const T* at) { return {*at}; }
    __device__ __forceinline__ void store(T* at) const { *at = element; }
    __device__ __forceinline__ void widen_to(float (&values)[1]) const { values[0] = widen(element); }
    __device__ __forceinline__ static Packed from(const float (&values)[1]) { return {narrow<T>(values[0])}; }
};

// One element whose type is known when the kernel runs: 0 for f32, 1 for Bf16, 2 for F16.
__device__ __forceinline__ float load_one(const void* from, int64_t index, int element) {
    if (element == 0) return static_cast<const float*>(from)[index];
    if (element == 1) return widen(static_cast<const Bf16*>(from)[index]);
    return widen(static_cast<const F16*>(from)[index]);
}

__device__ __forceinline__ void store_one(void* to, int64_t index, int element, float value) {
    if (element == 0)
        static_cast<float*>(to)[index] = value;
    else if (element == 1)
        static_cast<Bf16*>(to)[index] = narrow<Bf16>(value);
    else
        static_cast<F16*>(to)[index] = narrow<F16>(value);
}

// Whether 16-byte accesses may be used at `at` and every `stride` elements from there on.
template <class T>
__host__ __forceinline__ bool vectors_fit(const T* at, int64_t stride) {
    return reinterpret_cast<uintptr_t>(at) % 16 == 0 && stride % VECTOR<T> == 0;
}

// Copies `count` items by all threads of the block, four of a thread's on their way at once; zeros where `from`
// is null.
template <class Item>
__device__ __forceinline__ void block_copy(const Item* from, Item* to, int count) {
    constexpr int AT_ONCE = 4;
    const int threads = static_cast<int>(blockDim.x);
    for (int start = static_cast<int>(threadIdx.x); start < count; start += AT_ONCE * threads) {
        Item items[AT_ONCE] = {};
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (from && start + i * threads < count) items[i] = from[start + i * threads];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (start + i * threads < count) to[start + i * threads] = items[i];
    }
}

// Calls `f` with a null pointer to the widest item that rows of `bytes` bytes at these addresses can be copied by:
// 16, 4 or 2 bytes.
template <class F>
int by_item(const void* from, const void* to, int64_t bytes, F&& f) {
    const uint64_t all = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | static_cast<uint64_t>(bytes);
    if (all % 16 == 0) return f(static_cast<const uint4*>(nullptr));
    if (all % 4 == 0) return f(static_cast<const uint32_t*>(nullptr));
    return f(static_cast<const uint16_t*>(nullptr));
}

// ---- Reductions ----------------------------------------------------------------------------------

struct Sum {
    __device__ __forceinline__ static float neutral() { return 0.0F; }
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
    __device__ __forceinline__ static float neutral() { return -INFINITY; }
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Over groups of LANES neighbouring lanes; every lane gets the result. All 32 lanes must come.
template <int LANES = WARP_SIZE, class Combine>
__device__ __forceinline__ float warp_reduce(float value, Combine combine) {
#pragma unroll
    for (int by = LANES / 2; by > 0; by /= 2) value = combine(value, __shfl_xor_sync(ALL_LANES, value, by));
    return value;
}
__device__ __forceinline__ float warp_sum(float value) { return warp_reduce(value, Sum{}); }
__device__ __forceinline__ float warp_max(float value) { return warp_reduce(value, Max{}); }

// Over a block of whole warps in one dimension; every thread gets the result. All threads must come. Ends with
// shared memory free for the next reduction only after the block's next barrier, so `scratch` (32 floats of
// shared memory) must be another one where two reductions follow each other.
template <class Combine>
__device__ __forceinline__ float block_reduce(float value, float* scratch, Combine combine) {
    const int lane = static_cast<int>(threadIdx.x) % WARP_SIZE, warp = static_cast<int>(threadIdx.x) / WARP_SIZE;
    const int warps = static_cast<int>(blockDim.x) / WARP_SIZE;
    value = warp_reduce(value, combine);
    if (warps == 1) return value;
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    return warp_reduce(lane < warps ? scratch[lane] : Combine::neutral(), combine);
}
__device__ __forceinline__ float block_sum(float value, float* scratch) { return block_reduce(value, scratch, Sum{}); }
__device__ __forceinline__ float block_max(float value, float* scratch) { return block_reduce(value, scratch, Max{}); }

// ---- Launching -----------------------------------------------------------------------------------

template <class T>
struct Tag {
    using Type = T;
};

// Calls `f` with the Tag of the element type that the caller's number stands for (`backend::Element`).
template <class F>
int by_element(int element, F&& f) {
    switch (element) {
        case 0: return f(Tag<float>{});
        case 1: return f(Tag<Bf16>{});
        case 2: return f(Tag<F16>{});
        default: return cudaErrorInvalidValue;
    }
}

// Bytes of an element, zero where there is no such type.
inline int64_t element_bytes(int element) { return element == 0 ? 4 : element == 1 || element == 2 ? 2 : 0; }

template <class N, class D>
constexpr N ceil_div(N n, D d) {
    return (n + static_cast<N>(d) - 1) / static_cast<N>(d);
}

// `threads` rounded up to whole warps, at most `most`.
inline unsigned whole_warps(int64_t threads, int64_t most) {
    const int64_t rounded = ceil_div(threads, WARP_SIZE) * WARP_SIZE;
    return static_cast<unsigned>(rounded < most ? rounded : most);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           Arguments... arguments) {
#ifdef CLUSTER_CUDA_EMULATION
    (void)stream;
    return emulation::queue([=] {
        auto body = [&] { kernel(static_cast<Parameters>(arguments)...); };
        using Call = decltype(body);
        const auto call = [](void* body) { (*static_cast<Call*>(body))(); };
        return emulation::machine().run(grid, block, shared_bytes, call, &body);
    });
#else
    constexpr size_t WITHOUT_ASKING = 48 * 1024;
    if (shared_bytes > WITHOUT_ASKING) {
        const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                       static_cast<int>(shared_bytes));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
    return cudaGetLastError();
#endif
}

}  // namespace cluster
