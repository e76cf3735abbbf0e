// What the forward and backward kernels of bank_attention share: tiles of keys that a table names.
#pragma once
#include "attention.cuh"
#include "pyvidx/bank_attention.h"

namespace pyvidx::cuda {

constexpr int kBankWarps = int(kBankAttentionWarps), kBankThreads = 32 * kBankWarps, kMergeThreads = 256;
template <typename T>
constexpr int kBankTiles = sizeof(T) == 2   ? 8
                           : sizeof(T) == 4 ? 4
                                            : 1;  // double is for checking gradients

// d. A division in 64 bits takes about 100 instructions.
__device__ __forceinline__ int head_width(const BankAttentionInput& a) {
  return int(unsigned(a.q.size[3]) / unsigned(a.heads));
}

// What a warp of the kernels that walk over keys works on: 16 queries of one head, and of one split of the keys the
// part that is threadIdx.y's. Warps that follow each other in x have the same keys, or those of the next step, most of
// which are the same rows: they find them in L1.
struct BankTask {
  unsigned b, s, h, split, first, last, L;  // keys, L of each position
  int q0, n, d;
  bool active;  // otherwise it has no keys and no queries
  __device__ __forceinline__ BankTask(const BankAttentionInput& a, int64_t splits) {
    const unsigned groups = unsigned(a.q.size[2] + 15) / 16, steps = unsigned(a.q.size[1]), heads = unsigned(a.heads);
    unsigned rest = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    q0 = int(rest % groups) * 16, rest /= groups;
    s = rest % steps, rest /= steps;
    split = rest % unsigned(splits), rest /= unsigned(splits);
    h = rest % heads, b = rest / heads;
    active = b < a.q.size[0];
    L = unsigned(a.table ? a.table.size[3] : a.rows.size[1]);
    const unsigned keys = active ? unsigned(a.rows.size[2]) * L : 0, pieces = unsigned(splits) * blockDim.y;
    const unsigned each = (keys + pieces - 1) / pieces;
    first = (split * blockDim.y + threadIdx.y) * each, last = first + each < keys ? first + each : keys;
    n = int(a.q.size[2]), d = head_width(a);
    if (!active) q0 = n;
  }
  __device__ __forceinline__ int64_t head(const BankAttentionInput& a) const {
    return (int64_t(b) * a.q.size[1] + s) * a.heads + h;
  }
};

// The n queries, or their gradients, of one head and step of x [B, t, n, H * d].
template <typename T, int kD>
__device__ __forceinline__ auto rows_of_head(const View<4>& x, int64_t b, int64_t s, int64_t h, int d) {
  using Stride = typename StrideOf<kD>::type;
  return Rows<T, Stride>{x.at<T>(b, s, 0, h * d), Stride(x.stride[2] * int64_t(sizeof(T))), int(x.size[2]), d};
}

// The 16 rows that stay on a warp's left side: in registers, where there is room for them.
template <typename T, int kD>
constexpr bool kHeld = kD == 64 && sizeof(T) == 2;
template <typename T, int kD, typename R>
__device__ __forceinline__ auto held(const R& rows) {
  if constexpr (kHeld<T, kD>) {
    return HeldRows<T, kD>(rows);
  } else {
    return rows;
  }
}

// Warps among which a task's keys may be parted; those of double would not leave room for what they find.
template <typename T>
constexpr int kBankParts = sizeof(T) == 8 ? 4 : kBankWarps;

// What warps have found that parted a task's keys goes to the first of them.
template <typename T, typename Found>
__device__ __forceinline__ void gather_parts(Found& found) {
  __shared__ typename Found::Storage others[kBankParts<T> / 2];
  for (unsigned parts = blockDim.y / 2; parts > 0; parts /= 2) {  // the upper half of them to the lower
    auto& other = others[threadIdx.y % parts * (blockDim.x / 32) + threadIdx.x / 32];
    __syncthreads();  // the last ones have been read
    if (threadIdx.y / parts == 1) found.put(other);
    __syncthreads();
    if (threadIdx.y < parts) found.add(other);
  }
}

// A warp's tile of kKeys keys. What a table says of them is asked for a tile ahead, and looked at when its turn has
// come.
template <typename T, int kKeys>
struct KeyTile {
  static constexpr int kEach = (kKeys + 31) / 32;  // keys of a lane
  struct Shared {
    const T* row[kKeys];  // nullptr: no key
    Acc<T> bias[kKeys];   // the logarithm of its size
  };
  Shared& shared;
  int slot[kEach], size[kEach], attended[kEach];

  __device__ __forceinline__ explicit KeyTile(Shared& own) : shared(own) {}

  // Asks for the keys from k0 on.
  __device__ __forceinline__ void ask(const BankAttentionInput& a, const BankTask& task, unsigned k0) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const unsigned i = threadIdx.x % 32 + 32 * e, key = k0 + i, p = key / task.L, j = key % task.L;
      slot[e] = -1, size[e] = 1, attended[e] = 1;
      if (i >= kKeys || key >= task.last) continue;
      slot[e] = a.table ? *a.table.at<const int32_t>(task.b, task.s, p, j) : int(j);
      if (a.sizes) size[e] = *a.sizes.at<const int32_t>(task.b, task.s, p, j);
      if (a.mask) attended[e] = *a.mask.at<const int32_t>(task.b, p);
    }
  }
  // Puts them where all lanes see them.
  __device__ __forceinline__ void show(const BankAttentionInput& a, const BankTask& task, unsigned k0) {
    using A = Acc<T>;
    __syncwarp();  // the last tile has been read
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const unsigned i = threadIdx.x % 32 + 32 * e;
      if (i >= kKeys) continue;
      const bool present = slot[e] >= 0 && attended[e] != 0;
      if (present && slot[e] >= a.rows.size[1]) __trap();  // as index_select does
      shared.row[i] = present ? a.rows.at<const T>(task.b, slot[e], (k0 + i) / task.L) : nullptr;
      shared.bias[i] = present ? A(log2(A(size[e] < 1 ? 1 : size[e]))) : A(kAbsent);
    }
    __syncwarp();
  }
};

#ifndef __CUDACC_RTC__
// Blocks for kernels that walk over keys, `slabs` times, and their threads: as many tasks as have keys in common, where
// that leaves a block for each multiprocessor, and then each task's keys in up to `parts` parts, a power of two.
struct BankLaunch {
  dim3 threads;
  Grid blocks;
  BankLaunch(const BankAttentionInput& a, int64_t splits, int64_t parts, int64_t slabs = 1) : threads(0), blocks(0) {
    const int64_t all = a.q.size[0] * a.q.size[1] * a.heads * splits * ceil_div(a.q.size[2], 16);
    const int64_t keys = a.rows.size[2] * (a.table ? a.table.size[3] : a.rows.size[1]);
    narrow(all, "bank_attention: queries / 16 times heads, steps and splits");
    narrow(keys + splits * kBankWarps, "bank_attention: the keys of a step");
    int64_t tasks = bank_attention_tasks(a);
    if (splits == 1 && tasks > 1 && parts > 1) tasks = all / 128 < 1 ? 1 : all / 128 < tasks ? all / 128 : tasks;
    while (parts * tasks > kBankWarps && parts > 1) parts /= 2;
    threads = dim3(unsigned(32 * tasks), unsigned(parts)), blocks = Grid(ceil_div(all, tasks), 1, slabs);
  }
};
#endif

}  // namespace pyvidx::cuda
