#include "pyvidx/quick_gelu.h"

#include "torch_view.h"

namespace pyvidx {
namespace {

using torch::stable::contiguous;
using torch::stable::empty_like;

View<1> flat(const Tensor& x) {  // contiguous
  View<1> v;
  v.data = x.data_ptr(), v.dtype = dtype_of(x);
  v.size[0] = x.numel(), v.stride[0] = 1;
  return v;
}

void quick_gelu_out(const Tensor& x, Tensor out) {
  const Tensor x_ = contiguous(x);
  QuickGELUArgs args{flat(x_), flat(out)};
  PYVIDX_RUN(quick_gelu, x, args);
}

Tensor quick_gelu(const Tensor& x) {
  const Tensor x_ = contiguous(x);
  Tensor out = empty_like(x_);
  quick_gelu_out(x_, out);
  return out;
}

Tensor quick_gelu_backward(const Tensor& grad_out, const Tensor& x) {
  const Tensor grad_ = contiguous(grad_out), x_ = contiguous(x);
  Tensor grad_x = empty_like(x_);
  QuickGELUBackwardArgs args{flat(grad_), flat(x_), flat(grad_x)};
  PYVIDX_RUN(quick_gelu_backward, x, args);
  return grad_x;
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
