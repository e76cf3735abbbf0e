// t steps of a memory bank, position by position: its M + 1 rows stay in the L2 cache while the frames stream by, and
// the next frame's row and a share of the next position's rows are prefetched, as they lie far apart. At v3, M = 20,
// t = 16 on a Zen 4 the latter took 5.9 to 4.3 ms in float32, 4.1 to 3.4 in bfloat16. What binds are the steps in the
// caches: 8 rows each for every row of a frame. Versions at v3 (instructions for 16 values in float32 and bfloat16; ns
// a step of 1408 values in the caches):
//   one walk, the newest's product with the merged row beside it    47, 67    612, 615
//   merge, then append of the same values, no such product          43, 63    504, 597   kept
//   two walks in 16 bits, so that no sum goes through memory             62         664   its loops end twice as often
//   the same sums by one walk that takes rows in turn                    59         580   not worth its code
//
// The replay takes kReplayBytes of every row at a time, and a merge reads what it needs where it came from a moment
// ago: so what is only copied goes past the caches. Of itself it costs more than t steps in place, which move 5 rows of
// a state that stays in the caches, where it has to write M + 1 + 2t. It pays in what follows: all t frames read its
// one list.
#include "pyvidx/memory_scan.h"

#include "level.h"
#include "memory_step.h"
#include "parallel.h"

namespace pyvidx {
namespace {

constexpr int64_t kReplayBytes = 1024;

// Entries of a position after step s, by their ids: those after step s - 1, with the merged pair replaced, then frame
// s.
PYVIDX_INLINE void write_plan(const MemoryScanArgs& a, const Plan& p, int64_t s, int64_t length) {
  const int64_t t = a.frames.size[1], slots = a.order.size[2];
  auto entry = [&](int64_t j) -> int32_t& { return *a.table.at<int32_t>(p.b, s, p.n, j); };
  int32_t* sources = a.sources.at<int32_t>(p.b, s, p.n);
  int32_t* counts = a.counts.at<int32_t>(p.b, s, p.n);
  sources[0] = sources[1] = -1, counts[0] = p.count0, counts[1] = p.count1;
  if (p.k >= 0) {
    sources[0] = entry(p.k), sources[1] = entry(p.k + 1);
    entry(p.k) = int32_t(slots + t + s);
    for (int64_t j = p.k + 1; j + 1 < slots; ++j) entry(j) = entry(j + 1);
    --length;
  }
  if (p.target >= 0) entry(length) = int32_t(slots + s);
}

template <typename T>
void scan(const MemoryScanArgs& a, const MemoryStepArgs& state, const Executor& executor) {
  const int64_t B = a.bank.size[0], slots = a.bank.size[1], N = a.bank.size[2], C = a.bank.size[3];
  const int64_t t = a.frames.size[1];
  parallel_for(executor, B * N, kGrainElements / (8 * t * C + 1) + 1, [&](int64_t begin, int64_t end) {
    MemoryStepArgs step = state;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / N, n = row % N;
      const bool on = !a.active || *a.active.at<const int32_t>(b) != 0;
      int64_t length = *a.length.at<const int32_t>(b);
      for (int64_t s = 0; s < t; ++s) {
        for (int64_t j = 0; j < slots; ++j) {
          int32_t before = j < length ? *a.order.at<const int32_t>(b, n, j) : -1;
          if (s > 0) before = *a.table.at<const int32_t>(b, s - 1, n, j);
          *a.table.at<int32_t>(b, s, n, j) = before;
        }
        Plan p = no_plan(b, n);
        if (on) {
          step.frame.data = a.frames.at<T>(0, s);
          p = make_plan(step, b, n, length);
        }
        write_plan(a, p, s, length);
        if (!on) continue;
        Rows<T> ahead{};  // the next frame's row, and a share of the next position's
        if (s + 1 < t) ahead.frame = a.frames.at<const T>(b, s + 1, n);
        if (row + 1 < end) {
          const int64_t next_b = (row + 1) / N, next_n = (row + 1) % N;
          const auto slot = [&](int64_t j) { return j < slots ? a.bank.at<T>(next_b, j, next_n) : nullptr; };
          ahead.keep = slot(s), ahead.gone = slot(s + t), ahead.left = slot(s + 2 * t);
          if (s + 1 == t) ahead.frame = a.frames.at<const T>(next_b, 0, next_n);
        }
        any_bank_rows(step, p, &ahead);
        if (length < slots) ++length;
      }
    }
  });
  for (int64_t b = 0; b < B; ++b) {  // after every row has read it
    if (a.active && *a.active.at<const int32_t>(b) == 0) continue;
    int32_t& length = *a.length.at<int32_t>(b);
    length = int32_t(length + t < slots ? length + t : slots);
  }
}

template <typename T>
void replay(const MemoryReplayArgs& a, const Executor& executor) {
  const int64_t B = a.rows.size[0], slots = a.rows.size[1], N = a.rows.size[2], W = a.rows.size[3];
  const int64_t t = a.frames.size[1];
  constexpr int64_t kBlock = kReplayBytes / sizeof(T);
  const int64_t bytes = W * sizeof(T);
  const bool stream = bytes % sizeof(float) == 0 && B * a.extended.size[1] * N * bytes > simd::kStreamBytes;
  parallel_for(executor, B * N, kGrainElements / ((2 * slots + 4 * t) * W + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / N, n = row % N;
      for (int64_t c = 0; c < W; c += kBlock) {
        const int64_t width = c + kBlock < W ? kBlock : W - c;
        auto out = [&](int64_t id) { return a.extended.at<T>(b, id, n) + c; };
        auto source = [&](int64_t id) -> const T* {
          if (id >= slots + t) return out(id);
          return (id < slots ? a.rows.at<const T>(b, id, n) : a.frames.at<const T>(b, id - slots, n)) + c;
        };
        auto copy = [&](const T* from, T* to) {
          if (stream) {
            const float* x = reinterpret_cast<const float*>(from);
            float* y = reinterpret_cast<float*>(to);
            const int64_t words = width * sizeof(T) / sizeof(float);
            return each_pair<float>(words, y, true,
                                    [&](int64_t i, auto part) { store(y + i, load(x + i, part), part); });
          }
          each_pair<T>(width, [&](int64_t i, auto part) { store_raw(to + i, load_raw(from + i, part), part); });
        };
        for (int64_t j = 0; j < slots; ++j) {
          const int64_t next = j + 1 < slots ? j + 1 : j;
          prefetch(a.rows.at<const T>(b, next, n), c, c + width);
          copy(source(j), out(j));
        }
        for (int64_t s = 0; s < t; ++s) {
          if (s + 1 < t) prefetch(a.frames.at<const T>(b, s + 1, n), c, c + width);
          copy(source(slots + s), out(slots + s));
          T* const to = out(slots + t + s);
          const int32_t* sources = a.sources.at<const int32_t>(b, s, n);
          if (sources[0] < 0) {
            each_pair<T>(width, [&](int64_t i, auto part) { store(to + i, Of<T, decltype(part)>{}, part); });
            continue;
          }
          const int32_t* counts = a.counts.at<const int32_t>(b, s, n);
          const Mean<T> mean(a.weighted ? counts[0] : 1, a.weighted ? counts[1] : 1);
          const T *x = source(sources[0]), *y = source(sources[1]);
          each_pair<T>(width,
                       [&](int64_t i, auto part) { store(to + i, mean(load(x + i, part), load(y + i, part)), part); });
        }
        for (int64_t j = 0; j < slots; ++j) {  // a row from before this clip lies where it lay
          const int32_t id = *a.table.at<const int32_t>(b, t - 1, n, j);
          if (id >= slots) copy(source(id), a.rows.at<T>(b, *a.order.at<const int32_t>(b, n, j), n) + c);
        }
      }
    }
    simd::fence();
  });
}

