// `zvc`, zero-value compression: a bit a symbol, set where it is not zero, then the non-zero symbols, `bits`
// bits each. The masks are those of the runtime's packed map (csrc/kernels).
#include <cstring>

#include "codec/bytes.h"
#include "codec/codec.h"
#include "codec/kernels.h"

namespace actzip::codec {
namespace {

enum Slot { kValues = Scratch::kFirst };

class ZvcCoder final : public Coder {
 public:
  explicit ZvcCoder(const MapInfo& m)
      : bits_(m.bits), width_(static_cast<size_t>(m.width)), whole_(m.bits == 8 * m.width) {}

  size_t bound(const Box& b) const override { return b.size() / 8 + (b.size() + 64) * width_ + 16; }

  bool reads_beyond() const override { return false; }
  bool light() const override { return whole_; }

  size_t encode(const void* s, const Box& b, uint8_t* out, Scratch& scratch) const override {
    if (width_ == 1) return encode_as(static_cast<const uint8_t*>(s), b.size(), out, scratch);
    if (width_ == 2) return encode_as(static_cast<const uint16_t*>(s), b.size(), out, scratch);
    return encode_as(static_cast<const uint32_t*>(s), b.size(), out, scratch);
  }
  void decode(const uint8_t* in, size_t size, const Box& b, void* s, Scratch& scratch) const override {
    if (width_ == 1) return decode_as(in, size, b.size(), static_cast<uint8_t*>(s), scratch);
    if (width_ == 2) return decode_as(in, size, b.size(), static_cast<uint16_t*>(s), scratch);
    decode_as(in, size, b.size(), static_cast<uint32_t*>(s), scratch);
  }

 private:
  static size_t compress(const uint8_t* s, size_t n, uint8_t* mask, uint8_t* v) {
    return kernels().compress8(s, n, 0, mask, v);
  }
  static size_t compress(const uint16_t* s, size_t n, uint8_t* mask, uint16_t* v) {
    return kernels().compress16(s, n, 0, mask, v);
  }
  static size_t compress(const uint32_t* s, size_t n, uint8_t* mask, uint32_t* v) {
    return kernels().compress32(s, n, 0, mask, v);
  }
  static void expand(const uint8_t* mask, const uint8_t* v, size_t n, uint8_t* s) {
    kernels().expand8(mask, 0, v, n, s);
  }
  static void expand(const uint8_t* mask, const uint16_t* v, size_t n, uint16_t* s) {
    kernels().expand16(mask, 0, v, n, s);
  }
  static void expand(const uint8_t* mask, const uint32_t* v, size_t n, uint32_t* s) {
    kernels().expand32(mask, 0, v, n, s);
  }

  static bool any_zero(const uint8_t* v, size_t n) { return kernels().any_zero8(v, n); }
  static bool any_zero(const uint16_t* v, size_t n) { return kernels().any_zero16(v, n); }
  static bool any_zero(const uint32_t* v, size_t n) { return kernels().any_zero32(v, n); }

  template <class U>
  size_t encode_as(const U* s, size_t n, uint8_t* out, Scratch& scratch) const {
    const size_t nm = (n + 7) / 8;
    if (whole_) return nm + sizeof(U) * compress(s, n, out, reinterpret_cast<U*>(out + nm));
    U* const values = scratch.get_as<U>(kValues, n + 64);
    const size_t count = compress(s, n, out, values);
    BitSink sink{out + nm};
    if constexpr (sizeof(U) == 1)
      kernels().pack8(values, count, bits_, &sink);
    else if constexpr (sizeof(U) == 2)
      kernels().pack16(values, count, bits_, &sink);
    return static_cast<size_t>(sink.finish() - out);
  }

  template <class U>
  void decode_as(const uint8_t* in, size_t size, size_t n, U* s, Scratch& scratch) const {
    const size_t nm = (n + 7) / 8;
    Reader r(in, size, "payload");
    const uint8_t* mask = r.take(nm, "mask");
    if (n % 8 != 0 && mask[nm - 1] >> (n % 8) != 0)
      throw FormatError("padding bits of the mask are not zero");
    const size_t count = kernels().ones(mask, nm);
    const size_t want = (count * static_cast<size_t>(bits_) + 7) / 8;
    if (r.left() != want)
      throw FormatError("payload, byte " + std::to_string(nm) + ": " + std::to_string(count) +
                        " non-zero symbols take " + std::to_string(want) + " bytes, " +
                        std::to_string(r.left()) + " are there");
    const uint8_t* packed = r.here();
    const size_t used = count * static_cast<size_t>(bits_) % 8;
    if (used != 0 && packed[want - 1] >> used != 0)
      throw FormatError("padding bits of the symbols are not zero");
    const U* values;
    if (whole_) {
      values = reinterpret_cast<const U*>(packed);
    } else {
      U* const copy = scratch.get_as<U>(kValues, count + 64);
      if constexpr (sizeof(U) == 1)
        kernels().unpack8(packed, count, bits_, copy);
      else if constexpr (sizeof(U) == 2)
        kernels().unpack16(packed, count, bits_, copy);
      values = copy;
    }
    // A zero among the values would be a second way to write the same map.
    if (any_zero(values, count)) throw FormatError("a symbol that the mask says is not zero is zero");
    expand(mask, values, n, s);
  }

  int bits_;
  size_t width_;
  bool whole_;  // symbols fill their bytes
};

std::vector<uint8_t> plan(const MapInfo&, const Source&, const Options&, int) { return {}; }

std::unique_ptr<Coder> open(const MapInfo& m, const uint8_t*, size_t n) {
  if (n != 0) throw FormatError("zvc has no parameters");
  return std::make_unique<ZvcCoder>(m);
}

}  // namespace

const Codec kZvc = {4,
                    "zvc",
                    "zero-value compression: a mask and the non-zero symbols",
                    kIntegers | kFloats,
                    "",
                    {4, 4, 4, 4},
                    plan,
                    open};

}  // namespace actzip::codec
