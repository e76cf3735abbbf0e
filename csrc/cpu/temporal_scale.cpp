// A task walks the frames of a clip with a few rows (token positions), so that the K frames around each are still in
// the caches: x is read from memory once. Within a frame, a vector of channels of four rows at a time, for which each
// tap is loaded once (bfloat16 at v3: of one row, whose addresses fit the registers); backward at v3, of one row of
// four frames. Frames that read as 0 are rows of zeros. Traffic: 2 passes; backward 3.
//
// Tried at v3, 384 channels on a Zen 4; instructions for 16 values in bfloat16, share of a copy in float32 and
// bfloat16:
//   forward, T = 8: before                                             45  .58 .38
//     + outputs of over 1 MB past the caches (with a sum behind it: -13 %)  45  .89 .50
//     + one row, addresses found before the loop                       33  .83 .55
//     + the next rows fetched where the walk over the frames ends      33  .96 .56  kept
//   backward, T = 64: before                                           75  .68 .49
//     + gradients collected, then stored past the caches               77  .98 .63
//     + addresses found before the loop                                68  1.0 .66
//     + one row of four frames: rows are widened once                  59  .93 .67  kept; in the caches 3.1 to 2.5 ms
//   forward by four frames, collected and copied: no gain; 16, 32, 64 rows a task: no gain
// What is left forward in bfloat16 at T = 8, 0.3 ms: 0.14 with all in the caches; and the call of an op takes 0.12
// where torch's operators ran between (0.01 where it is repeated), of which the checks in Python are a third.
#include "pyvidx/temporal_scale.h"

#include "level.h"
#include "pairs.h"
#include "parallel.h"

namespace pyvidx {
namespace {

using simd::Acc;
using simd::each_pair;
using simd::load;
using simd::Of;
using simd::store;
using simd::Vec;

template <typename T>
constexpr int kTogether = simd::kPairs<T> && sizeof(T) == 2 ? 1 : 4;  // rows
template <typename T>
constexpr int kTogetherBack = simd::kPairs<T> ? 2 : 4;  // of pairs, two are what 16 registers hold

constexpr int kFrames = 4;  // the backward takes at once
template <typename T>
constexpr bool kByFrames = simd::kPairs<T>;

// Channels whose gradients are collected before they are stored: stores past the caches that take turns with those of
// the sums leave half-filled lines.
constexpr int64_t kBlock = 256;

// Rows of one frame, `step` elements apart.
template <typename T>
struct Rows {
  T* data;
  int64_t step;
  PYVIDX_SIMD Rows from(int64_t row) const { return {data + row * step, step}; }
};

template <typename T>
Rows<T> rows_of(const View<4>& x, int64_t b, int64_t t, int64_t n) {
  return {x.at<T>(b, t, n), x.stride[2]};
}

// What all tasks read.
template <typename T>
struct Taps {
  const Acc<T>* data;  // [K + 2, C]: the taps, the bias, zeros
  int64_t K, C;
  const Acc<T>* row(int64_t k) const { return data + k * C; }
  Rows<const T> zeros() const { return {reinterpret_cast<const T*>(row(K + 1)), 0}; }  // 0 has the same bits in every T
};

template <typename T>
Taps<T> fill_taps(const View<2>& weight, const View<1>& bias, const View<2>& taps) {
  const int64_t C = weight.size[0], K = weight.size[1];
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t c = 0; c < C; ++c) {
      *taps.at<Acc<T>>(k, simd::pair_place<T>(c, C)) = simd::load(weight.at<const T>(c, k), simd::Part{1})[0];
    }
  }
  each_pair<T>(C, [&](int64_t c, auto part) {
    store(taps.at<Acc<T>>(K, c), bias ? load(bias.at<const T>(c), part) : Of<T, decltype(part)>{}, part);
    store(taps.at<Acc<T>>(K + 1, c), Of<T, decltype(part)>{}, part);
  });
  return {taps.at<const Acc<T>>(), K, C};
}

bool is_real(const View<2>& mask, int64_t b, int64_t t) { return !mask || *mask.at<const int32_t>(b, t) != 0; }

