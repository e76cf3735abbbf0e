// What can be known of this library without torch, as text that Python reads through ctypes: so that one library serves
// every Python.
#include <exception>
#include <string>

#include "build_info.h"  // made by the build: what it was built with
#include "pyvidx/isa.h"

#define PYVIDX_EXPORT extern "C" __attribute__((visibility("default")))

// A JSON object: compiler, torch, cuda_archs.
PYVIDX_EXPORT const char* pyvidx_build() { return PYVIDX_BUILD; }

// The instruction-set level the CPU kernels run at (v2, v3, v4 or v4bf16 on x86-64, baseline elsewhere), or why they
// cannot run.
PYVIDX_EXPORT const char* pyvidx_isa() {
  static const std::string level = [] {
    try {
      return std::string(pyvidx::isa_name(pyvidx::isa()));
    } catch (const std::exception& error) {
      return std::string(error.what());
    }
  }();
  return level.c_str();
}
