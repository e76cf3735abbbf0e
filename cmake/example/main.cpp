// Gathers two kept patches of a small clip with the kernels alone, and checks the result.
#include <cstdio>
#include <vector>

#include "pyvidx/isa.h"
#include "pyvidx/token_gather.h"

namespace {

template <typename T, int kDims>
pyvidx::View<kDims> contiguous(std::vector<T>& data, const int64_t (&size)[kDims], pyvidx::DType dtype) {
  pyvidx::View<kDims> view;
  view.data = data.data();
  view.dtype = dtype;
  for (int64_t d = kDims - 1, stride = 1; d >= 0; stride *= size[d--]) view.size[d] = size[d], view.stride[d] = stride;
  return view;
}

}  // namespace

int main() {
  using pyvidx::DType;
  constexpr int64_t B = 1, T = 2, P = 3, C = 5, K = 2;
  std::vector<float> x(B * T * P * C), position(P * C), time(T * C), out(B * T * K * C, -1.f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i);
  for (size_t i = 0; i < position.size(); ++i) position[i] = 100.f * float(i);
  for (size_t i = 0; i < time.size(); ++i) time[i] = 1000.f * float(i);
  std::vector<int64_t> keep = {2, 0};

  pyvidx::TokenGatherArgs args;
  args.x = contiguous(x, {B, T, P, C}, DType::f32);
  args.keep = contiguous(keep, {B, 1, K}, DType::i64);
  args.position = contiguous(position, {P, C}, DType::f32);
  args.time = contiguous(time, {T, C}, DType::f32);
  args.out = contiguous(out, {B, T, K, C}, DType::f32);
  args.tube = true;
  pyvidx::token_gather_cpu(args, pyvidx::Executor{});

  int wrong = 0;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c) {
        const int64_t p = keep[k];
        wrong += out[(t * K + k) * C + c] != x[(t * P + p) * C + c] + position[p * C + c] + time[t * C + c];
      }
  std::printf("token_gather at level %s: %s\n", pyvidx::isa_name(pyvidx::isa()), wrong ? "WRONG" : "right");
  return wrong != 0;
}
