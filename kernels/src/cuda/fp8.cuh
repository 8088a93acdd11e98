// 8-bit floats with 4 bits of exponent and 3 of mantissa, without infinities (OCP's E4M3): to and from f32.
// What is too large becomes the largest; rounding is to nearest even. Caches may be stored in them.
#pragma once

#include "device.cuh"

namespace cluster {

constexpr float LARGEST_E4M3 = 448.0F;

// Without the instruction that devices since sm_89 have.
__device__ __forceinline__ uint32_t e4m3_by_bits(float value) {
    const uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | 0x7f;
    if (magnitude >= 0x43e00000) return sign | 0x7e;
    if (magnitude < 0x3c800000) {
        // Subnormal: adding 2^14 puts the units of 2^-9 into the last bits, and the sum is rounded.
        return sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.0F) - 0x46800000);
    }
    // A carry out of the mantissa raises the exponent, as it should.
    return sign | (magnitude - 0x3c000000 + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
}

// Two codes, the first one in the low byte.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return e4m3_by_bits(low) | e4m3_by_bits(high) << 8;
#endif
}

// ---- As elements ---------------------------------------------------------------------------------

// Bits only, as the other elements. A cache may be stored in these; nothing is computed in them.
struct E4m3 { uint8_t bits; };

// Half of 16 bytes: what registers hold of a key once it is widened.
template <>
constexpr int VECTOR<E4m3> = 8;

// The two codes in the low bytes of `pair`.
__device__ __forceinline__ void widen_pair(uint32_t pair, float& low, float& high, E4m3*) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(pair)));
    widen_pair(halves, low, high, static_cast<F16*>(nullptr));
#else
    // Exponent and mantissa where f32 has them; what the exponents' biases differ by is a factor.
    const auto value = [](uint32_t code) {
        const float size = __uint_as_float((code & 0x7f) << 20) * 0x1p120F;
        const float known = (code & 0x7f) == 0x7f ? NAN : size;
        return code & 0x80 ? -known : known;
    };
    low = value(pair & 0xff);
    high = value(pair >> 8 & 0xff);
#endif
}

__device__ __forceinline__ float widen(E4m3 value) {
    float low, high;
    widen_pair(value.bits, low, high, static_cast<E4m3*>(nullptr));
    return low;
}

template <>
__device__ __forceinline__ E4m3 narrow<E4m3>(float value) {
    return {static_cast<uint8_t>(e4m3_pair(value, 0.0F))};
}

template <>
struct Packed<E4m3, 8> {
    uint2 bits;

    __device__ __forceinline__ static Packed load(const E4m3* at) {
        CLUSTER_CHECK_ALIGNED(at, 8);
        return {*reinterpret_cast<const uint2*>(at)};
    }
    __device__ __forceinline__ void widen_to(float (&values)[8]) const {
        const uint32_t words[2] = {bits.x, bits.y};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            widen_pair(words[i / 2] >> i % 2 * 16, values[2 * i], values[2 * i + 1], static_cast<E4m3*>(nullptr));
    }
};

// As `by_element`, with the elements that only caches have.
template <class F>
int by_stored(int element, F&& f) {
    return element == 3 ? f(Tag<E4m3>{}) : by_element(element, f);
}

}  // namespace cluster
