// The definitions of functions.h's rows, compiled once per instruction set. See csrc/common/cpu.h for what
// may stand here.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>

#include "common/vectors.inl.h"
#include "engine/functions.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own headers (bug 105593)
#endif

namespace actzip::engine {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

// A NaN in x passes all of these. (The instructions give their second operand where one is NaN or both are
// 0.)
AZ_INLINE vf at_least(vf x, float lo) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vf>(
      _mm512_max_ps(reinterpret_cast<__m512>(splat(lo)), reinterpret_cast<__m512>(x)));
#elif ACTZIP_VL == 8
  return reinterpret_cast<vf>(
      _mm256_max_ps(reinterpret_cast<__m256>(splat(lo)), reinterpret_cast<__m256>(x)));
#else
  return x < lo ? splat(lo) : x;
#endif
}
AZ_INLINE vf at_most(vf x, float hi) {
#if ACTZIP_VL == 16
  return reinterpret_cast<vf>(
      _mm512_min_ps(reinterpret_cast<__m512>(splat(hi)), reinterpret_cast<__m512>(x)));
#elif ACTZIP_VL == 8
  return reinterpret_cast<vf>(
      _mm256_min_ps(reinterpret_cast<__m256>(splat(hi)), reinterpret_cast<__m256>(x)));
#else
  return x > hi ? splat(hi) : x;
#endif
}
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
struct Reduced {
  vf r, n;
  vi exponent;  // n
};
AZ_INLINE Reduced reduce(vf x) {
  const vf magic = splat(12582912.0f);
  const vf t = x * 1.44269504088896341f + magic;
  const vf n = t - magic;
  return {(x - n * 0.693359375f) + n * 2.12194440e-4f, n,
          reinterpret_cast<vi>(t) - reinterpret_cast<vi>(magic)};
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
AZ_INLINE vf power(vi n) { return reinterpret_cast<vf>((n + 127) << 23); }  // 2^n, n <= 127; 0 for n = -127

// exp(x) to about 2 ulp for all x. In two factors, so that the limits become 0 and infinity by themselves.
AZ_INLINE vf exp_(vf x) {
  const Reduced q = reduce(at_most(at_least(x, -104.0f), 89.0f));
  const vf p = exp_part(q.r) + 1.0f;
#if ACTZIP_VL == 16
  return reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(q.n)));
#else
  const vi half = q.exponent >> 1;
  return p * power(half) * power(q.exponent - half);
#endif
}
// The same for x <= 0, in one factor: what would be subnormal is 0.
AZ_INLINE vf exp_down(vf x) {
  const Reduced q = reduce(at_least(x, -88.0f));
  return (exp_part(q.r) + 1.0f) * power(q.exponent);
}

// e^x - 1 for x <= 0
AZ_INLINE vf expm1_(vf x) {
  const Reduced q = reduce(at_least(x, -80.0f));
  const vf scale = power(q.exponent);
  return exp_part(q.r) * scale + (scale - 1.0f);
}

