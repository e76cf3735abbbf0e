// The checks of a memory bank that an op changes in place: memory_merge_ and memory_scan_.
#pragma once
#include <vector>

#include "check.h"

namespace pyvidx {

inline Check check_bank(const char* op, const Tensor& bank) {
  const Check check(op, "bank [B, M+1, N, C]", bank, {kAny, kAny, kAny, kAny});
  check.that(bank.size(1) >= 2, "bank must be [B, M+1, N, C] with M >= 1");
  return check;
}

inline Check check_state(const char* op, const Tensor& bank, const Tensor& sizes, const Tensor& order,
                         const Tensor& similarity, const Tensor& length, const OptionalTensor& active) {
  const Check check = check_bank(op, bank);
  const int64_t B = bank.size(0), slots = bank.size(1), N = bank.size(2);
  check.of(ScalarType::Int, "sizes [B, N, M+1]", sizes, {B, N, slots});
  check.of(ScalarType::Int, "order [B, N, M+1]", order, {B, N, slots});
  check.of(ScalarType::Float, "similarity [B, N, M]", similarity, {B, N, slots - 1});
  check.of(ScalarType::Int, "length [B]", length, {B});
  check.of(ScalarType::Int, "active [B]", active, {B});
  return check;
}

// What a call changes in place, and what it reads beside: none of it may share memory.
class Changed {
 public:
  Changed(const Check& check, const Tensor& bank, const Tensor& sizes, const Tensor& order, const Tensor& similarity,
          const Tensor& length)
      : check_(check) {
    writes("bank", bank), writes("sizes", sizes, false), writes("order", order, false);
    writes("similarity", similarity, false), writes("length", length, false);
  }
  void writes(const char* name, const Elements& x, bool rows = true) {
    all_.push_back({name, x});
    written_.emplace_back(check_, name, x, rows);
  }
  void reads(const char* name, const Elements& x) { read_.push_back({name, x}); }

  void check() const {
    for (size_t i = 0; i < written_.size(); ++i) {
      for (size_t j = 0; j < i; ++j) written_[i].apart_from(all_[j].name, all_[j].elements);
      for (const Argument& other : read_) written_[i].apart_from(other.name, other.elements);
    }
  }

 private:
  const Check& check_;
  std::vector<Written> written_;
  std::vector<Argument> all_, read_;  // all_[i] is what written_[i] writes
};

}  // namespace pyvidx
