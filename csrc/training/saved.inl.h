// Packing of saved tensors, a chunk at a time: see kernels.h. Compiled once per instruction set.
#include <cstring>

#include "common/vectors.inl.h"
#include "training/kernels.h"

#if ACTZIP_VL == 4 && defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace actzip::training::ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint32_t vuu __attribute__((vector_size(VL * 4), aligned(4), may_alias));

// ------------------------------------------------------------------------------------------------- masks

// The lanes (all ones or all zeros each) as bits.
AZ_INLINE uint32_t lanes(vi m) {
#if ACTZIP_VL == 16
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(m));
#elif ACTZIP_VL == 8
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(m)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(m)));
#else
  uint32_t k = 0;
  for (int l = 0; l < VL; ++l) k |= static_cast<uint32_t>(m[l] & 1) << l;
  return k;
#endif
}

// VL elements as the low bits of lanes of 32.
AZ_INLINE vu load_lanes(const uint32_t* p) { return *reinterpret_cast<const vuu*>(p); }
AZ_INLINE vu load_lanes(const uint16_t* p) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vu>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif ACTZIP_VL == 8
  return reinterpret_cast<vu>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  vu v;
  for (int l = 0; l < VL; ++l) v[l] = p[l];
  return v;
#endif
}

AZ_INLINE void store_lanes(uint32_t* p, vu v) { *reinterpret_cast<vuu*>(p) = v; }
AZ_INLINE void store_lanes(uint16_t* p, vu v) {
#if ACTZIP_VL == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#elif ACTZIP_VL == 8
  const __m256i w = reinterpret_cast<__m256i>(v);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
#else
  for (int l = 0; l < VL; ++l) p[l] = static_cast<uint16_t>(v[l]);
#endif
}

struct Nonzero {
  AZ_INLINE uint32_t operator()(vu x) const {
#if ACTZIP_VL == 16
    const __m512i v = reinterpret_cast<__m512i>(x);
    return _mm512_test_epi32_mask(v, v);
#else
    return lanes(reinterpret_cast<vi>(x != 0));
#endif
  }
};

template <Test TEST, int SHIFT>  // SHIFT: to the place of a float's bits
struct Compared {
  vf lo, hi;
  AZ_INLINE uint32_t operator()(vu bits) const {
    const vf x = reinterpret_cast<vf>(bits << SHIFT);
    if constexpr (TEST == Test::not_below) return lanes(~(x <= lo));
    if constexpr (TEST == Test::not_beyond) return lanes(~((x <= lo) | (x >= hi)));
    if constexpr (TEST == Test::above) return lanes(x > lo);
    if constexpr (TEST == Test::between) return lanes((x > lo) & (x < hi));
    return lanes((x >= lo) & (x <= hi));
  }
};

// 64 elements, the last ones padded with `rest`.
template <class T>
struct Tail {
  T x[64];
  Tail(const T* p, int64_t n) {
    memset(x, 0, sizeof x);
    memcpy(x, p, static_cast<size_t>(n) * sizeof(T));
  }
};

template <class T, class F>
AZ_INLINE uint64_t mask64(const T* x, const F& test) {
  uint64_t m = 0;
#pragma GCC unroll 16
  for (int j = 0; j < 64; j += VL) m |= static_cast<uint64_t>(test(load_lanes(x + j))) << j;
  return m;
}

template <class T, class F>
int64_t mask_lanes(const T* x, int64_t n, const F& test, uint8_t* bits) {
  int64_t count = 0, i = 0;
  for (; i + 64 <= n; i += 64) {
    const uint64_t m = mask64(x + i, test);
    count += popcount(m);
    memcpy(bits + i / 8, &m, 8);
  }
  if (i < n) {
    const Tail<T> tail(x + i, n - i);
    const uint64_t m = mask64(tail.x, test) & ((1ull << (n - i)) - 1);
    count += popcount(m);
    memcpy(bits + i / 8, &m, static_cast<size_t>((n - i + 7) / 8));
  }
  return count;
}

template <class T>
int64_t mask_scalar(const T* x, int64_t n, uint8_t* bits) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 8) {
    uint32_t m = 0;
    const int64_t end = n - i < 8 ? n - i : 8;
    for (int64_t j = 0; j < end; ++j) m |= static_cast<uint32_t>(x[i + j] != 0) << j;
    count += popcount(m);
    bits[i / 8] = static_cast<uint8_t>(m);
  }
  return count;
}

