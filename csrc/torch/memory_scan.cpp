#include "pyvidx/memory_scan.h"

#include <utility>

#include "memory_state.h"

namespace pyvidx {
namespace {

std::tuple<Tensor, Tensor, Tensor> memory_scan_(Tensor bank, Tensor sizes, Tensor order, Tensor similarity,
                                                Tensor length, const Tensor& frames, bool weighted,
                                                const OptionalTensor& active) {
  const Check check = check_state("memory_scan_", bank, sizes, order, similarity, length, active);
  const int64_t B = bank.size(0), slots = bank.size(1), N = bank.size(2);
  check.like("frames [B, t, N, C]", frames, {B, kAny, N, bank.size(3)});
  const int64_t t = frames.size(1);
  check.that(t >= 1, "frames must be [B, t, N, C] of bank with t >= 1");
  Changed changed(check, bank, sizes, order, similarity, length);
  changed.reads("frames", frames), changed.reads("active", active);
  changed.check();
  const Tensor frames_ = unit_last_stride(frames);
  Tensor table = make_empty(bank, {B, t, N, slots}, ScalarType::Int);
  Tensor sources = make_empty(bank, {B, t, N, 2}, ScalarType::Int);
  Tensor counts = make_empty(bank, {B, t, N, 2}, ScalarType::Int);
  MemoryScanArgs args{view<4>(bank),    view<3>(sizes),   view<3>(order),  view<3>(similarity),
                      view<1>(length),  view<4>(frames_), view<1>(active), view<4>(table),
                      view<4>(sources), view<4>(counts),  weighted};
  if (table.numel() > 0) PYVIDX_RUN(memory_scan, bank, args);
  return {table, sources, counts};
}

void memory_replay_(Tensor rows, const Tensor& frames, const Tensor& table, const Tensor& sources, const Tensor& counts,
                    const Tensor& order, bool weighted, Tensor out) {
  const Check check("memory_replay_", "rows [B, M+1, N, W]", rows, {kAny, kAny, kAny, kAny});
  const int64_t B = rows.size(0), slots = rows.size(1), N = rows.size(2), W = rows.size(3);
  check.like("frames [B, t, N, W]", frames, {B, kAny, N, W});
  const int64_t t = frames.size(1);
  check.that(t >= 1 && slots >= 1, "frames must be [B, t, N, W] of rows with t >= 1");
  check.of(ScalarType::Int, "table [B, t, N, M+1]", table, {B, t, N, slots});
  check.of(ScalarType::Int, "sources [B, t, N, 2]", sources, {B, t, N, 2});
  check.of(ScalarType::Int, "counts [B, t, N, 2]", counts, {B, t, N, 2});
  check.of(ScalarType::Int, "order [B, N, M+1]", order, {B, N, slots});
  check.like("out [B, M+1+2t, N, W]", out, {B, slots + 2 * t, N, W});
  Written(check, "out", out).apart_from("rows", rows);
  for (const auto& [name, to] : {std::pair<const char*, const Tensor*>{"out", &out}, {"rows", &rows}}) {
    Written(check, name, *to)
        .apart_from("frames", frames)
        .apart_from("table", table)
        .apart_from("sources", sources)
        .apart_from("counts", counts)
        .apart_from("order", order);
  }
  const Tensor frames_ = unit_last_stride(frames), table_ = unit_last_stride(table), order_ = unit_last_stride(order);
  const Tensor sources_ = unit_last_stride(sources), counts_ = unit_last_stride(counts);
  MemoryReplayArgs args{view<4>(rows),    view<4>(frames_), view<4>(table_), view<4>(sources_),
                        view<4>(counts_), view<3>(order_),  view<4>(out),    weighted};
  if (out.numel() > 0) PYVIDX_RUN(memory_replay, rows, args);
}

template <typename Library>
void kernels(Library& m) {
  m.impl("memory_scan_", TORCH_BOX(&memory_scan_));
  m.impl("memory_replay_", TORCH_BOX(&memory_replay_));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
