// A task is one (b, p, h), neighboring heads after each other. Its T rows of q, k and v are packed as float (at their
// own strides, often powers of two, they would evict each other from L1), both products run in registers from there,
// and the scores stay in L1 or L2. Scores are held transposed, w[key][query]: then maxima and sums over the keys go
// along the rows, with no horizontal operation. Traffic: 4 passes (q, k, v, out), 7 backward. Arithmetic: 4 T^2 D flops
// per head, 10 T^2 D backward; against 4 T D elements of traffic it binds from about T = 16 (float) or T = 8 (16-bit)
// on.
#include "pyvidx/temporal_attention.h"

#include <cstdlib>
#include <type_traits>

#include "level.h"
#include "parallel.h"
#include "simd.h"
#include "tile_product.h"

namespace pyvidx {
namespace {

using simd::Acc;
using simd::each;
using simd::kWidth;
using simd::load;
using simd::store;
using simd::Vec;

PYVIDX_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory of one thread, cut into pieces that start on cache lines.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(static_cast<char*>(std::aligned_alloc(64, round_up(bytes, 64)))) {
    if (memory_ == nullptr) std::abort();  // as any allocation of a few KB that fails on Linux
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;

  template <typename A>
  A* take(int64_t n) {
    A* piece = reinterpret_cast<A*>(memory_ + used_);
    used_ += round_up(n * sizeof(A), 64);
    return piece;
  }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// Fetches rows of the next task while this one computes; the hardware does not foresee them.
class Prefetch {
 public:
  Prefetch() = default;
  template <typename T, typename... Rest>
  Prefetch(int64_t D, Matrix<const T> rows, Rest... rest) : row_bytes_(D * sizeof(T)) {
    for (const Matrix<const T>& m : {rows, rest...}) {
      data_[count_] = reinterpret_cast<const char*>(m.data);
      frame_bytes_[count_++] = m.row * sizeof(T);
    }
  }
  PYVIDX_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int m = 0; m < count_; ++m) {
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t i = 0; i < row_bytes_; i += 64) simd::prefetch(data_[m] + t * frame_bytes_[m] + i);
      }
    }
  }

 private:
  const char* data_[2] = {};
  int64_t frame_bytes_[2] = {}, row_bytes_ = 0;
  int count_ = 0;
};

// T rows of D elements as floats: as they lie where they are floats and `in_place`, else packed into memory [T][ld],
// zero beyond D.
template <typename T>
Matrix<const Acc<T>> as_floats(Matrix<const T> x, int64_t rows, int64_t D, bool in_place, Acc<T>* memory, int64_t ld) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    if (in_place) return x;
  }
  for (int64_t t = 0; t < rows; ++t) {
    each<T>(D, [&](int64_t d, auto part) { store(memory + t * ld + d, load(x.data + t * x.row + d, part)); });
  }
  return {memory, ld};
}

// out <- x, T rows of D elements.
template <typename T>
void store_rows(Matrix<const Acc<T>> x, int64_t rows, int64_t D, Matrix<T> out) {
  for (int64_t t = 0; t < rows; ++t) {
    T* row = out.data + t * out.row;
    each<T>(D, row, out.stream,
            [&](int64_t d, auto part) { store(row + d, simd::read<Vec<T>>(x.data + t * x.row + d), part); });
  }
}

// w[key][query] <- softmax over the keys of scale * w.
template <typename V, typename A>
__attribute__((noinline)) void softmax_columns(A* w, int64_t T, int64_t ld, A scale) {
  for (int64_t c = 0; c < ld; c += sizeof(V) / sizeof(A)) {
    V largest = simd::read<V>(w + c) * scale, sum = {};
    for (int64_t j = 1; j < T; ++j) largest = simd::larger(simd::read<V>(w + j * ld + c) * scale, largest);
    for (int64_t j = 0; j < T; ++j) {
      const V e = simd::exp(simd::read<V>(w + j * ld + c) * scale - largest);
      simd::write(w + j * ld + c, e);
      sum += e;
    }
    const V inverse = 1 / sum;
    for (int64_t j = 0; j < T; ++j) simd::write(w + j * ld + c, simd::read<V>(w + j * ld + c) * inverse);
  }
}

