// A warp takes a row and keeps it in registers between the three times a LayerNorm needs it: all its loads are under
// way at once, and no warp waits for another. Rows of more than 2048 channels, or not aligned, are read three times,
// twice from the caches. The class rows of a video are one row, with as many copies as there are slots. Traffic: 4
// passes.
//
// Versions: half, 1024 channels; registers on sm_70 and sm_90, instructions per 16 bytes moved, loads at once; shares
// of copy on V100, H100, H200 as `pyvidx bench predict` has them.
//   a block takes a row, two barriers     56, 64   129   1    .99  .88  .73
//   a warp takes a row                    79, 72    45   8   1.00  .99  .97
//   that, one loop for copies and rows    spills: nvcc keeps the normalized row beside the row
#include "block.cuh"
#include "pyvidx/residual_norm.h"

namespace pyvidx::cuda {

constexpr int kNormRows = 2;  // warps of a block: few, so that even a frame's rows reach all multiprocessors

// Blocks of a multiprocessor, by the channels of a lane: with fewer registers some would spill.
template <typename X, int kChannels>
constexpr int kNormBlocks = kChannels > 32   ? (sizeof(X) == 4 ? 4 : 5)
                            : sizeof(X) == 4 ? 8
                                             : 12;

struct NormPlan {
  unsigned class_rows, rows;  // rows: with the class rows, which come first
  unsigned frame, video;      // rows of a slot and of all slots of a video
  double inverse;             // 1 / C
};

// A row, or a video's class rows.
template <typename X, typename Y>
struct NormRow {
  const X* x;
  const Y* y;  // absent: no more than x
  Acc<X> factor;
  X* out;
  Y* normed;
  Acc<X>* stats;

  __device__ __forceinline__ NormRow(const ResidualNormArgs& a, const NormPlan& plan, unsigned i) : factor(1) {
    if (i < plan.class_rows) {
      x = a.cls.at<const X>(i), y = a.y_cls.at<const Y>(i);
      out = a.out_cls.at<X>(i), normed = a.normed_cls.at<Y>(i), stats = a.stats_cls.at<Acc<X>>(i);
      if (a.share) factor = *a.share.at<const Acc<X>>(i);
      return;
    }
    const unsigned n = i - plan.class_rows, b = n / plan.video, s = (n - b * plan.video) / plan.frame,
                   k = n - b * plan.video - s * plan.frame;
    x = a.x.at<const X>(b, s, k), y = a.y.at<const Y>(b, s, k);
    out = a.out.at<X>(b, s, k), normed = a.normed.at<Y>(b, s, k), stats = a.stats.at<Acc<X>>(b, s, k);
    if (a.factor) factor = *a.factor.at<const Acc<X>>(b, s);
  }
  __device__ __forceinline__ void put_stats(int64_t at, Acc<X> mean, Acc<X> rstd) const {
    stats[at] = mean, stats[at + 1] = rstd;
  }
};

// Rows of up to 32 * kSize * kPacks channels, aligned.
template <typename X, typename Y, int kSize, int kPacks>
__global__ __launch_bounds__(32 * kNormRows,
                             kNormBlocks<X, kSize * kPacks>) void residual_norm_kernel(ResidualNormArgs a,
                                                                                       NormPlan plan) {
  using A = Acc<X>;
  constexpr int kStep = 32 * kSize;
  const unsigned i = blockIdx.x * kNormRows + threadIdx.x / 32;
  if (i >= plan.rows) return;
  const bool is_class = i < plan.class_rows;
  const NormRow<X, Y> row(a, plan, i);
  const int C = int(a.x.size[3]), lane = int(threadIdx.x % 32), own = lane * kSize;
  const int64_t slots = is_class && a.y_cls ? a.y_cls.size[1] : 0;
#pragma unroll 1
  for (int64_t slot = 1; slot < slots; ++slot) {  // read one after another below, but from the L2
#pragma unroll 1
    for (int byte = lane * 128; byte < C * int(sizeof(Y)); byte += 32 * 128) {
      prefetch_l2(reinterpret_cast<const char*>(a.y_cls.at<const Y>(i, slot)) + byte);
    }
  }
  A v[kPacks][kSize] = {}, y[kPacks][kSize] = {}, mean = 0, rstd = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (own + p * kStep < C) load_channels<X, kSize>(row.x + own + p * kStep, v[p]);
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (own + p * kStep < C && row.y) load_channels<Y, kSize>(row.y + own + p * kStep, y[p]);
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) v[p][e] += row.factor * y[p][e];
  }
#pragma unroll 1
  for (int64_t slot = 1; slot < slots; ++slot) {
    const A share = *a.share.at<const A>(i, slot);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (own + p * kStep >= C) continue;
      load_channels<Y, kSize>(a.y_cls.at<const Y>(i, slot, own + p * kStep), y[p]);
#pragma unroll
      for (int e = 0; e < kSize; ++e) v[p][e] += share * y[p][e];
    }
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) mean += v[p][e];
  }
  mean = warp_sum(mean) * A(plan.inverse);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (own + p * kStep >= C) continue;
