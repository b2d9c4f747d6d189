#include "codec/rans_model.h"

#include <algorithm>

#include "codec/bytes.h"
#include "codec/rans_bits.h"

namespace actzip::codec::rans {
namespace {

// The frequencies that the format can say: `keep` bits below the leading one.
uint32_t representable(uint32_t f, int keep) {
  const int drop = bit_length(f) - 1 - keep;
  if (drop <= 0) return f;
  const uint32_t half = 1u << (drop - 1);
  return (f + half) >> drop << drop;
}

uint32_t zigzag(int v) { return v < 0 ? static_cast<uint32_t>(-2 * v - 1) : static_cast<uint32_t>(2 * v); }

// Where the tables of one class begin.
void write_starts(const std::vector<uint8_t>& s, BitWriter& w) {
  uint32_t tables = 1, at = 0;
  for (size_t i = 1; i < s.size(); ++i) tables += s[i];
  w.gamma(tables);
  for (size_t i = 1; i < s.size(); ++i) {
    if (!s[i]) continue;
    w.gamma(static_cast<uint32_t>(i) - at);
    at = static_cast<uint32_t>(i);
  }
}

// Frequencies, their lengths relative to the table before or, in the first one, the token before.
void write_table(const Model& m, const Frequencies& f, const Frequencies* before, BitWriter& w) {
  const Alphabet& a = m.alphabet;
  int last = 0, big = 0;
  for (int t = 0; t < a.count; ++t) {
    if (f[static_cast<size_t>(t)]) last = t;
    if (f[static_cast<size_t>(t)] > f[static_cast<size_t>(big)]) big = t;
  }
  // The token whose frequency is not said must be the one that need not be representable.
  for (int t = 0; t < a.count; ++t)
    if (representable(f[static_cast<size_t>(t)], m.keep) != f[static_cast<size_t>(t)]) big = t;
  w.put(static_cast<uint32_t>(last), 6);
  w.put(static_cast<uint32_t>(big), 6);
  int previous = 0;
  for (int t = 0; t <= last; ++t) {
    if (t == big) continue;
    const uint32_t v = f[static_cast<size_t>(t)];
    const int n = bit_length(v), guess = before ? bit_length((*before)[static_cast<size_t>(t)]) : previous;
    w.gamma(zigzag(n - guess) + 1);
    const int said = std::min(n - 1, m.keep);
    if (said > 0) w.put(v >> (n - 1 - said) & ((1u << said) - 1), said);
    previous = n;
  }
}

void read_form(const MapInfo& info, Reader& r, Model& m) {
  const uint8_t form = r.u8("the form"), more = r.u8("the number of classes");
  Alphabet& a = m.alphabet;
  a.kind = info.kind;
  a.bits = info.bits;
  a.fine = form & 3;
  m.prec = 8 + (form >> 2 & 7);
  a.rotate = (form & 32) != 0;
  m.keep = more & 15;
  m.classes = 1u + (more >> 4);
  if (info.kind != Kind::integer) a.first = r.u8("the first exponent");
  if (form > 63 || m.prec > 12 || m.keep > 12 || !a.build())
    throw FormatError("parameters, byte 0: impossible form");
}

void read_classes(const MapInfo& info, BitReader& b, Model& m) {
  if (m.classes == 1) return;
  const int bits = bits_for(m.classes);
  if (info.channels > b.left() / static_cast<uint64_t>(bits))
    b.fail("the classes of the channels", "are cut off");
  m.class_of.resize(info.channels);
  for (uint8_t& c : m.class_of) {
    c = static_cast<uint8_t>(b.get(bits, "a channel's class"));
    if (c >= m.classes) b.fail("a channel's class", "does not exist");
  }
}

// Where each class's tables begin.
void read_starts(BitReader& b, Model& m) {
  uint32_t tables = 0;
  const uint32_t contexts = static_cast<uint32_t>(m.alphabet.contexts());
  m.start.assign(m.classes, std::vector<uint8_t>(contexts, 0));
  for (auto& s : m.start) {
    const uint32_t n = b.gamma("the number of tables");
    tables += n;
    if (n > contexts || tables > kMaxTables) b.fail("the number of tables", "is too large");
    uint32_t at = 0;
    for (uint32_t i = 1; i < n; ++i) {
      at += b.gamma("the first context of a table");
      if (at >= contexts) b.fail("the first context of a table", "is too large");
      s[at] = 1;
    }
  }
  m.tables.resize(tables);
}

Frequencies read_table(const Model& m, const Frequencies* before, BitReader& b) {
  Frequencies f;
  f.fill(0);
  const int last = static_cast<int>(b.get(6, "the last token")),
            big = static_cast<int>(b.get(6, "the free token"));
  if (last >= m.alphabet.count || big > last) b.fail("the free token", "is out of range");
  uint32_t used = 0;
  int previous = 0;
  for (int t = 0; t <= last; ++t) {
    if (t == big) continue;
    const int guess = before ? bit_length((*before)[static_cast<size_t>(t)]) : previous;
    const uint32_t z = b.gamma("a frequency's length") - 1;
    const int n = guess + (z & 1 ? -static_cast<int>((z + 1) / 2) : static_cast<int>(z / 2));
    if (n < 0 || n > m.prec) b.fail("a frequency's length", "is out of range");
    previous = n;
    if (n == 0) continue;
    const int said = std::min(n - 1, m.keep);
    const uint32_t v = (1u << said | b.get(said, "a frequency")) << (n - 1 - said);
    used += v;
    if (used >= 1u << m.prec) b.fail("a frequency", "is too large");
    f[static_cast<size_t>(t)] = static_cast<uint16_t>(v);
  }
  f[static_cast<size_t>(big)] = static_cast<uint16_t>((1u << m.prec) - used);
  return f;
}

}  // namespace

Frequencies normalise(const uint64_t* count, int n, int prec, int keep) {
  Frequencies f{};
  uint64_t total = 0;
  int big = 0;
  for (int t = 0; t < n; ++t) {
    total += count[t];
    if (count[t] > count[big]) big = t;
  }
  const uint32_t sum = 1u << prec;
  uint32_t used = 0;
  for (int t = 0; t < n; ++t) {
    if (t == big || count[t] == 0) continue;
    const uint64_t exact = ((count[t] << prec) + total / 2) / total;
    const uint32_t r = representable(static_cast<uint32_t>(std::max<uint64_t>(exact, 1)), keep);
    f[static_cast<size_t>(t)] = static_cast<uint16_t>(r);
    used += r;
  }
  while (used >= sum) {  // many rare tokens: take from the most frequent of the others
    int most = -1;
    for (int t = 0; t < n; ++t)
      if (t != big && (most < 0 || f[static_cast<size_t>(t)] > f[static_cast<size_t>(most)])) most = t;
    uint16_t& m = f[static_cast<size_t>(most)];
    const uint32_t less = m - (1u << std::max(0, bit_length(m) - 1 - keep));
    used -= m - less;
    m = static_cast<uint16_t>(less);
  }
  f[static_cast<size_t>(big)] = static_cast<uint16_t>(sum - used);
  return f;
}

std::vector<uint8_t> write_model(const Model& m) {
  std::vector<uint8_t> out;
  const Alphabet& a = m.alphabet;
  out.push_back(static_cast<uint8_t>(a.fine | (m.prec - 8) << 2 | (a.rotate ? 32 : 0)));
  out.push_back(static_cast<uint8_t>(m.keep | (m.classes - 1) << 4));
  if (a.kind != Kind::integer) out.push_back(static_cast<uint8_t>(a.first));
  BitWriter w(&out);
  if (m.classes > 1)
    for (uint8_t c : m.class_of) w.put(c, bits_for(m.classes));
  for (const auto& s : m.start) write_starts(s, w);
  for (size_t k = 0; k < m.tables.size(); ++k) write_table(m, m.tables[k], k ? &m.tables[k - 1] : nullptr, w);
  return out;
}

Model read_model(const MapInfo& info, const uint8_t* p, size_t size) {
  Reader r(p, size, "parameters");
  Model m;
  read_form(info, r, m);
  BitReader b(r.here(), r.left(), r.at());
  read_classes(info, b, m);
  read_starts(b, m);
  for (size_t k = 0; k < m.tables.size(); ++k) m.tables[k] = read_table(m, k ? &m.tables[k - 1] : nullptr, b);
  b.finish();
  return m;
}

}  // namespace actzip::codec::rans
