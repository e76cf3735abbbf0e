// A block makes 32 columns x 32 rows of one frame. It works out their windows, which no memory but its own holds. It
// goes down the source rows that they read, `chunk` quads of rows at a time: parts them into planes, so that a word is
// four levels of one channel; resizes them across, a lane a column and a warp a quad of rows, into words of four rows'
// levels; and at the end down, a lane a column and a warp a row in eight. 23-bit weights times 8-bit levels are dot
// products of four: two of 16 low bits (dp2a) and one of the signed rest (dp4a) for four pixels, exact. Traffic: 1 read
// of the window of the crop, and again of the rows and columns that two blocks share (a quarter of them for 360p to
// 224, a tenth for 1080p), from L2; 1 write. Arithmetic: 3 (H w n_w + h w n_h) / 4 x 3 dot products a frame. What does
// not fit into shared memory (enlarged a lot, or reduced to below a tenth or so) goes the long way: windows of any
// length in global memory, worked out by a launch of its own.
//
#include "block.cuh"
#include "pyvidx/resize_normalize.h"
#ifndef __CUDACC_RTC__
#include <algorithm>
#endif

namespace pyvidx::cuda {

constexpr int kResizeThreads = 256, kResizeWarps = kResizeThreads / 32;
constexpr int kTile = 32;  // columns and rows
constexpr int kPlanes = 3 * int(kQuad);

// What the windows of a tile take, at most; sizes of what it holds in shared memory.
struct ResizePlan {
  Axis across, down;
  unsigned tiles_across, tiles_down;
  int column_quads, row_quads;  // of a window
  int wide, high;               // quads of pixels in a row that the tile reads, and of rows
  unsigned per_wide;            // 2^32 / wide, rounded up
  int chunk;                    // quads of rows at a time
};

__device__ __forceinline__ int clamped(int level) { return level < 0 ? 0 : level > 255 ? 255 : level; }

__device__ __forceinline__ unsigned packed_levels(const int (&level)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 720
  unsigned packed;
  asm("{\n.reg .b32 high;\ncvt.pack.sat.u8.s32.b32 high, %4, %3, 0;\ncvt.pack.sat.u8.s32.b32 %0, %2, %1, high;\n}"
      : "=r"(packed)
      : "r"(level[0]), "r"(level[1]), "r"(level[2]), "r"(level[3]));
  return packed;
#else
  unsigned packed = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) packed |= unsigned(clamped(level[i])) << (8 * i);
  return packed;
#endif
}

// sum + four levels times four weights, of which two words have the low 16 bits and one the signed rest.
struct Levels {
  unsigned low = 1u << (kWeightBits - 1);  // half a level, so that they are rounded
  int high = 0;

  __device__ __forceinline__ void add(unsigned levels, unsigned first, unsigned second, unsigned rest) {
#if defined(__CUDA_ARCH__)
    low = __dp2a_hi(second, levels, __dp2a_lo(first, levels, low));
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(high) : "r"(levels), "r"(rest));
#else
    const unsigned weight[4] = {first & 0xffff, first >> 16, second & 0xffff, second >> 16};
    for (int i = 0; i < 4; ++i) {
      low += weight[i] * (levels >> 8 * i & 255), high += int8_t(rest >> 8 * i & 255) * int(levels >> 8 * i & 255);
    }
#endif
  }
  __device__ __forceinline__ int rounded() const { return int(low + (unsigned(high) << 16)) >> kWeightBits; }
};

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

// Of these, four levels of each channel.
__device__ __forceinline__ void part_pixels(unsigned* plane) {
  const unsigned a = plane[0], b = plane[1], c = plane[2];
  plane[0] = __byte_perm(__byte_perm(a, b, 0x0630), c, 0x5210);
  plane[1] = __byte_perm(__byte_perm(a, b, 0x0741), c, 0x6210);
  plane[2] = __byte_perm(__byte_perm(a, b, 0x0052), c, 0x7410);
}

__device__ __forceinline__ void load_planes(const unsigned* shared, unsigned (&plane)[kPlanes]) {
#pragma unroll
  for (int j = 0; j < 3; ++j) {
    const uint4 words = load16(shared + 4 * j);
    plane[4 * j] = words.x, plane[4 * j + 1] = words.y, plane[4 * j + 2] = words.z, plane[4 * j + 3] = words.w;
  }
}

