// Forward: a warp per 16 queries of one (b, p, h); neighboring warps take the other queries of the same head, then the
// next head, so that the rows a block reads lie together and K and V come from L1 when read again. Everything else
// stays in registers: scores (T / 2 of them per lane) and 64 columns of sums. Traffic: 4 passes, 7 backward.
// Arithmetic: 4 T^2 D flops per head, on tensor cores: at T = 64 and 16 bits 32 flops per byte, twice what float FMA
// could feed. 8 frames fill half of an mma; it is idle otherwise.
#pragma once
#include "attention.cuh"
#include "pyvidx/temporal_attention.h"

namespace pyvidx::cuda {

// Blocks that shall fit a multiprocessor: with half of 64 frames in 128 registers a thread instead of 138.
template <typename T, int kD, int kTiles>
constexpr int kForwardBlocks = sizeof(T) == 2 && kD > 0 ? 4 : 1;
constexpr int kAttentionWarps = 4, kAttentionThreads = 32 * kAttentionWarps, kAttentionRows = 16 * kAttentionWarps;

struct Head {
  unsigned b, p, h;
};

// The launchers hold the number of heads below 2^32: a division in 64 bits takes about 100 instructions.
__device__ __forceinline__ Head head_of(unsigned index, const View<6>& qkv) {
  const unsigned P = unsigned(qkv.size[2]), H = unsigned(qkv.size[4]), row = index / H;
  return {row / P, row % P, index % H};
}

template <typename T, int kD>
using HeadRows = Rows<T, typename StrideOf<kD>::type>;
template <typename T, int kD, int kDims, typename... Part>
__device__ __forceinline__ HeadRows<T, kD> rows_of(const View<kDims>& x, Head at, Part... part) {
  const auto stride = typename StrideOf<kD>::type(x.stride[1] * int64_t(sizeof(T)));
  return {x.template at<T>(at.b, 0, at.p, part..., at.h), stride, int(x.size[1]), int(x.size[kDims - 1])};
}

// kTiles: how many tiles of 8 frames a warp's scores have, or this, where a head has at most 8 frames: a warp takes two
// heads, with scores of 2 x 2 tiles, of which those of a head with itself count.
constexpr int kTwoHeads = 1;
template <int kTiles>
constexpr int kScoreTiles = kTiles == kTwoHeads ? 2 : kTiles;

// Which head a warp works on, or which two.
template <int kTiles>
struct Heads {
  Head head, second;
  bool active, has_second;
  __device__ __forceinline__ Heads(const View<6>& qkv, unsigned index) {
    const unsigned heads = unsigned(qkv.size[0] * qkv.size[2] * qkv.size[4]), pairs = (heads + 1) / 2;
    active = index < (kTiles == kTwoHeads ? pairs : heads);
    if (!active) index = 0;
    if constexpr (kTiles == kTwoHeads) {
      has_second = 2 * index + 1 < heads;
      head = head_of(2 * index, qkv), second = head_of(has_second ? 2 * index + 1 : 0, qkv);
    } else {
      head = head_of(index, qkv);
    }
  }
  template <typename T, int kD, int kDims, typename... Part>
  __device__ __forceinline__ auto rows(const View<kDims>& x, Part... part) const {
    const auto rows = rows_of<T, kD>(x, head, part...);
    if constexpr (kTiles == kTwoHeads) {
      auto others = rows_of<T, kD>(x, second, part...);
      if (!has_second) others.count = 0;
      return RowsOfTwo<T, typename StrideOf<kD>::type>(rows, others);
    } else {
      return rows;
    }
  }
};

// Is there such a score? (row and column within the warp's tiles, or of the whole head)
template <int kTiles>
__device__ __forceinline__ bool is_score(int row, int column, int frames) {
  return kTiles == kTwoHeads ? column % 8 < frames && column / 8 == row / 8 : column < frames;
}

template <typename T, int kD, int kTiles>
__global__ __launch_bounds__(kAttentionThreads,
                             (kForwardBlocks<T, kD, kTiles>)) void temporal_attention_kernel(TemporalAttentionArgs a) {
  const int frames = int(a.qkv.size[1]);
  const unsigned groups = kTiles > 2 ? unsigned(frames + 15) / 16 : 1;
  const unsigned task = blockIdx.x * kAttentionWarps + threadIdx.x / 32;
  const Heads<kTiles> heads(a.qkv, task / groups);
  if (!heads.active) return;
  const int q0 = int(task % groups) * 16;
  Acc<T> w[kScoreTiles<kTiles>][4];
  Softmax<Acc<T>> softmax[2];
  dot_rows<T, kD>(heads.template rows<const T, kD>(a.qkv, 0), q0, heads.template rows<const T, kD>(a.qkv, 1), 0, w);
  softmax_rows<T>(
      w, Acc<T>(a.scale * kLog2e), kTiles != kTwoHeads && frames == 8 * kTiles,
      [&](int column, int half) { return is_score<kTiles>(score_row<T>(half), column, frames); }, softmax);
  weigh_rows<T, kD>(w, heads.template rows<const T, kD>(a.qkv, 2), heads.template rows<T, kD>(a.out), q0);
}

// What a warp of a backward kernel works on: 16 rows of one head, or two heads.
template <int kTiles>
struct BackwardTask {
  int r0, shared0, frames;  // the first row, the head's first row in shared memory
  Heads<kTiles> heads;
  __device__ __forceinline__ explicit BackwardTask(const View<6>& qkv)
      : r0(warp() % groups(qkv) * 16),
        shared0(warp() / groups(qkv) * groups(qkv) * 16),
        frames(int(qkv.size[1])),
        heads(qkv, blockIdx.x * (blockDim.x / 32 / groups(qkv)) + warp() / groups(qkv)) {}
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int groups(const View<6>& qkv) { return int(unsigned(qkv.size[1] + 15) / 16); }
};

template <typename T, int kD, int kTiles>
__global__ __launch_bounds__(kAttentionThreads,
                             1) void temporal_attention_backward_kernel(TemporalAttentionBackwardArgs a) {
  using A = Acc<T>;
  constexpr int kCount = kScoreTiles<kTiles>;
  __shared__ A largest[kAttentionRows], inverse[kAttentionRows], mean[kAttentionRows];  // per query
  const BackwardTask<kTiles> task(a.qkv);
  const Heads<kTiles>& heads = task.heads;
  const auto q = heads.template rows<const T, kD>(a.qkv, 0), k = heads.template rows<const T, kD>(a.qkv, 1);
  const auto v = heads.template rows<const T, kD>(a.qkv, 2), grad = heads.template rows<const T, kD>(a.grad_out);
  const int r0 = task.r0, shared0 = task.shared0, frames = task.frames;
  const A scale = A(a.scale), scale2 = A(a.scale * kLog2e);
  const auto present = [&](int column, int half) { return is_score<kTiles>(score_row<T>(half), column, frames); };
  A w[kCount][4], dw[kCount][4];
  if (heads.active) {
    Softmax<A> softmax[2];
    dot_rows<T, kD>(q, r0, k, 0, w);
    softmax_rows<T>(w, scale2, kTiles != kTwoHeads && frames == 8 * kTiles, present, softmax);
    A sum[2] = {};
    dot_rows<T, kD>(grad, r0, v, 0, dw);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i / 2] += w[j][i] * dw[j][i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = row_sum<T>(sum[half]);
      if (first_of_row<T>()) {
        const int query = shared0 + r0 + score_row<T>(half);
        largest[query] = softmax[half].largest, inverse[query] = softmax[half].inverse, mean[query] = sum[half];
      }
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[j][i] *= (dw[j][i] - sum[i / 2]) * scale;
    }
    weigh_rows<T, kD>(w, k, heads.template rows<T, kD>(a.grad_qkv, 0), r0);
  }
  __syncthreads();
  if (!heads.active) return;
  dot_rows<T, kD>(k, r0, q, 0, w);
  each_score<T>(w, 0, [&](int query, int half, A& x) {  // [key][query]
    const Softmax<A> softmax{largest[shared0 + query], inverse[shared0 + query]};
    x = present(query, half) ? softmax.weight(x * scale2) : A(0);
  });
  weigh_rows<T, kD>(w, grad, heads.template rows<T, kD>(a.grad_qkv, 2), r0);
  dot_rows<T, kD>(v, r0, grad, 0, dw);
  each_score<T>(
      dw, 0, [&](int query, int half, A& x) { x = present(query, half) ? (x - mean[shared0 + query]) * scale : A(0); });
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[j][i] *= dw[j][i];
  }
  weigh_rows<T, kD>(w, q, heads.template rows<T, kD>(a.grad_qkv, 1), r0);
}

