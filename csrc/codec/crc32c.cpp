#include "codec/crc32c.h"

#include "codec/kernels.h"

namespace actzip::codec {
namespace {

struct Tables {
  uint32_t t[8][256];
  constexpr Tables() : t() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (0x82f63b78u & (0u - (c & 1)));
      t[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; ++i)
      for (int k = 1; k < 8; ++k) t[k][i] = (t[k - 1][i] >> 8) ^ t[0][t[k - 1][i] & 255];
  }
};
constexpr Tables kT;

// The register after 1024 zero bytes is linear in the register before.
struct Shift {
  uint32_t t[4][256];
  constexpr Shift() : t() {
    uint32_t bit[32] = {};
    for (int b = 0; b < 32; ++b) {
      uint32_t c = uint32_t{1} << b;
      for (int i = 0; i < 1024; ++i) c = (c >> 8) ^ kT.t[0][c & 255];
      bit[b] = c;
    }
    for (int k = 0; k < 4; ++k)
      for (int j = 0; j < 256; ++j)
        for (int b = 0; b < 8; ++b)
          if (j >> b & 1) t[k][j] ^= bit[8 * k + b];
  }
};
constexpr Shift kShift;

}  // namespace

const uint32_t (&kCrcShift1024)[4][256] = kShift.t;

uint32_t crc32c(const uint8_t* p, size_t n) { return kernels().crc32c(p, n); }

uint32_t crc32c_portable(const uint8_t* p, size_t n) {
  uint32_t c = ~0u;
  while (n >= 8) {
    const uint32_t a = c ^ (static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 |
                            static_cast<uint32_t>(p[2]) << 16 | static_cast<uint32_t>(p[3]) << 24);
    c = kT.t[7][a & 255] ^ kT.t[6][(a >> 8) & 255] ^ kT.t[5][(a >> 16) & 255] ^ kT.t[4][a >> 24] ^
        kT.t[3][p[4]] ^ kT.t[2][p[5]] ^ kT.t[1][p[6]] ^ kT.t[0][p[7]];
    p += 8;
    n -= 8;
  }
  while (n-- > 0) c = (c >> 8) ^ kT.t[0][(c ^ *p++) & 255];
  return ~c;
}

}  // namespace actzip::codec
