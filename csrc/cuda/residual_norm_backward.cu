// A block takes a part: a chunk of rows of one frame. A thread owns the same pack of channels in all of them and keeps
// their two sums in registers, and the next row is under way while it works on one. A second kernel adds the parts up
// in their order. The slots' class rows of a video are one row whose gradients are summed first: all that follows is
// linear in them. Rows of more packs than threads, or not aligned, are read twice and keep their sums in the scratch
// row. Traffic: 4 passes, 5 with grad_y.
//
// Versions, as in residual_norm.cu:
//   a row after the other                          128, 133   84   1    .97  .57  .42
//   the next under way, fp32 across the barrier    120, 115    -   5    4 blocks a multiprocessor
//   that, packed across the barrier                 96,  88   65   5    .98  .92  .87
#include "block.cuh"
#include "pyvidx/residual_norm.h"
#include "pyvidx/row_parts.h"
#include "row_sums.cuh"

namespace pyvidx::cuda {

constexpr int kNormThreads = 512;  // at most
constexpr int kNormWarps = kNormThreads / 32;

struct NormBackwardPlan {
  unsigned class_rows, parts, chunk, chunks;  // blocks: class rows, then parts
  double inverse;                             // 1 / C
};

// What a block works on: rows [first, last) of a slot, or a video's class row.
struct NormPart {
  bool is_class;
  unsigned part;  // of the partial sums
  unsigned b, s;
  unsigned first, last;

  __device__ __forceinline__ NormPart(const ResidualNormBackwardArgs& a, const NormBackwardPlan& plan)
      : is_class(blockIdx.x < plan.class_rows), b(blockIdx.x), s(0), first(0), last(1) {
    part = is_class ? plan.parts + blockIdx.x : blockIdx.x - plan.class_rows;
    if (is_class) return;
    const unsigned frame = part / plan.chunks, S = unsigned(a.value.size[1]), K = unsigned(a.value.size[2]);
    b = frame / S, s = frame - b * S;
    first = (part - frame * plan.chunks) * plan.chunk;
    last = first + plan.chunk < K ? first + plan.chunk : K;
  }
};

// A row's gradients of out and normed, the row itself and its statistics.
template <typename X, typename Y, int kSize>
struct GradientRow {
  Packed<X, kSize> grad, value;
  Packed<Y, kSize> normed;
  Acc<X> mean, rstd;

