// Forward: a warp per 16 queries of one (b, p, h); neighboring warps take the other queries of the same head, then the
// next head, so that the rows a block reads lie together and K and V come from L1 when read again. Everything else
// stays in registers: scores (T / 2 of them per lane) and 64 columns of sums. Traffic: 4 passes, 7 backward.
// Arithmetic: 4 T^2 D flops per head, on tensor cores: at T = 64 and 16 bits 32 flops per byte, twice what float FMA
// could feed. 8 frames fill half of an mma; it is idle otherwise.
#include "pyvidx/temporal_attention.h"
#include "temporal_attention.cuh"

namespace pyvidx::cuda {

constexpr int kAttentionWarps = 4, kAttentionThreads = 32 * kAttentionWarps;

struct Head {
  int64_t b, p, h;
};

__device__ __forceinline__ Head head_of(int64_t index, const View<6>& qkv) {
  const int64_t P = qkv.size[2], H = qkv.size[4];
  return {index / (P * H), index / H % P, index % H};
}

template <typename T>
__device__ __forceinline__ Rows<const T> part_of(const View<6>& qkv, Head at, int part, bool vectorized) {
  return {qkv.at<const T>(at.b, 0, at.p, part, at.h), qkv.stride[1], int(qkv.size[1]), int(qkv.size[5]), vectorized};
}
template <typename T, int kDims, typename... Part>
__device__ __forceinline__ Rows<T> rows_of(const View<kDims>& x, Head at, bool vectorized, Part... part) {
  return {x.template at<T>(at.b, 0, at.p, part..., at.h), x.stride[1], int(x.size[1]), int(x.size[kDims - 1]),
          vectorized};
}

template <typename T, int kD, int kTiles>
__global__ __launch_bounds__(kAttentionThreads) void temporal_attention_kernel(TemporalAttentionArgs a,
                                                                               bool vectorized) {
  const int frames = int(a.qkv.size[1]), groups = (frames + 15) / 16;
  const int64_t task = int64_t(blockIdx.x) * kAttentionWarps + threadIdx.x / 32;
  if (task >= a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4] * groups) return;
  const Head at = head_of(task / groups, a.qkv);
  const int q0 = int(task % groups) * 16;
  const Rows<const T> q = part_of<T>(a.qkv, at, 0, vectorized), k = part_of<T>(a.qkv, at, 1, vectorized);
  const Rows<const T> v = part_of<T>(a.qkv, at, 2, vectorized);
  Acc<T> w[kTiles][4];
  Softmax<Acc<T>> softmax[2];
  dot_rows<T, kD>(q, q0, k, 0, w);
  softmax_rows(w, frames, Acc<T>(a.scale), softmax);
  weigh_rows<T, kD>(w, v, rows_of<T>(a.out, at, vectorized), q0);
}

constexpr int kBackwardWarps = 8;  // at most: 16 rows each are the 128 frames

template <typename T, int kD, int kTiles>
__global__ __launch_bounds__(32 *
                             kBackwardWarps) void temporal_attention_backward_kernel(TemporalAttentionBackwardArgs a,
                                                                                     bool vectorized) {
  using A = Acc<T>;
  __shared__ A largest[16 * kBackwardWarps], inverse[16 * kBackwardWarps], mean[16 * kBackwardWarps];  // per query
  constexpr int kGroup = sizeof(A) == 8 ? (kTiles < 4 ? kTiles : 4) : kTiles < 8 ? kTiles : 8;  // what registers hold
  const int frames = int(a.qkv.size[1]), groups = (frames + 15) / 16;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int64_t head = int64_t(blockIdx.x) * (blockDim.x / 32 / groups) + warp / groups;
  const bool active = head < a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  const Head at = head_of(active ? head : 0, a.qkv);
  const int r0 = warp % groups * 16, shared0 = warp / groups * groups * 16;
  const Rows<const T> q = part_of<T>(a.qkv, at, 0, vectorized), k = part_of<T>(a.qkv, at, 1, vectorized);
  const Rows<const T> v = part_of<T>(a.qkv, at, 2, vectorized), grad = rows_of<const T>(a.grad_out, at, vectorized);
  const A scale = A(a.scale);
  A w[kTiles][4], dw[kGroup][4];
  if (active) {
    Softmax<A> softmax[2];
    dot_rows<T, kD>(q, r0, k, 0, w);
    softmax_rows(w, frames, scale, softmax);
    A sum[2] = {};
#pragma unroll
    for (int t = 0; t < kTiles; t += kGroup) {
      dot_rows<T, kD>(grad, r0, v, 8 * t, dw);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i / 2] += w[t + j][i] * dw[j][i];
      }
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
    for (int t = 0; t < kTiles; t += kGroup) {
      if (kGroup < kTiles) dot_rows<T, kD>(grad, r0, v, 8 * t, dw);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) w[t + j][i] *= (dw[j][i] - sum[i / 2]) * scale;
      }
    }
    weigh_rows<T, kD>(w, k, rows_of<T>(a.grad_qkv, at, vectorized, 0), r0);
  }
  __syncthreads();
  if (!active) return;
  dot_rows<T, kD>(k, r0, q, 0, w);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = 8 * j + 2 * c + i % 2, at_query = shared0 + query;
      w[j][i] =
          query < frames ? power_of_two(w[j][i] * scale * A(kLog2e) - largest[at_query]) * inverse[at_query] : A(0);
    }
  }
  weigh_rows<T, kD>(w, grad, rows_of<T>(a.grad_qkv, at, vectorized, 2), r0);
