// A task is one (b, split of the positions), all its steps and heads: so no other task adds to the gradients of its
// rows. Positions go in groups of about kBlock keys, and a group through all steps, while its gradients are in the
// caches: float ones in place, 16-bit ones as float in scratch memory. Of each head the block's keys and values are
// packed as float; w and dw, [key][query], stay in L1. Traffic: 2 passes over the rows. Arithmetic: 10 n D flops per
// key and step (5 products), which binds as in the forward pass.
#include "bank_attention.h"
#include "level.h"

namespace pyvidx {
namespace {

// The queries of one step and the gradients of their outputs, of all heads, as they lie and transposed.
template <typename T>
struct Queries {
  using A = Acc<T>;
  A *q, *grad;      // [H][n][ld]
  A *qt, *gradt;    // [H][ld][columns]
  A *lse, *delta;   // [H][columns], 0 beyond n
  int64_t columns;  // n, rounded up
  int64_t step = -1;

  static int64_t elements(const Sizes& z, int64_t columns) {
    return z.H * (2 * z.n * z.ld + 2 * z.ld * columns + 2 * columns);
  }
  Queries(const Sizes& z, int64_t columns, Scratch& scratch)
      : q(scratch.take<A>(z.H * z.n * z.ld)),
        grad(scratch.take<A>(z.H * z.n * z.ld)),
        qt(scratch.take<A>(z.H * z.ld * columns)),
        gradt(scratch.take<A>(z.H * z.ld * columns)),
        lse(scratch.take<A>(z.H * columns)),
        delta(scratch.take<A>(z.H * columns)),
        columns(columns) {
    for (int64_t i = 0; i < z.H * z.n * z.ld; ++i) q[i] = grad[i] = 0;  // pads of a head that fills no vector
    for (int64_t i = 0; i < z.H * columns; ++i) lse[i] = delta[i] = 0;
  }

  template <typename V>
  void load(const BankAttentionBackwardArgs& a, const Sizes& z, int64_t b, int64_t s) {
    if (b * z.steps + s == step) return;
    step = b * z.steps + s;
    for (int64_t h = 0; h < z.H; ++h) {
      const auto turn = [&](const View<4>& from, A* to, A* turned) {
        as_floats<T>({from.at<const T>(b, s, 0, h * z.d), from.stride[2]}, z.n, z.d, false, to + h * z.n * z.ld, z.ld);
        transpose<V>(Matrix<const A>{to + h * z.n * z.ld, z.ld}, z.n, z.ld, turned + h * z.ld * columns, columns);
      };
      turn(a.q, q, qt);
      turn(a.grad_out, grad, gradt);
      for (int64_t i = 0; i < z.n; ++i) {
        lse[h * columns + i] = *a.lse.at<const A>(b, s, h, i);
        delta[h * columns + i] = *a.delta.at<const A>(b, s, h, i);
      }
    }
  }
};

// w[key][query] <- e^(scale w + bias - lse), dw <- scale * w * (dw - delta)
template <typename V, typename A>
__attribute__((noinline)) void weights_backward(A* w, A* dw, int64_t keys, int64_t ld, const A* bias, A scale,
                                                const A* lse, const A* delta) {
  for (int64_t j = 0; j < keys; ++j) {
    for (int64_t c = j * ld; c < (j + 1) * ld; c += sizeof(V) / sizeof(A)) {
      const V e = simd::exp(simd::read<V>(w + c) * scale + bias[j] - simd::read<V>(lse + c - j * ld));
      simd::write(w + c, e);
      simd::write(dw + c, e * (simd::read<V>(dw + c) - simd::read<V>(delta + c - j * ld)) * scale);
    }
  }
}

// Gradients of the rows of a group of positions.
template <typename T>
struct RowGradients {
  using A = Acc<T>;
  static constexpr bool kInPlace = sizeof(T) == sizeof(A);
  const BankAttentionBackwardArgs& a;
  int64_t b, S, width, first;  // of the group's places
  A* memory;                   // [places][width], where the gradients are not of type A themselves
  char* written;               // [places]

