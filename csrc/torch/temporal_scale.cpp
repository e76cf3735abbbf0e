#include "pyvidx/temporal_scale.h"

#include "check.h"

namespace pyvidx {
namespace {

Tensor taps_of(const Tensor& weight) { return make_empty(weight, {weight.size(1) + 2, weight.size(0)}, wide(weight)); }

void check_weight(const Check& check, const Tensor& weight, int64_t C) {
  check.like("weight [C, K]", weight, {C, kAny});
  static_assert(kMaxTaps == 15, "the message says so");
  check.that(weight.size(1) % 2 == 1 && weight.size(1) <= kMaxTaps, "weight must be [C, K] of x, K odd and at most 15");
}

Check check_inputs(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                   const OptionalTensor& residual) {
  const Check check("temporal_scale", "x [B, T, N, C]", x, {kAny, kAny, kAny, kAny});
  check_weight(check, weight, x.size(3));
  check.like("bias [C]", bias, {x.size(3)});
  check.of(ScalarType::Int, "mask [B, T]", mask, {x.size(0), x.size(1)});
  check.like("residual [B, T, N, C]", residual, {x.size(0), x.size(1), x.size(2), x.size(3)});
  return check;
}

void scale(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
           const OptionalTensor& residual, const Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor x_ = unit_last_stride(x), weight_ = make_contiguous(weight), taps = taps_of(weight);
  const OptionalTensor bias_ = unit_last_stride(bias), residual_ = unit_last_stride(residual);
  TemporalScaleArgs args{view<4>(x_),        view<2>(weight_), view<1>(bias_), view<2>(mask),
                         view<4>(residual_), view<4>(out),     view<2>(taps)};
  PYVIDX_RUN(temporal_scale, x, args);
}

void temporal_scale_out(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                        const OptionalTensor& residual, Tensor out) {
  const Check check = check_inputs(x, weight, bias, mask, residual);
  check.like("out [B, T, N, C]", out, {x.size(0), x.size(1), x.size(2), x.size(3)});
  Written(check, "out", out)
      .apart_from("x", x)
      .apart_from("weight", weight)
      .apart_from("bias", bias)
      .apart_from("mask", mask)
      .may_be("residual", residual);
  scale(x, weight, bias, mask, residual, out);
}

Tensor temporal_scale(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& mask,
                      const OptionalTensor& residual) {
  check_inputs(x, weight, bias, mask, residual);
  Tensor out = make_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  scale(x, weight, bias, mask, residual, out);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> temporal_scale_backward(const Tensor& grad_out, const OptionalTensor& x,
                                                           const Tensor& weight, const OptionalTensor& mask) {
  const Check check("temporal_scale_backward", "grad_out [B, T, N, C]", grad_out, {kAny, kAny, kAny, kAny});
  const int64_t B = grad_out.size(0), T = grad_out.size(1), N = grad_out.size(2), C = grad_out.size(3);
  check.like("x [B, T, N, C]", x, {B, T, N, C});
  check_weight(check, weight, C);
  check.of(ScalarType::Int, "mask [B, T]", mask, {B, T});
  const int64_t K = weight.size(1), channels = x ? C : 0;
  if (grad_out.numel() == 0) {
    return {make_empty(grad_out, {B, T, N, C}), make_zeros(grad_out, {channels, K}), make_zeros(grad_out, {channels})};
  }
  const int64_t parts = x ? temporal_scale_parts(B, T, N) : 0;
  const Tensor grad_out_ = unit_last_stride(grad_out), weight_ = make_contiguous(weight), taps = taps_of(weight);
  const OptionalTensor x_ = unit_last_stride(x);
  Tensor grad_x = make_empty(grad_out, {B, T, N, C}), grad_weight = make_empty(grad_out, {channels, K}),
         grad_bias = make_empty(grad_out, {channels}),
         partial = make_empty(grad_out, {parts, K + 1, C}, wide(grad_out));
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
