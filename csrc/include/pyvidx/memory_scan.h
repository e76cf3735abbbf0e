// memory_scan: t streaming steps of a memory bank (memory_merge.h) in one launch, and the plan of what they merged.
//
// Rows of a position are named by their place in an extended list of E = M + 1 + 2t rows:
//   0 .. M           what the M + 1 slots held before,
//   M + 1 + s        frame s of these t,
//   M + 1 + t + s    the row that step s merged.
// memory_replay_ fills that list for any rows that follow those of the bank (keys and values), as memory_step merges
// them, and leaves in their slots what is stored after the last step.
//
// Floors: the scan reads the clip once (the bank stays in a cache, the plan is 4 (M + 5) bytes per position and frame);
// the replay reads M + 1 + t rows per position, writes M + 1 + 2t and those slots that changed.
#pragma once
#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;  // cudaStream_t, so that no CUDA header is needed here

namespace pyvidx {

struct MemoryScanArgs {
  View<4> bank;        // [B, M+1, N, C]   in/out; as in MemoryStepArgs, also the next four
  View<3> sizes;       // [B, N, M+1]      in/out, i32
  View<3> order;       // [B, N, M+1]      in/out, i32
  View<3> similarity;  // [B, N, M]        in/out, f32
  View<1> length;      // [B]              in/out, i32
  View<4> frames;      // [B, t, N, C]     in, dtype of bank, any strides but the last, which is 1
  View<1> active;      // [B]              in, i32, optional: nothing changes where it is 0
  View<4> table;       // [B, t, N, M+1]   out, i32: rows stored after step s in time order, -1 beyond the length
  View<4> sources;     // [B, t, N, 2]     out, i32: the rows merged at step s, -1 where nothing merged
  View<4> counts;      // [B, t, N, 2]     out, i32: frames in them, 0 where nothing merged
  bool weighted;
};

void memory_scan_cpu(const MemoryScanArgs& args, const Executor& executor);
void memory_scan_cuda(const MemoryScanArgs& args, CUstream_st* stream);

struct MemoryReplayArgs {
  View<4> rows;      // [B, M+1, N, W]  in/out, any strides but the last, which is 1; slots in use change
  View<4> frames;    // [B, t, N, W]    in, dtype of rows, any strides but the last, which is 1
  View<4> table;     // [B, t, N, M+1]  in, i32; only the last step's is read
  View<4> sources;   // [B, t, N, 2]    in, i32
  View<4> counts;    // [B, t, N, 2]    in, i32
  View<3> order;     // [B, N, M+1]     in, i32, as it is after the scan
  View<4> extended;  // [B, E, N, W]    out, dtype of rows; every element is written, zeros where nothing merged
  bool weighted;
};

void memory_replay_cpu(const MemoryReplayArgs& args, const Executor& executor);
void memory_replay_cuda(const MemoryReplayArgs& args, CUstream_st* stream);

}  // namespace pyvidx
