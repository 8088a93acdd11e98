// Paged attention from FlashInfer's templates, instantiated for the element types of each flashinfer_*.cu: what a
// call hands over, which tile sizes are compiled for which architecture, and the launch.
//
// Prefill and decode go through the same kernel: a plan (flashinfer.cu) cuts the step's queries into tiles and,
// where that leaves multiprocessors idle, their keys into chunks, whose partial results a second kernel
// merges. Not here: other element types and head sizes, which paged_attention.cu computes. FlashInfer's tiles are swizzled in
// rows of 128 bytes, so a head is a multiple of 64 elements: for 96 it would leave out the last 32.
//
// Invariant: of the sizes that a device could run, exactly those that `fragments` chooses for it are compiled.
#pragma once

#include <flashinfer/attention/prefill.cuh>

namespace cluster::attention {

// How a step is cut. The same words as in flashinfer.rs.
struct Plan {
    uint32_t tile;         // Rows (query heads of tokens) of a tile: 16, 64 or 128.
    uint32_t items;        // Blocks of threads for each key head; some may have nothing to do.
    uint32_t split;        // Whether keys are cut into chunks.
    uint32_t partial_rows; // Partial results for each query head; 0 where nothing is split.
    uint32_t words;        // Of the index workspace.
    // Where its arrays begin, in words.
    uint32_t request_indices, query_tiles, key_tiles, output_starts, chunk_size, merge_starts;
    // A byte for each block of threads, whether it has something to do; 0: all have.
    uint32_t valid;
};

// One layer's attention. The same words as in flashinfer.rs. Pointers are to device memory; sizes in elements.
struct Call {
    const void* queries;        // [tokens, query_stride]
    const void* keys;           // First key of the layer's first block.
    const void* values;
    void* out;                  // [tokens, heads * head_dim]
    const uint32_t* row_starts;   // [rows + 1]
    const uint32_t* context_lens; // [rows]
    const uint32_t* block_starts; // [rows + 1]
    const uint32_t* blocks;       // [block_starts[rows]]
    void* partials;             // `partial_rows * heads` results, then as many logarithms of sums.
    const uint32_t* indices;      // What the plan wrote.
    uint32_t rows, tokens;
    uint32_t heads, kv_heads, head_dim;
    uint32_t query_stride;
    uint32_t block_size, block_stride, head_stride;
    int32_t window_left; // Positions that a token sees before its own; negative: all.
    float scale;
    float soft_cap;      // 0: none.
};

// The names are FlashInfer's: its kernels read these members. Keys and values are `Kv`s: `Element`s, or 8-bit floats.
template <class Element, class Kv>
struct Params {
    using DTypeQ = Element;
    using DTypeKV = Kv;
    using DTypeO = Element;
    using IdType = int32_t;

    Element* q;
    flashinfer::paged_kv_t<Kv, int32_t> paged_kv;
    int32_t* q_indptr;
    Element* o;
    float* lse;
    flashinfer::uint_fastdiv group_size;
    uint32_t num_qo_heads;
    int32_t q_stride_n, q_stride_h;
    // Scales of 4-bit blocks, which are not compiled.
    uint32_t k_sf_stride_page, k_sf_stride_n, k_sf_stride_h, v_sf_stride_page, v_sf_stride_n, v_sf_stride_h;
    int32_t window_left;
    float logits_soft_cap;
    float sm_scale;
    int32_t *request_indices, *qo_tile_indices, *kv_tile_indices, *o_indptr, *kv_chunk_size_ptr;
    bool* block_valid_mask;
    bool partition_kv;
    const uint32_t* context_lens;

