// The floating-point mode of a thread: what subnormal numbers cost.
//
//   const FlushSubnormals flush;  // until the end of the scope; the mode before comes back, exceptions too
//
// A multiplication with a subnormal operand or result (below 1.2e-38; tails of GELU, fading features) takes
// about a hundred times as long as another on x86. In this mode such operands count as zero and such results
// become zero, which other engines do too. `parallel_for` runs its calls in the mode of the calling thread.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace actzip {

using FloatMode = uint64_t;

#if defined(__x86_64__) || defined(_M_X64)
inline constexpr FloatMode kFlushSubnormals = 0x8040;  // results (bit 15), operands (bit 6)
inline FloatMode float_mode() { return _mm_getcsr(); }
inline void set_float_mode(FloatMode mode) { _mm_setcsr(static_cast<unsigned>(mode)); }
#elif defined(__aarch64__) && !defined(_MSC_VER)
inline constexpr FloatMode kFlushSubnormals = FloatMode{1} << 24;  // FPCR.FZ: both
inline FloatMode float_mode() {
  FloatMode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
inline void set_float_mode(FloatMode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
#else
inline constexpr FloatMode kFlushSubnormals = 0;
inline FloatMode float_mode() { return 0; }
inline void set_float_mode(FloatMode) {}
#endif

// While it lives, the calling thread computes in `mode`.
class WithFloatMode {
 public:
  explicit WithFloatMode(FloatMode mode) : before_(float_mode()) {
    if (mode != before_) set_float_mode(mode);
  }
  ~WithFloatMode() {
    if (float_mode() != before_) set_float_mode(before_);
  }
  WithFloatMode(const WithFloatMode&) = delete;
  WithFloatMode& operator=(const WithFloatMode&) = delete;

 private:
  FloatMode before_;
};

class FlushSubnormals : WithFloatMode {
 public:
  FlushSubnormals() : WithFloatMode(float_mode() | kFlushSubnormals) {}
};

}  // namespace actzip
