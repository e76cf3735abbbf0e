// The streaming step on slots, and one merge as a function.
//
// A step moves 8 rows of the bank per position: it reads both rows of the pair, their outer neighbors, the last entry
// and the frame, and writes the merged row and (into the slot that became free) the frame. All in one walk over C, with
// the sums of the three cosines taken on the way. Attached rows: 5 (read 3, write 2). Both written rows have just been
// read, so plain stores cost no extra traffic and streaming stores gain nothing.
#include "pyvidx/memory_merge.h"

#include "level.h"
#include "memory_step.h"
#include "parallel.h"

namespace pyvidx {
namespace {

constexpr int64_t kPlans = 32;  // positions planned ahead: so the rows of the next one can be prefetched

// One attached tensor's rows of a position. `next`: the tensor and position to prefetch (its rows have dtype T too).
template <typename T>
void attached_rows(const MemoryAttached& a, const Plan& p, const MemoryAttached* next_of, const Plan& next) {
  const int64_t C = a.rows.size[3];
  const Rows<T> r = rows_of<T>(p, a.rows, a.frame);
  const Rows<T> ahead = next_of ? rows_of<T>(next, next_of->rows, next_of->frame) : Rows<T>{};
  const Mean<T> mean(p.s0, p.s1);
  constexpr int64_t kBlock = 1024 / sizeof(T);
  for (int64_t begin = 0; begin < C; begin += kBlock) {
    const int64_t count = begin + kBlock < C ? kBlock : C - begin;
    if (next_of && begin < next_of->rows.size[3]) {
      prefetch(ahead.keep, begin, begin + count), prefetch(ahead.gone, begin, begin + count);
      if (ahead.frame) prefetch(ahead.frame, begin, begin + count);
    }
    each_pair<T>(count, [&](int64_t i, auto part) {
      const int64_t c = begin + i;
      if (p.k >= 0) store(r.keep + c, mean(load(r.keep + c, part), load(r.gone + c, part)), part);
      if (r.frame) store_raw(r.target + c, load_raw(r.frame + c, part), part);
    });
  }
}

template <typename T, typename F>
void step(const MemoryStepArgs& a, const Executor& executor) {
  const int64_t B = a.bank.size[0], N = a.bank.size[2], C = a.bank.size[3];
  int64_t width = 8 * C;
  for (int i = 0; i < a.attached_count; ++i) width += 5 * a.attached[i].rows.size[3];
  parallel_for(executor, B * N, kGrainElements / (width + 1) + 1, [&](int64_t begin, int64_t end) {
    Plan plans[kPlans];
    for (int64_t row = begin; row < end;) {
      int64_t count = 0;
      for (; row < end && count < kPlans; ++row) {
        const int64_t b = row / N, n = row % N;
        int32_t& index = *a.index.at<int32_t>(b, n);
        index = -1;
        if (a.active && *a.active.at<const int32_t>(b) == 0) continue;
        plans[count] = make_plan(a, b, n, *a.length.at<const int32_t>(b));
        index = plans[count].k;
        if (plans[count].k >= 0 || plans[count].target >= 0) ++count;
      }
      for (int64_t i = 0; i < count; ++i) {
        Rows<T, F> ahead{};
        if (i + 1 < count) ahead = rows_of<T, F>(plans[i + 1], a.bank, a.frame);
        any_bank_rows(a, plans[i], i + 1 < count ? &ahead : nullptr);
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

PYVIDX_INLINE double size_at(const View<3>& sizes, int64_t b, int64_t t, int64_t n) {
  return sizes.dtype == DType::i32 ? *sizes.at<const int32_t>(b, t, n) : *sizes.at<const float>(b, t, n);
}

// to = from + more, in the dtype of the sizes (float32 or int32).
void add_sizes(const View<3>& sizes, int64_t b, int64_t from, int64_t more, int64_t n, const View<3>& out, int64_t to) {
  if (sizes.dtype == DType::i32) {
    *out.at<int32_t>(b, to, n) =
        *sizes.at<const int32_t>(b, from, n) + (more < 0 ? 0 : *sizes.at<const int32_t>(b, more, n));
  } else {
    *out.at<float>(b, to, n) = *sizes.at<const float>(b, from, n) + (more < 0 ? 0 : *sizes.at<const float>(b, more, n));
  }
}

struct Weights {
  double first, second;  // of e[k] and e[k + 1]
};

PYVIDX_INLINE Weights weights(const View<3>& sizes, int64_t b, int64_t k, int64_t n, bool weighted) {
  if (!weighted) return {1, 1};
  return {size_at(sizes, b, k, n), size_at(sizes, b, k + 1, n)};
}

template <typename T>
void copy_row(const T* from, T* to, int64_t C, bool stream) {
  each_pair<T>(C, to, stream, [&](int64_t c, auto part) { store_raw(to + c, load_raw(from + c, part), part); });
}

template <typename T>
int64_t most_similar(const View<4>& bank, int64_t b, int64_t n) {
  const int64_t next_n = n + 1 < bank.size[2] ? n + 1 : n;
  const int64_t C = bank.size[3];
  int64_t k = 0;
  Acc<T> best = 0, norm = 0;  // of the row before, squared
  for (int64_t t = 0; t + 1 < bank.size[1]; ++t) {
    const T *x = bank.at<const T>(b, t, n), *y = bank.at<const T>(b, t + 1, n);
    simd::Chains<T> dot, xx, yy;
    const T* next_row = bank.at<const T>(b, t + 2 < bank.size[1] ? t + 2 : 0, t + 2 < bank.size[1] ? n : next_n);
    each_pair<T>(C, [&](int64_t c, auto part) {
      __builtin_prefetch(next_row + c);  // rows of a position are far apart
      const auto u = load(x + c, part), v = load(y + c, part);
      dot += u * v, yy += v * v;
      if (t == 0) xx += u * u;
    });
    const Acc<T> next = yy.total(), value = cosine(dot.total(), t == 0 ? xx.total() : norm, next);
    if (t == 0 || better(value, best)) best = value, k = t;
    norm = next;
  }
  return k;
}

template <typename T>
void merge(const MemoryMergeArgs& a, const Executor& executor) {
  const int64_t B = a.bank.size[0], T_ = a.bank.size[1], N = a.bank.size[2], C = a.bank.size[3];
  const bool stream = B * T_ * N * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  parallel_for(executor, B * N, kGrainElements / (2 * T_ * C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / N, n = row % N, k = most_similar<T>(a.bank, b, n);
      *a.index.at<int32_t>(b, n) = int32_t(k);
      for (int64_t t = 0; t + 1 < T_; ++t) {
        const int64_t from = t <= k ? t : t + 1;
        add_sizes(a.sizes, b, from, t == k ? k + 1 : -1, n, a.out_sizes, t);
        const T* x = a.bank.at<const T>(b, from, n);
        T* out = a.out.at<T>(b, t, n);
        if (t != k) {
          copy_row(x, out, C, stream);
          continue;
        }
        const Weights w = weights(a.sizes, b, k, n, a.weighted);
        const Acc<T> first = Acc<T>(w.first), second = Acc<T>(w.second), total = first + second;
        const T* y = a.bank.at<const T>(b, k + 1, n);
        each_pair<T>(C, out, stream, [&](int64_t c, auto part) {
          store(out + c, (load(x + c, part) * first + load(y + c, part) * second) / total, part);
        });
      }
    }
    simd::fence();
  });
}

template <typename T>
void merge_backward(const MemoryMergeBackwardArgs& a, const Executor& executor) {
  const int64_t B = a.grad_bank.size[0], T_ = a.grad_bank.size[1], N = a.grad_bank.size[2], C = a.grad_bank.size[3];
  const bool stream = B * T_ * N * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  parallel_for(executor, B * T_ * N, kGrainElements / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / (T_ * N), t = row / N % T_, n = row % N, k = *a.index.at<const int32_t>(b, n);
      if (k < 0 || k >= T_ - 1) throw_index("memory_merge_backward: index must be", k, T_ - 1);
      const T* grad = a.grad_out.at<const T>(b, t <= k ? t : t - 1, n);
      T* out = a.grad_bank.at<T>(b, t, n);
      if (t != k && t != k + 1) {
        copy_row(grad, out, C, stream);
        continue;
      }
      const Weights w = weights(a.sizes, b, k, n, a.weighted);
      const Acc<T> share = Acc<T>((t == k ? w.first : w.second) / (w.first + w.second));
      each_pair<T>(C, out, stream, [&](int64_t c, auto part) { store(out + c, load(grad + c, part) * share, part); });
    }
    simd::fence();
  });
}

void run_step(const MemoryStepArgs& args, const Executor& executor) {
  check_state(args);
  for (int i = 0; i < args.attached_count; ++i) {
    visit_floating("memory_merge_", args.attached[i].rows.dtype, [](auto) {});  // threads must not throw
  }
  const DType frame = args.frame ? args.frame.dtype : args.bank.dtype;
  visit_mixed<Half, BFloat16>("memory_merge_", args.bank.dtype, frame, [&](auto t, auto f) {
    step<typename decltype(t)::type, typename decltype(f)::type>(args, executor);
  });
}

void run_merge(const MemoryMergeArgs& args, const Executor& executor) {
  visit_floating("memory_merge", args.bank.dtype, [&](auto t) { merge<typename decltype(t)::type>(args, executor); });
}

void run_backward(const MemoryMergeBackwardArgs& args, const Executor& executor) {
  visit_floating("memory_merge_backward", args.grad_bank.dtype,
                 [&](auto t) { merge_backward<typename decltype(t)::type>(args, executor); });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(memory_step, MemoryStepArgs, run_step)
PYVIDX_CPU_ENTRY(memory_merge, MemoryMergeArgs, run_merge)
PYVIDX_CPU_ENTRY(memory_merge_backward, MemoryMergeBackwardArgs, run_backward)