    __host__ __device__ __forceinline__ uint32_t get_qo_len(uint32_t row) const {
        return q_indptr[row + 1] - q_indptr[row];
    }
    __host__ __device__ __forceinline__ uint32_t get_kv_len(uint32_t row) const { return context_lens[row]; }
};

// A window of all keys costs nothing, so there is always one; the cap costs each score a tanh.
template <bool CAP>
using Variant = flashinfer::DefaultAttention</*custom mask*/ false, /*window*/ true, CAP, /*alibi*/ false>;

template <class Element, class Kv, int HEAD, int TILE, int FRAGMENTS, bool CAP>
using Traits = flashinfer::KernelTraits<
    flashinfer::MaskMode::kCausal, TILE, flashinfer::get_num_mma_q(TILE), FRAGMENTS, HEAD / 16, HEAD / 16,
    flashinfer::get_num_warps_q(TILE), flashinfer::get_num_warps_kv(TILE), flashinfer::PosEncodingMode::kNone, Element,
    Kv, Element, float, int32_t, Variant<CAP>>;

// ---- Which sizes ---------------------------------------------------------------------------------

// Kinds of devices that get other sizes: by the shared memory of a multiprocessor, and by the compiler's use of
// registers.
enum class Kind { Small, Medium, Hopper, Blackwell };

// Bytes that the blocks of a multiprocessor divide among themselves.
constexpr int shared_bytes(Kind kind) {
    switch (kind) {
        case Kind::Small: return 100 * 1024;
        case Kind::Medium: return 164 * 1024;
        default: return 228 * 1024;
    }
}

// Fragments of 16 keys that each warp works on at a time, for 16-bit elements: as many as leave room for two
// blocks on a multiprocessor and for the registers to hold the scores. Where keys and values are `kv_bytes` of 1,
// tiles of more than 16 rows widen them to 16 bits in as much memory again.
constexpr int fragments(int head, int tile, bool cap, Kind kind, int kv_bytes) {
    const int shared = shared_bytes(kind), key_warps = tile == 16 ? 4 : 1;
    const int fixed = tile * head * 2, each = 2 * head * 16 * key_warps * (tile == 16 ? kv_bytes : 2);
    const bool two = shared >= 2 * (fixed + each);
    const int fitting = ((two ? shared / 2 : shared - 1024) - fixed) / each;
    // What the compiler keeps in registers without spilling.
    int most = tile == 16 ? 8 : 4;
    if (tile == 128 && head == 128 && (cap || kind == Kind::Blackwell)) most = 2;
    if (tile == 16 && head == 256 && kv_bytes == 1) most = 1;
    const int count = fitting < most ? fitting : most;
    // Four warps take turns at the halves of a fragment of codes.
    const int least = kv_bytes == 1 && tile > 16 ? 2 : 1;
    return count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : least;
}

// Whether devices of this kind run code compiled for `architecture` (80 for 8.0, whose code 8.6 and 8.9 run too).
constexpr bool runs_on(int architecture, Kind kind) {
    switch (architecture) {
        case 80: return kind == Kind::Medium || kind == Kind::Small;
        case 87: return kind == Kind::Medium;
        case 90: return kind == Kind::Hopper;
        case 100: case 101: case 103: case 110: return kind == Kind::Blackwell;
        default: return kind == Kind::Small;
    }
}

constexpr Kind KINDS[] = {Kind::Blackwell, Kind::Hopper, Kind::Medium, Kind::Small};

constexpr bool is_compiled(int architecture, int head, int tile, bool cap, int count, int kv_bytes) {
    for (const Kind kind : KINDS)
        if (runs_on(architecture, kind) && fragments(head, tile, cap, kind, kv_bytes) == count) return true;
    return false;
}

// ---- Kernel and launch ---------------------------------------------------------------------------

template <class Element, class Kv, int HEAD, int TILE, int FRAGMENTS, bool CAP>
__global__ __launch_bounds__(128) void paged_attention(const __grid_constant__ Params<Element, Kv> params) {
#ifdef __CUDA_ARCH__
    if constexpr (is_compiled(__CUDA_ARCH__ / 10, HEAD, TILE, CAP, FRAGMENTS, sizeof(Kv))) {
        extern __shared__ uint8_t attention_shared[];
        using T = Traits<Element, Kv, HEAD, TILE, FRAGMENTS, CAP>;
        auto& storage = reinterpret_cast<typename T::SharedStoragePaged&>(attention_shared);
        flashinfer::BatchPrefillWithPagedKVCacheDevice<T, /*keys and values have the same strides*/ true>(params, storage);
    } else {
        __trap();
    }
#endif
}

inline void check(cudaError_t code, const char* what) {
    if (code != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(code));
}

// What this process's device is, among those that its code was compiled for.
template <class Element, class Kv>
Kind kind_of_device() {
    static const Kind found = [] {
        int device = 0, shared = 0;
        check(cudaGetDevice(&device), "ask for the device");
        check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), "ask for shared memory");
        cudaFuncAttributes attributes{};
        check(cudaFuncGetAttributes(&attributes, paged_attention<Element, Kv, 128, 16, fragments(128, 16, false, Kind::Hopper, sizeof(Kv)), false>), "find the kernels for this device");
        for (const Kind kind : KINDS)
            if (shared_bytes(kind) <= shared && runs_on(attributes.ptxVersion, kind)) return kind;
        throw std::runtime_error("no kernel was compiled for multiprocessors with " + std::to_string(shared) +
                                 " bytes of shared memory");
    }();
    return found;
}

