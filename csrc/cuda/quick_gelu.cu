// A thread takes 16 bytes, or one element where a tensor is not aligned or ends in less. With a bias it takes these
// channels of several rows: it reads the bias once, has a few loads of each tensor under way and keeps the bias's sums
// in registers; it writes them once, and a second kernel adds the parts up. Traffic: 2 passes, 3 backward.
#include "block.cuh"
#include "pyvidx/quick_gelu.h"
#include "row_sums.cuh"

namespace pyvidx::cuda {

constexpr int kActivationThreads = 256;
// With a bias; two of 16 bits, so that three blocks fit a multiprocessor.
template <typename T>
constexpr int kRows = sizeof(T) == 2 ? 2 : 4;

template <typename A>
__device__ __forceinline__ A gate_of(A scaled) {  // sigmoid(1.702 v)
  return A(1) / (A(1) + exp(-scaled));
}

template <typename A>
__device__ __forceinline__ A activated(A v) {
  return v * gate_of(v * A(kQuickGELU));
}

template <typename A>
__device__ __forceinline__ A slope(A v) {
  const A scaled = v * A(kQuickGELU), s = gate_of(scaled);
  return s * (1 + scaled * (1 - s));
}

template <typename T, int kSize>
__global__ __launch_bounds__(kActivationThreads) void quick_gelu_kernel(QuickGELUArgs a) {
  const int64_t i = (int64_t(blockIdx.x) * kActivationThreads + threadIdx.x) * kSize;
  if (i >= a.x.size[0]) return;
  Acc<T> x[kSize];
  load_pack<T, kSize>(a.x.at<const T>(i), x);
#pragma unroll
  for (int j = 0; j < kSize; ++j) x[j] = activated(x[j]);
  store_pack<T, kSize>(a.out.at<T>(i), x);
}

template <typename T, int kSize>
__global__ __launch_bounds__(kActivationThreads) void quick_gelu_backward_kernel(QuickGELUBackwardArgs a) {
  const int64_t i = (int64_t(blockIdx.x) * kActivationThreads + threadIdx.x) * kSize;
  if (i >= a.x.size[0]) return;
  Acc<T> x[kSize], grad[kSize];
  load_pack<T, kSize>(a.x.at<const T>(i), x);
  load_pack<T, kSize>(a.grad_out.at<const T>(i), grad);
#pragma unroll
  for (int j = 0; j < kSize; ++j) grad[j] *= slope(x[j]);
  store_pack<T, kSize>(a.grad_x.at<T>(i), grad);
}

// ---- with a bias ----

// Threads are numbered through the packs of a row, then the chunks of rows: neighbours read neighbouring bytes.
struct RowPlan {
  int64_t rows, C, packs, chunk;
};

struct Share {
  int64_t part, c, begin, end;  // channels from c of rows [begin, end)
};

template <int kSize>
__device__ __forceinline__ Share share_of(const RowPlan& plan) {
  const int64_t item = int64_t(blockIdx.x) * kActivationThreads + threadIdx.x, part = item / plan.packs;
  const int64_t begin = part * plan.chunk, end = begin + plan.chunk;
  return {part, (item - part * plan.packs) * kSize, begin, end < plan.rows ? end : plan.rows};
}

// A few rows from `row` on; past the end the last one again, so that no load waits for a branch.
template <typename T, int kSize>
__device__ __forceinline__ void load_rows(const View<1>& x, const RowPlan& plan, const Share& share, int64_t row,
                                          Acc<T> (&out)[kRows<T>][kSize]) {
#pragma unroll
  for (int k = 0; k < kRows<T>; ++k) {
    const int64_t at = row + k < share.end ? row + k : share.end - 1;
    load_pack<T, kSize>(x.at<const T>(at * plan.C + share.c), out[k]);
  }
}

template <typename T, int kSize>
__global__ __launch_bounds__(kActivationThreads) void quick_gelu_bias_kernel(QuickGELUArgs a, RowPlan plan) {
  const Share share = share_of<kSize>(plan);
  if (share.begin >= share.end) return;
  Acc<T> bias[kSize], x[kRows<T>][kSize];
  load_pack<T, kSize>(a.bias.at<const T>(share.c), bias);
  load_rows<T, kSize>(a.x, plan, share, share.begin, x);
#pragma unroll
  for (int k = 0; k < kRows<T>; ++k) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[k][j] = activated(x[k][j] + bias[j]);
    const int64_t row = share.begin + k;
    if (row < share.end) store_pack<T, kSize>(a.out.at<T>(row * plan.C + share.c), x[k]);
  }
}

