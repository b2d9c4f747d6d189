#include "codec/rans_tokens.h"

#include <cstring>

namespace actzip::codec::rans {

bool Alphabet::build() {
  std::memset(&table, 0, sizeof table);
  if (kind == Kind::integer) {
    if (fine > 3 || fine >= bits || rotate || first) return false;
    count = (bits + 1 - fine) << fine;
    if (count > kRansTokens) return false;
    build_integer();
  } else {
    if (fine > 2 || first >= exponents()) return false;
    count = 2 + (window() << fine);
    build_float();
  }
  wide = *std::max_element(table.raw, table.raw + kRansTokens) > 16;
  return true;
}

void Alphabet::build_integer() {
  for (int t = 0; t < count; ++t) {
    const int small = 2 << fine, e = t < small ? 0 : (t >> fine) - 1;
    table.raw[t] = static_cast<uint32_t>(e);
    table.base[t] = t < small ? static_cast<uint32_t>(t)
                              : ((1u << fine) | (static_cast<uint32_t>(t) & ((1u << fine) - 1))) << e;
  }
}

void Alphabet::build_float() {
  const int m = mantissa(), r = rotate ? 1 : 0;
  table.raw[1] = static_cast<uint32_t>(bits);
  for (int t = 2; t < count; ++t) {
    const uint32_t j = static_cast<uint32_t>(t - 2);
    table.raw[t] = static_cast<uint32_t>(m - fine + r);
    table.base[t] = ((static_cast<uint32_t>(first) << fine) + j) << (m - fine + r);
  }
}

namespace {

template <class U>
void float_tokens(const U* s, size_t n, const Alphabet& a, uint8_t* tok) {
  const int shift = a.mantissa() - a.fine + (a.rotate ? 1 : 0);
  const uint32_t first = static_cast<uint32_t>(a.first) << a.fine, count = static_cast<uint32_t>(a.count) - 2;
  for (size_t i = 0; i < n; ++i) {
    const U v = rotate_left(s[i], a.rotate);
    const uint32_t j = static_cast<uint32_t>(v >> shift) - first;
    tok[i] = static_cast<uint8_t>(v == 0 ? 0 : j < count ? j + 2 : 1);
  }
}

void tokens_of(const void* s, size_t n, const Alphabet& a, int width, uint8_t* tok) {
  if (a.kind != Kind::integer) {
    if (width == 2)
      float_tokens(static_cast<const uint16_t*>(s), n, a, tok);
    else
      float_tokens(static_cast<const uint32_t*>(s), n, a, tok);
  } else if (width == 1) {
    rans_kernels().tokens8(static_cast<const uint8_t*>(s), n, a.bits, a.fine, tok);
  } else {
    rans_kernels().tokens16(static_cast<const uint16_t*>(s), n, a.fine, tok);
  }
}

uint32_t ceil_div(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

}  // namespace

Stripes stripes_of(const Box& b) {
  const size_t n = b.size();
  Stripes s;
  s.lanes = n >= 32768 ? 32 : n >= 8192 ? 16 : n >= 1024 ? 8 : 4;
  s.plane = b.rows * b.cols;
  s.cols = b.cols;
  s.run = s.plane;
  s.per_plane = 1;
  if (b.planes < static_cast<uint32_t>(s.lanes)) {
    const uint32_t want = static_cast<uint32_t>(s.lanes) / b.planes;
    if (b.rows > 1)
      s.run = std::max(ceil_div(b.rows, want), std::min(b.rows, 8u)) * b.cols;
    else
      s.run = s.cols = std::max(ceil_div(b.cols, want), std::min(b.cols, 64u));
    s.per_plane = ceil_div(s.plane, s.run);
  }
  s.count = static_cast<uint64_t>(b.planes) * s.per_plane;
  while (s.lanes > 4 && s.count <= static_cast<uint64_t>(s.lanes) / 2) s.lanes /= 2;
  return s;
}

void pairs_of(const void* symbols, const Box& box, const Alphabet& a, int width, Scratch& scratch,
              uint16_t* pairs) {
  const Stripes s = stripes_of(box);
  const size_t n = box.size(), front = (s.cols + 63) / 64 * 64;  // readable: tokens that do not count
  uint8_t* const tok = scratch.get_as<uint8_t>(Scratch::kFirst, n + front) + front;
  tokens_of(symbols, n, a, width, tok);
  // Which neighbours count, for some whole planes: 0 in the first column and the first row of a stripe.
  constexpr size_t kLong = 2048;
  const size_t block = s.plane * std::max<size_t>(1, kLong / s.plane);
  uint8_t* const left = scratch.get_as<uint8_t>(Scratch::kFirst + 1, 2 * block);
  uint8_t* const up = left + block;
  std::memset(left, 255, 2 * block);
  for (size_t plane = 0; plane < block; plane += s.plane)
    for (size_t stripe = plane; stripe < plane + s.plane; stripe += s.run) {
      const size_t end = std::min(stripe + s.run, plane + s.plane);
      for (size_t i = stripe; i < end; i += s.cols) left[i] = 0;
      std::memset(up + stripe, 0, std::min<size_t>(s.cols, end - stripe));
    }
  for (size_t i = 0; i < n; i += block)
    rans_kernels().pairs(tok + i, left, up, std::min(block, n - i), s.cols, static_cast<uint16_t>(a.count),
                         pairs + i);
}

}  // namespace actzip::codec::rans
