// The C interface to FlashInfer's attention: cut a step into tiles and chunks, and run a layer.
//
// Planning is host work on host memory; the caller copies the index workspace to the device, once for all layers
// that have the same window. Nothing here allocates device memory or waits for the device. What goes wrong is
// written as text, and no exception leaves a function.
#ifndef CLUSTER_CUDA_EMULATION
#include <flashinfer/attention/scheduler.cuh>

#include "flashinfer.cuh"

namespace cluster::attention {
namespace {

// What is cut. The same words as in flashinfer.rs.
struct Step {
    const uint32_t* row_starts;   // [rows + 1], host
    const uint32_t* context_lens; // [rows], host
    uint32_t rows, tokens;
    uint32_t heads, kv_heads, head_dim;
    uint32_t block_size;
    int32_t window_left; // As in `Call`; it decides how many chunks there are.
    uint32_t multiprocessors;
};

// Arrays of the index workspace, one after the other at multiples of 16 bytes.
class Words {
  public:
    Words(uint32_t* start, size_t capacity) : start_(start), capacity_(capacity) {}

    template <class Values>
    uint32_t put(const Values& values) {
        const uint32_t at = used_;
        used_ += static_cast<uint32_t>((values.size() + 3) / 4 * 4);
        if (used_ > capacity_)
            throw std::runtime_error("a plan takes more than " + std::to_string(capacity_ * 4) + " bytes");
        std::copy(values.begin(), values.end(), start_ + at);
        return at;
    }

    uint32_t used() const { return used_; }

  private:
    uint32_t* start_;
    size_t capacity_;
    uint32_t used_ = 0;
};

// A byte for each of `count` blocks of threads, 1 for the first `used`.
std::vector<uint32_t> mask(size_t used, size_t count) {
    std::vector<uint32_t> words((count + 3) / 4);
    memset(words.data(), 1, used);
    return words;
}

void plan(const Step& step, Words words, size_t partial_bytes, Plan& plan) {
    std::vector<int32_t> queries(step.row_starts, step.row_starts + step.rows + 1), pages{0};
    for (uint32_t row = 0; row < step.rows; ++row)
        pages.push_back(pages.back() + static_cast<int32_t>((step.context_lens[row] + step.block_size - 1) / step.block_size));
    // As many blocks as fill the device twice, if the keys are cut into chunks for it.
    const uint32_t most_items = 2 * step.multiprocessors / step.kv_heads;
    auto [split, items, padded, tile, chunk, requests, query_tiles, key_tiles, merge_starts, output_starts] =
        flashinfer::PrefillSplitQOKVIndptr(queries.data(), pages.data(), step.tokens, step.rows, step.heads,
                                           step.kv_heads, step.head_dim, step.block_size, most_items,
                                           /*enable_cuda_graph=*/false, step.window_left, /*fixed_split_size=*/-1,
                                           /*disable_split_kv=*/false, /*uniform_q_len=*/0);
    plan.tile = tile;
    plan.items = items;
    plan.split = split;
    plan.partial_rows = split ? static_cast<uint32_t>(output_starts.back()) : 0;
    std::vector<uint32_t> valid;
    if (step.tokens == step.rows) {
        // A decode step's launches depend on its number of rows alone, so that they can be recorded and replayed:
        // keys count as cut where that many rows leave room for it, and blocks of threads fill that room.
        const uint32_t each = (step.heads / step.kv_heads + tile - 1) / tile, least = step.rows * each;
        plan.split = least < most_items;
        plan.items = plan.split ? most_items : least;
        plan.partial_rows = plan.split ? most_items : 0;
        if (items > plan.items) throw std::runtime_error("a decode step of " + std::to_string(items) + " blocks");
        if (plan.split) valid = mask(items, plan.items);
        for (auto* indices : {&requests, &query_tiles, &key_tiles}) indices->resize(plan.items);
    }
    const size_t needed = size_t{plan.partial_rows} * step.heads * (step.head_dim * 2 + sizeof(float));
    if (needed > partial_bytes)
        throw std::runtime_error("a plan takes " + std::to_string(needed) + " bytes for partial results where " +
                                 std::to_string(partial_bytes) + " were taken");
    plan.request_indices = words.put(requests);
    plan.query_tiles = words.put(query_tiles);
    plan.key_tiles = words.put(key_tiles);
    plan.output_starts = words.put(output_starts);
    plan.chunk_size = words.put(std::vector<int32_t>{static_cast<int32_t>(chunk)});
    plan.merge_starts = plan.split ? words.put(merge_starts) : 0;
    plan.valid = valid.empty() ? 0 : words.put(valid);
    plan.words = words.used();
}

// Runs `body`; what it throws becomes text of at most `length` bytes, the last one 0.
template <class Body>
int caught(char* error, size_t length, Body body) {
    try {
        body();
        return 0;
    } catch (const std::exception& thrown) {
        snprintf(error, length, "%s", thrown.what());
    } catch (...) {
        snprintf(error, length, "an exception of unknown kind");
    }
    return 1;
}

}  // namespace
}  // namespace cluster::attention

using namespace cluster::attention;

// Cuts a step: fills `plan`, and `words` words at most at `indices`, in host memory.
extern "C" int cluster_flashinfer_plan(const Step* step, uint32_t* indices, size_t words, size_t partial_bytes, Plan* out,
                                       char* error, size_t error_bytes) {
    return caught(error, error_bytes, [&] { plan(*step, Words(indices, words), partial_bytes, *out); });
}

// Queues the attention of one layer; `element` is 1 for bfloat16 and 2 for half, and so is `kv_element`, or 3 for
// 8-bit floats.
extern "C" int cluster_flashinfer_run(void* stream, int element, int kv_element, const Call* call, const Plan* plan,
                                      char* error, size_t error_bytes) {
    return caught(error, error_bytes, [&] {
        const auto queue = static_cast<cudaStream_t>(stream);
        if (element == 1 && kv_element == 1) return run<nv_bfloat16, nv_bfloat16>(*call, *plan, queue);
        if (element == 2 && kv_element == 2) return run<half, half>(*call, *plan, queue);
        if (element == 1 && kv_element == 3) return run<nv_bfloat16, __nv_fp8_e4m3>(*call, *plan, queue);
        if (element == 2 && kv_element == 3) return run<half, __nv_fp8_e4m3>(*call, *plan, queue);
        throw std::runtime_error("elements of kinds " + std::to_string(element) + " and " + std::to_string(kv_element) +
                                 " are not compiled");
    });
}
#endif
