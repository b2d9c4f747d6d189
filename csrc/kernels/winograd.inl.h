// Winograd convolution that skips zeros: 3x3 kernels of stride 1, output tiles of M x M (M is 2, 4 or 6). The
// pixels of a tile are as far apart as the kernel's dilation says.
//
// A tile reads A x A pixels, A = M + 2, and a channel that is zero in all of them is zero in all A * A
// places of the transformed tile. So a tile is to this method what a pixel is to the others, and the product
// is A * A sparse 1x1 convolutions over tiles. No place depends on all pixels: those in the middle do not on
// the tile's border, those of the first row (column) do on even rows (columns) alone, of the last on odd
// ones. So each of these kinds of places has a mask of its own (see winograd_place).
//
//   input      [place][block][tile][64]
//   masks      [kind of place][block][tile]
//   weights    [place / P][block][channel][place % P][nv * vl]  (P: WinogradProducts::places)
//   products   [place][tile][nv * vl]
//
// Interpolation points: 0, 1, -1, infinity for M = 2; 0, +-1/sqrt(2), +-sqrt(2), infinity for M = 4, whose
// rounding error is a third of that of the usual 0, +-1, +-2; 0, +-1, +-2, +-1/2, infinity for M = 6 (Lavin
// and Gray, arXiv:1509.09308; points: Barabasz et al., arXiv:1803.10986). Each block of channels is summed
// by itself, which halves the error over many channels.

#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"
#include "kernels/pack.inl.h"
#include "kernels/sparse.inl.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

// B^T d.
template <int M>
AZ_INLINE void winograd_in(const vf* d, vf* o) {
  if constexpr (M == 2) {
    o[0] = d[0] - d[2];
    o[1] = d[1] + d[2];
    o[2] = d[2] - d[1];
    o[3] = d[3] - d[1];
  } else if constexpr (M == 4) {
    constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;
    const vf even_a = d[4] - 2.0f * d[2], odd_a = d[3] - 2.0f * d[1];
    const vf even_b = d[4] - 0.5f * d[2], odd_b = d[3] - 0.5f * d[1];
    o[0] = d[4] - 2.5f * d[2] + d[0];
    o[1] = even_a + kA * odd_a;
    o[2] = even_a - kA * odd_a;
    o[3] = even_b + kB * odd_b;
    o[4] = even_b - kB * odd_b;
    o[5] = d[5] - 2.5f * d[3] + d[1];
  } else {
    const vf even_a = d[6] + d[2] - 4.25f * d[4], odd_a = d[5] + d[1] - 4.25f * d[3];
    const vf even_b = d[6] + 0.25f * d[2] - 1.25f * d[4], odd_b = d[5] + 0.25f * d[1] - 1.25f * d[3];
    const vf even_c = d[6] + 4.0f * d[2] - 5.0f * d[4], odd_c = d[5] + 4.0f * d[1] - 5.0f * d[3];
    o[0] = d[6] - d[0] + 5.25f * (d[2] - d[4]);
    o[1] = even_a + odd_a;
    o[2] = even_a - odd_a;
    o[3] = even_b + 2.0f * odd_b;
    o[4] = even_b - 2.0f * odd_b;
    o[5] = even_c + 0.5f * odd_c;
    o[6] = even_c - 0.5f * odd_c;
    o[7] = d[7] - d[1] + 5.25f * (d[3] - d[5]);
  }
}

// A^T m.
template <int M>
AZ_INLINE void winograd_out(const vf* m, vf* o) {
  if constexpr (M == 2) {
    o[0] = m[0] + m[1] + m[2];
    o[1] = m[1] - m[2] + m[3];
  } else if constexpr (M == 4) {
    constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;
    const vf even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const vf even_b = m[3] + m[4], odd_b = m[3] - m[4];
    o[0] = m[0] + even_a + even_b;
    o[1] = kA * odd_a + kB * odd_b;
    o[2] = 0.5f * even_a + 2.0f * even_b;
    o[3] = kA * 0.5f * odd_a + kB * 2.0f * odd_b + m[5];
  } else {
    const vf even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const vf even_b = m[3] + m[4], odd_b = m[3] - m[4];
    const vf even_c = m[5] + m[6], odd_c = m[5] - m[6];
    o[0] = m[0] + even_a + even_b + even_c;
    o[1] = odd_a + 2.0f * odd_b + 0.5f * odd_c;
    o[2] = even_a + 4.0f * even_b + 0.25f * even_c;
    o[3] = odd_a + 8.0f * odd_b + 0.125f * odd_c;
    o[4] = even_a + 16.0f * even_b + 0.0625f * even_c;
    o[5] = m[7] + odd_a + 32.0f * odd_b + 0.03125f * odd_c;
  }
}

