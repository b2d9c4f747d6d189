// Internal: the functions that are compiled once per instruction set, and their table. *_conv.cpp and
// packed.cpp (compiled for the baseline) arrange the work; everything that touches many floats is here.
//
// Scratch and weight pointers are aligned to 64 bytes and padded to whole vectors; `vl` is the vector length
// in floats, `nv` a number of vectors, MR a number of pixels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/cpu.h"

namespace actzip::kernels {

inline constexpr int kMaxNv = 12;  // vectors of one accumulator tile
inline constexpr int kMaxMr = 14;
inline constexpr int kMaxWinograd = 6;
inline constexpr int kCookOut = 4, kCookPlaces = 7;
inline constexpr int kMaxLines = 8;  // output channels; and vectors of positions

// One (ic block, tap) over a run of output pixels: acc[i][0 .. nv * vl) += values of input pixel i * step
// times the weight rows of their channels.
struct SparseRun {
  const float* weight;  // [64][nv * vl]
  float* acc;           // pixel i at acc + i * acc_stride
  int64_t acc_stride;
  int64_t count;               // output pixels
  int64_t step;                // input pixels between output pixels
  const uint64_t* masks;       // of the first input pixel
  const float* const* values;  // per input pixel: its first value, packed or expanded
  uint64_t clip;               // channels to use
  const float* next_weight;    // fetched to the second-level cache meanwhile: next_lines lines of 64 bytes
  int64_t next_lines;          // a pixel (pair kernels: a pair) from here on
  // Row kernels: so many taps a visit, their input pixels and weights that far apart.
  int64_t taps, tap_step, tap_weight;
};
using SparseRunFn = void (*)(const SparseRun&);

// acc[m][0 .. nv * vl) (+)= sum over taps, k of in[tap][m][k] * weight[tap_ids[tap]][k][0 .. nv * vl), m <
// mr.
struct DenseTile {
  const float* const* in;  // [taps][in_table_stride], of which mr are used
  int64_t in_table_stride;
  int64_t in_offset;  // floats added to every pointer
  const int32_t* tap_ids;
  int64_t taps, depth;  // depth: channels a tap
  const float* weight;
  int64_t weight_tap_stride;
  bool first;  // from zero; else from acc
  float* acc;
  int64_t acc_stride;
  int64_t last;  // floats of the last vector that are stored
  // At the end: acc = min(max(acc + bias + residual, lo), hi), each where asked for.
  const float* bias;  // nv * vl floats, or null
  bool floor, ceiling;
  float lo, hi;
  const float* residual;  // or null
  int64_t residual_stride;
};
using DenseFn = void (*)(const DenseTile&);

// A few output channels along lines of positions that follow each other: out[i][o] = min(max(sum over
// lines l, taps k of in[l][first + i + offsets[k]] * weight[l][k][o] + bias[o], lo), hi), i < count.
struct LinesTile {
  const float* const* in;  // position 0 of every line, readable as far as whole vectors reach; or null: zeros
  int64_t lines;
  const int64_t* offsets;
  int64_t taps;
  const float* weight;
  const float* bias;
  int64_t first, count;
  float lo, hi;
  float* out;  // of position 0
  int64_t out_stride;
};
using LinesFn = void (*)(const LinesTile&);

// act(acc + bias + residual) in place or to a dense map; acc + bias quantized where `pre_step` is not 0.
struct EpilogueRow {
  float* acc;
  int64_t acc_stride;
  int64_t count;          // pixels
  int64_t width;          // channels
  const float* bias;      // per channel, padded to whole vectors; or null: acc holds it
  const float* residual;  // or null
  int64_t residual_stride;
  int act;  // ActKind
  float lo, hi, step;
  float pre_lo, pre_hi, pre_step;
  const float* thresholds;  // per channel, padded to whole vectors
  float* out;               // dense: width channels a pixel; null: result stays in acc
  int64_t out_stride;
};

struct DepthwiseRow {
  const float* const* rows;  // kh input rows, or null for a row of zeros (padding)
  int64_t in_stride;         // floats between input pixels
  int64_t iw, kh, kw, sw, dw, pad_left;
  const float* weight;  // [channels / vl, the last padded][kh * kw][vl]
  const float* bias;    // padded
  int64_t channels;
  float lo, hi;  // acc = min(max(sum, lo), hi)
  float* acc;    // [count][acc_stride]; nothing beyond the channels is touched
  int64_t acc_stride;
  int64_t first, count;  // output pixels first .. first + count
};

// The A x A transformed places of a tile (A = M + 2) lie in this order: the M x M inner ones, M of the first
// row, of the last row, of the first column, of the last column, the four corners. These are kPlaceKinds
// kinds, which depend on different pixels of the tile: places of a tile's first row on its even rows, of the
// last on its odd ones, others on all but its first and last; columns likewise.
inline constexpr int kPlaceKinds = 9;
static constexpr int winograd_place(int m, int row, int column) {
  const int last = m + 1;
  if (row % last != 0 && column % last != 0) return (row - 1) * m + column - 1;
  if (column % last != 0) return m * (m + row / last) + column - 1;
  if (row % last != 0) return m * (m + 2 + column / last) + row - 1;
  return m * (m + 4) + row / last * 2 + column / last;
}
static constexpr int place_kind(int m, int place) {
  if (place < m * m) return 0;
  return place < m * (m + 4) ? 1 + place / m - m : 5 + place - m * (m + 4);
}
inline constexpr unsigned kLastRow = 0b110000100, kLastColumn = 0b101010000;  // kinds, as bits

// Tiles side by side of one tile row and one input block: their places.
struct WinogradInput {
  // Of every row, the block's channels. Dense: of pixel 0, null outside the map. Packed: the values from
  // pixel `from` on, readable 64 bytes further, and the masks of pixel 0, zeros for rows outside.
  const float* rows[kMaxWinograd + 2];
  const uint64_t* masks[kMaxWinograd + 2];  // dense: null
  int64_t from;
  int64_t pixel_stride;  // dense
  int64_t step;          // pixels from one of a tile to the next: the dilation
  int64_t iw, x;         // width of the map; the first tile's first pixel, which may be negative
  int64_t tiles, width;  // channels of the block
  uint64_t* tile_masks;  // [kind of place][tile]: channels that may not be zero there
  int64_t kind_stride;
  float* out;  // [place][tile][64]; of whole vectors without any channel: anything
  int64_t place_stride;
};

// Some places and one input block over tiles: acc[place][tile] (+)= values times the weight rows of their
// channels.
struct WinogradProduct {
  const float* weight;    // [channel][place][nv * vl]
  const float* values;    // [place][tile][64], as WinogradInput::out
  int64_t values_stride;  // of places
  const uint64_t* masks;
  int64_t tiles, across, high;  // tiles, those of a row and the rows of an image
  float* acc;                   // [place][tile][nv * vl]
  int64_t acc_stride;           // of places
  bool first;                   // nothing is there yet
  const float* next_weight;     // fetched meanwhile: next_lines lines of 64 bytes a pair of tiles
  int64_t next_lines;
};
struct WinogradProducts {
  void (*run)(const WinogradProduct&);
  int places;  // at once: 1, 2 or 4
};

// One tile: M x M pixels of `floats` channels from their places.
struct WinogradOutput {
  const float* acc;  // [place]
  int64_t place_stride, floats;
  const float* bias;
  float* out;
  int64_t row_stride, pixel_stride;
};

// One-dimensional F(4, 4): one tile.
struct CookInput {
  const float* pixels[kCookPlaces];  // null outside the map
  int64_t channels;
  const float* matrix;  // [place][pixel]
  float* out;           // [place]: whole vectors are written
  int64_t place_stride;
};
struct CookOutput {
  const float* acc;  // [place]
  int64_t place_stride, floats;
  const float* matrix;  // [pixel][place]
  const float* bias;
  int64_t count;  // pixels
  float* out;
  int64_t out_stride;
};

// The transforms of one tile size.
struct WinogradTile {
  void (*input)(const WinogradInput&);
  bool (*output)(const WinogradOutput&);  // whether all is finite
  bool (*pooled)(const WinogradOutput&);  // the greatest of every 2 x 2 pixels
};

struct Kernels {
  Isa isa;
  int vl;
  SparseRunFn sparse[kMaxNv + 1];       // by nv; null where the registers do not suffice. values: packed
  SparseRunFn sparse_row[kMaxNv + 1];   // the taps of a kernel row in one visit
  SparseRunFn sparse_pair[kMaxNv + 1];  // two pixels at once; values packed, or expanded as this says:
  SparseRunFn
      sparse_taps_pair[5];  // three taps of two input pixels, by nv of a tap; null where there is none
  bool expanded_pairs;
  WinogradTile winograd[kMaxWinograd + 1];        // by M: 2, 4 and 6
  WinogradProducts winograd_product[kMaxNv + 1];  // by nv; null where registers do not suffice
  DenseFn dense[kMaxNv + 1][kMaxMr + 1];          // by nv and mr; null where there is none
  int dense_mr[kMaxNv + 1];                       // the largest mr
  LinesFn lines[kMaxLines + 1][kMaxLines + 1];    // by output channels and vectors of positions
  int lines_oc, lines_nx[kMaxLines + 1];          // the most of both

