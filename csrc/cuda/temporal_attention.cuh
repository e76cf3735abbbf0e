// Forward: a warp per 16 queries of one (b, p, h); neighboring warps take the other queries of the same head, then the
// next head, so that the rows a block reads lie together and K and V come from L1 when read again. Everything else
// stays in registers: scores (T / 2 of them per lane) and 64 columns of sums. Traffic: 4 passes, 7 backward.
// Arithmetic: 4 T^2 D flops per head, on tensor cores: at T = 64 and 16 bits 32 flops per byte, twice what float FMA
// could feed. 8 frames fill half of an mma; it is idle otherwise.
#pragma once
#include "attention.cuh"
#include "pyvidx/temporal_attention.h"

namespace pyvidx::cuda {

constexpr int kAttentionWarps = 4, kAttentionThreads = 32 * kAttentionWarps, kAttentionRows = 16 * kAttentionWarps;

struct Head {
  int64_t b, p, h;
};

__device__ __forceinline__ Head head_of(int64_t index, const View<6>& qkv) {
  const int64_t P = qkv.size[2], H = qkv.size[4];
  return {index / (P * H), index / H % P, index % H};
}

template <typename T>
__device__ __forceinline__ Rows<const T> part_of(const View<6>& qkv, Head at, int part) {
  return {qkv.at<const T>(at.b, 0, at.p, part, at.h), qkv.stride[1], int(qkv.size[1]), int(qkv.size[5])};
}
template <typename T, int kDims, typename... Part>
__device__ __forceinline__ Rows<T> rows_of(const View<kDims>& x, Head at, Part... part) {
  return {x.template at<T>(at.b, 0, at.p, part..., at.h), x.stride[1], int(x.size[1]), int(x.size[kDims - 1])};
}

template <typename T, int kD, int kTiles>
__global__ __launch_bounds__(kAttentionThreads, 1) void temporal_attention_kernel(TemporalAttentionArgs a) {
  const int frames = int(a.qkv.size[1]), groups = (frames + 15) / 16;
  const int64_t task = int64_t(blockIdx.x) * kAttentionWarps + threadIdx.x / 32;
  if (task >= a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4] * groups) return;
  const Head at = head_of(task / groups, a.qkv);
  const int q0 = int(task % groups) * 16;
  const Rows<const T> q = part_of<T>(a.qkv, at, 0), k = part_of<T>(a.qkv, at, 1);
  const Rows<const T> v = part_of<T>(a.qkv, at, 2);
  Acc<T> w[kTiles][4];
  Softmax<Acc<T>> softmax[2];
  dot_rows<T, kD>(q, q0, k, 0, w);
  softmax_rows(w, frames, Acc<T>(a.scale * kLog2e), softmax);
  weigh_rows<T, kD>(w, v, rows_of<T>(a.out, at), q0);
}

// What a warp of a backward kernel works on: 16 rows of one head.
template <typename T>
struct BackwardTask {
  Head at;
  Rows<const T> q, k, v, grad;
  int r0, shared0, frames;  // the first row, the head's first row in shared memory
  bool active;

  __device__ __forceinline__ explicit BackwardTask(const TemporalAttentionBackwardArgs& a) {
    frames = int(a.qkv.size[1]);
    const int groups = (frames + 15) / 16, warp = threadIdx.x / 32;
    const int64_t head = int64_t(blockIdx.x) * (blockDim.x / 32 / groups) + warp / groups;
    active = head < a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
    at = head_of(active ? head : 0, a.qkv);
    r0 = warp % groups * 16, shared0 = warp / groups * groups * 16;
    q = part_of<T>(a.qkv, at, 0), k = part_of<T>(a.qkv, at, 1), v = part_of<T>(a.qkv, at, 2);
    grad = rows_of<const T>(a.grad_out, at);
  }
  __device__ __forceinline__ Rows<T> grad_rows(const TemporalAttentionBackwardArgs& a, int part) const {
    return rows_of<T>(a.grad_qkv, at, part);
  }
};

