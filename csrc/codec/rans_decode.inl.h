// The inner loop of the `rans` decoder: all lanes of a group, one symbol of each a step.
//
// A step has up to three phases, each over all lanes in ascending order: the token (then a word for each lane
// whose state fell below kRansLow), the low 16 raw bits (words again), and, if any token has more, the raw
// bits above those (words again). The scalar form is the definition; the others do the same on 8 or 16
// lanes at once.
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

// Writes steps [first, first + count) of the tile to the stripes. T: symbol type.
template <class T>
inline void rans_flush_tile(const RansGroup& g, uint32_t first, uint32_t count) {
  const T* tile = reinterpret_cast<const T*>(g.tile);
  const int lanes = g.lanes;
  for (int l = 0; l < lanes; ++l) {
    const uint32_t length = g.length[l];
    if (length <= first) continue;
    const uint32_t n = length - first < count ? length - first : count;
    T* out = reinterpret_cast<T*>(g.out[l]) + first;
    const T* in = tile + l;
    for (uint32_t i = 0; i < n; ++i) out[i] = in[static_cast<size_t>(i) * static_cast<size_t>(lanes)];
  }
}

inline uint32_t rans_word(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8;
}

template <class T>
inline bool rans_group_scalar(const RansGroup& g, RansStream* s) {
  const int lanes = g.lanes;
  const size_t back = static_cast<size_t>(g.cols) * static_cast<size_t>(lanes);
  const uint32_t mask = (1u << g.prec) - 1;
  const int prec = g.prec;
  const uint8_t* at = s->at;
  T* tile = reinterpret_cast<T*>(g.tile);
  uint8_t* now = g.history + back;
  uint32_t left[kRansMaxLanes], more[kRansMaxLanes], value[kRansMaxLanes];
  uint32_t column = 0, filled = 0;
  for (uint32_t i = 0; i < g.steps; ++i) {
    if (at > s->safe) {
      s->at = at;
      if (!s->refill()) return false;
      at = s->at;
    }
    if (column == 0)
      for (int l = 0; l < lanes; ++l) left[l] = 0;
    const uint8_t* up = now - back;
    for (int l = 0; l < lanes; ++l) {
      if (i >= g.length[l]) {
        now[l] = 0;
        continue;
      }
      uint32_t x = s->state[l];
      const uint32_t entry = g.slots[g.contexts[g.row[l] + left[l] + up[l]] + (x & mask)];
      x = (entry & 0x1fff) * (x >> prec) + ((entry >> 13) & 0xfff);
      if (x < kRansLow) {
        x = x << 16 | rans_word(at);
        at += 2;
      }
      s->state[l] = x;
      left[l] = entry >> 25;
      now[l] = static_cast<uint8_t>(entry >> 25);
    }
    for (int l = 0; l < lanes; ++l) {
      if (i >= g.length[l]) continue;
      uint32_t x = s->state[l];
      uint32_t raw = g.tokens->raw[left[l]];
      more[l] = 0;
      if (raw > 16) {
        more[l] = raw - 16;
        raw = 16;
      }
      value[l] = g.tokens->base[left[l]] + (x & ((1u << raw) - 1));
      x >>= raw;
      if (x < kRansLow) {
        x = x << 16 | rans_word(at);
        at += 2;
      }
      s->state[l] = x;
    }
    if (g.wide) {
      for (int l = 0; l < lanes; ++l) {
        if (i >= g.length[l]) continue;
        uint32_t x = s->state[l];
        value[l] += (x & ((1u << more[l]) - 1)) << 16;
        x >>= more[l];
        if (x < kRansLow) {
          x = x << 16 | rans_word(at);
          at += 2;
        }
        s->state[l] = x;
      }
    }
    T* row = tile + static_cast<size_t>(filled) * static_cast<size_t>(lanes);
    if (g.rotate) {
      for (int l = 0; l < lanes; ++l)
        row[l] = static_cast<T>(value[l] >> 1 | (value[l] & 1) << (8 * sizeof(T) - 1));
    } else {
      for (int l = 0; l < lanes; ++l) row[l] = static_cast<T>(value[l]);
    }
    now += lanes;
    if (++column == g.cols) column = 0;
    if (++filled == kRansTile) {
      rans_flush_tile<T>(g, i + 1 - filled, filled);
      filled = 0;
    }
  }
  rans_flush_tile<T>(g, g.steps - filled, filled);
  s->at = at;
  return true;
}

#ifdef ACTZIP_RANS_VECTOR

inline void rans_store(uint8_t* p, RansVec::V v) { RansVec::store8(p, v); }
inline void rans_store(uint16_t* p, RansVec::V v) { RansVec::store16(p, v); }
inline void rans_store(uint32_t* p, RansVec::V v) { RansVec::store32(p, v); }