  void (*cook_input)(const CookInput&);
  bool (*cook_output)(const CookOutput&);  // whether all is finite

  void (*epilogue)(const EpilogueRow&);
  void (*depthwise)(const DepthwiseRow&);
  // Pixel i of three planes, `plane` floats apart, to dst[3 * i ...].
  void (*interleave3)(const float* src, int64_t plane, int64_t count, float* dst);
  // Positions of a line, `stride` floats apart, to a line a channel: position i to dst[i % step * phase + i /
  // step], the next channel's `plane` further.
  void (*lines_split)(const float* src, int64_t stride, int64_t channels, int64_t count, int64_t step,
                      int64_t phase, float* dst, int64_t plane);

  // What the row becomes (`out` is not read), packed: appends its non-zero values to dst (room for 64 * count
  // + 16 floats), writes the pixels' masks, returns how many. At most 64 channels. type, scale, top: values
  // are rounded to what the type can hold first (u8, u16: the integers, at most top, or what the type holds
  // where it is 0).
  int64_t (*compress)(const EpilogueRow&, int type, float scale, float top, uint64_t* masks, float* dst);
  // Values that pixels have together; and where those of each begin.
  int64_t (*count_values)(const uint64_t* masks, int64_t count);
  void (*point_values)(const uint64_t* masks, int64_t count, const float* values, const float** pointers);
  // To and from the stored type. load: dst has room for count + 16.
  void (*store_values)(const float* src, int64_t count, int type, void* dst);
  void (*load_values)(const void* src, int64_t count, int type, float scale, float* dst);
  // Zeros and values of `count` pixels to dst[i * stride + 0 .. width). Returns the number of values read.
  // `src` is readable 64 bytes further.
  int64_t (*expand)(const uint64_t* masks, const float* src, int64_t count, int64_t width, float* dst,
                    int64_t stride);
  // FMAs in registers; returns floating-point operations done.
  double (*peak)(int64_t rounds);
};

// Of an instruction set compiled in here; the baseline's for others.
const Kernels& kernels_for(Isa isa);

}  // namespace actzip::kernels
