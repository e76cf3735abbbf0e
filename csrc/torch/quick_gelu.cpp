#include "pyvidx/quick_gelu.h"

#include <algorithm>
#include <tuple>

#include "check.h"

namespace pyvidx {
namespace {

View<1> flat(const Tensor& x) {  // contiguous
  View<1> v;
  v.data = x.data_ptr(), v.dtype = dtype_of(x);
  v.size[0] = x.numel(), v.stride[0] = 1;
  return v;
}

// Rows that are summed in one go: few partial sums, but enough for the threads of a CPU or the blocks of a GPU. Of the
// sizes alone, and so are the sums.
int64_t chunk_of(const Tensor& x, int64_t rows) {
  return std::max<int64_t>(x.is_cpu() ? 64 : 16, (rows + 1023) / 1024);
}

// x of any shape, with a bias [..., C].
Check check_inputs(const char* op, const Tensor& x, const OptionalTensor& bias) {
  const Check check(op, "x", x);
  if (bias) {
    check.that(x.dim() > 0, "with a bias x must be [..., C]");
    check.like("bias [C]", bias, {x.size(x.dim() - 1)});
  }
  return check;
}

void activate(const Tensor& x, const OptionalTensor& bias, const Tensor& out) {
  const OptionalTensor bias_ = unit_last_stride(bias);
  QuickGELUArgs args{flat(x), view<1>(bias_), flat(out)};
  if (args.out.size[0] > 0) PYVIDX_RUN(quick_gelu, x, args);
}

void quick_gelu_out(const Tensor& x, const OptionalTensor& bias, Tensor out) {
  const Check check = check_inputs("quick_gelu", x, bias);
  check.like("out", out, x);
  check.that(out.is_contiguous(), "out must be contiguous");
  Written(check, "out", out).may_be("x", x).apart_from("bias", bias);
  activate(make_contiguous(x), bias, out);
}

Tensor quick_gelu(const Tensor& x, const OptionalTensor& bias) {
  check_inputs("quick_gelu", x, bias);
  const Tensor x_ = make_contiguous(x);
  Tensor out = make_like(x_);
  activate(x_, bias, out);
  return out;
}

std::tuple<Tensor, Tensor> quick_gelu_backward(const Tensor& grad_out, const Tensor& x, const OptionalTensor& bias,
                                               bool need_x, bool need_bias) {
  check_inputs("quick_gelu_backward", x, bias).like("grad_out", grad_out, x);
  const Tensor grad_ = make_contiguous(grad_out), x_ = make_contiguous(x);
  const OptionalTensor bias_ = unit_last_stride(bias);
  const bool sums = bias && need_bias;
  const int64_t C = bias ? bias->size(0) : 0;
  Tensor grad_x = need_x ? make_like(x_) : nothing(x);
  if (x.numel() == 0) return {grad_x, sums ? make_zeros(x, {C}) : nothing(x)};
  QuickGELUBackwardArgs args = {};
  args.grad_out = flat(grad_), args.x = flat(x_), args.bias = view<1>(bias_);
  Tensor grad_bias = nothing(x), partial = nothing(x);
  args.grad_x = flat(grad_x);
  const int64_t rows = C > 0 ? x.numel() / C : 0;
  args.chunk = chunk_of(x, rows);
  if (sums) {
    grad_bias = make_empty(x, {C}), partial = make_empty(x, {(rows + args.chunk - 1) / args.chunk, C}, wide(x));
    args.grad_bias = view<1>(grad_bias), args.partial = view<2>(partial);
  }
  if (args.grad_x || args.grad_bias) PYVIDX_RUN(quick_gelu_backward, x, args);
  return {grad_x, grad_bias};
}

template <typename Library>
void kernels(Library& m) {
  m.impl("quick_gelu", TORCH_BOX(&quick_gelu));
  m.impl("quick_gelu_out", TORCH_BOX(&quick_gelu_out));
  m.impl("quick_gelu_backward", TORCH_BOX(&quick_gelu_backward));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