#pragma unroll
    for (int e = 0; e < kSize; ++e) rstd += (v[p][e] - mean) * (v[p][e] - mean);
  }
  rstd = rsqrt(warp_sum(rstd) * A(plan.inverse) + A(a.eps));
  const auto normed_pack = [&](int p, A(&normed)[kSize]) {
    A weight[kSize], shift[kSize];
    load_parameters<X, kSize>(a.weight.at<const X>(own + p * kStep), weight);
    load_parameters<X, kSize>(a.shift.at<const X>(own + p * kStep), shift);
#pragma unroll
    for (int e = 0; e < kSize; ++e) normed[e] = (v[p][e] - mean) * rstd * weight[e] + shift[e];
  };
  // Only now is out written, which may be x or y. Without copies apart: a loop around them would keep more in
  // registers.
  A normed[kSize];
  if (!is_class) {
    if (lane == 0) row.put_stats(0, mean, rstd);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (own + p * kStep >= C) return;
      normed_pack(p, normed);
      store_channels<X, kSize>(row.out + own + p * kStep, v[p]);
      store_channels<Y, kSize>(row.normed + own + p * kStep, normed);
    }
    return;
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if (own + p * kStep >= C) continue;
    normed_pack(p, normed);
#pragma unroll 1
    for (int64_t copy = 0; copy < a.out_cls.size[1]; ++copy) {
      store_channels<X, kSize>(a.out_cls.at<X>(i, copy, own + p * kStep), v[p]);
      store_channels<Y, kSize>(a.normed_cls.at<Y>(i, copy, own + p * kStep), normed);
    }
  }
#pragma unroll 1
  for (int64_t copy = lane; copy < a.out_cls.size[1]; copy += 32)
    row.put_stats(copy * a.stats_cls.stride[1], mean, rstd);
}

// Any rows, a channel of each lane at a time.
template <typename X, typename Y>
__global__ __launch_bounds__(32 * kNormRows) void residual_norm_any_kernel(ResidualNormArgs a, NormPlan plan) {
  using A = Acc<X>;
  const unsigned i = blockIdx.x * kNormRows + threadIdx.x / 32;
  if (i >= plan.rows) return;
  const bool is_class = i < plan.class_rows;
  const NormRow<X, Y> row(a, plan, i);
  const int64_t C = a.x.size[3], lane = threadIdx.x % 32;
  const int64_t slots = is_class && a.y_cls ? a.y_cls.size[1] : 0, copies = is_class ? a.out_cls.size[1] : 1;
  const auto value = [&](int64_t c) {
    A v = to_acc(row.x[c]);
    if (row.y) v += row.factor * to_acc(row.y[c]);
#pragma unroll 1
    for (int64_t slot = 1; slot < slots; ++slot) {
      v += *a.share.at<const A>(i, slot) * to_acc(*a.y_cls.at<const Y>(i, slot, c));
    }
    return v;
  };
  A mean = 0, rstd = 0;
  for (int64_t c = lane; c < C; c += 32) mean += value(c);
  mean = warp_sum(mean) * A(plan.inverse);
  for (int64_t c = lane; c < C; c += 32) rstd += (value(c) - mean) * (value(c) - mean);
  rstd = rsqrt(warp_sum(rstd) * A(plan.inverse) + A(a.eps));
  for (int64_t c = lane; c < C; c += 32) {
    const A v = value(c),
            normed = (v - mean) * rstd * to_acc(*a.weight.at<const X>(c)) + to_acc(*a.shift.at<const X>(c));
    for (int64_t copy = 0; copy < copies; ++copy) {
      row.out[copy * a.out_cls.stride[1] + c] = from_acc<X>(v);
      row.normed[copy * a.normed_cls.stride[1] + c] = from_acc<Y>(normed);
    }
  }
  for (int64_t copy = lane; copy < copies; copy += 32) row.put_stats(copy * a.stats_cls.stride[1], mean, rstd);
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

}  // namespace

void residual_norm_cuda(const ResidualNormArgs& a, cudaStream_t stream) {
  const int64_t B = a.x.size[0], S = a.x.size[1], K = a.x.size[2], C = a.x.size[3], class_rows = a.cls ? B : 0;
  const int64_t rows = class_rows + B * S * K;
  if (rows == 0 || C == 0) return;
  narrow(rows, "residual_norm_kernel: rows");
  const NormPlan plan{unsigned(class_rows), unsigned(rows), unsigned(K), unsigned(S * K), 1. / double(C)};
  const int64_t blocks = ceil_div(rows, kNormRows), threads = 32 * kNormRows;
  visit_mixed<__half, __nv_bfloat16>("residual_norm", a.x.dtype, a.y.dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if constexpr (!std::is_same_v<X, double>) {  // float64 is for checking gradients
      constexpr int kSize = kVec<Y>;
      if (aligned<X, Y>(a) && C <= 1024) {
        PYVIDX_LAUNCH((residual_norm_kernel<X, Y, kSize, 32 / kSize>), blocks, threads, 0, stream, a, plan);
        return check_launch("residual_norm_kernel");
      }
      if (aligned<X, Y>(a) && C <= 2048) {
        PYVIDX_LAUNCH((residual_norm_kernel<X, Y, kSize, 64 / kSize>), blocks, threads, 0, stream, a, plan);
        return check_launch("residual_norm_kernel");
      }
    }
    PYVIDX_LAUNCH((residual_norm_any_kernel<X, Y>), blocks, threads, 0, stream, a, plan);
    check_launch("residual_norm_any_kernel");
  });
}

}  // namespace pyvidx
#endif
