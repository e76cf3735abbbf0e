#include "pyvidx/residual_norm.h"

#include <tuple>

#include "pyvidx/row_parts.h"
#include "torch_view.h"

namespace pyvidx {
namespace {

using torch::stable::new_empty;

// All rows, or those behind the class row.
View<4> rows(const Tensor& x, bool with_class) { return with_class ? patches(x) : view<4>(x); }

// [B, S], or [B, S, K].
View<3> row_factor(const Tensor& factor, int64_t K) {
  if (factor.dim() == 3) return view<3>(factor);
  const View<2> slots = view<2>(factor);
  View<3> v;
  v.data = slots.data, v.dtype = slots.dtype;
  for (int i = 0; i < 2; ++i) v.size[i] = slots.size[i], v.stride[i] = slots.stride[i];
  v.size[2] = K;
  return v;
}

void residual_norm_into(const Tensor& x, const Tensor& y, const OptionalTensor& cls, const OptionalTensor& bias,
                        const OptionalTensor& constant, const OptionalTensor& factor, const OptionalTensor& share,
                        const Tensor& weight, const Tensor& shift, double eps, const Tensor& out, const Tensor& normed,
                        const Tensor& stats) {
  const Tensor x_ = unit_last_stride(x), y_ = unit_last_stride(y), weight_ = unit_last_stride(weight),
               shift_ = unit_last_stride(shift);
  const OptionalTensor cls_ = unit_last_stride(cls), bias_ = unit_last_stride(bias),
                       constant_ = unit_last_stride(constant);
  const bool with_class = cls || share;
  ResidualNormArgs a = {};
  a.x = rows(x_, bool(share)), a.y = rows(y_, bool(share));
  a.bias = view<1>(bias_), a.constant = view<1>(constant_);
  if (factor) a.factor = row_factor(*factor, a.x.size[2]);
  a.weight = view<1>(weight_), a.shift = view<1>(shift_);
  if (cls) a.cls = view<2>(cls_);
  if (share) a.cls = first_class_row(x_), a.y_cls = class_tokens(y_), a.share = view<2>(*share);
  a.out = rows(out, with_class), a.normed = rows(normed, with_class), a.stats = rows(stats, with_class);
  if (with_class) a.out_cls = class_tokens(out), a.normed_cls = class_tokens(normed), a.stats_cls = class_tokens(stats);
  a.eps = eps;
  PYVIDX_RUN(residual_norm, x, a);
}

void residual_norm_out(const Tensor& x, const Tensor& y, const OptionalTensor& cls, const OptionalTensor& bias,
                       const OptionalTensor& constant, const OptionalTensor& factor, const OptionalTensor& share,
                       const Tensor& weight, const Tensor& shift, double eps, Tensor out, Tensor normed) {
  const Tensor stats = new_empty(out, {out.size(0), out.size(1), out.size(2), 2}, wide(out));
  residual_norm_into(x, y, cls, bias, constant, factor, share, weight, shift, eps, out, normed, stats);
}

std::tuple<Tensor, Tensor, Tensor> residual_norm(const Tensor& x, const Tensor& y, const OptionalTensor& cls,
                                                 const OptionalTensor& bias, const OptionalTensor& constant,
                                                 const OptionalTensor& factor, const OptionalTensor& share,
                                                 const Tensor& weight, const Tensor& shift, double eps) {
  const int64_t B = x.size(0), S = x.size(1), N = x.size(2) + (cls ? 1 : 0), C = x.size(3);
  Tensor out = new_empty(x, {B, S, N, C}), normed = new_empty(y, {B, S, N, C}),
         stats = new_empty(x, {B, S, N, 2}, wide(x));
  residual_norm_into(x, y, cls, bias, constant, factor, share, weight, shift, eps, out, normed, stats);
  return {out, normed, stats};
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
SevenTensors residual_norm_backward(const Tensor& grad_out, const Tensor& grad_normed, const Tensor& value,
                                    const Tensor& stats, const OptionalTensor& factor, const OptionalTensor& share,
                                    const Tensor& weight, bool cls, bool need_bias, bool need_constant, bool need_y) {
  const Tensor grad_ = unit_last_stride(grad_out), normed_ = unit_last_stride(grad_normed),
               weight_ = unit_last_stride(weight);
  const bool with_class = cls || share;
  const int64_t B = value.size(0), S = value.size(1), N = value.size(2), C = value.size(3),
                K = N - (with_class ? 1 : 0);
  Tensor grad_x = new_empty(value, {B, S, share ? N : K, C}), grad_weight = new_empty(value, {C}),
         grad_shift = new_empty(value, {C}),
         grad_y = need_y ? new_empty(normed_, {B, S, share ? N : K, C}) : nothing(normed_),
         grad_cls = cls ? new_empty(value, {B, C}) : nothing(value),
         grad_bias = need_bias ? new_empty(value, {C}) : nothing(value),
         grad_constant = need_constant ? new_empty(value, {C}) : nothing(value),
         partial = new_empty(value, {4, row_parts(B * S, K) + B, C}, wide(value)),
         class_sums = new_empty(value, {with_class ? B : 0, 2, C}, wide(value));
  ResidualNormBackwardArgs a = {};
  a.grad_out = rows(grad_, with_class), a.grad_normed = rows(normed_, with_class);
  a.value = rows(value, with_class), a.stats = rows(stats, with_class);
  if (factor) a.factor = row_factor(*factor, K);
  a.share = view<2>(share), a.weight = view<1>(weight_);
  if (with_class) {
    a.grad_out_cls = class_tokens(grad_), a.grad_normed_cls = class_tokens(normed_);
    a.value_cls = class_tokens(value), a.stats_cls = class_tokens(stats);
    a.class_sums = view<3>(class_sums);
  }
  a.grad_x = rows(grad_x, bool(share));
  if (need_y) a.grad_y = rows(grad_y, bool(share));
  if (share) a.grad_cls = class_tokens(grad_x);
  if (share && need_y) a.grad_y_cls = class_tokens(grad_y);
  if (cls) a.grad_cls = one_slot(grad_cls);
  if (need_bias) a.grad_bias = view<1>(grad_bias);
  if (need_constant) a.grad_constant = view<1>(grad_constant);
  a.grad_weight = view<1>(grad_weight), a.grad_shift = view<1>(grad_shift);
  a.partial = view<3>(partial);
  PYVIDX_RUN(residual_norm_backward, value, a);
  return {grad_x, grad_y, grad_cls, grad_bias, grad_constant, grad_weight, grad_shift};
}

template <typename Library>
void kernels(Library& m) {
  m.impl("residual_norm", TORCH_BOX(&residual_norm));
  m.impl("residual_norm_out", TORCH_BOX(&residual_norm_out));
  m.impl("residual_norm_backward", TORCH_BOX(&residual_norm_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
