// The model of `rans`: what its parameters say, written and read. docs/bitstream.md describes them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "codec/codec.h"
#include "codec/rans_tokens.h"

namespace actzip::codec::rans {

using Frequencies = std::array<uint16_t, kRansTokens>;

inline constexpr uint32_t kMaxTables = 256;

// What the parameters say: everything that coding needs besides the chunk.
struct Model {
  Alphabet alphabet;
  int prec = 11;
  int keep = 3;  // bits of a frequency kept below its leading one
  uint32_t classes = 1;
  std::vector<uint8_t> class_of;            // of each channel; empty for one class
  std::vector<std::vector<uint8_t>> start;  // [class][context]: 1 where a new table begins
  std::vector<Frequencies> tables;
};

// Frequencies of sum 2^prec for the counts: every token that occurs gets at least 1.
Frequencies normalise(const uint64_t* count, int n, int prec, int keep);

std::vector<uint8_t> write_model(const Model& m);
// Throws FormatError.
Model read_model(const MapInfo& info, const uint8_t* p, size_t size);

}  // namespace actzip::codec::rans
