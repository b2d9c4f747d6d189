#include "codec/container.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "codec/bytes.h"
#include "codec/crc32c.h"
#include "codec/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace actzip::codec {
namespace {

constexpr char kMagic[4] = {'A', 'C', 'T', 'Z'};
constexpr size_t kFixed = 14;  // magic, version, codec, dtype, bits, flags, ndim, header size
constexpr uint8_t kSigned = 1, kQuantizer = 2, kChannelsLast = 4, kTorch = 8;
constexpr size_t kMaxParams = size_t{1} << 24;
enum Slot { kGather = 0, kPayload = 1, kSlotOut = 2, kBack = 3 };

struct DtypeRow {
  Dtype d;
  const char* name;
};
constexpr DtypeRow kDtypes[] = {
    {Dtype::u8, "uint8"},     {Dtype::i8, "int8"},     {Dtype::u16, "uint16"},    {Dtype::i16, "int16"},
    {Dtype::u32, "uint32"},   {Dtype::i32, "int32"},   {Dtype::u64, "uint64"},    {Dtype::i64, "int64"},
    {Dtype::boolean, "bool"}, {Dtype::f16, "float16"}, {Dtype::bf16, "bfloat16"}, {Dtype::f32, "float32"},
    {Dtype::f64, "float64"},
};

[[noreturn]] void bad(size_t at, const std::string& what) {
  throw FormatError("header, byte " + std::to_string(at) + ": " + what);
}

bool mul(uint64_t a, uint64_t b, uint64_t* r) {
  if (a != 0 && b > UINT64_MAX / a) return false;
  *r = a * b;
  return true;
}

uint64_t ceil_div(uint64_t a, uint64_t b) { return a / b + (a % b != 0); }

void zigzag(void* v, size_t n, int width) {
  width == 1 ? kernels().zigzag8(static_cast<uint8_t*>(v), n)
             : kernels().zigzag16(static_cast<uint16_t*>(v), n);
}
void unzigzag(void* v, size_t n, int width) {
  width == 1 ? kernels().unzigzag8(static_cast<uint8_t*>(v), n)
             : kernels().unzigzag16(static_cast<uint16_t*>(v), n);
}

bool contiguous(const std::vector<uint64_t>& shape, const std::vector<int64_t>& strides, int width) {
  uint64_t step = static_cast<uint64_t>(width);
  for (size_t i = shape.size(); i-- > 0;) {
    if (shape[i] != 1 && strides[i] != static_cast<int64_t>(step)) return false;
    step *= shape[i];
  }
  return true;
}

bool aligned(const uint8_t* p, int width) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(width) == 0;
}

// Calls fn(byte offset in the strided array, run length, index of the run in the chunk) for the runs along
// the last axis that make up symbols [first, first + count).
template <class F>
void runs(const std::vector<uint64_t>& shape, const std::vector<int64_t>& strides, uint64_t first,
          uint64_t count, F&& fn) {
  const size_t nd = shape.size();
  if (nd == 0) {
    fn(int64_t{0}, uint64_t{1}, uint64_t{0});
    return;
  }
  uint64_t index[kMaxDims];
  uint64_t rest = first;
  for (size_t i = nd; i-- > 0;) {
    index[i] = rest % shape[i];
    rest /= shape[i];
  }
  uint64_t done = 0;
  while (done < count) {
    int64_t offset = 0;
    for (size_t i = 0; i < nd; ++i) offset += static_cast<int64_t>(index[i]) * strides[i];
    const uint64_t n = std::min(shape[nd - 1] - index[nd - 1], count - done);
    fn(offset, n, done);
    done += n;
    index[nd - 1] += n;
    for (size_t i = nd; i-- > 1 && index[i] == shape[i];) {
      index[i] = 0;
      ++index[i - 1];
    }
  }
}

template <class U>
void gather(const uint8_t* src, int64_t stride, uint64_t n, void* dst) {
  U* d = static_cast<U*>(dst);
  for (uint64_t i = 0; i < n; ++i) std::memcpy(d + i, src + static_cast<int64_t>(i) * stride, sizeof(U));
}
template <class U>
void scatter(const void* src, uint64_t n, uint8_t* dst, int64_t stride) {
  const U* s = static_cast<const U*>(src);
  for (uint64_t i = 0; i < n; ++i) std::memcpy(dst + static_cast<int64_t>(i) * stride, s + i, sizeof(U));
}

class ArraySource final : public Source {
 public:
  ArraySource(const Header& h, const ArrayRef& a)
      : h_(h),
        a_(a),
        direct_(!h.is_signed && contiguous(h.shape, a.strides, h.info.width) &&
                aligned(a.data, h.info.width)) {}

