// The interface of a codec: what the container gives it and what it must give back.
//
// An activation map reaches a codec as *symbols*: unsigned integers below 2^bits, stored in 1, 2 or 4 bytes
// each (`MapInfo::width`). The container has already mapped signed values (0, -1, 1, -2 ... -> 0, 1, 2, 3
// ...); floating-point maps come as their bit patterns, with `MapInfo::kind` saying so. The map is cut into
// *chunks*, boxes of whole planes, or whole rows of one plane, or part of one row, contiguous in C order, at
// most kMaxChunk symbols. Chunks are coded independently of each other, in any order, on several threads:
// nothing but the parameters (made once for the map, kept in the blob's header) may pass between them.
//
// The bytes made are part of the format (docs/bitstream.md): they must not depend on the instruction set, the
// number of threads, the platform, floating-point arithmetic or uninitialised memory.
//
// A new codec: one file here that defines a `Codec`, one row in registry.cpp, one file in
// src/actzip/codec/, one section in docs/bitstream.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace actzip::codec {

// Readable bytes that the container guarantees after the payload given to Coder::decode, and after the
// symbols given to Coder::encode (their contents are arbitrary: they must not change the result).
inline constexpr size_t kPad = 64;

// The most symbols in a chunk. It bounds the memory that a small blob can make a decoder take.
inline constexpr uint64_t kMaxChunk = uint64_t{1} << 20;

// A blob, or part of one, is not what the format says. Becomes actzip.errors.CodecError; the container adds
// the chunk and its byte range.
struct FormatError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The caller asked for something impossible (unknown codec or option, value out of range). Becomes
// actzip.errors.InputError.
struct ArgumentError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Kind : uint8_t { integer = 0, float16 = 1, bfloat16 = 2, float32 = 3 };
inline constexpr uint32_t kind_bit(Kind k) { return 1u << static_cast<uint32_t>(k); }
inline constexpr uint32_t kIntegers = 1u;
inline constexpr uint32_t kFloats = 2u | 4u | 8u;

// What is known of the whole map.
struct MapInfo {
  Kind kind = Kind::integer;
  int bits = 8;   // symbols are below 2^bits: 1..16 for integers, 16 or 32 for floating point
  int width = 1;  // bytes a symbol: 1 for bits <= 8, 2 for bits <= 16, 4 for float32
  // The map in C order as planes x rows x cols; plane p belongs to channel p % channels. At least 1 each,
  // unless the map is empty (then no chunk exists).
  uint64_t planes = 1, rows = 1, cols = 1, channels = 1;
};

// A chunk: planes * rows * cols symbols in C order. planes > 1 only if rows and cols are the map's;
// rows > 1 only if cols is the map's. Plane j of the chunk belongs to channel (first_plane + j) % channels.
struct Box {
  uint64_t first_plane = 0, first_row = 0, first_col = 0;
  uint32_t planes = 1, rows = 1, cols = 1;
  size_t size() const { return static_cast<size_t>(planes) * rows * cols; }
};

// Memory that lives as long as a thread and grows as needed: get(slot, n) returns at least n bytes, aligned
// to 64, followed by kPad bytes that may be read and written; its contents are arbitrary and are lost by the
// next get of the same slot. Slots kFirst..kSlots-1 belong to the codec that is running; lower ones to the
// container. Every pointer is valid until the same slot is asked for more.
class Scratch {
 public:
  static constexpr int kFirst = 4;
  static constexpr int kSlots = 16;
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  void* get(int slot, size_t bytes);
  template <class T>
  T* get_as(int slot, size_t count) {
    return static_cast<T*>(get(slot, count * sizeof(T)));
  }
  void trim(size_t keep_per_slot);  // frees slots larger than that

 private:
  void* data_[kSlots] = {};
  size_t size_[kSlots] = {};
};

// The chunks of the map that is being encoded, as symbols.
class Source {
 public:
  virtual ~Source() = default;
  virtual uint64_t chunks() const = 0;
  virtual Box box(uint64_t chunk) const = 0;
  // The symbols of a chunk (box(chunk).size() of them, with `pad` followed by kPad readable bytes), in the
  // caller's array or in `scratch`, valid until the next load with the same scratch. Safe from several
  // threads with different scratch.
  virtual const void* load(uint64_t chunk, Scratch& scratch, bool pad = true) const = 0;
};

