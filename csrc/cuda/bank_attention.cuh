// What the forward and backward kernels of bank_attention share: tiles of keys that a table names.
#pragma once
#include "attention.cuh"
#include "pyvidx/bank_attention.h"

namespace pyvidx::cuda {

constexpr int kBankThreads = 128, kMergeThreads = 256;
template <typename T>
constexpr int kBankTiles = sizeof(T) == 2   ? 8
                           : sizeof(T) == 4 ? 4
                                            : 1;  // double is for checking gradients

// What a block of the kernels that walk over keys works on: 16 queries per warp of one head, one split of the
// positions.
struct BankTask {
  int64_t b, s, h, head, split;
  int64_t first, last, L;  // keys, L of each position
  int q0, n, d;
  __device__ __forceinline__ BankTask(const BankAttentionInput& a, int64_t splits) {
    const int64_t steps = a.q.size[1], N = a.rows.size[2];
    head = blockIdx.x / splits, split = blockIdx.x % splits, h = head % a.heads;
    b = head / a.heads / steps, s = head / a.heads % steps;
    L = a.table ? a.table.size[3] : a.rows.size[1];
    first = N * split / splits * L, last = N * (split + 1) / splits * L;
    q0 = int(blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * 16;
    n = int(a.q.size[2]), d = int(a.q.size[3] / a.heads);
  }
};

// Frames in key j, which counts as one without sizes.
__device__ __forceinline__ int key_size(const BankAttentionInput& a, int64_t b, int64_t s, int64_t p, int64_t j) {
  const int size = a.sizes ? *a.sizes.at<const int32_t>(b, s, p, j) : 1;
  return size < 1 ? 1 : size;
}

// The n queries, or their gradients, of one head and step of x [B, t, n, H * d].
template <typename T>
__device__ __forceinline__ Rows<T> rows_of_head(const View<4>& x, int64_t b, int64_t s, int64_t h, int d) {
  return {x.at<T>(b, s, 0, h * d), x.stride[2] * int64_t(sizeof(T)), int(x.size[2]), d};
}

// The rows of kKeys keys from k0 on and the logarithms of their sizes, found by the whole block.
template <int kKeys, typename T>
__device__ __forceinline__ void find_keys(const BankAttentionInput& a, const BankTask& task, int64_t k0, const T** row,
                                          Acc<T>* bias) {
  using A = Acc<T>;
  __syncthreads();  // the last tile has been read
  for (int i = threadIdx.x; i < kKeys; i += blockDim.x) {
    const int64_t p = (k0 + i) / task.L, j = (k0 + i) % task.L;
    int64_t slot = -1;
    if (k0 + i < task.last && (!a.mask || *a.mask.at<const int32_t>(task.b, p) != 0)) {
      slot = a.table ? *a.table.at<const int32_t>(task.b, task.s, p, j) : j;
    }
    if (slot >= a.rows.size[1]) __trap();  // as index_select does
    row[i] = slot < 0 ? nullptr : a.rows.at<const T>(task.b, slot, p);
    bias[i] = slot < 0 ? A(kAbsent) : A(log2(A(key_size(a, task.b, task.s, p, j))));
  }
  __syncthreads();
}

}  // namespace pyvidx::cuda
