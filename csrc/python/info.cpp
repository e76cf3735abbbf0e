// pyvidx._C: what can be known of this build that is not a tensor operation.
#include <pybind11/pybind11.h>

#include "kernel_resources.h"  // made by the build from the CUDA compiler's log
#include "pyvidx/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of pyvidx's native code.";
  m.attr("compiler") = "gcc " __VERSION__;
  m.attr("built_with_torch") = PYVIDX_BUILD_TORCH;
  m.attr("cuda_archs") = PYVIDX_BUILD_ARCHS;
  m.attr("kernel_resources") = PYVIDX_KERNEL_RESOURCES;
  m.def(
      "isa", [] { return pyvidx::isa_name(pyvidx::isa()); },
      "The instruction-set level the CPU kernels run at: v2, v3, v4 or v4bf16 (x86-64), baseline elsewhere.");
}
