// CUDA on the CPU, for tests on machines without a GPU: what the .cu files use of the language and its
// library, as plain C++17 for g++. Every thread of a block is a fiber; blocks run one after the other.
//
// It does not measure speed, model memory, or know tensor cores and asynchronous copies. It is stricter than a
// device: a barrier that some thread of the block never reaches, a warp operation whose lanes disagree, an index
// outside a shared array and a launch that a device would refuse all end the launch with a sentence on
// standard error and an error code.
//
// Invariant: threads of one block run in an order that changes from block to block, and only ever stop
// at barriers and warp operations, so a missing barrier gives other results for some block.
#pragma once

#include "emulation_graph.h"
#include "emulation_machine.h"

// ---- The language --------------------------------------------------------------------------------

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks of one operating-system thread run one after the other, so one copy for each is a block's.
#define __shared__ static thread_local
#define __align__(bytes) alignas(bytes)
#define CLUSTER_DYNAMIC_SHARED(type, name) \
    type* name = reinterpret_cast<type*>(::cluster::emulation::machine().dynamic_shared())
#define CLUSTER_CHECK_ALIGNED(at, bytes) ::cluster::emulation::check_aligned(at, bytes)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
    memset(at, value, bytes);
    return cudaSuccess;
}

namespace cluster::emulation {

// Values travel between lanes as 64 bits.
template <class T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8, "a warp operation takes up to 64 bits");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
T shuffle(Operation operation, unsigned mask, T value, int argument, int width) {
    return from_bits<T>(machine().warp(operation, mask, to_bits(value), argument, width));
}
inline uint64_t vote(Operation operation, unsigned mask, uint64_t value) {
    return machine().warp(operation, mask, value, 0, WARP);
}
template <class T, class Change>
T exchange_at(T* at, Change change) {
    const T before = *at;
    *at = change(before);
    return before;
}

// What a device answers with a fault.
inline void check_aligned(const void* at, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(at) % bytes != 0)
        machine().fail("an access of " + std::to_string(bytes) + " bytes at an address that is no multiple of it");
}

// The sentence of this thread's last launch, empty where it succeeded.
inline const char* last_message() { return machine().message().c_str(); }

}  // namespace cluster::emulation

// ---- The library ---------------------------------------------------------------------------------

#define threadIdx (::cluster::emulation::machine().current().index)
#define blockIdx (::cluster::emulation::machine().block_index)
#define blockDim (::cluster::emulation::machine().block)
#define gridDim (::cluster::emulation::machine().grid)
constexpr int warpSize = 32;

