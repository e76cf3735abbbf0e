// Kernels with planted bugs, each beside its correct self: they test the emulator (tests/test_cuda_emu.py).
#include "mma.cuh"
#ifndef __CUDACC_RTC__
#include <cstdio>
#include <vector>
#endif

namespace pyvidx::cuda {

constexpr int kThreads = 128;

template <bool kBug>
__global__ void out_of_bounds_kernel(float* out, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kBug ? i <= n : i < n) out[i] = 1.f;
}

__device__ __attribute__((noinline)) void write_one(float* p) { *p = 1.f; }

// One past a row of shared memory, where the compiler does not know which object it is.
template <bool kBug>
__global__ void static_shared_overflow_kernel(float* out) {
  __shared__ float s[kThreads];
  write_one(s + threadIdx.x + (kBug ? 1 : 0));
  __syncthreads();
  out[threadIdx.x] = s[0];
}

template <bool kBug>
__global__ void dynamic_shared_overflow_kernel(float* out) {
  PYVIDX_SHARED(float, s);
  s[threadIdx.x + (kBug ? 1 : 0)] = 1.f;
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x];
}

template <bool kBug>
__global__ void misaligned_kernel(const float* x, float* out) {
  float v[4];
  load_vec(x + 4 * threadIdx.x + (kBug ? 1 : 0), v);
  out[threadIdx.x] = v[0];
}

