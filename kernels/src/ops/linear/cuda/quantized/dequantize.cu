// A quantised weight as elements. Formula and shapes: dequantize.rs.
//
// A thread takes 16 bytes of codes; what it stores is side by side by eights.
#include "codes.cuh"

namespace {

using namespace cluster;
using namespace cluster::quantized;

template <class T, class Codes>
__global__ void __launch_bounds__(256) dequantize(Weights weights, T* __restrict__ out, int first, int64_t units) {
    constexpr F16* TYPE = nullptr;
    constexpr int CHUNKS = Codes::PORTIONS / Codes::PORTIONS_PER_CHUNK;
    const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (index >= units) return;
    const int64_t each = weights.units_per_row<Codes>();
    const int row = static_cast<int>(index / each), output = first + row;
    const auto in_row = static_cast<int>(index % each);
    const int stretch = in_row / 4, lane = in_row % 4;
    const uint4 unit = weights.codes[output * each + in_row];
#pragma unroll
    for (int portion = 0; portion < Codes::PORTIONS; ++portion) {
        const uint32_t group = weights.chunk_groups[stretch * CHUNKS + portion / Codes::PORTIONS_PER_CHUNK];
        const float scale = weights.scale(group, output);
        uint32_t pairs[4];
        Codes::pairs(unit, portion, weights.zero_pair<Codes>(group, output, TYPE), pairs, TYPE);
        float values[PORTION];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            widen_pair(pairs[i], values[2 * i], values[2 * i + 1], TYPE);
            values[2 * i] *= scale;
            values[2 * i + 1] *= scale;
        }
        T* to = out + int64_t{row} * weights.columns + int64_t{stretch} * Codes::STRETCH + Codes::column(lane, portion);
        constexpr int N = VECTOR<T>;
#pragma unroll
        for (int start = 0; start < PORTION; start += N) {
            float part[N];
#pragma unroll
            for (int i = 0; i < N; ++i) part[i] = values[start + i];
            Packed<T, N>::from(part).store(to + start);
        }
    }
}

}  // namespace

// `out: [count, columns]` as `element`, from output `first` on; the weight as codes.cuh says.
extern "C" int cluster_dequantize(void* stream, int element, int code, const void* codes, const void* scales,
                                  int scale_element, const uint8_t* zeros, const uint32_t* chunk_groups, void* out,
                                  int32_t outputs, int32_t columns, int32_t first, int32_t count) {
    return by_code(code, [&](auto code_tag) -> int {
        using Codes = typename decltype(code_tag)::Type;
        return by_element(element, [&](auto tag) -> int {
            using T = typename decltype(tag)::Type;
            if (columns < 1 || columns % Codes::STRETCH != 0 || first < 0 || count < 0 || first + count > outputs)
                return cudaErrorInvalidValue;
            if (count == 0) return cudaSuccess;
            const Weights weights{static_cast<const uint4*>(codes), scales, zeros, chunk_groups, scale_element, outputs, columns};
            const int64_t units = int64_t{count} * (columns / Codes::STRETCH) * 4;
            const auto blocks = static_cast<unsigned>(ceil_div(units, 256));
            return CLUSTER_LAUNCH((&dequantize<T, Codes>), blocks, 256, 0, stream, weights, static_cast<T*>(out), first, units);
        });
    });
}
