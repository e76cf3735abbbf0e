// A block takes a chunk of rows of one frame, some at a time: a thread owns 16 bytes of channels in each. The class
// rows are the first blocks of the same launch, so that their strided reads hide behind the rest. Traffic: 3 passes
// over the branch's rows (read x, read z, write out), 4 with the LayerNorm; 2 or 3 for the first input. w is computed
// once per block. The norm's row is in registers; its mean and variance are two sums over the block, for all rows in
// flight at once. Rows that are not aligned or longer than 2048 channels go through a second kernel: w comes from a
// scratch row, and the norm reads x and z three times (twice from the caches).
//
// Tried, half, gate and norm, T = 8 (registers of sm_70 and sm_90; rounds of loads; predicted share of a copy, H200):
//   the norm's parameters behind the gate             120, 80    4    .84
//   on their way with it, unpacked where they serve   122, 80    3    .87   kept
#include "gated_fusion.cuh"

namespace pyvidx::cuda {

// Rows in flight: as many as give a thread 16 values, that is two to four outstanding loads.
template <typename T>
constexpr int kFusionRows = 16 / kVec<T>;

template <typename T, int kSize, Fusion kForm>
__device__ __forceinline__ void class_row(const GatedFusionArgs& a, int64_t b, int64_t c, const Acc<T> (&w)[kSize]) {
  const int64_t T_ = a.x_cls.size[1];
  Acc<T> mean[kSize] = {}, x[kSize], z[kSize], out[kSize];
#pragma unroll 4
  for (int64_t t = 0; t < T_; ++t) {
    load_pack<T, kSize>(a.x_cls.at<const T>(b, t, c), x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) mean[i] += x[i];
  }
  load_pack<T, kSize>(a.cls.at<const T>(b, c), z);
  if constexpr (kForm == Fusion::first) load_pack<T, kSize>(a.position.at<const T>(0, c), x);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    mean[i] *= Acc<T>(1) / Acc<T>(T_);
    if constexpr (kForm == Fusion::first) out[i] = (mean[i] + z[i] + x[i]) * Acc<T>(0.5);
    if constexpr (kForm == Fusion::sum) out[i] = z[i] + mean[i];
    if constexpr (kForm == Fusion::gate) out[i] = (1 - w[i]) * z[i] + w[i] * mean[i];
  }
  store_pack<T, kSize>(a.out_cls.at<T>(b, c), out);
}

// kSize channels from c of kRows rows of the branch, not rounded. Loads first, so that all are under way together.
template <typename T, int kSize, int kRows, Fusion kForm>
__device__ __forceinline__ void fuse(const GatedFusionArgs& a, const Chunk& chunk, const int64_t (&k)[kRows],
                                     const Patch (&from)[kRows], int64_t c, const Acc<T> (&w)[kSize],
                                     Acc<T> (&v)[kRows][kSize]) {
  Acc<T> z[kRows][kSize], more[kRows][kSize];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    load_pack<T, kSize>(a.x.at<const T>(chunk.b, a.pair ? 2 * from[r].t : from[r].t, from[r].p, c), v[r]);
    if constexpr (kForm == Fusion::first) {
      load_pack<T, kSize>(a.position.at<const T>(1 + from[r].p, c), z[r]);
      load_pack<T, kSize>(a.time.at<const T>(from[r].t, c), more[r]);
    } else {
      load_pack<T, kSize>(a.z.at<const T>(chunk.b, chunk.s, k[r], c), z[r]);
    }
  }
  if (a.pair) {
    Acc<T> second[kRows][kSize];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      load_pack<T, kSize>(a.x.at<const T>(chunk.b, 2 * from[r].t + 1, from[r].p, c), second[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[r][i] = (v[r][i] + second[r][i]) * Acc<T>(0.5);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kForm == Fusion::first) v[r][i] += z[r][i] + more[r][i];
      if constexpr (kForm == Fusion::sum) v[r][i] += z[r][i];
      if constexpr (kForm == Fusion::gate) v[r][i] = (1 - w[i]) * z[r][i] + w[i] * v[r][i];
    }
  }
}