int64_t nonzero(const void* x, int64_t n, int width, uint8_t* bits) {
  if (width == 4) return mask_lanes(static_cast<const uint32_t*>(x), n, Nonzero{}, bits);
  if (width == 2) return mask_lanes(static_cast<const uint16_t*>(x), n, Nonzero{}, bits);
  if (width == 8) return mask_scalar(static_cast<const uint64_t*>(x), n, bits);
  return mask_scalar(static_cast<const uint8_t*>(x), n, bits);
}

template <class T, int SHIFT>
int64_t test_type(const T* x, int64_t n, Test test, float lo, float hi, uint8_t* bits) {
  const vf l = splat(lo), h = splat(hi);
  switch (test) {
    case Test::not_below:
      return mask_lanes(x, n, Compared<Test::not_below, SHIFT>{l, h}, bits);
    case Test::not_beyond:
      return mask_lanes(x, n, Compared<Test::not_beyond, SHIFT>{l, h}, bits);
    case Test::above:
      return mask_lanes(x, n, Compared<Test::above, SHIFT>{l, h}, bits);
    case Test::inside:
      return mask_lanes(x, n, Compared<Test::inside, SHIFT>{l, h}, bits);
    case Test::between:
      return mask_lanes(x, n, Compared<Test::between, SHIFT>{l, h}, bits);
    default:
      return mask_lanes(x, n, Nonzero{}, bits);
  }
}

int64_t test(const void* x, int64_t n, Real type, Test test, float lo, float hi, uint8_t* bits) {
  if (type == Real::float32)
    return test_type<uint32_t, 0>(static_cast<const uint32_t*>(x), n, test, lo, hi, bits);
  return test_type<uint16_t, 16>(static_cast<const uint16_t*>(x), n, test, lo, hi, bits);
}

// ---------------------------------------------------------------------------------------- compress, expand

// The lanes of x whose bit in k is set, to the front.
AZ_INLINE vu compress_lanes(vu x, uint32_t k) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vu>(
      _mm512_maskz_compress_epi32(static_cast<__mmask16>(k), reinterpret_cast<__m512i>(x)));
#elif ACTZIP_VL == 8
  // The index of the lanes set, a byte each, by a bit deposit and extract.
  const uint64_t spread = _pdep_u64(k, 0x0101010101010101ull) * 0xff;
  const uint64_t order = _pext_u64(0x0706050403020100ull, spread);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(order)));
  return reinterpret_cast<vu>(_mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(x), index));
#else
  vu out{};
  for (int l = 0, j = 0; l < VL; ++l) {
    out[j & (VL - 1)] = x[l];
    j += k >> l & 1;
  }
  return out;
#endif
}

// The first popcount(k) lanes of x to the places of the bits of k, zeros elsewhere.
AZ_INLINE vu expand_lanes(vu x, uint32_t k) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vu>(
      _mm512_maskz_expand_epi32(static_cast<__mmask16>(k), reinterpret_cast<__m512i>(x)));
#elif ACTZIP_VL == 8
  const uint64_t spread = _pdep_u64(k, 0x0101010101010101ull) * 0xff;
  const uint64_t order = _pdep_u64(0x0706050403020100ull, spread);
  const __m256i index = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(order)));
  const __m256i keep = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(spread)));
  return reinterpret_cast<vu>(
      _mm256_and_si256(_mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(x), index), keep));
#else
  vu out{};
  for (int l = 0, j = 0; l < VL; ++l) {
    out[l] = (k >> l & 1) ? x[j & (VL - 1)] : 0;
    j += k >> l & 1;
  }
  return out;
#endif
}

template <class T>
int64_t compress_scalar(const T* x, int64_t n, const uint8_t* bits, T* out) {
  T* const begin = out;
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    const bool set = bits[i / 8] >> (i % 8) & 1;
    same &= (x[i] != 0) == set;
    *out = x[i];
    out += set;
  }
  return same ? out - begin : -1;
}

template <class T>
int64_t compress_lanes_all(const T* x, int64_t n, const uint8_t* bits, T* out) {
  T* const begin = out;
  uint64_t differ = 0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t m;
    memcpy(&m, bits + i / 8, 8);
#if defined(__AVX512VBMI2__)
    if constexpr (sizeof(T) == 2) {
      for (int j = 0; j < 64; j += 32) {
        const __m512i v = _mm512_loadu_si512(x + i + j);
        const auto k = static_cast<__mmask32>(m >> j);
        differ |= k ^ _mm512_test_epi16_mask(v, v);
        _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(k, v));
        out += popcount(k);
      }
      continue;
    }
