// residual_norm: a residual stream takes in what a layer adds to it, and the LayerNorm that follows, in one pass.
//
//   out[b, s, k] = x[b, s, k] + factor[b, s] y[b, s, k]     normed = LayerNorm(out)
//
// With class rows (in front of every slot s of a video, and the same in all of them):
//   out_cls[b, s] = cls[b] + sum_s' share[b, s'] y_cls[b, s']  the sum only where there is a share
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;

namespace pyvidx {

// Views: any strides but the last, which is 1 except in factor. "wide": float, or double where x is double. y, normed
// and their gradients have the dtype of x or, where that is float, one of 16 bits (autocast); all else has the dtype of
// x.
struct ResidualNormArgs {
  View<4> x;           // [B, S, K, C]  in
  View<4> y;           // [B, S, K, C]  in, what the layer's last product gave
  View<2> factor;      // [B, S]        in, wide, optional: DropPath
  View<2> cls;         // [B, C]        in, optional: there are class rows
  View<3> y_cls;       // [B, S, C]     in, optional, with cls
  View<2> share;       // [B, S]        in, wide, with y_cls
  View<1> weight;      // [C]           in
  View<1> shift;       // [C]           in, the LayerNorm's bias
  View<4> out;         // [B, S, K, C]  out, may be x or, of one dtype, y
  View<4> normed;      // [B, S, K, C]  out
  View<4> stats;       // [B, S, K, 2]  out, wide: mean and 1 / std of each row
  View<3> out_cls;     // [B, S, C]     out, with cls; may be y_cls
  View<3> normed_cls;  // [B, S, C]     out, with cls
  View<3> stats_cls;   // [B, S, 2]     out, wide, with cls
  double eps;
};

void residual_norm_cpu(const ResidualNormArgs& args, const Executor& executor);
void residual_norm_cuda(const ResidualNormArgs& args, CUstream_st* stream);

// The gradients. g, the whole gradient of out: what came for out, and through the LayerNorm what came for normed. The
// slots' class rows are one row with the sum of their gradients. Sums over rows have two stages with a split that
// depends on the sizes alone.
struct ResidualNormBackwardArgs {
  View<4> grad_out;         // [B, S, K, C]  in
  View<4> grad_normed;      // [B, S, K, C]  in
  View<4> value;            // [B, S, K, C]  in, out of the forward
  View<4> stats;            // [B, S, K, 2]  in, wide
  View<3> grad_out_cls;     // [B, S, C]     in, optional: there are class rows
  View<3> grad_normed_cls;  // [B, S, C]     in, with them; and so on
  View<3> value_cls;        // [B, S, C]     in
  View<3> stats_cls;        // [B, S, 2]     in, wide
  View<2> factor;           // [B, S]        in, wide, optional
  View<2> share;            // [B, S]        in, wide, optional, with class rows
  View<1> weight;           // [C]           in
  View<4> grad_x;           // [B, S, K, C]  out: g
  View<4> grad_y;           // [B, S, K, C]  out, optional: factor * g
  View<3> grad_cls;         // [B, R, C]     out, with class rows: their g in row 0, zeros in the others
  View<3> grad_y_cls;       // [B, S, C]     out, with share
  View<1> grad_weight;      // [C]           out
  View<1> grad_shift;       // [C]           out
  View<3> partial;          // [2, row_parts(B * S, K) + B, C]  scratch, wide, contiguous
  View<3> class_sums;       // [B, 2, C]     scratch of the CPU, wide, contiguous, with class rows
};

void residual_norm_backward_cpu(const ResidualNormBackwardArgs& args, const Executor& executor);
void residual_norm_backward_cuda(const ResidualNormBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