  __device__ __forceinline__ void load(const ResidualNormBackwardArgs& a, const NormPart& at, int64_t k, int c) {
    grad.load(a.grad_out.at<const X>(at.b, at.s, k, c));
    normed.load(a.grad_normed.at<const Y>(at.b, at.s, k, c));
    value.load(a.value.at<const X>(at.b, at.s, k, c));
    load_stats(a.stats.at<const Acc<X>>(at.b, at.s, k));
  }
  __device__ __forceinline__ void load_stats(const Acc<X>* stats) { mean = stats[0], rstd = stats[1]; }
};

// Blocks of a multiprocessor: as many as keep all in registers.
template <typename X, typename Y, int kThreads>
constexpr int kNormBlocks = kThreads * kVec<Y> > 1024 ? 512 / kThreads
                            : sizeof(Y) == 4          ? 3
                            : sizeof(X) == 4          ? 4
                                                      : 5;

// Rows of up to kThreads packs, aligned.
template <typename X, typename Y, int kThreads>
__global__ __launch_bounds__(kThreads,
                             kNormBlocks<X, Y, kThreads>) void residual_norm_backward_kernel(ResidualNormBackwardArgs a,
                                                                                             NormBackwardPlan plan) {
  constexpr int kSize = kVec<Y>;
  using A = Acc<X>;
  __shared__ A shared[2 * kNormWarps * 2];
  RowSum<2, A, kNormWarps> row_sum{shared};
  const NormPart at(a, plan);
  const int C = int(a.value.size[3]), c = int(threadIdx.x) * kSize;
  const bool mine = c < C;
  Packed<X, kSize> packed_weight = {};
  A to_weight[kSize] = {}, to_shift[kSize] = {};
  if (mine) packed_weight.load_constant(a.weight.at<const X>(c));
  GradientRow<X, Y, kSize> next = {};
  A value[kSize] = {}, g[kSize];
  // g <- the row's whole gradient, of out and through the norm. What is packed is unpacked again behind the barrier: it
  // takes half the registers until then.
  const auto whole = [&](A mean, A rstd, const auto& grad, const auto& packed_normed) {
    A sums[2] = {}, weight[kSize], normed[kSize];
    packed_weight.unpack(weight), packed_normed.unpack(normed);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      value[i] = (value[i] - mean) * rstd;
      sums[0] += normed[i] * weight[i];
      sums[1] += normed[i] * weight[i] * value[i];
    }
    row_sum(sums);
    sums[0] *= A(plan.inverse), sums[1] *= A(plan.inverse);
    grad.unpack(g), packed_weight.unpack(weight), packed_normed.unpack(normed);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      g[i] += (normed[i] * weight[i] - sums[0] - value[i] * sums[1]) * rstd;
      to_weight[i] += normed[i] * value[i], to_shift[i] += normed[i];
    }
  };
  if (at.is_class) {
    const int64_t slots = a.value_cls.size[1];
    A grad[kSize] = {}, normed[kSize] = {};
#pragma unroll 1
    for (int64_t slot = 0; mine && slot < slots; ++slot) {
      A one[kSize], other[kSize];
      load_channels<X, kSize>(a.grad_out_cls.at<const X>(at.b, slot, c), one);
      load_channels<Y, kSize>(a.grad_normed_cls.at<const Y>(at.b, slot, c), other);
#pragma unroll
      for (int i = 0; i < kSize; ++i) grad[i] += one[i], normed[i] += other[i];
    }
    if (mine) load_channels<X, kSize>(a.value_cls.at<const X>(at.b, 0, c), value);
    Packed<A, kSize> grads, normeds;
    memcpy(grads.bits, grad, sizeof grad), memcpy(normeds.bits, normed, sizeof normed);
    const A* const stats = a.stats_cls.at<const A>(at.b);
    whole(stats[0], stats[1], grads, normeds);
    if (mine) {
      store_channels<X, kSize>(a.grad_cls.at<X>(at.b, 0, c), g);
      const A zero[kSize] = {};
#pragma unroll 1
      for (int64_t row = 1; row < a.grad_cls.size[1]; ++row) {
        store_channels<X, kSize>(a.grad_cls.at<X>(at.b, row, c), zero);
      }
#pragma unroll 1
      for (int64_t slot = 0; a.grad_y_cls && slot < slots; ++slot) {
        const A share = *a.share.at<const A>(at.b, slot);
#pragma unroll
        for (int i = 0; i < kSize; ++i) value[i] = g[i] * share;
        store_channels<Y, kSize>(a.grad_y_cls.at<Y>(at.b, slot, c), value);
      }
    }
  } else {
    const A factor = a.factor ? *a.factor.at<const A>(at.b, at.s) : A(1);
    if (mine) next.load(a, at, at.first, c);
#pragma unroll 1
    for (unsigned k = at.first; k < at.last; ++k) {
      const GradientRow<X, Y, kSize> row = next;
      if (mine && k + 1 < at.last) next.load(a, at, k + 1, c);
      row.value.unpack(value);
      whole(row.mean, row.rstd, row.grad, row.normed);
      if (!mine) continue;
      store_channels<X, kSize>(a.grad_x.at<X>(at.b, at.s, k, c), g);
      if (!a.grad_y) continue;
#pragma unroll
      for (int i = 0; i < kSize; ++i) g[i] *= factor;
      store_channels<Y, kSize>(a.grad_y.at<Y>(at.b, at.s, k, c), g);
    }
  }
  if (!mine) return;
  store_channels<A, kSize>(a.partial.at<A>(0, at.part, c), to_weight);
  store_channels<A, kSize>(a.partial.at<A>(1, at.part, c), to_shift);
}

