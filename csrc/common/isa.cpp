#include "pyvidx/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "pyvidx/dispatch.h"

namespace pyvidx {
namespace {

Isa best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return __builtin_cpu_supports("avx512bf16") ? Isa::v4bf16 : Isa::v4;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::v3;
#endif
  return Isa::baseline;
}

Isa choose_level() {
  const Isa best = best_level();
  const char* wish = std::getenv("PYVIDX_ISA");
  if (!wish || !*wish) return best;
  for (Isa level : {Isa::baseline, Isa::v3, Isa::v4, Isa::v4bf16}) {
    if (std::string(wish) != isa_name(level)) continue;
    if (level > best)
      throw std::runtime_error(std::string("PYVIDX_ISA=") + wish + ": this CPU has up to " + isa_name(best));
    return level;
  }
  throw std::runtime_error(std::string("PYVIDX_ISA must be v2, v3, v4 or v4bf16, got ") + wish);
}

}  // namespace

Isa isa() {
  static const Isa level = choose_level();
  return level;
}

const char* isa_name(Isa level) {
#if defined(__x86_64__)
  static const char* names[] = {"v2", "v3", "v4", "v4bf16"};
  return names[int(level)];
#else
  (void)level;
  return "baseline";
#endif
}

void throw_out_of_range(const char* message) { throw std::out_of_range(message); }

void throw_no_memory() { throw std::runtime_error("pyvidx: out of memory for the scratch of a thread"); }

void throw_index(const char* what, int64_t index, int64_t limit, bool absent) {
  const std::string bound = std::to_string(limit);
  throw std::out_of_range(std::string(what) + (absent ? " below " + bound : " in [0, " + bound + ")") + ", got " +
                          std::to_string(index));
}

void throw_unsupported_dtype(const char* op, DType dtype) {
  static const char* names[] = {"float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8"};
  throw std::invalid_argument(std::string(op) + ": unsupported dtype " + names[int(dtype)]);
}

}  // namespace pyvidx