// The windows of a tile along one axis, a lane each, as one warp works them out. begin: its first pixel; of an aligned
// window a multiple of kQuad below that.
struct LaneWindow {
  Axis axis;
  Window window;
  int begin, count;
  bool inside;

  __device__ __forceinline__ LaneWindow(const Axis& axis, int64_t at, bool aligned)
      : axis(axis),
        window(axis, at < 0              ? 0
                     : at < axis.resized ? at
                                         : axis.resized - 1) {
    inside = at >= 0 && at < axis.resized;
    begin = int(window.begin) & (aligned ? -int(kQuad) : -1), count = int(window.end) - begin;
  }

  // put(q, {first, second, rest, 0}) for each quad of weights (struct Levels); scratch: [quads][4][32], of which each
  // lane has its own.
  template <typename Put>
  __device__ __forceinline__ void weights(int quads, double* scratch, Put&& put) const {
    double sum = 0;
#pragma unroll 1
    for (int k = 0; k < quads * int(kQuad); ++k) {
      const bool read = inside && k < count && begin + k >= int(window.begin);
      const double weight = read ? window.weight(axis, begin + k) : 0;
      sum += weight, scratch[k * kTile] = weight;
    }
    const double inverse = inside ? 1 / sum : 0;
#pragma unroll 1
    for (int q = 0; q < quads; ++q) {
      unsigned weight[kQuad];
#pragma unroll
      for (int i = 0; i < int(kQuad); ++i) {  // a quotient from the rounded inverse and what is left is rounded as well
        const double w = scratch[(q * int(kQuad) + i) * kTile], share = w * inverse;
        weight[i] = unsigned(fixed_point(fma(fma(-share, sum, w), inverse, share)));
      }
      const unsigned first = __byte_perm(weight[0], weight[1], 0x5410),
                     second = __byte_perm(weight[2], weight[3], 0x5410);
      const unsigned low = __byte_perm(weight[0], weight[1], 0x0062), high = __byte_perm(weight[2], weight[3], 0x0062);
      put(q, uint4{first, second, __byte_perm(low, high, 0x5410), 0});
    }
  }
};

