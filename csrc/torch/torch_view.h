// The only bridge between torch tensors and views. Torch's stable ABI: light headers, and one binary for torch 2.10 and
// newer, with and without CUDA.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>

#include "pyvidx/executor.h"
#include "pyvidx/view.h"

struct CUstream_st;

namespace pyvidx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& x);  // binding.cpp
Executor torch_executor();        // torch's thread pool
CUstream_st* current_stream(const Tensor& on);

// Of torch, whose error for a lack of memory they pass on.
Tensor make_empty(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> dtype = {});
Tensor make_zeros(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> dtype = {});
Tensor make_contiguous(const Tensor& x);
Tensor make_like(const Tensor& x);

template <int kDims>
View<kDims> view(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == kDims, "pyvidx: a kernel wants ", kDims, " dimensions, got ", x.dim());
  View<kDims> v;
  v.data = x.data_ptr();
  v.dtype = dtype_of(x);
  for (int i = 0; i < kDims; ++i) v.size[i] = x.size(i), v.stride[i] = x.stride(i);
  return v;
}

template <int kDims>
View<kDims> view(const OptionalTensor& x) {
  return x ? view<kDims>(*x) : View<kDims>{};
}

// Kernels read rows with vector loads: the last stride must be 1.
inline Tensor unit_last_stride(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) <= 1 ? x : make_contiguous(x);
}
inline OptionalTensor unit_last_stride(const OptionalTensor& x) { return x ? OptionalTensor(unit_last_stride(*x)) : x; }

// What a kernel computes in: the dtype of scratch.
inline ScalarType wide(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
// An output that is not there.
inline Tensor nothing(const Tensor& like) { return make_empty(like, {0}); }

// x [B, T, 1 + P, C] without its class tokens, [B, T, P, C], and the class tokens alone, [B, T, C].
inline View<4> patches(const Tensor& x) {
  View<4> v = view<4>(x);
  v.size[2] -= 1;
  if (v.data != nullptr) v.data = static_cast<char*>(v.data) + v.stride[2] * int64_t(x.element_size());
  return v;
}
inline View<3> class_tokens(const Tensor& x) {
  View<3> v;
  v.data = x.data_ptr(), v.dtype = dtype_of(x);
  for (int i = 0; i < 3; ++i) v.size[i] = x.size(i < 2 ? i : 3), v.stride[i] = x.stride(i < 2 ? i : 3);
  return v;
}
// That of the first frame, [B, C].
inline View<2> first_class_row(const Tensor& x) {
  const View<3> all = class_tokens(x);
  View<2> v;
  v.data = all.data, v.dtype = all.dtype;
  v.size[0] = all.size[0], v.size[1] = all.size[2], v.stride[0] = all.stride[0], v.stride[1] = all.stride[2];
  return v;
}
// Class rows [B, C] as those of one frame, [B, 1, C].
inline View<3> one_slot(const Tensor& cls) {
  const View<2> rows = view<2>(cls);
  View<3> v;
  v.data = rows.data, v.dtype = rows.dtype;
  v.size[0] = rows.size[0], v.size[1] = 1, v.size[2] = rows.size[1];
  v.stride[0] = rows.stride[0], v.stride[2] = rows.stride[1];
  return v;
}

// keep [B|1, K] (tube) or [B|1, S, K] as [B, S|1, K]; rows shared between videos get stride 0.
inline View<3> keep_view(const Tensor& keep, int64_t B) {
  View<3> v;
  if (keep.dim() == 2) {
    const View<2> tube = view<2>(keep);
    v.data = tube.data, v.dtype = tube.dtype;
    v.size[0] = tube.size[0], v.size[1] = 1, v.size[2] = tube.size[1];
    v.stride[0] = tube.stride[0], v.stride[1] = 0, v.stride[2] = tube.stride[1];
  } else {
    v = view<3>(keep);
  }
  if (v.size[0] == 1) v.size[0] = B, v.stride[0] = 0;
  return v;
}

template <typename Args>
struct Entry {
  using Cpu = void (*)(const Args&, const Executor&);
  using Cuda = void (*)(const Args&, CUstream_st*);
};

template <typename Args>
void run(const Tensor& on, const Args& args, typename Entry<Args>::Cpu cpu, typename Entry<Args>::Cuda cuda) {
  if (cpu != nullptr && on.is_cpu()) return cpu(args, torch_executor());
  STD_TORCH_CHECK(cuda != nullptr, "pyvidx: this build has no CUDA kernels");
  if (on.is_cpu()) return cuda(args, current_stream(on));  // the emulator
  torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  cuda(args, current_stream(on));
}

}  // namespace pyvidx

// The ops' namespace in torch. A library that is loaded beside others of pyvidx needs one of its own
// (cmake/hf_kernel.py).
#if !defined(PYVIDX_NAMESPACE)
#define PYVIDX_NAMESPACE pyvidx
#endif

// PYVIDX_REGISTER(kernels): calls kernels(library) for every device that this build has kernels for.
#if defined(PYVIDX_CUDA)
#define PYVIDX_REGISTER(kernels)                                                  \
  STABLE_TORCH_LIBRARY_IMPL(PYVIDX_NAMESPACE, CPU, library) { kernels(library); } \
  STABLE_TORCH_LIBRARY_IMPL(PYVIDX_NAMESPACE, CUDA, library) { kernels(library); }
#else
#define PYVIDX_REGISTER(kernels) \
  STABLE_TORCH_LIBRARY_IMPL(PYVIDX_NAMESPACE, CPU, library) { kernels(library); }
#endif

// PYVIDX_RUN(op, on, args): call op_cpu or op_cuda, by the device of the tensor `on`.
// PYVIDX_EMU: the CUDA kernels run in the emulator, on CPU tensors (tests/cuda_emu).
#if defined(PYVIDX_EMU)
#define PYVIDX_RUN(op, on, args) ::pyvidx::run(on, args, nullptr, &op##_cuda)
#elif defined(PYVIDX_CUDA)
#define PYVIDX_RUN(op, on, args) ::pyvidx::run(on, args, &op##_cpu, &op##_cuda)
#else
#define PYVIDX_RUN(op, on, args) ::pyvidx::run(on, args, &op##_cpu, nullptr)
#endif
