// A block makes 32 columns x 16 rows of one frame, a lane of its warps one column. It goes down the source rows, 32 at
// a time: resizes them across into shared memory, 3 KB of 8-bit levels, then adds them to the sums of the output rows
// that read them, which stay in registers: so no window is too long. Four pixels, 12 bytes, are read as three words
// where rows allow; each weight serves four rows. A first kernel works out the weights, a thread per row and column.
// Traffic: 1 read of the window of the crop, and again of the rows that two blocks share (a quarter of them for 1080p
// to 224), from L2; 1 write. Arithmetic: 3 (H w n_w + h w n_h) integer multiply-adds per frame.
#include "block.cuh"
#include "pyvidx/resize_normalize.h"

namespace pyvidx::cuda {

constexpr int kResizeThreads = 256, kResizeWarps = kResizeThreads / 32;
constexpr int kResizeColumns = 32, kResizeRows = 16, kResizeOwn = kResizeRows / kResizeWarps;
constexpr int kResizeChunk = 32, kResizeTake = kResizeChunk / kResizeWarps;  // source rows, and those of a warp
constexpr int kWindowThreads = 128;

__global__ __launch_bounds__(kWindowThreads) void resize_windows_kernel(ResizeNormalizeArgs a) {
  const int64_t i = int64_t(blockIdx.x) * kWindowThreads + threadIdx.x, rows = a.rows.size[0];
  if (i < rows) {
    resample_window(a.down(), a.top + i, a.rows.at<int32_t>(i));
  } else if (i - rows < a.columns.size[0]) {
    resample_window(a.across(), a.left + i - rows, a.columns.at<int32_t>(i - rows));
  }
}

__device__ __forceinline__ unsigned level_of(int sum) {
  const int level = sum >> kWeightBits;
  return unsigned(level < 0 ? 0 : level > 255 ? 255 : level);
}

// The levels of four pixels, red first; 0 beyond the end of a row.
template <bool kWords>
__device__ __forceinline__ void load_pixels(const View<4>& frames, const uint8_t* row, int64_t x, int (&level)[12]) {
  if constexpr (kWords) {
    if (x + kQuad <= frames.size[2]) {
      const unsigned* words = reinterpret_cast<const unsigned*>(row + 3 * x);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const unsigned word = words[i];
#pragma unroll
        for (int b = 0; b < 4; ++b) level[4 * i + b] = int(word >> (8 * b) & 255u);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool there = x + i < frames.size[2];
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      level[3 * i + c] = there ? int(row[(x + i) * frames.stride[2] + c * frames.stride[3]]) : 0;
    }
  }
}

template <typename T, bool kWords>
__global__ __launch_bounds__(kResizeThreads, 2) void resize_normalize_kernel(ResizeNormalizeArgs a, unsigned tiles_down,
                                                                             unsigned tiles_across) {
  __shared__ uint8_t across[kResizeChunk][3][kResizeColumns];
  const int64_t H = a.frames.size[1], rows = a.rows.size[0], columns = a.columns.size[0];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t t = blockIdx.x / tiles_across / tiles_down;
  const int64_t x = int64_t(blockIdx.x % tiles_across) * kResizeColumns + lane;
  const int64_t y0 = int64_t(blockIdx.x / tiles_across % tiles_down) * kResizeRows;
  const int64_t y_last = (y0 + kResizeRows < rows ? y0 + kResizeRows : rows) - 1;
  const int quads = int((a.columns.size[1] - 1) / kQuad), taps = int(a.rows.size[1] - 1);
  const int32_t* const column = a.columns.at<const int32_t>(x < columns ? x : columns - 1);
  const int64_t begin = *a.rows.at<const int32_t>(y0), past = *a.rows.at<const int32_t>(y_last) + taps;
  const int64_t end = past < H ? past : H;

  int sum[kResizeOwn][3];
#pragma unroll
  for (int r = 0; r < kResizeOwn; ++r) {
#pragma unroll
    for (int c = 0; c < 3; ++c) sum[r][c] = 1 << (kWeightBits - 1);
  }
#pragma unroll 1
  for (int64_t chunk = begin; chunk < end; chunk += kResizeChunk) {
    int own[kResizeTake][3];
    const uint8_t* row[kResizeTake];
#pragma unroll
    for (int r = 0; r < kResizeTake; ++r) {  // rows beyond the last one are made of it, and no one reads them
      const int64_t Y = chunk + warp * kResizeTake + r;
      row[r] = a.frames.at<const uint8_t>(t, Y < H ? Y : H - 1);
#pragma unroll
      for (int c = 0; c < 3; ++c) own[r][c] = 1 << (kWeightBits - 1);
    }
#pragma unroll 1
    for (int q = 0; q < quads; ++q) {
      const int32_t* const k = column + 1 + q * kQuad;
      const int weight[4] = {k[0], k[1], k[2], k[3]};
#pragma unroll
      for (int r = 0; r < kResizeTake; ++r) {
        int level[12];
        load_pixels<kWords>(a.frames, row[r], *column + q * kQuad, level);
#pragma unroll
        for (int i = 0; i < 12; ++i) own[r][i % 3] += weight[i / 3] * level[i];
      }
    }
    __syncthreads();  // the last chunk has been read
#pragma unroll
    for (int r = 0; r < kResizeTake; ++r) {
#pragma unroll
      for (int c = 0; c < 3; ++c) across[warp * kResizeTake + r][c][lane] = uint8_t(level_of(own[r][c]));
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kResizeOwn; ++r) {
      const int64_t y = y0 + warp + r * kResizeWarps;
      if (y >= rows) break;
      const int32_t* const window = a.rows.at<const int32_t>(y);
      const int64_t first = *window, last = first + taps;
      const int64_t low = first > chunk ? first : chunk,
                    stop = last < chunk + kResizeChunk ? last : chunk + kResizeChunk;
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
  for (int r = 0; r < kResizeOwn; ++r) {
    const int64_t y = y0 + warp + r * kResizeWarps;
    if (y >= rows) return;
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const Acc<T> level = Acc<T>(level_of(sum[r][c]));
      *a.out.at<T>(t, c, y, x) = from_acc<T>(level * Acc<T>(a.scale[c]) + Acc<T>(a.shift[c]));
    }
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

// May four pixels of a row be read as three words?
bool in_words(const View<4>& frames) {
  return frames.stride[3] == 1 && frames.stride[2] == 3 && frames.stride[1] % 4 == 0 && frames.stride[0] % 4 == 0 &&
         reinterpret_cast<uintptr_t>(frames.data) % 4 == 0;
}

}  // namespace

void resize_normalize_cuda(const ResizeNormalizeArgs& args, cudaStream_t stream) {
  const int64_t T_ = args.out.size[0], rows = args.out.size[2], columns = args.out.size[3];
  if (T_ * rows * columns == 0) return;
  const int64_t down = ceil_div(rows, kResizeRows), across = ceil_div(columns, kResizeColumns);
  const int64_t blocks = T_ * down * across;
  checked_grid("resize_normalize_kernel", blocks);  // before the first of two launches
  const unsigned tiles_down = unsigned(down), tiles_across = unsigned(across);
  PYVIDX_LAUNCH(resize_windows_kernel, ceil_div(rows + columns, kWindowThreads), kWindowThreads, 0, stream, args);
  check_launch("resize_windows_kernel");
  visit_dtype<float, double, __half, __nv_bfloat16>("resize_normalize", args.out.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (in_words(args.frames)) {
      PYVIDX_LAUNCH((resize_normalize_kernel<T, true>), blocks, kResizeThreads, 0, stream, args, tiles_down,
                    tiles_across);
    } else {
      PYVIDX_LAUNCH((resize_normalize_kernel<T, false>), blocks, kResizeThreads, 0, stream, args, tiles_down,
                    tiles_across);
    }
  });
  check_launch("resize_normalize_kernel");
}

}  // namespace pyvidx
#endif