// ---- what the kernels above do not fit: more than 64 frames, any D, any alignment, double. A few tiles of scores at a
// time, computed again whenever they are needed; little code and few registers rather than speed. ----

constexpr int kPartWarps = 8, kPartThreads = 32 * kPartWarps;  // 16 rows each are the 128 frames
constexpr int kManyTiles = 0;                                  // for Heads: one head a warp
template <typename T>
constexpr int kPartTiles = sizeof(T) == 8 ? 2 : 4;  // double, for gradcheck, would spill with 4

template <typename T, int kD>
__global__ __launch_bounds__(kPartThreads, 1) void temporal_attention_by_parts_kernel(TemporalAttentionArgs a) {
  using A = Acc<T>;
  const int frames = int(a.qkv.size[1]);
  const unsigned groups = unsigned(frames + 15) / 16;
  const unsigned task = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const Heads<kManyTiles> heads(a.qkv, task / groups);
  if (!heads.active) return;
  const int q0 = int(task % groups) * 16;
  const auto q = heads.rows<const T, kD>(a.qkv, 0), k = heads.rows<const T, kD>(a.qkv, 1);
  const A scale2 = A(a.scale * kLog2e);
  Softmax<A> softmax[2];
  softmax_by_parts<T, kD, kPartTiles<T>>(q, q0, k, scale2, softmax);
  const auto weights = [&](int k0, A(&w)[kPartTiles<T>][4]) {
    dot_rows<T, kD>(q, q0, k, k0, w);
    each_score<T>(w, k0, [&](int key, int half, A& x) { x = key < frames ? softmax[half].weight(x * scale2) : A(0); });
  };
  weigh_rows_by_parts<T, kD, kPartTiles<T>>(weights, heads.rows<const T, kD>(a.qkv, 2), heads.rows<T, kD>(a.out), q0);
}

