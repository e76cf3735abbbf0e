// The weights of Pillow's antialiased resize along one axis, in its own fixed point: integers in units of 2^-22, so
// that sums of them with 8-bit levels are exact in 32 bits, in whatever order.
#pragma once
#include "pyvidx/view.h"

namespace pyvidx {

constexpr int kWeightBits = 22;
// Windows begin at multiples of so many pixels, and are so many times as long: four 8-bit levels fill 32 bits.
constexpr int64_t kQuad = 4;

// A product that no fused multiply-add swallows: Pillow rounds it, and its weights are to be equal bit for bit.
PYVIDX_INLINE double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// `length` source pixels become `resized`. 1 <= both < 2^31. A kernel that is handed one divides nothing.
struct Axis {
  int64_t length, resized;
  bool bilinear;  // or bicubic, a = -1/2
  double scale, support, shrink;

  PYVIDX_INLINE Axis(int64_t length, int64_t resized, bool bilinear)
      : length(length), resized(resized), bilinear(bilinear), scale(double(length) / double(resized)) {
    const double stretch = scale < 1 ? 1.0 : scale;
    support = (bilinear ? 1 : 2) * stretch, shrink = 1 / stretch;
  }
  // The most pixels that one output reads.
  PYVIDX_INLINE int64_t reads() const { return length == resized ? 1 : int64_t(2 * support) + 1; }
  // Of every window, a multiple of kQuad: the pixels that one output reads, and those before them down to a multiple.
  PYVIDX_INLINE int64_t taps() const { return (reads() + 2 * (kQuad - 1)) / kQuad * kQuad; }
};

// Both pieces of bicubic are computed: lanes of a warp need both, and pixels in a row overlap then.
PYVIDX_INLINE double resample_filter(double x, bool bilinear) {
  x = x < 0 ? -x : x;
  if (bilinear) return x < 1 ? 1 - x : 0.0;
  const double near = rounded_product(rounded_product(rounded_product(1.5, x) - 2.5, x), x) + 1;
  const double far = rounded_product(rounded_product(rounded_product(x - 5, x) + 8, x) - 4, -0.5);
  return x < 1 ? near : x < 2 ? far : 0.0;
}

// The pixels [begin, end) that an output in [0, resized) reads, and their weights before they are made to add up to 1.
struct Window {
  int64_t begin, end;
  double center;

  PYVIDX_INLINE Window(const Axis& axis, int64_t at) : center(rounded_product(double(at) + 0.5, axis.scale)) {
    begin = int64_t(center - axis.support + 0.5), end = int64_t(center + axis.support + 0.5);
    begin = begin < 0 ? 0 : begin, end = end < axis.length ? end : axis.length;
    if (axis.length == axis.resized) begin = at, end = at + 1;
  }
  PYVIDX_INLINE double weight(const Axis& axis, int64_t i) const {
    return resample_filter(rounded_product(double(i) - center + 0.5, axis.shrink), axis.bilinear);
  }
};

PYVIDX_INLINE int32_t fixed_point(double share) {
  share *= 1 << kWeightBits;
  return int32_t(share < 0 ? share - 0.5 : share + 0.5);
}

// What output `at` reads: window = {first, weight of pixel first, of first + 1, ...}, axis.taps() of them. Outside of
// [0, resized) all weights are 0, and so is the level.
PYVIDX_INLINE void resample_window(const Axis& axis, int64_t at, int32_t* window) {
  const int64_t inside = at < 0 ? 0 : at < axis.resized ? at : axis.resized - 1, taps = axis.taps();
  const Window w(axis, inside);
  double sum = 0;
  for (int64_t i = w.begin; i < w.end; ++i) sum += w.weight(axis, i);
  const int64_t first = w.begin / kQuad * kQuad;
  window[0] = int32_t(first);
  for (int64_t i = first; i < first + taps; ++i) {
    window[1 + i - first] = at == inside && i >= w.begin && i < w.end ? fixed_point(w.weight(axis, i) / sum) : 0;
  }
}

// The windows of outputs begin, begin + 1, ...: one row of windows [count, 1 + taps], i32, each. On the host.
void resample_windows(const Axis& axis, int64_t begin, const View<2>& windows);

}  // namespace pyvidx
