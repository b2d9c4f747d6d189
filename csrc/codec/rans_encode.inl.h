// The inner loop of the `rans` encoder: all lanes of a group, one symbol of each a step, from the last step
// to the first. A step does what the decoder's does, in reverse: raw bits above 16, those below, the token.
// The scalar form is the definition; the others do the same on 8 or 16 lanes at once.
#pragma once

#include <cstring>

#include "codec/rans_lanes.h"
#include "codec/rans_vectors.inl.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own headers (bug 105593)
#endif

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

template <class U>
inline uint32_t rans_rotated(U v, bool rotate) {
  return rotate ? static_cast<U>(v << 1 | v >> (8 * sizeof(U) - 1)) : v;
}

inline uint32_t rans_push(uint32_t x, uint32_t v, uint32_t raw, uint16_t** words) {
  if (static_cast<uint64_t>(x) << raw >> 32) {
    *(*words)++ = static_cast<uint16_t>(x);
    x >>= 16;
  }
  return x << raw | (v & ((1u << raw) - 1));
}

inline uint32_t rans_divide(uint32_t x, uint32_t f, const uint64_t* reciprocals) {
#ifdef __SIZEOF_INT128__
  __extension__ using Wide = unsigned __int128;
  return static_cast<uint32_t>(static_cast<Wide>(reciprocals[f]) * x >> 44);  // exact: frequency <= 2^12
#else
  (void)reciprocals;
  return x / f;
#endif
}

template <class U>
inline uint16_t* rans_encode_scalar(RansEncodeGroup* group, uint16_t* words) {
  RansEncodeGroup& g = *group;
  const int lanes = g.lanes, prec = g.prec;
  const U* symbols = static_cast<const U*>(g.symbols);
  uint32_t entry[kRansMaxLanes];  // 0: no symbol in this step
  for (uint32_t i = g.steps; i-- > 0;) {
    uint32_t most = 0;
    for (int l = 0; l < lanes; ++l) {
      entry[l] = i < g.length[l] ? g.entries[g.row[l] + g.pairs[g.offset[l] + i]] : 0;
      most = entry[l] > most ? entry[l] : most;
    }
    most >>= 25;  // raw bits
    if (g.wide && most > 16) {
      for (int l = 0; l < lanes; ++l) {
        const uint32_t raw = entry[l] >> 25;
        if (raw <= 16) continue;
        const uint32_t v = rans_rotated(symbols[g.offset[l] + i], g.rotate);
        g.state[l] = rans_push(g.state[l], v >> 16, raw - 16, &words);
      }
    }
    if (most > 0) {
      for (int l = 0; l < lanes; ++l) {
        const uint32_t raw = entry[l] >> 25;
        if (raw == 0) continue;
        const uint32_t v = rans_rotated(symbols[g.offset[l] + i], g.rotate);
        g.state[l] = rans_push(g.state[l], v, raw < 16 ? raw : 16, &words);
      }
    }
    for (int l = 0; l < lanes; ++l) {
      const uint32_t f = entry[l] & 0x1fff, first = entry[l] >> 13 & 0xfff;
      if (f == 0) continue;
      uint32_t x = g.state[l];
      if (x >> (32 - prec) >= f) {
        *words++ = static_cast<uint16_t>(x);
        x >>= 16;
      }
      const uint32_t q = rans_divide(x, f, g.reciprocals);
      g.state[l] = (q << prec) + (x - q * f) + first;
    }
  }
  return words;
}

#ifdef ACTZIP_RANS_VECTOR

