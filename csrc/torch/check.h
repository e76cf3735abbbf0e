// What the bindings ask of their arguments, in the words of pyvidx/ops: "op: what must hold, got what".
//
// A call that reaches a kernel has passed these, whoever made it: compiled graphs, exported programs and torch.ops do
// not come through the public functions. They throw std::invalid_argument, which is ValueError in Python, as from
// there. (STD_TORCH_CHECK would make it a RuntimeError that names a source file of the machine that built the library.)
#pragma once
#include <initializer_list>
#include <string>

#include "torch_view.h"

namespace pyvidx {

constexpr int64_t kAny = -1;  // a size that may be anything
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

bool is_floating(ScalarType dtype);  // of those that kernels compute in

// The checks of one call: of one device, and for floating tensors of one dtype, those of its first argument.
// `what`: the argument and its dimensions, "position [P, C]".
class Check {
 public:
  Check(const char* op, const char* what, const Tensor& first);  // of any shape
  Check(const char* op, const char* what, const Tensor& first, Shape sizes) : Check(op, what, first) {
    of(dtype_, what, first, sizes);
  }
  Check(const char* op, const char* what, const Tensor& first, Shape sizes, ScalarType dtype);  // of this dtype

  // "op: must", unless ok.
  void that(bool ok, const char* must) const;
  // Of the dtype of the first argument, or of `dtype`.
  void like(const char* what, const Tensor& x, Shape sizes) const { of(dtype_, what, x, sizes); }
  void of(ScalarType dtype, const char* what, const Tensor& x, Shape sizes) const;
  void like(const char* what, const Tensor& x, const Tensor& shaped) const;  // of the shape of another argument
  // Of the dtype of the first argument or, where that is float, of 16 bits.
  void mixed(const char* what, const Tensor& x, Shape sizes) const;
  // What a kernel accumulates in: float, or double where the first argument is double.
  void wide(const char* what, const Tensor& x, Shape sizes) const { of(pyvidx::wide(first_), what, x, sizes); }

  void like(const char* what, const OptionalTensor& x, Shape sizes) const { of(dtype_, what, x, sizes); }
  void of(ScalarType dtype, const char* what, const OptionalTensor& x, Shape sizes) const {
    if (x) of(dtype, what, *x, sizes);
  }
  void wide(const char* what, const OptionalTensor& x, Shape sizes) const {
    if (x) wide(what, *x, sizes);
  }
  // keep, int64 [B or 1, K] (a tube) or [B or 1, S, K].
  void keep(const Tensor& x, int64_t B) const;

  const char* op() const { return op_; }

 private:
  bool fits(ScalarType dtype, const Tensor& x, Shape sizes) const;
  [[noreturn]] void fail(const char* what, ScalarType dtype, const Tensor& x, Shape sizes) const;

  const char* op_;
  const Tensor& first_;
  ScalarType dtype_;
  int32_t device_type_, device_index_;
};

// The elements of a tensor or view in memory; borrows its sizes and strides.
struct Elements {
  const char* data = nullptr;  // nullptr: none
  int64_t dims = 0, bytes = 0;
  const int64_t *size = nullptr, *stride = nullptr;

  Elements() = default;
  Elements(const Tensor& x)  // NOLINT: implicit, so that calls read as lists of arguments
      : data(static_cast<const char*>(x.data_ptr())),
        dims(x.dim()),
        bytes(int64_t(x.element_size())),
        size(x.sizes().data()),
        stride(x.strides().data()) {}
  Elements(const OptionalTensor& x) {  // NOLINT
    if (x) *this = Elements(*x);
  }
  template <int kDims>
  Elements(const View<kDims>& x, int64_t bytes)
      : data(static_cast<const char*>(x.data)), dims(kDims), bytes(bytes), size(x.size), stride(x.stride) {}
};

struct Argument {
  const char* name;
  Elements elements;
};

// What a call writes into, checked as torch checks out=: rows of stride 1, no element twice in memory.
class Written {
 public:
  Written(const Check& check, const char* what, const Elements& to, bool rows = true);

  // No memory in common with the tensor `name`. `or_same`: but it may be this very tensor, element by element.
  const Written& apart_from(const char* name, const Elements& other, bool or_same = false) const;
  const Written& apart_from(std::initializer_list<Argument> others) const {
    for (const Argument& other : others) apart_from(other.name, other.elements);
    return *this;
  }
  const Written& may_be(const char* name, const Elements& other) const { return apart_from(name, other, true); }

 private:
  const char *op_, *what_;
  Elements to_;
};

}  // namespace pyvidx
