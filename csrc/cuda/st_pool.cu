// Where a frame has few patches (kPoolAtOnce): a block takes 16 bytes of the channels of a clip, so that all its sums
// are whole; a lane of it one patch. It goes through the frames eight at a time, with the next eight under way;
// patches' sums stay in registers. Eight frames' sums are halved from lane to lane, each step with half as many values
// for half as many lanes, and those of the warps meet in shared memory. Traffic: 1 read of x, from L2 twice, for
// neighbors share its sectors of 32 bytes: this is what is left between a clip of 100 frames and a copy on an H200.
//
// Else a block takes a part, 32 patches of some frames, and 128 bytes of its channels; its warps take turns at the
// frames. In a warp 8 lanes of 16 bytes lie side by side, and each of the four groups of lanes has 8 patches. So a lane
// has 8 reads of a frame under way at once, keeps its patches' sums in registers, and four groups' sums of a frame meet
// in two shuffles; the warps' sums of the patches meet in shared memory. A second kernel adds up the parts of a frame
// and, where the frames were split over blocks as well, of a patch. Traffic: 1 read of x, and the sums of the frames in
// float once out and back (1 / 16 of x in 16 bits each way), which stay in L2.
//
// Tried, half, C = 1024; shares of a copy are predicted (docs/predictions.md), T = 8 and 100:
//   version                 registers, sm_70 / 90   rounds of loads   instructions per 16 bytes   V100       H200
//   a warp a block          128 / 128               16, 34            54, 73                      .48, .95   .19, .50
//   four warps a block      126 / 124               2, 5              76, 85                      .63, .95   .34, .66
//   at once, 32 bytes       128 / 128               1, 1              97, 121                     .99, .99   .74, .47
//   at once, 16 bytes       128 / 128               1, 1              97, 116                     .99, .99   .79, .60
//   loads without branches  108 / 128               1, 12             83, 68                      1.0, 1.0   .85, .76
// The model does not know what 32 lines in one load of a warp cost L1: at once for many frames is to be measured first.
//
// Backward: a thread takes 16 bytes of channels of one patch in eight frames. Traffic: 1 write.
#include "block.cuh"
#include "pyvidx/st_pool.h"

namespace pyvidx::cuda {

constexpr int kPoolWarps = 4, kPoolThreads = 32 * kPoolWarps;
constexpr int kPoolLanes = 8, kPoolGroups = 32 / kPoolLanes, kPoolPatches = int(kPoolRows) / kPoolGroups;
// At once: a patch has kOnceLanes lanes of 16 bytes.
constexpr int kOnceLanes = 1, kOncePatches = 32 / kOnceLanes, kOnceFrames = 8;
constexpr int kOnceThreads = int(kPoolAtOnce) / kOncePatches * 32;
constexpr int kAddUpThreads = 128, kSpreadThreads = 256, kSpreadFrames = 8;

__device__ __forceinline__ bool is_real(const View<2>& mask, int64_t b, int64_t t) {
  return !mask || *mask.at<const int32_t>(b, t) != 0;
}

// 1 / the frames of a clip that the mask keeps, 0 where there is none. The whole warp takes part.
template <typename A>
__device__ __forceinline__ A inverse_count(const View<2>& mask, int64_t b, int64_t T_) {
  if (!mask) return A(1) / A(T_);
  int count = 0;
  for (int64_t t = threadIdx.x % 32; t < T_; t += 32) count += is_real(mask, b, t);
  count = warp_sum(count);
  return count > 0 ? A(1) / A(count) : A(0);
}

// Sums over the lanes whose numbers differ in bits from kBit on: of each step's values a lane passes half on to the
// lane across, and keeps the other half. At the end lane has kCount / (steps' powers of two) of them in front;
// returns the index of the first.
template <int kBit, int kCount, typename A>
__device__ __forceinline__ int halve(A* x, int lane) {
  constexpr int kHalf = kCount / 2;
  const bool upper = lane & kBit;
  if constexpr (kHalf == 0) {
    x[0] += __shfl_xor_sync(kFullWarp, x[0], kBit);
  } else {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const A sent = upper ? x[i] : x[i + kHalf], kept = upper ? x[i + kHalf] : x[i];
      x[i] = kept + __shfl_xor_sync(kFullWarp, sent, kBit);
    }
  }
  const int first = upper ? kHalf : 0;
  if constexpr (kBit > kOnceLanes) {
    return first + halve<kBit / 2, kHalf == 0 ? 1 : kHalf>(x, lane);
  } else {
    return first;
  }
}

