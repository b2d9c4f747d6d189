// The inner loops of the codecs. Compiled once per instruction set by isa/*.cpp, with ACTZIP_ISA_NS set; see
// common/cpu.h for the rules. Three levels: portable C++; with BMI2 (pext and pdep move 8 bytes or four
// 16-bit symbols at a time in and out of bit streams); with AVX-512 VBMI2 (64 bytes at a time).
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

// ---------------------------------------------------------------- masks and non-zero values

// Element i of values that need not be aligned.
template <class U>
inline U load_at(const U* p, size_t i) {
  U v;
  std::memcpy(&v, reinterpret_cast<const uint8_t*>(p) + i * sizeof(U), sizeof(U));
  return v;
}
template <class U>
inline void store_at(U* p, size_t i, U v) {
  std::memcpy(reinterpret_cast<uint8_t*>(p) + i * sizeof(U), &v, sizeof(U));
}

#if ACTZIP_BMI2
// The bytes (16-bit lanes) of x whose bit in m is set, as a mask of whole lanes.
inline uint64_t lanes8(uint64_t m) { return _pdep_u64(m, 0x0101010101010101u) * 255u; }
inline uint64_t lanes16(uint64_t m) { return _pdep_u64(m, 0x0001000100010001u) * 65535u; }
#endif

inline uint64_t nonzero_mask(const uint8_t* s) {
#if defined(__AVX512BW__)
  const __m512i v = _mm512_loadu_si512(s);
  return _mm512_test_epi8_mask(v, v);
#elif defined(__AVX2__)
  const __m256i z = _mm256_setzero_si256();
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + 32));
  const uint32_t lo = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(a, z)));
  const uint32_t hi = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(b, z)));
  return ~(static_cast<uint64_t>(hi) << 32 | lo);
#else
  uint64_t m = 0;
  for (size_t i = 0; i < 64; ++i) m |= static_cast<uint64_t>(load_at(s, i) != 0) << i;
  return m;
#endif
}
inline uint64_t nonzero_mask(const uint16_t* s) {
#if defined(__AVX512BW__)
  const __m512i a = _mm512_loadu_si512(s), b = _mm512_loadu_si512(s + 32);
  return static_cast<uint64_t>(_mm512_test_epi16_mask(b, b)) << 32 | _mm512_test_epi16_mask(a, a);
#elif defined(__AVX2__)
  const __m256i z = _mm256_setzero_si256();
  uint64_t m = 0;
  for (int i = 0; i < 2; ++i) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + 32 * i));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s + 32 * i + 16));
    const __m256i e = _mm256_packs_epi16(_mm256_cmpeq_epi16(a, z), _mm256_cmpeq_epi16(b, z));
    const uint32_t bits = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(e, 0xd8)));
    m |= static_cast<uint64_t>(~bits) << (32 * i);
  }
  return m;
#else
  uint64_t m = 0;
  for (size_t i = 0; i < 64; ++i) m |= static_cast<uint64_t>(load_at(s, i) != 0) << i;
  return m;
#endif
}
inline uint64_t nonzero_mask(const uint32_t* s) {
  uint64_t m = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    const __m512i v = _mm512_loadu_si512(s + 16 * i);
    m |= static_cast<uint64_t>(_mm512_test_epi32_mask(v, v)) << (16 * i);
  }
#else
  for (size_t i = 0; i < 64; ++i) m |= static_cast<uint64_t>(load_at(s, i) != 0) << i;
#endif
  return m;
}

// The values of s[0, 64) whose bit in m is set, to out (64 elements may be written). Returns their number.
inline size_t squeeze(const uint8_t* s, uint64_t m, uint8_t* out) {
#if ACTZIP_VBMI2
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(m, _mm512_loadu_si512(s)));
  return static_cast<size_t>(ones64(m));
#elif ACTZIP_BMI2
  uint8_t* o = out;
  for (int i = 0; i < 8; ++i) {
    const uint64_t b = m >> (8 * i) & 255;
    store64(o, _pext_u64(load64(s + 8 * i), lanes8(b)));
    o += ones64(b);
  }
  return static_cast<size_t>(o - out);
#else
  size_t n = 0;
  for (int i = 0; i < 64; ++i) {
    store_at(out, n, s[i]);
    n += m >> i & 1;
  }
  return n;
#endif
}
inline size_t squeeze(const uint16_t* s, uint64_t m, uint16_t* out) {
#if ACTZIP_VBMI2
  const uint32_t a = static_cast<uint32_t>(m), b = static_cast<uint32_t>(m >> 32);
  const size_t na = static_cast<size_t>(ones64(a));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(a, _mm512_loadu_si512(s)));
  _mm512_storeu_si512(out + na, _mm512_maskz_compress_epi16(b, _mm512_loadu_si512(s + 32)));
  return na + static_cast<size_t>(ones64(b));
#elif ACTZIP_BMI2
  uint16_t* o = out;
  for (int i = 0; i < 16; ++i) {
    const uint64_t b = m >> (4 * i) & 15;
    store64(o, _pext_u64(load64(s + 4 * i), lanes16(b)));
    o += ones64(b);
  }
  return static_cast<size_t>(o - out);
#else
  size_t n = 0;
  for (int i = 0; i < 64; ++i) {
    store_at(out, n, s[i]);
    n += m >> i & 1;
  }
  return n;
