#include "pyvidx/memory_merge.h"

#include <vector>

#include "torch_view.h"

namespace pyvidx {
namespace {

Tensor memory_merge_(Tensor bank, Tensor sizes, Tensor order, Tensor similarity, Tensor length,
                     const OptionalTensor& frame, std::vector<Tensor> attached, std::vector<Tensor> attached_frame,
                     bool weighted, const OptionalTensor& active) {
  Tensor index = torch::stable::new_empty(bank, {bank.size(0), bank.size(2)}, ScalarType::Int);
  const OptionalTensor frame_ = unit_last_stride(frame);
  std::vector<MemoryAttached> followers;
  for (Tensor& f : attached_frame) f = unit_last_stride(f);
  for (size_t i = 0; i < attached.size(); ++i) {
    followers.push_back({view<4>(attached[i]), frame ? view<3>(attached_frame[i]) : View<3>{}});
  }
  MemoryStepArgs args{view<4>(bank),    view<3>(sizes),        view<3>(order),  view<3>(similarity),
                      view<1>(length),  view<3>(frame_),       view<1>(active), view<2>(index),
                      followers.data(), int(followers.size()), weighted};
  PYVIDX_RUN(memory_step, bank, args);
  return index;
}

std::tuple<Tensor, Tensor, Tensor> memory_merge(const Tensor& bank, const Tensor& sizes, bool weighted) {
  const int64_t B = bank.size(0), T = bank.size(1), N = bank.size(2), C = bank.size(3);
  const Tensor bank_ = unit_last_stride(bank);
  Tensor out = torch::stable::new_empty(bank, {B, T - 1, N, C});
  Tensor out_sizes = torch::stable::new_empty(sizes, {B, T - 1, N});
  Tensor index = torch::stable::new_empty(bank, {B, N}, ScalarType::Int);
  MemoryMergeArgs args{view<4>(bank_), view<3>(sizes), view<4>(out), view<3>(out_sizes), view<2>(index), weighted};
  PYVIDX_RUN(memory_merge, bank, args);
  return {out, out_sizes, index};
}

Tensor memory_merge_backward(const Tensor& grad_out, const Tensor& sizes, const Tensor& index, bool weighted) {
  const Tensor grad_out_ = unit_last_stride(grad_out);
  Tensor grad_bank =
      torch::stable::new_empty(grad_out, {sizes.size(0), sizes.size(1), sizes.size(2), grad_out.size(3)});
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
