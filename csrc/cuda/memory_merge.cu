// The streaming step: one block per position (b, n), one launch. It reads the choice off the cached similarities, takes
// the attached rows and the bank's, and then changes the state of its position, which no other block reads; the length
// of a video is changed by the block of its first position. No atomics, no scratch memory, no host.
//
// Attached tensors of several dtypes or alignments, which nothing in this project has, go before it in launches of
// their own.
//
// Traffic per position: 8 rows of the bank (6 read, 2 written), 5 of every attached tensor (3 read, 2 written).
// Versions (registers of sm_70 and sm_90, float; rounds of loads that wait for each other before the bank's rows;
// rounds for 12 attached tensors of 768 floats, and bytes of them at a position that are under way together):
//   128 threads, entries read where they lie    72, 80    5    24    6 KB
//   352 threads, entries in shared memory       60, 64    2     7   17 KB   attached rows in parts of 32 packs
//   two parts a warp, six warps for 16 bits     64, 64    2     4   34 KB   kept; in half 82, 84 registers: predicted
//       .96 of a copy on an H100 where it was .78, .89 on an H200 where it was .62
// A frame of 16 bits goes into a bank of floats as it is, 8 bytes a thread, in at most 64 registers. The four kernels
// for it are 140 KB of a cubin; casting before is a launch and 8 bytes an element more.
#include "memory_step.cuh"
#include "pyvidx/memory_merge.h"