#endif
}
inline size_t squeeze(const uint32_t* s, uint64_t m, uint32_t* out) {
  size_t n = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    const __mmask16 b = static_cast<__mmask16>(m >> (16 * i));
    _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi32(b, _mm512_loadu_si512(s + 16 * i)));
    n += static_cast<size_t>(ones64(b));
  }
#else
  for (int i = 0; i < 64; ++i) {
    store_at(out, n, s[i]);
    n += m >> i & 1;
  }
#endif
  return n;
}

template <class U>
size_t compress(const U* s, size_t n, uint8_t flip, uint8_t* mask, U* values) {
  const uint64_t f = flip ? ~uint64_t{0} : 0;
  U* v = values;
  size_t i = 0;
  for (; i + 64 <= n; i += 64) {
    const uint64_t m = nonzero_mask(s + i);
    store64(mask + i / 8, m ^ f);
    v += squeeze(s + i, m, v);
  }
  if (i < n) {
    U tail[64] = {};
    std::memcpy(tail, s + i, (n - i) * sizeof(U));
    const uint64_t valid = (uint64_t{1} << (n - i)) - 1, m = nonzero_mask(tail);
    uint8_t last[8];
    store64(last, (m ^ f) & valid);
    std::memcpy(mask + i / 8, last, (n - i + 7) / 8);
    v += squeeze(tail, m, v);
  }
  return static_cast<size_t>(v - values);
}

// Puts values to the places of out[0, 64) whose bit in m is set, zero elsewhere. Returns how many were used.
inline size_t spread(const uint8_t* v, uint64_t m, uint8_t* out) {
#if ACTZIP_VBMI2
  _mm512_storeu_si512(out, _mm512_maskz_expand_epi8(m, _mm512_loadu_si512(v)));
  return static_cast<size_t>(ones64(m));
#elif ACTZIP_BMI2
  const uint8_t* p = v;
  for (int i = 0; i < 8; ++i) {
    const uint64_t b = m >> (8 * i) & 255;
    store64(out + 8 * i, _pdep_u64(load64(p), lanes8(b)));
    p += ones64(b);
  }
  return static_cast<size_t>(p - v);
#else
  size_t n = 0;
  for (int i = 0; i < 64; ++i) {
    const unsigned b = m >> i & 1;
    out[i] = static_cast<uint8_t>(load_at(v, n) & (0u - b));
    n += b;
  }
  return n;
#endif
}
inline size_t spread(const uint16_t* v, uint64_t m, uint16_t* out) {
#if ACTZIP_VBMI2
  const uint32_t a = static_cast<uint32_t>(m), b = static_cast<uint32_t>(m >> 32);
  const size_t na = static_cast<size_t>(ones64(a));
  _mm512_storeu_si512(out, _mm512_maskz_expand_epi16(a, _mm512_loadu_si512(v)));
  _mm512_storeu_si512(out + 32, _mm512_maskz_expand_epi16(b, _mm512_loadu_si512(v + na)));
  return na + static_cast<size_t>(ones64(b));
#elif ACTZIP_BMI2
  const uint16_t* p = v;
  for (int i = 0; i < 16; ++i) {
    const uint64_t b = m >> (4 * i) & 15;
    store64(out + 4 * i, _pdep_u64(load64(p), lanes16(b)));
    p += ones64(b);
  }
  return static_cast<size_t>(p - v);
#else
  size_t n = 0;
  for (int i = 0; i < 64; ++i) {
    const unsigned b = m >> i & 1;
    out[i] = static_cast<uint16_t>(load_at(v, n) & (0u - b));
    n += b;
  }
  return n;
#endif
}
inline size_t spread(const uint32_t* v, uint64_t m, uint32_t* out) {
  size_t n = 0;
#if defined(__AVX512F__)
  for (int i = 0; i < 4; ++i) {
    const __mmask16 b = static_cast<__mmask16>(m >> (16 * i));
    _mm512_storeu_si512(out + 16 * i, _mm512_maskz_expand_epi32(b, _mm512_loadu_si512(v + n)));
    n += static_cast<size_t>(ones64(b));
  }
#else
  for (int i = 0; i < 64; ++i) {
    const uint32_t b = static_cast<uint32_t>(m >> i & 1);
    out[i] = load_at(v, n) & (0u - b);
    n += b;
  }
#endif
  return n;
}

template <class U>
void expand(const uint8_t* mask, uint8_t flip, const U* values, size_t n, U* out) {
  const uint64_t f = flip ? ~uint64_t{0} : 0;
  size_t i = 0;
  for (; i + 64 <= n; i += 64) values += spread(values, load64(mask + i / 8) ^ f, out + i);
  if (i < n) {
    // No more values than belong to the tail are looked at: the rest of the mask is cut off, and the portable
    // loops may look one element ahead, which is slack.
    U tail[64];
    spread(values, (load64(mask + i / 8) ^ f) & ((uint64_t{1} << (n - i)) - 1), tail);
    std::memcpy(out + i, tail, (n - i) * sizeof(U));
  }
}

