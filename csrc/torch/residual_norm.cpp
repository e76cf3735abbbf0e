#include "pyvidx/residual_norm.h"

#include <tuple>

#include "check.h"
#include "pyvidx/row_parts.h"

namespace pyvidx {
namespace {

// All rows, or those behind the class row.
View<4> rows(const Tensor& x, bool with_class) { return with_class ? patches(x) : view<4>(x); }

void residual_norm_into(const Tensor& x, const Tensor& y, const OptionalTensor& cls, const OptionalTensor& factor,
                        const OptionalTensor& share, const Tensor& weight, const Tensor& shift, double eps,
                        const Tensor& out, const Tensor& normed, const Tensor& stats) {
  if (out.numel() == 0) return;
  const Tensor x_ = unit_last_stride(x), y_ = unit_last_stride(y), weight_ = unit_last_stride(weight),
               shift_ = unit_last_stride(shift);
  const OptionalTensor cls_ = unit_last_stride(cls);
  const bool with_class = cls || share;
  ResidualNormArgs a = {};
  a.x = rows(x_, bool(share)), a.y = rows(y_, bool(share));
  a.factor = view<2>(factor), a.weight = view<1>(weight_), a.shift = view<1>(shift_);
  if (cls) a.cls = view<2>(cls_);
  if (share) a.cls = first_class_row(x_), a.y_cls = class_tokens(y_), a.share = view<2>(*share);
  a.out = rows(out, with_class), a.normed = rows(normed, with_class), a.stats = rows(stats, with_class);
  if (with_class) a.out_cls = class_tokens(out), a.normed_cls = class_tokens(normed), a.stats_cls = class_tokens(stats);
  a.eps = eps;
  PYVIDX_RUN(residual_norm, x, a);
}

Check check_inputs(const Tensor& x, const Tensor& y, const OptionalTensor& cls, const OptionalTensor& factor,
                   const OptionalTensor& share, const Tensor& weight, const Tensor& shift) {
  const Check check("residual_norm", "x [B, S, K, C]", x, {kAny, kAny, kAny, kAny});
  const int64_t B = x.size(0), S = x.size(1), K = x.size(2), C = x.size(3);
  check.mixed("y [B, S, K, C]", y, {B, S, K, C});
  check.like("cls [B, C]", cls, {B, C});
  check.wide("factor [B, S]", factor, {B, S});
  check.wide("share [B, S]", share, {B, S});
  check.like("weight [C]", weight, {C});
  check.like("shift [C]", shift, {C});
  check.that(!share || !cls, "share excludes cls");
  check.that(C > 0, "a LayerNorm needs channels");
  check.that(!share || (S > 0 && K > 0), "with share x must have a class row in every slot");
  return check;
}

void residual_norm_out(const Tensor& x, const Tensor& y, const OptionalTensor& cls, const OptionalTensor& factor,
                       const OptionalTensor& share, const Tensor& weight, const Tensor& shift, double eps, Tensor out,
                       Tensor normed) {
  const Check check = check_inputs(x, y, cls, factor, share, weight, shift);
  const int64_t B = x.size(0), S = x.size(1), N = x.size(2) + (cls ? 1 : 0), C = x.size(3);
  check.like("out [B, S, K, C]", out, {B, S, N, C});
  check.of(y.scalar_type(), "normed [B, S, K, C]", normed, {B, S, N, C});
  Written(check, "normed", normed).apart_from("out", out);
  const std::initializer_list<Argument> read = {
      {"cls", cls}, {"factor", factor}, {"share", share}, {"weight", weight}, {"bias of the norm", shift}};
  const Elements x_elements(x), y_elements(y);
  Written(check, "out", out).apart_from(read).may_be("x", x_elements).may_be("y", y_elements);
  Written(check, "normed", normed).apart_from(read).may_be("x", x_elements).may_be("y", y_elements);
  const Tensor stats = make_empty(x, {B, S, N, 2}, wide(x));
  residual_norm_into(x, y, cls, factor, share, weight, shift, eps, out, normed, stats);
}

std::tuple<Tensor, Tensor, Tensor> residual_norm(const Tensor& x, const Tensor& y, const OptionalTensor& cls,
                                                 const OptionalTensor& factor, const OptionalTensor& share,
                                                 const Tensor& weight, const Tensor& shift, double eps) {
  check_inputs(x, y, cls, factor, share, weight, shift);
  const int64_t B = x.size(0), S = x.size(1), N = x.size(2) + (cls ? 1 : 0), C = x.size(3);
  Tensor out = make_empty(x, {B, S, N, C}), normed = make_empty(y, {B, S, N, C}),
         stats = make_empty(x, {B, S, N, 2}, wide(x));
  residual_norm_into(x, y, cls, factor, share, weight, shift, eps, out, normed, stats);
  return {out, normed, stats};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
FiveTensors residual_norm_backward(const Tensor& grad_out, const Tensor& grad_normed, const Tensor& value,
                                   const Tensor& stats, const OptionalTensor& factor, const OptionalTensor& share,
                                   const Tensor& weight, bool cls, bool need_y) {
  const Check check("residual_norm_backward", "value [B, S, K, C]", value, {kAny, kAny, kAny, kAny});
  const bool with_class = cls || share;
  const int64_t B = value.size(0), S = value.size(1), N = value.size(2), C = value.size(3),
                K = N - (with_class ? 1 : 0);
  check.that(!share || !cls, "share excludes cls");
  check.that(K >= 0, "value must have a class row in every slot");
  check.like("grad_out [B, S, K, C]", grad_out, {B, S, N, C});
  check.mixed("grad_normed [B, S, K, C]", grad_normed, {B, S, N, C});
  check.wide("stats [B, S, K, 2]", stats, {B, S, N, 2});
  check.wide("factor [B, S]", factor, {B, S});
  check.wide("share [B, S]", share, {B, S});
  check.like("weight [C]", weight, {C});
  if (value.numel() == 0) {
    return {make_zeros(value, {B, S, share ? N : K, C}),
            need_y ? make_zeros(grad_normed, {B, S, share ? N : K, C}) : nothing(grad_normed),
            cls ? make_zeros(value, {B, C}) : nothing(value), make_zeros(value, {C}), make_zeros(value, {C})};
  }
  const Tensor grad_ = unit_last_stride(grad_out), normed_ = unit_last_stride(grad_normed),
               weight_ = unit_last_stride(weight), value_ = unit_last_stride(value), stats_ = unit_last_stride(stats);
  Tensor grad_x = make_empty(value, {B, S, share ? N : K, C}), grad_weight = make_empty(value, {C}),
         grad_shift = make_empty(value, {C}),
         grad_y = need_y ? make_empty(normed_, {B, S, share ? N : K, C}) : nothing(normed_),
         grad_cls = cls ? make_empty(value, {B, C}) : nothing(value),
         partial = make_empty(value, {2, row_parts(B * S, K) + B, C}, wide(value)),
         class_sums = make_empty(value, {with_class ? B : 0, 2, C}, wide(value));
  ResidualNormBackwardArgs a = {};
  a.grad_out = rows(grad_, with_class), a.grad_normed = rows(normed_, with_class);
  a.value = rows(value_, with_class), a.stats = rows(stats_, with_class);
  a.factor = view<2>(factor), a.share = view<2>(share), a.weight = view<1>(weight_);
  if (with_class) {
    a.grad_out_cls = class_tokens(grad_), a.grad_normed_cls = class_tokens(normed_);
    a.value_cls = class_tokens(value_), a.stats_cls = class_tokens(stats_);
    a.class_sums = view<3>(class_sums);
  }
  a.grad_x = rows(grad_x, bool(share));
  if (need_y) a.grad_y = rows(grad_y, bool(share));
  if (share) a.grad_cls = class_tokens(grad_x);
  if (share && need_y) a.grad_y_cls = class_tokens(grad_y);
  if (cls) a.grad_cls = one_slot(grad_cls);
  a.grad_weight = view<1>(grad_weight), a.grad_shift = view<1>(grad_shift);
  a.partial = view<3>(partial);
  PYVIDX_RUN(residual_norm_backward, value, a);
  return {grad_x, grad_y, grad_cls, grad_weight, grad_shift};
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
