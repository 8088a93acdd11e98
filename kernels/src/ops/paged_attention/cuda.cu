// Attention over paged keys and values for any element type, head size up to 256, group, window and soft cap: where FlashInfer
// has no instance, and to check it by. Formula and shapes: mod.rs. No tensor cores.
//
// A block takes the query heads of one key head for one token, or for a few tokens of one row where they fit: QUERIES
// rows of q in registers. Its warps take turns at the keys; within a warp a key belongs to LANES neighbouring lanes,
// 16 bytes for each lane, so a warp reads 32 / LANES keys at a time and UNROLL times that before it uses the
// first. Each group of lanes has its own running maximum and sum, and all are merged at the end, so nothing waits
// at a barrier on the way. Runs of keys begin at multiples of their length, so that most are in one block.
#include "../../cuda/fp8.cuh"

namespace {

using namespace cluster;

constexpr float LOG2_E = 1.4426950408889634F;

struct Problem {
    const void* qkv;
    const void* keys;
    const void* values;
    const uint32_t* positions;
    const uint32_t* token_rows;
    const uint32_t* row_starts;
    const uint32_t* block_starts;
    const uint32_t* blocks;
    void* out;
    int element;
    int64_t qkv_stride;
    int heads, kv_heads, head_dim;
    int block_size;
    // log2 of the block size where it is a power of two, else -1.
    int block_shift;
    int64_t block_stride, head_stride, token_stride;
    // Positions that a token sees, at most; below 2^31.
    uint32_t window;
    // On q: scale times log2(e), as weights are powers of two; with a cap twice that over the cap.
    float scale;
    // The cap times log2(e); 0 where there is none.
    float soft_cap;
};

// A softmax whose terms come bit by bit, and the sum of the values weighted by it. PER_LANE of a head's dimensions.
template <int QUERIES, int PER_LANE>
struct Running {
    float max[QUERIES], sum[QUERIES], out[QUERIES][PER_LANE];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < QUERIES; ++m) {
            max[m] = -INFINITY;
            sum[m] = 0.0F;
#pragma unroll
            for (int d = 0; d < PER_LANE; ++d) out[m][d] = 0.0F;
        }
    }

    // The factor for what was summed relative to `before`, now that the maximum is `now`.
    __device__ __forceinline__ static float rescale(float before, float now) {
        return before == now ? 1.0F : exp2f(before - now);
    }

    // Adds what the lanes `by` away hold of other keys.
    __device__ __forceinline__ void merge_lanes(int by) {
#pragma unroll
        for (int m = 0; m < QUERIES; ++m) {
            const float most = fmaxf(max[m], __shfl_xor_sync(ALL_LANES, max[m], by));
            const float factor = rescale(max[m], most);
            max[m] = most;
            sum[m] *= factor;
            sum[m] += __shfl_xor_sync(ALL_LANES, sum[m], by);
#pragma unroll
            for (int d = 0; d < PER_LANE; ++d) {
                out[m][d] *= factor;
                out[m][d] += __shfl_xor_sync(ALL_LANES, out[m][d], by);
            }
        }
    }
};

// C: element of the cache. N: elements of one access. PACKS: accesses per lane for one key, each LANES * N apart.
template <class C, int N, int PACKS, int LANES, int QUERIES>
struct Attention {
    static constexpr int WARPS = 32 / QUERIES;
    static constexpr int THREADS = WARPS * WARP_SIZE;
    static constexpr int PER_LANE = PACKS * N;
    // Keys on their way at once for a group of lanes: what the registers hold beside q and the sums.
    static constexpr int UNROLL = QUERIES * PER_LANE > 32 ? 2 : 4;
    static constexpr int DIM = LANES * PER_LANE;
    static constexpr int KEYS_AT_ONCE = WARP_SIZE / LANES;
    static constexpr int RUN = KEYS_AT_ONCE * UNROLL;
    using Pack = Packed<C, N>;
    using State = Running<QUERIES, PER_LANE>;

    // Which token and head a row of q is. Rows that are none see no key.
    struct Query {
        int64_t token;
        int head;
        bool real;
    };

    // What a block works on.
    struct Tile {
        int64_t token;
        int tokens;
        int first_head, heads;
        int kv_head;

        __device__ __forceinline__ Query query(int m) const {
            return {token + m / heads, first_head + m % heads, m < tokens * heads};
        }
    };

    static __device__ __forceinline__ int dimension(int lane, int d) {
        return (d / N * LANES + lane) * N + d % N;
    }