template <class U>
bool any_zero(const U* v, size_t n) {
  uint64_t all = ~uint64_t{0};
  size_t i = 0;
  for (; i + 64 <= n; i += 64) all &= nonzero_mask(v + i);
  if (i < n) {
    U tail[64];
    std::memset(tail, 1, sizeof tail);
    std::memcpy(tail, v + i, (n - i) * sizeof(U));
    all &= nonzero_mask(tail);
  }
  return all != ~uint64_t{0};
}

size_t ones(const uint8_t* p, size_t n) {
  size_t total = 0, i = 0;
  for (; i + 8 <= n; i += 8) total += static_cast<size_t>(ones64(load64(p + i)));
  for (; i < n; ++i) total += static_cast<size_t>(ones64(p[i]));
  return total;
}

// ---------------------------------------------------------------- fixed width

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

// ---------------------------------------------------------------- exponential-Golomb

// One code at a time.
template <class U>
void eg_encode_slow(const U* values, size_t n, int k, int bias, BitSink& p, BitSink& q) {
  for (size_t i = 0; i < n; ++i) {
    const uint32_t g = values[i] - static_cast<uint32_t>(bias) + (1u << k);
    const int len = log2i(g);
    put(p, uint64_t{1} << (len - k), static_cast<uint64_t>(len - k + 1));
    put(q, g & ((1u << len) - 1), static_cast<uint64_t>(len));
  }
}

#if ACTZIP_VBMI2

// floor(log2(h)) of bytes, 8 where h is 0 (it stands for 256).
inline __m512i log2_bytes(__m512i h) {
  const __m512i low = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3));
  const __m512i high = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7));
  const __m512i nib = _mm512_set1_epi8(15);
  const __m512i a = _mm512_shuffle_epi8(low, _mm512_and_si512(h, nib));
  const __m512i b = _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16(h, 4), nib));
  return _mm512_mask_mov_epi8(_mm512_max_epu8(a, b), _mm512_testn_epi8_mask(h, h), _mm512_set1_epi8(8));
}
inline __m512i shift_right_bytes(__m512i v, int k) {
  return _mm512_and_si512(_mm512_srl_epi16(v, _mm_cvtsi32_si128(k)),
                          _mm512_set1_epi8(static_cast<char>(255 >> k)));
}
// floor(log2(w + 1)) of 32 16-bit lanes, as bytes.
inline __m256i log2_words(__m512i w) {
  const __m512i one = _mm512_set1_epi32(1), top = _mm512_set1_epi32(31);
  const __m512i a = _mm512_add_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(w)), one);
  const __m512i b = _mm512_add_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(w, 1)), one);
  const __m128i la = _mm512_cvtepi32_epi8(_mm512_sub_epi32(top, _mm512_lzcnt_epi32(a)));
  const __m128i lb = _mm512_cvtepi32_epi8(_mm512_sub_epi32(top, _mm512_lzcnt_epi32(b)));
  return _mm256_inserti128_si256(_mm256_castsi128_si256(la), lb, 1);
}

// (1 << i) - 1 and so on as a table for byte shuffles.
inline __m128i table(uint64_t low, uint64_t high) {
  return _mm_set_epi64x(static_cast<long long>(high), static_cast<long long>(low));
}
constexpr uint64_t kOneHot = 0x8040201008040201u, kOnes = 0xff7f3f1f0f070301u;  // 1 << m, (2 << m) - 1

void eg_encode_u8(const uint8_t* values, size_t n, int k, int bias, BitSink* prefix, BitSink* suffix) {
  BitSink p = *prefix, q = *suffix;
  const __m512i one_hot = _mm512_broadcast_i32x4(table(kOneHot, 0)),
                p_mask = _mm512_broadcast_i32x4(table(kOnes, 0));
  alignas(16) uint8_t s_table[16];
  for (int m = 0; m < 16; ++m) s_table[m] = static_cast<uint8_t>(m + k >= 8 ? 255 : (1 << (m + k)) - 1);
  const __m512i s_mask = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(s_table)));
  const __m512i vbias = _mm512_set1_epi8(static_cast<char>(bias)),
                vbase = _mm512_set1_epi8(static_cast<char>(1 << k));
  alignas(64) uint8_t code[64], code_mask[64], tail[64], tail_mask[64];
  for (size_t i = 0; i < n; i += 64) {
    const size_t r = n - i < 64 ? n - i : 64;
    const __mmask64 live = r == 64 ? ~uint64_t{0} : (uint64_t{1} << r) - 1;
    const __m512i v = _mm512_maskz_sub_epi8(live, _mm512_loadu_si512(values + i), vbias);
    const __m512i m = log2_bytes(_mm512_add_epi8(shift_right_bytes(v, k), _mm512_set1_epi8(1)));
    if (_mm512_cmpgt_epu8_mask(m, _mm512_set1_epi8(7)) != 0) {
      eg_encode_slow(values + i, r, k, bias, p, q);
      continue;
    }
    _mm512_store_si512(code, _mm512_maskz_shuffle_epi8(live, one_hot, m));
    _mm512_store_si512(code_mask, _mm512_maskz_shuffle_epi8(live, p_mask, m));
    _mm512_store_si512(tail, _mm512_add_epi8(v, vbase));
    _mm512_store_si512(tail_mask, _mm512_maskz_shuffle_epi8(live, s_mask, m));
    for (size_t j = 0; j < r; j += 8) {
      const uint64_t pm = load64(code_mask + j), sm = load64(tail_mask + j);
      put(p, _pext_u64(load64(code + j), pm), static_cast<uint64_t>(ones64(pm)));
      put(q, _pext_u64(load64(tail + j), sm), static_cast<uint64_t>(ones64(sm)));
    }
  }
  *prefix = p;
  *suffix = q;
}

