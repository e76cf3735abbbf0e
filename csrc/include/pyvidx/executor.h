// Executor: who runs the pieces of a CPU kernel. The caller brings its thread pool (torch's, in csrc/torch), as it
// brings the stream of a CUDA kernel. A default-made Executor runs everything on the calling thread.
#pragma once
#include <cstdint>

namespace pyvidx {

struct Executor {
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  // Call body on disjoint ranges that cover [0, n), in any order, each at least `grain` long where possible. Once all
  // of them are done, throw again the first exception that one of them threw: an index out of range is found there.
  void (*run)(int64_t n, int64_t grain, Body body, void* context) = nullptr;
};

}  // namespace pyvidx
