// Rows of the embedding table, chosen by token; zeros for tokens of another rank's part. Formula and shapes: embed.rs.
//
// One block for each token. A copy, 16 bytes at a time where the rows allow it; elements are looked at only where there
// is something to multiply them by. A token that the step before chose may not be known to the host: it is looked up where
// sampling left it.
#include "../cuda/device.cuh"

namespace {

using namespace cluster;

// A token id with this bit says with the others which word of sampling's results it is (`LEFT` in cuda/batch.rs).
constexpr uint32_t LEFT = uint32_t{1} << 31;

__device__ __forceinline__ uint32_t known(uint32_t id, const uint32_t* sampled) {
    return id & LEFT ? sampled[id & ~LEFT] : id;
}

template <class Item>
__global__ void __launch_bounds__(256) embed(const uint32_t* __restrict__ token_ids, const uint32_t* __restrict__ sampled,
                                             const Item* __restrict__ table, Item* __restrict__ out, int items,
                                             uint32_t first_token, uint32_t table_rows) {
    const int64_t token = blockIdx.x;
    // Below the first token this wraps around, to more than any table has.
    const uint32_t row = known(token_ids[token], sampled) - first_token;
    const Item* from = row < table_rows ? table + static_cast<int64_t>(row) * items : nullptr;
    block_copy(from, out + token * items, items);
}

template <class T>
__global__ void __launch_bounds__(256) embed_scaled(const uint32_t* __restrict__ token_ids,
                                                    const uint32_t* __restrict__ sampled, const T* __restrict__ table,
                                                    T* __restrict__ out, int width, uint32_t first_token,
                                                    uint32_t table_rows, float scale) {
    const int64_t token = blockIdx.x;
    const uint32_t row = known(token_ids[token], sampled) - first_token;
    const T* from = row < table_rows ? table + static_cast<int64_t>(row) * width : nullptr;
    for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x))
        out[token * width + i] = narrow<T>(from ? widen(from[i]) * scale : 0.0F);
}

}  // namespace

// `sampled`: results of sampling, read where a token id says so; `table: [table_rows, width]` begins with the row of
// `first_token`; `out: [tokens, width]`.
extern "C" int cluster_embed(void* stream, int element, const uint32_t* token_ids, const uint32_t* sampled,
                             const void* table, void* out, int64_t tokens, int64_t width, uint32_t first_token,
                             uint32_t table_rows, float scale) {
    const int64_t bytes = width * element_bytes(element);
    if (bytes == 0) return cudaErrorInvalidValue;
    if (tokens == 0) return cudaSuccess;
    if (scale != 1.0F)
        return by_element(element, [&](auto tag) -> int {
            using T = typename decltype(tag)::Type;
            return CLUSTER_LAUNCH(embed_scaled<T>, static_cast<unsigned>(tokens), whole_warps(width, 256), 0, stream,
                                  token_ids, sampled, static_cast<const T*>(table), static_cast<T*>(out),
                                  static_cast<int>(width), first_token, table_rows, scale);
        });
    return by_item(table, out, bytes, [&](auto* item) {
        using Item = std::remove_cv_t<std::remove_pointer_t<decltype(item)>>;
        const int64_t items = bytes / static_cast<int64_t>(sizeof(Item));
        return CLUSTER_LAUNCH(embed<Item>, static_cast<unsigned>(tokens), whole_warps(ceil_div(items, 2), 256), 0, stream,
                              token_ids, sampled, static_cast<const Item*>(table), static_cast<Item*>(out),
                              static_cast<int>(items), first_token, table_rows);
    });
}
