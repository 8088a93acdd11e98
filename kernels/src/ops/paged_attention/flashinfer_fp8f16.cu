// FlashInfer's paged attention for half over keys and values of 8-bit floats.
#ifndef CLUSTER_CUDA_EMULATION
#include "flashinfer.cuh"

namespace cluster::attention {
template void run<half, __nv_fp8_e4m3>(const Call&, const Plan&, cudaStream_t);
}
#endif
