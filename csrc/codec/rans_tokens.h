// What `rans` codes: the tokens of symbols, the stripes that a chunk is cut into, and the context of each
// token.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "codec/codec.h"
#include "codec/rans_lanes.h"

namespace actzip::codec::rans {

// How symbols become tokens. Integers: v < 2^(fine+1) is its own token; others have `fine` bits below the
// leading one in the token. Floating point: token 0 is the pattern 0, token 1 any pattern (all its bits raw),
// token 2 + j covers the exponent `first` + (j >> fine) with the top `fine` mantissa bits j % 2^fine.
struct Alphabet {
  Kind kind;
  int bits, fine, first = 0;
  bool rotate = false;  // floating point: rotated left by one bit first, so that the sign is lowest
  int count = 0;
  bool wide = false;
  RansTokenTable table;

  int mantissa() const { return kind == Kind::float16 ? 10 : kind == Kind::bfloat16 ? 7 : 23; }
  int exponents() const { return kind == Kind::float16 ? 32 : 256; }
  // Contexts, and values that a pair of a context and a token can have.
  int contexts() const { return 2 * (count - 1) + 1; }
  size_t pairs() const { return static_cast<size_t>(contexts()) * static_cast<size_t>(count); }
  int window() const { return std::min((kRansTokens - 2) >> fine, exponents() - first); }

  // The table; false if the fields do not go together.
  bool build();

 private:
  void build_integer();
  void build_float();
};

template <class U>
U rotate_left(U v, bool rotate) {
  return rotate ? static_cast<U>(v << 1 | v >> (8 * sizeof(U) - 1)) : v;
}

// A chunk is cut into stripes, contiguous runs of its symbols; stripe g * lanes + l is lane l's in group g.
struct Stripes {
  int lanes;
  uint32_t per_plane;  // stripes of a plane
  uint32_t run;        // symbols of a stripe; a plane's last has what is left
  uint32_t cols;       // the neighbour above is so many symbols back
  uint32_t plane;      // symbols of a plane
  uint64_t count;
  size_t offset(uint64_t s) const { return s / per_plane * plane + s % per_plane * run; }
  uint32_t length(uint64_t s) const {
    return std::min(run, plane - static_cast<uint32_t>(s % per_plane) * run);
  }
};
Stripes stripes_of(const Box& b);

// Of each symbol context * a.count + token. Its context is the sum of the tokens before it in its row and
// above it, inside its stripe. Uses the first two slots of the scratch memory.
void pairs_of(const void* symbols, const Box& box, const Alphabet& a, int width, Scratch& scratch,
              uint16_t* pairs);

}  // namespace actzip::codec::rans
