// The row functions, compiled once per instruction set: plain loops that the compiler vectorises. See
// csrc/common/cpu.h for what may stand here.
#include <math.h>

#include <cstdint>
#include <cstring>

#include "engine/rows.h"

namespace actzip::engine {
namespace ACTZIP_ISA_NS {
namespace {

#define ACTZIP_INLINE inline __attribute__((always_inline))

// exp(x) to about 2 ulp for all x, branch-free: 2^n * e^r, |r| <= ln 2 / 2, degree 6 (Cephes expf).
ACTZIP_INLINE float exp_(float x) {
  float y = x < -87.3365f ? -87.3365f : x;  // NaN passes both
  y = y > 88.7228f ? 88.7228f : y;
  const float t = y * 1.44269504088896341f;
  const float n = floorf(t + 0.5f);
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // two factors, so that n = 128 does not overflow on the way; the conversion of a NaN is not used
  const float m = n != n ? 0.0f : n;
  const int32_t a = static_cast<int32_t>(m) >> 1, b = static_cast<int32_t>(m) - a;
  const int32_t ia = (a + 127) << 23, ib = (b + 127) << 23;
  float fa, fb;
  memcpy(&fa, &ia, 4);
  memcpy(&fb, &ib, 4);
  const float e = p * fa * fb;
  const float big = x > 88.7228f ? INFINITY : e;
  return x < -103.9721f ? 0.0f : big;
}

ACTZIP_INLINE float sigmoid_(float x) { return 1.0f / (1.0f + exp_(-x)); }

ACTZIP_INLINE float tanh_(float x) {
  // small |x| by the odd series, where 1 - e^-2x loses digits
  const float a = x < 0 ? -x : x;
  const float e = exp_(-2.0f * a);
  const float big = (1.0f - e) / (1.0f + e);
  const float s = x * x;
  float q = -5.70498872745e-3f;
  q = q * s + 2.06390887954e-2f;
  q = q * s - 5.37397155531e-2f;
  q = q * s + 1.33314422036e-1f;
  q = q * s - 3.33332819422e-1f;
  const float small = x + x * s * q;
  const float signed_big = x < 0 ? -big : big;
  return a < 0.625f ? small : signed_big;
}

// Abramowitz & Stegun 7.1.26 (absolute error 1.5e-7) beyond 0.5, its series below.
ACTZIP_INLINE float erf_(float x) {
  const float a = x < 0 ? -x : x;
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float big = 1.0f - p * t * exp_(-a * a);
  const float s = x * x;
  float q = -1.0f / 1320.0f;
  q = q * s + 1.0f / 216.0f;
  q = q * s - 1.0f / 42.0f;
  q = q * s + 0.1f;
  q = q * s - 1.0f / 3.0f;
  const float small = 1.1283791670955126f * (x + x * s * q);
  const float signed_big = x < 0 ? -big : big;
  return a < 0.5f ? small : signed_big;
}

ACTZIP_INLINE float log1p_exp(float x) {  // log(1 + e^x)
  const float a = x < 0 ? -x : x;
  return (x > 0 ? x : (x <= 0 ? 0.0f : x)) + log1pf(exp_(-a));
}

template <class F>
ACTZIP_INLINE void each(const float* in, float* out, int64_t n, F f) {
  for (int64_t i = 0; i < n; ++i) out[i] = f(in[i]);
}

void activate(const Act& c, const float* in, float* out, int64_t n, const float* param, int64_t step) {
  switch (c.fn) {
    case Fn::none:
      if (in != out) memmove(out, in, static_cast<size_t>(n) * 4);
      return;
    case Fn::relu:
      return each(in, out, n, [](float x) { return x < 0.0f ? 0.0f : x; });
    case Fn::clip: {
      const float lo = c.lo, hi = c.hi;
      return each(in, out, n, [=](float x) {
        const float y = x < lo ? lo : x;
        return y > hi ? hi : y;
      });
    }
    case Fn::threshold: {
      const float hi = c.hi;
      if (step == 0) {
        const float t = *param;
        return each(in, out, n, [=](float x) {
          const float y = x <= t ? 0.0f : x;
          return y > hi ? hi : y;
        });
      }
      for (int64_t i = 0; i < n; ++i) {
        const float y = in[i] <= param[i] ? 0.0f : in[i];
        out[i] = y > hi ? hi : y;
      }
      return;
    }
    case Fn::leaky_relu: {
      const float a = c.alpha;
      return each(in, out, n, [=](float x) { return x < 0.0f ? x * a : x; });
    }
    case Fn::prelu:
      for (int64_t i = 0; i < n; ++i) out[i] = in[i] < 0.0f ? in[i] * param[i * step] : in[i];
      return;
    case Fn::elu: {
      const float a = c.alpha;
      for (int64_t i = 0; i < n; ++i) out[i] = in[i] <= 0.0f ? a * expm1f(in[i]) : in[i];
      return;
    }
    case Fn::selu:
      for (int64_t i = 0; i < n; ++i)
        out[i] = 1.0507009873554805f * (in[i] <= 0.0f ? 1.6732632423543772f * expm1f(in[i]) : in[i]);
      return;
    case Fn::celu: {
      const float a = c.alpha;
      for (int64_t i = 0; i < n; ++i) out[i] = in[i] <= 0.0f ? a * expm1f(in[i] / a) : in[i];
      return;
    }
    case Fn::softplus: {
      const float b = c.beta, limit = c.limit;
      for (int64_t i = 0; i < n; ++i) {
        const float z = in[i] * b;
        out[i] = z > limit ? in[i] : log1p_exp(z) / b;
      }
      return;
    }
    case Fn::softsign:
      return each(in, out, n, [](float x) { return x / (1.0f + (x < 0 ? -x : x)); });
    case Fn::sigmoid:
      return each(in, out, n, [](float x) { return sigmoid_(x); });
    case Fn::logsigmoid:
      for (int64_t i = 0; i < n; ++i) out[i] = -log1p_exp(-in[i]);
      return;
    case Fn::hardsigmoid: {
      const float a = c.alpha, b = c.beta;
      return each(in, out, n, [=](float x) {
        const float y = x * a + b;
        const float z = y < 0.0f ? 0.0f : y;
        return z > 1.0f ? 1.0f : z;
      });
    }
    case Fn::tanh:
      return each(in, out, n, [](float x) { return tanh_(x); });
    case Fn::silu:
      return each(in, out, n, [](float x) { return x / (1.0f + exp_(-x)); });
    case Fn::gelu:
      return each(in, out, n, [](float x) { return 0.5f * x * (1.0f + erf_(x * 0.70710678118654752f)); });
    case Fn::gelu_tanh:
      return each(in, out, n, [](float x) {
        return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * (x + 0.044715f * x * x * x)));
      });
    case Fn::hardswish:
      return each(in, out, n, [](float x) {
        const float y = x + 3.0f;
        const float z = y < 0.0f ? 0.0f : y;
        return x * (z > 6.0f ? 6.0f : z) * (1.0f / 6.0f);
      });
    case Fn::mish:
      for (int64_t i = 0; i < n; ++i) out[i] = in[i] * tanh_(in[i] > 20.0f ? in[i] : log1p_exp(in[i]));
      return;
    case Fn::exp:
      return each(in, out, n, [](float x) { return exp_(x); });
    case Fn::log:
      for (int64_t i = 0; i < n; ++i) out[i] = logf(in[i]);
      return;
    case Fn::sqrt:
      return each(in, out, n, [](float x) { return sqrtf(x); });
    case Fn::rsqrt:
      return each(in, out, n, [](float x) { return 1.0f / sqrtf(x); });
    case Fn::reciprocal:
      return each(in, out, n, [](float x) { return 1.0f / x; });
    case Fn::square:
      return each(in, out, n, [](float x) { return x * x; });
    case Fn::neg:
      return each(in, out, n, [](float x) { return -x; });
    case Fn::abs:
      return each(in, out, n, [](float x) { return fabsf(x); });
    case Fn::sign:
      return each(in, out, n, [](float x) {
        return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f;  // NaN: 0, as in PyTorch
      });
    case Fn::floor:
      return each(in, out, n, [](float x) { return floorf(x); });
    case Fn::ceil:
      return each(in, out, n, [](float x) { return ceilf(x); });
    case Fn::round:
      for (int64_t i = 0; i < n; ++i) out[i] = nearbyintf(in[i]);
      return;
    case Fn::erf:
      return each(in, out, n, [](float x) { return erf_(x); });
    case Fn::sin:
      for (int64_t i = 0; i < n; ++i) out[i] = sinf(in[i]);
      return;
    case Fn::cos:
      for (int64_t i = 0; i < n; ++i) out[i] = cosf(in[i]);
      return;
  }
}

template <class F>
ACTZIP_INLINE void two(const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t n, F f) {
  if (sa == 1 && sb == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], b[i]);
  } else if (sa == 1) {
    const float y = *b;
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], y);
  } else if (sb == 1) {
    const float x = *a;
    for (int64_t i = 0; i < n; ++i) out[i] = f(x, b[i]);
  } else {
    const float z = f(*a, *b);
    for (int64_t i = 0; i < n; ++i) out[i] = z;
  }
}

