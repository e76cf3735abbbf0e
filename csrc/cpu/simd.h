// Vectors of the level this file is compiled for: GCC/Clang vector extensions, and intrinsics where those are slow
// (16-bit conversions, streaming stores). A kernel loads any storage type T into a vector of its accumulator type
// (float, or double for double), computes there, and stores back rounded to nearest even.
//
//   each<T>(n, [&](int64_t i, auto part) { store(out + i, load(a + i, part) + load(b + i, part), part); });
#pragma once
#include <cstdint>
#include <utility>

#include "pyvidx/dispatch.h"
#include "pyvidx/view.h"
#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns about its own _mm512_undefined
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pyvidx {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <>
struct DTypeOf<Half> {
  static constexpr DType value = DType::f16;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::bf16;
};

namespace {
namespace simd {

#define PYVIDX_SIMD PYVIDX_INLINE
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kFloats = kBytes / 4, kDoubles = kBytes / 8;

typedef float VF __attribute__((vector_size(kBytes)));
typedef double VD __attribute__((vector_size(kBytes)));
typedef int32_t VI __attribute__((vector_size(kBytes)));
typedef uint32_t VU __attribute__((vector_size(kBytes)));
typedef uint16_t VH __attribute__((vector_size(kBytes / 2)));

template <typename V>
PYVIDX_SIMD V read(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
PYVIDX_SIMD void write(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// --- 16-bit conversions -------------------------------------------------------------------------------------------

PYVIDX_SIMD VU widen(VH h) {
#if defined(__AVX512F__)
  return (VU)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  return (VU)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, VU);
#endif
}

PYVIDX_SIMD VH narrow(VU u) {  // u < 65536
#if defined(__AVX512F__)
  return (VH)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  return (VH)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(u, VH);
#endif
}

PYVIDX_SIMD VF from_bf16(VH h) { return (VF)(widen(h) << 16); }

PYVIDX_SIMD VH to_bf16(VF v) {
#if defined(__AVX512BF16__)  // flushes results below 2^-126 to zero, where the others keep them
  return (VH)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__AVX512F__)  // GCC turns the comparison below into a vector and back: the mask register saves a third
  const __m512i u = (__m512i)v, odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  const __m512i bits = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  return (VH)_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
#elif defined(__AVX2__)
  const __m256i u = (__m256i)v, odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256 rounded = (__m256)_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 nan = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q);
  return narrow((VU)_mm256_blendv_ps(rounded, (__m256)_mm256_set1_epi32(0x7fc00000), nan) >> 16);
#else
  const VU u = (VU)v;
  const VU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VU nan = (VU)(v != v);
  return narrow((rounded & ~nan) | (nan & 0x7fc0u));
#endif
}

PYVIDX_SIMD VF from_f16(VH h) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (VF)_mm256_cvtph_ps((__m128i)h);
#else
  const VU u = widen(h), magnitude = (u & 0x7fffu) << 13;
  const VF scaled = (VF)magnitude * 0x1p+112f;  // rebias the exponent; subnormals come out right
  const VU special = (VU)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (VF)((VU)scaled | special | ((u & 0x8000u) << 16));
#endif
}

PYVIDX_SIMD VH to_f16(VF v) {
#if defined(__AVX512F__)
  return (VH)_mm512_cvtps_ph((__m512)v, 0);
#elif defined(__F16C__)
  return (VH)_mm256_cvtps_ph((__m256)v, 0);
#else
  VU u = (VU)v;
  const VU sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  const VU subnormal = (VU)((VF)u + 0.5f) - 0x3f000000u;
  const VU normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
  const VU infinite = 0x7c00u | ((VU)(u > 0x7f800000u) & 0x0200u);
  const VU small = (VU)(u < 0x38800000u), large = (VU)(u >= 0x47800000u);
  const VU finite = (subnormal & small) | (normal & ~small);
  return narrow((((infinite & large) | (finite & ~large)) & 0xffffu) | sign);
#endif
}

// --- storage type T <-> vector ------------------------------------------------------------------------------------

template <typename T>
struct Lane;
template <>
struct Lane<float> {
  using Acc = float;
  using V = VF;
  using Raw = VF;
  static PYVIDX_SIMD V up(Raw r) { return r; }
  static PYVIDX_SIMD Raw down(V v) { return v; }
};
template <>
struct Lane<double> {
  using Acc = double;
  using V = VD;
  using Raw = VD;
  static PYVIDX_SIMD V up(Raw r) { return r; }
  static PYVIDX_SIMD Raw down(V v) { return v; }
};
template <>
struct Lane<Half> {
  using Acc = float;
  using V = VF;
  using Raw = VH;
  static PYVIDX_SIMD V up(Raw r) { return from_f16(r); }
  static PYVIDX_SIMD Raw down(V v) { return to_f16(v); }
};
template <>
struct Lane<BFloat16> {
  using Acc = float;
  using V = VF;
  using Raw = VH;
  static PYVIDX_SIMD V up(Raw r) { return from_bf16(r); }
  static PYVIDX_SIMD Raw down(V v) { return to_bf16(v); }
};
template <typename T>
using Acc = typename Lane<T>::Acc;  // what T is computed in
template <typename T>
using Vec = typename Lane<T>::V;
template <typename T>
constexpr int kWidth = sizeof(typename Lane<T>::Raw) / sizeof(T);  // elements of T per vector

struct Full {};    // a whole vector
struct Stream {};  // a whole vector, stored past the caches: the address must be a multiple of the stored bytes
struct Part {      // the first n elements of a vector; the others read as 0 and are not written
  int64_t n;
};

template <typename T>
PYVIDX_SIMD Vec<T> load(const T* p, Full = {}) {
  return Lane<T>::up(read<typename Lane<T>::Raw>(p));
}
template <typename T>
PYVIDX_SIMD Vec<T> load(const T* p, Stream) {
  return load(p, Full{});
}
template <typename T>
PYVIDX_SIMD Vec<T> load(const T* p, Part part) {
  typename Lane<T>::Raw raw = {};
#if defined(__AVX512F__)  // a copy of a length known only at run time is a call of memcpy
  if constexpr (sizeof(T) == 8) raw = (decltype(raw))_mm512_maskz_loadu_epi64((1u << part.n) - 1, p);
  if constexpr (sizeof(T) == 4) raw = (decltype(raw))_mm512_maskz_loadu_epi32((1u << part.n) - 1, p);
  if constexpr (sizeof(T) == 2) raw = (decltype(raw))_mm256_maskz_loadu_epi16((1u << part.n) - 1, p);
#else
  __builtin_memcpy(&raw, p, part.n * sizeof(T));
#endif
  return Lane<T>::up(raw);
}
template <typename T>
PYVIDX_SIMD void store(T* p, Vec<T> v, Full = {}) {
  write(p, Lane<T>::down(v));
}
template <typename T>
PYVIDX_SIMD void store(T* p, Vec<T> v, Part part) {
  const auto raw = Lane<T>::down(v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) _mm512_mask_storeu_epi64(p, (1u << part.n) - 1, (__m512i)raw);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, (1u << part.n) - 1, (__m512i)raw);
  if constexpr (sizeof(T) == 2) _mm256_mask_storeu_epi16(p, (1u << part.n) - 1, (__m256i)raw);
#else
  __builtin_memcpy(p, &raw, part.n * sizeof(T));
#endif
}
template <typename Raw>
PYVIDX_SIMD void stream(void* p, Raw raw) {
#if defined(__AVX512F__)
  if constexpr (sizeof raw == 64) return _mm512_stream_si512((__m512i*)p, read<__m512i>(&raw));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof raw == 32) return _mm256_stream_si256((__m256i*)p, read<__m256i>(&raw));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof raw == 16) return _mm_stream_si128((__m128i*)p, read<__m128i>(&raw));
  if constexpr (sizeof raw == 8) return _mm_stream_si64((long long*)p, read<long long>(&raw));
