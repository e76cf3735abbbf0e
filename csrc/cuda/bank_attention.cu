// A warp per 16 queries of a (b, head, step) and part of the keys, see bank_attention_tasks. Keys go in tiles of 64
// (float: 32): their rows are found in the table a tile ahead; the warp reads them from global memory straight into
// mma's registers (the warps of the other queries, and of the next steps, find them in L1) and keeps a running softmax
// and its sums in registers. The warps of a block that parted a task's keys put together what they found, in shared
// memory. Of a long bank several blocks share the keys, and a second pass adds up their splits: an atomic counter would
// save it, but needs memory that is zero before and belongs to one launch alone, also in a graph. Traffic: 1 pass over
// the rows per 4 steps. Arithmetic: 4 n D flops per key, for 32 queries and 16 bits 32 per byte, on tensor cores.
//
// Versions, predicted for a frame of MA-LMM's visual bank, 5397 keys, in us (half on V100, A100, H100; float on H100):
//   blocks of 2 warps, 16 splits               37.9  26.9  22.2   42.0   6 tiles in turn a warp, then 12 rounds to add
//   up of 8, four to a task, 11 splits            -     -     13.9   21.6   2 tiles in turn, splits loaded 8 at a time
//   the same, no divisions in 64 bits          29.1  21.3  12.3   20.8
//   the same, queries stay in registers        28.7  -     12.3   -      kept: 9 % fewer instructions
// A query bank of 44 positions, 924 keys, is one launch of 36 blocks: 8.0 us on H100 in half, 16.2 in float.
#include "bank_attention.cuh"

namespace pyvidx::cuda {

// The partial sums of one head and split: see BankAttentionArgs.
template <typename A>
struct Partial {
  A *sums, *largest, *total;
  int ld;
  __device__ __forceinline__ Partial(const BankAttentionArgs& a, int64_t head, int64_t split) {
    const int64_t n = a.q.size[2];
    ld = int(bank_attention_padded(head_width(a)));
    sums = a.partial.at<A>(head, split);
    largest = sums + n * ld, total = largest + bank_attention_padded(n);
  }
};

// log of the sum of e^scores, 0 without keys
template <typename A>
__device__ __forceinline__ A log_of_sum(A largest, A total) {
  return total > 0 ? (largest + log2(total)) / A(kLog2e) : A(0);
}

// What a warp has found, as its lanes hold it: of their two rows, totals and sums of their columns.
template <typename T, int kSlabs>
struct Found {
  using A = Acc<T>;
  A largest[2] = {A(kAbsent), A(kAbsent)}, total[2] = {};
  A sums[kSlabs][kColumns<T>][4] = {};

  static constexpr int kNumbers = 4 + kSlabs * kColumns<T> * 4;
  using Storage = A[kNumbers][32];
  __device__ __forceinline__ void put(Storage& to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) to[half][lane] = largest[half], to[2 + half][lane] = total[half];
#pragma unroll
    for (int i = 4; i < kNumbers; ++i) to[i][lane] = (&sums[0][0][0])[i - 4];
  }
  __device__ __forceinline__ void add(const Storage& from) {
    const int lane = threadIdx.x % 32;
    A fade[2], factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const A other = from[half][lane], next = larger(largest[half], other);
      fade[half] = power_of_two(largest[half] - next), factor[half] = power_of_two(other - next);
      total[half] = total[half] * fade[half] + from[2 + half][lane] * factor[half];
      largest[half] = next;
    }
#pragma unroll
    for (int i = 4; i < kNumbers; ++i) {
      A& x = (&sums[0][0][0])[i - 4];
      x = x * fade[i % 4 / 2] + from[i][lane] * factor[i % 4 / 2];
    }
  }
};