template <typename T, int kD, int kTiles>
__global__ __launch_bounds__(kAttentionThreads,
                             1) void temporal_attention_backward_kernel(TemporalAttentionBackwardArgs a) {
  using A = Acc<T>;
  __shared__ A largest[kAttentionRows], inverse[kAttentionRows], mean[kAttentionRows];  // per query
  const BackwardTask<T> task(a);
  const Rows<const T>&q = task.q, &k = task.k, &v = task.v, &grad = task.grad;
  const int r0 = task.r0, shared0 = task.shared0, frames = task.frames;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const A scale = A(a.scale), scale2 = A(a.scale * kLog2e);
  A w[kTiles][4], dw[kTiles][4];
  if (task.active) {
    Softmax<A> softmax[2];
    dot_rows<T, kD>(q, r0, k, 0, w);
    softmax_rows(w, frames, scale2, softmax);
    A sum[2] = {};
    dot_rows<T, kD>(grad, r0, v, 0, dw);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i / 2] += w[j][i] * dw[j][i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = quad_sum(sum[half]);
      if (c == 0) {
        const int query = shared0 + r0 + g + 8 * half;
        largest[query] = softmax[half].largest, inverse[query] = softmax[half].inverse, mean[query] = sum[half];
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[j][i] *= (dw[j][i] - sum[i / 2]) * scale;
    }
    weigh_rows<T, kD>(w, k, task.grad_rows(a, 0), r0);
  }
  __syncthreads();
  if (!task.active) return;
  dot_rows<T, kD>(k, r0, q, 0, w);
  each_score(w, 0, [&](int query, int, A& x) {  // [key][query]
    x = query < frames ? Softmax<A>{largest[shared0 + query], inverse[shared0 + query]}.weight(x * scale2) : A(0);
  });
  weigh_rows<T, kD>(w, grad, task.grad_rows(a, 2), r0);
  dot_rows<T, kD>(v, r0, grad, 0, dw);
  each_score(dw, 0, [&](int query, int, A& x) { x = query < frames ? (x - mean[shared0 + query]) * scale : A(0); });
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[j][i] *= dw[j][i];
  }
  weigh_rows<T, kD>(w, q, task.grad_rows(a, 1), r0);
}

// ---- what the kernels above do not fit: more than 64 frames, any D, any alignment, double. A few tiles of scores at a
// time, computed again whenever they are needed; little code and few registers rather than speed. ----

constexpr int kPartWarps = 8, kPartThreads = 32 * kPartWarps;  // 16 rows each are the 128 frames
template <typename T>
constexpr int kPartTiles = sizeof(T) == 8 ? 2 : 4;  // double, for gradcheck, would spill with 4

template <typename T, int kD>
__global__ __launch_bounds__(kPartThreads, 1) void temporal_attention_by_parts_kernel(TemporalAttentionArgs a) {
  using A = Acc<T>;
  const int frames = int(a.qkv.size[1]), groups = (frames + 15) / 16;
  const int64_t task = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (task >= a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4] * groups) return;
  const Head at = head_of(task / groups, a.qkv);
  const int q0 = int(task % groups) * 16;
  const Rows<const T> q = part_of<T>(a.qkv, at, 0), k = part_of<T>(a.qkv, at, 1);
  const A scale2 = A(a.scale * kLog2e);
  Softmax<A> softmax[2];
  softmax_by_parts<T, kD, kPartTiles<T>>(q, q0, k, scale2, softmax);
  const auto weights = [&](int k0, A(&w)[kPartTiles<T>][4]) {
    dot_rows<T, kD>(q, q0, k, k0, w);
    each_score(w, k0, [&](int key, int half, A& x) { x = key < frames ? softmax[half].weight(x * scale2) : A(0); });
  };
  weigh_rows_by_parts<T, kD, kPartTiles<T>>(weights, part_of<T>(a.qkv, at, 2), rows_of<T>(a.out, at), q0);
}

