// Python bindings of the engine (nanobind). Arrays cross as buffers without a copy; the GIL is released in
// every call that does work.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/cpu.h"
#include "bindings/kernels_testing.h"
#include "bindings/plan.h"
#include "bindings/training.h"

namespace nb = nanobind;

NB_MODULE(_engine, m) {
#ifdef NDEBUG  // PyTorch keeps graphs and their plans until the process ends: nothing for a user to read
  nb::set_leak_warnings(false);
#endif
  m.doc() = "Native engine of actzip.";
  actzip::bind_cpu(m);
  actzip::bind_plan(m);
  actzip::kernels_testing::bind(m);
  actzip::training::bind(m);
}
