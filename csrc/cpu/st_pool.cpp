// A task walks the frames of a clip with the patches of a part, two frames and two patches at a time: the patches' sums
// stay in L2, those of the two frames in L1. Traffic: 1 read of x, and 1 / 16 of it (float32) for the frames' sums,
// which stay in the caches.
//
// Tried at v3, CLIP-L/14 on a Zen 4; bfloat16, T = 8 and 64: ms with all in the caches, share of a copy
//   4 frames by 4 patches                             .22 2.1  .49 .79
//   8 by 1                                            .38 3.2  .38 .51
//   4 by 1                                            .21 1.8  .54 .74
//   2 by 4                                            .19 1.7  .52 .97
//   2 by 2                                            .18 1.5  .52 .91
//     + the next patches fetched where a walk ends    .17 1.4  .66 1.0  kept
//   2 by 4, nothing fetched ahead                     .18 4.4  .48 .38
// Rows of x are a power of two apart, and so are the sums': 16 rows of x and 8 of sums at once evict each other from
// L1. Of 0.34 ms at T = 8 the call takes 0.15 where torch's operators ran between (0.01 where it is repeated).
#include "pyvidx/st_pool.h"

#include "level.h"
#include "pairs.h"
#include "parallel.h"
#include "temporal_attention.h"  // scratch

namespace pyvidx {
namespace {

using simd::each_pair;
using simd::Of;

constexpr int kTogether = 2;  // frames, and patches

bool is_real(const View<2>& mask, int64_t b, int64_t t) { return !mask || *mask.at<const int32_t>(b, t) != 0; }

int64_t real_frames(const View<2>& mask, int64_t b, int64_t T_) {
  int64_t count = 0;
  for (int64_t t = 0; t < T_; ++t) count += is_real(mask, b, t);
  return count;
}

template <typename A>
A inverse(int64_t count) {
  return count > 0 ? 1 / A(count) : A(0);
}

// kFrames x kRows rows of x, the latter `step` apart: added to their patches' and to their frames' sums.
template <typename T, int kFrames, int kRows>
void pool_rows(const T* const* x, int64_t step, int64_t C, Acc<T>* patch_sums, Acc<T>* const* frame_sums,
               const T* const* next) {
  each_pair<T>(C, [&](int64_t c, auto part) {
    Of<T, decltype(part)> frame[kFrames];
#pragma GCC unroll 2
    for (int f = 0; f < kFrames; ++f) frame[f] = load(frame_sums[f] + c, part);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
      auto patch = load(patch_sums + r * C + c, part);
#pragma GCC unroll 2
      for (int f = 0; f < kFrames; ++f) {
        simd::prefetch(next[f] + r * step + c);
        const auto v = load(x[f] + r * step + c, part);
        frame[f] += v, patch += v;
      }
      store(patch_sums + r * C + c, patch, part);
    }
#pragma GCC unroll 2
    for (int f = 0; f < kFrames; ++f) store(frame_sums[f] + c, frame[f], part);
  });
}

// The patches from p on in kFrames frames; fetches those from next_p on in the next frames.
template <typename T, int kFrames>
void pool_frames(const StPoolArgs& a, int64_t b, int64_t p, int64_t count, const int64_t* frames,
                 const int64_t* next_frames, int64_t next_p, Acc<T>* patch_sums) {
  const int64_t C = a.x.size[3], step = a.x.stride[2];
  for (int64_t row = 0; row < count; row += kTogether) {
    const T *x[kFrames], *next[kFrames];
    Acc<T>* frame_sums[kFrames];
    for (int f = 0; f < kFrames; ++f) {
      x[f] = a.x.at<const T>(b, frames[f], p + row), next[f] = a.x.at<const T>(b, next_frames[f], next_p + row);
      frame_sums[f] = a.frame_sums.at<Acc<T>>(b, p / kPoolRows, frames[f]);
    }
    Acc<T>* sums = patch_sums + row * C;
    if (count - row >= kTogether) {
      pool_rows<T, kFrames, kTogether>(x, step, C, sums, frame_sums, next);
      continue;
    }
    for (int64_t r = row; r < count; ++r, sums += C) {
      pool_rows<T, kFrames, 1>(x, step, C, sums, frame_sums, next);
      for (int f = 0; f < kFrames; ++f) x[f] += step, next[f] += step;
    }
  }
}

template <typename T>
void pool_part(const StPoolArgs& a, int64_t b, int64_t p) {
  const int64_t T_ = a.x.size[1], P = a.x.size[2], C = a.x.size[3];
  const int64_t count = P - p < kPoolRows ? P - p : kPoolRows, bytes = count * C * sizeof(Acc<T>);
  Scratch scratch(bytes + 64);
  Acc<T>* patch_sums = scratch.take<Acc<T>>(count * C);
  __builtin_memset(patch_sums, 0, bytes);
  __builtin_memset(a.frame_sums.at<Acc<T>>(b, p / kPoolRows), 0, T_ * C * sizeof(Acc<T>));
  const auto next_real = [&](int64_t t) {
    while (t < T_ && !is_real(a.mask, b, t)) ++t;
    return t;
  };
  int64_t real = 0, frames[kTogether], after[kTogether];
  for (int64_t t = next_real(0); t < T_;) {
    int64_t n = 0;
    for (; n < kTogether && t < T_; t = next_real(t + 1)) frames[n++] = t;
    const bool ends = t >= T_ && p + 2 * kPoolRows <= P;  // of this walk: the next one starts with the next patches
    const int64_t next_p = ends ? p + kPoolRows : p;
    for (int64_t i = 0, ahead = ends ? next_real(0) : t; i < n; ++i, ahead = next_real(ahead + 1)) {
      after[i] = ahead < T_ ? ahead : frames[i];
    }
    if (n == kTogether) {
      pool_frames<T, kTogether>(a, b, p, count, frames, after, next_p, patch_sums);
    } else {
      for (int64_t i = 0; i < n; ++i) pool_frames<T, 1>(a, b, p, count, frames + i, after + i, next_p, patch_sums);
    }
    real += n;
  }
  for (int64_t row = 0; row < count; ++row) {
    T* out = a.spatial.at<T>(b, p + row);
    each_pair<T>(C, [&](int64_t c, auto part) {
      store(out + c, load(patch_sums + row * C + c, part) * inverse<Acc<T>>(real), part);
    });
  }
}

template <typename T>
void pool(const StPoolArgs& a, const Executor& executor) {
  const int64_t B = a.x.size[0], T_ = a.x.size[1], P = a.x.size[2], C = a.x.size[3];
  const int64_t chunks = a.frame_sums.size[1];
  parallel_for(executor, B * chunks, kGrainElements / (kPoolRows * T_ * C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pool_part<T>(a, i / chunks, i % chunks * kPoolRows);
  });
  parallel_for(executor, B * T_, kGrainElements / (chunks * C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / T_, t = i % T_;
      T* out = a.temporal.at<T>(b, t);
      each_pair<T>(C, [&](int64_t c, auto part) {
        Of<T, decltype(part)> sum = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          sum += load(a.frame_sums.at<const Acc<T>>(b, chunk, t) + c, part);
        }
        store(out + c, sum * inverse<Acc<T>>(P), part);
      });
    }
  });
}

