// One pass over the branch's rows. Traffic of a gated or plain fusion: 3 passes (read x, read z, write out), 4 with the
// LayerNorm; of the first input 2, or 3; w, position and time stay in the caches. Expected: the speed of a copy that
// moves as many bytes, or better, since two thirds are reads. Measured on a busy Zen 4, one thread, ViT-L/14 and B/16,
// T = 8 and 64: 1.0 to 1.5 of that copy without the norm, 0.8 to 1.0 with it (bench/results, outputs streamed).
// AVX2 without bfloat16 instructions reaches 0.65 to 0.75 in bfloat16 with the norm: there the conversions bind.
//
// A LayerNorm needs the row three times: mean, variance, result. Nothing is written before the third, so out may be z.
// The next row is prefetched meanwhile: a hardware prefetcher stops at the end of a page, which is about one row.
#include "pyvidx/gated_fusion.h"

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

enum class Form { first, sum, gate };

// A normed row of up to kBuffer channels is kept in float between its three passes. Computing it again each time costs
// bfloat16 a third of its speed (conversions), float32 nothing; longer rows do that.
constexpr int64_t kBuffer = 2048;

template <typename T>
struct Sources {
  const T *x, *x_pair;  // the second frame of a pair
  const T *z, *position, *time;
};

template <typename T, Form kForm, bool kPair, typename Part>
PYVIDX_SIMD Of<T, Part> fused(const Sources<T>& r, const Acc<T>* mix, int64_t c, Part part) {
  Of<T, Part> x = load(r.x + c, part);
  if constexpr (kPair) x = (x + load(r.x_pair + c, part)) * Acc<T>(0.5);
  if constexpr (kForm == Form::first) return x + load(r.position + c, part) + load(r.time + c, part);
  const auto z = load(r.z + c, part);
  if constexpr (kForm == Form::sum) return z + x;
  const auto w = load(mix + c, part);
  return (1 - w) * z + w * x;  // exact where w is 0 or 1, as w tends to be
}

template <typename T, Form kForm, bool kPair>
PYVIDX_SIMD void prefetch(const Sources<T>& next, int64_t c) {
  __builtin_prefetch(next.x + c);
  if constexpr (kPair) __builtin_prefetch(next.x_pair + c);
  if constexpr (kForm != Form::first) __builtin_prefetch(next.z + c);
}

template <typename T, Form kForm, bool kPair>
void fuse_row(const Sources<T>& row, const Sources<T>& next, const Acc<T>* mix, T* out, int64_t C, bool stream) {
  each_pair<T>(C, out, stream, [&](int64_t c, auto part) {
    prefetch<T, kForm, kPair>(next, c);
    store(out + c, fused<T, kForm, kPair>(row, mix, c, part), part);
  });
}

template <typename T, Form kForm, bool kPair>
void fuse_and_norm_row(const Sources<T>& row, const Sources<T>& next, const Acc<T>* mix, const T* weight, const T* bias,
                       double eps, T* out, T* normed, Acc<T>* stats, int64_t C, bool stream) {
  alignas(64) Acc<T> room[kBuffer];
  Acc<T>* const buffer = C <= kBuffer ? room : nullptr;
  const Acc<T> total = simd::sum_of_pairs<T>(C, [&](int64_t c, auto part) {
    prefetch<T, kForm, kPair>(next, c);
    const auto v = fused<T, kForm, kPair>(row, mix, c, part);
    if (buffer != nullptr) store(buffer + c, v, part);
    return v;
  });
  const auto value = [&](int64_t c, auto part) {
    return buffer != nullptr ? load(buffer + c, part) : fused<T, kForm, kPair>(row, mix, c, part);
  };
  const Acc<T> mean = total / Acc<T>(C);
  const Acc<T> squares = simd::sum_of_pairs<T>(C, [&](int64_t c, auto part) {
    const auto d = simd::only(value(c, part) - mean, part);
    return d * d;
  });
  const Acc<T> rstd = 1 / __builtin_sqrt(squares / Acc<T>(C) + eps);
  stats[0] = mean, stats[1] = rstd;
  if (sizeof(T) == 2 && out != nullptr && buffer != nullptr) {  // apart: in turn, both leave half-filled lines
    each_pair<T>(C, out, stream, [&](int64_t c, auto part) { store(out + c, load(buffer + c, part), part); });
    out = nullptr;
  }
  stream = stream && (out == nullptr || reinterpret_cast<uintptr_t>(out) % simd::kBytes == 0);
  each_pair<T>(C, normed, stream, [&](int64_t c, auto part) {
    const auto v = value(c, part);
    if (out != nullptr) store(out + c, v, part);
    store(normed + c, (v - mean) * rstd * load(weight + c, part) + load(bias + c, part), part);
  });
}