// The frames that the taps of frame t meet: t - K / 2 and on, or the other way round.
template <typename T, typename Reads>
void fill_window(const View<4>& x, const Taps<T>& taps, int64_t b, int64_t t, int64_t n, int64_t step, Reads&& reads,
                 Rows<const T>* window) {
  for (int64_t k = 0; k < taps.K; ++k) {
    const int64_t from = t + step * (k - taps.K / 2);
    const bool there = from >= 0 && from < x.size[1] && reads(from);
    window[k] = there ? rows_of<const T>(x, b, from, n) : taps.zeros();
  }
}

// The rows from n on of frame t, to be fetched. After the last frame of the walk the next rows' walk begins: with 8
// frames, a quarter of x would not be fetched ahead otherwise.
template <typename T>
Rows<const T> rows_ahead(const View<4>& x, int64_t b, int64_t t, int64_t first, int64_t last, int64_t n) {
  if (t < last) return rows_of<const T>(x, b, t, n);
  const int64_t again = first + t - last, more = n + kScaleRows;
  return again < last && more + kScaleRows <= x.size[2] ? rows_of<const T>(x, b, again, more)
                                                        : rows_of<const T>(x, b, last - 1, n);
}

// Rows may be stored past the caches where all of them are aligned.
template <typename T>
bool aligned(const Rows<T>& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % simd::kBytes == 0 && rows.step * sizeof(T) % simd::kBytes == 0;
}

template <typename T, int kTaps, int kRows>
void scale_rows(const Taps<T>& taps, const Rows<const T>* window, Rows<const T> residual, Rows<const T> next,
                Rows<T> out, int64_t row, bool stream) {
  const int64_t K = kTaps > 0 ? kTaps : taps.K;
  Rows<const T> from[kTaps > 0 ? kTaps : kMaxTaps];
  for (int64_t k = 0; k < K; ++k) from[k] = window[k].from(row);
  const Acc<T>* weights[(kTaps > 0 ? kTaps : kMaxTaps) + 1];  // GCC would find the rows' addresses for each vector
  for (int64_t k = 0; k <= K; ++k) weights[k] = taps.row(k);
  out = out.from(row), next = next.from(row), residual = residual.from(row);
  each_pair<T>(taps.C, out.data, stream, [=](int64_t c, auto part) {
    Of<T, decltype(part)> sum[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      simd::prefetch(next.data + r * next.step + c);
      sum[r] = load(weights[K] + c, part);
    }
    for (int64_t k = 0; k < K; ++k) {
      const auto w = load(weights[k] + c, part);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r] += w * load(from[k].data + r * from[k].step + c, part);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if (residual.data != nullptr) sum[r] += load(residual.data + r * residual.step + c, part);
      store(out.data + r * out.step + c, sum[r], part);
    }
  });
}

template <typename T, int kTaps>
void scale(const TemporalScaleArgs& a, const Executor& executor) {
  const int64_t B = a.x.size[0], T_ = a.x.size[1], N = a.x.size[2], C = a.x.size[3];
  const Taps<T> taps = fill_taps<T>(a.weight, a.bias, a.taps);
  const int64_t chunks = (N + kScaleRows - 1) / kScaleRows;
  const bool large = B * T_ * N * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  parallel_for(executor, B * chunks, kGrainElements / (kScaleRows * T_ * C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks, n = task % chunks * kScaleRows, count = N - n < kScaleRows ? N - n : kScaleRows;
      for (int64_t t = 0; t < T_; ++t) {
        Rows<const T> window[kMaxTaps];
        fill_window(a.x, taps, b, t, n, 1, [&](int64_t from) { return is_real(a.mask, b, from); }, window);
        const Rows<const T> next = rows_ahead<T>(a.x, b, t + taps.K / 2 + 1, 0, T_, n);
        const Rows<const T> residual = a.residual ? rows_of<const T>(a.residual, b, t, n) : Rows<const T>{};
        const Rows<T> out = rows_of<T>(a.out, b, t, n);
        const bool stream = large && aligned(out);
        int64_t row = 0;
        for (; row + kTogether<T> <= count; row += kTogether<T>)
          scale_rows<T, kTaps, kTogether<T>>(taps, window, residual, next, out, row, stream);
        for (; row < count; ++row) scale_rows<T, kTaps, 1>(taps, window, residual, next, out, row, stream);
      }
    }
    simd::fence();
  });
}