  A* at(int64_t place) const {
    if constexpr (kInPlace) return a.grad_rows.at<A>(b, place % S, place / S);
    return memory + (place - first) * width;
  }
  bool begin(int64_t place) {  // is it the first that is added to this place?
    const bool fresh = !written[place - first];
    written[place - first] = 1;
    return fresh;
  }
  void finish(int64_t places) {
    for (int64_t i = first; i < first + places; ++i) {
      T* to = a.grad_rows.at<T>(b, i % S, i / S);
      const A* from = memory + (i - first) * width;
      if (!written[i - first]) {
        each<T>(width, [&](int64_t c, auto part) { store(to + c, Vec<T>{}, part); });
      } else if (!kInPlace) {
        each<T>(width, [&](int64_t c, auto part) { store(to + c, load(from + c, part), part); });
      }
      written[i - first] = 0;
    }
  }
};

template <typename T>
void backward_split(const BankAttentionBackwardArgs& a, const Sizes& z, int64_t b, int64_t split) {
  using A = Acc<T>;
  const int64_t n = z.n, d = z.d, ld = z.ld, N = a.rows.size[2], S = a.rows.size[1];
  const int64_t L = a.table ? a.table.size[3] : S, group = L < kBlock ? kBlock / (L > 0 ? L : 1) : 1;
  const int64_t begin = N * split / z.splits, end = N * (split + 1) / z.splits;
  const int64_t kept = sizeof(T) == sizeof(A) || !a.grad_rows ? 0 : group * S * 2 * z.D;
  with_query_vector<T>(n, [&](auto query_vector) {
    using V = decltype(query_vector);
    const int64_t columns = round_up(n, sizeof(V) / sizeof(A));
    Scratch scratch((Queries<T>::elements(z, columns) + 3 * kBlock * ld + 2 * kBlock * columns + n * ld + kept) *
                        sizeof(A) +
                    group * S + 14 * 64);
    Queries<T> queries(z, columns, scratch);
    A *keys = scratch.take<A>(kBlock * ld), *values = scratch.take<A>(kBlock * ld);
    A *w = scratch.take<A>(kBlock * columns), *dw = scratch.take<A>(kBlock * columns);
    A *part = scratch.take<A>(n * ld), *row_part = scratch.take<A>(kBlock * ld);
    RowGradients<T> gradients{a, b, S, 2 * z.D, 0, scratch.take<A>(kept), scratch.take<char>(group * S)};
    for (int64_t i = 0; i < group * S; ++i) gradients.written[i] = 0;
    for (int64_t i = 0; i < z.steps * z.H; ++i) {
      A* sums = a.partial.at<A>(b * z.steps * z.H + i, split);
      for (int64_t c = 0; c < n * ld; ++c) sums[c] = 0;
    }
    Block<T> block;
    bool fresh[kBlock];
    // to <- or += row_part, of every key
    const auto add_rows = [&](int64_t offset) {
      for (int64_t j = 0; j < block.count; ++j) {
        A* to = gradients.at(block.place[j]) + offset;
        each<A>(d, [&](int64_t c, auto some) {
          const Vec<A> sum = load(row_part + j * ld + c, some);
          store(to + c, fresh[j] ? sum : load(to + c, some) + sum, some);
        });
      }
    };
    for (int64_t p = begin; p < end; p += group) {
      const int64_t last = p + group < end ? p + group : end;
      gradients.first = p * S;
      for (int64_t s = 0; s < z.steps; ++s) {
        Walk<T> walk{a, b, s, p, last};
        for (walk.next(block); block.count > 0; walk.next(block)) {
          queries.template load<V>(a, z, b, s);
          for (int64_t j = 0; a.grad_rows && j < block.count; ++j) fresh[j] = gradients.begin(block.place[j]);
          for (int64_t h = 0; h < z.H; ++h) {
            const auto fetch_next = fetch(block, (h + 1 < z.H ? h + 1 : h) * d, d, z.D);
            const Matrix<const A> q{queries.q + h * n * ld, ld}, qt{queries.qt + h * ld * columns, columns};
            const Matrix<const A> grad{queries.grad + h * n * ld, ld}, gradt{queries.gradt + h * ld * columns, columns};
            pack(block, h * d, d, keys, ld);
            pack(block, z.D + h * d, d, values, ld);
            product<V>(block.count, columns, d, Left<A>{keys, ld, 1}, qt, Matrix<A>{w, columns}, fetch_next);
            product<V>(block.count, columns, d, Left<A>{values, ld, 1}, gradt, Matrix<A>{dw, columns}, Prefetch());
            weights_backward<V>(w, dw, block.count, columns, block.bias, A(a.scale), queries.lse + h * columns,
                                queries.delta + h * columns);
            product<Vec<T>>(n, ld, block.count, Left<A>{dw, 1, columns}, Matrix<const A>{keys, ld}, Matrix<A>{part, ld},
                            Prefetch());
            A* sums = a.partial.at<A>((b * z.steps + s) * z.H + h, split);
            each<A>(n * ld, [&](int64_t c, auto) { store(sums + c, load(sums + c) + load(part + c)); });
            if (!a.grad_rows) continue;
            const Matrix<A> to{row_part, ld};
            product<Vec<T>>(block.count, ld, n, Left<A>{dw, columns, 1}, q, to, Prefetch());
            add_rows(h * d);
            product<Vec<T>>(block.count, ld, n, Left<A>{w, columns, 1}, grad, to, Prefetch());
            add_rows(z.D + h * d);
          }
        }
      }
      if (a.grad_rows) gradients.finish((last - p) * S);
    }
  });
}

// delta[b, s, h, i] of all queries
template <typename T>
void sum_deltas(const BankAttentionBackwardArgs& a, const Sizes& z, int64_t head) {
  const int64_t b = head / z.H / z.steps, s = head / z.H % z.steps, h = head % z.H;
  for (int64_t i = 0; i < z.n; ++i) {
    const T *x = a.out.at<const T>(b, s, i, h * z.d), *y = a.grad_out.at<const T>(b, s, i, h * z.d);
    *a.delta.at<Acc<T>>(b, s, h, i) =
        simd::sum_of<T>(z.d, [&](int64_t c, auto part) { return load(x + c, part) * load(y + c, part); });
  }
}

// grad_q <- the sums of its splits
template <typename T>
void merge_head(const BankAttentionBackwardArgs& a, const Sizes& z, int64_t head) {
  const int64_t b = head / z.H / z.steps, s = head / z.H % z.steps, h = head % z.H;
  for (int64_t i = 0; i < z.n; ++i) {
    T* to = a.grad_q.at<T>(b, s, i, h * z.d);
    each<T>(z.d, [&](int64_t c, auto part) {
      Vec<T> sum = {};
      for (int64_t split = 0; split < z.splits; ++split) {
        sum += simd::read<Vec<T>>(a.partial.at<const Acc<T>>(head, split) + i * z.ld + c);
      }
      store(to + c, sum, part);
    });
  }
}

void backward(const BankAttentionBackwardArgs& a, const Executor& executor) {
  const Sizes z(a, a.partial);
  if (z.d == 0) return;
  const int64_t B = a.q.size[0], heads = B * z.steps * z.H, grain = kGrainElements / (z.n * z.d + 1) + 1;
  visit_dtype<float, double, Half, BFloat16>("bank_attention_backward", a.q.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    parallel_for(executor, heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum_deltas<T>(a, z, i);
    });
    parallel_for(executor, B * z.splits, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) backward_split<T>(a, z, i / z.splits, i % z.splits);
    });
    parallel_for(executor, heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) merge_head<T>(a, z, i);
    });
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(bank_attention_backward, BankAttentionBackwardArgs, backward)
