// A block takes a part: a chunk of rows of one frame. A thread owns the same channels in all of them and keeps their
// sums (for the gate, the norm's weight and bias) in registers; it writes them once, and a second kernel adds the parts
// up in their order. Further blocks of the same launch take the class rows and zero the rows of grad_x that nothing
// kept. Rows that are not aligned or longer than 2048 channels loop over channels, and keep the sums in their scratch
// row. Traffic: every tensor there is once: the gradients in, the row before the norm or x and z for the gate, grad_z
// and grad_x out. See csrc/cpu/gated_fusion_backward.cpp for what is saved and what is computed again.
#include "gated_fusion.cuh"
#include "row_sums.cuh"

namespace pyvidx::cuda {

// Rows in flight: two float rows, one 16-bit row, give a thread 8 values of each of up to four tensors.
template <typename T>
constexpr int kFusionBackwardRows = 8 / kVec<T>;
constexpr int kZeroRows = 16;  // per block
// With both a norm and a gate there are 64 values and sums in 16-bit's registers: they do not fit 80 registers.
template <typename T, bool kNormAndGate>
constexpr int kBackwardBlocks = kFusionBlocks<T> - (kNormAndGate && sizeof(T) == 2 ? 1 : 0);

struct FusionBackwardPlan {
  unsigned class_rows, parts, chunk, chunks;  // blocks: class rows, then parts, then what zeroes grad_x
};

template <int kSize, typename A>
struct RowSums {
  A gate[kSize] = {}, weight[kSize] = {}, bias[kSize] = {};
};

template <typename T, int kSize>
__device__ __forceinline__ void class_row_backward(const GatedFusionBackwardArgs& a, int64_t b, int64_t c,
                                                   const Acc<T> (&w)[kSize]) {
  const int64_t T_ = a.grad_x ? a.grad_x_cls.size[1] : a.x_cls.size[1];
  Acc<T> g[kSize], to_z[kSize], to_x[kSize];
  load_pack<T, kSize>(a.grad_out_cls.at<const T>(b, c), g);
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    if (a.first) g[i] *= Acc<T>(0.5);
    to_z[i] = a.gate ? (1 - w[i]) * g[i] : g[i];
    to_x[i] = (a.gate ? w[i] * g[i] : g[i]) * (Acc<T>(1) / Acc<T>(T_));
  }
  if (a.grad_cls) store_pack<T, kSize>(a.grad_cls.at<T>(b, 0, c), to_z);
  const Acc<T> zeros[kSize] = {};
  for (int64_t i = 1; i < a.grad_cls.size[1]; ++i) store_pack<T, kSize>(a.grad_cls.at<T>(b, i, c), zeros);
  if (a.grad_x) {
    for (int64_t t = 0; t < T_; ++t) store_pack<T, kSize>(a.grad_x_cls.at<T>(b, t, c), to_x);
  }
  if (!a.grad_gate) return;
  Acc<T> mean[kSize] = {}, x[kSize];
#pragma unroll 4
  for (int64_t t = 0; t < T_; ++t) {
    load_pack<T, kSize>(a.x_cls.at<const T>(b, t, c), x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) mean[i] += x[i];
  }
  load_pack<T, kSize>(a.cls.at<const T>(b, c), x);
  Acc<T>* sum = a.partial.at<Acc<T>>(0, a.parts + b, c);
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum[i] = g[i] * (mean[i] * (Acc<T>(1) / Acc<T>(T_)) - x[i]);
}

// What the gradient of kRows rows is made of, kSize channels from c.
template <typename T, int kSize, int kRows>
struct BackwardRows {
  Acc<T> grad[kRows][kSize];    // of out
  Acc<T> normed[kRows][kSize];  // of the norm's result
  Acc<T> value[kRows][kSize];   // the row before the norm; then normalized
  Acc<T> change[kRows][kSize];  // x - z
};

// The same as it lies in memory: with all loads before the first unpacking none waits for another.
template <typename T, int kSize, bool kNorm, bool kGate>
struct PackedRow {
  Packed<T, kSize> grad, normed, value, x, second, z;

  // Is the row before the norm computed again from x and z? And are they read, for that or for the gate?
  static __device__ __forceinline__ bool again(const GatedFusionBackwardArgs& a) {
    return kNorm && a.value.size[3] == 0;
  }
  static __device__ __forceinline__ bool mixed(const GatedFusionBackwardArgs& a) {
    return (kNorm || kGate) && (again(a) || a.grad_gate);
  }

