// Every kernel, written once with compiler vectors of ACTZIP_VL floats and compiled per instruction set. Only
// packing (compress, expand) and half precision use intrinsics.
#include <cstring>

#include "common/vectors.inl.h"
#include "kernels/ops.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

// ---------------------------------------------------------------------------------------------- sparse

AZ_INLINE const float* fetch(const float* p, int64_t lines) {
  for (; lines > 0; --lines, p += 16) __builtin_prefetch(p, 0, 2);
  return p;
}

// One pixel a visit: its accumulators stay in registers while the mask is walked.
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

// Where channel k of a pixel lies among its values: its rank in the mask, or k itself where counting bits is
// slow and the values come expanded (Ops::expanded_pairs).
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

// ----------------------------------------------------------------------------------------------- dense

template <int MR, int NV>
void dense_tile(const DenseTile& t) {
  vf a[MR][NV];
  if (t.init != nullptr) {
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      const vf x = load(t.init + j * VL);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) a[m][j] = x;
    }
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) a[m][j] = load(t.acc + m * t.acc_stride + j * VL);
  }
  const float* const* table = t.in;
  for (int64_t tap = 0; tap < t.taps; ++tap, table += t.in_table_stride) {
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
  if (t.clip) {
    const vf lo = splat(t.lo), hi = splat(t.hi);
    if (t.residual != nullptr) {
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
        for (int j = 0; j < NV; ++j) a[m][j] += load(t.residual + m * t.residual_stride + j * VL);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
      for (int j = 0; j < NV; ++j) {
        vf x = a[m][j];
        x = x < lo ? lo : x;
        a[m][j] = x > hi ? hi : x;
      }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) store(t.acc + m * t.acc_stride + j * VL, a[m][j]);
}

// ------------------------------------------------------------------------------------------- depthwise

// Pixels near the border, or a kernel without a faster form: any size, one pixel at a time.
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
      a += (lanes == VL ? load(p) : load_part(p, lanes)) *
           load(d.weight + (ky * d.kw + kx) * d.weight_stride + c);
    }
  }
  store(d.acc + i * d.acc_stride + c, a);
}

// PX neighbouring pixels at once: their windows share what they load.
template <int KW, int SW, int PX, bool PART>
AZ_INLINE void depthwise_group(const DepthwiseRow& d, int64_t i, int64_t c, int64_t lanes) {
  constexpr int COLUMNS = (PX - 1) * SW + KW;
  const int64_t at = ((d.first + i) * SW - d.pad_left) * d.in_stride + c;
  vf a[PX];
#pragma GCC unroll 8
  for (int j = 0; j < PX; ++j) a[j] = load(d.bias + c);
  for (int64_t ky = 0; ky < d.kh; ++ky) {
    if (d.rows[ky] == nullptr) continue;
    const float* p = d.rows[ky] + at;
    const float* w = d.weight + ky * KW * d.weight_stride + c;
    vf k[KW];
#pragma GCC unroll 8
    for (int x = 0; x < KW; ++x) {
      k[x] = load(w + x * d.weight_stride);
      keep(k[x]);
    }
#pragma GCC unroll 16
    for (int x = 0; x < COLUMNS; ++x) {
      vf v = PART ? load_part(p + x * d.in_stride, lanes) : load(p + x * d.in_stride);
      keep(v);
#pragma GCC unroll 8
      for (int j = 0; j < PX; ++j)
        if (x - j * SW >= 0 && x - j * SW < KW) a[j] += v * k[x - j * SW];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < PX; ++j) store(d.acc + (i + j) * d.acc_stride + c, a[j]);
}

template <int KW, int SW>
void depthwise_size(const DepthwiseRow& d) {
  constexpr int PX = 4;
  int64_t i = 0;
  while (i < d.count) {
    const int64_t x0 = (d.first + i) * SW - d.pad_left;
    const bool group = x0 >= 0 && x0 + (PX - 1) * SW + KW <= d.iw && i + PX <= d.count;
    int64_t c = 0;
    if (group) {
      for (; c + VL <= d.channels; c += VL) depthwise_group<KW, SW, PX, false>(d, i, c, VL);
      if (c < d.channels) depthwise_group<KW, SW, PX, true>(d, i, c, d.channels - c);
      i += PX;
    } else {
      for (; c < d.channels; c += VL) depthwise_pixel(d, i, c, d.channels - c < VL ? d.channels - c : VL);
      ++i;
    }
  }
}

void depthwise_row(const DepthwiseRow& d) {
  if (d.dw == 1 && d.kw == 3 && d.sw == 1) return depthwise_size<3, 1>(d);
  if (d.dw == 1 && d.kw == 3 && d.sw == 2) return depthwise_size<3, 2>(d);
  if (d.dw == 1 && d.kw == 5 && d.sw == 1) return depthwise_size<5, 1>(d);
  if (d.dw == 1 && d.kw == 5 && d.sw == 2) return depthwise_size<5, 2>(d);
  if (d.dw == 1 && d.kw == 7 && d.sw == 1) return depthwise_size<7, 1>(d);
  for (int64_t i = 0; i < d.count; ++i)
    for (int64_t c = 0; c < d.channels; c += VL)
      depthwise_pixel(d, i, c, d.channels - c < VL ? d.channels - c : VL);
}

// -------------------------------------------------------------------------------------------- epilogue

void fill(float* acc, int64_t acc_stride, int64_t count, const float* row, int64_t floats) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < floats; j += VL) store(acc + i * acc_stride + j, load(row + j));
}

