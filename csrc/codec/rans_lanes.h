// What the inner loop of the `rans` decoder (rans.inl.h, compiled once per instruction set) shares with the
// rest of it (rans.cpp). The format is described in docs/bitstream.md.
#pragma once

#include <cstddef>
#include <cstdint>

namespace actzip::codec {

inline constexpr int kRansTokens = 64;     // most tokens of an alphabet
inline constexpr int kRansContexts = 128;  // a context is the sum of two tokens
inline constexpr int kRansMaxLanes = 32;
inline constexpr uint32_t kRansLow = 1u << 16;  // a state is always in [kRansLow, 2^32)
inline constexpr int kRansTile = 64;      // symbols of a lane that are collected before they are written
inline constexpr size_t kRansTail = 512;  // see RansStream

// What the tokens stand for: symbol = base[token] + (raw[token] further bits).
struct RansTokenTable {
  alignas(64) uint32_t base[kRansTokens];
  alignas(64) uint32_t raw[kRansTokens];
};

// A group of up to `lanes` stripes that are decoded side by side, one symbol of each a step.
struct RansGroup {
  int lanes;                 // 4, 8, 16 or 32
  uint32_t steps;            // the longest stripe
  uint32_t cols;             // the length of a row: the neighbour above is that many steps back
  int prec;                  // tables have 2^prec slots
  bool wide;                 // some token has more than 16 raw bits
  bool rotate;               // symbols are rotated right by one bit in the end
  int width;                 // bytes a symbol: 1, 2, 4
  const uint32_t* contexts;  // [class][kRansContexts]: where the table begins in `slots`
  const uint32_t* slots;     // entries: token << 25 | bias << 13 | frequency
  const RansTokenTable* tokens;
  uint8_t* history;  // tokens, (cols + steps) * lanes bytes, the first cols * lanes zero; 64 bytes more
  uint8_t* tile;     // kRansTile * kRansMaxLanes * 4 bytes, 64-byte aligned
  alignas(64) uint32_t length[kRansMaxLanes];  // of each lane's stripe; 0 for a lane without one
  alignas(64) uint32_t row[kRansMaxLanes];     // class of the lane's channel * kRansContexts
  uint8_t* out[kRansMaxLanes];                 // where each lane's stripe goes
};

// The words of a payload and the states. Reading goes on at `at`; once that is beyond `safe`, it goes on in
// `tail`, a copy of the last `tail_size` <= kRansTail bytes before `end` with kRansTail zero bytes after it
// (then at == tail + ... and safe == tail + tail_size).
struct RansStream {
  const uint8_t* at;
  const uint8_t* safe;
  const uint8_t* end;
  const uint8_t* tail;
  size_t tail_size;
  bool in_tail;
  alignas(64) uint32_t state[kRansMaxLanes];

  // Called when at > safe: false if the words are exhausted.
  bool refill() {
    if (in_tail) return false;
    in_tail = true;
    at = tail + (tail_size - static_cast<size_t>(end - at));
    safe = tail + tail_size;
    return at <= safe;
  }
};

// Decodes a group; false if the stream ended too early.
using RansDecodeGroup = bool (*)(const RansGroup& group, RansStream* stream);

}  // namespace actzip::codec