#endif
  write(p, raw);
}
template <typename T>
PYVIDX_SIMD void store(T* p, Vec<T> v, Stream) {
  stream(p, Lane<T>::down(v));
}

// v where there are elements, 0 in the lanes beyond a part: for sums of what is not 0 where the inputs are.
template <typename V, typename P>
PYVIDX_SIMD V only(V v, P) {
  return v;
}
template <typename V>
PYVIDX_SIMD V only(V v, Part part) {
  V kept = {};
  __builtin_memcpy(&kept, &v, part.n * sizeof v[0]);
  return kept;
}

// After streaming stores, before another thread may read them.
PYVIDX_SIMD void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Start loading a cache line. GCC 12 drops loops and calls that do nothing but __builtin_prefetch; not so volatile asm.
PYVIDX_SIMD void prefetch(const void* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

// Outputs beyond this size leave the L2 cache anyway: writing them past the caches saves reading them first. An output
// of 3 MB that is read at once gains as well (temporal_scale.cpp).
constexpr int64_t kStreamBytes = 1 << 20;

// f(i, Full{}) for each whole vector of n elements, then f(i, Part{rest}).
template <typename T, typename F>
PYVIDX_SIMD void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) f(i, Full{});
  if (i < n) f(i, Part{n - i});
}
// The same with Stream{} for whole vectors, where `stream` says so and the row `out` allows it.
template <typename T, typename F>
PYVIDX_SIMD void each(int64_t n, const T* out, bool stream, F&& f) {
  if (!stream || reinterpret_cast<uintptr_t>(out) % kBytes != 0) return each<T>(n, f);
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) f(i, Stream{});
  if (i < n) f(i, Part{n - i});
}

