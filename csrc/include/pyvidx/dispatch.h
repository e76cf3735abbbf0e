// visit_dtype<Ts...>: call f(Type<T>{}) for the T of a runtime dtype. The caller spells the list of types, so that
// what a kernel supports can be read next to the kernel.
#pragma once
#include "pyvidx/view.h"

namespace pyvidx {

template <typename T>
struct Type {
  using type = T;
};

template <typename T>
struct DTypeOf;  // float and double here; the 16-bit types of a side in csrc/cpu/simd.h and csrc/cuda/block.cuh
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};

// Throws std::invalid_argument. Compiled once (csrc/common/isa.cpp), so that kernel files need no <string>.
[[noreturn]] void throw_unsupported_dtype(const char* op, DType dtype);
// std::out_of_range, from there for the same reason. `what`: "op: argument must be", in [0, limit) or, where negative
// ones are absent, below it.
[[noreturn]] void throw_out_of_range(const char* message);
[[noreturn]] void throw_no_memory();  // std::runtime_error
[[noreturn]] void throw_index(const char* what, int64_t index, int64_t limit, bool absent = false);

template <typename... Ts, typename F>
__attribute__((always_inline)) inline void visit_dtype(const char* op, DType dtype, F&& f) {
  const bool done = ((DTypeOf<Ts>::value == dtype ? (f(Type<Ts>{}), true) : false) || ...);
  if (!done) throw_unsupported_dtype(op, dtype);
}

// f(Type<X>{}, Type<Y>{}): two tensors of one dtype, or a float and one of the 16-bit types (autocast).
template <typename Half, typename BFloat16, typename F>
__attribute__((always_inline)) inline void visit_mixed(const char* op, DType x, DType y, F&& f) {
  if (x == y) return visit_dtype<float, double, Half, BFloat16>(op, x, [&](auto t) { f(t, t); });
  if (x != DType::f32) throw_unsupported_dtype(op, x);
  visit_dtype<Half, BFloat16>(op, y, [&](auto t) { f(Type<float>{}, t); });
}

}  // namespace pyvidx
