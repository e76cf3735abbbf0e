// The part of the CUDA runtime that launch.cuh uses: errors, attributes, and the limits of a launch.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <utility>

#include "cuda_emu.h"
#include "state.h"
#include "tensor_cores.h"

namespace cuemu {
namespace {

const std::string& mma_mode() {
  static const std::string mode = [] {
    const char* value = std::getenv("PYVIDX_EMU_MMA");
    std::string mode = value == nullptr ? "shuffles" : value;
    if (mode != "shuffles" && mode != "tensor_cores" && mode != "quad_pairs") {
      throw std::invalid_argument("PYVIDX_EMU_MMA must be shuffles, tensor_cores or quad_pairs, got " + mode);
    }
    return mode;
  }();
  return mode;
}

}  // namespace

bool tensor_cores() {
  static const bool yes = mma_mode() == "tensor_cores";
  return yes;
}
bool quad_pairs() {
  static const bool yes = mma_mode() == "quad_pairs";
  return yes;
}

}  // namespace cuemu

namespace {

constexpr size_t kNoOptIn = 48 * 1024;  // shared memory any kernel may use

cudaError_t last_error = cudaSuccess;
std::string unchecked;  // the kernel launched since the last cudaGetLastError
std::map<const void*, size_t> opted_in;

// A number that describes the pretended device; by default it is a small one of sm_70.
size_t described(const char* variable, size_t otherwise) {
  const char* value = std::getenv(variable);
  return value != nullptr ? std::stoul(value) : otherwise;
}

size_t device_shared_bytes() { return described("PYVIDX_EMU_SMEM", 96 * 1024); }

void (*watcher)(const char*) = nullptr;

void tell_launch(const cuemu::Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const char* path = std::getenv("PYVIDX_EMU_LOG");
  if (path == nullptr && watcher == nullptr) return;
  std::string line(kernel.name);
  for (const auto& [what, d] : {std::pair("\tgrid", grid), std::pair("\tblock", block)}) {
    line += what;
    for (const unsigned size : {d.x, d.y, d.z}) line += " " + std::to_string(size);
  }
  line += "\tshared " + std::to_string(shared_bytes);
  if (path != nullptr) {
    FILE* file = std::fopen(path, "a");
    if (file == nullptr) throw std::runtime_error(std::string("PYVIDX_EMU_LOG: cannot write ") + path);
    std::fprintf(file, "%s\n", line.c_str());
    std::fclose(file);
  }
  if (watcher == nullptr) return;
  line += "\t" + cuemu::symbol_of(kernel.function) + "\t";
  for (const unsigned char byte : kernel.parameters) {
    for (const int digit : {byte >> 4, byte & 15}) line += "0123456789abcdef"[digit];
  }
  watcher(line.c_str());
}

cudaError_t check(const cuemu::Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) return cudaErrorInvalidConfiguration;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaErrorInvalidConfiguration;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  const auto found = opted_in.find(kernel.function);
  const size_t fixed = cuemu::static_shared_bytes(kernel.function);
  const size_t limit = found == opted_in.end() ? kNoOptIn - fixed : found->second;
  return shared_bytes > limit ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

namespace cuemu {

bool may_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  if (!unchecked.empty()) {
    const std::string name = std::exchange(unchecked, "");
    throw std::runtime_error("cuda_emu: the launch of " + name + " is not followed by check_launch");
  }
  unchecked = kernel.name;
  if (static_shared_bytes(kernel.function) > kNoOptIn) {
    throw std::runtime_error(std::string("cuda_emu: ") + kernel.name + " declares more than 48 KB of __shared__");
  }
  last_error = check(kernel, grid, block, shared_bytes);
  if (last_error != cudaSuccess) return false;
  tell_launch(kernel, grid, block, shared_bytes);
  return true;
}

void forget_launch() { unchecked.clear(); }

}  // namespace cuemu

// For pyvidx.bench.traces, through ctypes: called at every launch, before it runs, with one line: what PYVIDX_EMU_LOG
// gets, the mangled name of the kernel, and its parameters, byte by byte.
extern "C" __attribute__((visibility("default"))) void cuemu_watch(void (*callback)(const char*)) {
  watcher = callback;
}

cudaError_t cudaGetLastError() {
  unchecked.clear();
  return std::exchange(last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    default:
      return "an error the emulator does not know";
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(device_shared_bytes());
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = int(kNoOptIn);
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = int(described("PYVIDX_EMU_SMS", 2));  // small, so that grid-stride loops do loop
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = int(described("PYVIDX_EMU_CAPABILITY", 70) / 10);
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = int(described("PYVIDX_EMU_CAPABILITY", 70) % 10);
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0) return cudaErrorInvalidValue;
  if (size_t(value) + cuemu::static_shared_bytes(kernel) > device_shared_bytes()) return cudaErrorInvalidValue;
  opted_in[kernel] = size_t(value);
  return cudaSuccess;
}
