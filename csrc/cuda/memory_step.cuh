// One step of a memory bank at one position, by one block. Shared by the streaming step (memory_merge) and the walk
// over a clip (memory_scan), which so give the same bits.
//
// One warp finds the pair, from a copy of the position's entries in shared memory, and later changes them; all others
// take the rows between, one pack of each a thread. Versions, for 1408 floats in a clip (registers of sm_70 and sm_90
// by SASS; instructions of all warps at a position and step; bytes at a position that are under way together; cycles of
// a step that has an H100 for itself, predicted):
//   128 threads, three passes, all warps plan      90, 80    4,160   5 barriers   12 KB
//   352 threads, one pass, all warps plan          80, 80    7,900   2 barriers   34 KB   thrown away: bound by issue
//   352 threads, one pass, the first warp plans    66, 66    3,420   2 barriers   34 KB   3,990
//   352 threads and a warp that plans              72, 80    2,690   2 barriers   39 KB   1,640   kept: of a copy .96
//       on an H100 where it was .67, .87 on an H200 where it was .50
// In the last, a lane plans for each row, and the largest similarity is a maximum of integers; entries move while rows
// are read; the next frame is loaded a step ahead; a row that is not there is another one, so that loads have no
// conditions; the frame is stored before anything is computed, so that ptxas puts no load behind that.
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
      : s0(first), s1(second), total(first + second), inverse(reciprocal(total)) {}
  __device__ __forceinline__ A operator()(A x, A y) const {
    const A dividend = x * s0 + y * s1, quotient = dividend * inverse;
    return (dividend - quotient * total) * inverse + quotient;
  }
};

enum StepRow { kKeep, kGone, kLeft, kRight, kLast, kTarget, kStepRows };

// What one step does at one position.
struct StepPlan {
  int k;                // the merged pair is (k, k + 1) in time; -1: nothing merges
  int length;           // after the merge
  int size0, size1;     // frames in the pair
  int slot[kStepRows];  // the pair, its neighbors in time, the newest entry after the merge and where the frame goes;
                        // -1: none, of the newest also where it is the merged one
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
    const int slot = *order.at<const int32_t>(b, n, j);
    if (slot < 0 || slot > e.M) __trap();  // a broken state: better stop than write elsewhere
    e.sizes[j] = *sizes.at<const int32_t>(b, n, j), e.order[j] = slot;
    if (j < e.M) e.similarity[j] = *similarity.at<const float>(b, n, j);
  }
}

// By one warp.
__device__ __forceinline__ void store_entries(const Entries& e, const View<3>& sizes, const View<3>& order,
                                              const View<3>& similarity, int64_t b, int64_t n) {
#pragma unroll 1
  for (int j = int(threadIdx.x) % 32; j <= e.M; j += 32) {
    *sizes.at<int32_t>(b, n, j) = e.sizes[j], *order.at<int32_t>(b, n, j) = e.order[j];
    if (j < e.M) *similarity.at<float>(b, n, j) = e.similarity[j];
  }
}

// As many as slots in use. All lanes of a warp take part. The length of the video, which says the same, is left
// to one block, which checks and then changes it: so no other has to be waited for.
__device__ __forceinline__ int stored_entries(const Entries& e) {
  int count = 0;
#pragma unroll 1
  for (int j = int(threadIdx.x) % 32; j <= e.M; j += 32) count += e.sizes[j] > 0;
  return warp_sum(count);
}

// By one thread of one block of a video.
__device__ __forceinline__ void set_length(const View<1>& length, int64_t b, int before, int after) {
  int32_t& held = *length.at<int32_t>(b);
  if (held != before) __trap();  // out of range, or a broken state
  held = after;
}

// Numbers that are ordered as the floats are, with NaN above all: their maximum is one instruction from sm_80 on.
__device__ __forceinline__ unsigned rank_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);  // one zero
  return x != x ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
}

// The most similar pair, the first one on ties. All lanes of a warp take part.
__device__ __forceinline__ int most_similar(const Entries& e) {
  const int lane = int(threadIdx.x) % 32;
  unsigned best = 0, place = ~0u;
#pragma unroll 1
  for (int j = lane; j < e.M; j += 32) {
    const unsigned rank = rank_of(e.similarity[j]);
    if (rank > best) best = rank, place = unsigned(j);
  }
  const unsigned most = warp_max(best);
  return int(~warp_max(best == most ? ~place : 0u));
}