// Any rows, a channel of each thread at a time.
template <typename X, typename Y>
__global__ __launch_bounds__(kNormThreads, 1) void residual_norm_backward_any_kernel(ResidualNormBackwardArgs a,
                                                                                     NormBackwardPlan plan) {
  using A = Acc<X>;
  __shared__ A shared[2 * kNormWarps * 2];
  RowSum<2, A, kNormWarps> row_sum{shared};
  const NormPart at(a, plan);
  const int64_t C = a.value.size[3], slots = at.is_class ? a.value_cls.size[1] : 1;
  const A factor = a.factor && !at.is_class ? *a.factor.at<const A>(at.b, at.s) : A(1);
#pragma unroll 1
  for (int64_t k = at.first; k < at.last; ++k) {
    const A* const stats = at.is_class ? a.stats_cls.at<const A>(at.b) : a.stats.at<const A>(at.b, at.s, k);
    const auto value = [&](int64_t c) {
      const A v = to_acc(at.is_class ? *a.value_cls.at<const X>(at.b, 0, c) : *a.value.at<const X>(at.b, at.s, k, c));
      return (v - stats[0]) * stats[1];
    };
    const auto sum = [&](auto of) {
      A total = 0;
#pragma unroll 1
      for (int64_t slot = 0; slot < slots; ++slot) total += of(slot);
      return total;
    };
    const auto grad = [&](int64_t c) {
      return sum([&](int64_t slot) {
        return to_acc(at.is_class ? *a.grad_out_cls.at<const X>(at.b, slot, c)
                                  : *a.grad_out.at<const X>(at.b, at.s, k, c));
      });
    };
    const auto normed = [&](int64_t c) {
      return sum([&](int64_t slot) {
        return to_acc(at.is_class ? *a.grad_normed_cls.at<const Y>(at.b, slot, c)
                                  : *a.grad_normed.at<const Y>(at.b, at.s, k, c));
      });
    };
    A sums[2] = {};
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
      const A g = normed(c) * to_acc(*a.weight.at<const X>(c));
      sums[0] += g, sums[1] += g * value(c);
    }
    row_sum(sums);
    sums[0] *= A(plan.inverse), sums[1] *= A(plan.inverse);
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
      const A n = normed(c), v = value(c);
      const A g = grad(c) + (n * to_acc(*a.weight.at<const X>(c)) - sums[0] - v * sums[1]) * stats[1];
      A *const scale = a.partial.at<A>(0, at.part, c), *const shift = a.partial.at<A>(1, at.part, c);
      *scale = (k == at.first ? A(0) : *scale) + n * v;  // only this thread touches channel c of this part
      *shift = (k == at.first ? A(0) : *shift) + n;
      if (!at.is_class) {
        *a.grad_x.at<X>(at.b, at.s, k, c) = from_acc<X>(g);
        if (a.grad_y) *a.grad_y.at<Y>(at.b, at.s, k, c) = from_acc<Y>(g * factor);
        continue;
      }
      for (int64_t row = 0; row < a.grad_cls.size[1]; ++row) {
        *a.grad_cls.at<X>(at.b, row, c) = from_acc<X>(row == 0 ? g : A(0));
      }
      for (int64_t slot = 0; a.grad_y_cls && slot < slots; ++slot) {
        *a.grad_y_cls.at<Y>(at.b, slot, c) = from_acc<Y>(g * *a.share.at<const A>(at.b, slot));
      }
    }
  }
}

template <typename X>
__global__ __launch_bounds__(kAddUpThreads, 1) void residual_norm_add_up_kernel(ResidualNormBackwardArgs a,
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

// Threads for rows of C channels in packs of kSize; whole warps.
unsigned norm_threads(int64_t C, int kSize) {
  const int64_t packs = ceil_div(C, kSize);
  return unsigned(packs < kNormThreads ? ceil_div(packs, 32) * 32 : kNormThreads);
}

template <typename X, typename Y, int kThreads>
void launch(const ResidualNormBackwardArgs& a, const NormBackwardPlan& plan, int64_t blocks, cudaStream_t stream) {
  PYVIDX_LAUNCH((residual_norm_backward_kernel<X, Y, kThreads>), blocks, norm_threads(a.value.size[3], kVec<Y>), 0,
                stream, a, plan);
  check_launch("residual_norm_backward_kernel");
}

template <typename X, typename Y>
void launch_parts(const ResidualNormBackwardArgs& a, const NormBackwardPlan& plan, int64_t blocks,
                  cudaStream_t stream) {
  const int64_t C = a.value.size[3];
  if constexpr (!std::is_same_v<X, double>) {  // float64 is for checking gradients
    if (aligned<X, Y>(a) && C <= 1024) return launch<X, Y, 1024 / kVec<Y>>(a, plan, blocks, stream);
    if (aligned<X, Y>(a) && C <= 2048) return launch<X, Y, 2048 / kVec<Y>>(a, plan, blocks, stream);
  }
  PYVIDX_LAUNCH((residual_norm_backward_any_kernel<X, Y>), blocks, norm_threads(C, 1), 0, stream, a, plan);
  check_launch("residual_norm_backward_any_kernel");
}

}  // namespace

void residual_norm_backward_cuda(const ResidualNormBackwardArgs& a, cudaStream_t stream) {
  const int64_t frames = a.value.size[0] * a.value.size[1], K = a.value.size[2], C = a.value.size[3];
  if (C == 0) return;
  const int64_t class_rows = a.grad_cls ? a.value.size[0] : 0, parts = row_parts(frames, K),
                blocks = class_rows + parts;
  NormBackwardPlan plan;
  plan.class_rows = unsigned(class_rows), plan.parts = unsigned(parts);
  plan.chunk = unsigned(row_chunk(frames, K)), plan.chunks = K > 0 ? unsigned(ceil_div(K, plan.chunk)) : 1;
  plan.inverse = 1. / double(C);
  visit_mixed<__half, __nv_bfloat16>("residual_norm_backward", a.value.dtype, a.grad_normed.dtype, [&](auto x, auto y) {
    using X = typename decltype(x)::type;
    using Y = typename decltype(y)::type;
    if (blocks > 0) launch_parts<X, Y>(a, plan, blocks, stream);
    PYVIDX_LAUNCH(residual_norm_add_up_kernel<X>, Grid(add_up_blocks(C), 2), kAddUpThreads, 0, stream, a,
                  unsigned(blocks));
    check_launch("residual_norm_add_up_kernel");
  });
}

}  // namespace pyvidx
#endif
