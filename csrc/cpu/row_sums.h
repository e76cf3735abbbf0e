// The second stage of sums over rows. The first leaves rows of partial sums, in a split that depends on the sizes
// alone; here they are added up in their order, so the result does not depend on the number of threads.
#pragma once
#include "pairs.h"
#include "parallel.h"

namespace pyvidx {
namespace {

// put(c, sum, part) for the sums over `count` rows of `partial` ([count, C], `step` elements apart), by vectors.
template <typename T, typename Put>
void add_up(const simd::Acc<T>* partial, int64_t step, int64_t count, int64_t C, const Executor& executor, Put&& put) {
  constexpr int64_t kTile = 256;
  const int64_t tiles = (C + kTile - 1) / kTile;
  parallel_for(executor, tiles, kGrainElements / (kTile * (count + 1)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kTile; first < end * kTile && first < C; first += kTile) {
      const int64_t n = C - first < kTile ? C - first : kTile;
      simd::Acc<T> sum[kTile] = {};
      for (int64_t i = 0; i < count; ++i) {
        const simd::Acc<T>* row = partial + i * step + first;
        simd::each_pair<T>(n, [&](int64_t c, auto part) {
          simd::store(sum + c, simd::load(sum + c, part) + simd::load(row + c, part), part);
        });
      }
      simd::each_pair<T>(n, [&](int64_t c, auto part) { put(first + c, simd::load(sum + c, part), part); });
    }
  });
}

}  // namespace
}  // namespace pyvidx