template <typename T, int kSize, bool kSums>
__global__ __launch_bounds__(kActivationThreads) void quick_gelu_bias_backward_kernel(QuickGELUBackwardArgs a,
                                                                                      RowPlan plan) {
  const Share share = share_of<kSize>(plan);
  if (share.begin >= share.end) return;
  Acc<T> bias[kSize], sum[kSize] = {};
  load_pack<T, kSize>(a.bias.at<const T>(share.c), bias);
  for (int64_t first = share.begin; first < share.end; first += kRows<T>) {
    Acc<T> x[kRows<T>][kSize], grad[kRows<T>][kSize];
    load_rows<T, kSize>(a.x, plan, share, first, x);
    load_rows<T, kSize>(a.grad_out, plan, share, first, grad);
#pragma unroll
    for (int k = 0; k < kRows<T>; ++k) {
      const int64_t row = first + k;
      if (row >= share.end) break;
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        grad[k][j] *= slope(x[k][j] + bias[j]);
        if constexpr (kSums) sum[j] += grad[k][j];
      }
      if (a.grad_x) store_pack<T, kSize>(a.grad_x.at<T>(row * plan.C + share.c), grad[k]);
    }
  }
  if constexpr (kSums) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) *a.partial.at<Acc<T>>(share.part, share.c + j) = sum[j];
  }
}

template <typename T>
__global__ __launch_bounds__(kAddUpThreads) void quick_gelu_add_up_kernel(QuickGELUBackwardArgs a) {
  const int64_t C = a.grad_bias.size[0];
  add_up(a.partial.at<const Acc<T>>(), C, a.partial.size[0], C,
         [&](int64_t c, Acc<T> sum) { *a.grad_bias.at<T>(c) = from_acc<T>(sum); });
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

int64_t activation_blocks(int64_t n, int size) { return ceil_div(n, int64_t(kActivationThreads) * size); }

RowPlan plan_of(int64_t n, int64_t C, int size, int64_t chunk) { return {n / C, C, C / size, chunk}; }

int64_t plan_blocks(const RowPlan& plan) {
  return ceil_div(ceil_div(plan.rows, plan.chunk) * plan.packs, kActivationThreads);
}

// f(std::integral_constant<int, channels of a thread>)
template <typename T, typename F>
void with_size(bool whole, F&& f) {
  if (whole) return f(std::integral_constant<int, kVec<T>>{});
  f(std::integral_constant<int, 1>{});
}

template <typename T, int kSize>
void launch(const QuickGELUArgs& a, cudaStream_t stream) {
  const int64_t n = a.x.size[0];
  if (a.bias) {
    const RowPlan plan = plan_of(n, a.bias.size[0], kSize, kRows<T>);
    PYVIDX_LAUNCH((quick_gelu_bias_kernel<T, kSize>), plan_blocks(plan), kActivationThreads, 0, stream, a, plan);
    return check_launch("quick_gelu_bias_kernel");
  }
  PYVIDX_LAUNCH((quick_gelu_kernel<T, kSize>), activation_blocks(n, kSize), kActivationThreads, 0, stream, a);
  check_launch("quick_gelu_kernel");
}

template <typename T, int kSize, bool kSums>
void launch_rows(const QuickGELUBackwardArgs& a, cudaStream_t stream) {
  const int64_t n = a.x.size[0], C = a.bias.size[0];
  const RowPlan plan = plan_of(n, C, kSize, kSums ? a.chunk : kRows<T>);
  PYVIDX_LAUNCH((quick_gelu_bias_backward_kernel<T, kSize, kSums>), plan_blocks(plan), kActivationThreads, 0, stream, a,
                plan);
  check_launch("quick_gelu_bias_backward_kernel");
}

template <typename T, int kSize>
void launch_backward(const QuickGELUBackwardArgs& a, cudaStream_t stream) {
  if (a.grad_bias) return launch_rows<T, kSize, true>(a, stream);
  if (a.bias) return launch_rows<T, kSize, false>(a, stream);
  PYVIDX_LAUNCH((quick_gelu_backward_kernel<T, kSize>), activation_blocks(a.x.size[0], kSize), kActivationThreads, 0,
                stream, a);
  check_launch("quick_gelu_backward_kernel");
}

}  // namespace

void quick_gelu_cuda(const QuickGELUArgs& args, cudaStream_t stream) {
  if (args.x.size[0] == 0) return;
  visit_dtype<float, double, __half, __nv_bfloat16>("quick_gelu", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    with_size<T>(vectorizable<T>(args.x) && vectorizable<T>(args.bias) && vectorizable<T>(args.out),
                 [&](auto size) { launch<T, decltype(size)::value>(args, stream); });
  });
}

void quick_gelu_backward_cuda(const QuickGELUBackwardArgs& args, cudaStream_t stream) {
  visit_dtype<float, double, __half, __nv_bfloat16>("quick_gelu_backward", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (args.x.size[0] > 0) {
      with_size<T>(vectorizable<T>(args.grad_out) && vectorizable<T>(args.x) && vectorizable<T>(args.bias) &&
                       vectorizable<T>(args.grad_x),
                   [&](auto size) { launch_backward<T, decltype(size)::value>(args, stream); });
    }
    if (!args.grad_bias) return;
    PYVIDX_LAUNCH(quick_gelu_add_up_kernel<T>, add_up_blocks(args.grad_bias.size[0]), kAddUpThreads, 0, stream, args);
    check_launch("quick_gelu_add_up_kernel");
  });
}

}  // namespace pyvidx
#endif
