// How sums over rows are split: a part is a chunk of rows of one frame, and partial sums are added up in their order.
// The split depends on the sizes alone, so results do not depend on the number of threads.
#pragma once
#include "pyvidx/view.h"

namespace pyvidx {

// Rows of one frame that are summed in one go. At least 16, so that partial sums are little beside the rows.
PYVIDX_INLINE int64_t row_chunk(int64_t frames, int64_t K) {
  const int64_t even = (frames * K + 1023) / 1024, chunk = even < 16 ? 16 : even;
  return chunk < K ? chunk : (K > 0 ? K : 1);
}
PYVIDX_INLINE int64_t row_parts(int64_t frames, int64_t K) {
  const int64_t chunk = row_chunk(frames, K);
  return frames * ((K + chunk - 1) / chunk);
}

}  // namespace pyvidx
