#include "codec/kernels.h"

#include "common/isa_table.h"

namespace actzip::codec {
namespace {

struct Positions {
  uint8_t t[256][8] = {};
  constexpr Positions() {
    for (int b = 0; b < 256; ++b)
      for (int i = 0, n = 0; i < 8; ++i)
        if (b >> i & 1) t[b][n++] = static_cast<uint8_t>(i);
  }
};

}  // namespace

// NOLINTNEXTLINE: filled from the constexpr table above
#define ROW(b) {P.t[b][0], P.t[b][1], P.t[b][2], P.t[b][3], P.t[b][4], P.t[b][5], P.t[b][6], P.t[b][7]}
#define ROWS4(b) ROW(b), ROW(b + 1), ROW(b + 2), ROW(b + 3)
#define ROWS16(b) ROWS4(b), ROWS4(b + 4), ROWS4(b + 8), ROWS4(b + 12)
#define ROWS64(b) ROWS16(b), ROWS16(b + 16), ROWS16(b + 32), ROWS16(b + 48)
static constexpr Positions P;
const uint8_t kBytePositions[256][8] = {ROWS64(0), ROWS64(64), ROWS64(128), ROWS64(192)};

ACTZIP_ISA_TABLE(kernels_for, Kernels, kTable)

const Kernels& kernels() { return kernels_for(active_isa()); }

}  // namespace actzip::codec