void check_plan(const MemoryReplayArgs& a) {
  const int64_t B = a.rows.size[0], slots = a.rows.size[1], N = a.rows.size[2], t = a.frames.size[1];
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t s = 0; s < t; ++s) {
      for (int64_t n = 0; n < N; ++n) {
        const int32_t* pair = a.sources.at<const int32_t>(b, s, n);
        const bool nothing = pair[0] == -1 && pair[1] == -1;
        for (int i = 0; i < 2; ++i) {
          const bool written =
              pair[i] >= 0 && (pair[i] < slots + s || (pair[i] >= slots + t && pair[i] < slots + t + s));
          if (!nothing && !written) throw_out_of_range("memory_replay_: sources must be rows from before their step");
        }
      }
    }
    for (int64_t n = 0; n < N; ++n) {
      bool fits = is_permutation(a.order, b, n);
      for (int64_t j = 0; j < slots; ++j) {
        const int32_t id = *a.table.at<const int32_t>(b, t - 1, n, j), slot = *a.order.at<const int32_t>(b, n, j);
        fits &= id < 0 || id == slot || (id >= slots && id < slots + 2 * t);
      }
      if (!fits) throw_out_of_range("memory_replay_: table and order must be those after the scan");
    }
  }
}

void run_scan(const MemoryScanArgs& a, const Executor& executor) {
  MemoryStepArgs step{a.bank, a.sizes, a.order, a.similarity, a.length, {}, a.active, {}, nullptr, 0, a.weighted};
  step.frame.dtype = a.frames.dtype;
  for (int d = 0; d < 3; ++d) {  // frame [B, N, C] of frames [B, t, N, C]
    step.frame.size[d] = a.frames.size[d ? d + 1 : 0], step.frame.stride[d] = a.frames.stride[d ? d + 1 : 0];
  }
  check_state(step);
  visit_floating("memory_scan_", a.bank.dtype, [&](auto t) { scan<typename decltype(t)::type>(a, step, executor); });
}

void run_replay(const MemoryReplayArgs& a, const Executor& executor) {
  check_plan(a);
  visit_floating("memory_replay_", a.rows.dtype, [&](auto t) { replay<typename decltype(t)::type>(a, executor); });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(memory_scan, MemoryScanArgs, run_scan)
PYVIDX_CPU_ENTRY(memory_replay, MemoryReplayArgs, run_replay)
