// The row functions, compiled once per instruction set: compiler vectors, and plain loops where GCC
// vectorises them. See csrc/common/cpu.h for what may stand here.
#include <math.h>

#include <cstdint>
#include <cstring>

#include "common/vectors.inl.h"
#include "engine/functions.inl.h"
#include "engine/rows.h"

namespace actzip::engine {
namespace ACTZIP_ISA_NS {
namespace {

using namespace actzip::ACTZIP_ISA_NS;

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

// V vectors of every pixel's numbers, of the last one `last` lanes: f(vector, its first lane) of all pixels.
template <int V, class F>
AZ_INLINE void of_pixels(const float* in, int64_t si, int64_t pixels, int64_t last, F f) {
  for (int64_t p = 0; p < pixels; ++p, in += si) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      f(p, v, v < V - 1 || last == VL ? load(in + v * VL) : load_part(in + v * VL, last));
  }
}

template <int V>
AZ_INLINE void norm_block(const float* in, int64_t si, float* out, int64_t so, int64_t pixels,
                          const float* less, const float* scale, const float* shift, int64_t last) {
  vf m[V], a[V], b[V];
  auto get = [=](const float* p, int v) {
    return v < V - 1 || last == VL ? load(p + v * VL) : load_part(p + v * VL, last);
  };
  for (int v = 0; v < V; ++v) {
    m[v] = get(less, v);
    a[v] = get(scale, v);
    b[v] = get(shift, v);
  }
  of_pixels<V>(in, si, pixels, last, [&](int64_t p, int v, vf x) {
    const vf y = (x - m[v]) * a[v] + b[v];
    if (v < V - 1 || last == VL)
      store(out + p * so + v * VL, y);
    else
      store_part(out + p * so + v * VL, y, last);
  });
}
void pixel_norm(const float* in, int64_t si, float* out, int64_t so, int64_t pixels, int64_t n,
                const float* less, const float* scale, const float* shift) {
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    norm_block<4>(in + i, si, out + i, so, pixels, less + i, scale + i, shift + i, VL);
  for (; i < n; i += VL)
    norm_block<1>(in + i, si, out + i, so, pixels, less + i, scale + i, shift + i, n - i < VL ? n - i : VL);
}

template <int V, class F>
AZ_INLINE void sum_block(const float* in, int64_t si, int64_t pixels, int64_t last, float* sums, F f) {
  constexpr int kChains = 4 / V;  // so many sums each, for additions take their time
  vf s[kChains][V] = {};
  int64_t p = 0;
  for (; p + kChains <= pixels; p += kChains, in += kChains * si)
#pragma GCC unroll 4
    for (int k = 0; k < kChains; ++k)
      of_pixels<V>(in + k * si, si, 1, last, [&](int64_t, int v, vf x) { s[k][v] += f(x, v); });
  of_pixels<V>(in, si, pixels - p, last, [&](int64_t, int v, vf x) { s[0][v] += f(x, v); });
  for (int v = 0; v < V; ++v) {
    vf all = s[0][v];
    for (int k = 1; k < kChains; ++k) all += s[k][v];
    store(sums + v * VL, all);
  }
}
template <int V>
AZ_INLINE void sum_block(const float* in, int64_t si, int64_t pixels, int64_t last, const float* less,
                         float* sums) {
  if (less == nullptr) return sum_block<V>(in, si, pixels, last, sums, [](vf x, int) { return x; });
  vf m[V];
  for (int v = 0; v < V; ++v)
    m[v] = v < V - 1 || last == VL ? load(less + v * VL) : load_part(less + v * VL, last);
  sum_block<V>(in, si, pixels, last, sums, [&](vf x, int v) { return (x - m[v]) * (x - m[v]); });
}
void pixel_sums(const float* in, int64_t si, int64_t pixels, int64_t n, const float* less, int64_t each,
                double* sums) {
  float found[4 * VL];
  int64_t left = each;  // of the sum that is at work
  auto take = [&](int64_t count) {
    for (int64_t l = 0; l < count; ++l) {
      if (left-- == 0) {
        ++sums;
        left = each - 1;
      }
      *sums += static_cast<double>(found[l]);
    }
  };
  auto at = [&](int64_t i) { return less == nullptr ? nullptr : less + i; };
  int64_t i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL) {
    sum_block<4>(in + i, si, pixels, VL, at(i), found);
    take(4 * VL);
  }
  for (; i < n; i += VL) {
    const int64_t m = n - i < VL ? n - i : VL;
    sum_block<1>(in + i, si, pixels, m, at(i), found);
    take(m);
  }
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

// R rows of out, V vectors of columns (of the last one `last` columns): the sums stay in registers, and each
// vector of b serves all rows. However many rows there are, a sum is of the same products in the same order.
template <int R, int V>
AZ_INLINE void mat_tile(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb,
                        int64_t depth, int64_t last) {
  vf sums[R][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    vf row[V];
    for (int v = 0; v < V - 1; ++v) row[v] = load(b + k * ldb + v * VL);
    const float* end = b + k * ldb + (V - 1) * VL;
    row[V - 1] = last == VL ? load(end) : load_part(end, last);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vf x = splat(a[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V - 1; ++v) store(out + r * ldo + v * VL, sums[r][v]);
    float* end = out + r * ldo + (V - 1) * VL;
    if (last == VL)
      store(end, sums[r][V - 1]);
    else
      store_part(end, sums[r][V - 1], last);
  }
}

// V vectors of columns of all rows: R at once, then four, then one.
template <int R, int V>
void mat_panel(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb,
               int64_t rows, int64_t depth, int64_t last) {
  int64_t i = 0;
  for (; i + R <= rows; i += R) mat_tile<R, V>(out + i * ldo, ldo, a + i * lda, lda, b, ldb, depth, last);
  for (; i + 4 <= rows; i += 4) mat_tile<4, V>(out + i * ldo, ldo, a + i * lda, lda, b, ldb, depth, last);
  for (; i < rows; ++i) mat_tile<1, V>(out + i * ldo, ldo, a + i * lda, lda, b, ldb, depth, last);
}

void mat_mat(float* out, int64_t ldo, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t rows,
             int64_t depth, int64_t n) {
  constexpr int kWide = VL == 16 ? 4 : 2;  // six rows of so many vectors: 24 or 12 sums
  int64_t j = 0;
  for (; j + kWide * VL <= n; j += kWide * VL)
    mat_panel<6, kWide>(out + j, ldo, a, lda, b + j, ldb, rows, depth, VL);
  for (; j < n; j += VL)
    mat_panel<12, 1>(out + j, ldo, a, lda, b + j, ldb, rows, depth, n - j < VL ? n - j : VL);
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
// All lanes folded by g, in every lane.
template <int H = VL / 2, class G>
AZ_INLINE vf across(vf v, G g) {
  if constexpr (H > 0) {
    vf a = v, b = v;
    exchange<H>(a, b, std::make_integer_sequence<int, VL>{});
    return across<H / 2>(g(a, b), g);
  }
  return v;
}
AZ_INLINE vf plus(vf a, vf b) { return a + b; }
AZ_INLINE vf greater(vf a, vf b) { return b > a ? b : a; }  // leaves a NaN out, or not
AZ_INLINE vf same(vf v) { return v; }

// out = e^(in - top), and its sum in every lane
AZ_INLINE vf exp_row(const float* in, float* out, int64_t n, vf top) {
  vf a{}, b{};
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    const vf x = exp_down(load(in + i) - top), y = exp_down(load(in + i + VL) - top);
    store(out + i, x);
    store(out + i + VL, y);
    a += x;
    b += y;
  }
  for (; i < n; i += VL) {
    const int64_t m = n - i < VL ? n - i : VL;
    const vf x = exp_down((m == VL ? load(in + i) : load_part(in + i, m, -INFINITY)) - top);
    if (m == VL)
      store(out + i, x);
    else
      store_part(out + i, x, m);
    a += x;
  }
  return across(a + b, plus);
}

// A NaN anywhere is in the sum, and so everywhere.
void softmax(const float* in, float* out, int64_t n, bool log) {
  const vf top = across(fold(in, n, -INFINITY, -INFINITY, same, greater), greater);
  if (log) {
    const vf sum = across(fold(in, n, -INFINITY, 0.0f, [=](vf v) { return exp_down(v - top); }, plus), plus);
    const float shift = top[0] + logf(sum[0]);
    return each(in, out, n, [=](vf v) { return v - shift; });
  }
  const vf scale = 1.0f / exp_row(in, out, n, top);
  each(out, out, n, [=](vf v) { return v * scale; });
}

void softmax_columns(float* x, int64_t n, bool log) {
  constexpr int64_t kStep = kSoftmaxColumns;
  for (int64_t j = 0; j < kStep; j += VL) {
    float* column = x + j;
    vf top = load(column);
    for (int64_t i = 1; i < n; ++i) top = greater(top, load(column + i * kStep));
    vf sum = splat(0.0f);
    for (int64_t i = 0; i < n; ++i) {
      const vf e = exp_down(load(column + i * kStep) - top);
      if (!log) store(column + i * kStep, e);
      sum += e;
    }
    if (log) {
      float shift[VL];
      for (int l = 0; l < VL; ++l) shift[l] = top[l] + logf(sum[l]);
      const vf by = load(shift);
      for (int64_t i = 0; i < n; ++i) store(column + i * kStep, load(column + i * kStep) - by);
    } else {
      const vf scale = splat(1.0f) / sum;
      for (int64_t i = 0; i < n; ++i) store(column + i * kStep, load(column + i * kStep) * scale);
    }
  }
}

void layer_norm(const float* in, float* out, int64_t n, const float* weight, const float* bias, float eps) {
  const auto count = static_cast<float>(n);
  const float mean = across(fold(in, n, 0.0f, 0.0f, same, plus), plus)[0] / count;
  const vf squares = fold(in, n, mean, 0.0f, [=](vf v) { return (v - mean) * (v - mean); }, plus);
  const float scale = 1.0f / sqrtf(across(squares, plus)[0] / count + eps);
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
const Rows kRows = {ACTZIP_ISA_ID, activate,        binary,     max_rows,       sum_rows,     affine,
                    pixel_norm,    pixel_sums,      accumulate, accumulate_max, lerp4,        mat_mat,
                    softmax,       softmax_columns, layer_norm, transpose,      count_nonzero};

}  // namespace ACTZIP_ISA_NS
}  // namespace actzip::engine
