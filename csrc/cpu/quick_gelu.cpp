// One pass: 2 passes of traffic, 3 backward, where plain torch makes two or three of each for a product, a sigmoid and
// a product. An exponential and a division per vector cost about what the memory does.
#include "pyvidx/quick_gelu.h"

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

template <typename T>
PYVIDX_SIMD Vec<T> activated(Vec<T> x) {
  return x / (1 + simd::exp(x * Acc<T>(-kQuickGELU)));
}

template <typename T>
PYVIDX_SIMD Vec<T> gradient(Vec<T> grad, Vec<T> x) {
  const Vec<T> scaled = x * Acc<T>(-kQuickGELU), s = 1 / (1 + simd::exp(scaled));
  return grad * s * (1 - scaled * (1 - s));
}

// f(first, n) for pieces of [0, n), each a whole number of vectors but the last.
template <typename F>
void pieces(int64_t n, const Executor& executor, F&& f) {
  constexpr int64_t kPiece = 4096;
  parallel_for(executor, (n + kPiece - 1) / kPiece, kGrainElements / kPiece, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * kPiece, n - i * kPiece < kPiece ? n - i * kPiece : kPiece);
    simd::fence();
  });
}

template <typename T>
void activate(const QuickGELUArgs& a, const Executor& executor) {
  const int64_t n = a.x.size[0];
  const bool stream = n * int64_t(sizeof(T)) > simd::kStreamBytes;
  pieces(n, executor, [&](int64_t first, int64_t count) {
    const T* x = a.x.at<const T>(first);
    T* out = a.out.at<T>(first);
    each<T>(count, out, stream, [&](int64_t i, auto part) { store(out + i, activated<T>(load(x + i, part)), part); });
  });
}

template <typename T>
void activate_backward(const QuickGELUBackwardArgs& a, const Executor& executor) {
  const int64_t n = a.x.size[0];
  const bool stream = n * int64_t(sizeof(T)) > simd::kStreamBytes;
  pieces(n, executor, [&](int64_t first, int64_t count) {
    const T *grad = a.grad_out.at<const T>(first), *x = a.x.at<const T>(first);
    T* out = a.grad_x.at<T>(first);
    each<T>(count, out, stream,
            [&](int64_t i, auto part) { store(out + i, gradient<T>(load(grad + i, part), load(x + i, part)), part); });
  });
}

void forward(const QuickGELUArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("quick_gelu", args.x.dtype,
                                             [&](auto t) { activate<typename decltype(t)::type>(args, executor); });
}

void backward(const QuickGELUBackwardArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("quick_gelu_backward", args.x.dtype, [&](auto t) {
    activate_backward<typename decltype(t)::type>(args, executor);
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(quick_gelu, QuickGELUArgs, forward)
PYVIDX_CPU_ENTRY(quick_gelu_backward, QuickGELUBackwardArgs, backward)
