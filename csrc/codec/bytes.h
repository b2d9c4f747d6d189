// Reading and writing little-endian numbers and LEB128 varints with every length checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "codec/codec.h"

namespace actzip::codec {

static_assert(sizeof(size_t) >= 8 || sizeof(size_t) == 4);

// memcpy. Where the target lies less than 64 bytes behind the source modulo 4096, `rep movsb`, by which the C
// library copies long runs, moves 3.6 GB/s on Zen 4 instead of 45: short runs are copied by vectors.
inline void copy_bytes(void* to, const void* from, size_t n) {
  constexpr size_t kShort = 2048;
  const size_t behind =
      (reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(from)) & uintptr_t{4095};
  const size_t step = behind > 0 && behind < 64 ? kShort : n;
  for (size_t i = 0; i < n; i += step)
    std::memcpy(static_cast<uint8_t*>(to) + i, static_cast<const uint8_t*>(from) + i,
                n - i < step ? n - i : step);
}

inline uint32_t load_u32(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}
inline void store_u32(uint8_t* p, uint32_t v) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<uint8_t>(v >> (8 * i));
}

// Appends `v` < 2^63 as LEB128: 7 bits a byte, low ones first, the high bit set on all but the last.
inline size_t write_varint(uint8_t* p, uint64_t v) {
  size_t n = 0;
  while (v >= 128) {
    p[n++] = static_cast<uint8_t>(v | 128);
    v >>= 7;
  }
  p[n++] = static_cast<uint8_t>(v);
  return n;
}
inline void append_varint(std::vector<uint8_t>* out, uint64_t v) {
  uint8_t b[10];
  out->insert(out->end(), b, b + write_varint(b, v));
}
inline void append_u32(std::vector<uint8_t>* out, uint32_t v) {
  uint8_t b[4];
  store_u32(b, v);
  out->insert(out->end(), b, b + 4);
}

// A cursor over bytes that may be hostile. Offsets in messages count from `base`.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size, const char* what, size_t base = 0)
      : p_(data), size_(size), what_(what), base_(base) {}

  size_t at() const { return pos_; }
  size_t left() const { return size_ - pos_; }
  const uint8_t* here() const { return p_ + pos_; }

  const uint8_t* take(size_t n, const char* field) {
    if (n > left())
      fail(field, "needs " + std::to_string(n) + " bytes, " + std::to_string(left()) + " are left");
    const uint8_t* r = p_ + pos_;
    pos_ += n;
    return r;
  }
  uint8_t u8(const char* field) { return *take(1, field); }
  uint32_t u32(const char* field) { return load_u32(take(4, field)); }

  // At most 9 bytes, the shortest form only.
  uint64_t varint(const char* field) {
    uint64_t v = 0;
    for (int shift = 0; shift < 63; shift += 7) {
      const uint8_t b = u8(field);
      v |= static_cast<uint64_t>(b & 127) << shift;
      if (b < 128) {
        if (b == 0 && shift > 0) fail(field, "is not in its shortest form");
        return v;
      }
    }
    fail(field, "is longer than 9 bytes");
  }

  [[noreturn]] void fail(const char* field, const std::string& why) const {
    throw FormatError(std::string(what_) + ", byte " + std::to_string(base_ + pos_) + ": " + field + " " +
                      why);
  }

 private:
  const uint8_t* p_;
  size_t size_, pos_ = 0;
  const char* what_;
  size_t base_;
};

}  // namespace actzip::codec