  uint64_t chunks() const override { return h_.chunks; }
  Box box(uint64_t chunk) const override { return h_.box(chunk); }

  const void* load(uint64_t chunk, Scratch& scratch, bool pad) const override {
    const uint64_t first = h_.first(chunk), count = h_.box(chunk).size();
    const size_t w = static_cast<size_t>(h_.info.width);
    if (direct_ && (!pad || (first + count) * w + kPad <= h_.elements * w)) return a_.data + first * w;
    uint8_t* out = scratch.get_as<uint8_t>(kGather, count * w);
    if (direct_) {
      std::memcpy(out, a_.data + first * w, count * w);
      return out;
    }
    const int64_t step = h_.shape.empty() ? 0 : a_.strides.back();
    runs(h_.shape, a_.strides, first, count, [&](int64_t offset, uint64_t n, uint64_t at) {
      const uint8_t* src = a_.data + offset;
      uint8_t* dst = out + at * w;
      if (step == static_cast<int64_t>(w))
        std::memcpy(dst, src, n * w);
      else if (w == 1)
        gather<uint8_t>(src, step, n, dst);
      else if (w == 2)
        gather<uint16_t>(src, step, n, dst);
      else
        gather<uint32_t>(src, step, n, dst);
    });
    if (h_.is_signed) zigzag(out, count, h_.info.width);
    return out;
  }

 private:
  const Header& h_;
  const ArrayRef& a_;
  bool direct_;
};

std::vector<uint8_t> build_header(const Header& h) {
  std::vector<uint8_t> b(kMagic, kMagic + 4);
  b.push_back(kVersion);
  b.push_back(h.codec->id);
  b.push_back(static_cast<uint8_t>(h.dtype));
  b.push_back(static_cast<uint8_t>(h.bits));
  b.push_back(static_cast<uint8_t>((h.is_signed ? kSigned : 0) | (h.has_quantizer ? kQuantizer : 0) |
                                   (h.layout == Layout::channels_last ? kChannelsLast : 0) |
                                   (h.from_torch ? kTorch : 0)));
  b.push_back(static_cast<uint8_t>(h.shape.size()));
  append_u32(&b, 0);  // header size, filled in below
  for (uint64_t d : h.shape) append_varint(&b, d);
  append_varint(&b, h.chunk_planes);
  append_varint(&b, h.chunk_rows);
  append_varint(&b, h.chunk_cols);
  if (h.has_quantizer) {
    uint32_t s;
    std::memcpy(&s, &h.scale, 4);
    append_u32(&b, s);
    append_u32(&b, static_cast<uint32_t>(h.zero));
  }
  append_varint(&b, h.params.size());
  b.insert(b.end(), h.params.begin(), h.params.end());
  const uint64_t size = b.size() + 8 * h.chunks + 4;
  if (size > UINT32_MAX) throw ArgumentError("the array is too large for one blob: split it");
  store_u32(b.data() + 10, static_cast<uint32_t>(size));
  return b;
}

// Asks the system for large pages in new memory: a fault for 2 MiB instead of 512 for 4 KiB.
uint8_t* with_large_pages(uint8_t* p, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (size >= size_t{4} << 20) {
    const uintptr_t from = (reinterpret_cast<uintptr_t>(p) + kPage - 1) & ~(kPage - 1);
    const uintptr_t to = (reinterpret_cast<uintptr_t>(p) + size) & ~(kPage - 1);
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a wish: failure changes nothing
  }
#else
  (void)size;
#endif
  return p;
}

std::string place(const Header& h, uint64_t chunk) {
  return "chunk " + std::to_string(chunk) + " (bytes " + std::to_string(h.chunk_offsets[chunk]) + " to " +
         std::to_string(h.chunk_offsets[chunk + 1]) + ")";
}

// `readable`: how many bytes may be read from `payload` on.
void decode_one(const Header& h, const Coder& coder, uint64_t chunk, const uint8_t* payload,
                uint64_t readable, uint8_t* out, bool verify, Scratch& scratch) {
  const size_t size = h.chunk_sizes[chunk];
  if (verify && crc32c(payload, size) != h.chunk_crcs[chunk])
    throw FormatError(place(h, chunk) + ": checksum mismatch, the bytes were altered");
  if (readable < size + kPad) {
    uint8_t* copy = scratch.get_as<uint8_t>(kPayload, size);
    if (size > 0) std::memcpy(copy, payload, size);
    std::memset(copy + size, 0, kPad);
    payload = copy;
  }
  const Box box = h.box(chunk);
  try {
    coder.decode(payload, size, box, out, scratch);
  } catch (const FormatError& e) {
    throw FormatError(place(h, chunk) + ": " + h.codec->name + ": " + e.what());
  }
  if (h.is_signed) unzigzag(out, box.size(), h.info.width);
}