// 1 / x for 2^-125 < |x| < 2^125, to 2 ulp
AZ_INLINE vf inverse(vf x) {
#if ACTZIP_VL == 16
  const vf y = reinterpret_cast<vf>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// 0 where the answer is below 5e-38.
AZ_INLINE vf sigmoid_(vf x) {
  const vf y = inverse(1.0f + exp_(-at_least(x, -86.0f)));
  return x < -86.0f ? vf{} : y;
}

AZ_INLINE vf tanh_(vf x) {
  // small |x| by the odd series, where 1 - e^-2x loses digits
  const vf a = abs_(x);
  const vf e = exp_down(-2.0f * a);
  const vf big = with_sign((1.0f - e) * inverse(1.0f + e), x);
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
  const vf e = at_most(at_least(y * p * inverse(q), -1.0f), 1.0f);
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

AZ_INLINE vf log1p_exp(vf x) { return at_least(x, 0.0f) + log1p_(exp_down(-abs_(x))); }  // log(1 + e^x)

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

// out[i] = f(in[i]) over n elements; `param`: one number an element (step 1) or one for all (step 0).
struct Elements {
  const Act& act;
  const float* in;
  float* out;
  int64_t n;
  const float* param;
  int64_t step;
};
template <class F>
AZ_INLINE void each(const Elements& e, F f) {
  each(e.in, e.out, e.n, f);
}
template <class F>
AZ_INLINE void with_param(const Elements& e, F f) {
  if (e.step != 0) return each(e.in, e.param, e.out, e.n, f);
  const vf p = splat(*e.param);
  each(e.in, e.out, e.n, [=](vf x) { return f(x, p); });
}
// Functions of the C library, a number at a time where the compiler knows no better.
template <class F>
AZ_INLINE void scalar(const Elements& e, F f) {
  for (int64_t i = 0; i < e.n; ++i) e.out[i] = f(e.in[i]);
}

namespace fn {

void none(const Elements& e) {
  if (e.in != e.out) memmove(e.out, e.in, static_cast<size_t>(e.n) * 4);
}
void relu(const Elements& e) {
  each(e, [](vf x) { return at_least(x, 0.0f); });
}
void clip(const Elements& e) {
  const float lo = e.act.lo, hi = e.act.hi;
  each(e, [=](vf x) { return at_most(at_least(x, lo), hi); });
}
void threshold(const Elements& e) {
  const float hi = e.act.hi;
  with_param(e, [=](vf x, vf t) { return at_most(x <= t ? vf{} : x, hi); });
}
void leaky_relu(const Elements& e) {
  const float a = e.act.alpha;
  each(e, [=](vf x) { return x < 0.0f ? x * a : x; });
}
void prelu(const Elements& e) {
  with_param(e, [](vf x, vf a) { return x < 0.0f ? x * a : x; });
}
void elu(const Elements& e) {
  const float a = e.act.alpha;
  each(e, [=](vf x) { return x <= 0.0f ? a * expm1_(at_most(x, 0.0f)) : x; });
}
void selu(const Elements& e) {
  each(e, [](vf x) {
    return 1.0507009873554805f * (x <= 0.0f ? 1.6732632423543772f * expm1_(at_most(x, 0.0f)) : x);
  });
}
void celu(const Elements& e) {
  const float a = e.act.alpha;
  each(e, [=](vf x) { return x <= 0.0f ? a * expm1_(at_most(x / a, 0.0f)) : x; });
}
void softplus(const Elements& e) {
  const float b = e.act.beta, limit = e.act.limit;
  each(e, [=](vf x) {
    const vf z = x * b;
    return z > limit ? x : log1p_exp(z) / b;
  });
}
void softsign(const Elements& e) {
  each(e, [](vf x) { return x / (1.0f + abs_(x)); });
}
void sigmoid(const Elements& e) {
  each(e, [](vf x) { return sigmoid_(x); });
}
void logsigmoid(const Elements& e) {
  each(e, [](vf x) { return -log1p_exp(-x); });
}
void hardsigmoid(const Elements& e) {
  const float a = e.act.alpha, b = e.act.beta;
  each(e, [=](vf x) { return at_most(at_least(x * a + b, 0.0f), 1.0f); });
}
void tanh(const Elements& e) {
  each(e, [](vf x) { return tanh_(x); });
}
void silu(const Elements& e) {
  each(e, [](vf x) { return x * sigmoid_(x); });
}
void gelu(const Elements& e) {
  each(e, [](vf x) { return 0.5f * x * (1.0f + erf_(x * 0.70710678118654752f)); });
}
void gelu_tanh(const Elements& e) {
  each(e, [](vf x) { return 0.5f * x * (1.0f + tanh_(0.7978845608028654f * (x + 0.044715f * x * x * x))); });
}
// min(max(x + 3, 0), 6) / 6: 1 where x is 3 or more, so that h-swish gives x itself there.
AZ_INLINE vf hard_gate(vf x) { return at_most(at_least(x + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f); }
void hardswish(const Elements& e) {
  each(e, [](vf x) { return x * hard_gate(x); });
}
void scaled_hardswish(const Elements& e) {
  const float a = e.act.alpha, b = e.act.beta;
  each(e, [=](vf x) { return x * hard_gate(x) * a + b; });
}
void mish(const Elements& e) {  // tanh(log(1 + y)) = (y^2 + 2 y) / (y^2 + 2 y + 2)
  each(e, [](vf x) {
    const vf y = exp_(at_most(x, 20.0f));
    const vf m = y * (y + 2.0f);
    return x * (m / (m + 2.0f));
  });
}
void exp(const Elements& e) {
  each(e, [](vf x) { return exp_(x); });
}
void log(const Elements& e) {
  scalar(e, [](float x) { return logf(x); });
}
void sqrt(const Elements& e) {
  scalar(e, [](float x) { return sqrtf(x); });
}
void rsqrt(const Elements& e) {
  scalar(e, [](float x) { return 1.0f / sqrtf(x); });
}
void reciprocal(const Elements& e) {
  each(e, [](vf x) { return 1.0f / x; });
}
void square(const Elements& e) {
  each(e, [](vf x) { return x * x; });
}
void neg(const Elements& e) {
  each(e, [](vf x) { return -x; });
}
void abs(const Elements& e) {
  each(e, [](vf x) { return abs_(x); });
}
void sign(const Elements& e) {
  each(e, [](vf x) {
    const vf positive = x > 0.0f ? splat(1.0f) : vf{};
    return x < 0.0f ? splat(-1.0f) : positive;
  });
}
void floor(const Elements& e) {
  scalar(e, [](float x) { return floorf(x); });
}
void ceil(const Elements& e) {
  scalar(e, [](float x) { return ceilf(x); });
}
void trunc(const Elements& e) {
  scalar(e, [](float x) { return truncf(x); });
}
void round(const Elements& e) {
  scalar(e, [](float x) { return nearbyintf(x); });
}
void quantize(const Elements& e) {
  const float step = e.act.alpha, lo = e.act.lo, hi = e.act.hi;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds
  each(e, [=](vf x) { return ((at_most(at_least(x / step, lo), hi) + magic) - magic) * step; });
}
void erf(const Elements& e) {
  each(e, [](vf x) { return erf_(x); });
}
void sin(const Elements& e) {
  scalar(e, [](float x) { return sinf(x); });
}
void cos(const Elements& e) {
  scalar(e, [](float x) { return cosf(x); });
}
void tan(const Elements& e) {
  scalar(e, [](float x) { return tanf(x); });
}
void atan(const Elements& e) {
  scalar(e, [](float x) { return atanf(x); });
}
void asin(const Elements& e) {
  scalar(e, [](float x) { return asinf(x); });
}
void acos(const Elements& e) {
  scalar(e, [](float x) { return acosf(x); });
}
void sinh(const Elements& e) {
  scalar(e, [](float x) { return sinhf(x); });
}
void cosh(const Elements& e) {
  scalar(e, [](float x) { return coshf(x); });
}
void asinh(const Elements& e) {
  scalar(e, [](float x) { return asinhf(x); });
}
void acosh(const Elements& e) {
  scalar(e, [](float x) { return acoshf(x); });
}
void atanh(const Elements& e) {
  scalar(e, [](float x) { return atanhf(x); });
}

}  // namespace fn

void activate(const Act& act, const float* in, float* out, int64_t n, const float* param, int64_t step) {
#define ACTZIP_ENTRY(name) fn::name,
  static constexpr void (*kTable[])(const Elements&) = {ACTZIP_FUNCTIONS(ACTZIP_ENTRY)};
#undef ACTZIP_ENTRY
  kTable[static_cast<int>(act.fn)]({act, in, out, n, param, step});
}

// out[i] = a[i * sa] fn b[i * sb], steps 0 or 1.
struct Pairs {
  const float* a;
  int64_t sa;
  const float* b;
  int64_t sb;
  float* out;
  int64_t n;
};

template <class F>
AZ_INLINE void two(const Pairs& p, F f) {
  const float *a = p.a, *b = p.b;
  float* out = p.out;
  const int64_t sa = p.sa, sb = p.sb, n = p.n;
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

namespace binary_fn {

void add(const Pairs& p) {
  two(p, [](vf x, vf y) { return x + y; });
}
void sub(const Pairs& p) {
  two(p, [](vf x, vf y) { return x - y; });
}
void mul(const Pairs& p) {
  two(p, [](vf x, vf y) { return x * y; });
}
void div(const Pairs& p) {
  two(p, [](vf x, vf y) { return x / y; });
}
void max(const Pairs& p) {
  two(p, [](vf x, vf y) { return max_(y, x); });
}
void min(const Pairs& p) {
  two(p, [](vf x, vf y) { return -max_(-y, -x); });
}
void pow(const Pairs& p) {
  for (int64_t i = 0; i < p.n; ++i) p.out[i] = powf(p.a[i * p.sa], p.b[i * p.sb]);
}
// Comparisons give 1 or 0.
void gt(const Pairs& p) {
  two(p, [](vf x, vf y) { return x > y ? splat(1.0f) : vf{}; });
}
void ge(const Pairs& p) {
  two(p, [](vf x, vf y) { return x >= y ? splat(1.0f) : vf{}; });
}
void lt(const Pairs& p) {
  two(p, [](vf x, vf y) { return x < y ? splat(1.0f) : vf{}; });
}
void le(const Pairs& p) {
  two(p, [](vf x, vf y) { return x <= y ? splat(1.0f) : vf{}; });
}
void eq(const Pairs& p) {
  two(p, [](vf x, vf y) { return x == y ? splat(1.0f) : vf{}; });
}
void ne(const Pairs& p) {
  two(p, [](vf x, vf y) { return x != y ? splat(1.0f) : vf{}; });
}
// y where x is not 0 (keep) or where it is (drop), else 0.
void keep(const Pairs& p) {
  two(p, [](vf x, vf y) { return x != 0.0f ? y : vf{}; });
}
void drop(const Pairs& p) {
  two(p, [](vf x, vf y) { return x != 0.0f ? vf{} : y; });
}

}  // namespace binary_fn

void binary(BinaryFn fn, const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t n) {
#define ACTZIP_ENTRY(name) binary_fn::name,
  static constexpr void (*kTable[])(const Pairs&) = {ACTZIP_BINARY_FUNCTIONS(ACTZIP_ENTRY)};
#undef ACTZIP_ENTRY
  kTable[static_cast<int>(fn)]({a, sa, b, sb, out, n});
}

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::engine

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
