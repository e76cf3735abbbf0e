// What the attention kernels share: scratch memory, packing, prefetch, the vector along which queries lie.
#pragma once
#include <cstdlib>
#include <type_traits>

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
    if (memory_ == nullptr) throw_no_memory();
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

// f(the vector along which the queries lie)
template <typename T, typename F>
PYVIDX_INLINE void with_query_vector(int64_t frames, F&& f) {
  if constexpr (sizeof(Acc<T>) == 4 && simd::kBytes == 64) {
    if (frames <= 8) return f(HalfVector{});
  }
  f(Vec<T>{});
}

}  // namespace
}  // namespace pyvidx
