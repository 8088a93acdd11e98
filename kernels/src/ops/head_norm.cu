// RMSNorm over each query and key head, in place. Formula and shapes: head_norm.rs.
//
// A head belongs to a group of neighbouring lanes, 16 bytes for each lane, so a warp works on up to four heads and
// nothing but the lanes' sum is shared.
#include "../cuda/device.cuh"

namespace {

using namespace cluster;

constexpr int THREADS = 256;

// `1 << lane_shift` lanes for each head. Vectors of N elements, of which a lane has at most PER_LANE; where
// that is 0 the head is of any width and read twice.
template <class T, int N, int PER_LANE>
__global__ void __launch_bounds__(THREADS)
    head_norm(T* __restrict__ qkv, const T* __restrict__ query_weight, const T* __restrict__ key_weight,
              unsigned all_heads, unsigned heads, unsigned normed_heads, int head_dim, int64_t stride, int lane_shift,
              float eps, float offset) {
    const int lanes = 1 << lane_shift, lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const unsigned head_index = blockIdx.x * (THREADS >> lane_shift) + (threadIdx.x >> lane_shift);
    const bool here = head_index < all_heads;
    const unsigned token = head_index / normed_heads, head = head_index % normed_heads;
    T* values_at = qkv + token * stride + static_cast<int64_t>(head) * head_dim;
    const T* weight_at = head < heads ? query_weight : key_weight;

    constexpr int KEPT = PER_LANE > 0 ? PER_LANE : 1;
    float values[KEPT][N];
    Packed<T, N> weights[KEPT];
    float squares = 0.0F;
    if constexpr (PER_LANE > 0) {
#pragma unroll
        for (int p = 0; p < PER_LANE; ++p) {
            const int at = (p * lanes + lane) * N;
            if (!here || at >= head_dim) continue;
            const auto bits = Packed<T, N>::load(values_at + at);
            weights[p] = Packed<T, N>::load(weight_at + at);
            bits.widen_to(values[p]);
#pragma unroll
            for (int i = 0; i < N; ++i) squares += values[p][i] * values[p][i];
        }
    } else {
        for (int at = lane; here && at < head_dim; at += lanes) {
            const float value = widen(values_at[at]);
            squares += value * value;
        }
    }
    for (int by = lanes / 2; by > 0; by /= 2) squares += __shfl_xor_sync(ALL_LANES, squares, by);
    const float factor = rsqrtf(__fdividef(squares, static_cast<float>(head_dim)) + eps);
    if (!here) return;
    if constexpr (PER_LANE > 0) {
#pragma unroll
        for (int p = 0; p < PER_LANE; ++p) {
            const int at = (p * lanes + lane) * N;
            if (at >= head_dim) continue;
            float weight[N];
            weights[p].widen_to(weight);
#pragma unroll
            for (int i = 0; i < N; ++i) weight[i] = (weight[i] + offset) * (values[p][i] * factor);
            Packed<T, N>::from(weight).store(values_at + at);
        }
    } else {
        for (int at = lane; at < head_dim; at += lanes)
            values_at[at] = narrow<T>(widen(values_at[at]) * factor * (widen(weight_at[at]) + offset));
    }
}

}  // namespace

// `qkv: [tokens, (heads + 2 * kv_heads) * head_dim]`; one weight of `head_dim` for queries and one for keys,
// which `weight_offset` is added to.
extern "C" int cluster_head_norm(void* stream, int element, void* qkv, const void* query_weight,
                                 const void* key_weight, int64_t tokens, int32_t heads, int32_t kv_heads,
                                 int32_t head_dim, float eps, float weight_offset) {
    return by_element(element, [&](auto tag) -> int {
        using T = typename decltype(tag)::Type;
        const int normed = heads + kv_heads;
        const int64_t all_heads = tokens * normed, stride = static_cast<int64_t>(heads + 2 * kv_heads) * head_dim;
        if (all_heads == 0 || head_dim == 0) return cudaSuccess;
        if (all_heads > INT32_MAX) return cudaErrorInvalidValue;
        auto* values = static_cast<T*>(qkv);
        const auto *query = static_cast<const T*>(query_weight), *key = static_cast<const T*>(key_weight);
        const bool vectors = vectors_fit(values, head_dim) && vectors_fit(query, 0) && vectors_fit(key, 0);
        const int items = vectors ? head_dim / VECTOR<T> : head_dim;
        int lane_shift = 0;
        while (1 << lane_shift < items && 1 << lane_shift < WARP_SIZE) ++lane_shift;
        const int lanes = 1 << lane_shift;
        const auto run = [&](auto* kernel) {
            const auto blocks = static_cast<unsigned>(ceil_div(all_heads * lanes, THREADS));
            return CLUSTER_LAUNCH(kernel, blocks, THREADS, 0, stream, values, query, key, all_heads, heads, normed,
                                  head_dim, stride, lane_shift, eps, weight_offset);
        };
        if (vectors && items <= lanes) return run(&head_norm<T, VECTOR<T>, 1>);
        if (vectors && items <= 2 * lanes) return run(&head_norm<T, VECTOR<T>, 2>);
        return run(&head_norm<T, 1, 0>);
    });
}
