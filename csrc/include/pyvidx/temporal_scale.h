// temporal_scale: a depthwise convolution over the frames of a clip, as shifted scales, in the layout of the tokens.
//
//   out[b, t, n] = bias + sum_k weight[:, k] x[b, t + k - K / 2, n] + residual[b, t, n]      (per channel)
//
// (ST-Adapter, arXiv:2206.13559, section 3.3, whose published kernel is 3 x 1 x 1.) Frames outside the clip, and frames
// that the mask leaves out, read as 0.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;  // cudaStream_t, so that no CUDA header is needed here

namespace pyvidx {

constexpr int kMaxTaps = 15;

struct TemporalScaleArgs {
  View<4> x;         // [B, T, N, C]  in, any strides but the last, which is 1
  View<2> weight;    // [C, K]        in, dtype of x, K odd and at most kMaxTaps
  View<1> bias;      // [C]           in, dtype of x, optional
  View<2> mask;      // [B, T]        in, i32, optional: 0 where a frame reads as 0
  View<4> residual;  // [B, T, N, C]  in, dtype of x, optional
  View<4> out;       // [B, T, N, C]  out, dtype of x
  View<2> taps;      // [K + 2, C]    scratch, wide, contiguous: the CPU keeps weight^T, bias and a row of zeros there
};

void temporal_scale_cpu(const TemporalScaleArgs& args, const Executor& executor);
void temporal_scale_cuda(const TemporalScaleArgs& args, CUstream_st* stream);

// grad_x[b, s, n] = sum_k weight[:, k] grad_out[b, s - k + K / 2, n], 0 where the mask leaves s out;
// grad_weight[:, k] = sum over (b, s, n) of grad_out[b, s - k + K / 2, n] x[b, s, n]; grad_bias = sum of grad_out.
// Sums over rows have two stages with a split that depends on the sizes alone.
struct TemporalScaleBackwardArgs {
  View<4> grad_out;     // [B, T, N, C]     in, any strides but the last, which is 1
  View<4> x;            // [B, T, N, C]     in, optional (grad_bias tells: an x without elements is absent)
  View<2> weight;       // [C, K]           in
  View<2> mask;         // [B, T]           in, i32, optional
  View<4> grad_x;       // [B, T, N, C]     out
  View<2> grad_weight;  // [C, K]           out, with x
  View<1> grad_bias;    // [C]              out, with x; absent: grad_x is all there is to compute
  View<3> partial;      // [parts, K + 1, C]  scratch, wide, contiguous, with x: sums for each tap, then for the bias
  View<2> taps;         // [K + 2, C]       scratch, wide, contiguous
};

void temporal_scale_backward_cpu(const TemporalScaleBackwardArgs& args, const Executor& executor);
void temporal_scale_backward_cuda(const TemporalScaleBackwardArgs& args, CUstream_st* stream);

// A part: kScaleRows token positions in kScaleFrames consecutive frames.
constexpr int64_t kScaleRows = 8, kScaleFrames = 16;
PYVIDX_INLINE int64_t temporal_scale_parts(int64_t B, int64_t T, int64_t N) {
  return B * ((T + kScaleFrames - 1) / kScaleFrames) * ((N + kScaleRows - 1) / kScaleRows);
}

}  // namespace pyvidx