template <typename T, Form kForm>
void class_row(const GatedFusionArgs& a, const Acc<T>* mix, int64_t b) {
  const int64_t T_ = a.x_cls.size[1], C = a.x_cls.size[2];
  const T *cls = a.cls.at<const T>(b), *x = a.x_cls.at<const T>(b);
  T* out = a.out_cls.at<T>(b);
  each_pair<T>(C, [&](int64_t c, auto part) {
    Of<T, decltype(part)> mean = {};
    for (int64_t t = 0; t < T_; ++t) mean += load(x + t * a.x_cls.stride[1] + c, part);
    mean = mean * (1 / Acc<T>(T_));
    const auto z = load(cls + c, part);
    if constexpr (kForm == Form::first) {
      store(out + c, (mean + z + load(a.position.at<const T>(0) + c, part)) * Acc<T>(0.5), part);
    } else if constexpr (kForm == Form::sum) {
      store(out + c, z + mean, part);
    } else {
      const auto w = load(mix + c, part);
      store(out + c, (1 - w) * z + w * mean, part);
    }
  });
}

template <typename T, Form kForm, bool kPair, bool kNorm>
void fuse(const GatedFusionArgs& a, const Executor& executor) {
  const View<4>& shape = a.rows();
  const int64_t P = a.x.size[2], C = a.x.size[3], B = a.x.size[0], S = shape.size[1], K = shape.size[2];
  const int64_t rows = B * S * K, class_rows = a.out_cls ? B : 0;
  const int64_t limit = a.tube ? P : a.x.size[1] / (kPair ? 2 : 1) * P;  // of keep
  const bool stream = rows * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  Acc<T>* mix = a.mix.at<Acc<T>>();
  if constexpr (kForm == Form::gate) {
    each_pair<T>(C, [&](int64_t c, auto part) {
      store(mix + c, simd::sigmoid(load(a.gate.at<const T>() + c, part) * Acc<T>(a.scale)), part);
    });
  }
  struct Place {
    int64_t b, s, k;
  };
  const auto place = [&](int64_t row) { return Place{row / (S * K), row / K % S, row % K}; };
  const auto sources = [&](const Place& at) {
    int64_t t = at.s, p = at.k;
    if (a.keep) {
      const int64_t index = *a.keep.at<const int64_t>(at.b, a.tube ? 0 : at.s, at.k);
      if (index < 0 || index >= limit) throw_index("gated_fusion: keep must be", index, limit);
      if (a.tube) {
        p = index;
      } else {
        t = index / P, p = index % P;
      }
    }
    Sources<T> r;
    r.x = a.x.at<const T>(at.b, kPair ? 2 * t : t, p);
    if constexpr (kPair) r.x_pair = r.x + a.x.stride[1];
    if constexpr (kForm == Form::first) {
      r.position = a.position.at<const T>(1 + p), r.time = a.time.at<const T>(t);
    } else {
      r.z = a.z.at<const T>(at.b, at.s, at.k);
    }
    return r;
  };
  parallel_for(executor, class_rows + rows, kGrainElements / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (; begin < end && begin < class_rows; ++begin) class_row<T, kForm>(a, mix, begin);
    if (begin >= end) return;
    begin -= class_rows, end -= class_rows;
    Sources<T> row, next = sources(place(begin));
    for (int64_t i = begin; i < end; ++i) {
      const Place at = place(i);
      row = next;
      if (i + 1 < end) next = sources(place(i + 1));
      T* out = a.out ? a.out.at<T>(at.b, at.s, at.k) : nullptr;
      if constexpr (kNorm) {
        fuse_and_norm_row<T, kForm, kPair>(row, next, mix, a.weight.at<const T>(), a.bias.at<const T>(), a.eps, out,
                                           a.normed.at<T>(at.b, at.s, at.k), a.stats.at<Acc<T>>(at.b, at.s, at.k), C,
                                           stream);
      } else {
        fuse_row<T, kForm, kPair>(row, next, mix, out, C, stream);
      }
    }
    simd::fence();
  });
}

template <typename T, Form kForm>
void pick(const GatedFusionArgs& a, const Executor& executor) {
  if (a.normed.size[3] > 0)
    return a.pair ? fuse<T, kForm, true, true>(a, executor) : fuse<T, kForm, false, true>(a, executor);
  return a.pair ? fuse<T, kForm, true, false>(a, executor) : fuse<T, kForm, false, false>(a, executor);
}

void forward(const GatedFusionArgs& a, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("gated_fusion", a.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (a.position) return pick<T, Form::first>(a, executor);
    return a.gate ? pick<T, Form::gate>(a, executor) : pick<T, Form::sum>(a, executor);
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(gated_fusion, GatedFusionArgs, forward)