// How many of the largest of `sizes` (descending) all threads should work on together, one after the other,
// so that the rest, each map by the next thread that is free, keeps all threads busy to within a twentieth.
size_t shared_by_all(const std::vector<uint64_t>& sizes, int threads) {
  const auto n = static_cast<size_t>(threads);
  uint64_t rest = 0;
  for (uint64_t s : sizes) rest += s;
  for (size_t whole = 0; whole < sizes.size(); rest -= sizes[whole++]) {
    std::vector<uint64_t> load(n, 0);  // a heap, the least loaded thread in front
    uint64_t most = 0;
    for (size_t i = whole; i < sizes.size(); ++i) {
      std::pop_heap(load.begin(), load.end(), std::greater<>());
      load.back() += sizes[i];
      most = std::max(most, load.back());
      std::push_heap(load.begin(), load.end(), std::greater<>());
    }
    if (20 * most * n <= 21 * rest) return whole;
  }
  return sizes.size();
}

// fn(i, threads) once for every i: the largest by all threads together, the others by one each.
template <class F>
void share_out(const std::vector<uint64_t>& sizes, const char* what, int threads, F&& fn) {
  threads = std::min(threads > 0 ? threads : default_threads(), 1 << 10);
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return sizes[a] > sizes[b]; });
  std::vector<uint64_t> descending;
  for (size_t i : order) descending.push_back(sizes[i]);
  const size_t whole = threads == 1 ? 0 : shared_by_all(descending, threads);
  const auto named = [&](size_t i, int t) {
    try {
      fn(i, t);
    } catch (const FormatError& e) {
      throw FormatError(what + std::string(" ") + std::to_string(i) + ": " + e.what());
    } catch (const ArgumentError& e) {
      throw ArgumentError(what + std::string(" ") + std::to_string(i) + ": " + e.what());
    }
  };
  for (size_t k = 0; k < whole; ++k) named(order[k], threads);
  parallel_for(static_cast<int64_t>(order.size() - whole), threads,
               [&](int64_t k, int) { named(order[whole + static_cast<size_t>(k)], 1); });
}

}  // namespace

size_t Coder::encode_to(const void* symbols, const Box& box, Place& place, Scratch& scratch) const {
  if (exact()) {
    const size_t size = bound(box);
    if (uint8_t* to = place.at(size)) encode(symbols, box, to, scratch);
    return size;
  }
  uint8_t* const payload = scratch.get_as<uint8_t>(kPayload, bound(box));
  const size_t size = encode(symbols, box, payload, scratch);
  if (uint8_t* to = place.at(size)) copy_bytes(to, payload, size);
  return size;
}

const char* dtype_name(Dtype d) {
  for (const auto& r : kDtypes)
    if (r.d == d) return r.name;
  return nullptr;
}

bool find_dtype(const std::string& name, Dtype* d) {
  for (const auto& r : kDtypes)
    if (name == r.name) {
      *d = r.d;
      return true;
    }
  return false;
}

bool is_float(Dtype d) { return static_cast<uint8_t>(d) >= 16; }

