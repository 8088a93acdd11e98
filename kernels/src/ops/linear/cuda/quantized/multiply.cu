// Few rows times a quantised weight. Formula and shapes: multiply.rs.
//
// The weight is what has to be read, so each warp takes 16 bytes of codes a lane of each of its outputs' rows, the next
// ones on their way while these are computed with, and hands them to the tensor cores as 16 outputs by 16 columns; the
// rows of x are the other factor. Sums of a group are scaled when the group ends. Warps of a block take stretches of
// columns in turn and are summed in their order; where there are few outputs several blocks share the columns, and
// `finish` sums theirs in order. Nothing depends on which block is done first.
#include "codes.cuh"

namespace {

using namespace cluster;
using namespace cluster::quantized;

constexpr int WARPS = 8;
constexpr int TILE = 16;

struct Problem {
    Weights weights;
    const void* x;
    int rows;
    // Stretches of columns in all, and of one block.
    int stretches, stretches_each;
    // As out's element; null where there is none.
    const void* bias;
    void* out;
    int out_element;
    int64_t out_stride;
    // [splits][rows][outputs]; null where one block has all columns.
    float* partials;
};

// TILES of 16 outputs by COLUMNS of 8 rows of x.
template <class T, class Codes, int COLUMNS, int TILES>
struct Warp {
    static constexpr T* TYPE = nullptr;

    const Problem& problem;
    int lane, quad, place;
    // Of each output's row: its place in a column of tiles.
    int outputs[TILES][2];
    const uint4* codes[TILES][2];
    float sums[TILES][COLUMNS][4] = {}, group_sums[TILES][COLUMNS][4] = {};
    float scales[TILES][2] = {};
    uint32_t zero_pairs[TILES][2] = {};
    uint32_t group = 0xffffffff;

    __device__ __forceinline__ explicit Warp(const Problem& problem) : problem(problem) {
        lane = static_cast<int>(threadIdx.x) % WARP_SIZE;
        quad = lane / 4;
        place = lane % 4;
        const int64_t units = problem.weights.units_per_row<Codes>();
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int output = (static_cast<int>(blockIdx.x) * TILES + tile) * TILE + half * 8 + quad;
                // Those beyond the last one repeat it, and are not stored.
                outputs[tile][half] = min(output, problem.weights.outputs - 1);
                codes[tile][half] = problem.weights.codes + outputs[tile][half] * units + place;
            }
    }

    __device__ __forceinline__ void load(uint4 (&units)[TILES][2], int stretch) const {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) units[tile][half] = codes[tile][half][int64_t{stretch} * 4];
    }

    __device__ __forceinline__ void end_group() {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[tile][column][i] += scales[tile][i / 2] * group_sums[tile][column][i];
                    group_sums[tile][column][i] = 0.0F;
                }
    }

    __device__ __forceinline__ void begin_group(uint32_t next) {
        if (next == group) return;
        end_group();
        group = next;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                scales[tile][half] = problem.weights.scale(group, outputs[tile][half]);
                zero_pairs[tile][half] = problem.weights.zero_pair<Codes>(group, outputs[tile][half], TYPE);
            }
    }

    __device__ __forceinline__ void take(const uint4 (&units)[TILES][2], int stretch) {
        constexpr int CHUNKS = Codes::PORTIONS / Codes::PORTIONS_PER_CHUNK;
#pragma unroll
        for (int portion = 0; portion < Codes::PORTIONS; ++portion) {
            if (portion % Codes::PORTIONS_PER_CHUNK == 0)
                begin_group(problem.weights.chunk_groups[stretch * CHUNKS + portion / Codes::PORTIONS_PER_CHUNK]);
            const int64_t first = int64_t{stretch} * Codes::STRETCH + Codes::column(place, portion);
            uint4 x[COLUMNS];
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) {
                const int row = column * 8 + quad;
                x[column] = make_uint4(0, 0, 0, 0);
                if (row < problem.rows) {
                    const T* at = static_cast<const T*>(problem.x) + int64_t{row} * problem.weights.columns + first;
                    x[column] = Packed<T, VECTOR<T>>::load(at).bits;
                }
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                uint32_t low[4], high[4];
                Codes::pairs(units[tile][0], portion, zero_pairs[tile][0], low, TYPE);
                Codes::pairs(units[tile][1], portion, zero_pairs[tile][1], high, TYPE);
                // Which columns are called which does not matter, as long as both factors agree.
                const uint32_t first_half[4] = {low[0], high[0], low[1], high[1]};
                const uint32_t second_half[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
                for (int column = 0; column < COLUMNS; ++column) {
                    const uint32_t first_x[2] = {x[column].x, x[column].y}, second_x[2] = {x[column].z, x[column].w};
                    tile_multiply(group_sums[tile][column], first_half, first_x, TYPE);
                    tile_multiply(group_sums[tile][column], second_half, second_x, TYPE);
                }
            }
        }
    }
};

