// One step of a memory bank at one position, by one block. Shared by the streaming step (memory_merge) and the walk
// over a clip (memory_scan), which so give the same bits.
#pragma once
#include "block.cuh"
#include "pyvidx/memory_merge.h"

namespace pyvidx::cuda {

constexpr int kMemoryThreads = 128;
constexpr int kMemoryWarps = kMemoryThreads / 32;
constexpr int kMemoryBlocks = 5;  // per multiprocessor: 96 registers; left to itself, ptxas takes fewer and spills

// A pack is what a thread takes at a time: 16 bytes, or one element where rows are not aligned.
template <typename T, bool kVectorized>
constexpr int kPack = kVectorized ? kVec<T> : 1;

// Exact divisions and roots of floats are subroutine calls around which ptxas spills; these are off by 2 units at most.
__device__ __forceinline__ float divide(float x, float y) { return __fdividef(x, y); }
__device__ __forceinline__ double divide(double x, double y) { return x / y; }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return rsqrt(x); }

// Cosine from a dot product and two squared norms, each norm at least eps. The same whichever row comes first.
template <typename A>
__device__ __forceinline__ A cosine(A dot, A xx, A yy) {
  const A least = A(kMemoryEps) * A(kMemoryEps);
  return dot * (inverse_root(xx < least ? least : xx) * inverse_root(yy < least ? least : yy));  // a NaN stays one
}

// (s0 x + s1 y) / (s0 + s1); a product and a Newton step round as the division does.
template <typename A>
struct Mean {
  A s0, s1, total, inverse;

  __device__ __forceinline__ Mean(A first, A second)
      : s0(first), s1(second), total(first + second), inverse(divide(A(1), total)) {}
  __device__ __forceinline__ A operator()(A x, A y) const {
    const A dividend = x * s0 + y * s1, quotient = dividend * inverse;
    return (dividend - quotient * total) * inverse + quotient;
  }
};

// What one step does at one position. Slots; -1: none.
struct StepPlan {
  int k;                        // the merged pair is (k, k + 1); -1: nothing merges
  int keep, gone, left, right;  // the pair, and its neighbors in time
  int last, target;             // the newest entry after the merge (may be `keep`), and where the frame goes
  int length;                   // after the merge
  int size0, size1;             // frames in the pair
};

// Entries stored at one position, as many as slots in use. All lanes of a warp take part. The length of the video,
// which says the same, is left to one block, which checks and then changes it: so no other has to be waited for.
__device__ __forceinline__ int stored_entries(const View<3>& sizes, int64_t b, int64_t n) {
  int count = 0;
  for (int64_t j = threadIdx.x % 32; j < sizes.size[2]; j += 32) count += *sizes.at<const int32_t>(b, n, j) > 0;
  return warp_sum(count);
}

// By one thread of one block of a video.
__device__ __forceinline__ void set_length(const View<1>& length, int64_t b, int before, int after) {
  int32_t& held = *length.at<int32_t>(b);
  if (held != before) __trap();  // out of range, or a broken state
  held = after;
}

// All lanes of a warp take part and get the same plan. `length`: entries before the step.
__device__ __forceinline__ StepPlan plan_step(const MemoryStepArgs& a, int64_t b, int64_t n, int length) {
  StepPlan p{-1, -1, -1, -1, -1, -1, -1, length, 1, 1};
  const int M = int(a.similarity.size[2]);
  if (p.length < 0 || p.length > M + 1) __trap();
  auto order = [&](int j) {
    const int slot = *a.order.at<const int32_t>(b, n, j);
    if (slot < 0 || slot > M) __trap();  // a broken state: better stop than write elsewhere
    return slot;
  };
  if (p.length == M + 1) {
    const int lane = threadIdx.x % 32, first = lane < M ? lane : 0;
    ArgMax<float> best{*a.similarity.at<const float>(b, n, first), first};
    for (int j = lane + 32; j < M; j += 32) best = better(best, {*a.similarity.at<const float>(b, n, j), j});
    p.k = warp_argmax(best).index;
    p.keep = order(p.k), p.gone = order(p.k + 1);
    if (p.k > 0) p.left = order(p.k - 1);
    if (p.k + 2 <= M) p.right = order(p.k + 2);
    p.size0 = *a.sizes.at<const int32_t>(b, n, p.keep), p.size1 = *a.sizes.at<const int32_t>(b, n, p.gone);
    p.length = M;
  }
  if (a.frame) {
    if (p.k >= 0) {
      p.target = p.gone;
      p.last = p.k == M - 1 ? p.keep : order(M);  // entry M was the last, unless it has just been merged away
    } else {
      p.target = order(p.length);
      if (p.length > 0) p.last = order(p.length - 1);
    }
  }
  return p;
}