// Comparisons are written so that NaN stays NaN.
template <int ACT>
AZ_INLINE vf activate(vf x, vf lo, vf hi) {
  const vf zero{};
  if constexpr (ACT == 1) return x < zero ? zero : x;
  if constexpr (ACT == 2) {
    x = x < lo ? lo : x;
    return x > hi ? hi : x;
  }
  if constexpr (ACT == 3) return x <= lo ? zero : x;
  return x;
}

template <int ACT>
void epilogue_act(const EpilogueRow& e) {
  const vf hi = splat(e.hi);
  for (int64_t i = 0; i < e.count; ++i) {
    float* a = e.acc + i * e.acc_stride;
    const float* res = e.residual == nullptr ? nullptr : e.residual + i * e.residual_stride;
    float* out = e.out == nullptr ? nullptr : e.out + i * e.out_stride;
    int64_t j = 0;
    for (; j + VL <= e.width; j += VL) {
      vf x = load(a + j);
      if (res != nullptr) x += load(res + j);
      const vf lo = ACT == 3 && e.thresholds != nullptr ? load(e.thresholds + j) : splat(e.lo);
      x = activate<ACT>(x, lo, hi);
      store(out != nullptr ? out + j : a + j, x);
    }
    if (j < e.width) {
      const vf r = res != nullptr ? load_part(res + j, e.width - j) : vf{};
      const vf lo = ACT == 3 && e.thresholds != nullptr ? load(e.thresholds + j) : splat(e.lo);
      const vf x = activate<ACT>(load(a + j) + r, lo, hi);
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
    default:
      return epilogue_act<0>(e);
  }
}

// --------------------------------------------------------------------------------------------- packing

// What the stored type can hold of x: f16: values that would round to zero become zero; u8, u16: the integer.
template <int TYPE>
AZ_INLINE vf representable(vf x, vf scale, vf top) {
  const vf zero{};
  if constexpr (TYPE == 1) {
    const vf tiny = splat(0x1p-25f);
    return ((x <= tiny) & (x >= -tiny)) ? zero : x;
  }
  if constexpr (TYPE == 2 || TYPE == 3) {
    const vf magic = splat(12582912.0f);
    x = x / scale;
    x = x <= zero ? zero : x;
    x = x < top ? x : top;  // NaN too
    return (x + magic) - magic;
  }
  return x;
}

// Non-zero lanes of x as bits, lane 0 lowest, and their values to dst in order (up to VL floats are written).
AZ_INLINE uint32_t compress_vector(vf x, float* dst) {
#if ACTZIP_VL == 16
  const __m512 v = reinterpret_cast<__m512>(x);
  const __mmask16 k = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(k, v));
  return k;
#elif ACTZIP_VL == 8
  const __m256 v = reinterpret_cast<__m256>(x);
  const uint32_t k =
      static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
  // The index of the lanes set, a byte each, by a bit deposit and extract.
  const uint64_t spread = _pdep_u64(k, 0x0101010101010101ull) * 0xff;
  const uint64_t lanes = _pext_u64(0x0706050403020100ull, spread);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes)));
  _mm256_storeu_ps(dst, _mm256_permutevar8x32_ps(v, index));
  return k;
#else
  uint32_t k = 0;
  for (int l = 0; l < VL; ++l) {
    *dst = x[l];
    const bool some = x[l] != 0;
    dst += some;
    k |= static_cast<uint32_t>(some) << l;
  }
  return k;
#endif
}