void binary(BinaryFn fn, const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t n) {
  switch (fn) {
    case BinaryFn::add:
      return two(a, sa, b, sb, out, n, [](float x, float y) { return x + y; });
    case BinaryFn::sub:
      return two(a, sa, b, sb, out, n, [](float x, float y) { return x - y; });
    case BinaryFn::mul:
      return two(a, sa, b, sb, out, n, [](float x, float y) { return x * y; });
    case BinaryFn::div:
      return two(a, sa, b, sb, out, n, [](float x, float y) { return x / y; });
    case BinaryFn::max:
      return two(a, sa, b, sb, out, n, [](float x, float y) { return x > y || x != x ? x : y; });
    case BinaryFn::min:
      return two(a, sa, b, sb, out, n, [](float x, float y) { return x < y || x != x ? x : y; });
    case BinaryFn::pow:
      return two(a, sa, b, sb, out, n, [](float x, float y) { return powf(x, y); });
  }
}

void max_rows(float* out, const float* const* rows, int64_t count, int64_t n) {
  memcpy(out, rows[0], static_cast<size_t>(n) * 4);
  int64_t k = 1;
  for (; k + 1 < count; k += 2) {
    const float *a = rows[k], *b = rows[k + 1];
    for (int64_t i = 0; i < n; ++i) {
      const float x = a[i] > out[i] || a[i] != a[i] ? a[i] : out[i];
      out[i] = b[i] > x || b[i] != b[i] ? b[i] : x;
    }
  }
  for (; k < count; ++k) {
    const float* a = rows[k];
    for (int64_t i = 0; i < n; ++i) out[i] = a[i] > out[i] || a[i] != a[i] ? a[i] : out[i];
  }
}

