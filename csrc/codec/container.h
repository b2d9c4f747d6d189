// The container: from an array to a self-describing blob and back. Normative description: docs/bitstream.md.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace actzip::codec {

inline constexpr uint8_t kVersion = 1;
inline constexpr int kMaxDims = 16;

// What the decoded array's elements are to its user (the header's dtype byte). What is stored in the chunks
// are symbols: see Header::bits, is_signed and Kind.
enum class Dtype : uint8_t {
  u8 = 0,
  i8 = 1,
  u16 = 2,
  i16 = 3,
  u32 = 4,
  i32 = 5,
  u64 = 6,
  i64 = 7,
  boolean = 8,
  f16 = 16,
  bf16 = 17,
  f32 = 18,
  f64 = 19,
};
const char* dtype_name(Dtype d);                     // "uint8" ... "float64"; null if unknown
bool find_dtype(const std::string& name, Dtype* d);  // false if unknown
bool is_float(Dtype d);

// Memory order of the array that was encoded; symbols are always coded in C order.
enum class Layout : uint8_t { c = 0, channels_last = 1 };

struct Header {
  Dtype dtype = Dtype::u8;
  int bits = 8;            // symbols are below 2^bits
  bool is_signed = false;  // integers mapped to symbols by zigzag
  bool has_quantizer = false;
  float scale = 0;  // real value = scale * (integer - zero)
  int32_t zero = 0;
  Layout layout = Layout::c;
  bool from_torch = false;  // a hint: the array was a torch tensor
  std::vector<uint64_t> shape;
  uint32_t chunk_planes = 1, chunk_rows = 1, chunk_cols = 1;
  const Codec* codec = nullptr;
  std::vector<uint8_t> params;

  // Filled by parse_header:
  size_t header_size = 0;
  std::vector<uint32_t> chunk_sizes, chunk_crcs;
  std::vector<uint64_t> chunk_offsets;  // chunks + 1 of them, from the start of the blob

  // Derived from the above by `derive`:
  MapInfo info;
  uint64_t elements = 0;
  uint64_t chunks = 0;
  Box box(uint64_t chunk) const;
  // Index of the chunk's first symbol, in C order.
  uint64_t first(uint64_t chunk) const;

  // Computes the derived fields from dtype, bits, has_quantizer, shape and the chunk shape; throws
  // FormatError if they contradict each other.
  void derive();
};

// An array in memory: `shape` of the header, elements of `width` bytes, strides in bytes. width 1, 2, 4;
// the integers of a signed header are two's complement in that width.
struct ArrayRef {
  const uint8_t* data;
  std::vector<int64_t> strides;
};
struct MutableArrayRef {
  uint8_t* data;
  std::vector<int64_t> strides;
};

struct EncodeOptions {
  Options codec_options;
  uint32_t chunk_elements = 65536;  // aim for so many symbols a chunk
  int threads = 0;
  // Memory of the caller to write the blob to, or null for `allocate`. Where it holds `bound` bytes (see
  // encode) the chunks are coded in place; it must hold the blob.
  uint8_t* out = nullptr;
  size_t out_size = 0;
};

// Fills in the header's chunk shape for its shape: whole images, planes or rows, about `aim` symbols.
void choose_chunks(Header* h, uint64_t aim);

// Encodes the array that `h` describes (dtype, bits, is_signed, quantizer, layout, shape, codec). Every value
// must fit `bits` (see `value_range`): the codecs rely on it. `allocate` is called once, with the blob's
// size, and must return that much memory, into which the blob is written; returns the size.
using Allocate = uint8_t* (*)(void* context, size_t bytes);
size_t encode(Header h, const ArrayRef& array, const EncodeOptions& options, Allocate allocate,
              void* context);

// One array of many to encode, as the arguments of `encode`; `size` is its result.
struct EncodeJob {
  Header header;
  ArrayRef array;
  EncodeOptions options;  // but for `threads`
  Allocate allocate = nullptr;
  void* context = nullptr;
  size_t size = 0;
};

// Encodes every array, on `threads` threads (0: all). A thread encodes a map alone, which needs no agreement
// with others; only maps too large to share the work out so are encoded by all threads together, first. The
// bytes are those of `encode`. Throws what `encode` does, with "tensor N: " before it.
void encode_many(std::vector<EncodeJob>& jobs, int threads);

// Least and greatest value of an integer array of `width` 1 or 2 bytes.
void value_range(const ArrayRef& array, const std::vector<uint64_t>& shape, int width, bool is_signed,
                 int threads, int64_t* least, int64_t* greatest);

// Parses and checks a header. `size` is what is at hand, `total` the length of the whole blob; only header
// bytes are looked at. If `need` is not null and the header is longer than `size`, sets *need to the bytes
// needed and returns an empty header instead of throwing.
Header parse_header(const uint8_t* blob, size_t size, uint64_t total, size_t* need = nullptr);

// Decodes the whole blob into an array of h.shape.
void decode(const uint8_t* blob, size_t size, const Header& h, const MutableArrayRef& out, bool verify,
            int threads);

// One blob of many to decode, as the arguments of `decode`.
struct DecodeJob {
  const uint8_t* blob;
  size_t size;
  const Header* header;
  MutableArrayRef out;
};

// Decodes every blob, shared out as in encode_many. Throws what `decode` does, with "blob N: " before it.
void decode_many(const std::vector<DecodeJob>& jobs, bool verify, int threads);

// Decodes chunks `ids[i]` into `outs[i]`, each box(ids[i]).size() symbols as integers or patterns of
// info.width bytes, contiguous. payloads[i] points at the chunk's payload, kPad more bytes need not be
// readable.
void decode_chunks(const Header& h, const std::vector<uint64_t>& ids,
                   const std::vector<const uint8_t*>& payloads, const std::vector<uint8_t*>& outs,
                   bool verify, int threads);

}  // namespace actzip::codec
