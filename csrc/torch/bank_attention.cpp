#include "pyvidx/bank_attention.h"

#include <algorithm>

#include "torch_view.h"

namespace pyvidx {
namespace {

using torch::stable::new_empty;

// Enough splits of the positions for the threads of a CPU, which has `tasks` without them, or the blocks of a GPU
// (steps and heads), each long enough that merging them is nothing beside it.
int64_t splits_of(const Tensor& q, const Tensor& rows, const OptionalTensor& table, int64_t heads, int64_t tasks) {
  const int64_t positions = std::max<int64_t>(1, rows.size(2)), blocks = std::max<int64_t>(1, q.size(0) * q.size(1));
  const int64_t keys = rows.size(2) * (table ? table->size(3) : rows.size(1));
  const int64_t wanted = q.is_cpu() ? 16 / std::max<int64_t>(1, tasks) : 1024 / (blocks * heads);
  return std::max<int64_t>(1, std::min({wanted, keys / (q.is_cpu() ? 256 : 128), positions}));
}

BankAttentionInput input(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
                         const OptionalTensor& mask, int64_t heads, double scale) {
  return {view<4>(q), view<4>(rows), view<4>(table), view<4>(sizes), view<2>(mask), heads, scale};
}

void attend(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
            const OptionalTensor& mask, int64_t heads, double scale, const Tensor& out, const OptionalTensor& lse) {
  const Tensor q_ = unit_last_stride(q), rows_ = unit_last_stride(rows);
  const int64_t steps = q.size(0) * q.size(1), n = q.size(2), d = q.size(3) / heads;
  Tensor partial =
      new_empty(q, {steps * heads, splits_of(q, rows, table, heads, steps), bank_attention_partial(n, d)}, wide(q));
  BankAttentionArgs args{input(q_, rows_, table, sizes, mask, heads, scale), view<4>(out), view<4>(lse),
                         view<3>(partial)};
  PYVIDX_RUN(bank_attention, q, args);
}

void bank_attention_out(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
                        const OptionalTensor& mask, int64_t heads, double scale, Tensor out) {
  attend(q, rows, table, sizes, mask, heads, scale, out, {});
}

std::tuple<Tensor, Tensor> bank_attention(const Tensor& q, const Tensor& rows, const OptionalTensor& table,
                                          const OptionalTensor& sizes, const OptionalTensor& mask, int64_t heads,
                                          double scale) {
  Tensor out = new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor lse = new_empty(q, {q.size(0), q.size(1), heads, q.size(2)}, wide(q));
  attend(q, rows, table, sizes, mask, heads, scale, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor> bank_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& rows,
                                                   const OptionalTensor& table, const OptionalTensor& sizes,
                                                   const OptionalTensor& mask, const Tensor& out, const Tensor& lse,
                                                   int64_t heads, double scale, bool need_rows) {
  const Tensor grad_ = unit_last_stride(grad_out), q_ = unit_last_stride(q), rows_ = unit_last_stride(rows),
               out_ = unit_last_stride(out);
  const int64_t B = q.size(0), t = q.size(1), n = q.size(2), D = q.size(3);
  const int64_t splits = splits_of(q, rows, table, heads, B);
  Tensor delta = new_empty(q, {B, t, heads, n}, wide(q));
  Tensor partial = new_empty(q, {B * t * heads, splits, n * bank_attention_padded(D / heads)}, wide(q));
  Tensor grad_q = new_empty(q, {B, t, n, D});
  OptionalTensor grad_rows;
  if (need_rows) grad_rows = new_empty(rows, {B, rows.size(1), rows.size(2), 2 * D});
  BankAttentionBackwardArgs args{input(q_, rows_, table, sizes, mask, heads, scale),
                                 view<4>(grad_),
                                 view<4>(out_),
                                 view<4>(lse),
                                 view<4>(delta),
                                 view<3>(partial),
                                 view<4>(grad_q),
                                 view<4>(grad_rows)};
  PYVIDX_RUN(bank_attention_backward, q, args);
  return {grad_q, need_rows ? *grad_rows : new_empty(q, {0})};
}

template <typename Library>
void kernels(Library& m) {
  m.impl("bank_attention", TORCH_BOX(&bank_attention));
  m.impl("bank_attention_out", TORCH_BOX(&bank_attention_out));
  m.impl("bank_attention_backward", TORCH_BOX(&bank_attention_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
