// What the forward and backward kernels of temporal_attention share: tasks, packing, softmax, prefetch.
#pragma once
#include <cstdlib>
#include <type_traits>

#include "parallel.h"
#include "pyvidx/temporal_attention.h"
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

// f(the vector along which the queries lie)
template <typename T, typename F>
PYVIDX_INLINE void with_query_vector(int64_t frames, F&& f) {
  if constexpr (sizeof(Acc<T>) == 4 && simd::kBytes == 64) {
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

}  // namespace
}  // namespace pyvidx
