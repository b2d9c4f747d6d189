// Packing: values to masks and non-zeros, and back; the stored types. Intrinsics where vectors have no word
// for it.
#pragma once

#include <cstring>

#include "common/vectors.inl.h"
#include "kernels/epilogue.inl.h"
#include "kernels/kernels.h"

namespace actzip::kernels {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

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

// Non-zero lanes of x (RELU: not negative either) as bits, lane 0 lowest, and their values to dst in order
// (up to VL floats are written).
template <bool RELU>
AZ_INLINE uint32_t compress_vector(vf x, float* dst) {
#if ACTZIP_VL == 16
  const __m512 v = reinterpret_cast<__m512>(x);
  const __mmask16 k = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), RELU ? _CMP_NLE_UQ : _CMP_NEQ_UQ);
  _mm512_storeu_ps(dst, _mm512_maskz_compress_ps(k, v));
  return k;
#elif ACTZIP_VL == 8
  const __m256 v = reinterpret_cast<__m256>(x);
  const auto k = static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), RELU ? _CMP_NLE_UQ : _CMP_NEQ_UQ)));
  // The index of the lanes set, a byte each, by a bit deposit and extract. Lanes 1, 3 and 6:
  //   k       01001010
  //   spread  00 ff 00 00 ff 00 ff 00   a byte a lane, lane 7 first
  //   lanes   00 00 00 00 00 06 03 01   of 07 06 05 04 03 02 01 00 those bytes, moved together
  const uint64_t spread = _pdep_u64(k, 0x0101010101010101ull) * 0xff;
  const uint64_t lanes = _pext_u64(0x0706050403020100ull, spread);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes)));
  _mm256_storeu_ps(dst, _mm256_permutevar8x32_ps(v, index));
  return k;
#else
  uint32_t k = 0;
  for (int l = 0; l < VL; ++l) {
    *dst = x[l];
    const bool some = RELU ? !(x[l] <= 0) : x[l] != 0;
    dst += some;
    k |= static_cast<uint32_t>(some) << l;
  }
  return k;
#endif
}

template <int TYPE, int ACT>
AZ_INLINE uint32_t compress_part(const EpilogueRow& e, vf x, int64_t j, vf scales, vf tops, float* dst) {
  constexpr bool kRelu = ACT == 1 && TYPE == 0;  // the comparison does it
  if constexpr (!kRelu) {
    const vf lo = ACT == 3 && e.thresholds != nullptr ? load(e.thresholds + j) : splat(e.lo);
    x = representable<TYPE>(activate<ACT>(x, lo, splat(e.hi), splat(e.step)), scales, tops);
  }
  return compress_vector<kRelu>(x, dst);
}

template <int TYPE, int ACT>
int64_t compress_type(const EpilogueRow& e, float scale, float top, uint64_t* masks, float* dst) {
  const vf scales = splat(scale), tops = splat(top > 0 ? top : TYPE == 2 ? 255.0f : 65535.0f);
  const float* acc = e.acc;
  const float* residual = e.residual;
  float* const begin = dst;
  for (int64_t i = 0; i < e.count; ++i, acc += e.acc_stride) {
    uint64_t mask = 0;
    int64_t j = 0;
    for (; j + VL <= e.width; j += VL) {
      vf x = load(acc + j);
      if (e.bias != nullptr) x += load(e.bias + j);
      if (residual != nullptr) x = before_residual(e, x) + load(residual + j);
      const uint32_t k = compress_part<TYPE, ACT>(e, x, j, scales, tops, dst);
      dst += popcount(k);
      mask |= static_cast<uint64_t>(k) << j;
    }
    if (j < e.width) {
      vf x = load_part(acc + j, e.width - j);
      if (e.bias != nullptr) x += load(e.bias + j);
      if (residual != nullptr) x = before_residual(e, x) + load_part(residual + j, e.width - j);
      uint32_t k = compress_part<TYPE, ACT>(e, x, j, scales, tops, dst);
      // An activation may make something of the zeros beyond the channels: they are last, and left out.
      k &= (uint32_t{1} << (e.width - j)) - 1;
      dst += popcount(k);
      mask |= static_cast<uint64_t>(k) << j;
    }
    masks[i] = mask;
    if (residual != nullptr) residual += e.residual_stride;
  }
  return dst - begin;
}

