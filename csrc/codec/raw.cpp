// `raw`: the symbols as they are, `bits` bits each, least significant first, no gaps.
#include <cstring>

#include "codec/bytes.h"
#include "codec/codec.h"
#include "codec/kernels.h"

namespace actzip::codec {
namespace {

size_t packed_size(size_t n, int bits) { return (n * static_cast<size_t>(bits) + 7) / 8; }

class RawCoder final : public Coder {
 public:
  explicit RawCoder(const MapInfo& m) : bits_(m.bits), width_(m.width) {}
  size_t bound(const Box& b) const override { return packed_size(b.size(), bits_) + (exact() ? 0 : 16); }
  bool exact() const override { return bits_ == 8 * width_; }
  bool reads_beyond() const override { return !exact(); }

  size_t encode(const void* s, const Box& b, uint8_t* out, Scratch&) const override {
    const size_t n = b.size();
    if (exact()) {
      copy_bytes(out, s, n * static_cast<size_t>(width_));
    } else {
      BitSink sink{out};
      width_ == 1 ? kernels().pack8(static_cast<const uint8_t*>(s), n, bits_, &sink)
                  : kernels().pack16(static_cast<const uint16_t*>(s), n, bits_, &sink);
      sink.finish();
    }
    return packed_size(n, bits_);
  }

  void decode(const uint8_t* in, size_t size, const Box& b, void* s, Scratch&) const override {
    const size_t n = b.size(), want = packed_size(n, bits_);
    if (size != want)
      throw FormatError(std::to_string(want) + " bytes expected, " + std::to_string(size) + " found");
    if (exact()) {
      copy_bytes(s, in, n * static_cast<size_t>(width_));
      return;
    }
    const size_t used = n * static_cast<size_t>(bits_) % 8;
    if (used != 0 && in[size - 1] >> used != 0) throw FormatError("padding bits are not zero");
    width_ == 1 ? kernels().unpack8(in, n, bits_, static_cast<uint8_t*>(s))
                : kernels().unpack16(in, n, bits_, static_cast<uint16_t*>(s));
  }

 private:
  int bits_, width_;
};

std::vector<uint8_t> plan(const MapInfo&, const Source&, const Options&, int) { return {}; }

std::unique_ptr<Coder> open(const MapInfo& m, const uint8_t*, size_t n) {
  if (n != 0) throw FormatError("raw has no parameters");
  return std::make_unique<RawCoder>(m);
}

}  // namespace

const Codec kRaw = {0,    "raw", "symbols as they are, bits packed", kIntegers | kFloats, "", {8, 8, 8, 8},
                    plan, open};

}  // namespace actzip::codec
