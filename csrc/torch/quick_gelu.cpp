#include "pyvidx/quick_gelu.h"

#include <algorithm>
#include <tuple>

#include "torch_view.h"

namespace pyvidx {
namespace {

using torch::stable::contiguous;
using torch::stable::empty_like;
using torch::stable::new_empty;

View<1> flat(const Tensor& x) {  // contiguous
  View<1> v;
  v.data = x.data_ptr(), v.dtype = dtype_of(x);
  v.size[0] = x.numel(), v.stride[0] = 1;
  return v;
}

// Rows that are summed in one go: few partial sums, but enough for the threads of a CPU or the blocks of a GPU. Of the
// sizes alone, and so are the sums.
int64_t chunk_of(const Tensor& x, int64_t rows) {
  return std::max<int64_t>(x.is_cpu() ? 64 : 16, (rows + 1023) / 1024);
}

void quick_gelu_out(const Tensor& x, const OptionalTensor& bias, Tensor out) {
  const Tensor x_ = contiguous(x);
  const OptionalTensor bias_ = unit_last_stride(bias);
  QuickGELUArgs args{flat(x_), view<1>(bias_), flat(out)};
  PYVIDX_RUN(quick_gelu, x, args);
}

Tensor quick_gelu(const Tensor& x, const OptionalTensor& bias) {
  const Tensor x_ = contiguous(x);
  Tensor out = empty_like(x_);
  quick_gelu_out(x_, bias, out);
  return out;
}

std::tuple<Tensor, Tensor> quick_gelu_backward(const Tensor& grad_out, const Tensor& x, const OptionalTensor& bias,
                                               bool need_x, bool need_bias) {
  const Tensor grad_ = contiguous(grad_out), x_ = contiguous(x);
  const OptionalTensor bias_ = unit_last_stride(bias);
  QuickGELUBackwardArgs args = {};
  args.grad_out = flat(grad_), args.x = flat(x_), args.bias = view<1>(bias_);
  Tensor grad_x = need_x ? empty_like(x_) : nothing(x), grad_bias = nothing(x), partial = nothing(x);
  args.grad_x = flat(grad_x);
  const int64_t C = bias ? bias->size(0) : 0, rows = C > 0 ? x.numel() / C : 0;
  args.chunk = chunk_of(x, rows);
  if (bias && need_bias) {
    grad_bias = new_empty(x, {C}), partial = new_empty(x, {(rows + args.chunk - 1) / args.chunk, C}, wide(x));
    args.grad_bias = view<1>(grad_bias), args.partial = view<2>(partial);
  }
  if (args.grad_x || args.grad_bias) PYVIDX_RUN(quick_gelu_backward, x, args);
  return {grad_x, grad_bias};
}

template <typename Library>
void kernels(Library& m) {
  m.impl("quick_gelu", TORCH_BOX(&quick_gelu));
  m.impl("quick_gelu_out", TORCH_BOX(&quick_gelu_out));
  m.impl("quick_gelu_backward", TORCH_BOX(&quick_gelu_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