template <typename T, Fusion kForm>
__global__ __launch_bounds__(kFusionThreads<T>,
                             kFusionBlocks<T>) void gated_fusion_kernel(GatedFusionArgs a, unsigned class_rows,
                                                                        unsigned chunk_rows, unsigned chunks) {
  constexpr int kSize = kVec<T>, kRows = kFusionRows<T>;
  __shared__ Acc<T> shared[2 * kRowWarps<T> * kRows];
  const int64_t C = a.x.size[3], c = int64_t(threadIdx.x) * kSize;
  const bool own = c < C, norm = a.normed.size[3] > 0;
  Acc<T> w[kSize] = {};
  Packed<T, kSize> weight, bias;  // on their way while the gate is
  weight.load_if(norm && own, norm ? a.weight.at<const T>(c) : nullptr);
  bias.load_if(norm && own, norm ? a.bias.at<const T>(c) : nullptr);
  if (kForm == Fusion::gate && own) load_mix<T, kSize>(a.gate, a.scale, c, w);
  if (blockIdx.x < class_rows) {
    if (own) class_row<T, kSize, kForm>(a, blockIdx.x, c, w);
    return;
  }
  const int64_t T_ = a.pair ? a.x.size[1] / 2 : a.x.size[1], P = a.x.size[2];
  const View<4>& rows = a.rows();
  const Chunk chunk = chunk_of(blockIdx.x - class_rows, chunk_rows, chunks, rows.size[1], rows.size[2]);
  const Acc<T> inverse = Acc<T>(1) / Acc<T>(C);
  RowSum<kRows, Acc<T>, kRowWarps<T>> row_sum{shared};
  for (int64_t first = chunk.begin; first < chunk.end; first += kRows) {
    int64_t k[kRows];
    Patch from[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // past the end: the last row once more, and no store
      k[r] = first + r < chunk.end ? first + r : chunk.end - 1;
      from[r] = source_of(a.keep, a.tube, chunk.b, chunk.s, k[r], T_, P);
    }
    Acc<T> v[kRows][kSize] = {};
    if (own) fuse<T, kSize, kRows, kForm>(a, chunk, k, from, c, w, v);
    if (a.out && own) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (first + r < chunk.end) store_pack<T, kSize>(a.out.at<T>(chunk.b, chunk.s, k[r], c), v[r]);
      }
    }
    if (!norm) continue;
    Acc<T> mean[kRows] = {}, rstd[kRows] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) mean[r] += v[r][i];
    }
    row_sum(mean);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      mean[r] *= inverse;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const Acc<T> d = own ? v[r][i] - mean[r] : Acc<T>(0);
        rstd[r] += d * d;
      }
    }
    row_sum(rstd);
    Acc<T> scale[kSize], shift[kSize];
    weight.unpack(scale), bias.unpack(shift);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      rstd[r] = rsqrt(rstd[r] * inverse + Acc<T>(a.eps));
      if (!own || first + r >= chunk.end) continue;
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[r][i] = (v[r][i] - mean[r]) * rstd[r] * scale[i] + shift[i];
      store_pack<T, kSize>(a.normed.at<T>(chunk.b, chunk.s, k[r], c), v[r]);
      if (threadIdx.x == 0) {
        Acc<T>* stats = a.stats.at<Acc<T>>(chunk.b, chunk.s, k[r]);
        stats[0] = mean[r], stats[1] = rstd[r];
      }
    }
  }
}

