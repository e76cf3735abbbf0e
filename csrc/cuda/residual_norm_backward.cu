// A block takes a part: a chunk of rows of one frame. A thread owns the same pack of channels in all of them and keeps
// their two sums in registers; it writes them once, and a second kernel adds the parts up in their order. The slots'
// class rows of a video are one row whose gradients are summed first: all that follows is linear in them. Rows of more
// packs than threads, or not aligned, keep their sums in the scratch row. Traffic: 4 passes, 5 with grad_y.
#include "pyvidx/row_parts.h"
#include "residual_norm.cuh"
#include "row_sums.cuh"

namespace pyvidx::cuda {

struct NormBackwardPlan {
  unsigned class_rows, parts, chunk, chunks;  // blocks: class rows, then parts
};

// kSize channels of a row: the gradients of out and normed, the normalized row and the norm's weight.
template <typename X, typename Y, int kSize>
__device__ __forceinline__ void load_gradients(const ResidualNormBackwardArgs& a, bool is_class, int64_t b, int64_t s,
                                               int64_t k, int64_t c, const Acc<X>* stats, Acc<X> (&grad)[kSize],
                                               Acc<X> (&normed)[kSize], Acc<X> (&value)[kSize],
                                               Acc<X> (&weight)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) grad[i] = normed[i] = 0;
  const int64_t slots = is_class ? a.value_cls.size[1] : 1;
#pragma unroll 1
  for (int64_t slot = 0; slot < slots; ++slot) {
    load_channels<X, kSize>(is_class ? a.grad_out_cls.at<const X>(b, slot, c) : a.grad_out.at<const X>(b, s, k, c),
                            value);
    load_channels<Y, kSize>(
        is_class ? a.grad_normed_cls.at<const Y>(b, slot, c) : a.grad_normed.at<const Y>(b, s, k, c), weight);
#pragma unroll
    for (int i = 0; i < kSize; ++i) grad[i] += value[i], normed[i] += weight[i];
  }
  load_channels<X, kSize>(is_class ? a.value_cls.at<const X>(b, 0, c) : a.value.at<const X>(b, s, k, c), value);
  load_channels<X, kSize>(a.weight.at<const X>(c), weight);
#pragma unroll
  for (int i = 0; i < kSize; ++i) value[i] = (value[i] - stats[0]) * stats[1];
}

// Stores what follows from g, kSize channels of a row's whole gradient.
template <typename X, typename Y, int kSize>
__device__ __forceinline__ void store_gradients(const ResidualNormBackwardArgs& a, bool is_class, int64_t b, int64_t s,
                                                int64_t k, int64_t c, Acc<X> factor, const Acc<X> (&g)[kSize]) {
  Acc<X> scaled[kSize];
  if (!is_class) {
    store_channels<X, kSize>(a.grad_x.at<X>(b, s, k, c), g);
    if (!a.grad_y) return;
#pragma unroll
    for (int i = 0; i < kSize; ++i) scaled[i] = g[i] * factor;
    return store_channels<Y, kSize>(a.grad_y.at<Y>(b, s, k, c), scaled);
  }
  store_channels<X, kSize>(a.grad_cls.at<X>(b, 0, c), g);
#pragma unroll
  for (int i = 0; i < kSize; ++i) scaled[i] = 0;
#pragma unroll 1
  for (int64_t row = 1; row < a.grad_cls.size[1]; ++row) store_channels<X, kSize>(a.grad_cls.at<X>(b, row, c), scaled);
  if (!a.grad_y_cls) return;
#pragma unroll 1
  for (int64_t slot = 0; slot < a.grad_y_cls.size[1]; ++slot) {
    const Acc<X> share = *a.share.at<const Acc<X>>(b, slot);
#pragma unroll
    for (int i = 0; i < kSize; ++i) scaled[i] = g[i] * share;
    store_channels<Y, kSize>(a.grad_y_cls.at<Y>(b, slot, c), scaled);
  }
}