template <typename A>
__device__ __forceinline__ Mean<A> mean_of(const MemoryStepArgs& a, const StepPlan& p) {
  return a.weighted ? Mean<A>(A(p.size0), A(p.size1)) : Mean<A>(A(1), A(1));
}

// Entries move up by one behind the merged pair: order and similarities. All threads of the block take part.
__device__ __forceinline__ void close_gap(const MemoryStepArgs& a, const StepPlan& p, int64_t b, int64_t n) {
  const int M = int(a.similarity.size[2]);
  for (int base = p.k; base < M; base += kMemoryThreads) {
    const int j = base + int(threadIdx.x);
    int slot = 0;
    float value = 0;
    if (j < M) slot = *a.order.at<const int32_t>(b, n, j + 1);
    if (j + 1 < M) value = *a.similarity.at<const float>(b, n, j + 1);
    __syncthreads();
    if (j < M) {
      if (j > p.k) *a.order.at<int32_t>(b, n, j) = slot;
      *a.similarity.at<float>(b, n, j) = value;
    }
    __syncthreads();
  }
}

// The step at one position: rows, order, sizes and similarities. All threads of the block take part; a plan made after
// it needs a __syncthreads first. Every thread keeps to its own columns of the rows.
template <typename T, bool kVectorized>
__device__ __forceinline__ void run_step(const MemoryStepArgs& a, const StepPlan& p, int64_t b, int64_t n) {
  using A = Acc<T>;
  const int C = int(a.bank.size[3]);
  constexpr int kSize = kPack<T, kVectorized>;
  const Mean<A> mean = mean_of<A>(a, p);
  auto row = [&](int slot) { return slot < 0 ? nullptr : a.bank.at<T>(b, slot, n); };
  T *const keep_row = row(p.keep), *const target_row = row(p.target);
  const T *const gone_row = row(p.gone), *const left_row = row(p.left), *const right_row = row(p.right);
  const T* const last_row = p.last == p.keep ? nullptr : row(p.last);
  const T* const frame_row = p.target < 0 ? nullptr : a.frame.at<const T>(b, n);

  // Squares of keep, left, right, last, frame; then left keep, keep right, last frame (or keep frame).
  A sums[8] = {};
  for (int c = int(threadIdx.x) * kSize; c < C; c += kMemoryThreads * kSize) {
    A keep[kSize] = {}, gone[kSize] = {}, left[kSize] = {}, right[kSize] = {}, last[kSize] = {}, frame[kSize] = {};
    if (keep_row) load_pack(keep_row + c, keep), load_pack(gone_row + c, gone);
    if (left_row) load_pack(left_row + c, left);
    if (right_row) load_pack(right_row + c, right);
    if (last_row) load_pack(last_row + c, last);
    if (frame_row) load_pack(frame_row + c, frame);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      keep[i] = to_acc(from_acc<T>(mean(keep[i], gone[i])));  // as it is stored
      const A newest = last_row ? last[i] : keep[i];
      sums[0] += keep[i] * keep[i], sums[1] += left[i] * left[i], sums[2] += right[i] * right[i];
      sums[3] += newest * newest, sums[4] += frame[i] * frame[i];
      sums[5] += left[i] * keep[i], sums[6] += keep[i] * right[i], sums[7] += newest * frame[i];
    }
    if (keep_row) store_pack(keep_row + c, keep);
    if (target_row) store_pack(target_row + c, frame);
  }
  block_sum<kMemoryThreads>(sums);  // and every warp has its plan by now: the state may change

  if (p.k >= 0) close_gap(a, p, b, n);
  if (threadIdx.x != 0) return;
  const int M = int(a.similarity.size[2]);
  if (p.k >= 0) {
    *a.order.at<int32_t>(b, n, M) = p.gone;
    *a.sizes.at<int32_t>(b, n, p.keep) = p.size0 + p.size1;
    *a.sizes.at<int32_t>(b, n, p.gone) = 0;
  }
  if (p.target >= 0) *a.sizes.at<int32_t>(b, n, p.target) = 1;
  auto similarity = [&](int j, A value) { *a.similarity.at<float>(b, n, j) = float(value); };
  if (p.left >= 0) similarity(p.k - 1, cosine(sums[5], sums[1], sums[0]));
  if (p.right >= 0) similarity(p.k, cosine(sums[6], sums[0], sums[2]));
  if (p.last >= 0) similarity(p.length - 1, cosine(sums[7], sums[3], sums[4]));
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx::cuda {

// Rows are counted in 32 bits on the device: a 64-bit division is a subroutine call.
inline unsigned checked_rows(int64_t rows) {
  if (rows > 0x7fffffff) throw std::invalid_argument("memory bank: B * T * N must be below 2^31");
  return unsigned(rows);
}

template <typename F>
void visit_floating(const char* op, DType dtype, F&& f) {
  visit_dtype<float, double, __half, __nv_bfloat16>(op, dtype, f);
}

}  // namespace pyvidx::cuda
#endif
