// Packing of saved tensors in Python, as the submodule `training` of _engine. Tensors cross as addresses:
// actzip.training.native, which alone calls this, has checked them; what a tensor offers is slower than a
// call.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>

#include "training/saved.h"
#include "training/team.h"

namespace actzip::training {

inline void bind(nanobind::module_& parent) {
  namespace nb = nanobind;
  using namespace nb::literals;
  using Address = uintptr_t;
  using Release = nb::call_guard<nb::gil_scoped_release>;
  nb::module_ m = parent.def_submodule("training", "Packing of the tensors that autograd saves.");
  m.attr("CHUNK") = kChunk;
  m.attr("GROUP") = kGroup;
  m.attr("SLACK") = kSlack;

  static const auto in = [](Address a) { return reinterpret_cast<const void*>(a); };
  static const auto bytes = [](Address a) { return reinterpret_cast<uint8_t*>(a); };
  static const auto counts = [](Address a) { return reinterpret_cast<int32_t*>(a); };
  static const auto ranges = [](Address a) { return reinterpret_cast<Range*>(a); };

  m.def("use_openmp", [](Address parallel) { use_openmp(reinterpret_cast<OpenMP>(parallel)); }, "parallel"_a);
  m.def(
      "sample_density", [](Address x, int64_t n, int width) { return sample_density(in(x), n, width); },
      "x"_a, "n"_a, "width"_a, Release());
  m.def("fingerprint", [](Address x, int64_t size) { return fingerprint(in(x), size); }, "x"_a, "bytes"_a);
  m.def(
      "is_uniform", [](Address x, int64_t n, int width) { return is_uniform(in(x), n, width); }, "x"_a, "n"_a,
      "width"_a, Release());
  m.def(
      "nonzero_mask",
      [](Address x, int64_t n, int width, Address bits, Address c, int threads) {
        return nonzero_mask(in(x), n, width, bytes(bits), counts(c), threads);
      },
      "x"_a, "n"_a, "width"_a, "bits"_a, "counts"_a, "threads"_a, Release());
  m.def(
      "test_mask",
      [](Address x, int64_t n, int type, int test, float lo, float hi, Address bits, Address c, int threads) {
        return test_mask(in(x), n, static_cast<Real>(type), static_cast<Test>(test), lo, hi, bytes(bits),
                         counts(c), threads);
      },
      "x"_a, "n"_a, "type"_a, "test"_a, "lo"_a, "hi"_a, "bits"_a, "counts"_a, "threads"_a, Release());
  m.def(
      "compress",
      [](Address x, int64_t n, int width, Address bits, Address c, Address values, int threads) {
        return compress(in(x), n, width, bytes(bits), counts(c), bytes(values), threads);
      },
      "x"_a, "n"_a, "width"_a, "bits"_a, "counts"_a, "values"_a, "threads"_a, Release());
  m.def(
      "expand",
      [](Address values, Address bits, Address c, int64_t n, int width, Address out, int threads) {
        expand(in(values), bytes(bits), counts(c), n, width, bytes(out), threads);
      },
      "values"_a, "bits"_a, "counts"_a, "n"_a, "width"_a, "out"_a, "threads"_a, Release());
  m.def(
      "fill",
      [](Address bits, int64_t n, int width, uint64_t on, uint64_t off, Address out, int threads) {
        fill(bytes(bits), n, width, on, off, bytes(out), threads);
      },
      "bits"_a, "n"_a, "width"_a, "on"_a, "off"_a, "out"_a, "threads"_a, Release());
  m.def(
      "select",
      [](Address x, Address bits, int64_t n, int width, Address out, int threads) {
        select(in(x), bytes(bits), n, width, bytes(out), threads);
      },
      "x"_a, "bits"_a, "n"_a, "width"_a, "out"_a, "threads"_a, Release());
  m.def(
      "coded_size", [](Address c, int64_t chunks, int bits) { return coded_size(counts(c), chunks, bits); },
      "counts"_a, "chunks"_a, "bits"_a, Release());
  m.def(
      "quantize",
      [](Address x, int64_t n, int type, Address mask, Address c, int bits, uint64_t seed, Address codes,
         Address r, int threads) {
        return static_cast<int>(quantize(in(x), n, static_cast<Real>(type), bytes(mask), counts(c), bits,
                                         seed, bytes(codes), ranges(r), threads));
      },
      "x"_a, "n"_a, "type"_a, "mask"_a, "counts"_a, "bits"_a, "seed"_a, "codes"_a, "ranges"_a, "threads"_a,
      Release());
  m.def(
      "dequantize",
      [](Address codes, Address r, int64_t n, int type, Address mask, Address c, int bits, Address out,
         int threads) {
        dequantize(bytes(codes), ranges(r), n, static_cast<Real>(type), bytes(mask), counts(c), bits,
                   bytes(out), threads);
      },
      "codes"_a, "ranges"_a, "n"_a, "type"_a, "mask"_a, "counts"_a, "bits"_a, "out"_a, "threads"_a,
      Release());

  // A pool's shape crosses as the members of PoolShape in their order: graphs that outlive the interpreter
  // hold it.
  using Members = std::array<int64_t, 14>;
  static const auto shape = [](const Members& p) {
    return PoolShape{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13]};
  };
  m.def("index_bits", [](const Members& pool) { return shape(pool).bits(); }, "pool"_a);
  m.def(
      "pack_indices",
      [](Address indices, const Members& pool, Address codes, int threads) {
        return pack_indices(reinterpret_cast<const int64_t*>(indices), shape(pool), bytes(codes), threads);
      },
      "indices"_a, "pool"_a, "codes"_a, "threads"_a, Release());
  m.def(
      "unpack_indices",
      [](Address codes, const Members& pool, Address indices, int threads) {
        unpack_indices(bytes(codes), shape(pool), reinterpret_cast<int64_t*>(indices), threads);
      },
      "codes"_a, "pool"_a, "indices"_a, "threads"_a, Release());
  m.def(
      "advise_large_pages", [](Address p, int64_t size) { advise_large_pages(bytes(p), size); }, "p"_a,
      "bytes"_a);
}

}  // namespace actzip::training