template <typename T, int kD>
__global__ __launch_bounds__(kPartThreads,
                             1) void temporal_attention_backward_by_parts_kernel(TemporalAttentionBackwardArgs a) {
  using A = Acc<T>;
  __shared__ A largest[16 * kPartWarps], inverse[16 * kPartWarps], mean[16 * kPartWarps];  // per query
  const BackwardTask<kManyTiles> task(a.qkv);
  const Heads<kManyTiles>& heads = task.heads;
  const auto q = heads.rows<const T, kD>(a.qkv, 0), k = heads.rows<const T, kD>(a.qkv, 1);
  const auto v = heads.rows<const T, kD>(a.qkv, 2), grad = heads.rows<const T, kD>(a.grad_out);
  const int r0 = task.r0, shared0 = task.shared0, frames = task.frames;
  const A scale = A(a.scale), scale2 = A(a.scale * kLog2e);
  if (heads.active) {
    Softmax<A> softmax[2];
    A sum[2] = {};
    softmax_by_parts<T, kD, kPartTiles<T>>(q, r0, k, scale2, softmax);
    const auto score_gradients = [&](int k0, A(&w)[kPartTiles<T>][4]) {  // times what `sum` is not subtracted from yet
      A dw[kPartTiles<T>][4];
      dot_rows<T, kD>(q, r0, k, k0, w);
      dot_rows<T, kD>(grad, r0, v, k0, dw);
      each_score<T>(w, k0,
                    [&](int key, int half, A& x) { x = key < frames ? softmax[half].weight(x * scale2) : A(0); });
#pragma unroll
      for (int j = 0; j < kPartTiles<T>; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[j][i] *= dw[j][i] - sum[i / 2];
      }
    };
    A mean_of_row[2] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < frames; k0 += 8 * kPartTiles<T>) {
      A w[kPartTiles<T>][4];
      score_gradients(k0, w);
      each_score<T>(w, k0, [&](int, int half, A& x) { mean_of_row[half] += x; });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = row_sum<T>(mean_of_row[half]);
      if (first_of_row<T>()) {
        const int query = shared0 + r0 + score_row<T>(half);
        largest[query] = softmax[half].largest, inverse[query] = softmax[half].inverse, mean[query] = sum[half];
      }
    }
    const auto scaled = [&](int k0, A(&w)[kPartTiles<T>][4]) {
      score_gradients(k0, w);
      each_score<T>(w, k0, [&](int, int, A& x) { x *= scale; });
    };
    weigh_rows_by_parts<T, kD, kPartTiles<T>>(scaled, k, heads.rows<T, kD>(a.grad_qkv, 0), r0);
  }
  __syncthreads();
  if (!heads.active) return;
  const auto weights = [&](int q0, A(&w)[kPartTiles<T>][4]) {  // [key][query]
    dot_rows<T, kD>(k, r0, q, q0, w);
    each_score<T>(w, q0, [&](int query, int, A& x) {
      x = query < frames ? Softmax<A>{largest[shared0 + query], inverse[shared0 + query]}.weight(x * scale2) : A(0);
    });
  };
  weigh_rows_by_parts<T, kD, kPartTiles<T>>(weights, grad, heads.rows<T, kD>(a.grad_qkv, 2), r0);
  const auto gradients = [&](int q0, A(&w)[kPartTiles<T>][4]) {
    A dw[kPartTiles<T>][4];
    weights(q0, w);
    dot_rows<T, kD>(v, r0, grad, q0, dw);
    each_score<T>(dw, q0,
                  [&](int query, int, A& x) { x = query < frames ? (x - mean[shared0 + query]) * scale : A(0); });
#pragma unroll
    for (int j = 0; j < kPartTiles<T>; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[j][i] *= dw[j][i];
    }
  };
  weigh_rows_by_parts<T, kD, kPartTiles<T>>(gradients, q, heads.rows<T, kD>(a.grad_qkv, 1), r0);
}

