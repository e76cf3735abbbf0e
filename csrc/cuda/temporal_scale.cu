// Forward: a thread takes 16 bytes of channels of one token position in four frames: it has the six frames that these
// meet under way at once, and memory is read 1.5 times through L2, once from outside it. Backward: a block takes a part
// (8 positions in 16 frames), a warp two positions of it, 32 lanes 512 bytes of their channels; the sums for weight and
// bias stay in registers, are added up over the warps in shared memory, and a second kernel adds up the parts in their
// order. Traffic: 2 passes; backward 3, and 2 % for the sums.
//
// That is for three taps, as published, and rows of whole 16 bytes. Any other number of taps or alignment goes channel
// by channel and tap by tap, through the caches.
#include "block.cuh"
#include "pyvidx/temporal_scale.h"
#include "row_sums.cuh"

namespace pyvidx::cuda {

constexpr int kTaps = 3;
constexpr int kScaleThreads = 256;
constexpr int kAnyThreads = 128;
constexpr int kForwardFrames = 4;  // of a thread
template <typename T>
constexpr int kBackwardFrames = sizeof(T) == 2 ? 2 : 4;  // at a time: 16-bit rows have twice the values in registers
constexpr int kBackwardThreads = 128, kBackwardWarps = kBackwardThreads / 32;
// Of a multiprocessor, so at most 128 registers; without, ptxas spills at 72. sm_120 needs a few more.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBackwardBlocks = 3;
#else
constexpr int kBackwardBlocks = 4;
#endif

// 16 bytes of channels in kFrames frames from t on, 0 where a frame is not there or left out by the mask.
template <typename T, int kFrames>
__device__ __forceinline__ void load_frames(const View<4>& x, const View<2>& mask, int64_t b, int64_t t, int64_t n,
                                            int64_t c, Packed<T, kVec<T>> (&frames)[kFrames]) {
  bool there[kFrames];
#pragma unroll
  for (int j = 0; j < kFrames; ++j) {
    there[j] = t + j >= 0 && t + j < x.size[1];
    if (mask && there[j]) there[j] = *mask.at<const int32_t>(b, t + j) != 0;
  }
  const T* const first = x.at<const T>(b, t, n, c);
#pragma unroll
  for (int j = 0; j < kFrames; ++j) {
    if (there[j]) frames[j].load(first + j * x.stride[1]);
  }
}

// weight is contiguous [C, 3]: the taps of a thread's channels are three times 16 bytes in a row.
template <typename T>
__device__ __forceinline__ void load_taps(const View<2>& weight, int64_t c, Acc<T> (&w)[kTaps][kVec<T>]) {
  Acc<T> flat[kTaps][kVec<T>];
#pragma unroll
  for (int k = 0; k < kTaps; ++k) load_vec(weight.at<const T>(c) + k * kVec<T>, flat[k]);
#pragma unroll
  for (int i = 0; i < kVec<T>; ++i) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) w[k][i] = flat[(i * kTaps + k) / kVec<T>][(i * kTaps + k) % kVec<T>];
  }
}

template <typename T>
__global__ __launch_bounds__(kScaleThreads) void temporal_scale_kernel(TemporalScaleArgs a, unsigned blocks_per_span,
                                                                       unsigned spans) {
  constexpr int kSize = kVec<T>, kWindow = kForwardFrames + kTaps - 1;
  const int64_t T_ = a.x.size[1], N = a.x.size[2];
  const unsigned packs = unsigned(a.x.size[3] / kSize), unit = blockIdx.x / blocks_per_span;
  const unsigned i = blockIdx.x % blocks_per_span * kScaleThreads + threadIdx.x, n = i / packs, b = unit / spans;
  if (n >= N) return;
  const int64_t t0 = int64_t(unit - b * spans) * kForwardFrames, c = int64_t(i - n * packs) * kSize;
  Packed<T, kSize> frames[kWindow], residual[kForwardFrames];
  load_frames<T>(a.x, a.mask, b, t0 - kTaps / 2, n, c, frames);
  if (a.residual) load_frames<T>(a.residual, {}, b, t0, n, c, residual);
  Acc<T> w[kTaps][kSize], bias[kSize] = {}, x[kWindow][kSize];
  load_taps<T>(a.weight, c, w);
  if (a.bias) load_vec(a.bias.at<const T>(c), bias);
#pragma unroll
  for (int j = 0; j < kWindow; ++j) frames[j].unpack(x[j]);
#pragma unroll
  for (int f = 0; f < kForwardFrames; ++f) {
    if (t0 + f >= T_) return;
    Acc<T> sum[kSize];
    residual[f].unpack(sum);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      sum[e] += bias[e];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) sum[e] += w[k][e] * x[f + k][e];
    }
    store_vec(a.out.at<T>(b, t0 + f, n, c), sum);
  }
}

