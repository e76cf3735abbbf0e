#include "pyvidx/st_pool.h"

#include <algorithm>

#include "torch_view.h"

namespace pyvidx {
namespace {

using torch::stable::new_empty;

// A CPU walks all frames of a part at once. A GPU has a warp for each part and 128 bytes of its channels: where a batch
// has too few of them, parts get fewer frames, but not so few that their patches' sums weigh beside x.
int64_t frames_of_part(const Tensor& x, int64_t chunks) {
  const int64_t T = x.size(1);
#if !defined(PYVIDX_EMU)
  if (x.is_cpu()) return T;
#endif
  constexpr int64_t kWarps = 1024, kLeast = 16;
  const int64_t warps = std::max<int64_t>(1, x.size(0) * chunks * (x.size(3) * x.element_size() / 128));
  const int64_t spans = std::max<int64_t>(1, std::min(kWarps / warps, T / kLeast));
  return (T + spans - 1) / spans;
}

void st_pool_out(const Tensor& x, const OptionalTensor& mask, Tensor spatial, Tensor temporal) {
  const int64_t B = x.size(0), T = x.size(1), P = x.size(2), C = x.size(3), chunks = (P + kPoolRows - 1) / kPoolRows;
  const int64_t frames = frames_of_part(x, chunks), spans = (T + frames - 1) / frames;
  const auto wide = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor x_ = unit_last_stride(x);
  Tensor patch_sums = new_empty(x, {spans > 1 ? B : 0, spans, P, C}, wide);
  Tensor frame_sums = new_empty(x, {B, chunks, T, C}, wide);
  StPoolArgs args{view<4>(x_),         view<2>(mask), view<3>(spatial), view<3>(temporal), view<4>(patch_sums),
                  view<4>(frame_sums), frames};
  PYVIDX_RUN(st_pool, x, args);
}

std::tuple<Tensor, Tensor> st_pool(const Tensor& x, const OptionalTensor& mask) {
  Tensor spatial = new_empty(x, {x.size(0), x.size(2), x.size(3)});
  Tensor temporal = new_empty(x, {x.size(0), x.size(1), x.size(3)});
  st_pool_out(x, mask, spatial, temporal);
  return {spatial, temporal};
}

Tensor st_pool_backward(const Tensor& grad_spatial, const Tensor& grad_temporal, const OptionalTensor& mask) {
  const Tensor spatial_ = unit_last_stride(grad_spatial), temporal_ = unit_last_stride(grad_temporal);
  Tensor grad_x = new_empty(grad_spatial,
                            {grad_spatial.size(0), grad_temporal.size(1), grad_spatial.size(1), grad_spatial.size(2)});
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
