// A thread takes 16 bytes, or one element where a tensor is not aligned or ends in less. Traffic: 2 passes, 3 backward.
#include "block.cuh"
#include "pyvidx/quick_gelu.h"

namespace pyvidx::cuda {

constexpr int kActivationThreads = 256;

template <typename T>
__device__ __forceinline__ Acc<T> gate_of(Acc<T> scaled) {  // sigmoid(1.702 x)
  return Acc<T>(1) / (Acc<T>(1) + exp(-scaled));
}

template <typename T, int kSize>
__global__ __launch_bounds__(kActivationThreads) void quick_gelu_kernel(QuickGELUArgs a) {
  const int64_t i = (int64_t(blockIdx.x) * kActivationThreads + threadIdx.x) * kSize;
  if (i >= a.x.size[0]) return;
  Acc<T> x[kSize];
  load_pack<T, kSize>(a.x.at<const T>(i), x);
#pragma unroll
  for (int j = 0; j < kSize; ++j) x[j] *= gate_of<T>(x[j] * Acc<T>(kQuickGELU));
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
  for (int j = 0; j < kSize; ++j) {
    const Acc<T> scaled = x[j] * Acc<T>(kQuickGELU), s = gate_of<T>(scaled);
    grad[j] *= s * (1 + scaled * (1 - s));
  }
  store_pack<T, kSize>(a.grad_x.at<T>(i), grad);
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

unsigned activation_blocks(int64_t n, int size) {
  return checked_grid(ceil_div(n, int64_t(kActivationThreads) * size));
}

}  // namespace

void quick_gelu_cuda(const QuickGELUArgs& args, cudaStream_t stream) {
  const int64_t n = args.x.size[0];
  if (n == 0) return;
  visit_dtype<float, double, __half, __nv_bfloat16>("quick_gelu", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (vectorizable<T>(args.x) && vectorizable<T>(args.out)) {
      PYVIDX_LAUNCH((quick_gelu_kernel<T, kVec<T>>), activation_blocks(n, kVec<T>), kActivationThreads, 0, stream,
                    args);
    } else {
      PYVIDX_LAUNCH((quick_gelu_kernel<T, 1>), activation_blocks(n, 1), kActivationThreads, 0, stream, args);
    }
  });
  check_launch("quick_gelu_kernel");
}

void quick_gelu_backward_cuda(const QuickGELUBackwardArgs& args, cudaStream_t stream) {
  const int64_t n = args.x.size[0];
  if (n == 0) return;
  visit_dtype<float, double, __half, __nv_bfloat16>("quick_gelu_backward", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (vectorizable<T>(args.grad_out) && vectorizable<T>(args.x) && vectorizable<T>(args.grad_x)) {
      PYVIDX_LAUNCH((quick_gelu_backward_kernel<T, kVec<T>>), activation_blocks(n, kVec<T>), kActivationThreads, 0,
                    stream, args);
    } else {
      PYVIDX_LAUNCH((quick_gelu_backward_kernel<T, 1>), activation_blocks(n, 1), kActivationThreads, 0, stream, args);
    }
  });
  check_launch("quick_gelu_backward_kernel");
}

}  // namespace pyvidx
#endif
