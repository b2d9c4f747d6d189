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

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
