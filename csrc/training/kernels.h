// Internal: what is compiled once per instruction set, and its table. saved.cpp cuts tensors into chunks and
// calls these on each. `n` is at most kChunk; scratch is readable and writable kSlack bytes beyond its end.
#pragma once

#include <cstdint>

#include "common/cpu.h"

namespace actzip::training {

inline constexpr int64_t kChunk = 8192;    // elements; 32 KiB of floats stay in the first-level cache
inline constexpr int64_t kGroup = 256;     // values that share a range
inline constexpr int64_t kSlack = 64;      // bytes
inline constexpr int64_t kCodeBlock = 32;  // 4 bits: value j and value j + 16 of a block share byte j

// What a bit of a mask says of its element. A NaN is never "below", "above" or "inside".
enum class Test : int {
  nonzero = 0,     // its bits are not all zero (so -0 counts as something)
  not_below = 1,   // !(x <= lo)               relu
  not_beyond = 2,  // !(x <= lo || x >= hi)    hardtanh, relu6
  above = 3,       // x > lo                   leaky_relu
  inside = 4,      // lo <= x && x <= hi       clamp
  between = 5,     // lo < x && x < hi         not_beyond, where nothing is a NaN
};

// Floating-point types that tests other than `nonzero` and quantizers take.
enum class Real : int { float32 = 0, bfloat16 = 1 };

struct Range {
  float lo, step;  // value = lo + code * step
};

struct Kernels {
  // Bits of n elements of `width` bytes (bit i % 8 of byte i / 8, the last byte padded with zeros); returns
  // how many are set.
  int64_t (*nonzero)(const void* x, int64_t n, int width, uint8_t* bits);
  int64_t (*test)(const void* x, int64_t n, Real type, Test test, float lo, float hi, uint8_t* bits);
  // The elements whose bit is set, to scratch; returns how many, or -1 where the bits are not those of
  // `nonzero`.
  int64_t (*compress)(const void* x, int64_t n, int width, const uint8_t* bits, void* scratch);
  // The inverse: zeros elsewhere. `values` is readable kSlack bytes beyond its end.
  void (*expand)(const void* values, const uint8_t* bits, int64_t n, int width, void* out);
  // on or off (the low `width` bytes), by the bits.
  void (*fill)(const uint8_t* bits, int64_t n, int width, uint64_t on, uint64_t off, void* out);
  // x where the bit is set, zero elsewhere.
  void (*select)(const void* x, const uint8_t* bits, int64_t n, int width, void* out);
  void (*widen)(const void* x, int64_t n, float* out);   // bfloat16 to float32
  void (*narrow)(const float* x, int64_t n, void* out);  // to nearest, ties to even; n rounded up to 16
  // x to codes of 8 or 4 bits, groups of kGroup, rounded up or down at random so that the mean is right (to
  // 2^-17 of a step). False where something is not finite. `codes`: scratch.
  bool (*quantize)(const float* x, int64_t n, int bits, uint64_t seed, uint8_t* codes, Range* ranges);
  // `codes` is readable kSlack bytes beyond its end; out: scratch.
  void (*dequantize)(const uint8_t* codes, const Range* ranges, int64_t n, int bits, float* out);
};

const Kernels& kernels_for(Isa isa);

}  // namespace actzip::training
