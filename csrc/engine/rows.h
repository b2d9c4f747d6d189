// Row functions of the executor: everything that is not a convolution works on rows of floats, and these are
// compiled once per instruction set (rows.inl.h, isa/). No alignment is asked for; in and out may be the same
// row where both are named.
#pragma once

#include <cstdint>

#include "common/cpu.h"
#include "engine/functions.h"

namespace actzip::engine {

// Columns that softmax_columns works on.
constexpr int64_t kSoftmaxColumns = 64;

struct Rows {
  Isa isa;
  // out[i] = fn(in[i]); param: one number a element (param_step 1) or one for all (0).
  void (*activate)(const Act& act, const float* in, float* out, int64_t n, const float* param,
                   int64_t param_step);
  // out[i] = a[i * sa] fn b[i * sb], steps 0 or 1
  void (*binary)(BinaryFn fn, const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t n);
  void (*max_rows)(float* out, const float* const* rows, int64_t count, int64_t n);
  // out = scale * sum of rows + bias (null: none)
  void (*sum_rows)(float* out, const float* const* rows, int64_t count, int64_t n, float scale,
                   const float* bias);
  void (*affine)(const float* in, float* out, const float* scale, const float* shift, int64_t n);
  // out = (in - less) * scale + shift, of pixels of n numbers that begin si and so apart
  void (*pixel_norm)(const float* in, int64_t si, float* out, int64_t so, int64_t pixels, int64_t n,
                     const float* less, const float* scale, const float* shift);
  // sums[i / each] += of all pixels' numbers i their squared distance to less[i], or themselves (less null)
  void (*pixel_sums)(const float* in, int64_t si, int64_t pixels, int64_t n, const float* less, int64_t each,
                     double* sums);
  void (*accumulate)(float* acc, const float* in, int64_t n);      // acc += in
  void (*accumulate_max)(float* acc, const float* in, int64_t n);  // acc = max(acc, in), NaN wins
  void (*lerp4)(float* out, const float* a, const float* b, const float* c, const float* d, float wa,
                float wb, float wc, float wd, int64_t n);
  // out (rows, n) = a (rows, depth) times b (depth, n), rows ldo, lda and ldb apart
  void (*mat_mat)(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb,
                  int64_t rows, int64_t depth, int64_t n);
  void (*softmax)(const float* in, float* out, int64_t n, bool log);
  // of every column of x (n, kSoftmaxColumns)
  void (*softmax_columns)(float* x, int64_t n, bool log);
  // normalised over n: (x - mean) / sqrt(var + eps) * weight + bias (either may be null)
  void (*layer_norm)(const float* in, float* out, int64_t n, const float* weight, const float* bias,
                     float eps);
  // dst[c * dst_stride + r] = src[r * src_stride + c]
  void (*transpose)(const float* src, int64_t src_stride, float* dst, int64_t dst_stride, int64_t rows,
                    int64_t cols);
  int64_t (*count_nonzero)(const float* x, int64_t n);
};

// Of an instruction set compiled in here; the baseline's for others.
const Rows& rows_for(Isa isa);

}  // namespace actzip::engine