template <typename X, typename Y, int kSize, bool kOnce>
__global__ __launch_bounds__(kNormThreads, 1) void residual_norm_backward_kernel(ResidualNormBackwardArgs a,
                                                                                 NormBackwardPlan plan) {
  using A = Acc<X>;
  __shared__ A shared[2 * kNormWarps * 2];
  RowSum<2, A, kNormWarps> row_sum{shared};
  const int64_t S = a.value.size[1], K = a.value.size[2], C = a.value.size[3];
  const int64_t own = int64_t(threadIdx.x) * kSize, step = int64_t(blockDim.x) * kSize;
  const bool is_class = blockIdx.x < plan.class_rows;
  const unsigned part = is_class ? plan.parts + blockIdx.x : blockIdx.x - plan.class_rows;
  const int64_t frame = part / plan.chunks, b = is_class ? blockIdx.x : frame / S, s = is_class ? 0 : frame % S;
  const int64_t first = is_class ? 0 : int64_t(part % plan.chunks) * plan.chunk;
  const int64_t last = is_class ? 1 : (first + plan.chunk < K ? first + plan.chunk : K);
  const A factor = a.factor && !is_class ? *a.factor.at<const A>(b, s) : A(1);
  A to_weight[kSize] = {}, to_shift[kSize] = {};
  A grad[kSize], normed[kSize], value[kSize], weight[kSize];
#pragma unroll 1
  for (int64_t k = first; k < last; ++k) {
    const A* stats = is_class ? a.stats_cls.at<const A>(b, 0) : a.stats.at<const A>(b, s, k);
    A mean[2] = {};
#pragma unroll 1
    for (int64_t c = own; c < C; c += step) {
      load_gradients<X, Y, kSize>(a, is_class, b, s, k, c, stats, grad, normed, value, weight);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        mean[0] += normed[i] * weight[i];
        mean[1] += normed[i] * weight[i] * value[i];
      }
      if constexpr (kOnce) break;
    }
    row_sum(mean);
    mean[0] /= A(C), mean[1] /= A(C);
#pragma unroll 1
    for (int64_t c = own; c < C; c += step) {
      if constexpr (!kOnce) load_gradients<X, Y, kSize>(a, is_class, b, s, k, c, stats, grad, normed, value, weight);
      A g[kSize];
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        g[i] = grad[i] + (normed[i] * weight[i] - mean[0] - value[i] * mean[1]) * stats[1];
        if constexpr (kOnce) {
          to_weight[i] += normed[i] * value[i], to_shift[i] += normed[i];
        } else {  // only this thread touches channel c of this part
          A *scale = a.partial.at<A>(0, part, c + i), *shift = a.partial.at<A>(1, part, c + i);
          *scale = (k == first ? A(0) : *scale) + normed[i] * value[i];
          *shift = (k == first ? A(0) : *shift) + normed[i];
        }
      }
      store_gradients<X, Y, kSize>(a, is_class, b, s, k, c, factor, g);
      if constexpr (kOnce) break;
    }
  }
  if (kOnce && own < C) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      *a.partial.at<A>(0, part, own + i) = to_weight[i];
      *a.partial.at<A>(1, part, own + i) = to_shift[i];
    }
  }
}

template <typename X>
__global__ __launch_bounds__(kAddUpThreads) void residual_norm_add_up_kernel(ResidualNormBackwardArgs a,
                                                                             unsigned count) {
  const View<1>& out = blockIdx.y == 0 ? a.grad_weight : a.grad_shift;
  const int64_t C = a.partial.size[2];
  add_up(a.partial.at<const Acc<X>>(int64_t(blockIdx.y)), C, count, C,
         [&](int64_t c, Acc<X> sum) { *out.at<X>(c) = from_acc<X>(sum); });
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

template <typename X, typename Y>
bool aligned(const ResidualNormBackwardArgs& a) {
  return vectorizable<X>(a.grad_out) && vectorizable<Y>(a.grad_normed) && vectorizable<X>(a.value) &&
         vectorizable<X>(a.grad_out_cls) && vectorizable<Y>(a.grad_normed_cls) && vectorizable<X>(a.value_cls) &&
         vectorizable<X>(a.weight) && vectorizable<X>(a.grad_x) && vectorizable<Y>(a.grad_y) &&
         vectorizable<X>(a.grad_cls) && vectorizable<Y>(a.grad_y_cls);
}

template <typename X, typename Y, int kSize, bool kOnce>
void launch(const ResidualNormBackwardArgs& a, cudaStream_t stream) {
  const int64_t frames = a.value.size[0] * a.value.size[1], K = a.value.size[2], C = a.value.size[3];
  NormBackwardPlan plan;
  const int64_t class_rows = a.grad_cls ? a.value.size[0] : 0, parts = row_parts(frames, K);
  plan.class_rows = unsigned(class_rows);
  plan.chunk = unsigned(row_chunk(frames, K));
  plan.chunks = K > 0 ? unsigned(ceil_div(K, plan.chunk)) : 1;
  plan.parts = unsigned(parts);
  const int64_t blocks = class_rows + parts;
  if (C == 0) return;
  if (blocks > 0) {
    PYVIDX_LAUNCH((residual_norm_backward_kernel<X, Y, kSize, kOnce>), blocks, norm_threads(C, kSize), 0, stream, a,
                  plan);
    check_launch("residual_norm_backward_kernel");
  }
  PYVIDX_LAUNCH(residual_norm_add_up_kernel<X>, Grid(add_up_blocks(C), 2), kAddUpThreads, 0, stream, a,
                unsigned(blocks));
  check_launch("residual_norm_add_up_kernel");
}

}  // namespace

void residual_norm_backward_cuda(const ResidualNormBackwardArgs& args, cudaStream_t stream) {
  visit_mixed<__half, __nv_bfloat16>("residual_norm_backward", args.value.dtype, args.grad_normed.dtype,
                                     [&](auto x, auto y) {
                                       using X = typename decltype(x)::type;
                                       using Y = typename decltype(y)::type;
                                       constexpr int kSize = kVec<Y>;
                                       if (!aligned<X, Y>(args)) return launch<X, Y, 1, false>(args, stream);
                                       if (args.value.size[3] > kNormThreads * kSize) {
                                         return launch<X, Y, kSize, false>(args, stream);
                                       }
                                       launch<X, Y, kSize, true>(args, stream);
                                     });
}

}  // namespace pyvidx
#endif
