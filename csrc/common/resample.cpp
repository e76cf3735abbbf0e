#include "pyvidx/resample.h"

namespace pyvidx {

// Here, and not in a kernel file: those are compiled for CPUs with fused multiply-adds too, which round otherwise.
void resample_windows(const Axis& axis, int64_t begin, const View<2>& windows) {
  for (int64_t i = 0; i < windows.size[0]; ++i) resample_window(axis, begin + i, windows.at<int32_t>(i));
}

}  // namespace pyvidx