namespace pyvidx::cuda {

constexpr int kMaxAttached = 16;   // per launch: kernel parameters may take 4 KB
constexpr int kAttachedAhead = 2;  // parts of rows that a warp has under way together

struct AttachedChunk {
  MemoryAttached item[kMaxAttached];
};
static_assert(sizeof(MemoryStepArgs) + sizeof(AttachedChunk) <= 4096, "kernel parameters");

// A step of attached tensors at one position: the warps of a block take 32 packs of a row in turn. `units`: the most
// that a row has of those.
template <typename T, bool kVectorized>
__device__ __forceinline__ void run_attached(const MemoryAttached* items, int count, int units, bool weighted,
                                             const StepPlan& p, int64_t b, int64_t n) {
  constexpr int kSize = kPack<T, kVectorized>;
  using Pack = Raw<T, kVectorized>;
  const Mean<Acc<T>> mean = mean_of<Acc<T>>(weighted, p.size0, p.size1);
  const int warps = int(blockDim.x) / 32;
#pragma unroll 1
  for (int first = int(threadIdx.x) / 32; first < count * units; first += kAttachedAhead * warps) {
    T *keep[kAttachedAhead], *target[kAttachedAhead];
    Pack bits[kAttachedAhead][3] = {};
#pragma unroll
    for (int u = 0; u < kAttachedAhead; ++u) {
      const int unit = first + u * warps;
      const MemoryAttached& item = items[unit < count * units ? unit / units : 0];
      const int c = (unit % units * 32 + int(threadIdx.x) % 32) * kSize;
      const bool own = unit < count * units && c < int(item.rows.size[3]);
      keep[u] = !own || p.k < 0 ? nullptr : item.rows.at<T>(b, p.slot[kKeep], n) + c;
      target[u] = !own || p.slot[kTarget] < 0 ? nullptr : item.rows.at<T>(b, p.slot[kTarget], n) + c;
      if (keep[u]) {
        bits[u][0] = *reinterpret_cast<const Pack*>(keep[u]);
        bits[u][1] = *reinterpret_cast<const Pack*>(item.rows.at<const T>(b, p.slot[kGone], n) + c);
      }
      if (target[u]) bits[u][2] = *reinterpret_cast<const Pack*>(item.frame.at<const T>(b, n) + c);
    }
#pragma unroll
    for (int u = 0; u < kAttachedAhead; ++u) {
      if (keep[u]) {
        Acc<T> x[kSize], y[kSize];
        unpack_raw<T>(bits[u][0], x), unpack_raw<T>(bits[u][1], y);
#pragma unroll
        for (int i = 0; i < kSize; ++i) x[i] = mean(x[i], y[i]);
        store_pack(keep[u], x);
      }
      if (target[u]) store_raw(target[u], bits[u][2]);  // where `gone` was
    }
  }
}

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kMemoryThreads, kMemoryBlocks<T>) void memory_attached_kernel(MemoryStepArgs a,
                                                                                           AttachedChunk chunk,
                                                                                           int count, int units) {
  const unsigned N = unsigned(a.bank.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  if (a.active && *a.active.at<const int32_t>(b) == 0) return;
  PYVIDX_SHARED(int32_t, shared);
  __shared__ __align__(16) unsigned char step_bytes[sizeof(Step<T>)];
  Step<T>& step = *reinterpret_cast<Step<T>*>(step_bytes);
  const Entries e = entries_in(shared, a.similarity);
  load_entries(e, a.sizes, a.order, a.similarity, b, n);
  __syncthreads();
  // Of the plan but its rows, which are those of the bank.
  if (threadIdx.x < 32) plan_step(step, e, bool(a.frame), stored_entries(e), a.bank, a.weighted, b, n);
  __syncthreads();
  run_attached<T, kVectorized>(chunk.item, count, units, a.weighted, step.plan, b, n);
}

// `count` of the attached tensors, of type F, are taken in the same launch. Frame: type of the new row, T or F.
template <typename T, typename F, typename Frame, bool kVectorized>
__global__ __launch_bounds__(kMemoryThreads, kMemoryBlocks<T>) void memory_step_kernel(MemoryStepArgs a,
                                                                                       AttachedChunk chunk, int count,
                                                                                       int units) {
  const unsigned N = unsigned(a.bank.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  if (a.active && *a.active.at<const int32_t>(b) == 0) {
    if (threadIdx.x == 0) *a.index.at<int32_t>(b, n) = -1;
    return;
  }
  PYVIDX_SHARED(int32_t, shared);
  __shared__ __align__(16) unsigned char step_bytes[sizeof(Step<T>)], sums[sizeof(Acc<T>) * 8 * kMemoryWarps];
  Step<T>& step = *reinterpret_cast<Step<T>*>(step_bytes);
  Acc<T>* const partial = reinterpret_cast<Acc<T>*>(sums);
  const Entries e = entries_in(shared, a.similarity);
  load_entries(e, a.sizes, a.order, a.similarity, b, n);
  __syncthreads();
  const int C = int(a.bank.size[3]);
  FramePacks<T, kVectorized, Frame> frames(a.frame ? a.frame.at<const Frame>(b, n) : nullptr, 0, bool(a.frame),
                                           int(threadIdx.x) * kPack<T, kVectorized>, C);
  if (threadIdx.x < 32) {
    const int length = stored_entries(e);
    plan_step(step, e, bool(a.frame), length, a.bank, a.weighted, b, n);
    if (threadIdx.x == 0) {
      *a.index.at<int32_t>(b, n) = step.plan.k;
      if (n == 0) set_length(a.length, b, length, step.plan.length + bool(a.frame));
    }
  }
  __syncthreads();
  if (step.plan.k < 0 && !a.frame) return;
  run_attached<F, kVectorized>(chunk.item, count, units, a.weighted, step.plan, b, n);
  step_rows<T, kVectorized>(step, frames, C, partial, int(blockDim.x) / 32);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const StepPlan plan = step.plan;
  renew_similarities(e, move_entries(e, plan), partial, sum_warps<kPack<T, kVectorized>>(C));
  store_entries(e, a.sizes, a.order, a.similarity, b, n);
}

// --- one merge as a function --------------------------------------------------------------------------------------

template <typename A>
__device__ __forceinline__ A size_at(const View<3>& sizes, int64_t b, int64_t t, int64_t n) {
  return sizes.dtype == DType::i32 ? A(*sizes.at<const int32_t>(b, t, n)) : A(*sizes.at<const float>(b, t, n));
}

// The rows at one position: row j is at rows + j * stride.
template <typename T>
struct Rows {
  T* rows;
  int64_t stride;

  __device__ __forceinline__ Rows(const View<4>& bank, int64_t b, int64_t n)
      : rows(bank.at<T>(b, 0, n)), stride(bank.stride[1]) {}
  __device__ __forceinline__ T* operator()(int j) const { return rows + j * stride; }
};

constexpr int kMergeWarps = 20;  // of a block, at most: MA-LMM's bank has 20 pairs
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int kMergeBlocks = 1;  // 1024 threads a multiprocessor
#else
constexpr int kMergeBlocks = 2;
#endif

// One block per position. Each warp takes pairs of neighbors in turn (a row is read twice, the second time from a
// cache), then rows to write. Versions (registers of sm_70 and sm_90, half; MA-LMM's rows of all positions that a
// multiprocessor works on, where the L1 cache has 128 KB and 256 KB; loads before the first store, and instructions per
// 16 bytes that are written):
//   4 warps, 5 blocks           64, 71    290 KB    1, 70   so the bank came twice from device memory
//   a warp a pair, 2 blocks     46, 40    118 KB    3, about 13   kept
template <typename T, bool kVectorized>
__global__ __launch_bounds__(32 * kMergeWarps, kMergeBlocks) void memory_merge_kernel(MemoryMergeArgs a) {
  using A = Acc<T>;
  constexpr int kSize = kPack<T, kVectorized>;
  const int T_ = int(a.bank.size[1]), C = int(a.bank.size[3]);
  const unsigned N = unsigned(a.bank.size[2]), b = blockIdx.x / N, n = blockIdx.x % N;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, warps = int(blockDim.x) / 32;
  const Rows<const T> bank(a.bank, b, n);
  const Rows<T> out(a.out, b, n);
  __shared__ ArgMax<A> found[kMergeWarps];

  ArgMax<A> best{A(-3), 0x7fffffff};
#pragma unroll 1
  for (int t = warp; t + 1 < T_; t += warps) {
    const T *const x_row = bank(t), *const y_row = bank(t + 1);
    A dot = 0, xx = 0, yy = 0;
#pragma unroll 1
    for (int c = lane * kSize; c < C; c += 32 * kSize) {
      A x[kSize], y[kSize];
      load_pack(x_row + c, x), load_pack(y_row + c, y);
#pragma unroll
      for (int i = 0; i < kSize; ++i) dot += x[i] * y[i], xx += x[i] * x[i], yy += y[i] * y[i];
    }
    best = better(best, {cosine(warp_sum(dot), warp_sum(xx), warp_sum(yy)), t});
  }
  if (lane == 0) found[warp] = best;
  __syncthreads();
  if (lane < warps) best = found[lane];  // a warp has 32 lanes, a block fewer warps: the others hold what one has found
  const int k = warp_argmax(best).index;
  if (threadIdx.x == 0) *a.index.at<int32_t>(b, n) = k;

#pragma unroll 1
  for (int t = warp; t + 1 < T_; t += warps) {
    if (t != k) copy_row<T, kVectorized>(bank(t < k ? t : t + 1), out(t), C);
  }
  if (warp == k % warps) {
    const T *const x_row = bank(k), *const y_row = bank(k + 1);
    T* const to = out(k);
    const Mean<A> mean =
        a.weighted ? Mean<A>(size_at<A>(a.sizes, b, k, n), size_at<A>(a.sizes, b, k + 1, n)) : Mean<A>(A(1), A(1));
#pragma unroll 1
    for (int c = lane * kSize; c < C; c += 32 * kSize) {
      A x[kSize], y[kSize];
      load_pack(x_row + c, x), load_pack(y_row + c, y);
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = mean(x[i], y[i]);
      store_pack(to + c, x);
    }
  }
  auto merge_sizes = [&](auto zero) {
    using Size = decltype(zero);
#pragma unroll 1
    for (int t = int(threadIdx.x); t + 1 < T_; t += int(blockDim.x)) {
      const Size extra = t == k ? *a.sizes.at<const Size>(b, k + 1, n) : 0;
      *a.out_sizes.at<Size>(b, t, n) = *a.sizes.at<const Size>(b, t <= k ? t : t + 1, n) + extra;
    }
  };
  if (a.sizes.dtype == DType::i32) {
    merge_sizes(int32_t(0));
  } else {
    merge_sizes(float(0));
  }
}

constexpr int kBackwardWarps = 4;

template <typename T, bool kVectorized>
__global__ __launch_bounds__(32 * kBackwardWarps) void memory_merge_backward_kernel(MemoryMergeBackwardArgs a) {
  using A = Acc<T>;
  constexpr int kSize = kPack<T, kVectorized>;
  const int C = int(a.grad_bank.size[3]);
  const unsigned T_ = unsigned(a.grad_bank.size[1]), N = unsigned(a.grad_bank.size[2]);
  const unsigned row = blockIdx.x * kBackwardWarps + threadIdx.x / 32;
  if (row >= a.grad_bank.size[0] * T_ * N) return;
  const unsigned b = row / (T_ * N), t = row / N % T_, n = row % N, k = unsigned(*a.index.at<const int32_t>(b, n));
  if (k >= T_ - 1) __trap();  // a negative one is large
  const T* const grad = a.grad_out.at<const T>(b, t <= k ? t : t - 1, n);
  T* const out = a.grad_bank.at<T>(b, t, n);
  if (t != k && t != k + 1) return copy_row<T, kVectorized>(grad, out, C);
  const A s0 = a.weighted ? size_at<A>(a.sizes, b, k, n) : A(1);
  const A s1 = a.weighted ? size_at<A>(a.sizes, b, k + 1, n) : A(1);
  const A share = divide(t == k ? s0 : s1, s0 + s1);
  for (int c = int(threadIdx.x) % 32 * kSize; c < C; c += 32 * kSize) {
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
  bool vectorized = false;
  DType dtype = DType::f32;

  Run() = default;
  Run(const MemoryStepArgs& args, int done) {
    const MemoryAttached* const item = args.attached + done;
    vectorized = aligned(*item), dtype = item->rows.dtype;
    while (count < kMaxAttached && done + count < args.attached_count && item[count].rows.dtype == dtype &&
           aligned(item[count]) == vectorized) {
      chunk.item[count] = item[count];
      ++count;
    }
  }

  // Of 32 packs, the most that a row of them has; F: their type.
  template <typename F>
  int units() const {
    int64_t width = 1;
    for (int i = 0; i < count; ++i) width = std::max(width, chunk.item[i].rows.size[3]);
    return int(ceil_div(width, 32 * (vectorized ? kVec<F> : 1)));
  }
};

void launch_attached(const MemoryStepArgs& args, const Run& run, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.bank.size[0] * args.bank.size[2]);
  const size_t smem = entries_smem("memory_merge_", args.order, kEntryWords);
  visit_floating("memory_merge_", run.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const int units = run.units<T>();
    const unsigned threads = memory_threads<T>(int64_t(32) * run.count * units, rows);
    if (run.vectorized) {
      set_max_dynamic_smem(memory_attached_kernel<T, true>, smem);
      PYVIDX_LAUNCH((memory_attached_kernel<T, true>), rows, threads, smem, stream, args, run.chunk, run.count, units);
    } else {
      set_max_dynamic_smem(memory_attached_kernel<T, false>, smem);
      PYVIDX_LAUNCH((memory_attached_kernel<T, false>), rows, threads, smem, stream, args, run.chunk, run.count, units);
    }
  });
  check_launch("memory_attached_kernel");
}

template <typename T, typename F, typename Frame>
void launch_step(const MemoryStepArgs& args, const Run& run, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.bank.size[0] * args.bank.size[2]);
  const size_t smem = entries_smem("memory_merge_", args.order, kEntryWords);
  const int units = run.units<F>();
  const int64_t packs = ceil_div(args.bank.size[3], run.vectorized ? kVec<T> : 1);
  const unsigned threads = memory_threads<T>(std::max(packs, int64_t(32) * run.count * units), rows);
  if (run.vectorized) {
    set_max_dynamic_smem(memory_step_kernel<T, F, Frame, true>, smem);
    PYVIDX_LAUNCH((memory_step_kernel<T, F, Frame, true>), rows, threads, smem, stream, args, run.chunk, run.count,
                  units);
  } else {
    set_max_dynamic_smem(memory_step_kernel<T, F, Frame, false>, smem);
    PYVIDX_LAUNCH((memory_step_kernel<T, F, Frame, false>), rows, threads, smem, stream, args, run.chunk, run.count,
                  units);
  }
  check_launch("memory_step_kernel");
}

