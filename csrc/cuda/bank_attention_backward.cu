// Two walks. The one for grad_q is the forward kernel's, but for 64 columns at a time, which leaves registers for w and
// dw. In the one for grad_rows a warp owns 16 rows of one head, neighboring positions of a slot, and goes through all
// steps and queries: so nothing is added by two threads. What a step's table says of a row is the sum of the sizes of
// its keys there, since keys of one row add up to one: a kernel before it looks that up, once for all heads. 16 rows
// that no key of a step names skip it, as most slots of a clip's list do at most steps. w is computed in both. Traffic:
// 2 reads of the rows, 1 write. Arithmetic: 14 n D flops per key, on tensor cores.
//
// Floor, half, 16 steps of 32 queries, 53 slots of 257 positions: 87 MB, 29 us on H100; 30 GFLOP for the keys that are
// named, 55 with the others of their tiles. A warp reads q and grad_out twice a step, 2.7 GB from L1: 87 us. Versions,
// predicted us on V100, A100, H100; of grad_rows' kernel at sm_90: registers, instructions of a warp and step, and how
// often it waits for memory:
//   the table searched by every warp             3033  2309  1625   240   1541  318   21 loads a step, in series
//   rows named beforehand                        -     -     372    222    615   34   prediction: 235
//   at 168 registers, three blocks               thrown away: spills 8 to 50 bytes, on every architecture
//   each warp begins at another step             -     -     359    222    606   33   thrown away: within the model's
//   noise 16 steps looked up at a time                 1643   534   338   224    530   34 own rows in registers on
//   sm_70, too          1143  -     - queries in registers in grad_q's walk        1074  -     326    224    530   34
//   kept
// The prediction missed since 8 warps of a multiprocessor do not hide what the first of a block waits for, twice a
// step.
#include "bank_attention.cuh"

