// The second stage of sums over rows. The first leaves rows of partial sums; here they are added up, in an order that
// depends on their number alone. A block takes 32 channels, and a warp every 32nd row, so that a few hundred rows are a
// few rounds of loads. Versions (cycles of a block for the 516 rows of gated_fusion_backward at sm_90; shares of a copy
// on an H100 that are predicted of gated_fusion_backward, of temporal_scale_backward):
//   eight rows under way as ptxas likes them             4,700   .83, .80   it takes some of them in turns
//   told that a multiprocessor holds one block           1,980   .84, .80   kept
//   sixteen rows, those beyond the last one masked       1,380   .85, .78
//   16 bytes a lane, so four rows at a time, eight loads 1,330   .85, .79
#pragma once
#include "block.cuh"

namespace pyvidx::cuda {

constexpr int kAddUpThreads = 1024;  // with launch bounds that say one block

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
