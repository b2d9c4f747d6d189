// Convolutions of few output channels: vectors lie along a row of the map, not across channels.
#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

// OC output channels of NX vectors of positions; `count` positions are wanted.
template <int OC, int NX>
void lines_tile(const LinesTile& t) {
  vf a[OC][NX];
#pragma GCC unroll 8
  for (int o = 0; o < OC; ++o)
#pragma GCC unroll 8
    for (int j = 0; j < NX; ++j) a[o][j] = vf{};
  const float* w = t.weight;
  for (int64_t l = 0; l < t.lines; ++l) {
    if (t.in[l] == nullptr) {
      w += t.taps * OC;
      continue;
    }
    const float* const line = t.in[l] + t.first;
    for (int64_t k = 0; k < t.taps; ++k, w += OC) {
      const float* p = line + t.offsets[k];
      vf x[NX];
#pragma GCC unroll 8
      for (int j = 0; j < NX; ++j) {
        x[j] = load(p + j * VL);
        keep(x[j]);
      }
#pragma GCC unroll 8
      for (int o = 0; o < OC; ++o) {
        const vf b = splat(w[o]);
#pragma GCC unroll 8
        for (int j = 0; j < NX; ++j) a[o][j] += b * x[j];
      }
    }
  }
  const vf lo = splat(t.lo), hi = splat(t.hi);
  float sums[OC][NX * VL];
#pragma GCC unroll 8
  for (int o = 0; o < OC; ++o)
#pragma GCC unroll 8
    for (int j = 0; j < NX; ++j) {
      vf x = a[o][j] + splat(t.bias[o]);
      x = x < lo ? lo : x;
      store(sums[o] + j * VL, x > hi ? hi : x);
    }
  float* out = t.out + t.first * t.out_stride;
  for (int64_t i = 0; i < t.count; ++i, out += t.out_stride)
#pragma GCC unroll 8
    for (int o = 0; o < OC; ++o) out[o] = sums[o][i];
}

// VL positions, `far` floats apart, of VL channels (PART: of the first `channels` of them).
template <bool PART>
AZ_INLINE void split_block(const float* src, int64_t far, int64_t channels, float* dst, int64_t plane) {
  vf r[VL];
#pragma GCC unroll 16
  for (int i = 0; i < VL; ++i) r[i] = PART ? load_part(src + i * far, channels) : load(src + i * far);
  transpose(r);
#pragma GCC unroll 16
  for (int c = 0; c < VL; ++c)
    if (!PART || c < channels) store(dst + c * plane, r[c]);
}

// Positions [0, count) of a line, `stride` floats apart, to a line a channel, of the phases that positions
// `step` apart make: position i to dst[i % step * phase + i / step], the next channel's `plane` further.
void lines_split(const float* src, int64_t stride, int64_t channels, int64_t count, int64_t step,
                 int64_t phase, float* dst, int64_t plane) {
  for (int64_t r = 0; r < step; ++r, dst += phase, src += stride) {
    const int64_t many = (count - r + step - 1) / step, far = step * stride;
    for (int64_t c = 0; c < channels; c += VL) {
      const int64_t here = channels - c < VL ? channels - c : VL;
      const float* from = src + c;
      float* to = dst + c * plane;
      int64_t i = 0;
      if (here == VL)
        for (; i + VL <= many; i += VL) split_block<false>(from + i * far, far, VL, to + i, plane);
      else if (here * 4 >= VL && here > 1)
        for (; i + VL <= many; i += VL) split_block<true>(from + i * far, far, here, to + i, plane);
      for (; i < many; ++i)
        for (int64_t k = 0; k < here; ++k) to[k * plane + i] = from[i * far + k];
    }
  }
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
