// A block takes one row after another: a thread owns a pack of channels, 16 bytes of y, and keeps it in registers for
// the two sums of the norm. Rows of more packs than threads, or not aligned, are read three times, twice from the
// caches. The class rows of a video are one row, taken by a block of its own, with as many copies as there are slots.
// Traffic: 4 passes.
#include "residual_norm.cuh"

namespace pyvidx::cuda {

constexpr int kNormRows = 4;  // per block, one after another

// The row before the norm, kSize channels from c.
template <typename X, typename Y, int kSize>
__device__ __forceinline__ void take_in(const ResidualNormArgs& a, bool is_class, int64_t b, int64_t s, int64_t k,
                                        int64_t c, Acc<X> factor, Acc<X> (&v)[kSize]) {
  Acc<X> y[kSize];
  load_channels<X, kSize>(is_class ? a.cls.at<const X>(b, c) : a.x.at<const X>(b, s, k, c), v);
  const int64_t slots = !is_class ? 1 : a.y_cls ? a.y_cls.size[1] : 0;
#pragma unroll 1
  for (int64_t slot = 0; slot < slots; ++slot) {
    load_channels<Y, kSize>(is_class ? a.y_cls.at<const Y>(b, slot, c) : a.y.at<const Y>(b, s, k, c), y);
    const Acc<X> part = is_class ? *a.share.at<const Acc<X>>(b, slot) : factor;
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] += part * y[i];
  }
}

template <typename X, typename Y, int kSize, bool kOnce>
__global__ __launch_bounds__(kNormThreads, 1) void residual_norm_kernel(ResidualNormArgs a, unsigned class_rows) {
  using A = Acc<X>;
  __shared__ A shared[2 * kNormWarps];
  RowSum<1, A, kNormWarps> row_sum{shared};
  const int64_t S = a.x.size[1], K = a.x.size[2], C = a.x.size[3], rows = a.x.size[0] * S * K;
  const int64_t own = int64_t(threadIdx.x) * kSize, step = int64_t(blockDim.x) * kSize;
  const bool is_class = blockIdx.x < class_rows;
  const int64_t first = is_class ? 0 : int64_t(blockIdx.x - class_rows) * kNormRows;
  const int64_t last = is_class ? 1 : (first + kNormRows < rows ? first + kNormRows : rows);
#pragma unroll 1
  for (int64_t row = first; row < last; ++row) {
    const int64_t b = is_class ? blockIdx.x : row / (S * K), s = is_class ? 0 : row / K % S, k = is_class ? 0 : row % K;
    const A factor = a.factor && !is_class ? *a.factor.at<const A>(b, s) : A(1);
    A kept[kSize];
    A mean[1] = {}, rstd[1] = {};
#pragma unroll 1
    for (int64_t c = own; c < C; c += step) {
      take_in<X, Y, kSize>(a, is_class, b, s, k, c, factor, kept);
#pragma unroll
      for (int i = 0; i < kSize; ++i) mean[0] += kept[i];
      if constexpr (kOnce) break;
    }
    row_sum(mean);
    mean[0] /= A(C);
#pragma unroll 1
    for (int64_t c = own; c < C; c += step) {
      if constexpr (!kOnce) take_in<X, Y, kSize>(a, is_class, b, s, k, c, factor, kept);
#pragma unroll
      for (int i = 0; i < kSize; ++i) rstd[0] += (kept[i] - mean[0]) * (kept[i] - mean[0]);
      if constexpr (kOnce) break;
    }
    row_sum(rstd);
    rstd[0] = A(1) / sqrt(rstd[0] / A(C) + A(a.eps));
    const int64_t copies = is_class ? S : 1;
#pragma unroll 1
    for (int64_t c = own; c < C; c += step) {  // out may be x or y: only now is it written
      if constexpr (!kOnce) take_in<X, Y, kSize>(a, is_class, b, s, k, c, factor, kept);
      A weight[kSize], shift[kSize], normed[kSize];
      load_channels<X, kSize>(a.weight.at<const X>(c), weight);
      load_channels<X, kSize>(a.shift.at<const X>(c), shift);
#pragma unroll
      for (int i = 0; i < kSize; ++i) normed[i] = (kept[i] - mean[0]) * rstd[0] * weight[i] + shift[i];
#pragma unroll 1
      for (int64_t i = 0; i < copies; ++i) {
        store_channels<X, kSize>(is_class ? a.out_cls.at<X>(b, i, c) : a.out.at<X>(b, s, k, c), kept);
        store_channels<Y, kSize>(is_class ? a.normed_cls.at<Y>(b, i, c) : a.normed.at<Y>(b, s, k, c), normed);
      }
      if constexpr (kOnce) break;
    }
    for (int64_t i = threadIdx.x; i < copies; i += blockDim.x) {
      A* stats = is_class ? a.stats_cls.at<A>(b, i) : a.stats.at<A>(b, s, k);
      stats[0] = mean[0], stats[1] = rstd[0];
    }
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

template <typename X, typename Y>
bool aligned(const ResidualNormArgs& a) {
  return vectorizable<X>(a.x) && vectorizable<Y>(a.y) && vectorizable<X>(a.cls) && vectorizable<Y>(a.y_cls) &&
         vectorizable<X>(a.weight) && vectorizable<X>(a.shift) && vectorizable<X>(a.out) && vectorizable<Y>(a.normed) &&
         vectorizable<X>(a.out_cls) && vectorizable<Y>(a.normed_cls);
}

template <typename X, typename Y, int kSize, bool kOnce>
void launch(const ResidualNormArgs& a, cudaStream_t stream) {
  const int64_t rows = a.x.size[0] * a.x.size[1] * a.x.size[2], C = a.x.size[3], videos = a.cls ? a.x.size[0] : 0;
  const int64_t blocks = videos + ceil_div(rows, kNormRows);
  if (blocks == 0 || C == 0) return;
  PYVIDX_LAUNCH((residual_norm_kernel<X, Y, kSize, kOnce>), blocks, norm_threads(C, kSize), 0, stream, a,
                unsigned(videos));
  check_launch("residual_norm_kernel");
}

}  // namespace

void residual_norm_cuda(const ResidualNormArgs& args, cudaStream_t stream) {
  visit_mixed<__half, __nv_bfloat16>("residual_norm", args.x.dtype, args.y.dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    constexpr int kSize = kVec<Y>;
    if (!aligned<X, Y>(args)) return launch<X, Y, 1, false>(args, stream);
    if (args.x.size[3] > kNormThreads * kSize) return launch<X, Y, kSize, false>(args, stream);
    launch<X, Y, kSize, true>(args, stream);
  });
}

}  // namespace pyvidx
#endif
