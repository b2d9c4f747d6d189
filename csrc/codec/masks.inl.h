// Masks and non-zero values.
#pragma once

#include "codec/bits.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

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
// The bytes (16-bit lanes) of a word whose bit in m is set, as a mask of whole lanes.
template <class U>
inline uint64_t lanes(uint64_t m) {
  return sizeof(U) == 1 ? _pdep_u64(m, 0x0101010101010101u) * 255u
                        : _pdep_u64(m, 0x0001000100010001u) * 65535u;
}
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
template <class U>
inline size_t squeeze(const U* s, uint64_t m, U* out) {
#if ACTZIP_VBMI2
  if constexpr (sizeof(U) == 1) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi8(m, _mm512_loadu_si512(s)));
    return static_cast<size_t>(ones64(m));
  }
  if constexpr (sizeof(U) == 2) {
    const uint32_t a = static_cast<uint32_t>(m), b = static_cast<uint32_t>(m >> 32);
    const size_t na = static_cast<size_t>(ones64(a));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(a, _mm512_loadu_si512(s)));
    _mm512_storeu_si512(out + na, _mm512_maskz_compress_epi16(b, _mm512_loadu_si512(s + 32)));
    return na + static_cast<size_t>(ones64(b));
  }
#elif ACTZIP_BMI2
  if constexpr (sizeof(U) <= 2) {
    constexpr int n = 8 / sizeof(U);  // in a word
    U* o = out;
    for (int i = 0; i < 64; i += n) {
      const uint64_t b = m >> i & ((1u << n) - 1);
      store64(o, _pext_u64(load64(s + i), lanes<U>(b)));
      o += ones64(b);
    }
    return static_cast<size_t>(o - out);
  }
#endif
  size_t n = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(U) == 4) {
    for (int i = 0; i < 4; ++i) {
      const __mmask16 b = static_cast<__mmask16>(m >> (16 * i));
      _mm512_storeu_si512(out + n, _mm512_maskz_compress_epi32(b, _mm512_loadu_si512(s + 16 * i)));
      n += static_cast<size_t>(ones64(b));
    }
    return n;
  }
#endif
  for (int i = 0; i < 64; ++i) {
    store_at(out, n, s[i]);
    n += m >> i & 1;
  }
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
template <class U>
inline size_t spread(const U* v, uint64_t m, U* out) {
#if ACTZIP_VBMI2
  if constexpr (sizeof(U) == 1) {
    _mm512_storeu_si512(out, _mm512_maskz_expand_epi8(m, _mm512_loadu_si512(v)));
    return static_cast<size_t>(ones64(m));
  }
  if constexpr (sizeof(U) == 2) {
    const uint32_t a = static_cast<uint32_t>(m), b = static_cast<uint32_t>(m >> 32);
    const size_t na = static_cast<size_t>(ones64(a));
    _mm512_storeu_si512(out, _mm512_maskz_expand_epi16(a, _mm512_loadu_si512(v)));
    _mm512_storeu_si512(out + 32, _mm512_maskz_expand_epi16(b, _mm512_loadu_si512(v + na)));
    return na + static_cast<size_t>(ones64(b));
  }
#elif ACTZIP_BMI2
  if constexpr (sizeof(U) <= 2) {
    constexpr int n = 8 / sizeof(U);  // in a word
    const U* p = v;
    for (int i = 0; i < 64; i += n) {
      const uint64_t b = m >> i & ((1u << n) - 1);
      store64(out + i, _pdep_u64(load64(p), lanes<U>(b)));
      p += ones64(b);
    }
    return static_cast<size_t>(p - v);
  }
#endif
  size_t n = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(U) == 4) {
    for (int i = 0; i < 4; ++i) {
      const __mmask16 b = static_cast<__mmask16>(m >> (16 * i));
      _mm512_storeu_si512(out + 16 * i, _mm512_maskz_expand_epi32(b, _mm512_loadu_si512(v + n)));
      n += static_cast<size_t>(ones64(b));
    }
    return n;
  }
#endif
  for (int i = 0; i < 64; ++i) {
    const unsigned b = m >> i & 1;
    out[i] = static_cast<U>(load_at(v, n) & (0u - b));
    n += b;
  }
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

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