void Header::derive() {
  const bool lossless_float = is_float(dtype) && !has_quantizer;
  info = MapInfo{};
  if (lossless_float) {
    if (dtype == Dtype::f64) bad(6, "float64 is stored only quantized");
    info.kind = dtype == Dtype::f16 ? Kind::float16 : dtype == Dtype::bf16 ? Kind::bfloat16 : Kind::float32;
    const int want = dtype == Dtype::f32 ? 32 : 16;
    if (bits != want || is_signed)
      bad(7, std::string(dtype_name(dtype)) + " has " + std::to_string(want) + " bits and no sign flag");
  } else {
    if (bits < 1 || bits > 16) bad(7, std::to_string(bits) + " bits: 1 to 16 are allowed");
    int limit = 16;
    if (dtype == Dtype::boolean) limit = 1;
    if (dtype == Dtype::u8 || dtype == Dtype::i8) limit = 8;
    if (bits > limit) bad(7, std::to_string(bits) + " bits do not fit " + dtype_name(dtype));
    const bool unsigned_type = dtype == Dtype::u8 || dtype == Dtype::u16 || dtype == Dtype::u32 ||
                               dtype == Dtype::u64 || dtype == Dtype::boolean;
    if (is_signed && unsigned_type) bad(8, std::string("signed symbols in ") + dtype_name(dtype));
    if (!is_signed && (dtype == Dtype::i8 || dtype == Dtype::i16) && bits > limit - 1)
      bad(7, std::to_string(bits) + " unsigned bits do not fit " + dtype_name(dtype));
  }
  info.bits = bits;
  info.width = bits <= 8 ? 1 : bits <= 16 ? 2 : 4;
  if (codec != nullptr && (codec->kinds & kind_bit(info.kind)) == 0)
    bad(5, std::string("codec ") + codec->name + " does not take " +
               (lossless_float ? dtype_name(dtype) : "integers"));

  elements = 1;
  for (uint64_t d : shape)
    if (!mul(elements, d, &elements)) bad(kFixed, "the shape has more than 2^64 elements");
  if (elements > (uint64_t{1} << 60)) bad(kFixed, "the shape has more than 2^60 elements");
  const size_t nd = shape.size();
  if (elements == 0) {
    info.planes = info.rows = info.cols = info.channels = 0;
    chunks = 0;
  } else {
    info.cols = nd >= 1 ? shape[nd - 1] : 1;
    info.rows = nd >= 2 ? shape[nd - 2] : 1;
    info.planes = elements / info.cols / info.rows;
    info.channels = nd >= 3 ? shape[nd - 3] : 1;
  }
  if (layout == Layout::channels_last && nd < 3) bad(8, "channels-last needs three dimensions");
  const uint64_t cp = chunk_planes, cr = chunk_rows, cc = chunk_cols;
  if (elements == 0) {
    if (cp != 1 || cr != 1 || cc != 1) bad(kFixed, "chunk shape of an empty map must be 1, 1, 1");
    return;
  }
  if (cp < 1 || cr < 1 || cc < 1 || cp > info.planes || cr > info.rows || cc > info.cols)
    bad(kFixed, "chunk shape does not fit the map");
  if ((cp > 1 && cr != info.rows) || ((cp > 1 || cr > 1) && cc != info.cols))
    bad(kFixed, "chunks are not contiguous");
  // Each factor fits 32 bits; two may be large at most, so check before the third.
  if (cp * cr > kMaxChunk || cp * cr * cc > kMaxChunk)
    bad(kFixed, "chunks have more than " + std::to_string(kMaxChunk) + " symbols");
  // The product is at most the number of elements, hence no overflow.
  chunks = ceil_div(info.planes, cp) * ceil_div(info.rows, cr) * ceil_div(info.cols, cc);
}

Box Header::box(uint64_t chunk) const {
  const uint64_t nr = ceil_div(info.rows, chunk_rows), nc = ceil_div(info.cols, chunk_cols);
  Box b;
  b.first_col = chunk % nc * chunk_cols;
  b.first_row = chunk / nc % nr * chunk_rows;
  b.first_plane = chunk / nc / nr * chunk_planes;
  b.planes = static_cast<uint32_t>(std::min<uint64_t>(chunk_planes, info.planes - b.first_plane));
  b.rows = static_cast<uint32_t>(std::min<uint64_t>(chunk_rows, info.rows - b.first_row));
  b.cols = static_cast<uint32_t>(std::min<uint64_t>(chunk_cols, info.cols - b.first_col));
  return b;
}

uint64_t Header::first(uint64_t chunk) const {
  const Box b = box(chunk);
  return (b.first_plane * info.rows + b.first_row) * info.cols + b.first_col;
}

void choose_chunks(Header* h, uint64_t aim) {
  h->chunk_planes = h->chunk_rows = h->chunk_cols = 1;
  h->derive();
  if (h->elements == 0) return;
  aim = std::clamp<uint64_t>(aim, 1, kMaxChunk);
  const MapInfo& m = h->info;
  const uint64_t image = m.channels * m.rows * m.cols, plane = m.rows * m.cols;
  uint64_t cp = 1, cr = m.rows, cc = m.cols;
  if (image <= aim)
    cp = m.channels * (aim / image);
  else if (plane <= aim)
    cp = aim / plane;
  else if (m.cols <= aim)
    cr = aim / m.cols;
  else
    cr = 1, cc = aim;
  h->chunk_planes = static_cast<uint32_t>(std::min(cp, m.planes));
  h->chunk_rows = static_cast<uint32_t>(std::min(cr, m.rows));
  h->chunk_cols = static_cast<uint32_t>(std::min(cc, m.cols));
  h->derive();
}

