// The Python module maestro_fast._C. Arrays come as an address and a size: the caller keeps the memory alive and
// has checked type, layout and device. Errors of the library (std::invalid_argument) reach Python as ValueError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "pack_sequences.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of maestro_fast. Use them through maestro_fast.ops.";

  module.def(
      "pack_sequences",
      [](std::uintptr_t lengths, std::size_t count, std::int64_t max_tokens) {
        return maestro_fast::pack_sequences(reinterpret_cast<const std::int64_t*>(lengths), count, max_tokens);
      },
      py::arg("lengths"), py::arg("count"), py::arg("max_tokens"), py::call_guard<py::gil_scoped_release>(),
      "First-fit decreasing over `count` int64 at address `lengths`.");
}