namespace pyvidx::cuda {

// With w and dw of more the compiler spills: of keys on sm_90, of queries on sm_120.
template <typename T>
constexpr int kKeyTiles = sizeof(T) == 2 ? 4 : 1;
template <typename T>
constexpr int kQueryTiles = sizeof(T) == 8 ? 1 : 2;
constexpr int kRowThreads = 128, kRowsPerBlock = kRowThreads / 2;

// Of those whose gradients a block sums up.
template <typename T, int kD>
__device__ __forceinline__ int first_column(unsigned block) {
  return kD == 8 * kColumns<T> ? 0 : int(block) * 8 * kColumns<T>;
}

// What the walks need of two neighboring queries: their lse, in units of log 2, and delta. Behind the last query there
// are some of which every w is 0.
template <typename A>
struct alignas(4 * sizeof(A)) QueryPair {
  A lse[2], delta[2];
  static __device__ __forceinline__ QueryPair* at(const View<4>& delta, int64_t b, int64_t s, int64_t h, int query) {
    return static_cast<QueryPair*>(static_cast<void*>(delta.at<A>(b, s, h))) + query / 2;
  }
};

// How many frames are in all keys of step s that are this row; 0: there is none.
__device__ __forceinline__ int frames_of_row(const BankAttentionInput& a, int64_t b, int64_t s, int64_t slot,
                                             int64_t p) {
  if (a.mask && *a.mask.at<const int32_t>(b, p) == 0) return 0;
  const auto frames = [&](int64_t j) {
    const int size = a.sizes ? *a.sizes.at<const int32_t>(b, s, p, j) : 1;
    return size < 1 ? 1 : size;
  };
  if (!a.table) return frames(slot);
  int sum = 0;
#pragma unroll 8
  for (int64_t j = 0; j < a.table.size[3]; ++j) {
    const int size = frames(j);
    sum += *a.table.at<const int32_t>(b, s, p, j) == slot ? size : 0;
  }
  return sum;
}

// A thread per query of a head; in the blocks behind those, per row of a step.
template <typename T, int kSize>
__global__ __launch_bounds__(kMergeThreads) void bank_attention_prepare_kernel(BankAttentionBackwardArgs a) {
  using A = Acc<T>;
  const unsigned n = unsigned(a.q.size[2]), d = unsigned(head_width(a)), steps = unsigned(a.q.size[1]);
  const unsigned B = unsigned(a.q.size[0]), heads = unsigned(a.heads), all = unsigned(a.delta.size[3] / 2);
  const unsigned blocks = (B * steps * heads * all + kMergeThreads - 1) / kMergeThreads;
  if (blockIdx.x >= blocks) {
    const unsigned i = (blockIdx.x - blocks) * kMergeThreads + threadIdx.x;
    const unsigned N = unsigned(a.named.size[3]), S = unsigned(a.named.size[2]);
    const unsigned p = i % N, slot = i / N % S, s = i / N / S % steps, b = i / N / S / steps;
    if (b < B) *a.named.at<int32_t>(b, s, slot, p) = frames_of_row(a, b, s, slot, p);
    return;
  }
  const unsigned i = blockIdx.x * kMergeThreads + threadIdx.x;
  const unsigned query = i % all, h = i / all % heads, s = i / all / heads % steps, b = i / all / heads / steps;
  if (b >= B) return;
  A sum = 0, lse = A(-kAbsent);
  if (query < n) {
    const T* x = a.out.at<const T>(b, s, query, h * d);
    const T* y = a.grad_out.at<const T>(b, s, query, h * d);
    lse = *a.lse.at<const A>(b, s, h, query) * A(kLog2e);
#pragma unroll 4
    for (unsigned c = 0; c < d; c += 8) {
#pragma unroll
      for (int k = 0; k < 8; k += kSize) {
        A left[kSize], right[kSize];
        load_pack<T, kSize>(x + c + k, left);
        load_pack<T, kSize>(y + c + k, right);
#pragma unroll
        for (int e = 0; e < kSize; ++e) sum += left[e] * right[e];
      }
    }
  }
  QueryPair<A>& pair = *QueryPair<A>::at(a.delta, b, s, h, int(query));
  pair.lse[query % 2] = lse, pair.delta[query % 2] = sum;
}

// What a warp adds up for grad_q.
template <typename T>
struct QuerySums {
  using A = Acc<T>;
  A sums[kColumns<T>][4] = {};
  using Storage = A[kColumns<T>][4][32];
  __device__ __forceinline__ void put(Storage& to) const {
#pragma unroll
    for (int column = 0; column < kColumns<T>; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) to[column][i][threadIdx.x % 32] = sums[column][i];
    }
  }
  __device__ __forceinline__ void add(const Storage& from) {
#pragma unroll
    for (int column = 0; column < kColumns<T>; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[column][i] += from[column][i][threadIdx.x % 32];
    }
  }
};