    // Element offset of a key that is there.
    static __device__ __forceinline__ int64_t key_at(const Problem& problem, const uint32_t* table, int key) {
        const auto index = static_cast<uint32_t>(key);
        const auto size = static_cast<uint32_t>(problem.block_size);
        const uint32_t entry = problem.block_shift >= 0 ? index >> problem.block_shift : index / size;
        return table[entry] * problem.block_stride + (index - entry * size) * problem.token_stride;
    }

    static __device__ __forceinline__ void load(Pack (&to)[PACKS], const C* head, int64_t at, bool there, int lane,
                                                int head_dim) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            const int d = (p * LANES + lane) * N;
            // Weights of keys that are not there are zero, and zero times anything has to be zero.
            to[p] = there && d < head_dim ? Pack::load(head + at + d) : Pack{};
        }
    }

    static __device__ __forceinline__ void widen_all(const Pack (&from)[PACKS], float (&to)[PER_LANE]) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            float part[N];
            from[p].widen_to(part);
#pragma unroll
            for (int i = 0; i < N; ++i) to[p * N + i] = part[i];
        }
    }

    // Takes up a run of UNROLL keys of this group of lanes: their scores first, and then what they weigh.
    static __device__ __forceinline__ void take(State& state, const float (&q)[QUERIES][PER_LANE],
                                                const int (&positions)[QUERIES], uint32_t window, float soft_cap,
                                                const Pack (&keys)[UNROLL][PACKS], const Pack (&values)[UNROLL][PACKS],
                                                int key) {
        float scores[UNROLL][QUERIES];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float k[PER_LANE];
            widen_all(keys[u], k);
#pragma unroll
            for (int m = 0; m < QUERIES; ++m) {
                float product = 0.0F;
#pragma unroll
                for (int d = 0; d < PER_LANE; ++d) product += q[m][d] * k[d];
                product = warp_reduce<LANES>(product, Sum{});
                // tanh(x) = 1 - 2 / (1 + e^2x): near 0 it is off by 2^-23 of the cap, which no weight shows.
                if (soft_cap > 0.0F) product = soft_cap - __fdividef(2.0F * soft_cap, 1.0F + exp2f(product));
                // Later keys are at a negative distance, which is more than any window.
                const auto distance = static_cast<uint32_t>(positions[m] - (key + u * KEYS_AT_ONCE));
                scores[u][m] = distance < window ? product : -INFINITY;
            }
        }
#pragma unroll
        for (int m = 0; m < QUERIES; ++m) {
            float most = state.max[m];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) most = fmaxf(most, scores[u][m]);
            const float factor = State::rescale(state.max[m], most);
            state.max[m] = most;
            state.sum[m] *= factor;
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                // Where nothing was seen yet the difference of two infinities is not a number.
                scores[u][m] = scores[u][m] == -INFINITY ? 0.0F : exp2f(scores[u][m] - most);
                state.sum[m] += scores[u][m];
            }
#pragma unroll
            for (int d = 0; d < PER_LANE; ++d) state.out[m][d] *= factor;
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float v[PER_LANE];
            widen_all(values[u], v);
#pragma unroll
            for (int m = 0; m < QUERIES; ++m)
