// What the forward and the backward kernels of gated_fusion share.
//
// A thread owns the same channels, kSize of them, in every row of its block: w, the norm's parameters and the sums over
// rows stay in its registers, and a LayerNorm is a sum over the block.
#pragma once
#include "block.cuh"
#include "pyvidx/gated_fusion.h"

namespace pyvidx::cuda {

// At most, where a thread owns 16 bytes: rows of 2048 channels. Longer rows are looped over.
template <typename T>
constexpr int kFusionThreads = 2048 / kVec<T>;
// Per multiprocessor, so that the compiler keeps a 16-bit kernel to 80 registers: more loads under way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
template <typename T>
constexpr int kFusionBlocks = sizeof(T) == 2 ? 2 : 1;  // sm_70 would spill at 80
#else
template <typename T>
constexpr int kFusionBlocks = sizeof(T) == 2 ? 3 : 1;
#endif
constexpr int kFusionLoopThreads = 256;
constexpr int kLoopWarps = kFusionLoopThreads / 32;
template <typename T>
constexpr int kRowWarps = kFusionThreads<T> / 32;  // at most, of the kernels that do not loop

enum class Fusion { first, sum, gate };

template <typename A>
__device__ __forceinline__ A sigmoid(A x) {
  const A e = exp(x < 0 ? x : -x), larger = refined_reciprocal(1 + e);  // of sigmoid(|x|): no overflow, no slow path
  return x < 0 ? e * larger : larger;
}

// w of kSize channels from c.
template <typename T, int kSize>
__device__ __forceinline__ void load_mix(const View<1>& gate, double scale, int64_t c, Acc<T> (&w)[kSize]) {
  load_pack<T, kSize>(gate.at<const T>(c), w);
#pragma unroll
  for (int i = 0; i < kSize; ++i) w[i] = sigmoid(w[i] * Acc<T>(scale));
}

struct Patch {
  int64_t t, p;  // frame (pair of frames) and patch in x
};

// Where row k of frame s comes from. An index out of range stops the kernel, as in index_select.
__device__ __forceinline__ Patch source_of(const View<3>& keep, bool tube, int64_t b, int64_t s, int64_t k, int64_t T_,
                                           int64_t P) {
  if (!keep) return {s, k};
  const int64_t index = *keep.at<const int64_t>(b, tube ? 0 : s, k);
  if (index < 0 || index >= (tube ? P : T_ * P)) __trap();
  if (tube) return {s, index};
  const unsigned t = unsigned(index) / unsigned(P);  // the launcher refuses clips of 2^32 tokens
  return {t, int64_t(unsigned(index) - t * unsigned(P))};
}

// A block's rows: `chunk` rows of one frame.
struct Chunk {
  int64_t b, s, begin, end;
};
__device__ __forceinline__ Chunk chunk_of(unsigned unit, unsigned chunk, unsigned chunks, int64_t S, int64_t K) {
  const unsigned frame = unit / chunks, b = frame / unsigned(S);
  const int64_t begin = int64_t(unit % chunks) * chunk;
  return {b, frame - b * unsigned(S), begin, begin + chunk < K ? begin + chunk : K};
}

// w of every channel, for the kernels that loop over channels.
template <typename T>
__global__ __launch_bounds__(kFusionLoopThreads) void fusion_mix_kernel(View<1> gate, View<1> mix, double scale) {
  const int64_t c = int64_t(blockIdx.x) * kFusionLoopThreads + threadIdx.x;
  if (c >= gate.size[0]) return;
  Acc<T> w[1];
  load_mix<T, 1>(gate, scale, c, w);
  *mix.at<Acc<T>>(c) = w[0];
}

#ifndef __CUDACC_RTC__
template <typename T>
void launch_mix(const View<1>& gate, const View<1>& mix, double scale, cudaStream_t stream) {
  PYVIDX_LAUNCH(fusion_mix_kernel<T>, ceil_div(gate.size[0], kFusionLoopThreads), kFusionLoopThreads, 0, stream, gate,
                mix, scale);
  check_launch("fusion_mix_kernel");
}
#endif

}  // namespace pyvidx::cuda