// One element: channel c at (b, t, n), 0 where the frame is not there or left out.
template <typename T>
__device__ __forceinline__ Acc<T> element(const View<4>& x, const View<2>& mask, int64_t b, int64_t t, int64_t n,
                                          int64_t c) {
  if (t < 0 || t >= x.size[1] || (mask && *mask.at<const int32_t>(b, t) == 0)) return 0;
  return to_acc(*x.at<const T>(b, t, n, c));
}

template <typename T>
__global__ __launch_bounds__(kAnyThreads) void temporal_scale_any_kernel(TemporalScaleArgs a, unsigned tiles) {
  const int64_t row = blockIdx.x / tiles, N = a.x.size[2], T_ = a.x.size[1], K = a.weight.size[1];
  const int64_t b = row / (T_ * N), t = row / N % T_, n = row % N;
  const int64_t c = int64_t(blockIdx.x % tiles) * kAnyThreads + threadIdx.x;
  if (c >= a.x.size[3]) return;
  Acc<T> sum = a.bias ? to_acc(*a.bias.at<const T>(c)) : Acc<T>(0);
  if (a.residual) sum += to_acc(*a.residual.at<const T>(b, t, n, c));
  for (int64_t k = 0; k < K; ++k) {
    sum += to_acc(*a.weight.at<const T>(c, k)) * element<T>(a.x, a.mask, b, t + k - K / 2, n, c);
  }
  *a.out.at<T>(b, t, n, c) = from_acc<T>(sum);
}

struct Part {
  int64_t b, s, n;  // its first frame and position
};
__device__ __forceinline__ Part part_of(const View<4>& grad, unsigned part) {
  const unsigned chunks = unsigned((grad.size[2] + kScaleRows - 1) / kScaleRows);
  const unsigned spans = unsigned((grad.size[1] + kScaleFrames - 1) / kScaleFrames);
  return {part / chunks / spans, int64_t(part / chunks % spans) * kScaleFrames, int64_t(part % chunks) * kScaleRows};
}

// One position in kBackwardFrames frames from s on: grad_x, and the products for weight and bias.
template <typename T, bool kSums>
__device__ __forceinline__ void backward_step(const TemporalScaleBackwardArgs& a, int64_t b, int64_t s, int64_t n,
                                              int64_t c, const Acc<T> (&w)[kTaps][kVec<T>],
                                              Acc<T> (&sums)[kTaps + 1][kVec<T>]) {
  constexpr int kFrames = kBackwardFrames<T>, kWindow = kFrames + kTaps - 1;
  Packed<T, kVec<T>> grads[kWindow], rows[kFrames];
  load_frames<T>(a.grad_out, {}, b, s - kTaps / 2, n, c, grads);
  if constexpr (kSums) load_frames<T>(a.x, a.mask, b, s, n, c, rows);
  Acc<T> g[kWindow][kVec<T>], x[kFrames][kVec<T>];
#pragma unroll
  for (int j = 0; j < kWindow; ++j) grads[j].unpack(g[j]);
#pragma unroll
  for (int f = 0; f < kFrames; ++f) rows[f].unpack(x[f]);
#pragma unroll
  for (int f = 0; f < kFrames; ++f) {
    if (s + f >= a.grad_out.size[1]) return;
    const bool real = !a.mask || *a.mask.at<const int32_t>(b, s + f) != 0;
    Acc<T> grad[kVec<T>] = {};
#pragma unroll
    for (int e = 0; e < kVec<T>; ++e) {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) {
        const Acc<T> other = g[f + kTaps - 1 - k][e];
        if (real) grad[e] += w[k][e] * other;
        if constexpr (kSums) sums[k][e] += x[f][e] * other;
      }
      if constexpr (kSums) sums[kTaps][e] += g[f + kTaps / 2][e];
    }
    store_vec(a.grad_x.at<T>(b, s + f, n, c), grad);
  }
}