template <typename T, Fusion kForm>
__global__ __launch_bounds__(kFusionLoopThreads,
                             2) void gated_fusion_loop_kernel(GatedFusionArgs a, unsigned class_rows,
                                                              unsigned chunk_rows, unsigned chunks) {
  __shared__ Acc<T> shared[2 * kLoopWarps];
  const int64_t C = a.x.size[3];
  const auto mix = [&](int64_t c, Acc<T>(&w)[1]) { w[0] = kForm == Fusion::gate ? *a.mix.at<Acc<T>>(c) : Acc<T>(0); };
  if (blockIdx.x < class_rows) {
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
      Acc<T> w[1];
      mix(c, w);
      class_row<T, 1, kForm>(a, blockIdx.x, c, w);
    }
    return;
  }
  const int64_t T_ = a.pair ? a.x.size[1] / 2 : a.x.size[1], P = a.x.size[2];
  const View<4>& rows = a.rows();
  const Chunk chunk = chunk_of(blockIdx.x - class_rows, chunk_rows, chunks, rows.size[1], rows.size[2]);
  RowSum<1, Acc<T>, kLoopWarps> row_sum{shared};
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const Patch from[1] = {source_of(a.keep, a.tube, chunk.b, chunk.s, k, T_, P)};
    const int64_t at[1] = {k};
    const auto value = [&](int64_t c) {
      Acc<T> w[1], v[1][1];
      mix(c, w);
      fuse<T, 1, 1, kForm>(a, chunk, at, from, c, w, v);
      return v[0][0];
    };
    Acc<T> mean[1] = {}, rstd[1] = {};
    if (a.normed) {
      for (int64_t c = threadIdx.x; c < C; c += blockDim.x) mean[0] += value(c);
      row_sum(mean);
      mean[0] /= Acc<T>(C);
      for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
        const Acc<T> d = value(c) - mean[0];
        rstd[0] += d * d;
      }
      row_sum(rstd);
      rstd[0] = rsqrt(rstd[0] / Acc<T>(C) + Acc<T>(a.eps));
      if (threadIdx.x == 0) {
        Acc<T>* stats = a.stats.at<Acc<T>>(chunk.b, chunk.s, k);
        stats[0] = mean[0], stats[1] = rstd[0];
      }
    }
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {  // out may be z: only now is it written
      const Acc<T> v = value(c);
      if (a.out) *a.out.at<T>(chunk.b, chunk.s, k, c) = from_acc<T>(v);
      if (a.normed) {
        const Acc<T> scaled = (v - mean[0]) * rstd[0] * to_acc(*a.weight.at<const T>(c));
        *a.normed.at<T>(chunk.b, chunk.s, k, c) = from_acc<T>(scaled + to_acc(*a.bias.at<const T>(c)));
      }
    }
  }
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

template <typename T>
bool whole_rows(const GatedFusionArgs& a) {
  return a.x.size[3] <= 2048 && vectorizable<T>(a.x) && vectorizable<T>(a.x_cls) && vectorizable<T>(a.z) &&
         vectorizable<T>(a.cls) && vectorizable<T>(a.gate) && vectorizable<T>(a.position) && vectorizable<T>(a.time) &&
         vectorizable<T>(a.weight) && vectorizable<T>(a.bias) && vectorizable<T>(a.out) && vectorizable<T>(a.out_cls) &&
         vectorizable<T>(a.normed);
}

template <typename T, Fusion kForm>
void launch(const GatedFusionArgs& a, cudaStream_t stream) {
  const View<4>& shape = a.rows();
  const int64_t frames = shape.size[0] * shape.size[1], K = shape.size[2], C = a.x.size[3];
  const int64_t class_rows = a.out_cls ? a.out_cls.size[0] : 0;
  // Small enough that one video fills a GPU, large enough that reading w and the norm's parameters does not count.
  const int64_t wanted = frames * K < 4096 ? 4 : frames * K < 16384 ? 8 : 16, chunk = wanted < K || K == 0 ? wanted : K;
  const int64_t chunks = (K + chunk - 1) / chunk;
  const int64_t blocks = class_rows + frames * chunks;
  narrow(a.x.size[1] * a.x.size[2], "gated_fusion: the tokens of a clip");  // source_of divides in 32 bits
  if (blocks == 0 || C == 0) return;
  if constexpr (!std::is_same_v<T, double>) {  // float64 is for checking gradients
    if (whole_rows<T>(a)) {
      const unsigned threads = unsigned((C / kVec<T> + 31) / 32 * 32);
      PYVIDX_LAUNCH((gated_fusion_kernel<T, kForm>), blocks, threads, 0, stream, a, unsigned(class_rows),
                    unsigned(chunk), unsigned(chunks));
      return check_launch("gated_fusion_kernel");
    }
  }
  if (kForm == Fusion::gate) launch_mix<T>(a.gate, a.mix, a.scale, stream);
  PYVIDX_LAUNCH((gated_fusion_loop_kernel<T, kForm>), blocks, kFusionLoopThreads, 0, stream, a, unsigned(class_rows),
                unsigned(chunk), unsigned(chunks));
  check_launch("gated_fusion_loop_kernel");
}

}  // namespace

void gated_fusion_cuda(const GatedFusionArgs& args, cudaStream_t stream) {
  visit_dtype<float, double, __half, __nv_bfloat16>("gated_fusion", args.x.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (args.position) return launch<T, Fusion::first>(args, stream);
    return args.gate ? launch<T, Fusion::gate>(args, stream) : launch<T, Fusion::sum>(args, stream);
  });
}

}  // namespace pyvidx
#endif
