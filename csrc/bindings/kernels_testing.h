// The kernels one by one, for tests and micro-benchmarks (`actzip._engine.kernels`): not part of the public
// API.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <stdexcept>

#include "common/thread_pool.h"
#include "kernels/conv.h"
#include "kernels/packed.h"

namespace actzip {
namespace kernels_testing {

namespace nb = nanobind;
using Array = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Result = nb::ndarray<nb::numpy, float>;

inline Result result(std::vector<size_t> shape) {
  size_t count = 1;
  for (size_t s : shape) count *= s;
  auto* data = new float[count > 0 ? count : 1]();
  nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return Result(data, shape.size(), shape.data(), owner);
}

// Seconds: of this thread's own CPU time where one thread is timed (other load then disturbs less), else of
// the clock.
inline double now(int threads) {
#if defined(__linux__)
  if (threads == 1) {
    timespec t{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  }
#endif
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// A packed map with memory of its own.
struct Owned {
  std::unique_ptr<PackedMap> map;
  std::unique_ptr<unsigned char, decltype(&std::free)> index{nullptr, &std::free},
      values{nullptr, &std::free};

  Owned(int64_t n, int64_t h, int64_t w, std::vector<ChannelBlock> blocks, int type, float scale,
        double density) {
    PackedLayout l;
    l.n = n;
    l.h = h;
    l.w = w;
    l.blocks = std::move(blocks);
    l.c = l.blocks.empty() ? 0 : l.blocks.back().first + l.blocks.back().width;
    l.type = static_cast<ValueType>(type);
    if (scale > 0) l.set_scale(scale);  // else the blocks have theirs
    const size_t capacity = l.value_bytes(density);
    const size_t index_bytes = l.index_bytes();
    map = std::make_unique<PackedMap>(l);
    index.reset(static_cast<unsigned char*>(std::aligned_alloc(64, index_bytes + 64)));
    values.reset(static_cast<unsigned char*>(std::aligned_alloc(64, capacity)));
    if (index == nullptr || values == nullptr) throw std::bad_alloc();
    map->bind(n, index.get(), values.get(), capacity);
  }
};

inline std::vector<ChannelBlock> blocks_of(const std::vector<int64_t>& parts, int64_t channels) {
  return parts.empty() ? split_channels(channels) : split_channels(parts);
}

inline void bind(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("kernels", "Kernels one by one, for tests and benchmarks.");

  m.def(
      "table",
      [](const std::string& isa) {
        nb::list rows;
        for (Isa i : supported_isas())
          if (isa == isa_name(i))
            for (const KernelRow& r : kernel_table(i)) {
              nb::dict d;
              d["name"] = r.name;
              d["kind"] = r.kind;
              d["oc_tile"] = r.oc_tile;
              d["pixel_tile"] = r.pixel_tile;
              d["reference"] = r.reference;
              rows.append(d);
            }
        return rows;
      },
      nb::arg("isa"), "Rows of the kernel table of one instruction set.");

  m.def("peak_gflops", &measure_peak_gflops, nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
        "GFLOP/s of one core by a loop of FMAs in registers.");

  // Through a packed map and back. Returns (array, used bytes, spilled bytes, non-zeros, index bytes).
  m.def(
      "roundtrip",
      [](Array x, const std::vector<int64_t>& parts, int type, float scale, double capacity, int threads,
         const std::vector<float>& scales, const std::vector<float>& tops) {
        if (x.ndim() != 4) throw std::invalid_argument("NHWC expected");
        const auto n = static_cast<int64_t>(x.shape(0)), h = static_cast<int64_t>(x.shape(1)),
                   w = static_cast<int64_t>(x.shape(2)), c = static_cast<int64_t>(x.shape(3));
        Result out = result({x.shape(0), x.shape(1), x.shape(2), x.shape(3)});
        std::vector<ChannelBlock> blocks = blocks_of(parts, c);
        for (size_t b = 0; b < blocks.size(); ++b) {
          blocks[b].scale = scales.empty() ? scale : scales.at(b);
          blocks[b].top = tops.empty() ? 0.0f : tops.at(b);
        }
        Owned o(n, h, w, std::move(blocks), type, 0.0f, capacity);
        {
          nb::gil_scoped_release release;
          pack_map(*o.map, x.data(), c, 0, -1, threads);
          unpack_map(*o.map, out.data(), c, 0, -1, threads);
        }
        return nb::make_tuple(out, o.map->used_bytes(), o.map->spilled_bytes(), o.map->nonzeros(),
                              o.map->layout().index_bytes());
      },
      nb::arg("x"), nb::arg("parts"), nb::arg("type"), nb::arg("scale"), nb::arg("capacity"),
      nb::arg("threads") = 1, nb::arg("scales") = std::vector<float>{},
      nb::arg("tops") = std::vector<float>{});

  nb::class_<ConvProblem>(m, "Problem")
      .def(nb::init<>())
      .def_rw("ic", &ConvProblem::ic)
      .def_rw("oc", &ConvProblem::oc)
      .def_rw("kh", &ConvProblem::kh)
      .def_rw("kw", &ConvProblem::kw)
      .def_rw("sh", &ConvProblem::sh)
      .def_rw("sw", &ConvProblem::sw)
      .def_rw("dh", &ConvProblem::dh)
      .def_rw("dw", &ConvProblem::dw)
      .def_rw("pad_top", &ConvProblem::pad_top)
      .def_rw("pad_left", &ConvProblem::pad_left)
      .def_rw("pad_bottom", &ConvProblem::pad_bottom)
      .def_rw("pad_right", &ConvProblem::pad_right)
      .def_rw("groups", &ConvProblem::groups)
      .def_rw("pool", &ConvProblem::pool)
      .def_rw("in_packed", &ConvProblem::in_packed)
      .def_rw("out_packed", &ConvProblem::out_packed)
      .def_prop_rw(
          "act", [](const ConvProblem& p) { return static_cast<int>(p.act); },
          [](ConvProblem& p, int v) { p.act = static_cast<ActKind>(v); })
      .def_rw("lo", &ConvProblem::lo)
      .def_rw("hi", &ConvProblem::hi)
      .def_rw("step", &ConvProblem::step)
      .def_rw("pre_step", &ConvProblem::pre_step)
      .def_rw("pre_lo", &ConvProblem::pre_lo)
      .def_rw("pre_hi", &ConvProblem::pre_hi)
      .def_rw("thresholds", &ConvProblem::thresholds)
      .def_rw("hint_h", &ConvProblem::hint_h)
      .def_rw("hint_w", &ConvProblem::hint_w)
      .def_rw("hint_density", &ConvProblem::hint_density)
      .def("set_in_parts",
           [](ConvProblem& p, const std::vector<int64_t>& parts) { p.in_blocks = split_channels(parts); });

  m.def("variants", &conv_variants, nb::arg("problem"),
        "Kernels that can compute it, the likely best first.");

  // One convolution: x, residual NHWC; weight OIHW. `in_pad`, `out_pad`: extra floats between dense pixels;
  // out_front: blocks (packed) or 3 * out_front floats (dense) left of the output. repeat > 0: returns
  // (out, seconds of each repetition).
  m.def(
      "conv",
      [](const ConvProblem& problem, const std::string& variant, Array x, Array weight,
         nb::object bias_object, nb::object residual_object, bool residual_packed, int type, float scale,
         int out_type, float out_scale, int64_t in_pad, int64_t out_pad, int64_t out_front, double capacity,
         int threads, int repeat) {
        if (x.ndim() != 4) throw std::invalid_argument("NHWC expected");
        const auto n = static_cast<int64_t>(x.shape(0)), h = static_cast<int64_t>(x.shape(1)),
                   w = static_cast<int64_t>(x.shape(2)), c = static_cast<int64_t>(x.shape(3));
        const float* bias = nullptr;
        Array bias_array, residual_array;
        if (!bias_object.is_none()) {
          bias_array = nb::cast<Array>(bias_object);
          bias = bias_array.data();
        }
        if (!residual_object.is_none()) residual_array = nb::cast<Array>(residual_object);
        const auto conv = Conv::make(problem, variant, weight.data(), bias);
        const int64_t oh = problem.out_h(h), ow = problem.out_w(w), oc = problem.oc;
        if (c != problem.ic || oh < 1 || ow < 1)
          throw std::invalid_argument("input does not fit the problem");
        Result out = result({static_cast<size_t>(n), static_cast<size_t>(oh), static_cast<size_t>(ow),
                             static_cast<size_t>(oc)});
        std::vector<double> seconds;
        {
          nb::gil_scoped_release release;
          ConvArgs a;
          a.n = n;
          a.ih = h;
          a.iw = w;
          std::unique_ptr<Owned> in_map, out_map, residual_map;
          std::vector<float> in_dense, out_dense;
          if (problem.in_packed) {
            in_map = std::make_unique<Owned>(
                n, h, w, problem.in_blocks.empty() ? split_channels(c) : problem.in_blocks, type, scale,
                capacity);
            pack_map(*in_map->map, x.data(), c, 0, -1, 1);
            a.in_map = in_map->map.get();
          } else {
            // Exactly as much memory as the map needs, so that a read beyond it is seen by sanitizers.
            a.in_stride = c + in_pad;
            in_dense.assign(static_cast<size_t>((n * h * w - 1) * a.in_stride + c), 1e30f);
            for (int64_t i = 0; i < n * h * w; ++i)
              std::memcpy(in_dense.data() + i * a.in_stride, x.data() + i * c, static_cast<size_t>(c) * 4);
            a.in = in_dense.data();
          }
          if (problem.out_packed) {
            std::vector<int64_t> parts(static_cast<size_t>(out_front), 48);
            parts.push_back(oc);
            parts.push_back(5);
            out_map =
                std::make_unique<Owned>(n, oh, ow, split_channels(parts), out_type, out_scale, capacity);
            a.out_map = out_map->map.get();
            a.out_first_block = out_front;
          } else {
            a.out_stride = oc + out_pad + 3 * out_front;
            out_dense.assign(static_cast<size_t>(n * oh * ow * a.out_stride), -7.0f);
            a.out = out_dense.data() + 3 * out_front;
          }
          if (!residual_object.is_none()) {
            if (residual_packed) {
              residual_map = std::make_unique<Owned>(n, oh, ow, split_channels(oc), type, scale, capacity);
              pack_map(*residual_map->map, residual_array.data(), oc, 0, -1, 1);
              a.residual_map = residual_map->map.get();
            } else {
              a.residual = residual_array.data();
              a.residual_stride = oc;
            }
          }
          conv->check(a);
          if (threads <= 0) threads = default_threads();
          const size_t each = (conv->scratch_bytes(a, threads) + 127) / 64 * 64;
          std::unique_ptr<unsigned char, decltype(&std::free)> scratch(
              static_cast<unsigned char*>(std::aligned_alloc(64, each * static_cast<size_t>(threads))),
              &std::free);
          if (scratch == nullptr) throw std::bad_alloc();
          for (int r = 0; r < std::max(1, repeat); ++r) {
            if (out_map)
              out_map->map->bind(n, out_map->index.get(), out_map->values.get(),
                                 out_map->map->layout().value_bytes(capacity));
            const auto t0 = now(threads);
            parallel_for(conv->items(a, threads), threads, [&](int64_t i, int worker) {
              conv->run_item(a, threads, i, scratch.get() + each * static_cast<size_t>(worker));
            });
            seconds.push_back(now(threads) - t0);
          }
          if (problem.out_packed) {
            unpack_map(*a.out_map, out.data(), oc, out_front, static_cast<int64_t>(split_channels(oc).size()),
                       1);
          } else {
            for (int64_t i = 0; i < n * oh * ow; ++i) {
              const float* row = out_dense.data() + i * a.out_stride;
              std::memcpy(out.data() + i * oc, row + 3 * out_front, static_cast<size_t>(oc) * 4);
              for (int64_t j = 0; j < a.out_stride; ++j)
                if ((j < 3 * out_front || j >= 3 * out_front + oc) && row[j] != -7.0f)
                  throw std::runtime_error("convolution wrote outside its channels");
            }
          }
        }
        return nb::make_tuple(out, seconds);
      },
      nb::arg("problem"), nb::arg("variant"), nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
      nb::arg("residual").none() = nb::none(), nb::arg("residual_packed") = false, nb::arg("type") = 0,
      nb::arg("scale") = 1.0f, nb::arg("out_type") = 0, nb::arg("out_scale") = 1.0f, nb::arg("in_pad") = 0,
      nb::arg("out_pad") = 0, nb::arg("out_front") = 0, nb::arg("capacity") = 1.0, nb::arg("threads") = 1,
      nb::arg("repeat") = 0);
}

}  // namespace kernels_testing
}  // namespace actzip
