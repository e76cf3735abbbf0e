// The streaming step: one block per position (b, n), one launch. It reads the choice off the cached similarities, takes
// the attached rows and the bank's, and then changes the state of its position, which no other block reads; the length
// of a video is changed by the block of its first position. No atomics, no scratch memory, no host.
//
// Attached tensors of several dtypes or alignments, which nothing in this project has, go before it in launches of
// their own, a warp per position and tensor.
//
// Traffic per position: 8 rows of the bank (6 read, 2 written), 5 of every attached tensor (3 read, 2 written).
#include "memory_step.cuh"
#include "pyvidx/memory_merge.h"

namespace pyvidx::cuda {

constexpr int kMaxAttached = 16;  // per launch: kernel parameters may take 4 KB

struct AttachedChunk {
  MemoryAttached item[kMaxAttached];
};
static_assert(sizeof(MemoryStepArgs) + sizeof(AttachedChunk) <= 4096, "kernel parameters");

// A step of one attached tensor at one position by threads first, first + count, ...
template <typename T, bool kVectorized>
__device__ __forceinline__ void run_attached(const MemoryAttached& item, const StepPlan& p, const Mean<Acc<T>>& mean,
                                             int64_t b, int64_t n, int first, int count) {
  const int C = int(item.rows.size[3]);
  constexpr int kSize = kPack<T, kVectorized>;
  T* const keep = p.k < 0 ? nullptr : item.rows.at<T>(b, p.keep, n);
  const T* const gone = p.k < 0 ? nullptr : item.rows.at<const T>(b, p.gone, n);
  T* const target = p.target < 0 ? nullptr : item.rows.at<T>(b, p.target, n);
  const T* const frame = p.target < 0 ? nullptr : item.frame.at<const T>(b, n);
  for (int c = first * kSize; c < C; c += count * kSize) {
    Acc<T> x[kSize] = {}, y[kSize] = {}, fresh[kSize] = {};
    if (keep) load_pack(keep + c, x), load_pack(gone + c, y);
    if (target) load_pack(frame + c, fresh);
    if (keep) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = mean(x[i], y[i]);
      store_pack(keep + c, x);
    }
    if (target) store_pack(target + c, fresh);  // where `gone` was
  }
}

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kMemoryThreads) void memory_attached_kernel(MemoryStepArgs a, AttachedChunk chunk) {
  const unsigned N = unsigned(a.bank.size[2]), row = blockIdx.x * kMemoryWarps + threadIdx.x / 32;
  if (row >= a.bank.size[0] * N) return;
  const unsigned b = row / N, n = row % N;
  if (a.active && *a.active.at<const int32_t>(b) == 0) return;
  const StepPlan p = plan_step(a, b, n, stored_entries(a.sizes, b, n));
  if (p.k < 0 && p.target < 0) return;
  run_attached<T, kVectorized>(chunk.item[blockIdx.y], p, mean_of<Acc<T>>(a, p), b, n, threadIdx.x % 32, 32);
}

