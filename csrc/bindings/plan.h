// Plan and its builder in Python. Arrays cross as buffers; the GIL is released while a plan is built or run.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include "engine/plan.h"
#include "kernels/conv.h"

namespace actzip {

inline void bind_plan(nanobind::module_& m) {
  namespace nb = nanobind;
  using namespace nb::literals;
  using engine::NodeSpec;
  using engine::Plan;
  using engine::PlanBuilder;
  using engine::ValueSpec;
  using In = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
  using Out = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
  using Strings = std::map<std::string, std::string>;
  using Ints = std::map<std::string, std::vector<int64_t>>;
  using Floats = std::map<std::string, std::vector<double>>;

  static const auto check = [](const std::vector<int64_t>& want, size_t rank, auto size) {
    bool same = want.size() == rank;
    for (size_t d = 0; same && d < rank; ++d) same = static_cast<int64_t>(size(d)) == want[d];
    if (!same) throw std::invalid_argument("plan: an array of another shape");
  };
  struct Call {
    std::vector<const float*> in;
    std::vector<float*> out;
    Call(const Plan& p, int64_t batch, const std::vector<In>& inputs, const std::vector<Out>& outputs) {
      if (inputs.size() != p.inputs().size() || outputs.size() != p.outputs().size())
        throw std::invalid_argument("plan: another number of inputs or outputs");
      for (size_t i = 0; i < inputs.size(); ++i) {
        check(p.shape(p.inputs()[i], batch), inputs[i].ndim(), [&](size_t d) { return inputs[i].shape(d); });
        in.push_back(inputs[i].data());
      }
      for (size_t i = 0; i < outputs.size(); ++i) {
        check(p.shape(p.outputs()[i], batch), outputs[i].ndim(),
              [&](size_t d) { return outputs[i].shape(d); });
        out.push_back(outputs[i].data());
      }
    }
  };

  nb::class_<Plan>(m, "Plan", "A compiled network; see docs/engine.md.")
      .def(
          "run",
          [](const Plan& p, int64_t batch, const std::vector<In>& inputs, const std::vector<Out>& outputs,
             int threads) {
            const Call call(p, batch, inputs, outputs);
            const nb::gil_scoped_release released;
            p.run(batch, call.in, call.out, threads);
          },
          "batch"_a, "inputs"_a.noconvert(), "outputs"_a.noconvert(), "threads"_a = 0)
      .def(
          "profile",
          [](const Plan& p, int64_t batch, const std::vector<In>& inputs, const std::vector<Out>& outputs,
             int threads) {
            const Call call(p, batch, inputs, outputs);
            std::vector<engine::NodeTiming> timings;
            {
              const nb::gil_scoped_release released;
              timings = p.profile(batch, call.in, call.out, threads);
            }
            nb::list rows;
            for (const auto& t : timings)
              rows.append(nb::make_tuple(t.op, t.name, t.kernel, t.kind, t.seconds));
            return rows;
          },
          "batch"_a, "inputs"_a.noconvert(), "outputs"_a.noconvert(), "threads"_a = 0,
          "(op, name, kernel, kind, seconds) of every node of one run.")
      .def(
          "densities",
          [](const Plan& p, int64_t batch, const std::vector<In>& inputs, const std::vector<Out>& outputs,
             int threads) {
            const Call call(p, batch, inputs, outputs);
            const nb::gil_scoped_release released;
            return p.densities(batch, call.in, call.out, threads);
          },
          "batch"_a, "inputs"_a.noconvert(), "outputs"_a.noconvert(), "threads"_a = 0,
          "Share of non-zeros of every value that a node writes in one run, -1 for the others.")
      .def(
          "capture",
          [](const Plan& p, int64_t batch, const std::vector<In>& inputs, const std::vector<Out>& outputs,
             int threads, const std::vector<int>& values) {
            const Call call(p, batch, inputs, outputs);
            std::vector<std::vector<float>> found;
            {
              const nb::gil_scoped_release released;
              found = p.capture(batch, call.in, call.out, threads, values);
            }
            nb::list arrays;
            for (size_t i = 0; i < values.size(); ++i) {
              const std::vector<int64_t> nchw = p.shape(values[i], batch);
              std::vector<size_t> shape;
              for (int d : {0, 2, 3, 1}) shape.push_back(static_cast<size_t>(nchw[static_cast<size_t>(d)]));
              auto* data = new std::vector<float>(std::move(found[i]));
              const nb::capsule owner(data,
                                      [](void* v) noexcept { delete static_cast<std::vector<float>*>(v); });
              arrays.append(nb::ndarray<nb::numpy, float>(data->data(), 4, shape.data(), owner));
            }
            return arrays;
          },
          "batch"_a, "inputs"_a.noconvert(), "outputs"_a.noconvert(), "threads"_a, "values"_a,
          "Arrays (N, H, W, C): what these maps, which nodes read, hold in one run.")
      .def("shape", &Plan::shape, "value"_a, "batch"_a)
      .def("arena_bytes", &Plan::arena_bytes, "batch"_a, "threads"_a = 1)
      .def(
          "memory",
          [](const Plan& p, int64_t batch, int threads) {
            nb::list rows;
            for (const auto& row : p.memory(batch, threads))
              rows.append(nb::make_tuple(row.name, row.values, row.scratch));
            return rows;
          },
          "batch"_a, "threads"_a = 1,
          "(name, bytes of values, bytes of scratch) that every node needs of one arena while it runs.")
      .def("weight_bytes", &Plan::weight_bytes)
      .def("spilled_bytes", &Plan::spilled_bytes)
      .def("release", &Plan::release, "Frees the memory of idle contexts.");

  static const auto node_of = [](const std::string& op, const std::string& name, std::vector<int> inputs,
                                 int output, const Ints& ints, const Floats& floats, const nb::dict& arrays,
                                 const Strings& strings) {
    NodeSpec s;
    s.op = op;
    s.name = name;
    s.inputs = std::move(inputs);
    s.output = output;
    s.ints = ints;
    s.floats = floats;
    s.strings = strings;
    for (auto [k, v] : arrays) {
      // Given back wherever the last node drops it, which may be outside the interpreter's lock.
      const std::shared_ptr<In> lent(new In(nb::cast<In>(v)), [](In* array) {
        const nb::gil_scoped_acquire lock;
        delete array;
      });
      s.borrowed[nb::cast<std::string>(k)] = {lent->data(), lent->size(), lent};
    }
    return s;
  };
  static const auto value_of = [](const std::string& name, std::vector<int64_t> dims, std::vector<bool> batch,
                                  const std::string& layout, int parent, int64_t offset,
                                  std::vector<int64_t> parts, const std::string& type,
                                  std::vector<float> scales, std::vector<float> tops, double density,
                                  nb::object data, int64_t band) {
    ValueSpec v;
    v.name = name;
    v.dims = std::move(dims);
    v.batch = std::move(batch);
    if (layout == "plain") {
      v.layout = engine::Layout::plain;
    } else if (layout == "map") {
      v.layout = engine::Layout::map;
    } else if (layout == "packed") {
      v.layout = engine::Layout::packed;
    } else {
      throw std::invalid_argument("value '" + name + "': layout '" + layout + "'");
    }
    v.parent = parent;
    v.offset = offset;
    v.parts = std::move(parts);
    static const std::map<std::string, ValueType> types = {
        {"f32", ValueType::f32}, {"f16", ValueType::f16}, {"u8", ValueType::u8}, {"u16", ValueType::u16}};
    const auto t = types.find(type);
    if (t == types.end()) throw std::invalid_argument("value '" + name + "': type '" + type + "'");
    v.type = t->second;
    for (float s : scales)
      if (!(s > 0.0f && s <= 3.4028235e38f))
        throw std::invalid_argument("value '" + name + "': a scale must be positive and finite");
    if ((scales.size() > 1 && scales.size() != v.parts.size()) ||
        (!tops.empty() && tops.size() != scales.size()))
      throw std::invalid_argument("value '" + name + "': one scale and top, or one of each a part");
    v.scales = std::move(scales);
    v.tops = std::move(tops);
    v.density = density;
    v.band = band;
    if (!data.is_none()) {
      const auto a = nb::cast<In>(data);
      v.data.assign(a.data(), a.data() + a.size());
    }
    return v;
  };

  nb::class_<WeightStore>(m, "WeightStore",
                          "Packed weights by layer and kernel, shared by the plans of a model.")
      .def(nb::init<>())
      .def(
          "lend",
          [](WeightStore& s, const std::string& key, In array) {
            const float* data = array.data();
            const auto count = static_cast<int64_t>(array.size());
            s.lend(key, SharedFloats(data, [array](const float*) {}), count);
          },
          "key"_a, "array"_a.noconvert(), "Weights packed before, used where they lie.")
      .def("drop_idle", &WeightStore::drop_idle, "Forgets weights that no plan has.")
      .def(
          "used",
          [](const WeightStore& s) {
            nb::dict found;
            for (const auto& [key, entry] : s.used()) {
              auto* owner = new SharedFloats(entry.array);
              nb::capsule keep(owner, [](void* p) noexcept { delete static_cast<SharedFloats*>(p); });
              found[key.c_str()] = nb::ndarray<nb::numpy, const float, nb::ndim<1>>(
                  entry.array.get(), {static_cast<size_t>(entry.count)}, keep);
            }
            return found;
          },
          "What plans took so far: key -> float32 array.");

  struct Builder {
    PlanBuilder builder;
    std::shared_ptr<WeightStore> store;
    explicit Builder(std::shared_ptr<WeightStore> s = nullptr) : builder(s), store(std::move(s)) {}
    std::vector<ValueSpec> values;
  };
  nb::class_<Builder>(m, "PlanBuilder", "Values and nodes of a Plan to be; see docs/engine.md.")
      .def(nb::init<std::shared_ptr<WeightStore>>(), "store"_a = nb::none())
      .def(
          "value",
          [](Builder& b, const std::string& name, std::vector<int64_t> dims, std::vector<bool> batch,
             const std::string& layout, int parent, int64_t offset, std::vector<int64_t> parts,
             const std::string& type, std::vector<float> scales, std::vector<float> tops, double density,
             nb::object data, int64_t band) {
            ValueSpec v =
                value_of(name, std::move(dims), std::move(batch), layout, parent, offset, std::move(parts),
                         type, std::move(scales), std::move(tops), density, std::move(data), band);
            ValueSpec light = v;
            light.data.clear();
            b.values.push_back(std::move(light));
            return b.builder.value(std::move(v));
          },
          "name"_a, "dims"_a, "batch"_a, "layout"_a = "plain", "parent"_a = -1, "offset"_a = 0,
          "parts"_a = std::vector<int64_t>{}, "type"_a = "f32", "scales"_a = std::vector<float>{},
          "tops"_a = std::vector<float>{}, "density"_a = 1.0, "data"_a = nb::none(), "band"_a = 0)
      .def(
          "node",
          [](Builder& b, const std::string& op, const std::string& name, std::vector<int> inputs, int output,
             const Ints& ints, const Floats& floats, const nb::dict& arrays, const Strings& strings) {
            b.builder.node(node_of(op, name, std::move(inputs), output, ints, floats, arrays, strings));
          },
          "op"_a, "name"_a, "inputs"_a, "output"_a, "ints"_a = Ints{}, "floats"_a = Floats{},
          "arrays"_a = nb::dict(), "strings"_a = Strings{})
      .def(
          "variants",
          [](Builder& b, const std::string& op, const std::string& name, std::vector<int> inputs, int output,
             const Ints& ints, const Floats& floats, const nb::dict& arrays, const Strings& strings) {
            return engine::node_variants(
                node_of(op, name, std::move(inputs), output, ints, floats, arrays, strings), b.values);
          },
          "op"_a, "name"_a, "inputs"_a, "output"_a, "ints"_a = Ints{}, "floats"_a = Floats{},
          "arrays"_a = nb::dict(), "strings"_a = Strings{},
          "Kernel variants for a conv or linear node between values added before.")
      .def(
          "input", [](Builder& b, int v) { b.builder.input(v); }, "value"_a)
      .def(
          "output", [](Builder& b, int v) { b.builder.output(v); }, "value"_a)
      .def(
          "build",
          [](Builder& b, const nb::object& packed) {
            const nb::gil_scoped_release released;
            b.values.clear();
            if (packed.is_none()) return b.builder.build();
            return b.builder.build([&](size_t node) {
              const nb::gil_scoped_acquire lock;
              packed(node);
            });
          },
          "packed"_a = nb::none(), "packed(i): called when node i has packed its weights.");

  m.def("operators", &engine::operator_names, "Operators that a node of a plan can have.");
  m.def("activations", &engine::activation_names, "Elementwise functions that nodes apply (strings 'act').");
  m.def(
      "peak_gflops",
      [](double seconds) {
        const nb::gil_scoped_release released;
        return measure_peak_gflops(seconds);
      },
      "seconds"_a = 0.05,
      "GFLOP/s of one core by a loop of FMAs in registers on the instruction set in use.");
}

}  // namespace actzip
