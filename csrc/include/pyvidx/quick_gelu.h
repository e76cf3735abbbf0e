// quick_gelu: the activation of OpenAI's CLIP, and so of BT-Adapter's branch, after the bias of the layer before it.
//
//   v = x + bias,  out = v * sigmoid(1.702 v)
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;

namespace pyvidx {

constexpr double kQuickGELU = 1.702;

// All tensors are contiguous and have the dtype of x, unless it says "wide": float, or double where x is double.
struct QuickGELUArgs {
  View<1> x;     // [n]  in; with a bias rows of C, n = rows * C
  View<1> bias;  // [C]  in, optional
  View<1> out;   // [n]  out; may be x
};

void quick_gelu_cpu(const QuickGELUArgs& args, const Executor& executor);
void quick_gelu_cuda(const QuickGELUArgs& args, CUstream_st* stream);

// grad_x = grad_out * s * (1 + 1.702 v (1 - s)), s = sigmoid(1.702 v); grad_bias = its sum over rows, before it is
// rounded. The sum has two stages: `chunk` rows at a time, then these partial sums.
struct QuickGELUBackwardArgs {
  View<1> grad_out;   // [n]  in
  View<1> x;          // [n]  in
  View<1> bias;       // [C]  in, optional
  View<1> grad_x;     // [n]  out, optional where there is grad_bias
  View<1> grad_bias;  // [C]  out, optional, with bias
  View<2> partial;    // [ceil(rows / chunk), C]  scratch, wide, with grad_bias
  int64_t chunk;      // with grad_bias
};

void quick_gelu_backward_cpu(const QuickGELUBackwardArgs& args, const Executor& executor);
void quick_gelu_backward_cuda(const QuickGELUBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