template <typename T, int kTaps, bool kSums, int kRows>
void backward_rows(const Taps<T>& taps, const Rows<const T>* window, Rows<const T> x, Rows<const T> next,
                   Rows<const T> next_x, Rows<T> grad_x, Acc<T>* sums, int64_t row, bool stream) {
  const int64_t K = kTaps > 0 ? kTaps : taps.K, C = taps.C;
  Rows<const T> from[kTaps > 0 ? kTaps : kMaxTaps];
  for (int64_t k = 0; k < K; ++k) from[k] = window[k].from(row);
  x = x.from(row), next = next.from(row), next_x = next_x.from(row), grad_x = grad_x.from(row);
  const Acc<T>* weights[kTaps > 0 ? kTaps : kMaxTaps];
  Acc<T>* totals[(kTaps > 0 ? kTaps : kMaxTaps) + 1];
  for (int64_t k = 0; k < K; ++k) weights[k] = taps.row(k);
  for (int64_t k = 0; kSums && k <= K; ++k) totals[k] = sums + k * C;
  alignas(64) T collected[kRows * kBlock];
  for (int64_t first = 0; first < C; first += kBlock) {
    const int64_t n = C - first < kBlock ? C - first : kBlock;
    const Rows<T> to = stream ? Rows<T>{collected, kBlock} : Rows<T>{grad_x.data + first, grad_x.step};
    each_pair<T>(n, [=](int64_t i, auto part) {
      const int64_t c = first + i;
      Of<T, decltype(part)> sum[kRows] = {}, value[kRows] = {};
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        simd::prefetch(next.data + r * next.step + c);
        if constexpr (kSums) {
          simd::prefetch(next_x.data + r * next_x.step + c);
          value[r] = load(x.data + r * x.step + c, part);
        }
      }
      for (int64_t k = 0; k < K; ++k) {
        const auto w = load(weights[k] + c, part);
        Of<T, decltype(part)> products = {}, plain = {};
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const auto g = load(from[k].data + r * from[k].step + c, part);
          sum[r] += w * g;
          if constexpr (kSums) products += value[r] * g, plain += g;
        }
        if constexpr (kSums) {
          Acc<T>* total = totals[k] + c;
          store(total, load(total, part) + products, part);
          if (k == K / 2) {
            total = totals[K] + c;
            store(total, load(total, part) + plain, part);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) store(to.data + r * to.step + i, sum[r], part);
    });
    for (int r = 0; stream && r < kRows; ++r) {
      T* out = grad_x.data + r * grad_x.step + first;
      each_pair<T>(n, out, true, [&](int64_t i, auto part) {
        simd::store_raw(out + i, simd::load_raw(to.data + r * to.step + i, part), part);
      });
    }
  }
}

// One row in kFrames frames from s on, for three taps: each row of gradients is loaded and widened once for all frames
// that it is met by, and the sums are read and written once. grad[i]: frame s - 1 + i.
template <typename T, bool kSums>
void backward_frames(const Taps<T>& taps, const T* const* grad, const T* const* x, const T* const* next,
                     const T* const* next_x, T* const* grad_x, Acc<T>* sums, bool stream) {
  const int64_t C = taps.C;
  alignas(64) Acc<T> collected[kFrames][kBlock];
  for (int64_t first = 0; first < C; first += kBlock) {
    const int64_t n = C - first < kBlock ? C - first : kBlock;
    simd::each_half<T>(n, [&](int64_t i, auto part) {
      const int64_t c = first + i;
      using V = Of<T, decltype(part)>;
      V before = load(grad[0] + c, part), here = load(grad[1] + c, part), total[4];
#pragma GCC unroll 4
      for (int k = 0; kSums && k < 4; ++k) total[k] = load(sums + k * C + c, part);
#pragma GCC unroll 4
      for (int f = 0; f < kFrames; ++f) {
        const V after = load(grad[f + 2] + c, part);
        store(collected[f] + i,
              load(taps.row(0) + c, part) * after + load(taps.row(1) + c, part) * here +
                  load(taps.row(2) + c, part) * before,
              part);
        if constexpr (kSums) {
          const V value = load(x[f] + c, part);
          total[0] += value * after, total[1] += value * here, total[2] += value * before, total[3] += here;
        }
        before = here, here = after;
      }
#pragma GCC unroll 4
      for (int k = 0; kSums && k < 4; ++k) store(sums + k * C + c, total[k], part);
    });
#pragma GCC unroll 4
    for (int f = 0; f < kFrames; ++f) {
      T* out = grad_x[f] + first;
      each_pair<T>(n, out, stream, [&](int64_t i, auto part) {
        simd::prefetch(next[f] + first + i);
        if constexpr (kSums) simd::prefetch(next_x[f] + first + i);
        store(out + i, load(collected[f] + i, part), part);
      });
    }
  }
}

