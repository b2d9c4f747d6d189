// The row functions of pooling. See csrc/common/cpu.h for what may stand here.
#include <cstdint>
#include <cstring>

#include "common/vectors.inl.h"
#include "engine/nodes/pool.h"

namespace actzip::engine {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

template <bool MAX>
AZ_INLINE vf fold(vf a, vf b) {
  if constexpr (MAX) {
    const vf m = a > b ? a : b;  // a NaN in `b` is taken,
    return a != a ? a : m;       // one in `a` stays
  }
  return a + b;
}
template <bool MAX>
AZ_INLINE float neutral() {
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
  const int64_t count = r.count, whole = r.width / VL * VL;
  for (int64_t x = 0; x < r.pixels; ++x) {
    const int64_t at = x * r.stride;
    float* out = r.out + x * kPoolBlock;
    int64_t j = 0;
    if (count == 3) {
      for (; j < whole; j += VL)
        store(out + j,
              fold<MAX>(fold<MAX>(load(in[0] + at + j), load(in[1] + at + j)), load(in[2] + at + j)));
    } else {
      for (; j < whole; j += VL) {
        vf a = load(in[0] + at + j);
        for (int64_t k = 1; k < count; ++k) a = fold<MAX>(a, load(in[k] + at + j));
        store(out + j, a);
      }
    }
    if (j < r.width) {
      const int64_t lanes = r.width - j;
      vf a = load_part(in[0] + at + j, lanes);
      for (int64_t k = 1; k < count; ++k) a = fold<MAX>(a, load_part(in[k] + at + j, lanes));
      store_part(out + j, a, lanes);
    }
  }
}

// One output pixel from taps that lie inside.
template <bool MAX>
AZ_INLINE void cols_pixel(const PoolCols& c, int64_t ox, const float* first, int64_t taps, int64_t step) {
  float* out = c.out + ox * c.out_stride;
  const float scale = MAX ? 1.0f : c.scale[ox];
  const int64_t whole = c.width / VL * VL;
  int64_t j = 0;
  for (; j < whole; j += VL) {
    vf a;
    if (taps == 3) {
      a = fold<MAX>(fold<MAX>(load(first + j), load(first + step + j)), load(first + 2 * step + j));
    } else {
      a = splat(neutral<MAX>());
      if (taps > 0) a = load(first + j);
      for (int64_t k = 1; k < taps; ++k) a = fold<MAX>(a, load(first + k * step + j));
    }
    if constexpr (!MAX) a = a * scale;
    if (c.bias != nullptr) a += load(c.bias + j);
    store(out + j, a);
  }
  if (j < c.width) {
    const int64_t lanes = c.width - j;
    vf a = splat(neutral<MAX>());
    if (taps > 0) a = load_part(first + j, lanes);
    for (int64_t k = 1; k < taps; ++k) a = fold<MAX>(a, load_part(first + k * step + j, lanes));
    if constexpr (!MAX) a = a * scale;
    if (c.bias != nullptr) a += load_part(c.bias + j, lanes);
    store_part(out + j, a, lanes);
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