template <class Element, class Kv, int HEAD, int TILE, int FRAGMENTS, bool CAP>
void launch_kernel(const Params<Element, Kv>& params, dim3 grid, cudaStream_t stream) {
    using T = Traits<Element, Kv, HEAD, TILE, FRAGMENTS, CAP>;
    static_assert(!T::IsInvalid());
    constexpr size_t bytes = sizeof(typename T::SharedStoragePaged);
    const auto kernel = paged_attention<Element, Kv, HEAD, TILE, FRAGMENTS, CAP>;
    // Once in a process, which has one device.
    static const cudaError_t prepared =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    check(prepared, "raise the limit of shared memory");
    kernel<<<grid, dim3(32, T::NUM_WARPS_Q, T::NUM_WARPS_KV), bytes, stream>>>(params);
    check(cudaGetLastError(), "launch attention");
}

// The kernel with as many fragments as this device takes; others were not compiled for it.
template <class Element, class Kv, int HEAD, int TILE, bool CAP>
void launch_tile(const Params<Element, Kv>& params, dim3 grid, cudaStream_t stream) {
    switch (kind_of_device<Element, Kv>()) {
        case Kind::Small: return launch_kernel<Element, Kv, HEAD, TILE, fragments(HEAD, TILE, CAP, Kind::Small, sizeof(Kv)), CAP>(params, grid, stream);
        case Kind::Medium: return launch_kernel<Element, Kv, HEAD, TILE, fragments(HEAD, TILE, CAP, Kind::Medium, sizeof(Kv)), CAP>(params, grid, stream);
        case Kind::Hopper: return launch_kernel<Element, Kv, HEAD, TILE, fragments(HEAD, TILE, CAP, Kind::Hopper, sizeof(Kv)), CAP>(params, grid, stream);
        case Kind::Blackwell: return launch_kernel<Element, Kv, HEAD, TILE, fragments(HEAD, TILE, CAP, Kind::Blackwell, sizeof(Kv)), CAP>(params, grid, stream);
    }
}

template <class Element, class Kv, int HEAD, bool CAP>
void launch_head(const Params<Element, Kv>& params, uint32_t tile, dim3 grid, cudaStream_t stream) {
    switch (tile) {
        case 16: return launch_tile<Element, Kv, HEAD, 16, CAP>(params, grid, stream);
        case 64: return launch_tile<Element, Kv, HEAD, 64, CAP>(params, grid, stream);
        case 128:
            if constexpr (HEAD < 256) return launch_tile<Element, Kv, HEAD, 128, CAP>(params, grid, stream);
        default: throw std::runtime_error("a plan with tiles of " + std::to_string(tile) + " rows");
    }
}

// Adds up the chunks of each token and head.
template <class Element, int HEAD>
void merge(Element* partials, float* logarithms, const Call& call, const Plan& plan, cudaStream_t stream) {
    constexpr uint32_t vector = HEAD / 32 > 8 ? HEAD / 32 : 8, across = HEAD / vector, down = 128 / across, stages = 4;
    constexpr size_t bytes = stages * down * HEAD * sizeof(Element) + 128 * sizeof(float);
    const auto kernel =
        flashinfer::PersistentVariableLengthMergeStatesKernel<vector, across, down, stages, Element, Element, int32_t>;
    static const int most_blocks = [kernel] {
        int device = 0, multiprocessors = 0, blocks = 0;
        check(cudaGetDevice(&device), "ask for the device");
        check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "ask for multiprocessors");
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, 128, bytes), "ask for occupancy");
        return multiprocessors * blocks;
    }();
    const auto work = static_cast<uint64_t>(call.tokens) * call.heads;
    const auto blocks = static_cast<unsigned>(std::min<uint64_t>(work, static_cast<uint64_t>(most_blocks)));
    auto* starts = reinterpret_cast<int32_t*>(const_cast<uint32_t*>(call.indices)) + plan.merge_starts;
    kernel<<<blocks, dim3(across, down), bytes, stream>>>(partials, logarithms, starts, static_cast<Element*>(call.out),
                                                         nullptr, call.tokens, nullptr, call.heads);
    check(cudaGetLastError(), "launch the merging of chunks");
}