template <int TYPE>
int64_t compress_type(const float* src, int64_t stride, int64_t count, int64_t width, float scale, float top,
                      uint64_t* masks, float* dst) {
  const vf scales = splat(scale), tops = splat(top > 0 ? top : TYPE == 2 ? 255.0f : 65535.0f);
  float* const begin = dst;
  for (int64_t i = 0; i < count; ++i, src += stride) {
    uint64_t mask = 0;
    int64_t j = 0;
    for (; j + VL <= width; j += VL) {
      const uint32_t k = compress_vector(representable<TYPE>(load(src + j), scales, tops), dst);
      dst += popcount(k);
      mask |= static_cast<uint64_t>(k) << j;
    }
    if (j < width) {
      const vf x = load_part(src + j, width - j);
      const uint32_t k = compress_vector(representable<TYPE>(x, scales, tops), dst);
      dst += popcount(k);
      mask |= static_cast<uint64_t>(k) << j;
    }
    masks[i] = mask;
  }
  return dst - begin;
}

int64_t compress(const float* src, int64_t stride, int64_t count, int64_t width, int type, float scale,
                 float top, uint64_t* masks, float* dst) {
  switch (type) {
    case 1:
      return compress_type<1>(src, stride, count, width, scale, top, masks, dst);
    case 2:
      return compress_type<2>(src, stride, count, width, scale, top, masks, dst);
    case 3:
      return compress_type<3>(src, stride, count, width, scale, top, masks, dst);
    default:
      return compress_type<0>(src, stride, count, width, scale, top, masks, dst);
  }
}

// IEEE half precision, round to nearest even.
AZ_INLINE uint16_t to_half(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (u >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
  if (u < 0x38800000u) {                                               // below 2^-14: subnormal
    float y;
    memcpy(&y, &u, 4);
    y += 0.5f;  // aligns the half's last place with the float's
    uint32_t v;
    memcpy(&v, &y, 4);
    return static_cast<uint16_t>(sign | (v - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((u - 0x38000000u) >> 13));
}
AZ_INLINE float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t u = h & 0x7fffu;
  float y;
  if (u >= 0x7c00u) {
    u = 0x7f800000u | ((u & 0x3ffu) << 13);
    memcpy(&y, &u, 4);
  } else {
    u <<= 13;
    memcpy(&y, &u, 4);
    y *= 0x1p112f;  // exact; subnormals become normal
  }
  memcpy(&u, &y, 4);
  u |= sign;
  memcpy(&y, &u, 4);
  return y;
}

void store_values(const float* src, int64_t count, int type, void* dst) {
  int64_t i = 0;
  if (type == 0) {
    memcpy(dst, src, static_cast<size_t>(count) * 4);
  } else if (type == 1) {
    auto* d = static_cast<uint16_t*>(dst);
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(d + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
#endif
    for (; i < count; ++i) d[i] = to_half(src[i]);
  } else if (type == 2) {
    auto* d = static_cast<uint8_t*>(dst);
    for (; i < count; ++i) d[i] = static_cast<uint8_t>(static_cast<int32_t>(src[i]));
  } else {
    auto* d = static_cast<uint16_t*>(dst);
    for (; i < count; ++i) d[i] = static_cast<uint16_t>(static_cast<int32_t>(src[i]));
  }
}

void load_values(const void* src, int64_t count, int type, float scale, float* dst) {
  int64_t i = 0;
  if (type == 0) {
    memcpy(dst, src, static_cast<size_t>(count) * 4);
  } else if (type == 1) {
    const auto* s = static_cast<const uint16_t*>(src);
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
      _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s + i))));
#endif
    for (; i < count; ++i) dst[i] = from_half(s[i]);
  } else if (type == 2) {
    const auto* s = static_cast<const uint8_t*>(src);
    for (; i < count; ++i) dst[i] = scale * static_cast<float>(s[i]);
  } else {
    const auto* s = static_cast<const uint16_t*>(src);
    for (; i < count; ++i) dst[i] = scale * static_cast<float>(s[i]);
  }
}

int64_t expand(const uint64_t* masks, const float* src, int64_t count, int64_t width, float* dst,
               int64_t stride) {
  const float* const begin = src;
  for (int64_t i = 0; i < count; ++i, dst += stride) {
    const uint64_t mask = masks[i];
    int64_t j = 0;
#if ACTZIP_VL == 16
    for (; j + 16 <= width; j += 16) {
      const auto k = static_cast<__mmask16>(mask >> j);
      _mm512_storeu_ps(dst + j, _mm512_maskz_expand_ps(k, _mm512_loadu_ps(src)));
      src += popcount(k);
    }
#elif ACTZIP_VL == 8
    for (; j + 8 <= width; j += 8) {
      const uint64_t k = (mask >> j) & 0xff;
      const uint64_t spread = _pdep_u64(k, 0x0101010101010101ull) * 0xff;
      const uint64_t lanes = _pdep_u64(0x0706050403020100ull, spread);
      const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes)));
      const __m256i keep = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(spread)));
      const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(src), index);
      _mm256_storeu_ps(dst + j, _mm256_and_ps(v, _mm256_castsi256_ps(keep)));
      src += popcount(k);
    }
