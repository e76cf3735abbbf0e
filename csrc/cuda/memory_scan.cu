// t steps of a memory bank in one launch: one block per position (b, n) walks all frames. The state of its position
// lives in shared memory, the rows of its bank in the caches, and the next frame is on its way to registers: a step
// waits for loads that depend on the choice before it, never for device memory. The last warp plans, the others take
// rows. The length of a video is changed by the block of its first position, and read by no other. memory_step.cuh has
// the versions of the step.
//
// The replay gives each thread 16 bytes of the width: it walks the steps and reads only what it wrote itself, so
// nothing is synchronized. Traffic: M + 1 + t rows read, M + 1 + 2t and the slots that changed written; those, and two
// rows per merge, are read again from a cache. Versions (registers of sm_70 and sm_90; rounds of loads that wait for
// each other, M = 20, t = 16):
//   a row at a time                                   32, 31    37 to copy, 32 to merge, 42 to put back
//   four rows copied at a time                        40, 40    10, 32, 42
//   merges named ahead, rows put back four at a time  48, 40    10, 17, 12
//   rows seven at a time, merges four, ids checked first  80, 80    24 in all; predicted .96 of a copy on an H100 where
//                                                     it was .79, .89 on an H200 where it was .61   kept
#include "memory_step.cuh"
#include "pyvidx/memory_scan.h"

