#include "pyvidx/gated_fusion.h"

#include <tuple>

#include "check.h"

namespace pyvidx {
namespace {

Tensor scratch(const Tensor& like, const OptionalTensor& gate) {
  return make_empty(like, {gate ? gate->size(0) : 0}, wide(like));
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

// S, K: slots and patches of the branch.
struct Branch {
  int64_t S, K;
};

// x [B, T, 1 + P, C] as frames (or pairs of them) and patches, and what keep makes of them.
Branch check_tokens(const Check& check, const OptionalTensor& keep, int64_t B, int64_t T, int64_t P, bool pair) {
  check.that(T > 0 && P >= 0, "x must be [B, T, 1 + P, C] with T > 0");
  check.that(!pair || T % 2 == 0, "pair needs an even number of frames");
  const int64_t frames = pair ? T / 2 : T;
  if (!keep) return {frames, P};
  check.keep(*keep, B);
  return {keep->dim() == 2 ? frames : keep->size(1), keep->size(keep->dim() - 1)};
}

// The branch [B, S, K, C], or with its class rows in front where there is no cls.
void check_branch(const Check& check, const OptionalTensor& z, const OptionalTensor& cls, int64_t B, Branch branch,
                  int64_t C) {
  check.that(cls || branch.S > 0, "without cls, z must have its class row in a slot");
  check.like("z [B, S, K, C] (without cls [B, S, 1 + K, C])", z, {B, branch.S, branch.K + (cls ? 0 : 1), C});
  check.like("cls [B, C]", cls, {B, C});
}

void check_norm(const Check& check, const OptionalTensor& weight, const OptionalTensor& bias, int64_t C) {
  check.that(bool(weight) == bool(bias), "weight and bias of the norm come together");
  check.that(!weight || C > 0, "a LayerNorm needs channels");
  check.like("weight [C]", weight, {C});
  check.like("bias [C]", bias, {C});
}

Branch check_inputs(const Check& check, const Tensor& x, const OptionalTensor& z, const OptionalTensor& cls,
                    const OptionalTensor& gate, const OptionalTensor& position, const OptionalTensor& time,
                    const OptionalTensor& keep, const OptionalTensor& weight, const OptionalTensor& bias, bool pair) {
  const int64_t B = x.size(0), T = x.size(1), P = x.size(2) - 1, C = x.size(3);
  const Branch branch = check_tokens(check, keep, B, T, P, pair);
  check_norm(check, weight, bias, C);
  if (z) {
    check.that(!position && !time, "position and time make the first input, which has no z");
    check_branch(check, z, cls, B, branch, C);
    check.like("gate [C]", gate, {C});
  } else {
    check.that(position && time && cls && !gate, "without z there must be position, time and seed, and no gate");
    check.like("position [1 + P, C]", position, {1 + P, C});
    check.like("time [frames or more, C]", time, {kAny, C});
    check.that(time->size(0) >= (pair ? T / 2 : T), "time must be [frames or more, C] of x");
    cls->dim() == 2 ? check.like("seed [B, C]", cls, {B, C}) : check.like("seed [C]", cls, {C});
  }
  return branch;
}

// Without cls, z has class rows in front.
void fuse(const Tensor& x, const OptionalTensor& z, const OptionalTensor& cls, const OptionalTensor& gate,
          const OptionalTensor& position, const OptionalTensor& time, const OptionalTensor& keep,
          const OptionalTensor& weight, const OptionalTensor& bias, double scale, double eps, bool pair,
          const Tensor& out, const Tensor& out_cls, const OptionalTensor& normed, const Tensor& stats) {
  if (out_cls.numel() == 0) return;  // no videos, or no channels
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
  return make_empty(x, {rows.size(0), rows.size(1), rows.size(2), 2}, wide(x));
}

void gated_fusion_out(const Tensor& x, const OptionalTensor& z, const OptionalTensor& cls, const OptionalTensor& gate,
                      const OptionalTensor& position, const OptionalTensor& time, const OptionalTensor& keep,
                      const OptionalTensor& weight, const OptionalTensor& bias, double scale, double eps, bool pair,
                      Tensor out, Tensor out_cls, OptionalTensor normed) {
  const Check check("gated_fusion", "x [B, T, 1 + P, C]", x, {kAny, kAny, kAny, kAny});
  const auto [S, K] = check_inputs(check, x, z, cls, gate, position, time, keep, weight, bias, pair);
  check.like("out [B, S, K, C]", out, {x.size(0), S, K, x.size(3)});
  check.like("out_cls [B, C]", out_cls, {x.size(0), x.size(3)});
  check.that(bool(normed) == bool(weight), "normed is written where there is a norm, and only there");
  check.like("normed [B, S, K, C]", normed, {x.size(0), S, K, x.size(3)});
  const std::initializer_list<Argument> read = {{"x", x},
                                                {"position", position},
                                                {"time", time},
                                                {"keep", keep},
                                                {"gate", gate},
                                                {"weight of the norm", weight},
                                                {"bias of the norm", bias}};
  // Without cls, out may be the patches of z, and out_cls the class row that is read.
  const auto rows = z && !cls ? patches(*z) : View<4>{};
  const auto row = z && !cls ? first_class_row(*z) : View<2>{};
  const int64_t bytes = int64_t(x.element_size());
  const Elements z_rows = z && !cls ? Elements(rows, bytes) : Elements(z);
  const Elements z_cls = z && !cls ? Elements(row, bytes) : Elements(cls);
  Written(check, "out", out)
      .apart_from(read)
      .may_be("z", z_rows)
      .apart_from("cls", z_cls)
      .apart_from("out_cls", out_cls);
  Written(check, "out_cls", out_cls).apart_from(read).may_be("cls", z_cls).apart_from("z", z_rows);
  if (normed) {
    Written(check, "normed", *normed)
        .apart_from(read)
        .apart_from("z", z)
        .apart_from("cls", cls)
        .apart_from("out", out)
        .apart_from("out_cls", out_cls);
  }
  fuse(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair, out, out_cls, normed,
       normed ? new_stats(x, out) : nothing(x));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_fusion(const Tensor& x, const OptionalTensor& z,
                                                        const OptionalTensor& cls, const OptionalTensor& gate,
                                                        const OptionalTensor& position, const OptionalTensor& time,
                                                        const OptionalTensor& keep, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double scale, double eps,
                                                        bool pair) {
  const Check check("gated_fusion", "x [B, T, 1 + P, C]", x, {kAny, kAny, kAny, kAny});
  const auto [S, K] = check_inputs(check, x, z, cls, gate, position, time, keep, weight, bias, pair);
  Tensor out = make_empty(x, {x.size(0), S, K, x.size(3)}), out_cls = make_empty(x, {x.size(0), x.size(3)});
  OptionalTensor normed;
  if (weight) normed = make_empty(x, {x.size(0), S, K, x.size(3)});
  Tensor stats = normed ? new_stats(x, out) : nothing(x);
  fuse(x, z, cls, gate, position, time, keep, weight, bias, scale, eps, pair, out, out_cls, normed, stats);
  return {out, out_cls, normed ? *normed : nothing(x), stats};
}

Check check_output(const char* op, const Tensor& x_cls, const Tensor& cls, const OptionalTensor& gate) {
  const Check check(op, "x_cls [B, T, C]", x_cls, {kAny, kAny, kAny});
  check.that(x_cls.size(1) > 0, "x_cls must be [B, T, C] with T > 0");
  check.like("cls [B, C]", cls, {x_cls.size(0), x_cls.size(2)});
  check.like("gate [C]", gate, {x_cls.size(2)});
  return check;
}

void output(const Tensor& x_cls, const Tensor& cls, const OptionalTensor& gate, const OptionalTensor& weight,
            const OptionalTensor& bias, double scale, double eps, const Tensor& out, const Tensor& stats) {
  if (out.numel() == 0) return;
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
  return weight ? make_empty(x_cls, {x_cls.size(0), 1, x_cls.size(1), 2}, wide(x_cls)) : nothing(x_cls);
}

void gated_output_out(const Tensor& x_cls, const Tensor& cls, const OptionalTensor& gate, const OptionalTensor& weight,
                      const OptionalTensor& bias, double scale, double eps, Tensor out) {
  const Check check = check_output("gated_output", x_cls, cls, gate);
  check_norm(check, weight, bias, x_cls.size(2));
  check.like("out [B, T, C]", out, x_cls);
  Written(check, "out", out)
      .may_be("x_cls", x_cls)
      .apart_from("cls", cls)
      .apart_from("gate", gate)
      .apart_from("weight of the norm", weight)
      .apart_from("bias of the norm", bias);
  output(x_cls, cls, gate, weight, bias, scale, eps, out, new_output_stats(x_cls, weight));
}

std::tuple<Tensor, Tensor> gated_output(const Tensor& x_cls, const Tensor& cls, const OptionalTensor& gate,
                                        const OptionalTensor& weight, const OptionalTensor& bias, double scale,
                                        double eps) {
  check_norm(check_output("gated_output", x_cls, cls, gate), weight, bias, x_cls.size(2));
  Tensor out = make_empty(x_cls, {x_cls.size(0), x_cls.size(1), x_cls.size(2)});
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
        partial(make_empty(like, {0, 0, 0}, wide(like))),
        mix(scratch(like, gate_logits)) {
    const int64_t C = like.size(like.dim() - 1);
    if (need_gate) gate = make_empty(like, {C});
    if (norm) weight = make_empty(like, {C}), bias = make_empty(like, {C});
    if (need_gate || norm) partial = make_empty(like, {3, parts + class_rows, C}, wide(like));
  }

  void zero() {
    for (Tensor* x : {&gate, &weight, &bias}) torch::stable::zero_(*x);
  }

  void fill(GatedFusionBackwardArgs& a, bool need_gate, bool norm) {
    if (need_gate) a.grad_gate = view<1>(gate);
    if (norm) a.grad_weight = view<1>(weight), a.grad_bias = view<1>(bias);
    a.partial = view<3>(partial), a.mix = view<1>(mix);
  }
};

void check_gradients(const OptionalTensor& grad_out, const Tensor& grad_out_cls, const OptionalTensor& grad_normed,
                     const OptionalTensor& value, const OptionalTensor& x, const OptionalTensor& z,
                     const OptionalTensor& cls, const OptionalTensor& gate, const OptionalTensor& keep,
                     const OptionalTensor& source, const OptionalTensor& weight, const OptionalTensor& stats, int64_t T,
                     int64_t P, bool pair, bool packed, bool need_x, bool need_gate) {
  const Check check("gated_fusion_backward", "grad_out_cls [B, C]", grad_out_cls, {kAny, kAny});
  const int64_t B = grad_out_cls.size(0), C = grad_out_cls.size(1);
  const Branch branch = check_tokens(check, keep, B, T, P, pair);
  const auto [S, K] = branch;
  check.that(grad_out || grad_normed, "grad_out or grad_normed must be given");
  check.that(!packed || S > 0, "packed needs a slot for the class rows");
  for (const OptionalTensor& rows : {grad_out, grad_normed, value}) check.like("rows [B, S, K, C]", rows, {B, S, K, C});
  check.like("x [B, T, 1 + P, C]", x, {B, T, 1 + P, C});
  check.that(!z || bool(cls) != packed, "z has class rows in front where packed is set, and cls is given where not");
  if (z) check_branch(check, z, cls, B, branch, C);
  check.like("gate [C]", gate, {C});
  check.like("weight [C]", weight, {C});
  check.wide("stats [B, S, K, 2]", stats, {B, S, K, 2});
  check.that(!grad_normed || (weight && stats && (value || (x && z))),
             "grad_normed needs weight, stats, and value or x and z");
  check.that(!need_gate || (gate && x && z), "need_gate needs gate, x and z");
  check.of(ScalarType::Long, "source [B, frames, P]", source, {B, pair ? T / 2 : T, P});
  check.that(!need_x || !keep || source, "with keep, need_x needs source");
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
SixTensors gated_fusion_backward(const OptionalTensor& grad_out, const Tensor& grad_out_cls,
                                 const OptionalTensor& grad_normed, const OptionalTensor& value,
                                 const OptionalTensor& x, const OptionalTensor& z, const OptionalTensor& cls,
                                 const OptionalTensor& gate, const OptionalTensor& keep, const OptionalTensor& source,
                                 const OptionalTensor& weight, const OptionalTensor& stats, int64_t T, int64_t P,
                                 double scale, bool pair, bool first, bool packed, bool need_x, bool need_z,
                                 bool need_gate) {
  check_gradients(grad_out, grad_out_cls, grad_normed, value, x, z, cls, gate, keep, source, weight, stats, T, P, pair,
                  packed, need_x, need_gate);
  const OptionalTensor grad_ = unit_last_stride(grad_out), grad_normed_ = unit_last_stride(grad_normed),
                       value_ = unit_last_stride(value), x_ = unit_last_stride(x), z_ = unit_last_stride(z),
                       cls_ = unit_last_stride(cls), gate_ = unit_last_stride(gate), weight_ = unit_last_stride(weight),
                       stats_ = unit_last_stride(stats);
  const Tensor grad_cls_ = unit_last_stride(grad_out_cls), rows = grad_normed_ ? *grad_normed_ : *grad_;
  const int64_t B = rows.size(0), S = rows.size(1), K = rows.size(2), C = rows.size(3);
  const bool norm = bool(grad_normed_);
  GatedFusionBackwardArgs a = {};
  a.parts = row_parts(B * S, K);
  ParameterGrads parameters(rows, a.parts, B, need_gate, norm, gate);
  Tensor grad_x = need_x ? make_empty(rows, {B, T, 1 + P, C}) : nothing(rows);
  packed = packed && need_z;
  Tensor grad_z = need_z ? make_empty(rows, {B, S, packed ? 1 + K : K, C}) : nothing(rows),
         grad_cls = packed ? nothing(rows) : make_empty(rows, {B, C});
  if (grad_out_cls.numel() == 0) {  // no videos, or no channels
    parameters.zero();
    return {grad_x, grad_z, grad_cls, parameters.gate, parameters.weight, parameters.bias};
  }
  a.grad_out = view<4>(grad_), a.grad_out_cls = view<2>(grad_cls_), a.grad_normed = view<4>(grad_normed_);
  a.value = view<4>(value_), a.gate = view<1>(gate_);
  if (z_) a.z = cls_ ? view<4>(z_) : patches(*z_), a.cls = cls_ ? view<2>(cls_) : first_class_row(*z_);
  if (x_) a.x = patches(*x_), a.x_cls = class_tokens(*x_);
  if (keep) a.keep = keep_view(*keep, B), a.tube = keep->dim() == 2;
  if (keep) a.source = view<3>(source);
  if (norm) a.weight = view<1>(weight_), a.stats = view<4>(stats_);
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
  const Check check = check_output("gated_output_backward", x_cls, cls, gate);
  check.like("grad [B, T, C]", grad, x_cls);
  check.that(bool(weight) == bool(stats), "weight and stats of the norm come together");
  check.like("weight [C]", weight, {x_cls.size(2)});
  check.wide("stats [B, 1, T, 2]", stats, {x_cls.size(0), 1, x_cls.size(1), 2});
  check.that(!need_gate || gate, "need_gate needs gate");
  const Tensor grad_ = unit_last_stride(grad), x_ = unit_last_stride(x_cls), cls_ = unit_last_stride(cls);
  const OptionalTensor gate_ = unit_last_stride(gate), weight_ = unit_last_stride(weight),
                       stats_ = unit_last_stride(stats);
  const int64_t B = grad.size(0), T = grad.size(1), C = grad.size(2);
  const bool norm = bool(weight);
  GatedFusionBackwardArgs a = {};
  a.parts = row_parts(B, T);
  ParameterGrads parameters(grad, a.parts, 0, need_gate, norm, gate);
  Tensor grad_x = make_empty(grad, {B, T, C}), grad_rows = make_empty(grad, {B, T, C});
  if (grad.numel() == 0) {
    parameters.zero();
    return {grad_x, grad_rows, parameters.gate, parameters.weight, parameters.bias};
  }
  (norm ? a.grad_normed : a.grad_out) = one_frame(grad_, T);
  a.x = one_frame(x_, T), a.z = one_frame(cls_, T), a.gate = view<1>(gate_);
  if (norm) a.weight = view<1>(weight_), a.stats = view<4>(stats_);
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