// dw <- scale * w * (dw - sum over the keys of w * dw): from the gradient of the softmax to that of its argument.
template <typename V, typename A>
__attribute__((noinline)) void softmax_columns_backward(const A* w, A* dw, int64_t T, int64_t ld, A scale) {
  for (int64_t c = 0; c < ld; c += sizeof(V) / sizeof(A)) {
    V mean = {};
    for (int64_t j = 0; j < T; ++j) mean += simd::read<V>(w + j * ld + c) * simd::read<V>(dw + j * ld + c);
    for (int64_t j = 0; j < T; ++j) {
      const V centered = simd::read<V>(dw + j * ld + c) - mean;
      simd::write(dw + j * ld + c, simd::read<V>(w + j * ld + c) * centered * scale);
    }
  }
}

// The lanes along which queries lie. Half a vector where the frames fill no more: 8 is the most common clip.
template <typename T>
constexpr bool kHalves = sizeof(Acc<T>) == 4 && simd::kBytes == 64;
typedef float HalfVector __attribute__((vector_size(32)));

template <typename T, typename F>
PYVIDX_INLINE void with_query_vector(int64_t frames, F&& f) {
  if constexpr (kHalves<T>) {
    if (frames <= 8) return f(HalfVector{});
  }
  f(Vec<T>{});
}

// Can rows of this view be stored past the caches, and is it worth it?
template <typename T, int kDims>
bool streams(const View<kDims>& x) {
  int64_t bytes = sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % simd::kBytes == 0;
  for (int i = 0; i < kDims; ++i) bytes *= x.size[i];
  for (int i = 0; i + 1 < kDims; ++i) aligned &= x.stride[i] * int64_t(sizeof(T)) % simd::kBytes == 0;
  return aligned && bytes > simd::kStreamBytes;
}

struct Task {
  int64_t b, p, h;
};

// f(task, the task after it) for the tasks [begin, end).
template <typename F>
PYVIDX_INLINE void each_task(const View<6>& qkv, int64_t begin, int64_t end, F&& f) {
  const int64_t P = qkv.size[2], H = qkv.size[4];
  Task task{begin / (P * H), begin / H % P, begin % H};
  for (int64_t i = begin; i < end; ++i) {
    Task next = task;
    if (i + 1 < end && ++next.h == H) {
      next.h = 0;
      if (++next.p == P) next.p = 0, ++next.b;
    }
    f(task, next);
    task = next;
  }
}

template <typename T>
Matrix<const T> part_of(const View<6>& qkv, Task task, int part) {
  return {qkv.at<const T>(task.b, 0, task.p, part, task.h), qkv.stride[1]};
}
template <typename T>
Matrix<const T> rows_of(const View<5>& x, Task task) {
  return {x.at<const T>(task.b, 0, task.p, task.h), x.stride[1]};
}

template <typename T>
void attend(const TemporalAttentionArgs& a, const Executor& executor) {
  using A = Acc<T>;
  const int64_t frames = a.qkv.size[1], D = a.qkv.size[5], tasks = a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  if (frames == 0 || D == 0) return;
  const bool stream = streams<T>(a.out);
  const int64_t ld = round_up(D, kWidth<T>);
  const bool whole = ld == D, few = whole && frames <= 8;  // few: a product reads its right operand only once
  with_query_vector<T>(frames, [&](auto query_vector) {
    using V = decltype(query_vector);
    const int64_t queries = round_up(frames, sizeof(V) / sizeof(A));
    parallel_for(executor, tasks, kGrainElements / (4 * frames * D) + 1, [&](int64_t begin, int64_t end) {
      Scratch scratch((3 * frames * ld + ld * queries + frames * queries) * sizeof(A) + 5 * 64);
      A *q_memory = scratch.take<A>(frames * ld), *k_memory = scratch.take<A>(frames * ld);
      A *v_memory = scratch.take<A>(frames * ld), *sums = q_memory;
      A *qt = scratch.take<A>(ld * queries), *w = scratch.take<A>(frames * queries);
      each_task(a.qkv, begin, end, [&](Task task, Task next) {
        const Prefetch next_qk(D, part_of<T>(a.qkv, next, 0), part_of<T>(a.qkv, next, 1));
        const Prefetch next_v(D, part_of<T>(a.qkv, next, 2));
        const auto q = as_floats<T>(part_of<T>(a.qkv, task, 0), frames, D, whole, q_memory, ld);
        const auto k = as_floats<T>(part_of<T>(a.qkv, task, 1), frames, D, whole, k_memory, ld);
        transpose<V>(q, frames, ld, qt, queries);
        product<V>(frames, queries, D, Left<A>{k.data, k.row, 1}, Matrix<const A>{qt, queries}, Matrix<A>{w, queries},
                   next_qk);
        softmax_columns<V>(w, frames, queries, A(a.scale));
        const Left<A> weights{w, 1, queries};
        const Matrix<T> out{a.out.at<T>(task.b, 0, task.p, task.h), a.out.stride[1], stream};
        const auto v_here = part_of<T>(a.qkv, task, 2);
        if (few) return product<Vec<T>>(frames, D, frames, weights, v_here, out, next_v);
        const auto v = as_floats<T>(v_here, frames, D, false, v_memory, ld);
        if (whole) return product<Vec<T>>(frames, D, frames, weights, v, out, next_v);
        product<Vec<T>>(frames, ld, frames, weights, v, Matrix<A>{sums, ld}, next_v);
        store_rows<T>({sums, ld}, frames, D, out);
      });
      simd::fence();
    });
  });
}

