// `silu(gate) * up`. Formula and shapes: silu_mul.rs.
//
// Two loads of 16 bytes and one store for each thread; a block stays within one row.
#include "../cuda/device.cuh"

namespace {

using namespace cluster;

// The quick functions are off by a few units of f32's last place, far below what half precision keeps.
template <class T>
__device__ __forceinline__ float silu(float x) {
    // Where e^-x overflows both give zero, the limit.
    if constexpr (sizeof(T) == 4) return x / (1.0F + expf(-x));
    return __fdividef(x, 1.0F + __expf(-x));
}

template <class T, int N>
__global__ void __launch_bounds__(256) silu_mul(const T* __restrict__ gate_up, T* __restrict__ out, int n,
                                                unsigned blocks_per_row) {
    const int64_t row = blockIdx.x / blocks_per_row;
    const int at = static_cast<int>((blockIdx.x % blocks_per_row * blockDim.x + threadIdx.x) * N);
    if (at >= n) return;
    const T* gates = gate_up + row * 2 * n + at;
    const auto gate_bits = Packed<T, N>::load(gates), up_bits = Packed<T, N>::load(gates + n);
    float gate[N], up[N];
    gate_bits.widen_to(gate);
    up_bits.widen_to(up);
#pragma unroll
    for (int i = 0; i < N; ++i) gate[i] = silu<T>(gate[i]) * up[i];
    Packed<T, N>::from(gate).store(out + row * n + at);
}

}  // namespace

// `gate_up: [rows, 2 * n]`, `out: [rows, n]`.
extern "C" int cluster_silu_mul(void* stream, int element, const void* gate_up, void* out, int64_t rows, int64_t n) {
    return by_element(element, [&](auto tag) -> int {
        using T = typename decltype(tag)::Type;
        if (rows == 0 || n == 0) return cudaSuccess;
        const auto* from = static_cast<const T*>(gate_up);
        auto* to = static_cast<T*>(out);
        const bool vectors = vectors_fit(from, n) && vectors_fit(to, n);
        const int64_t items = vectors ? n / VECTOR<T> : n;
        const unsigned threads = whole_warps(items, 256);
        const auto blocks = static_cast<unsigned>(ceil_div(items, threads));
        const auto grid = static_cast<unsigned>(rows * blocks);
        const int width = static_cast<int>(n);
        if (vectors) return CLUSTER_LAUNCH((silu_mul<T, VECTOR<T>>), grid, threads, 0, stream, from, to, width, blocks);
        return CLUSTER_LAUNCH((silu_mul<T, 1>), grid, threads, 0, stream, from, to, width, blocks);
    });
}
