// What the forward and backward kernels of temporal_attention share: tasks and softmax.
#pragma once
#include "attention.h"
#include "pyvidx/temporal_attention.h"

namespace pyvidx {
namespace {

// w[key][query] <- softmax over the keys of scale * w. kCoarse: as exact as a sum that is rounded to bfloat16 needs.
template <typename V, bool kCoarse = false, typename A>
__attribute__((noinline)) void softmax_columns(A* w, int64_t T, int64_t ld, A scale) {
  if constexpr (kCoarse) scale *= 1.44269504088896f;  // powers of 2
  for (int64_t c = 0; c < ld; c += sizeof(V) / sizeof(A)) {
    V largest = simd::read<V>(w + c) * scale, sum = {};
    for (int64_t j = 1; j < T; ++j) largest = simd::larger(simd::read<V>(w + j * ld + c) * scale, largest);
    for (int64_t j = 0; j < T; ++j) {
      const V x = simd::read<V>(w + j * ld + c) * scale - largest;
      V e;
      if constexpr (kCoarse) {
        e = simd::coarse_power(x);
      } else {
        e = simd::exp(x);
      }
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

// Can rows of this view be stored past the caches, and is it worth it?
template <typename T, int kDims>
bool streams(const View<kDims>& x) {
  int64_t bytes = sizeof(T);
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % simd::kBytes == 0;
  for (int i = 0; i < kDims; ++i) bytes *= x.size[i];
  for (int i = 0; i + 1 < kDims; ++i) aligned &= x.stride[i] * int64_t(sizeof(T)) % simd::kBytes == 0;
  return aligned && bytes >= simd::kStreamBytes;
}

struct Task {
  int64_t b, p, h;
};

// f(task, the task `ahead` after it or the last one) for the tasks [begin, end).
template <typename F>
PYVIDX_INLINE void each_task(const View<6>& qkv, int64_t begin, int64_t end, int64_t ahead, F&& f) {
  const int64_t P = qkv.size[2], H = qkv.size[4];
  const auto step = [=](Task& task) {
    if (++task.h < H) return;
    task.h = 0;
    if (++task.p == P) task.p = 0, ++task.b;
  };
  Task task{begin / (P * H), begin / H % P, begin % H}, next = task;
  for (int64_t i = begin + 1; i < end && i <= begin + ahead; ++i) step(next);
  for (int64_t i = begin; i < end; ++i) {
    f(task, next);
    step(task);
    if (i + ahead + 1 < end) step(next);
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
