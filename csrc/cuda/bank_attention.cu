// A block per (b, step, head, split of the positions), a warp per 16 queries. Keys go in tiles of 64 (float: 32): the
// block finds their rows in the table once, every warp reads them from global memory straight into mma's registers (a
// second warp finds them in L1) and keeps a running softmax and its sums in registers. A second pass adds up the
// splits. Traffic: 1 pass over the rows per step (steps share most of theirs, in L2). Arithmetic: 4 n D flops per key,
// for 32 queries and 16 bits 32 per byte, on tensor cores.
#include "bank_attention.cuh"

namespace pyvidx::cuda {

// The partial sums of one head and split: see BankAttentionArgs.
template <typename A>
struct Partial {
  A *sums, *largest, *total;
  int ld;
  __device__ __forceinline__ Partial(const BankAttentionArgs& a, int64_t head, int64_t split) {
    const int64_t n = a.q.size[2];
    ld = int(bank_attention_padded(a.q.size[3] / a.heads));
    sums = a.partial.at<A>(head, split);
    largest = sums + n * ld, total = largest + bank_attention_padded(n);
  }
};

template <typename T, int kD, int kSlabs>
__global__ __launch_bounds__(kBankThreads, 1) void bank_attention_kernel(BankAttentionArgs a) {
  using A = Acc<T>;
  // Heads wider than 64 keep twice the sums: with more tiles float then spills, where its products are added one by
  // one.
  constexpr int kTiles = sizeof(T) == 4 && kSlabs > 1 ? 1 : kBankTiles<T>, kKeys = 8 * kTiles;
  __shared__ const T* row[kKeys];
  __shared__ A bias[kKeys];
  const BankTask task(a, a.partial.size[1]);
  const int64_t h = task.h;
  const int n = task.n, d = task.d, q0 = task.q0;
  const Rows<const T> q = rows_of_head<const T>(a.q, task.b, task.s, h, d);
  const A scale = A(a.scale * kLog2e);

  A largest[2] = {A(kAbsent), A(kAbsent)}, total[2] = {};  // of rows g and g + 8; totals are of this lane's columns
  A sums[kSlabs][kColumns<T>][4] = {};
  for (int64_t k0 = task.first; k0 < task.last; k0 += kKeys) {
    find_keys<kKeys>(a, task, k0, row, bias);
    if (q0 >= n) continue;
    const RowTable<const T> keys{row, h * d, kKeys, d}, values{row, (a.heads + h) * d, kKeys, d};
    A w[kTiles][4], next[2] = {largest[0], largest[1]}, fade[2];
    dot_rows<T, kD>(q, q0, keys, 0, w);
    each_score<T>(w, 0, [&](int key, int half, A& x) {
      x = bias[key] == A(kAbsent) ? A(kAbsent) : x * scale + bias[key];
      next[half] = larger(next[half], x);
    });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      next[half] = row_max<T>(next[half]);
      fade[half] = power_of_two(largest[half] - next[half]);
      total[half] *= fade[half];
      largest[half] = next[half];
    }
    each_score<T>(w, 0, [&](int, int half, A& x) {
      x = x == A(kAbsent) ? A(0) : power_of_two(x - largest[half]);
      total[half] += x;
    });
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int column = 0; column < kColumns<T>; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[slab][column][i] *= fade[i / 2];
      }
      add_weighted<T, kD>(w, values, 0, slab * 8 * kColumns<T>, sums[slab]);
    }
  }
  if (q0 >= n) return;
  const Partial<A> to(a, task.head, task.split);
#pragma unroll
  for (int slab = 0; slab < kSlabs; ++slab) {
    store_sums<T, kWhole>(sums[slab], Rows<A>{to.sums, to.ld * int64_t(sizeof(A)), n, d}, q0, slab * 8 * kColumns<T>);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = q0 + score_row<T>(half);
    total[half] = row_sum<T>(total[half]);
    if (first_of_row<T>() && query < n) to.largest[query] = largest[half], to.total[query] = total[half];
  }
}

// A thread per element of out.
template <typename T>
__global__ __launch_bounds__(kMergeThreads) void bank_attention_merge_kernel(BankAttentionArgs a) {
  using A = Acc<T>;
  const int64_t n = a.q.size[2], D = a.q.size[3], d = D / a.heads, steps = a.q.size[1];
  const int64_t i = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i >= a.q.size[0] * steps * n * D) return;
  const int64_t step = i / (n * D), query = i / D % n, column = i % D, head = step * a.heads + column / d;
  A largest = A(kAbsent), total = 0, sum = 0;
  for (int64_t split = 0; split < a.partial.size[1]; ++split) {
    const A x = Partial<A>(a, head, split).largest[query];
    largest = x > largest ? x : largest;
  }
  for (int64_t split = 0; split < a.partial.size[1]; ++split) {
    const Partial<A> part(a, head, split);
    const A factor = power_of_two(part.largest[query] - largest);
    total += factor * part.total[query];
    sum += factor * part.sums[query * part.ld + column % d];
  }
  *a.out.at<T>(step / steps, step % steps, query, column) = from_acc<T>(total > 0 ? sum / total : A(0));
  if (a.lse && column % d == 0) {
    const A lse = total > 0 ? (largest + log2(total)) / A(kLog2e) : A(0);
    *a.lse.at<A>(step / steps, step % steps, column / d, query) = lse;
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

void bank_attention_cuda(const BankAttentionArgs& args, cudaStream_t stream) {
  const int64_t n = args.q.size[2], D = args.q.size[3], d = D / args.heads, warps = (n + 15) / 16;
  const int64_t elements = args.q.size[0] * args.q.size[1] * n * D;
  if (elements == 0) return;
  if (d % 8 != 0 || d > kBankAttentionMaxWidth) {
    throw std::invalid_argument("bank_attention: a head's width must be a multiple of 8 up to 128");
  }
  const unsigned threads = unsigned(32 * (warps < 4 ? warps : 4));
  const Grid blocks(args.partial.size[0] * args.partial.size[1], ceil_div(warps, 4));
  visit_dtype<float, double, __half, __nv_bfloat16>("bank_attention", args.q.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int kSlabs = int(kBankAttentionMaxWidth) / (8 * kColumns<T>);
    const bool vectorized = sizeof(T) <= 4 && vectorizable<T>(args.q) && vectorizable<T>(args.rows);
    if constexpr (sizeof(T) <= 4) {
      if (vectorized && d == 64) {
        PYVIDX_LAUNCH((bank_attention_kernel<T, 64, 1>), blocks, threads, 0, stream, args);
      } else if (vectorized) {
        PYVIDX_LAUNCH((bank_attention_kernel<T, kWhole, kSlabs>), blocks, threads, 0, stream, args);
      }
    }
    if (!vectorized) {
      PYVIDX_LAUNCH((bank_attention_kernel<T, kRagged, kSlabs>), blocks, threads, 0, stream, args);
    }
    check_launch("bank_attention_kernel");
    PYVIDX_LAUNCH((bank_attention_merge_kernel<T>), ceil_div(elements, kMergeThreads), kMergeThreads, 0, stream, args);
    check_launch("bank_attention_merge_kernel");
  });
}

}  // namespace pyvidx
#endif
