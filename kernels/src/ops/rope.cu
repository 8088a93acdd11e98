// Rotary position embedding of queries and keys, in place. Formula and shapes: rope.rs.
//
// A thread rotates one 16-byte vector of a head's lower half with its partner of the upper half; a block stays within
// one token, so the cosines and sines it needs are in the first cache after their first use.
#include "../cuda/device.cuh"

namespace {

using namespace cluster;

template <class T, int N>
__global__ void __launch_bounds__(256)
    rope(T* __restrict__ qkv, const float* __restrict__ table, const uint32_t* __restrict__ positions, int table_rows,
         int rotated_heads, int half, int64_t stride, unsigned blocks_per_token) {
    const int64_t token = blockIdx.x / blocks_per_token;
    const int item = static_cast<int>(blockIdx.x % blocks_per_token * blockDim.x + threadIdx.x);
    const int per_head = half / N;
    const int head = item / per_head, at = item % per_head * N;
    if (head >= rotated_heads) return;
    T* low_at = qkv + token * stride + static_cast<int64_t>(head) * 2 * half + at;
    const auto low_bits = Packed<T, N>::load(low_at), high_bits = Packed<T, N>::load(low_at + half);
    const uint32_t position = positions[token];
    // A position that the table does not have must not pass for another one.
    const bool known = position < static_cast<uint32_t>(table_rows);
    const float* cosines = table + (known ? static_cast<int64_t>(position) * 2 * half : 0) + at;
    float cosine[N], sine[N], low[N], high[N];
    if constexpr (N == 1) {
        cosine[0] = cosines[0];
        sine[0] = cosines[half];
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            float four[4];
            Packed<float, 4>::load(cosines + i).widen_to(four);
#pragma unroll
            for (int j = 0; j < 4; ++j) cosine[i + j] = four[j];
            Packed<float, 4>::load(cosines + half + i).widen_to(four);
#pragma unroll
            for (int j = 0; j < 4; ++j) sine[i + j] = four[j];
        }
    }
    low_bits.widen_to(low);
    high_bits.widen_to(high);
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float a = low[i], b = high[i];
        low[i] = known ? a * cosine[i] - b * sine[i] : NAN;
        high[i] = known ? b * cosine[i] + a * sine[i] : NAN;
    }
    Packed<T, N>::from(low).store(low_at);
    Packed<T, N>::from(high).store(low_at + half);
}

}  // namespace

// `qkv: [tokens, (heads + 2 * kv_heads) * head_dim]`, `table: [table_rows, head_dim]` in f32, of which a position
// outside gives NaN. `head_dim` is even.
extern "C" int cluster_rope(void* stream, int element, void* qkv, const float* table, const uint32_t* positions,
                            int64_t tokens, int64_t table_rows, int32_t heads, int32_t kv_heads, int32_t head_dim) {
    return by_element(element, [&](auto tag) -> int {
        using T = typename decltype(tag)::Type;
        if (head_dim % 2 != 0 || table_rows < 1) return cudaErrorInvalidValue;
        const int half = head_dim / 2, rotated = heads + kv_heads;
        if (tokens == 0 || rotated == 0 || half == 0) return cudaSuccess;
        const int64_t stride = static_cast<int64_t>(heads + 2 * kv_heads) * head_dim;
        auto* values = static_cast<T*>(qkv);
        // The table's rows are aligned where halves are: vectors of f32 are never longer than those of T.
        const bool vectors = vectors_fit(values, half) && vectors_fit(table, half);
        const int64_t items = static_cast<int64_t>(rotated) * (vectors ? half / VECTOR<T> : half);
        const unsigned threads = whole_warps(items, 256);
        const auto blocks = static_cast<unsigned>(ceil_div(items, threads));
        const auto run = [&](auto* kernel) {
            return CLUSTER_LAUNCH(kernel, static_cast<unsigned>(tokens * blocks), threads, 0, stream, values, table,
                                  positions, static_cast<int>(table_rows), rotated, half, stride, blocks);
        };
        return vectors ? run(&rope<T, VECTOR<T>>) : run(&rope<T, 1>);
    });
}
