// A task is one (b, p, h), neighboring heads after each other. Its T rows of q, k and v are packed as float (at their
// own strides, often powers of two, they would evict each other from L1), both products run in registers from there,
// and the scores stay in L1 or L2. Scores are held transposed, w[key][query]: then maxima and sums over the keys go
// along the rows, with no horizontal operation. Traffic: 4 passes (q, k, v, out), 7 backward. Arithmetic: 4 T^2 D flops
// per head, 10 T^2 D backward; against 4 T D elements of traffic it binds from about T = 16 (float) or T = 8 (16-bit)
// on.
#include "temporal_attention.h"

#include "eight_frames.h"
#include "level.h"
#include "temporal_attention_bf16.h"

namespace pyvidx {
namespace {

template <typename T>
void attend(const TemporalAttentionArgs& a, const Executor& executor) {
  using A = Acc<T>;
  const int64_t frames = a.qkv.size[1], D = a.qkv.size[5], tasks = a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  if (frames == 0 || D == 0) return;
  if (frames == kEight && D % kLine<T> == 0) return attend_eight<T>(a, executor);
  const bool stream = streams<T>(a.out);
  const int64_t ld = round_up(D, kWidth<T>);
  const bool whole = ld == D, few = whole && frames <= 8;  // few: a product reads its right operand only once
  with_query_vector<T>(frames, [&](auto query_vector) {
    using V = decltype(query_vector);
    const int64_t queries = round_up(frames, sizeof(V) / sizeof(A));
    parallel_for(executor, tasks, kGrainElements / (4 * frames * D) + 1, [&](int64_t begin, int64_t end) {
      Scratch scratch((3 * frames * ld + ld * queries + frames * queries) * sizeof(A) + 5 * 64);
      A *q_memory = scratch.take<A>(frames * ld), *k_memory = scratch.take<A>(frames * ld);
      A *v_memory = scratch.take<A>(frames * ld), *sums = q_memory;
      A *qt = scratch.take<A>(ld * queries), *w = scratch.take<A>(frames * queries);
      each_task(a.qkv, begin, end, 1, [&](Task task, Task next) {
        const Prefetch next_qk(D, part_of<T>(a.qkv, next, 0), part_of<T>(a.qkv, next, 1));
        const Prefetch next_v(D, part_of<T>(a.qkv, next, 2));
        const auto q = as_floats<T>(part_of<T>(a.qkv, task, 0), frames, D, whole, q_memory, ld);
        const auto k = as_floats<T>(part_of<T>(a.qkv, task, 1), frames, D, whole, k_memory, ld);
        transpose<V>(q, frames, ld, qt, queries);
        product<V>(frames, queries, D, Left<A>{k.data, k.row, 1}, Matrix<const A>{qt, queries}, Matrix<A>{w, queries},
                   next_qk);
        softmax_columns<V>(w, frames, queries, A(a.scale));
        const Left<A> weights{w, 1, queries};
        const Matrix<T> out{a.out.at<T>(task.b, 0, task.p, task.h), a.out.stride[1], stream};
        const auto v_here = part_of<T>(a.qkv, task, 2);
        if (few) return product<Vec<T>>(frames, D, frames, weights, v_here, out, next_v);
        const auto v = as_floats<T>(v_here, frames, D, false, v_memory, ld);
        if (whole) return product<Vec<T>>(frames, D, frames, weights, v, out, next_v);
        product<Vec<T>>(frames, ld, frames, weights, v, Matrix<A>{sums, ld}, next_v);
        store_rows<T>({sums, ld}, frames, D, out);
      });
      simd::fence();
    });
  });
}

template <typename T>
void attend_backward(const TemporalAttentionBackwardArgs& a, const Executor& executor) {
  using A = Acc<T>;
  const int64_t frames = a.qkv.size[1], D = a.qkv.size[5], tasks = a.qkv.size[0] * a.qkv.size[2] * a.qkv.size[4];
  if (frames == 0 || D == 0) return;
  if (frames == kEight && D % kLine<T> == 0) return attend_eight_backward<T>(a, executor);
  const bool stream = streams<T>(a.grad_qkv);
  const int64_t ld = round_up(D, kWidth<T>);
  const bool direct = ld == D && std::is_same_v<T, A>;  // 16-bit tiles would stream parts of lines: 11 % slower on v3
  with_query_vector<T>(frames, [&](auto query_vector) {
    using V = decltype(query_vector);
    const int64_t queries = round_up(frames, sizeof(V) / sizeof(A));
    parallel_for(executor, tasks, kGrainElements / (7 * frames * D) + 1, [&](int64_t begin, int64_t end) {
      Scratch scratch((5 * frames * ld + ld * queries + 2 * frames * queries) * sizeof(A) + 8 * 64);
      A* memory[4];
      for (A*& m : memory) m = scratch.take<A>(frames * ld);
      A *sums = scratch.take<A>(frames * ld), *transposed = scratch.take<A>(ld * queries);
      A *w = scratch.take<A>(frames * queries), *dw = scratch.take<A>(frames * queries);
      each_task(a.qkv, begin, end, 1, [&](Task task, Task next) {
        const auto packed = [&](Matrix<const T> x, int i) { return as_floats<T>(x, frames, D, false, memory[i], ld); };
        const Prefetch next_qk(D, part_of<T>(a.qkv, next, 0), part_of<T>(a.qkv, next, 1));
        const Prefetch next_v(D, part_of<T>(a.qkv, next, 2)), next_grad(D, rows_of<T>(a.grad_out, next));
        const auto q = packed(part_of<T>(a.qkv, task, 0), 0), k = packed(part_of<T>(a.qkv, task, 1), 1);
        const auto v = packed(part_of<T>(a.qkv, task, 2), 2), grad = packed(rows_of<T>(a.grad_out, task), 3);
        const Matrix<const A> columns{transposed, queries};
        const auto gradient = [&](int part, Left<A> left, Matrix<const A> right, const Prefetch& meanwhile) {
          const Matrix<T> out{a.grad_qkv.at<T>(task.b, 0, task.p, part, task.h), a.grad_qkv.stride[1], stream};
          if (direct) return product<Vec<T>>(frames, D, frames, left, right, out, meanwhile);
          product<Vec<T>>(frames, ld, frames, left, right, Matrix<A>{sums, ld}, meanwhile);
          store_rows<T>({sums, ld}, frames, D, out);
        };

        transpose<V>(q, frames, ld, transposed, queries);
        product<V>(frames, queries, D, Left<A>{k.data, ld, 1}, columns, Matrix<A>{w, queries}, next_qk);
        softmax_columns<V>(w, frames, queries, A(a.scale));
        transpose<V>(grad, frames, ld, transposed, queries);
        product<V>(frames, queries, D, Left<A>{v.data, ld, 1}, columns, Matrix<A>{dw, queries}, next_v);
        softmax_columns_backward<V>(w, dw, frames, queries, A(a.scale));

        gradient(0, {dw, 1, queries}, k, next_grad);
        gradient(1, {dw, queries, 1}, q, Prefetch());
        gradient(2, {w, queries, 1}, grad, Prefetch());
      });
      simd::fence();
    });
  });
}

void forward(const TemporalAttentionArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("temporal_attention", args.qkv.dtype, [&](auto t) {
#if defined(__AVX512BF16__)
    if (std::is_same_v<typename decltype(t)::type, BFloat16>) return attend_bf16(args, executor);
#endif
    attend<typename decltype(t)::type>(args, executor);
  });
}

void backward(const TemporalAttentionBackwardArgs& args, const Executor& executor) {
  visit_dtype<float, double, Half, BFloat16>("temporal_attention_backward", args.qkv.dtype, [&](auto t) {
    attend_backward<typename decltype(t)::type>(args, executor);
  });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(temporal_attention, TemporalAttentionArgs, forward)
PYVIDX_CPU_ENTRY(temporal_attention_backward, TemporalAttentionBackwardArgs, backward)
