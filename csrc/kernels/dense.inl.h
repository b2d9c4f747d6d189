// The dense kernel: a tile of pixels times output channels in registers.
#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

// What stands between the loops is read from memory again: kept in registers, it would push loop variables
// out into vector registers (GCC does), and on their way back they wait for all multiplications before them.
template <int MR, int NV>
void dense_tile(const DenseTile& tile) {
  const DenseTile* volatile kept = &tile;
  vf a[MR][NV];
  if (tile.first) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[m][j] = vf{};
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[m][j] = load(tile.acc + m * tile.acc_stride + j * VL);
  }
  for (int64_t tap = 0; tap < kept->taps; ++tap) {
    const DenseTile& t = *kept;
    const float* const* const table = t.in + tap * t.in_table_stride;
    const float* p[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) p[m] = table[m] + t.in_offset;
    const float* w = t.weight + t.tap_ids[tap] * t.weight_tap_stride;
    const int64_t depth = t.depth;
    for (int64_t k = 0; k < depth; ++k, w += NV * VL) {
      vf x[NV];
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) x[j] = load(w + j * VL);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const vf b = splat(p[m][k]);
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) a[m][j] += b * x[j];
      }
    }
  }
  const DenseTile& t = *kept;
  if (t.bias != nullptr) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      const vf x = load(t.bias + j * VL);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) a[m][j] += x;
    }
  }
  if (t.residual != nullptr) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        const float* r = t.residual + m * t.residual_stride + j * VL;
        a[m][j] += j < NV - 1 || t.last == VL ? load(r) : load_part(r, t.last);
      }
  }
  if (t.floor) {
    const vf lo = splat(t.lo);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[m][j] = a[m][j] < lo ? lo : a[m][j];
  }
  if (t.ceiling) {
    const vf hi = splat(t.hi);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[m][j] = a[m][j] > hi ? hi : a[m][j];
  }
  if (t.last < VL) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      float* to = t.acc + m * t.acc_stride;
#pragma GCC unroll 16
      for (int j = 0; j < NV - 1; ++j) store(to + j * VL, a[m][j]);
      store_part(to + (NV - 1) * VL, a[m][NV - 1], t.last);
    }
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store(t.acc + m * t.acc_stride + j * VL, a[m][j]);
}

// Vector J of the three that a vector of pixels makes. Its lanes are, with four of them:
//
//   a0 b0 c0 a1   b1 c1 a2 b2   c2 a3 b3 c3
template <int J, int... L>
AZ_INLINE vf interleaved(vf a, vf b, vf c, std::integer_sequence<int, L...>) {
#define AZ_PIXEL ((J * VL + L) / 3)
#define AZ_PLANE ((J * VL + L) % 3)
#if defined(__clang__) || __GNUC__ >= 12
  const vf ab = __builtin_shufflevector(a, b, (AZ_PLANE == 1 ? VL + AZ_PIXEL : AZ_PIXEL)...);
  return __builtin_shufflevector(ab, c, (AZ_PLANE == 2 ? VL + AZ_PIXEL : L)...);
#else
  const vf ab = __builtin_shuffle(a, b, vi{(AZ_PLANE == 1 ? VL + AZ_PIXEL : AZ_PIXEL)...});
  return __builtin_shuffle(ab, c, vi{(AZ_PLANE == 2 ? VL + AZ_PIXEL : L)...});
#endif
#undef AZ_PIXEL
#undef AZ_PLANE
}

void interleave3(const float* src, int64_t plane, int64_t count, float* dst) {
  constexpr auto lanes = std::make_integer_sequence<int, VL>{};
  int64_t x = 0;
  for (; x + VL <= count; x += VL, dst += 3 * VL) {
    const vf a = load(src + x), b = load(src + plane + x), c = load(src + 2 * plane + x);
    store(dst, interleaved<0>(a, b, c, lanes));
    store(dst + VL, interleaved<1>(a, b, c, lanes));
    store(dst + 2 * VL, interleaved<2>(a, b, c, lanes));
  }
  for (; x < count; ++x, dst += 3)
    for (int64_t c = 0; c < 3; ++c) dst[c] = src[c * plane + x];
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
