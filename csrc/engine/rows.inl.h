// The row functions, compiled once per instruction set: compiler vectors, and plain loops where GCC
// vectorises them. See csrc/common/cpu.h for what may stand here.
#include <math.h>

#include <cstdint>
#include <cstring>

#include "common/vectors.inl.h"
#include "engine/rows.h"

namespace actzip::engine {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

// A NaN in x passes all of these.
AZ_INLINE vf at_least(vf x, float lo) { return x < lo ? splat(lo) : x; }
AZ_INLINE vf at_most(vf x, float hi) { return x > hi ? splat(hi) : x; }
AZ_INLINE vf abs_(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff); }
AZ_INLINE vf with_sign(vf magnitude, vf of) {
  return reinterpret_cast<vf>(reinterpret_cast<vi>(magnitude) |
                              (reinterpret_cast<vi>(of) & static_cast<int32_t>(0x80000000u)));
}
// Of any two numbers the greater, NaN where there is one.
AZ_INLINE vf max_(vf a, vf b) {
  const vf m = b > a ? b : a;  // a NaN in a stays,
  return b != b ? b : m;       // one in b is taken
}

// x = n ln 2 + r with |r| <= ln 2 / 2, for |x| < 2^22 ln 2. Adding 1.5 * 2^23 rounds to an integer, which the
// sum's last bits then are: no conversion and no rounding mode.
AZ_INLINE vi reduce(vf x, vf* r) {
  const vf magic = splat(12582912.0f);
  const vf t = x * 1.44269504088896341f + magic;
  const vf n = t - magic;
  *r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return reinterpret_cast<vi>(t) - reinterpret_cast<vi>(magic);
}
// e^r - 1 there (Cephes expf)
AZ_INLINE vf exp_part(vf r) {
  vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r;
}
AZ_INLINE vf power(vi n) { return reinterpret_cast<vf>((n + 127) << 23); }  // 2^n, -126 <= n <= 127

// exp(x) to about 2 ulp for all x. In two factors, so that the limits become 0 and infinity by themselves.
AZ_INLINE vf exp_(vf x) {
  vf r;
  const vi n = reduce(at_most(at_least(x, -104.0f), 89.0f), &r);
  const vi half = n >> 1;
  return (exp_part(r) + 1.0f) * power(half) * power(n - half);
}

// e^x - 1 for x <= 0
AZ_INLINE vf expm1_(vf x) {
  vf r;
  const vf scale = power(reduce(at_least(x, -80.0f), &r));
  return exp_part(r) * scale + (scale - 1.0f);
}

AZ_INLINE vf sigmoid_(vf x) { return 1.0f / (1.0f + exp_(-x)); }

AZ_INLINE vf tanh_(vf x) {
  // small |x| by the odd series, where 1 - e^-2x loses digits
  const vf a = abs_(x);
  const vf e = exp_(-2.0f * a);
  const vf big = with_sign((1.0f - e) / (1.0f + e), x);
  const vf s = x * x;
  vf q = -5.70498872745e-3f * s + 2.06390887954e-2f;
  q = q * s - 5.37397155531e-2f;
  q = q * s + 1.33314422036e-1f;
  q = q * s - 3.33332819422e-1f;
  return a < 0.625f ? x + x * s * q : big;
}

// A rational approximation (that of Eigen), and 1 where erf rounds to it; to about 6 ulp, 3e-7.
AZ_INLINE vf erf_(vf x) {
  const vf y = at_most(at_least(x, -4.0f), 4.0f);
  const vf s = y * y;
  vf p = -2.72614225801306e-10f * s + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  vf q = -1.45660718464996e-05f * s - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  const vf e = at_most(at_least(y * p / q, -1.0f), 1.0f);
  return abs_(x) >= 3.8325f ? with_sign(splat(1.0f), x) : e;
}

AZ_INLINE vf log1p_(vf z) {  // 0 <= z <= 1 (Cephes logf)
  const vi upper = z > 0.41421356237f;
  const vf f = upper ? (z - 1.0f) * 0.5f : z;
  vf p = 7.0376836292e-2f * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const vf s = f * f;
  const vf y = f + (p * f * s - 0.5f * s);
  return upper ? y + 0.69314718056f : y;
}

AZ_INLINE vf log1p_exp(vf x) { return at_least(x, 0.0f) + log1p_(exp_(-abs_(x))); }  // log(1 + e^x)

// in and out may be the same, but not overlap otherwise: the last vector is computed before any is written.
template <class F>
AZ_INLINE void each(const float* in, float* out, int64_t n, F f) {
  if (n < VL) return store_part(out, f(load_part(in, n, 0.0f)), n);
  const vf last = f(load(in + n - VL));
  for (int64_t i = 0; i + VL < n; i += VL) store(out + i, f(load(in + i)));
  store(out + n - VL, last);
}
// the same with one number more an element
template <class F>
AZ_INLINE void each(const float* in, const float* with, float* out, int64_t n, F f) {
  if (n < VL) return store_part(out, f(load_part(in, n, 0.0f), load_part(with, n, 0.0f)), n);
  const vf last = f(load(in + n - VL), load(with + n - VL));
  for (int64_t i = 0; i + VL < n; i += VL) store(out + i, f(load(in + i), load(with + i)));
  store(out + n - VL, last);
}

