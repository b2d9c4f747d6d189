// Winograd convolution that skips zeros: 3x3 kernels of stride 1, output tiles of M x M (M is 2 or 4).
//
// A tile reads A x A pixels, A = M + 2, and a channel that is zero in all of them is zero in all A * A
// places of the transformed tile. So a tile is to this method what a pixel is to the others: it has a mask a
// block, which its A * A places share, and the product is A * A sparse 1x1 convolutions over tiles.
//
//   input      [place][block][tile][64]  values of the mask's channels, in order (kCompact), or of all
//   weights    [place / P][block][channel][place % P][nv * vl]  (P: WinogradProducts::places)
//   products   [place][tile][nv * vl]
//
// Interpolation points: 0, 1, -1, infinity for M = 2; 0, +-1/sqrt(2), +-sqrt(2), infinity for M = 4, whose
// rounding error is a third of that of the usual 0, +-1, +-2 (Lavin and Gray, arXiv:1509.09308; points:
// Barabasz et al., arXiv:1803.10986).

#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"
#include "kernels/sparse.inl.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

#if defined(__BMI2__)
constexpr bool kCompact = true;
AZ_INLINE uint64_t extract(uint64_t mask, uint64_t from) { return _pext_u64(mask, from); }
#else
constexpr bool kCompact = false;
AZ_INLINE uint64_t extract(uint64_t mask, uint64_t) { return mask; }
#endif

// Lane l is the next of the values at p where bit l is set, else zero. p is readable 64 bytes on.
AZ_INLINE vf spread(uint32_t bits, const float* p) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vf>(_mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(p)));
#elif ACTZIP_VL == 8
  const uint64_t some = _pdep_u64(bits, 0x0101010101010101ull) * 0xff;
  const uint64_t lanes = _pdep_u64(0x0706050403020100ull, some);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes)));
  const __m256i keep = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(some)));
  const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index);
  return reinterpret_cast<vf>(_mm256_and_ps(v, _mm256_castsi256_ps(keep)));
#else
  vf v{};
  for (int l = 0; l < VL; ++l) {
    if (((bits >> l) & 1) != 0) v[l] = *p++;
  }
  return v;
#endif
}

// B^T d.
template <int M>
AZ_INLINE void winograd_in(const vf* d, vf* o) {
  if constexpr (M == 2) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[3] - d[1];
  } else {
    constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;
    const vf even_a = d[4] - 2.0f * d[2], odd_a = d[3] - 2.0f * d[1];
    const vf even_b = d[4] - 0.5f * d[2], odd_b = d[3] - 0.5f * d[1];
    o[0] = d[4] - 2.5f * d[2] + d[0];
    o[1] = even_a + kA * odd_a;
    o[2] = even_a - kA * odd_a;
    o[3] = even_b + kB * odd_b;
    o[4] = even_b - kB * odd_b;
    o[5] = d[5] - 2.5f * d[3] + d[1];
  }
}

// A^T m.
template <int M>
AZ_INLINE void winograd_out(const vf* m, vf* o) {
  if constexpr (M == 2) {
    o[0] = m[0] + m[1] + m[2];
    o[1] = m[1] - m[2] + m[3];
  } else {
    constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;
    const vf even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const vf even_b = m[3] + m[4], odd_b = m[3] - m[4];
    o[0] = m[0] + even_a + even_b;
    o[1] = kA * odd_a + kB * odd_b;
    o[2] = 0.5f * even_a + 2.0f * even_b;
    o[3] = kA * 0.5f * odd_a + kB * 2.0f * odd_b + m[5];
  }
}

// The lanes whose bits are set, side by side; all of them where tiles keep their channels' places.
AZ_INLINE vf squeeze(uint32_t bits, vf v) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vf>(
      _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(v)));
#elif ACTZIP_VL == 8
  const uint64_t some = _pdep_u64(bits, 0x0101010101010101ull) * 0xff;
  const uint64_t lanes = _pext_u64(0x0706050403020100ull, some);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes)));
  return reinterpret_cast<vf>(_mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), index));
#else
  (void)bits;
  return v;
#endif
}

// Lanes that are not zero, lane 0 lowest.
AZ_INLINE uint32_t nonzero_lanes(vf v) {
#if ACTZIP_VL == 16
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif ACTZIP_VL == 8
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(v), _mm256_setzero_ps(), _CMP_NEQ_UQ)));
#else
  uint32_t k = 0;
  for (int l = 0; l < VL; ++l) k |= static_cast<uint32_t>(v[l] != 0) << l;
  return k;
#endif
}