template <bool kBug>
__global__ void missing_syncthreads_kernel(float* out) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = float(threadIdx.x);
  if (!kBug) __syncthreads();
  out[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

// A shuffle makes the lanes meet but orders no memory.
template <bool kBug>
__global__ void missing_syncwarp_kernel(float* out) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = float(threadIdx.x);
  if (kBug) {
    __shfl_sync(kFullWarp, 0, 0);
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}

// The reductions of block.cuh twice in a row: their scratch is reused.
template <bool kBug>
__global__ void block_sum_kernel(float* out) {
  float first = block_sum<kThreads>(1.f);
  float second[2] = {first, float(threadIdx.x)};
  block_sum<kThreads>(second);
  const int thread = int(threadIdx.x);
  const ArgMax<float> most = block_argmax<kThreads>(ArgMax<float>{float(thread / 2), thread}, -1.f);
  const ArgMax<float> nan = block_argmax<kThreads>(ArgMax<float>{thread < 77 ? 1e9f : nanf(""), thread}, -1.f);
  const float largest = block_max<kThreads>(-float(thread ^ 5), -1e9f);
  // 128 * 128 + 8128, the first of the largest pair 126, the first NaN 77, and -0
  out[threadIdx.x] = second[0] + second[1] + float(most.index) + float(nan.index) + largest;
}

template <bool kBug>
__global__ void missing_wait_kernel(const float* x, float* out) {
  PYVIDX_SHARED(float, s);
  cp_async<4>(s + threadIdx.x, x + threadIdx.x);
  cp_async_commit();
  if (!kBug) cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

// Two stages under way, the first one read: wait<1> is enough, wait<2> is not.
template <bool kBug>
__global__ void wait_for_too_few_kernel(const float* x, float* out) {
  PYVIDX_SHARED(float, s);
  for (int stage = 0; stage < 2; ++stage) {
    cp_async<4>(s + stage * kThreads + threadIdx.x, x + stage * kThreads + threadIdx.x);
    cp_async_commit();
  }
  cp_async_wait<kBug ? 2 : 1>();
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x ^ 32];
  __syncthreads();
  cp_async_wait_all();
}

template <bool kBug>
__global__ void missing_barrier_after_wait_kernel(const float* x, float* out) {
  PYVIDX_SHARED(float, s);
  cp_async<4>(s + threadIdx.x, x + threadIdx.x);
  cp_async_wait_all();
  if (!kBug) __syncthreads();
  out[threadIdx.x] = s[kThreads - 1 - threadIdx.x];
}

template <bool kBug>
__global__ void divergent_barrier_kernel(float* out) {
  if (kBug && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = float(__syncthreads_count(threadIdx.x % 2));
}

template <bool kBug>
__global__ void partial_barrier_kernel(float* out) {
  if (!kBug || threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1.f;
}

template <bool kBug>
__global__ void missing_lane_kernel(float* out) {
  if (kBug && threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = warp_sum(1.f);
}

template <bool kBug>
__global__ void uninitialized_static_kernel(float* out) {
  __shared__ float s[kThreads];
  if (!kBug || blockIdx.x == 0) s[threadIdx.x] = 1.f;  // the next block must not find what this one wrote
  out[threadIdx.x] = s[threadIdx.x];
}

template <bool kBug>
__global__ void uninitialized_dynamic_kernel(float* out) {
  PYVIDX_SHARED(float, s);
  if (!kBug || threadIdx.x != 5) s[threadIdx.x] = 1.f;
  out[threadIdx.x] = s[threadIdx.x];
}

// 64 tiles whose 8 products are 3/4 of a float's last bit beside 1: rounded to nearest each adds a whole bit, truncated
// none. (With shuffles products are added one by one, and are lost as well.)
template <bool kBug>
__global__ void tile_sums_kernel(float* out) {
  float sum[4] = {1.f, 1.f, 1.f, 1.f};
  const float a[4] = {0x3p-14f, 0x3p-14f, 0x3p-14f, 0x3p-14f}, b[2] = {0x1p-14f, 0x1p-14f};
  for (int i = 0; i < 64; ++i) {
    if constexpr (kBug && kTensorCores<float>) {
      unsigned x[4], y[2];
      for (int k = 0; k < 4; ++k) x[k] = to_tf32(a[k]);
      for (int k = 0; k < 2; ++k) y[k] = to_tf32(b[k]);
      tensor_mma<float>(sum, x, y);
    } else {
      mma<float>(sum, a, b);
    }
  }
  out[threadIdx.x] = (sum[threadIdx.x % 4] - 1.f) * 0x1p23f;
}

#ifndef __CUDACC_RTC__

template <bool kBug>
void launch(const std::string& name, const float* x, float* out) {
  const auto bytes = [](int n) { return sizeof(float) * size_t(n); };
#define ONE(kernel, grid, smem, ...)                                                  \
  if (name == #kernel) {                                                              \
    PYVIDX_LAUNCH(kernel##_kernel<kBug>, grid, kThreads, smem, nullptr, __VA_ARGS__); \
    return check_launch(#kernel "_kernel");                                           \
  }
  ONE(out_of_bounds, 2, 0, out, kThreads)
  ONE(static_shared_overflow, 1, 0, out)
  ONE(dynamic_shared_overflow, 1, bytes(kThreads), out)
  ONE(misaligned, 1, 0, x, out)
  ONE(missing_syncthreads, 1, 0, out)
  ONE(missing_syncwarp, 1, 0, out)
  ONE(block_sum, 1, 0, out)
  ONE(missing_wait, 1, bytes(kThreads), x, out)
  ONE(wait_for_too_few, 1, bytes(2 * kThreads), x, out)
  ONE(missing_barrier_after_wait, 1, bytes(kThreads), x, out)
  ONE(divergent_barrier, 1, 0, out)
  ONE(partial_barrier, 1, 0, out)
  ONE(missing_lane, 1, 0, out)
  ONE(uninitialized_static, 2, 0, out)
  ONE(uninitialized_dynamic, 1, bytes(kThreads), out)
  ONE(tile_sums, 1, 0, out)
  if (name == "too_many_threads") {
    PYVIDX_LAUNCH(partial_barrier_kernel<false>, 1, kBug ? 1025 : kThreads, 0, nullptr, out);
    return check_launch("partial_barrier_kernel");
  }
  if (name == "shared_memory_not_asked_for") {
    const size_t want = 60 * 1024;
    if (!kBug) set_max_dynamic_smem(uninitialized_dynamic_kernel<kBug>, want);
    PYVIDX_LAUNCH(uninitialized_dynamic_kernel<kBug>, 1, kThreads, want, nullptr, out);
    return check_launch("uninitialized_dynamic_kernel");
  }
  if (name == "more_shared_memory_than_there_is") {
    return set_max_dynamic_smem(dynamic_shared_overflow_kernel<kBug>, device_smem() + (kBug ? 1 : 0));
  }
  if (name == "other_stream") {
    const auto other = reinterpret_cast<cudaStream_t>(uintptr_t(kBug ? 1 : 0));
    PYVIDX_LAUNCH(partial_barrier_kernel<false>, 1, kThreads, 0, other, out);
    return check_launch("partial_barrier_kernel");
  }
  if (name == "too_many_blocks") {  // one more than 2^32: a conversion to 32 bits leaves one
    PYVIDX_LAUNCH(partial_barrier_kernel<false>, kBug ? (int64_t(1) << 32) + 1 : 1, kThreads, 0, nullptr, out);
    return check_launch("partial_barrier_kernel");
  }
  if (name == "launch_not_checked") {
    PYVIDX_LAUNCH(partial_barrier_kernel<false>, 1, kThreads, 0, nullptr, out);
    if (!kBug) check_launch("partial_barrier_kernel");
    PYVIDX_LAUNCH(partial_barrier_kernel<false>, 1, kThreads, 0, nullptr, out);
    return check_launch("partial_barrier_kernel");
  }
  throw std::invalid_argument("no kernel " + name);
#undef ONE
}

#endif

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__

// Runs a kernel on x[i] = i; result: the kThreads outputs. Returns 0, or 1 and a message.
extern "C" __attribute__((visibility("default"))) int run_fault(const char* name, int bug, float* result, char* message,
                                                                size_t message_size) {
  namespace cuda = pyvidx::cuda;
  std::vector<float> x(4 * cuda::kThreads + 4);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  const std::vector<float> poison(cuda::kThreads, -1.f);
  std::vector<float> out = poison;
  out.shrink_to_fit();
  message[0] = 0;
  try {
    bug ? cuda::launch<true>(name, x.data(), out.data()) : cuda::launch<false>(name, x.data(), out.data());
  } catch (const std::exception& error) {
    std::snprintf(message, message_size, "%s", error.what());
    return 1;
  }
  std::copy(out.begin(), out.end(), result);
  return 0;
}
#endif
