// The second stage of sums over rows. The first leaves rows of partial sums; here they are added up, in an order that
// depends on their number alone. A block takes 32 channels, and a warp every 32nd row, so that a few hundred rows are a
// few rounds of loads. Sixteen rows at a time, with those beyond the last one masked, lost: .73 of a copy on an H100
// where gated_fusion_backward has .83, .76 where temporal_scale_backward has .80 (predicted).
#pragma once
#include "block.cuh"

namespace pyvidx::cuda {

constexpr int kAddUpThreads = 1024;

// put(c, sum) for the sums over `count` rows of `partial` ([count, C], `step` elements apart), from one thread for each
// channel. Blocks of kAddUpThreads, add_up_blocks(C) of them along x; all threads of a block take part.
template <typename A, typename Put>
__device__ __forceinline__ void add_up(const A* partial, int64_t step, int64_t count, int64_t C, Put&& put) {
  constexpr int kWarps = kAddUpThreads / 32;
  __shared__ A shared[kWarps][33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c = int64_t(blockIdx.x) * 32 + lane;
  A sum = 0;
  if (c < C) {
#pragma unroll 8
    for (int64_t i = warp; i < count; i += kWarps) sum += partial[i * step + c];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= C) return;
  sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared[i][lane];
  put(c, sum);
}

#ifndef __CUDACC_RTC__
inline int64_t add_up_blocks(int64_t C) { return ceil_div(C, 32); }
#endif

}  // namespace pyvidx::cuda
