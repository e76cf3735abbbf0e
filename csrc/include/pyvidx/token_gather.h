// token_gather: the kept patch tokens of a masked clip, with their position and time rows added.
//
//   out[b, s, k] = x[b, t, p] + position[p] + time[t],   (t, p) the source of (s, k)
//
// (BT-Adapter's masked branch input, arXiv:2309.15785, section 3.2.) A tube mask keeps the same patches in every frame:
// keep [B, K], p = keep[b, k], t = s. Otherwise keep [B, S, K] holds flat source indices t * P + p.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;  // cudaStream_t, so that no CUDA header is needed here

namespace pyvidx {

struct TokenGatherArgs {
  View<4> x;         // [B, T, P, C]  in, any strides but the last, which is 1
  View<3> keep;      // [B, S, K]     in, i64; a tube is [B, 1, K]; stride 0 shares rows between videos
  View<2> position;  // [P, C]        in, dtype of x, optional
  View<2> time;      // [>= T, C]     in, dtype of x, optional
  View<4> out;       // [B, S, K, C]  out, dtype of x
  bool tube;
};

void token_gather_cpu(const TokenGatherArgs& args, const Executor& executor);
void token_gather_cuda(const TokenGatherArgs& args, CUstream_st* stream);

// grad_x[b, t, p] = grad_out[b, s, k] where (t, p) is kept, 0 elsewhere. Kept indices must be unique per video.
struct TokenGatherBackwardArgs {
  View<4> grad_out;  // [B, S, K, C]  in, any strides but the last, which is 1
  View<3> source;    // [B, T, P]     in, i64: flat index s * K + k of the row that kept (t, p), or -1
  View<4> grad_x;    // [B, T, P, C]  out, every element is written
};

void token_gather_backward_cpu(const TokenGatherBackwardArgs& args, const Executor& executor);
void token_gather_backward_cuda(const TokenGatherBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
