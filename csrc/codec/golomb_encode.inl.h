// Exponential-Golomb codes, written.
#pragma once

#include "codec/bits.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

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

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
