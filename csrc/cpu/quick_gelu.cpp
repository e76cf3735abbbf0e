// One pass: 2 passes of traffic, 3 backward, where plain torch makes two or three of each for a sum, a product, a
// sigmoid and a product. An exponential and a division per vector cost about what the memory does.
//
// Without a bias a tensor is flat. With one it is taken in blocks, a row at a time: kBlock channels of `chunk` rows, so
// that the bias and its sums stay in L1 (whole rows of 4096: a third slower). The next row is fetched by hand, because
// the processor's own guess, on along this row, is wrong at the end of each (without: half as slow again). Several rows
// at once, which would load the sums less often, were slower.
#include "pyvidx/quick_gelu.h"

#include "level.h"
#include "parallel.h"
#include "row_sums.h"
#include "simd.h"

namespace pyvidx {
namespace {

using simd::Acc;
using simd::each;
using simd::load;
using simd::store;
using simd::Vec;

constexpr int64_t kBlock = 2048;
constexpr int64_t kChunk = 16;  // where nothing is summed

template <typename T>
PYVIDX_SIMD Vec<T> activated(Vec<T> v) {
  return v / (1 + simd::exp(v * Acc<T>(-kQuickGELU)));
}

template <typename T>
PYVIDX_SIMD Vec<T> gradient(Vec<T> grad, Vec<T> v) {
  const Vec<T> scaled = v * Acc<T>(-kQuickGELU), s = 1 / (1 + simd::exp(scaled));
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
struct Block {
  int64_t part, first, n, begin, end;  // channels [first, first + n) of rows [begin, end), the rows of a part
  const Acc<T>* bias;                  // of these channels, and of whole vectors
};

// f(block) for the blocks of n elements.
template <typename T, typename F>
void blocks(int64_t n, const View<1>& bias, int64_t chunk, const Executor& executor, F&& f) {
  const int64_t C = bias.size[0], rows = C > 0 ? n / C : 0, across = (C + kBlock - 1) / kBlock;
  const int64_t tasks = (rows + chunk - 1) / chunk * across, size = chunk * (C < kBlock ? C : kBlock);
  parallel_for(executor, tasks, kGrainElements / (size + 1) + 1, [&](int64_t begin, int64_t end) {
    alignas(64) Acc<T> wide[kBlock];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / across, first = task % across * kBlock, last = (part + 1) * chunk;
      const int64_t count = C - first < kBlock ? C - first : kBlock;
      each<T>(count, [&](int64_t i, auto p) { simd::write(wide + i, load(bias.at<const T>(first + i), p)); });
      f(Block<T>{part, first, count, part * chunk, last < rows ? last : rows, wide});
    }
    simd::fence();
  });
}

template <typename T>
void activate(const QuickGELUArgs& a, const Executor& executor) {
  const int64_t n = a.x.size[0], C = a.bias.size[0];
  const bool stream = n * int64_t(sizeof(T)) > simd::kStreamBytes;
  if (a.bias) {
    return blocks<T>(n, a.bias, kChunk, executor, [&](const Block<T>& block) {
      for (int64_t row = block.begin; row < block.end; ++row) {
        const int64_t at = row * C + block.first, ahead = row + 1 < block.end ? C : 0;
        const T* x = a.x.at<const T>(at);
        T* out = a.out.at<T>(at);
        each<T>(block.n, out, stream, [&](int64_t i, auto part) {
          simd::prefetch(x + ahead + i);
          store(out + i, activated<T>(load(x + i, part) + load(block.bias + i)), part);
        });
      }
    });
  }
  pieces(n, executor, [&](int64_t first, int64_t count) {
    const T* x = a.x.at<const T>(first);
    T* out = a.out.at<T>(first);
    each<T>(count, out, stream, [&](int64_t i, auto part) { store(out + i, activated<T>(load(x + i, part)), part); });
  });
}

template <typename T, bool kRows, bool kSums>  // what is wanted: grad_x, grad_bias
void backward_block(const QuickGELUBackwardArgs& a, const Block<T>& block, bool stream) {
  const int64_t C = a.bias.size[0];
  alignas(64) Acc<T> sums[kBlock];
  if constexpr (kSums) __builtin_memset(sums, 0, sizeof sums);
  for (int64_t row = block.begin; row < block.end; ++row) {
    const int64_t at = row * C + block.first, ahead = row + 1 < block.end ? C : 0;
    const T *grad = a.grad_out.at<const T>(at), *x = a.x.at<const T>(at);
    T* out = kRows ? a.grad_x.at<T>(at) : nullptr;
    each<T>(block.n, out, stream, [&](int64_t i, auto part) {
      simd::prefetch(grad + ahead + i);
      simd::prefetch(x + ahead + i);
      const Vec<T> g = gradient<T>(load(grad + i, part), load(x + i, part) + load(block.bias + i));
      if constexpr (kRows) store(out + i, g, part);
      if constexpr (kSums) store(sums + i, load(sums + i) + g);
    });
  }
  if constexpr (kSums) {
    __builtin_memcpy(a.partial.at<Acc<T>>(block.part, block.first), sums, block.n * sizeof *sums);
  }
}

template <typename T>
void activate_backward(const QuickGELUBackwardArgs& a, const Executor& executor) {
  const int64_t n = a.x.size[0];
  const bool stream = n * int64_t(sizeof(T)) > simd::kStreamBytes;
  if (a.bias) {
    blocks<T>(n, a.bias, a.grad_bias ? a.chunk : kChunk, executor, [&](const Block<T>& block) {
      if (!a.grad_bias) return backward_block<T, true, false>(a, block, stream);
      a.grad_x ? backward_block<T, true, true>(a, block, stream) : backward_block<T, false, true>(a, block, stream);
    });
    if (!a.grad_bias) return;
    const int64_t parts = a.partial.size[0], C = a.bias.size[0];
    return add_up<T>(a.partial.at<const Acc<T>>(), C, parts, C, executor,
                     [&](int64_t c, Vec<T> sum, auto part) { store(a.grad_bias.at<T>(c), sum, part); });
  }
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