namespace pyvidx::cuda {

constexpr int kReplayThreads = 128, kReplayBlocks = 6;  // of a multiprocessor: without, ptxas spills at sm_100
constexpr int kReplayAhead = 7;                         // rows that a thread has under way together
template <typename T>
constexpr int kMergeAhead = sizeof(T) == 8 ? 2 : 4;  // merges

constexpr int kScanWords = kEntryWords + 1;  // of shared memory per slot: its entry, and the id of its row

constexpr int kScanThreads = kMemoryThreads + 32;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 750
constexpr int kScanBound =
    14 * 32;  // so that four blocks of half the threads fit, and MA-LMM's positions are one round
#else
constexpr int kScanBound = kScanThreads;
#endif

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kScanBound, kMemoryBlocks<T>) void memory_scan_kernel(MemoryScanArgs a) {
  constexpr int kSize = kPack<T, kVectorized>;
  const unsigned N = unsigned(a.bank.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  const int slots = int(a.order.size[2]), t = int(a.frames.size[1]), C = int(a.bank.size[3]);
  const int thread = int(threadIdx.x), lane = thread % 32, own = int(blockDim.x) / 32 - 1;
  const bool plans = thread / 32 == own;
  PYVIDX_SHARED(int32_t, shared);
  __shared__ __align__(16) unsigned char step_bytes[sizeof(Step<T>)], sums[sizeof(Acc<T>) * 8 * kMemoryWarps];
  Step<T>& step = *held(reinterpret_cast<Step<T>*>(step_bytes));
  Acc<T>* const partial = held(reinterpret_cast<Acc<T>*>(sums));
  const Entries e = entries_in(held(shared), a.similarity);
  int32_t* const ids = e.sizes + kEntryWords * slots;
  load_entries(e, a.sizes, a.order, a.similarity, b, n);
  for (int j = thread; j < slots; j += int(blockDim.x)) ids[j] = j;
  __syncthreads();

  int length = plans ? stored_entries(e) : 0;
  auto write = [&](int s, int from, int size) {
    if (lane < 2) *a.sources.at<int32_t>(b, s, n, lane) = from, *a.counts.at<int32_t>(b, s, n, lane) = size;
#pragma unroll 1
    for (int j = lane; j < slots; j += 32) *a.table.at<int32_t>(b, s, n, j) = j < length ? ids[e.order[j]] : -1;
  };
  if (a.active && *a.active.at<const int32_t>(b) == 0) {
    for (int s = 0; s < t && plans; ++s) write(s, -1, 0);
    return;
  }
  if (n == 0 && plans && lane == 0) set_length(a.length, b, length, length + t < slots ? length + t : slots);
  FramePacks<T, kVectorized> frames(a.frames.at<const T>(b, 0, n), a.frames.stride[1], plans ? 0 : t, thread * kSize,
                                    C);
  int place = -1;
#pragma unroll 1
  for (int s = 0; s < t; ++s) {
    if (plans) plan_step(step, e, true, length, a.bank, a.weighted, b, n);
    __syncthreads();
    if (plans) {
      const StepPlan p = step.plan;
      const int keep = p.slot[kKeep], slot = lane == 0 ? keep : p.slot[kGone];
      const int from = p.k < 0 ? -1 : ids[slot], size = lane == 0 ? p.size0 : p.size1;
      __syncwarp();
      if (lane == 0) {
        if (p.k >= 0) ids[keep] = slots + t + s;
        ids[p.slot[kTarget]] = slots + s;
      }
      length = p.length + 1;
      place = move_entries(e, p);
      write(s, from, p.k < 0 ? 0 : size);
    } else {
      step_rows<T, kVectorized>(step, frames, C, partial, own);
    }
    __syncthreads();
    if (plans) renew_similarities(e, place, partial, sum_warps<kSize>(C));
  }
  if (plans) store_entries(e, a.sizes, a.order, a.similarity, b, n);
}

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kReplayThreads, kReplayBlocks) void memory_replay_kernel(MemoryReplayArgs a) {
  constexpr int kSize = kPack<T, kVectorized>;
  using Pack = Raw<T, kVectorized>;
  const unsigned N = unsigned(a.rows.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  const int slots = int(a.rows.size[1]), t = int(a.frames.size[1]);
  const int64_t c = (int64_t(blockIdx.y) * kReplayThreads + threadIdx.x) * kSize;
  if (c >= a.rows.size[3]) return;
  copy_packs<Pack, kReplayAhead>(
      slots, [&](int j) { return a.rows.at<const T>(b, j, n) + c; },
      [&](int j) { return a.extended.at<T>(b, j, n) + c; });
  copy_packs<Pack, kReplayAhead>(
      t, [&](int s) { return a.frames.at<const T>(b, s, n) + c; },
      [&](int s) { return a.extended.at<T>(b, slots + s, n) + c; });
  // A few steps' rows at a time, but for those that these steps make themselves.
  constexpr int kMerges = kMergeAhead<T>;
#pragma unroll 1
  for (int from = 0; from < t; from += kMerges) {
    int source[kMerges][2];
    Pack packs[kMerges][2] = {};
    Acc<T> weight[kMerges][2];
    const int made = slots + t + from;  // the id of the first row of these steps
#pragma unroll
    for (int i = 0; i < kMerges; ++i) {
      const int s = from + i;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        source[i][which] = s < t ? *a.sources.at<const int32_t>(b, s, n, which) : -1;
        weight[i][which] = s < t && a.weighted ? Acc<T>(*a.counts.at<const int32_t>(b, s, n, which)) : Acc<T>(1);
      }
    }
    bool whole = true;
#pragma unroll
    for (int i = 0; i < kMerges; ++i) {
      const int s = from + i;
      auto written = [&](int id) { return id >= 0 && (id < slots + s || (id >= slots + t && id < slots + t + s)); };
      whole = whole && (source[i][0] < 0 || (written(source[i][0]) && written(source[i][1])));
    }
    if (!whole) __trap();  // a broken plan: better stop than read elsewhere
#pragma unroll
    for (int i = 0; i < kMerges; ++i) {
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const int id = source[i][which];
        if (source[i][0] >= 0 && id < made) {
          packs[i][which] = *reinterpret_cast<const Pack*>(a.extended.at<const T>(b, id, n) + c);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kMerges; ++i) {
      if (from + i >= t) break;
      Acc<T> x[kSize] = {};
      if (source[i][0] >= 0) {
        const Mean<Acc<T>> mean(weight[i][0], weight[i][1]);
        Acc<T> y[kSize];
        unpack_raw<T>(packs[i][0], x), unpack_raw<T>(packs[i][1], y);
#pragma unroll
        for (int e = 0; e < kSize; ++e) x[e] = mean(x[e], y[e]);
      }
      const Pack result = pack_raw<T, kVectorized>(x);
      store_raw(a.extended.at<T>(b, made + i, n) + c, result);
#pragma unroll
      for (int later = i + 1; later < kMerges; ++later) {
#pragma unroll
        for (int which = 0; which < 2; ++which) {
          if (source[later][which] == made + i) packs[later][which] = result;
        }
      }
    }
  }
#pragma unroll 1
  for (int first = 0; first < slots; first += kReplayAhead) {
    int id[kReplayAhead], slot[kReplayAhead];
    Pack packs[kReplayAhead];
#pragma unroll
    for (int i = 0; i < kReplayAhead; ++i) {
      id[i] = slot[i] = -1;
      if (first + i >= slots) continue;
      id[i] = *a.table.at<const int32_t>(b, t - 1, n, first + i), slot[i] = *a.order.at<const int32_t>(b, n, first + i);
    }
    bool whole = true;
#pragma unroll
    for (int i = 0; i < kReplayAhead; ++i) {  // a row from before this clip lies where it lay
      const bool lies = id[i] < 0 || id[i] >= slots || id[i] == slot[i];
      whole = whole && (first + i >= slots || (id[i] < slots + 2 * t && slot[i] >= 0 && slot[i] < slots && lies));
    }
    if (!whole) __trap();
#pragma unroll
    for (int i = 0; i < kReplayAhead; ++i) {
      if (id[i] >= slots) packs[i] = *reinterpret_cast<const Pack*>(a.extended.at<const T>(b, id[i], n) + c);
    }
#pragma unroll
    for (int i = 0; i < kReplayAhead; ++i) {
      if (id[i] >= slots) store_raw(a.rows.at<T>(b, slot[i], n) + c, packs[i]);
    }
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

void memory_scan_cuda(const MemoryScanArgs& args, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.bank.size[0] * args.bank.size[2]);
  if (rows == 0 || args.frames.size[1] == 0) return;
  check_columns(args.bank.size[3]);
  const size_t smem = entries_smem("memory_scan_", args.order, kScanWords);
  visit_floating("memory_scan_", args.bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool vectorized = vectorizable<T>(args.bank) && vectorizable<T>(args.frames);
    const unsigned threads = memory_threads<T>(ceil_div(args.bank.size[3], vectorized ? kVec<T> : 1), rows) + 32;
    if (vectorized) {
      set_max_dynamic_smem(memory_scan_kernel<T, true>, smem);
      PYVIDX_LAUNCH((memory_scan_kernel<T, true>), rows, threads, smem, stream, args);
    } else {
      set_max_dynamic_smem(memory_scan_kernel<T, false>, smem);
      PYVIDX_LAUNCH((memory_scan_kernel<T, false>), rows, threads, smem, stream, args);
    }
  });
  check_launch("memory_scan_kernel");
}

void memory_replay_cuda(const MemoryReplayArgs& args, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.rows.size[0] * args.rows.size[2]);
  const int64_t W = args.rows.size[3];
  if (rows == 0 || W == 0) return;
  visit_floating("memory_replay_", args.rows.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool vectorized =
        vectorizable<T>(args.rows) && vectorizable<T>(args.frames) && vectorizable<T>(args.extended);
    const int64_t columns = kReplayThreads * (vectorized ? kVec<T> : 1);
    const Grid grid(rows, ceil_div(W, columns));
    if (vectorized) {
      PYVIDX_LAUNCH((memory_replay_kernel<T, true>), grid, kReplayThreads, 0, stream, args);
    } else {
      PYVIDX_LAUNCH((memory_replay_kernel<T, false>), grid, kReplayThreads, 0, stream, args);
    }
  });
  check_launch("memory_replay_kernel");
}

}  // namespace pyvidx
#endif
