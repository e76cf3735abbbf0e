// A thread takes 16 bytes, or one element where a tensor is not aligned or ends in less. Traffic: 2 passes, 3 backward.
//
// Versions: half; registers on sm_70 and sm_90, instructions per 16 bytes moved; shares of copy on V100, H100, H200 as
// `pyvidx bench predict` has them.
//   IEEE division, exact exponential   23, 25   110   1.00  .96  .87
//   one instruction for each           29, 28    46   1.00  .99  .98
//   that, two packs a thread           32, 32    43   no gain: 32 KB are under way in a multiprocessor anyway
// Backward: 30, 30 registers, 89 instructions, 1.00 .98 .93 before; 32, 32, 48, 1.00 1.00 .99 now.
#include "block.cuh"
#include "pyvidx/quick_gelu.h"

namespace pyvidx::cuda {

constexpr int kActivationThreads = 256;

template <typename A>
struct Gate {
  A open, shut;  // s = sigmoid(1.702 x) and 1 - s, which a subtraction would leave without its last bits
};

template <typename T>
__device__ __forceinline__ Gate<Acc<T>> gate_of(Acc<T> x) {
  Acc<T> e, larger;  // exp(-|1.702 x|), and the larger of the two, 1 / (1 + e)
  if constexpr (sizeof(T) == 2) {
    e = power_of_two(fabsf(x) * float(-kQuickGELU * 1.4426950408889634));
    larger = reciprocal(1 + e);
  } else if constexpr (sizeof(T) == 4) {
    e = expf(fabsf(x) * float(-kQuickGELU));  // the power's own rounding would show
    larger = refined_reciprocal(1 + e);
  } else {
    e = exp(fabs(x) * -kQuickGELU);
    larger = refined_reciprocal(1 + e);
  }
  return x < 0 ? Gate<Acc<T>>{e * larger, larger} : Gate<Acc<T>>{larger, e * larger};
}

template <typename T, int kSize>
__global__ __launch_bounds__(kActivationThreads) void quick_gelu_kernel(QuickGELUArgs a) {
  const int64_t first = (int64_t(blockIdx.x) * kActivationThreads + threadIdx.x) * kSize;
  if (first >= a.x.size[0]) return;
  Acc<T> x[kSize];
  load_pack<T, kSize>(static_cast<const T*>(a.x.data) + first, x);
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] *= gate_of<T>(x[i]).open;
  store_pack<T, kSize>(static_cast<T*>(a.out.data) + first, x);
}

template <typename T, int kSize>
__global__ __launch_bounds__(kActivationThreads) void quick_gelu_backward_kernel(QuickGELUBackwardArgs a) {
  const int64_t first = (int64_t(blockIdx.x) * kActivationThreads + threadIdx.x) * kSize;
  if (first >= a.x.size[0]) return;
  Acc<T> x[kSize], grad[kSize];
  load_pack<T, kSize>(static_cast<const T*>(a.x.data) + first, x);
  load_pack<T, kSize>(static_cast<const T*>(a.grad_out.data) + first, grad);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const Gate<Acc<T>> gate = gate_of<T>(x[i]);
    grad[i] *= gate.open * (1 + Acc<T>(kQuickGELU) * x[i] * gate.shut);
  }
  store_pack<T, kSize>(static_cast<T*>(a.grad_x.data) + first, grad);
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