template <typename T, int kSize>
__global__ __launch_bounds__(kOnceThreads) void st_pool_at_once_kernel(StPoolArgs a, unsigned slices) {
  using A = Acc<T>;
  constexpr int kSums = kOnceFrames * kSize, kKept = kSums * kOnceLanes / 32 > 0 ? kSums * kOnceLanes / 32 : 1;
  constexpr int kSame = kSums * kOnceLanes >= 32 ? kOnceLanes : 32 / kSums;  // lanes that end with the same sums
  __shared__ A sums[2][kOnceThreads / 32][kOnceLanes][kSums];
  const int64_t T_ = a.x.size[1], P = a.x.size[2], C = a.x.size[3];
  const int64_t b = blockIdx.x / slices, c0 = int64_t(blockIdx.x % slices) * kOnceLanes * kSize;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t p = warp * kOncePatches + lane / kOnceLanes, c = c0 + lane % kOnceLanes * kSize;
  const bool own = p < P && c < C;  // the others only take part in the shuffles
  const T* const x = a.x.at<const T>(b, 0, own ? p : 0, own ? c : 0);
  Packed<T, kSize> packed[kOnceFrames];
  const auto load = [&](int64_t t0) {
    unsigned real = t0 + kOnceFrames <= T_ ? (1u << kOnceFrames) - 1 : t0 < T_ ? (1u << (T_ - t0)) - 1 : 0;
    if (a.mask) {
      for (int f = 0; f < kOnceFrames; ++f) {
        if (real >> f & 1 && !is_real(a.mask, b, t0 + f)) real ^= 1u << f;
      }
    }
#pragma unroll
    for (int f = 0; f < kOnceFrames; ++f) packed[f].load_if(own && real >> f & 1, x + (t0 + f) * a.x.stride[1]);
  };
  load(0);
  A patch[kSize] = {};
  const A of_frames = inverse_count<A>(a.mask, b, T_), of_patches = A(1) / A(P);
#pragma unroll 1
  for (int64_t t0 = 0, turn = 0; t0 < T_; t0 += kOnceFrames, turn ^= 1) {
    A frames[kSums];
#pragma unroll
    for (int f = 0; f < kOnceFrames; ++f) {
      A values[kSize];
      packed[f].unpack(values);
#pragma unroll
      for (int i = 0; i < kSize; ++i) patch[i] += values[i], frames[f * kSize + i] = values[i];
    }
    load(t0 + kOnceFrames);
    const int first = halve<16, kSums>(frames, lane);
    if (lane % kSame / kOnceLanes == 0) {
#pragma unroll
      for (int i = 0; i < kKept; ++i) sums[turn][warp][lane % kOnceLanes][first + i] = frames[i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kSums * kOnceLanes; i += blockDim.x) {
      const int f = i / (kSize * kOnceLanes), at = i % (kSize * kOnceLanes);
      if (t0 + f >= T_ || c0 + at >= C) continue;
      A sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums[turn][w][at / kSize][f * kSize + at % kSize];
      *a.temporal.at<T>(b, t0 + f, c0 + at) = from_acc<T>(sum * of_patches);
    }
  }
  if (!own) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) patch[i] *= of_frames;
  store_pack<T, kSize>(a.spatial.at<T>(b, p, c), patch);
}

