// What goes before and after a product with a quantised weight: rows in the order of the weight's columns, as elements
// or as codes, and sums that become results. Formulas and shapes: arrange.rs.
#include "../../../../cuda/device.cuh"
#include "../../../../cuda/fp8.cuh"

namespace {

using namespace cluster;

constexpr uint32_t NO_INPUT = 0xffffffff;

// Element `column` of a row of x; zero where no input belongs to it.
template <class T>
__device__ __forceinline__ T input_of(const T* row, const uint32_t* inputs, int column) {
    const uint32_t input = inputs ? inputs[column] : static_cast<uint32_t>(column);
    return input == NO_INPUT ? T{} : row[input];
}

template <class T>
__global__ void __launch_bounds__(256) arrange(const T* __restrict__ x, const uint32_t* __restrict__ inputs,
                                               T* __restrict__ out, int width, int columns, unsigned blocks_per_row) {
    const int64_t row = blockIdx.x / blocks_per_row;
    const int column = static_cast<int>(blockIdx.x % blocks_per_row * blockDim.x + threadIdx.x);
    if (column < columns) out[row * columns + column] = input_of(x + row * width, inputs, column);
}

// One block for each row: its largest, and then its codes, of which a thread stores four at once.
template <class T>
__global__ void __launch_bounds__(256) quantize_rows(const T* __restrict__ x, const uint32_t* __restrict__ inputs,
                                                     uint32_t* __restrict__ codes, float* __restrict__ scales,
                                                     int width, int columns) {
    __shared__ float scratch[WARP_SIZE];
    const T* row = x + int64_t{blockIdx.x} * width;
    float most = 0.0F;
    for (int column = static_cast<int>(threadIdx.x); column < width; column += static_cast<int>(blockDim.x))
        most = fmaxf(most, fabsf(widen(row[column])));
    most = block_max(most, scratch);
    // The inverse of anything smaller may be no number; nobody sees what such a row would have given.
    const bool is_zero = most < 1e-30F;
    const float factor = is_zero ? 0.0F : LARGEST_E4M3 / most;
    if (threadIdx.x == 0) scales[blockIdx.x] = is_zero ? 0.0F : most / LARGEST_E4M3;
    uint32_t* to = codes + int64_t{blockIdx.x} * (columns / 4);
    for (int word = static_cast<int>(threadIdx.x); word < columns / 4; word += static_cast<int>(blockDim.x)) {
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) values[i] = factor * widen(input_of(row, inputs, 4 * word + i));
        to[word] = e4m3_pair(values[0], values[1]) | e4m3_pair(values[2], values[3]) << 16;
    }
}

struct Finish {
    // [parts][rows][outputs]
    const float* sums;
    int parts;
    // Null where there are none.
    const float *row_scales, *output_scales;
    const void* bias;
    void* out;
    int out_element;
    int64_t rows, outputs, out_stride;
};

__global__ void __launch_bounds__(256) finish(Finish problem) {
    const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, all = problem.rows * problem.outputs;
    if (index >= all) return;
    const int64_t row = index / problem.outputs, output = index % problem.outputs;
    float sum = 0.0F;
    for (int part = 0; part < problem.parts; ++part) sum += problem.sums[part * all + index];
    if (problem.row_scales) sum *= problem.row_scales[row] * problem.output_scales[output];
    if (problem.bias) sum += load_one(problem.bias, output, problem.out_element);
    store_one(problem.out, row * problem.out_stride + output, problem.out_element, sum);
}

}  // namespace

// `out: [rows, columns]` takes column j from `x: [rows, width]` at `inputs[j]`, at j where that is null.
extern "C" int cluster_arrange(void* stream, int element, const void* x, const uint32_t* inputs, void* out, int64_t rows,
                               int32_t width, int32_t columns) {
    return by_element(element, [&](auto tag) -> int {
        using T = typename decltype(tag)::Type;
        if (rows == 0 || columns == 0) return cudaSuccess;
        const unsigned threads = whole_warps(columns, 256);
        const auto blocks = static_cast<unsigned>(ceil_div(columns, threads));
        return CLUSTER_LAUNCH(&arrange<T>, static_cast<unsigned>(rows * blocks), threads, 0, stream,
                              static_cast<const T*>(x), inputs, static_cast<T*>(out), width, columns, blocks);
    });
}

// As `cluster_arrange`, but `codes: [rows, columns]` in e4m3 with `scales: [rows]`. `columns` is a multiple of 4.
extern "C" int cluster_quantize_rows(void* stream, int element, const void* x, const uint32_t* inputs, void* codes,
                                     float* scales, int64_t rows, int32_t width, int32_t columns) {
    return by_element(element, [&](auto tag) -> int {
        using T = typename decltype(tag)::Type;
        if (columns % 4 != 0) return cudaErrorInvalidValue;
        if (rows == 0 || columns == 0) return cudaSuccess;
        return CLUSTER_LAUNCH(&quantize_rows<T>, static_cast<unsigned>(rows), whole_warps(columns / 4, 256), 0, stream,
                              static_cast<const T*>(x), inputs, static_cast<uint32_t*>(codes), scales, width, columns);
    });
}

// `out: [rows, outputs]` from `sums: [parts, rows, outputs]`, with scales by row and by output and a bias where these
// are not null.
extern "C" int cluster_finish_sums(void* stream, const float* sums, int32_t parts, const float* row_scales,
                                   const float* output_scales, const void* bias, void* out, int out_element,
                                   int64_t rows, int64_t outputs, int64_t out_stride) {
    if (rows == 0 || outputs == 0) return cudaSuccess;
    const Finish problem{sums, parts, row_scales, output_scales, bias, out, out_element, rows, outputs, out_stride};
    return CLUSTER_LAUNCH(&finish, static_cast<unsigned>(ceil_div(rows * outputs, 256)), 256, 0, stream, problem);
}
