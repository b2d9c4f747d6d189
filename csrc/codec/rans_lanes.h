// What the inner loops of `rans` (rans.inl.h, rans_encode.inl.h, compiled once per instruction set) share
// with the rest of it. The format is described in docs/bitstream.md.
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

// A group of up to `lanes` stripes that are encoded side by side. Places are lanes from the last to the
// first, because that is the order in which an encoder, which goes backwards, meets their words.
struct RansEncodeGroup {
  int lanes;                    // 4, 8, 16 or 32
  uint32_t steps;               // the longest stripe
  uint32_t last;                // the chunk's last symbol
  int prec;                     // tables have 2^prec slots
  bool wide;                    // some token has more than 16 raw bits
  bool rotate;                  // symbols are rotated left by one bit first
  int width;                    // bytes a symbol: 1, 2, 4
  const uint32_t* entries;      // [class][pair]: raw bits << 25 | first slot << 13 | frequency
  const uint64_t* reciprocals;  // [frequency]: ceil(2^44 / frequency)
  const uint16_t* pairs;        // of the chunk's symbols, see rans_tokens.h; 4 readable bytes of slack
  const void* symbols;          // of the chunk; 4 readable bytes of slack
  alignas(64) uint32_t offset[kRansMaxLanes];  // of each place's stripe in the chunk
  alignas(64) uint32_t length[kRansMaxLanes];  // 0 for a place without one
  alignas(64) uint32_t row[kRansMaxLanes];     // where in `entries` the class of its channel begins
  alignas(64) uint32_t state[kRansMaxLanes];
};

// How often a pair occurs in a channel.
struct RansCount {
  uint32_t pair, count;
};
inline constexpr size_t kRansClasses = 8;               // most of them: the prices of a pair lie together
inline constexpr size_t kRansFewest = size_t{1} << 16;  // symbols whose prices add up below 2^32

struct RansKernels {
  // Decodes a group; false if the stream ended too early.
  bool (*decode)(const RansGroup& group, RansStream* stream);
  // Encodes a group, from its last step to its first. Words go to `words` in the order in which an encoder
  // makes them, the reverse of the payload's; 32 words of slack. Returns their end.
  uint16_t* (*encode)(RansEncodeGroup* group, uint16_t* words);
  // cost[k] += what counts[0, n) of at most kRansFewest symbols cost by price[pair][k].
  void (*costs)(const RansCount* counts, size_t n, const uint32_t* price, uint64_t* cost);
  // Tokens of integer symbols, see rans_tokens.h.
  void (*tokens8)(const uint8_t* s, size_t n, int bits, int fine, uint8_t* tok);
  void (*tokens16)(const uint16_t* s, size_t n, int fine, uint8_t* tok);
  // context * count + token, for the contexts (tok[i - 1] & left[i]) + (tok[i - width] & up[i]).
  void (*pairs)(const uint8_t* tok, const uint8_t* left, const uint8_t* up, size_t n, size_t width,
                uint16_t count, uint16_t* pairs);
};
const RansKernels& rans_kernels();

}  // namespace actzip::codec
