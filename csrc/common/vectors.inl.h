// One register of floats, for everything that is compiled once per instruction set (see cpu.h for what may
// stand in such files). Written with compiler vectors, for GCC vectorises no loop that compares or converts
// unless told that floating point never traps; of vectors wider than a register it takes comparisons apart,
// lane by lane.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if ACTZIP_VL > 4
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define AZ_INLINE inline __attribute__((always_inline))

namespace actzip::ACTZIP_ISA_NS {
namespace {

constexpr int VL = ACTZIP_VL;  // floats of a register
#if ACTZIP_VL == 16 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

AZ_INLINE vf load(const float* p) { return *reinterpret_cast<const vfu*>(p); }
AZ_INLINE void store(float* p, vf v) { *reinterpret_cast<vfu*>(p) = v; }
AZ_INLINE vf splat(float x) { return x - vf{}; }  // x - 0 = x, NaN and infinities too

// Keeps a loaded vector in its register: left alone, GCC loads it again for every use.
AZ_INLINE void keep(vf& v) {
#if defined(__x86_64__) || defined(__i386__)
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#else
  __asm__("" : "+x"(v));
#endif
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
}

// f(0), f(1), ... f(N - 1) with numbers known to the compiler: unrolled whatever f holds, where GCC's pragma
// may not and arrays then stay in memory.
#define AZ_LAMBDA __attribute__((always_inline))
template <int... I, class F>
AZ_INLINE void unroll(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
AZ_INLINE void unrolled(F&& f) {
  unroll(std::make_integer_sequence<int, N>{}, f);
}

// p + stride, of which the compiler knows nothing: it keeps no register for every place that is stepped to.
template <class T>
AZ_INLINE T* step(T* p, int64_t stride) {
  p += stride;
#if defined(__GNUC__)
  __asm__("" : "+r"(p));
#endif
  return p;
}

// The first n < VL lanes, `rest` in the others; nothing beyond them is touched.
AZ_INLINE vf load_part(const float* p, int64_t n, float rest = 0.0f) {
#if ACTZIP_VL == 16
  const auto lanes = static_cast<__mmask16>((1u << n) - 1);
  return reinterpret_cast<vf>(_mm512_mask_loadu_ps(reinterpret_cast<__m512>(splat(rest)), lanes, p));
#else
  vf v = splat(rest);
  for (int64_t l = 0; l < n; ++l) v[l] = p[l];
  return v;
#endif
}
AZ_INLINE void store_part(float* p, vf v, int64_t n) {
#if ACTZIP_VL == 16
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
  for (int64_t l = 0; l < n; ++l) p[l] = v[l];
#endif
}

// Lanes with bit H of their number of two vectors that are H rows apart change places.
template <int H, int... L>
AZ_INLINE void exchange(vf& a, vf& b, std::integer_sequence<int, L...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const vf low = __builtin_shufflevector(a, b, ((L & H) != 0 ? VL + L - H : L)...);
  b = __builtin_shufflevector(a, b, ((L & H) != 0 ? VL + L : L + H)...);
#else
  const vf low = __builtin_shuffle(a, b, vi{((L & H) != 0 ? VL + L - H : L)...});
  b = __builtin_shuffle(a, b, vi{((L & H) != 0 ? VL + L : L + H)...});
#endif
  a = low;
}
// Lane j of row i becomes lane i of row j. Of four rows: blocks of two by two, then single lanes.
//
//   a0 a1 a2 a3     a0 a1 c0 c1     a0 b0 c0 d0
//   b0 b1 b2 b3     b0 b1 d0 d1     a1 b1 c1 d1
//   c0 c1 c2 c3     a2 a3 c2 c3     a2 b2 c2 d2
//   d0 d1 d2 d3     b2 b3 d2 d3     a3 b3 c3 d3
template <int H = VL / 2>
AZ_INLINE void transpose(vf (&r)[VL]) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i)
      if ((i & H) == 0) exchange<H>(r[i], r[i + H], std::make_integer_sequence<int, VL>{});
    transpose<H / 2>(r);
  }
}

AZ_INLINE int ctz(uint64_t m) { return __builtin_ctzll(m); }
AZ_INLINE int popcount(uint64_t m) { return __builtin_popcountll(m); }

}  // namespace
}  // namespace actzip::ACTZIP_ISA_NS
