// Python bindings of the codec (nanobind). Arrays cross as buffers without a copy; the GIL is released in
// every call that does work. The Python face is src/actzip/codec.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include "bindings/cpu.h"
#include "bindings/stats.h"
#include "codec/container.h"
#include "codec/crc32c.h"
#include "codec/kernels.h"

namespace nb = nanobind;
using namespace actzip::codec;

namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using MutableArray = nb::ndarray<nb::device::cpu>;

using Bytewise = nb::ndarray<nb::c_contig, nb::device::cpu>;
using ReadBytewise = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using MutableFloats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

// A map of `size` numbers of n inputs, as runs that each have one of `steps` steps, in turns.
struct Runs {
  size_t count = 0, size = 0;
  Runs(size_t numbers, size_t n, size_t steps) {
    if (numbers == 0) return;
    count = steps == 1 ? 1 : n * steps;
    if (steps == 0 || numbers % count != 0)
      throw ArgumentError("as many steps as the map has channels are needed, or one");
    size = numbers / count;
  }
};

// A contiguous byte buffer: bytes, bytearray, memoryview, mmap, numpy array.
class Bytes {
 public:
  explicit Bytes(nb::handle h, int flags = PyBUF_SIMPLE) {
    if (PyObject_GetBuffer(h.ptr(), &view_, flags) != 0) throw nb::python_error();
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  uint8_t* writable() const { return static_cast<uint8_t*>(view_.buf); }
  size_t size() const { return static_cast<size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

template <class A>
std::vector<int64_t> byte_strides(const A& a, size_t item) {
  std::vector<int64_t> s;
  for (size_t i = 0; i < a.ndim(); ++i) s.push_back(a.stride(i) * static_cast<int64_t>(item));
  return s;
}
template <class A>
std::vector<uint64_t> shape_of(const A& a) {
  std::vector<uint64_t> s;
  for (size_t i = 0; i < a.ndim(); ++i) s.push_back(a.shape(i));
  return s;
}

const Codec* codec_named(const std::string& name) {
  const Codec* c = find_codec(name);
  if (c == nullptr) {
    std::string known;
    for (const Codec* k : codecs()) known += std::string(known.empty() ? "" : ", ") + k->name;
    throw ArgumentError("unknown codec '" + name + "'; there are: " + known);
  }
  return c;
}

void set_error(const char* name, const char* what) {
  nb::object type = nb::module_::import_("actzip.errors").attr(name);
  PyErr_SetString(type.ptr(), what);
}

struct BytesOut {
  PyObject* object = nullptr;
  static uint8_t* allocate(void* self, size_t n) {
    nb::gil_scoped_acquire gil;
    auto* out = static_cast<BytesOut*>(self);
    out->object = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(n));
    if (out->object == nullptr) throw nb::python_error();
    return reinterpret_cast<uint8_t*>(PyBytes_AsString(out->object));
  }
  ~BytesOut() { Py_XDECREF(object); }
};

Header header_of(const Array& a, const std::string& codec, const std::string& dtype, int bits, bool is_signed,
                 std::optional<float> scale, int32_t zero, bool channels_last, bool from_torch) {
  Header h;
  h.codec = codec_named(codec);
  if (!find_dtype(dtype, &h.dtype)) throw ArgumentError("unknown dtype '" + dtype + "'");
  if (a.ndim() > static_cast<size_t>(kMaxDims)) throw ArgumentError("more than 16 dimensions");
  h.bits = bits;
  h.is_signed = is_signed;
  h.has_quantizer = scale.has_value();
  h.scale = scale.value_or(0);
  h.zero = zero;
  h.layout = channels_last ? Layout::channels_last : Layout::c;
  h.from_torch = from_torch;
  h.shape = shape_of(a);
  const size_t item = a.itemsize();
  if (item != (bits <= 8 ? 1u : bits <= 16 ? 2u : 4u))
    throw ArgumentError("elements of " + std::to_string(item) + " bytes for " + std::to_string(bits) +
                        " bits");
  return h;
}

ArrayRef reference(const Array& a) {
  return {static_cast<const uint8_t*>(a.data()), byte_strides(a, a.itemsize())};
}

nb::object encode_array(Array a, const std::string& codec, const std::string& dtype, int bits, bool is_signed,
                        std::optional<float> scale, int32_t zero, bool channels_last, bool from_torch,
                        const std::map<std::string, int64_t>& options, uint32_t chunk_elements, int threads,
                        nb::object into) {
  Header h = header_of(a, codec, dtype, bits, is_signed, scale, zero, channels_last, from_torch);
  const ArrayRef ref = reference(a);
  EncodeOptions o;
  o.codec_options = options;
  o.chunk_elements = chunk_elements;
  o.threads = threads;
  if (!into.is_none()) {
    Bytes buffer(into, PyBUF_WRITABLE);
    o.out = buffer.writable();
    o.out_size = buffer.size();
    size_t used;
    {
      nb::gil_scoped_release release;
      used = encode(std::move(h), ref, o, nullptr, nullptr);
    }
    return nb::int_(used);
  }
  BytesOut out;
  {
    nb::gil_scoped_release release;
    encode(std::move(h), ref, o, &BytesOut::allocate, &out);
  }
  PyObject* result = out.object;
  out.object = nullptr;
  return nb::steal(result);
}

// What encode_array takes of one array.
using Item = std::tuple<Array, std::string, int, bool, std::optional<float>, bool, bool>;

nb::list encode_arrays(const std::vector<Item>& items, const std::string& codec,
                       const std::map<std::string, int64_t>& options, uint32_t chunk_elements, int threads,
                       std::optional<std::vector<nb::object>> into) {
  if (into && into->size() != items.size()) throw ArgumentError("out: a buffer for each array is needed");
  std::vector<EncodeJob> jobs(items.size());
  std::vector<BytesOut> made(into ? 0 : items.size());
  std::vector<std::unique_ptr<Bytes>> buffers;
  for (size_t i = 0; i < items.size(); ++i) {
    const auto& [a, dtype, bits, is_signed, scale, channels_last, from_torch] = items[i];
    EncodeJob& j = jobs[i];
    j.header = header_of(a, codec, dtype, bits, is_signed, scale, 0, channels_last, from_torch);
    j.array = reference(a);
    j.options.codec_options = options;
    j.options.chunk_elements = chunk_elements;
    if (into) {
      buffers.push_back(std::make_unique<Bytes>((*into)[i], PyBUF_WRITABLE));
      j.options.out = buffers.back()->writable();
      j.options.out_size = buffers.back()->size();
    } else {
      j.allocate = &BytesOut::allocate;
      j.context = &made[i];
    }
  }
  {
    nb::gil_scoped_release release;
    encode_many(jobs, threads);
  }
  nb::list results;
  for (size_t i = 0; i < items.size(); ++i) {
    if (into) {
      results.append(nb::int_(jobs[i].size));
    } else {
      results.append(nb::steal(made[i].object));
      made[i].object = nullptr;
    }
  }
  return results;
}

nb::dict describe(const Header& h) {
  nb::dict d;
  d["version"] = kVersion;
  d["codec"] = h.codec->name;
  d["dtype"] = dtype_name(h.dtype);
  d["bits"] = h.bits;
  d["width"] = h.info.width;
  d["signed"] = h.is_signed;
  d["scale"] = h.has_quantizer ? nb::object(nb::float_(static_cast<double>(h.scale))) : nb::none();
  d["zero"] = h.zero;
  d["channels_last"] = h.layout == Layout::channels_last;
  d["from_torch"] = h.from_torch;
  d["shape"] = nb::tuple(nb::cast(h.shape));
  d["chunk_shape"] = nb::make_tuple(h.chunk_planes, h.chunk_rows, h.chunk_cols);
  d["elements"] = h.elements;
  d["chunks"] = h.chunks;
  d["header_bytes"] = h.header_size;
  d["params"] = nb::bytes(reinterpret_cast<const char*>(h.params.data()), h.params.size());
  return d;
}

void check_output(const Header& h, const Bytes& blob, const MutableArray& out) {
  if (shape_of(out) != h.shape || out.itemsize() != static_cast<size_t>(h.info.width))
    throw ArgumentError("the output array has another shape or element size than the blob");
  if (blob.size() != h.chunk_offsets.back()) throw ArgumentError("the header is of another blob");
}

// A parsed header, kept for several decodings.
struct PyHeader {
  Header h;
};

}  // namespace

NB_MODULE(_codec, m) {
#ifdef NDEBUG  // PyTorch keeps graphs and their plans until the process ends: nothing for a user to read
  nb::set_leak_warnings(false);
#endif
  m.doc() = "Native codec of actzip.";
  actzip::bind_cpu(m);
  actzip::bind_stats(m);

  nb::register_exception_translator([](const std::exception_ptr& p, void*) {
    try {
      std::rethrow_exception(p);
    } catch (const FormatError& e) {
      set_error("CodecError", e.what());
    } catch (const ArgumentError& e) {
      set_error("InputError", e.what());
    }
  });

  m.def(
      "codecs",
      [] {
        nb::list all;
        for (const Codec* c : codecs()) {
          nb::dict d;
          d["id"] = c->id;
          d["name"] = c->name;
          d["summary"] = c->summary;
          d["integers"] = (c->kinds & kIntegers) != 0;
          nb::list floats;
          if (c->kinds & kind_bit(Kind::float16)) floats.append("float16");
          if (c->kinds & kind_bit(Kind::bfloat16)) floats.append("bfloat16");
          if (c->kinds & kind_bit(Kind::float32)) floats.append("float32");
          d["floats"] = floats;
          d["options"] = std::string(c->options);
          d["encode_gbps"] = nb::make_tuple(c->speed.encode8, c->speed.encode16);
          d["decode_gbps"] = nb::make_tuple(c->speed.decode8, c->speed.decode16);
          all.append(d);
        }
        return all;
      },
      "The registry: one dict a codec.");

  m.def("encode", &encode_array, nb::arg("array"), nb::arg("codec"), nb::arg("dtype"), nb::arg("bits"),
        nb::arg("signed"), nb::arg("scale").none(), nb::arg("zero"), nb::arg("channels_last"),
        nb::arg("from_torch"), nb::arg("options"), nb::arg("chunk_elements"), nb::arg("threads"),
        nb::arg("out") = nb::none(),
        "The blob of an array of symbols (uint8, int8, uint16, int16, or uint32 patterns of float32); with "
        "`out`, a writable buffer, it is written there and its length returned.");

  m.def("encode_many", &encode_arrays, nb::arg("items"), nb::arg("codec"), nb::arg("options"),
        nb::arg("chunk_elements"), nb::arg("threads"), nb::arg("out") = nb::none(),
        "The blobs of many arrays, each given as (array, dtype, bits, signed, scale, channels_last, "
        "from_torch); "
        "with `out`, a writable buffer for each, they are written there and their lengths returned.");

  m.def(
      "value_range",
      [](Array a, bool is_signed, int threads) {
        const size_t item = a.itemsize();
        if (item != 1 && item != 2) throw ArgumentError("value_range takes 1- and 2-byte integers");
        const ArrayRef ref{static_cast<const uint8_t*>(a.data()), byte_strides(a, item)};
        const auto shape = shape_of(a);
        int64_t lo, hi;
        {
          nb::gil_scoped_release release;
          value_range(ref, shape, static_cast<int>(item), is_signed, threads, &lo, &hi);
        }
        return nb::make_tuple(lo, hi);
      },
      nb::arg("array"), nb::arg("signed"), nb::arg("threads") = 0,
      "(least, greatest) of an integer array and zero.");

  m.def(
      "to_levels",
      [](Floats x, Floats inverse, float rounding, int most, bool is_signed, Bytewise out) {
        const Runs r(x.size(), x.ndim() > 0 ? x.shape(0) : 1, inverse.size());
        if (out.size() != x.size() || out.itemsize() != 1) throw ArgumentError("to_levels: a byte a number");
        auto* q = static_cast<uint8_t*>(out.data());
        bool finite = true;
        nb::gil_scoped_release release;
        for (size_t i = 0; i < r.count; ++i)
          finite &= kernels().to_levels(x.data() + i * r.size, r.size, inverse.data()[i % inverse.size()],
                                        rounding, static_cast<float>(most), is_signed, q + i * r.size);
        return finite;
      },
      nb::arg("x"), nb::arg("inverse"), nb::arg("rounding"), nb::arg("most"), nb::arg("signed"),
      nb::arg("out"),
      "Integers of a contiguous map (N, C, ...) for one inverse step, or one a channel, into a contiguous "
      "array of bytes; whether all numbers were finite.");

  m.def(
      "from_levels",
      [](ReadBytewise q, Floats table, Floats step, bool few, MutableFloats out) {
        const Runs r(out.size(), out.ndim() > 0 ? out.shape(0) : 1, step.size());
        if (q.nbytes() != out.size() || table.size() != 256)
          throw ArgumentError("from_levels: a byte a number, and a table of 256");
        const auto* from = static_cast<const uint8_t*>(q.data());
        nb::gil_scoped_release release;
        for (size_t i = 0; i < r.count; ++i)
          kernels().from_levels(from + i * r.size, r.size, table.data(), step.data()[i % step.size()], few,
                                out.data() + i * r.size);
      },
      nb::arg("q"), nb::arg("table"), nb::arg("step"), nb::arg("few"), nb::arg("out"),
      "The map that bytes stand for, by a table and one step, or one a channel; few: all are below 32.");

  m.def(
      "crc32c",
      [](nb::object data) {
        Bytes b(data);
        nb::gil_scoped_release release;
        return crc32c(b.data(), b.size());
      },
      nb::arg("data"), "CRC-32C of a byte buffer.");

  m.def(
      "copy",
      [](Array a, MutableArray out, int threads) {
        if (a.nbytes() != out.nbytes()) throw ArgumentError("copy: arrays of different length");
        if (threads < 1)
          throw ArgumentError("copy: threads must be 1 or more, not " + std::to_string(threads));
        const auto* from = static_cast<const uint8_t*>(a.data());
        auto* to = static_cast<uint8_t*>(out.data());
        const size_t n = a.nbytes(), part = (n / static_cast<size_t>(threads) + 64) & ~size_t{63};
        nb::gil_scoped_release release;
        actzip::parallel_for(threads, threads, [&](int64_t i, int) {
          const size_t at = std::min(n, part * static_cast<size_t>(i));
          std::memcpy(to + at, from + at, std::min(part, n - at));
        });
      },
      nb::arg("array"), nb::arg("out"), nb::arg("threads"),
      "memcpy of a contiguous array, an equal part a thread: what the codecs' speeds are compared with.");

  nb::class_<PyHeader>(m, "Header", "A parsed and checked header of a blob.")
      .def("describe", [](const PyHeader& p) { return describe(p.h); })
      .def_prop_ro("chunk_sizes", [](const PyHeader& p) { return p.h.chunk_sizes; })
      .def_prop_ro("chunk_offsets", [](const PyHeader& p) { return p.h.chunk_offsets; })
      .def(
          "box",
          [](const PyHeader& p, uint64_t i) {
            if (i >= p.h.chunks)
              throw ArgumentError("chunk " + std::to_string(i) + " of " + std::to_string(p.h.chunks));
            const Box b = p.h.box(i);
            return nb::make_tuple(b.first_plane, b.first_row, b.first_col, b.planes, b.rows, b.cols);
          },
          nb::arg("chunk"), "(first plane, first row, first column, planes, rows, columns) of a chunk.");

  m.def(
      "parse_header",
      [](nb::object data, std::optional<uint64_t> total) -> nb::object {
        Bytes b(data);
        size_t need = 0;
        Header h = parse_header(b.data(), b.size(), total.value_or(b.size()), total ? &need : nullptr);
        if (need > 0) return nb::int_(need);
        return nb::cast(PyHeader{std::move(h)});
      },
      nb::arg("data"), nb::arg("total") = nb::none(),
      "The header of a blob. With `total`, the length of the whole blob, `data` may be its beginning: "
      "returns "
      "how many bytes are needed where it is too short.");

  m.def(
      "decode",
      [](nb::object data, const PyHeader& header, MutableArray out, bool verify, int threads) {
        Bytes b(data);
        const Header& h = header.h;
        check_output(h, b, out);
        const MutableArrayRef ref{static_cast<uint8_t*>(out.data()), byte_strides(out, out.itemsize())};
        nb::gil_scoped_release release;
        decode(b.data(), b.size(), h, ref, verify, threads);
      },
      nb::arg("data"), nb::arg("header"), nb::arg("out"), nb::arg("verify") = true, nb::arg("threads") = 0,
      "Decode a whole blob into an array of symbols of the header's shape.");

  m.def(
      "decode_many",
      [](const std::vector<nb::object>& blobs, const std::vector<nb::object>& headers,
         const std::vector<MutableArray>& outs, bool verify, int threads) {
        if (headers.size() != blobs.size() || outs.size() != blobs.size())
          throw ArgumentError("as many headers and outputs as blobs are needed");
        std::vector<std::unique_ptr<Bytes>> views;
        std::vector<DecodeJob> jobs;
        for (size_t i = 0; i < blobs.size(); ++i) {
          views.push_back(std::make_unique<Bytes>(blobs[i]));
          const Bytes& b = *views.back();
          const Header& h = nb::cast<const PyHeader&>(headers[i]).h;
          check_output(h, b, outs[i]);
          jobs.push_back(
              {b.data(),
               b.size(),
               &h,
               {static_cast<uint8_t*>(outs[i].data()), byte_strides(outs[i], outs[i].itemsize())}});
        }
        nb::gil_scoped_release release;
        decode_many(jobs, verify, threads);
      },
      nb::arg("blobs"), nb::arg("headers"), nb::arg("outs"), nb::arg("verify") = true, nb::arg("threads") = 0,
      "Decode many whole blobs, each into an array of symbols of its header's shape.");

  m.def(
      "decode_chunks",
      [](const PyHeader& header, const std::vector<uint64_t>& ids, const std::vector<nb::object>& payloads,
         const std::vector<MutableArray>& outs, bool verify, int threads) {
        const Header& h = header.h;
        if (payloads.size() != ids.size() || outs.size() != ids.size())
          throw ArgumentError("as many payloads and outputs as chunks are needed");
        std::vector<std::unique_ptr<Bytes>> views;
        std::vector<const uint8_t*> in;
        std::vector<uint8_t*> out;
        for (size_t i = 0; i < ids.size(); ++i) {
          if (ids[i] >= h.chunks)
            throw ArgumentError("chunk " + std::to_string(ids[i]) + ": the blob has " +
                                std::to_string(h.chunks));
          views.push_back(std::make_unique<Bytes>(payloads[i]));
          if (views.back()->size() != h.chunk_sizes[ids[i]])
            throw ArgumentError("the payload of chunk " + std::to_string(ids[i]) + " has another length");
          in.push_back(views.back()->data());
          if (outs[i].ndim() != 1 || outs[i].size() != h.box(ids[i]).size() || outs[i].stride(0) != 1 ||
              outs[i].itemsize() != static_cast<size_t>(h.info.width))
            throw ArgumentError("the output of chunk " + std::to_string(ids[i]) + " does not fit it");
          out.push_back(static_cast<uint8_t*>(outs[i].data()));
        }
        nb::gil_scoped_release release;
        decode_chunks(h, ids, in, out, verify, threads);
      },
      nb::arg("header"), nb::arg("chunks"), nb::arg("payloads"), nb::arg("outs"), nb::arg("verify") = true,
      nb::arg("threads") = 0, "Decode some chunks, each into its own one-dimensional array of symbols.");
}
