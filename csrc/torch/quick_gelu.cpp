#include "pyvidx/quick_gelu.h"

#include "check.h"

namespace pyvidx {
namespace {

View<1> flat(const Tensor& x) {  // contiguous
  View<1> v;
  v.data = x.data_ptr(), v.dtype = dtype_of(x);
  v.size[0] = x.numel(), v.stride[0] = 1;
  return v;
}

Tensor quick_gelu(const Tensor& x) {
  const Check check("quick_gelu", "x", x);
  const Tensor x_ = make_contiguous(x);
  Tensor out = make_like(x_);
  const QuickGELUArgs args{flat(x_), flat(out)};
  if (x.numel() > 0) PYVIDX_RUN(quick_gelu, x, args);
  return out;
}

Tensor quick_gelu_backward(const Tensor& grad_out, const Tensor& x) {
  Check("quick_gelu_backward", "x", x).like("grad_out", grad_out, x);
  const Tensor grad_ = make_contiguous(grad_out), x_ = make_contiguous(x);
  Tensor grad_x = make_like(x_);
  const QuickGELUBackwardArgs args{flat(grad_), flat(x_), flat(grad_x)};
  if (x.numel() > 0) PYVIDX_RUN(quick_gelu_backward, x, args);
  return grad_x;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("quick_gelu", TORCH_BOX(&quick_gelu));
  m.impl("quick_gelu_backward", TORCH_BOX(&quick_gelu_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
