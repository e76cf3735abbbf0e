#include "pyvidx/temporal_attention.h"

#include "check.h"

namespace pyvidx {
namespace {

// x [B, T, P, H * D] as [B, T, P, H, D].
View<5> heads_view(const Tensor& x, int64_t H, int64_t D) {
  const View<4> rows = view<4>(x);
  View<5> v;
  v.data = rows.data, v.dtype = rows.dtype;
  for (int i = 0; i < 3; ++i) v.size[i] = rows.size[i], v.stride[i] = rows.stride[i];
  v.size[3] = H, v.stride[3] = D;
  v.size[4] = D, v.stride[4] = 1;
  return v;
}

Check check_qkv(const char* op, const Tensor& qkv) {
  const Check check(op, "qkv [B, T, P, 3, H, D]", qkv, {kAny, kAny, kAny, 3, kAny, kAny});
  static_assert(kTemporalAttentionMaxFrames == 128, "the message says so");
  check.that(qkv.size(1) <= kTemporalAttentionMaxFrames, "qkv must have at most 128 frames");
  return check;
}

// Like x [B, T, P, H * D].
void check_rows(const Check& check, const char* what, const Tensor& x, const Tensor& qkv) {
  check.like(what, x, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4) * qkv.size(5)});
}

void attend(const Tensor& qkv, double scale, const Tensor& out) {
  if (out.numel() == 0) return;
  const Tensor qkv_ = unit_last_stride(qkv);
  TemporalAttentionArgs args{view<6>(qkv_), heads_view(out, qkv.size(4), qkv.size(5)), scale};
  PYVIDX_RUN(temporal_attention, qkv, args);
}

void temporal_attention_out(const Tensor& qkv, double scale, Tensor out) {
  const Check check = check_qkv("temporal_attention", qkv);
  check_rows(check, "out [B, T, P, H * D]", out, qkv);
  Written(check, "out", out).apart_from("qkv", qkv);
  attend(qkv, scale, out);
}

Tensor temporal_attention(const Tensor& qkv, double scale) {
  check_qkv("temporal_attention", qkv);
  Tensor out = make_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4) * qkv.size(5)});
  attend(qkv, scale, out);
  return out;
}

Tensor temporal_attention_backward(const Tensor& grad_out, const Tensor& qkv, double scale) {
  check_rows(check_qkv("temporal_attention_backward", qkv), "grad_out [B, T, P, H * D]", grad_out, qkv);
  Tensor grad_qkv = make_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3), qkv.size(4), qkv.size(5)});
  if (grad_qkv.numel() == 0) return grad_qkv;
  const Tensor grad_out_ = unit_last_stride(grad_out), qkv_ = unit_last_stride(qkv);
  TemporalAttentionBackwardArgs args{heads_view(grad_out_, qkv.size(4), qkv.size(5)), view<6>(qkv_), view<6>(grad_qkv),
                                     scale};
  PYVIDX_RUN(temporal_attention_backward, qkv, args);
  return grad_qkv;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("temporal_attention", TORCH_BOX(&temporal_attention));
  m.impl("temporal_attention_out", TORCH_BOX(&temporal_attention_out));
  m.impl("temporal_attention_backward", TORCH_BOX(&temporal_attention_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
