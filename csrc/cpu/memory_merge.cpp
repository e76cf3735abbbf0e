// The streaming step on slots, and one merge as a function.
//
// A step moves 8 rows of the bank per position: it reads both rows of the pair, their outer neighbors, the last entry
// and the frame, and writes the merged row and (into the slot that became free) the frame. All in one walk over C, with
// the sums of the three cosines taken on the way. Attached rows: 5 (read 3, write 2). Both written rows have just been
// read, so plain stores cost no extra traffic and streaming stores gain nothing.
#include "pyvidx/memory_merge.h"

#include "level.h"
#include "parallel.h"
#include "simd.h"

namespace pyvidx {
namespace {

using simd::Acc;
using simd::each;
using simd::load;
using simd::store;
using simd::sum;
using simd::Vec;

template <typename F>
void visit_floating(const char* op, DType dtype, F&& f) {
  visit_dtype<float, double, Half, BFloat16>(op, dtype, f);
}

constexpr int64_t kPlans = 32;  // positions planned ahead: so the rows of the next one can be prefetched

// What one step does at one position. Slots; -1: none.
struct Plan {
  int64_t b, n;
  int32_t k;                        // the merged pair is (k, k + 1); -1: nothing merges
  int32_t keep, gone, left, right;  // the pair, and its neighbors in time
  int32_t last, target;             // the newest entry after the merge (may be `keep`), and where the frame goes
  int32_t last_index;               // of `last` in time
  int32_t s0, s1;                   // weights of the pair
};

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

// Vectors as they are stored: what is only moved needs no conversion, what is written and used is converted once.
template <typename T>
using Raw = typename simd::Lane<T>::Raw;
template <typename T>
PYVIDX_INLINE Raw<T> load_raw(const T* p, simd::Full) {
  return simd::read<Raw<T>>(p);
}
template <typename T>
PYVIDX_INLINE Raw<T> load_raw(const T* p, simd::Part part) {
  Raw<T> raw = {};
  __builtin_memcpy(&raw, p, part.n * sizeof(T));
  return raw;
}
template <typename T>
PYVIDX_INLINE void store_raw(T* p, Raw<T> raw, simd::Full) {
  simd::write(p, raw);
}
template <typename T>
PYVIDX_INLINE void store_raw(T* p, Raw<T> raw, simd::Part part) {
  __builtin_memcpy(p, &raw, part.n * sizeof(T));
}

// Choose, and bring order, sizes and the cached similarities up to date, but for those that need the rows.
Plan make_plan(const MemoryStepArgs& a, int64_t b, int64_t n) {
  const int64_t M = a.similarity.size[2];
  Plan p{b, n, -1, -1, -1, -1, -1, -1, -1, -1, 1, 1};
  int32_t* index = a.index.at<int32_t>(b, n);
  *index = -1;
  if (a.active && *a.active.at<const int32_t>(b) == 0) return p;
  int64_t length = *a.length.at<const int32_t>(b);
  auto order = [&](int64_t j) -> int32_t& { return *a.order.at<int32_t>(b, n, j); };
  auto size = [&](int64_t slot) -> int32_t& { return *a.sizes.at<int32_t>(b, n, slot); };
  auto similarity = [&](int64_t j) -> float& { return *a.similarity.at<float>(b, n, j); };

  if (length == M + 1) {
    int64_t k = 0;
    float best = similarity(0);
    for (int64_t j = 1; j < M; ++j) {
      if (better(similarity(j), best)) best = similarity(j), k = j;
    }
    *index = p.k = int32_t(k);
    p.keep = order(k), p.gone = order(k + 1);
    if (k > 0) p.left = order(k - 1);
    if (k + 2 <= M) p.right = order(k + 2);
    if (a.weighted) p.s0 = size(p.keep), p.s1 = size(p.gone);
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
template <typename T>
struct Rows {
  T *keep, *target;
  const T *gone, *left, *right, *last, *frame;
};

template <typename T>
PYVIDX_INLINE Rows<T> rows_of(const Plan& p, const View<4>& rows, const View<3>& frame) {
  const int32_t any = p.k >= 0 ? p.keep : p.target;
  auto row = [&](int32_t slot) { return rows.at<T>(p.b, slot < 0 ? any : slot, p.n); };
  return {row(p.keep),
          row(p.target),
          row(p.gone),
          row(p.left),
          row(p.right),
          row(p.last),
          frame ? frame.at<const T>(p.b, p.n) : nullptr};
}

constexpr int64_t kLine = 64;

template <typename T>
PYVIDX_INLINE void prefetch(const T* row, int64_t begin, int64_t end) {  // elements
  const char* p = reinterpret_cast<const char*>(row + begin);
  for (const char* last = reinterpret_cast<const char*>(row + end); p < last; p += kLine) __builtin_prefetch(p, 0, 2);
}

// (s0 x + s1 y) / (s0 + s1)
template <typename T>
struct Mean {
  Acc<T> s0, s1, total, inverse, first, second;

  explicit Mean(const Plan& p)
      : s0(p.s0), s1(p.s1), total(s0 + s1), inverse(1 / total), first(s0 / total), second(s1 / total) {}

  PYVIDX_INLINE Vec<T> operator()(Vec<T> x, Vec<T> y) const {
    if constexpr (sizeof(T) == 2) return x * first + y * second;  // rounded to 16 bits below
    const Vec<T> dividend = x * s0 + y * s1;
#if defined(__FMA__)  // a vector division takes as long as all the rest: one Newton step on the product rounds as well
    const Vec<T> quotient = dividend * inverse;
    return (dividend - quotient * total) * inverse + quotient;
#else
    return dividend / total;
#endif
  }
};

// The bank's rows of one position. `next`: the rows to prefetch, of the next position.
template <typename T, bool kMerge, bool kAppend>
void bank_rows(const MemoryStepArgs& a, const Plan& p, const Plan* next) {
  const int64_t C = a.bank.size[3];
  const Rows<T> r = rows_of<T>(p, a.bank, a.frame);
  const Mean<T> mean(p);
  Vec<T> keep2{}, left2{}, right2{}, last2{}, frame2{}, left_keep{}, keep_right{}, keep_frame{}, last_frame{};
  constexpr int64_t kBlock = 1024 / sizeof(T);
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    const int64_t end = begin + kBlock < C ? begin + kBlock : C;
    if (next) {
      const Rows<T> ahead = rows_of<T>(*next, a.bank, a.frame);
      prefetch(ahead.keep, begin, end), prefetch(ahead.gone, begin, end);
      prefetch(ahead.left, begin, end), prefetch(ahead.right, begin, end);
      if (kAppend) prefetch(ahead.last, begin, end), prefetch(ahead.frame, begin, end);
    }
    each<T>(end - begin, [&](int64_t i, auto part) {
      const int64_t c = begin + i;
      using L = simd::Lane<T>;
      Raw<T> raw_keep, raw_frame;
      Vec<T> keep{};
      if constexpr (kMerge) {
        raw_keep = L::down(mean(load(r.keep + c, part), load(r.gone + c, part)));
        keep = L::up(raw_keep);
        const Vec<T> left = load(r.left + c, part), right = load(r.right + c, part);
        keep2 += keep * keep, left2 += left * left, right2 += right * right;
        left_keep += left * keep, keep_right += keep * right;
      }
      if constexpr (kAppend) {
        const Vec<T> last = load(r.last + c, part);
        raw_frame = load_raw(r.frame + c, part);
        const Vec<T> frame = L::up(raw_frame);
        frame2 += frame * frame, last2 += last * last, last_frame += last * frame, keep_frame += keep * frame;
      }
      if constexpr (kMerge) store_raw(r.keep + c, raw_keep, part);
      if constexpr (kAppend) store_raw(r.target + c, raw_frame, part);
    });
  }
  auto similarity = [&](int64_t j, Acc<T> value) { *a.similarity.at<float>(p.b, p.n, j) = float(value); };
  if (p.left >= 0) similarity(p.k - 1, cosine(sum(left_keep), sum(left2), sum(keep2)));
  if (p.right >= 0) similarity(p.k, cosine(sum(keep_right), sum(keep2), sum(right2)));
  if (p.last >= 0) {
    similarity(p.last_index, p.last == p.keep ? cosine(sum(keep_frame), sum(keep2), sum(frame2))
                                              : cosine(sum(last_frame), sum(last2), sum(frame2)));
  }
}

// One attached tensor's rows of a position. `next`: the tensor and position to prefetch (its rows have dtype T too).
template <typename T>
void attached_rows(const MemoryAttached& a, const Plan& p, const MemoryAttached* next_of, const Plan& next) {
  const int64_t C = a.rows.size[3];
  const Rows<T> r = rows_of<T>(p, a.rows, a.frame);
  const Rows<T> ahead = next_of ? rows_of<T>(next, next_of->rows, next_of->frame) : Rows<T>{};
  const Mean<T> mean(p);
  constexpr int64_t kBlock = 1024 / sizeof(T);
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    const int64_t count = begin + kBlock < C ? kBlock : C - begin;
    if (next_of && begin < next_of->rows.size[3]) {
      prefetch(ahead.keep, begin, begin + count), prefetch(ahead.gone, begin, begin + count);
      if (ahead.frame) prefetch(ahead.frame, begin, begin + count);
    }
    each<T>(count, [&](int64_t i, auto part) {
      const int64_t c = begin + i;
      if (p.k >= 0) store(r.keep + c, mean(load(r.keep + c, part), load(r.gone + c, part)), part);
      if (r.frame) store_raw(r.target + c, load_raw(r.frame + c, part), part);
    });
  }
}

// Memory safety: slots come from the caller's state. (A slot stored twice is wrong, but harms nobody else.)
void check_state(const MemoryStepArgs& a) {
  const auto& size = a.order.size;
  for (int64_t b = 0; b < size[0]; ++b) {
    const int32_t length = *a.length.at<const int32_t>(b);
    if (length < 0 || length > size[2]) {
      throw_out_of_range("memory_merge_: length must be between 0 and M + 1");
    }
    for (int64_t n = 0; n < size[1]; ++n) {
      for (int64_t j = 0; j < size[2]; ++j) {
        const int32_t slot = *a.order.at<const int32_t>(b, n, j);
        if (slot < 0 || slot >= size[2]) throw_out_of_range("memory_merge_: order must hold slots 0 .. M");
      }
    }
  }
}

template <typename T>
void step(const MemoryStepArgs& a, const Executor& executor) {
  const int64_t B = a.bank.size[0], N = a.bank.size[2], C = a.bank.size[3];
  int64_t width = 8 * C;
  for (int i = 0; i < a.attached_count; ++i) width += 5 * a.attached[i].rows.size[3];
  parallel_for(executor, B * N, kGrainElements / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    Plan plans[kPlans];
    for (int64_t row = begin; row < end;) {
      int64_t count = 0;
      for (; row < end && count < kPlans; ++row) {
        plans[count] = make_plan(a, row / N, row % N);
        if (plans[count].k >= 0 || plans[count].target >= 0) ++count;
      }
      for (int64_t i = 0; i < count; ++i) {
        const Plan *p = &plans[i], *next = i + 1 < count ? p + 1 : nullptr;
        if (p->k >= 0 && p->target >= 0) {
          bank_rows<T, true, true>(a, *p, next);
        } else if (p->k >= 0) {
          bank_rows<T, true, false>(a, *p, next);
        } else {
          bank_rows<T, false, true>(a, *p, next);
        }
      }
      for (int i = 0; i < a.attached_count; ++i) {
        const MemoryAttached *now = &a.attached[i], *later = i + 1 < a.attached_count ? now + 1 : nullptr;
        if (later && later->rows.dtype != now->rows.dtype) later = nullptr;
        visit_floating("memory_merge_", now->rows.dtype, [&](auto t) {
          for (int64_t j = 0; j < count; ++j) {
            const bool more = j + 1 < count;
            attached_rows<typename decltype(t)::type>(*now, plans[j], more ? now : later, plans[more ? j + 1 : 0]);
          }
        });
      }
    }
  });
  for (int64_t b = 0; b < B; ++b) {  // after every row has read it
    if (a.active && *a.active.at<const int32_t>(b) == 0) continue;
    int32_t& length = *a.length.at<int32_t>(b);
    length += (a.frame ? 1 : 0) - (length == a.order.size[2] ? 1 : 0);
  }
}

// --- one merge as a function --------------------------------------------------------------------------------------

struct Weights {
  double first, second;  // of e[k] and e[k + 1]
};

template <typename S>
PYVIDX_INLINE Weights weights(const View<3>& sizes, int64_t b, int64_t k, int64_t n, bool weighted) {
  if (!weighted) return {1, 1};
  return {double(*sizes.at<const S>(b, k, n)), double(*sizes.at<const S>(b, k + 1, n))};
}

template <typename T>
void copy_row(const T* from, T* to, int64_t C, bool stream) {
  each<T>(C, to, stream, [&](int64_t c, auto part) { store(to + c, load(from + c, part), part); });
}

template <typename T>
int64_t most_similar(const View<4>& bank, int64_t b, int64_t n) {
  const int64_t next_n = n + 1 < bank.size[2] ? n + 1 : n;
  const int64_t C = bank.size[3];
  int64_t k = 0;
  Acc<T> best = 0, norm = 0;  // of the row before, squared
  for (int64_t t = 0; t + 1 < bank.size[1]; ++t) {
    const T *x = bank.at<const T>(b, t, n), *y = bank.at<const T>(b, t + 1, n);
    Vec<T> dot{}, xx{}, yy{};
    const T* next_row = bank.at<const T>(b, t + 2 < bank.size[1] ? t + 2 : 0, t + 2 < bank.size[1] ? n : next_n);
    each<T>(C, [&](int64_t c, auto part) {
      __builtin_prefetch(next_row + c);  // rows of a position are far apart
      const Vec<T> u = load(x + c, part), v = load(y + c, part);
      dot += u * v, yy += v * v;
      if (t == 0) xx += u * u;
    });
    const Acc<T> next = sum(yy), value = cosine(sum(dot), t == 0 ? sum(xx) : norm, next);
    if (t == 0 || better(value, best)) best = value, k = t;
    norm = next;
  }
  return k;
}

template <typename T, typename S>
void merge(const MemoryMergeArgs& a, const Executor& executor) {
  const int64_t B = a.bank.size[0], T_ = a.bank.size[1], N = a.bank.size[2], C = a.bank.size[3];
  const bool stream = B * T_ * N * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  parallel_for(executor, B * N, kGrainElements / (2 * T_ * C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / N, n = row % N, k = most_similar<T>(a.bank, b, n);
      *a.index.at<int32_t>(b, n) = int32_t(k);
      for (int64_t t = 0; t + 1 < T_; ++t) {
        const int64_t from = t <= k ? t : t + 1;
        S* size = a.out_sizes.at<S>(b, t, n);
        *size = *a.sizes.at<const S>(b, from, n);
        const T* x = a.bank.at<const T>(b, from, n);
        T* out = a.out.at<T>(b, t, n);
        if (t != k) {
          copy_row(x, out, C, stream);
          continue;
        }
        *size += *a.sizes.at<const S>(b, k + 1, n);
        const Weights w = weights<S>(a.sizes, b, k, n, a.weighted);
        const Acc<T> first = Acc<T>(w.first), second = Acc<T>(w.second), total = first + second;
        const T* y = a.bank.at<const T>(b, k + 1, n);
        each<T>(C, out, stream, [&](int64_t c, auto part) {
          store(out + c, (load(x + c, part) * first + load(y + c, part) * second) / total, part);
        });
      }
    }
    simd::fence();
  });
}

