// 8-bit floats with 4 bits of exponent and 3 of mantissa, without infinities (OCP's E4M3): to and from f32.
// What is too large becomes the largest; rounding is to nearest even.
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

}  // namespace cluster
