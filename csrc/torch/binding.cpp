// What every binding shares: dtypes, torch's thread pool, torch's current stream.
#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>

#include "torch_view.h"

// Weak: torch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();
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
    case ScalarType::Byte:
      return DType::u8;
    default:
      STD_TORCH_CHECK(false,
                      "pyvidx: kernels take float16, bfloat16, float32, float64, int32, int64 and uint8 tensors");
  }
}

Executor torch_executor() {
  Executor executor;
  executor.run = [](int64_t n, int64_t grain, Executor::Body body, void* context) {
    std::exception_ptr first;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      try {
        body(context, begin, end);
      } catch (...) {  // torch's C interface would keep neither its type nor its text
        if (!failed.test_and_set()) first = std::current_exception();
      }
    });
    if (first) std::rethrow_exception(first);
  };
  return executor;
}

namespace {

// f(), with the text of torch's own error. Its C interface keeps that aside and throws where it was called from.
template <typename F>
Tensor made_by_torch(F&& f) {
  try {
    return f();
  } catch (const std::runtime_error& error) {
    if (torch_exception_get_what_without_backtrace == nullptr) {
      throw std::runtime_error(std::string("pyvidx: torch could not make a tensor; is it out of memory? ") +
                               error.what());
    }
    throw std::runtime_error(torch_exception_get_what_without_backtrace());
  }
}

}  // namespace

Tensor make_empty(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> dtype) {
  return made_by_torch([&] { return torch::stable::new_empty(like, sizes, dtype); });
}

Tensor make_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> dtype) {
  return made_by_torch([&] { return torch::stable::new_zeros(like, sizes, dtype); });
}

Tensor make_contiguous(const Tensor& x) {
  return made_by_torch([&] { return torch::stable::contiguous(x); });
}

Tensor make_like(const Tensor& x) {
  return made_by_torch([&] { return torch::stable::empty_like(x); });
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