template <typename T, int kD>
__global__ __launch_bounds__(kBankThreads, 1) void bank_attention_queries_kernel(BankAttentionBackwardArgs a) {
  using A = Acc<T>;
  constexpr int kTiles = kKeyTiles<T>, kKeys = 8 * kTiles;
  using Tile = KeyTile<T, kKeys>;
  __shared__ typename Tile::Shared shared[kBankWarps];
  const int64_t splits = a.partial.size[1];
  const BankTask task(a, splits);
  Tile tile{shared[threadIdx.y * (blockDim.x / 32) + threadIdx.x / 32]};
  const int64_t h = task.h;
  const int n = task.n, d = task.d, q0 = task.q0, slab = first_column<T, kD>(blockIdx.z);
  const auto q = held<T, kD>(rows_of_head<const T, kD>(a.q, task.b, task.s, h, d).behind(q0));
  const auto grad = held<T, kD>(rows_of_head<const T, kD>(a.grad_out, task.b, task.s, h, d).behind(q0));
  const A scale = A(a.scale * kLog2e);
  A lse[2] = {}, delta[2] = {};  // of the lane's two rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = q0 + score_row<T>(half);
    if (!task.active) continue;
    const QueryPair<A>& pair = *QueryPair<A>::at(a.delta, task.b, task.s, h, query);
    lse[half] = pair.lse[query % 2], delta[half] = pair.delta[query % 2];
  }
  QuerySums<T> found;
  A(&sums)[kColumns<T>][4] = found.sums;
  const RowTable<const T> keys{tile.shared.row, h * d, kKeys, d}, values{tile.shared.row, (a.heads + h) * d, kKeys, d};
  tile.ask(a, task, task.first);
  for (unsigned k0 = task.first; k0 < task.last; k0 += kKeys) {
    tile.show(a, task, k0);
    tile.ask(a, task, k0 + kKeys);
    A w[kTiles][4], dw[kTiles][4];
    dot_rows<T, kD>(q, 0, keys, 0, w);
    dot_rows<T, kD>(grad, 0, values, 0, dw);
    each_score<T>(w, 0, [&](int key, int half, A& x) {
      const A bias = tile.shared.bias[key];
      x = bias == A(kAbsent) ? A(0) : power_of_two(x * scale + bias - lse[half]);
    });
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dw[j][i] = w[j][i] * (dw[j][i] - delta[i / 2]);
    }
    add_weighted<T, kD>(dw, keys, 0, slab, sums);
  }
  gather_parts<T>(found);
  if (!task.active || threadIdx.y > 0) return;
  if (splits == 1) {
#pragma unroll
    for (int column = 0; column < kColumns<T>; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[column][i] *= A(a.scale);
    }
    return store_sums<T, kD>(sums, rows_of_head<T, kD>(a.grad_q, task.b, task.s, h, d), q0, slab);
  }
  const int64_t ld = bank_attention_padded(d);
  const Rows<A> rows{a.partial.at<A>(task.head(a), task.split), ld * int64_t(sizeof(A)), n, d};
  store_sums<T, kWhole>(sums, rows, q0, slab);
}

// The steps that a warp works off, 16 at a time, and what they say of its 16 rows: the logarithms of their frames.
// todo: bits of the steps that have any of the rows.
template <typename A>
struct Steps {
  A (&bias)[16][16];  // step, row
  unsigned todo;
  __device__ __forceinline__ explicit Steps(A (&shared)[16][16]) : bias(shared), todo(0) {}

  // frames(s): those of row lane % 16.
  template <typename F>
  __device__ __forceinline__ void look(int s0, int steps, F&& frames) {
    const int lane = threadIdx.x % 32;
    int found[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int s = s0 + 2 * i + lane / 16;
      found[i] = s < steps ? frames(s) : 0;
    }
    todo = 0;
    __syncwarp();  // the last ones have been read
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      bias[2 * i + lane / 16][lane % 16] = found[i] > 0 ? A(log2(A(found[i]))) : A(kAbsent);
      const unsigned present = __ballot_sync(kFullWarp, found[i] > 0);
      todo |= unsigned((present & 0xffff) != 0) << 2 * i | unsigned(present >> 16 != 0) << (2 * i + 1);
    }
    __syncwarp();
  }
};