// `count` of the attached tensors, of type F, are taken in the same launch.
template <typename T, typename F, bool kVectorized>
__global__ __launch_bounds__(kMemoryThreads, kMemoryBlocks) void memory_step_kernel(MemoryStepArgs a,
                                                                                    AttachedChunk chunk, int count) {
  const unsigned N = unsigned(a.bank.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  const bool on = !a.active || *a.active.at<const int32_t>(b) != 0;
  StepPlan p{-1, -1, -1, -1, -1, -1, -1, 0, 1, 1};
  if (on) {
    const int length = stored_entries(a.sizes, b, n);
    p = plan_step(a, b, n, length);
    if (n == 0 && threadIdx.x == 0) set_length(a.length, b, length, p.length + (p.target >= 0));
  }
  if (threadIdx.x == 0) *a.index.at<int32_t>(b, n) = p.k;
  if (p.k < 0 && p.target < 0) return;
  for (int i = 0; i < count; ++i) {
    run_attached<F, kVectorized>(chunk.item[i], p, mean_of<Acc<F>>(a, p), b, n, int(threadIdx.x), kMemoryThreads);
  }
  run_step<T, kVectorized>(a, p, b, n);
}

// --- one merge as a function --------------------------------------------------------------------------------------

template <typename A>
__device__ __forceinline__ A size_at(const View<3>& sizes, int64_t b, int64_t t, int64_t n) {
  return sizes.dtype == DType::i32 ? A(*sizes.at<const int32_t>(b, t, n)) : A(*sizes.at<const float>(b, t, n));
}

// One block per position. Each warp takes pairs of neighbors in turn (a row is read twice, the second time from a
// cache), then rows to write. Traffic: the bank read once, or twice where a position's rows do not fit the L1 cache.
template <typename T, bool kVectorized>
__global__ __launch_bounds__(kMemoryThreads, kMemoryBlocks) void memory_merge_kernel(MemoryMergeArgs a) {
  using A = Acc<T>;
  constexpr int kSize = kPack<T, kVectorized>;
  const int T_ = int(a.bank.size[1]);
  const int64_t C = a.bank.size[3];
  const unsigned N = unsigned(a.bank.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  const int warp = threadIdx.x / 32, first = threadIdx.x % 32 * kSize;

  ArgMax<A> best{A(-3), 0x7fffffff};
  for (int t = warp; t + 1 < T_; t += kMemoryWarps) {
    const T *x_row = a.bank.at<const T>(b, t, n), *y_row = a.bank.at<const T>(b, t + 1, n);
    A dot = 0, xx = 0, yy = 0;
    for (int64_t c = first; c < C; c += 32 * kSize) {
      A x[kSize], y[kSize];
      load_pack(x_row + c, x), load_pack(y_row + c, y);
#pragma unroll
      for (int i = 0; i < kSize; ++i) dot += x[i] * y[i], xx += x[i] * x[i], yy += y[i] * y[i];
    }
    best = better(best, {cosine(warp_sum(dot), warp_sum(xx), warp_sum(yy)), t});
  }
  const int k = block_argmax<kMemoryThreads>(best, A(-3)).index;
  if (threadIdx.x == 0) *a.index.at<int32_t>(b, n) = k;

  const Mean<A> mean =
      a.weighted ? Mean<A>(size_at<A>(a.sizes, b, k, n), size_at<A>(a.sizes, b, k + 1, n)) : Mean<A>(A(1), A(1));
  for (int t = warp; t + 1 < T_; t += kMemoryWarps) {
    const int from = t <= k ? t : t + 1;
    const T *x_row = a.bank.at<const T>(b, from, n), *y_row = a.bank.at<const T>(b, k + 1, n);
    T* const out = a.out.at<T>(b, t, n);
    for (int64_t c = first; c < C; c += 32 * kSize) {
      A x[kSize], y[kSize];
      load_pack(x_row + c, x);
      if (t == k) {
        load_pack(y_row + c, y);
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[i] = mean(x[i], y[i]);
      }
      store_pack(out + c, x);
    }
    if (threadIdx.x % 32 != 0) continue;
    if (a.sizes.dtype == DType::i32) {
      const int32_t extra = t == k ? *a.sizes.at<const int32_t>(b, k + 1, n) : 0;
      *a.out_sizes.at<int32_t>(b, t, n) = *a.sizes.at<const int32_t>(b, from, n) + extra;
    } else {
      const float extra = t == k ? *a.sizes.at<const float>(b, k + 1, n) : 0;
      *a.out_sizes.at<float>(b, t, n) = *a.sizes.at<const float>(b, from, n) + extra;
    }
  }
}

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kMemoryThreads) void memory_merge_backward_kernel(MemoryMergeBackwardArgs a) {
  using A = Acc<T>;
  constexpr int kSize = kPack<T, kVectorized>;
  const int64_t C = a.grad_bank.size[3];
  const unsigned T_ = unsigned(a.grad_bank.size[1]), N = unsigned(a.grad_bank.size[2]);
  const unsigned row = blockIdx.x * kMemoryWarps + threadIdx.x / 32;
  if (row >= a.grad_bank.size[0] * T_ * N) return;
  const unsigned b = row / (T_ * N), t = row / N % T_, n = row % N, k = unsigned(*a.index.at<const int32_t>(b, n));
  if (k >= T_ - 1) __trap();  // a negative one is large
  A share = 1;
  if (t == k || t == k + 1) {
    const A s0 = a.weighted ? size_at<A>(a.sizes, b, k, n) : A(1);
    const A s1 = a.weighted ? size_at<A>(a.sizes, b, k + 1, n) : A(1);
    share = divide(t == k ? s0 : s1, s0 + s1);
  }
  const T* grad = a.grad_out.at<const T>(b, t <= k ? t : t - 1, n);
  T* const out = a.grad_bank.at<T>(b, t, n);
  for (int64_t c = threadIdx.x % 32 * kSize; c < C; c += 32 * kSize) {
    A x[kSize];
    load_pack(grad + c, x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] *= share;
    store_pack(out + c, x);
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

bool aligned(const MemoryAttached& a) {
  bool yes = false;
  visit_floating("memory_merge_", a.rows.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    yes = vectorizable<T>(a.rows) && (!a.frame || vectorizable<T>(a.frame));
  });
  return yes;
}

// The next run of attached tensors that share a dtype and an alignment, at most as many as a launch takes.
struct Run {
  AttachedChunk chunk;
  int count = 0;
  bool vectorized;
  DType dtype;

  Run(const MemoryStepArgs& args, int done) {
    const MemoryAttached* const item = args.attached + done;
    vectorized = aligned(*item), dtype = item->rows.dtype;
    while (count < kMaxAttached && done + count < args.attached_count && item[count].rows.dtype == dtype &&
           aligned(item[count]) == vectorized) {
      chunk.item[count] = item[count];
      ++count;
    }
  }
};

void launch_attached(const MemoryStepArgs& args, const Run& run, cudaStream_t stream) {
  const Grid grid(ceil_div(checked_rows(args.bank.size[0] * args.bank.size[2]), kMemoryWarps), run.count);
  visit_floating("memory_merge_", run.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (run.vectorized) {
      PYVIDX_LAUNCH((memory_attached_kernel<T, true>), grid, kMemoryThreads, 0, stream, args, run.chunk);
    } else {
      PYVIDX_LAUNCH((memory_attached_kernel<T, false>), grid, kMemoryThreads, 0, stream, args, run.chunk);
    }
  });
  check_launch("memory_attached_kernel");
}

template <typename T, typename F>
void launch_step(const MemoryStepArgs& args, const AttachedChunk& chunk, int count, bool vectorized,
                 cudaStream_t stream) {
  const unsigned rows = checked_rows(args.bank.size[0] * args.bank.size[2]);
  if (vectorized) {
    PYVIDX_LAUNCH((memory_step_kernel<T, F, true>), rows, kMemoryThreads, 0, stream, args, chunk, count);
  } else {
    PYVIDX_LAUNCH((memory_step_kernel<T, F, false>), rows, kMemoryThreads, 0, stream, args, chunk, count);
  }
  check_launch("memory_step_kernel");
}

}  // namespace

