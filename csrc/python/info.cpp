// pyvidx._C: what the CUDA compiler said of every kernel, for who works on them. Only builds in the source tree have
// it: a pybind11 module is bound to one Python, and a wheel serves all.
#include <pybind11/pybind11.h>

#include "kernel_resources.h"  // made by the build from the CUDA compiler's log

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CUDA compiler's report on the kernels of this build.";
  m.attr("kernel_resources") = PYVIDX_KERNEL_RESOURCES;
}
