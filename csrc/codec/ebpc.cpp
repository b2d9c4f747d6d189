// `ebpc`: extended bit-plane compression. L. Cavigelli, G. Rutishauser, L. Benini, "EBPC: Extended Bit-Plane
// Compression for Deep Neural Network Inference and Training Accelerators", arXiv:1908.11645: a zero
// run-length stream beside the bit-plane compressed stream of the non-zero values, with the symbol table
// (table III a) as in the authors' own encoder. docs/bitstream.md is normative.
#include <algorithm>
#include <cstring>

#include "codec/bytes.h"
#include "codec/codec.h"

namespace actzip::codec {
namespace {

constexpr int kMaxBlock = 32;

int ceil_log2(uint32_t v) {
  int n = 0;
  while ((uint32_t{1} << n) < v) ++n;
  return n;
}

// Bits, most significant first in each byte. `put` needs bits <= 32 and v < 2^bits.
class MsbWriter {
 public:
  explicit MsbWriter(uint8_t* p) : p_(p), begin_(p) {}
  void put(uint32_t v, int bits) {
    acc_ = acc_ << bits | v;
    have_ += bits;
    while (have_ >= 8) {
      have_ -= 8;
      *p_++ = static_cast<uint8_t>(acc_ >> have_);
    }
  }
  size_t finish() {
    if (have_ > 0) put(0, 8 - have_);
    return static_cast<size_t>(p_ - begin_);
  }

 private:
  uint8_t *p_, *begin_;
  uint64_t acc_ = 0;
  int have_ = 0;
};

class MsbReader {
 public:
  MsbReader(const uint8_t* p, size_t size, size_t base, const char* name)
      : p_(p), size_(size), base_(base), name_(name) {}
  // The next `bits` <= 32 bits.
  uint32_t get(int bits) {
    while (have_ < bits) {
      if (at_ == size_) fail("ends too early");
      acc_ = acc_ << 8 | p_[at_++];
      have_ += 8;
    }
    have_ -= bits;
    return static_cast<uint32_t>(acc_ >> have_ & ((uint64_t{1} << bits) - 1));
  }
  void finish() {
    if (at_ != size_) fail("is followed by more bytes");
    if (acc_ & ((uint64_t{1} << have_) - 1)) fail("does not end in zero bits");
  }
  [[noreturn]] void fail(const char* why) const {
    throw FormatError(std::string(name_) + ", byte " + std::to_string(base_ + at_) + ": " + why);
  }

 private:
  const uint8_t* p_;
  size_t size_, at_ = 0, base_;
  const char* name_;
  uint64_t acc_ = 0;
  int have_ = 0;
};

class EbpcCoder final : public Coder {
 public:
  EbpcCoder(const MapInfo& m, int block) : bits_(m.bits), width_(m.width), block_(block) {
    run_bits_ = ceil_log2(static_cast<uint32_t>(bits_));
    place_bits_ = ceil_log2(static_cast<uint32_t>(block_));
  }

  // A zero costs at most 5 bits, a plane at most max(block, 5 + log2 block) bits.
  size_t bound(const Box& b) const override {
    const size_t n = b.size(), blocks = n / static_cast<size_t>(block_) + 1;
    const size_t plane = static_cast<size_t>(std::max(block_, 5 + place_bits_));
    return 10 + (5 * n + 7) / 8 + (blocks * (static_cast<size_t>(bits_ + 1) * plane + 16) + 7) / 8 + 16;
  }

  size_t encode(const void* s, const Box& b, uint8_t* out, Scratch& scratch) const override {
    return width_ == 1 ? encode_as(static_cast<const uint8_t*>(s), b.size(), out, scratch)
                       : encode_as(static_cast<const uint16_t*>(s), b.size(), out, scratch);
  }

  void decode(const uint8_t* in, size_t size, const Box& b, void* s, Scratch& scratch) const override {
    if (width_ == 1)
      decode_as(in, size, b.size(), static_cast<uint8_t*>(s), scratch);
    else
      decode_as(in, size, b.size(), static_cast<uint16_t*>(s), scratch);
  }

 private:
  template <class U>
  size_t encode_as(const U* s, size_t n, uint8_t* out, Scratch& scratch) const {
    uint8_t* zeros = scratch.get_as<uint8_t>(Scratch::kFirst, (5 * n + 7) / 8 + 8);
    U* values = scratch.get_as<U>(Scratch::kFirst + 1, n + kMaxBlock);
    MsbWriter z(zeros);
    size_t count = 0;
    for (size_t i = 0; i < n;) {
      if (s[i] != 0) {
        z.put(1, 1);
        values[count++] = s[i++];
        continue;
      }
      uint32_t run = 1;
      while (run < 16 && i + run < n && s[i + run] == 0) ++run;
      z.put(run - 1, 5);
      i += run;
    }
    const size_t zero_bytes = z.finish();
    const size_t head = write_varint(out, zero_bytes);
    std::memcpy(out + head, zeros, zero_bytes);
    for (int i = 0; i < kMaxBlock; ++i) values[count + static_cast<size_t>(i)] = 0;
    MsbWriter w(out + head + zero_bytes);
    for (size_t i = 0; i < count; i += static_cast<size_t>(block_)) encode_block(values + i, w);
    return head + zero_bytes + w.finish();
  }