void eg_encode_u16(const uint16_t* values, size_t n, int k, int bias, BitSink* prefix, BitSink* suffix) {
  BitSink p = *prefix, q = *suffix;
  const __m256i one_hot = _mm256_broadcastsi128_si256(table(kOneHot, 0)),
                p_mask = _mm256_broadcastsi128_si256(table(kOnes, 0));
  const __m512i vbias = _mm512_set1_epi16(static_cast<short>(bias)),
                vbase = _mm512_set1_epi16(static_cast<short>(1 << k));
  const __m128i shift = _mm_cvtsi32_si128(k);
  const __m512i one = _mm512_set1_epi16(1), vk = _mm512_set1_epi16(static_cast<short>(k));
  alignas(64) uint8_t code[32], code_mask[32];
  alignas(64) uint16_t tail[32], tail_mask[32];
  for (size_t i = 0; i < n; i += 32) {
    const size_t r = n - i < 32 ? n - i : 32;
    const __mmask32 live = r == 32 ? ~uint32_t{0} : (uint32_t{1} << r) - 1;
    const __m512i v = _mm512_maskz_sub_epi16(live, _mm512_loadu_si512(values + i), vbias);
    const __m256i m = log2_words(_mm512_srl_epi16(v, shift));
    if (_mm256_cmpgt_epu8_mask(m, _mm256_set1_epi8(7)) != 0) {
      eg_encode_slow(values + i, r, k, bias, p, q);
      continue;
    }
    _mm256_store_si256(reinterpret_cast<__m256i*>(code), _mm256_maskz_shuffle_epi8(live, one_hot, m));
    _mm256_store_si256(reinterpret_cast<__m256i*>(code_mask), _mm256_maskz_shuffle_epi8(live, p_mask, m));
    const __m512i len = _mm512_add_epi16(_mm512_cvtepu8_epi16(m), vk);
    _mm512_store_si512(tail, _mm512_add_epi16(v, vbase));
    _mm512_store_si512(tail_mask, _mm512_maskz_sub_epi16(live, _mm512_sllv_epi16(one, len), one));
    for (size_t j = 0; j < r; j += 8) {
      const uint64_t pm = load64(code_mask + j), sa = load64(tail_mask + j), sb = load64(tail_mask + j + 4);
      put(p, _pext_u64(load64(code + j), pm), static_cast<uint64_t>(ones64(pm)));
      put(q, _pext_u64(load64(tail + j), sa), static_cast<uint64_t>(ones64(sa)));
      put(q, _pext_u64(load64(tail + j + 4), sb), static_cast<uint64_t>(ones64(sb)));
    }
  }
  *prefix = p;
  *suffix = q;
}

#else  // BMI2 or portable: the parts of each code from a table or computed, then 8 (4) at a time or singly

template <class U>
void eg_encode(const U* values, size_t n, int k, int bias, BitSink* prefix, BitSink* suffix) {
  BitSink p = *prefix, q = *suffix;
  size_t i = 0;
#if ACTZIP_BMI2
  constexpr size_t kLanes = 8 / sizeof(U);
  constexpr unsigned kWidth = 8 * sizeof(U);
  for (; i + kLanes <= n; i += kLanes) {
    uint64_t tail = 0, tail_mask = 0, code = 0, code_len = 0;
    for (size_t j = 0; j < kLanes; ++j) {
      const uint32_t g = values[i + j] - static_cast<uint32_t>(bias) + (1u << k);
      const unsigned len = static_cast<unsigned>(log2i(g));
      const uint64_t m = (uint64_t{1} << len) - 1;
      tail |= (g & m) << (kWidth * j);
      tail_mask |= m << (kWidth * j);
      code_len += len - static_cast<unsigned>(k);
      code |= (uint64_t{1} << (code_len & 63));
      ++code_len;
    }
    if (code_len > 64) {
      eg_encode_slow(values + i, kLanes, k, bias, p, q);
      continue;
    }
    put(p, code, code_len);
    put(q, _pext_u64(tail, tail_mask), static_cast<uint64_t>(ones64(tail_mask)));
  }
#endif
  eg_encode_slow(values + i, n - i, k, bias, p, q);
  *prefix = p;
  *suffix = q;
}
void eg_encode_u8(const uint8_t* v, size_t n, int k, int bias, BitSink* p, BitSink* q) {
  eg_encode(v, n, k, bias, p, q);
}
void eg_encode_u16(const uint16_t* v, size_t n, int k, int bias, BitSink* p, BitSink* q) {
  eg_encode(v, n, k, bias, p, q);
}

#endif

