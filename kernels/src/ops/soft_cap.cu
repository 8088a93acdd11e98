// `cap * tanh(x / cap)` in place. Formula: soft_cap.rs. One thread for each element: the tanh takes longer than the access.
#include "../cuda/device.cuh"

namespace {

using namespace cluster;

constexpr unsigned THREADS = 256;

template <class T>
__global__ void __launch_bounds__(THREADS) soft_cap(T* __restrict__ x, int64_t count, float cap) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (at < count) x[at] = narrow<T>(cap * tanhf(widen(x[at]) / cap));
}

}  // namespace

// `x` has `count` elements.
extern "C" int cluster_soft_cap(void* stream, int element, void* x, int64_t count, float cap) {
    return by_element(element, [&](auto tag) -> int {
        using T = typename decltype(tag)::Type;
        if (!(cap > 0.0F)) return cudaErrorInvalidValue;
        if (count == 0) return cudaSuccess;
        return CLUSTER_LAUNCH(soft_cap<T>, static_cast<unsigned>(ceil_div(count, THREADS)), THREADS, 0, stream,
                              static_cast<T*>(x), count, cap);
    });
}
