// Row functions of pooling, compiled once per instruction set (pool.inl.h, isa/). A window is reduced in two
// steps: `rows` folds the window's rows into one row of the input's width, `cols` folds the window's columns
// of that row. A step works on one block of at most 64 channels; pixels are `stride` floats apart.
//
// Maxima: NaN wins over every number, as in PyTorch. Sums are taken in float32, rows first.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu.h"
#include "engine/node.h"

namespace actzip::engine {

inline constexpr int64_t kPoolBlock = 64;

struct PoolRows {
  const float* const* rows;  // `count` of them; count 0: the neutral element
  int64_t count;
  int64_t stride;  // of all rows
  int64_t pixels, width;
  float* out;  // pixels kPoolBlock floats apart
};

struct PoolCols {
  const float* in;
  int64_t in_stride;
  int64_t iw, ow, kw, sw, dw, pad_left;
  int64_t width;
  const float* scale;  // per output pixel; sums only
  const float* bias;   // width numbers, or null
  float* out;          // pixels out_stride apart; only `width` floats of each are written
  int64_t out_stride;
};

struct PoolTable {
  Isa isa;
  void (*rows_max)(const PoolRows&);
  void (*rows_sum)(const PoolRows&);
  void (*cols_max)(const PoolCols&);
  void (*cols_sum)(const PoolCols&);  // out = scale * sum + bias
};

const PoolTable& pool_for(Isa isa);

// Channels to work on at once: the blocks of whichever side is packed, else 64 at a time.
std::vector<BlockOf> pool_blocks(const View& x, const View& y);

}  // namespace actzip::engine
