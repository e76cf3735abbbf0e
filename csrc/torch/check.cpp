#include "check.h"

#include <algorithm>
#include <stdexcept>

namespace pyvidx {
namespace {

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

int32_t device_type_of(const Tensor& x) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  return type;
}

std::string device_name(const Tensor& x) {
  if (x.is_cpu()) return "cpu";
  return x.is_cuda() ? "cuda:" + std::to_string(x.get_device_index()) : "another device";
}

// "(2, 3) float32 on cpu"
std::string described(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ") " + name_of(x.scalar_type()) + " on " + device_name(x);
}

std::string described(Shape sizes) {
  std::string text;
  for (int64_t n : sizes) text += (text.empty() ? "" : ", ") + (n == kAny ? "any" : std::to_string(n));
  return "(" + text + ")";
}

// Bytes from the first element to behind the last.
int64_t extent(const Elements& x) {
  int64_t bytes = x.bytes;
  for (int64_t i = 0; i < x.dims; ++i) bytes += (x.size[i] - 1) * x.stride[i] * x.bytes;
  return bytes;
}

bool has_none(const Elements& x) {
  if (x.data == nullptr) return true;
  return std::any_of(x.size, x.size + x.dims, [](int64_t n) { return n == 0; });
}

// Is every element at an address of its own? Sorted by stride, each dimension must step over all smaller ones.
bool apart_in_itself(const Elements& x) {
  bool taken[8] = {};
  int64_t reached = 0;  // the farthest element of the dimensions so far
  for (int64_t round = 0; round < x.dims; ++round) {
    int64_t next = -1;
    for (int64_t i = 0; i < x.dims; ++i) {
      if (!taken[i] && x.size[i] > 1 && (next < 0 || x.stride[i] < x.stride[next])) next = i;
    }
    if (next < 0) break;
    if (x.stride[next] <= reached) return false;
    reached += (x.size[next] - 1) * x.stride[next];
    taken[next] = true;
  }
  return true;
}

bool same(const Elements& x, const Elements& y) {
  if (x.data != y.data || x.bytes != y.bytes || x.dims != y.dims) return false;
  for (int64_t i = 0; i < x.dims; ++i) {
    if (x.size[i] != y.size[i] || (x.size[i] > 1 && x.stride[i] != y.stride[i])) return false;
  }
  return true;
}

// Slices of one tensor, such as class tokens and patches, lie between each other: modulo the step from row to row they
// never meet.
bool interleaved(const Elements& x, const Elements& y, int64_t step) {
  const auto row = [&](const Elements& e) {  // bytes of it within a step
    int64_t bytes = e.bytes;
    for (int64_t i = 0; i < e.dims; ++i) {
      if (e.size[i] > 1 && e.stride[i] * e.bytes % step != 0) bytes += (e.size[i] - 1) * e.stride[i] * e.bytes;
    }
    return bytes;
  };
  const int64_t ahead = ((y.data - x.data) % step + step) % step;
  return ahead >= row(x) && ahead + row(y) <= step;
}

bool overlap(const Elements& x, const Elements& y) {
  if (has_none(x) || has_none(y)) return false;
  if (x.data + extent(x) <= y.data || y.data + extent(y) <= x.data) return false;
  for (const Elements* e : {&x, &y}) {
    for (int64_t i = 0; i < e->dims; ++i) {
      const int64_t step = e->stride[i] * e->bytes;
      if (e->size[i] > 1 && step > 0 && interleaved(x, y, step)) return false;
    }
  }
  return true;
}

}  // namespace

bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

Check::Check(const char* op, const char* what, const Tensor& first)
    : op_(op),
      first_(first),
      dtype_(first.scalar_type()),
      device_type_(device_type_of(first)),
      device_index_(first.get_device_index()) {
  if (!is_floating(dtype_)) {
    throw std::invalid_argument(std::string(op) + ": " + what + " must be float32, float16, bfloat16 or float64, got " +
                                described(first));
  }
}

Check::Check(const char* op, const char* what, const Tensor& first, Shape sizes, ScalarType dtype)
    : op_(op),
      first_(first),
      dtype_(dtype),
      device_type_(device_type_of(first)),
      device_index_(first.get_device_index()) {
  of(dtype, what, first, sizes);
}

void Check::that(bool ok, const char* must) const {
  if (!ok) throw std::invalid_argument(std::string(op_) + ": " + must);
}

bool Check::fits(ScalarType dtype, const Tensor& x, Shape sizes) const {
  const auto size = x.sizes();
  if (size.size() != sizes.size() || x.scalar_type() != dtype) return false;
  if (device_type_of(x) != device_type_ || x.get_device_index() != device_index_) return false;
  return std::equal(sizes.begin(), sizes.end(), size.begin(),
                    [](int64_t wanted, int64_t n) { return wanted == kAny || wanted == n; });
}

void Check::fail(const char* what, ScalarType dtype, const Tensor& x, Shape sizes) const {
  throw std::invalid_argument(std::string(op_) + ": " + what + " must be " + described(sizes) + " " + name_of(dtype) +
                              " on " + device_name(first_) + ", got " + described(x));
}

void Check::of(ScalarType dtype, const char* what, const Tensor& x, Shape sizes) const {
  if (!fits(dtype, x, sizes)) fail(what, dtype, x, sizes);
}

void Check::like(const char* what, const Tensor& x, const Tensor& shaped) const { of(dtype_, what, x, shaped.sizes()); }

void Check::mixed(const char* what, const Tensor& x, Shape sizes) const {
  const ScalarType dtype = x.scalar_type();
  const bool low = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  of(dtype_ == ScalarType::Float && low ? dtype : dtype_, what, x, sizes);
}

void Check::keep(const Tensor& x, int64_t B) const {
  const int64_t dims = x.dim(), videos = dims > 0 && x.size(0) == 1 ? 1 : B;
  if (dims == 3) return of(ScalarType::Long, "keep [B or 1, S, K]", x, {videos, kAny, kAny});
  of(ScalarType::Long, "keep [B or 1, K]", x, {videos, kAny});
}

Written::Written(const Check& check, const char* what, const Elements& to, bool rows)
    : op_(check.op()), what_(what), to_(to) {
  if (has_none(to)) return;
  const int64_t last = to.dims - 1;
  const bool fits = (!rows || last < 0 || to.size[last] <= 1 || to.stride[last] == 1) && apart_in_itself(to);
  if (!fits) {
    throw std::invalid_argument(
        std::string(op_) + ": " + what_ +
        (rows ? " is written: its last stride must be 1, and no two of its elements may share memory"
              : " is written: no two of its elements may share memory"));
  }
}

const Written& Written::apart_from(const char* name, const Elements& other, bool or_same) const {
  if (overlap(to_, other) && !(or_same && same(to_, other))) {
    throw std::invalid_argument(std::string(op_) + ": " + what_ + " is written and must not share memory with " + name +
                                (or_same ? ", unless it is the same tensor" : "") + ": pass a copy of one of them");
  }
  return *this;
}

}  // namespace pyvidx