// B^T d B of a tile of vectors, place by place through put(place, vector).
template <int M, class Get, class Put>
AZ_INLINE void winograd_tile(Get&& get, Put&& put) {
  constexpr int A = M + 2;
  vf e[A][A];
#pragma GCC unroll 8
  for (int c = 0; c < A; ++c) {
    vf d[A], o[A];
#pragma GCC unroll 8
    for (int r = 0; r < A; ++r) d[r] = get(r, c);
    winograd_in<M>(d, o);
#pragma GCC unroll 8
    for (int r = 0; r < A; ++r) e[r][c] = o[r];
  }
#pragma GCC unroll 8
  for (int r = 0; r < A; ++r) {
    vf o[A];
    winograd_in<M>(e[r], o);
#pragma GCC unroll 8
    for (int c = 0; c < A; ++c) put(r * A + c, o[c]);
  }
}

// Tiles side by side, of one block of a packed map.
template <int M>
void winograd_packed(const WinogradInput& w) {
  constexpr int A = M + 2;
  const float* at[A];  // the values of each row's pixel x0 or, left of the row, of its first
  for (int r = 0; r < A; ++r) {
    at[r] = w.values[r];
    for (int64_t x = 0; x < w.x && x < w.iw; ++x) at[r] += popcount(w.masks[r][x]);
  }
  float* to = w.out;
  for (int64_t t = 0; t < w.tiles; ++t, to += 64) {
    const int64_t x0 = w.x + t * M;
    uint64_t mask[A][A], all = 0;
    const float* from[A][A];
    for (int r = 0; r < A; ++r) {
      const float* p = at[r];
#pragma GCC unroll 8
      for (int c = 0; c < A; ++c) {
        const bool inside = static_cast<uint64_t>(x0 + c) < static_cast<uint64_t>(w.iw);
        const uint64_t bits = inside ? w.masks[r][x0 + c] : 0;
        mask[r][c] = bits;
        from[r][c] = p;
        all |= bits;
        p += popcount(bits);
      }
      at[r] = from[r][M];
    }
    w.tile_masks[t] = all;
    if (all == 0) continue;
    if constexpr (kCompact)
      for (int r = 0; r < A; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < A; ++c) mask[r][c] = extract(mask[r][c], all);
    const int64_t width = kCompact ? popcount(all) : w.width;
    for (int64_t g = 0; g < width; g += VL)
      winograd_tile<M>(
          [&](int r, int c) __attribute__((always_inline)) {
            const auto bits = static_cast<uint32_t>(mask[r][c] >> g) & ((uint32_t{1} << VL) - 1);
            const vf v = spread(bits, from[r][c]);
            from[r][c] += popcount(bits);
            return v;
          },
          [&](int p, vf v) __attribute__((always_inline)) { store(to + p * w.place_stride + g, v); });
  }
}

// The same of a dense map, whose masks are found here.
template <int M>
void winograd_dense(const WinogradInput& w) {
  constexpr int A = M + 2;
  alignas(64) static const float zeros[64] = {};
  float* to = w.out;
  for (int64_t t = 0; t < w.tiles; ++t, to += 64) {
    const int64_t x0 = w.x + t * M;
    const float* from[A][A];
    for (int r = 0; r < A; ++r)
      for (int c = 0; c < A; ++c) {
        const bool inside =
            w.values[r] != nullptr && static_cast<uint64_t>(x0 + c) < static_cast<uint64_t>(w.iw);
        from[r][c] = inside ? w.values[r] + (x0 + c) * w.pixel_stride : zeros;
      }
    uint64_t all = 0;
    int64_t rank = 0;
    for (int64_t g = 0; g < w.width; g += VL) {
      const int64_t lanes = w.width - g;
      vf d[A][A];
      vi any{};
#pragma GCC unroll 8
      for (int r = 0; r < A; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < A; ++c) {
          d[r][c] = lanes >= VL ? load(from[r][c] + g) : load_part(from[r][c] + g, lanes);
          any |= reinterpret_cast<vi>(d[r][c]);
        }
      const uint32_t bits = nonzero_lanes(reinterpret_cast<vf>(any));
      if (bits == 0) continue;
      all |= static_cast<uint64_t>(bits) << g;
      const int64_t place = kCompact ? rank : g;
      winograd_tile<M>([&](int r, int c) __attribute__((always_inline)) { return d[r][c]; },
                       [&](int p, vf v) __attribute__((always_inline)) {
                         store(to + p * w.place_stride + place, squeeze(bits, v));
                       });
      rank += popcount(bits);
    }
    w.tile_masks[t] = all;
  }
}

AZ_INLINE int64_t winograd_rank(uint64_t mask, int64_t k) {
  if constexpr (kCompact) return place(mask, k);
  return k;
}

