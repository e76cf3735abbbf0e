#include "pyvidx/temporal_attention.h"

#include "torch_view.h"

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

void temporal_attention_out(const Tensor& qkv, double scale, Tensor out) {
  const Tensor qkv_ = unit_last_stride(qkv);
  TemporalAttentionArgs args{view<6>(qkv_), heads_view(out, qkv.size(4), qkv.size(5)), scale};
  PYVIDX_RUN(temporal_attention, qkv, args);
}

Tensor temporal_attention(const Tensor& qkv, double scale) {
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(4) * qkv.size(5)});
  temporal_attention_out(qkv, scale, out);
  return out;
}

Tensor temporal_attention_backward(const Tensor& grad_out, const Tensor& qkv, double scale) {
  const Tensor grad_out_ = unit_last_stride(grad_out), qkv_ = unit_last_stride(qkv);
  Tensor grad_qkv =
      torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1), qkv.size(2), qkv.size(3), qkv.size(4), qkv.size(5)});
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
