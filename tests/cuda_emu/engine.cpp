// Runs grids: fibers, schedules, blocks. Compiled without sanitizer instrumentation (see sanitizers.h).
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "state.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim, gridDim;

// Save the callee-saved registers and the stack pointer, go on where `to` was left.
extern "C" void cuemu_switch(void** save, void* to);
__asm__(
    ".text\n.local cuemu_switch\n.type cuemu_switch,@function\ncuemu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nretq\n"
    ".size cuemu_switch,.-cuemu_switch\n");

namespace cuemu {

Engine engine;

namespace {

constexpr size_t kStack = 128 << 10, kGuard = 4 << 10;

}  // namespace

// ---- switching ----

void to_main(bool for_good) {
  Fiber& fiber = *engine.current;
  asan_leave(for_good ? nullptr : &fiber.asan, engine.main_stack);
  tsan_switch(engine.main_tsan);
  cuemu_switch(&fiber.stack_pointer, engine.main_stack_pointer);
  engine.main_stack = asan_arrive(fiber.asan);
}

namespace {

void run(Fiber& fiber) {
  engine.current = &fiber;
  threadIdx = fiber.index;
  asan_leave(&engine.main_asan, {fiber.stack, kStack});
  tsan_switch(fiber.tsan);
  cuemu_switch(&engine.main_stack_pointer, fiber.stack_pointer);
  asan_arrive(engine.main_asan);
}

void fiber_main() {
  engine.main_stack = asan_arrive(nullptr);
  tsan_acquire(&engine.start);
  engine.kernel->call(engine.kernel->context.get());
  tsan_release(&engine.end);
  thread_returns();
  to_main(true);
  __builtin_unreachable();
}

// ---- schedules ----

struct Schedule {
  std::string order = "forward";
  std::mt19937_64 random;

  // Read at every launch, so that a test can set it. The same launch gets the same schedule in every run.
  explicit Schedule(uint64_t launch) {
    if (const char* value = std::getenv("PYVIDX_EMU_ORDER")) order = value;
    uint64_t seed = 1;
    if (order.rfind("random:", 0) == 0) seed = std::stoull(order.substr(7)), order = "random";
    if (order != "forward" && order != "reverse" && order != "random") {
      throw std::invalid_argument("PYVIDX_EMU_ORDER must be forward, reverse, random or random:<seed>, got " + order);
    }
    random.seed(seed * 0x9e3779b97f4a7c15u ^ launch);
  }

  template <typename T>
  void arrange(std::vector<T>& items) {
    if (order == "reverse") std::reverse(items.begin(), items.end());
    if (order == "random") std::shuffle(items.begin(), items.end(), random);
  }
};

void make_fibers(unsigned threads) {
  while (engine.fibers.size() < threads) {
    Fiber fiber;
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    fiber.stack = static_cast<char*>(memory) + kGuard;
    fiber.tsan = tsan_create(("CUDA thread " + std::to_string(engine.fibers.size())).c_str());
    engine.fibers.push_back(std::move(fiber));
  }
}

void start(Fiber& fiber, unsigned thread, dim3 block) {
  fiber.thread = thread;
  fiber.index = make_uint3(thread % block.x, thread / block.x % block.y, thread / block.x / block.y);
  fiber.state = State::ready;
  fiber.at = nullptr;
  auto* top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // so that the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers cuemu_switch pops
  fiber.stack_pointer = top;
}

// After a failure fibers are left in the middle of a kernel: forget their frames.
void abandon_fibers() {
  for (Fiber& fiber : engine.fibers) {
    fiber.committed.clear();
    fiber.uncommitted.clear();
    asan_unpoison(fiber.stack, kStack);
    tsan_destroy(fiber.tsan);
    fiber.tsan = tsan_create(("CUDA thread " + std::to_string(&fiber - engine.fibers.data())).c_str());
  }
}

std::string deadlock() {
  std::string what = "deadlock:";
  int shown = 0;
  for (const Fiber& fiber : engine.fibers) {
    if (fiber.state != State::waiting || shown++ == 4) continue;
    const bool block = fiber.at == &engine.barrier;
    what += " thread " + text(fiber.index) + (block ? " waits at __syncthreads " : " waits for lanes of its warp at ");
    what += text(fiber.site) + ";";
  }
  return what;
}

void run_block(dim3 block, Schedule& schedule) {
  engine.alive = engine.threads;
  engine.barrier = Meeting{};
  for (size_t w = 0; w < engine.warps.size(); ++w) {
    const unsigned lanes = std::min(32u, engine.threads - unsigned(w) * 32);
    engine.warps[w].returned = lanes == 32 ? 0 : ~0u << lanes;
  }
  for (unsigned t = 0; t < engine.threads; ++t) start(engine.fibers[t], t, block);
  std::vector<unsigned> order(engine.threads);
  std::iota(order.begin(), order.end(), 0u);
  if (schedule.order == "reverse") schedule.arrange(order);
  tsan_release(&engine.start);
  while (engine.alive > 0) {
    if (schedule.order == "random") schedule.arrange(order);
    bool progress = false;
    for (unsigned t : order) {
      Fiber& fiber = engine.fibers[t];
      if (fiber.state == State::waiting && fiber.at->generation != fiber.generation) fiber.state = State::ready;
      if (fiber.state != State::ready) continue;
      run(fiber);
      progress = true;
      if (!engine.error.empty()) return;
    }
    if (!progress) {
      engine.error = std::string(engine.kernel->name) + ", block " + text(blockIdx) + ": " + deadlock();
      return;
    }
  }
  tsan_acquire(&engine.end);
}

}  // namespace

void run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, const void* stream) {
  check_stream(kernel, stream);
  if (!may_launch(kernel, grid, block, shared_bytes) || captured(kernel, grid, block, shared_bytes)) return;
  const char *dry = std::getenv("PYVIDX_EMU_DRY"), *always = std::getenv("PYVIDX_EMU_RUN");
  const uint64_t threads = uint64_t(grid.x) * grid.y * grid.z * block.x * block.y * block.z;
  const bool needed = always != nullptr && std::strstr(kernel.name, always) != nullptr;
  if (dry != nullptr && threads > std::stoull(dry) && !needed) return;
  execute(kernel, grid, block, shared_bytes);
}

void execute(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const std::lock_guard<std::mutex> lock(engine.one_at_a_time);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  engine.kernel = &kernel;
  engine.threads = block.x * block.y * block.z;
  engine.warps = std::vector<Warp>((engine.threads + 31) / 32);
  engine.main_tsan = tsan_current();
  engine.error.clear();
  gridDim = grid;
  blockDim = block;
  make_fibers(engine.threads);
  Schedule schedule(blocks * 1024 + engine.threads);
  void* memory = nullptr;  // of exactly this size, so that AddressSanitizer sees what is past it
  if (posix_memalign(&memory, 128, shared_bytes) != 0) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> owner(memory, &std::free);
  engine.shared = static_cast<unsigned char*>(memory);
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), uint64_t(0));
  schedule.arrange(order);
  for (uint64_t b : order) {
    blockIdx = make_uint3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y));
    poison_static_shared(kernel.function);
    if (shared_bytes > 0) std::memset(engine.shared, 0xff, shared_bytes);  // NaN
    run_block(block, schedule);
    if (!engine.error.empty()) {
      abandon_fibers();
      forget_launch();
      throw std::runtime_error("cuda_emu: " + engine.error);
    }
  }
}

}  // namespace cuemu
