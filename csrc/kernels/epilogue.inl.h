// What follows a convolution's sums: bias, residual and activation. The bias comes last: were it first, every
// product would be rounded to its magnitude.
#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

// step * min(max(round(x / step), lo), hi)
AZ_INLINE vf quantize(vf x, vf lo, vf hi, vf step) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds
  x = x / step;
  x = x < lo ? lo : x;
  x = x > hi ? hi : x;
  return ((x + magic) - magic) * step;
}

// Comparisons are written so that NaN stays NaN.
template <int ACT>
AZ_INLINE vf activate(vf x, vf lo, vf hi, vf step) {
  const vf zero{};
  if constexpr (ACT == 1) return x < zero ? zero : x;
  if constexpr (ACT == 2) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
  }
  if constexpr (ACT == 3) return x <= lo ? zero : x;
  if constexpr (ACT == 4) return quantize(x, lo, hi, step);
  return x;
}

AZ_INLINE vf before_residual(const EpilogueRow& e, vf x) {
  return e.pre_step == 0 ? x : quantize(x, splat(e.pre_lo), splat(e.pre_hi), splat(e.pre_step));
}

template <int ACT>
void epilogue_act(const EpilogueRow& e) {
  const vf hi = splat(e.hi), step = splat(e.step);
  for (int64_t i = 0; i < e.count; ++i) {
    float* a = e.acc + i * e.acc_stride;
    const float* res = e.residual == nullptr ? nullptr : e.residual + i * e.residual_stride;
    float* out = e.out == nullptr ? nullptr : e.out + i * e.out_stride;
    int64_t j = 0;
    for (; j + VL <= e.width; j += VL) {
      vf x = load(a + j);
      if (e.bias != nullptr) x += load(e.bias + j);
      if (res != nullptr) x = before_residual(e, x) + load(res + j);
      const vf lo = ACT == 3 && e.thresholds != nullptr ? load(e.thresholds + j) : splat(e.lo);
      x = activate<ACT>(x, lo, hi, step);
      store(out != nullptr ? out + j : a + j, x);
    }
    if (j < e.width) {
      vf x = load(a + j);
      if (e.bias != nullptr) x += load(e.bias + j);
      if (res != nullptr) x = before_residual(e, x) + load_part(res + j, e.width - j);
      const vf lo = ACT == 3 && e.thresholds != nullptr ? load(e.thresholds + j) : splat(e.lo);
      x = activate<ACT>(x, lo, hi, step);
      if (out == nullptr)
        store(a + j, x);
      else
        store_part(out + j, x, e.width - j);
    }
  }
}

void epilogue(const EpilogueRow& e) {
  switch (e.act) {
    case 1:
      return epilogue_act<1>(e);
    case 2:
      return epilogue_act<2>(e);
    case 3:
      return epilogue_act<3>(e);
    case 4:
      return epilogue_act<4>(e);
    default:
      return epilogue_act<0>(e);
  }
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
