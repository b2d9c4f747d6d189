// The lanes of `rans` as vectors of 16 (AVX-512) or 8 (AVX2) numbers of 32 bits.
#pragma once

#include <cstring>

#include "codec/rans_lanes.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own headers (bug 105593)
#endif

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

#if defined(__AVX512BW__)
#define ACTZIP_RANS_VECTOR 1

struct RansVec {
  using V = __m512i;
  using M = __mmask16;
  static constexpr int n = 16;
  static V set(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static V zero() { return _mm512_setzero_si512(); }
  static V load(const uint32_t* p) { return _mm512_load_si512(p); }
  static void store(uint32_t* p, V v) { _mm512_store_si512(p, v); }
  static V load8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store8(uint8_t* p, V v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static void store16(uint16_t* p, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
  static void store32(uint32_t* p, V v) { _mm512_storeu_si512(p, v); }
  static V gather(const uint32_t* p, V i) { return _mm512_i32gather_epi32(i, p, 4); }
  static V add(V a, V b) { return _mm512_add_epi32(a, b); }
  static V sub(V a, V b) { return _mm512_sub_epi32(a, b); }
  static V mul(V a, V b) { return _mm512_mullo_epi32(a, b); }
  static V and_(V a, V b) { return _mm512_and_si512(a, b); }
  static V or_(V a, V b) { return _mm512_or_si512(a, b); }
  static V min(V a, V b) { return _mm512_min_epu32(a, b); }
  template <int k>
  static V srl(V a) {
    return _mm512_srli_epi32(a, k);
  }
  template <int k>
  static V sll(V a) {
    return _mm512_slli_epi32(a, k);
  }
  static V srlc(V a, __m128i k) { return _mm512_srl_epi32(a, k); }
  static V sllc(V a, __m128i k) { return _mm512_sll_epi32(a, k); }
  static V srlv(V a, V k) { return _mm512_srlv_epi32(a, k); }
  static V sllv(V a, V k) { return _mm512_sllv_epi32(a, k); }
  static M greater(V a, V b) { return _mm512_cmpgt_epu32_mask(a, b); }
  static bool some(M m) { return m != 0; }
  static V keep(M m, V v) { return _mm512_maskz_mov_epi32(m, v); }
  static V select(M m, V yes, V no) { return _mm512_mask_mov_epi32(no, m, yes); }
  // base and raw of tokens: two lookups of 64 entries.
  struct Table {
    V t[4];
  };
  static Table table(const uint32_t* p) { return {{load(p), load(p + 16), load(p + 32), load(p + 48)}}; }
  static V look(const Table& t, V i, bool big) {
    const V low = _mm512_permutex2var_epi32(t.t[0], i, t.t[1]);
    if (!big) return low;
    const V high = _mm512_permutex2var_epi32(t.t[2], i, t.t[3]);
    return _mm512_mask_mov_epi32(low, _mm512_test_epi32_mask(i, set(32)), high);
  }
  // Lanes of x below kRansLow take a word each.
  static V renorm(V x, const uint8_t** at) {
    const M need = _mm512_cmplt_epu32_mask(x, set(kRansLow));
    const V words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(*at)));
    *at += 2 * static_cast<size_t>(__builtin_popcount(need));
    return _mm512_mask_or_epi32(x, need, _mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(need, words));
  }
  // For encoding: a >= b, of numbers below 2^31; both; any lane.
  static M at_least(V a, V b) { return _mm512_cmpge_epu32_mask(a, b); }
  static M below(V a, V b) { return _mm512_cmplt_epi32_mask(a, b); }  // signed
  static M both(M a, M b) { return a & b; }
  static bool any(V v) { return _mm512_test_epi32_mask(v, v) != 0; }
  template <int scale>
  static V gather_at(const void* p, V i) {
    return _mm512_i32gather_epi32(i, p, scale);
  }
  // x / f, one too much or too little at most, where x / f < 2^22.
  static V divide(V x, V f) {
    return _mm512_cvttps_epi32(_mm512_div_ps(_mm512_cvtepu32_ps(x), _mm512_cvtepi32_ps(f)));
  }
  // Lanes that need it give their low word.
  static void give(M need, V* x, uint16_t** words) {
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(need, *x));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(*words), low);
    *words += __builtin_popcount(need);
    *x = _mm512_mask_srli_epi32(*x, need, *x, 16);
  }
};

#elif defined(__AVX2__)
#define ACTZIP_RANS_VECTOR 1

