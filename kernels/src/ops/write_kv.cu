// Copies keys and values of new tokens to their slots. Formula and shapes: write_kv.rs.
//
// A thread copies the same vector of a key and of a value; a block stays within one token.
#include "../cuda/fp8.cuh"

namespace {

using namespace cluster;

// Where the slots of one layer are, in elements.
struct Slots {
    int block_size;
    int64_t block_stride, head_stride, token_stride;
    uint32_t count;
};

template <class T, class C, int N>
__global__ void __launch_bounds__(256)
    write_kv(const T* __restrict__ new_keys, const uint32_t* __restrict__ slots, C* __restrict__ keys,
             C* __restrict__ values, Slots place, int kv_heads, int head_dim, int64_t stride,
             unsigned blocks_per_token) {
    const int64_t token = blockIdx.x / blocks_per_token;
    const int item = static_cast<int>(blockIdx.x % blocks_per_token * blockDim.x + threadIdx.x);
    const int per_head = head_dim / N;
    const int head = item / per_head, at = item % per_head * N;
    const uint32_t slot = slots[token];
    // Tokens that fill up a step to a fixed size have no slot.
    if (head >= kv_heads || slot >= place.count) return;
    const T* from = new_keys + token * stride + static_cast<int64_t>(head) * head_dim + at;
    const int64_t to = slot / place.block_size * place.block_stride + head * place.head_stride +
                       slot % place.block_size * place.token_stride + at;
    const auto key = Packed<T, N>::load(from);
    const auto value = Packed<T, N>::load(from + static_cast<int64_t>(kv_heads) * head_dim);
    if constexpr (N > 1) {
        // Only between equal types: the bits are the same.
        key.store(keys + to);
        value.store(values + to);
    } else {
        float one[1];
        key.widen_to(one);
        Packed<C, 1>::from(one).store(keys + to);
        value.widen_to(one);
        Packed<C, 1>::from(one).store(values + to);
    }
}

}  // namespace

// `qkv: [tokens, (heads + 2 * kv_heads) * head_dim]`. `keys` and `values` are one layer's, as `cache_element`: the
// vector of slot s and head h begins `s / block_size * block_stride + h * head_stride + s % block_size * token_stride`
// elements from there. Slots from `slot_count` on are left out.
extern "C" int cluster_write_kv(void* stream, int element, int cache_element, const void* qkv, const uint32_t* slots,
                                void* keys, void* values, int64_t tokens, int32_t heads, int32_t kv_heads,
                                int32_t head_dim, int32_t block_size, int64_t block_stride, int64_t head_stride,
                                int64_t token_stride, uint32_t slot_count) {
    return by_element(element, [&](auto tag) -> int {
        using T = typename decltype(tag)::Type;
        return by_stored(cache_element, [&](auto cache_tag) -> int {
            using C = typename decltype(cache_tag)::Type;
            if (block_size < 1) return cudaErrorInvalidValue;
            if (tokens == 0 || kv_heads == 0 || head_dim == 0) return cudaSuccess;
            const int64_t stride = static_cast<int64_t>(heads + 2 * kv_heads) * head_dim;
            const auto* from = static_cast<const T*>(qkv) + static_cast<int64_t>(heads) * head_dim;
            auto *k = static_cast<C*>(keys), *v = static_cast<C*>(values);
            constexpr bool SAME = std::is_same_v<T, C>;
            const bool vectors = SAME && vectors_fit(from, head_dim) && vectors_fit(k, block_stride) &&
                                 vectors_fit(v, head_stride) && vectors_fit(v, token_stride);
            const int64_t items = static_cast<int64_t>(kv_heads) * (vectors ? head_dim / VECTOR<T> : head_dim);
            const unsigned threads = whole_warps(items, 256);
            const auto blocks = static_cast<unsigned>(ceil_div(items, threads));
            const Slots place{block_size, block_stride, head_stride, token_stride, slot_count};
            const auto run = [&](auto* kernel) {
                return CLUSTER_LAUNCH(kernel, static_cast<unsigned>(tokens * blocks), threads, 0, stream, from, slots, k,
                                      v, place, kv_heads, head_dim, stride, blocks);
            };
            return vectors ? run(&write_kv<T, C, SAME ? VECTOR<T> : 1>) : run(&write_kv<T, C, 1>);
        });
    });
}