#define __syncthreads() ((void)::cluster::emulation::machine().block_barrier(__LINE__, 0))
#define __syncthreads_count(value) (::cluster::emulation::machine().block_barrier(__LINE__, (value) != 0))
#define __syncthreads_or(value) (::cluster::emulation::machine().block_barrier(__LINE__, (value) != 0) != 0)
#define __syncthreads_and(value) (::cluster::emulation::machine().block_barrier(__LINE__, (value) == 0) == 0)

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return cluster::emulation::shuffle(cluster::emulation::Operation::Index, mask, value, lane, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return cluster::emulation::shuffle(cluster::emulation::Operation::Up, mask, value, static_cast<int>(by), width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    return cluster::emulation::shuffle(cluster::emulation::Operation::Down, mask, value, static_cast<int>(by), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
    return cluster::emulation::shuffle(cluster::emulation::Operation::Xor, mask, value, by, width);
}
inline void __syncwarp(unsigned mask = 0xffffffff) {
    cluster::emulation::vote(cluster::emulation::Operation::Sync, mask, 0);
}
inline unsigned __ballot_sync(unsigned mask, int value) {
    return static_cast<unsigned>(cluster::emulation::vote(cluster::emulation::Operation::Ballot, mask, value != 0));
}
inline int __any_sync(unsigned mask, int value) {
    return static_cast<int>(cluster::emulation::vote(cluster::emulation::Operation::Any, mask, value != 0));
}
inline int __all_sync(unsigned mask, int value) {
    return static_cast<int>(cluster::emulation::vote(cluster::emulation::Operation::All, mask, value != 0));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    return static_cast<unsigned>(
        cluster::emulation::vote(cluster::emulation::Operation::MatchAny, mask, cluster::emulation::to_bits(value)));
}
// 32-bit integers only, as on a device; signed ones keep their sign on the way.
template <class T>
T cluster_reduce(cluster::emulation::Operation operation, unsigned mask, T value) {
    static_assert(sizeof(T) == 4 && T(1) / T(2) == T(0), "a 32-bit integer");
    const auto wide = static_cast<uint64_t>(static_cast<int64_t>(value));
    return static_cast<T>(cluster::emulation::vote(operation, mask, wide));
}
#define CLUSTER_REDUCE(name, operation)                                          \
    template <class T>                                                           \
    T name(unsigned mask, T value) {                                             \
        return cluster_reduce(cluster::emulation::Operation::operation, mask, value); \
    }
CLUSTER_REDUCE(__reduce_add_sync, Add)
CLUSTER_REDUCE(__reduce_min_sync, Min)
CLUSTER_REDUCE(__reduce_max_sync, Max)
CLUSTER_REDUCE(__reduce_and_sync, And)
CLUSTER_REDUCE(__reduce_or_sync, Or)

// Threads stop at barriers only, so an ordinary read and write is an atomic one.
#define CLUSTER_ATOMIC(name, result)                                                                            \
    template <class T, class U>                                                                                 \
    T name(T* at, U operand) {                                                                                  \
        const T with = static_cast<T>(operand);                                                                 \
        return cluster::emulation::exchange_at(at, [&](T was) { return static_cast<T>(result); });              \
    }
CLUSTER_ATOMIC(atomicAdd, was + with)
CLUSTER_ATOMIC(atomicSub, was - with)
CLUSTER_ATOMIC(atomicMax, std::max(was, with))
CLUSTER_ATOMIC(atomicMin, std::min(was, with))
CLUSTER_ATOMIC(atomicOr, was | with)
CLUSTER_ATOMIC(atomicAnd, was & with)
CLUSTER_ATOMIC(atomicExch, with)
template <class T, class U, class V>
T atomicCAS(T* at, U expected, V with) {
    return cluster::emulation::exchange_at(
        at, [&](T was) { return was == static_cast<T>(expected) ? static_cast<T>(with) : was; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __ldg(const T* at) { return *at; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline int __clzll(long long value) {
    return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value));
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t{high} << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return result;
}
inline unsigned __float_as_uint(float value) {
    return cluster::emulation::from_bits<unsigned>(cluster::emulation::to_bits(value));
}
inline int __float_as_int(float value) {
    return cluster::emulation::from_bits<int>(cluster::emulation::to_bits(value));
}
inline float __uint_as_float(unsigned bits) { return cluster::emulation::from_bits<float>(bits); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
// The device's quick versions are less exact than these: tolerances have to allow for both.
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0F / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0F / x; }
inline float __fmul_rn(float a, float b) { volatile float product = a * b; return product; }
inline float __fadd_rn(float a, float b) { volatile float sum = a + b; return sum; }
inline unsigned long long __float2ull_rn(float value) { return static_cast<unsigned long long>(llrintf(value)); }
using std::max;
using std::min;

// What `-fsanitize=bounds` calls for an index outside an array of known size; it begins with the place.
struct ClusterPlace { const char* file; unsigned line, column; };
extern "C" __attribute__((weak, used)) void __ubsan_handle_out_of_bounds(void* data, void* index) {
    const auto* place = static_cast<const ClusterPlace*>(data);
    cluster::emulation::machine().fail(std::string(place->file) + ":" + std::to_string(place->line) + ": index " +
                                       std::to_string(reinterpret_cast<intptr_t>(index)) + " is outside its array");
}