template <typename T, typename S>
void merge_backward(const MemoryMergeBackwardArgs& a, const Executor& executor) {
  const int64_t B = a.grad_bank.size[0], T_ = a.grad_bank.size[1], N = a.grad_bank.size[2], C = a.grad_bank.size[3];
  const bool stream = B * T_ * N * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  parallel_for(executor, B * T_ * N, kGrainElements / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / (T_ * N), t = row / N % T_, n = row % N, k = *a.index.at<const int32_t>(b, n);
      const T* grad = a.grad_out.at<const T>(b, t <= k ? t : t - 1, n);
      T* out = a.grad_bank.at<T>(b, t, n);
      if (t != k && t != k + 1) {
        copy_row(grad, out, C, stream);
        continue;
      }
      const Weights w = weights<S>(a.sizes, b, k, n, a.weighted);
      const Acc<T> share = Acc<T>((t == k ? w.first : w.second) / (w.first + w.second));
      each<T>(C, out, stream, [&](int64_t c, auto part) { store(out + c, load(grad + c, part) * share, part); });
    }
    simd::fence();
  });
}

void run_step(const MemoryStepArgs& args, const Executor& executor) {
  check_state(args);
  for (int i = 0; i < args.attached_count; ++i) {
    visit_floating("memory_merge_", args.attached[i].rows.dtype, [](auto) {});  // threads must not throw
  }
  visit_floating("memory_merge_", args.bank.dtype, [&](auto t) { step<typename decltype(t)::type>(args, executor); });
}

void run_merge(const MemoryMergeArgs& args, const Executor& executor) {
  visit_floating("memory_merge", args.bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    args.sizes.dtype == DType::i32 ? merge<T, int32_t>(args, executor) : merge<T, float>(args, executor);
  });
}

void run_backward(const MemoryMergeBackwardArgs& args, const Executor& executor) {
  visit_floating("memory_merge_backward", args.grad_bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    args.sizes.dtype == DType::i32 ? merge_backward<T, int32_t>(args, executor)
                                   : merge_backward<T, float>(args, executor);
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(memory_step, MemoryStepArgs, run_step)
PYVIDX_CPU_ENTRY(memory_merge, MemoryMergeArgs, run_merge)
PYVIDX_CPU_ENTRY(memory_merge_backward, MemoryMergeBackwardArgs, run_backward)
