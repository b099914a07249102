// The Python module _C: importing it registers the native ops; its functions tell and set what will run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cprec/cpu.h"
#include "torch/pool.h"

namespace py = pybind11;

namespace {

py::dict build_config() {
  py::dict config;
  config["torch"] = CPREC_TORCH_VERSION;
  config["compiler"] = CPREC_COMPILER;
  config["cuda_compiler"] = CPREC_CUDA_COMPILER;            // "" when nvcc was not there
  config["cuda_architectures"] = CPREC_CUDA_ARCHITECTURES;  // what csrc/cuda was compiled for
  py::list kernels;
  for (const char* name : {"block_embedding/cpu",
                           "block_embedding_backward/cpu",
                           "block_embedding_backward_sparse/cpu",
                           "block_embedding_backward_accumulate/cpu",
                           "clustered_softmax/cpu",
                           "clustered_softmax_backward/cpu",
                           "clustered_softmax_backward_into/cpu",
                           "clustered_topk/cpu",
                           "clustered_rank/cpu",
                           "clustered_score/cpu",
                           "topk_index/cpu",
                           "in_large_pages/cpu",
                           "gather_taps/cpu",
                           "gather_taps_backward/cpu",
                           "conv_norm_relu/cpu",
                           "conv_norm_relu_backward/cpu",
                           "dropout/cpu",
                           "residual_stack/cpu",
                           "row_adamw_/cpu",
                           "row_adagrad_/cpu",
                           "row_decay_/cpu"})
    kernels.append(name);
#ifdef CPREC_WITH_CUDA
  kernels.append("block_embedding/cuda");
#endif
  config["kernels"] = kernels;  // "<op>/<device type>" of every kernel that is linked in
  return config;
}

double probe_read(const py::buffer& data) {
  const py::buffer_info info = data.request();
  if (info.format != py::format_descriptor<float>::format() || info.ndim != 1 ||
      info.strides[0] != static_cast<py::ssize_t>(sizeof(float)))
    throw py::value_error("data must be a contiguous float32 vector");
  const py::gil_scoped_release release;
  return cprec::cpu_kernels().probe_read(static_cast<const float*>(info.ptr), info.size);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of cprec_kernels.";
  m.def("build_config", &build_config, "What this module was built with and which kernels it holds.");
  m.def("cpu_isa", [] { return std::string(cprec::cpu_kernels().isa); }, "Instruction set of the CPU kernels in use.");
  m.def("available_cpu_isas", &cprec::available_cpu_isas, "Instruction sets that set_cpu_isa takes here.");
  m.def("set_cpu_isa", &cprec::set_cpu_isa, py::arg("name"),
        "Choose the instruction set of the CPU kernels by name, or 'auto'. Raises ValueError for one that cannot run.");
  m.def("release_memory", &cprec::release_pool, "Give memory kept for the next step back; returns the bytes.");
  // Probes of one thread, in the instruction set in use; cprec_kernels/testing/roofline.py turns them into rates.
  m.def(
      "probe_fma", [](std::int64_t iterations) { return cprec::cpu_kernels().probe_fma(iterations); },
      py::arg("iterations"), py::call_guard<py::gil_scoped_release>(), "Multiply tiles in L1; returns FLOPs.");
  m.def(
      "probe_bf16", [](std::int64_t iterations) { return cprec::cpu_kernels().probe_bf16(iterations); },
      py::arg("iterations"), py::call_guard<py::gil_scoped_release>(), "As probe_fma, of bf16 pairs; returns FLOPs.");
  m.def(
      "probe_exp2", [](std::int64_t iterations) { return cprec::cpu_kernels().probe_exp2(iterations); },
      py::arg("iterations"), py::call_guard<py::gil_scoped_release>(), "Powers of two in L1; returns their count.");
  m.def("probe_read", &probe_read, py::arg("data"), "Read a float32 vector once; returns bytes.");
}