// Whether lanes are not zero, lane 0 lowest.
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

// What is non-zero of a tile's rows (columns), for places of its first one, the inner ones and its last one.
template <class T>
struct Kinds {
  T first, inner, last;
};
template <int M, class F>
AZ_INLINE auto kinds(F&& row) {
  auto even = row(2), odd = row(1);
#pragma GCC unroll 8
  for (int r = 4; r <= M; r += 2) {
    even |= row(r);
    odd |= row(r - 1);
  }
  return Kinds<decltype(even)>{even | row(0), even | odd, odd | row(M + 1)};
}

AZ_INLINE uint64_t winograd_lanes(uint64_t mask, int64_t g) {
  return (mask >> g) & ((uint64_t{1} << VL) - 1);
}

// B^T d of the pixels of one column, all channels of the block: [vector][row][VL], `to` on. Values of packed
// rows are read where `values` points, which moves on. `some`: the channels that are not zero.
template <int M>
AZ_INLINE void winograd_packed_column(const WinogradInput& w, int64_t x, const float** values, float* to,
                                      Kinds<uint64_t>* some) {
  constexpr int A = M + 2;
  *some = kinds<M>([&](int r) { return w.masks[r][x]; });
  for (int64_t g = 0; g < w.width; g += VL, to += A * VL) {
    vf d[A], o[A];
#pragma GCC unroll 8
    for (int r = 0; r < A; ++r) {
      const auto k = static_cast<uint32_t>(winograd_lanes(w.masks[r][x], g));
      d[r] = expand_vector(k, values[r]);
      __builtin_prefetch(values[r] + 192, 0, 3);
      values[r] += popcount(k);
    }
    winograd_in<M>(d, o);
#pragma GCC unroll 8
    for (int r = 0; r < A; ++r) store(to + r * VL, o[r]);
  }
}
template <int M>
AZ_INLINE void winograd_dense_column(const WinogradInput& w, int64_t x, float* to, Kinds<uint64_t>* some) {
  constexpr int A = M + 2;
  static const float kZeros[64]{};
  const float* rows[A];
  for (int r = 0; r < A; ++r) rows[r] = w.rows[r] == nullptr ? kZeros : w.rows[r] + x * w.pixel_stride;
  // Vectors may reach over the channels as long as there are pixels.
  const bool over = (w.iw - 1 - x) * w.pixel_stride >= (VL - w.width % VL) % VL;
  *some = {};
  for (int64_t g = 0; g < w.width; g += VL, to += A * VL) {
    const int64_t lanes = w.width - g;
    vf d[A], o[A];
#pragma GCC unroll 8
    for (int r = 0; r < A; ++r)
      d[r] = over || lanes >= VL ? load(rows[r] + g) : load_part(rows[r] + g, lanes);
    winograd_in<M>(d, o);
#pragma GCC unroll 8
    for (int r = 0; r < A; ++r) store(to + r * VL, o[r]);
    const Kinds<vi> any = kinds<M>([&](int r) { return reinterpret_cast<vi>(d[r]); });
    const auto add = [&](uint64_t& to_mask, vi v) {
      to_mask |= static_cast<uint64_t>(nonzero_lanes(reinterpret_cast<vf>(v))) << g;
    };
    add(some->first, any.first);
    add(some->inner, any.inner);
    add(some->last, any.last);
  }
  const uint64_t channels = w.width == 64 ? ~uint64_t{0} : (uint64_t{1} << w.width) - 1;
  some->first &= channels;
  some->inner &= channels;
  some->last &= channels;
}

// Columns of a tile, new ones over the oldest: transformed pixels, and their channels that are not zero.
template <int M>
struct WinogradRing {
  static constexpr int A = M + 2;
  alignas(64) float columns[A * A * 64];  // [column][vector][row][VL]
  Kinds<uint64_t> some[A];
};

