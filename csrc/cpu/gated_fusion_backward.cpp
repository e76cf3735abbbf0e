// One pass over the branch's rows: reads the gradients (grad_out and, with a LayerNorm, grad_normed) and what they need
// (the row before the norm; x and z for the gate), writes grad_z and the kept rows of grad_x. The rows of grad_x that
// nothing kept are zeroed from the inverse table, so that grad_x is written once.
//
// Statistics of the norm come from the forward (8 bytes a row). The row itself is the saved out, or is computed again
// where the gradient of the gate reads x and z anyway: no pass is spent on it alone.
//
// Rows go in small groups, each in two passes (the means that the norm needs, then the gradients), while the next group
// is fetched. Traffic with norm and gate, without grad_x: 5 passes. CPU time on a busy Zen 4, one thread, ViT-L/14:
// 0.74 to 0.80 of a copy of those bytes in float, 0.47 to 0.60 in bfloat16, where the arithmetic binds. Row by row,
// with the sums read and written for each and stores that took turns, it was 0.6 and 0.3 to 0.5.
//
// Tried at v3 in bfloat16, us a row with all in the caches (a copy from memory takes .56): groups of 4 by halves of
// pairs .70, kept; of 3 or 2, no gain; single rows by whole pairs, 2, 3 or 5 fetched ahead, .64, but no gain from
// memory.
#include "level.h"
#include "pairs.h"
#include "parallel.h"
#include "pyvidx/gated_fusion.h"
#include "row_sums.h"