void sum_rows(float* out, const float* const* rows, int64_t count, int64_t n, float scale,
              const float* bias) {
  int64_t i = 0;
  constexpr int64_t kChunk = 64;
  for (; i < n; i += kChunk) {
    const int64_t m = n - i < kChunk ? n - i : kChunk;
    float acc[kChunk];
    for (int64_t j = 0; j < m; ++j) acc[j] = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
      const float* row = rows[k] + i;
      for (int64_t j = 0; j < m; ++j) acc[j] += row[j];
    }
    if (bias != nullptr) {
      for (int64_t j = 0; j < m; ++j) out[i + j] = acc[j] * scale + bias[i + j];
    } else {
      for (int64_t j = 0; j < m; ++j) out[i + j] = acc[j] * scale;
    }
  }
}

void affine(const float* in, float* out, const float* scale, const float* shift, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * scale[i] + shift[i];
}

void accumulate(float* acc, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) acc[i] += in[i];
}

void accumulate_max(float* acc, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) acc[i] = in[i] > acc[i] || in[i] != in[i] ? in[i] : acc[i];
}

void lerp4(float* out, const float* a, const float* b, const float* c, const float* d, float wa, float wb,
           float wc, float wd, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = (a[i] * wa + b[i] * wb) + (c[i] * wc + d[i] * wd);
}