// A frame that the forward read as 0: its gradient is 0, and it has part in the bias alone.
template <typename T, bool kSums>
void masked_rows(const Taps<T>& taps, Rows<const T> grad, Rows<T> grad_x, Acc<T>* bias, int64_t count) {
  for (int64_t row = 0; row < count; ++row) {
    each_pair<T>(taps.C, [&](int64_t c, auto part) {
      store(grad_x.data + row * grad_x.step + c, Of<T, decltype(part)>{}, part);
      if constexpr (kSums) store(bias + c, load(bias + c, part) + load(grad.data + row * grad.step + c, part), part);
    });
  }
}

// `count` rows in the kFrames frames from s on, in a walk over frames [first, last).
template <typename T, bool kSums>
void frames_of_part(const TemporalScaleBackwardArgs& a, const Taps<T>& taps, int64_t b, int64_t s, int64_t n,
                    int64_t first, int64_t last, int64_t count, bool large, Acc<T>* sums) {
  Rows<const T> grad[kFrames + 2], x[kFrames], next[kFrames], next_x[kFrames];
  Rows<T> grad_x[kFrames];
  bool stream = large;
  for (int64_t i = 0; i < kFrames + 2; ++i) {
    const int64_t t = s - 1 + i;
    grad[i] = t >= 0 && t < a.grad_out.size[1] ? rows_of<const T>(a.grad_out, b, t, n) : taps.zeros();
  }
  const int64_t ahead = s + kFrames < last ? kFrames + 1 : kFrames;
  for (int64_t f = 0; f < kFrames; ++f) {
    grad_x[f] = rows_of<T>(a.grad_x, b, s + f, n), stream &= aligned(grad_x[f]);
    next[f] = rows_ahead<T>(a.grad_out, b, s + ahead + f, first, last, n);
    x[f] = kSums ? rows_of<const T>(a.x, b, s + f, n) : taps.zeros();
    next_x[f] = kSums ? rows_ahead<T>(a.x, b, s + kFrames + f, first, last, n) : taps.zeros();
  }
  for (int64_t row = 0; row < count; ++row) {
    const T *g[kFrames + 2], *v[kFrames], *next_g[kFrames], *next_v[kFrames];
    T* out[kFrames];
    for (int i = 0; i < kFrames + 2; ++i) g[i] = grad[i].from(row).data;
    for (int f = 0; f < kFrames; ++f) {
      v[f] = x[f].from(row).data, next_g[f] = next[f].from(row).data, next_v[f] = next_x[f].from(row).data;
      out[f] = grad_x[f].from(row).data;
    }
    backward_frames<T, kSums>(taps, g, v, next_g, next_v, out, sums, stream);
  }
}