#pragma unroll
                for (int d = 0; d < PER_LANE; ++d) state.out[m][d] += scores[u][m] * v[d];
        }
    }

    // Merges the warps' states and writes the result. `scratch` holds a maximum, a sum and DIM values for each query
    // of each warp.
    static __device__ __forceinline__ void finish(const Problem& problem, const Tile& tile, State& state,
                                                  float* scratch) {
        constexpr int WIDTH = DIM + 2;
        const int lane = static_cast<int>(threadIdx.x) % LANES;
        const int warp = static_cast<int>(threadIdx.x) / WARP_SIZE;
#pragma unroll
        for (int by = LANES; by < WARP_SIZE; by *= 2) state.merge_lanes(by);
        if (static_cast<int>(threadIdx.x) % WARP_SIZE < LANES) {
#pragma unroll
            for (int m = 0; m < QUERIES; ++m) {
                float* row = scratch + (warp * QUERIES + m) * WIDTH;
                if (lane == 0) {
                    row[DIM] = state.max[m];
                    row[DIM + 1] = state.sum[m];
                }
#pragma unroll
                for (int d = 0; d < PER_LANE; ++d) row[dimension(lane, d)] = state.out[m][d];
            }
        }
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < QUERIES * problem.head_dim; i += THREADS) {
            const int m = i / problem.head_dim, d = i % problem.head_dim;
            const Query query = tile.query(m);
            if (!query.real) continue;
            const float* rows = scratch + m * WIDTH;
            float most = -INFINITY;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, rows[w * QUERIES * WIDTH + DIM]);
            float sum = 0.0F, value = 0.0F;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float* row = rows + w * QUERIES * WIDTH;
                const float factor = State::rescale(row[DIM], most);
                sum += factor * row[DIM + 1];
                value += factor * row[d];
            }
            const int64_t at = (query.token * problem.heads + query.head) * problem.head_dim + d;
            store_one(problem.out, at, problem.element, value / sum);
        }
    }

    static __device__ __forceinline__ void run(const Problem& problem, const Tile& tile, float* scratch) {
        const int lane = static_cast<int>(threadIdx.x) % LANES;
        const int group = static_cast<int>(threadIdx.x) % WARP_SIZE / LANES;
        const int warp = static_cast<int>(threadIdx.x) / WARP_SIZE;

        float q[QUERIES][PER_LANE];
        int positions[QUERIES];
        // The tile's first token sees the earliest key, its last token the latest.
        const auto start = static_cast<int>(problem.positions[tile.token]);
        const auto last = static_cast<int>(problem.positions[tile.token + tile.tokens - 1]);
        const int first_key = max(0, start - static_cast<int>(problem.window) + 1);
#pragma unroll
        for (int m = 0; m < QUERIES; ++m) {
            const Query query = tile.query(m);
            positions[m] = query.real ? static_cast<int>(problem.positions[query.token]) : -1;
            const int64_t at = query.token * problem.qkv_stride + int64_t{query.head} * problem.head_dim;
#pragma unroll
            for (int d = 0; d < PER_LANE; ++d) {
                const int column = dimension(lane, d);
                const bool there = query.real && column < problem.head_dim;
                q[m][d] = there ? load_one(problem.qkv, at + column, problem.element) * problem.scale : 0.0F;
            }
        }

        const uint32_t* table = problem.blocks + problem.block_starts[problem.token_rows[tile.token]];
        const C* keys = static_cast<const C*>(problem.keys) + tile.kv_head * problem.head_stride;
        const C* values = static_cast<const C*>(problem.values) + tile.kv_head * problem.head_stride;
        State state;
        state.clear();
        for (int run = first_key / RUN + warp; run * RUN <= last; run += WARPS) {
            const int key = run * RUN + group;
            Pack key_bits[UNROLL][PACKS], value_bits[UNROLL][PACKS];
            int64_t at[UNROLL];
            bool there[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const int position = key + u * KEYS_AT_ONCE;
                there[u] = position >= first_key && position <= last;
                at[u] = there[u] ? key_at(problem, table, position) : 0;
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) load(key_bits[u], keys, at[u], there[u], lane, problem.head_dim);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) load(value_bits[u], values, at[u], there[u], lane, problem.head_dim);
            take(state, q, positions, problem.window, problem.soft_cap, key_bits, value_bits, key);
        }
        finish(problem, tile, state, scratch);
    }
};

// Blocks: tokens, key heads, and parts of a group that is larger than QUERIES.
template <class Shape, int QUERIES>
__global__ void __launch_bounds__(Shape::THREADS) attend(Problem problem) {
    __shared__ float scratch[Shape::WARPS * QUERIES * (Shape::DIM + 2)];
    const int group = problem.heads / problem.kv_heads;
    typename Shape::Tile tile;
    tile.kv_head = static_cast<int>(blockIdx.y);
    tile.heads = min(group - static_cast<int>(blockIdx.z) * QUERIES, QUERIES);
    tile.first_head = tile.kv_head * group + static_cast<int>(blockIdx.z) * QUERIES;
    tile.token = blockIdx.x;
    // Only the first token of each tile has work: tiles are counted from the row's start.
    const int per_tile = group < QUERIES ? QUERIES / group : 1;
    const uint32_t row = problem.token_rows[tile.token];
    const int64_t start = problem.row_starts[row], end = problem.row_starts[row + 1];
    if ((tile.token - start) % per_tile != 0) return;
    tile.tokens = static_cast<int>(min(static_cast<int64_t>(per_tile), end - tile.token));
    Shape::run(problem, tile, scratch);
}

