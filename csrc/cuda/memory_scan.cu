// t steps of a memory bank in one launch: one block per position (b, n) walks all frames. The state of its position
// lives in shared memory, the rows of its bank in the caches, and the frame after the next step's choice is prefetched
// to L2: a step waits for loads that depend on the choice before it, never for device memory. The length of a video is
// changed by the block of its first position, and read by no other.
//
// The replay gives each thread 16 bytes of the width: it walks the steps and reads only what it wrote itself, so
// nothing is synchronized. It copies four rows at a time, all loads first (SASS of sm_90: 4 loads in a row instead of
// one, 40 registers instead of 31). Traffic: M + 1 + t rows read, M + 1 + 2t and the slots that changed written; those,
// and two rows per merge, are read again from a cache.
#include "memory_step.cuh"
#include "pyvidx/memory_scan.h"

namespace pyvidx::cuda {

constexpr int kReplayThreads = 128;
constexpr int kReplayAhead = 4;  // rows that are under way together

// What shared memory holds per slot: size, slot in time order, similarity, id of the row.
constexpr int kScanWords = 4;

// Bring a row of C elements to L2, one line per thread.
template <typename T>
__device__ __forceinline__ void prefetch_row(const T* row, int64_t C) {
  constexpr int kLine = 128 / sizeof(T);
  for (int64_t c = int64_t(threadIdx.x) * kLine; c < C; c += kMemoryThreads * kLine) prefetch_l2(row + c);
}

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kMemoryThreads, kMemoryBlocks) void memory_scan_kernel(MemoryScanArgs a) {
  const unsigned N = unsigned(a.bank.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  const int slots = int(a.order.size[2]), t = int(a.frames.size[1]), thread = int(threadIdx.x);
  const bool on = !a.active || *a.active.at<const int32_t>(b) != 0;
  int length = stored_entries(a.sizes, b, n);
  if (on && n == 0 && thread == 0) set_length(a.length, b, length, length + t < slots ? length + t : slots);
  PYVIDX_SHARED(int32_t, sizes);
  int32_t *const order = sizes + slots, *const ids = order + slots;
  float* const similarity = reinterpret_cast<float*>(ids + slots);
  for (int j = thread; j < slots; j += kMemoryThreads) {
    sizes[j] = *a.sizes.at<const int32_t>(b, n, j), order[j] = *a.order.at<const int32_t>(b, n, j), ids[j] = j;
    if (j + 1 < slots) similarity[j] = *a.similarity.at<const float>(b, n, j);
  }
  __syncthreads();

  MemoryStepArgs step{};
  auto local = [&](View<3>& view, const View<3>& like, void* data) {
    view.data = data, view.dtype = like.dtype, view.stride[2] = 1;
    view.size[0] = like.size[0], view.size[1] = like.size[1], view.size[2] = like.size[2];
  };
  local(step.sizes, a.sizes, sizes), local(step.order, a.order, order),
      local(step.similarity, a.similarity, similarity);
  step.bank = a.bank, step.weighted = a.weighted;
  for (int s = 0; s < t; ++s) {
    if (on) {
      step.frame.data = a.frames.at<T>(b, s, n);  // strides 0
      if (s + 1 < t) prefetch_row(a.frames.at<const T>(b, s + 1, n), a.frames.size[3]);
      const StepPlan p = plan_step(step, b, n, length);
      run_step<T, kVectorized>(step, p, b, n);
      length = p.length + 1;
      if (thread == 0) {
        int32_t* const sources = a.sources.at<int32_t>(b, s, n);
        int32_t* const counts = a.counts.at<int32_t>(b, s, n);
        sources[0] = sources[1] = -1, counts[0] = counts[1] = 0;
        if (p.k >= 0) {
          sources[0] = ids[p.keep], sources[1] = ids[p.gone], counts[0] = p.size0, counts[1] = p.size1;
          ids[p.keep] = slots + t + s;
        }
        ids[p.target] = slots + s;
      }
      __syncthreads();
    } else if (thread < 2) {
      a.sources.at<int32_t>(b, s, n)[thread] = -1;
      a.counts.at<int32_t>(b, s, n)[thread] = 0;
    }
    for (int j = thread; j < slots; j += kMemoryThreads) {  // read before the next run_step changes it
      *a.table.at<int32_t>(b, s, n, j) = j < length ? ids[order[j]] : -1;
    }
  }
  if (!on) return;
  for (int j = thread; j < slots; j += kMemoryThreads) {
    *a.sizes.at<int32_t>(b, n, j) = sizes[j], *a.order.at<int32_t>(b, n, j) = order[j];
    if (j + 1 < slots) *a.similarity.at<float>(b, n, j) = similarity[j];
  }
}

template <typename T, bool kVectorized>
struct RawPack {
  using type = uint4;
};
template <typename T>
struct RawPack<T, false> {
  using type = T;
};
template <typename T>
__device__ __forceinline__ void store_raw(T* p, T x) {
  *p = x;
}
__device__ __forceinline__ void store_raw(void* p, uint4 x) { store16(p, x); }

// A pack of each of `count` rows, several under way at once: a store is a wall for the loads behind it.
template <typename Pack, typename From, typename To>
__device__ __forceinline__ void copy_rows(int count, From from, To to) {
#pragma unroll 1
  for (int first = 0; first < count; first += kReplayAhead) {
    Pack packs[kReplayAhead];
#pragma unroll
    for (int i = 0; i < kReplayAhead; ++i) {
      if (first + i < count) packs[i] = *reinterpret_cast<const Pack*>(from(first + i));
    }
#pragma unroll
    for (int i = 0; i < kReplayAhead; ++i) {
      if (first + i >= count) break;
      store_raw(to(first + i), packs[i]);
    }
  }
}

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kReplayThreads) void memory_replay_kernel(MemoryReplayArgs a) {
  constexpr int kSize = kPack<T, kVectorized>;
  using Raw = typename RawPack<T, kVectorized>::type;
  const unsigned N = unsigned(a.rows.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  const int slots = int(a.rows.size[1]), t = int(a.frames.size[1]);
  const int64_t c = (int64_t(blockIdx.y) * kReplayThreads + threadIdx.x) * kSize;
  if (c >= a.rows.size[3]) return;
  copy_rows<Raw>(
      slots, [&](int j) { return a.rows.at<const T>(b, j, n) + c; },
      [&](int j) { return a.extended.at<T>(b, j, n) + c; });
  copy_rows<Raw>(
      t, [&](int s) { return a.frames.at<const T>(b, s, n) + c; },
      [&](int s) { return a.extended.at<T>(b, slots + s, n) + c; });
  for (int s = 0; s < t; ++s) {
    const int32_t* const sources = a.sources.at<const int32_t>(b, s, n);
    const int32_t* const counts = a.counts.at<const int32_t>(b, s, n);
    const int first = sources[0], second = sources[1];
    Acc<T> x[kSize] = {};
    if (first >= 0) {
      auto written = [&](int id) { return id >= 0 && (id < slots + s || (id >= slots + t && id < slots + t + s)); };
      if (!written(first) || !written(second)) __trap();  // a broken plan: better stop than read elsewhere
      const Mean<Acc<T>> mean = a.weighted ? Mean<Acc<T>>(Acc<T>(counts[0]), Acc<T>(counts[1])) : Mean<Acc<T>>(1, 1);
      Acc<T> y[kSize];
      load_pack(a.extended.at<const T>(b, first, n) + c, x), load_pack(a.extended.at<const T>(b, second, n) + c, y);
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = mean(x[i], y[i]);
    }
    store_pack(a.extended.at<T>(b, slots + t + s, n) + c, x);
  }
#pragma unroll 1                     // unrolled, it spills on sm_70
  for (int j = 0; j < slots; ++j) {  // a row from before this clip lies where it lay
    const int id = *a.table.at<const int32_t>(b, t - 1, n, j), slot = *a.order.at<const int32_t>(b, n, j);
    if (id >= slots + 2 * t || slot < 0 || slot >= slots || (id >= 0 && id < slots && id != slot)) __trap();
    if (id < slots) continue;
    Acc<T> x[kSize];
    load_pack(a.extended.at<const T>(b, id, n) + c, x);
    store_pack(a.rows.at<T>(b, slot, n) + c, x);
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

void memory_scan_cuda(const MemoryScanArgs& args, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.bank.size[0] * args.bank.size[2]);
  if (rows == 0 || args.frames.size[1] == 0) return;
  const size_t smem = size_t(args.order.size[2]) * kScanWords * sizeof(int32_t);
  if (smem + 1024 > device_smem()) throw std::invalid_argument("memory_scan_: M is too large for shared memory");
  visit_floating("memory_scan_", args.bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (vectorizable<T>(args.bank) && vectorizable<T>(args.frames)) {
      set_max_dynamic_smem(memory_scan_kernel<T, true>, smem);
      PYVIDX_LAUNCH((memory_scan_kernel<T, true>), rows, kMemoryThreads, smem, stream, args);
    } else {
      set_max_dynamic_smem(memory_scan_kernel<T, false>, smem);
      PYVIDX_LAUNCH((memory_scan_kernel<T, false>), rows, kMemoryThreads, smem, stream, args);
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
