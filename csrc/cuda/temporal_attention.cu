// Which instantiation of temporal_attention.cuh a call takes. Each dtype has a file of its own, so that they compile
// side by side: together they take a third of the time of all kernels.
#include "block.cuh"
#include "pyvidx/temporal_attention.h"

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace cuda {
template <typename T>
void launch_temporal_attention(const TemporalAttentionArgs& args, cudaStream_t stream);
template <typename T>
void launch_temporal_attention_backward(const TemporalAttentionBackwardArgs& args, cudaStream_t stream);
}  // namespace cuda

namespace {

// Is there anything to do?
bool check_sizes(const View<6>& qkv) {
  const int64_t frames = qkv.size[1], D = qkv.size[5];
  if (frames > kTemporalAttentionMaxFrames) {
    throw std::invalid_argument("temporal_attention: at most 128 frames, got " + std::to_string(frames));
  }
  if (D > 0x7fffffff) throw std::invalid_argument("temporal_attention: a head's width must be below 2^31");
  return qkv.size[0] * qkv.size[2] * qkv.size[4] * frames * D > 0;
}

}  // namespace

void temporal_attention_cuda(const TemporalAttentionArgs& args, cudaStream_t stream) {
  if (!check_sizes(args.qkv)) return;
  visit_dtype<float, double, __half, __nv_bfloat16>("temporal_attention", args.qkv.dtype, [&](auto t) {
    launch_temporal_attention<typename decltype(t)::type>(args, stream);
  });
}

void temporal_attention_backward_cuda(const TemporalAttentionBackwardArgs& args, cudaStream_t stream) {
  if (!check_sizes(args.qkv)) return;
  visit_dtype<float, double, __half, __nv_bfloat16>("temporal_attention_backward", args.qkv.dtype, [&](auto t) {
    launch_temporal_attention_backward<typename decltype(t)::type>(args, stream);
  });
}

}  // namespace pyvidx
#endif