// (B^T d) B of tile `t`, those vectors of its channels that are not zero, and its masks. Its first column is
// at START, so that they are found without counting.
template <int M, int START>
AZ_INLINE void winograd_across(const WinogradInput& w, const WinogradRing<M>& all, int64_t t) {
  constexpr int A = M + 2;
  const auto at = [&](int c) -> const Kinds<uint64_t>& { return all.some[(START + c) % A]; };
  const auto first = kinds<M>([&](int c) { return at(c).first; });
  const auto inner = kinds<M>([&](int c) { return at(c).inner; });
  const auto last = kinds<M>([&](int c) { return at(c).last; });
  const uint64_t of_kinds[kPlaceKinds] = {inner.inner, first.inner, last.inner, inner.first, inner.last,
                                          first.first, first.last,  last.first, last.last};
  for (int k = 0; k < kPlaceKinds; ++k) w.tile_masks[k * w.kind_stride + t] = of_kinds[k];
  const uint64_t mask = first.first | first.last | last.first | last.last;
  const int64_t width = w.width, stride = w.place_stride;
  const float* ring = all.columns;
  for (int64_t g = 0; g < width; g += VL, ring += A * VL) {
    if (winograd_lanes(mask, g) == 0) continue;
    float* const to = w.out + t * 64 + g;
    const auto row = [&](int r, float* front, float* middle, float* back) __attribute__((always_inline)) {
      vf d[A], o[A];
#pragma GCC unroll 8
      for (int c = 0; c < A; ++c) d[c] = load(ring + (START + c) % A * (A * 64) + r * VL);
      winograd_in<M>(d, o);
      const auto put = [&](float* place, vf v) { store(place, v); };
      put(front, o[0]);
#pragma GCC unroll 8
      for (int c = 1; c <= M; ++c, middle += stride) put(middle, o[c]);
      put(back, o[A - 1]);
    };
    const auto place = [&](int r, int c) { return to + winograd_place(M, r, c) * stride; };
    row(0, place(0, 0), place(0, 1), place(0, A - 1));
    float *front = place(1, 0), *middle = to, *back = place(1, A - 1);
    for (int r = 1; r <= M; ++r, front += stride, middle += M * stride, back += stride)
      row(r, front, middle, back);
    row(A - 1, place(A - 1, 0), place(A - 1, 1), place(A - 1, A - 1));
  }
}

// Tiles side by side. The two columns that neighbours share are transformed once.
template <int M>
void winograd_input(const WinogradInput& w) {
  constexpr int A = M + 2;
  WinogradRing<M> ring;
  const float* values[A];
  const bool packed = w.masks[0] != nullptr;
  int64_t x = w.x;
  if (packed) {
    const int64_t first = x < 0 ? (w.step - -x % w.step) % w.step : x;
    const int64_t before = (first < w.iw ? first : w.iw) - w.from;
    for (int r = 0; r < A; ++r) values[r] = w.rows[r] + count_values(w.masks[r] + w.from, before);
  }
  int start = 0;
  for (int64_t t = 0; t < w.tiles; ++t, start = (start + M) % A) {
    for (int c = t == 0 ? 0 : 2; c < A; ++c, x += w.step) {
      const int slot = (start + c) % A;
      float* const column = ring.columns + slot * (A * 64);
      if (x < 0 || x >= w.iw) {
        ring.some[slot] = {};
        memset(column, 0, static_cast<size_t>((w.width + VL - 1) / VL * VL * A) * sizeof(float));
      } else if (!packed) {
        winograd_dense_column<M>(w, x, column, &ring.some[slot]);
      } else {
        winograd_packed_column<M>(w, x, values, column, &ring.some[slot]);
        const int64_t between = (x + w.step < w.iw ? x + w.step : w.iw) - x - 1;
        if (between > 0)
          for (int r = 0; r < A; ++r) values[r] += count_values(w.masks[r] + x + 1, between);
      }
    }
    if (start == 0) winograd_across<M, 0>(w, ring, t);
    if (start == 2) winograd_across<M, 2>(w, ring, t);
    if constexpr (M > 2)
      if (start == 4) winograd_across<M, 4>(w, ring, t);
    if constexpr (M > 4)
      if (start == 6) winograd_across<M, 6>(w, ring, t);
  }
}

// P places of a tile at once: their masks are the same, and a visit has more to do.
template <int NV, int P>
AZ_INLINE void winograd_solo(const WinogradProduct& w, vf (*a)[NV], uint64_t m, const float* v) {
  for (; m != 0; m &= m - 1) {
    const int64_t k = ctz(m);
    const float* x = w.weight + k * (P * NV * VL);
    const float* at = v + k;
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const vf b = splat(at[p * w.values_stride]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[p][j] += b * load(x + (p * NV + j) * VL);
    }
  }
}

// The sums of a visit, to those of the blocks before it.
template <int NV, int P>
AZ_INLINE void winograd_store(const WinogradProduct& w, vf (*a)[NV], float* acc) {
  const bool first = w.first;
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      float* to = acc + p * w.acc_stride + j * VL;
      store(to, first ? a[p][j] : a[p][j] + load(to));
    }
}

