#include "pyvidx/temporal_scale.h"

#include "torch_view.h"

namespace pyvidx {
namespace {

using torch::stable::new_empty;

Tensor taps_of(const Tensor& weight) { return new_empty(weight, {weight.size(1) + 2, weight.size(0)}, wide(weight)); }

void temporal_scale_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                        const OptionalTensor& residual, Tensor out) {
  const Tensor x_ = unit_last_stride(x), weight_ = torch::stable::contiguous(weight), taps = taps_of(weight);
  const OptionalTensor bias_ = unit_last_stride(bias), residual_ = unit_last_stride(residual);
  TemporalScaleArgs args{view<4>(x_),        view<2>(weight_), view<1>(bias_), view<2>(mask),
                         view<4>(residual_), view<4>(out),     view<2>(taps)};
  PYVIDX_RUN(temporal_scale, x, args);
}

Tensor temporal_scale(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                      const OptionalTensor& residual) {
  Tensor out = new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  temporal_scale_out(x, weight, bias, mask, residual, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> temporal_scale_backward(const Tensor& grad_out, const OptionalTensor& x,
                                                           const Tensor& weight, const OptionalTensor& mask) {
  const int64_t B = grad_out.size(0), T = grad_out.size(1), N = grad_out.size(2), C = grad_out.size(3);
  const int64_t K = weight.size(1), parts = x ? temporal_scale_parts(B, T, N) : 0;
  const Tensor grad_out_ = unit_last_stride(grad_out), weight_ = torch::stable::contiguous(weight),
               taps = taps_of(weight);
  const OptionalTensor x_ = unit_last_stride(x);
  Tensor grad_x = new_empty(grad_out, {B, T, N, C}), grad_weight = new_empty(grad_out, {x ? C : 0, K}),
         grad_bias = new_empty(grad_out, {x ? C : 0}), partial = new_empty(grad_out, {parts, K + 1, C}, wide(grad_out));
  TemporalScaleBackwardArgs args{view<4>(grad_out_), view<4>(x_),      view<2>(weight_),
                                 view<2>(mask),      view<4>(grad_x),  view<2>(grad_weight),
                                 view<1>(grad_bias), view<3>(partial), view<2>(taps)};
  PYVIDX_RUN(temporal_scale_backward, grad_out, args);
  return {grad_x, grad_weight, grad_bias};
}

template <typename Library>
void kernels(Library& m) {
  m.impl("temporal_scale", TORCH_BOX(&temporal_scale));
  m.impl("temporal_scale_out", TORCH_BOX(&temporal_scale_out));
  m.impl("temporal_scale_backward", TORCH_BOX(&temporal_scale_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
