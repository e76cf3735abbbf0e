// A block makes 32 columns x 32 rows of one frame. Two of its warps work out the windows, which no other memory holds,
// while the others load pixels. It goes down the source rows that the windows read, `chunk` quads of rows at a time:
// parts them into planes, so that a word is four levels of one channel; resizes them across, a lane a column and a warp
// a quad of rows, into words of four rows' levels; and at the end down, a lane four columns of a row. Weights have
// 23 bits, levels 8: four products are two dot products of the weights' low 16 bits (dp2a) and one of the signed rest
// (dp4a), exact as they are.
// Traffic: 1 read of the window of the crop, and again of the rows and columns that two blocks share (a quarter for
// 360p to 224, an eighth for 1080p), from L2; 1 write. Arithmetic: 9 / 4 (H w n_w + h w n_h) dot products a frame: 1.4
// us of an H200 for 8 frames of 360p, where a copy's bytes take 1.3; so what is around them decides. What does not fit
// into shared memory (reduced to below a tenth or so) goes the long way: windows of any length in global memory, worked
// out by a launch of its own.
//
// Tried, half, 8 frames of 360p and 1080p; shares of a copy are predicted (docs/predictions.md):
//   version                                     registers, sm_70 / 90   rounds   per 16 bytes   V100       H200
//   two launches, tap by tap, 16 rows a block   80 / 80                 22, 46   1153, 552      .16, .32   .11, .14
//   dot products; all warps work out windows    80 / 80                 1, 11    571, 364       -          .38, .35
//   two warps do; 16-byte shared loads          75 / 76                 2, 11    355, 213       .66, .75   .52, .54
//   down four columns a lane; first quad apart  75 / 70                 2, 11    296, 194       .73, .79   .59, .58
#include "resize_long.cuh"
#ifndef __CUDACC_RTC__
#include <algorithm>
#endif

namespace pyvidx::cuda {

constexpr int kPlanes = 3 * int(kQuad);
constexpr int kOwn = 4, kOwnLanes = kTile / kOwn;  // columns of a lane on the way down, and lanes of a row
static_assert(kResizeThreads == kTile * kOwnLanes, "a thread has four pixels of a tile");

// In one access, two for double.
template <typename T>
__device__ __forceinline__ void store_group(T* to, const T (&value)[kOwn]) {
  if constexpr (sizeof(value) == sizeof(uint2)) {
    uint2 bits;
    memcpy(&bits, value, sizeof bits);
    *reinterpret_cast<uint2*>(to) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < kOwn; i += kVec<T>) {
      uint4 bits;
      memcpy(&bits, value + i, sizeof bits);
      store16(to + i, bits);
    }
  }
}

// What the windows of a tile take, at most; sizes of what it holds in shared memory.
struct ResizePlan {
  Axis across, down;
  unsigned tiles_across, tiles_down;
  int column_quads, row_quads;  // of a window
  int wide, high;               // quads of pixels in a row that the tile reads, and of rows
  unsigned per_wide;            // 2^32 / wide, rounded up
  int levels;                   // words of those that are resized across
  int chunk;                    // quads of rows at a time
  bool groups;                  // may kOwn columns of a row be written together?
};

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
    for (int k = 0; k < quads * int(kQuad); k += int(kQuad)) {
      double weight[kQuad];
#pragma unroll
      for (int i = 0; i < int(kQuad); ++i) weight[i] = window.weight(axis, begin + k + i);
#pragma unroll
      for (int i = 0; i < int(kQuad); ++i) {
        const bool read = inside && k + i < count && begin + k + i >= int(window.begin);
        weight[i] = read ? weight[i] : 0;
        sum += weight[i], scratch[(k + i) * kTile] = weight[i];
      }
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
  unsigned* const across = shared;                                 // [high][3][32]: four rows' levels; before these
  double* const scratch = reinterpret_cast<double*>(shared);       // [both quads][4][32]
  unsigned* const columns = shared + plan.levels;                  // [column_quads][3][32]: weights
  unsigned* const rows = columns + plan.column_quads * 3 * kTile;  // [32][row_quads][4]
  int* const first_column = reinterpret_cast<int*>(rows + plan.row_quads * 4 * kTile);  // [32]
  int *const first_row = first_column + kTile, *const row_quads = first_row + kTile;    // [32] each, in quads
  unsigned* const pixels = reinterpret_cast<unsigned*>(row_quads + kTile);              // [chunk][wide][4][3]
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
      const auto take = [&] {
        unsigned next[kPlanes];
        load_planes(pixel += kPlanes, next);
        const unsigned first = weight[0], second = weight[kTile], rest = weight[2 * kTile];
#pragma unroll
        for (int i = 0; i < kPlanes; ++i) {
          sum[i].add(__byte_perm(now[i], next[i], select), first, second, rest);
          now[i] = next[i];
        }
        weight += 3 * kTile;
      };
      take();  // by itself: what sums begin with costs nothing then
#pragma unroll 2
      for (int q = 1; q < plan.column_quads; ++q) take();
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        const int level[4] = {sum[c].rounded(), sum[3 + c].rounded(), sum[6 + c].rounded(), sum[9 + c].rounded()};
        across[((from + quad) * 3 + c) * kTile + lane] = packed_levels(level);
      }
    }
  }
  __syncthreads();
  // Down, a lane four columns of a row.
  const int r = int(threadIdx.x) / kOwnLanes, own = int(threadIdx.x) % kOwnLanes * kOwn;
  const int64_t x = x0 + own, y = y0 + r;
  if (x > x_last || y > y_last) return;
  const unsigned* level = across + (first_row[r] - first_row[0]) * 3 * kTile + own;
  const unsigned* weight = rows + r * plan.row_quads * 4;
  Levels sum[3 * kOwn];  // nvcc 12 and 13 begin only the first row of an array of arrays as Levels says
  const auto take = [&] {
    const uint4 w = load16(weight);
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      const uint4 words = load16(level + c * kTile);
      const unsigned levels[kOwn] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < kOwn; ++i) sum[c * kOwn + i].add(levels[i], w.x, w.y, w.z);
    }
    level += 3 * kTile, weight += 4;
  };
  take();