  template <class U>
  void encode_block(const U* v, MsbWriter& w) const {
    const int planes = bits_ + 1, width = block_ - 1;
    const uint32_t all = (uint32_t{1} << width) - 1;
    uint32_t dbp[17] = {};
    for (int j = 1; j < block_; ++j) {
      const uint32_t d = static_cast<uint32_t>(static_cast<int32_t>(v[j]) - static_cast<int32_t>(v[j - 1]));
      for (int p = 0; p < planes; ++p) dbp[p] |= (d >> p & 1) << (width - j);
    }
    w.put(v[0], bits_);
    uint32_t run = 0, before = 0;
    auto flush = [&] {
      if (run == 1) w.put(1, 2);
      if (run > 1) w.put(1, 3), w.put(run - 2, run_bits_);
      run = 0;
    };
    for (int p = 0; p < planes; ++p) {
      const uint32_t x = dbp[p] ^ before;
      before = dbp[p];
      if (x == 0) {
        ++run;
        continue;
      }
      flush();
      const uint32_t lowest = x & (~x + 1);
      if (x == all) {
        w.put(0, 5);
      } else if (dbp[p] == 0) {
        w.put(1, 5);
      } else if (x == lowest || x == 3 * lowest) {
        // The position of the first one, from the first delta on.
        const int first = ceil_log2(lowest) + (x != lowest);
        w.put(x == lowest ? 3 : 2, 5);
        w.put(static_cast<uint32_t>(width - 1 - first), place_bits_);
      } else {
        w.put(1, 1);
        w.put(x, width);
      }
    }
    flush();
  }

  template <class U>
  void decode_as(const uint8_t* in, size_t size, size_t n, U* s, Scratch& scratch) const {
    Reader r(in, size, "payload");
    const uint64_t zero_bytes = r.varint("the length of the zero stream");
    const size_t zeros_at = r.at();
    const uint8_t* zeros = r.take(zero_bytes, "the zero stream");
    MsbReader z(zeros, zero_bytes, zeros_at, "zero stream"), w(r.here(), r.left(), r.at(), "value stream");
    U* block = scratch.get_as<U>(Scratch::kFirst, kMaxBlock);
    int used = block_;
    for (size_t i = 0; i < n;) {
      if (z.get(1) == 0) {
        const size_t run = z.get(4) + size_t{1};
        if (run > n - i) z.fail("has a run of zeros beyond the end of the chunk");
        std::memset(s + i, 0, run * sizeof(U));
        i += run;
        continue;
      }
      if (used == block_) {
        decode_block(w, block);
        used = 0;
      }
      if (block[used] == 0) w.fail("has a zero among the values");
      s[i++] = block[used++];
    }
    for (; used < block_; ++used)
      if (block[used] != 0) w.fail("has a value after the last");
    z.finish();
    w.finish();
  }

  template <class U>
  void decode_block(MsbReader& w, U* v) const {
    const int planes = bits_ + 1, width = block_ - 1;
    const uint32_t all = (uint32_t{1} << width) - 1;
    int32_t delta[kMaxBlock] = {};
    const int32_t base = static_cast<int32_t>(w.get(bits_));
    uint32_t before = 0;
    for (int p = 0; p < planes;) {
      uint32_t x;
      if (w.get(1)) {
        x = w.get(width);
      } else if (w.get(1)) {
        x = 0;
      } else if (w.get(1)) {
        const int run = static_cast<int>(w.get(run_bits_)) + 2;
        if (run > planes - p) w.fail("has a run of planes beyond the last");
        for (int k = 0; k < run; ++k, ++p) set_plane(before, p, delta);
        continue;
      } else {
        const uint32_t which = w.get(2);
        if (which == 0) {
          x = all;
        } else if (which == 1) {
          x = before;  // so that the plane itself is zero
        } else {
          const int two = which == 2;
          const int first = static_cast<int>(w.get(place_bits_));
          if (first + two >= width) w.fail("has a one beyond the last delta");
          x = (two ? 3u : 1u) << (width - 1 - first - two);
        }
      }
      before ^= x;
      set_plane(before, p++, delta);
    }
    int32_t value = base;
    v[0] = static_cast<U>(base);
    for (int j = 1; j < block_; ++j) {
      // bits_ + 1 bits, two's complement
      const int32_t d = delta[j] - ((delta[j] >> bits_ & 1) << planes);
      value += d;
      if (value < 0 || value >> bits_) w.fail("has a value out of range");
      v[j] = static_cast<U>(value);
    }
  }

  void set_plane(uint32_t plane, int p, int32_t* delta) const {
    for (int j = 1; j < block_; ++j) delta[j] |= static_cast<int32_t>(plane >> (block_ - 1 - j) & 1) << p;
  }

  int bits_, width_, block_, run_bits_, place_bits_;
};

std::vector<uint8_t> plan(const MapInfo&, const Source&, const Options& options, int) {
  const int64_t block = option(options, "block", 8);
  if (block != 8 && block != 16 && block != 32) throw ArgumentError("ebpc: block must be 8, 16 or 32");
  return {static_cast<uint8_t>(block)};
}

std::unique_ptr<Coder> open(const MapInfo& info, const uint8_t* params, size_t size) {
  Reader r(params, size, "parameters");
  const int block = r.u8("the block length");
  if (block != 8 && block != 16 && block != 32) r.fail("the block length", "is not 8, 16 or 32");
  if (r.left()) r.fail("the end", "is followed by more bytes");
  return std::make_unique<EbpcCoder>(info, block);
}

}  // namespace

const Codec kEbpc = {5,         "ebpc",  "extended bit-plane compression, for hardware",
                     kIntegers, "block", {0.05, 0.1, 0.05, 0.1},
                     plan,      open};

}  // namespace actzip::codec
