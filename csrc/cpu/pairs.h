// Two vectors at a time, for the 256-bit level. One vector of 16-bit values is half a register there, and loading and
// rounding it takes 11 instructions for 8 values; two are a whole register, and take 14 for 16:
//
//   each_pair<T>(n, [&](int64_t i, auto part) { store(out + i, load(a + i, part) + load(b + i, part), part); });
//
// gives f whole pairs, then what is left as `each` does. At the other levels, and for double, it is `each`. Attention
// over 8 frames takes pairs of bfloat16 at every level.
//
// The two vectors of a pair of bfloat16 are its even and its odd elements: so widening is a shift and a mask. A row of
// float that is written and read by pairs of the same places (scratch, sums) has the same order; a row of float that
// comes from outside has not, and takes `each`.
#pragma once
#include <type_traits>

#include "simd.h"

namespace pyvidx {
namespace {
namespace simd {

#if defined(__AVX2__) && !defined(__AVX512F__)
template <typename T>
constexpr bool kPairs = !std::is_same<T, double>::value;
#else
template <typename T>
constexpr bool kPairs = false;
#endif

struct Two {
  VF a, b;

  PYVIDX_SIMD Two(float value = 0) : a(VF{} + value), b(VF{} + value) {}
  PYVIDX_SIMD Two(VF first, VF second) : a(first), b(second) {}
  friend PYVIDX_SIMD Two operator+(Two x, Two y) { return {x.a + y.a, x.b + y.b}; }
  friend PYVIDX_SIMD Two operator-(Two x, Two y) { return {x.a - y.a, x.b - y.b}; }
  friend PYVIDX_SIMD Two operator*(Two x, Two y) { return {x.a * y.a, x.b * y.b}; }
  friend PYVIDX_SIMD Two operator/(Two x, Two y) { return {x.a / y.a, x.b / y.b}; }
  friend PYVIDX_SIMD Two operator-(Two x) { return {-x.a, -x.b}; }
  PYVIDX_SIMD Two& operator+=(Two x) { return *this = *this + x; }
};

// By halves: a copy of the whole goes through memory.
template <>
PYVIDX_SIMD Two read<Two>(const void* p) {
  return {read<VF>(p), read<VF>((const char*)p + kBytes)};
}
PYVIDX_SIMD void write(void* p, Two v) { write(p, v.a), write((char*)p + kBytes, v.b); }
PYVIDX_SIMD void stream(void* p, Two v) { stream(p, v.a), stream((char*)p + kBytes, v.b); }

PYVIDX_SIMD Two exp(Two x) { return {exp(x.a), exp(x.b)}; }
PYVIDX_SIMD Two coarse_inverse(Two x) { return {coarse_inverse(x.a), coarse_inverse(x.b)}; }

struct Pair {};        // two whole vectors
struct PairStream {};  // stored past the caches: the address must be a multiple of kBytes

template <typename T>
struct Lane2;  // of a pair, as Lane of a vector
template <>
struct Lane2<float> {
  using Raw = Two;
  static PYVIDX_SIMD Two up(Raw r) { return r; }
  static PYVIDX_SIMD Raw down(Two v) { return v; }
};
#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
struct Lane2<Half> {
  using Raw = __m256i;
  static PYVIDX_SIMD Two up(Raw r) {
    return {from_f16((VH)_mm256_castsi256_si128(r)), from_f16((VH)_mm256_extracti128_si256(r, 1))};
  }
  static PYVIDX_SIMD Raw down(Two v) { return _mm256_set_m128i((__m128i)to_f16(v.b), (__m128i)to_f16(v.a)); }
};
template <>
struct Lane2<BFloat16> {
  using Raw = __m256i;
  static PYVIDX_SIMD Two up(Raw r) { return {(VF)((VU)r << 16), (VF)((VU)r & 0xffff0000u)}; }
  // Rounded to nearest even, in 16-bit lanes: the carry of low + 0x7fff + (high & 1). A NaN stays one: where nothing
  // but a carry would make it a number, the highest positive one is held by saturation, the negative one by the
  // maximum.
  static PYVIDX_SIMD Raw down(Two v) {
    const __m256i even = (__m256i)v.a, odd = (__m256i)v.b;
    const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
    const __m256i low = _mm256_blend_epi16(even, _mm256_slli_epi32(odd, 16), 0xaa);
    const __m256i half = _mm256_or_si256(_mm256_and_si256(high, _mm256_set1_epi16(1)), _mm256_set1_epi16(0x7ffe));
    const __m256i carry = _mm256_srli_epi16(_mm256_avg_epu16(low, half), 15);
    return _mm256_max_epu16(_mm256_adds_epi16(high, carry), high);
  }
};
#else
// For sums of products of bfloat16: the low half of their NaN is 0 and rounds to NaN, so none is looked for.
template <>
struct Lane2<BFloat16> {
  using Raw = VU;
  static PYVIDX_SIMD Two up(Raw r) { return {(VF)(r << 16), (VF)(r & 0xffff0000u)}; }
  static PYVIDX_SIMD Raw down(Two v) {
#if defined(__AVX512BF16__)
    return widen(to_bf16(v.a)) | widen(to_bf16(v.b)) << 16;
#else
    const auto rounded = [](VF x) __attribute__((always_inline)) { return (VU)x + 0x7fffu + (((VU)x >> 16) & 1u); };
    const VU even = rounded(v.a) >> 16, odd = rounded(v.b);
#if defined(__AVX512F__)
    return (VU)_mm512_mask_mov_epi16((__m512i)even, 0xaaaaaaaau, (__m512i)odd);
#else
    return even | (odd & 0xffff0000u);
#endif
#endif
  }
};
#endif

// One of the two vectors of a pair, where two of everything are too many for 16 registers: f runs once for each.
struct First {};
struct Second {};
template <typename T>
PYVIDX_SIMD Vec<T> load(const T* p, First) {
  if constexpr (std::is_same<T, BFloat16>::value) return (VF)(read<VU>(p) << 16);
  return load(p);
}
template <typename T>
PYVIDX_SIMD Vec<T> load(const T* p, Second) {
  if constexpr (std::is_same<T, BFloat16>::value) return (VF)(read<VU>(p) & 0xffff0000u);
  return load(p + kWidth<T>);
}
PYVIDX_SIMD void store(float* p, VF v, First) { write(p, v); }
PYVIDX_SIMD void store(float* p, VF v, Second) { write(p + kFloats, v); }

template <typename Part>
constexpr bool kIsPair = std::is_same<Part, Pair>::value || std::is_same<Part, PairStream>::value;
template <typename T, typename Part>
using Of = std::conditional_t<kIsPair<Part>, Two, Vec<T>>;
template <typename T, typename Part>
using LaneOf = std::conditional_t<kIsPair<Part>, Lane2<T>, Lane<T>>;

// As stored: what is only moved needs no conversion.
template <typename T, typename Part>
PYVIDX_SIMD typename LaneOf<T, Part>::Raw load_raw(const T* p, Part part) {
  using Raw = typename LaneOf<T, Part>::Raw;
  if constexpr (std::is_same<Part, simd::Part>::value) {
    Raw raw = {};
    __builtin_memcpy(&raw, p, part.n * sizeof(T));
    return raw;
  } else {
    return read<Raw>(p);
  }
}
template <typename T, typename Part>
PYVIDX_SIMD void store_raw(T* p, typename LaneOf<T, Part>::Raw raw, Part part) {
  if constexpr (std::is_same<Part, simd::Part>::value) {
    __builtin_memcpy(p, &raw, part.n * sizeof(T));
  } else if constexpr (std::is_same<Part, PairStream>::value || std::is_same<Part, Stream>::value) {
    stream(p, raw);
  } else {
    write(p, raw);
  }
}

template <typename T>
PYVIDX_SIMD Two load(const T* p, Pair) {
  if constexpr (std::is_same<T, Half>::value) return {load(p), load(p + kFloats)};  // converted from memory: no shuffle
  return Lane2<T>::up(load_raw(p, Pair{}));
}
template <typename T>
PYVIDX_SIMD Two load(const T* p, PairStream) {
  return load(p, Pair{});
}
template <typename T>
PYVIDX_SIMD void store(T* p, Two v, Pair part) {
  store_raw(p, Lane2<T>::down(v), part);
}
template <typename T>
PYVIDX_SIMD void store(T* p, Two v, PairStream part) {
  store_raw(p, Lane2<T>::down(v), part);
}

// sum += x * y
PYVIDX_SIMD void add_product(VF& sum, Two x, Two y) { sum += x.a * y.a, sum += x.b * y.b; }
template <typename V>
PYVIDX_SIMD void add_product(V& sum, V x, V y) {
  sum += x * y;
}

// Y: what else f loads or stores. Pairs of float and bfloat16 have different orders: there it is `each`.
template <typename T, typename Y>
constexpr bool kPairsWith = kPairs<T> && (std::is_same<T, BFloat16>::value || !std::is_same<Y, BFloat16>::value);

template <typename T, typename Y = T, typename F>
PYVIDX_SIMD void each_pair(int64_t n, F&& f) {
  int64_t i = 0;
  if constexpr (kPairsWith<T, Y>) {
    for (; i + 2 * kWidth<T> <= n; i += 2 * kWidth<T>) f(i, Pair{});
  }
  for (; i + kWidth<T> <= n; i += kWidth<T>) f(i, Full{});
  if (i < n) f(i, Part{n - i});
}
// The same past the caches, where `stream` says so and the row `out` allows it.
template <typename T, typename Y = T, typename F>
PYVIDX_SIMD void each_pair(int64_t n, const void* out, bool stream, F&& f) {
  if (!stream || reinterpret_cast<uintptr_t>(out) % kBytes != 0) return each_pair<T, Y>(n, f);
  int64_t i = 0;
  if constexpr (kPairsWith<T, Y>) {
    for (; i + 2 * kWidth<T> <= n; i += 2 * kWidth<T>) f(i, PairStream{});
  }
  for (; i + kWidth<T> <= n; i += kWidth<T>) f(i, Stream{});
  if (i < n) f(i, Part{n - i});
}

// The same with First{} and Second{} for a pair of 16 bits; f stores to rows of float alone.
template <typename T, typename F>
PYVIDX_SIMD void each_half(int64_t n, F&& f) {
  int64_t i = 0;
  if constexpr (kPairs<T> && sizeof(T) == 2) {
    for (; i + 2 * kWidth<T> <= n; i += 2 * kWidth<T>) f(i, First{}), f(i, Second{});
  }
  for (; i + kWidth<T> <= n; i += kWidth<T>) f(i, Full{});
  if (i < n) f(i, Part{n - i});
}

// Where element i of n lies in a row of float that is read and written by pairs of T.
template <typename T>
PYVIDX_SIMD int64_t pair_place(int64_t i, int64_t n) {
  constexpr int64_t kTwo = 2 * kWidth<T>;
  if (!kPairs<T> || !std::is_same<T, BFloat16>::value || i >= n / kTwo * kTwo) return i;
  return i / kTwo * kTwo + i % 2 * kWidth<T> + i % kTwo / 2;
}

// Chains of sums that vectors and pairs are added to.
template <typename T>
struct Chains {
  Vec<T> a = {}, b = {};
  PYVIDX_SIMD Chains& operator+=(Vec<T> v) {
    a += v;
    return *this;
  }
  PYVIDX_SIMD Chains& operator+=(Two v) {
    a += v.a, b += v.b;
    return *this;
  }
  PYVIDX_SIMD Acc<T> total() const { return sum(a + b); }
};

// The sum over n elements of f(i, part), in four chains.
template <typename T, typename Y = T, typename F>
PYVIDX_SIMD Acc<T> sum_of_pairs(int64_t n, F&& f) {
  if constexpr (!kPairsWith<T, Y>) {
    return sum_of<T>(n, f);
  } else {
    Two a, b;
    int64_t i = 0;
    for (; i + 4 * kWidth<T> <= n; i += 4 * kWidth<T>) {
      a += f(i, Pair{});
      b += f(i + 2 * kWidth<T>, Pair{});
    }
    if (i + 2 * kWidth<T> <= n) a += f(i, Pair{}), i += 2 * kWidth<T>;  // where each_pair has a pair, so has this
    a += b;
    if (i + kWidth<T> <= n) a.a += f(i, Full{}), i += kWidth<T>;
    if (i < n) a.b += f(i, Part{n - i});
    return sum(a.a + a.b);
  }
}

}  // namespace simd
}  // namespace
}  // namespace pyvidx
