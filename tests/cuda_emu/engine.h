// What cuda_emu.h asks of the engine (engine.cpp), which runs one fiber per CUDA thread.
#pragma once

#include <vector_functions.h>  // dim3, uint3, float4 ... of the CUDA toolkit, usable on the host
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace cuemu {

// Where in a kernel something was called, for messages.
struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

struct Kernel {
  const char* name;
  const void* function;
  void (*call)(const void* context);  // runs the kernel for the current thread
  std::shared_ptr<const void> context;
  std::vector<unsigned char> parameters;
};

// Runs the grid, or records it during a capture (graphs.cpp). A launch the GPU would refuse sets the error
// cudaGetLastError returns; a kernel that breaks a rule of CUDA throws std::runtime_error with kernel, block, thread
// and line.
void run_grid(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes, const void* stream);

// ---- called by a kernel ----

[[noreturn]] void fail(const char* what, Site site);
int lane();
void* dynamic_shared();

// All threads of the block arrive; returns how many came with a true predicate.
int sync_block(bool predicate, Site site);

struct Lanes {
  const uint64_t* value;  // [32], what every lane brought
  unsigned present;       // the lanes that took part
};
// All lanes of the mask that have not returned arrive. Orders memory only where CUDA says so (__syncwarp): a shuffle
// or a vote does not make other lanes' writes visible.
Lanes sync_warp(unsigned mask, uint64_t value, bool orders_memory, Site site);

// The copy happens at the wait, so that a missing wait is seen.
void cp_async(void* shared, const void* global, size_t bytes, Site site = here());
void cp_async_commit();
void cp_async_wait_group(int pending);
void cp_async_wait_all();

}  // namespace cuemu
