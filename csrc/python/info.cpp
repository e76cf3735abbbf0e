// pyvidx._C: what can be known of this build that is not a tensor operation.
#include <pybind11/pybind11.h>

#include "pyvidx/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of pyvidx's native code.";
  m.attr("compiler") = __VERSION__;
  m.attr("built_with_torch") = PYVIDX_BUILD_TORCH;
  m.attr("cuda_archs") = PYVIDX_BUILD_ARCHS;
  m.def("isa", [] { return pyvidx::isa_name(pyvidx::isa()); },
        "The instruction-set level the CPU kernels run at: v2, v3 or v4 (x86-64), baseline elsewhere.");
}
