// The rows whose logits are wanted, side by side. Formula and shapes: gather.rs.
//
// A copy: one block for each row, 16 bytes at a time where the rows allow it.
#include "../cuda/device.cuh"

namespace {

using namespace cluster;

template <class Item>
__global__ void __launch_bounds__(256) gather(const uint32_t* __restrict__ rows, const Item* __restrict__ x,
                                              Item* __restrict__ out, int items) {
    const int64_t row = blockIdx.x;
    block_copy(x + static_cast<int64_t>(rows[row]) * items, out + row * items, items);
}

}  // namespace

// `out[i] = x[rows[i]]` for `count` rows of `width` elements.
extern "C" int cluster_gather_rows(void* stream, int element, const uint32_t* rows, const void* x, void* out,
                                   int64_t count, int64_t width) {
    const int64_t bytes = width * element_bytes(element);
    if (bytes == 0) return cudaErrorInvalidValue;
    if (count == 0) return cudaSuccess;
    return by_item(x, out, bytes, [&](auto* item) {
        using Item = std::remove_cv_t<std::remove_pointer_t<decltype(item)>>;
        const int64_t items = bytes / static_cast<int64_t>(sizeof(Item));
        return CLUSTER_LAUNCH(gather<Item>, static_cast<unsigned>(count), whole_warps(ceil_div(items, 2), 256), 0, stream,
                              rows, static_cast<const Item*>(x), static_cast<Item*>(out), static_cast<int>(items));
    });
}
