// One pass over the kept rows: reads x at its own strides, adds the position and time rows, writes out.
// Traffic: 2 passes over the kept rows (position and time stay in the caches).
//
// Tried at v3 in bfloat16: rows fetched 2, 3, 5 or 8 ahead, no gain over 1. At T = 8 it takes .10 ms with all in the
// caches and .25 where torch's operators ran between, .12 of which is the call (see temporal_scale.cpp).
#include "pyvidx/token_gather.h"

#include "level.h"
#include "pairs.h"
#include "parallel.h"

namespace pyvidx {
namespace {

using simd::each_pair;
using simd::load;
using simd::load_raw;
using simd::Of;
using simd::store;
using simd::store_raw;

template <typename T, bool kPosition, bool kTime>
void gather_row(const T* x, const T* position, const T* time, const T* next, T* out, int64_t C, bool stream) {
  each_pair<T>(C, out, stream, [&](int64_t c, auto part) {
    __builtin_prefetch(next + c);  // hardware prefetchers stop at each page, and gathered rows are short
    auto v = load(x + c, part);
    if constexpr (kPosition) v += load(position + c, part);
    if constexpr (kTime) v += load(time + c, part);
    store(out + c, v, part);
  });
}

struct Token {
  int64_t t, p;
};

template <typename T>
void gather(const TokenGatherArgs& a, const Executor& executor) {
  const int64_t P = a.x.size[2], C = a.x.size[3], S = a.out.size[1], K = a.out.size[2];
  const int64_t limit = a.tube ? P : a.x.size[1] * P;
  const int64_t rows = a.out.size[0] * S * K;
  const bool stream = rows * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  const auto row_kernel = a.position ? (a.time ? &gather_row<T, true, true> : &gather_row<T, true, false>)
                                     : (a.time ? &gather_row<T, false, true> : &gather_row<T, false, false>);
  const auto source = [&](const Place& at) {
    const int64_t index = *a.keep.at<const int64_t>(at.b, a.tube ? 0 : at.s, at.k);
    if (index < 0 || index >= limit) throw_index("token_gather: keep must be", index, limit);
    return a.tube ? Token{at.s, index} : Token{index / P, index % P};
  };
  parallel_for(executor, rows, kGrainElements / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    Place at(begin, S, K);
    Token from = source(at);
    for (int64_t row = begin; row < end; ++row) {
      const Place after = row + 1 < end ? at.after(S, K) : at;
      const Token next = source(after);
      row_kernel(a.x.at<const T>(at.b, from.t, from.p), a.position ? a.position.at<const T>(from.p) : nullptr,
                 a.time ? a.time.at<const T>(from.t) : nullptr, a.x.at<const T>(after.b, next.t, next.p),
                 a.out.at<T>(at.b, at.s, at.k), C, stream);
      at = after, from = next;
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
    Place at(begin, T_, P);
    for (int64_t row = begin; row < end; ++row, at = at.after(T_, P)) {
      const auto [b, t, p] = at;
      const int64_t source = *a.source.at<const int64_t>(b, t, p);
      if (source >= limit) throw_index("token_gather_backward: source must be", source, limit, true);
      T* out = a.grad_x.at<T>(b, t, p);
      if (source < 0) {
        each_pair<T>(C, out, stream, [&](int64_t c, auto part) { store(out + c, Of<T, decltype(part)>{}, part); });
      } else {
        const T* grad = a.grad_out.at<const T>(b, source / K, source % K);
        each_pair<T>(C, out, stream, [&](int64_t c, auto part) { store_raw(out + c, load_raw(grad + c, part), part); });
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
