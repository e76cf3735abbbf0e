#include "pyvidx/token_gather.h"

#include "torch_view.h"

namespace pyvidx {
namespace {

void token_gather_out(const Tensor& x, const Tensor& keep, const OptionalTensor& position, const OptionalTensor& time,
                      Tensor out) {
  const Tensor x_ = unit_last_stride(x);
  const OptionalTensor position_ = unit_last_stride(position), time_ = unit_last_stride(time);
  TokenGatherArgs args{view<4>(x_),    keep_view(keep, x.size(0)), view<2>(position_), view<2>(time_), view<4>(out),
                       keep.dim() == 2};
  PYVIDX_RUN(token_gather, x, args);
}

Tensor token_gather(const Tensor& x, const Tensor& keep, const OptionalTensor& position, const OptionalTensor& time) {
  const int64_t S = keep.dim() == 2 ? x.size(1) : keep.size(1);
  Tensor out = torch::stable::new_empty(x, {x.size(0), S, keep.size(keep.dim() - 1), x.size(3)});
  token_gather_out(x, keep, position, time, out);
  return out;
}

Tensor token_gather_backward(const Tensor& grad_out, const Tensor& source) {
  const Tensor grad_out_ = unit_last_stride(grad_out);
  Tensor grad_x =
      torch::stable::new_empty(grad_out, {source.size(0), source.size(1), source.size(2), grad_out.size(3)});
  TokenGatherBackwardArgs args{view<4>(grad_out_), view<3>(source), view<4>(grad_x)};
  PYVIDX_RUN(token_gather_backward, grad_out, args);
  return grad_x;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("token_gather", TORCH_BOX(&token_gather));
  m.impl("token_gather_out", TORCH_BOX(&token_gather_out));
  m.impl("token_gather_backward", TORCH_BOX(&token_gather_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
