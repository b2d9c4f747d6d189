// Sparse kernels: a pixel's non-zero values times the weight rows of their channels.
#pragma once

#include "common/vectors.inl.h"
#include "kernels/kernels.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

AZ_INLINE const float* fetch(const float* p, int64_t lines) {
  for (; lines > 0; --lines, p += 16) __builtin_prefetch(p, 0, 2);
  return p;
}

// One pixel a visit: its accumulators stay in registers while the mask is walked. A pixel whose channels 1, 3
// and 6 are not zero, masks and values as a packed map has them:
//
//   mask 01001010 (channel 0 is the lowest bit), values [v1 v3 v6], clip 11111111
//
//   m          ctz(m)   a (NV * VL output channels)
//   01001010   1        a += v1 * weight row 1
//   01001000   3        a += v3 * weight row 3
//   01000000   6        a += v6 * weight row 6
//   00000000            stored
//
// Another group of the convolution, clip 11111000: m is 01001000, and the walk of values begins at v3, for
// one bit of the mask lies below the lowest of m and outside clip.
template <int NV>
void sparse_run(const SparseRun& r) {
  const float* const weight = r.weight;
  float* acc = r.acc;
  const uint64_t* masks = r.masks;
  const float* const* values = r.values;
  const float* next = r.next_weight;
  for (int64_t i = 0; i < r.count; ++i, acc += r.acc_stride, masks += r.step, values += r.step) {
    const uint64_t all = *masks;
    next = fetch(next, r.next_lines);
    uint64_t m = all & r.clip;
    if (m == 0) continue;
    // Values below the clipped channels are passed over.
    const float* v = *values + popcount(all & ~r.clip & ((m & (~m + 1)) - 1));
    vf a[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) a[j] = load(acc + j * VL);
    do {
      const float* w = weight + static_cast<int64_t>(ctz(m)) * (NV * VL);
      m &= m - 1;
      const vf b = splat(*v++);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[j] += b * load(w + j * VL);
    } while (m != 0);
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store(acc + j * VL, a[j]);
  }
}