#endif
#pragma GCC unroll 16
    for (int j = 0; j < 64; j += VL) {
      const auto k = static_cast<uint32_t>(m >> j) & ((1u << VL) - 1);
      const vu v = load_lanes(x + i + j);
      differ |= k ^ Nonzero{}(v);
      store_lanes(out, compress_lanes(v, k));
      out += popcount(k);
    }
  }
  if (differ != 0) return -1;
  const int64_t rest = compress_scalar(x + i, n - i, bits + i / 8, out);
  return rest < 0 ? -1 : out - begin + rest;
}

int64_t compress(const void* x, int64_t n, int width, const uint8_t* bits, void* out) {
  if (width == 4)
    return compress_lanes_all(static_cast<const uint32_t*>(x), n, bits, static_cast<uint32_t*>(out));
  if (width == 2)
    return compress_lanes_all(static_cast<const uint16_t*>(x), n, bits, static_cast<uint16_t*>(out));
  if (width == 8)
    return compress_scalar(static_cast<const uint64_t*>(x), n, bits, static_cast<uint64_t*>(out));
  return compress_scalar(static_cast<const uint8_t*>(x), n, bits, static_cast<uint8_t*>(out));
}

template <class T>
void expand_scalar(const T* values, const uint8_t* bits, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const bool set = bits[i / 8] >> (i % 8) & 1;
    out[i] = set ? *values : T{0};
    values += set;
  }
}

template <class T>
void expand_lanes_all(const T* values, const uint8_t* bits, int64_t n, T* out) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t m;
    memcpy(&m, bits + i / 8, 8);
#if defined(__AVX512VBMI2__)
    if constexpr (sizeof(T) == 2) {
      for (int j = 0; j < 64; j += 32) {
        const auto k = static_cast<__mmask32>(m >> j);
        _mm512_storeu_si512(out + i + j, _mm512_maskz_expand_epi16(k, _mm512_loadu_si512(values)));
        values += popcount(k);
      }
      continue;
    }
#endif
#pragma GCC unroll 16
    for (int j = 0; j < 64; j += VL) {
      const auto k = static_cast<uint32_t>(m >> j) & ((1u << VL) - 1);
      store_lanes(out + i + j, expand_lanes(load_lanes(values), k));
      values += popcount(k);
    }
  }
  expand_scalar(values, bits + i / 8, n - i, out + i);
}

void expand(const void* values, const uint8_t* bits, int64_t n, int width, void* out) {
  if (width == 4)
    return expand_lanes_all(static_cast<const uint32_t*>(values), bits, n, static_cast<uint32_t*>(out));
  if (width == 2)
    return expand_lanes_all(static_cast<const uint16_t*>(values), bits, n, static_cast<uint16_t*>(out));
  if (width == 8)
    return expand_scalar(static_cast<const uint64_t*>(values), bits, n, static_cast<uint64_t*>(out));
  expand_scalar(static_cast<const uint8_t*>(values), bits, n, static_cast<uint8_t*>(out));
}

template <class T>
void fill_type(const uint8_t* bits, int64_t n, T on, T off, T* out) {
  int64_t i = 0;
#if ACTZIP_VL == 16
  if constexpr (sizeof(T) == 4) {
    const __m512i offs = _mm512_set1_epi32(static_cast<int>(off)),
                  ons = _mm512_set1_epi32(static_cast<int>(on));
    for (; i + 16 <= n; i += 16) {
      uint16_t k;
      memcpy(&k, bits + i / 8, 2);
      _mm512_storeu_si512(out + i, _mm512_mask_blend_epi32(k, offs, ons));
    }
  }
#endif
  for (; i + 8 <= n; i += 8) {
    const uint32_t m = bits[i / 8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
      out[i + j] = static_cast<T>(off ^ ((on ^ off) & (T{0} - static_cast<T>(m >> j & 1))));
  }
  for (; i < n; ++i) out[i] = bits[i / 8] >> (i % 8) & 1 ? on : off;
}

void fill(const uint8_t* bits, int64_t n, int width, uint64_t on, uint64_t off, void* out) {
  if (width == 4)
    return fill_type(bits, n, static_cast<uint32_t>(on), static_cast<uint32_t>(off),
                     static_cast<uint32_t*>(out));
  if (width == 2)
    return fill_type(bits, n, static_cast<uint16_t>(on), static_cast<uint16_t>(off),
                     static_cast<uint16_t*>(out));
  if (width == 8) return fill_type(bits, n, on, off, static_cast<uint64_t*>(out));
  fill_type(bits, n, static_cast<uint8_t>(on), static_cast<uint8_t>(off), static_cast<uint8_t*>(out));
}

template <class T>
void select_type(const T* x, const uint8_t* bits, int64_t n, T* out) {
  int64_t i = 0;
#if ACTZIP_VL == 16
  if constexpr (sizeof(T) == 4)
    for (; i + 16 <= n; i += 16) {
      uint16_t k;
      memcpy(&k, bits + i / 8, 2);
      _mm512_storeu_si512(out + i, _mm512_maskz_loadu_epi32(k, x + i));
    }
#endif
  for (; i + 8 <= n; i += 8) {
    const uint32_t m = bits[i / 8];
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) out[i + j] = static_cast<T>(x[i + j] & (T{0} - static_cast<T>(m >> j & 1)));
  }
  for (; i < n; ++i) out[i] = bits[i / 8] >> (i % 8) & 1 ? x[i] : T{0};
}