// The step with a run of attached tensors, which may be empty. False: there is no kernel for these types together.
template <typename T>
bool launch_step_with(const MemoryStepArgs& args, const Run& run, DType frame, cudaStream_t stream) {
  const DType own = args.bank.dtype;
  if (run.dtype == own && frame == own) return launch_step<T, T, T>(args, run, stream), true;
  bool done = false;
  if constexpr (std::is_same_v<T, float>) {
    auto launch = [&](auto low) {
      using F = typename decltype(low)::type;
      if (run.dtype != DTypeOf<F>::value || (frame != own && frame != run.dtype)) return;
      done = true;
      if (frame == own) return launch_step<T, F, T>(args, run, stream);
      launch_step<T, F, F>(args, run, stream);
    };
    launch(Type<__half>{}), launch(Type<__nv_bfloat16>{});
  }
  return done;
}

// May the rows of the frame be read by packs of T?
template <typename T>
bool fits_packs(const View<3>& frame) {
  if (frame.dtype == DTypeOf<T>::value) return vectorizable<T>(frame);
  return vectorizable<uint16_t, kVec<T>>(frame);
}

}  // namespace

void memory_step_cuda(const MemoryStepArgs& args, cudaStream_t stream) {
  if (checked_rows(args.bank.size[0] * args.bank.size[2]) == 0) return;
  check_columns(args.bank.size[3]);
  for (int i = 0; i < args.attached_count; ++i) check_columns(args.attached[i].rows.size[3]);
  visit_floating("memory_merge_", args.bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const DType frame = args.frame ? args.frame.dtype : args.bank.dtype;
    const bool vectorized = vectorizable<T>(args.bank) && (!args.frame || fits_packs<T>(args.frame));
    for (int done = 0; done < args.attached_count;) {
      const Run run(args, done);
      done += run.count;
      const bool last = done == args.attached_count && run.vectorized == vectorized;
      if (last && launch_step_with<T>(args, run, frame, stream)) return;  // the last run goes along
      launch_attached(args, run, stream);
    }
    Run none;
    none.vectorized = vectorized, none.dtype = frame;
    if (!launch_step_with<T>(args, none, frame, stream)) throw_unsupported_dtype("memory_merge_", frame);
  });
}

