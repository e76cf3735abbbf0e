// resize_normalize: 8-bit frames, resized as Pillow does it, cropped and normalized, in one pass.
//
//   across[t, Y, x, c] = level(sum_X columns[x, X] frames[t, Y, X, c])
//   out[t, c, y, x]    = scale[c] level(sum_Y rows[y, Y] across[t, Y, x, c]) + shift[c]
//   level(s)           = clamp((s + 2^21) >> 22, 0, 255)
//
// rows and columns are the integer weights of resample.h. Only what the crop keeps is computed; where it reaches beyond
// the resized frame, the level is 0.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/resample.h"
#include "pyvidx/view.h"

struct CUstream_st;  // cudaStream_t, so that no CUDA header is needed here

namespace pyvidx {

struct ResizeNormalizeArgs {
  View<4> frames;  // [T, H, W, 3]  in, u8, any strides; H, W >= 1
  int64_t h, w;    // of the whole resized frame
  int64_t top, left;
  bool bilinear;
  double scale[3], shift[3];
  View<2> rows, columns;  // [rows or columns, 1 + taps of their axis]  scratch, i32; on a GPU of long windows
  View<4> out;            // [T, 3, rows, columns]  out, any strides but the last, which is 1

  PYVIDX_INLINE Axis down() const { return Axis(frames.size[1], h, bilinear); }
  PYVIDX_INLINE Axis across() const { return Axis(frames.size[2], w, bilinear); }
};

void resize_normalize_cpu(const ResizeNormalizeArgs& args, const Executor& executor);
void resize_normalize_cuda(const ResizeNormalizeArgs& args, CUstream_st* stream);

}  // namespace pyvidx