#ifndef __CUDACC_RTC__

constexpr int kByParts = 0;  // instead of a number of tiles

template <int kD, int kTiles>
struct Sizes {
  static constexpr bool kTwo = kTiles == kTwoHeads;
};

// f(Sizes): enough tiles of 8 rows for the frames, and the best that can be said of D.
template <typename T, bool kBackward, typename F>
void with_sizes(int64_t frames, int64_t D, bool vectorized, F&& f) {
  constexpr bool kSpills = kBackward && sizeof(T) == 4;  // with the scores of 64 frames and any width
  if constexpr (sizeof(T) <= 4) {                        // double is for checking gradients
    if (vectorized && D == 64 && frames <= 8) return f(Sizes<64, kTwoHeads>{});
    if (vectorized && D == 64 && frames <= 16) return f(Sizes<64, 2>{});
    if (vectorized && D == 64 && frames <= 64) return f(Sizes<64, 8>{});
    if (vectorized && frames <= 16) return f(Sizes<kWhole, 2>{});
    if constexpr (!kSpills) {
      if (vectorized && frames <= 64) return f(Sizes<kWhole, 8>{});
    }
    if (vectorized) return f(Sizes<kWhole, kByParts>{});
  }
  f(Sizes<kRagged, kByParts>{});
}

template <typename T, int kD, int kTiles>
void launch(const TemporalAttentionArgs& args, int64_t blocks, cudaStream_t stream, Sizes<kD, kTiles>) {
  if constexpr (kTiles == kByParts) {
    PYVIDX_LAUNCH((temporal_attention_by_parts_kernel<T, kD>), blocks, kAttentionThreads, 0, stream, args);
  } else {
    PYVIDX_LAUNCH((temporal_attention_kernel<T, kD, kTiles>), blocks, kAttentionThreads, 0, stream, args);
  }
  check_launch("temporal_attention_kernel");
}

template <typename T, int kD, int kTiles>
void launch(const TemporalAttentionBackwardArgs& args, int64_t blocks, unsigned threads, cudaStream_t stream,
            Sizes<kD, kTiles>) {
  if constexpr (kTiles == kByParts) {
    PYVIDX_LAUNCH((temporal_attention_backward_by_parts_kernel<T, kD>), blocks, threads, 0, stream, args);
  } else {
    PYVIDX_LAUNCH((temporal_attention_backward_kernel<T, kD, kTiles>), blocks, threads, 0, stream, args);
  }
  check_launch("temporal_attention_backward_kernel");
}

template <typename T>
void launch_temporal_attention(const TemporalAttentionArgs& args, cudaStream_t stream) {
  const int64_t frames = args.qkv.size[1], D = args.qkv.size[5];
  const int64_t heads = args.qkv.size[0] * args.qkv.size[2] * args.qkv.size[4];
  const bool vectorized = has_chunks<T, 1>(args.qkv) && has_chunks<T, 1>(args.out);
  with_sizes<T, false>(frames, D, vectorized, [&](auto sizes) {
    const int64_t warps = decltype(sizes)::kTwo ? ceil_div(heads, 2) : heads * ceil_div(frames, 16);
    narrow(warps, "temporal_attention: heads times groups of 16 frames");
    launch<T>(args, ceil_div(warps, kAttentionWarps), stream, sizes);
  });
}

template <typename T>
void launch_temporal_attention_backward(const TemporalAttentionBackwardArgs& args, cudaStream_t stream) {
  const int64_t frames = args.qkv.size[1], D = args.qkv.size[5];
  const int64_t heads = args.qkv.size[0] * args.qkv.size[2] * args.qkv.size[4];
  const int64_t groups = ceil_div(frames, 16), per_block = groups < 4 ? 4 / groups : 1;
  const bool vectorized =
      has_chunks<T, 1>(args.qkv) && has_chunks<T, 1>(args.grad_out) && has_chunks<T, 1>(args.grad_qkv);
  narrow(heads * groups, "temporal_attention_backward: heads times groups of 16 frames");
  with_sizes<T, true>(frames, D, vectorized, [&](auto sizes) {
    const int64_t tasks = decltype(sizes)::kTwo ? ceil_div(heads, 2) : heads;
    launch<T>(args, ceil_div(tasks, per_block), unsigned(32 * groups * per_block), stream, sizes);
  });
}

#endif

}  // namespace pyvidx::cuda
