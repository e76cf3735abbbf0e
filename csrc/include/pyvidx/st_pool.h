// st_pool: the mean over the frames of a clip, for every patch, and the mean over the patches of every frame.
//
//   spatial[b, p] = mean_t x[b, t, p],   temporal[b, t] = mean_p x[b, t, p]
//
// (Video-ChatGPT, arXiv:2306.05424, section 3.1.) With a mask, over its frames alone: the others have no part in
// spatial, and rows of 0 in temporal; a clip without any has 0 in both.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;  // cudaStream_t, so that no CUDA header is needed here

namespace pyvidx {

// A part: kPoolRows patches of `frames` consecutive frames. It has one sum for each patch and one for each frame; the
// second stage adds up those of several parts. The split depends on the sizes alone.
constexpr int64_t kPoolRows = 32;
// A GPU sums up frames of at most so many patches at once, without parts.
constexpr int64_t kPoolAtOnce = 256;

struct StPoolArgs {
  View<4> x;           // [B, T, P, C]       in, T, P > 0, any strides but the last, which is 1
  View<2> mask;        // [B, T]             in, i32, optional: 0 where a frame is left out
  View<3> spatial;     // [B, P, C]          out, dtype of x
  View<3> temporal;    // [B, T, C]          out, dtype of x
  View<4> patch_sums;  // [B, spans, P, C]   scratch, wide, contiguous; size 0 where spans is 1, and without parts
  View<4> frame_sums;  // [B, chunks, T, C]  scratch, wide, contiguous; size 0 without parts
  int64_t frames;      // of a part, at least 1; on the CPU all of them; 0: no parts
};

void st_pool_cpu(const StPoolArgs& args, const Executor& executor);
void st_pool_cuda(const StPoolArgs& args, CUstream_st* stream);

// grad_x[b, t, p] = grad_spatial[b, p] / frames of the mask + grad_temporal[b, t] / P, 0 in frames that are left out.
struct StPoolBackwardArgs {
  View<3> grad_spatial;   // [B, P, C]     in, any strides but the last, which is 1
  View<3> grad_temporal;  // [B, T, C]     in, likewise
  View<2> mask;           // [B, T]        in, i32, optional
  View<4> grad_x;         // [B, T, P, C]  out
};

void st_pool_backward_cpu(const StPoolBackwardArgs& args, const Executor& executor);
void st_pool_backward_cuda(const StPoolBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
