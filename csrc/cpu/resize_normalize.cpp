// A task takes a stretch of output rows. It resizes source rows across, as many at a time as a vector has lanes: one
// row per lane, four pixels of one channel in its 32 bits. What comes of them is kept in a window of rows, again four
// to 32 bits, but with one column per lane, so that both passes are the same loop.
//
// Floor, for a crop of h x w from a window of H x W source pixels read: 3 T H W bytes in, T 3 h w values out, and
// 3 T w (H n_w + h n_h) products, n the pixels that one output reads (4 W / w for bicubic reductions). 8 frames of 720p
// to 224 x 224: 12 MB in, 5 MB out, 71 million products. A weight has 23 bits: in two 16-bit halves a vector of 16 sums
// takes 4 products in 11 instructions.
#include "pyvidx/resize_normalize.h"

#include "attention.h"  // Scratch
#include "level.h"
#include "parallel.h"
#include "simd.h"

namespace pyvidx {
namespace {

using simd::Full;
using simd::Part;
using simd::VF;
using simd::VI;
using simd::VU;

constexpr int kLanes = simd::kFloats;
constexpr int kRowQuads = kLanes / int(kQuad);   // of one block of source rows
constexpr int kTogether = 2;                     // vectors of columns
constexpr int64_t kTile = 512;                   // columns of one turn: bounds the scratch
constexpr int32_t kEven = 0x00ff00ff;            // of four levels
constexpr int64_t kBlock = int64_t(kLanes) * 4;  // bytes of a vector
typedef uint16_t VS __attribute__((vector_size(simd::kBytes)));

// Both 16-bit halves of a lane, multiplied and added.
PYVIDX_INLINE VU multiply_add(VI a, VI b) {
#if defined(__AVX512BW__)
  return (VU)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (VU)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (VU)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return (VU)((a >> 16) * (b >> 16) + ((VI)((VU)a << 16) >> 16) * ((VI)((VU)b << 16) >> 16));
#endif
}

// Four weights as `weigh` multiplies them: the low and high halves of the even and the odd ones.
void split(int32_t* k) {
  int32_t low[4], high[4];
  for (int i = 0; i < 4; ++i) low[i] = int16_t(k[i]), high[i] = (k[i] - low[i]) >> 16;
  const auto both = [](int32_t a, int32_t b) { return int32_t((uint32_t(b) << 16) | (uint32_t(a) & 0xffff)); };
  const int32_t packed[4] = {both(low[0], low[2]), both(low[1], low[3]), both(high[0], high[2]),
                             both(high[1], high[3])};
  __builtin_memcpy(k, packed, sizeof packed);
}

// The levels of kN vectors, not clamped: sums over `quads` quads of levels, `step` bytes from each other, of one window
// of weights. Sums may wrap around on the way; the total fits.
template <int kN>
PYVIDX_INLINE void weigh(const char* levels, int64_t step, int64_t apart, const int32_t* window, int64_t quads,
                         VI (&out)[kN]) {
  VU low[kN], high[kN];
  for (int n = 0; n < kN; ++n) low[n] = VU{} + (1u << (kWeightBits - 1)), high[n] = VU{};
  for (int64_t q = 0; q < quads; ++q, levels += step, window += kQuad) {
    const VI low_even = VI{} + window[0], low_odd = VI{} + window[1];
    const VI high_even = VI{} + window[2], high_odd = VI{} + window[3];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      const VI four = simd::read<VI>(levels + n * apart), even = four & kEven, odd = (VI)((VS)four >> 8);
      low[n] += multiply_add(even, low_even) + multiply_add(odd, low_odd);
      high[n] += multiply_add(even, high_even) + multiply_add(odd, high_odd);
    }
  }
  for (int n = 0; n < kN; ++n) out[n] = (VI)((high[n] << 16) + low[n]) >> kWeightBits;
}

// Levels of four columns, a row per lane, clamped: for every four rows 16 bytes, 4 of each column, `step` bytes apart.
PYVIDX_INLINE void store_columns(const VI (&column)[4], char* to, int64_t step) {
#if defined(__AVX512BW__)
  const __m512i a = _mm512_packs_epi32((__m512i)column[0], (__m512i)column[1]);
  const __m512i b = _mm512_packs_epi32((__m512i)column[2], (__m512i)column[3]);
  const __m512i all = _mm512_packus_epi16(a, b);
#elif defined(__AVX2__)
  const __m256i a = _mm256_packs_epi32((__m256i)column[0], (__m256i)column[1]);
  const __m256i b = _mm256_packs_epi32((__m256i)column[2], (__m256i)column[3]);
  const __m256i all = _mm256_packus_epi16(a, b);
#elif defined(__x86_64__)
  const __m128i a = _mm_packs_epi32((__m128i)column[0], (__m128i)column[1]);
  const __m128i b = _mm_packs_epi32((__m128i)column[2], (__m128i)column[3]);
  const __m128i all = _mm_packus_epi16(a, b);
#else
  uint8_t all[kLanes * 4];
  for (int r = 0; r < kLanes; ++r) {
    for (int x = 0; x < 4; ++x) {
      const int32_t v = column[x][r];
      all[r / 4 * 16 + x * 4 + r % 4] = uint8_t(v < 0 ? 0 : v > 255 ? 255 : v);
    }
  }
#endif
  for (int q = 0; q < kRowQuads; ++q) __builtin_memcpy(to + q * step, reinterpret_cast<const char*>(&all) + q * 16, 16);
}

struct Source {
  const uint8_t* row[kLanes];
  int64_t length, pixel, channel;  // pixels of a row; strides
};

// The quads [begin, end) of pixels of some rows: to[quad][channel][row], 0 beyond the end of a row.
void take(const Source& from, int64_t begin, int64_t end, char* to) {
  int64_t q = begin;
#if defined(__x86_64__)
  if (from.pixel == 3 && from.channel == 1) {
    const __m128i by_channel = _mm_setr_epi8(0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, -1, -1, -1, -1);
    for (; q < end && q * 12 + 16 <= from.length * 3; ++q, to += 3 * kBlock) {
      for (int r = 0; r < kLanes; r += 4) {
        __m128i x[4];
        for (int i = 0; i < 4; ++i) {
          const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from.row[r + i] + q * 12));
          x[i] = _mm_shuffle_epi8(pixels, by_channel);
        }
        const __m128i ab = _mm_unpacklo_epi32(x[0], x[1]), cd = _mm_unpacklo_epi32(x[2], x[3]);
        const __m128i ab_blue = _mm_unpackhi_epi32(x[0], x[1]), cd_blue = _mm_unpackhi_epi32(x[2], x[3]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + r * 4), _mm_unpacklo_epi64(ab, cd));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kBlock + r * 4), _mm_unpackhi_epi64(ab, cd));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * kBlock + r * 4), _mm_unpacklo_epi64(ab_blue, cd_blue));
      }
    }
  }
