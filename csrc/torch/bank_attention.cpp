#include "pyvidx/bank_attention.h"

#include <algorithm>

#include "check.h"

namespace pyvidx {
namespace {

BankAttentionInput input(const Tensor& q, const Tensor& rows, const OptionalTensor& table, const OptionalTensor& sizes,
                         const OptionalTensor& mask, int64_t heads, double scale) {
  return {view<4>(q), view<4>(rows), view<4>(table), view<4>(sizes), view<2>(mask), heads, scale};
}

bool on_cpu([[maybe_unused]] const Tensor& x) {
#if defined(PYVIDX_EMU)
  return false;  // kernels of a GPU
#else
  return x.is_cpu();
#endif
}

// Enough splits of the positions for the threads of a CPU, which has `tasks` without them, each long enough that
// merging them is nothing beside it; of the keys for the blocks of a GPU.
int64_t splits_of(const Tensor& q, const BankAttentionInput& a, int64_t tasks) {
  if (!on_cpu(q)) return bank_attention_gpu_splits(a);
  const int64_t positions = a.rows.size[2], keys = positions * (a.table ? a.table.size[3] : a.rows.size[1]);
  return std::max<int64_t>(1, std::min({16 / std::max<int64_t>(1, tasks), keys / 256, positions}));
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
  const BankAttentionInput in = input(q_, rows_, table, sizes, mask, heads, scale);
  const int64_t steps = q.size(0) * q.size(1), n = q.size(2), d = q.size(3) / heads;
  Tensor partial = make_empty(q, {steps * heads, splits_of(q, in, steps), bank_attention_partial(n, d)}, wide(q));
  BankAttentionArgs args{in, view<4>(out), view<4>(lse), view<3>(partial)};
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
  const BankAttentionInput in = input(q_, rows_, table, sizes, mask, heads, scale);
  const int64_t splits = splits_of(q, in, B);
  Tensor delta = make_empty(q, {B, t, heads, bank_attention_pairs(n)}, wide(q));
  Tensor partial = make_empty(q, {B * t * heads, splits, n * bank_attention_padded(D / heads)}, wide(q));
  Tensor grad_q = make_empty(q, {B, t, n, D});
  OptionalTensor grad_rows, named;
  if (need_rows) grad_rows = make_empty(rows, {B, rows.size(1), rows.size(2), 2 * D});
  if (need_rows && !on_cpu(q) && (table || sizes || mask)) {
    named = make_empty(rows, {B, t, rows.size(1), rows.size(2)}, ScalarType::Int);
  }
  BankAttentionBackwardArgs args{in,
                                 view<4>(grad_),
                                 view<4>(out_),
                                 view<4>(lse),
                                 view<4>(delta),
                                 view<4>(named),
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
