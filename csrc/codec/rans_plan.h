// Choosing the model of `rans` for a map: alphabet, classes of channels, tables of contexts.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codec/codec.h"
#include "codec/rans_lanes.h"

namespace actzip::codec::rans {

// The parameters (write_model) for a map.
std::vector<uint8_t> plan(const MapInfo& info, const Source& source, const Options& options, int threads);

struct LogTable {
  uint16_t row[4096];
};
extern const LogTable kLogTable;

// log2(v) in units of 1/256, rounded down, 0 for 0; the same everywhere (no floating point).
inline uint64_t log2_256(uint64_t v) {
  const int bits = static_cast<int>(std::bit_width(v)), drop = bits > 12 ? bits - 12 : 0;
  return static_cast<uint64_t>(drop) * 256 + kLogTable.row[v >> drop];
}

struct Piece {  // pairs of one plane
  size_t at, size;
  uint32_t channel;
};
// Symbols of a map, or of some of its chunks, as pairs (see pairs_of); 64 bytes of slack after them.
struct Sample {
  const uint16_t* pairs = nullptr;
  std::vector<Piece> pieces;
  size_t channels = 0;
};

// Counts pairs, skipping those of zeros among zeros, which are most.
class PairCounter {
 public:
  // row[pair] += how often it is in pairs[0, n); 64 readable bytes of slack.
  template <class Count>
  void add(const uint16_t* pairs, size_t n, Count* row) {
    each_block(pairs, n, [&](const uint16_t* some, size_t count) {
      for (size_t i = 0; i < count; ++i) ++row[some[i]];
    });
    row[0] += static_cast<Count>(zeros_);
  }
  // As `add`; the pairs other than 0 that had no count in the row are put to seen[0, result).
  size_t add_seen(const uint16_t* pairs, size_t n, uint32_t* row, uint16_t* seen) {
    size_t found = 0;
    each_block(pairs, n, [&](const uint16_t* some, size_t count) {
      for (size_t i = 0; i < count; ++i) {
        seen[found] = some[i];
        found += row[some[i]]++ == 0;
      }
    });
    row[0] += static_cast<uint32_t>(zeros_);
    return found;
  }

 private:
  static constexpr size_t kBlock = 4096;
  size_t squeeze(const uint16_t* pairs, size_t n);  // the pairs that are not 0, to some_
  template <class F>
  void each_block(const uint16_t* pairs, size_t n, F&& f) {
    zeros_ = 0;
    for (size_t i = 0; i < n; i += kBlock) {
      const size_t size = n - i < kBlock ? n - i : kBlock, count = squeeze(pairs + i, size);
      zeros_ += size - count;
      f(some_, count);
    }
  }
  uint16_t some_[kBlock + 64];
  uint8_t mask_[kBlock / 8];
  size_t zeros_ = 0;
};

// How often each pair occurs in each channel of a sample. In the scratch memory of the thread that made it,
// as is the sample.
class Channels {
 public:
  Channels(const Sample& sample, size_t pairs, int threads);
  size_t size() const { return spans_.size(); }
  uint64_t symbols(size_t channel) const { return spans_[channel].symbols; }
  const RansCount* begin(size_t channel) const { return spans_[channel].begin; }
  const RansCount* end(size_t channel) const { return spans_[channel].end; }

 private:
  struct Span {
    RansCount *begin, *end;
    uint64_t symbols;
  };
  std::vector<Span> spans_;
};

struct Classes {
  std::vector<uint8_t> of;       // the class of each channel
  std::vector<uint32_t> counts;  // [class][pair]
};
// Classes of channels by k-means on code length: each channel joins the class whose statistics code it best.
Classes cluster(const Channels& channels, size_t pairs, int tokens, uint32_t classes, int threads);

}  // namespace actzip::codec::rans
