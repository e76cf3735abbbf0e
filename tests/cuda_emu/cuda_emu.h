// CUDA C++ for g++: runs kernels on the CPU, one fiber per CUDA thread, for tests only.
//
// Blocks run one after another; the threads of a block run in the order PYVIDX_EMU_ORDER says (forward, reverse,
// random, random:<seed>) and switch only where they wait for each other. The same source builds plain, with
// -fsanitize=address,undefined and with -fsanitize=thread, where every CUDA thread is a thread for the race detector.
//
// Checked: launches on another stream than the op was given, barriers that not all threads reach, lanes missing from a
// mask, cp.async that is never waited for or reads out of bounds, launches the GPU would refuse, launches without
// check_launch, shared memory read before it is written (it starts as NaN). Under ThreadSanitizer: missing barriers;
// blocks are not checked against each other. Not shown: speed, registers, coalescing, bank conflicts, memory order
// between blocks, inline PTX.
//
// PYVIDX_EMU_SMEM=<bytes>, _SMS=<number> and _CAPABILITY=<70> describe the pretended device. PYVIDX_EMU_LOG=<file>
// lists the launches; with PYVIDX_EMU_DRY=<n> those of more than n threads are not run, but for kernels with
// PYVIDX_EMU_RUN=<word> in their name.
#pragma once

#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly; other machines need their own in engine.cpp"
#endif

#include <driver_types.h>  // cudaStream_t, cudaError_t; defines the qualifiers redefined below

#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "engine.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __noinline__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __grid_constant__
#define __noinline__  // empty: headers of g++ use the word as the name of an attribute
#define __launch_bounds__(...)
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ alignas(65536) static  // leaves room that shared_memory.cpp turns into red zones
#else
#define __shared__ static
#endif

// Set by the engine whenever it switches threads.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuemu {

// As a kernel finds its parameters in constant memory: each at the next multiple of its alignment.
template <typename... Parameters>
std::vector<unsigned char> parameter_bytes(const std::tuple<Parameters...>& parameters) {
  std::vector<unsigned char> bytes;
  const auto add = [&bytes](const auto& parameter) {
    const size_t at =
        (bytes.size() + alignof(decltype(parameter)) - 1) / alignof(decltype(parameter)) * alignof(decltype(parameter));
    bytes.resize(at + sizeof parameter);
    std::memcpy(bytes.data() + at, &parameter, sizeof parameter);
  };
  std::apply([&add](const auto&... parameter) { (add(parameter), ...); }, parameters);
  return bytes;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Arguments&&... arguments) {
  // Converted to the kernel's parameter types once, as a launch does, and copied for each thread. Shared: a graph may
  // keep it.
  struct Context {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const auto context = std::make_shared<const Context>(
      Context{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)});
  const auto call = [](const void* p) {
    const Context& c = *static_cast<const Context*>(p);
    std::apply(c.kernel, c.parameters);
  };
  run_grid({name, reinterpret_cast<const void*>(kernel), call, context, parameter_bytes(context->parameters)}, grid,
           block, shared_bytes, stream);
}

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// `source` is relative to the segment of `width` lanes; out of it, a lane keeps its own value.
template <typename T, typename Source>
T shuffle(unsigned mask, T value, int width, Site site, Source source) {
  const int segment = lane() & ~(width - 1), inside = lane() & (width - 1);
  int from = source(inside);
  from = segment + (from < 0 || from >= width ? inside : from);
  const Lanes lanes = sync_warp(mask, to_bits(value), false, site);
  if (!(lanes.present >> from & 1)) fail("shuffle reads a lane that is not in the mask or has returned", site);
  return from_bits<T>(lanes.value[from]);
}

template <typename T, typename Combine>
T reduce(unsigned mask, T value, Site site, Combine combine) {
  const Lanes lanes = sync_warp(mask, to_bits(value), false, site);
  T result = value;
  bool first = true;
  for (int i = 0; i < 32; ++i) {
    if (!(lanes.present >> i & 1)) continue;
    const T other = from_bits<T>(lanes.value[i]);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}

}  // namespace cuemu

// ---- barriers, shuffles, votes ----

inline void __syncthreads(cuemu::Site site = cuemu::here()) { cuemu::sync_block(false, site); }
inline int __syncthreads_count(int p, cuemu::Site site = cuemu::here()) { return cuemu::sync_block(p, site); }
inline int __syncthreads_or(int p, cuemu::Site site = cuemu::here()) { return cuemu::sync_block(p, site) > 0; }
inline int __syncthreads_and(int p, cuemu::Site site = cuemu::here()) { return cuemu::sync_block(!p, site) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu, cuemu::Site site = cuemu::here()) {
  cuemu::sync_warp(mask, 0, true, site);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, cuemu::Site site = cuemu::here()) {
  return cuemu::shuffle(mask, value, width, site, [=](int) { return source & (width - 1); });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, cuemu::Site site = cuemu::here()) {
  return cuemu::shuffle(mask, value, width, site, [=](int inside) { return inside ^ bits; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, cuemu::Site site = cuemu::here()) {
  return cuemu::shuffle(mask, value, width, site, [=](int inside) { return inside - int(delta); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, cuemu::Site site = cuemu::here()) {
  return cuemu::shuffle(mask, value, width, site, [=](int inside) { return inside + int(delta); });
}

inline unsigned __ballot_sync(unsigned mask, int p, cuemu::Site site = cuemu::here()) {
  const cuemu::Lanes lanes = cuemu::sync_warp(mask, p != 0, false, site);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= unsigned((lanes.present >> i & 1) && lanes.value[i]) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int p, cuemu::Site site = cuemu::here()) {
  return __ballot_sync(mask, p, site) != 0;
}
inline int __all_sync(unsigned mask, int p, cuemu::Site site = cuemu::here()) {
  return __ballot_sync(mask, !p, site) == 0;
}
// Which lanes happen to run together is up to the machine; here each runs alone.
inline unsigned __activemask() { return 1u << cuemu::lane(); }

template <typename T>
T __reduce_add_sync(unsigned mask, T x, cuemu::Site site = cuemu::here()) {
  return cuemu::reduce(mask, x, site, [](T a, T b) { return T(a + b); });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T x, cuemu::Site site = cuemu::here()) {
  return cuemu::reduce(mask, x, site, [](T a, T b) { return b < a ? b : a; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T x, cuemu::Site site = cuemu::here()) {
  return cuemu::reduce(mask, x, site, [](T a, T b) { return a < b ? b : a; });
}

[[noreturn]] inline void __trap(cuemu::Site site = cuemu::here()) { cuemu::fail("__trap", site); }

// ---- runtime API: what launch.cuh calls ----

cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

#include "device_math.h"
