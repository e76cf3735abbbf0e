// quick_gelu: the activation of OpenAI's CLIP, and so of BT-Adapter's branch.
//
//   out = x * sigmoid(1.702 x)
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;

namespace pyvidx {

constexpr double kQuickGELU = 1.702;

// All tensors are contiguous and have the dtype of x.
struct QuickGELUArgs {
  View<1> x;    // [n]  in
  View<1> out;  // [n]  out
};

void quick_gelu_cpu(const QuickGELUArgs& args, const Executor& executor);
void quick_gelu_cuda(const QuickGELUArgs& args, CUstream_st* stream);

// grad_x = grad_out * s * (1 + 1.702 x (1 - s)), s = sigmoid(1.702 x)
struct QuickGELUBackwardArgs {
  View<1> grad_out;  // [n]  in
  View<1> x;         // [n]  in
  View<1> grad_x;    // [n]  out
};

void quick_gelu_backward_cpu(const QuickGELUBackwardArgs& args, const Executor& executor);
void quick_gelu_backward_cuda(const QuickGELUBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