  __device__ __forceinline__ void load(const GatedFusionBackwardArgs& a, const Chunk& chunk, int64_t k, Patch from,
                                       int64_t c) {
    if (kNorm) normed.load(a.grad_normed.at<const T>(chunk.b, chunk.s, k, c));
    if (kNorm && !again(a)) value.load(a.value.at<const T>(chunk.b, chunk.s, k, c));
    if (a.grad_out) grad.load(a.grad_out.at<const T>(chunk.b, chunk.s, k, c));
    if (!mixed(a)) return;
    x.load(a.x.at<const T>(chunk.b, a.pair ? 2 * from.t : from.t, from.p, c));
    z.load(a.z.at<const T>(chunk.b, chunk.s, k, c));
    if (a.pair) second.load(a.x.at<const T>(chunk.b, 2 * from.t + 1, from.p, c));
  }

  // x, of both frames of a pair, and z.
  __device__ __forceinline__ void unpack_mixed(const GatedFusionBackwardArgs& a, Acc<T> (&from_x)[kSize],
                                               Acc<T> (&from_z)[kSize]) const {
    x.unpack(from_x), z.unpack(from_z);
    if (!a.pair) return;
    Acc<T> other[kSize];
    second.unpack(other);
#pragma unroll
    for (int i = 0; i < kSize; ++i) from_x[i] = (from_x[i] + other[i]) * Acc<T>(0.5);
  }

  // What the norm's sums need, and behind their barrier the rest: packed, it takes half the registers until then.
  template <int kRows>
  __device__ __forceinline__ void unpack_norm(const GatedFusionBackwardArgs& a, const Acc<T> (&w)[kSize], int r,
                                              BackwardRows<T, kSize, kRows>& rows) const {
    normed.unpack(rows.normed[r]), value.unpack(rows.value[r]);
    if (!again(a)) return;
    Acc<T> from_x[kSize], from_z[kSize];
    unpack_mixed(a, from_x, from_z);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      rows.value[r][i] = kGate ? (1 - w[i]) * from_z[i] + w[i] * from_x[i] : from_z[i] + from_x[i];
    }
  }
  template <int kRows>
  __device__ __forceinline__ void unpack_rest(const GatedFusionBackwardArgs& a, int r,
                                              BackwardRows<T, kSize, kRows>& rows) const {
    grad.unpack(rows.grad[r]);
    if (!kGate || !a.grad_gate) return;
    Acc<T> from_x[kSize], from_z[kSize];
    unpack_mixed(a, from_x, from_z);
#pragma unroll
    for (int i = 0; i < kSize; ++i) rows.change[r][i] = from_x[i] - from_z[i];
  }
};

// With rows.value normalized and the norm's two means known: the gradients of one row's kSize channels.
template <typename T, int kSize, int kRows, bool kNorm, bool kGate>
__device__ __forceinline__ void finish_row(const GatedFusionBackwardArgs& a, const Chunk& chunk, int64_t k, Patch from,
                                           int64_t c, const Acc<T> (&w)[kSize], const Acc<T> (&weight)[kSize],
                                           Acc<T> rstd, Acc<T> mean_g, Acc<T> mean_gx, int r,
                                           const BackwardRows<T, kSize, kRows>& rows, RowSums<kSize, Acc<T>>& sums) {
  Acc<T> to_x[kSize], to_z[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    Acc<T> g = rows.grad[r][i];
    if constexpr (kNorm) {
      g += (rows.normed[r][i] * weight[i] - mean_g - rows.value[r][i] * mean_gx) * rstd;
      sums.weight[i] += rows.normed[r][i] * rows.value[r][i];
      sums.bias[i] += rows.normed[r][i];
    }
    if (kGate && a.grad_gate) sums.gate[i] += g * rows.change[r][i];
    to_z[i] = kGate ? (1 - w[i]) * g : g;
    to_x[i] = (kGate ? w[i] * g : g) * (a.pair ? Acc<T>(0.5) : Acc<T>(1));
  }
  if (a.grad_z) store_pack<T, kSize>(a.grad_z.at<T>(chunk.b, chunk.s, k, c), to_z);
  if (!a.grad_x) return;
  store_pack<T, kSize>(a.grad_x.at<T>(chunk.b, a.pair ? 2 * from.t : from.t, from.p, c), to_x);
  if (a.pair) store_pack<T, kSize>(a.grad_x.at<T>(chunk.b, 2 * from.t + 1, from.p, c), to_x);
}

