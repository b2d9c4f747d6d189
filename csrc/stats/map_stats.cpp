#include "stats/map_stats.h"

#include <bit>
#include <cstring>

namespace actzip {
namespace {

// Runs of ones (bursts) and zeros in a stream of bits that arrives 64 at a time.
class Runs {
 public:
  Runs(int64_t* zeros, int64_t* ones) : bins_{zeros, ones} {}

  void add(uint64_t word, int n) {
    while (n > 0) {
      const bool one = word & 1;
      int same = one ? std::countr_one(word) : std::countr_zero(word);
      if (same > n) same = n;
      if (one == current_) {
        length_ += same;
      } else {
        flush();
        current_ = one;
        length_ = same;
      }
      n -= same;
      word = same == 64 ? 0 : word >> same;
    }
  }

  void flush() {
    if (length_ > 0) {
      const int bin = std::bit_width(static_cast<uint64_t>(length_)) - 1;
      ++bins_[current_][bin < kRunBins ? bin : kRunBins - 1];
    }
    length_ = 0;
  }

 private:
  int64_t* bins_[2];
  bool current_ = false;
  int64_t length_ = 0;
};

}  // namespace

void count_maps(const float* x, int64_t images, int64_t channels, int64_t positions, MapCounts* counts) {
  // Neighbouring values often fall into one bin: two tables break the chain of loads and stores to it.
  uint32_t tables[2][kMagnitudeBins] = {};
  int64_t in_tables = 0;
  const auto drain = [&] {
    for (int b = 0; b < kMagnitudeBins; ++b) counts->magnitudes[b] += int64_t{tables[0][b]} + tables[1][b];
    std::memset(tables, 0, sizeof tables);
    in_tables = 0;
  };
  const bool runs = counts->zero_runs != nullptr;
  uint32_t peak = 0;
  for (int64_t n = 0; n < images; ++n) {
    int64_t image_nonzeros = 0;
    Runs run(counts->zero_runs, counts->bursts);
    for (int64_t c = 0; c < channels; ++c, x += positions) {
      int64_t nonzeros = 0;
      for (int64_t p = 0; p < positions;) {
        const int width = positions - p < 64 ? static_cast<int>(positions - p) : 64;
        uint64_t word = 0;
        for (int i = 0; i < width; ++i) word |= static_cast<uint64_t>(x[p + i] != 0.0f) << i;
        nonzeros += std::popcount(word);
        if (runs) run.add(word, width);
        if (counts->position_nonzeros != nullptr)
          for (int i = 0; i < width; ++i) counts->position_nonzeros[p + i] += (word >> i) & 1;
        p += width;
      }
      counts->channel_nonzeros[c] += nonzeros;
      image_nonzeros += nonzeros;
      for (int64_t from = 0; from < positions; from += int64_t{1} << 30) {
        const int64_t to = positions - from > (int64_t{1} << 30) ? from + (int64_t{1} << 30) : positions;
        for (int64_t p = from; p < to; ++p) {
          uint32_t bits;
          std::memcpy(&bits, x + p, sizeof bits);
          const uint32_t magnitude = bits & 0x7fffffffu;
          if (magnitude < 0x7f800000u && magnitude > peak) peak = magnitude;
          counts->negatives += (bits >> 31) & (magnitude != 0);
          ++tables[p & 1][magnitude >> 20];
        }
        in_tables += to - from;
        if (in_tables >= int64_t{1} << 30) drain();
      }
    }
    if (runs) run.flush();
    counts->image_nonzeros[n] = image_nonzeros;
  }
  drain();
  float value;
  std::memcpy(&value, &peak, sizeof value);
  if (value > counts->max_abs) counts->max_abs = value;
}

}  // namespace actzip
