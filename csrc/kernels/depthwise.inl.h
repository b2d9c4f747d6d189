// Depthwise kernels: rows of some channels.
#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

AZ_INLINE void depthwise_store(float* to, int64_t lanes, vf x, vf lo, vf hi) {
  x = x < lo ? lo : x;
  x = x > hi ? hi : x;
  if (lanes >= VL)
    store(to, x);
  else
    store_part(to, x, lanes);
}

// A kernel without a faster form: any size, one pixel at a time.
void depthwise_pixel(const DepthwiseRow& d, int64_t i) {
  const int64_t x0 = (d.first + i) * d.sw - d.pad_left;
  const float* w = d.weight;
  for (int64_t c = 0; c < d.channels; c += VL, w += d.kh * d.kw * VL) {
    const int64_t lanes = d.channels - c;
    vf a = load(d.bias + c);
    for (int64_t ky = 0; ky < d.kh; ++ky) {
      if (d.rows[ky] == nullptr) continue;
      for (int64_t kx = 0; kx < d.kw; ++kx) {
        const int64_t x = x0 + kx * d.dw;
        if (x < 0 || x >= d.iw) continue;
        const float* p = d.rows[ky] + x * d.in_stride + c;
        a += (lanes >= VL ? load(p) : load_part(p, lanes)) * load(w + (ky * d.kw + kx) * VL);
      }
    }
    depthwise_store(d.acc + i * d.acc_stride + c, lanes, a, splat(d.lo), splat(d.hi));
  }
}

// One vector of channels of PX neighbouring pixels: their K x K windows, which begin at `at` of the rows,
// share what they load. EDGE: columns may lie outside the map, x0 is the first. The sums of eight pixels hide
// the latency of one addition behind the next; an address that steps from column to column needs one register
// where GCC would take one a column, and spill them. Kernel rows stay a loop: unrolled, the code is three
// times as large, and five times as long to compile, for 5 to 10 % in the first-level cache.
template <int K, int SW, int PX, bool EDGE, bool PART>
AZ_INLINE void depthwise_group(const float* const (&rows)[K], int64_t at, int64_t stride, const float* w,
                               vf bias, int64_t lanes, int64_t x0, int64_t iw, vf (&a)[PX]) {
  constexpr int COLUMNS = (PX - 1) * SW + K;
#pragma GCC unroll 8
  for (int j = 0; j < PX; ++j) a[j] = bias;
  for (int ky = 0; ky < K; ++ky, w += K * VL) {
    if (rows[ky] == nullptr) continue;
    const float* p = rows[ky] + at;
    vf k[K];
#pragma GCC unroll 8
    for (int x = 0; x < K; ++x) {
      k[x] = load(w + x * VL);
      keep(k[x]);
    }
    unrolled<COLUMNS>([&](auto x) AZ_LAMBDA {
      if (!EDGE || static_cast<uint64_t>(x0 + x) < static_cast<uint64_t>(iw)) {
        vf v = PART ? load_part(p, lanes) : load(p);
        keep(v);
#pragma GCC unroll 8
        for (int j = 0; j < PX; ++j)
          if (x - j * SW >= 0 && x - j * SW < K) a[j] += v * k[x - j * SW];
      }
      p = step(p, stride);
    });
  }
}

// All channels of PX pixels from i on, of which `pixels` are wanted. What the loop needs is in local
// variables: GCC would read it again for each vector.
template <int K, int SW, int PX, bool EDGE>
AZ_INLINE void depthwise_pixels(const DepthwiseRow& d, int64_t i, int64_t pixels) {
  const float* rows[K];
#pragma GCC unroll 8
  for (int ky = 0; ky < K; ++ky) rows[ky] = d.rows[ky];
  const int64_t stride = d.in_stride, out_stride = d.acc_stride, channels = d.channels, iw = d.iw;
  const int64_t x0 = (d.first + i) * SW - d.pad_left;
  const vf lo = splat(d.lo), hi = splat(d.hi);
  const float *w = d.weight, *bias = d.bias;
  float* out = d.acc + i * out_stride;
  int64_t at = x0 * stride, c = 0;
  vf a[PX];
  const auto store_all = [&](int64_t lanes) AZ_LAMBDA {
    float* to = out;
    unrolled<PX>([&](auto j) AZ_LAMBDA {
      if (!EDGE || j < pixels) depthwise_store(to, lanes, a[j], lo, hi);
      to = step(to, out_stride);
    });
  };
  for (; c + VL <= channels; c += VL, at += VL, w += K * K * VL, bias += VL, out += VL) {
    depthwise_group<K, SW, PX, EDGE, false>(rows, at, stride, w, load(bias), VL, x0, iw, a);
    store_all(VL);
  }
  if (c == channels) return;
  depthwise_group<K, SW, PX, EDGE, true>(rows, at, stride, w, load(bias), channels - c, x0, iw, a);
  store_all(channels - c);
}

template <int K, int SW, int PX>
AZ_INLINE void depthwise_at(const DepthwiseRow& d, int64_t i) {
  const int64_t x0 = (d.first + i) * SW - d.pad_left;
  if (x0 >= 0 && x0 + (PX - 1) * SW + K <= d.iw && i + PX <= d.count)
    depthwise_pixels<K, SW, PX, false>(d, i, PX);
  else
    depthwise_pixels<K, SW, PX, true>(d, i, d.count - i);
}

// Groups of eight pixels, where the registers hold them beside a row of weights, then of four. The last group
// begins earlier, where there are pixels enough, and computes some of them again.
template <int K, int SW>
void depthwise_size(const DepthwiseRow& d) {
  constexpr int kOthers = VL > 4 || kRegisters == 32 ? 1 : 2;  // a pixel, and a product where there is no FMA
  constexpr int PX = 8 + K + kOthers <= kRegisters ? 8 : 4;
  int64_t i = 0;
  for (; i + PX <= d.count; i += PX) depthwise_at<K, SW, PX>(d, i);
  if (PX == 8 && d.count - i > 4 && d.count >= PX) {
    depthwise_at<K, SW, PX>(d, d.count - PX);
    return;
  }
  for (; i < d.count; i += 4) depthwise_at<K, SW, 4>(d, i + 4 > d.count && d.count >= 4 ? d.count - 4 : i);
}

void depthwise_row(const DepthwiseRow& d) {
  if (d.dw == 1 && d.kh == d.kw) {
    if (d.kw == 3 && d.sw == 1) return depthwise_size<3, 1>(d);
    if (d.kw == 3 && d.sw == 2) return depthwise_size<3, 2>(d);
    if (d.kw == 5 && d.sw == 1) return depthwise_size<5, 1>(d);
    if (d.kw == 5 && d.sw == 2) return depthwise_size<5, 2>(d);
    if (d.kw == 7 && d.sw == 1) return depthwise_size<7, 1>(d);
  }
  for (int64_t i = 0; i < d.count; ++i) depthwise_pixel(d, i);
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