template <class C, int N, int PACKS, int LANES>
int launch_shape(const Problem& problem, int64_t tokens, bool one_token_rows, void* stream) {
    const int group = problem.heads / problem.kv_heads;
    const auto run = [&](auto* kernel, int queries, int threads) {
        const dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(problem.kv_heads),
                        static_cast<unsigned>(ceil_div(group, queries)));
        return CLUSTER_LAUNCH(kernel, grid, threads, 0, stream, problem);
    };
    using Few = Attention<C, N, PACKS, LANES, 4>;
    using Many = Attention<C, N, PACKS, LANES, 8>;
    if (one_token_rows && group <= 4) return run(&attend<Few, 4>, 4, Few::THREADS);
    return run(&attend<Many, 8>, 8, Many::THREADS);
}

template <class C>
int launch_cache(const Problem& problem, int64_t tokens, bool one_token_rows, void* stream) {
    constexpr int N = VECTOR<C>;
    const auto *keys = static_cast<const C*>(problem.keys), *values = static_cast<const C*>(problem.values);
    const bool vectors = vectors_fit(keys, problem.block_stride) && vectors_fit(values, problem.head_stride) &&
                         vectors_fit(keys, problem.token_stride) && problem.head_dim % N == 0;
    const int packs = problem.head_dim / N;
    if (!vectors) return launch_shape<C, 1, 8, 32>(problem, tokens, one_token_rows, stream);
    if (packs <= 8) return launch_shape<C, N, 1, 8>(problem, tokens, one_token_rows, stream);
    if (packs <= 16) return launch_shape<C, N, 1, 16>(problem, tokens, one_token_rows, stream);
    if (packs <= 32) return launch_shape<C, N, 1, 32>(problem, tokens, one_token_rows, stream);
    // Only f32 takes more than 32 vectors for a head of 256.
    return launch_shape<C, N, sizeof(C) == 4 ? 2 : 1, 32>(problem, tokens, one_token_rows, stream);
}

}  // namespace

// `qkv: [tokens, (heads + 2 * kv_heads) * head_dim]` and `out: [tokens, heads * head_dim]` as `element`; keys and values
// of one layer as `cache_element`, placed as write_kv.cu says. `window` positions are seen, all where it is 0; so with `soft_cap`.
extern "C" int cluster_paged_attention(void* stream, int element, int cache_element, const void* qkv, const void* keys,
                                       const void* values, const uint32_t* positions, const uint32_t* token_rows,
                                       const uint32_t* row_starts, const uint32_t* block_starts, const uint32_t* blocks,
                                       void* out, int64_t tokens, int64_t rows, int32_t heads, int32_t kv_heads,
                                       int32_t head_dim, int32_t block_size, int64_t block_stride, int64_t head_stride,
                                       int64_t token_stride, int64_t window, float scale, float soft_cap) {
    constexpr int LARGEST_HEAD = 256;
    const bool valid = element_bytes(element) > 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0 &&
                       head_dim > 0 && head_dim <= LARGEST_HEAD && block_size > 0;
    if (!valid) return cudaErrorInvalidValue;
    if (tokens == 0) return cudaSuccess;
    Problem problem{};
    problem.qkv = qkv;
    problem.keys = keys;
    problem.values = values;
    problem.positions = positions;
    problem.token_rows = token_rows;
    problem.row_starts = row_starts;
    problem.block_starts = block_starts;
    problem.blocks = blocks;
    problem.out = out;
    problem.element = element;
    problem.qkv_stride = static_cast<int64_t>(heads + 2 * kv_heads) * head_dim;
    problem.heads = heads;
    problem.kv_heads = kv_heads;
    problem.head_dim = head_dim;
    problem.block_size = block_size;
    problem.block_shift = -1;
    for (int shift = 0; shift < 31; ++shift)
        if (block_size == 1 << shift) problem.block_shift = shift;
    problem.block_stride = block_stride;
    problem.head_stride = head_stride;
    problem.token_stride = token_stride;
    problem.window = window > 0 && window < INT32_MAX ? static_cast<uint32_t>(window) : INT32_MAX;
    problem.scale = soft_cap > 0.0F ? scale * LOG2_E * 2.0F / soft_cap : scale * LOG2_E;
    problem.soft_cap = soft_cap * LOG2_E;
    return by_stored(cache_element, [&](auto tag) {
        using C = typename decltype(tag)::Type;
        return launch_cache<C>(problem, tokens, tokens == rows, stream);
    });
}
