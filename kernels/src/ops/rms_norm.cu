// RMSNorm, and the same after an addition to the residual. Formula and shapes: rms_norm.rs.
//
// One block for each row. Rows that fit are kept in registers between the sum of squares and the scaling,
// so that memory is read once, and all loads of a thread, the weight's too, leave before the first one is used. Other
// rows (very wide, or not made of whole 16 bytes) are read twice, the second time from cache.
#include "../cuda/device.cuh"

namespace {

using namespace cluster;

constexpr int MAX_THREADS = 1024;

// What is normed, after adding `added` where there is one. The sum is rounded before it is normed, so that the
// result belongs to the residual that is stored.
template <class T, int N, bool ADD>
__device__ __forceinline__ void summed(const Packed<T, N>& x, const Packed<T, N>& added, T* residual,
                                       float (&values)[N]) {
    x.widen_to(values);
    if constexpr (ADD) {
        float more[N];
        added.widen_to(more);
#pragma unroll
        for (int i = 0; i < N; ++i) values[i] += more[i];
        const auto sum = Packed<T, N>::from(values);
        sum.store(residual);
        sum.widen_to(values);
    }
}

template <class T, int N>
__device__ __forceinline__ void scale_and_store(const float (&values)[N], const Packed<T, N>& weight_bits,
                                                float factor, float offset, T* out) {
    float weight[N];
    weight_bits.widen_to(weight);
#pragma unroll
    for (int i = 0; i < N; ++i) weight[i] = (weight[i] + offset) * (values[i] * factor);
    Packed<T, N>::from(weight).store(out);
}

// Rows of up to PER_THREAD vectors for each thread.
template <class T, int PER_THREAD, bool ADD>
__global__ void __launch_bounds__(MAX_THREADS)
    norm_in_registers(const T* __restrict__ x, T* __restrict__ residual, const T* __restrict__ weight,
                      T* __restrict__ out, int width, float eps, float offset) {
    constexpr int N = VECTOR<T>;
    __shared__ float scratch[WARP_SIZE];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
    const int first = static_cast<int>(threadIdx.x) * N, step = static_cast<int>(blockDim.x) * N;
    Packed<T, N> bits[PER_THREAD], added[PER_THREAD], weights[PER_THREAD];
#pragma unroll
    for (int p = 0; p < PER_THREAD; ++p) {
        const int at = first + p * step;
        if (at >= width) continue;
        bits[p] = Packed<T, N>::load(x + row + at);
        if constexpr (ADD) added[p] = Packed<T, N>::load(residual + row + at);
        weights[p] = Packed<T, N>::load(weight + at);
    }
    float values[PER_THREAD][N];
    float squares = 0.0F;
#pragma unroll
    for (int p = 0; p < PER_THREAD; ++p) {
        const int at = first + p * step;
        if (at >= width) continue;
        summed<T, N, ADD>(bits[p], added[p], residual + row + at, values[p]);
#pragma unroll
        for (int i = 0; i < N; ++i) squares += values[p][i] * values[p][i];
    }
    const float factor = rsqrtf(__fdividef(block_sum(squares, scratch), static_cast<float>(width)) + eps);
#pragma unroll
    for (int p = 0; p < PER_THREAD; ++p) {
        const int at = first + p * step;
        if (at < width) scale_and_store<T, N>(values[p], weights[p], factor, offset, out + row + at);
    }
}

// Rows of any width.
template <class T, int N, bool ADD>
__global__ void __launch_bounds__(MAX_THREADS)
    norm_in_two_passes(const T* __restrict__ x, T* __restrict__ residual, const T* __restrict__ weight,
                       T* __restrict__ out, int width, float eps, float offset) {
    __shared__ float scratch[WARP_SIZE];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
    const int first = static_cast<int>(threadIdx.x) * N, step = static_cast<int>(blockDim.x) * N;
    float squares = 0.0F;
    for (int at = first; at < width; at += step) {
        float values[N];
        const auto bits = Packed<T, N>::load(x + row + at);
        summed<T, N, ADD>(bits, ADD ? Packed<T, N>::load(residual + row + at) : bits, residual + row + at, values);
#pragma unroll
        for (int i = 0; i < N; ++i) squares += values[i] * values[i];
    }
    const float factor = rsqrtf(__fdividef(block_sum(squares, scratch), static_cast<float>(width)) + eps);
    // Each thread reads what it wrote itself: no barrier is needed for the residual.
    const T* again = ADD ? residual : x;
    for (int at = first; at < width; at += step) {
        float values[N];
        Packed<T, N>::load(again + row + at).widen_to(values);
        scale_and_store<T, N>(values, Packed<T, N>::load(weight + at), factor, offset, out + row + at);
    }
}

template <bool ADD>
int norm(void* stream, int element, const void* x, void* residual, const void* weight, void* out, int64_t rows,
         int64_t width, float eps, float offset) {
    return by_element(element, [&](auto tag) -> int {
        using T = typename decltype(tag)::Type;
        if (rows == 0 || width == 0) return cudaSuccess;
        const auto *from = static_cast<const T*>(x), *w = static_cast<const T*>(weight);
        auto *sum = static_cast<T*>(residual), *to = static_cast<T*>(out);
        const bool vectors = vectors_fit(from, width) && vectors_fit(w, 0) && vectors_fit(to, width) &&
                             (!ADD || vectors_fit(sum, width));
        const int64_t items = vectors ? width / VECTOR<T> : width;
        const auto run = [&](auto* kernel, unsigned threads) {
            return CLUSTER_LAUNCH(kernel, static_cast<unsigned>(rows), threads, 0, stream, from, sum, w, to,
                                  static_cast<int>(width), eps, offset);
        };
        const unsigned all = whole_warps(items, MAX_THREADS);
        if (!vectors) return run(&norm_in_two_passes<T, 1, ADD>, all);
        if (items <= MAX_THREADS) return run(&norm_in_registers<T, 1, ADD>, all);
        if (items <= 2 * MAX_THREADS)
            return run(&norm_in_registers<T, 2, ADD>, whole_warps(ceil_div(items, 2), MAX_THREADS));
        // Only f32 needs four vectors for rows of 16,384.
        if (sizeof(T) == 4 && items <= 4 * MAX_THREADS)
            return run(&norm_in_registers<T, sizeof(T) == 4 ? 4 : 1, ADD>, whole_warps(ceil_div(items, 4), MAX_THREADS));
        return run(&norm_in_two_passes<T, VECTOR<T>, ADD>, all);
    });
}

}  // namespace

// `x, out: [rows, width]`, `weight: [width]`, which `weight_offset` is added to.
extern "C" int cluster_rms_norm(void* stream, int element, const void* x, const void* weight, void* out, int64_t rows,
                                int64_t width, float eps, float weight_offset) {
    return norm<false>(stream, element, x, nullptr, weight, out, rows, width, eps, weight_offset);
}

// As above with `residual: [rows, width]`, which is changed first.
extern "C" int cluster_add_rms_norm(void* stream, int element, const void* x, void* residual, const void* weight,
                                    void* out, int64_t rows, int64_t width, float eps, float weight_offset) {
    return norm<true>(stream, element, x, residual, weight, out, rows, width, eps, weight_offset);
}