namespace pyvidx {
namespace {

using simd::Acc;
using simd::each_pair;
using simd::load;
using simd::Of;
using simd::store;

enum class Norm { none, saved, again };  // the row before the norm: out as saved, or computed again

// Rows of a group, as many as stay in L1 between their two passes: their sums over rows are read and written once.
template <typename T>
constexpr int64_t kRows = sizeof(T) == 2 ? 4 : 2;
// Channels whose results are collected before they are stored: stores past the caches that take turns with others, of
// the sums or of another row, leave half-filled lines (bfloat16: half the speed).
constexpr int64_t kBlock = 256;

template <typename T>
struct Row {
  const T *grad_out, *grad_normed, *value, *x, *x_pair, *z;
  T *grad_x, *grad_x_pair, *grad_z;
  Acc<T> mean, rstd;       // with a norm: its statistics
  Acc<T> mean_g, mean_gx;  // of g and g * normal, g = grad_normed * weight
};

template <typename T>
struct Group {
  Row<T> rows[kRows<T>];  // from `count` on the last one again
  int64_t count;
};

template <typename T>
struct Channels {
  const Acc<T>* mix;
  const T* weight;
  Acc<T>*gate, *scale, *bias;  // partial sums: of the gate's logit, the norm's weight and bias
};

template <typename T, typename Part>
PYVIDX_SIMD Of<T, Part> source(const Row<T>& r, int64_t c, Part part) {
  auto x = load(r.x + c, part);
  if (r.x_pair != nullptr) x = (x + load(r.x_pair + c, part)) * Acc<T>(0.5);
  return x;
}

template <typename T, bool kGate, Norm kNorm, typename Part>
PYVIDX_SIMD Of<T, Part> value(const Row<T>& r, const Channels<T>& ch, int64_t c, Part part) {
  if constexpr (kNorm == Norm::saved) return load(r.value + c, part);
  const auto x = source(r, c, part), z = load(r.z + c, part);
  if constexpr (!kGate) return z + x;
  const auto w = load(ch.mix + c, part);
  return (1 - w) * z + w * x;  // as forward: a gate of 1 gives x to the bit
}

template <typename A, typename V, typename Part>
PYVIDX_SIMD void add(A* sum, V v, Part part) {
  store(sum, load(sum, part) + v, part);
}

// Fetches c of the rows that the forward had, of a row of the next group.
template <typename T, Norm kNorm, bool kGateGrad>
PYVIDX_SIMD void prefetch_inputs(const Row<T>& next, int64_t c) {
  if constexpr (kNorm == Norm::saved) simd::prefetch(next.value + c);
  if constexpr (kNorm == Norm::again || kGateGrad) {
    simd::prefetch(next.x + c);
    simd::prefetch(next.z + c);
    if (next.x_pair != nullptr) simd::prefetch(next.x_pair + c);
  }
}

template <typename T, bool kGate, Norm kNorm, bool kGateGrad>
void norm_means(Row<T>& r, const Row<T>& next, const Channels<T>& ch, int64_t C) {
  simd::Chains<T> sum_g, sum_gx;
  each_pair<T>(C, [&](int64_t c, auto part) {
    prefetch_inputs<T, kNorm, kGateGrad>(next, c);
    const auto g = load(r.grad_normed + c, part) * load(ch.weight + c, part);
    sum_g += g;
    sum_gx += g * (value<T, kGate, kNorm>(r, ch, c, part) - r.mean);
  });
  r.mean_g = sum_g.total() / Acc<T>(C), r.mean_gx = sum_gx.total() * r.rstd / Acc<T>(C);
}

// Channels [first, first + n) of a group: adds to the sums, leaves the whole gradient of out and what of it goes to z.
template <typename T, bool kGate, Norm kNorm, bool kGateGrad>
PYVIDX_SIMD void backward_block(const Group<T>& group, const Group<T>& next, const Channels<T>& ch, int64_t first,
                                int64_t n, Acc<T> (&to_x)[kRows<T>][kBlock], Acc<T> (&to_z)[kRows<T>][kBlock]) {
  simd::each_half<T>(n, [&](int64_t i, auto part) {
    const int64_t c = first + i;
    constexpr bool kFetch = !std::is_same<decltype(part), simd::Second>::value;  // the line is that of the first
    Of<T, decltype(part)> w = {}, weight = {}, gate = {}, scale = {}, bias = {};
    if constexpr (kGate) w = load(ch.mix + c, part);
    if constexpr (kNorm != Norm::none) {
      weight = load(ch.weight + c, part), scale = load(ch.scale + c, part), bias = load(ch.bias + c, part);
    }
    if constexpr (kGateGrad) gate = load(ch.gate + c, part);
    for (int64_t k = 0; k < group.count; ++k) {
      const Row<T>&r = group.rows[k], &after = next.rows[k];
      Of<T, decltype(part)> g = {};
      if (r.grad_out != nullptr) {
        g = load(r.grad_out + c, part);
        if constexpr (kFetch) simd::prefetch(after.grad_out + c);
      }
      if constexpr (kNorm != Norm::none) {
        if constexpr (kFetch) simd::prefetch(after.grad_normed + c);
        const auto grad = load(r.grad_normed + c, part);
        const auto normal = (value<T, kGate, kNorm>(r, ch, c, part) - r.mean) * r.rstd;
        bias += grad;
        scale += grad * normal;
        g += (grad * weight - r.mean_g - normal * r.mean_gx) * r.rstd;
      } else if constexpr (kFetch) {
        prefetch_inputs<T, kNorm, kGateGrad>(after, c);
      }
      if constexpr (kGateGrad) gate += g * (source(r, c, part) - load(r.z + c, part));
      if (r.grad_z != nullptr) store(to_z[k] + i, kGate ? (1 - w) * g : g, part);
      if (r.grad_x != nullptr) store(to_x[k] + i, (kGate ? w * g : g) * Acc<T>(r.grad_x_pair ? 0.5 : 1), part);
    }
    if constexpr (kNorm != Norm::none) store(ch.scale + c, scale, part), store(ch.bias + c, bias, part);
    if constexpr (kGateGrad) store(ch.gate + c, gate, part);
  });
}

template <typename T, bool kGate, Norm kNorm, bool kGateGrad>
void backward_rows(Group<T>& group, const Group<T>& next, const Channels<T>& ch, int64_t C, bool stream) {
  alignas(64) Acc<T> to_x[kRows<T>][kBlock], to_z[kRows<T>][kBlock];
  if constexpr (kNorm != Norm::none) {
    for (int64_t k = 0; k < group.count; ++k) {
      norm_means<T, kGate, kNorm, kGateGrad>(group.rows[k], next.rows[k], ch, C);
    }
  }
  for (int64_t first = 0; first < C; first += kBlock) {
    const int64_t n = C - first < kBlock ? C - first : kBlock;
    backward_block<T, kGate, kNorm, kGateGrad>(group, next, ch, first, n, to_x, to_z);
    const auto put = [&](T* row, const Acc<T>* from) {
      if (row == nullptr) return;
      T* out = row + first;
      each_pair<T>(n, out, stream, [&](int64_t i, auto part) { store(out + i, load(from + i, part), part); });
    };
    for (int64_t k = 0; k < group.count; ++k) {
      put(group.rows[k].grad_z, to_z[k]);
      put(group.rows[k].grad_x, to_x[k]);
      put(group.rows[k].grad_x_pair, to_x[k]);
    }
  }
}

// The class row of video b: grad_cls, the class rows of grad_x, and its part in the gate's gradient.
template <typename T>
void class_row(const GatedFusionBackwardArgs& a, int64_t b, int64_t C) {
  const int64_t T_ = a.grad_x ? a.grad_x_cls.size[1] : a.x_cls.size[1];
  const Acc<T>* mix = a.gate ? a.mix.at<const Acc<T>>() : nullptr;
  const Acc<T> share = a.first ? Acc<T>(0.5) : Acc<T>(1);
  each_pair<T>(C, [&](int64_t c, auto part) {
    const auto g = load(a.grad_out_cls.at<const T>(b) + c, part) * share;
    auto to_x = g, to_z = g;
    if (mix != nullptr) {
      const auto w = load(mix + c, part);
      to_x = w * g, to_z = (1 - w) * g;
    }
    if (a.grad_cls) store(a.grad_cls.at<T>(b, 0) + c, to_z, part);
    for (int64_t i = 1; i < a.grad_cls.size[1]; ++i) store(a.grad_cls.at<T>(b, i) + c, Of<T, decltype(part)>{}, part);
    if (a.grad_x) {
      to_x = to_x * (1 / Acc<T>(T_));
      for (int64_t t = 0; t < T_; ++t) store(a.grad_x_cls.at<T>(b, t) + c, to_x, part);
    }
    if (a.grad_gate) {
      Of<T, decltype(part)> mean = {};
      for (int64_t t = 0; t < T_; ++t) mean += load(a.x_cls.at<const T>(b, t) + c, part);
      store(a.partial.at<Acc<T>>(0, a.parts + b) + c,
            g * (mean * (1 / Acc<T>(T_)) - load(a.cls.at<const T>(b) + c, part)), part);
    }
  });
}

[[noreturn]] void throw_not_inverse() {
  throw_out_of_range("gated_fusion_backward: source must be the inverse of keep, which names a token at most once");
}

// Row k of frame s of video b.
template <typename T, Norm kNorm, bool kGateGrad>
Row<T> row_at(const GatedFusionBackwardArgs& a, int64_t b, int64_t s, int64_t k) {
  int64_t t = s, p = k;
  if (a.keep && (a.grad_x || a.x)) {
    const View<4>& x = a.grad_x ? a.grad_x : a.x;
    const int64_t P = x.size[2], limit = a.tube ? P : x.size[1] / (a.pair ? 2 : 1) * P;
    const int64_t index = *a.keep.at<const int64_t>(b, a.tube ? 0 : s, k);
    if (index < 0 || index >= limit) throw_index("gated_fusion_backward: keep must be", index, limit);
    if (a.tube) {
      p = index;
    } else {
      t = index / P, p = index % P;
    }
    // Two rows of one token would be written by two threads.
    if (a.grad_x && *a.source.at<const int64_t>(b, t, p) != s * a.rows().size[2] + k) throw_not_inverse();
  }
  Row<T> r = {};
  if (a.grad_out) r.grad_out = a.grad_out.at<const T>(b, s, k);
  if constexpr (kNorm != Norm::none) {
    const Acc<T>* stats = a.stats.at<const Acc<T>>(b, s, k);
    r.grad_normed = a.grad_normed.at<const T>(b, s, k), r.mean = stats[0], r.rstd = stats[1];
  }
  if constexpr (kNorm == Norm::saved) r.value = a.value.at<const T>(b, s, k);
  if constexpr (kNorm == Norm::again || kGateGrad) {
    r.z = a.z.at<const T>(b, s, k), r.x = a.x.at<const T>(b, a.pair ? 2 * t : t, p);
    if (a.pair) r.x_pair = r.x + a.x.stride[1];
  }
  if (a.grad_x) {
    r.grad_x = a.grad_x.at<T>(b, a.pair ? 2 * t : t, p);
    if (a.pair) r.grad_x_pair = r.grad_x + a.grad_x.stride[1];
  }
  if (a.grad_z) r.grad_z = a.grad_z.at<T>(b, s, k);
  return r;
}

template <typename T, bool kGate, Norm kNorm, bool kGateGrad>
void rows_of_parts(const GatedFusionBackwardArgs& a, int64_t begin, int64_t end, bool stream) {
  const View<4>& shape = a.rows();
  const int64_t S = shape.size[1], K = shape.size[2], C = shape.size[3];
  const int64_t chunk = row_chunk(shape.size[0] * S, K), chunks = (K + chunk - 1) / chunk;
  const auto rows_in = [&](int64_t part) {
    const int64_t first = part % chunks * chunk;
    return K - first < chunk ? K - first : chunk;
  };
  const auto group_at = [&](int64_t part, int64_t row) {
    const int64_t left = rows_in(part) - row, frame = part / chunks, k = part % chunks * chunk + row;
    Group<T> group;
    group.count = left < kRows<T> ? left : kRows<T>;
    for (int64_t i = 0; i < kRows<T>; ++i) {
      const int64_t at = i < group.count ? k + i : k + group.count - 1;
      group.rows[i] = row_at<T, kNorm, kGateGrad>(a, frame / S, frame % S, at);
    }
    return group;
  };
  Group<T> next = group_at(begin, 0);
  for (int64_t part = begin; part < end; ++part) {
    Channels<T> ch{a.mix.at<const Acc<T>>(), a.weight.at<const T>(), nullptr, nullptr, nullptr};
    const auto zeroed = [&](int64_t which) {
      Acc<T>* sum = a.partial.at<Acc<T>>(which, part);
      __builtin_memset(sum, 0, C * sizeof *sum);
      return sum;
    };
    if constexpr (kGateGrad) ch.gate = zeroed(0);
    if constexpr (kNorm != Norm::none) ch.scale = zeroed(1), ch.bias = zeroed(2);
    for (int64_t row = 0; row < rows_in(part); row += kRows<T>) {
      Group<T> group = next;  // past the last one: the same again, which is in the caches
      if (row + kRows<T> < rows_in(part)) {
        next = group_at(part, row + kRows<T>);
      } else if (part + 1 < end) {
        next = group_at(part + 1, 0);
      }
      backward_rows<T, kGate, kNorm, kGateGrad>(group, next, ch, C, stream);
    }
  }
}

// The rows of grad_x that nothing kept.
template <typename T>
void zero_rows(const GatedFusionBackwardArgs& a, const Executor& executor, bool stream) {
  const int64_t T_ = a.source.size[1], P = a.source.size[2], C = a.grad_x.size[3], frames = a.pair ? 2 : 1;
  const int64_t S = a.rows().size[1], K = a.rows().size[2];
  parallel_for(executor, a.source.size[0] * T_ * P, kGrainElements / (C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / (T_ * P), t = row / P % T_, p = row % P;
      const int64_t source = *a.source.at<const int64_t>(b, t, p);
      if (source >= 0) {  // a row was written here, if that row knows of it
        if (source >= S * K) throw_index("gated_fusion_backward: source must be", source, S * K, true);
        const int64_t index = *a.keep.at<const int64_t>(b, a.tube ? 0 : source / K, source % K);
        if (index + (a.tube ? source / K * P : 0) != t * P + p) throw_not_inverse();
        continue;
      }
      for (int64_t f = 0; f < frames; ++f) {
        T* out = a.grad_x.at<T>(b, frames * t + f, p);
        each_pair<T>(C, out, stream, [&](int64_t c, auto part) { store(out + c, Of<T, decltype(part)>{}, part); });
      }
    }
    simd::fence();
  });
}

template <typename T, bool kGate, Norm kNorm, bool kGateGrad>
void run(const GatedFusionBackwardArgs& a, const Executor& executor) {
  const View<4>& shape = a.rows();
  const int64_t B = shape.size[0], rows = B * shape.size[1] * shape.size[2], C = shape.size[3];
  const bool stream = rows * C * int64_t(sizeof(T)) > simd::kStreamBytes;
  Acc<T>* mix = a.mix.at<Acc<T>>();
  if constexpr (kGate) {
    each_pair<T>(C, [&](int64_t c, auto part) {
      store(mix + c, simd::sigmoid(load(a.gate.at<const T>() + c, part) * Acc<T>(a.scale)), part);
    });
  }
  const bool any_rows = a.grad_x || a.grad_z || kGateGrad || kNorm != Norm::none;
  const int64_t class_rows = a.grad_out_cls ? B : 0, parts = any_rows ? a.parts : 0;
  const int64_t chunk = row_chunk(B * shape.size[1], shape.size[2]);
  parallel_for(executor, class_rows + parts, kGrainElements / (chunk * C + 1) + 1, [&](int64_t begin, int64_t end) {
    for (; begin < end && begin < class_rows; ++begin) class_row<T>(a, begin, C);
    if (begin < end) {
      rows_of_parts<T, kGate, kNorm, kGateGrad>(a, begin - class_rows, end - class_rows, stream);
    }
    simd::fence();
  });
  if (a.grad_x && a.source) zero_rows<T>(a, executor, stream);
  const auto total = [&](int64_t which, int64_t count, auto&& put) {
    add_up<T>(a.partial.at<const Acc<T>>(which), C, count, C, executor, put);
  };
  if constexpr (kGateGrad) {
    total(0, a.parts + class_rows, [&](int64_t c, auto sum, auto part) {
      const auto logit = load(a.gate.at<const T>() + c, part) * Acc<T>(a.scale);
      store(a.grad_gate.at<T>(c), sum * simd::sigmoid(logit) * simd::sigmoid(-logit) * Acc<T>(a.scale), part);
    });
  }
  if constexpr (kNorm != Norm::none) {
    total(1, a.parts, [&](int64_t c, auto sum, auto part) { store(a.grad_weight.at<T>(c), sum, part); });
    total(2, a.parts, [&](int64_t c, auto sum, auto part) { store(a.grad_bias.at<T>(c), sum, part); });
  }
}

template <typename T, bool kGate, bool kGateGrad>
void pick(const GatedFusionBackwardArgs& a, const Executor& executor) {
  if (a.grad_normed.size[3] == 0) return run<T, kGate, Norm::none, kGateGrad>(a, executor);
  return a.value.size[3] > 0 ? run<T, kGate, Norm::saved, kGateGrad>(a, executor)
                             : run<T, kGate, Norm::again, kGateGrad>(a, executor);
}

void backward(const GatedFusionBackwardArgs& a, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("gated_fusion_backward", a.rows().dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    if (!a.gate) return pick<T, false, false>(a, executor);
    return a.grad_gate ? pick<T, true, true>(a, executor) : pick<T, true, false>(a, executor);
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(gated_fusion_backward, GatedFusionBackwardArgs, backward)
