// Symbols as pairs of a context and a token: passes that are left to the compiler.
#pragma once

#include <cstring>

#include "codec/rans_lanes.h"

namespace actzip::codec::ACTZIP_ISA_NS {
namespace {

// Of all splits of v into a leading part and e raw bits, the token's is the least: (e << fine) + (v >> e)
// grows with e where the leading part is too short, and with -e where it is too long.
void rans_tokens8(const uint8_t* s, size_t n, int bits, int fine, uint8_t* tok) {
  constexpr size_t kBlock = 4096;  // stays in the nearest cache
  for (size_t from = 0; from < n; from += kBlock) {
    const size_t end = n - from < kBlock ? n : from + kBlock;
    std::memcpy(tok + from, s + from, end - from);
    for (int e = 1; e < bits - fine; ++e) {
      const auto more = static_cast<uint8_t>(e << fine);
      for (size_t i = from; i < end; ++i) {
        const auto t = static_cast<uint8_t>((s[i] >> e) + more);
        tok[i] = t < tok[i] ? t : tok[i];
      }
    }
  }
}

// By the leading bits of v in its conversion to binary32, which is exact.
void rans_tokens16(const uint16_t* s, size_t n, int fine, uint8_t* tok) {
  const int32_t direct = (2 << fine) - 1, offset = ((fine + 127) << fine) - (1 << fine);
  for (size_t i = 0; i < n; ++i) {
    const int32_t v = s[i];
    const float f = static_cast<float>(v);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    const int32_t t = static_cast<int32_t>(u >> (23 - fine)) - offset;
    const int32_t d = v < direct ? v : direct;
    tok[i] = static_cast<uint8_t>(t > d ? t : d);
  }
}

void rans_pairs(const uint8_t* tok, const uint8_t* left, const uint8_t* up, size_t n, size_t width,
                uint16_t count, uint16_t* pairs) {
  const uint8_t *before = tok - 1, *above = tok - width;
  for (size_t i = 0; i < n; ++i) {
    const auto context = static_cast<uint8_t>((before[i] & left[i]) + (above[i] & up[i]));
    pairs[i] = static_cast<uint16_t>(context * count + tok[i]);
  }
}

}  // namespace
}  // namespace actzip::codec::ACTZIP_ISA_NS