// A pack of global memory, whose address has been in shared memory.
template <typename Pack, typename T>
__device__ __forceinline__ Pack load_row(const T* p) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(p));
#endif
  return *reinterpret_cast<const Pack*>(p);
}

template <typename A>
__device__ __forceinline__ Mean<A> mean_of(bool weighted, int size0, int size1) {
  return weighted ? Mean<A>(A(size0), A(size1)) : Mean<A>(A(1), A(1));
}

// What all warps of a block need of a step, in shared memory: one plans for all, as eleven that plan issue more than
// they load.
template <typename T>
struct Step {
  T* row[kStepRows];  // another of them where there is none: what is read then is not used
  StepPlan plan;
  Mean<Acc<T>> mean;
};

// By one warp: the plan of a step, a lane for each row. `length`: entries before the step; append: a frame comes in.
template <typename T>
__device__ __forceinline__ void plan_step(Step<T>& step, const Entries& e, bool append, int length, const View<4>& bank,
                                          bool weighted, int64_t b, int64_t n) {
  const int lane = int(threadIdx.x) % 32, M = e.M;
  const bool merges = length == M + 1;
  const int k = merges ? most_similar(e) : -1, newest = (merges ? M : length) - 1;
  int place = merges ? k + 1 : -1;  // in time; of the pair's second
  if (lane == kTarget) place = !append ? -1 : merges ? k + 1 : length;
  if (lane == kKeep) place = k;
  if (lane == kLeft) place = k - 1;
  if (lane == kRight) place = merges && k + 2 <= M ? k + 2 : -1;
  if (lane == kLast) place = !append || k == newest ? -1 : newest + merges;
  const int other = merges ? k : newest < 0 ? 0 : newest;  // a row that is read anyway
  const int held = e.order[place < 0 ? other : place], slot = place < 0 ? -1 : held;
  T* const row = bank.at<T>(b, held, n);
  const int size = merges && slot >= 0 ? e.sizes[slot] : 1;
  const int size0 = __shfl_sync(kFullWarp, size, kKeep), size1 = __shfl_sync(kFullWarp, size, kGone);
  const Mean<Acc<T>> mean = mean_of<Acc<T>>(weighted, size0, size1);
  if (lane < kStepRows) {
    step.plan.slot[lane] = slot;
    step.row[lane] = row;
  }
  if (lane == 0) {
    step.plan.k = k, step.plan.length = newest + 1, step.plan.size0 = size0, step.plan.size1 = size1;
    step.mean = mean;
  }
  __syncwarp();
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

// By one warp: entries move up by one behind the merged pair, sizes change. Where in time the similarity is that the
// step changes and this lane knows (renew_similarities); -1: none.
__device__ __forceinline__ int move_entries(const Entries& e, const StepPlan& p) {
  const int lane = int(threadIdx.x) % 32, M = e.M, target = p.slot[kTarget];
  if (p.k >= 0) {
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
  if (lane == 0) {
    if (p.k >= 0) e.order[M] = p.slot[kGone], e.sizes[p.slot[kKeep]] = p.size0 + p.size1, e.sizes[p.slot[kGone]] = 0;
    if (target >= 0) e.sizes[target] = 1;
  }
  __syncwarp();
  if (lane == 0 && p.slot[kLeft] >= 0) return p.k - 1;
  if (lane == 1 && p.slot[kRight] >= 0) return p.k;
  return lane == 2 && target >= 0 ? p.length - 1 : -1;
}

// By the same warp, behind that and when all have left step_rows. Lane 0: left and keep; lane 1: keep and right; lane
// 2: the newest before, and the frame.
template <typename A>
__device__ __forceinline__ void renew_similarities(const Entries& e, int place, const A* partial, int warps) {
  const int lane = int(threadIdx.x) % 32;
  A sum = 0;  // in lane l that of value l % 8
#pragma unroll
  for (int i = 0; i < kMemoryWarps; i += 4) {
    if (i + lane / 8 < warps) sum += partial[8 * i + lane];
  }
  sum += __shfl_xor_sync(kFullWarp, sum, 8);
  sum += __shfl_xor_sync(kFullWarp, sum, 16);
  const int which = lane < 3 ? lane : 0;
  const A dot = __shfl_sync(kFullWarp, sum, 5 + which);
  const A xx = __shfl_sync(kFullWarp, sum, which == 0 ? 1 : which == 1 ? 0 : 3);
  const A yy = __shfl_sync(kFullWarp, sum, which == 0 ? 0 : 2 * which);
  if (place >= 0) e.similarity[place] = float(cosine(dot, xx, yy));
  __syncwarp();
}

// The packs of frames that a thread takes, in their order. Each is loaded when the one before has been taken: a step
// waits for no row from device memory.
template <typename T, bool kVectorized, typename Frame = T>
struct FramePacks {
  using Pack = Raw<T, kVectorized>;
  const Frame* frame;
  int64_t step;          // elements from a frame to the next
  int frames, first, C;  // frames that are left; the thread's first column
  Pack pack = {};

  __device__ __forceinline__ FramePacks(const Frame* frame, int64_t step, int frames, int first, int C)
      : frame(frame), step(step), frames(frames), first(first), C(C) {
    if (frames > 0 && first < C) pack = load_as<T, kVectorized>(frame + first);
  }
  // The pack at column c; where that is beyond the last one, the next frame's first.
  __device__ __forceinline__ void fetch(int c) {
    if (c >= C) frame += step, --frames, c = first;
    if (frames > 0) pack = load_as<T, kVectorized>(frame + c);
  }
};

// The rows of a step, each of C elements, and sums for renew_similarities: of 32 packs each, at partial. All threads of
// the first `own` warps take part, each on its own columns, which so are the same in every step. Sums are those of
// kMemoryThreads threads or of as many as there are packs, however many the block has: the bits depend on nothing but
// the width.
template <typename T, bool kVectorized, typename Frames>
__device__ __forceinline__ void step_rows(const Step<T>& step, Frames& frames, int C, Acc<T>* partial, int own) {
  using A = Acc<T>;
  constexpr int kSize = kPack<T, kVectorized>;
  using Pack = Raw<T, kVectorized>;
  const int lane = int(threadIdx.x) % 32, warps = sum_warps<kSize>(C);
#pragma unroll 1
  for (int warp = int(threadIdx.x) / 32; warp < warps; warp += own) {
    // Squares of keep, left, right, newest, frame; then left keep, keep right, newest frame.
    A sums[8] = {};
#pragma unroll 1
    for (int c = (32 * warp + lane) * kSize; c < C;) {
      Pack bits[kTarget];
#pragma unroll
      for (int i = 0; i < kTarget; ++i) bits[i] = load_row<Pack>(step.row[i] + c);
      T *const merged = step.row[kKeep] + c, *const target = step.row[kTarget] + c;
      const bool merges = step.plan.k >= 0, appends = step.plan.slot[kTarget] >= 0, older = step.plan.slot[kLast] >= 0;
      const Mean<A> mean = step.mean;
      if (appends) store_raw(target, frames.pack);  // where `gone` was; all rows are on their way before it
      A keep[kSize], gone[kSize], left[kSize], right[kSize], newest[kSize], fresh[kSize];
      unpack_raw<T>(bits[kKeep], keep), unpack_raw<T>(bits[kGone], gone), unpack_raw<T>(bits[kLeft], left);
      unpack_raw<T>(bits[kRight], right), unpack_raw<T>(bits[kLast], newest), unpack_raw<T>(frames.pack, fresh);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        keep[i] = to_acc(from_acc<T>(mean(keep[i], gone[i])));  // as it is stored
        const A last = older ? newest[i] : keep[i];
        sums[0] += keep[i] * keep[i], sums[1] += left[i] * left[i], sums[2] += right[i] * right[i];
        sums[3] += last * last, sums[4] += fresh[i] * fresh[i];
        sums[5] += left[i] * keep[i], sums[6] += keep[i] * right[i], sums[7] += last * fresh[i];
      }
      if (merges) store_pack(merged, keep);
      c += 32 * warps * kSize;
      frames.fetch(c < C ? c : warp + own < warps ? (32 * (warp + own) + lane) * kSize : C);
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