template <typename T>
void spread(const StPoolBackwardArgs& a, const Executor& executor) {
  const int64_t B = a.grad_x.size[0], T_ = a.grad_x.size[1], P = a.grad_x.size[2], C = a.grad_x.size[3];
  const bool stream = B * T_ * P * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  parallel_for(executor, B * T_, kGrainElements / (P * C + 1) + 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(C * sizeof(Acc<T>));
    Acc<T>* const of_frame = scratch.take<Acc<T>>(C);  // the part of a frame's gradient that all its patches share
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / T_, t = i % T_;
      const bool real = is_real(a.mask, b, t);
      const Acc<T> share = inverse<Acc<T>>(real_frames(a.mask, b, T_));
      const T* temporal = a.grad_temporal.at<const T>(b, t);
      each_pair<T>(
          C, [&](int64_t c, auto part) { store(of_frame + c, load(temporal + c, part) * inverse<Acc<T>>(P), part); });
      for (int64_t p = 0; p < P; ++p) {
        const T* spatial = a.grad_spatial.at<const T>(b, p);
        T* out = a.grad_x.at<T>(b, t, p);
        each_pair<T>(C, out, stream, [=](int64_t c, auto part) {
          const auto grad = load(spatial + c, part) * share + load(of_frame + c, part);
          store(out + c, real ? grad : Of<T, decltype(part)>{}, part);
        });
      }
    }
    simd::fence();
  });
}

void forward(const StPoolArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("st_pool", args.x.dtype,
                                             [&](auto t) { pool<typename decltype(t)::type>(args, executor); });
}

void backward(const StPoolBackwardArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("st_pool_backward", args.grad_x.dtype,
                                             [&](auto t) { spread<typename decltype(t)::type>(args, executor); });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(st_pool, StPoolArgs, forward)
PYVIDX_CPU_ENTRY(st_pool_backward, StPoolBackwardArgs, backward)
