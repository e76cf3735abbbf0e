// The forward kernel for bfloat16 where the CPU multiplies pairs of them (AVX512_BF16): twice the arithmetic, and q and
// k need no conversion. Sums are float; the weights are rounded to bfloat16 for their product with v, as on tensor
// cores.
#pragma once
#include "temporal_attention.h"

#if defined(__AVX512BF16__)
namespace pyvidx {
namespace {

// low's bfloat16 beside high's: 16 (or 8) pairs.
PYVIDX_INLINE simd::VU pairs(simd::VH low, simd::VH high) { return simd::widen(low) | simd::widen(high) << 16; }
PYVIDX_INLINE simd::VF pairs(simd::VF low, simd::VF high) {
  return (simd::VF)pairs(simd::to_bf16(low), simd::to_bf16(high));
}
PYVIDX_INLINE HalfVector pairs(HalfVector low, HalfVector high) {
  const __m256i low_ = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh((__m256)low));
  const __m256i high_ = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh((__m256)high));
  return (HalfVector)_mm256_or_si256(low_, _mm256_slli_epi32(high_, 16));
}

// x as rows of pairs along D: in place where it can be, else packed into memory [rows][ld], zero beyond D.
inline Matrix<const float> as_pairs(Matrix<const BFloat16> x, int64_t rows, int64_t D, BFloat16* memory, int64_t ld) {
  if (ld == D && x.row % 2 == 0) return {reinterpret_cast<const float*>(x.data), x.row / 2};
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t d = 0; d < ld; d += 16) {
      const int64_t left = D - d;
      const simd::Part part{left < 0 ? 0 : left < 16 ? left : 16};
      store(memory + t * ld + d, load(x.data + t * x.row + d, part));
    }
  }
  return {reinterpret_cast<const float*>(memory), ld / 2};
}

// out [rows / 2][ld] <- rows 2j and 2j + 1 of x beside each other, zero beyond D and beyond the last row.
inline void pair_rows(Matrix<const BFloat16> x, int64_t rows, int64_t D, float* out, int64_t ld) {
  for (int64_t t = 0; t < rows; t += 2) {
    const BFloat16 *low = x.data + t * x.row, *high = low + x.row;
    each<BFloat16>(D, [&](int64_t d, auto part) {
      const auto a = (simd::VU)load(low + d, part) >> 16;
      const auto b = t + 1 < rows ? (simd::VU)load(high + d, part) : simd::VU{};
      simd::write(out + t / 2 * ld + d, a | b);
    });
  }
}

// out [rows / 2][ld] <- rows 2j and 2j + 1 of w, as bfloat16, beside each other.
template <typename V>
__attribute__((noinline)) void pair_weights(const float* w, int64_t rows, int64_t ld, float* out) {
  for (int64_t j = 0; j < rows; j += 2) {
    for (int64_t c = 0; c < ld; c += sizeof(V) / 4) {
      const V high = j + 1 < rows ? simd::read<V>(w + (j + 1) * ld + c) : V{};
      simd::write(out + j / 2 * ld + c, pairs(simd::read<V>(w + j * ld + c), high));
    }
  }
}

inline void attend_bf16(const TemporalAttentionArgs& a, const Executor& executor) {
  const int64_t frames = a.qkv.size[1], D = a.qkv.size[5], tasks = a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  if (frames == 0 || D == 0) return;
  const bool stream = streams<BFloat16>(a.out);
  const int64_t half = (frames + 1) / 2, columns = round_up(D, 16), ld = round_up(D, 32);
  with_query_vector<BFloat16>(frames, [&](auto query_vector) {
    using V = decltype(query_vector);
    const int64_t queries = round_up(frames, sizeof(V) / 4);
    parallel_for(executor, tasks, kGrainElements / (4 * frames * D) + 1, [&](int64_t begin, int64_t end) {
      Scratch scratch((frames * ld + ld / 2 * queries + half * columns + (frames + half) * queries) * 4 +
                      frames * columns * 4 + 8 * 64);
      BFloat16 *q_memory = scratch.take<BFloat16>(frames * ld), *k_memory = scratch.take<BFloat16>(frames * ld);
      float *qt = scratch.take<float>(ld / 2 * queries), *v = scratch.take<float>(half * columns);
      float *w = scratch.take<float>(frames * queries), *weights = scratch.take<float>(half * queries);
      float* sums = scratch.take<float>(frames * columns);
      each_task(a.qkv, begin, end, 1, [&](Task task, Task next) {
        const Prefetch next_qk(D, part_of<BFloat16>(a.qkv, next, 0), part_of<BFloat16>(a.qkv, next, 1));
        const Prefetch next_v(D, part_of<BFloat16>(a.qkv, next, 2));
        const auto q = as_pairs(part_of<BFloat16>(a.qkv, task, 0), frames, D, q_memory, ld);
        const auto k = as_pairs(part_of<BFloat16>(a.qkv, task, 1), frames, D, k_memory, ld);
        pair_rows(part_of<BFloat16>(a.qkv, task, 2), frames, D, v, columns);
        transpose<V>(q, frames, ld / 2, qt, queries);
        product<V>(frames, queries, ld / 2, Left<Pair>{reinterpret_cast<const Pair*>(k.data), k.row, 1},
                   Matrix<const float>{qt, queries}, Matrix<float>{w, queries}, next_qk);
        softmax_columns<V>(w, frames, queries, float(a.scale));
        pair_weights<V>(w, frames, queries, weights);
        const Left<Pair> left{reinterpret_cast<const Pair*>(weights), 1, queries};
        const Matrix<const float> right{v, columns};
        const Matrix<BFloat16> out{a.out.at<BFloat16>(task.b, 0, task.p, task.h), a.out.stride[1], stream};
        if (columns == D) return product<simd::VF>(frames, D, half, left, right, out, next_v);
        product<simd::VF>(frames, columns, half, left, right, Matrix<float>{sums, columns}, next_v);
        store_rows<BFloat16>({sums, columns}, frames, D, out);
      });
      simd::fence();
    });
  });
}

}  // namespace
}  // namespace pyvidx
#endif
