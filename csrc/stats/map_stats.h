// Counts over activation maps, for the profiler: zeros, magnitudes, runs. Integers only, so that the counts
// of two halves of a data set add up exactly to those of the whole.
#pragma once

#include <cstddef>
#include <cstdint>

namespace actzip {

inline constexpr int kMagnitudeBins = 2048;  // a float32 pattern without its sign, shifted right by 20
inline constexpr int kRunBins = 24;          // runs of 2^i .. 2^(i+1)-1 elements; the last bin is open

// All pointers are the caller's, zeroed or holding earlier counts: everything is added to them.
struct MapCounts {
  int64_t* image_nonzeros;     // [images], written, not added to
  int64_t* channel_nonzeros;   // [channels]
  int64_t* position_nonzeros;  // [positions] or null
  int64_t* magnitudes;         // [kMagnitudeBins]; bin 0 holds zeros and the least subnormals
  int64_t* zero_runs;          // [kRunBins] or null: runs do not cross images; order is channel, position
  int64_t* bursts;             // [kRunBins] or null (both or neither): runs of non-zeros
  int64_t negatives = 0;       // values below zero
  float max_abs = 0;           // largest finite magnitude
};

// Counts `images` maps of `channels` x `positions` float32 values each, contiguous. NaN counts as non-zero.
// No allocation, no errors; safe from several threads on different `counts`.
void count_maps(const float* x, int64_t images, int64_t channels, int64_t positions, MapCounts* counts);

}  // namespace actzip
