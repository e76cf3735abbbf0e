// One pass over the kept rows: reads x at its own strides, adds the position and time rows, writes out.
// Traffic: 2 passes over the kept rows (position and time stay in the caches).
#include "pyvidx/token_gather.h"

#include "level.h"
#include "parallel.h"
#include "simd.h"

namespace pyvidx {
namespace {

using simd::each;
using simd::load;
using simd::store;

template <typename T, bool kPosition, bool kTime>
void gather_row(const T* x, const T* position, const T* time, const T* next, T* out, int64_t C, bool stream) {
  each<T>(C, out, stream, [&](int64_t c, auto part) {
    __builtin_prefetch(next + c);  // hardware prefetchers stop at each page, and gathered rows are short
    auto v = load(x + c, part);
    if constexpr (kPosition) v += load(position + c, part);
    if constexpr (kTime) v += load(time + c, part);
    store(out + c, v, part);
  });
}

template <typename T>
void gather(const TokenGatherArgs& a, const Executor& executor) {
  const int64_t P = a.x.size[2], C = a.x.size[3], S = a.out.size[1], K = a.out.size[2];
  const int64_t limit = a.tube ? P : a.x.size[1] * P;
  const int64_t rows = a.out.size[0] * S * K;
  const bool stream = rows * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  const auto row_kernel = a.position ? (a.time ? &gather_row<T, true, true> : &gather_row<T, true, false>)
                                     : (a.time ? &gather_row<T, false, true> : &gather_row<T, false, false>);
  struct Place {
    int64_t b, s, k, t, p;
  };
  const auto locate = [&](int64_t row) {
    const int64_t b = row / (S * K), s = row / K % S, k = row % K;
    const int64_t index = *a.keep.at<const int64_t>(b, a.tube ? 0 : s, k);
    if (index < 0 || index >= limit) throw_index("token_gather: keep must be", index, limit);
    return a.tube ? Place{b, s, k, s, index} : Place{b, s, k, index / P, index % P};
  };
  parallel_for(executor, rows, kGrainElements / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const auto [b, s, k, t, p] = locate(row);
      const Place next = locate(row + 1 < end ? row + 1 : row);
      row_kernel(a.x.at<const T>(b, t, p), a.position ? a.position.at<const T>(p) : nullptr,
                 a.time ? a.time.at<const T>(t) : nullptr, a.x.at<const T>(next.b, next.t, next.p),
                 a.out.at<T>(b, s, k), C, stream);
    }
    simd::fence();
  });
}

template <typename T>
void scatter(const TokenGatherBackwardArgs& a, const Executor& executor) {
  const int64_t T_ = a.grad_x.size[1], P = a.grad_x.size[2], C = a.grad_x.size[3], K = a.grad_out.size[2];
  const int64_t limit = a.grad_out.size[1] * K;
  const int64_t rows = a.grad_x.size[0] * T_ * P;
  const bool stream = rows * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  parallel_for(executor, rows, kGrainElements / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / (T_ * P), t = row / P % T_, p = row % P;
      const int64_t source = *a.source.at<const int64_t>(b, t, p);
      if (source >= limit) throw_index("token_gather_backward: source must be", source, limit, true);
      T* out = a.grad_x.at<T>(b, t, p);
      if (source < 0) {
        each<T>(C, out, stream, [&](int64_t c, auto part) { store(out + c, simd::Vec<T>{}, part); });
      } else {
        const T* grad = a.grad_out.at<const T>(b, source / K, source % K);
        gather_row<T, false, false>(grad, nullptr, nullptr, grad, out, C, stream);
      }
    }
    simd::fence();
  });
}

void forward(const TokenGatherArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("token_gather", args.x.dtype,
                                             [&](auto t) { gather<typename decltype(t)::type>(args, executor); });
}

void backward(const TokenGatherBackwardArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("token_gather_backward", args.grad_x.dtype,
                                             [&](auto t) { scatter<typename decltype(t)::type>(args, executor); });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(token_gather, TokenGatherArgs, forward)
PYVIDX_CPU_ENTRY(token_gather_backward, TokenGatherBackwardArgs, backward)
