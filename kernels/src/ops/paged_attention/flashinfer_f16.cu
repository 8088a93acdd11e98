// FlashInfer's paged attention for half.
#ifndef CLUSTER_CUDA_EMULATION
#include "flashinfer.cuh"

namespace cluster::attention {
template void run<half, half>(const Call&, const Plan&, cudaStream_t);
}
#endif