// One output pixel a visit and all taps of a kernel row: blocks of few channels have too few values a tap to
// pay for loading and storing the accumulators.
template <int NV>
void sparse_row_run(const SparseRun& r) {
  float* acc = r.acc;
  const uint64_t* masks = r.masks;
  const float* const* values = r.values;
  const float* next = r.next_weight;
  for (int64_t i = 0; i < r.count; ++i, acc += r.acc_stride, masks += r.step, values += r.step) {
    next = fetch(next, r.next_lines);
    vf a[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) a[j] = load(acc + j * VL);
    const float* weight = r.weight;
    for (int64_t t = 0; t < r.taps; ++t, weight += r.tap_weight) {
      const uint64_t all = masks[t * r.tap_step];
      uint64_t m = all & r.clip;
      const float* v = values[t * r.tap_step] + popcount(all & ~r.clip & ((m & (~m + 1)) - 1));
      for (; m != 0; m &= m - 1) {
        const float* w = weight + static_cast<int64_t>(ctz(m)) * (NV * VL);
        const vf b = splat(*v++);
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) a[j] += b * load(w + j * VL);
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store(acc + j * VL, a[j]);
  }
}

#if defined(__POPCNT__) && defined(__BMI2__)
constexpr bool kExpandedPairs = false;
#else
constexpr bool kExpandedPairs = true;
#endif

// Where channel k of a pixel lies among its values: its rank in the mask, or k itself where counting bits is
// slow and the values come expanded (Kernels::expanded_pairs).
AZ_INLINE int64_t place(uint64_t mask, int64_t k) {
#if defined(__POPCNT__) && defined(__BMI2__)
  return popcount(_bzhi_u64(mask, static_cast<uint32_t>(k)));
#else
  (void)mask;
  return k;
#endif
}

// Two neighbouring output pixels a visit: the channels that both have share their weight rows' loads.
template <int NV>
void sparse_pair_run(const SparseRun& r) {
  const float* const weight = r.weight;
  float* acc = r.acc;
  const uint64_t* masks = r.masks;
  const float* const* values = r.values;
  const float* next = r.next_weight;
  int64_t i = 0;
  for (; i + 1 < r.count; i += 2, acc += 2 * r.acc_stride, masks += 2 * r.step, values += 2 * r.step) {
    next = fetch(next, r.next_lines);
    const uint64_t all0 = masks[0], all1 = masks[r.step];
    const uint64_t m0 = all0 & r.clip, m1 = all1 & r.clip;
    const float *v0 = values[0], *v1 = values[r.step];
    float* acc1 = acc + r.acc_stride;
    vf a[NV], c[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) a[j] = load(acc + j * VL), c[j] = load(acc1 + j * VL);
    for (uint64_t m = m0 & m1; m != 0; m &= m - 1) {
      const int64_t k = ctz(m);
      const float* w = weight + k * (NV * VL);
      const vf b0 = splat(v0[place(all0, k)]), b1 = splat(v1[place(all1, k)]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        vf x = load(w + j * VL);
        keep(x);
        a[j] += b0 * x;
        c[j] += b1 * x;
      }
    }
    for (uint64_t m = m0 & ~m1; m != 0; m &= m - 1) {
      const int64_t k = ctz(m);
      const float* w = weight + k * (NV * VL);
      const vf b = splat(v0[place(all0, k)]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[j] += b * load(w + j * VL);
    }
    for (uint64_t m = m1 & ~m0; m != 0; m &= m - 1) {
      const int64_t k = ctz(m);
      const float* w = weight + k * (NV * VL);
      const vf b = splat(v1[place(all1, k)]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) c[j] += b * load(w + j * VL);
    }
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store(acc + j * VL, a[j]), store(acc1 + j * VL, c[j]);
  }
  if (i < r.count) {
    const uint64_t all0 = masks[0];
    uint64_t m = all0 & r.clip;
    const float* v = values[0];
    vf a[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) a[j] = load(acc + j * VL);
    for (; m != 0; m &= m - 1) {
      const int64_t k = ctz(m);
      const float* w = weight + k * (NV * VL);
      const vf b = splat(v[place(all0, k)]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[j] += b * load(w + j * VL);
    }
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store(acc + j * VL, a[j]);
  }
}

// Three taps of a kernel row (weight: 3 * nv vectors a channel) for two neighbouring input pixels: their
// outputs are four neighbouring accumulators of nv vectors, acc_stride apart, of which they share the middle
// two.
template <int NV>
void sparse_taps_pair_run(const SparseRun& r) {
  constexpr int TAPS = 3 * NV;
  const float* const weight = r.weight;
  float* acc = r.acc;
  const uint64_t* masks = r.masks;
  const float* const* values = r.values;
  for (int64_t i = 0; i < r.count; i += 2, acc += 2 * NV * VL, masks += 2, values += 2) {
    const bool second = i + 1 < r.count;
    const uint64_t all0 = masks[0], all1 = second ? masks[1] : 0;
    const uint64_t m0 = all0 & r.clip, m1 = all1 & r.clip;
    if ((m0 | m1) == 0) continue;
    const float *v0 = values[0], *v1 = second ? values[1] : nullptr;
    vf a[TAPS + NV];
#pragma GCC unroll 16
    for (int j = 0; j < TAPS + NV; ++j) a[j] = load(acc + j * VL);
    for (uint64_t m = m0 & m1; m != 0; m &= m - 1) {
      const int64_t k = ctz(m);
      const float* w = weight + k * (TAPS * VL);
      const vf b0 = splat(v0[place(all0, k)]), b1 = splat(v1[place(all1, k)]);
#pragma GCC unroll 16
      for (int j = 0; j < TAPS; ++j) {
        vf x = load(w + j * VL);
        keep(x);
        a[j] += b0 * x;
        a[j + NV] += b1 * x;
      }
    }
    for (uint64_t m = m0 & ~m1; m != 0; m &= m - 1) {
      const int64_t k = ctz(m);
      const float* w = weight + k * (TAPS * VL);
      const vf b = splat(v0[place(all0, k)]);
#pragma GCC unroll 16
      for (int j = 0; j < TAPS; ++j) a[j] += b * load(w + j * VL);
    }
    for (uint64_t m = m1 & ~m0; m != 0; m &= m - 1) {
      const int64_t k = ctz(m);
      const float* w = weight + k * (TAPS * VL);
      const vf b = splat(v1[place(all1, k)]);
#pragma GCC unroll 16
      for (int j = 0; j < TAPS; ++j) a[j + NV] += b * load(w + j * VL);
    }
    // The last accumulator of a single pixel at the end is not ours.
#pragma GCC unroll 16
    for (int j = 0; j < TAPS; ++j) store(acc + j * VL, a[j]);
    if (second)
#pragma GCC unroll 16
      for (int j = TAPS; j < TAPS + NV; ++j) store(acc + j * VL, a[j]);
  }
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
