// How long exponential-Golomb codes will be.
#pragma once

#include "codec/bits.inl.h"
#include "codec/golomb_encode.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

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

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
