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

void memory_replay_out(const Tensor& rows, const Tensor& frames, const Tensor& sources, const Tensor& counts,
                       bool weighted, Tensor out) {
  const Tensor rows_ = unit_last_stride(rows), frames_ = unit_last_stride(frames);
  const Tensor sources_ = unit_last_stride(sources), counts_ = unit_last_stride(counts);
  MemoryReplayArgs args{view<4>(rows_), view<4>(frames_), view<4>(sources_), view<4>(counts_), view<4>(out), weighted};
  PYVIDX_RUN(memory_replay, rows, args);
}

Tensor memory_replay(const Tensor& rows, const Tensor& frames, const Tensor& sources, const Tensor& counts,
                     bool weighted) {
  const int64_t entries = rows.size(1) + 2 * frames.size(1);
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), entries, rows.size(2), rows.size(3)});
  memory_replay_out(rows, frames, sources, counts, weighted, out);
  return out;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("memory_scan_", TORCH_BOX(&memory_scan_));
  m.impl("memory_replay", TORCH_BOX(&memory_replay));
  m.impl("memory_replay_out", TORCH_BOX(&memory_replay_out));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
