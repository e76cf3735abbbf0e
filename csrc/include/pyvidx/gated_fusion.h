// gated_fusion: the branch takes in the backbone's newest tokens (BT-Adapter, arXiv:2309.15785, section 3.1).
//
//   out[b, s, k] = (1 - w) z[b, s, k] + w x[b, t, p]            w = sigmoid(scale * gate), one per channel
//   out_cls[b]   = (1 - w) cls[b] + w mean_t x_cls[b, t]
//
// with (t, p) the source of (s, k), as in token_gather. Without a gate both are plain sums. With `position`, it is the
// branch's first input: out = x + position[1 + p] + time[t], out_cls = (mean_t x_cls + cls + position[0]) / 2.
// pair: frames 2u and 2u + 1 of x are averaged first; t, s and keep then count pairs.
// Where `normed` is present, LayerNorm(out) is written in the same pass, from the row before it is rounded.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/row_parts.h"
#include "pyvidx/view.h"

struct CUstream_st;

namespace pyvidx {

// Views: any strides but the last, which is 1. All floating tensors have the dtype of x, unless it says "wide": float,
// or double where x is double.
struct GatedFusionArgs {
  View<4> x;         // [B, T, P, C]  in, patch tokens of the backbone
  View<3> x_cls;     // [B, T, C]     in, its class tokens
  View<4> z;         // [B, S, K, C]  in, patch tokens of the branch; not read at the first input
  View<2> cls;       // [B, C]        in, class row of the branch; the seed at the first input
  View<1> gate;      // [C]           in, optional
  View<2> position;  // [1 + P, C]    in, optional: this is the first input
  View<2> time;      // [>= S, C]     in, with position
  View<3> keep;      // [B, S, K]     in, i64, optional (all patches); a tube is [B, 1, K]
  View<1> weight;    // [C]           in, with normed
  View<1> bias;      // [C]           in, with normed
  View<4> out;       // [B, S, K, C]  out, may be z; optional where there is normed
  View<2> out_cls;   // [B, C]        out, may be cls; optional
  View<4> normed;    // [B, S, K, C]  out, optional
  View<4> stats;     // [B, S, K, 2]  out, wide, contiguous, with normed: mean and 1 / std of each row
  View<1> mix;       // [C]           scratch, wide: the CPU keeps w here
  double scale, eps;
  bool tube, pair;

  PYVIDX_INLINE const View<4>& rows() const { return normed.size[3] > 0 ? normed : out; }
};

void gated_fusion_cpu(const GatedFusionArgs& args, const Executor& executor);
void gated_fusion_cuda(const GatedFusionArgs& args, CUstream_st* stream);

// The gradients. With g the whole gradient that reaches out (what came for out, and through the LayerNorm what came for
// normed): grad_z = (1 - w) g, grad_x = w g at the source and 0 where nothing was kept, grad_gate = scale w (1 - w) *
// sum of g (x - z). Sums over rows have two stages with a split that depends on the sizes alone, so they do not depend
// on the number of threads.
struct GatedFusionBackwardArgs {
  View<4> grad_out;      // [B, S, K, C]  in, optional
  View<2> grad_out_cls;  // [B, C]        in, optional
  View<4> grad_normed;   // [B, S, K, C]  in, optional: there was no LayerNorm
  View<4> value;         // [B, S, K, C]  in, out of the forward; absent: computed again from x and z
  View<4> x;             // [B, T, P, C]  in, for grad_gate or where value is absent; so are the next three
  View<3> x_cls;         // [B, T, C]
  View<4> z;             // [B, S, K, C]
  View<2> cls;           // [B, C]
  View<1> gate;          // [C]           in, optional
  View<3> keep;          // [B, S, K]     in, i64, optional; unique per video
  View<3> source;        // [B, T, P]     in, i64, with keep: flat index s * K + k of the row that kept (t, p), or -1
  View<1> weight;        // [C]           in, with grad_normed
  View<4> stats;         // [B, S, K, 2]  in, wide, with grad_normed
  View<4> grad_x;        // [B, T, P, C]  out, optional; every element is written
  View<3> grad_x_cls;    // [B, T, C]     out, with grad_x
  View<4> grad_z;        // [B, S, K, C]  out, optional
  View<3> grad_cls;      // [B, R, C]     out, optional: in row 0, zeros in the others
  View<1> grad_gate;     // [C]           out, optional
  View<1> grad_weight;   // [C]           out, with grad_normed
  View<1> grad_bias;     // [C]           out, with grad_normed
  View<3> partial;       // [3, parts + B, C]  scratch, wide, contiguous: sums for gate, weight, bias
  View<1> mix;           // [C]           scratch, wide
  int64_t parts;         // row_parts(B * S, K)
  double scale;
  bool tube, pair;
  bool first;  // the gradients of the first input: the class rows carry half

  PYVIDX_INLINE const View<4>& rows() const { return grad_normed.size[3] > 0 ? grad_normed : grad_out; }
};

void gated_fusion_backward_cpu(const GatedFusionBackwardArgs& args, const Executor& executor);
void gated_fusion_backward_cuda(const GatedFusionBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
