// temporal_attention: every patch position attends over the frames of its clip.
//
//   out[b, t, p, h] = sum_s softmax_s(scale <q[b, t, p, h], k[b, s, p, h]>) v[b, s, p, h],   s over the T frames
//
// (The temporal branch of BT-Adapter, arXiv:2309.15785, section 3.1; divided space-time attention.) qkv is read where
// and as the projection left it; neither a [B * P, T, C] copy nor the scores reach memory.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;  // cudaStream_t, so that no CUDA header is needed here

namespace pyvidx {

constexpr int kTemporalAttentionMaxFrames = 128;  // the scores of one (b, p, h) must fit in shared memory

struct TemporalAttentionArgs {
  View<6> qkv;  // [B, T, P, 3, H, D]  in, any strides but the last, which is 1
  View<5> out;  // [B, T, P, H, D]     out, dtype of qkv, likewise
  double scale;
};

void temporal_attention_cpu(const TemporalAttentionArgs& args, const Executor& executor);
void temporal_attention_cuda(const TemporalAttentionArgs& args, CUstream_st* stream);

// With w = softmax(scale q k^T) computed again and dw = grad_out v^T - rowsum(w * grad_out v^T):
//   grad_v = w^T grad_out,   grad_q = scale (w * dw) k,   grad_k = scale (w * dw)^T q
// Neither out nor the softmax's sums are needed: all T scores of a row are at hand, so w costs no further pass.
struct TemporalAttentionBackwardArgs {
  View<5> grad_out;  // [B, T, P, H, D]     in, dtype of qkv, any strides but the last, which is 1
  View<6> qkv;       // [B, T, P, 3, H, D]  in, likewise
  View<6> grad_qkv;  // [B, T, P, 3, H, D]  out, every element is written
  double scale;
};

void temporal_attention_backward_cpu(const TemporalAttentionBackwardArgs& args, const Executor& executor);
void temporal_attention_backward_cuda(const TemporalAttentionBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
