// The transforms of one-dimensional kernels: F(4, 4), linear combinations of seven pixels or places.
#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

void cook_input(const CookInput& t) {
  for (int64_t c = 0; c < t.channels; c += VL) {
    vf x[kCookPlaces];
    for (int i = 0; i < kCookPlaces; ++i)
      x[i] = t.pixels[i] == nullptr ? vf{}
             : c + VL <= t.channels ? load(t.pixels[i] + c)
                                    : load_part(t.pixels[i] + c, t.channels - c);
    for (int p = 0; p < kCookPlaces; ++p) {
      vf sum{};
#pragma GCC unroll 8
      for (int i = 0; i < kCookPlaces; ++i) sum += x[i] * splat(t.matrix[p * kCookPlaces + i]);
      store(t.out + p * t.place_stride + c, sum);
    }
  }
}

bool cook_output(const CookOutput& t) {
  vf wrong{};
  const vf zero{};
  for (int64_t c = 0; c < t.floats; c += VL) {
    vf x[kCookPlaces];
#pragma GCC unroll 8
    for (int p = 0; p < kCookPlaces; ++p) x[p] = load(t.acc + p * t.place_stride + c);
    for (int64_t i = 0; i < t.count; ++i) {
      vf sum = load(t.bias + c);
#pragma GCC unroll 8
      for (int p = 0; p < kCookPlaces; ++p) sum += x[p] * splat(t.matrix[i * kCookPlaces + p]);
      wrong += sum * zero;  // NaN where it is not finite
      store(t.out + i * t.out_stride + c, sum);
    }
  }
  for (int l = 0; l < VL; ++l)
    if (wrong[l] != 0) return false;
  return true;
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