void vec_mat(float* out, const float* a, int64_t sa, const float* b, int64_t ldb, int64_t depth, int64_t n) {
  constexpr int64_t kChunk = 64;
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t m = n - i < kChunk ? n - i : kChunk;
    float acc[kChunk];
    for (int64_t j = 0; j < kChunk; ++j) acc[j] = 0.0f;
    if (m == kChunk) {
      for (int64_t k = 0; k < depth; ++k) {
        const float x = a[k * sa];
        const float* row = b + k * ldb + i;
        for (int64_t j = 0; j < kChunk; ++j) acc[j] += x * row[j];
      }
    } else {
      for (int64_t k = 0; k < depth; ++k) {
        const float x = a[k * sa];
        const float* row = b + k * ldb + i;
        for (int64_t j = 0; j < m; ++j) acc[j] += x * row[j];
      }
    }
    for (int64_t j = 0; j < m; ++j) out[i + j] = acc[j];
  }
}

void softmax(float* x, int64_t n, bool log) {
  float top = -INFINITY;
  for (int64_t i = 0; i < n; ++i) top = x[i] > top || x[i] != x[i] ? x[i] : top;
  if (log) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += exp_(x[i] - top);
    const float shift = top + logf(static_cast<float>(sum));
    for (int64_t i = 0; i < n; ++i) x[i] -= shift;
    return;
  }
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = exp_(x[i] - top);
    sum += x[i];
  }
  const float scale = 1.0f / sum;
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

void layer_norm(const float* in, float* out, int64_t n, const float* weight, const float* bias, float eps) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += in[i];
  const float mean = static_cast<float>(sum / static_cast<double>(n));
  double square = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float d = in[i] - mean;
    square += d * d;
  }
  const float scale = 1.0f / sqrtf(static_cast<float>(square / static_cast<double>(n)) + eps);
  if (weight != nullptr && bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = (in[i] - mean) * scale * weight[i] + bias[i];
  } else {
    for (int64_t i = 0; i < n; ++i)
      out[i] = (in[i] - mean) * scale * (weight != nullptr ? weight[i] : 1.0f) +
               (bias != nullptr ? bias[i] : 0.0f);
  }
}

void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t rows,
               int64_t cols) {
  constexpr int64_t kTile = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kTile) {
    const int64_t r1 = r0 + kTile < rows ? r0 + kTile : rows;
    for (int64_t c0 = 0; c0 < cols; c0 += kTile) {
      const int64_t c1 = c0 + kTile < cols ? c0 + kTile : cols;
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t r = r0; r < r1; ++r) dst[c * dst_stride + r] = src[r * src_stride + c];
    }
  }
}

int64_t count_nonzero(const float* x, int64_t n) {
  int64_t k = 0;
  for (int64_t i = 0; i < n; ++i) k += x[i] != 0.0f ? 1 : 0;
  return k;
}

}  // namespace

extern const Rows kRows;
const Rows kRows = {ACTZIP_ISA_ID,  activate, binary,  max_rows, sum_rows,   affine,    accumulate,
                    accumulate_max, lerp4,    vec_mat, softmax,  layer_norm, transpose, count_nonzero};

}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::engine