void memory_merge_cuda(const MemoryMergeArgs& args, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.bank.size[0] * args.bank.size[2]);
  if (rows == 0) return;
  check_columns(args.bank.size[3]);
  const int64_t pairs = args.out.size[1], turns = ceil_div(pairs, kMergeWarps);
  const unsigned threads = unsigned(32 * ceil_div(pairs, turns));  // so that the last turn is as full as the others
  visit_floating("memory_merge", args.bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (vectorizable<T>(args.bank) && vectorizable<T>(args.out)) {
      PYVIDX_LAUNCH((memory_merge_kernel<T, true>), rows, threads, 0, stream, args);
    } else {
      PYVIDX_LAUNCH((memory_merge_kernel<T, false>), rows, threads, 0, stream, args);
    }
  });
  check_launch("memory_merge_kernel");
}

void memory_merge_backward_cuda(const MemoryMergeBackwardArgs& args, cudaStream_t stream) {
  const unsigned rows = checked_rows(args.grad_bank.size[0] * args.grad_bank.size[1] * args.grad_bank.size[2]);
  if (rows == 0 || args.grad_bank.size[3] == 0) return;
  check_columns(args.grad_bank.size[3]);
  const int64_t blocks = ceil_div(rows, kBackwardWarps);
  visit_floating("memory_merge_backward", args.grad_bank.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (vectorizable<T>(args.grad_out) && vectorizable<T>(args.grad_bank)) {
      PYVIDX_LAUNCH((memory_merge_backward_kernel<T, true>), blocks, 32 * kBackwardWarps, 0, stream, args);
    } else {
      PYVIDX_LAUNCH((memory_merge_backward_kernel<T, false>), blocks, 32 * kBackwardWarps, 0, stream, args);
    }
  });
  check_launch("memory_merge_backward_kernel");
}

}  // namespace pyvidx
#endif