// K vectors of lanes; prec >= 10, see RansVec::divide.
template <class U, int K, bool wide>
inline uint16_t* rans_encode_vector(RansEncodeGroup* group, uint16_t* words) {
  using V = RansVec::V;
  constexpr int n = RansVec::n, lanes = K * n;
  const RansEncodeGroup& g = *group;
  const V one = RansVec::set(1), sixteen = RansVec::set(16), last = RansVec::set(g.last);
  const V slots = RansVec::set(1u << g.prec);
  const __m128i rest = _mm_cvtsi32_si128(32 - g.prec);
  const bool rotate = g.rotate;
  V x[K], offset[K], length[K], row[K], two[K], entry[K];
  for (int k = 0; k < K; ++k) {
    x[k] = RansVec::load(g.state + k * n);
    offset[k] = RansVec::load(g.offset + k * n);
    length[k] = RansVec::load(g.length + k * n);
    row[k] = RansVec::load(g.row + k * n);
    two[k] = RansVec::zero();
  }
  uint32_t shortest = g.length[0];
  for (int l = 1; l < lanes; ++l) shortest = g.length[l] < shortest ? g.length[l] : shortest;
  for (uint32_t i = g.steps; i-- > 0;) {
    const bool partial = i >= shortest, odd = i & 1;
    const V step = RansVec::set(i);
    if (odd || i + 1 == g.steps) {  // the pairs of two steps
      const V even = RansVec::set(i & ~1u);
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k)
        two[k] = RansVec::template gather_at<2>(g.pairs, RansVec::min(RansVec::add(offset[k], even), last));
    }
    V raws = RansVec::zero();
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      V pair = odd ? RansVec::template srl<16>(two[k]) : RansVec::and_(two[k], RansVec::set(0xffff));
      if (partial) pair = RansVec::keep(RansVec::greater(length[k], step), pair);
      entry[k] = RansVec::gather(g.entries, RansVec::add(row[k], pair));
      if (partial) entry[k] = RansVec::keep(RansVec::greater(length[k], step), entry[k]);
      raws = RansVec::or_(raws, RansVec::template srl<25>(entry[k]));
    }
    if (RansVec::any(raws)) {
      V value[K];
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const V at = RansVec::min(RansVec::add(offset[k], step), last);
        V v = RansVec::template gather_at<sizeof(U)>(g.symbols, at);
        if (sizeof(U) == 2) v = RansVec::and_(v, RansVec::set(0xffff));
        if (rotate)
          v = RansVec::or_(RansVec::template sll<1>(v), RansVec::template srl<8 * sizeof(U) - 1>(v));
        value[k] = v;
      }
      if (wide) {
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          const V all = RansVec::template srl<25>(entry[k]);
          const V raw = RansVec::sub(all, RansVec::min(all, sixteen));
          const V v =
              RansVec::and_(RansVec::template srl<16>(value[k]), RansVec::sub(RansVec::sllv(one, raw), one));
          const V over = RansVec::srlv(x[k], RansVec::sub(RansVec::set(32), raw));
          RansVec::give(RansVec::at_least(over, one), &x[k], &words);
          x[k] = RansVec::or_(RansVec::sllv(x[k], raw), v);
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const V raw = RansVec::min(RansVec::template srl<25>(entry[k]), sixteen);
        const V v = RansVec::and_(value[k], RansVec::sub(RansVec::sllv(one, raw), one));
        const V over = RansVec::srlv(x[k], RansVec::sub(RansVec::set(32), raw));
        RansVec::give(RansVec::at_least(over, one), &x[k], &words);
        x[k] = RansVec::or_(RansVec::sllv(x[k], raw), v);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      V f = RansVec::and_(entry[k], RansVec::set(0x1fff));
      auto need = RansVec::at_least(RansVec::srlc(x[k], rest), f);
      if (partial) {
        const auto here = RansVec::greater(length[k], step);
        need = RansVec::both(need, here);
        f = RansVec::select(here, f, one);
      }
      RansVec::give(need, &x[k], &words);
      const V first = RansVec::and_(RansVec::template srl<13>(entry[k]), RansVec::set(0xfff));
      const V more = RansVec::sub(slots, f), q = RansVec::divide(x[k], f);
      const V left = RansVec::sub(x[k], RansVec::mul(q, f));  // of the division, -f to 2 f
      V y = RansVec::add(RansVec::add(x[k], first), RansVec::mul(q, more));
      y = RansVec::sub(y, RansVec::keep(RansVec::below(left, RansVec::zero()), more));
      y = RansVec::add(y, RansVec::keep(RansVec::below(RansVec::sub(f, one), left), more));
      x[k] = partial ? RansVec::select(RansVec::greater(length[k], step), y, x[k]) : y;
    }
  }
  for (int k = 0; k < K; ++k) RansVec::store(group->state + k * n, x[k]);
  return words;
}
#endif

template <class U>
inline uint16_t* rans_encode(RansEncodeGroup* g, uint16_t* words) {
#ifdef ACTZIP_RANS_VECTOR
  if (g->prec >= 10 && g->lanes == 32)
    return g->wide ? rans_encode_vector<U, 32 / RansVec::n, true>(g, words)
                   : rans_encode_vector<U, 32 / RansVec::n, false>(g, words);
  if (g->prec >= 10 && g->lanes == 16)
    return g->wide ? rans_encode_vector<U, 16 / RansVec::n, true>(g, words)
                   : rans_encode_vector<U, 16 / RansVec::n, false>(g, words);
#endif
  return rans_encode_scalar<U>(g, words);
}

uint16_t* rans_encode_group(RansEncodeGroup* g, uint16_t* words) {
  if (g->width == 1) return rans_encode<uint8_t>(g, words);
  if (g->width == 2) return rans_encode<uint16_t>(g, words);
  return rans_encode<uint32_t>(g, words);
}

void rans_costs(const RansCount* counts, size_t n, const uint32_t* price, uint64_t* cost) {
  alignas(32) uint32_t sum[kRansClasses] = {};
#if defined(__AVX2__)
  __m256i even = _mm256_setzero_si256(), odd = even;
  const auto times = [&](size_t i) {
    const auto* row = reinterpret_cast<const __m256i*>(price + counts[i].pair * kRansClasses);
    return _mm256_mullo_epi32(_mm256_loadu_si256(row), _mm256_set1_epi32(static_cast<int>(counts[i].count)));
  };
  size_t i = 0;
  for (; i + 2 <= n; i += 2) {
    even = _mm256_add_epi32(even, times(i));
    odd = _mm256_add_epi32(odd, times(i + 1));
  }
  if (i < n) even = _mm256_add_epi32(even, times(i));
  _mm256_store_si256(reinterpret_cast<__m256i*>(sum), _mm256_add_epi32(even, odd));
#else
  for (size_t i = 0; i < n; ++i) {
    const uint32_t* row = price + counts[i].pair * kRansClasses;
    for (size_t k = 0; k < kRansClasses; ++k) sum[k] += counts[i].count * row[k];
  }
#endif
  for (size_t k = 0; k < kRansClasses; ++k) cost[k] += sum[k];
}

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