template <class T, class Codes, int COLUMNS, int TILES>
__global__ void __launch_bounds__(WARPS* WARP_SIZE, COLUMNS == 1 ? 3 : COLUMNS == 2 ? 2 : 1) multiply(Problem problem) {
    constexpr int WIDTH = TILES * TILE, ROWS = COLUMNS * 8;
    // Padded so that the lanes of a warp store to different banks.
    constexpr int STRIDE = WIDTH + 4;
    __shared__ float scratch[WARPS][ROWS][STRIDE];
    const int index = static_cast<int>(threadIdx.x) / WARP_SIZE;
    const int begin = static_cast<int>(blockIdx.y) * problem.stretches_each;
    const int end = min(begin + problem.stretches_each, problem.stretches);
    Warp<T, Codes, COLUMNS, TILES> warp(problem);

    uint4 units[TILES][2], next[TILES][2];
    int stretch = begin + index;
    if (stretch < end) warp.load(next, stretch);
    for (; stretch < end; stretch += WARPS) {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) units[tile][half] = next[tile][half];
        if (stretch + WARPS < end) warp.load(next, stretch + WARPS);
        warp.take(units, stretch);
    }
    warp.end_group();

#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                scratch[index][column * 8 + warp.place * 2 + i % 2][tile * TILE + i / 2 * 8 + warp.quad] =
                    warp.sums[tile][column][i];
    __syncthreads();
    for (int item = static_cast<int>(threadIdx.x); item < WIDTH * ROWS; item += WARPS * WARP_SIZE) {
        const int row = item / WIDTH, column = item % WIDTH;
        const int output = static_cast<int>(blockIdx.x) * WIDTH + column;
        if (row >= problem.rows || output >= problem.weights.outputs) continue;
        float sum = 0.0F;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += scratch[w][row][column];
        if (problem.partials) {
            const int64_t part = int64_t{blockIdx.y} * problem.rows + row;
            problem.partials[part * problem.weights.outputs + output] = sum;
            continue;
        }
        if (problem.bias) sum += load_one(problem.bias, output, problem.out_element);
        store_one(problem.out, row * problem.out_stride + output, problem.out_element, sum);
    }
}

}  // namespace

// `x: [rows, columns]` as `element` (1 or 2), rows up to 32; the weight as codes.cuh says; `out: [rows, outputs]` of
// `out_element` with `out_stride` elements between rows. `splits` blocks share the columns; from 2 on their sums go to
// `partials: [splits, rows, outputs]`, and neither bias nor out are touched.
extern "C" int cluster_quantized_multiply(void* stream, int element, int code, const void* x, const void* codes,
                                          const void* scales, int scale_element, const uint8_t* zeros,
                                          const uint32_t* chunk_groups, const void* bias, void* out, int out_element,
                                          int64_t out_stride, float* partials, int32_t rows, int32_t outputs,
                                          int32_t columns, int32_t splits) {
    return by_code(code, [&](auto code_tag) -> int {
        using Codes = typename decltype(code_tag)::Type;
        if (rows < 1 || rows > 32 || outputs < 1 || columns < 1 || columns % Codes::STRETCH != 0 || splits < 1)
            return cudaErrorInvalidValue;
        Problem problem{};
        problem.weights = {static_cast<const uint4*>(codes), scales, zeros, chunk_groups, scale_element, outputs, columns};
        problem.x = x;
        problem.rows = rows;
        problem.stretches = columns / Codes::STRETCH;
        problem.stretches_each = ceil_div(problem.stretches, splits);
        problem.bias = bias;
        problem.out = out;
        problem.out_element = out_element;
        problem.out_stride = out_stride;
        problem.partials = splits > 1 ? partials : nullptr;
        const auto launched = [&](auto* kernel, int tiles) -> int {
            const dim3 grid(static_cast<unsigned>(ceil_div(outputs, tiles * TILE)), static_cast<unsigned>(splits));
            return CLUSTER_LAUNCH(kernel, grid, WARPS * WARP_SIZE, 0, stream, problem);
        };
        const auto with = [&](auto tag) -> int {
            using T = typename decltype(tag)::Type;
            if (rows <= 8) return launched(&multiply<T, Codes, 1, 1>, 1);
            if (rows <= 16) return launched(&multiply<T, Codes, 2, 2>, 2);
            return launched(&multiply<T, Codes, 4, 2>, 2);
        };
        switch (element) {
            case 1: return with(Tag<Bf16>{});
            case 2: return with(Tag<F16>{});
            default: return cudaErrorInvalidValue;
        }
    });
}
