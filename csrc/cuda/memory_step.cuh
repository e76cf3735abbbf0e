// One step of a memory bank at one position, by one block. Shared by the streaming step (memory_merge) and the walk
// over a clip (memory_scan), which so give the same bits.
//
// The first warp finds the pair, from a copy of the position's entries in shared memory, and later changes them; all
// warps take the rows between, one pack of each a thread. Versions, for 1408 floats in a clip (registers of sm_70 and
// sm_90 by SASS; instructions of all warps at a position and step; bytes at a position that are under way together):
//   128 threads, three passes, all warps plan      90, 80    4,160   5 barriers   12 KB
//   352 threads, one pass, all warps plan          80, 80    7,900   2 barriers   34 KB   thrown away: bound by issue
//   352 threads, one pass, the first warp plans    66, 66    3,470   2 barriers   34 KB   kept: 39 instructions per 16
//       bytes where it were 47. Prediction: 1.8 times as fast at sm_90, where steps wait for each other.
#pragma once
#include "memory_pack.cuh"
#include "pyvidx/memory_merge.h"

namespace pyvidx::cuda {

constexpr int kMemoryWarps = 11;  // of a block, at most: 352 threads have the 1408 floats of a row of MA-LMM
constexpr int kMemoryThreads = 32 * kMemoryWarps;
// Of that size per multiprocessor: at most 80 registers. Rows in 16 and 64 bits would spill; in 16 bits six warps have
// MA-LMM's row.
template <typename T>
constexpr int kMemoryBlocks = sizeof(T) == 4 ? 2 : 1;

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

// What is known of the entries at one position. A block takes it to shared memory, where finding the pair takes no
// further round of loads.
struct Entries {
  int32_t *sizes, *order;  // [M + 1]
  float* similarity;       // [M]
  int M;
};
constexpr int kEntryWords = 3;  // per slot

__device__ __forceinline__ Entries entries_in(int32_t* shared, const View<3>& similarity) {
  const int M = int(similarity.size[2]);
  return {shared, shared + M + 1, reinterpret_cast<float*>(shared + 2 * (M + 1)), M};
}

// By all threads of a block; then a __syncthreads.
__device__ __forceinline__ void load_entries(const Entries& e, const View<3>& sizes, const View<3>& order,
                                             const View<3>& similarity, int64_t b, int64_t n) {
#pragma unroll 1
  for (int j = int(threadIdx.x); j <= e.M; j += int(blockDim.x)) {
    e.sizes[j] = *sizes.at<const int32_t>(b, n, j), e.order[j] = *order.at<const int32_t>(b, n, j);
    if (j < e.M) e.similarity[j] = *similarity.at<const float>(b, n, j);
  }
}

// By the first warp.
__device__ __forceinline__ void store_entries(const Entries& e, const View<3>& sizes, const View<3>& order,
                                              const View<3>& similarity, int64_t b, int64_t n) {
#pragma unroll 1
  for (int j = int(threadIdx.x); j <= e.M; j += 32) {
    *sizes.at<int32_t>(b, n, j) = e.sizes[j], *order.at<int32_t>(b, n, j) = e.order[j];
    if (j < e.M) *similarity.at<float>(b, n, j) = e.similarity[j];
  }
}

// As many as slots in use. All lanes of the first warp take part. The length of the video, which says the same, is left
// to one block, which checks and then changes it: so no other has to be waited for.
__device__ __forceinline__ int stored_entries(const Entries& e) {
  int count = 0;
#pragma unroll 1
  for (int j = int(threadIdx.x); j <= e.M; j += 32) count += e.sizes[j] > 0;
  return warp_sum(count);
}

// By one thread of one block of a video.
__device__ __forceinline__ void set_length(const View<1>& length, int64_t b, int before, int after) {
  int32_t& held = *length.at<int32_t>(b);
  if (held != before) __trap();  // out of range, or a broken state
  held = after;
}

// All lanes of the first warp take part and get the same plan. `length`: entries before the step; append: a frame comes
// in.
__device__ __forceinline__ StepPlan plan_step(const Entries& e, bool append, int length) {
  StepPlan p{-1, -1, -1, -1, -1, -1, -1, length, 1, 1};
  const int M = e.M;
  if (p.length < 0 || p.length > M + 1) __trap();
  auto order = [&](int j) {
    const int slot = e.order[j];
    if (slot < 0 || slot > M) __trap();  // a broken state: better stop than write elsewhere
    return slot;
  };
  if (p.length == M + 1) {
    const int lane = int(threadIdx.x), first = lane < M ? lane : 0;
    ArgMax<float> best{e.similarity[first], first};
#pragma unroll 1
    for (int j = lane + 32; j < M; j += 32) best = better(best, {e.similarity[j], j});
    p.k = warp_argmax(best).index;
    p.keep = order(p.k), p.gone = order(p.k + 1);
    if (p.k > 0) p.left = order(p.k - 1);
    if (p.k + 2 <= M) p.right = order(p.k + 2);
    p.size0 = e.sizes[p.keep], p.size1 = e.sizes[p.gone];
    p.length = M;
  }
  if (append) {
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
__device__ __forceinline__ Mean<A> mean_of(bool weighted, const StepPlan& p) {
  return weighted ? Mean<A>(A(p.size0), A(p.size1)) : Mean<A>(A(1), A(1));
}

// Sums over a warp of 8 values; lane l gets that of value l % 8. An exchange halves what is left: 9 shuffles, not 40.
template <typename A>
__device__ __forceinline__ A warp_sums(A (&x)[8]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const A other = __shfl_xor_sync(kFullWarp, upper ? x[i] : x[i + half], half);
      x[i] = (upper ? x[i + half] : x[i]) + other;
    }
  }
  x[0] += __shfl_xor_sync(kFullWarp, x[0], 8);
  return x[0] + __shfl_xor_sync(kFullWarp, x[0], 16);
}

// Sums of a step are made by at most so many warps, one for 32 packs of a row.
template <int kSize>
__device__ __forceinline__ int sum_warps(int C) {
  return min((C + 32 * kSize - 1) / (32 * kSize), kMemoryWarps);
}

// By the first warp, when all have left step_rows: what the step makes of the entries.
template <typename A>
__device__ __forceinline__ void change_entries(const Entries& e, const StepPlan& p, const A* partial, int warps) {
  const int lane = int(threadIdx.x), M = e.M;
  A sum = 0;  // in lane l that of value l % 8
#pragma unroll 1
  for (int warp = lane / 8; warp < warps; warp += 4) sum += partial[8 * warp + lane % 8];
  sum += __shfl_xor_sync(kFullWarp, sum, 8);
  sum += __shfl_xor_sync(kFullWarp, sum, 16);
  if (p.k >= 0) {  // entries move up by one behind the merged pair
#pragma unroll 1
    for (int base = p.k; base < M; base += 32) {
      const int j = base + lane;
      const int slot = j < M ? e.order[j + 1] : 0;
      const float value = j + 1 < M ? e.similarity[j + 1] : 0;
      __syncwarp();
      if (j < M) {
        if (j > p.k) e.order[j] = slot;
        e.similarity[j] = value;
      }
      __syncwarp();
    }
  }
  // Lane 0: left and keep; lane 1: keep and right; lane 2: the newest before, and the frame.
  const int which = lane < 3 ? lane : 0;
  const A dot = __shfl_sync(kFullWarp, sum, 5 + which);
  const A xx = __shfl_sync(kFullWarp, sum, which == 0 ? 1 : which == 1 ? 0 : 3);
  const A yy = __shfl_sync(kFullWarp, sum, which == 0 ? 0 : 2 * which);
  // Does it exist? p.left >= 0 and so on say the same; they would be three registers while the rows are loaded.
  const bool there = which == 0 ? p.k > 0 : which == 1 ? p.k >= 0 && p.k + 2 <= M : p.target >= 0 && p.length > 0;
  const int place = which == 0 ? p.k - 1 : which == 1 ? p.k : p.length - 1;
  if (lane < 3 && there) e.similarity[place] = float(cosine(dot, xx, yy));
  if (lane == 0) {
    if (p.k >= 0) e.order[M] = p.gone, e.sizes[p.keep] += e.sizes[p.gone], e.sizes[p.gone] = 0;
    if (p.target >= 0) e.sizes[p.target] = 1;
  }
  __syncwarp();
}

enum StepRow { kKeep, kGone, kLeft, kRight, kLast, kTarget, kStepRows };

// What all warps of a block need of a step, in shared memory: the first one plans for all, as eleven that plan issue
// more than they load.
template <typename T>
struct Step {
  int64_t rows[kStepRows];  // of the bank, in elements from its first; -1: none; kLast: none too where it is kKeep
  StepPlan plan;
  Mean<Acc<T>> mean;
};

// By the first warp.
template <typename T>
__device__ __forceinline__ void publish(Step<T>& step, const StepPlan& p, const View<4>& bank, bool weighted, int64_t b,
                                        int64_t n) {
  const int lane = int(threadIdx.x);
  int slot = p.target;
  if (lane == kKeep) slot = p.keep;
  if (lane == kGone) slot = p.gone;
  if (lane == kLeft) slot = p.left;
  if (lane == kRight) slot = p.right;
  if (lane == kLast) slot = p.last == p.keep ? -1 : p.last;
  if (lane < kStepRows) {
    step.rows[lane] = slot < 0 ? -1 : b * bank.stride[0] + slot * bank.stride[1] + n * bank.stride[2];
  }
  if (lane == 0) step.plan = p, step.mean = mean_of<Acc<T>>(weighted, p);
}

// The rows of a step, each of C elements, of a bank and the frame that comes in, and sums for change_entries: of 32
// packs each, at partial. All threads of the block take part, each on its own columns, which so are the same in every
// step. Sums are those of kMemoryThreads threads or of as many as there are packs, however many the block has: the bits
// depend on nothing but the width.
template <typename T, bool kVectorized, typename Frame>
__device__ __forceinline__ void step_rows(const Step<T>& step, T* bank, const Frame* frame, int C, Acc<T>* partial) {
  using A = Acc<T>;
  constexpr int kSize = kPack<T, kVectorized>;
  const int lane = int(threadIdx.x) % 32, warps = sum_warps<kSize>(C);
#pragma unroll 1
  for (int warp = int(threadIdx.x) / 32; warp < warps; warp += int(blockDim.x) / 32) {
    // Squares of keep, left, right, newest, frame; then left keep, keep right, newest frame.
    A sums[8] = {};
#pragma unroll 1
    for (int c = (32 * warp + lane) * kSize; c < C; c += 32 * warps * kSize) {
      Raw<T, kVectorized> bits[kStepRows] = {};  // the frame's at kTarget, where it goes
#pragma unroll
      for (int i = 0; i < kTarget; ++i) {
        if (step.rows[i] >= 0) bits[i] = *reinterpret_cast<const Raw<T, kVectorized>*>(bank + step.rows[i] + c);
      }
      const int64_t target = step.rows[kTarget];
      if (target >= 0) bits[kTarget] = load_as<T, kVectorized>(frame + c);
      const bool older = step.rows[kLast] >= 0;
      const Mean<A> mean = step.mean;
      A keep[kSize], gone[kSize], left[kSize], right[kSize], newest[kSize], fresh[kSize];
      unpack_raw<T>(bits[kKeep], keep), unpack_raw<T>(bits[kGone], gone), unpack_raw<T>(bits[kLeft], left);
      unpack_raw<T>(bits[kRight], right), unpack_raw<T>(bits[kLast], newest), unpack_raw<T>(bits[kTarget], fresh);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        keep[i] = to_acc(from_acc<T>(mean(keep[i], gone[i])));  // as it is stored
        const A last = older ? newest[i] : keep[i];
        sums[0] += keep[i] * keep[i], sums[1] += left[i] * left[i], sums[2] += right[i] * right[i];
        sums[3] += last * last, sums[4] += fresh[i] * fresh[i];
        sums[5] += left[i] * keep[i], sums[6] += keep[i] * right[i], sums[7] += last * fresh[i];
      }
      if (step.rows[kKeep] >= 0) store_pack(bank + step.rows[kKeep] + c, keep);
      if (target >= 0) store_raw(bank + target + c, bits[kTarget]);
    }
    const A sum = warp_sums(sums);
    if (lane < 8) partial[8 * warp + lane] = sum;
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx::cuda {

// Rows are counted in 32 bits on the device: a 64-bit division is a subroutine call.
inline unsigned checked_rows(int64_t rows) {
  if (rows > 0x7fffffff) throw std::invalid_argument("memory bank: B * T * N must be below 2^31");
  return unsigned(rows);
}

// Columns too.
inline void check_columns(int64_t C) {
  if (C > 0x40000000) throw std::invalid_argument("memory bank: rows must have at most 2^30 elements");
}

// Threads of a block, as many as give one pack to each. Half of them where so many blocks do not fit the GPU at a time:
// then a second pass over the row is less to wait for than a second round of blocks.
template <typename T>
unsigned memory_threads(int64_t packs, unsigned positions) {
  const int64_t warps = std::min<int64_t>(std::max<int64_t>(ceil_div(packs, 32), 1), kMemoryWarps);
  constexpr int kResident = sizeof(T) == 2 ? 20 : 22;  // warps that the registers of a multiprocessor are enough for
  const int64_t at_a_time = device_attribute(cudaDevAttrMultiProcessorCount) * (kResident / warps);
  return unsigned(32 * (positions <= at_a_time ? warps : (warps + 1) / 2));
}

// The bytes of shared memory for the entries of a position.
inline size_t entries_smem(const char* op, const View<3>& order, int words) {
  const size_t bytes = size_t(order.size[2]) * words * sizeof(int32_t);
  if (bytes + 2048 > device_smem()) throw std::invalid_argument(std::string(op) + ": M is too large for shared memory");
  return bytes;
}

template <typename F>
void visit_floating(const char* op, DType dtype, F&& f) {
  visit_dtype<float, double, __half, __nv_bfloat16>(op, dtype, f);
}

}  // namespace pyvidx::cuda
#endif
