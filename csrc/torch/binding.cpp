// What every binding shares: dtypes, torch's thread pool, torch's current stream.
#include "torch_view.h"

// Weak: a CPU-only torch does not have it, and the CUDA kernels are never reached there.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace pyvidx {

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Int:
      return DType::i32;
    case ScalarType::Long:
      return DType::i64;
    default:
      STD_TORCH_CHECK(false, "pyvidx: kernels take float16, bfloat16, float32, float64, int32 and int64 tensors");
  }
}

Executor torch_executor() {
  Executor executor;
  executor.run = [](int64_t n, int64_t grain, Executor::Body body, void* context) {
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return executor;
}

#if defined(PYVIDX_EMU)
extern "C" CUstream_st* cuemu_current_stream();  // tests/cuda_emu/graphs.cpp

CUstream_st* current_stream(const Tensor&) { return cuemu_current_stream(); }
#else
CUstream_st* current_stream(const Tensor& on) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "pyvidx: this torch has no CUDA");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream) == 0,
                  "pyvidx: torch gave no current CUDA stream");
  return static_cast<CUstream_st*>(stream);
}
#endif

}  // namespace pyvidx