void memory_step_cuda(const MemoryStepArgs& args, cudaStream_t stream) {
  if (checked_rows(args.bank.size[0] * args.bank.size[2]) == 0) return;
  visit_floating("memory_merge_", args.bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool vectorized = vectorizable<T>(args.bank) && (!args.frame || vectorizable<T>(args.frame));
    for (int done = 0; done < args.attached_count;) {
      const Run run(args, done);
      done += run.count;
      if (done == args.attached_count && run.vectorized == vectorized) {  // the last run goes along
        if (run.dtype == args.bank.dtype) return launch_step<T, T>(args, run.chunk, run.count, vectorized, stream);
        if constexpr (std::is_same_v<T, float>) {
          if (run.dtype == DType::f16) return launch_step<T, __half>(args, run.chunk, run.count, vectorized, stream);
          if (run.dtype == DType::bf16) {
            return launch_step<T, __nv_bfloat16>(args, run.chunk, run.count, vectorized, stream);
          }
        }
      }
      launch_attached(args, run, stream);
    }
    launch_step<T, T>(args, AttachedChunk{}, 0, vectorized, stream);
  });
}

void memory_merge_cuda(const MemoryMergeArgs& args, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.bank.size[0] * args.bank.size[2]);
  if (rows == 0) return;
  visit_floating("memory_merge", args.bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (vectorizable<T>(args.bank) && vectorizable<T>(args.out)) {
      PYVIDX_LAUNCH((memory_merge_kernel<T, true>), rows, kMemoryThreads, 0, stream, args);
    } else {
      PYVIDX_LAUNCH((memory_merge_kernel<T, false>), rows, kMemoryThreads, 0, stream, args);
    }
  });
  check_launch("memory_merge_kernel");
}

void memory_merge_backward_cuda(const MemoryMergeBackwardArgs& args, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.grad_bank.size[0] * args.grad_bank.size[1] * args.grad_bank.size[2]);
  if (rows == 0 || args.grad_bank.size[3] == 0) return;
  const int64_t blocks = ceil_div(rows, kMemoryWarps);
  visit_floating("memory_merge_backward", args.grad_bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (vectorizable<T>(args.grad_out) && vectorizable<T>(args.grad_bank)) {
      PYVIDX_LAUNCH((memory_merge_backward_kernel<T, true>), blocks, kMemoryThreads, 0, stream, args);
    } else {
      PYVIDX_LAUNCH((memory_merge_backward_kernel<T, false>), blocks, kMemoryThreads, 0, stream, args);
    }
  });
  check_launch("memory_merge_backward_kernel");
}

}  // namespace pyvidx
#endif