#endif
    for (; j < width; ++j) {
      const bool some = (mask >> j) & 1;
      dst[j] = some ? *src : 0.0f;
      src += some;
    }
  }
  return src - begin;
}

// ------------------------------------------------------------------------------------------------ peak

double peak(int64_t rounds) {
  constexpr int N = kRegisters == 32 ? 24 : 12;
  vf a[N];
  for (int j = 0; j < N; ++j) a[j] = splat(0.001f * static_cast<float>(j));
  vf b = splat(0.9999f), c = splat(0.0001f);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 32
    for (int j = 0; j < N; ++j) a[j] = a[j] * b + c;
  }
  vf s{};
  for (int j = 0; j < N; ++j) s += a[j];
  volatile float sink = s[0];
  (void)sink;
  return static_cast<double>(rounds) * N * VL * 2;
}

// ----------------------------------------------------------------------------------------------- table

template <int NV, int MR>
constexpr void put_dense(Ops& o, int top) {
  if constexpr (MR >= 1) {
    o.dense[NV][MR] = &dense_tile<MR, NV>;
    put_dense<NV, MR - 1>(o, top);
  }
}

constexpr Ops make_ops() {
  Ops o{};
  o.isa = ACTZIP_ISA_ID;
  o.vl = VL;
  o.sparse[1] = sparse_run<1>;
  o.sparse[2] = sparse_run<2>;
  o.sparse[3] = sparse_run<3>;
  o.sparse[4] = sparse_run<4>;
  o.sparse[5] = sparse_run<5>;
  o.sparse[6] = sparse_run<6>;
  o.sparse[7] = sparse_run<7>;
  o.sparse[8] = sparse_run<8>;
  o.sparse[9] = sparse_run<9>;
  o.sparse[10] = sparse_run<10>;
  o.sparse[11] = sparse_run<11>;
  o.sparse[12] = sparse_run<12>;
  o.sparse_row[1] = sparse_row_run<1>;
  o.sparse_row[2] = sparse_row_run<2>;
  o.sparse_row[3] = sparse_row_run<3>;
  o.sparse_row[4] = sparse_row_run<4>;
  o.sparse_row[5] = sparse_row_run<5>;
  o.sparse_row[6] = sparse_row_run<6>;
  o.sparse_row[7] = sparse_row_run<7>;
  o.sparse_row[8] = sparse_row_run<8>;
  o.sparse_row[9] = sparse_row_run<9>;
  o.sparse_row[10] = sparse_row_run<10>;
  o.sparse_row[11] = sparse_row_run<11>;
  o.sparse_row[12] = sparse_row_run<12>;
  o.sparse_pair[1] = sparse_pair_run<1>;
  o.sparse_pair[2] = sparse_pair_run<2>;
  o.sparse_pair[3] = sparse_pair_run<3>;
  o.sparse_pair[4] = sparse_pair_run<4>;
  o.sparse_pair[5] = sparse_pair_run<5>;
  o.sparse_pair[6] = sparse_pair_run<6>;
  if constexpr (kRegisters == 32) {
    o.sparse_pair[7] = sparse_pair_run<7>;
    o.sparse_pair[8] = sparse_pair_run<8>;
#if ACTZIP_VL == 16
    o.sparse_taps_pair[1] = sparse_taps_pair_run<1>;
    o.sparse_taps_pair[2] = sparse_taps_pair_run<2>;
    o.sparse_taps_pair[3] = sparse_taps_pair_run<3>;
    o.sparse_taps_pair[4] = sparse_taps_pair_run<4>;
#endif
    put_dense<1, 12>(o, 12);
    put_dense<2, 12>(o, 12);
    put_dense<3, 8>(o, 8);
    put_dense<4, 6>(o, 6);
    o.dense_mr[1] = 12, o.dense_mr[2] = 12, o.dense_mr[3] = 8, o.dense_mr[4] = 6;
  } else {
    put_dense<1, 10>(o, 10);
    put_dense<2, 6>(o, 6);
    put_dense<3, 4>(o, 4);
    o.dense_mr[1] = 10, o.dense_mr[2] = 6, o.dense_mr[3] = 4;
  }
#if !(defined(__POPCNT__) && defined(__BMI2__))
  o.expanded_pairs = true;
#endif
  o.fill = fill;
  o.epilogue = epilogue;
  o.depthwise = depthwise_row;
  o.compress = compress;
  o.store_values = store_values;
  o.load_values = load_values;
  o.expand = expand;
  o.peak = peak;
  return o;
}

}  // namespace

extern const Ops kOps;
constexpr Ops kOps = make_ops();  // before any code runs: this CPU may not have the instructions

}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
