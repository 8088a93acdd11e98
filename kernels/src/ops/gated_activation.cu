// `activation(gate) * up`. Formula and shapes: gated_activation.rs.
//
// Two loads of 16 bytes and one store for each thread; a block stays within one row.
#include "../cuda/device.cuh"

namespace {

using namespace cluster;

// The numbers of the caller.
enum class Activation { Silu, GeluTanh };

// The quick functions are off by a few units of f32's last place, far below what half precision keeps.
template <class T, Activation KIND>
__device__ __forceinline__ float activated(float x) {
    // 2 sqrt(2 / pi) and GELU's part of the cube.
    const float exponent = KIND == Activation::Silu ? x : 1.5957692F * (x + 0.044715F * x * x * x);
    // Where e^-exponent overflows both give zero, the limit.
    if constexpr (sizeof(T) == 4) return x / (1.0F + expf(-exponent));
    return __fdividef(x, 1.0F + __expf(-exponent));
}

template <class T, int N, Activation KIND>
__global__ void __launch_bounds__(256) gated_activation(const T* __restrict__ gate_up, T* __restrict__ out, int n,
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
    for (int i = 0; i < N; ++i) gate[i] = activated<T, KIND>(gate[i]) * up[i];
    Packed<T, N>::from(gate).store(out + row * n + at);
}

template <Activation KIND>
int run(void* stream, int element, const void* gate_up, void* out, int64_t rows, int64_t n) {
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
        const auto launched = [&](auto* kernel) {
            return CLUSTER_LAUNCH(kernel, grid, threads, 0, stream, from, to, static_cast<int>(n), blocks);
        };
        return vectors ? launched(&gated_activation<T, VECTOR<T>, KIND>) : launched(&gated_activation<T, 1, KIND>);
    });
}

}  // namespace

// `gate_up: [rows, 2 * n]`, `out: [rows, n]`; `activation` is 0 for SiLU and 1 for GELU in its tanh form.
extern "C" int cluster_gated_activation(void* stream, int element, int activation, const void* gate_up, void* out,
                                        int64_t rows, int64_t n) {
    switch (activation) {
        case 0: return run<Activation::Silu>(stream, element, gate_up, out, rows, n);
        case 1: return run<Activation::GeluTanh>(stream, element, gate_up, out, rows, n);
        default: return cudaErrorInvalidValue;
    }
}
