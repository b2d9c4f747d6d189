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

uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

// Of all splits of v into a leading part and e raw bits, the token's is the least: (e << fine) + (v >> e)
// grows with e where the leading part is too short, and with -e where it is too long.
void integer_tokens(const uint8_t* s, size_t n, int bits, int fine, uint8_t* tok) {
  constexpr size_t kBlock = 4096;  // stays in the nearest cache
  for (size_t from = 0; from < n; from += kBlock) {
    const size_t end = std::min(n, from + kBlock);
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

void integer_tokens(const uint16_t* s, size_t n, int fine, uint8_t* tok) {
  const int32_t direct = (2 << fine) - 1, offset = ((fine + 127) << fine) - (1 << fine);
  // The leading bits of v, from its conversion to binary32, which is exact.
  for (size_t i = 0; i < n; ++i) {
    const int32_t v = s[i];
    const int32_t t = static_cast<int32_t>(float_bits(static_cast<float>(v)) >> (23 - fine)) - offset;
    const int32_t d = v < direct ? v : direct;
    tok[i] = static_cast<uint8_t>(t > d ? t : d);
  }
}

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
    integer_tokens(static_cast<const uint8_t*>(s), n, a.bits, a.fine, tok);
  } else {
    integer_tokens(static_cast<const uint16_t*>(s), n, a.fine, tok);
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
  uint8_t* const tok = scratch.get_as<uint8_t>(Scratch::kFirst, box.size() + 64) + 64;  // tok[-1] is read
  tokens_of(symbols, box.size(), a, width, tok);
  uint8_t* const keep = scratch.get_as<uint8_t>(Scratch::kFirst + 1, s.run);  // 0 in the first column
  std::memset(keep, 255, s.run);
  for (size_t i = 0; i < s.run; i += s.cols) keep[i] = 0;
  const auto count = static_cast<uint16_t>(a.count);
  for (uint64_t k = 0; k < s.count; ++k) {
    const uint8_t* __restrict t = tok + s.offset(k);
    uint16_t* __restrict p = pairs + s.offset(k);
    const size_t n = s.length(k), w = s.cols, first = std::min(n, w);
    for (size_t i = 0; i < first; ++i) {
      const auto context = static_cast<uint8_t>(t[i - 1] & keep[i]);
      p[i] = static_cast<uint16_t>(context * count + t[i]);
    }
    for (size_t i = w; i < n; ++i) {
      const auto context = static_cast<uint8_t>((t[i - 1] & keep[i]) + t[i - w]);
      p[i] = static_cast<uint16_t>(context * count + t[i]);
    }
  }
}

}  // namespace actzip::codec::rans