void select(const void* x, const uint8_t* bits, int64_t n, int width, void* out) {
  if (width == 4) return select_type(static_cast<const uint32_t*>(x), bits, n, static_cast<uint32_t*>(out));
  if (width == 2) return select_type(static_cast<const uint16_t*>(x), bits, n, static_cast<uint16_t*>(out));
  if (width == 8) return select_type(static_cast<const uint64_t*>(x), bits, n, static_cast<uint64_t*>(out));
  select_type(static_cast<const uint8_t*>(x), bits, n, static_cast<uint8_t*>(out));
}

// ----------------------------------------------------------------------------------------------- quantizer

void widen(const void* x, int64_t n, float* out) {
  const auto* s = static_cast<const uint16_t*>(x);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(out + i, reinterpret_cast<vf>(load_lanes(s + i) << 16));
  for (; i < n; ++i) {
    const uint32_t u = static_cast<uint32_t>(s[i]) << 16;
    memcpy(out + i, &u, 4);
  }
}

void narrow(const float* x, int64_t n, void* out) {  // finite values alone
  auto* d = static_cast<uint16_t*>(out);
  for (int64_t i = 0; i < n; i += VL) {
    const vu u = reinterpret_cast<vu>(load(x + i));
    store_lanes(d + i, (u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
}

// 16 lanes of xorshift, whatever the vector length, so that every instruction set rounds alike. A draw is two
// numbers of 16 bits.
constexpr int kLaneVectors = 16 / VL;
struct Random {
  vu state[kLaneVectors];
  explicit Random(uint64_t seed) {
    for (int j = 0; j < 16; ++j) {
      seed += 0x9e3779b97f4a7c15ull;  // splitmix
      uint64_t z = seed;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
      state[j / VL][j % VL] = static_cast<uint32_t>(z >> 32) | 1u;
    }
  }
  AZ_INLINE vu next(int j) {
    vu& s = state[j];
    s ^= s << 13;
    s ^= s >> 17;
    s ^= s << 5;
    return s;
  }
};

AZ_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }
AZ_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

// To the nearest integer, ties to even.
AZ_INLINE vi nearest(vf v) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vi>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(v)));
#elif ACTZIP_VL == 8
  return reinterpret_cast<vi>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(v)));
#elif defined(__SSE2__)
  return reinterpret_cast<vi>(_mm_cvtps_epi32(reinterpret_cast<__m128>(v)));
#elif defined(__aarch64__)
  return reinterpret_cast<vi>(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(v)));
#else
  vi n;
  for (int l = 0; l < VL; ++l) n[l] = static_cast<int32_t>(__builtin_rintf(v[l]));
  return n;
#endif
}

// One lane of them all, by a tree.
template <class F>
AZ_INLINE float reduced(vf v, const F& of) {
  float x[VL];
  memcpy(x, &v, sizeof x);
#pragma GCC unroll 4
  for (int half = VL / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int l = 0; l < half; ++l) x[l] = of(x[l], x[l + half]);
  return x[0];
}

// Codes of VL values to bytes.
AZ_INLINE void store_bytes(uint8_t* p, vi q) {
#if ACTZIP_VL == 16
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(q)));
#elif ACTZIP_VL == 8
  const __m256i v = reinterpret_cast<__m256i>(q);
  const __m128i w = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(w, w));
#else
  for (int l = 0; l < VL; ++l) p[l] = static_cast<uint8_t>(q[l]);
#endif
}
AZ_INLINE vi load_bytes(const uint8_t* p) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif ACTZIP_VL == 8
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vi v;
  for (int l = 0; l < VL; ++l) v[l] = p[l];
  return v;
#endif
}