namespace {

// The chunks of one blob, coded into memory `to` of which `room` bytes may be written; sizes and checksums go
// to the index. One thread codes the chunks one behind the other. Several code each chunk into memory of
// their own, and copy it behind the one before, which is known as soon as that is coded. Where coding costs
// no more than copying they take the chunks from both ends of a group: those from the front are coded in
// place, those from the back aside, in memory small enough to stay in the cache, and all threads together
// copy them.
struct Chunks {
  const Header& h;
  const ArraySource& source;
  const Coder& coder;
  uint8_t* index;
  uint8_t* to;
  size_t room;
  int threads;
  bool pad = coder.reads_beyond();

  // Where the last chunk ends, the first of which begins at `start`.
  size_t run(size_t start, Scratch& own) {
    if (threads == 1 || h.chunks <= 1) return one_by_one(start, own);
    return coder.light() ? both_ends(start, own) : behind(start);
  }

 private:
  void note(uint64_t i, const uint8_t* payload, size_t size) const {
    store_u32(index + 8 * i, static_cast<uint32_t>(size));
    store_u32(index + 8 * i + 4, crc32c(payload, size));
  }

  size_t one_by_one(size_t total, Scratch& own) const {
    for (uint64_t i = 0; i < h.chunks; ++i) {
      const size_t size = coder.encode(source.load(i, own, pad), h.box(i), to + total, own);
      note(i, to + total, size);
      total += size;
    }
    return total;
  }

  struct Piece {
    uint8_t* payload;
    size_t size;
  };
  static constexpr uint64_t kGroup = 64;

  size_t both_ends(size_t total, Scratch& own) const {
    Piece pieces[kGroup];
    const size_t slot = coder.bound(h.box(0));  // no chunk is larger than the first
    uint8_t* const aside = own.get_as<uint8_t>(kBack, slot * std::min(h.chunks, kGroup));
    for (uint64_t from = 0; from < h.chunks; from += kGroup) {
      const uint64_t n = std::min(kGroup, h.chunks - from);
      uint64_t front = 0;  // of worker 0, as `at`
      size_t at = total;
      std::atomic<uint64_t> back{0};
      parallel_for(static_cast<int64_t>(n), threads, [&](int64_t, int worker) {
        const uint64_t k = worker == 0 ? front++ : n - 1 - back.fetch_add(1, std::memory_order_relaxed);
        const Box box = h.box(from + k);
        const bool here = worker == 0 && at + coder.bound(box) <= room;
        Scratch& scratch = thread_scratch();
        uint8_t* const payload = here ? to + at : aside + k * slot;
        const size_t size = coder.encode(source.load(from + k, scratch, pad), box, payload, scratch);
        note(from + k, payload, size);
        pieces[k] = {payload, size};
        if (worker == 0) at = here ? at + size : room;  // once there is no room, the rest goes aside too
      });
      total = gather(pieces, n, total);
    }
    return total;
  }

  // Copies the pieces that were coded aside to their places; where the last ends.
  size_t gather(const Piece* pieces, uint64_t n, size_t total) const {
    constexpr size_t kPart = size_t{32} << 10;
    struct Part {
      uint8_t *to, *from;
      size_t size;
    };
    std::vector<Part> parts;
    for (uint64_t k = 0; k < n; total += pieces[k++].size) {
      const Piece& piece = pieces[k];
      if (piece.payload == to + total || total + piece.size > room) continue;
      for (size_t i = 0; i < piece.size; i += kPart)
        parts.push_back({to + total + i, piece.payload + i, std::min(kPart, piece.size - i)});
    }
    parallel_for(static_cast<int64_t>(parts.size()), threads, [&](int64_t i, int) {
      const Part& part = parts[static_cast<size_t>(i)];
      copy_bytes(part.to, part.from, part.size);
    });
    return total;
  }

  struct Behind final : Place {  // the chunk before; chunks are begun in order, so it is in work or done
    std::atomic<size_t>* ends;
    std::atomic<bool>* failed;
    uint8_t* to;
    size_t room;
    uint8_t* payload = nullptr;
    uint8_t* at(size_t size) override {
      size_t from = 0;
      for (int spin = 0; (from = ends[0].load(std::memory_order_acquire)) == 0; ++spin) {
        if (failed->load(std::memory_order_relaxed)) return nullptr;
        if (spin > 2000) std::this_thread::yield();
      }
      ends[1].store(from + size, std::memory_order_release);
      payload = from + size <= room ? to + from : nullptr;
      return payload;
    }
  };

