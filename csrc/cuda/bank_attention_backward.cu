// Two walks. The one for grad_q is the forward kernel's (a warp per 16 queries, keys in tiles, splits that a further
// kernel adds up if there are more than one), but for 64 columns at a time, which leaves registers for w and dw. In the
// one for grad_rows a warp owns 16 rows of one head, neighboring positions of a slot, and goes through all steps and
// queries: so nothing is added by two threads. What a step's table says of a row is the sum of the sizes of its keys
// there, since keys of one row add up to one; 16 rows that no key of a step names skip it, as most slots of a clip's
// list do at most steps. w is computed in both. Traffic: 2 reads of the rows, 1 write. Arithmetic: 14 n D flops per
// key, on tensor cores.
#include "bank_attention.cuh"

namespace pyvidx::cuda {

// With w and dw of more the compiler spills: of keys on sm_90, of queries on sm_120.
template <typename T>
constexpr int kKeyTiles = sizeof(T) == 2 ? 4 : 1;
template <typename T>
constexpr int kQueryTiles = (kBankTiles<T> + 1) / 2;
constexpr int kRowThreads = 128, kRowsPerBlock = kRowThreads / 2;

// A thread per query of a head.
template <typename T>
__global__ __launch_bounds__(kMergeThreads) void bank_attention_delta_kernel(BankAttentionBackwardArgs a) {
  const int64_t n = a.q.size[2], d = a.q.size[3] / a.heads, steps = a.q.size[1];
  const int64_t i = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i >= a.q.size[0] * steps * a.heads * n) return;
  const int64_t query = i % n, h = i / n % a.heads, s = i / n / a.heads % steps, b = i / n / a.heads / steps;
  const T* x = a.out.at<const T>(b, s, query, h * d);
  const T* y = a.grad_out.at<const T>(b, s, query, h * d);
  Acc<T> sum = 0;
  for (int64_t c = 0; c < d; c += 8) {
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += to_acc(x[c + k]) * to_acc(y[c + k]);
  }
  *a.delta.at<Acc<T>>(b, s, h, query) = sum;
}

template <typename T, int kD>
__global__ __launch_bounds__(kBankThreads, 1) void bank_attention_queries_kernel(BankAttentionBackwardArgs a) {
  using A = Acc<T>;
  constexpr int kTiles = kKeyTiles<T>, kKeys = 8 * kTiles;
  using Tile = KeyTile<T, kKeys>;
  __shared__ typename Tile::Shared shared[kBankWarps];
  const int64_t splits = a.partial.size[1];
  const BankTask task(a, splits);
  if (!task.active) return;
  Tile tile{shared[threadIdx.x / 32]};
  const int64_t h = task.h;
  const int n = task.n, d = task.d, q0 = task.q0, slab = blockIdx.z * 8 * kColumns<T>;
  const Rows<const T> q = rows_of_head<const T>(a.q, task.b, task.s, h, d);
  const Rows<const T> grad = rows_of_head<const T>(a.grad_out, task.b, task.s, h, d);
  const A scale = A(a.scale * kLog2e);
  A lse[2] = {}, delta[2] = {};  // of the lane's two rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = q0 + score_row<T>(half);
    if (query >= n) continue;
    lse[half] = *a.lse.at<const A>(task.b, task.s, h, query) * A(kLog2e);
    delta[half] = *a.delta.at<const A>(task.b, task.s, h, query);
  }
  A sums[kColumns<T>][4] = {};
  const RowTable<const T> keys{tile.shared.row, h * d, kKeys, d}, values{tile.shared.row, (a.heads + h) * d, kKeys, d};
  tile.ask(a, task, task.first);
  for (unsigned k0 = task.first; k0 < task.last; k0 += kKeys) {
    tile.show(a, task, k0);
    tile.ask(a, task, k0 + kKeys);
    A w[kTiles][4], dw[kTiles][4];
    dot_rows<T, kD>(q, q0, keys, 0, w);
    dot_rows<T, kD>(grad, q0, values, 0, dw);
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
  if (splits == 1) {
#pragma unroll
    for (int column = 0; column < kColumns<T>; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[column][i] *= A(a.scale);
    }
    return store_sums<T, kD>(sums, rows_of_head<T>(a.grad_q, task.b, task.s, h, d), q0, slab);
  }
  const int64_t ld = bank_attention_padded(d);
  const Rows<A> rows{a.partial.at<A>(task.head(a), task.split), ld * int64_t(sizeof(A)), n, d};
  store_sums<T, kWhole>(sums, rows, q0, slab);
}

