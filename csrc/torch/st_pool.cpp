#include "pyvidx/st_pool.h"

#include <algorithm>

#include "check.h"

namespace pyvidx {
namespace {

// A CPU walks all frames of a part at once. A GPU has a block for each part and 128 bytes of its channels: where a
// batch has too few of them, parts get fewer frames, but not so few that their patches' sums weigh beside x. It needs
// no parts, 0, where frames are small and each 16 bytes of channels make blocks enough, or where it is done soon.
int64_t frames_of_part(const Tensor& x, int64_t chunks) {
  const int64_t B = x.size(0), T = x.size(1), bytes = x.size(3) * x.element_size();
#if !defined(PYVIDX_EMU)
  if (x.is_cpu()) return T;
#endif
  constexpr int64_t kBlocks = 1024, kLeast = 16, kEnough = 64, kSoon = 16;
  if (x.size(2) <= kPoolAtOnce && (B * bytes / 16 >= kEnough || T <= kSoon)) return 0;
  const int64_t blocks = std::max<int64_t>(1, B * chunks * (bytes / 128));
  const int64_t spans = std::max<int64_t>(1, std::min(kBlocks / blocks, T / kLeast));
  return (T + spans - 1) / spans;
}

Check check_clip(const Tensor& x, const OptionalTensor& mask) {
  const Check check("st_pool", "x [B, T, P, C]", x, {kAny, kAny, kAny, kAny});
  check.that(x.size(1) > 0 && x.size(2) > 0, "x must be [B, T, P, C] with T, P > 0");
  check.of(ScalarType::Int, "mask [B, T]", mask, {x.size(0), x.size(1)});
  return check;
}

void pool(const Tensor& x, const OptionalTensor& mask, const Tensor& spatial, const Tensor& temporal) {
  if (x.numel() == 0) return;
  const int64_t B = x.size(0), T = x.size(1), P = x.size(2), C = x.size(3), chunks = (P + kPoolRows - 1) / kPoolRows;
  const int64_t frames = frames_of_part(x, chunks), spans = frames > 0 ? (T + frames - 1) / frames : 0;
  const Tensor x_ = unit_last_stride(x);
  Tensor patch_sums = make_empty(x, {spans > 1 ? B : 0, spans, P, C}, wide(x));
  Tensor frame_sums = make_empty(x, {spans > 0 ? B : 0, chunks, T, C}, wide(x));
  StPoolArgs args{view<4>(x_),         view<2>(mask), view<3>(spatial), view<3>(temporal), view<4>(patch_sums),
                  view<4>(frame_sums), frames};
  PYVIDX_RUN(st_pool, x, args);
}

void st_pool_out(const Tensor& x, const OptionalTensor& mask, Tensor spatial, Tensor temporal) {
  const Check check = check_clip(x, mask);
  check.like("spatial [B, P, C]", spatial, {x.size(0), x.size(2), x.size(3)});
  check.like("temporal [B, T, C]", temporal, {x.size(0), x.size(1), x.size(3)});
  Written(check, "spatial", spatial).apart_from("x", x).apart_from("mask", mask).apart_from("temporal", temporal);
  Written(check, "temporal", temporal).apart_from("x", x).apart_from("mask", mask);
  pool(x, mask, spatial, temporal);
}

std::tuple<Tensor, Tensor> st_pool(const Tensor& x, const OptionalTensor& mask) {
  check_clip(x, mask);
  Tensor spatial = make_empty(x, {x.size(0), x.size(2), x.size(3)});
  Tensor temporal = make_empty(x, {x.size(0), x.size(1), x.size(3)});
  pool(x, mask, spatial, temporal);
  return {spatial, temporal};
}

Tensor st_pool_backward(const Tensor& grad_spatial, const Tensor& grad_temporal, const OptionalTensor& mask) {
  const Check check("st_pool_backward", "grad_spatial [B, P, C]", grad_spatial, {kAny, kAny, kAny});
  const int64_t B = grad_spatial.size(0), P = grad_spatial.size(1), C = grad_spatial.size(2);
  check.like("grad_temporal [B, T, C]", grad_temporal, {B, kAny, C});
  const int64_t T = grad_temporal.size(1);
  check.of(ScalarType::Int, "mask [B, T]", mask, {B, T});
  Tensor grad_x = make_empty(grad_spatial, {B, T, P, C});
  if (grad_x.numel() == 0) return grad_x;
  const Tensor spatial_ = unit_last_stride(grad_spatial), temporal_ = unit_last_stride(grad_temporal);
  StPoolBackwardArgs args{view<3>(spatial_), view<3>(temporal_), view<2>(mask), view<4>(grad_x)};
  PYVIDX_RUN(st_pool_backward, grad_spatial, args);
  return grad_x;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("st_pool", TORCH_BOX(&st_pool));
  m.impl("st_pool_out", TORCH_BOX(&st_pool_out));
  m.impl("st_pool_backward", TORCH_BOX(&st_pool_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