#pragma unroll 1
  for (int q = row_quads[r]; q > 1; --q) take();
  T* const out = a.out.at<T>(t, 0, y, x);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    const Acc<T> scale = Acc<T>(a.scale[c]), shift = Acc<T>(a.shift[c]);
    T value[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      value[i] = from_acc<T>(Acc<T>(clamped(sum[c * kOwn + i].rounded())) * scale + shift);
    }
    T* const to = out + c * a.out.stride[1];
    if (plan.groups) {
      store_group(to, value);
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (x + i <= x_last) to[i * a.out.stride[3]] = value[i];
      }
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

// Of shared memory.
int64_t bytes_of(const ResizePlan& plan) {
  const int64_t of_lane = 3 * plan.column_quads + 4 * plan.row_quads + 3;
  return 4 * (plan.levels + of_lane * kTile + int64_t(plan.chunk) * plan.wide * kPlanes);
}

// With as many rows at a time as keep a few blocks on a multiprocessor; fewer where even one has too little room.
ResizePlan plan_of(const ResizeNormalizeArgs& a, int64_t room) {
  ResizePlan plan{a.across(), a.down(), 0, 0, 0, 0, 0, 0, 0, 0, 2 * kResizeWarps, false};
  plan.tiles_across = unsigned(ceil_div(a.columns.size[0], kTile));
  plan.tiles_down = unsigned(ceil_div(a.rows.size[0], kTile));
  const auto quads = [](double pixels) { return int(std::min(pixels, 1e6)) / int(kQuad) + 2; };
  plan.column_quads = int(std::min<int64_t>(ceil_div(plan.across.reads(), kQuad), 1 << 20));
  plan.row_quads = int(std::min<int64_t>(plan.down.taps() / kQuad, 1 << 20));
  plan.wide = quads((kTile - 1) * plan.across.scale + kQuad) + plan.column_quads;
  plan.per_wide = unsigned(((int64_t(1) << 32) + plan.wide - 1) / plan.wide);
  plan.high = quads((kTile - 1) * plan.down.scale + kQuad) + plan.row_quads;
  plan.levels = std::max(plan.high * 3, (plan.column_quads + plan.row_quads) * int(kQuad) * 2) * kTile;
  while (plan.chunk > kResizeWarps && int64_t(plan.chunk) * plan.wide * kPlanes * 4 > 16 * 1024) plan.chunk /= 2;
  while (plan.chunk > 1 && bytes_of(plan) > room) plan.chunk /= 2;
  return plan;
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
void launch(const ResizeNormalizeArgs& args, ResizePlan plan, int64_t bytes, cudaStream_t stream) {
  plan.groups = vectorizable<T, kOwn>(args.out);
  set_max_dynamic_smem(resize_normalize_kernel<T, kWords>, size_t(bytes));
  const int64_t blocks = args.out.size[0] * plan.tiles_across * plan.tiles_down;
  PYVIDX_LAUNCH((resize_normalize_kernel<T, kWords>), blocks, kResizeThreads, bytes, stream, args, plan);
  check_launch("resize_normalize_kernel");
}

}  // namespace

void resize_normalize_cuda(const ResizeNormalizeArgs& args, cudaStream_t stream) {
  if (args.out.size[0] * args.out.size[2] * args.out.size[3] == 0) return;
  const int64_t room = int64_t(device_smem());
  const ResizePlan plan = plan_of(args, room);
  const int64_t bytes = bytes_of(plan);
  visit_dtype<float, double, __half, __nv_bfloat16>("resize_normalize", args.out.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (bytes > room) return launch_long<T>(args, stream);
    in_words(args.frames) ? launch<T, true>(args, plan, bytes, stream) : launch<T, false>(args, plan, bytes, stream);
  });
}

}  // namespace pyvidx
#endif