template <typename T, bool kSums>
__global__ __launch_bounds__(kBackwardThreads,
                             kBackwardBlocks) void temporal_scale_backward_kernel(TemporalScaleBackwardArgs a,
                                                                                  unsigned tiles) {
  constexpr int kSize = kVec<T>, kValues = (kTaps + 1) * kSize;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned part = blockIdx.x / tiles;
  const Part at = part_of(a.grad_out, part);
  const int64_t C = a.grad_out.size[3], first = int64_t(blockIdx.x % tiles) * 32 * kSize, c = first + lane * kSize;
  Acc<T> w[kTaps][kSize], sums[kTaps + 1][kSize] = {};
  if (c < C) load_taps<T>(a.weight, c, w);
#pragma unroll 1
  for (int64_t n = at.n + warp; c < C && n < at.n + kScaleRows && n < a.grad_out.size[2]; n += kBackwardWarps) {
#pragma unroll 1
    for (int64_t s = at.s; s < at.s + kScaleFrames && s < a.grad_out.size[1]; s += kBackwardFrames<T>) {
      backward_step<T, kSums>(a, at.b, s, n, c, w, sums);
    }
  }
  if constexpr (kSums) {
    __shared__ Acc<T> shared[kBackwardWarps][kValues][32];
#pragma unroll
    for (int k = 0; k <= kTaps; ++k) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) shared[warp][k * kSize + i][lane] = sums[k][i];
    }
    __syncthreads();
    for (int v = warp; v < kValues; v += kBackwardWarps) {
      if (c >= C) break;
      Acc<T> sum = 0;
#pragma unroll
      for (int other = 0; other < kBackwardWarps; ++other) sum += shared[other][v][lane];
      *a.partial.at<Acc<T>>(part, v / kSize, c + v % kSize) = sum;
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kAnyThreads) void temporal_scale_backward_any_kernel(TemporalScaleBackwardArgs a,
                                                                                  unsigned tiles) {
  const unsigned part = blockIdx.x / tiles;
  const Part at = part_of(a.grad_out, part);
  const int64_t T_ = a.grad_out.size[1], N = a.grad_out.size[2], K = a.weight.size[1];
  const int64_t c = int64_t(blockIdx.x % tiles) * kAnyThreads + threadIdx.x;
  if (c >= a.grad_out.size[3]) return;
  // f(s, x or grad_x there, grad_out of the position): plain pointers, because with views ptxas spilled here
  const auto each_row = [&](const View<4>& x, auto&& f) {
#pragma unroll 1
    for (int64_t n = at.n; n < at.n + kScaleRows && n < N; ++n) {
      const T* g = a.grad_out.at<const T>(at.b, 0, n, c);
#pragma unroll 1
      for (int64_t s = at.s; s < at.s + kScaleFrames && s < T_; ++s) f(s, x.at<T>(at.b, s, n, c), g);
    }
  };
  const auto grad = [&](const T* g, int64_t t) {
    return t >= 0 && t < T_ ? to_acc(g[t * a.grad_out.stride[1]]) : Acc<T>(0);
  };
  const auto real = [&](int64_t s) { return !a.mask || *a.mask.at<const int32_t>(at.b, s) != 0; };
  each_row(a.grad_x, [&](int64_t s, T* out, const T* g) {
    Acc<T> sum = 0;
    const int64_t taps = real(s) ? K : 0;
#pragma unroll 1
    for (int64_t k = 0; k < taps; ++k) sum += to_acc(*a.weight.at<const T>(c, k)) * grad(g, s - k + K / 2);
    *out = from_acc<T>(sum);
  });
  if (!a.grad_bias) return;
#pragma unroll 1
  for (int64_t k = 0; k < K; ++k) {
    Acc<T> sum = 0;
    each_row(a.x, [&](int64_t s, const T* x, const T* g) {
      if (real(s)) sum += grad(g, s - k + K / 2) * to_acc(*x);
    });
    *a.partial.at<Acc<T>>(part, k, c) = sum;
  }
  Acc<T> sum = 0;
  each_row(a.x, [&](int64_t s, const T*, const T* g) { sum += grad(g, s); });
  *a.partial.at<Acc<T>>(part, K, c) = sum;
}

