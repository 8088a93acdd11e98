// FlashInfer's paged attention for bfloat16 over keys and values of 8-bit floats.
#ifndef CLUSTER_CUDA_EMULATION
#include "flashinfer.cuh"

namespace cluster::attention {
template void run<nv_bfloat16, __nv_fp8_e4m3>(const Call&, const Plan&, cudaStream_t);
}
#endif