template <typename T, int kD, int kSlabs>
__global__ __launch_bounds__(kBankThreads, 1) void bank_attention_kernel(BankAttentionArgs a) {
  using A = Acc<T>;
  // Heads wider than 64 keep twice the sums: more tiles would spill.
  constexpr int kTiles = kSlabs == 1 ? kBankTiles<T> : sizeof(T) == 2 ? 4 : 1, kKeys = 8 * kTiles;
  using Tile = KeyTile<T, kKeys>;
  __shared__ typename Tile::Shared shared[kBankWarps];
  const int64_t splits = a.partial.size[1];
  const BankTask task(a, splits);
  Tile tile{shared[threadIdx.y * (blockDim.x / 32) + threadIdx.x / 32]};
  const int64_t h = task.h;
  const int n = task.n, d = task.d, q0 = task.q0;
  const auto q = held<T, kD>(rows_of_head<const T, kD>(a.q, task.b, task.s, h, d).behind(q0));
  const RowTable<const T> keys{tile.shared.row, h * d, kKeys, d}, values{tile.shared.row, (a.heads + h) * d, kKeys, d};
  const A scale = A(a.scale * kLog2e);

  Found<T, kSlabs> found;
  A(&largest)[2] = found.largest, (&total)[2] = found.total;
  A(&sums)[kSlabs][kColumns<T>][4] = found.sums;
  tile.ask(a, task, task.first);
  for (unsigned k0 = task.first; k0 < task.last; k0 += kKeys) {
    tile.show(a, task, k0);
    tile.ask(a, task, k0 + kKeys);
    A w[kTiles][4], next[2] = {largest[0], largest[1]}, fade[2];
    dot_rows<T, kD>(q, 0, keys, 0, w);
    each_score<T>(w, 0, [&](int key, int half, A& x) {
      const A bias = tile.shared.bias[key];
      x = bias == A(kAbsent) ? A(kAbsent) : x * scale + bias;
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
  gather_parts<T>(found);
  if (!task.active || threadIdx.y > 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) total[half] = row_sum<T>(total[half]);
  if (splits == 1) {
    const A inverse[2] = {total[0] > 0 ? 1 / total[0] : A(0), total[1] > 0 ? 1 / total[1] : A(0)};
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
#pragma unroll
      for (int column = 0; column < kColumns<T>; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[slab][column][i] *= inverse[i / 2];
      }
      store_sums<T, kD>(sums[slab], rows_of_head<T, kD>(a.out, task.b, task.s, h, d), q0, slab * 8 * kColumns<T>);
    }
  } else {
    const Partial<A> to(a, task.head(a), task.split);
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      const Rows<A> rows{to.sums, to.ld * int64_t(sizeof(A)), n, d};
      store_sums<T, kWhole>(sums[slab], rows, q0, slab * 8 * kColumns<T>);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = q0 + score_row<T>(half);
    if (!first_of_row<T>() || query >= n) continue;
    if (splits == 1) {
      if (a.lse) *a.lse.at<A>(task.b, task.s, h, query) = log_of_sum(largest[half], total[half]);
    } else {
      const Partial<A> to(a, task.head(a), task.split);
      to.largest[query] = largest[half], to.total[query] = total[half];
    }
  }
}

// A thread per element of out.
template <typename T>
__global__ __launch_bounds__(kMergeThreads) void bank_attention_merge_kernel(BankAttentionArgs a) {
  using A = Acc<T>;
  const unsigned n = unsigned(a.q.size[2]), D = unsigned(a.q.size[3]), d = D / unsigned(a.heads);
  const unsigned steps = unsigned(a.q.size[1]), i = blockIdx.x * kMergeThreads + threadIdx.x;
  const unsigned column = i % D, query = i / D % n, step = i / D / n, s = step % steps, b = step / steps;
  if (b >= a.q.size[0]) return;
  const unsigned head = step * unsigned(a.heads) + column / d;
  const Partial<A> part(a, head, 0);
  const A *const of_query = part.largest + query, *const of_column = part.sums + query * part.ld + column % d;
  const int64_t totals_at = part.total - part.largest;
  const int splits = int(a.partial.size[1]);
  A largest = A(kAbsent), total = 0, sum = 0;
  constexpr int kAhead = 8;
  for (int first = 0; first < splits; first += kAhead) {
    A top[kAhead], totals[kAhead], sums[kAhead], next = largest;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t at = min(first + i, splits - 1) * a.partial.stride[1];  // the last one again, which then counts 0
      top[i] = first + i < splits ? of_query[at] : A(kAbsent);
      totals[i] = of_query[totals_at + at], sums[i] = of_column[at];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) next = larger(next, top[i]);
    const A fade = power_of_two(largest - next);
    total *= fade, sum *= fade, largest = next;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const A factor = power_of_two(top[i] - next);
      total += factor * totals[i], sum += factor * sums[i];
    }
  }
  *a.out.at<T>(b, s, query, column) = from_acc<T>(total > 0 ? sum / total : A(0));
  if (a.lse && column % d == 0) *a.lse.at<A>(b, s, column / d, query) = log_of_sum(largest, total);
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

void bank_attention_cuda(const BankAttentionArgs& args, cudaStream_t stream) {
  const int64_t n = args.q.size[2], D = args.q.size[3], d = D / args.heads;
  const int64_t elements = args.q.size[0] * args.q.size[1] * n * D;
  if (elements == 0) return;
  if (d % 8 != 0 || d > kBankAttentionMaxWidth) {
    throw std::invalid_argument("bank_attention: a head's width must be a multiple of 8 up to 128");
  }
  const int64_t splits = args.partial.size[1];
  narrow(elements, "bank_attention: the elements of q");
  visit_dtype<float, double, __half, __nv_bfloat16>("bank_attention", args.q.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const BankLaunch launch(args, splits, kBankParts<T>);
    constexpr int kSlabs = int(kBankAttentionMaxWidth) / (8 * kColumns<T>);
    const bool vectorized = sizeof(T) <= 4 && has_chunks<T, 2>(args.q) && vectorizable<T>(args.rows) &&
                            (splits > 1 || has_chunks<T, 2>(args.out));
    if constexpr (sizeof(T) <= 4) {
      if (vectorized && d == 64) {
        PYVIDX_LAUNCH((bank_attention_kernel<T, 64, 1>), launch.blocks, launch.threads, 0, stream, args);
      } else if (vectorized) {
        PYVIDX_LAUNCH((bank_attention_kernel<T, kWhole, kSlabs>), launch.blocks, launch.threads, 0, stream, args);
      }
    }
    if (!vectorized) {
      PYVIDX_LAUNCH((bank_attention_kernel<T, kRagged, kSlabs>), launch.blocks, launch.threads, 0, stream, args);
    }
    check_launch("bank_attention_kernel");
    if (splits == 1) return;
    PYVIDX_LAUNCH((bank_attention_merge_kernel<T>), ceil_div(elements, kMergeThreads), kMergeThreads, 0, stream, args);
    check_launch("bank_attention_merge_kernel");
  });
}

}  // namespace pyvidx
#endif
