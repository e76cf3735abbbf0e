// One pass over the rows. Traffic: 4 passes (x, y, out, normed), 5 backward with grad_y, 4 without. A row is kept in
// float between the three times that a LayerNorm needs it, and nothing is written before the third, so out may be x or
// y. The class rows of a video are one row with as many copies as there are slots.
#include "pyvidx/residual_norm.h"

#include "level.h"
#include "parallel.h"
#include "simd.h"

namespace pyvidx {
namespace {

using simd::Acc;
using simd::each;
using simd::load;
using simd::store;
using simd::Vec;

constexpr int64_t kBuffer = 2048;  // channels; longer rows are computed three times

template <typename X, typename Y>
struct Outputs {
  X* out;
  Y* normed;
  Acc<X>* stats;
  int64_t count, out_stride, normed_stride, stats_stride;  // copies
};

// value_of(c, part): the row before the norm.
template <typename X, typename Y, typename Value>
PYVIDX_SIMD void norm_row(const ResidualNormArgs& a, const Outputs<X, Y>& to, bool stream, Value&& value_of) {
  const int64_t C = a.x.size[3];
  const X *weight = a.weight.at<const X>(), *shift = a.shift.at<const X>();
  alignas(64) Acc<X> room[kBuffer];
  Acc<X>* const buffer = C <= kBuffer ? room : nullptr;
  const Acc<X> total = simd::sum_of<X>(C, [&](int64_t c, auto part) {
    const Vec<X> v = value_of(c, part);
    if (buffer != nullptr) store(buffer + c, v, part);
    return v;
  });
  const auto value = [&](int64_t c, auto part) {
    return buffer != nullptr ? load(buffer + c, part) : value_of(c, part);
  };
  const Acc<X> mean = total / Acc<X>(C);
  const Acc<X> squares = simd::sum_of<X>(C, [&](int64_t c, auto part) {
    const Vec<X> d = simd::only(value(c, part) - mean, part);
    return d * d;
  });
  const Acc<X> rstd = 1 / __builtin_sqrt(squares / Acc<X>(C) + a.eps);
  for (int64_t i = 0; i < to.count; ++i) {
    Acc<X>* stats = to.stats + i * to.stats_stride;
    stats[0] = mean, stats[1] = rstd;
  }
  stream = stream && to.count == 1 && reinterpret_cast<uintptr_t>(to.normed) % (sizeof(Y) * simd::kWidth<Y>) == 0;
  each<X>(C, to.out, stream, [&](int64_t c, auto part) {
    const Vec<X> v = value(c, part), n = (v - mean) * rstd * load(weight + c, part) + load(shift + c, part);
    for (int64_t i = 0; i < to.count; ++i) {
      store(to.out + i * to.out_stride + c, v, part);
      store(to.normed + i * to.normed_stride + c, n, part);
    }
  });
}

template <typename X, typename Y>
void class_row(const ResidualNormArgs& a, int64_t b) {
  const int64_t S = a.x.size[1];
  const X* cls = a.cls.at<const X>(b);
  const Outputs<X, Y> to{a.out_cls.at<X>(b),  a.normed_cls.at<Y>(b),  a.stats_cls.at<Acc<X>>(b), S,
                         a.out_cls.stride[1], a.normed_cls.stride[1], a.stats_cls.stride[1]};
  norm_row<X, Y>(a, to, false, [&](int64_t c, auto part) {
    Vec<X> v = load(cls + c, part);
    for (int64_t s = 0; a.y_cls && s < S; ++s) {
      v += load(a.y_cls.at<const Y>(b, s) + c, part) * *a.share.at<const Acc<X>>(b, s);
    }
    return v;
  });
}

template <typename X, typename Y>
void forward_of(const ResidualNormArgs& a, const Executor& executor) {
  const int64_t B = a.x.size[0], S = a.x.size[1], K = a.x.size[2], C = a.x.size[3];
  const int64_t class_rows = a.cls ? B : 0, rows = B * S * K;
  const bool stream = rows * C * int64_t(sizeof(X)) > simd::kStreamBytes;
  parallel_for(executor, class_rows + rows, kGrainElements / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (; begin < end && begin < class_rows; ++begin) class_row<X, Y>(a, begin);
    for (int64_t i = begin - class_rows; i < end - class_rows; ++i) {
      const int64_t b = i / (S * K), s = i / K % S, k = i % K, next = i + 1 < end - class_rows ? i + 1 : i;
      const X *x = a.x.at<const X>(b, s, k), *next_x = a.x.at<const X>(next / (S * K), next / K % S, next % K);
      const Y *y = a.y.at<const Y>(b, s, k), *next_y = a.y.at<const Y>(next / (S * K), next / K % S, next % K);
      const Acc<X> factor = a.factor ? *a.factor.at<const Acc<X>>(b, s) : Acc<X>(1);
      const Outputs<X, Y> to{a.out.at<X>(b, s, k), a.normed.at<Y>(b, s, k), a.stats.at<Acc<X>>(b, s, k), 1, 0, 0, 0};
      norm_row<X, Y>(a, to, stream, [&](int64_t c, auto part) {
        simd::prefetch(next_x + c);
        simd::prefetch(next_y + c);
        return load(x + c, part) + load(y + c, part) * factor;
      });
    }
    simd::fence();
  });
}

void forward(const ResidualNormArgs& a, const Executor& executor) {
  visit_mixed<Half, BFloat16>("residual_norm", a.x.dtype, a.y.dtype, [&](auto x, auto y) {
    forward_of<typename decltype(x)::type, typename decltype(y)::type>(a, executor);
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(residual_norm, ResidualNormArgs, forward)
