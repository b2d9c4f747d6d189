// The row functions of pooling. See csrc/common/cpu.h for what may stand here.
#include <cstdint>
#include <cstring>

#include "engine/pool.h"

namespace actzip::engine {
namespace ACTZIP_ISA_NS {
namespace {

// Floats at once: one register. Of wider vectors GCC takes comparisons apart, lane by lane.
#if defined(__AVX512F__)
constexpr int kPoolV = 16;
#elif defined(__AVX2__)
constexpr int kPoolV = 8;
#else
constexpr int kPoolV = 4;
#endif
typedef float PoolV __attribute__((vector_size(kPoolV * 4)));
typedef float PoolVU __attribute__((vector_size(kPoolV * 4), aligned(4), may_alias));

#define ACTZIP_POOL_INLINE inline __attribute__((always_inline))

ACTZIP_POOL_INLINE PoolV pool_load(const float* p) { return *reinterpret_cast<const PoolVU*>(p); }
ACTZIP_POOL_INLINE void pool_store(float* p, PoolV v) { *reinterpret_cast<PoolVU*>(p) = v; }
ACTZIP_POOL_INLINE PoolV pool_splat(float x) { return x - PoolV{}; }

template <bool MAX>
ACTZIP_POOL_INLINE float fold(float a, float b) {
  return MAX ? (b > a || b != b ? b : a) : a + b;
}
template <bool MAX>
ACTZIP_POOL_INLINE PoolV fold(PoolV a, PoolV b) {
  if constexpr (MAX) {
    const PoolV m = a > b ? a : b;  // a NaN in `b` is taken,
    return a != a ? a : m;          // one in `a` stays
  }
  return a + b;
}
template <bool MAX>
ACTZIP_POOL_INLINE float neutral() {
  return MAX ? -__builtin_inff() : 0.0f;
}

template <bool MAX>
void rows(const PoolRows& r) {
  if (r.count == 0) {
    for (int64_t x = 0; x < r.pixels; ++x)
      for (int64_t j = 0; j < r.width; ++j) r.out[x * kPoolBlock + j] = neutral<MAX>();
    return;
  }
  const float* const* in = r.rows;
  const int64_t count = r.count, whole = r.width / kPoolV * kPoolV;
  for (int64_t x = 0; x < r.pixels; ++x) {
    const int64_t at = x * r.stride;
    float* out = r.out + x * kPoolBlock;
    int64_t j = 0;
    if (count == 3) {
      for (; j < whole; j += kPoolV)
        pool_store(out + j, fold<MAX>(fold<MAX>(pool_load(in[0] + at + j), pool_load(in[1] + at + j)),
                                      pool_load(in[2] + at + j)));
    } else {
      for (; j < whole; j += kPoolV) {
        PoolV a = pool_load(in[0] + at + j);
        for (int64_t k = 1; k < count; ++k) a = fold<MAX>(a, pool_load(in[k] + at + j));
        pool_store(out + j, a);
      }
    }
    for (; j < r.width; ++j) {
      float a = in[0][at + j];
      for (int64_t k = 1; k < count; ++k) a = fold<MAX>(a, in[k][at + j]);
      out[j] = a;
    }
  }
}

// One output pixel from taps that lie inside.
template <bool MAX>
ACTZIP_POOL_INLINE void cols_pixel(const PoolCols& c, int64_t ox, const float* first, int64_t taps,
                                   int64_t step) {
  float* out = c.out + ox * c.out_stride;
  const float scale = MAX ? 1.0f : c.scale[ox];
  const int64_t whole = c.width / kPoolV * kPoolV;
  int64_t j = 0;
  for (; j < whole; j += kPoolV) {
    PoolV a;
    if (taps == 3) {
      a = fold<MAX>(fold<MAX>(pool_load(first + j), pool_load(first + step + j)),
                    pool_load(first + 2 * step + j));
    } else {
      a = pool_splat(neutral<MAX>());
      if (taps > 0) a = pool_load(first + j);
      for (int64_t k = 1; k < taps; ++k) a = fold<MAX>(a, pool_load(first + k * step + j));
    }
    if constexpr (!MAX) a = a * scale;
    if (c.bias != nullptr) a += pool_load(c.bias + j);
    pool_store(out + j, a);
  }
  for (; j < c.width; ++j) {
    float a = neutral<MAX>();
    if (taps > 0) a = first[j];
    for (int64_t k = 1; k < taps; ++k) a = fold<MAX>(a, first[k * step + j]);
    if (!MAX) a *= scale;
    if (c.bias != nullptr) a += c.bias[j];
    out[j] = a;
  }
}

template <bool MAX>
void cols(const PoolCols& c) {
  const int64_t step = c.dw * c.in_stride;
  for (int64_t ox = 0; ox < c.ow; ++ox) {
    const int64_t left = ox * c.sw - c.pad_left;
    int64_t k0 = 0, k1 = c.kw;  // taps inside: [k0, k1)
    if (left < 0) k0 = (-left + c.dw - 1) / c.dw;
    if (left + (c.kw - 1) * c.dw >= c.iw) k1 = left >= c.iw ? 0 : (c.iw - 1 - left) / c.dw + 1;
    if (k1 > c.kw) k1 = c.kw;
    const int64_t taps = k1 > k0 ? k1 - k0 : 0;
    cols_pixel<MAX>(c, ox, taps > 0 ? c.in + (left + k0 * c.dw) * c.in_stride : c.in, taps, step);
  }
}

}  // namespace

extern const PoolTable kPool;
const PoolTable kPool = {ACTZIP_ISA_ID, rows<true>, rows<false>, cols<true>, cols<false>};

}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::engine
