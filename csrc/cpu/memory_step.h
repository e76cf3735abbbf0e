// One step of a memory bank at one position: the choice, the merge, the similarities that change. Shared by the
// streaming step (memory_merge) and the walk over a clip (memory_scan), which so give the same bits.
#pragma once
#include "level.h"
#include "pairs.h"
#include "pyvidx/memory_merge.h"

namespace pyvidx {
namespace {

using simd::Acc;
using simd::add_product;
using simd::each_pair;
using simd::load;
using simd::load_raw;
using simd::Of;
using simd::store;
using simd::store_raw;
using simd::sum;
using simd::Vec;

template <typename F>
void visit_floating(const char* op, DType dtype, F&& f) {
  visit_dtype<float, double, Half, BFloat16>(op, dtype, f);
}

// What one step does at one position. Slots; -1: none.
struct Plan {
  int64_t b, n;
  int32_t k;                        // the merged pair is (k, k + 1); -1: nothing merges
  int32_t keep, gone, left, right;  // the pair, and its neighbors in time
  int32_t last, target;             // the newest entry after the merge (may be `keep`), and where the frame goes
  int32_t last_index;               // of `last` in time
  int32_t s0, s1;                   // weights of the pair
  int32_t count0, count1;           // frames in the pair
};

PYVIDX_INLINE Plan no_plan(int64_t b, int64_t n) { return {b, n, -1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 0, 0}; }

PYVIDX_INLINE double root(double x) { return __builtin_sqrt(x); }
PYVIDX_INLINE float root(float x) { return __builtin_sqrtf(x); }

template <typename A>
PYVIDX_INLINE A cosine(A dot, A xx, A yy) {
  const A eps = A(kMemoryEps), x = root(xx), y = root(yy);
  return dot / ((x < eps ? eps : x) * (y < eps ? eps : y));  // the same whichever row comes first
}

// NaN is larger than every number, as in torch.argmax.
template <typename A>
PYVIDX_INLINE bool better(A x, A best) {
  return x > best || (x != x && best == best);
}

// Choose, and bring order, sizes and the cached similarities up to date, but for those that need the rows.
// `length`: entries before the step.
PYVIDX_INLINE Plan make_plan(const MemoryStepArgs& a, int64_t b, int64_t n, int64_t length) {
  const int64_t M = a.similarity.size[2];
  Plan p = no_plan(b, n);
  auto order = [&](int64_t j) -> int32_t& { return *a.order.at<int32_t>(b, n, j); };
  auto size = [&](int64_t slot) -> int32_t& { return *a.sizes.at<int32_t>(b, n, slot); };
  auto similarity = [&](int64_t j) -> float& { return *a.similarity.at<float>(b, n, j); };

  if (length == M + 1) {
    int64_t k = 0;
    float best = similarity(0);
    for (int64_t j = 1; j < M; ++j) {
      if (better(similarity(j), best)) best = similarity(j), k = j;
    }
    p.k = int32_t(k);
    p.keep = order(k), p.gone = order(k + 1);
    if (k > 0) p.left = order(k - 1);
    if (k + 2 <= M) p.right = order(k + 2);
    p.count0 = size(p.keep), p.count1 = size(p.gone);
    if (a.weighted) p.s0 = p.count0, p.s1 = p.count1;
    size(p.keep) += size(p.gone);
    size(p.gone) = 0;
    for (int64_t j = k + 1; j < M; ++j) order(j) = order(j + 1);
    order(M) = p.gone;
    for (int64_t j = k; j + 1 < M; ++j) similarity(j) = similarity(j + 1);
    similarity(M - 1) = 0;
    --length;
  }
  if (a.frame) {
    p.target = order(length);
    size(p.target) = 1;
    p.last_index = int32_t(length) - 1;
    if (length > 0) p.last = order(length - 1);
  }
  return p;
}

// The rows of a plan in one tensor. Missing ones point to a row that is there; what is computed of it is not used.
// F: type of the frame, where it is not that of the bank.
template <typename T, typename F = T>
struct Rows {
  T *keep, *target;
  const T *gone, *left, *right, *last;
  const F* frame;
};

template <typename T, typename F = T>
PYVIDX_INLINE Rows<T, F> rows_of(const Plan& p, const View<4>& rows, const View<3>& frame) {
  const int32_t any = p.k >= 0 ? p.keep : p.target;
  auto row = [&](int32_t slot) { return rows.at<T>(p.b, slot < 0 ? any : slot, p.n); };
  return {row(p.keep),
          row(p.target),
          row(p.gone),
          row(p.left),
          row(p.right),
          row(p.last),
          frame ? frame.at<const F>(p.b, p.n) : nullptr};
}

constexpr int64_t kLine = 64;

template <typename T>
PYVIDX_INLINE void prefetch(const T* row, int64_t begin, int64_t end) {  // elements
  if (row == nullptr) return;
  const char* p = reinterpret_cast<const char*>(row + begin);
  for (const char* last = reinterpret_cast<const char*>(row + end); p < last; p += kLine) __builtin_prefetch(p, 0, 2);
}

// (s0 x + s1 y) / (s0 + s1)
template <typename T>
struct Mean {
  Acc<T> s0, s1, total, inverse, first, second;

  Mean(int32_t x, int32_t y)
      : s0(x), s1(y), total(s0 + s1), inverse(1 / total), first(s0 / total), second(s1 / total) {}