template <typename T, int kD>
__global__ __launch_bounds__(kPartThreads,
                             1) void temporal_attention_backward_by_parts_kernel(TemporalAttentionBackwardArgs a) {
  using A = Acc<T>;
  __shared__ A largest[16 * kPartWarps], inverse[16 * kPartWarps], mean[16 * kPartWarps];  // per query
  const BackwardTask<T> task(a);
  const Rows<const T>&q = task.q, &k = task.k, &v = task.v, &grad = task.grad;
  const int r0 = task.r0, shared0 = task.shared0, frames = task.frames;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const A scale = A(a.scale), scale2 = A(a.scale * kLog2e);
  if (task.active) {
    Softmax<A> softmax[2];
    A sum[2] = {};
    softmax_by_parts<T, kD, kPartTiles<T>>(q, r0, k, scale2, softmax);
    const auto score_gradients = [&](int k0, A(&w)[kPartTiles<T>][4]) {  // times what `sum` is not subtracted from yet
      A dw[kPartTiles<T>][4];
      dot_rows<T, kD>(q, r0, k, k0, w);
      dot_rows<T, kD>(grad, r0, v, k0, dw);
      each_score(w, k0, [&](int key, int half, A& x) { x = key < frames ? softmax[half].weight(x * scale2) : A(0); });
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
      each_score(w, k0, [&](int, int half, A& x) { mean_of_row[half] += x; });
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = quad_sum(mean_of_row[half]);
      if (c == 0) {
        const int query = shared0 + r0 + g + 8 * half;
        largest[query] = softmax[half].largest, inverse[query] = softmax[half].inverse, mean[query] = sum[half];
      }
    }
    const auto scaled = [&](int k0, A(&w)[kPartTiles<T>][4]) {
      score_gradients(k0, w);
      each_score(w, k0, [&](int, int, A& x) { x *= scale; });
    };
    weigh_rows_by_parts<T, kD, kPartTiles<T>>(scaled, k, task.grad_rows(a, 0), r0);
  }
  __syncthreads();
  if (!task.active) return;
  const auto weights = [&](int q0, A(&w)[kPartTiles<T>][4]) {  // [key][query]
    dot_rows<T, kD>(k, r0, q, q0, w);
    each_score(w, q0, [&](int query, int, A& x) {
      x = query < frames ? Softmax<A>{largest[shared0 + query], inverse[shared0 + query]}.weight(x * scale2) : A(0);
    });
  };
  weigh_rows_by_parts<T, kD, kPartTiles<T>>(weights, grad, task.grad_rows(a, 2), r0);
  const auto gradients = [&](int q0, A(&w)[kPartTiles<T>][4]) {
    A dw[kPartTiles<T>][4];
    weights(q0, w);
    dot_rows<T, kD>(v, r0, grad, q0, dw);
    each_score(dw, q0, [&](int query, int, A& x) { x = query < frames ? (x - mean[shared0 + query]) * scale : A(0); });
#pragma unroll
    for (int j = 0; j < kPartTiles<T>; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) w[j][i] *= dw[j][i];
    }
  };
  weigh_rows_by_parts<T, kD, kPartTiles<T>>(gradients, q, task.grad_rows(a, 1), r0);
}

#ifndef __CUDACC_RTC__

constexpr int kByParts = 0;  // instead of a number of tiles

template <int kD, int kTiles>
struct Sizes {};

// f(Sizes): enough tiles of 8 rows for the frames, and the best that can be said of D.
template <typename T, bool kBackward, typename F>
void with_sizes(int64_t frames, int64_t D, bool vectorized, F&& f) {
  constexpr bool kSpills = kBackward && sizeof(T) == 4;  // with the scores of 64 frames and any width
  if constexpr (sizeof(T) <= 4) {                        // double is for checking gradients
    if (vectorized && D == 64 && frames <= 8) return f(Sizes<64, 1>{});
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
  const int64_t warps = args.qkv.size[0] * args.qkv.size[2] * args.qkv.size[4] * ceil_div(frames, 16);
  const bool vectorized = D % kChunk<T> == 0 && vectorizable<T>(args.qkv) && vectorizable<T>(args.out);
  with_sizes<T, false>(frames, D, vectorized,
                       [&](auto sizes) { launch<T>(args, ceil_div(warps, kAttentionWarps), stream, sizes); });
}

template <typename T>
void launch_temporal_attention_backward(const TemporalAttentionBackwardArgs& args, cudaStream_t stream) {
  const int64_t frames = args.qkv.size[1], D = args.qkv.size[5];
  const int64_t heads = args.qkv.size[0] * args.qkv.size[2] * args.qkv.size[4];
  const int64_t groups = ceil_div(frames, 16), per_block = groups < 4 ? 4 / groups : 1;
  const bool vectorized = D % kChunk<T> == 0 && vectorizable<T>(args.qkv) && vectorizable<T>(args.grad_out) &&
                          vectorizable<T>(args.grad_qkv);
  with_sizes<T, true>(frames, D, vectorized, [&](auto sizes) {
    launch<T>(args, ceil_div(heads, per_block), unsigned(32 * groups * per_block), stream, sizes);
  });
}

#endif

}  // namespace pyvidx::cuda
