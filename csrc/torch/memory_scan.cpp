#include "pyvidx/memory_scan.h"

#include "torch_view.h"

namespace pyvidx {
namespace {

std::tuple<Tensor, Tensor, Tensor> memory_scan_(Tensor bank, Tensor sizes, Tensor order, Tensor similarity,
                                                Tensor length, const Tensor& frames, bool weighted,
                                                const OptionalTensor& active) {
  const int64_t B = bank.size(0), slots = bank.size(1), N = bank.size(2), t = frames.size(1);
  const Tensor frames_ = unit_last_stride(frames);
  Tensor table = torch::stable::new_empty(bank, {B, t, N, slots}, ScalarType::Int);
  Tensor sources = torch::stable::new_empty(bank, {B, t, N, 2}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(bank, {B, t, N, 2}, ScalarType::Int);
  MemoryScanArgs args{view<4>(bank),    view<3>(sizes),   view<3>(order),  view<3>(similarity),
                      view<1>(length),  view<4>(frames_), view<1>(active), view<4>(table),
                      view<4>(sources), view<4>(counts),  weighted};
  PYVIDX_RUN(memory_scan, bank, args);
  return {table, sources, counts};
}

void memory_replay_(Tensor rows, const Tensor& frames, const Tensor& table, const Tensor& sources, const Tensor& counts,
                    const Tensor& order, bool weighted, Tensor out) {
  const Tensor frames_ = unit_last_stride(frames), table_ = unit_last_stride(table), order_ = unit_last_stride(order);
  const Tensor sources_ = unit_last_stride(sources), counts_ = unit_last_stride(counts);
  MemoryReplayArgs args{view<4>(rows),    view<4>(frames_), view<4>(table_), view<4>(sources_),
                        view<4>(counts_), view<3>(order_),  view<4>(out),    weighted};
  PYVIDX_RUN(memory_replay, rows, args);
}

template <typename Library>
void kernels(Library& m) {
  m.impl("memory_scan_", TORCH_BOX(&memory_scan_));
  m.impl("memory_replay_", TORCH_BOX(&memory_replay_));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
