// Small kernels that say whether the emulation is CUDA: what they compute is known, and some are wrong on purpose.
// Their twin with the expected results is emulation_test.rs.
#include "device.cuh"

namespace {

using namespace cluster;

// out[0..256]: the block's sum in every thread; then the maximum; then the sum of each group of 8 lanes.
__global__ void reductions(const float* in, float* out) {
    __shared__ float first[32], second[32];
    const unsigned i = threadIdx.x, n = blockDim.x;
    out[i] = block_sum(in[i], first);
    out[n + i] = block_max(in[i], second);
    out[2 * n + i] = warp_reduce<8>(in[i], Sum{});
}

// Each lane's view of the shuffles and votes, [7, 32].
__global__ void shuffles(const float* in, float* out) {
    const int lane = static_cast<int>(threadIdx.x);
    const float value = in[lane];
    out[lane] = __shfl_up_sync(ALL_LANES, value, 3);
    out[32 + lane] = __shfl_down_sync(ALL_LANES, value, 3, 8);
    out[64 + lane] = __shfl_sync(ALL_LANES, value, lane * 7 % 32);
    out[96 + lane] = static_cast<float>(__popc(__ballot_sync(ALL_LANES, value > 0.0F)));
    // Half of the warp alone.
    if (lane < 16) out[128 + lane] = __shfl_xor_sync(0xffff, value, 1);
    else out[128 + lane] = value;
    __syncwarp();
    out[160 + lane] = static_cast<float>(__reduce_min_sync(ALL_LANES, lane - 40));
    out[192 + lane] = static_cast<float>(__match_any_sync(ALL_LANES, lane / 16) & 0xffff);
}

// Reverses each block's part through static shared memory, and sums everything in out[n] and counts in out[n + 1].
__global__ void shared_and_atomics(const float* in, float* out, int n) {
    __shared__ float values[64];
    CLUSTER_DYNAMIC_SHARED(float, more);
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    values[threadIdx.x] = in[i];
    more[threadIdx.x] = 1.0F;
    __syncthreads();
    out[i] = values[blockDim.x - 1 - threadIdx.x];
    atomicAdd(&out[n], in[i]);
    atomicMax(reinterpret_cast<int*>(&out[n + 1]), static_cast<int>(i));
    if (__syncthreads_count(more[63 - threadIdx.x] == 1.0F) != 64) out[i] = -1.0F;
}

__global__ void barrier_in_a_branch(float* out) {
    if (threadIdx.x < 7) __syncthreads();
    out[threadIdx.x] = 1.0F;
}

__global__ void two_barriers(float* out) {
    if (threadIdx.x % 2 == 0)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1.0F;
}

__global__ void lanes_that_disagree(float* out) {
    out[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(ALL_LANES, 1.0F, 1)
                                        : static_cast<float>(__ballot_sync(ALL_LANES, 1));
}

__global__ void lane_that_left(float* out) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, 1.0F, 1);
}

__global__ void outside_dynamic_shared(float* out) {
    CLUSTER_DYNAMIC_SHARED(float, values);
    values[threadIdx.x + 1] = 1.0F;
    out[threadIdx.x] = 1.0F;
}

__global__ void outside_static_shared(float* out) {
    __shared__ float values[32];
    values[threadIdx.x + 1] = 1.0F;
    out[threadIdx.x] = values[0];
}

// Without its barrier: some order of the threads reads what was not yet written.
__global__ void missing_barrier(const float* in, float* out) {
    CLUSTER_DYNAMIC_SHARED(float, values);
    values[threadIdx.x] = in[threadIdx.x];
    out[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

template <class T>
__global__ void round_trip(const float* in, float* out, int n) {
    const int first = static_cast<int>(threadIdx.x) * VECTOR<T>;
    T stored[VECTOR<T>];
    float values[VECTOR<T>];
    for (int i = 0; i < VECTOR<T>; ++i) values[i] = first + i < n ? in[first + i] : 0.0F;
    alignas(16) T packed[VECTOR<T>];
    Packed<T, VECTOR<T>>::from(values).store(packed);
    for (int i = 0; i < VECTOR<T>; ++i) stored[i] = narrow<T>(values[i]);
    Packed<T, VECTOR<T>>::load(packed).widen_to(values);
    for (int i = 0; i < VECTOR<T>; ++i)
        if (first + i < n) {
            // Vectors and single elements have to agree to the bit.
            const bool same = __float_as_uint(values[i]) == __float_as_uint(widen(stored[i]));
            out[first + i] = same ? values[i] : -12345.0F;
        }
}

}  // namespace

// Runs one of the kernels over `in: [n]`; `out` is as long as the kernel needs.
extern "C" int cluster_emulation_test(int which, const float* in, float* out, int n) {
    switch (which) {
        case 0: return CLUSTER_LAUNCH(reductions, 1, 256, 0, nullptr, in, out);
        case 1: return CLUSTER_LAUNCH(shuffles, 1, 32, 0, nullptr, in, out);
        case 2: return CLUSTER_LAUNCH(shared_and_atomics, n / 64, 64, 64 * sizeof(float), nullptr, in, out, n);
        case 3: return CLUSTER_LAUNCH(barrier_in_a_branch, 1, 64, 0, nullptr, out);
        case 4: return CLUSTER_LAUNCH(two_barriers, 1, 64, 0, nullptr, out);
        case 5: return CLUSTER_LAUNCH(lanes_that_disagree, 1, 32, 0, nullptr, out);
        case 6: return CLUSTER_LAUNCH(lane_that_left, 1, 32, 0, nullptr, out);
        case 7: return CLUSTER_LAUNCH(outside_dynamic_shared, 1, 32, 32 * sizeof(float), nullptr, out);
        case 8: return CLUSTER_LAUNCH(outside_static_shared, 1, 32, 0, nullptr, out);
        case 9: return CLUSTER_LAUNCH(missing_barrier, 2, 32, 32 * sizeof(float), nullptr, in, out);
        case 10: return CLUSTER_LAUNCH(lane_that_left, 0, 32, 0, nullptr, out);
        case 11: return CLUSTER_LAUNCH(lane_that_left, 1, 20, 0, nullptr, out);
        default:
            return by_element(which - 20, [&](auto tag) {
                using T = typename decltype(tag)::Type;
                return CLUSTER_LAUNCH(round_trip<T>, 1, ceil_div(n, VECTOR<T>), 0, nullptr, in, out, n);
            });
    }
}

// The sentence that the last failed launch of this thread printed.
extern "C" const char* cluster_emulation_message() { return cluster::emulation::last_message(); }
