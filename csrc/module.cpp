// The Python module _C: importing it registers the native ops; its functions tell and set what will run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cprec/cpu.h"

namespace py = pybind11;

namespace {

py::dict build_config() {
  py::dict config;
  config["torch"] = CPREC_TORCH_VERSION;
  config["compiler"] = CPREC_COMPILER;
  config["cuda_compiler"] = CPREC_CUDA_COMPILER;            // "" when nvcc was not there
  config["cuda_architectures"] = CPREC_CUDA_ARCHITECTURES;  // what csrc/cuda was compiled for
  py::list kernels;
  for (const char* name : {"block_embedding/cpu", "clustered_softmax/cpu", "clustered_softmax_backward/cpu"})
    kernels.append(name);
#ifdef CPREC_WITH_CUDA
  kernels.append("block_embedding/cuda");
#endif
  config["kernels"] = kernels;  // "<op>/<device type>" of every kernel that is linked in
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of cprec_kernels.";
  m.def("build_config", &build_config, "What this module was built with and which kernels it holds.");
  m.def("cpu_isa", [] { return std::string(cprec::cpu_kernels().isa); }, "Instruction set of the CPU kernels in use.");
  m.def("available_cpu_isas", &cprec::available_cpu_isas, "Instruction sets that set_cpu_isa takes here.");
  m.def("set_cpu_isa", &cprec::set_cpu_isa, py::arg("name"),
        "Choose the instruction set of the CPU kernels by name, or 'auto'. Raises ValueError for one that cannot run.");
}
