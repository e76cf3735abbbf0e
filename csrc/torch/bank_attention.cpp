#include "pyvidx/bank_attention.h"

#include <algorithm>

#include "check.h"

namespace pyvidx {
namespace {

// Enough splits of the positions for the threads of a CPU, which has `tasks` without them, or the blocks of a GPU
// (steps and heads), each long enough that merging them is nothing beside it.
int64_t splits_of(const Tensor& q, const Tensor& rows, const OptionalTensor& table, int64_t heads, int64_t tasks) {
  const int64_t positions = std::max<int64_t>(1, rows.size(2)), blocks = std::max<int64_t>(1, q.size(0) * q.size(1));
  const int64_t keys = rows.size(2) * (table ? table->size(3) : rows.size(1));
  const int64_t wanted = q.is_cpu() ? 16 / std::max<int64_t>(1, tasks) : 1024 / (blocks * heads);
  return std::max<int64_t>(1, std::min({wanted, keys / 256, positions}));
}

BankAttentionInput input(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
                         const OptionalTensor& mask, int64_t heads, double scale) {
  return {view<4>(q), view<4>(rows), view<4>(table), view<4>(sizes), view<2>(mask), heads, scale};
}

Check check_inputs(const char* op, const Tensor& q, const Tensor& rows, const OptionalTensor& table,
                   const OptionalTensor& sizes, const OptionalTensor& mask, int64_t heads) {
  const Check check(op, "q [B, t, n, D]", q, {kAny, kAny, kAny, kAny});
  const int64_t B = q.size(0), t = q.size(1), D = q.size(3), d = heads > 0 && D % heads == 0 ? D / heads : 0;
  static_assert(kBankAttentionMaxWidth == 128, "the message says so");
  check.that(d > 0 && d % 8 == 0 && d <= kBankAttentionMaxWidth,
             "D must be heads * d, d a multiple of 8 up to 128, heads at least 1");
  check.like("rows [B, S, N, 2D]", rows, {B, kAny, kAny, 2 * D});
  const int64_t N = rows.size(2);
  check.of(ScalarType::Int, "table [B, t, N, L]", table, {B, t, N, kAny});
  check.of(ScalarType::Int, "sizes [B, t, N, L]", sizes, {B, t, N, table ? table->size(3) : rows.size(1)});
  check.of(ScalarType::Int, "mask [B, N]", mask, {B, N});
  return check;
}

// Are there queries, but no key for any of them? A tensor without elements is none to a kernel.
bool no_keys(const Tensor& rows, const OptionalTensor& table) {
  return rows.numel() == 0 || (table && table->numel() == 0);
}

void attend(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
            const OptionalTensor& mask, int64_t heads, double scale, const Tensor& out, const OptionalTensor& lse) {
  if (q.numel() == 0) return;
  const Tensor q_ = unit_last_stride(q), rows_ = unit_last_stride(rows);
  const int64_t steps = q.size(0) * q.size(1), n = q.size(2), d = q.size(3) / heads;
  Tensor partial =
      make_empty(q, {steps * heads, splits_of(q, rows, table, heads, steps), bank_attention_partial(n, d)}, wide(q));
  BankAttentionArgs args{input(q_, rows_, table, sizes, mask, heads, scale), view<4>(out), view<4>(lse),
                         view<3>(partial)};
  PYVIDX_RUN(bank_attention, q, args);
}

void bank_attention_out(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
                        const OptionalTensor& mask, int64_t heads, double scale, Tensor out) {
  const Check check = check_inputs("bank_attention", q, rows, table, sizes, mask, heads);
  check.like("out [B, t, n, D]", out, q);
  Written(check, "out", out)
      .apart_from("q", q)
      .apart_from("rows", rows)
      .apart_from("table", table)
      .apart_from("sizes", sizes)
      .apart_from("mask", mask);
  if (no_keys(rows, table)) return void(torch::stable::zero_(out));
  attend(q, rows, table, sizes, mask, heads, scale, out, {});
}

std::tuple<Tensor, Tensor> bank_attention(const Tensor& q, const Tensor& rows, const OptionalTensor& table,
                                          const OptionalTensor& sizes, const OptionalTensor& mask, int64_t heads,
                                          double scale) {
  check_inputs("bank_attention", q, rows, table, sizes, mask, heads);
  if (no_keys(rows, table)) {
    return {make_zeros(q, {q.size(0), q.size(1), q.size(2), q.size(3)}),
            make_zeros(q, {q.size(0), q.size(1), heads, q.size(2)}, wide(q))};
  }
  Tensor out = make_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor lse = make_empty(q, {q.size(0), q.size(1), heads, q.size(2)}, wide(q));
  attend(q, rows, table, sizes, mask, heads, scale, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor> bank_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& rows,
                                                   const OptionalTensor& table, const OptionalTensor& sizes,
                                                   const OptionalTensor& mask, const Tensor& out, const Tensor& lse,
                                                   int64_t heads, double scale, bool need_rows) {
  const Check check = check_inputs("bank_attention_backward", q, rows, table, sizes, mask, heads);
  check.like("grad_out [B, t, n, D]", grad_out, q);
  check.like("out [B, t, n, D]", out, q);
  check.wide("lse [B, t, H, n]", lse, {q.size(0), q.size(1), heads, q.size(2)});
  if (q.numel() == 0 || no_keys(rows, table)) {
    return {make_zeros(q, {q.size(0), q.size(1), q.size(2), q.size(3)}),
            need_rows ? make_zeros(rows, {rows.size(0), rows.size(1), rows.size(2), rows.size(3)}) : nothing(q)};
  }
  const Tensor grad_ = unit_last_stride(grad_out), q_ = unit_last_stride(q), rows_ = unit_last_stride(rows),
               out_ = unit_last_stride(out);
  const int64_t B = q.size(0), t = q.size(1), n = q.size(2), D = q.size(3);
  const int64_t splits = splits_of(q, rows, table, heads, B);
  Tensor delta = make_empty(q, {B, t, heads, n}, wide(q));
  Tensor partial = make_empty(q, {B * t * heads, splits, n * bank_attention_padded(D / heads)}, wide(q));
  Tensor grad_q = make_empty(q, {B, t, n, D});
  OptionalTensor grad_rows;
  if (need_rows) grad_rows = make_empty(rows, {B, rows.size(1), rows.size(2), 2 * D});
  BankAttentionBackwardArgs args{input(q_, rows_, table, sizes, mask, heads, scale),
                                 view<4>(grad_),
                                 view<4>(out_),
                                 view<4>(lse),
                                 view<4>(delta),
                                 view<3>(partial),
                                 view<4>(grad_q),
                                 view<4>(grad_rows)};
  PYVIDX_RUN(bank_attention_backward, q, args);
  return {grad_q, need_rows ? *grad_rows : nothing(q)};
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
