// The engine's own state, shared by engine.cpp (fibers, schedules, grids) and threads.cpp (what threads call).
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine.h"
#include "sanitizers.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuemu {

// A meeting of threads. `generation` counts the completed ones; what belongs to one meeting is kept twice, because a
// thread may arrive at the next before the last has left this one (and no further).
struct Meeting {
  uint64_t generation = 0;
  unsigned arrived = 0;  // a count of threads, or a mask of lanes
  Site site{};           // where the first one arrived
  int trues[2] = {};
  uint64_t value[2][32] = {};
  unsigned present[2] = {};
  char token[2] = {};  // what ThreadSanitizer orders by
};

struct WarpGroup {
  unsigned mask = 0;
  Meeting meeting;
};

struct Warp {
  std::vector<std::unique_ptr<WarpGroup>> groups;  // one per mask in use
  unsigned returned = 0;                           // lanes that have returned, or that the block does not have
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  Site site;
};

enum class State { ready, waiting, returned };

struct Fiber {
  unsigned thread = 0;
  uint3 index{};
  State state = State::returned;
  const Meeting* at = nullptr;  // what it waits for, while its generation is
  uint64_t generation = 0;
  Site site{};
  std::vector<std::vector<Copy>> committed;  // cp.async groups, oldest first
  std::vector<Copy> uncommitted;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan = nullptr;
  void* tsan = nullptr;
};

struct Engine {
  std::mutex one_at_a_time;
  const Kernel* kernel = nullptr;
  std::vector<Fiber> fibers;
  unsigned threads = 0, alive = 0;
  Meeting barrier;
  std::vector<Warp> warps;
  unsigned char* shared = nullptr;
  Fiber* current = nullptr;
  std::string error;  // set by fail(), thrown by run_grid
  void* main_stack_pointer = nullptr;
  StackBounds main_stack;
  void* main_asan = nullptr;
  void* main_tsan = nullptr;
  char start = 0, end = 0;  // tokens: the host before and after a block
};

extern Engine engine;

std::string text(Site site);
std::string text(uint3 index);

void to_main(bool for_good);  // leave the current fiber
void thread_returns();        // the kernel is done in the current fiber

// The mangled name of a kernel. (shared_memory.cpp)
const std::string& symbol_of(const void* kernel);
// Bytes of the kernel's own static __shared__ variables. (shared_memory.cpp)
size_t static_shared_bytes(const void* kernel);
// Fill the static __shared__ variables of the kernel and of device functions with NaN bits. (shared_memory.cpp)
void poison_static_shared(const void* kernel);
// Would the GPU take this launch? If not, sets the error of cudaGetLastError. (runtime.cpp)
bool may_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes);
// On the stream that the op was given? Throws if not. (graphs.cpp)
void check_stream(const Kernel& kernel, const void* stream);
// During a capture: keep the launch for replay() instead of running it. (graphs.cpp)
bool captured(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes);
// Run the blocks of a launch. (engine.cpp)
void execute(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes);
// The launch ended in an exception: check_launch is not reached, and not missed. (runtime.cpp)
void forget_launch();

}  // namespace cuemu
