// FlashInfer's paged attention for bfloat16.
#ifndef CLUSTER_CUDA_EMULATION
#include "flashinfer.cuh"

namespace cluster::attention {
template void run<nv_bfloat16, nv_bfloat16>(const Call&, const Plan&, cudaStream_t);
}
#endif
