// What a kernel file needs around its kernels, so that one source compiles with
//   nvcc                 the library,
//   NVRTC                device code alone, for GPUs this nvcc no longer knows (sm_70); host code is inside
//                        `#ifndef __CUDACC_RTC__`, kernels are in the named namespace pyvidx::cuda,
//   g++ -DPYVIDX_EMU     the emulator of tests/cuda_emu, which runs the kernels on the CPU in the tests.
//
// A kernel file reads:
//   #include "pyvidx/<op>.h"
//   #include "block.cuh"  // or launch.cuh
//   namespace pyvidx::cuda {
//   constexpr int kThreads = 256;  // one name for __launch_bounds__, the reductions and the launcher
//   template <typename T> __global__ __launch_bounds__(kThreads) void <op>_kernel(<Op>Args args) { ... }
//   }  // namespace pyvidx::cuda
//   #ifndef __CUDACC_RTC__
//   namespace pyvidx { void <op>_cuda(const <Op>Args& args, cudaStream_t stream) { ... } }
//   #endif
//
// Inline PTX and what needs a newer GPU stay behind a wrapper here with a plain path beside it.
#pragma once

#if defined(PYVIDX_EMU)
#include "cuda_emu.h"
#elif !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

#ifndef __CUDACC_RTC__
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#endif

// PYVIDX_LAUNCH((some_kernel<T, 4>), grid, block, shared_bytes, stream, args...); parentheses where the name has a
// comma. grid: a number of blocks or a Grid, which checked_grid has to accept.
#if defined(PYVIDX_EMU)
#define PYVIDX_LAUNCH(kernel, grid, block, smem, stream, ...)                                                      \
  cuemu::launch(#kernel, kernel, ::pyvidx::cuda::checked_grid(#kernel, grid), dim3(block), size_t(smem), (stream), \
                __VA_ARGS__)
#elif !defined(__CUDACC_RTC__)
#define PYVIDX_LAUNCH(kernel, grid, block, smem, stream, ...) \
  (kernel)<<<::pyvidx::cuda::checked_grid(#kernel, grid), dim3(block), size_t(smem), (stream)>>>(__VA_ARGS__)
#endif

// PYVIDX_SHARED(T, name): the dynamic shared memory of the launch as `T* name`, 16-byte aligned.
#if defined(PYVIDX_EMU)
#define PYVIDX_SHARED(T, name) T* const name = static_cast<T*>(cuemu::dynamic_shared())
#else
#define PYVIDX_SHARED(T, name)                                \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  T* const name = reinterpret_cast<T*>(name##_raw)
#endif

namespace pyvidx::cuda {

// A pointer to shared memory that stays in a register: on sm_90 nvcc works such addresses out anew before each use,
// from a special register that takes as long as the memory.
template <typename T>
__device__ __forceinline__ T* held(T* shared) {
#if defined(__CUDA_ARCH__)
  unsigned address = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
#else
  return shared;
#endif
}

constexpr unsigned kFullWarp = 0xffffffffu;

// Copy kBytes (4, 8 or 16, both sides aligned to it) from global to shared memory without passing through registers
// (sm_80 and newer; a plain copy before). Readable only after cp_async_wait and a __syncthreads.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if defined(PYVIDX_EMU)
  cuemu::cp_async(shared, global, kBytes);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {  // .cg skips L1: a staged tile is read once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(address), "l"(global), "n"(kBytes) : "memory");
  }
#else
  if constexpr (kBytes == 16) {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(shared) = *static_cast<const uint2*>(global);
  } else {
    *static_cast<unsigned*>(shared) = *static_cast<const unsigned*>(global);
  }
#endif
}

// Ask for the cache line of an address in global memory; nothing waits for it.
__device__ __forceinline__ void prefetch_l2([[maybe_unused]] const void* global) {
#if !defined(PYVIDX_EMU)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#endif
}

// Close the group of copies this thread has issued since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if defined(PYVIDX_EMU)
  cuemu::cp_async_commit();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Wait until at most kPending of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if defined(PYVIDX_EMU)
  cuemu::cp_async_wait_group(kPending);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// Wait for all of this thread's copies, committed or not.
__device__ __forceinline__ void cp_async_wait_all() {
#if defined(PYVIDX_EMU)
  cuemu::cp_async_wait_all();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;\n" ::: "memory");
#endif
}

#ifndef __CUDACC_RTC__

// Turn a CUDA error into an exception that names the kernel (or the call). Clears the error, so the next op starts
// clean.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Call right after every launch.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The blocks of a launch, counted in 64 bits.
struct Grid {
  int64_t x, y, z;
  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

// As a launch takes it. More than CUDA's limits is refused here, before a conversion makes a small number of it.
inline dim3 checked_grid(const char* kernel, Grid grid) {
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error(std::string(kernel) + ": a launch has at most (2147483647, 65535, 65535) blocks, got (" +
                             std::to_string(grid.x) + ", " + std::to_string(grid.y) + ", " + std::to_string(grid.z) +
                             "): split the batch");
  }
  return dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
}

// A number that a kernel counts in 32 bits.
inline unsigned narrow(int64_t n, const char* what) {
  if (n < 0 || n > 0xffffffffll) {
    throw std::invalid_argument(std::string(what) + " must be below 2^32, got " + std::to_string(n));
  }
  return unsigned(n);
}

// An attribute of the current device, e.g. cudaDevAttrMultiProcessorCount.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// The most shared memory, in bytes, static and dynamic together, one block may ask for here: 96 KB on sm_70, 64 KB on
// sm_75, 163 KB on sm_80, 227 KB on sm_90. Pick the tile from it.
inline size_t device_smem() { return size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)); }

// Needed before a launch with more than 48 KB of dynamic shared memory; does nothing below.
template <typename Kernel>
void set_max_dynamic_smem(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(bytes)),
             "set_max_dynamic_smem");
}

#endif  // __CUDACC_RTC__

}  // namespace pyvidx::cuda