template <typename T>
__global__ __launch_bounds__(kAddUpThreads, 1) void temporal_scale_add_up_kernel(TemporalScaleBackwardArgs a) {
  const int64_t k = blockIdx.y, C = a.grad_bias.size[0];
  add_up(a.partial.at<const Acc<T>>(0, k), a.partial.stride[0], a.partial.size[0], C, [&](int64_t c, Acc<T> sum) {
    *(k < a.weight.size[1] ? a.grad_weight.at<T>(c, k) : a.grad_bias.at<T>(c)) = from_acc<T>(sum);
  });
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

template <typename T>
bool whole_taps(const View<2>& weight) {
  const bool contiguous = weight.stride[1] == 1 && weight.stride[0] == kTaps;
  return weight.size[1] == kTaps && contiguous && reinterpret_cast<uintptr_t>(weight.data) % 16 == 0;
}

template <typename T>
void launch_forward(const TemporalScaleArgs& a, cudaStream_t stream) {
  const int64_t B = a.x.size[0], T_ = a.x.size[1], N = a.x.size[2], C = a.x.size[3];
  if (B * T_ * N * C == 0) return;
  narrow(N * C, "temporal_scale: the elements of a frame");
  if (whole_taps<T>(a.weight) && vectorizable<T>(a.x) && vectorizable<T>(a.out) && vectorizable<T>(a.bias) &&
      vectorizable<T>(a.residual)) {
    const int64_t blocks = ceil_div(N * C / kVec<T>, kScaleThreads), spans = ceil_div(T_, kForwardFrames);
    PYVIDX_LAUNCH(temporal_scale_kernel<T>, B * spans * blocks, kScaleThreads, 0, stream, a, unsigned(blocks),
                  unsigned(spans));
    return check_launch("temporal_scale_kernel");
  }
  const int64_t tiles = ceil_div(C, kAnyThreads);
  PYVIDX_LAUNCH(temporal_scale_any_kernel<T>, B * T_ * N * tiles, kAnyThreads, 0, stream, a, unsigned(tiles));
  check_launch("temporal_scale_any_kernel");
}

template <typename T>
void launch_backward(const TemporalScaleBackwardArgs& a, cudaStream_t stream) {
  const int64_t C = a.grad_out.size[3];
  const int64_t parts = temporal_scale_parts(a.grad_out.size[0], a.grad_out.size[1], a.grad_out.size[2]);
  if (C == 0) return;
  if (parts > 0 && whole_taps<T>(a.weight) && vectorizable<T>(a.grad_out) && vectorizable<T>(a.x) &&
      vectorizable<T>(a.grad_x)) {
    const int64_t tiles = ceil_div(C, 32 * kVec<T>);
    if (a.grad_bias) {
      PYVIDX_LAUNCH((temporal_scale_backward_kernel<T, true>), parts * tiles, kBackwardThreads, 0, stream, a,
                    unsigned(tiles));
    } else {
      PYVIDX_LAUNCH((temporal_scale_backward_kernel<T, false>), parts * tiles, kBackwardThreads, 0, stream, a,
                    unsigned(tiles));
    }
    check_launch("temporal_scale_backward_kernel");
  } else if (parts > 0) {
    const int64_t tiles = ceil_div(C, kAnyThreads);
    PYVIDX_LAUNCH(temporal_scale_backward_any_kernel<T>, parts * tiles, kAnyThreads, 0, stream, a, unsigned(tiles));
    check_launch("temporal_scale_backward_any_kernel");
  }
  if (!a.grad_bias) return;
  const Grid grid(add_up_blocks(C), a.weight.size[1] + 1);
  PYVIDX_LAUNCH(temporal_scale_add_up_kernel<T>, grid, kAddUpThreads, 0, stream, a);
  check_launch("temporal_scale_add_up_kernel");
}

}  // namespace

void temporal_scale_cuda(const TemporalScaleArgs& args, cudaStream_t stream) {
  visit_dtype<float, double, __half, __nv_bfloat16>(
      "temporal_scale", args.x.dtype, [&](auto t) { launch_forward<typename decltype(t)::type>(args, stream); });
}

void temporal_scale_backward_cuda(const TemporalScaleBackwardArgs& args, cudaStream_t stream) {
  visit_dtype<float, double, __half, __nv_bfloat16>("temporal_scale_backward", args.grad_x.dtype, [&](auto t) {
    launch_backward<typename decltype(t)::type>(args, stream);
  });
}

}  // namespace pyvidx
#endif