// The rows of grad_x that nothing kept, a block's share of them. `step` channels apart, kSize each.
template <typename T, int kSize>
__device__ __forceinline__ void zero_rows(const GatedFusionBackwardArgs& a, int64_t block, int64_t C) {
  const unsigned T_ = unsigned(a.source.size[1]), P = unsigned(a.source.size[2]);
  const int64_t rows = a.source.size[0] * T_ * P;
  const Acc<T> zero[kSize] = {};
  for (int64_t row = block * kZeroRows; row < (block + 1) * kZeroRows && row < rows; ++row) {
    const int64_t b = row / (int64_t(T_) * P), t = row / P % T_, p = row % P;
    if (*a.source.at<const int64_t>(b, t, p) >= 0) continue;
    for (int64_t c = int64_t(threadIdx.x) * kSize; c < C; c += int64_t(blockDim.x) * kSize) {
      store_pack<T, kSize>(a.grad_x.at<T>(b, a.pair ? 2 * t : t, p, c), zero);
      if (a.pair) store_pack<T, kSize>(a.grad_x.at<T>(b, 2 * t + 1, p, c), zero);
    }
  }
}

// Where x or grad_x is touched, the source of row k; anywhere else it does not matter.
__device__ __forceinline__ Patch backward_source(const GatedFusionBackwardArgs& a, const Chunk& chunk, int64_t k) {
  if (!a.grad_x && !a.x) return {0, 0};
  const int64_t T_ = a.grad_x ? a.grad_x.size[1] : a.x.size[1], P = a.grad_x ? a.grad_x.size[2] : a.x.size[2];
  return source_of(a.keep, a.tube, chunk.b, chunk.s, k, a.pair ? T_ / 2 : T_, P);
}

template <typename T, bool kNorm, bool kGate>
__global__ __launch_bounds__(kFusionThreads<T>, kBackwardBlocks<T, kNorm && kGate>) void gated_fusion_backward_kernel(
    GatedFusionBackwardArgs a, FusionBackwardPlan plan) {
  constexpr int kSize = kVec<T>, kRows = kFusionBackwardRows<T>;
  __shared__ Acc<T> shared[2 * kRowWarps<T> * 2 * kRows];
  const View<4>& shape = a.rows();
  const int64_t C = shape.size[3], c = int64_t(threadIdx.x) * kSize;
  const bool own = c < C;
  if (blockIdx.x >= plan.class_rows + plan.parts) {
    return zero_rows<T, kSize>(a, blockIdx.x - plan.class_rows - plan.parts, C);
  }
  Packed<T, kSize> packed_weight;
  Acc<T> w[kSize] = {}, weight[kSize];
  if (kGate && own) load_mix<T, kSize>(a.gate, a.scale, c, w);
  if (blockIdx.x < plan.class_rows) {
    if (own) class_row_backward<T, kSize>(a, blockIdx.x, c, w);
    return;
  }
  if (kNorm && own) packed_weight.load_constant(a.weight.at<const T>(c));
  const unsigned part = blockIdx.x - plan.class_rows;
  const Chunk chunk = chunk_of(part, plan.chunk, plan.chunks, shape.size[1], shape.size[2]);
  const Acc<T> inverse = Acc<T>(1) / Acc<T>(C);
  RowSum<2 * kRows, Acc<T>, kRowWarps<T>> row_sum{shared};
  RowSums<kSize, Acc<T>> sums;
  for (int64_t first = chunk.begin; first < chunk.end; first += kRows) {
    int64_t k[kRows];
    Patch from[kRows];
    PackedRow<T, kSize, kNorm, kGate> packed[kRows];
    BackwardRows<T, kSize, kRows> rows;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // past the end: the last row once more, and nothing is done with it
      k[r] = first + r < chunk.end ? first + r : chunk.end - 1;
      from[r] = backward_source(a, chunk, k[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (own) packed[r].load(a, chunk, k[r], from[r], c);
    }
#pragma unroll
    for (int r = 0; kNorm && r < kRows; ++r) packed[r].unpack_norm(a, w, r, rows);
    Acc<T> mean[2 * kRows] = {}, rstd[kRows] = {};
    if constexpr (kNorm) {
      packed_weight.unpack(weight);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const Acc<T>* stats = a.stats.at<const Acc<T>>(chunk.b, chunk.s, k[r]);
        rstd[r] = stats[1];
        if (!own) continue;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          rows.value[r][i] = (rows.value[r][i] - stats[0]) * rstd[r];
          mean[2 * r] += rows.normed[r][i] * weight[i];
          mean[2 * r + 1] += rows.normed[r][i] * weight[i] * rows.value[r][i];
        }
      }
      row_sum(mean);
#pragma unroll
      for (int i = 0; i < 2 * kRows; ++i) mean[i] *= inverse;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (!own || first + r >= chunk.end) continue;
      packed[r].unpack_rest(a, r, rows);
      finish_row<T, kSize, kRows, kNorm, kGate>(a, chunk, k[r], from[r], c, w, weight, rstd[r], mean[2 * r],
                                                mean[2 * r + 1], r, rows, sums);
    }
  }
  if (!own) return;
  if (kGate && a.grad_gate) store_channels<Acc<T>, kSize>(a.partial.at<Acc<T>>(0, part, c), sums.gate);
  if constexpr (kNorm) {
    store_channels<Acc<T>, kSize>(a.partial.at<Acc<T>>(1, part, c), sums.weight);
    store_channels<Acc<T>, kSize>(a.partial.at<Acc<T>>(2, part, c), sums.bias);
  }
}