// P places of a tile at once: their masks are the same, and a visit has more to do.
template <int NV, int P>
AZ_INLINE void winograd_solo(const WinogradProduct& w, vf (*a)[NV], uint64_t m, uint64_t all,
                             const float* v) {
  for (; m != 0; m &= m - 1) {
    const int64_t k = ctz(m);
    const float* x = w.weight + k * (P * NV * VL);
    const float* at = v + winograd_rank(all, k);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const vf b = splat(at[p * w.values_stride]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[p][j] += b * load(x + (p * NV + j) * VL);
    }
  }
}

template <int NV, int P>
AZ_INLINE void winograd_load(const WinogradProduct& w, vf (*a)[NV], const float* acc) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) a[p][j] = w.first ? vf{} : load(acc + p * w.acc_stride + j * VL);
}

template <int NV, int P>
AZ_INLINE void winograd_store(const WinogradProduct& w, vf (*a)[NV], float* acc) {
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store(acc + p * w.acc_stride + j * VL, a[p][j]);
}

// Two tiles: channels that both have share the weights' loads.
template <int NV, int P>
AZ_INLINE void winograd_pair(const WinogradProduct& w, const uint64_t* masks, const float* v, float* acc) {
  const uint64_t m0 = masks[0], m1 = masks[1];
  vf a[P][NV], c[P][NV];
  winograd_load<NV, P>(w, a, acc);
  winograd_load<NV, P>(w, c, acc + NV * VL);
  for (uint64_t m = m0 & m1; m != 0; m &= m - 1) {
    const int64_t k = ctz(m);
    const float* x = w.weight + k * (P * NV * VL);
    const float *v0 = v + winograd_rank(m0, k), *v1 = v + 64 + winograd_rank(m1, k);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const vf b0 = splat(v0[p * w.values_stride]), b1 = splat(v1[p * w.values_stride]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        vf y = load(x + (p * NV + j) * VL);
        keep(y);
        a[p][j] += b0 * y;
        c[p][j] += b1 * y;
      }
    }
  }
  winograd_solo<NV, P>(w, a, m0 & ~m1, m0, v);
  winograd_solo<NV, P>(w, c, m1 & ~m0, m1, v + 64);
  winograd_store<NV, P>(w, a, acc);
  winograd_store<NV, P>(w, c, acc + NV * VL);
}

template <int NV, int P>
AZ_INLINE void winograd_single(const WinogradProduct& w, const uint64_t* masks, const float* v, float* acc) {
  vf a[P][NV];
  winograd_load<NV, P>(w, a, acc);
  winograd_solo<NV, P>(w, a, *masks, *masks, v);
  winograd_store<NV, P>(w, a, acc);
}

// Pairs never reach over the end of a tile row: the order of a sum then depends on the tile's place alone.
template <int NV, int P>
void winograd_product(const WinogradProduct& w) {
  const float* next = w.next_weight;
  for (int64_t row = 0; row < w.tiles; row += w.across)
    for (int64_t t = row; t < row + w.across; t += 2) {
      next = fetch(next, w.next_lines);
      if (t + 1 < row + w.across)
        winograd_pair<NV, P>(w, w.masks + t, w.values + t * 64, w.acc + t * (NV * VL));
      else
        winograd_single<NV, P>(w, w.masks + t, w.values + t * 64, w.acc + t * (NV * VL));
    }
}

// Places at once: two tiles' accumulators and what is multiplied stay in registers.
constexpr int winograd_places(int nv) {
  for (int p = 4; p > 1; p /= 2)
    if (2 * p * nv <= kRegisters * 3 / 4) return p;
  return 1;
}

// One tile: `count` vectors from the products to M rows of M pixels. Returns whether all are finite.
template <int M>
bool winograd_output(const WinogradOutput& w) {
  constexpr int A = M + 2;
  vf sum{};
  for (int64_t j = 0; j < w.floats; j += VL) {
    vf s[M][A], o[M][M];
    const vf bias = load(w.bias + j);
#pragma GCC unroll 8
    for (int c = 0; c < A; ++c) {
      vf m[A], x[M];
#pragma GCC unroll 8
      for (int r = 0; r < A; ++r) m[r] = load(w.acc + (r * A + c) * w.place_stride + j);
      winograd_out<M>(m, x);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) s[r][c] = x[r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      winograd_out<M>(s[r], o[r]);
#pragma GCC unroll 8
      for (int c = 0; c < M; ++c) store(w.out + r * w.row_stride + c * w.pixel_stride + j, o[r][c] + bias);
    }
    // What is not finite in any place is so in a corner.
    const vf corners = (o[0][0] + o[0][M - 1]) + (o[M - 1][0] + o[M - 1][M - 1]);
    sum += corners - corners;
  }
  bool finite = true;
  for (int l = 0; l < VL; ++l) finite &= sum[l] == 0.0f;
  return finite;
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
