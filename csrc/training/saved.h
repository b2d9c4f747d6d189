// Packing of the tensors that autograd saves: masks of a bit an element, the values that are not zero, codes
// of 8 or 4 bits, and the indices of max pools. Tensors are dense memory of n elements, cut into chunks of
// kChunk; `counts` holds how many bits are set in each chunk. Nothing here allocates what it returns: callers
// give buffers of the sizes named, and `threads` as parallel_for takes it
// (the loops are those of team.h).
#pragma once

#include <cstdint>
#include <utility>

#include "training/kernels.h"

namespace actzip::training {

inline int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

// The share of elements that are not zero, of some hundreds spread over the tensor.
double sample_density(const void* x, int64_t n, int width);

// Of some of the memory, spread over all of it: another one where most changes were made.
uint64_t fingerprint(const void* x, int64_t bytes);

// True where n elements are all the same, bit for bit.
bool is_uniform(const void* x, int64_t n, int width);

// bits: (n + 7) / 8 bytes; counts: chunks_of(n). Returns how many are set.
int64_t nonzero_mask(const void* x, int64_t n, int width, uint8_t* bits, int32_t* counts, int threads);
// -1 where a NaN lies beyond for PyTorch's vectors and not for its scalars: no bit says both.
int64_t test_mask(const void* x, int64_t n, Real type, Test test, float lo, float hi, uint8_t* bits,
                  int32_t* counts, int threads);

// values: as many as bits are set. False, and values are not to be used, where the bits are not those of
// nonzero_mask.
bool compress(const void* x, int64_t n, int width, const uint8_t* bits, const int32_t* counts, void* values,
              int threads);
// values: readable kSlack bytes beyond the end.
void expand(const void* values, const uint8_t* bits, const int32_t* counts, int64_t n, int width, void* out,
            int threads);
void fill(const uint8_t* bits, int64_t n, int width, uint64_t on, uint64_t off, void* out, int threads);
// x where the bit is set, zero elsewhere.
void select(const void* x, const uint8_t* bits, int64_t n, int width, void* out, int threads);

// Bytes of codes (without slack) and number of ranges for chunks with so many values each.
std::pair<int64_t, int64_t> coded_size(const int32_t* counts, int64_t chunks, int bits);

enum class Quantized : int { yes = 0, not_finite = 1, other_zeros = 2 };

// All n elements (mask and counts null), or those whose bit is set. Buffers as coded_size says, of the counts
// or of full chunks.
Quantized quantize(const void* x, int64_t n, Real type, const uint8_t* mask, const int32_t* counts, int bits,
                   uint64_t seed, uint8_t* codes, Range* ranges, int threads);
// codes: readable kSlack bytes beyond the end.
void dequantize(const uint8_t* codes, const Range* ranges, int64_t n, Real type, const uint8_t* mask,
                const int32_t* counts, int bits, void* out, int threads);

// Two-dimensional max pooling. Memory order of the indices: outer, oh, ow, inner.
struct PoolShape {
  int64_t outer, oh, ow, inner, ih, iw;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t count() const { return outer * oh * ow * inner; }
  // Bits an index takes: 1, 2, 4 or 8; 0 where the window has too many places.
  int bits() const;
};
// Place in the window instead of place in the plane. codes: (count * bits + 7) / 8 bytes. False where an
// index is not in its window.
bool pack_indices(const int64_t* indices, const PoolShape& pool, uint8_t* codes, int threads);
void unpack_indices(const uint8_t* codes, const PoolShape& pool, int64_t* indices, int threads);

// Asks for large pages: fresh memory costs a fault a page. Does nothing where the system has none.
void advise_large_pages(void* p, int64_t bytes);

}  // namespace actzip::training
