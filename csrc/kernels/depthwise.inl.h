// Depthwise kernels: rows of some channels.
#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

AZ_INLINE void depthwise_store(const DepthwiseRow& d, int64_t i, int64_t c, int64_t lanes, vf x) {
  const vf lo = splat(d.lo), hi = splat(d.hi);
  x = x < lo ? lo : x;
  x = x > hi ? hi : x;
  float* to = d.acc + i * d.acc_stride + c;
  if (lanes >= VL)
    store(to, x);
  else
    store_part(to, x, lanes);
}

// A kernel without a faster form: any size, one pixel at a time.
AZ_INLINE void depthwise_pixel(const DepthwiseRow& d, int64_t i, int64_t c, int64_t lanes) {
  const int64_t x0 = (d.first + i) * d.sw - d.pad_left;
  vf a = load(d.bias + c);
  for (int64_t ky = 0; ky < d.kh; ++ky) {
    const float* row = d.rows[ky];
    if (row == nullptr) continue;
    for (int64_t kx = 0; kx < d.kw; ++kx) {
      const int64_t x = x0 + kx * d.dw;
      if (x < 0 || x >= d.iw) continue;
      const float* p = row + x * d.in_stride + c;
      a += (lanes >= VL ? load(p) : load_part(p, lanes)) *
           load(d.weight + (ky * d.kw + kx) * d.weight_stride + c);
    }
  }
  depthwise_store(d, i, c, lanes, a);
}

// PX neighbouring pixels at once, of which `pixels` are wanted: their windows share what they load. EDGE:
// columns may lie outside the map.
template <int KW, int SW, int PX, bool EDGE, bool PART>
AZ_INLINE void depthwise_group(const DepthwiseRow& d, int64_t i, int64_t pixels, int64_t c) {
  constexpr int COLUMNS = (PX - 1) * SW + KW;
  const int64_t x0 = (d.first + i) * SW - d.pad_left, lanes = d.channels - c;
  vf a[PX];
#pragma GCC unroll 8
  for (int j = 0; j < PX; ++j) a[j] = load(d.bias + c);
  for (int64_t ky = 0; ky < d.kh; ++ky) {
    if (d.rows[ky] == nullptr) continue;
    const float* p = d.rows[ky] + x0 * d.in_stride + c;
    const float* w = d.weight + ky * KW * d.weight_stride + c;
    vf k[KW];
#pragma GCC unroll 8
    for (int x = 0; x < KW; ++x) {
      k[x] = load(w + x * d.weight_stride);
      keep(k[x]);
    }
#pragma GCC unroll 16
    for (int x = 0; x < COLUMNS; ++x) {
      if (EDGE && static_cast<uint64_t>(x0 + x) >= static_cast<uint64_t>(d.iw)) continue;
      vf v = PART ? load_part(p + x * d.in_stride, lanes) : load(p + x * d.in_stride);
      keep(v);
#pragma GCC unroll 8
      for (int j = 0; j < PX; ++j)
        if (x - j * SW >= 0 && x - j * SW < KW) a[j] += v * k[x - j * SW];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < PX; ++j)
    if (!EDGE || j < pixels) depthwise_store(d, i + j, c, PART ? lanes : VL, a[j]);
}

template <int KW, int SW, int PX, bool EDGE>
AZ_INLINE void depthwise_channels(const DepthwiseRow& d, int64_t i, int64_t pixels) {
  int64_t c = 0;
  for (; c + VL <= d.channels; c += VL) depthwise_group<KW, SW, PX, EDGE, false>(d, i, pixels, c);
  if (c < d.channels) depthwise_group<KW, SW, PX, EDGE, true>(d, i, pixels, c);
}

// The last group begins earlier, where there are pixels enough, and computes some of them again.
template <int KW, int SW>
void depthwise_size(const DepthwiseRow& d) {
  constexpr int PX = 4;
  for (int64_t at = 0; at < d.count; at += PX) {
    const int64_t i = at + PX > d.count && d.count >= PX ? d.count - PX : at;
    const int64_t x0 = (d.first + i) * SW - d.pad_left;
    if (x0 >= 0 && x0 + (PX - 1) * SW + KW <= d.iw && i + PX <= d.count)
      depthwise_channels<KW, SW, PX, false>(d, i, PX);
    else
      depthwise_channels<KW, SW, PX, true>(d, i, d.count - i);
  }
}

void depthwise_row(const DepthwiseRow& d) {
  if (d.dw == 1 && d.kw == 3 && d.sw == 1) return depthwise_size<3, 1>(d);
  if (d.dw == 1 && d.kw == 3 && d.sw == 2) return depthwise_size<3, 2>(d);
  if (d.dw == 1 && d.kw == 5 && d.sw == 1) return depthwise_size<5, 1>(d);
  if (d.dw == 1 && d.kw == 5 && d.sw == 2) return depthwise_size<5, 2>(d);
  if (d.dw == 1 && d.kw == 7 && d.sw == 1) return depthwise_size<7, 1>(d);
  for (int64_t i = 0; i < d.count; ++i)
    for (int64_t c = 0; c < d.channels; c += VL) depthwise_pixel(d, i, c, d.channels - c);
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