  size_t behind(size_t start) const {
    std::vector<std::atomic<size_t>> ends(h.chunks + 1);  // of the chunk before; 0: not yet known
    ends[0].store(start, std::memory_order_relaxed);
    std::atomic<bool> failed{false};
    parallel_for(static_cast<int64_t>(h.chunks), threads, [&](int64_t c, int) {
      const uint64_t i = static_cast<uint64_t>(c);
      Scratch& scratch = thread_scratch();
      Behind place;
      place.ends = ends.data() + i, place.failed = &failed, place.to = to, place.room = room;
      try {
        const size_t size = coder.encode_to(source.load(i, scratch, pad), h.box(i), place, scratch);
        if (place.payload != nullptr) note(i, place.payload, size);
      } catch (...) {
        failed.store(true);
        throw;
      }
    });
    return ends[h.chunks].load(std::memory_order_relaxed);
  }
};

void check_options(const Header& h, const Options& options) {
  for (const auto& [name, value] : options) {
    const std::string known = std::string(" ") + h.codec->options + " ";
    if (known.find(" " + name + " ") == std::string::npos)
      throw ArgumentError(std::string("codec ") + h.codec->name + " has no option '" + name + "'" +
                          (*h.codec->options ? std::string("; it has: ") + h.codec->options : ""));
  }
}

// Bytes [start, total), in `parts`.
void copy_parts(uint8_t* to, const uint8_t* from, size_t start, size_t total, uint64_t parts, int threads) {
  const size_t part = (total - start) / parts + 1;
  parallel_for(static_cast<int64_t>(parts), threads, [&](int64_t k, int) {
    const size_t at = std::min(total, start + static_cast<size_t>(k) * part);
    copy_bytes(to + at, from + at, std::min(total - at, part));
  });
}

}  // namespace

size_t encode(Header h, const ArrayRef& array, const EncodeOptions& o, Allocate allocate, void* context) {
  check_options(h, o.codec_options);
  choose_chunks(&h, o.chunk_elements);
  const ArraySource source(h, array);
  h.params = h.codec->plan(h.info, source, o.codec_options, o.threads);
  if (h.params.size() > kMaxParams) throw ArgumentError("the codec's parameters exceed 16 MiB");
  const std::unique_ptr<Coder> coder = h.codec->open(h.info, h.params.data(), h.params.size());
  std::vector<uint8_t> head = build_header(h);
  const size_t index = head.size(), start = index + 8 * h.chunks + 4;
  head.resize(start);

  // The blob is coded where it will be if its size is known, or if the caller's memory has room for the slack
  // that a codec may write; else into memory that the thread keeps.
  constexpr size_t kKeep = size_t{64} << 20;
  Scratch& own = thread_scratch();
  const int threads = std::min<int64_t>(o.threads > 0 ? o.threads : default_threads(), 1 << 10);
  const bool serial = threads == 1 || h.chunks <= 1;
  size_t most = start;
  for (uint64_t i = 0; i < h.chunks; ++i) most += coder->bound(h.box(i));
  const bool given = o.out != nullptr, exact = !given && coder->exact();
  const bool in_place = exact || (given && (!serial || o.out_size >= most));
  uint8_t* const to = exact      ? with_large_pages(allocate(context, most), most)
                      : in_place ? o.out
                                 : own.get_as<uint8_t>(kSlotOut, most);
  Chunks chunks{h, source, *coder, head.data() + index, to, in_place && given ? o.out_size : most, threads};
  const size_t total = chunks.run(start, own);
  store_u32(head.data() + start - 4, crc32c(head.data(), start - 4));
  if (given && o.out_size < total)
    throw ArgumentError("the blob has " + std::to_string(total) + " bytes, the memory given for it " +
                        std::to_string(o.out_size));
  uint8_t* const blob = in_place ? to : given ? o.out : with_large_pages(allocate(context, total), total);
  std::memcpy(blob, head.data(), start);
  if (!in_place) {
    const uint64_t parts = serial ? 1 : std::min<uint64_t>(h.chunks, 4 * static_cast<uint64_t>(threads));
    copy_parts(blob, to, start, total, parts, threads);
    if (most > kKeep) own.trim(kKeep);
  }
  return total;
}

void encode_many(std::vector<EncodeJob>& jobs, int threads) {
  std::vector<uint64_t> sizes;
  for (EncodeJob& j : jobs) {
    j.header.derive();
    sizes.push_back(j.header.elements);
  }
  share_out(sizes, "tensor", threads, [&](size_t i, int t) {
    EncodeJob& j = jobs[i];
    EncodeOptions o = j.options;
    o.threads = t;
    j.size = encode(j.header, j.array, o, j.allocate, j.context);
  });
}

