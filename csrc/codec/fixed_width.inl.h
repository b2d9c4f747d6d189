// Symbols of a fixed number of bits.
#pragma once

#include "codec/bits.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

template <class U>
void pack(const U* s, size_t n, int bits, BitSink* sink) {
  BitSink o = *sink;
#if ACTZIP_BMI2
  constexpr size_t kLanes = 8 / sizeof(U);
  const uint64_t lane = (uint64_t{1} << bits) - 1;
  const uint64_t mask = lane * (sizeof(U) == 1 ? 0x0101010101010101u : 0x0001000100010001u);
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    put(o, _pext_u64(load64(s + i), mask), kLanes * static_cast<uint64_t>(bits));
  for (; i < n; ++i) put(o, s[i], static_cast<uint64_t>(bits));
#else
  for (size_t i = 0; i < n; ++i) put(o, s[i], static_cast<uint64_t>(bits));
#endif
  *sink = o;
}

// 64 bits of the stream from bit `at` on.
inline uint64_t peek(const uint8_t* in, uint64_t at) {
  const uint8_t* p = in + (at >> 3);
  const unsigned s = at & 7;
  return load64(p) >> s | (static_cast<uint64_t>(p[8]) << 1) << (63 - s);
}

template <class U>
void unpack(const uint8_t* in, size_t n, int bits, U* out) {
  const uint64_t lane = (uint64_t{1} << bits) - 1;
  uint64_t at = 0;
  size_t i = 0;
#if ACTZIP_BMI2
  constexpr size_t kLanes = 8 / sizeof(U);
  const uint64_t mask = lane * (sizeof(U) == 1 ? 0x0101010101010101u : 0x0001000100010001u);
  for (; i + kLanes <= n; i += kLanes, at += kLanes * static_cast<uint64_t>(bits))
    store64(out + i, _pdep_u64(peek(in, at), mask));
#endif
  for (; i < n; ++i, at += static_cast<uint64_t>(bits)) out[i] = static_cast<U>(peek(in, at) & lane);
}

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
