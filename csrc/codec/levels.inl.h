// Levels of the quantizers of split networks (src/actzip/split/quantizer.py): numbers to integers and back.
// No product and sum are fused (-ffp-contract=off), so that all instruction sets give the same integers.
#pragma once

#include <cmath>

#include "codec/bits.inl.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

template <bool is_signed>
inline bool to_levels(const float* x, size_t n, float inverse, float rounding, float most, uint8_t* out) {
  uint32_t strange = 0;
  for (size_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    strange |= (bits & 0x7f800000u) == 0x7f800000u;
    float y = x[i] * inverse;
    if (is_signed) {
      y += std::copysign(rounding, x[i]);
      y = y > -most ? y : -most;
    } else {
      y += rounding;
      y = y > 0.0f ? y : 0.0f;
    }
    y = y < most ? y : most;
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(y));
  }
  return strange == 0;
}

bool to_levels_any(const float* x, size_t n, float inverse, float rounding, float most, bool is_signed,
                   uint8_t* out) {
  return is_signed ? to_levels<true>(x, n, inverse, rounding, most, out)
                   : to_levels<false>(x, n, inverse, rounding, most, out);
}

void from_levels(const uint8_t* q, size_t n, const float* table, float step, bool few, float* out) {
  size_t i = 0;
#if defined(__AVX512F__)
  const __m512 by = _mm512_set1_ps(step), low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16);
  for (; i + 16 <= n; i += 16) {
    const __m512i at = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q + i)));
    const __m512 v =
        few ? _mm512_permutex2var_ps(low, at, high) : _mm512_i32gather_ps(at, table, sizeof(float));
    _mm512_storeu_ps(out + i, _mm512_mul_ps(v, by));
  }
#elif defined(__AVX2__)
  const __m256 by = _mm256_set1_ps(step);
  for (; i + 8 <= n; i += 8) {
    const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i)));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_i32gather_ps(table, at, sizeof(float)), by));
  }
#endif
  (void)few;
  for (; i < n; ++i) out[i] = table[q[i]] * step;
}

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