bool positions(const uint8_t* in, size_t n, uint8_t* out) {
  bool gap = false;
  for (size_t i = 0; i < n; i += 8) {
    uint64_t w = load64(in + i);
    if (n - i < 8) w &= (uint64_t{1} << (8 * (n - i))) - 1;
    gap |= w == 0;
#if ACTZIP_VBMI2
    alignas(64) static constexpr uint8_t kIota[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
        22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
        44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i at = _mm512_add_epi8(_mm512_load_si512(kIota), _mm512_set1_epi8(static_cast<char>(i * 8)));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(w, at));
    out += ones64(w);
#else
    for (int j = 0; j < 8; ++j) {
      const unsigned b = w >> (8 * j) & 255;
      const uint64_t base = 0x0101010101010101u * ((i * 8 + static_cast<size_t>(j) * 8) & 255);
      // Bytewise sums below 256: the base is a multiple of 8 and the positions are below 8.
      store64(out, load64(kBytePositions[b]) + base);
      out += ones64(b);
    }
#endif
  }
  return !gap;
}

// The longest suffix whose smallest value, 2^len - 2^k + bias, is at most `most`.
inline int longest(int k, int bias, uint32_t most) {
  int len = k - 1;
  while (len < 16 && (uint32_t{1} << (len + 1)) - (uint32_t{1} << k) + static_cast<uint32_t>(bias) <= most)
    ++len;
  return len;
}

#if ACTZIP_VBMI2

EgStatus eg_decode_u8(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                      uint64_t end, uint64_t* bit, uint8_t* values) {
  const int top = longest(k, bias, most) - k;
  if (top < 0) return n == 0 ? EgStatus::ok : EgStatus::too_large;
  alignas(16) uint8_t s_table[16], b_table[16];
  for (int m = 0; m < 16; ++m) {
    s_table[m] = static_cast<uint8_t>(m + k >= 8 ? 255 : (1 << (m + k)) - 1);
    b_table[m] = static_cast<uint8_t>((1 << (m + k)) - (1 << k) + bias);
  }
  const __m512i s_mask = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(s_table)));
  const __m512i b_base = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(b_table)));
  const __m512i vtop = _mm512_set1_epi8(static_cast<char>(top)),
                vmost = _mm512_set1_epi8(static_cast<char>(most));
  alignas(64) uint8_t tail_mask[64], tail[64];
  uint64_t pos = *bit;
  for (size_t i = 0; i < n; i += 64) {
    const size_t r = n - i < 64 ? n - i : 64;
    const __mmask64 live = r == 64 ? ~uint64_t{0} : (uint64_t{1} << r) - 1;
    const __m512i here = _mm512_loadu_si512(at + i), before = _mm512_loadu_si512(at + i - 1);
    const __m512i m = _mm512_sub_epi8(_mm512_sub_epi8(here, before), _mm512_set1_epi8(1));
    if (_mm512_mask_cmpgt_epu8_mask(live, m, vtop) != 0) return EgStatus::too_long;
    _mm512_store_si512(tail_mask, _mm512_maskz_shuffle_epi8(live, s_mask, m));
    if (pos + 512 > end) {
      uint64_t need = pos;
      for (size_t j = 0; j < 64; j += 8) need += static_cast<uint64_t>(ones64(load64(tail_mask + j)));
      if (need > end) return EgStatus::exhausted;
    }
    for (size_t j = 0; j < r; j += 8) {
      const uint64_t sm = load64(tail_mask + j);
      store64(tail + j, _pdep_u64(peek(suffix, pos), sm));
      pos += static_cast<uint64_t>(ones64(sm));
    }
    const __m512i base = _mm512_shuffle_epi8(b_base, m);
    const __m512i x = _mm512_add_epi8(_mm512_load_si512(tail), base);
    if ((_mm512_mask_cmplt_epu8_mask(live, x, base) | _mm512_mask_cmpgt_epu8_mask(live, x, vmost)) != 0)
      return EgStatus::too_large;
    _mm512_storeu_si512(values + i, x);
  }
  *bit = pos;
  return EgStatus::ok;
}

EgStatus eg_decode_u16(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                       uint64_t end, uint64_t* bit, uint16_t* values) {
  const int top = longest(k, bias, most) - k;
  if (top < 0) return n == 0 ? EgStatus::ok : EgStatus::too_large;
  const __m256i vtop = _mm256_set1_epi8(static_cast<char>(top));
  const __m512i vmost = _mm512_set1_epi16(static_cast<short>(most)), one = _mm512_set1_epi16(1),
                vk = _mm512_set1_epi16(static_cast<short>(k)),
                offset = _mm512_set1_epi16(static_cast<short>(bias - (1 << k)));
  alignas(64) uint16_t tail_mask[32], tail[32];
  uint64_t pos = *bit;
  for (size_t i = 0; i < n; i += 32) {
    const size_t r = n - i < 32 ? n - i : 32;
    const __mmask32 live = r == 32 ? ~uint32_t{0} : (uint32_t{1} << r) - 1;
    const __m256i here = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + i));
    const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + i - 1));
    const __m256i m = _mm256_sub_epi8(_mm256_sub_epi8(here, before), _mm256_set1_epi8(1));
    if (_mm256_mask_cmpgt_epu8_mask(live, m, vtop) != 0) return EgStatus::too_long;
    const __m512i power = _mm512_sllv_epi16(one, _mm512_add_epi16(_mm512_cvtepu8_epi16(m), vk));
    _mm512_store_si512(tail_mask, _mm512_maskz_sub_epi16(live, power, one));
    if (pos + 512 > end) {
      uint64_t need = pos;
      for (size_t j = 0; j < 32; j += 4) need += static_cast<uint64_t>(ones64(load64(tail_mask + j)));
      if (need > end) return EgStatus::exhausted;
    }
    for (size_t j = 0; j < r; j += 4) {
      const uint64_t sm = load64(tail_mask + j);
      store64(tail + j, _pdep_u64(peek(suffix, pos), sm));
      pos += static_cast<uint64_t>(ones64(sm));
    }
    const __m512i base = _mm512_add_epi16(power, offset);
    const __m512i x = _mm512_add_epi16(_mm512_load_si512(tail), base);
    if ((_mm512_mask_cmplt_epu16_mask(live, x, base) | _mm512_mask_cmpgt_epu16_mask(live, x, vmost)) != 0)
      return EgStatus::too_large;
    _mm512_storeu_si512(values + i, x);
  }
  *bit = pos;
  return EgStatus::ok;
}

