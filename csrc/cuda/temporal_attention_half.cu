#include "temporal_attention.cuh"

#ifndef __CUDACC_RTC__
namespace pyvidx::cuda {
template void launch_temporal_attention<__half>(const TemporalAttentionArgs&, cudaStream_t);
template void launch_temporal_attention_backward<__half>(const TemporalAttentionBackwardArgs&, cudaStream_t);
}  // namespace pyvidx::cuda
#endif