template <typename T, bool kNorm, bool kGate>
__global__ __launch_bounds__(kFusionLoopThreads, 2) void gated_fusion_backward_loop_kernel(GatedFusionBackwardArgs a,
                                                                                           FusionBackwardPlan plan) {
  __shared__ Acc<T> shared[2 * kLoopWarps * 2];
  const View<4>& shape = a.rows();
  const int64_t C = shape.size[3];
  if (blockIdx.x >= plan.class_rows + plan.parts) {
    return zero_rows<T, 1>(a, blockIdx.x - plan.class_rows - plan.parts, C);
  }
  const auto mix = [&](int64_t c, Acc<T>(&w)[1]) { w[0] = kGate ? *a.mix.at<Acc<T>>(c) : Acc<T>(0); };
  if (blockIdx.x < plan.class_rows) {
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
      Acc<T> w[1];
      mix(c, w);
      class_row_backward<T, 1>(a, blockIdx.x, c, w);
    }
    return;
  }
  const unsigned part = blockIdx.x - plan.class_rows;
  const Chunk chunk = chunk_of(part, plan.chunk, plan.chunks, shape.size[1], shape.size[2]);
  RowSum<2, Acc<T>, kLoopWarps> row_sum{shared};
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    const Patch from = backward_source(a, chunk, k);
    const Acc<T>* stats = kNorm ? a.stats.at<const Acc<T>>(chunk.b, chunk.s, k) : nullptr;
    BackwardRows<T, 1, 1> rows;
    Acc<T> mean[2] = {}, w[1], weight[1] = {};
    const auto load = [&](int64_t c) {
      mix(c, w);
      PackedRow<T, 1, kNorm, kGate> packed;
      packed.load(a, chunk, k, from, c);
      packed.unpack_norm(a, w, 0, rows), packed.unpack_rest(a, 0, rows);
      if constexpr (kNorm) {
        weight[0] = to_acc(*a.weight.at<const T>(c));
        rows.value[0][0] = (rows.value[0][0] - stats[0]) * stats[1];
      }
    };
    if constexpr (kNorm) {
      for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
        load(c);
        mean[0] += rows.normed[0][0] * weight[0];
        mean[1] += rows.normed[0][0] * weight[0] * rows.value[0][0];
      }
      row_sum(mean);
      mean[0] /= Acc<T>(C), mean[1] /= Acc<T>(C);
    }
    for (int64_t c = threadIdx.x; c < C; c += blockDim.x) {
      load(c);
      RowSums<1, Acc<T>> sums;
      finish_row<T, 1, 1, kNorm, kGate>(a, chunk, k, from, c, w, weight, kNorm ? stats[1] : Acc<T>(0), mean[0], mean[1],
                                        0, rows, sums);
      const auto add = [&](int which, Acc<T> x) {  // only this thread touches channel c of this part
        Acc<T>* sum = a.partial.at<Acc<T>>(which, part, c);
        *sum = k == chunk.begin ? x : *sum + x;
      };
      if (kGate && a.grad_gate) add(0, sums.gate[0]);
      if (kNorm) add(1, sums.weight[0]), add(2, sums.bias[0]);
    }
  }
}