// For a mask of 8 lanes, in lane order: which of the next words each takes.
struct RansExpand {
  uint64_t row[256];
  constexpr RansExpand() : row() {
    for (int m = 0; m < 256; ++m) {
      uint64_t r = 0;
      int k = 0;
      for (int l = 0; l < 8; ++l)
        if (m >> l & 1) r |= static_cast<uint64_t>(k++) << (8 * l);
      row[m] = r;
    }
  }
};
constexpr RansExpand kRansExpand{};
// The inverse: for a mask of 8 lanes, those that are set, in order.
struct RansCompress {
  uint64_t row[256];
  constexpr RansCompress() : row() {
    for (int m = 0; m < 256; ++m) {
      uint64_t r = 0;
      int k = 0;
      for (int l = 0; l < 8; ++l)
        if (m >> l & 1) r |= static_cast<uint64_t>(l) << (8 * k++);
      row[m] = r;
    }
  }
};
constexpr RansCompress kRansCompress{};

struct RansVec {
  using V = __m256i;
  using M = __m256i;
  static constexpr int n = 8;
  static V set(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static V zero() { return _mm256_setzero_si256(); }
  static V load(const uint32_t* p) { return _mm256_load_si256(reinterpret_cast<const V*>(p)); }
  static void store(uint32_t* p, V v) { _mm256_store_si256(reinterpret_cast<V*>(p), v); }
  static V load8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static __m128i narrow16(V v) {  // values below 2^16
    return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  }
  static void store8(uint8_t* p, V v) {
    const __m128i h = narrow16(v);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(h, h));
  }
  static void store16(uint16_t* p, V v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow16(v)); }
  static void store32(uint32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
  static V gather(const uint32_t* p, V i) {
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(p), i, 4);
  }
  static V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static V sub(V a, V b) { return _mm256_sub_epi32(a, b); }
  static V mul(V a, V b) { return _mm256_mullo_epi32(a, b); }
  static V and_(V a, V b) { return _mm256_and_si256(a, b); }
  static V or_(V a, V b) { return _mm256_or_si256(a, b); }
  static V min(V a, V b) { return _mm256_min_epu32(a, b); }
  template <int k>
  static V srl(V a) {
    return _mm256_srli_epi32(a, k);
  }
  template <int k>
  static V sll(V a) {
    return _mm256_slli_epi32(a, k);
  }
  static V srlc(V a, __m128i k) { return _mm256_srl_epi32(a, k); }
  static V sllc(V a, __m128i k) { return _mm256_sll_epi32(a, k); }
  static V srlv(V a, V k) { return _mm256_srlv_epi32(a, k); }
  static V sllv(V a, V k) { return _mm256_sllv_epi32(a, k); }
  static M greater(V a, V b) {  // of numbers below 2^31
    return _mm256_cmpgt_epi32(a, b);
  }
  static bool some(M m) { return _mm256_movemask_epi8(m) != 0; }
  static V keep(M m, V v) { return _mm256_and_si256(m, v); }
  static V select(M m, V yes, V no) { return _mm256_blendv_epi8(no, yes, m); }
  struct Table {
    const uint32_t* p;
  };
  static Table table(const uint32_t* p) { return {p}; }
  static V look(const Table& t, V i, bool) { return gather(t.p, i); }
  static V renorm(V x, const uint8_t** at) {
    const V need = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), zero());
    const unsigned bits = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(need)));
    const V words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(*at)));
    *at += 2 * static_cast<size_t>(__builtin_popcount(bits));
    const V order = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kRansExpand.row[bits])));
    const V taken = _mm256_permutevar8x32_epi32(words, order);
    return _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), taken), need);
  }
  static M at_least(V a, V b) { return _mm256_cmpgt_epi32(add(a, set(1)), b); }
  static M below(V a, V b) { return _mm256_cmpgt_epi32(b, a); }
  static M both(M a, M b) { return _mm256_and_si256(a, b); }
  static bool any(V v) { return _mm256_testz_si256(v, v) == 0; }
  template <int scale>
  static V gather_at(const void* p, V i) {
    return _mm256_i32gather_epi32(static_cast<const int*>(p), i, scale);
  }
  static V divide(V x, V f) {
    const __m256 high = _mm256_cvtepi32_ps(srl<16>(x)), low = _mm256_cvtepi32_ps(and_(x, set(0xffff)));
    const __m256 whole = _mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.0f)), low);
    return _mm256_cvttps_epi32(_mm256_div_ps(whole, _mm256_cvtepi32_ps(f)));
  }
  static void give(M need, V* x, uint16_t** words) {
    const unsigned bits = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(need)));
    const __m128i order = _mm_cvtsi64_si128(static_cast<long long>(kRansCompress.row[bits]));
    const V taken = _mm256_permutevar8x32_epi32(*x, _mm256_cvtepu8_epi32(order));
    const __m128i low = narrow16(and_(taken, set(0xffff)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(*words), low);
    *words += __builtin_popcount(bits);
    *x = select(need, srl<16>(*x), *x);
  }
};
#endif

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