template <typename T, bool kWords>
__global__ __launch_bounds__(kResizeThreads, 3) void resize_normalize_kernel(ResizeNormalizeArgs a, ResizePlan plan) {
  PYVIDX_SHARED(unsigned, shared);
  unsigned* const across = shared;                                 // [high][3][32]: four rows' levels
  unsigned* const columns = across + plan.high * 3 * kTile;        // [column_quads][3][32]: weights
  unsigned* const rows = columns + plan.column_quads * 3 * kTile;  // [32][row_quads][4]
  int* const first_column = reinterpret_cast<int*>(rows + plan.row_quads * 4 * kTile);  // [32]
  int *const first_row = first_column + kTile, *const row_quads = first_row + kTile;    // [32] each, in quads
  double* const scratch = reinterpret_cast<double*>(row_quads + 2 * kTile);             // [both quads][4][32]
  unsigned* const pixels =                                                              // [chunk][wide][4][3]
      reinterpret_cast<unsigned*>(scratch + (plan.column_quads + plan.row_quads) * kQuad * kTile);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned tile = blockIdx.x / plan.tiles_across;
  const int64_t t = tile / plan.tiles_down;
  const int64_t x0 = int64_t(blockIdx.x - tile * plan.tiles_across) * kTile;
  const int64_t y0 = int64_t(tile - unsigned(t) * plan.tiles_down) * kTile;
  const int64_t x_last = a.columns.size[0] - 1, y_last = a.rows.size[0] - 1;

  const auto stage = [&](int from, int turns, int thread, int threads) {
    const int left = first_column[0] / int(kQuad), top = first_row[0];
#pragma unroll 1
    for (int i = thread; i < turns * plan.wide; i += threads) {
      const int quad = int(__umulhi(unsigned(i), plan.per_wide));
      unsigned plane[kPlanes];
      load_pixels<kWords, int(kQuad)>(a.frames, t, (top + from + quad) * int(kQuad),
                                      (left + i - quad * plan.wide) * int(kQuad), plane);
#pragma unroll
      for (int r = 0; r < int(kQuad); ++r) part_pixels(plane + 3 * r);
      uint4* const to = reinterpret_cast<uint4*>(pixels + i * kPlanes);
#pragma unroll
      for (int j = 0; j < 3; ++j) to[j] = {plane[4 * j], plane[4 * j + 1], plane[4 * j + 2], plane[4 * j + 3]};
    }
  };
  const auto high = [&] { return first_row[kTile - 1] + row_quads[kTile - 1] - first_row[0]; };
  const auto window_of_column = [&] {
    const int64_t x = x0 + lane;
    return LaneWindow(plan.across, a.left + (x < x_last ? x : x_last), false);
  };
  const auto window_of_row = [&] {
    const int64_t y = y0 + lane;
    return LaneWindow(plan.down, a.top + (y < y_last ? y : y_last), true);
  };
  if (warp == 0) {
    first_column[lane] = window_of_column().begin;
  } else if (warp == 1) {
    const LaneWindow mine = window_of_row();
    first_row[lane] = mine.begin / int(kQuad), row_quads[lane] = (mine.count + int(kQuad) - 1) / int(kQuad);
  }
  __syncthreads();
  if (warp == 0) {
    window_of_column().weights(plan.column_quads, scratch + lane, [&](int q, uint4 words) {
      unsigned* const to = columns + q * 3 * kTile + lane;
      to[0] = words.x, to[kTile] = words.y, to[2 * kTile] = words.z;
    });
  } else if (warp == 1) {
    window_of_row().weights(
        plan.row_quads, scratch + plan.column_quads * kQuad * kTile + lane,
        [&](int q, uint4 words) { reinterpret_cast<uint4*>(rows)[lane * plan.row_quads + q] = words; });
  } else {
    stage(0, high() < plan.chunk ? high() : plan.chunk, int(threadIdx.x) - 64, kResizeThreads - 64);
  }
  const int end = high(), own_first = first_column[lane];
  const int own_pixels = (own_first / int(kQuad) - first_column[0] / int(kQuad)) * kPlanes;
  const unsigned select = 0x3210u + unsigned(own_first) % 4 * 0x1111u;

#pragma unroll 1
  for (int from = 0; from < end; from += plan.chunk) {
    const int turns = end - from < plan.chunk ? end - from : plan.chunk;
    if (from > 0) {
      __syncthreads();  // the last pixels have been read
      stage(from, turns, threadIdx.x, kResizeThreads);
    }
    __syncthreads();
#pragma unroll 1
    for (int quad = warp; quad < turns; quad += kResizeWarps) {
      const unsigned *pixel = pixels + quad * plan.wide * kPlanes + own_pixels, *weight = columns + lane;
      unsigned now[kPlanes];
      Levels sum[kPlanes];
      load_planes(pixel, now);
#pragma unroll 2
      for (int q = 0; q < plan.column_quads; ++q, weight += 3 * kTile) {
        unsigned next[kPlanes];
        load_planes(pixel += kPlanes, next);
        const unsigned first = weight[0], second = weight[kTile], rest = weight[2 * kTile];
#pragma unroll
        for (int i = 0; i < kPlanes; ++i) {
          sum[i].add(__byte_perm(now[i], next[i], select), first, second, rest);
          now[i] = next[i];
        }
      }
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        const int level[4] = {sum[c].rounded(), sum[3 + c].rounded(), sum[6 + c].rounded(), sum[9 + c].rounded()};
        across[((from + quad) * 3 + c) * kTile + lane] = packed_levels(level);
      }
    }
  }
  __syncthreads();
  const int64_t x = x0 + lane;
  if (x > x_last) return;
  Acc<T> scale[3], shift[3];
#pragma unroll
  for (int c = 0; c < 3; ++c) scale[c] = Acc<T>(a.scale[c]), shift[c] = Acc<T>(a.shift[c]);
  T* out = a.out.at<T>(t, 0, y0 + warp, x);
  const int count = int(y_last - y0 < kTile - 1 ? y_last - y0 + 1 : kTile), top = first_row[0];
#pragma unroll 1
  for (int r = warp; r < count; r += kResizeWarps, out += kResizeWarps * a.out.stride[2]) {
    const unsigned* level = across + (first_row[r] - top) * 3 * kTile + lane;
    const unsigned* weight = rows + r * plan.row_quads * 4;
    Levels sum[3];
#pragma unroll 1
    for (int q = row_quads[r]; q > 0; --q, level += 3 * kTile, weight += 4) {
      const uint4 w = load16(weight);
#pragma unroll
      for (int c = 0; c < 3; ++c) sum[c].add(level[c * kTile], w.x, w.y, w.z);
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      out[c * a.out.stride[1]] = from_acc<T>(Acc<T>(clamped(sum[c].rounded())) * scale[c] + shift[c]);
    }
  }
}