void activate(const Act& c, const float* in, float* out, int64_t n, const float* param, int64_t step) {
  switch (c.fn) {
    case Fn::none:
      if (in != out) memmove(out, in, static_cast<size_t>(n) * 4);
      return;
    case Fn::relu:
      return each(in, out, n, [](vf x) { return at_least(x, 0.0f); });
    case Fn::clip: {
      const float lo = c.lo, hi = c.hi;
      return each(in, out, n, [=](vf x) { return at_most(at_least(x, lo), hi); });
    }
    case Fn::threshold: {
      const float hi = c.hi;
      if (step == 0) {
        const float t = *param;
        return each(in, out, n, [=](vf x) { return at_most(x <= t ? vf{} : x, hi); });
      }
      return each(in, param, out, n, [=](vf x, vf t) { return at_most(x <= t ? vf{} : x, hi); });
    }
    case Fn::leaky_relu: {
      const float a = c.alpha;
      return each(in, out, n, [=](vf x) { return x < 0.0f ? x * a : x; });
    }
    case Fn::prelu: {
      if (step == 0) {
        const float a = *param;
        return each(in, out, n, [=](vf x) { return x < 0.0f ? x * a : x; });
      }
      return each(in, param, out, n, [](vf x, vf a) { return x < 0.0f ? x * a : x; });
    }
    case Fn::elu: {
      const float a = c.alpha;
      return each(in, out, n, [=](vf x) { return x <= 0.0f ? a * expm1_(at_most(x, 0.0f)) : x; });
    }
    case Fn::selu:
      return each(in, out, n, [](vf x) {
        return 1.0507009873554805f * (x <= 0.0f ? 1.6732632423543772f * expm1_(at_most(x, 0.0f)) : x);
      });
    case Fn::celu: {
      const float a = c.alpha;
      return each(in, out, n, [=](vf x) { return x <= 0.0f ? a * expm1_(at_most(x / a, 0.0f)) : x; });
    }
    case Fn::softplus: {
      const float b = c.beta, limit = c.limit;
      return each(in, out, n, [=](vf x) {
        const vf z = x * b;
        return z > limit ? x : log1p_exp(z) / b;
      });
    }
    case Fn::softsign:
      return each(in, out, n, [](vf x) { return x / (1.0f + abs_(x)); });
    case Fn::sigmoid:
      return each(in, out, n, [](vf x) { return sigmoid_(x); });
    case Fn::logsigmoid:
      return each(in, out, n, [](vf x) { return -log1p_exp(-x); });
    case Fn::hardsigmoid: {
      const float a = c.alpha, b = c.beta;
      return each(in, out, n, [=](vf x) { return at_most(at_least(x * a + b, 0.0f), 1.0f); });
    }
    case Fn::tanh:
      return each(in, out, n, [](vf x) { return tanh_(x); });
    case Fn::silu:
      return each(in, out, n, [](vf x) { return x / (1.0f + exp_(-x)); });
    case Fn::gelu:
      return each(in, out, n, [](vf x) { return 0.5f * x * (1.0f + erf_(x * 0.70710678118654752f)); });
    case Fn::gelu_tanh:
      return each(in, out, n, [](vf x) {
        return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * (x + 0.044715f * x * x * x)));
      });
    case Fn::hardswish:
      return each(in, out, n,
                  [](vf x) { return x * at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f); });
    case Fn::mish:  // tanh(log(1 + e)) = (e^2 + 2 e) / (e^2 + 2 e + 2)
      return each(in, out, n, [](vf x) {
        const vf e = exp_(at_most(x, 20.0f));
        const vf m = e * (e + 2.0f);
        return x * (m / (m + 2.0f));
      });
    case Fn::exp:
      return each(in, out, n, [](vf x) { return exp_(x); });
    case Fn::log:
      for (int64_t i = 0; i < n; ++i) out[i] = logf(in[i]);
      return;
    case Fn::sqrt:
      for (int64_t i = 0; i < n; ++i) out[i] = sqrtf(in[i]);
      return;
    case Fn::rsqrt:
      for (int64_t i = 0; i < n; ++i) out[i] = 1.0f / sqrtf(in[i]);
      return;
    case Fn::reciprocal:
      return each(in, out, n, [](vf x) { return 1.0f / x; });
    case Fn::square:
      return each(in, out, n, [](vf x) { return x * x; });
    case Fn::neg:
      return each(in, out, n, [](vf x) { return -x; });
    case Fn::abs:
      return each(in, out, n, [](vf x) { return abs_(x); });
    case Fn::sign:
      return each(in, out, n, [](vf x) {
        const vf positive = x > 0.0f ? splat(1.0f) : vf{};
        return x < 0.0f ? splat(-1.0f) : positive;  // NaN: 0, as in PyTorch
      });
    case Fn::floor:
      for (int64_t i = 0; i < n; ++i) out[i] = floorf(in[i]);
      return;
    case Fn::ceil:
      for (int64_t i = 0; i < n; ++i) out[i] = ceilf(in[i]);
      return;
    case Fn::round:
      for (int64_t i = 0; i < n; ++i) out[i] = nearbyintf(in[i]);
      return;
    case Fn::erf:
      return each(in, out, n, [](vf x) { return erf_(x); });
    case Fn::sin:
      for (int64_t i = 0; i < n; ++i) out[i] = sinf(in[i]);
      return;
    case Fn::cos:
      for (int64_t i = 0; i < n; ++i) out[i] = cosf(in[i]);
      return;
  }
}