// Options of an encoder, by name, as the caller gave them; the registry row lists the names a codec takes.
using Options = std::map<std::string, int64_t>;
inline int64_t option(const Options& o, const char* name, int64_t otherwise) {
  const auto it = o.find(name);
  return it == o.end() ? otherwise : it->second;
}

// Where a chunk's payload goes once its length is known: memory of just that length, or null (the memory is
// used up, or another chunk failed).
class Place {
 public:
  virtual uint8_t* at(size_t size) = 0;

 protected:
  ~Place() = default;
};

// One map being coded or decoded, with its parameters parsed and its tables built. Immutable: used from
// several threads at once.
class Coder {
 public:
  virtual ~Coder() = default;

  // Bytes of output memory that `encode` may need for a chunk, slack for wide stores included.
  virtual size_t bound(const Box& box) const = 0;

  // Whether the payload has always the length that `bound` says, and `encode` writes nothing beyond it.
  virtual bool exact() const { return false; }

  // Whether `encode` may read up to kPad bytes behind the symbols; else the array's end need not be copied.
  virtual bool reads_beyond() const { return true; }

  // Whether `encode` costs little more than copying the payload: then copies are saved where they can be.
  virtual bool light() const { return false; }

  // Encodes the chunk into `out` (bound(box) bytes) and returns the payload's length.
  virtual size_t encode(const void* symbols, const Box& box, uint8_t* out, Scratch& scratch) const = 0;

  // As `encode`, for several threads that write chunks one behind the other: the payload goes to place.at(its
  // length), asked for once, as soon as the length is known; where that is null nothing is written. Returns
  // the length. Nothing beyond the payload is written there. By default the chunk is coded in memory of the
  // container and copied; a codec that knows the length before it writes saves the copy.
  virtual size_t encode_to(const void* symbols, const Box& box, Place& place, Scratch& scratch) const;

  // Decodes the payload in[0, size) into exactly box.size() symbols at `symbols`, and writes nothing beyond
  // them. kPad bytes after the payload are readable. Any payload must either decode or throw FormatError
  // (saying which part, at which byte or bit of the payload); the symbols written must be below 2^bits; a
  // payload with bytes left over is an error.
  virtual void decode(const uint8_t* in, size_t size, const Box& box, void* symbols,
                      Scratch& scratch) const = 0;
};

// Nominal speeds, GB/s of the q-bit tensor on one core at 8 and 16 bits, from which `auto` chooses when the
// caller gives the least speed that is enough. Constants, so that the choice is the same everywhere.
struct Speed {
  double encode8, encode16, decode8, decode16;
};

struct Codec {
  uint8_t id;           // in the blob; never reused
  const char* name;     // as the caller says it
  const char* summary;  // one line
  uint32_t kinds;       // kIntegers, kFloats or single kind_bits
  const char* options;  // names that `plan` reads, separated by spaces
  Speed speed;

  // Looks at the map as far as it needs to (use parallel_for over the chunks) and returns the parameters
  // that go into the header (at most 16 MiB). Throws ArgumentError for a bad option.
  std::vector<uint8_t> (*plan)(const MapInfo& info, const Source& source, const Options& options,
                               int threads);

  // Parses parameters, which may be hostile: checks every length before memory is taken, throws FormatError.
  std::unique_ptr<Coder> (*open)(const MapInfo& info, const uint8_t* params, size_t size);
};

// The registry. find_codec returns null where there is none; ids and names are unique. `auto` is not in it:
// it is a way of choosing, not a codec of its own.
const std::vector<const Codec*>& codecs();
const Codec* find_codec(const std::string& name);
const Codec* find_codec(uint8_t id);

extern const Codec kRaw, kSeg, kEg, kHuffman, kZvc, kEbpc, kRans;

// Calls fn(chunk, symbols, box, worker) for every chunk of the source, on several threads.
template <class F>
void for_each_chunk(const Source& source, int threads, F&& fn);

// The calling thread's scratch memory.
Scratch& thread_scratch();

}  // namespace actzip::codec

#include "common/thread_pool.h"

namespace actzip::codec {
template <class F>
void for_each_chunk(const Source& source, int threads, F&& fn) {
  parallel_for(static_cast<int64_t>(source.chunks()), threads, [&](int64_t i, int worker) {
    const Box box = source.box(static_cast<uint64_t>(i));
    fn(static_cast<uint64_t>(i), source.load(static_cast<uint64_t>(i), thread_scratch()), box, worker);
  });
}
}  // namespace actzip::codec
