// Streams and CUDA graphs, as far as a launcher can get them wrong: an op must launch on the stream it was given, and
// all it computes must come from its launches, so that running them again on other data gives the results of that data.
// What a launcher may not do during a capture (allocate, wait, copy to the host) is not there to be called.
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "state.h"

struct CUstream_st {
  int unused;
};

namespace {

struct Node {
  cuemu::Kernel kernel;
  dim3 grid, block;
  size_t shared_bytes;
};

std::vector<Node> nodes;
bool capturing = false;
CUstream_st stream_of_ops;
const void* expected = nullptr;  // the stream of the op that runs; before any op, CUDA's default one

}  // namespace

namespace cuemu {

void check_stream(const Kernel& kernel, const void* stream) {
  if (stream == expected) return;
  throw std::runtime_error(std::string("cuda_emu: ") + kernel.name +
                           " is launched on another stream than it was given");
}

bool captured(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  if (capturing) nodes.push_back({kernel, grid, block, shared_bytes});
  return capturing;
}

}  // namespace cuemu

#define EXPORT extern "C" __attribute__((visibility("default")))

// For csrc/torch/binding.cpp, in place of torch's current stream.
extern "C" CUstream_st* cuemu_current_stream() {
  expected = &stream_of_ops;
  return &stream_of_ops;
}

// For tests, through ctypes.
EXPORT void cuemu_begin_capture() { nodes.clear(), capturing = true; }

// Returns the number of launches.
EXPORT int cuemu_end_capture() {
  capturing = false;
  return int(nodes.size());
}

// Returns 0, or 1 and a message.
EXPORT int cuemu_replay(char* message, size_t size) {
  try {
    for (const Node& node : nodes) cuemu::execute(node.kernel, node.grid, node.block, node.shared_bytes);
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
    return 1;
  }
  return 0;
}
