// Choosing the model of `rans` for a map: alphabet, classes of channels, tables of contexts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/codec.h"

namespace actzip::codec::rans {

// The parameters (write_model) for a map.
std::vector<uint8_t> plan(const MapInfo& info, const Source& source, const Options& options, int threads);

// log2(v) in units of 1/256, rounded down, for v >= 1; the same everywhere (no floating point).
uint64_t log2_256(uint64_t v);

struct Piece {  // pairs of one plane
  size_t at, size;
  uint32_t channel;
};
// Symbols of a map, or of some of its chunks, as pairs context * tokens + token.
struct Sample {
  std::vector<uint16_t> pairs;
  std::vector<Piece> pieces;
  size_t channels;
  size_t cells;  // values that a pair can have
  int tokens;
};
// Classes of channels by k-means on code length: each channel joins the class whose statistics code it best.
std::vector<uint8_t> cluster(const Sample& sample, uint32_t classes, int threads);

}  // namespace actzip::codec::rans
