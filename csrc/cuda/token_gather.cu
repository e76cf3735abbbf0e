// One warp per output row, 16 bytes per lane and access; rows are 1 KB and longer, so a gathered row is read coalesced.
// Traffic: 2 passes over the kept rows (position and time rows stay in L2). The backward kernel is the same walk over
// the rows of grad_x, each of which has one source row or none.
//
// A store is a wall for the loads behind it, so a lane loads four accesses of each row before it stores the first.
// Versions, half (registers of sm_70 and sm_90; loads in a row; instructions of the kernel at sm_90):
//   an access at a time           47, 50     3   .43 of a copy in a model of a V100
//   four, 64-bit divisions        72, 75    12   880; .56 in that model, a prediction
//   four, 32-bit divisions        72, 76    12   568   kept
#include "block.cuh"
#include "pyvidx/token_gather.h"

namespace pyvidx::cuda {

constexpr int kGatherThreads = 256;
constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kGatherAhead = 4;  // accesses of a lane that are under way together

// out = x + position + time, over the C elements of a row; absent rows are nullptr.
template <typename T, bool kVectorized>
__device__ __forceinline__ void gather_row(const T* x, const T* position, const T* time, T* out, int64_t C) {
  const int lane = threadIdx.x % 32;
  if constexpr (kVectorized) {
    constexpr int kStep = 32 * kVec<T>;
    for (int64_t first = lane * kVec<T>; first < C; first += kGatherAhead * kStep) {
      const T* const rows[3] = {x, position, time};
      uint4 bits[3][kGatherAhead] = {};
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (!rows[j]) continue;
#pragma unroll
        for (int i = 0; i < kGatherAhead; ++i) {
          if (first + i * kStep < C) bits[j][i] = load16(rows[j] + first + i * kStep);
        }
      }
#pragma unroll
      for (int i = 0; i < kGatherAhead; ++i) {
        if (first + i * kStep >= C) break;
        Acc<T> sum[kVec<T>], row[kVec<T>];
        unpack<T>(bits[0][i], sum);
#pragma unroll
        for (int j = 1; j < 3; ++j) {
          if (!rows[j]) continue;
          unpack<T>(bits[j][i], row);
#pragma unroll
          for (int k = 0; k < kVec<T>; ++k) sum[k] += row[k];
        }
        store_vec(out + first + i * kStep, sum);
      }
    }
  } else {
    for (int64_t c = lane; c < C; c += 32) {
      Acc<T> sum = x ? to_acc(x[c]) : Acc<T>(0);
      if (position) sum += to_acc(position[c]);
      if (time) sum += to_acc(time[c]);
      out[c] = from_acc<T>(sum);
    }
  }
}

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kGatherThreads) void token_gather_kernel(TokenGatherArgs a) {
  const unsigned T_ = unsigned(a.x.size[1]), P = unsigned(a.x.size[2]);
  const unsigned S = unsigned(a.out.size[1]), K = unsigned(a.out.size[2]);
  const int64_t C = a.x.size[3];
  const unsigned row = blockIdx.x * kGatherWarps + threadIdx.x / 32;
  if (row >= a.out.size[0] * S * K) return;
  const unsigned group = row / K, b = group / S, s = group % S, k = row % K;
  const int64_t found = *a.keep.at<const int64_t>(b, a.tube ? 0 : s, k);
  if (found < 0 || found >= (a.tube ? P : T_ * P)) __trap();  // an index out of range: as index_select does
  const unsigned index = unsigned(found), t = a.tube ? s : index / P, p = a.tube ? index : index % P;
  gather_row<T, kVectorized>(a.x.at<const T>(b, t, p), a.position ? a.position.at<const T>(p) : nullptr,
                             a.time ? a.time.at<const T>(t) : nullptr, a.out.at<T>(b, s, k), C);
}

template <typename T, bool kVectorized>
__global__ __launch_bounds__(kGatherThreads) void token_gather_backward_kernel(TokenGatherBackwardArgs a) {
  const unsigned T_ = unsigned(a.grad_x.size[1]), P = unsigned(a.grad_x.size[2]), K = unsigned(a.grad_out.size[2]);
  const int64_t C = a.grad_x.size[3];
  const unsigned row = blockIdx.x * kGatherWarps + threadIdx.x / 32;
  if (row >= a.grad_x.size[0] * T_ * P) return;
  const unsigned group = row / P, b = group / T_, t = group % T_, p = row % P;
  const int64_t source = *a.source.at<const int64_t>(b, t, p);
  if (source >= a.grad_out.size[1] * K) __trap();
  const T* grad = source < 0 ? nullptr : a.grad_out.at<const T>(b, unsigned(source) / K, unsigned(source) % K);
  gather_row<T, kVectorized>(grad, nullptr, nullptr, a.grad_x.at<T>(b, t, p), C);
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

// Rows are counted in 32 bits on the device: a 64-bit division is a subroutine call.
static void check_gathered(int64_t rows) { narrow(rows + kGatherWarps, "token_gather: B * T * P and B * S * K"); }

void token_gather_cuda(const TokenGatherArgs& args, cudaStream_t stream) {
  const int64_t rows = args.out.size[0] * args.out.size[1] * args.out.size[2];
  if (rows == 0 || args.x.size[3] == 0) return;
  check_gathered(rows), check_gathered(args.x.size[1] * args.x.size[2]);
  const int64_t blocks = ceil_div(rows, kGatherWarps);
  visit_dtype<float, double, __half, __nv_bfloat16>("token_gather", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const bool vectorized = vectorizable<T>(args.x) && vectorizable<T>(args.out) &&
                            (!args.position || vectorizable<T>(args.position)) &&
                            (!args.time || vectorizable<T>(args.time));
    if (vectorized) {
      PYVIDX_LAUNCH((token_gather_kernel<T, true>), blocks, kGatherThreads, 0, stream, args);
    } else {
      PYVIDX_LAUNCH((token_gather_kernel<T, false>), blocks, kGatherThreads, 0, stream, args);
    }
  });
  check_launch("token_gather_kernel");
}

void token_gather_backward_cuda(const TokenGatherBackwardArgs& args, cudaStream_t stream) {
  const int64_t rows = args.grad_x.size[0] * args.grad_x.size[1] * args.grad_x.size[2];
  if (rows == 0 || args.grad_x.size[3] == 0) return;
  check_gathered(rows), check_gathered(args.grad_out.size[1] * args.grad_out.size[2]);
  const int64_t blocks = ceil_div(rows, kGatherWarps);
  visit_dtype<float, double, __half, __nv_bfloat16>("token_gather_backward", args.grad_x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (vectorizable<T>(args.grad_out) && vectorizable<T>(args.grad_x)) {
      PYVIDX_LAUNCH((token_gather_backward_kernel<T, true>), blocks, kGatherThreads, 0, stream, args);
    } else {
      PYVIDX_LAUNCH((token_gather_backward_kernel<T, false>), blocks, kGatherThreads, 0, stream, args);
    }
  });
  check_launch("token_gather_backward_kernel");
}

}  // namespace pyvidx
#endif
