// What the forward and backward kernels of bank_attention share: the keys of a step, a block at a time.
#pragma once
#include "attention.h"
#include "pyvidx/bank_attention.h"

namespace pyvidx {
namespace {

constexpr int64_t kBlock = 64;

template <typename T>
struct Block {
  const T* row[kBlock];
  int64_t place[kBlock];  // position * S + slot
  Acc<T> bias[kBlock];
  int64_t count = 0;
};

// The keys of a step at positions [p, end), a block at a time.
template <typename T>
struct Walk {
  const BankAttentionInput& a;
  int64_t b, s, p, end, j = 0;

  void next(Block<T>& block) {
    const int64_t S = a.rows.size[1], L = a.table ? a.table.size[3] : S;
    block.count = 0;
    for (; p < end; ++p, j = 0) {
      if (a.mask && *a.mask.at<const int32_t>(b, p) == 0) continue;
      for (; j < L; ++j) {
        const int64_t slot = a.table ? *a.table.at<const int32_t>(b, s, p, j) : j;
        if (slot < 0) continue;
        if (block.count == kBlock) return;
        if (slot >= S) throw_index("bank_attention: table must name slots", slot, S, true);
        block.bias[block.count] = 0;
        if (a.sizes) {
          const int32_t size = *a.sizes.at<const int32_t>(b, s, p, j);
          block.bias[block.count] = Acc<T>(__builtin_log(size < 1 ? 1 : size));
        }
        block.place[block.count] = p * S + slot;
        block.row[block.count++] = a.rows.at<const T>(b, slot, p);
      }
    }
  }
};

// memory [keys][ld] <- d elements of each row from `offset` on, 0 beyond d
template <typename T>
void pack(const Block<T>& block, int64_t offset, int64_t d, Acc<T>* memory, int64_t ld) {
  for (int64_t j = 0; j < block.count; ++j) {
    each<T>(d, [&](int64_t i, auto part) { store(memory + j * ld + i, load(block.row[j] + offset + i, part)); });
  }
}

// Fetches a head's keys and values of a block, D elements apart, for product()'s `meanwhile`.
template <typename T>
auto fetch(const Block<T>& block, int64_t offset, int64_t d, int64_t D) {
  return [&block, offset, d, D](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end && j < block.count; ++j) {
      for (int64_t i = 0; i < d; i += 64 / int64_t(sizeof(T))) {
        simd::prefetch(block.row[j] + offset + i);
        simd::prefetch(block.row[j] + offset + D + i);
      }
    }
  };
}

struct Sizes {
  int64_t steps, n, H, d, D, ld, splits, padded;
  Sizes(const BankAttentionInput& a, const View<3>& partial)
      : steps(a.q.size[1]),
        n(a.q.size[2]),
        H(a.heads),
        d(a.q.size[3] / a.heads),
        D(a.q.size[3]),
        ld(bank_attention_padded(d)),
        splits(partial.size[1]),
        padded(bank_attention_padded(n)) {}
};

}  // namespace
}  // namespace pyvidx