// K vectors of lanes.
template <class T, int K, bool wide>
inline bool rans_group_vector(const RansGroup& g, RansStream* s) {
  using V = RansVec::V;
  constexpr int n = RansVec::n, lanes = K * n;
  const size_t back = static_cast<size_t>(g.cols) * lanes;
  const V mask = RansVec::set((1u << g.prec) - 1), one = RansVec::set(1);
  const __m128i prec = _mm_cvtsi32_si128(g.prec);
  const auto base = RansVec::table(g.tokens->base), raws = RansVec::table(g.tokens->raw);
  bool big = false;
  for (int t = 32; t < kRansTokens; ++t) big |= (g.tokens->base[t] | g.tokens->raw[t]) != 0;
  uint32_t direct = 0;  // tokens that are symbols, without raw bits; token 0 always is one
  while (direct + 1 < kRansTokens && g.tokens->raw[direct + 1] == 0 &&
         g.tokens->base[direct + 1] == direct + 1)
    ++direct;
  const V plain = RansVec::set(direct);
  const bool rotate = g.rotate;
  const uint8_t* at = s->at;
  const uint8_t* safe = s->safe;
  const uint32_t* contexts = g.contexts;
  const uint32_t* slots = g.slots;
  uint8_t* now = g.history + back;
  T* row = reinterpret_cast<T*>(g.tile);
  V x[K], left[K], length[K], of[K], value[K], more[K];
  for (int k = 0; k < K; ++k) {
    x[k] = RansVec::load(s->state + k * n);
    length[k] = RansVec::load(g.length + k * n);
    of[k] = RansVec::load(g.row + k * n);
    left[k] = RansVec::zero();
  }
  uint32_t shortest = g.length[0];
  for (int l = 1; l < lanes; ++l) shortest = g.length[l] < shortest ? g.length[l] : shortest;
  uint32_t column = 0, filled = 0;
  for (uint32_t i = 0; i < g.steps; ++i) {
    if (at > safe) {
      s->at = at;
      if (!s->refill()) return false;
      at = s->at;
      safe = s->safe;
    }
    if (column == 0)
      for (int k = 0; k < K; ++k) left[k] = RansVec::zero();
    const bool partial = i >= shortest;
    const V step = RansVec::set(i);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const V sum = RansVec::add(of[k], RansVec::add(left[k], RansVec::load8(now - back + k * n)));
      const V slot = RansVec::add(RansVec::gather(contexts, sum), RansVec::and_(x[k], mask));
      const V entry = RansVec::gather(slots, slot);
      const V y =
          RansVec::add(RansVec::mul(RansVec::and_(entry, RansVec::set(0x1fff)), RansVec::srlc(x[k], prec)),
                       RansVec::and_(RansVec::srl<13>(entry), RansVec::set(0xfff)));
      left[k] = RansVec::srl<25>(entry);
      if (partial) {
        const auto active = RansVec::greater(length[k], step);
        left[k] = RansVec::keep(active, left[k]);
        x[k] = RansVec::select(active, y, x[k]);
      } else {
        x[k] = y;
      }
      RansVec::store8(now + k * n, left[k]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) x[k] = RansVec::renorm(x[k], &at);
    bool raw_bits = false;
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      raw_bits |= RansVec::some(RansVec::greater(left[k], plain));
      value[k] = left[k];
    }
    if (raw_bits) {  // of some lane
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        V raw = RansVec::look(raws, left[k], big);
        if (partial) raw = RansVec::keep(RansVec::greater(length[k], step), raw);
        if (wide) {
          const V low = RansVec::min(raw, RansVec::set(16));
          more[k] = RansVec::sub(raw, low);
          raw = low;
        }
        value[k] = RansVec::add(RansVec::look(base, left[k], big),
                                RansVec::and_(x[k], RansVec::sub(RansVec::sllv(one, raw), one)));
        x[k] = RansVec::srlv(x[k], raw);
      }
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) x[k] = RansVec::renorm(x[k], &at);
      if (wide) {
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) {
          const V high = RansVec::and_(x[k], RansVec::sub(RansVec::sllv(one, more[k]), one));
          value[k] = RansVec::add(value[k], RansVec::template sll<16>(high));
          x[k] = RansVec::srlv(x[k], more[k]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) x[k] = RansVec::renorm(x[k], &at);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      V v = value[k];
      if (rotate)
        v = RansVec::or_(RansVec::srl<1>(v), RansVec::sll<8 * sizeof(T) - 1>(RansVec::and_(v, one)));
      rans_store(row + k * n, v);
    }
    now += lanes;
    row += lanes;
    if (++column == g.cols) column = 0;
    if (++filled == kRansTile) {
      rans_flush_tile<T>(g, i + 1 - filled, filled);
      filled = 0;
      row = reinterpret_cast<T*>(g.tile);
    }
  }
  rans_flush_tile<T>(g, g.steps - filled, filled);
  for (int k = 0; k < K; ++k) RansVec::store(s->state + k * n, x[k]);
  s->at = at;
  return true;
}
#endif

template <class T>
inline bool rans_group(const RansGroup& g, RansStream* s) {
#ifdef ACTZIP_RANS_VECTOR
  if (g.lanes == 32)
    return g.wide ? rans_group_vector<T, 32 / RansVec::n, true>(g, s)
                  : rans_group_vector<T, 32 / RansVec::n, false>(g, s);
  if (g.lanes == 16)
    return g.wide ? rans_group_vector<T, 16 / RansVec::n, true>(g, s)
                  : rans_group_vector<T, 16 / RansVec::n, false>(g, s);
#endif
  return rans_group_scalar<T>(g, s);
}

bool rans_decode_group(const RansGroup& g, RansStream* s) {
  if (g.width == 1) return rans_group<uint8_t>(g, s);
  if (g.width == 2) return rans_group<uint16_t>(g, s);
  return rans_group<uint32_t>(g, s);
}

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