template <typename T, int kD>
__global__ __launch_bounds__(kRowThreads, 1) void bank_attention_rows_kernel(BankAttentionBackwardArgs a) {
  using A = Acc<T>;
  constexpr int kTiles = kQueryTiles<T>;
  __shared__ const T* row[kRowsPerBlock];
  __shared__ T* grad_row[kRowsPerBlock];
  __shared__ A biases[kRowsPerBlock];
  const int64_t S = a.rows.size[1], N = a.rows.size[2], groups = (S * N + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t b = blockIdx.x / groups / a.heads, h = blockIdx.x / groups % a.heads;
  const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
  const int n = int(a.q.size[2]), d = int(a.q.size[3] / a.heads), slab = blockIdx.y * 8 * kColumns<T>;
  const int64_t i = blockIdx.x % groups * kRowsPerBlock + own + lane, slot = i / N, p = i % N;
  if (i - lane >= S * N) return;
  const bool exists = lane < 16 && i < S * N;
  const bool attended = exists && (!a.mask || *a.mask.at<const int32_t>(b, p) != 0);
  if (lane < 16) {
    row[own + lane] = exists ? a.rows.at<const T>(b, slot, p) : nullptr;
    grad_row[own + lane] = exists ? a.grad_rows.at<T>(b, slot, p) : nullptr;
  }
  const RowTable<const T> keys{row + own, h * d, 16, d}, values{row + own, (a.heads + h) * d, 16, d};
  A sum_k[kColumns<T>][4] = {}, sum_v[kColumns<T>][4] = {};
  for (int64_t s = 0; s < a.q.size[1]; ++s) {
    int64_t size = 0;  // of all keys of this row
    if (attended && !a.table) {
      size = key_size(a, b, s, p, slot);
    } else if (attended) {
      for (int64_t j = 0; j < a.table.size[3]; ++j) {
        if (*a.table.at<const int32_t>(b, s, p, j) != slot) continue;
        size += key_size(a, b, s, p, j);
      }
    }
    __syncwarp();  // the last step's have been read
    if (lane < 16) biases[own + lane] = size > 0 ? A(log2(A(size))) : A(kAbsent);
    __syncwarp();
    if (!__any_sync(kFullWarp, size > 0)) continue;
    const A bias[2] = {biases[own + score_row<T>(0)], biases[own + score_row<T>(1)]};
    const Rows<const T> q = rows_of_head<const T>(a.q, b, s, h, d);
    const Rows<const T> grad = rows_of_head<const T>(a.grad_out, b, s, h, d);
#pragma unroll 1
    for (int q0 = 0; q0 < n; q0 += 8 * kTiles) {
      A w[kTiles][4], dw[kTiles][4];
      dot_rows<T, kD>(keys, 0, q, q0, w);
      dot_rows<T, kD>(values, 0, grad, q0, dw);
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const int query = q0 + score_column<T>(j, column);
          const A lse = query < n ? *a.lse.at<const A>(b, s, h, query) * A(kLog2e) : A(0);
          const A delta = query < n ? *a.delta.at<const A>(b, s, h, query) : A(0);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            A& x = w[j][2 * half + column];
            const bool present = query < n && bias[half] != A(kAbsent);
            x = present ? power_of_two(x * A(a.scale * kLog2e) + bias[half] - lse) : A(0);
            dw[j][2 * half + column] = x * (dw[j][2 * half + column] - delta);
          }
        }
      }
      add_weighted<T, kD>(w, grad, q0, slab, sum_v);
      add_weighted<T, kD>(dw, q, q0, slab, sum_k);
    }
  }
#pragma unroll
  for (int column = 0; column < kColumns<T>; ++column) {
#pragma unroll
    for (int k = 0; k < 4; ++k) sum_k[column][k] *= A(a.scale);
  }
  __syncwarp();  // the addresses, where there is no step
  store_sums<T, kD>(sum_k, RowTable<T>{grad_row + own, h * d, 16, d}, 0, slab);
  store_sums<T, kD>(sum_v, RowTable<T>{grad_row + own, (a.heads + h) * d, 16, d}, 0, slab);
}

// A thread per element of grad_q.
template <typename T>
__global__ __launch_bounds__(kMergeThreads) void bank_attention_queries_merge_kernel(BankAttentionBackwardArgs a) {
  const int64_t n = a.q.size[2], D = a.q.size[3], d = D / a.heads, steps = a.q.size[1];
  const int64_t i = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (i >= a.q.size[0] * steps * n * D) return;
  const int64_t step = i / (n * D), query = i / D % n, column = i % D;
  const int64_t at = query * bank_attention_padded(d) + column % d;
  Acc<T> sum = 0;
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
  const int64_t elements = args.q.size[0] * args.q.size[1] * n * D;
  if (d % 8 != 0 || d > kBankAttentionMaxWidth) {
    throw std::invalid_argument("bank_attention_backward: a head's width must be a multiple of 8 up to 128");
  }
  const int64_t groups =
      args.grad_rows ? (args.rows.size[1] * args.rows.size[2] + kRowsPerBlock - 1) / kRowsPerBlock : 0;
  visit_dtype<float, double, __half, __nv_bfloat16>("bank_attention_backward", args.q.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const int64_t slabs = ceil_div(d, 8 * kColumns<T>);
    const auto walks = [&](auto width) {
      constexpr int kD = decltype(width)::value;
      if (elements > 0) {
        const BankLaunch launch(args, splits, slabs);
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
      PYVIDX_LAUNCH((bank_attention_delta_kernel<T>), ceil_div(elements / d, kMergeThreads), kMergeThreads, 0, stream,
                    args);
      check_launch("bank_attention_delta_kernel");
    }
    const bool vectorized = sizeof(T) <= 4 && vectorizable<T>(args.q) && vectorizable<T>(args.rows) &&
                            vectorizable<T>(args.grad_out) && (!args.grad_rows || vectorizable<T>(args.grad_rows)) &&
                            (splits > 1 || vectorizable<T>(args.grad_q));
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
