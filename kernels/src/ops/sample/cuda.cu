// Chooses and scores tokens, one block for each row of logits. Meaning and order of operations: mod.rs; what goes
// in and comes out: cuda.rs.
//
// A row is read a few times, never sorted and never copied: what a request changes in it (biases, penalties, bans) is
// written into it, and taken back when the token is chosen.
//
// Invariant: the token is the CPU path's, and so is everything that a score is made of.
#include "row.cuh"

namespace {

constexpr uint32_t IN_PROMPT = uint32_t{1} << 31;
constexpr uint32_t EVERY = 0xffffffff;

// ---- What goes in and comes out: the same words as in cuda.rs -----------------------------------

struct Row { uint32_t row, first, count; };

enum Kind : uint32_t { SCORE, GREEDY, GREEDY_CHANGED, DRAW };

struct Request {
    uint32_t kind;
    uint32_t token;      // Where it is given.
    uint32_t scored;     // Whether a score is wanted,
    uint32_t top;        // and how many of the likeliest tokens,
    uint32_t top_at;     // which go here among the results' words, two for each.
    uint32_t uniform[2]; // A fraction of 2^64, the low half first.
    float factor;        // 1 / temperature
    float min_p;         // 0: off
    float top_p;         // 1 or more: off
    uint32_t top_k;      // 0: off
    float repetition, presence, frequency;
    uint32_t edits_at, edits;               // Changes of logits, among the words.
    uint32_t allowed_at, allowed;           // The tokens that may be chosen; as many as EVERY: all.
    uint32_t last;       // The request of the step before whose token counts as generated once more; EVERY: none.
};

// All that happens to one token's logit. They stand in the order of their tokens; where `last` names a token, the last
// one has none and takes it if it is none of the others'.
struct Edit {
    uint32_t token;
    uint32_t saved; // The logit's bits, for putting them back.
    uint32_t mark;  // Occurrences, for penalties: IN_PROMPT and a count of those generated.
    uint32_t banned;
    uint32_t bias_at, biases; // Added one after the other.
};

struct Result {
    uint32_t token, rank;
    float logit, max;
    uint32_t total[2]; // Low half first.
};

// ---- Choosing ------------------------------------------------------------------------------------

template <class View>
__device__ __forceinline__ uint64_t largest(const View& view, Shared& shared) {
    uint64_t key = 0;
    each<16>(view, [&](uint32_t id, float logit) { key = Larger{}(key, view.key(logit, id)); });
    return reduce(key, shared, Larger{});
}

// Sums the weights of the tokens that are left, by pieces of `piece` tokens, a warp for each.
__device__ __forceinline__ uint64_t sum_pieces(const Changed& view, const Weights& weights, uint32_t piece, Shared& shared) {
    constexpr uint32_t AT_ONCE = 4;
    const uint32_t lane = threadIdx.x % WARP_SIZE;
    uint64_t all = 0;
    for (uint32_t p = threadIdx.x / WARP_SIZE; p < PIECES; p += THREADS / WARP_SIZE) {
        const uint32_t start = p * piece, end = start + piece < view.count ? start + piece : view.count;
        uint64_t sum = 0;
        for (uint32_t base = start + lane; base < end; base += AT_ONCE * WARP_SIZE) {
            float logits[AT_ONCE];
#pragma unroll
            for (uint32_t j = 0; j < AT_ONCE; ++j) {
                const uint32_t i = base + j * WARP_SIZE;
                logits[j] = i < end ? view.load(i) : -INFINITY;
            }
#pragma unroll
            for (uint32_t j = 0; j < AT_ONCE; ++j) {
                const uint32_t i = base + j * WARP_SIZE;
                if (i < end && view.key(logits[j], view.id(i)) >= weights.cut) sum += weights(logits[j]);
            }
        }
#pragma unroll
        for (int by = WARP_SIZE / 2; by > 0; by /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, by);
        if (lane == 0) {
            shared.pieces[p] = sum;
            all += sum;
        }
    }
    return reduce(all, shared, Plus{});
}

// The first token at which the running sum of weights reaches `target`, which is above 0 and at most the whole sum.
__device__ __forceinline__ uint32_t find(const Changed& view, const Weights& weights, uint32_t piece, uint64_t target, Shared& shared) {
    const uint32_t p = first_to_reach(target, PIECES, shared, [&](uint32_t i) { return shared.pieces[i]; });
    const uint64_t left = target - shared.before;
    const uint32_t start = p * piece, end = start + piece < view.count ? start + piece : view.count;
    // All have read what this overwrites.
    __syncthreads();
    const uint32_t i = start + first_to_reach(left, end - start, shared, [&](uint32_t i) -> uint64_t {
        const float logit = view.load(start + i);
        return view.key(logit, view.id(start + i)) >= weights.cut ? weights(logit) : 0;
    });
    __syncthreads();
    return view.id(i);
}

// Steps 3 and 4.
__device__ __forceinline__ uint32_t draw(const Changed& view, const Request& request, Shared& shared) {
    const uint64_t top = largest(view, shared);
    const float max = logit_of(top);
    if (view.count == 0 || max == -INFINITY) return 0;
    Weights weights{max, request.factor, request.min_p, 0};
    // Below this everything weighs nothing: e^-28.42 is half of 2^-40.
    const uint64_t low = key_of(finite(max - 28.5F / request.factor), ~uint32_t{0});
    if (request.top_k > 0) weights.cut = select<false>(view, weights, low, top, request.top_k, shared);
    const uint32_t piece = (view.count + PIECES * WARP_SIZE - 1) / (PIECES * WARP_SIZE) * WARP_SIZE;
    uint64_t total = sum_pieces(view, weights, piece, shared);
    if (request.top_p < 1.0F) {
        const auto share = static_cast<uint64_t>(static_cast<double>(request.top_p) * static_cast<double>(total));
        weights.cut = select<true>(view, weights, low, top, share > 0 ? share : 1, shared);
        total = sum_pieces(view, weights, piece, shared);
    }
    if (total == 0) return 0;
    const uint64_t uniform = uint64_t{request.uniform[1]} << 32 | request.uniform[0];
    return find(view, weights, piece, high_half(uniform, total) + 1, shared);
}

// ---- Changing and scoring ------------------------------------------------------------------------

// Whether one of `count` edits is about `token`.
__device__ __forceinline__ bool contains(const Edit* edits, uint32_t count, uint32_t token) {
    uint32_t first = 0;
    while (count > 0) {
        const uint32_t half = count / 2;
        const bool after = edits[first + half].token < token;
        first += after ? half + 1 : 0;
        count = after ? count - half - 1 : half;
    }
    return edits[first].token == token;
}

// Step 2, but for `allowed`: all that happens to a token is done by one thread.
__device__ __forceinline__ void change(float* row, const Request& request, uint32_t* words, const Result* before) {
    auto* edits = reinterpret_cast<Edit*>(words + request.edits_at);
    const bool has_last = request.last != EVERY;
    const uint32_t last = has_last ? before[request.last].token : EVERY;
    for (uint32_t i = threadIdx.x; i < request.edits; i += THREADS) {
        Edit& edit = edits[i];
        if (has_last && i == request.edits - 1) {
            if (contains(edits, i, last)) continue;
            edit.token = last;
        }
        const uint32_t mark = edit.mark + (edit.token == last);
        const float raw = row[edit.token];
        edit.saved = __float_as_uint(raw);
        float logit = finite(raw);
        for (uint32_t b = 0; b < edit.biases; ++b) logit = finite(plus(logit, __uint_as_float(words[edit.bias_at + b])));
        if (mark != 0) {
            logit = logit > 0.0F ? logit / request.repetition : times(logit, request.repetition);
            const uint32_t count = mark & ~IN_PROMPT;
            if (count > 0) logit = plus(logit, -plus(times(request.frequency, static_cast<float>(count)), request.presence));
            logit = finite(logit);
        }
        row[edit.token] = edit.banned ? __uint_as_float(RULED_OUT) : logit;
    }
    __syncthreads();
}

__device__ __forceinline__ void change_back(float* row, const Request& request, const uint32_t* words) {
    __syncthreads();
    const auto* edits = reinterpret_cast<const Edit*>(words + request.edits_at);
    for (uint32_t i = threadIdx.x; i < request.edits; i += THREADS)
        if (edits[i].token != EVERY) row[edits[i].token] = __uint_as_float(edits[i].saved);
    __syncthreads();
}

__device__ __forceinline__ uint32_t choose(float* row, uint32_t vocab, const Request& request, uint32_t* words,
                                           const Result* before, Shared& shared) {
    if (request.kind == SCORE) return request.token;
    if (request.kind == GREEDY) return id_of(largest(Raw{row, vocab}, shared));
    change(row, request, words, before);
    const bool every = request.allowed == EVERY;
    const Changed view{row, every ? nullptr : words + request.allowed_at, every ? vocab : request.allowed};
    uint32_t token = 0;
    if (request.kind == DRAW) {
        token = draw(view, request, shared);
    } else {
        const uint64_t key = largest(view, shared);
        token = view.count == 0 || logit_of(key) == -INFINITY ? 0 : id_of(key);
    }
    change_back(row, request, words);
    return token;
}

// Scores `token` and the likeliest by the raw logits.
__device__ __forceinline__ void score(const float* row, uint32_t vocab, const Request& request, uint32_t token, uint32_t* results,
                                      Result& result, Shared& shared) {
    Scored view{row, vocab, false};
    uint64_t top = largest(view, shared);
    if (logit_of(top) == -INFINITY) {
        view.flat = true;
        top = key_of(0.0F, 0);
    }
    const float logit = view.load(token);
    const Weights weights{logit_of(top), 1.0F, 0.0F, 0};
    const uint64_t own = key_of(logit, token);
    uint64_t total = 0, better = 0;
    each<8>(view, [&](uint32_t id, float other) {
        total += weights(other);
        better += key_of(other, id) > own;
    });
    total = reduce(total, shared, Plus{});
    better = reduce(better, shared, Plus{});
    if (threadIdx.x == 0) {
        result.rank = static_cast<uint32_t>(better) + 1;
        result.logit = logit;
        result.max = weights.max;
        result.total[0] = static_cast<uint32_t>(total);
        result.total[1] = static_cast<uint32_t>(total >> 32);
    }
    if (request.top == 0) return;
    const Even even{0};
    const uint64_t cut = select<false>(view, even, key_of(-INFINITY, ~uint32_t{0}), top, request.top, shared);
    const uint32_t count = gather(view, even, cut, top, shared);
    for (uint32_t i = threadIdx.x; i < count; i += THREADS) {
        results[request.top_at + 2 * i] = id_of(shared.sorted[i]);
        results[request.top_at + 2 * i + 1] = __float_as_uint(logit_of(shared.sorted[i]));
    }
    __syncthreads();
}

__global__ void __launch_bounds__(THREADS, 1) sample(float* logits, int64_t width, uint32_t vocab, uint32_t* words,
                                                     uint32_t requests_at, uint32_t rows_at, const uint32_t* before,
                                                     uint32_t* results) {
    __shared__ Shared shared;
    const Row row = reinterpret_cast<const Row*>(words + rows_at)[blockIdx.x];
    float* values = logits + static_cast<int64_t>(row.row) * width;
    for (uint32_t i = row.first; i < row.first + row.count; ++i) {
        const Request& request = reinterpret_cast<const Request*>(words + requests_at)[i];
        Result& result = reinterpret_cast<Result*>(results)[i];
        const uint32_t token = choose(values, vocab, request, words, reinterpret_cast<const Result*>(before), shared);
        if (threadIdx.x == 0) result.token = token;
        if (request.scored) score(values, vocab, request, token, results, result, shared);
    }
}

}  // namespace

// `logits: [_, width]` of f32, changed and changed back. `words` hold the requests, row by row, at `requests_at`, `rows` rows at
// `rows_at`, and the lists that requests name; `results` begin with one Result for each request, and `before` are those of
// the step before.
extern "C" int cluster_sample(void* stream, void* logits, int64_t width, int64_t vocab, void* words, int64_t requests_at,
                              int64_t rows_at, int64_t rows, const void* before, void* results) {
    if (rows == 0) return cudaSuccess;
    return CLUSTER_LAUNCH(sample, static_cast<unsigned>(rows), THREADS, 0, stream, static_cast<float*>(logits), width,
                          static_cast<uint32_t>(vocab), static_cast<uint32_t*>(words),
                          static_cast<uint32_t>(requests_at), static_cast<uint32_t>(rows_at),
                          static_cast<const uint32_t*>(before), static_cast<uint32_t*>(results));
}