void value_range(const ArrayRef& a, const std::vector<uint64_t>& shape, int width, bool is_signed,
                 int threads, int64_t* least, int64_t* greatest) {
  uint64_t total = 1;
  for (uint64_t d : shape) total *= d;
  *least = *greatest = 0;
  if (total == 0) return;
  constexpr uint64_t kPart = 1 << 18;
  const uint64_t parts = ceil_div(total, kPart);
  std::vector<int64_t> lo(parts), hi(parts);
  const int64_t step = shape.empty() ? width : a.strides.back();
  const auto kernel = width == 1 ? (is_signed ? kernels().range_i8 : kernels().range_u8)
                                 : (is_signed ? kernels().range_i16 : kernels().range_u16);
  parallel_for(static_cast<int64_t>(parts), threads, [&](int64_t part, int) {
    const uint64_t first = static_cast<uint64_t>(part) * kPart, n = std::min(kPart, total - first);
    int l = 0, g = 0;  // zero is always a value worth having
    runs(shape, a.strides, first, n, [&](int64_t offset, uint64_t count, uint64_t) {
      const uint8_t* p = a.data + offset;
      if (step == width) {
        kernel(p, count, &l, &g);
      } else {
        for (uint64_t i = 0; i < count; ++i) kernel(p + static_cast<int64_t>(i) * step, 1, &l, &g);
      }
    });
    lo[static_cast<size_t>(part)] = l;
    hi[static_cast<size_t>(part)] = g;
  });
  *least = *std::min_element(lo.begin(), lo.end());
  *greatest = *std::max_element(hi.begin(), hi.end());
}

Header parse_header(const uint8_t* blob, size_t size, uint64_t total, size_t* need) {
  if (total < kFixed + 4)
    bad(0, "the blob is truncated: " + std::to_string(total) + " bytes, even an empty header has more");
  if (size < kFixed) {
    if (need == nullptr) bad(0, "the blob is truncated");
    *need = kFixed;
    return {};
  }
  if (std::memcmp(blob, kMagic, 4) != 0) bad(0, "not an actzip blob: it does not begin with 'ACTZ'");
  if (blob[4] != kVersion)
    bad(4, "format version " + std::to_string(blob[4]) + "; this reads version " + std::to_string(kVersion));
  const uint32_t hs = load_u32(blob + 10);
  if (hs < kFixed + 4 || hs > total)
    bad(10, "the header claims " + std::to_string(hs) + " bytes, the blob has " + std::to_string(total));
  if (size < hs) {
    if (need == nullptr) bad(10, "the header is truncated");
    *need = hs;
    return {};
  }
  if (crc32c(blob, hs - 4) != load_u32(blob + hs - 4))
    bad(hs - 4, "checksum mismatch: the header was altered");

  Header h;
  h.header_size = hs;
  h.codec = find_codec(blob[5]);
  if (h.codec == nullptr) bad(5, "unknown codec " + std::to_string(blob[5]));
  h.dtype = static_cast<Dtype>(blob[6]);
  if (dtype_name(h.dtype) == nullptr) bad(6, "unknown dtype " + std::to_string(blob[6]));
  h.bits = blob[7];
  const uint8_t flags = blob[8];
  if (flags & ~(kSigned | kQuantizer | kChannelsLast | kTorch))
    bad(8, "unknown flags " + std::to_string(flags));
  h.is_signed = flags & kSigned;
  h.has_quantizer = flags & kQuantizer;
  h.layout = flags & kChannelsLast ? Layout::channels_last : Layout::c;
  h.from_torch = flags & kTorch;
  const int nd = blob[9];
  if (nd > kMaxDims) bad(9, std::to_string(nd) + " dimensions: at most 16 are allowed");
  Reader r(blob + kFixed, hs - kFixed - 4, "header", kFixed);
  for (int i = 0; i < nd; ++i) h.shape.push_back(r.varint("dimension"));
  uint32_t* const chunk[3] = {&h.chunk_planes, &h.chunk_rows, &h.chunk_cols};
  for (uint32_t* c : chunk) {
    const uint64_t v = r.varint("chunk shape");
    if (v < 1 || v > kMaxChunk) r.fail("chunk shape", "is out of range");
    *c = static_cast<uint32_t>(v);
  }
  if (h.has_quantizer) {
    const uint32_t s = r.u32("scale");
    std::memcpy(&h.scale, &s, 4);
    if (!(h.scale > 0 && h.scale <= 3.4028235e38f)) r.fail("scale", "is not a positive finite number");
    h.zero = static_cast<int32_t>(r.u32("zero point"));
  }
  const uint64_t np = r.varint("length of the parameters");
  if (np > kMaxParams) r.fail("length of the parameters", "exceeds 16 MiB");
  const uint8_t* params = r.take(static_cast<size_t>(np), "parameters");
  h.params.assign(params, params + np);
  h.derive();
  if (h.chunks > r.left() / 8 || r.left() != 8 * h.chunks)
    r.fail("chunk index", "has " + std::to_string(r.left()) + " bytes, " + std::to_string(h.chunks) +
                              " chunks of 8 bytes each were expected");
  h.chunk_sizes.resize(h.chunks);
  h.chunk_crcs.resize(h.chunks);
  h.chunk_offsets.resize(h.chunks + 1);
  uint64_t at = hs;
  for (uint64_t i = 0; i < h.chunks; ++i) {
    h.chunk_sizes[i] = r.u32("chunk size");
    h.chunk_crcs[i] = r.u32("chunk checksum");
    h.chunk_offsets[i] = at;
    at += h.chunk_sizes[i];
  }
  h.chunk_offsets[h.chunks] = at;
  if (at != total)
    bad(hs, "the chunks end at byte " + std::to_string(at) + " but the blob has " + std::to_string(total) +
                (at > total ? " bytes: it is truncated" : " bytes: something was appended"));
  return h;
}

