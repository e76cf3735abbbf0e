#include "pyvidx/bank_attention.h"

#include <algorithm>

#include "torch_view.h"

namespace pyvidx {
namespace {

// Enough splits of the positions for the threads of a CPU (whose tasks are steps) or the blocks of a GPU (steps and
// heads), each long enough that merging them is nothing beside it.
int64_t splits_of(const Tensor& q, const Tensor& rows, int64_t keys, int64_t heads) {
  const int64_t steps = std::max<int64_t>(1, q.size(0) * q.size(1)), positions = std::max<int64_t>(1, rows.size(2));
  const int64_t wanted = q.is_cpu() ? 16 / steps : 1024 / (steps * heads), most = keys / (q.is_cpu() ? 256 : 128);
  return std::max<int64_t>(1, std::min({wanted, most, positions}));
}

void bank_attention_out(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
                        const OptionalTensor& mask, int64_t heads, double scale, Tensor out) {
  const Tensor q_ = unit_last_stride(q), rows_ = unit_last_stride(rows);
  const int64_t keys = rows.size(2) * (table ? table->size(3) : rows.size(1)), n = q.size(2), d = q.size(3) / heads;
  const auto wide = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor partial = torch::stable::new_empty(
      q, {q.size(0) * q.size(1) * heads, splits_of(q, rows, keys, heads), bank_attention_partial(n, d)}, wide);
  BankAttentionArgs args{view<4>(q_),  view<4>(rows_),   view<4>(table), view<4>(sizes), view<2>(mask),
                         view<4>(out), view<3>(partial), heads,          scale};
  PYVIDX_RUN(bank_attention, q, args);
}

Tensor bank_attention(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
                      const OptionalTensor& mask, int64_t heads, double scale) {
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  bank_attention_out(q, rows, table, sizes, mask, heads, scale, out);
  return out;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("bank_attention", TORCH_BOX(&bank_attention));
  m.impl("bank_attention_out", TORCH_BOX(&bank_attention_out));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
