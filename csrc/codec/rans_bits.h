// Bits of the parameters of `rans`.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace actzip::codec::rans {

inline int bit_length(uint32_t v) { return static_cast<int>(std::bit_width(v)); }

inline int bits_for(uint32_t count) { return bit_length(count - 1); }  // to tell `count` things apart

// Bits, least significant first in each byte.
class BitWriter {
 public:
  explicit BitWriter(std::vector<uint8_t>* out) : out_(out) {}
  void put(uint32_t v, int bits) {
    for (int some; bits > 0; bits -= some, v >>= some) {
      if (used_ == 0) out_->push_back(0);
      some = std::min(bits, 8 - used_);
      out_->back() = static_cast<uint8_t>(out_->back() | (v & ((1u << some) - 1)) << used_);
      used_ = (used_ + some) & 7;
    }
  }
  // Elias gamma, v >= 1: bit length - 1 zeros, then a one, then the bits below the leading one.
  void gamma(uint32_t v) {
    const int n = bit_length(v);
    put(0, n - 1);
    put(1, 1);
    put(v & ((1u << (n - 1)) - 1), n - 1);
  }

 private:
  std::vector<uint8_t>* out_;
  int used_ = 0;
};

class BitReader {
 public:
  BitReader(const uint8_t* p, size_t size, size_t base) : p_(p), bits_(uint64_t{8} * size), base_(base) {}
  uint32_t get(int n, const char* what) {
    if (static_cast<uint64_t>(n) > bits_ - pos_) fail(what, "is cut off");
    uint32_t v = 0;
    for (int some, done = 0; done < n; done += some, pos_ += static_cast<uint64_t>(some)) {
      const int used = static_cast<int>(pos_ & 7);
      some = std::min(n - done, 8 - used);
      v |= (static_cast<uint32_t>(p_[pos_ >> 3]) >> used & ((1u << some) - 1)) << done;
    }
    return v;
  }
  uint32_t gamma(const char* what) {
    int n = 0;
    while (get(1, what) == 0)
      if (++n > 20) fail(what, "is too large");
    return 1u << n | get(n, what);
  }
  uint64_t left() const { return bits_ - pos_; }
  void finish() {
    if (left() >= 8) fail("the end", "is followed by more bytes");
    while (left() > 0)
      if (get(1, "padding")) fail("padding", "is not zero");
  }
  [[noreturn]] void fail(const char* what, const char* why) const {
    throw FormatError("parameters, byte " + std::to_string(base_ + (pos_ >> 3)) + " bit " +
                      std::to_string(pos_ & 7) + ": " + what + " " + why);
  }

 private:
  const uint8_t* p_;
  uint64_t bits_, pos_ = 0;
  size_t base_;
};

}  // namespace actzip::codec::rans
