#include "pyvidx/memory_merge.h"

#include <vector>

#include "memory_state.h"

namespace pyvidx {
namespace {

// float32 or int32 [B, T, N]
void check_sizes(const Check& check, const Tensor& sizes, int64_t B, int64_t T, int64_t N) {
  check.of(sizes.scalar_type() == ScalarType::Int ? ScalarType::Int : ScalarType::Float, "sizes [B, T, N]", sizes,
           {B, T, N});
}

Tensor memory_merge_(Tensor bank, Tensor sizes, Tensor order, Tensor similarity, Tensor length,
                     const OptionalTensor& frame, std::vector<Tensor> attached, std::vector<Tensor> attached_frame,
                     bool weighted, const OptionalTensor& active) {
  const Check check = check_state("memory_merge_", bank, sizes, order, similarity, length, active);
  const int64_t B = bank.size(0), slots = bank.size(1), N = bank.size(2), C = bank.size(3);
  if (frame) check.mixed("frame [B, N, C]", *frame, {B, N, C});
  check.that(attached_frame.size() == (frame ? attached.size() : 0),
             "with a frame, attached_frame must hold one frame per attached tensor, without one none");
  Changed changed(check, bank, sizes, order, similarity, length);
  changed.reads("frame", frame), changed.reads("active", active);
  for (size_t i = 0; i < attached.size(); ++i) {
    const Check own("memory_merge_", "attached [B, M+1, N, Ci]", attached[i], {B, slots, N, kAny});
    check.of(attached[i].scalar_type(), "attached [B, M+1, N, Ci]", attached[i], {B, slots, N, kAny});
    if (frame) own.like("attached_frame [B, N, Ci]", attached_frame[i], {B, N, attached[i].size(3)});
    changed.writes("attached", attached[i]);
    if (frame) changed.reads("attached_frame", attached_frame[i]);
  }
  changed.check();
  Tensor index = make_empty(bank, {bank.size(0), bank.size(2)}, ScalarType::Int);
  const OptionalTensor frame_ = unit_last_stride(frame);
  std::vector<MemoryAttached> followers;
  for (Tensor& f : attached_frame) f = unit_last_stride(f);
  for (size_t i = 0; i < attached.size(); ++i) {
    followers.push_back({view<4>(attached[i]), frame ? view<3>(attached_frame[i]) : View<3>{}});
  }
  MemoryStepArgs args{view<4>(bank),    view<3>(sizes),        view<3>(order),  view<3>(similarity),
                      view<1>(length),  view<3>(frame_),       view<1>(active), view<2>(index),
                      followers.data(), int(followers.size()), weighted};
  if (index.numel() > 0) PYVIDX_RUN(memory_step, bank, args);
  return index;
}

std::tuple<Tensor, Tensor, Tensor> memory_merge(const Tensor& bank, const Tensor& sizes, bool weighted) {
  const Check check = check_bank("memory_merge", bank);
  const int64_t B = bank.size(0), T = bank.size(1), N = bank.size(2), C = bank.size(3);
  check_sizes(check, sizes, B, T, N);
  const Tensor bank_ = unit_last_stride(bank);
  Tensor out = make_empty(bank, {B, T - 1, N, C});
  Tensor out_sizes = make_empty(sizes, {B, T - 1, N});
  Tensor index = make_empty(bank, {B, N}, ScalarType::Int);
  MemoryMergeArgs args{view<4>(bank_), view<3>(sizes), view<4>(out), view<3>(out_sizes), view<2>(index), weighted};
  if (index.numel() > 0) PYVIDX_RUN(memory_merge, bank, args);
  return {out, out_sizes, index};
}

Tensor memory_merge_backward(const Tensor& grad_out, const Tensor& sizes, const Tensor& index, bool weighted) {
  const Check check("memory_merge_backward", "grad_out [B, T-1, N, C]", grad_out, {kAny, kAny, kAny, kAny});
  const int64_t B = grad_out.size(0), T = grad_out.size(1) + 1, N = grad_out.size(2);
  check.that(T >= 2, "grad_out must be [B, T-1, N, C] with T >= 2");
  check_sizes(check, sizes, B, T, N);
  check.of(ScalarType::Int, "index [B, N]", index, {B, N});
  const Tensor grad_out_ = unit_last_stride(grad_out);
  Tensor grad_bank = make_empty(grad_out, {B, T, N, grad_out.size(3)});
  if (grad_bank.numel() == 0) return grad_bank;
  MemoryMergeBackwardArgs args{view<4>(grad_out_), view<3>(sizes), view<2>(index), view<4>(grad_bank), weighted};
  PYVIDX_RUN(memory_merge_backward, grad_out, args);
  return grad_bank;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("memory_merge_", TORCH_BOX(&memory_merge_));
  m.impl("memory_merge", TORCH_BOX(&memory_merge));
  m.impl("memory_merge_backward", TORCH_BOX(&memory_merge_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
