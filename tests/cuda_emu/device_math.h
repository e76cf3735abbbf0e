// Device functions that are not about threads: atomics, math, bits, loads. Results differ from a GPU's by ulps.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

// ---- atomics: relaxed, as in CUDA; each returns the old value ----

template <typename T, typename Next>
T cuemu_atomic(T* address, Next next) {
  T old, wanted;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do wanted = next(old);
  while (!__atomic_compare_exchange(address, &old, &wanted, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// The second parameter must not take part in deduction: atomicAdd(float*, 1).
template <typename T>
using CuemuSame = std::common_type_t<T>;

template <typename T>
T atomicAdd(T* p, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T old) { return T(old + x); });
}
template <typename T>
T atomicSub(T* p, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T old) { return T(old - x); });
}
template <typename T>
T atomicMin(T* p, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T old) { return x < old ? x : old; });
}
template <typename T>
T atomicMax(T* p, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T old) { return old < x ? x : old; });
}
template <typename T>
T atomicAnd(T* p, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T old) { return T(old & x); });
}
template <typename T>
T atomicOr(T* p, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T old) { return T(old | x); });
}
template <typename T>
T atomicXor(T* p, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T old) { return T(old ^ x); });
}
template <typename T>
T atomicExch(T* p, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T) { return x; });
}
template <typename T>
T atomicCAS(T* p, CuemuSame<T> expected, CuemuSame<T> x) {
  return cuemu_atomic(p, [=](T old) { return old == expected ? x : old; });
}
// Blocks run one after another and threads of a block one at a time, so that there is nothing to order.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- loads and stores with a cache hint ----

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
void __stcg(T* p, std::common_type_t<T> x) {
  *p = x;
}
template <typename T>
void __stcs(T* p, std::common_type_t<T> x) {
  *p = x;
}

// Four of the eight bytes of x and y, x having the lower ones; a digit of `selector` for each.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | uint64_t(y) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(uint64_t(x) * y >> 32); }

// ---- math; what C has too (fminf, expf, exp2f, fmaf ...) comes from <cmath> ----

inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return float(1. / std::sqrt(double(x))); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
// Not inline functions: glibc declares some of these names itself.
#define __expf(x) std::exp(float(x))
#define __logf(x) std::log(float(x))
#define __log2f(x) std::log2(float(x))
#define __powf(x, y) std::pow(float(x), float(y))
#define __sinf(x) std::sin(float(x))
#define __cosf(x) std::cos(float(x))

// Of a number and a NaN, the number, as on the GPU.
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(b) < T(a) ? T(b) : T(a);
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}

// ---- bits ----

template <typename To, typename From>
To cuemu_bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline int __float_as_int(float x) { return cuemu_bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return cuemu_bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return cuemu_bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return cuemu_bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