  template <typename V>
  PYVIDX_INLINE V operator()(V x, V y) const {
    if constexpr (sizeof(T) == 2) return x * first + y * second;  // rounded to 16 bits below
    const V dividend = x * s0 + y * s1;
#if defined(__FMA__)  // a vector division takes as long as all the rest: one Newton step on the product rounds as well
    const V quotient = dividend * inverse;
    return (dividend - quotient * total) * inverse + quotient;
#else
    return dividend / total;
#endif
  }
};

// As a row of T would be: F may be of 16 bits where T is float.
template <typename T, typename F, typename Part>
PYVIDX_INLINE typename simd::LaneOf<T, Part>::Raw load_as(const F* p, Part part) {
  if constexpr (std::is_same<T, F>::value) {
    return load_raw(p, part);
  } else if constexpr (simd::kIsPair<Part>) {  // by halves: two of bfloat16 come as its even and its odd elements
    return {load(p, simd::Full{}), load(p + simd::kWidth<T>, simd::Full{})};
  } else {
    return load(p, part);
  }
}

// The bank's rows of one position. `ahead`: rows to prefetch meanwhile, those of the next walk.
template <typename T, typename F, bool kMerge, bool kAppend>
void bank_rows(const MemoryStepArgs& a, const Plan& p, const Rows<T, F>* ahead) {
  const int64_t C = a.bank.size[3];
  const Rows<T, F> r = rows_of<T, F>(p, a.bank, a.frame);
  const Mean<T> mean(p.s0, p.s1);
  Vec<T> keep2{}, left2{}, right2{}, last2{}, frame2{}, left_keep{}, keep_right{}, last_frame{};
  const auto merge = [&](int64_t c, auto part) __attribute__((always_inline)) {
    using L = simd::LaneOf<T, decltype(part)>;
    const auto raw = L::down(mean(load(r.keep + c, part), load(r.gone + c, part)));
    const auto keep = L::up(raw), left = load(r.left + c, part), right = load(r.right + c, part);
    add_product(keep2, keep, keep), add_product(left2, left, left), add_product(right2, right, right);
    add_product(left_keep, left, keep), add_product(keep_right, keep, right);
    store_raw(r.keep + c, raw, part);
  };
  // After the merge: the newest may be the merged row.
  const auto append = [&](int64_t c, auto part) __attribute__((always_inline)) {
    const auto last = load(r.last + c, part);
    const auto raw = load_as<T>(r.frame + c, part);
    const auto frame = simd::LaneOf<T, decltype(part)>::up(raw);
    add_product(frame2, frame, frame), add_product(last2, last, last), add_product(last_frame, last, frame);
    store_raw(r.target + c, raw, part);
  };
  constexpr int64_t kBlock = 1024 / sizeof(T);
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    const int64_t end = begin + kBlock < C ? begin + kBlock : C;
    if (ahead) {
      prefetch(ahead->keep, begin, end), prefetch(ahead->gone, begin, end);
      prefetch(ahead->left, begin, end), prefetch(ahead->right, begin, end);
      if (kAppend) prefetch(ahead->last, begin, end), prefetch(ahead->frame, begin, end);
    }
    each_pair<T>(end - begin, [&](int64_t i, auto part) {
      if constexpr (kMerge) merge(begin + i, part);
      if constexpr (kAppend) append(begin + i, part);
    });
  }
  auto similarity = [&](int64_t j, Acc<T> value) { *a.similarity.at<float>(p.b, p.n, j) = float(value); };
  if (p.left >= 0) similarity(p.k - 1, cosine(sum(left_keep), sum(left2), sum(keep2)));
  if (p.right >= 0) similarity(p.k, cosine(sum(keep_right), sum(keep2), sum(right2)));
  if (p.last >= 0) similarity(p.last_index, cosine(sum(last_frame), sum(last2), sum(frame2)));
}

template <typename T, typename F>
void any_bank_rows(const MemoryStepArgs& a, const Plan& p, const Rows<T, F>* ahead) {
  if (p.k >= 0 && p.target >= 0) {
    bank_rows<T, F, true, true>(a, p, ahead);
  } else if (p.k >= 0) {
    bank_rows<T, F, true, false>(a, p, ahead);
  } else {
    bank_rows<T, F, false, true>(a, p, ahead);
  }
}

// Is order [b, n] a permutation of its slots?
PYVIDX_INLINE bool is_permutation(const View<3>& order, int64_t b, int64_t n) {
  constexpr int64_t kBits = 64;
  const int64_t slots = order.size[2];
  for (int64_t first = 0; first < slots; first += kBits) {  // one walk for every 64 slots: they are few
    uint64_t seen = 0;
    for (int64_t j = 0; j < slots; ++j) {
      const int32_t slot = *order.at<const int32_t>(b, n, j);
      if (slot < 0 || slot >= slots) return false;
      if (slot >= first && slot < first + kBits) seen |= uint64_t(1) << (slot - first);
    }
    const int64_t count = slots - first < kBits ? slots - first : kBits;
    if (seen != ~uint64_t(0) >> (kBits - count)) return false;
  }
  return true;
}

// Slots and lengths come from the caller's state.
PYVIDX_INLINE void check_state(const MemoryStepArgs& a) {
  const auto& size = a.order.size;
  for (int64_t b = 0; b < size[0]; ++b) {
    const int32_t length = *a.length.at<const int32_t>(b);
    if (length < 0 || length > size[2]) {
      throw_out_of_range("memory bank: length must be between 0 and M + 1");
    }
    for (int64_t n = 0; n < size[1]; ++n) {
      if (!is_permutation(a.order, b, n)) throw_out_of_range("memory bank: order must hold each of the slots 0 .. M");
    }
  }
}

}  // namespace
}  // namespace pyvidx
