// parallel_for: spread [0, n) over an Executor's threads.
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

}  // namespace pyvidx