// --- mathematics --------------------------------------------------------------------------------------------------

// In pairs, 6 instructions for 8 lanes: one lane after the other takes 14, and as many additions' time as there are
// lanes. At v3 memory_merge_ with all in the caches takes 213 us for 264, a LayerNorm's rows in bfloat16 5 to 15 %
// less.
template <size_t kHalf, typename V, size_t... i>
PYVIDX_SIMD auto folded(V v, std::index_sequence<i...> lanes) {
  v += __builtin_shufflevector(v, v, (i ^ kHalf)...);
  if constexpr (kHalf > 1) return folded<kHalf / 2>(v, lanes);
  return v[0];
}
template <typename V>
PYVIDX_SIMD auto sum(V v) {
  constexpr size_t kLanes = sizeof v / sizeof v[0];
  return folded<kLanes / 2>(v, std::make_index_sequence<kLanes>());
}

// The sum over n elements of f(i, Full{}) and f(i, Part{rest}), in four chains: one addition takes four cycles.
template <typename T, typename F>
PYVIDX_SIMD Acc<T> sum_of(int64_t n, F&& f) {
  Vec<T> a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * kWidth<T> <= n; i += 4 * kWidth<T>) {
    a += f(i, Full{});
    b += f(i + kWidth<T>, Full{});
    c += f(i + 2 * kWidth<T>, Full{});
    d += f(i + 3 * kWidth<T>, Full{});
  }
  for (; i + kWidth<T> <= n; i += kWidth<T>) a += f(i, Full{});
  if (i < n) b += f(i, Part{n - i});
  return sum((a + b) + (c + d));
}

template <typename V>
PYVIDX_SIMD V larger(V a, V b) {  // b where either is NaN
  return a > b ? a : b;
}
template <typename V>
PYVIDX_SIMD V smaller(V a, V b) {
  return a < b ? a : b;
}
#if defined(__AVX512F__)  // the same in one instruction, where GCC makes a comparison and a blend
PYVIDX_SIMD VF larger(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
PYVIDX_SIMD VF smaller(VF a, VF b) { return (VF)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
PYVIDX_SIMD VF larger(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
PYVIDX_SIMD VF smaller(VF a, VF b) { return (VF)_mm256_min_ps((__m256)a, (__m256)b); }
#endif

// e^x of a vector of floats, relative error below 2e-7 on [-87, 88], clamped outside. Coefficients: Cephes expf.
template <typename V>
PYVIDX_SIMD V exp(V x) {
  using I = decltype(x < x);
  x = smaller(V{} + 88.3f, larger(V{} - 87.3f, x));
  V n = x * 1.44269504088896f + 12582912.f;  // 1.5 * 2^23: rounds to an integer held in the low bits
  const I exponent = (I)n;
  n -= 12582912.f;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // In pairs: one chain of multiply-adds is twice as long, and its latency binds.
  const V r2 = r * r;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r2 + (r * 8.3334519073e-3f + 4.1665795894e-2f);
  p = p * r2 + (r * 1.6666665459e-1f + 5.0000001201e-1f);
  p = p * r2 + (r + 1.f);
  return p * (V)((exponent + (127 - 0x4b400000)) << 23);
}
PYVIDX_SIMD VD exp(VD x) {  // float64 is for checking gradients, not for speed
  for (int i = 0; i < kDoubles; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}
// For what is rounded to bfloat16: 2^f for f of [-1/2, 1/2] with a relative error below 1.1e-4 (the least one of such
// polynomials that are 1 at 0), 2^x for x of [-126, 0], clamped below, and 1 / x with one below 4e-4.
template <typename V>
PYVIDX_SIMD V coarse_fraction_power(V f) {
  return ((f * 5.500893126e-2f + 2.422109678e-1f) * f + 6.932829281e-1f) * f + 1.f;
}
template <typename V>
PYVIDX_SIMD V coarse_power(V x) {
  using I = decltype(x < x);
  x = larger(V{} - 126.f, x);
  const V t = x + 12582912.f;  // as in exp
  return (V)((I)coarse_fraction_power(x - (t - 12582912.f)) + ((I)t << 23));
}
PYVIDX_SIMD VF coarse_inverse(VF x) {
#if defined(__AVX512F__)
  return (VF)_mm512_rcp14_ps((__m512)x);
#elif defined(__AVX2__)
  return (VF)_mm256_rcp_ps((__m256)x);
#elif defined(__x86_64__)
  return (VF)_mm_rcp_ps((__m128)x);
#else
  return 1 / x;
#endif
}
template <typename V>
PYVIDX_SIMD V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

}  // namespace simd
}  // namespace
}  // namespace pyvidx
