#include "pyvidx/resize_normalize.h"

#include <vector>

#include "check.h"

namespace pyvidx {
namespace {

constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // pixels of an axis

bool within(int64_t n, int64_t low, int64_t high) { return n >= low && n <= high; }

Check check(const Tensor& frames, const std::vector<int64_t>& size, const std::vector<int64_t>& crop,
            const std::vector<double>& mean, const std::vector<double>& std) {
  const Check check("resize_normalize", "frames [T, H, W, 3]", frames, {kAny, kAny, kAny, 3}, ScalarType::Byte);
  check.that(within(frames.size(1), 1, kMost) && within(frames.size(2), 1, kMost),
             "H and W of frames must be in [1, 2^31)");
  check.that(size.size() == 2 && within(size[0], 1, kMost) && within(size[1], 1, kMost),
             "size must be (h, w), each in [1, 2^31)");
  check.that(crop.size() == 4 && within(crop[0], -kMost, kMost) && within(crop[1], -kMost, kMost) &&
                 within(crop[2], 1, kMost) && within(crop[3], 1, kMost),
             "crop must be (top, left, rows, columns), of rows and columns at least 1, all below 2^31");
  check.that(mean.size() == 3 && std.size() == 3, "mean and std must have 3 values");
  check.that(std[0] != 0 && std[1] != 0 && std[2] != 0, "std must not be 0");
  return check;
}

void resize(const Tensor& frames, const std::vector<int64_t>& size, const std::vector<int64_t>& crop, bool bilinear,
            const std::vector<double>& mean, const std::vector<double>& std, const Tensor& out) {
  if (out.numel() == 0) return;
  ResizeNormalizeArgs args = {};
  args.frames = view<4>(frames), args.out = view<4>(out), args.bilinear = bilinear;
  args.h = size[0], args.w = size[1], args.top = crop[0], args.left = crop[1];
  for (int c = 0; c < 3; ++c) args.scale[c] = 1 / (255 * std[c]), args.shift[c] = -mean[c] / std[c];
  const Tensor rows = make_empty(frames, {crop[2], 1 + args.down().taps()}, ScalarType::Int);
  const Tensor columns = make_empty(frames, {crop[3], 1 + args.across().taps()}, ScalarType::Int);
  args.rows = view<2>(rows), args.columns = view<2>(columns);
  PYVIDX_RUN(resize_normalize, frames, args);
}

void resize_normalize_out(const Tensor& frames, std::vector<int64_t> size, std::vector<int64_t> crop, bool bilinear,
                          std::vector<double> mean, std::vector<double> std, Tensor out) {
  const Check asked = check(frames, size, crop, mean, std);
  const Check given("resize_normalize", "out", out);
  asked.of(out.scalar_type(), "out [T, 3, rows, columns]", out, {frames.size(0), 3, crop[2], crop[3]});
  Written(asked, "out", out).apart_from("frames", frames);
  resize(frames, size, crop, bilinear, mean, std, out);
}

Tensor resize_normalize(const Tensor& frames, std::vector<int64_t> size, std::vector<int64_t> crop, bool bilinear,
                        std::vector<double> mean, std::vector<double> std, ScalarType dtype) {
  check(frames, size, crop, mean, std).that(is_floating(dtype), "dtype must be float32, float16, bfloat16 or float64");
  Tensor out = make_empty(frames, {frames.size(0), 3, crop[2], crop[3]}, dtype);
  resize(frames, size, crop, bilinear, mean, std, out);
  return out;
}

template <typename Library>
void kernels(Library& m) {
  m.impl("resize_normalize", TORCH_BOX(&resize_normalize));
  m.impl("resize_normalize_out", TORCH_BOX(&resize_normalize_out));
}

}  // namespace
}  // namespace pyvidx

PYVIDX_REGISTER(pyvidx::kernels)
