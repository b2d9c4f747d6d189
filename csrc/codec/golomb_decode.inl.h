// Exponential-Golomb codes, read.
#pragma once

#include "codec/bits.inl.h"
#include "codec/golomb_encode.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

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

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
