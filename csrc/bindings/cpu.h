// What both modules expose of csrc/common.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "common/cpu.h"
#include "common/thread_pool.h"

namespace actzip {

inline void bind_cpu(nanobind::module_& m) {
  m.def("isa", [] { return std::string(isa_name(active_isa())); }, "The instruction set in use.");
  m.def(
      "isas",
      [] {
        std::vector<std::string> v;
        for (Isa i : supported_isas()) v.emplace_back(isa_name(i));
        return v;
      },
      "The instruction sets that this CPU can run, best last.");
  m.def("force_isa", &force_isa, nanobind::arg("name"),
        "Force an instruction set in this module ('' for the best); False if it cannot run here.");
  m.def("isa_warning", &isa_warning, "What was wrong with ACTZIP_ISA, or ''.");
  m.def("cpu_model", &cpu_model, "The CPU's own name.");
  m.def("cpu_extras", &cpu_extras, "Features beyond the ladder: AMX, VNNI, bfloat16.");
  m.def("default_threads", &default_threads, "Threads used where none are given.");
}

}  // namespace actzip