template <class F>
AZ_INLINE void two(const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t n, F f) {
  if (sa == 1 && sb == 1) {
    if (out == b) return each(b, a, out, n, [=](vf y, vf x) { return f(x, y); });
    return each(a, b, out, n, f);
  }
  if (sa == 1) {
    const vf y = splat(*b);
    return each(a, out, n, [=](vf x) { return f(x, y); });
  }
  if (sb == 1) {
    const vf x = splat(*a);
    return each(b, out, n, [=](vf y) { return f(x, y); });
  }
  const float z = f(splat(*a), splat(*b))[0];
  for (int64_t i = 0; i < n; ++i) out[i] = z;
}

void binary(BinaryFn fn, const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t n) {
  switch (fn) {
    case BinaryFn::add:
      return two(a, sa, b, sb, out, n, [](vf x, vf y) { return x + y; });
    case BinaryFn::sub:
      return two(a, sa, b, sb, out, n, [](vf x, vf y) { return x - y; });
    case BinaryFn::mul:
      return two(a, sa, b, sb, out, n, [](vf x, vf y) { return x * y; });
    case BinaryFn::div:
      return two(a, sa, b, sb, out, n, [](vf x, vf y) { return x / y; });
    case BinaryFn::max:
      return two(a, sa, b, sb, out, n, [](vf x, vf y) { return max_(y, x); });
    case BinaryFn::min:
      return two(a, sa, b, sb, out, n, [](vf x, vf y) { return -max_(-y, -x); });
    case BinaryFn::pow:
      for (int64_t i = 0; i < n; ++i) out[i] = powf(a[i * sa], b[i * sb]);
      return;
  }
}

void max_rows(float* out, const float* const* rows, int64_t count, int64_t n) {
  memcpy(out, rows[0], static_cast<size_t>(n) * 4);
  for (int64_t k = 1; k < count; ++k) each(out, rows[k], out, n, [](vf x, vf y) { return max_(x, y); });
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
  each(acc, in, acc, n, [](vf x, vf y) { return max_(x, y); });
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

// f over vectors of n numbers, the last filled with `rest`, folded by g, beginning at `first`.
template <class F, class G>
AZ_INLINE vf fold(const float* x, int64_t n, float rest, float first, F f, G g) {
  vf a = splat(first), b = a;
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    a = g(a, f(load(x + i)));
    b = g(b, f(load(x + i + VL)));
  }
  if (i + VL <= n) {
    a = g(a, f(load(x + i)));
    i += VL;
  }
  if (i < n) b = g(b, f(load_part(x + i, n - i, rest)));
  return g(a, b);
}
AZ_INLINE double total(vf v) {
  double sum = 0;
  for (int i = 0; i < VL; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

void softmax(float* x, int64_t n, bool log) {
  const auto add = [](vf a, vf b) { return a + b; };
  const vf tops =
      fold(x, n, -INFINITY, -INFINITY, [](vf v) { return v; }, [](vf a, vf b) { return max_(a, b); });
  float top = -INFINITY;
  for (int i = 0; i < VL; ++i) top = tops[i] > top || tops[i] != tops[i] ? tops[i] : top;
  if (log) {
    const double sum = total(fold(x, n, -INFINITY, 0.0f, [=](vf v) { return exp_(v - top); }, add));
    const float shift = top + logf(static_cast<float>(sum));
    return each(x, x, n, [=](vf v) { return v - shift; });
  }
  each(x, x, n, [=](vf v) { return exp_(v - top); });
  const auto scale = static_cast<float>(1.0 / total(fold(x, n, 0.0f, 0.0f, [](vf v) { return v; }, add)));
  each(x, x, n, [=](vf v) { return v * scale; });
}

void layer_norm(const float* in, float* out, int64_t n, const float* weight, const float* bias, float eps) {
  const auto add = [](vf a, vf b) { return a + b; };
  const auto count = static_cast<double>(n);
  const auto mean = static_cast<float>(total(fold(in, n, 0.0f, 0.0f, [](vf v) { return v; }, add)) / count);
  const double square = total(fold(in, n, mean, 0.0f, [=](vf v) { return (v - mean) * (v - mean); }, add));
  const float scale = 1.0f / sqrtf(static_cast<float>(square / count) + eps);
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
