// bank_attention: few queries over the many rows of a memory, which a table of slots names.
//
//   y[b, s, i] = sum_(p, j) softmax_(p, j)(scale <q[b, s, i], k> + log sizes[b, s, p, j]) v   per head,
//   (k, v) = rows[b, table[b, s, p, j], p]
//
// (The Q-Former over MA-LMM's memory bank, arXiv:2404.05726, section 3.2.) Neither the gathered rows nor the scores
// reach memory: the keys are cut into splits, each keeps a running softmax of its own, a second pass adds them up.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;  // cudaStream_t, so that no CUDA header is needed here

namespace pyvidx {

constexpr int64_t kBankAttentionMaxWidth = 128;  // of a head: a GPU keeps its sums in registers

struct BankAttentionInput {
  View<4> q;      // [B, t, n, H * d]  in, any strides but the last, which is 1; d a multiple of 8
  View<4> rows;   // [B, S, N, 2 * H * d]  in, dtype of q, likewise: keys, then values
  View<4> table;  // [B, t, N, L]  in, i32: slots < S, negative where there is no key. Optional: all slots, L = S
  View<4> sizes;  // [B, t, N, L]  in, i32, 1 or more, optional
  View<2> mask;   // [B, N]        in, i32, 0: a position that nobody attends to. Optional
  int64_t heads;
  double scale;
};

struct BankAttentionArgs : BankAttentionInput {
  View<4> out;      // [B, t, n, H * d]  out, dtype of q
  View<4> lse;      // [B, t, H, n]  out, f32 (f64 for f64), optional: log of the sum of e^scores, 0 without keys
  View<3> partial;  // [B * t * H, splits, bank_attention_partial(n, d)]  scratch, contiguous, aligned to 16 bytes, f32
                    // (f64 for f64); the caller chooses splits >= 1: more for more threads or blocks
};

// What one split leaves of one head: its sums [n][padded d], largest scores and totals [padded n] each.
PYVIDX_INLINE int64_t bank_attention_padded(int64_t n) { return (n + 15) / 16 * 16; }
PYVIDX_INLINE int64_t bank_attention_partial(int64_t n, int64_t d) {
  return n * bank_attention_padded(d) + 2 * bank_attention_padded(n);
}

void bank_attention_cpu(const BankAttentionArgs& args, const Executor& executor);
void bank_attention_cuda(const BankAttentionArgs& args, CUstream_st* stream);

// How a GPU shares the work out. A warp has 16 queries of a head. Those of a step, and of up to 4 steps, have most keys
// in common: so many tasks of the up to 8 warps of a block. Where there are fewer, each task's keys are cut into parts.
constexpr int64_t kBankAttentionWarps = 8;
PYVIDX_INLINE int64_t bank_attention_tasks(const BankAttentionInput& a) {
  const int64_t groups = (a.q.size[2] + 15) / 16, steps = a.q.size[1] < 4 ? a.q.size[1] : 4;
  return groups * steps < kBankAttentionWarps ? groups * steps : kBankAttentionWarps;
}
// Splits for the blocks of a GPU. None up to kKeysOfBlock keys a step, which a block has behind it sooner than a second
// launch begins; of more, two blocks a multiprocessor, and two tiles of keys a warp.
constexpr int64_t kKeysOfBlock = 2048;
PYVIDX_INLINE int64_t bank_attention_gpu_splits(const BankAttentionInput& a) {
  const int64_t keys = a.rows.size[2] * (a.table ? a.table.size[3] : a.rows.size[1]);
  if (keys <= kKeysOfBlock) return 1;
  const int64_t tasks = bank_attention_tasks(a),
                warps = a.q.size[0] * a.q.size[1] * a.heads * ((a.q.size[2] + 15) / 16);
  const int64_t wanted = 256 * tasks / warps, most = (keys * tasks / kBankAttentionWarps + 127) / 128;
  return wanted < 1 ? 1 : wanted < most ? wanted : most;
}

// Of each query two numbers, which a GPU has beside each other; up to a multiple of 32 queries.
PYVIDX_INLINE int64_t bank_attention_pairs(int64_t n) { return 2 * ((n + 31) / 32 * 32); }

// With w = e^(scale q k^T + log sizes - lse), delta = rowsum(grad_out * out) and dw = w * (grad_out v^T - delta):
//   grad_q = scale dw k,   grad_k = scale dw^T q,   grad_v = w^T grad_out,   both summed over the steps that read a row
// Who works on a position does all its steps, one after the other: no two threads add to one row, and every run gives
// the same bits.
struct BankAttentionBackwardArgs : BankAttentionInput {
  View<4> grad_out;  // [B, t, n, H * d]  in, dtype of q, any strides but the last, which is 1
  View<4> out;       // [B, t, n, H * d]  in, likewise: what the forward pass gave,
  View<4> lse;       // [B, t, H, n]      in, f32 (f64 for f64): and this
  View<4> delta;     // [B, t, H, bank_attention_pairs(n)]  scratch, dtype of lse, contiguous, aligned to 32 bytes
  View<4> named;     // [B, t, S, N]      scratch of a GPU, i32, contiguous. Only with grad_rows and any of table, sizes
                     // and mask
  View<3> partial;   // [B * t * H, splits, n * bank_attention_padded(d)]  scratch, as in the forward pass
  View<4> grad_q;    // [B, t, n, H * d]  out, dtype of q, last stride 1
  View<4> grad_rows;  // [B, S, N, 2 * H * d]  out, likewise, every element is written. Optional
};

void bank_attention_backward_cpu(const BankAttentionBackwardArgs& args, const Executor& executor);
void bank_attention_backward_cuda(const BankAttentionBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