template <typename T>
__global__ __launch_bounds__(kAddUpThreads, 1) void gated_fusion_add_up_kernel(GatedFusionBackwardArgs a,
                                                                               unsigned class_rows) {
  const int which = int(blockIdx.y);
  const View<1>& out = which == 0 ? a.grad_gate : which == 1 ? a.grad_weight : a.grad_bias;
  if (!out) return;
  const int64_t C = out.size[0], count = which == 0 ? a.parts + class_rows : a.parts;
  add_up(a.partial.at<const Acc<T>>(which), C, count, C, [&](int64_t c, Acc<T> sum) {
    if (which == 0) {
      const Acc<T> logit = to_acc(*a.gate.at<const T>(c)) * Acc<T>(a.scale);
      sum *= Acc<T>(a.scale) * sigmoid(logit) * sigmoid(-logit);
    }
    *out.at<T>(c) = from_acc<T>(sum);
  });
}

}  // namespace pyvidx::cuda

#ifndef __CUDACC_RTC__
namespace pyvidx {

using namespace cuda;

namespace {

template <typename T>
bool whole_rows(const GatedFusionBackwardArgs& a) {
  return a.rows().size[3] <= 2048 && vectorizable<T>(a.grad_out) && vectorizable<T>(a.grad_out_cls) &&
         vectorizable<T>(a.grad_normed) && vectorizable<T>(a.value) && vectorizable<T>(a.x) &&
         vectorizable<T>(a.x_cls) && vectorizable<T>(a.z) && vectorizable<T>(a.cls) && vectorizable<T>(a.gate) &&
         vectorizable<T>(a.weight) && vectorizable<T>(a.grad_x) && vectorizable<T>(a.grad_x_cls) &&
         vectorizable<T>(a.grad_z) && vectorizable<T>(a.grad_cls);
}

template <typename T, bool kNorm, bool kGate>
void launch(const GatedFusionBackwardArgs& a, cudaStream_t stream) {
  const View<4>& shape = a.rows();
  const int64_t frames = shape.size[0] * shape.size[1], K = shape.size[2], C = shape.size[3];
  FusionBackwardPlan plan;
  const int64_t class_rows = a.grad_out_cls ? shape.size[0] : 0;
  plan.class_rows = unsigned(class_rows);
  plan.chunk = unsigned(row_chunk(frames, K));
  plan.chunks = unsigned((K + plan.chunk - 1) / plan.chunk);
  const bool any_rows = a.grad_x || a.grad_z || a.grad_gate || kNorm;
  const int64_t zeros = a.grad_x && a.source ? a.source.size[0] * a.source.size[1] * a.source.size[2] : 0;
  const int64_t parts = any_rows ? a.parts : 0, zero_blocks = (zeros + kZeroRows - 1) / kZeroRows;
  const View<4>& x = a.grad_x ? a.grad_x : a.x;
  const int64_t blocks = class_rows + parts + zero_blocks;
  narrow(x.size[1] * x.size[2], "gated_fusion_backward: the tokens of a clip");
  plan.parts = unsigned(parts);
  if (C == 0) return;
  bool done = blocks == 0;
  if constexpr (!std::is_same_v<T, double>) {  // float64 is for checking gradients
    if (!done && whole_rows<T>(a)) {
      const unsigned threads = unsigned((C / kVec<T> + 31) / 32 * 32);
      PYVIDX_LAUNCH((gated_fusion_backward_kernel<T, kNorm, kGate>), blocks, threads, 0, stream, a, plan);
      check_launch("gated_fusion_backward_kernel");
      done = true;
    }
  }
  if (!done) {
    if (kGate) launch_mix<T>(a.gate, a.mix, a.scale, stream);
    PYVIDX_LAUNCH((gated_fusion_backward_loop_kernel<T, kNorm, kGate>), blocks, kFusionLoopThreads, 0, stream, a, plan);
    check_launch("gated_fusion_backward_loop_kernel");
  }
  if (!a.grad_gate && !kNorm) return;
  PYVIDX_LAUNCH(gated_fusion_add_up_kernel<T>, Grid(add_up_blocks(C), 3), kAddUpThreads, 0, stream, a, plan.class_rows);
  check_launch("gated_fusion_add_up_kernel");
}

}  // namespace

void gated_fusion_backward_cuda(const GatedFusionBackwardArgs& args, cudaStream_t stream) {
  visit_dtype<float, double, __half, __nv_bfloat16>("gated_fusion_backward", args.rows().dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (args.grad_normed.size[3] > 0) {
      return args.gate ? launch<T, true, true>(args, stream) : launch<T, true, false>(args, stream);
    }
    return args.gate ? launch<T, false, true>(args, stream) : launch<T, false, false>(args, stream);
  });
}

}  // namespace pyvidx
#endif
