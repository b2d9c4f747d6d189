// CRC-32C.
#pragma once

#include "codec/bits.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

#if defined(__SSE4_2__) && defined(__x86_64__)
inline uint64_t crc_shift(uint64_t c) {
  return kCrcShift1024[0][c & 255] ^ kCrcShift1024[1][c >> 8 & 255] ^ kCrcShift1024[2][c >> 16 & 255] ^
         kCrcShift1024[3][c >> 24 & 255];
}
#if ACTZIP_VBMI2 && defined(__GNUC__)
#define ACTZIP_VPCLMUL 1
// V. Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009):
// 128 bits times x^D are its low half times x^(D + 31) and its high half times x^(D - 33), mod P and
// bit-reflected.
__attribute__((target("pclmul,vpclmulqdq"))) inline __m512i crc_fold(__m512i x, __m512i k, __m512i next) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, k, 0x00), _mm512_clmulepi64_epi128(x, k, 0x11),
                                   next, 0x96);
}
// The register `c` after p[0, n), n a multiple of 256 and not 0.
__attribute__((target("pclmul,vpclmulqdq"))) uint64_t crc_blocks(const uint8_t* p, size_t n, uint64_t c) {
  const __m512i k256 = _mm512_broadcast_i32x4(_mm_set_epi64x(0xb9e02b86, 0xdcb17aa4)),
                k64 = _mm512_broadcast_i32x4(_mm_set_epi64x(0x9e4addf8, 0x740eef02));
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(p + 64 * i);
  x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi64_si128(static_cast<long long>(c))));
  for (size_t at = 256; at < n; at += 256)
    for (int i = 0; i < 4; ++i) x[i] = crc_fold(x[i], k256, _mm512_loadu_si512(p + at + 64 * i));
  for (int i = 0; i < 3; ++i) x[i + 1] = crc_fold(x[i], k64, x[i + 1]);
  alignas(64) uint8_t rest[64];
  _mm512_store_si512(rest, x[3]);
  c = 0;
  for (int i = 0; i < 64; i += 8) c = _mm_crc32_u64(c, load64(rest + i));
  return c;
}
#endif
uint32_t crc32c(const uint8_t* p, size_t n) {
  uint64_t c = 0xffffffffu;
#if ACTZIP_VPCLMUL
  if (n >= 256) {
    const size_t whole = n & ~size_t{255};
    c = crc_blocks(p, whole, c);
    p += whole;
    n -= whole;
  }
#endif
  // Three runs of 1024 bytes at once hide the latency of the instruction.
  for (; n >= 3072; p += 3072, n -= 3072) {
    uint64_t d = 0, e = 0;
    for (size_t i = 0; i < 1024; i += 8) {
      c = _mm_crc32_u64(c, load64(p + i));
      d = _mm_crc32_u64(d, load64(p + 1024 + i));
      e = _mm_crc32_u64(e, load64(p + 2048 + i));
    }
    c = crc_shift(crc_shift(c) ^ d) ^ e;
  }
  for (; n >= 8; p += 8, n -= 8) c = _mm_crc32_u64(c, load64(p));
  for (; n > 0; ++p, --n) c = _mm_crc32_u8(static_cast<uint32_t>(c), *p);
  return ~static_cast<uint32_t>(c);
}
#else
uint32_t crc32c(const uint8_t* p, size_t n) { return crc32c_portable(p, n); }
#endif

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