#else

template <class U>
EgStatus eg_decode(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                   uint64_t end, uint64_t* bit, U* values) {
  const int top = longest(k, bias, most) - k;
  if (top < 0) return n == 0 ? EgStatus::ok : EgStatus::too_large;
  constexpr size_t kLanes = 8 / sizeof(U);
  constexpr unsigned kWidth = 8 * sizeof(U);
  uint64_t pos = *bit;
  // In blocks of as many as the other implementations take, so that of several errors the same one is
  // reported.
  constexpr size_t kBlock = 64 / sizeof(U);
  for (size_t i = 0; i < n; i += kBlock) {
    const size_t r = n - i < kBlock ? n - i : kBlock;
    uint8_t len[kBlock];
    unsigned longest_code = 0;
    uint64_t need = pos;
    for (size_t j = 0; j < r; ++j) {
      const unsigned m = static_cast<uint8_t>(at[i + j] - at[static_cast<ptrdiff_t>(i + j) - 1] - 1);
      longest_code = m > longest_code ? m : longest_code;
      len[j] = static_cast<uint8_t>(m + static_cast<unsigned>(k));
      need += len[j];
    }
    if (longest_code > static_cast<unsigned>(top)) return EgStatus::too_long;
    if (need > end) return EgStatus::exhausted;
    bool large = false;
    size_t j = 0;
#if ACTZIP_BMI2
    for (; j + kLanes <= r; j += kLanes) {
      uint64_t mask = 0;
      for (size_t l = 0; l < kLanes; ++l) mask |= ((uint64_t{1} << len[j + l]) - 1) << (kWidth * l);
      U tail[kLanes];
      store64(tail, _pdep_u64(peek(suffix, pos), mask));
      pos += static_cast<uint64_t>(ones64(mask));
      for (size_t l = 0; l < kLanes; ++l) {
        const uint32_t x = (1u << len[j + l]) - (1u << k) + static_cast<uint32_t>(bias) + tail[l];
        large |= x > most;
        values[i + j + l] = static_cast<U>(x);
      }
    }
#endif
    for (; j < r; ++j) {
      const uint32_t power = 1u << len[j];
      const uint32_t x = power - (1u << k) + static_cast<uint32_t>(bias) +
                         (static_cast<uint32_t>(peek(suffix, pos)) & (power - 1));
      pos += len[j];
      large |= x > most;
      values[i + j] = static_cast<U>(x);
    }
    if (large) return EgStatus::too_large;
  }
  *bit = pos;
  (void)kLanes;
  (void)kWidth;
  return EgStatus::ok;
}
EgStatus eg_decode_u8(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                      uint64_t end, uint64_t* bit, uint8_t* values) {
  return eg_decode(at, n, k, bias, most, suffix, end, bit, values);
}
EgStatus eg_decode_u16(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                       uint64_t end, uint64_t* bit, uint16_t* values) {
  return eg_decode(at, n, k, bias, most, suffix, end, bit, values);
}

#endif

#if ACTZIP_VBMI2

inline uint64_t sum64(__m512i v) { return static_cast<uint64_t>(_mm512_reduce_add_epi64(v)); }

// sum[j] += max(b - j, 0) for 64 bytes b <= 16 at a time; bytes add up for 15 rounds before they are widened.
template <int kTop>
struct BoundSums {
  __m512i wide[kTop], narrow[kTop];
  int rounds = 0;
  BoundSums() {
    for (int j = 0; j < kTop; ++j) wide[j] = narrow[j] = _mm512_setzero_si512();
  }
  void add(__m512i b) {
    for (int j = 0; j < kTop; ++j) {
      narrow[j] = _mm512_add_epi8(narrow[j], b);
      b = _mm512_subs_epu8(b, _mm512_set1_epi8(1));
    }
    if (++rounds == 15) widen();
  }
  void widen() {
    for (int j = 0; j < kTop; ++j) {
      wide[j] = _mm512_add_epi64(wide[j], _mm512_sad_epu8(narrow[j], _mm512_setzero_si512()));
      narrow[j] = _mm512_setzero_si512();
    }
    rounds = 0;
  }
  void finish(uint64_t* sum) {
    widen();
    for (int j = 0; j < kTop; ++j) sum[j] += sum64(wide[j]);
  }
};

