// memory_merge: shorten a memory bank by merging its most similar neighbors (MA-LMM, arXiv:2404.05726, section 3.2).
//
// At every position (b, n), over the stored entries e in time order:
//   k    = argmax_j cos(e[j], e[j+1])                             first one on ties, NaN above all
//   e[k] = (s[k] e[k] + s[k+1] e[k+1]) / (s[k] + s[k+1]),  s[k] += s[k+1],  and e[k+1] is gone;   s = sizes
// with each norm of the cosine at least kMemoryEps. weighted = false takes (e[k] + e[k+1]) / 2 instead.
//
// memory_step does it in place on a bank of M + 1 slots and then appends a frame; memory_merge returns a new bank.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;  // cudaStream_t, so that no CUDA header is needed here

namespace pyvidx {

constexpr float kMemoryEps = 1e-8f;

// A tensor whose rows follow those of the bank, as projections of them do: weights that sum to 1 keep affine maps.
struct MemoryAttached {
  View<4> rows;   // [B, M+1, N, Ci]  in/out, own dtype, last stride 1
  View<3> frame;  // [B, N, Ci]       in, dtype of rows; absent with MemoryStepArgs::frame
};

// One streaming step: where length[b] == M + 1, merge (length M); then, if there is a frame, append it (length + 1).
struct MemoryStepArgs {
  View<4> bank;        // [B, M+1, N, C]  in/out, any strides but the last, which is 1
  View<3> sizes;       // [B, N, M+1]     in/out, i32: frames merged into each slot, 0 if free
  View<3> order;       // [B, N, M+1]     in/out, i32: a permutation of the slots; the first length[b] in time order
  View<3> similarity;  // [B, N, M]       in/out, f32: cos(e[j], e[j+1]), 0 from length - 1 on
  View<1> length;      // [B]             in/out, i32
  View<3> frame;       // [B, N, C]       in, dtype of bank, or 16 bits for an f32 bank, optional
  View<1> active;      // [B]             in, i32, optional: nothing changes where it is 0
  View<2> index;       // [B, N]          out, i32: k, or -1 where nothing merged
  const MemoryAttached* attached;  // on the host
  int attached_count;
  bool weighted;
};

void memory_step_cpu(const MemoryStepArgs& args, const Executor& executor);
void memory_step_cuda(const MemoryStepArgs& args, CUstream_st* stream);

struct MemoryMergeArgs {
  View<4> bank;       // [B, T, N, C]    in, any strides but the last, which is 1
  View<3> sizes;      // [B, T, N]       in, f32 or i32
  View<4> out;        // [B, T-1, N, C]  out, dtype of bank
  View<3> out_sizes;  // [B, T-1, N]     out, dtype of sizes
  View<2> index;      // [B, N]          out, i32
  bool weighted;
};

void memory_merge_cpu(const MemoryMergeArgs& args, const Executor& executor);
void memory_merge_cuda(const MemoryMergeArgs& args, CUstream_st* stream);

struct MemoryMergeBackwardArgs {
  View<4> grad_out;   // [B, T-1, N, C]  in, any strides but the last, which is 1
  View<3> sizes;      // [B, T, N]       in, f32 or i32
  View<2> index;      // [B, N]          in, i32
  View<4> grad_bank;  // [B, T, N, C]    out, every element is written
  bool weighted;
};

void memory_merge_backward_cpu(const MemoryMergeBackwardArgs& args, const Executor& executor);
void memory_merge_backward_cuda(const MemoryMergeBackwardArgs& args, CUstream_st* stream);

}  // namespace pyvidx