template <typename T, int kSize>
__global__ __launch_bounds__(kPoolThreads) void st_pool_kernel(StPoolArgs a, unsigned spans, unsigned tiles) {
  using A = Acc<T>;
  __shared__ A sums[kPoolWarps][kPoolPatches * kSize][32];
  const int64_t T_ = a.x.size[1], P = a.x.size[2], C = a.x.size[3];
  const unsigned chunks = unsigned(a.frame_sums.size[1]);
  const unsigned tile = blockIdx.x % tiles, chunk = blockIdx.x / tiles % chunks;
  const unsigned span = blockIdx.x / tiles / chunks % spans, b = blockIdx.x / tiles / chunks / spans;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % kPoolLanes, group = threadIdx.x % 32 / kPoolLanes;
  const int64_t p0 = chunk * kPoolRows + group, c = (int64_t(tile) * kPoolLanes + lane) * kSize;
  const int64_t begin = span * a.frames, end = begin + a.frames < T_ ? begin + a.frames : T_;
  const bool own = c < C;  // the others only take part in the shuffles
  const int64_t x_step = kPoolGroups * a.x.stride[2];
  A patch[kPoolPatches][kSize] = {};
#pragma unroll 1
  for (int64_t t = begin + warp; t < end; t += kPoolWarps) {
    const T* const x = a.x.at<const T>(b, t, p0, c);
    A frame[kSize] = {};
    if (is_real(a.mask, b, t)) {
      Packed<T, kSize> packed[kPoolPatches];
#pragma unroll
      for (int r = 0; r < kPoolPatches; ++r) {
        if (own && p0 + r * kPoolGroups < P) packed[r].load(x + r * x_step);
      }
#pragma unroll
      for (int r = 0; r < kPoolPatches; ++r) {
        A x[kSize];
        packed[r].unpack(x);
#pragma unroll
        for (int i = 0; i < kSize; ++i) patch[r][i] += x[i], frame[i] += x[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      for (int bit = kPoolLanes; bit < 32; bit *= 2) frame[i] += __shfl_xor_sync(kFullWarp, frame[i], bit);
    }
    if (group != 0 || !own) continue;
    store_channels<A, kSize>(a.frame_sums.at<A>(b, chunk, t, c), frame);
  }
#pragma unroll
  for (int r = 0; r < kPoolPatches; ++r) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) sums[warp][r * kSize + i][threadIdx.x % 32] = patch[r][i];
  }
  const A share = spans == 1 ? inverse_count<A>(a.mask, b, T_) : A(1);
  __syncthreads();
  for (int r = warp; r < kPoolPatches; r += kPoolWarps) {
    const int64_t p = p0 + r * kPoolGroups;
    if (!own || p >= P) return;
    A sum[kSize] = {};
#pragma unroll
    for (int w = 0; w < kPoolWarps; ++w) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum[i] += sums[w][r * kSize + i][threadIdx.x % 32];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] *= share;
    if (spans == 1) {
      store_pack<T, kSize>(a.spatial.at<T>(b, p, c), sum);
    } else {
      store_channels<A, kSize>(a.patch_sums.at<A>(b, span, p, c), sum);
    }
  }
}

// The second stage, a block for each row of temporal, then of spatial where its sums were split.
template <typename T>
__global__ __launch_bounds__(kAddUpThreads) void st_pool_add_up_kernel(StPoolArgs a, unsigned tiles) {
  using A = Acc<T>;
  const int64_t B = a.x.size[0], T_ = a.x.size[1], P = a.x.size[2];
  const int64_t row = blockIdx.x / tiles, c = int64_t(blockIdx.x % tiles) * kAddUpThreads + threadIdx.x;
  const bool temporal = row < B * T_;
  const int64_t b = temporal ? row / T_ : (row - B * T_) / P, at = temporal ? row % T_ : (row - B * T_) % P;
  const View<4>& sums = temporal ? a.frame_sums : a.patch_sums;
  const A share = temporal ? A(1) / A(P) : inverse_count<A>(a.mask, b, T_);
  if (c >= a.x.size[3]) return;
  A sum = 0;
  for (int64_t i = 0; i < sums.size[1]; ++i) sum += *sums.at<const A>(b, i, at, c);
  *(temporal ? a.temporal.at<T>(b, at, c) : a.spatial.at<T>(b, at, c)) = from_acc<T>(sum * share);
}

