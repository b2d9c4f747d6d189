// Words, bits and what the compiler may use, for the inner loops of the codecs.
#pragma once

#include <cstring>

#include "codec/kernels.h"

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12's own AVX-512 headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if defined(__BMI2__) || (defined(_MSC_VER) && defined(__AVX2__))
#define ACTZIP_BMI2 1
#endif
#if defined(__AVX512VBMI2__)
#define ACTZIP_VBMI2 1
#endif

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

inline uint64_t load64(const void* p) {
  uint64_t v;
  std::memcpy(&v, p, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  v = __builtin_bswap64(v);
#endif
  return v;
}
inline void store64(void* p, uint64_t v) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  v = __builtin_bswap64(v);
#endif
  std::memcpy(p, &v, 8);
}
inline int ones64(uint64_t v) {
#if defined(_MSC_VER) && !defined(__clang__)
  int n = 0;
  for (; v != 0; v &= v - 1) ++n;
  return n;
#else
  return __builtin_popcountll(v);
#endif
}
// floor(log2(v)), v > 0
inline int log2i(uint32_t v) {
#if defined(_MSC_VER) && !defined(__clang__)
  int n = -1;
  for (; v != 0; v >>= 1) ++n;
  return n;
#else
  return 31 - __builtin_clz(v);
#endif
}
inline int bit_length(uint32_t v) { return v == 0 ? 0 : log2i(v) + 1; }

// Appends `len` <= 64 bits (those above are zero).
inline void put(BitSink& s, uint64_t bits, uint64_t len) {
  const uint64_t acc = s.acc | bits << s.have;
  store64(s.p, acc);
  const uint64_t total = s.have + len;
  const bool full = total >= 64;
  const uint64_t taken = 64 - s.have;  // 1..64 bits of `bits` went out
  s.acc = full ? (bits >> 1) >> (taken - 1) : acc;
  s.p += full ? 8 : 0;
  s.have = total & 63;
}

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