size_t eg_bounds_u8(const uint8_t* s, size_t n, int bias, uint64_t* sum) {
  const __m512i vbias = _mm512_set1_epi8(static_cast<char>(bias));
  BoundSums<8> sums;
  size_t count = 0;
  for (size_t i = 0; i < n; i += 64) {
    const __mmask64 live = n - i < 64 ? (uint64_t{1} << (n - i)) - 1 : ~uint64_t{0};
    const __m512i x = _mm512_maskz_loadu_epi8(live, s + i);
    count += static_cast<size_t>(ones64(_mm512_mask_cmpge_epu8_mask(live, x, vbias)));
    const __m512i v = _mm512_subs_epu8(x, vbias);  // bit length: log2 + 1, 0 for 0
    sums.add(_mm512_maskz_add_epi8(_mm512_test_epi8_mask(v, v), log2_bytes(v), _mm512_set1_epi8(1)));
  }
  sums.finish(sum);
  return count;
}

size_t eg_bounds_u16(const uint16_t* s, size_t n, int bias, uint64_t* sum) {
  const __m512i vbias = _mm512_set1_epi16(static_cast<short>(bias)), one = _mm512_set1_epi8(1);
  // Even bytes of a, then of b; odd ones.
  alignas(64) uint8_t even[64], odd[64];
  for (int i = 0; i < 64; ++i) {
    even[i] = static_cast<uint8_t>(2 * i);
    odd[i] = static_cast<uint8_t>(2 * i + 1);
  }
  const __m512i veven = _mm512_load_si512(even), vodd = _mm512_load_si512(odd);
  BoundSums<16> sums;
  size_t count = 0;
  for (size_t i = 0; i < n; i += 64) {
    const size_t r = n - i < 64 ? n - i : 64;
    const uint64_t live = r == 64 ? ~uint64_t{0} : (uint64_t{1} << r) - 1;
    const __mmask32 la = static_cast<__mmask32>(live), lb = static_cast<__mmask32>(live >> 32);
    const __m512i xa = _mm512_maskz_loadu_epi16(la, s + i), xb = _mm512_maskz_loadu_epi16(lb, s + i + 32);
    count += static_cast<size_t>(ones64(_mm512_mask_cmpge_epu16_mask(la, xa, vbias)) +
                                 ones64(_mm512_mask_cmpge_epu16_mask(lb, xb, vbias)));
    const __m512i va = _mm512_subs_epu16(xa, vbias), vb = _mm512_subs_epu16(xb, vbias);
    const __m512i low = _mm512_permutex2var_epi8(va, veven, vb),
                  high = _mm512_permutex2var_epi8(va, vodd, vb);
    const __mmask64 has_high = _mm512_test_epi8_mask(high, high), has_low = _mm512_test_epi8_mask(low, low);
    __m512i b = _mm512_maskz_add_epi8(has_low, log2_bytes(low), one);
    b = _mm512_mask_add_epi8(b, has_high, log2_bytes(high), _mm512_set1_epi8(9));
    sums.add(b);
  }
  sums.finish(sum);
  return count;
}

uint64_t eg_zeros_u8(const uint8_t* s, size_t n, int bias, int k) {
  const __m512i vbias = _mm512_set1_epi8(static_cast<char>(bias));
  __m512i acc = _mm512_setzero_si512();
  for (size_t i = 0; i < n; i += 64) {
    const __mmask64 live = n - i < 64 ? (uint64_t{1} << (n - i)) - 1 : ~uint64_t{0};
    const __m512i v = _mm512_subs_epu8(_mm512_maskz_loadu_epi8(live, s + i), vbias);
    const __m512i m = log2_bytes(_mm512_add_epi8(shift_right_bytes(v, k), _mm512_set1_epi8(1)));
    acc = _mm512_add_epi64(acc, _mm512_sad_epu8(m, _mm512_setzero_si512()));
  }
  return sum64(acc);
}

uint64_t eg_zeros_u16(const uint16_t* s, size_t n, int bias, int k) {
  const __m512i vbias = _mm512_set1_epi16(static_cast<short>(bias)), one = _mm512_set1_epi32(1);
  const __m128i shift = _mm_cvtsi32_si128(k);
  uint64_t total = 0;
  for (size_t i = 0; i < n; i += 1 << 16) {  // 32-bit sums of leading zeros
    const size_t end = n - i < (1 << 16) ? n : i + (1 << 16);
    __m512i acc = _mm512_setzero_si512();
    uint64_t lanes = 0;
    for (size_t j = i; j < end; j += 32, lanes += 32) {
      const __mmask32 live = end - j < 32 ? (uint32_t{1} << (end - j)) - 1 : ~uint32_t{0};
      const __m512i v =
          _mm512_srl_epi16(_mm512_subs_epu16(_mm512_maskz_loadu_epi16(live, s + j), vbias), shift);
      const __m512i a = _mm512_add_epi32(_mm512_and_si512(v, _mm512_set1_epi32(0xffff)), one);
      const __m512i b = _mm512_add_epi32(_mm512_srli_epi32(v, 16), one);
      acc = _mm512_add_epi32(acc, _mm512_add_epi32(_mm512_lzcnt_epi32(a), _mm512_lzcnt_epi32(b)));
    }
    total += 31 * lanes - static_cast<uint64_t>(static_cast<uint32_t>(_mm512_reduce_add_epi32(acc)));
  }
  return total;
}

#else

