// One register of floats, for the row functions. See csrc/common/cpu.h for what may stand here.
#pragma once

#include <cstdint>

namespace actzip::engine {
namespace ACTZIP_ISA_NS {
namespace {

#define ACTZIP_INLINE inline __attribute__((always_inline))

// Floats at once: one register. Written with vectors, for GCC vectorises no loop that compares or converts
// unless told that floating point never traps; of wider vectors it takes comparisons apart, lane by lane.
#if defined(__AVX512F__)
constexpr int kV = 16;
#elif defined(__AVX2__)
constexpr int kV = 8;
#else
constexpr int kV = 4;
#endif
typedef float V __attribute__((vector_size(kV * 4)));
typedef float VU __attribute__((vector_size(kV * 4), aligned(4), may_alias));
typedef int32_t VI __attribute__((vector_size(kV * 4)));

ACTZIP_INLINE V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
ACTZIP_INLINE void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
ACTZIP_INLINE V splat(float x) { return x - V{}; }  // x - 0 = x, NaN and infinities too

}  // namespace
}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::engine
