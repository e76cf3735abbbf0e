#include "pyvidx/token_gather.h"

#include <utility>

#include "check.h"

namespace pyvidx {
namespace {

// S, K
std::pair<int64_t, int64_t> check(const Check& check, const Tensor& x, const Tensor& keep,
                                  const OptionalTensor& position, const OptionalTensor& time) {
  const int64_t T = x.size(1), P = x.size(2), C = x.size(3);
  check.keep(keep, x.size(0));
  check.like("position [P, C]", position, {P, C});
  check.like("time [T or more, C]", time, {kAny, C});
  check.that(!time || time->size(0) >= T, "time must be [T or more, C] of x");
  return {keep.dim() == 2 ? T : keep.size(1), keep.size(keep.dim() - 1)};
}

void gather(const Tensor& x, const Tensor& keep, const OptionalTensor& position, const OptionalTensor& time,
            const Tensor& out) {
  const Tensor x_ = unit_last_stride(x);
  const OptionalTensor position_ = unit_last_stride(position), time_ = unit_last_stride(time);
  TokenGatherArgs args{view<4>(x_),    keep_view(keep, x.size(0)), view<2>(position_), view<2>(time_), view<4>(out),
                       keep.dim() == 2};
  if (out.numel() > 0) PYVIDX_RUN(token_gather, x, args);
}

void token_gather_out(const Tensor& x, const Tensor& keep, const OptionalTensor& position, const OptionalTensor& time,
                      Tensor out) {
  const Check asked("token_gather", "x [B, T, P, C]", x, {kAny, kAny, kAny, kAny});
  const auto [S, K] = check(asked, x, keep, position, time);
  asked.like("out [B, S, K, C]", out, {x.size(0), S, K, x.size(3)});
  Written(asked, "out", out)
      .apart_from("x", x)
      .apart_from("keep", keep)
      .apart_from("position", position)
      .apart_from("time", time);
  gather(x, keep, position, time, out);
}

Tensor token_gather(const Tensor& x, const Tensor& keep, const OptionalTensor& position, const OptionalTensor& time) {
  const Check asked("token_gather", "x [B, T, P, C]", x, {kAny, kAny, kAny, kAny});
  const auto [S, K] = check(asked, x, keep, position, time);
  Tensor out = make_empty(x, {x.size(0), S, K, x.size(3)});
  gather(x, keep, position, time, out);
  return out;
}

Tensor token_gather_backward(const Tensor& grad_out, const Tensor& source) {
  const Check check("token_gather_backward", "grad_out [B, S, K, C]", grad_out, {kAny, kAny, kAny, kAny});
  check.of(ScalarType::Long, "source [B, T, P]", source, {grad_out.size(0), kAny, kAny});
  const Tensor grad_out_ = unit_last_stride(grad_out);
  Tensor grad_x = make_empty(grad_out, {source.size(0), source.size(1), source.size(2), grad_out.size(3)});
  TokenGatherBackwardArgs args{view<4>(grad_out_), view<3>(source), view<4>(grad_x)};
  if (grad_x.numel() > 0) PYVIDX_RUN(token_gather_backward, grad_out, args);
  return grad_x;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("token_gather", TORCH_BOX(&token_gather));
  m.impl("token_gather_out", TORCH_BOX(&token_gather_out));
  m.impl("token_gather_backward", TORCH_BOX(&token_gather_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
