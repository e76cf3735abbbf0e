// A thread takes 16 bytes, or one element where a tensor is not aligned or ends in less. Traffic: 2 passes, 3 backward.
#include "block.cuh"
#include "pyvidx/quick_gelu.h"

namespace pyvidx::cuda {

constexpr int kActivationThreads = 256;

template <typename A>
__device__ __forceinline__ A gate_of(A scaled) {  // sigmoid(1.702 x)
  return A(1) / (A(1) + exp(-scaled));
}

template <typename A>
__device__ __forceinline__ A slope(A x) {
  const A scaled = x * A(kQuickGELU), s = gate_of(scaled);
  return s * (1 + scaled * (1 - s));
}

template <typename T, int kSize>
__global__ __launch_bounds__(kActivationThreads) void quick_gelu_kernel(QuickGELUArgs a) {
  const int64_t i = (int64_t(blockIdx.x) * kActivationThreads + threadIdx.x) * kSize;
  if (i >= a.x.size[0]) return;
  Acc<T> x[kSize];
  load_pack<T, kSize>(a.x.at<const T>(i), x);
#pragma unroll
  for (int j = 0; j < kSize; ++j) x[j] *= gate_of(x[j] * Acc<T>(kQuickGELU));
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

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

int64_t activation_blocks(int64_t n, int size) { return ceil_div(n, int64_t(kActivationThreads) * size); }

template <typename T, int kSize>
void launch(const QuickGELUArgs& a, cudaStream_t stream) {
  PYVIDX_LAUNCH((quick_gelu_kernel<T, kSize>), activation_blocks(a.x.size[0], kSize), kActivationThreads, 0, stream, a);
  check_launch("quick_gelu_kernel");
}

template <typename T, int kSize>
void launch_backward(const QuickGELUBackwardArgs& a, cudaStream_t stream) {
  PYVIDX_LAUNCH((quick_gelu_backward_kernel<T, kSize>), activation_blocks(a.x.size[0], kSize), kActivationThreads, 0,
                stream, a);
  check_launch("quick_gelu_backward_kernel");
}

}  // namespace

void quick_gelu_cuda(const QuickGELUArgs& args, cudaStream_t stream) {
  if (args.x.size[0] == 0) return;
  visit_dtype<float, double, __half, __nv_bfloat16>("quick_gelu", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool whole = vectorizable<T>(args.x) && vectorizable<T>(args.out);
    whole ? launch<T, kVec<T>>(args, stream) : launch<T, 1>(args, stream);
  });
}

void quick_gelu_backward_cuda(const QuickGELUBackwardArgs& args, cudaStream_t stream) {
  if (args.x.size[0] == 0) return;
  visit_dtype<float, double, __half, __nv_bfloat16>("quick_gelu_backward", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool whole = vectorizable<T>(args.grad_out) && vectorizable<T>(args.x) && vectorizable<T>(args.grad_x);
    whole ? launch_backward<T, kVec<T>>(args, stream) : launch_backward<T, 1>(args, stream);
  });
}

}  // namespace pyvidx
#endif