// A warp's 16 rows of one head, neighboring positions of a slot, through all steps and queries.
template <typename T, int kD>
__global__ __launch_bounds__(kRowThreads, 1) void bank_attention_rows_kernel(BankAttentionBackwardArgs a) {
  using A = Acc<T>;
  constexpr int kTiles = kQueryTiles<T>, kWarps = kRowThreads / 32;
  __shared__ const T* row[kRowsPerBlock];
  __shared__ T* grad_row[kRowsPerBlock];
  __shared__ A biases[kWarps][16][16];
  const unsigned S = unsigned(a.rows.size[1]), N = unsigned(a.rows.size[2]), all = S * N;
  const unsigned groups = (all + kRowsPerBlock - 1) / kRowsPerBlock, heads = unsigned(a.heads);
  const unsigned b = blockIdx.x / groups / heads, h = blockIdx.x / groups % heads;
  const int own = threadIdx.x / 32 * 16, steps = int(a.q.size[1]), n = int(a.q.size[2]);
  const int d = head_width(a), slab = first_column<T, kD>(blockIdx.y);
  const unsigned first = blockIdx.x % groups * kRowsPerBlock + own, i = first + threadIdx.x % 16, slot = i / N,
                 p = i % N;
  if (first >= all) return;
  if (threadIdx.x % 32 < 16) {
    row[own + threadIdx.x % 16] = i < all ? a.rows.at<const T>(b, slot, p) : nullptr;
    grad_row[own + threadIdx.x % 16] = i < all ? a.grad_rows.at<T>(b, slot, p) : nullptr;
  }
  __syncwarp();
  const auto keys = held<T, kD>(RowTable<const T>{row + own, int64_t(h) * d, 16, d});
  const auto values = held<T, kD>(RowTable<const T>{row + own, (a.heads + h) * d, 16, d});
  const T *const q_first = a.q.at<const T>(b, 0, 0, h * d), *const grad_first = a.grad_out.at<const T>(b, 0, 0, h * d);
  const QueryPair<A>* const pairs_first = QueryPair<A>::at(a.delta, b, 0, h, 0);
  const auto at_step = [n, d](const View<4>& x, const T* first_step, int s) {
    using Stride = typename StrideOf<kD>::type;
    return RepeatedRows(
        Rows<const T, Stride>{first_step + s * x.stride[1], Stride(x.stride[2] * int64_t(sizeof(T))), n, d});
  };
  const int32_t* const named = a.named && i < all ? a.named.at<const int32_t>(b, 0, slot, p) : nullptr;
  const A scale = A(a.scale * kLog2e);
  A sum_k[kColumns<T>][4] = {}, sum_v[kColumns<T>][4] = {};
  Steps<A> some(biases[threadIdx.x / 32]);
#pragma unroll 1
  for (int s0 = 0; s0 < steps; s0 += 16) {
    some.look(s0, steps, [&](int s) { return named ? named[s * all] : int(i < all && !a.named); });
#pragma unroll 1
    for (int s = s0; s < s0 + 16; ++s) {
      if ((some.todo >> (s - s0) & 1) == 0) continue;
      A bias[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) bias[half] = some.bias[s - s0][score_row<T>(half)];
      const auto q = at_step(a.q, q_first, s), grad = at_step(a.grad_out, grad_first, s);
      const QueryPair<A>* const pairs_here = pairs_first + s * (int64_t(heads) * a.delta.size[3] / 4);
#pragma unroll 1
      for (int q0 = 0; q0 < n; q0 += 8 * kTiles) {
        QueryPair<A> pairs[kTiles];
#pragma unroll
        for (int j = 0; j < kTiles; ++j) pairs[j] = pairs_here[(q0 + score_column<T>(j, 0)) / 2];
        A w[kTiles][4], dw[kTiles][4];
        dot_rows<T, kD>(keys, 0, q, q0, w);
        dot_rows<T, kD>(values, 0, grad, q0, dw);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const A x = power_of_two(w[j][k] * scale + bias[k / 2] - pairs[j].lse[k % 2]);
            const bool present = bias[k / 2] != A(kAbsent);  // what else is in its place may be no number
            w[j][k] = present ? x : A(0);
            dw[j][k] = present ? x * (dw[j][k] - pairs[j].delta[k % 2]) : A(0);
          }
        }
        add_weighted<T, kD>(w, grad, q0, slab, sum_v);
        add_weighted<T, kD>(dw, q, q0, slab, sum_k);
      }
    }
  }
#pragma unroll
  for (int column = 0; column < kColumns<T>; ++column) {
#pragma unroll
    for (int k = 0; k < 4; ++k) sum_k[column][k] *= A(a.scale);
  }
  store_sums<T, kD>(sum_k, RowTable<T>{grad_row + own, int64_t(h) * d, 16, d}, 0, slab);
  store_sums<T, kD>(sum_v, RowTable<T>{grad_row + own, (a.heads + h) * d, 16, d}, 0, slab);
}

