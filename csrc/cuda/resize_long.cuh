// resize_normalize with windows of any length, which lie in global memory: a thread a window works them out in a launch
// of its own. A block makes 32 columns x 16 rows of one frame, a lane of its warps one column. It goes down the source
// rows, 32 at a time: resizes them across into shared memory, 3 KB of 8-bit levels, then adds them to the sums of the
// output rows that read them, which stay in registers. Each weight serves four rows.
#pragma once
#include "block.cuh"
#include "pyvidx/resize_normalize.h"

namespace pyvidx::cuda {

constexpr int kResizeThreads = 256, kResizeWarps = kResizeThreads / 32;
constexpr int kTile = 32;  // columns, and rows of the kernel of resize_normalize.cu

__device__ __forceinline__ int clamped(int level) { return level < 0 ? 0 : level > 255 ? 255 : level; }

// Four pixels of each of kRows rows, red first, a byte a level; 0 beyond the end of a row, and in place of rows beyond
// the last one that one. kWords: four pixels are three words, and rows end with such.
template <bool kWords, int kRows>
__device__ __forceinline__ void load_pixels(const View<4>& frames, int64_t t, int y, int x,
                                            unsigned (&pixel)[3 * kRows]) {
  const int last = int(frames.size[1]) - 1, W = int(frames.size[2]);
  const uint8_t* row = frames.at<const uint8_t>(t, y < last ? y : last, x);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if constexpr (kWords) {
        pixel[3 * r + i] = x < W ? reinterpret_cast<const unsigned*>(row)[i] : 0;
      } else {
        unsigned word = 0;
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          const int after = (4 * i + b) / 3, c = (4 * i + b) % 3;
          const unsigned level = x < W - after ? row[after * frames.stride[2] + c * frames.stride[3]] : 0;
          word |= level << (8 * b);
        }
        pixel[3 * r + i] = word;
      }
    }
    if (y + r < last) row += frames.stride[1];
  }
}

constexpr int kLongRows = 16, kLongOwn = kLongRows / kResizeWarps;
constexpr int kLongChunk = 32, kLongTake = kLongChunk / kResizeWarps;  // source rows, and those of a warp
constexpr int kWindowThreads = 128;

__global__ __launch_bounds__(kWindowThreads) void resize_windows_kernel(ResizeNormalizeArgs a) {
  const int64_t i = int64_t(blockIdx.x) * kWindowThreads + threadIdx.x, rows = a.rows.size[0];
  if (i < rows) {
    resample_window(a.down(), a.top + i, a.rows.at<int32_t>(i));
  } else if (i - rows < a.columns.size[0]) {
    resample_window(a.across(), a.left + i - rows, a.columns.at<int32_t>(i - rows));
  }
}

template <typename T>
__global__ __launch_bounds__(kResizeThreads, 2) void resize_long_kernel(ResizeNormalizeArgs a, unsigned tiles_down,
                                                                        unsigned tiles_across) {
  __shared__ uint8_t across[kLongChunk][3][kTile];
  const int64_t H = a.frames.size[1], rows = a.rows.size[0], columns = a.columns.size[0];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t t = blockIdx.x / tiles_across / tiles_down;
  const int64_t x = int64_t(blockIdx.x % tiles_across) * kTile + lane;
  const int64_t y0 = int64_t(blockIdx.x / tiles_across % tiles_down) * kLongRows;
  const int64_t y_last = (y0 + kLongRows < rows ? y0 + kLongRows : rows) - 1;
  const int quads = int((a.columns.size[1] - 1) / kQuad), taps = int(a.rows.size[1] - 1);
  const int32_t* const column = a.columns.at<const int32_t>(x < columns ? x : columns - 1);
  const int64_t begin = *a.rows.at<const int32_t>(y0), past = *a.rows.at<const int32_t>(y_last) + taps;
  const int64_t end = past < H ? past : H;

  int sum[kLongOwn][3];
#pragma unroll
  for (int r = 0; r < kLongOwn; ++r) {
#pragma unroll
    for (int c = 0; c < 3; ++c) sum[r][c] = 1 << (kWeightBits - 1);
  }
#pragma unroll 1
  for (int64_t chunk = begin; chunk < end; chunk += kLongChunk) {
    int own[kLongTake][3];
#pragma unroll
    for (int r = 0; r < kLongTake; ++r) {
#pragma unroll
      for (int c = 0; c < 3; ++c) own[r][c] = 1 << (kWeightBits - 1);
    }
#pragma unroll 1
    for (int q = 0; q < quads; ++q) {
      const int32_t* const k = column + 1 + q * kQuad;
      const int weight[4] = {k[0], k[1], k[2], k[3]};
      unsigned pixel[3 * kLongTake];
      load_pixels<false, kLongTake>(a.frames, t, int(chunk) + warp * kLongTake, *column + q * int(kQuad), pixel);
#pragma unroll
      for (int r = 0; r < kLongTake; ++r) {
#pragma unroll
        for (int i = 0; i < 12; ++i) {
          own[r][i % 3] += weight[i / 3] * int(pixel[3 * r + i / 4] >> (8 * (i % 4)) & 255u);
        }
      }
    }
    __syncthreads();  // the last chunk has been read
#pragma unroll
    for (int r = 0; r < kLongTake; ++r) {
#pragma unroll
      for (int c = 0; c < 3; ++c) across[warp * kLongTake + r][c][lane] = uint8_t(clamped(own[r][c] >> kWeightBits));
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kLongOwn; ++r) {
      const int64_t y = y0 + warp + r * kResizeWarps;
      if (y >= rows) break;
      const int32_t* const window = a.rows.at<const int32_t>(y);
      const int64_t first = *window, last = first + taps;
      const int64_t low = first > chunk ? first : chunk, stop = last < chunk + kLongChunk ? last : chunk + kLongChunk;
#pragma unroll 1
      for (int64_t Y = low; Y < (stop < end ? stop : end); ++Y) {
        const int weight = window[1 + Y - first];
#pragma unroll
        for (int c = 0; c < 3; ++c) sum[r][c] += weight * int(across[Y - chunk][c][lane]);
      }
    }
  }
  if (x >= columns) return;
#pragma unroll
  for (int r = 0; r < kLongOwn; ++r) {
    const int64_t y = y0 + warp + r * kResizeWarps;
    if (y >= rows) return;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const Acc<T> level = Acc<T>(clamped(sum[r][c] >> kWeightBits));
      *a.out.at<T>(t, c, y, x) = from_acc<T>(level * Acc<T>(a.scale[c]) + Acc<T>(a.shift[c]));
    }
  }
}

}  // namespace pyvidx::cuda
