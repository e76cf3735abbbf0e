// A CPU kernel file is compiled once per level of cmake/build.json, with PYVIDX_LEVEL = baseline, v3, v4 or v4bf16. All
// of it lives in an anonymous namespace, but for the entry points that PYVIDX_CPU_ENTRY makes: one per level, and (in
// the baseline build) the public function that picks the level at run time.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/isa.h"

#ifndef PYVIDX_LEVEL
#error "PYVIDX_LEVEL is set by the build: baseline, v3, v4 or v4bf16"
#endif

#define PYVIDX_LEVEL_ID_baseline 0
#define PYVIDX_LEVEL_ID_v3 1
#define PYVIDX_LEVEL_ID_v4 2
#define PYVIDX_LEVEL_ID_v4bf16 3
#define PYVIDX_CAT_(a, b) a##b
#define PYVIDX_CAT(a, b) PYVIDX_CAT_(a, b)

#if defined(__x86_64__)
#define PYVIDX_PICK(op, args, executor)    \
  switch (isa()) {                         \
    case Isa::v4bf16:                      \
      return v4bf16::op(args, executor);   \
    case Isa::v4:                          \
      return v4::op(args, executor);       \
    case Isa::v3:                          \
      return v3::op(args, executor);       \
    default:                               \
      return baseline::op(args, executor); \
  }
#else
#define PYVIDX_PICK(op, args, executor) return baseline::op(args, executor);
#endif

#define PYVIDX_ENTRY_OF_LEVEL(op, Args, run)                                   \
  namespace pyvidx::PYVIDX_LEVEL {                                             \
  void op(const Args& args, const Executor& executor) { run(args, executor); } \
  }

// PYVIDX_CPU_ENTRY(op, Args, run): makes pyvidx::op_cpu(const Args&, const Executor&) from run(args, executor).
#if PYVIDX_CAT(PYVIDX_LEVEL_ID_, PYVIDX_LEVEL) == 0
#define PYVIDX_CPU_ENTRY(op, Args, run)                                                         \
  PYVIDX_ENTRY_OF_LEVEL(op, Args, run)                                                          \
  namespace pyvidx::v3 {                                                                        \
  void op(const Args& args, const Executor& executor);                                          \
  }                                                                                             \
  namespace pyvidx::v4 {                                                                        \
  void op(const Args& args, const Executor& executor);                                          \
  }                                                                                             \
  namespace pyvidx::v4bf16 {                                                                    \
  void op(const Args& args, const Executor& executor);                                          \
  }                                                                                             \
  namespace pyvidx {                                                                            \
  void op##_cpu(const Args& args, const Executor& executor) { PYVIDX_PICK(op, args, executor) } \
  }
#else
#define PYVIDX_CPU_ENTRY(op, Args, run) PYVIDX_ENTRY_OF_LEVEL(op, Args, run)
#endif
