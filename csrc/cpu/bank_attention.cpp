// A task is one (b, step, split of the positions), all heads: so a row is read from memory once and whole. Keys go in
// blocks of 64; of each head, the block's keys and values are packed as float, both products run in registers from
// there, and the scores, w[key][query], stay in L1. What the next head reads is fetched meanwhile. Traffic: 1 pass over
// the rows. Arithmetic: 4 n D flops per key, for 32 queries in float 16 per byte: it binds.
#include "bank_attention.h"

#include "level.h"

namespace pyvidx {
namespace {

// w[key][query] <- e^(scale w + bias - largest); `largest` and `total` move on, fade <- what older sums shrink by.
template <typename V, typename A>
__attribute__((noinline)) void online_softmax(A* w, int64_t keys, int64_t ld, const A* bias, A scale, A* largest,
                                              A* total, A* fade) {
  for (int64_t c = 0; c < ld; c += sizeof(V) / sizeof(A)) {
    const V before = simd::read<V>(largest + c);
    V top = before;
    for (int64_t j = 0; j < keys; ++j) top = simd::larger(simd::read<V>(w + j * ld + c) * scale + bias[j], top);
    const V shrink = simd::exp(before - top);
    V sum = simd::read<V>(total + c) * shrink;
    for (int64_t j = 0; j < keys; ++j) {
      const V e = simd::exp(simd::read<V>(w + j * ld + c) * scale + bias[j] - top);
      simd::write(w + j * ld + c, e);
      sum += e;
    }
    simd::write(largest + c, top);
    simd::write(total + c, sum);
    simd::write(fade + c, shrink);
  }
}

// The partial sums of one head.
template <typename A>
struct Partial {
  A *sums, *largest, *total;
  Partial(const BankAttentionArgs& a, const Sizes& z, int64_t step, int64_t split, int64_t h)
      : sums(a.partial.at<A>(step * z.H + h, split)), largest(sums + z.n * z.ld), total(largest + z.padded) {}
};

template <typename T>
void attend_split(const BankAttentionArgs& a, const Sizes& z, int64_t step, int64_t split) {
  using A = Acc<T>;
  const int64_t b = step / z.steps, s = step % z.steps, n = z.n, d = z.d, ld = z.ld, N = a.rows.size[2];
  with_query_vector<T>(n, [&](auto query_vector) {
    using V = decltype(query_vector);
    const int64_t queries = round_up(n, sizeof(V) / sizeof(A));
    Scratch scratch((2 * kBlock * ld + kBlock * queries + n * ld + z.H * ld * queries + queries) * sizeof(A) + 6 * 64);
    A *keys = scratch.take<A>(kBlock * ld), *values = scratch.take<A>(kBlock * ld);
    A *w = scratch.take<A>(kBlock * queries), *part = scratch.take<A>(n * ld);
    A *qt = scratch.take<A>(z.H * ld * queries), *fade = scratch.take<A>(queries);
    for (int64_t h = 0; h < z.H; ++h) {
      const Partial<A> to(a, z, step, split, h);
      for (int64_t i = 0; i < n * ld; ++i) to.sums[i] = 0, part[i] = 0;  // pads of a head that fills no vector
      for (int64_t i = 0; i < z.padded; ++i) to.largest[i] = A(-3e38), to.total[i] = 0;
      as_floats<T>({a.q.at<const T>(b, s, 0, h * d), a.q.stride[2]}, n, d, false, part, ld);
      transpose<V>(Matrix<const A>{part, ld}, n, ld, qt + h * ld * queries, queries);
    }
    Walk<T> walk{a, b, s, N * split / z.splits, N * (split + 1) / z.splits};
    Block<T> blocks[2];
    walk.next(blocks[0]);
    for (int current = 0; blocks[current].count > 0; current ^= 1) {
      const Block<T>&block = blocks[current], &after = blocks[current ^ 1];
      walk.next(blocks[current ^ 1]);
      for (int64_t h = 0; h < z.H; ++h) {
        const auto fetch_next = h + 1 < z.H ? fetch(block, (h + 1) * d, d, z.D) : fetch(after, 0, d, z.D);
        const Partial<A> to(a, z, step, split, h);
        pack(block, h * d, d, keys, ld);
        pack(block, z.D + h * d, d, values, ld);
        product<V>(block.count, queries, d, Left<A>{keys, ld, 1}, Matrix<const A>{qt + h * ld * queries, queries},
                   Matrix<A>{w, queries}, fetch_next);
        online_softmax<V>(w, block.count, queries, block.bias, A(a.scale), to.largest, to.total, fade);
        product<Vec<T>>(n, ld, block.count, Left<A>{w, 1, queries}, Matrix<const A>{values, ld}, Matrix<A>{part, ld},
                        Prefetch());
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t c = i * ld; c < (i + 1) * ld; c += kWidth<T>) {
            simd::write(to.sums + c, simd::read<Vec<T>>(to.sums + c) * fade[i] + simd::read<Vec<T>>(part + c));
          }
        }
      }
    }
  });
}

// out <- the splits of one head, weighted; 0 where there was no key.
template <typename T>
void merge_head(const BankAttentionArgs& a, const Sizes& z, int64_t step, int64_t h) {
  using A = Acc<T>;
  using V = Vec<T>;
  constexpr int64_t kLanes = sizeof(V) / sizeof(A);
  const int64_t piece = a.partial.stride[1];
  const Partial<A> first(a, z, step, 0, h);
  for (int64_t c = 0; c < z.padded; c += kLanes) {
    V top = simd::read<V>(first.largest + c), total = {};
    for (int64_t i = 1; i < z.splits; ++i) top = simd::larger(simd::read<V>(first.largest + i * piece + c), top);
    for (int64_t i = 0; i < z.splits; ++i) {
      const V factor = simd::exp(simd::read<V>(first.largest + i * piece + c) - top);
      total += factor * simd::read<V>(first.total + i * piece + c);
      simd::write(first.largest + i * piece + c, factor);
    }
    for (int64_t i = c; a.lse && i < z.n && i < c + kLanes; ++i) {
      const A sum = total[i - c];
      *a.lse.at<A>(step / z.steps, step % z.steps, h, i) = sum > 0 ? A(top[i - c] + __builtin_log(sum)) : 0;
    }
    const V inverse = total > 0 ? 1 / total : V{};
    for (int64_t i = 0; i < z.splits; ++i) {
      A* factor = first.largest + i * piece + c;
      simd::write(factor, simd::read<V>(factor) * inverse);
    }
  }
  for (int64_t q = 0; q < z.n; ++q) {
    T* out = a.out.at<T>(step / z.steps, step % z.steps, q, h * z.d);
    each<T>(z.d, [&](int64_t c, auto part) {
      V sum = {};
      for (int64_t i = 0; i < z.splits; ++i) {
        sum += simd::read<V>(first.sums + i * piece + q * z.ld + c) * first.largest[i * piece + q];
      }
      store(out + c, sum, part);
    });
  }
}

void forward(const BankAttentionArgs& a, const Executor& executor) {
  const Sizes z(a, a.partial);
  const int64_t steps = a.q.size[0] * z.steps;
  if (z.n == 0 || z.d == 0) return;
  visit_dtype<float, double, Half, BFloat16>("bank_attention", a.q.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel_for(executor, steps * z.splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) attend_split<T>(a, z, i / z.splits, i % z.splits);
    });
    parallel_for(executor, steps * z.H, kGrainElements / (z.splits * z.n * z.d) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) merge_head<T>(a, z, i / z.H, i % z.H);
    });
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(bank_attention, BankAttentionArgs, forward)
