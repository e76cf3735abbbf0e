#include "pyvidx/gated_fusion.h"

#include <tuple>

#include "torch_view.h"

namespace pyvidx {
namespace {

using torch::stable::new_empty;

Tensor scratch(const Tensor& like, const OptionalTensor& gate) {
  return new_empty(like, {gate ? gate->size(0) : 0}, wide(like));
}

// Rows [B, T, C] as one frame of T patches, [B, 1, T, C]; rows [B, C] as T times the same.
View<4> one_frame(const Tensor& x, int64_t T) {
  View<4> v;
  v.data = x.data_ptr(), v.dtype = dtype_of(x);
  v.size[0] = x.size(0), v.size[1] = 1, v.size[2] = T, v.size[3] = x.size(x.dim() - 1);
  v.stride[0] = x.stride(0), v.stride[2] = x.dim() == 3 ? x.stride(1) : 0, v.stride[3] = 1;
  return v;
}
// cls [B, C], or a seed [C] for all videos.
View<2> class_row(const Tensor& cls, int64_t B) {
  if (cls.dim() == 2) return view<2>(cls);
  const View<1> seed = view<1>(cls);
  View<2> v;
  v.data = seed.data, v.dtype = seed.dtype;
  v.size[0] = B, v.size[1] = seed.size[0], v.stride[1] = 1;
  return v;
}

// Without cls, z has class rows in front.
void fuse(const Tensor& x, const OptionalTensor& z, const OptionalTensor& cls, const OptionalTensor& gate,
          const OptionalTensor& position, const OptionalTensor& time, const OptionalTensor& keep,
          const OptionalTensor& weight, const OptionalTensor& bias, double scale, double eps, bool pair,
          const Tensor& out, const Tensor& out_cls, const OptionalTensor& normed, const Tensor& stats) {
  const Tensor x_ = unit_last_stride(x);
  const OptionalTensor cls_ = unit_last_stride(cls), z_ = unit_last_stride(z), gate_ = unit_last_stride(gate),
                       weight_ = unit_last_stride(weight), bias_ = unit_last_stride(bias),
                       position_ = unit_last_stride(position), time_ = unit_last_stride(time);
  const Tensor mix = scratch(x, gate);
  GatedFusionArgs a = {};
  a.x = patches(x_), a.x_cls = class_tokens(x_);
  a.z = cls_ ? view<4>(z_) : patches(*z_), a.cls = cls_ ? class_row(*cls_, x.size(0)) : first_class_row(*z_);
  a.gate = view<1>(gate_);
  a.position = view<2>(position_), a.time = view<2>(time_);
  if (keep) a.keep = keep_view(*keep, x.size(0)), a.tube = keep->dim() == 2;
  a.weight = view<1>(weight_), a.bias = view<1>(bias_);
  a.out = view<4>(out), a.out_cls = view<2>(out_cls), a.normed = view<4>(normed);
  if (normed) a.stats = view<4>(stats);
  a.mix = view<1>(mix);
  a.scale = scale, a.eps = eps, a.pair = pair;
  PYVIDX_RUN(gated_fusion, x, a);
}

Tensor new_stats(const Tensor& x, const Tensor& rows) {
  return new_empty(x, {rows.size(0), rows.size(1), rows.size(2), 2}, wide(x));
}

void gated_fusion_out(const Tensor& x, const OptionalTensor& z, const OptionalTensor& cls, const OptionalTensor& gate,
                      const OptionalTensor& position, const OptionalTensor& time, const OptionalTensor& keep,
                      const OptionalTensor& weight, const OptionalTensor& bias, double scale, double eps, bool pair,
                      Tensor out, Tensor out_cls, OptionalTensor normed) {
  fuse(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair, out, out_cls, normed,
       normed ? new_stats(x, out) : nothing(x));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_fusion(const Tensor& x, const OptionalTensor& z,
                                                        const OptionalTensor& cls, const OptionalTensor& gate,
                                                        const OptionalTensor& position, const OptionalTensor& time,
                                                        const OptionalTensor& keep, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double scale, double eps,
                                                        bool pair) {
  const int64_t S = keep && keep->dim() == 3 ? keep->size(1) : x.size(1) / (pair ? 2 : 1);
  const int64_t K = keep ? keep->size(keep->dim() - 1) : x.size(2) - 1;
  Tensor out = new_empty(x, {x.size(0), S, K, x.size(3)}), out_cls = new_empty(x, {x.size(0), x.size(3)});
  OptionalTensor normed;
  if (weight) normed = new_empty(x, {x.size(0), S, K, x.size(3)});
  Tensor stats = normed ? new_stats(x, out) : nothing(x);
  fuse(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair, out, out_cls, normed, stats);
  return {out, out_cls, normed ? *normed : nothing(x), stats};
}

void output(const Tensor& x_cls, const Tensor& cls, const OptionalTensor& gate, const OptionalTensor& weight,
            const OptionalTensor& bias, double scale, double eps, const Tensor& out, const Tensor& stats) {
  const Tensor x_ = unit_last_stride(x_cls), cls_ = unit_last_stride(cls), mix = scratch(x_cls, gate);
  const OptionalTensor gate_ = unit_last_stride(gate), weight_ = unit_last_stride(weight),
                       bias_ = unit_last_stride(bias);
  const int64_t T = x_cls.size(1);
  GatedFusionArgs a = {};
  a.x = one_frame(x_, T), a.z = one_frame(cls_, T), a.gate = view<1>(gate_);
  a.weight = view<1>(weight_), a.bias = view<1>(bias_);
  (weight ? a.normed : a.out) = one_frame(out, T);
  if (weight) a.stats = view<4>(stats);
  a.mix = view<1>(mix);
  a.scale = scale, a.eps = eps;
  PYVIDX_RUN(gated_fusion, x_cls, a);
}

Tensor new_output_stats(const Tensor& x_cls, const OptionalTensor& weight) {
  return weight ? new_empty(x_cls, {x_cls.size(0), 1, x_cls.size(1), 2}, wide(x_cls)) : nothing(x_cls);
}

void gated_output_out(const Tensor& x_cls, const Tensor& cls, const OptionalTensor& gate, const OptionalTensor& weight,
                      const OptionalTensor& bias, double scale, double eps, Tensor out) {
  output(x_cls, cls, gate, weight, bias, scale, eps, out, new_output_stats(x_cls, weight));
}

std::tuple<Tensor, Tensor> gated_output(const Tensor& x_cls, const Tensor& cls, const OptionalTensor& gate,
                                        const OptionalTensor& weight, const OptionalTensor& bias, double scale,
                                        double eps) {
  Tensor out = new_empty(x_cls, {x_cls.size(0), x_cls.size(1), x_cls.size(2)});
  Tensor stats = new_output_stats(x_cls, weight);
  output(x_cls, cls, gate, weight, bias, scale, eps, out, stats);
  return {out, stats};
}

// Gradients of what both backward ops share: the gate's logits and the norm's parameters, and the scratch for them.
struct ParameterGrads {
  Tensor gate, weight, bias, partial, mix;

  ParameterGrads(const Tensor& like, int64_t parts, int64_t class_rows, bool need_gate, bool norm,
                 const OptionalTensor& gate_logits)
      : gate(nothing(like)),
        weight(nothing(like)),
        bias(nothing(like)),
        partial(new_empty(like, {0, 0, 0}, wide(like))),
        mix(scratch(like, gate_logits)) {
    const int64_t C = like.size(like.dim() - 1);
    if (need_gate) gate = new_empty(like, {C});
    if (norm) weight = new_empty(like, {C}), bias = new_empty(like, {C});
    if (need_gate || norm) partial = new_empty(like, {3, parts + class_rows, C}, wide(like));
  }

  void fill(GatedFusionBackwardArgs& a, bool need_gate, bool norm) {
    if (need_gate) a.grad_gate = view<1>(gate);
    if (norm) a.grad_weight = view<1>(weight), a.grad_bias = view<1>(bias);
    a.partial = view<3>(partial), a.mix = view<1>(mix);
  }
};

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
SixTensors gated_fusion_backward(const OptionalTensor& grad_out, const Tensor& grad_out_cls,
                                 const OptionalTensor& grad_normed, const OptionalTensor& value,
                                 const OptionalTensor& x, const OptionalTensor& z, const OptionalTensor& cls,
                                 const OptionalTensor& gate, const OptionalTensor& keep, const OptionalTensor& source,
                                 const OptionalTensor& weight, const OptionalTensor& stats, int64_t T, int64_t P,
                                 double scale, bool pair, bool first, bool packed, bool need_x, bool need_z,
                                 bool need_gate) {
  const OptionalTensor grad_ = unit_last_stride(grad_out), grad_normed_ = unit_last_stride(grad_normed),
                       value_ = unit_last_stride(value), x_ = unit_last_stride(x), z_ = unit_last_stride(z),
                       cls_ = unit_last_stride(cls), gate_ = unit_last_stride(gate), weight_ = unit_last_stride(weight);
  const Tensor grad_cls_ = unit_last_stride(grad_out_cls), rows = grad_normed_ ? *grad_normed_ : *grad_;
  const int64_t B = rows.size(0), S = rows.size(1), K = rows.size(2), C = rows.size(3);
  const bool norm = bool(grad_normed_);
  GatedFusionBackwardArgs a = {};
  a.parts = row_parts(B * S, K);
  ParameterGrads parameters(rows, a.parts, B, need_gate, norm, gate);
  Tensor grad_x = need_x ? new_empty(rows, {B, T, 1 + P, C}) : nothing(rows);
  packed = packed && need_z;
  Tensor grad_z = need_z ? new_empty(rows, {B, S, packed ? 1 + K : K, C}) : nothing(rows),
         grad_cls = packed ? nothing(rows) : new_empty(rows, {B, C});
  a.grad_out = view<4>(grad_), a.grad_out_cls = view<2>(grad_cls_), a.grad_normed = view<4>(grad_normed_);
  a.value = view<4>(value_), a.gate = view<1>(gate_);
  if (z_) a.z = cls_ ? view<4>(z_) : patches(*z_), a.cls = cls_ ? view<2>(cls_) : first_class_row(*z_);
  if (x_) a.x = patches(*x_), a.x_cls = class_tokens(*x_);
  if (keep) a.keep = keep_view(*keep, B), a.tube = keep->dim() == 2;
  a.source = view<3>(source);
  if (norm) a.weight = view<1>(weight_), a.stats = view<4>(stats);
  if (need_x) a.grad_x = patches(grad_x), a.grad_x_cls = class_tokens(grad_x);
  if (need_z) a.grad_z = packed ? patches(grad_z) : view<4>(grad_z);
  a.grad_cls = packed ? class_tokens(grad_z) : one_slot(grad_cls);
  parameters.fill(a, need_gate, norm);
  a.scale = scale, a.pair = pair, a.first = first;
  PYVIDX_RUN(gated_fusion_backward, rows, a);
  return {grad_x, grad_z, grad_cls, parameters.gate, parameters.weight, parameters.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_output_backward(const Tensor& grad, const Tensor& x_cls,
                                                                         const Tensor& cls, const OptionalTensor& gate,
                                                                         const OptionalTensor& weight,
                                                                         const OptionalTensor& stats, double scale,
                                                                         bool need_gate) {
  const Tensor grad_ = unit_last_stride(grad), x_ = unit_last_stride(x_cls), cls_ = unit_last_stride(cls);
  const OptionalTensor gate_ = unit_last_stride(gate), weight_ = unit_last_stride(weight);
  const int64_t B = grad.size(0), T = grad.size(1), C = grad.size(2);
  const bool norm = bool(weight);
  GatedFusionBackwardArgs a = {};
  a.parts = row_parts(B, T);
  ParameterGrads parameters(grad, a.parts, 0, need_gate, norm, gate);
  Tensor grad_x = new_empty(grad, {B, T, C}), grad_rows = new_empty(grad, {B, T, C});
  (norm ? a.grad_normed : a.grad_out) = one_frame(grad_, T);
  a.x = one_frame(x_, T), a.z = one_frame(cls_, T), a.gate = view<1>(gate_);
  if (norm) a.weight = view<1>(weight_), a.stats = view<4>(stats);
  a.grad_x = one_frame(grad_x, T), a.grad_z = one_frame(grad_rows, T);
  parameters.fill(a, need_gate, norm);
  a.scale = scale;
  PYVIDX_RUN(gated_fusion_backward, grad, a);
  return {grad_x, grad_rows, parameters.gate, parameters.weight, parameters.bias};
}

template <typename Library>
void kernels(Library& m) {
  m.impl("gated_fusion", TORCH_BOX(&gated_fusion));
  m.impl("gated_fusion_out", TORCH_BOX(&gated_fusion_out));
  m.impl("gated_fusion_backward", TORCH_BOX(&gated_fusion_backward));
  m.impl("gated_output", TORCH_BOX(&gated_output));
  m.impl("gated_output_out", TORCH_BOX(&gated_output_out));
  m.impl("gated_output_backward", TORCH_BOX(&gated_output_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
