// A part is a chunk of rows of one frame; its sums over rows stay in L1 and are added up by parts afterwards. The class
// rows of a video are one row whose gradients are summed first: all that follows is linear in them.
#include "level.h"
#include "pairs.h"
#include "parallel.h"
#include "pyvidx/residual_norm.h"
#include "pyvidx/row_parts.h"
#include "row_sums.h"

namespace pyvidx {
namespace {

using simd::Acc;
using simd::each_pair;
using simd::load;
using simd::Of;
using simd::store;

template <typename X, typename G, typename N>
struct Row {
  const G* grad_out;
  const N* grad_normed;
  const X* value;
  const Acc<X>* stats;
};

template <typename A>
struct Sums {
  A *weight, *shift;
};

// Channels whose gradients are collected before they are stored: stores past the caches that take turns with those of
// the sums leave half-filled lines (half the speed).
constexpr int64_t kBlock = 256;

// put(c, n, g): stores what follows from n channels of the row's whole gradient.
template <typename X, typename G, typename N, typename Put>
PYVIDX_SIMD void backward_row(const ResidualNormBackwardArgs& a, const Row<X, G, N>& r, const Row<X, G, N>& next,
                              const Sums<Acc<X>>& sums, Put&& put) {
  alignas(64) Acc<X> whole[kBlock];
  const int64_t C = a.value.size[3];
  const X* weight = a.weight.at<const X>();
  const Acc<X> mean = simd::usual_nan(r.stats[0]), rstd = simd::usual_nan(r.stats[1]);
  simd::Chains<X> sum_g, sum_gx;
  each_pair<X, N>(C, [&](int64_t c, auto part) {
    simd::prefetch(next.grad_normed + c);
    simd::prefetch(next.value + c);
    const auto g = load(r.grad_normed + c, part) * load(weight + c, part);
    sum_g += g;
    sum_gx += g * (load(r.value + c, part) - mean);
  });
  const Acc<X> mean_g = sum_g.total() / Acc<X>(C), mean_gx = sum_gx.total() * rstd / Acc<X>(C);
  for (int64_t first = 0; first < C; first += kBlock) {
    const int64_t n = C - first < kBlock ? C - first : kBlock;
    each_pair<X, N>(n, [&](int64_t i, auto part) {
      const int64_t c = first + i;
      simd::prefetch(next.grad_out + c);
      const auto grad = load(r.grad_normed + c, part), normal = (load(r.value + c, part) - mean) * rstd;
      const auto through = (grad * load(weight + c, part) - mean_g - normal * mean_gx) * rstd;
      const auto g = load(r.grad_out + c, part) + through;
      const auto shift = load(sums.shift + c, part) + grad, scale = load(sums.weight + c, part) + grad * normal;
      store(whole + i, g, part);
      store(sums.shift + c, shift, part);
      store(sums.weight + c, scale, part);
    });
    put(first, n, whole);
  }
}

// out <- scale * g
template <typename X, typename T, typename A>
PYVIDX_SIMD void put_scaled(T* out, int64_t n, const A* g, A scale, bool stream) {
  each_pair<X, T>(n, out, stream, [&](int64_t i, auto part) { store(out + i, load(g + i, part) * scale, part); });
}

template <typename X>
Sums<Acc<X>> zeroed_sums(const ResidualNormBackwardArgs& a, int64_t part) {
  const Sums<Acc<X>> sums{a.partial.at<Acc<X>>(0, part), a.partial.at<Acc<X>>(1, part)};
  __builtin_memset(sums.weight, 0, a.partial.size[2] * sizeof(Acc<X>));
  __builtin_memset(sums.shift, 0, a.partial.size[2] * sizeof(Acc<X>));
  return sums;
}

template <typename X, typename Y>
void class_part(const ResidualNormBackwardArgs& a, int64_t b, int64_t part_of_sums) {
  using A = Acc<X>;
  const int64_t S = a.value.size[1], C = a.value.size[3];
  A *grad_out = a.class_sums.at<A>(b, 0), *grad_normed = a.class_sums.at<A>(b, 1);
  each_pair<X, Y>(C, [&](int64_t c, auto part) {
    Of<X, decltype(part)> out = {}, normed = {};
    for (int64_t s = 0; s < S; ++s) {
      out += load(a.grad_out_cls.at<const X>(b, s) + c, part);
      normed += load(a.grad_normed_cls.at<const Y>(b, s) + c, part);
    }
    store(grad_out + c, out, part);
    store(grad_normed + c, normed, part);
  });
  const Row<X, A, A> row{grad_out, grad_normed, a.value_cls.at<const X>(b), a.stats_cls.at<const A>(b)};
  backward_row<X>(a, row, row, zeroed_sums<X>(a, part_of_sums), [&](int64_t c, int64_t n, const A* g) {
    put_scaled<X>(a.grad_cls.at<X>(b, 0, c), n, g, A(1), false);
    for (int64_t i = 1; i < a.grad_cls.size[1]; ++i) __builtin_memset(a.grad_cls.at<X>(b, i, c), 0, n * sizeof(X));
    for (int64_t s = 0; a.grad_y_cls && s < S; ++s) {
      put_scaled<X>(a.grad_y_cls.at<Y>(b, s, c), n, g, *a.share.at<const A>(b, s), false);
    }
  });
}

template <typename X, typename Y>
void backward_of(const ResidualNormBackwardArgs& a, const Executor& executor) {
  using A = Acc<X>;
  const int64_t B = a.value.size[0], S = a.value.size[1], K = a.value.size[2], C = a.value.size[3];
  const int64_t chunk = row_chunk(B * S, K), parts = row_parts(B * S, K), chunks = parts / (B * S > 0 ? B * S : 1);
  const int64_t class_rows = a.grad_cls ? B : 0;
  const bool stream = B * S * K * C * int64_t(sizeof(X)) > simd::kStreamBytes;
  parallel_for(executor, class_rows + parts, kGrainElements / (chunk * C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (; begin < end && begin < class_rows; ++begin) class_part<X, Y>(a, begin, parts + begin);
    for (int64_t part = begin - class_rows; part < end - class_rows; ++part) {
      const int64_t frame = part / chunks, b = frame / S, s = frame % S, first = part % chunks * chunk;
      const int64_t last = first + chunk < K ? first + chunk : K;
      const auto row_at = [&](int64_t k) {
        return Row<X, X, Y>{a.grad_out.at<const X>(b, s, k), a.grad_normed.at<const Y>(b, s, k),
                            a.value.at<const X>(b, s, k), a.stats.at<const A>(b, s, k)};
      };
      const Sums<A> sums = zeroed_sums<X>(a, part);
      const A factor = a.factor ? *a.factor.at<const A>(b, s) : A(1);
      for (int64_t k = first; k < last; ++k) {
        const Row<X, X, Y> next = row_at(k + 1 < last ? k + 1 : k);
        backward_row<X>(a, row_at(k), next, sums, [&](int64_t c, int64_t n, const A* g) {
          put_scaled<X>(a.grad_x.at<X>(b, s, k, c), n, g, A(1), stream);
          if (a.grad_y) put_scaled<X>(a.grad_y.at<Y>(b, s, k, c), n, g, factor, stream);
        });
      }
    }
    simd::fence();
  });
  X* const outputs[] = {a.grad_weight.at<X>(), a.grad_shift.at<X>()};
  for (int i = 0; i < 2; ++i) {
    X* out = outputs[i];
    add_up<X>(a.partial.at<const A>(i), C, parts + class_rows, C, executor,
              [&](int64_t c, auto sum, auto part) { store(out + c, sum, part); });
  }
}

void backward(const ResidualNormBackwardArgs& a, const Executor& executor) {
  visit_mixed<Half, BFloat16>("residual_norm_backward", a.value.dtype, a.grad_normed.dtype, [&](auto x, auto y) {
    backward_of<typename decltype(x)::type, typename decltype(y)::type>(a, executor);
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(residual_norm_backward, ResidualNormBackwardArgs, backward)