// The smallest and the largest of n values (a multiple of 2 * VL); false where one is not finite.
AZ_INLINE bool bounds(const float* x, int64_t n, float* lo, float* hi) {
  vf low[2] = {load(x), load(x + VL)}, high[2] = {low[0], low[1]};
  vi size[2] = {};
  for (int64_t i = 0; i < n; i += 2 * VL)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const vf v = load(x + i + j * VL);
      low[j] = smaller(low[j], v), high[j] = larger(high[j], v);
      const vi bits = reinterpret_cast<vi>(v) & 0x7fffffff;
      size[j] = size[j] > bits ? size[j] : bits;
    }
  *lo = reduced(smaller(low[0], low[1]), [](float a, float b) { return a < b ? a : b; });
  *hi = reduced(larger(high[0], high[1]), [](float a, float b) { return a > b ? a : b; });
  constexpr int32_t kInfinity = 0x7f800000;
  return (lanes(size[0] >= kInfinity) | lanes(size[1] >= kInfinity)) == 0;
}

// Codes in units of 2^-16, plus a random number of 16 bits, without those bits.
struct Scale {
  vf lo, units;
  int top;
  AZ_INLINE vi code(vf x, vu random) const {
    const vi up = nearest((x - lo) * units) + reinterpret_cast<vi>(random);
    const vi code = up >> 16;
    return code < top ? code : top;
  }
};

// n: a multiple of kCodeBlock, at most kGroup.
template <int BITS>
AZ_INLINE bool quantize_group(const float* x, int64_t n, Random& random, uint8_t* codes, Range* range) {
  static_assert(kCodeBlock == 32);
  float lo, hi;
  if (!bounds(x, n, &lo, &hi)) return false;
  constexpr int top = (1 << BITS) - 1;
  const float width = hi - lo;
  if (!(width <= 3.4028234e38f)) return false;
  const bool point = !(width > 0x1p-100f);  // a range too small to divide by
  *range = {lo, point ? 0.0f : width / top};
  const Scale scale{splat(lo), splat(point ? 0.0f : top / width * 65536.0f), top};
  for (int64_t i = 0; i < n; i += 32)
#pragma GCC unroll 4
    for (int j = 0; j < kLaneVectors; ++j) {
      const vu r = random.next(j);
      const vi a = scale.code(load(x + i + j * VL), r & 0xffff);
      const vi b = scale.code(load(x + i + 16 + j * VL), r >> 16);
      if constexpr (BITS == 8) {
        store_bytes(codes + i + j * VL, a);
        store_bytes(codes + i + 16 + j * VL, b);
      } else {
        store_bytes(codes + i / 2 + j * VL, a | (b << 4));
      }
    }
  return true;
}

template <int BITS>
bool quantize_bits(const float* x, int64_t n, uint64_t seed, uint8_t* codes, Range* ranges) {
  Random random(seed);
  for (; n >= kGroup; n -= kGroup, x += kGroup, codes += kGroup * BITS / 8)
    if (!quantize_group<BITS>(x, kGroup, random, codes, ranges++)) return false;
  if (n == 0) return true;
  alignas(64) float rest[kGroup] = {};
  const int64_t whole = (n + kCodeBlock - 1) / kCodeBlock * kCodeBlock;
  for (int64_t i = 0; i < whole; ++i) rest[i] = x[i < n ? i : n - 1];
  return quantize_group<BITS>(rest, whole, random, codes, ranges);
}

bool quantize(const float* x, int64_t n, int bits, uint64_t seed, uint8_t* codes, Range* ranges) {
  if (n == 0) return true;
  return bits == 8 ? quantize_bits<8>(x, n, seed, codes, ranges)
                   : quantize_bits<4>(x, n, seed, codes, ranges);
}

template <int BITS>
void dequantize_bits(const uint8_t* codes, const Range* ranges, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kCodeBlock) {
    const Range& range = ranges[i / kGroup];
    const vf lo = splat(range.lo), step = splat(range.step);
#pragma GCC unroll 8
    for (int j = 0; j < kCodeBlock; j += VL) {
      vi q;
      if constexpr (BITS == 8)
        q = load_bytes(codes + i + j);
      else if (j < 16)
        q = load_bytes(codes + i / 2 + j) & 15;
      else
        q = load_bytes(codes + i / 2 + j - 16) >> 4;
      store(out + i + j, __builtin_convertvector(q, vf) * step + lo);
    }
  }
}

void dequantize(const uint8_t* codes, const Range* ranges, int64_t n, int bits, float* out) {
  if (bits == 8)
    dequantize_bits<8>(codes, ranges, n, out);
  else
    dequantize_bits<4>(codes, ranges, n, out);
}

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {nonzero, test, compress, expand, fill, select, widen, narrow, quantize, dequantize};

}  // namespace actzip::training::ACTZIP_ISA_NS