#endif
  for (; q < end; ++q) {
    for (int c = 0; c < 3; ++c) {
      for (int r = 0; r < kLanes; ++r) {
        for (int64_t x = q * kQuad; x < (q + 1) * kQuad; ++x) {
          *to++ = x < from.length ? char(from.row[r][x * from.pixel + c * from.channel]) : 0;
        }
      }
    }
  }
}

// Windows of weights, split, with their first quad in place of their first pixel.
struct Windows {
  const View<2>& of;
  int64_t quads = (of.size[1] - 1) / kQuad;

  int64_t first(int64_t i) const { return *of.at<const int32_t>(i) / kQuad; }
  const int32_t* weights(int64_t i) const { return of.at<const int32_t>(i) + 1; }
};

// A stretch of columns of consecutive output rows.
template <typename T>
class Tile {
 public:
  Tile(const ResizeNormalizeArgs& a, int64_t begin, int64_t end)
      : a_(a),
        rows_{a.rows},
        columns_{a.columns},
        begin_(begin),
        end_(end),
        first_(columns_.first(begin)),
        last_(columns_.first(end - 1) + columns_.quads),
        width_((end - begin + kTogether * kLanes - 1) / (kTogether * kLanes) * (kTogether * kLanes)),
        kept_(2 * rows_.quads + kRowQuads),
        scratch_((last_ - first_) * 3 * kBlock + 3 * kept_ * width_ * 4 + 2 * 64),
        source_(scratch_.take<char>((last_ - first_) * 3 * kBlock)),
        across_(scratch_.take<char>(3 * kept_ * width_ * 4)) {}

  // Output rows [begin, end) of frame t.
  void run(int64_t t, int64_t begin, int64_t end) {
    int64_t from = rows_.first(begin), to = from;  // the quads of rows that the window holds
    for (int64_t y = begin; y < end; ++y) {
      const int64_t need = rows_.first(y) + rows_.quads;
      while (to < need) {
        if (to + kRowQuads - from > kept_) {
          const int64_t gone = rows_.first(y) - from, left = to > from + gone ? to - from - gone : 0;
          for (int c = 0; c < 3; ++c) {
            __builtin_memmove(at(c, 0), at(c, gone), left * width_ * 4);
          }
          from += gone, to = from + left;
        }
        if (to * kQuad < a_.frames.size[1]) resize_across(t, to * kQuad, to - from);
        to += kRowQuads;
      }
      for (int c = 0; c < 3; ++c) resize_down(t, y, c, at(c, rows_.first(y) - from));
    }
  }