#pragma unroll
  for (int t = 0; t < kTiles; t += kGroup) {
    dot_rows<T, kD>(v, r0, grad, 8 * t, dw);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = 8 * (t + j) + 2 * c + i % 2;
        if (query < frames) w[t + j][i] *= (dw[j][i] - mean[shared0 + query]) * scale;
      }
    }
  }
  weigh_rows<T, kD>(w, q, rows_of<T>(a.grad_qkv, at, vectorized, 1), r0);
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
#include <type_traits>

namespace pyvidx {

using namespace cuda;

namespace {

// f(kD, kTiles) as integral constants: enough tiles of 8 rows for the frames, and 64 columns where the compiler may
// unroll for them. Double, for checking gradients, has one size.
template <typename T, typename F>
void with_sizes(int64_t frames, int64_t D, bool vectorized, F&& f) {
  using std::integral_constant;
  if constexpr (sizeof(T) <= 4) {
    if (vectorized && D == 64 && frames <= 8) return f(integral_constant<int, 64>{}, integral_constant<int, 1>{});
    if (vectorized && D == 64 && frames <= 16) return f(integral_constant<int, 64>{}, integral_constant<int, 2>{});
    if (vectorized && D == 64 && frames <= 64) return f(integral_constant<int, 64>{}, integral_constant<int, 8>{});
    if (frames <= 16) return f(integral_constant<int, 0>{}, integral_constant<int, 2>{});
    if (frames <= 64) return f(integral_constant<int, 0>{}, integral_constant<int, 8>{});
  }
  f(integral_constant<int, 0>{}, integral_constant<int, 16>{});
}

}  // namespace

void temporal_attention_cuda(const TemporalAttentionArgs& args, cudaStream_t stream) {
  const int64_t frames = args.qkv.size[1], D = args.qkv.size[5];
  const int64_t heads = args.qkv.size[0] * args.qkv.size[2] * args.qkv.size[4];
  if (heads == 0 || frames == 0 || D == 0) return;
  const int64_t warps = heads * ((frames + 15) / 16);
  const unsigned blocks = unsigned((warps + kAttentionWarps - 1) / kAttentionWarps);
  visit_dtype<float, double, __half, __nv_bfloat16>("temporal_attention", args.qkv.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool vectorized = D % kChunk<T> == 0 && vectorizable<T>(args.qkv) && vectorizable<T>(args.out);
    with_sizes<T>(frames, D, vectorized, [&](auto kD, auto kTiles) {
      PYVIDX_LAUNCH((temporal_attention_kernel<T, decltype(kD)::value, decltype(kTiles)::value>), blocks,
                    kAttentionThreads, 0, stream, args, vectorized);
    });
  });
  check_launch("temporal_attention_kernel");
}

void temporal_attention_backward_cuda(const TemporalAttentionBackwardArgs& args, cudaStream_t stream) {
  const int64_t frames = args.qkv.size[1], D = args.qkv.size[5];
  const int64_t heads = args.qkv.size[0] * args.qkv.size[2] * args.qkv.size[4];
  if (heads == 0 || frames == 0 || D == 0) return;
  const int64_t groups = (frames + 15) / 16, per_block = groups < 4 ? 4 / groups : 1;
  const unsigned blocks = unsigned((heads + per_block - 1) / per_block), threads = unsigned(32 * groups * per_block);
  visit_dtype<float, double, __half, __nv_bfloat16>("temporal_attention_backward", args.qkv.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool vectorized = D % kChunk<T> == 0 && vectorizable<T>(args.qkv) && vectorizable<T>(args.grad_out) &&
                            vectorizable<T>(args.grad_qkv);
    with_sizes<T>(frames, D, vectorized, [&](auto kD, auto kTiles) {
      PYVIDX_LAUNCH((temporal_attention_backward_kernel<T, decltype(kD)::value, decltype(kTiles)::value>), blocks,
                    threads, 0, stream, args, vectorized);
    });
  });
  check_launch("temporal_attention_backward_kernel");
}

}  // namespace pyvidx
#endif