void decode(const uint8_t* blob, size_t size, const Header& h, const MutableArrayRef& out, bool verify,
            int threads) {
  if (h.chunks == 0) return;
  std::unique_ptr<Coder> coder;
  try {
    coder = h.codec->open(h.info, h.params.data(), h.params.size());
  } catch (const FormatError& e) {
    throw FormatError(std::string("parameters: ") + h.codec->name + ": " + e.what());
  }
  const size_t w = static_cast<size_t>(h.info.width);
  const bool direct = contiguous(h.shape, out.strides, h.info.width) && aligned(out.data, h.info.width);
  const int64_t step = h.shape.empty() ? 0 : out.strides.back();
  parallel_for(static_cast<int64_t>(h.chunks), threads, [&](int64_t c, int) {
    const uint64_t i = static_cast<uint64_t>(c);
    Scratch& scratch = thread_scratch();
    const uint64_t first = h.first(i), count = h.box(i).size(), at = h.chunk_offsets[i];
    if (direct) {
      decode_one(h, *coder, i, blob + at, size - at, out.data + first * w, verify, scratch);
      return;
    }
    uint8_t* tmp = scratch.get_as<uint8_t>(kSlotOut, count * w);
    decode_one(h, *coder, i, blob + at, size - at, tmp, verify, scratch);
    runs(h.shape, out.strides, first, count, [&](int64_t offset, uint64_t n, uint64_t from) {
      uint8_t* dst = out.data + offset;
      const uint8_t* src = tmp + from * w;
      if (step == static_cast<int64_t>(w))
        std::memcpy(dst, src, n * w);
      else if (w == 1)
        scatter<uint8_t>(src, n, dst, step);
      else if (w == 2)
        scatter<uint16_t>(src, n, dst, step);
      else
        scatter<uint32_t>(src, n, dst, step);
    });
  });
}

void decode_many(const std::vector<DecodeJob>& jobs, bool verify, int threads) {
  std::vector<uint64_t> sizes;
  for (const DecodeJob& j : jobs) sizes.push_back(j.header->elements);
  share_out(sizes, "blob", threads, [&](size_t i, int t) {
    const DecodeJob& j = jobs[i];
    decode(j.blob, j.size, *j.header, j.out, verify, t);
  });
}

void decode_chunks(const Header& h, const std::vector<uint64_t>& ids,
                   const std::vector<const uint8_t*>& payloads, const std::vector<uint8_t*>& outs,
                   bool verify, int threads) {
  if (ids.empty()) return;
  std::unique_ptr<Coder> coder;
  try {
    coder = h.codec->open(h.info, h.params.data(), h.params.size());
  } catch (const FormatError& e) {
    throw FormatError(std::string("parameters: ") + h.codec->name + ": " + e.what());
  }
  parallel_for(static_cast<int64_t>(ids.size()), threads, [&](int64_t i, int) {
    const size_t n = static_cast<size_t>(i);
    decode_one(h, *coder, ids[n], payloads[n], h.chunk_sizes[ids[n]], outs[n], verify, thread_scratch());
  });
}

}  // namespace actzip::codec