 private:
  char* at(int c, int64_t quad) { return across_ + (c * kept_ + quad) * width_ * 4; }

  // Source rows from `row` on, to the window's quads from `quad` on.
  void resize_across(int64_t t, int64_t row, int64_t quad) {
    const View<4>& frames = a_.frames;
    Source from;
    from.length = frames.size[2], from.pixel = frames.stride[2], from.channel = frames.stride[3];
    for (int r = 0; r < kLanes; ++r) {  // beyond the last one, any: their weights are 0
      from.row[r] = frames.at<const uint8_t>(t, row + r < frames.size[1] ? row + r : frames.size[1] - 1);
    }
    take(from, first_, last_, source_);
    const int64_t ahead = (row + kLanes < frames.size[1] ? kLanes : 0) * frames.stride[1];
    for (int64_t x = begin_; x < end_; x += 4) {
      VI level[3][4];
      for (int r = 0; r < kLanes; ++r) {  // the next rows: more than the hardware can foresee
        simd::prefetch(from.row[r] + ahead + columns_.first(x) * kQuad * from.pixel);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t column = x + i < end_ ? x + i : end_ - 1;
        VI sums[3];
        weigh(source_ + (columns_.first(column) - first_) * 3 * kBlock, 3 * kBlock, kBlock, columns_.weights(column),
              columns_.quads, sums);
        for (int c = 0; c < 3; ++c) level[c][i] = sums[c];
      }
      for (int c = 0; c < 3; ++c) store_columns(level[c], at(c, quad) + (x - begin_) * 4, width_ * 4);
    }
  }

  void resize_down(int64_t t, int64_t y, int c, const char* window) {
    T* out = a_.out.at<T>(t, c, y) + begin_;
    const int64_t columns = end_ - begin_;
    for (int64_t x = 0; x < columns; x += kTogether * kLanes) {
      VI level[kTogether];
      weigh(window + x * 4, width_ * 4, kBlock, rows_.weights(y), rows_.quads, level);
      for (int n = 0; n < kTogether; ++n) {
        const int64_t left = columns - x - n * kLanes;
        if (left <= 0) break;
        level[n] = simd::smaller(simd::larger(level[n], VI{}), VI{} + 255);
        normalize(level[n], c, out + x + n * kLanes, left);
      }
    }
  }

  void normalize(VI level, int c, T* out, int64_t left) const {
    if constexpr (sizeof(T) == 8) {  // for checks
      for (int i = 0; i < kLanes && i < left; ++i) out[i] = level[i] * a_.scale[c] + a_.shift[c];
    } else {
      const VF v = __builtin_convertvector(level, VF) * float(a_.scale[c]) + float(a_.shift[c]);
      left < kLanes ? simd::store(out, v, Part{left}) : simd::store(out, v, Full{});
    }
  }

  const ResizeNormalizeArgs& a_;
  Windows rows_, columns_;
  int64_t begin_, end_, first_, last_, width_, kept_;
  Scratch scratch_;
  char *source_, *across_;
};

template <typename T>
void resize(const ResizeNormalizeArgs& a, const Executor& executor) {
  const int64_t rows = a.out.size[2], columns = a.out.size[3];
  parallel_for(executor, a.out.size[0] * rows, kGrainElements / (3 * columns) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t x = 0; x < columns; x += kTile) {
      Tile<T> tile(a, x, x + kTile < columns ? x + kTile : columns);
      for (int64_t i = begin; i < end;) {
        const int64_t t = i / rows, y = i % rows, count = end - i < rows - y ? end - i : rows - y;
        tile.run(t, y, y + count);
        i += count;
      }
    }
  });
}

void split_all(const View<2>& windows) {
  for (int64_t i = 0; i < windows.size[0]; ++i) {
    for (int64_t k = 1; k < windows.size[1]; k += kQuad) split(windows.at<int32_t>(i, k));
  }
}

void forward(const ResizeNormalizeArgs& args, const Executor& executor) {
  resample_windows(args.down(), args.top, args.rows);
  resample_windows(args.across(), args.left, args.columns);
  split_all(args.rows), split_all(args.columns);
  visit_dtype<float, double, Half, BFloat16>("resize_normalize", args.out.dtype,
                                             [&](auto t) { resize<typename decltype(t)::type>(args, executor); });
}

}  // namespace
}  // namespace pyvidx

PYVIDX_CPU_ENTRY(resize_normalize, ResizeNormalizeArgs, forward)