template <typename T, int kTaps, bool kSums>
void backward_part(const TemporalScaleBackwardArgs& a, const Taps<T>& taps, int64_t part) {
  const int64_t T_ = a.grad_out.size[1], N = a.grad_out.size[2], C = taps.C;
  const int64_t chunks = (N + kScaleRows - 1) / kScaleRows, spans = (T_ + kScaleFrames - 1) / kScaleFrames;
  const int64_t b = part / chunks / spans, first = part / chunks % spans * kScaleFrames;
  const int64_t last = first + kScaleFrames < T_ ? first + kScaleFrames : T_;
  const int64_t n = part % chunks * kScaleRows, count = N - n < kScaleRows ? N - n : kScaleRows;
  Acc<T>* sums = nullptr;
  if constexpr (kSums) {
    sums = a.partial.at<Acc<T>>(part);
    __builtin_memset(sums, 0, (taps.K + 1) * C * sizeof *sums);
  }
  const bool large = a.grad_out.size[0] * T_ * N * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  for (int64_t s = first; s < last; ++s) {
    if constexpr (kTaps == 3 && kByFrames<T>) {
      bool together = s + kFrames <= last;
      for (int64_t t = s; together && t < s + kFrames; ++t) together = is_real(a.mask, b, t);
      if (together) {
        frames_of_part<T, kSums>(a, taps, b, s, n, first, last, count, large, sums);
        s += kFrames - 1;
        continue;
      }
    }
    const Rows<T> grad_x = rows_of<T>(a.grad_x, b, s, n);
    if (!is_real(a.mask, b, s)) {
      masked_rows<T, kSums>(taps, rows_of<const T>(a.grad_out, b, s, n), grad_x, sums + taps.K * C, count);
      continue;
    }
    Rows<const T> window[kMaxTaps];
    fill_window(a.grad_out, taps, b, s, n, -1, [](int64_t) { return true; }, window);
    const Rows<const T> next = rows_ahead<T>(a.grad_out, b, s + taps.K / 2 + 1, first, last, n);
    const Rows<const T> x = kSums ? rows_of<const T>(a.x, b, s, n) : taps.zeros();
    const Rows<const T> next_x = kSums ? rows_ahead<T>(a.x, b, s + 1, first, last, n) : taps.zeros();
    const bool stream = large && aligned(grad_x);
    int64_t row = 0;
    for (; row + kTogetherBack<T> <= count; row += kTogetherBack<T>)
      backward_rows<T, kTaps, kSums, kTogetherBack<T>>(taps, window, x, next, next_x, grad_x, sums, row, stream);
    for (; row < count; ++row)
      backward_rows<T, kTaps, kSums, 1>(taps, window, x, next, next_x, grad_x, sums, row, stream);
  }
}

// The second stage: the parts' sums, in their order.
template <typename T>
void add_up(const TemporalScaleBackwardArgs& a, const Executor& executor, const Taps<T>& taps) {
  constexpr int64_t kTile = 256;
  const int64_t K = taps.K, C = taps.C, parts = a.partial.size[0], tiles = (C + kTile - 1) / kTile;
  parallel_for(executor, (K + 1) * tiles, kGrainElements / (kTile * (parts + 1)) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t k = task / tiles, first = task % tiles * kTile, n = C - first < kTile ? C - first : kTile;
      Acc<T> sum[kTile] = {};
      for (int64_t part = 0; part < parts; ++part) {
        const Acc<T>* row = a.partial.at<const Acc<T>>(part, k, first);
        each_pair<T>(n, [&](int64_t c, auto how) { store(sum + c, load(sum + c, how) + load(row + c, how), how); });
      }
      for (int64_t c = 0; c < n; ++c) {
        T* out = k < K ? a.grad_weight.at<T>(first + c, k) : a.grad_bias.at<T>(first + c);
        store(out, Vec<T>{} + sum[simd::pair_place<T>(first + c, C) - first], simd::Part{1});
      }
    }
  });
}

template <typename T, int kTaps, bool kSums>
void gradients(const TemporalScaleBackwardArgs& a, const Executor& executor) {
  const int64_t B = a.grad_out.size[0], T_ = a.grad_out.size[1], N = a.grad_out.size[2], C = a.grad_out.size[3];
  const Taps<T> taps = fill_taps<T>(a.weight, {}, a.taps);
  const int64_t grain = kGrainElements / (kScaleRows * kScaleFrames * C + 1) + 1;
  parallel_for(executor, temporal_scale_parts(B, T_, N), grain, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) backward_part<T, kTaps, kSums>(a, taps, part);
    simd::fence();
  });
  if constexpr (kSums) add_up<T>(a, executor, taps);
}

// f(the number of taps that the loops over them are unrolled for; 0: any)
template <typename F>
void with_taps(int64_t K, F&& f) {
  if (K == 3) return f(std::integral_constant<int, 3>{});
  f(std::integral_constant<int, 0>{});
}

void forward(const TemporalScaleArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("temporal_scale", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    with_taps(args.weight.size[1], [&](auto taps) { scale<T, decltype(taps)::value>(args, executor); });
  });
}

void backward(const TemporalScaleBackwardArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("temporal_scale_backward", args.grad_x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    with_taps(args.weight.size[1], [&](auto taps) {
      constexpr int kTaps = decltype(taps)::value;
      args.grad_bias ? gradients<T, kTaps, true>(args, executor) : gradients<T, kTaps, false>(args, executor);
    });
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(temporal_scale, TemporalScaleArgs, forward)
PYVIDX_CPU_ENTRY(temporal_scale_backward, TemporalScaleBackwardArgs, backward)