// A thread per element of grad_q.
template <typename T>
__global__ __launch_bounds__(kMergeThreads) void bank_attention_queries_merge_kernel(BankAttentionBackwardArgs a) {
  const unsigned n = unsigned(a.q.size[2]), D = unsigned(a.q.size[3]), d = D / unsigned(a.heads);
  const unsigned steps = unsigned(a.q.size[1]), i = blockIdx.x * kMergeThreads + threadIdx.x;
  const unsigned column = i % D, query = i / D % n, step = i / D / n;
  if (step >= a.q.size[0] * steps) return;
  const int64_t at = query * bank_attention_padded(d) + column % d;
  Acc<T> sum = 0;
#pragma unroll 8
  for (int64_t split = 0; split < a.partial.size[1]; ++split) {
    sum += a.partial.at<const Acc<T>>(step * a.heads + column / d, split)[at];
  }
  *a.grad_q.at<T>(step / steps, step % steps, query, column) = from_acc<T>(sum * Acc<T>(a.scale));
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
#include <type_traits>

namespace pyvidx {

using namespace cuda;

void bank_attention_backward_cuda(const BankAttentionBackwardArgs& args, cudaStream_t stream) {
  const int64_t n = args.q.size[2], D = args.q.size[3], d = D / args.heads, splits = args.partial.size[1];
  const int64_t steps = args.q.size[0] * args.q.size[1], elements = steps * n * D;
  if (d % 8 != 0 || d > kBankAttentionMaxWidth) {
    throw std::invalid_argument("bank_attention_backward: a head's width must be a multiple of 8 up to 128");
  }
  const int64_t rows = args.rows.size[1] * args.rows.size[2];
  const int64_t groups = args.grad_rows ? ceil_div(rows, kRowsPerBlock) : 0;
  narrow(elements, "bank_attention_backward: the elements of q");
  narrow(args.named ? steps * rows : rows, "bank_attention_backward: the rows of all steps");
  visit_dtype<float, double, __half, __nv_bfloat16>("bank_attention_backward", args.q.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const int64_t slabs = ceil_div(d, 8 * kColumns<T>);
    const auto walks = [&](auto width) {
      constexpr int kD = decltype(width)::value;
      if (elements > 0) {
        const BankLaunch launch(args, splits, kBankParts<T>, slabs);
        PYVIDX_LAUNCH((bank_attention_queries_kernel<T, kD>), launch.blocks, launch.threads, 0, stream, args);
        check_launch("bank_attention_queries_kernel");
      }
      if (groups > 0) {
        const Grid blocks(args.rows.size[0] * args.heads * groups, slabs);
        PYVIDX_LAUNCH((bank_attention_rows_kernel<T, kD>), blocks, kRowThreads, 0, stream, args);
        check_launch("bank_attention_rows_kernel");
      }
    };
    if (elements > 0) {
      const int64_t queries = steps * args.heads * args.delta.size[3] / 2;
      narrow(queries, "bank_attention_backward: the queries of all heads");
      const int64_t blocks =
          ceil_div(queries, kMergeThreads) + (args.named ? ceil_div(steps * rows, kMergeThreads) : 0);
      if (vectorizable<T>(args.out) && vectorizable<T>(args.grad_out) && d % kVec<T> == 0) {
        PYVIDX_LAUNCH((bank_attention_prepare_kernel<T, kVec<T>>), blocks, kMergeThreads, 0, stream, args);
      } else {
        PYVIDX_LAUNCH((bank_attention_prepare_kernel<T, 1>), blocks, kMergeThreads, 0, stream, args);
      }
      check_launch("bank_attention_prepare_kernel");
    }
    const bool vectorized = sizeof(T) <= 4 && has_chunks<T, 2>(args.q) && vectorizable<T>(args.rows) &&
                            has_chunks<T, 2>(args.grad_out) && (!args.grad_rows || vectorizable<T>(args.grad_rows)) &&
                            (splits > 1 || has_chunks<T, 2>(args.grad_q));
    if constexpr (sizeof(T) <= 4) {
      if (vectorized && d == 64) {
        walks(std::integral_constant<int, 64>{});
      } else if (vectorized) {
        walks(std::integral_constant<int, kWhole>{});
      }
    }
    if (!vectorized) walks(std::integral_constant<int, kRagged>{});
    if (elements > 0 && splits > 1) {
      PYVIDX_LAUNCH((bank_attention_queries_merge_kernel<T>), ceil_div(elements, kMergeThreads), kMergeThreads, 0,
                    stream, args);
      check_launch("bank_attention_queries_merge_kernel");
    }
  });
}

}  // namespace pyvidx
#endif