template <typename T>
void attend_backward(const TemporalAttentionBackwardArgs& a, const Executor& executor) {
  using A = Acc<T>;
  const int64_t frames = a.qkv.size[1], D = a.qkv.size[5], tasks = a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  if (frames == 0 || D == 0) return;
  const bool stream = streams<T>(a.grad_qkv);
  const int64_t ld = round_up(D, kWidth<T>);
  with_query_vector<T>(frames, [&](auto query_vector) {
    using V = decltype(query_vector);
    const int64_t queries = round_up(frames, sizeof(V) / sizeof(A));
    parallel_for(executor, tasks, kGrainElements / (7 * frames * D) + 1, [&](int64_t begin, int64_t end) {
      Scratch scratch((5 * frames * ld + ld * queries + 2 * frames * queries) * sizeof(A) + 8 * 64);
      A* memory[4];
      for (A*& m : memory) m = scratch.take<A>(frames * ld);
      A *sums = scratch.take<A>(frames * ld), *transposed = scratch.take<A>(ld * queries);
      A *w = scratch.take<A>(frames * queries), *dw = scratch.take<A>(frames * queries);
      each_task(a.qkv, begin, end, [&](Task task, Task next) {
        const auto packed = [&](Matrix<const T> x, int i) { return as_floats<T>(x, frames, D, false, memory[i], ld); };
        const Prefetch next_qk(D, part_of<T>(a.qkv, next, 0), part_of<T>(a.qkv, next, 1));
        const Prefetch next_v(D, part_of<T>(a.qkv, next, 2)), next_grad(D, rows_of<T>(a.grad_out, next));
        const auto q = packed(part_of<T>(a.qkv, task, 0), 0), k = packed(part_of<T>(a.qkv, task, 1), 1);
        const auto v = packed(part_of<T>(a.qkv, task, 2), 2), grad = packed(rows_of<T>(a.grad_out, task), 3);
        const Matrix<const A> columns{transposed, queries};
        const auto result = [&](int part) {
          store_rows<T>({sums, ld}, frames, D,
                        {a.grad_qkv.at<T>(task.b, 0, task.p, part, task.h), a.grad_qkv.stride[1], stream});
        };

        transpose<V>(q, frames, ld, transposed, queries);
        product<V>(frames, queries, D, Left<A>{k.data, ld, 1}, columns, Matrix<A>{w, queries}, next_qk);
        softmax_columns<V>(w, frames, queries, A(a.scale));
        transpose<V>(grad, frames, ld, transposed, queries);
        product<V>(frames, queries, D, Left<A>{v.data, ld, 1}, columns, Matrix<A>{dw, queries}, next_v);
        softmax_columns_backward<V>(w, dw, frames, queries, A(a.scale));

        const Matrix<A> out{sums, ld};
        product<Vec<T>>(frames, ld, frames, Left<A>{dw, 1, queries}, k, out, next_grad);
        result(0);
        product<Vec<T>>(frames, ld, frames, Left<A>{dw, queries, 1}, q, out, Prefetch());
        result(1);
        product<Vec<T>>(frames, ld, frames, Left<A>{w, queries, 1}, grad, out, Prefetch());
        result(2);
      });
      simd::fence();
    });
  });
}

void forward(const TemporalAttentionArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("temporal_attention", args.qkv.dtype,
                                             [&](auto t) { attend<typename decltype(t)::type>(args, executor); });
}

void backward(const TemporalAttentionBackwardArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("temporal_attention_backward", args.qkv.dtype, [&](auto t) {
    attend_backward<typename decltype(t)::type>(args, executor);
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(temporal_attention, TemporalAttentionArgs, forward)
PYVIDX_CPU_ENTRY(temporal_attention_backward, TemporalAttentionBackwardArgs, backward)