// Two tiles, t and t + apart: channels that both have share the weights' loads. With each of them LINES of
// what is `next` are fetched: all at once would fill the buffers of the loads that are under way.
template <int NV, int P, int LINES>
AZ_INLINE void winograd_pair(const WinogradProduct& w, int64_t t, int64_t apart, const float* next) {
  const uint64_t m0 = w.masks[t], m1 = w.masks[t + apart];
  const float *const v = w.values + t * 64, *const second = v + apart * 64;
  const float* const end = next + w.next_lines * 16;
  vf a[P][NV]{}, c[P][NV]{};
  for (uint64_t m = m0 & m1; m != 0; m &= m - 1) {
    const int64_t k = ctz(m);
    next = fetch(next, LINES);
    const float* x = w.weight + k * (P * NV * VL);
    const float *v0 = v + k, *v1 = second + k;
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
  if (next < end) fetch(next, (end - next) / 16);
  winograd_solo<NV, P>(w, a, m0 & ~m1, v);
  winograd_solo<NV, P>(w, c, m1 & ~m0, second);
  winograd_store<NV, P>(w, a, w.acc + t * (NV * VL));
  winograd_store<NV, P>(w, c, w.acc + (t + apart) * (NV * VL));
}

template <int NV, int P>
AZ_INLINE void winograd_single(const WinogradProduct& w, int64_t t) {
  vf a[P][NV]{};
  winograd_solo<NV, P>(w, a, w.masks[t], w.values + t * 64);
  winograd_store<NV, P>(w, a, w.acc + t * (NV * VL));
}

// Tiles two by two along a row; one that is left over goes with that of the row below, rows two by two from
// an image's top. So who goes with whom, and the order of a sum, depends on the tile's place alone.
template <int NV, int P, int LINES>
AZ_INLINE void winograd_tiles(const WinogradProduct& w) {
  const float* next = w.next_weight;
  int64_t y = 0;
  for (int64_t row = 0; row < w.tiles; row += w.across, y = y + 1 < w.high ? y + 1 : 0)
    for (int64_t t = row; t < row + w.across; t += 2) {
      const bool left_over = t + 1 == row + w.across;
      if (left_over && y % 2 == 1) continue;  // done with the row above
      if (left_over && y + 1 == w.high) {
        fetch(next, w.next_lines);
        winograd_single<NV, P>(w, t);
      } else {
        winograd_pair<NV, P, LINES>(w, t, left_over ? w.across : 1, next);
      }
      next += w.next_lines * 16;
    }
}
template <int NV, int P>
void winograd_product(const WinogradProduct& w) {
  if (w.next_lines > 32)  // few tiles: the weights hardly come as fast as they are used
    winograd_tiles<NV, P, 3>(w);
  else
    winograd_tiles<NV, P, 1>(w);
}

// Places at once: two tiles' accumulators and what is multiplied stay in registers.
constexpr int winograd_places(int nv) {
  for (int p = 4; p > 1; p /= 2)
    if (2 * p * nv <= kRegisters * 3 / 4) return p;
  return 1;
}

AZ_INLINE vf greatest(vf a, vf b) { return a > b ? a : b; }

// One tile: `count` vectors from the products to M rows of M pixels, or the greatest of every POOL x POOL.
// Returns whether all are finite.
template <int M, int POOL>
bool winograd_output(const WinogradOutput& w) {
  constexpr int A = M + 2;
  vf sum{};
  for (int64_t j = 0; j < w.floats; j += VL) {
    vf s[M][A], above[M / POOL]{}, corners{};
    const vf bias = load(w.bias + j);
#pragma GCC unroll 8
    for (int c = 0; c < A; ++c) {
      vf m[A], x[M];
#pragma GCC unroll 8
      for (int r = 0; r < A; ++r) m[r] = load(w.acc + winograd_place(M, r, c) * w.place_stride + j);
      winograd_out<M>(m, x);
#pragma GCC unroll 8
      for (int r = 0; r < M; ++r) s[r][c] = x[r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
      vf o[M];
      winograd_out<M>(s[r], o);
#pragma GCC unroll 8
      for (int c = 0; c < M / POOL; ++c) {
        float* to = w.out + r / POOL * w.row_stride + c * w.pixel_stride + j;
        if constexpr (POOL == 1) {
          store(to, o[c] + bias);
        } else {
          const vf both = greatest(o[2 * c], o[2 * c + 1]);
          if (r % 2 == 1) store(to, greatest(above[c], both) + bias);
          above[c] = both;
        }
      }
      // What is not finite in any place is so in a corner.
      if (r == 0 || r == M - 1) corners += o[0] + o[M - 1];
    }
    sum += corners - corners;
  }
  bool finite = true;
  for (int l = 0; l < VL; ++l) finite &= sum[l] == 0.0f;
  return finite;
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
