// parallel_for: spread [0, n) over an Executor's threads. Place: the indices of one of them.
#pragma once
#include <type_traits>

#include "pyvidx/executor.h"
#include "pyvidx/view.h"

namespace pyvidx {

// Elements a thread should at least be given: below this, waking a thread costs more than it saves.
constexpr int64_t kGrainElements = 1 << 15;

template <typename F>  // F(int64_t begin, int64_t end); what it throws reaches the caller
PYVIDX_INLINE void parallel_for(const Executor& executor, int64_t n, int64_t grain, F&& f) {
  if (n <= 0) return;
  if (executor.run == nullptr || n <= grain) return f(int64_t(0), n);
  auto body = [](void* context, int64_t begin, int64_t end) {
    (*static_cast<std::remove_reference_t<F>*>(context))(begin, end);
  };
  executor.run(n, grain, body, &f);
}

// Row `row` of [B, S, K], and the one after it without the divisions: they cost a quarter of a row of 1024 in 16 bits.
struct Place {
  int64_t b, s, k;

  PYVIDX_INLINE Place(int64_t row, int64_t S, int64_t K) : b(row / K / S), s(row / K % S), k(row % K) {}
  PYVIDX_INLINE Place after(int64_t S, int64_t K) const {
    Place next = *this;
    if (++next.k < K) return next;
    next.k = 0;
    if (++next.s == S) next.s = 0, ++next.b;
    return next;
  }
};

}  // namespace pyvidx