template <class Element, class Kv, int HEAD>
void run_head(const Call& call, const Plan& plan, cudaStream_t stream) {
    const auto ints = [](const uint32_t* at) { return reinterpret_cast<int32_t*>(const_cast<uint32_t*>(at)); };
    Params<Element, Kv> params{};
    params.q = static_cast<Element*>(const_cast<void*>(call.queries));
    const int64_t strides[3] = {call.block_stride, call.head_stride, HEAD};
    params.paged_kv = flashinfer::paged_kv_t<Kv, int32_t>(
        call.kv_heads, call.block_size, HEAD, call.rows, flashinfer::QKVLayout::kHND,
        static_cast<Kv*>(const_cast<void*>(call.keys)), static_cast<Kv*>(const_cast<void*>(call.values)), strides,
        ints(call.blocks), ints(call.block_starts), /*last_page_len: context_lens says it*/ nullptr);
    params.q_indptr = ints(call.row_starts);
    params.context_lens = call.context_lens;
    params.group_size = flashinfer::uint_fastdiv(call.heads / call.kv_heads);
    params.num_qo_heads = call.heads;
    params.q_stride_n = static_cast<int32_t>(call.query_stride);
    params.q_stride_h = HEAD;
    params.window_left = call.window_left;
    params.logits_soft_cap = call.soft_cap;
    params.sm_scale = call.scale;
    params.request_indices = ints(call.indices) + plan.request_indices;
    params.qo_tile_indices = ints(call.indices) + plan.query_tiles;
    params.kv_tile_indices = ints(call.indices) + plan.key_tiles;
    params.o_indptr = ints(call.indices) + plan.output_starts;
    params.kv_chunk_size_ptr = ints(call.indices) + plan.chunk_size;
    if (plan.valid != 0) params.block_valid_mask = reinterpret_cast<bool*>(ints(call.indices) + plan.valid);
    params.partition_kv = plan.split != 0;
    params.o = static_cast<Element*>(plan.split != 0 ? call.partials : call.out);
    auto* logarithms = reinterpret_cast<float*>(static_cast<Element*>(call.partials) +
                                                size_t{plan.partial_rows} * call.heads * HEAD);
    params.lse = plan.split != 0 ? logarithms : nullptr;

    const dim3 grid(plan.items, 1, call.kv_heads);
    if (call.soft_cap > 0) {
        // Gemma 2 has heads of 128 and 256; every instance takes 0.2 MB for each architecture.
        if constexpr (HEAD == 64)
            throw std::runtime_error("soft caps are not compiled for heads of 64 elements");
        else
            launch_head<Element, Kv, HEAD, true>(params, plan.tile, grid, stream);
    } else {
        launch_head<Element, Kv, HEAD, false>(params, plan.tile, grid, stream);
    }
    if (plan.split != 0) merge<Element, HEAD>(params.o, logarithms, call, plan, stream);
}

// Queues the attention of one layer. Throws what went wrong.
template <class Element, class Kv>
void run(const Call& call, const Plan& plan, cudaStream_t stream) {
    switch (call.head_dim) {
        case 64:
            // A row of such a head's codes is half of what the tiles of keys are swizzled in.
            if constexpr (sizeof(Kv) > 1) return run_head<Element, Kv, 64>(call, plan, stream);
            throw std::runtime_error("8-bit keys are not compiled for heads of 64 elements");
        case 128: return run_head<Element, Kv, 128>(call, plan, stream);
        case 256: return run_head<Element, Kv, 256>(call, plan, stream);
        default: throw std::runtime_error("heads of " + std::to_string(call.head_dim) + " elements are not compiled");
    }
}

// Each in its own flashinfer_*.cu, so that they compile side by side.
extern template void run<nv_bfloat16, nv_bfloat16>(const Call&, const Plan&, cudaStream_t);
extern template void run<half, half>(const Call&, const Plan&, cudaStream_t);
extern template void run<nv_bfloat16, __nv_fp8_e4m3>(const Call&, const Plan&, cudaStream_t);
extern template void run<half, __nv_fp8_e4m3>(const Call&, const Plan&, cudaStream_t);

}  // namespace cluster::attention