// floor(log2(v)) for 0 < v < 2^24, from the exponent of a float (exact); vectorises everywhere.
inline int32_t log2_by_float(int32_t v) {
  const float f = static_cast<float>(v);
  int32_t u;
  std::memcpy(&u, &f, 4);
  return (u >> 23) - 127;
}

template <class U>
size_t eg_bounds(const U* s, size_t n, int bias, uint64_t* sum) {
  constexpr size_t kBlock = 512;
  uint32_t histogram[4][32] = {};  // four, so that equal neighbours do not wait for each other
  uint64_t total[32] = {};
  size_t below = 0;
  for (size_t i = 0; i < n; i += kBlock) {
    const size_t r = n - i < kBlock ? n - i : kBlock;
    uint8_t length[kBlock + 4];
    int32_t uncoded = 0;
    for (size_t j = 0; j < r; ++j) {
      const int32_t v = s[i + j] - bias;
      uncoded += v < 0;
      // log2(2 v + 1) is the bit length of v
      length[j] = static_cast<uint8_t>(log2_by_float(2 * (v < 0 ? 0 : v) + 1));
    }
    for (size_t j = r; j < r + 4; ++j) length[j] = 0;  // counts for nothing
    below += static_cast<size_t>(uncoded);
    for (size_t j = 0; j < r; j += 4)
      for (size_t l = 0; l < 4; ++l) ++histogram[l][length[j + l]];
    if ((i / kBlock & 0xffff) == 0xffff || i + kBlock >= n)
      for (auto& h : histogram)
        for (int b = 0; b < 32; ++b) total[b] += h[b], h[b] = 0;
  }
  for (int j = 0; j < 16; ++j)
    for (int b = j + 1; b <= 16; ++b) sum[j] += total[b] * static_cast<uint64_t>(b - j);
  return n - below;
}
template <class U>
uint64_t eg_zeros(const U* s, size_t n, int bias, int k) {
  uint64_t total = 0;
  for (size_t i = 0; i < n; i += 4096) {
    const size_t r = n - i < 4096 ? n - i : 4096;
    int32_t part = 0;
    for (size_t j = 0; j < r; ++j) {
      const int32_t v = s[i + j] - bias;
      part += log2_by_float(((v < 0 ? 0 : v) >> k) + 1);
    }
    total += static_cast<uint64_t>(part);
  }
  return total;
}
size_t eg_bounds_u8(const uint8_t* s, size_t n, int bias, uint64_t* sum) {
  return eg_bounds(s, n, bias, sum);
}
size_t eg_bounds_u16(const uint16_t* s, size_t n, int bias, uint64_t* sum) {
  return eg_bounds(s, n, bias, sum);
}
uint64_t eg_zeros_u8(const uint8_t* s, size_t n, int bias, int k) { return eg_zeros(s, n, bias, k); }
uint64_t eg_zeros_u16(const uint16_t* s, size_t n, int bias, int k) { return eg_zeros(s, n, bias, k); }

#endif

// ---------------------------------------------------------------- plain passes, left to the compiler

template <class T>
void range(const uint8_t* s, size_t n, int* least, int* greatest) {
  constexpr size_t kBlock = 1024;
  T low = static_cast<T>(*least), high = static_cast<T>(*greatest);
  T block[kBlock];
  for (size_t i = 0; i < n; i += kBlock) {
    const size_t r = n - i < kBlock ? n - i : kBlock;
    std::memcpy(block, s + i * sizeof(T), r * sizeof(T));  // s may be unaligned
    for (size_t j = 0; j < r; ++j) {
      low = block[j] < low ? block[j] : low;
      high = block[j] > high ? block[j] : high;
    }
  }
  *least = low;
  *greatest = high;
}

template <class U>
void zigzag(U* v, size_t n) {
  constexpr int s = sizeof(U) * 8 - 1;
  for (size_t i = 0; i < n; ++i)
    v[i] = static_cast<U>(static_cast<U>(v[i] << 1) ^ static_cast<U>(0u - (v[i] >> s)));
}
template <class U>
void unzigzag(U* v, size_t n) {
  for (size_t i = 0; i < n; ++i) v[i] = static_cast<U>((v[i] >> 1) ^ static_cast<U>(0u - (v[i] & 1u)));
}

// ---------------------------------------------------------------- checksum

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

extern const Kernels kTable;
const Kernels kTable = {
    compress<uint8_t>,  compress<uint16_t>,
    compress<uint32_t>, expand<uint8_t>,
    expand<uint16_t>,   expand<uint32_t>,
    any_zero<uint8_t>,  any_zero<uint16_t>,
    any_zero<uint32_t>, ones,
    pack<uint8_t>,      pack<uint16_t>,
    unpack<uint8_t>,    unpack<uint16_t>,
    eg_encode_u8,       eg_encode_u16,
    positions,          eg_decode_u8,
    eg_decode_u16,      eg_bounds_u8,
    eg_bounds_u16,      eg_zeros_u8,
    eg_zeros_u16,       range<uint8_t>,
    range<int8_t>,      range<uint16_t>,
    range<int16_t>,     zigzag<uint8_t>,
    zigzag<uint16_t>,   unzigzag<uint8_t>,
    unzigzag<uint16_t>, crc32c,
};

}  // namespace actzip::codec::ACTZIP_ISA_NS