// ---- the long way: source rows 32 at a time, resized across into shared memory, then added to the output rows ----

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

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

// May four pixels of a row be read as three words?
bool in_words(const View<4>& frames) {
  return frames.size[2] % kQuad == 0 && frames.stride[3] == 1 && frames.stride[2] == 3 && frames.stride[1] % 4 == 0 &&
         frames.stride[0] % 4 == 0 && reinterpret_cast<uintptr_t>(frames.data) % 4 == 0;
}

ResizePlan plan_of(const ResizeNormalizeArgs& a) {
  ResizePlan plan{a.across(), a.down(), unsigned(ceil_div(a.columns.size[0], kTile)),
                  unsigned(ceil_div(a.rows.size[0], kTile))};
  const auto quads = [](double pixels) { return int(std::min(pixels, 1e6)) / int(kQuad) + 2; };
  plan.column_quads = int(std::min<int64_t>(ceil_div(plan.across.reads(), kQuad), 1 << 20));
  plan.row_quads = int(std::min<int64_t>(plan.down.taps() / kQuad, 1 << 20));
  plan.wide = quads((kTile - 1) * plan.across.scale + kQuad) + plan.column_quads;
  plan.per_wide = unsigned(((int64_t(1) << 32) + plan.wide - 1) / plan.wide);
  plan.high = quads((kTile - 1) * plan.down.scale + kQuad) + plan.row_quads;
  return plan;
}

// Of shared memory, with chunks of so many quads of rows.
int64_t bytes_of(const ResizePlan& plan, int chunk) {
  const int64_t pixels = int64_t(chunk) * plan.wide * kPlanes * 4;
  const int64_t weights = int64_t(plan.column_quads + plan.row_quads) * kQuad * kTile * 8;
  const int64_t of_lane = int64_t(plan.high + plan.column_quads) * 3 + plan.row_quads * 4 + 4;
  return of_lane * kTile * 4 + weights + pixels;
}

template <typename T>
void launch_long(const ResizeNormalizeArgs& args, cudaStream_t stream) {
  const int64_t rows = args.rows.size[0], columns = args.columns.size[0];
  const int64_t down = ceil_div(rows, kLongRows), across = ceil_div(columns, kTile);
  const int64_t blocks = args.out.size[0] * down * across;
  checked_grid("resize_long_kernel", blocks);  // before the first of two launches
  PYVIDX_LAUNCH(resize_windows_kernel, ceil_div(rows + columns, kWindowThreads), kWindowThreads, 0, stream, args);
  check_launch("resize_windows_kernel");
  PYVIDX_LAUNCH(resize_long_kernel<T>, blocks, kResizeThreads, 0, stream, args, unsigned(down), unsigned(across));
  check_launch("resize_long_kernel");
}

template <typename T, bool kWords>
void launch(const ResizeNormalizeArgs& args, const ResizePlan& plan, int64_t bytes, cudaStream_t stream) {
  set_max_dynamic_smem(resize_normalize_kernel<T, kWords>, size_t(bytes));
  const int64_t blocks = args.out.size[0] * plan.tiles_across * plan.tiles_down;
  PYVIDX_LAUNCH((resize_normalize_kernel<T, kWords>), blocks, kResizeThreads, bytes, stream, args, plan);
  check_launch("resize_normalize_kernel");
}

}  // namespace

void resize_normalize_cuda(const ResizeNormalizeArgs& args, cudaStream_t stream) {
  if (args.out.size[0] * args.out.size[2] * args.out.size[3] == 0) return;
  ResizePlan plan = plan_of(args);
  // As many rows as keep a few blocks on a multiprocessor, then fewer where even one has too little room.
  plan.chunk = 2 * kResizeWarps;
  while (plan.chunk > kResizeWarps && int64_t(plan.chunk) * plan.wide * kPlanes * 4 > 16 * 1024) plan.chunk /= 2;
  const int64_t room = int64_t(device_smem());
  while (plan.chunk > 1 && bytes_of(plan, plan.chunk) > room) plan.chunk /= 2;
  const int64_t bytes = bytes_of(plan, plan.chunk);
  visit_dtype<float, double, __half, __nv_bfloat16>("resize_normalize", args.out.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (bytes > room) return launch_long<T>(args, stream);
    in_words(args.frames) ? launch<T, true>(args, plan, bytes, stream) : launch<T, false>(args, plan, bytes, stream);
  });
}

}  // namespace pyvidx
#endif