template <typename T, int kSize>
__global__ __launch_bounds__(kSpreadThreads) void st_pool_backward_kernel(StPoolBackwardArgs a, unsigned spans,
                                                                          unsigned blocks_per_span) {
  using A = Acc<T>;
  const int64_t T_ = a.grad_x.size[1], P = a.grad_x.size[2], packs = a.grad_x.size[3] / kSize;
  const unsigned unit = blockIdx.x / blocks_per_span;
  const int64_t b = unit / spans, t0 = int64_t(unit % spans) * kSpreadFrames;
  const int64_t i = int64_t(blockIdx.x % blocks_per_span) * kSpreadThreads + threadIdx.x;
  const A of_frames = inverse_count<A>(a.mask, b, T_), of_patches = A(1) / A(P);
  if (i >= P * packs) return;
  const int64_t p = i / packs, c = (i - p * packs) * kSize;
  A spatial[kSize];
  load_pack<T, kSize>(a.grad_spatial.at<const T>(b, p, c), spatial);
  for (int64_t t = t0; t < t0 + kSpreadFrames && t < T_; ++t) {
    A grad[kSize];
    load_pack<T, kSize>(a.grad_temporal.at<const T>(b, t, c), grad);
    const bool real = is_real(a.mask, b, t);
#pragma unroll
    for (int e = 0; e < kSize; ++e) grad[e] = real ? spatial[e] * of_frames + grad[e] * of_patches : A(0);
    store_pack<T, kSize>(a.grad_x.at<T>(b, t, p, c), grad);
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

template <typename T, int kSize>
void launch_forward(const StPoolArgs& a, cudaStream_t stream) {
  const int64_t B = a.x.size[0], T_ = a.x.size[1], P = a.x.size[2], C = a.x.size[3];
  if (B * C == 0) return;
  if (a.frames == 0) {
    const int64_t slices = ceil_div(C, kOnceLanes * kSize), threads = ceil_div(P, kOncePatches) * 32;
    PYVIDX_LAUNCH((st_pool_at_once_kernel<T, kSize>), B * slices, unsigned(threads), 0, stream, a, unsigned(slices));
    check_launch("st_pool_at_once_kernel");
    return;
  }
  const int64_t spans = ceil_div(T_, a.frames), tiles = ceil_div(C, kPoolLanes * kSize);
  const int64_t parts = B * spans * narrow(a.frame_sums.size[1], "st_pool: the chunks of a frame") * tiles;
  PYVIDX_LAUNCH((st_pool_kernel<T, kSize>), parts, kPoolThreads, 0, stream, a, unsigned(spans), unsigned(tiles));
  check_launch("st_pool_kernel");
  const int64_t rows = B * (T_ + (spans > 1 ? P : 0)), add_up_tiles = ceil_div(C, kAddUpThreads);
  PYVIDX_LAUNCH(st_pool_add_up_kernel<T>, rows * add_up_tiles, kAddUpThreads, 0, stream, a, unsigned(add_up_tiles));
  check_launch("st_pool_add_up_kernel");
}

template <typename T, int kSize>
void launch_backward(const StPoolBackwardArgs& a, cudaStream_t stream) {
  const int64_t B = a.grad_x.size[0], T_ = a.grad_x.size[1], P = a.grad_x.size[2], C = a.grad_x.size[3];
  if (B * C == 0) return;
  const int64_t spans = ceil_div(T_, kSpreadFrames), blocks = ceil_div(P * (C / kSize), kSpreadThreads);
  PYVIDX_LAUNCH((st_pool_backward_kernel<T, kSize>), B * spans * blocks, kSpreadThreads, 0, stream, a, unsigned(spans),
                unsigned(blocks));
  check_launch("st_pool_backward_kernel");
}

}  // namespace

void st_pool_cuda(const StPoolArgs& args, cudaStream_t stream) {
  visit_dtype<float, double, __half, __nv_bfloat16>("st_pool", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    vectorizable<T>(args.x) && vectorizable<T>(args.spatial) ? launch_forward<T, kVec<T>>(args, stream)
                                                             : launch_forward<T, 1>(args, stream);
  });
}

void st_pool_backward_cuda(const StPoolBackwardArgs& args, cudaStream_t stream) {
  visit_dtype<float, double, __half, __nv_bfloat16>("st_pool_backward", args.grad_x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    vectorizable<T>(args.grad_spatial) && vectorizable<T>(args.grad_temporal) && vectorizable<T>(args.grad_x)
        ? launch_backward<T, kVec<T>>(args, stream)
        : launch_backward<T, 1>(args, stream);
  });
}

}  // namespace pyvidx
#endif