template <int TYPE>
int64_t compress_act(const EpilogueRow& e, float scale, float top, uint64_t* masks, float* dst) {
  switch (e.act) {
    case 1:
      return compress_type<TYPE, 1>(e, scale, top, masks, dst);
    case 2:
      return compress_type<TYPE, 2>(e, scale, top, masks, dst);
    case 3:
      return compress_type<TYPE, 3>(e, scale, top, masks, dst);
    case 4:
      return compress_type<TYPE, 4>(e, scale, top, masks, dst);
    default:
      return compress_type<TYPE, 0>(e, scale, top, masks, dst);
  }
}

int64_t compress(const EpilogueRow& e, int type, float scale, float top, uint64_t* masks, float* dst) {
  switch (type) {
    case 1:
      return compress_act<1>(e, scale, top, masks, dst);
    case 2:
      return compress_act<2>(e, scale, top, masks, dst);
    case 3:
      return compress_act<3>(e, scale, top, masks, dst);
    default:
      return compress_act<0>(e, scale, top, masks, dst);
  }
}

int64_t count_values(const uint64_t* masks, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += popcount(masks[i]);
  return sum;
}

void point_values(const uint64_t* masks, int64_t count, const float* values, const float** pointers) {
  for (int64_t i = 0; i < count; ++i) {
    pointers[i] = values;
    values += popcount(masks[i]);
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

#if defined(__aarch64__)
// Where the bytes of four lanes come from that are expanded, by their bits; beyond the vector: zeros.
struct ExpandedBytes {
  uint8_t of[16][16];
};
constexpr ExpandedBytes expanded_bytes() {
  ExpandedBytes bytes{};
  for (int k = 0; k < 16; ++k)
    for (int l = 0, from = 0; l < 4; ++l) {
      const bool some = (k >> l) & 1;
      for (int b = 0; b < 4; ++b) bytes.of[k][4 * l + b] = static_cast<uint8_t>(some ? 4 * from + b : 255);
      from += some;
    }
  return bytes;
}
constexpr ExpandedBytes kExpandedBytes = expanded_bytes();
#endif

// The reverse of compress_vector: the next values of src in the lanes whose bits `k` has, zeros in the
// others. `src` is readable for a whole vector.
AZ_INLINE vf expand_vector(uint32_t k, const float* src) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vf>(_mm512_maskz_expand_ps(static_cast<__mmask16>(k), _mm512_loadu_ps(src)));
#elif ACTZIP_VL == 8
  const uint64_t spread = _pdep_u64(k, 0x0101010101010101ull) * 0xff;
  const uint64_t lanes = _pdep_u64(0x0706050403020100ull, spread);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(lanes)));
  const __m256i keep = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(spread)));
  const __m256 v = _mm256_permutevar8x32_ps(_mm256_loadu_ps(src), index);
  return reinterpret_cast<vf>(_mm256_and_ps(v, _mm256_castsi256_ps(keep)));
#elif defined(__aarch64__)
  const uint8x16_t v = vreinterpretq_u8_f32(vld1q_f32(src));
  return reinterpret_cast<vf>(vqtbl1q_u8(v, vld1q_u8(kExpandedBytes.of[k])));
#else
  vf v{};
  for (int l = 0; l < VL; ++l) {
    const bool some = (k >> l) & 1;
    v[l] = some ? *src : 0.0f;
    src += some;
  }
  return v;
#endif
}

#if ACTZIP_VL > 4 || defined(__aarch64__)
constexpr bool kExpandsVectors = true;
#else
constexpr bool kExpandsVectors = false;  // one by one is as quick
#endif

int64_t expand(const uint64_t* masks, const float* src, int64_t count, int64_t width, float* dst,
               int64_t stride) {
  const float* const begin = src;
  for (int64_t i = 0; i < count; ++i, dst += stride) {
    const uint64_t mask = masks[i];
    int64_t j = 0;
    if constexpr (kExpandsVectors)
      for (; j + VL <= width; j += VL) {
        const auto k = static_cast<uint32_t>(mask >> j) & ((1u << VL) - 1);
        store(dst + j, expand_vector(k, src));
        src += popcount(k);
      }
    for (; j < width; ++j) {
      const bool some = (mask >> j) & 1;
      dst[j] = some ? *src : 0.0f;
      src += some;
    }
  }
  return src - begin;
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::kernels
