// `rans`: the dense codec. Each symbol becomes a token (its magnitude, roughly) and raw bits; the token is
// coded by interleaved range asymmetric numeral systems with a static table that is chosen by the class of
// the channel and by the tokens of the left and the upper neighbour. docs/bitstream.md describes the format.
//
// J. Duda, "Asymmetric numeral systems", arXiv:1311.2540 (rANS: section 3); F. Giesen, "Interleaved entropy
// coders", arXiv:1402.3392 (interleaving and vectors).
#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <numeric>

#include "codec/bytes.h"
#include "codec/codec.h"
#include "codec/rans_lanes.h"
#include "common/isa_table.h"

namespace actzip::codec {

ACTZIP_ISA_TABLE(rans_decoder, RansDecodeGroup, kRansDecodeGroup)

namespace {

// ---------------------------------------------------------------------------------------------- numbers

// log2(v) in units of 1/256, rounded down, for v >= 1; the same everywhere (no floating point).
struct LogTable {
  uint16_t row[4096];
  LogTable() {
    row[0] = 0;
    for (uint32_t v = 1; v < 4096; ++v) {
      int e = 31;
      while (!(v >> e)) --e;
      uint64_t m = static_cast<uint64_t>(v) << (31 - e);
      uint32_t r = static_cast<uint32_t>(e);
      for (int k = 0; k < 8; ++k) {
        m = m * m >> 31;
        r = r << 1 | static_cast<uint32_t>(m >> 32);
        m >>= m >> 32;
      }
      row[v] = static_cast<uint16_t>(r);
    }
  }
};

uint64_t log2_256(uint64_t v) {
  static const LogTable table;
  uint64_t shift = 0;
  while (v >= (uint64_t{1} << 24)) v >>= 12, shift += 12;
  while (v >= 4096) v >>= 1, ++shift;
  return shift * 256 + table.row[v];
}

int bit_length(uint32_t v) {
  int n = 0;
  while (v) ++n, v >>= 1;
  return n;
}

int bits_for(uint32_t count) { return bit_length(count - 1); }  // to tell `count` things apart

// Bits, least significant first in each byte.
class BitWriter {
 public:
  explicit BitWriter(std::vector<uint8_t>* out) : out_(out) {}
  void put(uint32_t v, int bits) {
    for (int i = 0; i < bits; ++i) {
      if (used_ == 0) out_->push_back(0);
      out_->back() = static_cast<uint8_t>(out_->back() | (v >> i & 1) << used_);
      used_ = (used_ + 1) & 7;
    }
  }
  // Elias gamma, v >= 1: bit length - 1 zeros, then a one, then the bits below the leading one.
  void gamma(uint32_t v) {
    const int n = bit_length(v);
    put(0, n - 1);
    put(1, 1);
    put(v & ((1u << (n - 1)) - 1), n - 1);
  }

 private:
  std::vector<uint8_t>* out_;
  int used_ = 0;
};

class BitReader {
 public:
  BitReader(const uint8_t* p, size_t size, size_t base) : p_(p), bits_(uint64_t{8} * size), base_(base) {}
  uint32_t get(int n, const char* what) {
    if (static_cast<uint64_t>(n) > bits_ - pos_) fail(what, "is cut off");
    uint32_t v = 0;
    for (int i = 0; i < n; ++i, ++pos_) v |= static_cast<uint32_t>(p_[pos_ >> 3] >> (pos_ & 7) & 1) << i;
    return v;
  }
  uint32_t gamma(const char* what) {
    int n = 0;
    while (get(1, what) == 0)
      if (++n > 20) fail(what, "is too large");
    return 1u << n | get(n, what);
  }
  uint64_t left() const { return bits_ - pos_; }
  void finish() {
    if (left() >= 8) fail("the end", "is followed by more bytes");
    while (left() > 0)
      if (get(1, "padding")) fail("padding", "is not zero");
  }
  [[noreturn]] void fail(const char* what, const char* why) const {
    throw FormatError("parameters, byte " + std::to_string(base_ + (pos_ >> 3)) + " bit " +
                      std::to_string(pos_ & 7) + ": " + what + " " + why);
  }

 private:
  const uint8_t* p_;
  uint64_t bits_, pos_ = 0;
  size_t base_;
};

// ---------------------------------------------------------------------------------------------- tokens

// How symbols become tokens. Integers: v < 2^(fine+1) is its own token; others have `fine` bits below the
// leading one in the token. Floating point: token 0 is the pattern 0, token 1 any pattern (all its bits raw),
// token 2 + j covers the exponent `first` + (j >> fine) with the top `fine` mantissa bits j % 2^fine.
struct Alphabet {
  Kind kind;
  int bits, fine, first = 0;
  bool rotate =
      false;  // floating point: the pattern is rotated left by one bit first, so that the sign is lowest
  int count = 0;
  bool wide = false;
  RansTokenTable table;

  int mantissa() const { return kind == Kind::float16 ? 10 : kind == Kind::bfloat16 ? 7 : 23; }
  int exponents() const { return kind == Kind::float16 ? 32 : 256; }
  int window() const { return std::min((kRansTokens - 2) >> fine, exponents() - first); }

  // False if the fields do not go together.
  bool build() {
    std::memset(&table, 0, sizeof table);
    if (kind == Kind::integer) {
      if (fine > 3 || fine >= bits || rotate || first) return false;
      count = (bits + 1 - fine) << fine;
      if (count > kRansTokens) return false;
      for (int t = 0; t < count; ++t) {
        const int small = 2 << fine, e = t < small ? 0 : (t >> fine) - 1;
        table.raw[t] = static_cast<uint32_t>(e);
        table.base[t] = t < small ? static_cast<uint32_t>(t)
                                  : ((1u << fine) | (static_cast<uint32_t>(t) & ((1u << fine) - 1))) << e;
      }
    } else {
      if (fine > 2 || first >= exponents()) return false;
      const int m = mantissa(), r = rotate ? 1 : 0;
      count = 2 + (window() << fine);
      table.raw[1] = static_cast<uint32_t>(bits);
      for (int t = 2; t < count; ++t) {
        const uint32_t j = static_cast<uint32_t>(t - 2);
        table.raw[t] = static_cast<uint32_t>(m - fine + r);
        table.base[t] = ((static_cast<uint32_t>(first) << fine) + j) << (m - fine + r);
      }
    }
    wide = *std::max_element(table.raw, table.raw + kRansTokens) > 16;
    return true;
  }
};

uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

template <class U>
void integer_tokens(const U* s, size_t n, int fine, uint8_t* tok) {
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
U rotate_left(U v, bool rotate) {
  return rotate ? static_cast<U>(v << 1 | v >> (8 * sizeof(U) - 1)) : v;
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
    integer_tokens(static_cast<const uint8_t*>(s), n, a.fine, tok);
  } else {
    integer_tokens(static_cast<const uint16_t*>(s), n, a.fine, tok);
  }
}

// ---------------------------------------------------------------------------------------------- stripes

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

uint32_t ceil_div(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }

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

// The context of each symbol: the sum of the tokens before it in its row and above it, inside its stripe.
void contexts_of(const Stripes& s, const uint8_t* tok, uint8_t* ctx) {
  for (uint64_t k = 0; k < s.count; ++k) {
    const uint8_t* t = tok + s.offset(k);
    uint8_t* c = ctx + s.offset(k);
    const uint32_t n = s.length(k), w = s.cols, first = std::min(n, w);
    c[0] = 0;
    for (uint32_t i = 1; i < first; ++i) c[i] = t[i - 1];
    for (uint32_t y = w; y < n; y += w) {
      c[y] = t[y - w];
      for (uint32_t i = y + 1; i < y + w; ++i) c[i] = static_cast<uint8_t>(t[i - 1] + t[i - w]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- the model

constexpr uint32_t kMaxClasses = 16, kMaxTables = 256;

// What the parameters say: everything that coding needs besides the chunk.
struct Model {
  Alphabet alphabet;
  int prec = 11;
  int keep = 3;  // bits of a frequency kept below its leading one
  uint32_t classes = 1;
  std::vector<uint8_t> class_of;                          // of each channel; empty for one class
  std::vector<std::vector<uint8_t>> start;                // [class][context]: 1 where a new table begins
  std::vector<std::array<uint16_t, kRansTokens>> tables;  // frequencies

  int contexts() const { return 2 * (alphabet.count - 1) + 1; }
};

// The frequencies that the format can say: `keep` bits below the leading one.
uint32_t representable(uint32_t f, int keep) {
  const int drop = bit_length(f) - 1 - keep;
  if (drop <= 0) return f;
  const uint32_t half = 1u << (drop - 1);
  return (f + half) >> drop << drop;
}

// Frequencies of sum 2^prec for the counts: every token that occurs gets at least 1.
std::array<uint16_t, kRansTokens> normalise(const uint64_t* count, int n, int prec, int keep) {
  std::array<uint16_t, kRansTokens> f{};
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

uint32_t zigzag(int v) { return v < 0 ? static_cast<uint32_t>(-2 * v - 1) : static_cast<uint32_t>(2 * v); }

std::vector<uint8_t> write_model(const Model& m) {
  std::vector<uint8_t> out;
  const Alphabet& a = m.alphabet;
  out.push_back(static_cast<uint8_t>(a.fine | (m.prec - 8) << 2 | (a.rotate ? 32 : 0)));
  out.push_back(static_cast<uint8_t>(m.keep | (m.classes - 1) << 4));
  if (a.kind != Kind::integer) out.push_back(static_cast<uint8_t>(a.first));
  BitWriter w(&out);
  if (m.classes > 1)
    for (uint8_t c : m.class_of) w.put(c, bits_for(m.classes));
  for (const auto& s : m.start) {
    uint32_t tables = 1, at = 0;
    for (size_t i = 1; i < s.size(); ++i) tables += s[i];
    w.gamma(tables);
    for (size_t i = 1; i < s.size(); ++i) {
      if (!s[i]) continue;
      w.gamma(static_cast<uint32_t>(i) - at);
      at = static_cast<uint32_t>(i);
    }
  }
  std::array<uint16_t, kRansTokens> before{};
  for (size_t k = 0; k < m.tables.size(); ++k) {
    const auto& f = m.tables[k];
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
      const int n = bit_length(v), guess = k ? bit_length(before[static_cast<size_t>(t)]) : previous;
      w.gamma(zigzag(n - guess) + 1);
      const int said = std::min(n - 1, m.keep);
      if (said > 0) w.put(v >> (n - 1 - said) & ((1u << said) - 1), said);
      previous = n;
    }
    before = f;
  }
  return out;
}

Model read_model(const MapInfo& info, const uint8_t* p, size_t size) {
  Reader r(p, size, "parameters");
  Model m;
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
  BitReader b(r.here(), r.left(), r.at());
  if (m.classes > 1) {
    const int bits = bits_for(m.classes);
    if (info.channels > b.left() / static_cast<uint64_t>(bits))
      b.fail("the classes of the channels", "are cut off");
    m.class_of.resize(info.channels);
    for (uint8_t& c : m.class_of) {
      c = static_cast<uint8_t>(b.get(bits, "a channel's class"));
      if (c >= m.classes) b.fail("a channel's class", "does not exist");
    }
  }
  uint32_t tables = 0;
  const uint32_t contexts = static_cast<uint32_t>(m.contexts());
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
  for (uint32_t k = 0; k < tables; ++k) {
    auto& f = m.tables[k];
    f.fill(0);
    const int last = static_cast<int>(b.get(6, "the last token")),
              big = static_cast<int>(b.get(6, "the free token"));
    if (last >= a.count || big > last) b.fail("the free token", "is out of range");
    uint32_t used = 0;
    int previous = 0;
    for (int t = 0; t <= last; ++t) {
      if (t == big) continue;
      const int guess = k ? bit_length(m.tables[k - 1][static_cast<size_t>(t)]) : previous;
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
  }
  b.finish();
  return m;
}

// ---------------------------------------------------------------------------------------------- planning

using Histogram = std::vector<uint64_t>;  // [context][token]

// The cost in 1/256 bits of coding with an own table, its own cost included.
uint64_t cost_of(const uint64_t* c, int n) {
  uint64_t total = 0, sum = 0;
  int seen = 0, last = 0;
  for (int t = 0; t < n; ++t) {
    if (!c[t]) continue;
    total += c[t];
    sum += c[t] * log2_256(c[t]);
    ++seen;
    last = t;
  }
  if (total == 0) return 0;
  return total * log2_256(total) - sum + 256 * 12 + 1024 * static_cast<uint64_t>(seen) +
         256 * static_cast<uint64_t>(last + 1 - seen);
}

// Where tables begin, for one class: adjacent contexts share one while that is cheaper. Adds the counts of
// the tables to `counts` and returns the cost.
uint64_t merge_contexts(const uint64_t* h, int contexts, int n, size_t limit, std::vector<uint8_t>* start,
                        std::vector<std::vector<uint64_t>>* counts) {
  struct Run {
    int first;
    std::vector<uint64_t> c;
    uint64_t cost;
    int64_t gain = 0;  // of merging with the next
  };
  std::vector<Run> runs;
  for (int k = 0; k < contexts; ++k) {
    const uint64_t* c = h + static_cast<size_t>(k) * static_cast<size_t>(n);
    if (std::all_of(c, c + n, [](uint64_t v) { return v == 0; })) continue;
    runs.push_back({k, std::vector<uint64_t>(c, c + n), cost_of(c, n)});
  }
  if (runs.empty()) {
    runs.push_back({0, std::vector<uint64_t>(static_cast<size_t>(n), 0), 0});
    runs[0].c[0] = 1;
  }
  std::vector<uint64_t> both(static_cast<size_t>(n));
  auto gain = [&](size_t i) {
    if (i + 1 >= runs.size()) return;
    for (size_t t = 0; t < both.size(); ++t) both[t] = runs[i].c[t] + runs[i + 1].c[t];
    runs[i].gain =
        static_cast<int64_t>(runs[i].cost + runs[i + 1].cost) - static_cast<int64_t>(cost_of(both.data(), n));
  };
  for (size_t i = 0; i < runs.size(); ++i) gain(i);
  while (runs.size() > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < runs.size(); ++i)
      if (runs[i].gain > runs[best].gain) best = i;
    if (runs[best].gain <= 0 && runs.size() <= limit) break;
    for (size_t t = 0; t < both.size(); ++t) runs[best].c[t] += runs[best + 1].c[t];
    runs[best].cost = cost_of(runs[best].c.data(), n);
    runs.erase(runs.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    gain(best);
    if (best > 0) gain(best - 1);
  }
  start->assign(static_cast<size_t>(contexts), 0);
  uint64_t cost = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (i > 0) (*start)[static_cast<size_t>(runs[i].first)] = 1;
    cost += runs[i].cost;
    counts->push_back(std::move(runs[i].c));
  }
  return cost;
}

// Reads the map's chunks as pairs context * tokens + token.
class Pairs {
 public:
  Pairs(const Source& source, const Alphabet& a, int width) : source_(source), a_(a), width_(width) {}
  // The pairs of a chunk, at `out`.
  void load(uint64_t chunk, Scratch& scratch, uint16_t* out) const {
    const Box box = source_.box(chunk);
    const size_t n = box.size();
    const void* s = source_.load(chunk, scratch);
    uint8_t* tok = scratch.get_as<uint8_t>(Scratch::kFirst, n);
    uint8_t* ctx = scratch.get_as<uint8_t>(Scratch::kFirst + 1, n);
    tokens_of(s, n, a_, width_, tok);
    contexts_of(stripes_of(box), tok, ctx);
    const unsigned count = static_cast<unsigned>(a_.count);
    for (size_t i = 0; i < n; ++i) out[i] = static_cast<uint16_t>(ctx[i] * count + tok[i]);
  }

 private:
  const Source& source_;
  const Alphabet& a_;
  int width_;
};

struct Piece {  // pairs of one plane
  size_t at, size;
  uint32_t channel;
};

// Classes of channels by k-means on code length: each channel joins the class whose statistics code it best.
std::vector<uint8_t> cluster(const std::vector<uint16_t>& pairs, const std::vector<Piece>& pieces,
                             size_t channels, size_t cells, int tokens, uint32_t classes, int threads) {
  // The pieces of each channel together: one thread has all of them.
  std::vector<size_t> begin(channels + 1, 0), next;
  for (const Piece& p : pieces) ++begin[p.channel + 1];
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  next = begin;
  std::vector<Piece> sorted(pieces.size());
  for (const Piece& p : pieces) sorted[next[p.channel]++] = p;
  const size_t together = channels / 64 + 1;  // channels of a task
  auto for_each_channel = [&](auto&& fn) {
    parallel_for(static_cast<int64_t>((channels + together - 1) / together), threads, [&](int64_t i, int w) {
      const size_t first = static_cast<size_t>(i) * together;
      for (size_t c = first; c < std::min(channels, first + together); ++c) fn(c, w);
    });
  };
  auto for_each_piece = [&](size_t channel, auto&& fn) {
    for (size_t k = begin[channel]; k < begin[channel + 1]; ++k) fn(sorted[k]);
  };

  std::vector<uint64_t> mean(channels);
  for_each_channel([&](size_t c, int) {
    uint64_t sum = 0, size = 0;
    for_each_piece(c, [&](const Piece& p) {
      for (size_t i = p.at; i < p.at + p.size; ++i) sum += pairs[i];
      size += p.size;
    });
    mean[c] = size ? (sum << 8) / size : 0;
  });
  std::vector<uint32_t> order(channels);
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return mean[a] != mean[b] ? mean[a] < mean[b] : a < b; });
  std::vector<uint8_t> of(channels);
  for (size_t i = 0; i < channels; ++i) of[order[i]] = static_cast<uint8_t>(i * classes / channels);

  constexpr size_t wide = 8;
  const size_t workers = static_cast<size_t>(threads > 0 ? threads : default_threads());
  std::vector<std::vector<uint32_t>> parts(workers);
  std::vector<uint32_t> h(cells * classes), price(cells * wide);
  for (int round = 0; round < 3; ++round) {
    for (auto& part : parts) std::fill(part.begin(), part.end(), 0u);
    for_each_channel([&](size_t c, int w) {
      auto& part = parts[static_cast<size_t>(w)];
      part.resize(h.size(), 0u);
      uint32_t* row = &part[of[c] * cells];
      for_each_piece(c, [&](const Piece& p) {
        for (size_t i = p.at; i < p.at + p.size; ++i) ++row[pairs[i]];
      });
    });
    std::fill(h.begin(), h.end(), 0u);
    for (const auto& part : parts)
      for (size_t i = 0; i < part.size(); ++i) h[i] += part[i];
    std::fill(price.begin(), price.end(), 0u);
    for (uint32_t k = 0; k < classes; ++k) {
      for (size_t c = 0; c < cells; c += static_cast<size_t>(tokens)) {
        const uint32_t* row = &h[k * cells + c];
        uint64_t total = static_cast<uint64_t>(tokens);
        for (int t = 0; t < tokens; ++t) total += 16 * static_cast<uint64_t>(row[t]);
        const uint64_t all = log2_256(total);
        for (int t = 0; t < tokens; ++t)
          price[(c + static_cast<size_t>(t)) * wide + k] =
              static_cast<uint32_t>(all - log2_256(16 * static_cast<uint64_t>(row[t]) + 1));
      }
    }
    std::atomic<bool> moved{false};
    for_each_channel([&](size_t c, int) {
      uint64_t cost[wide] = {};
      for_each_piece(c, [&](const Piece& p) {
        for (size_t i = p.at; i < p.at + p.size;) {
          uint32_t acc[wide] = {};
          const size_t end = std::min(p.at + p.size, i + 65536);
          for (; i < end; ++i) {
            const uint32_t* from = &price[pairs[i] * wide];
            for (size_t k = 0; k < wide; ++k) acc[k] += from[k];
          }
          for (size_t k = 0; k < wide; ++k) cost[k] += acc[k];
        }
      });
      uint8_t best = of[c];
      for (uint32_t k = 0; k < classes; ++k)
        if (cost[k] < cost[best]) best = static_cast<uint8_t>(k);
      if (best != of[c]) moved.store(true, std::memory_order_relaxed);
      of[c] = best;
    });
    if (!moved) break;
  }
  return of;
}

// Chooses the exponents that have tokens, and whether signs are common enough to be rotated into the raw
// bits.
void choose_float_form(const MapInfo& info, const Source& source, int threads, Alphabet* a) {
  const size_t workers = static_cast<size_t>(threads > 0 ? threads : default_threads());
  const int m = a->mantissa();
  const size_t cells = static_cast<size_t>(a->exponents()) * 2;
  std::vector<std::vector<uint64_t>> parts(workers, std::vector<uint64_t>(cells + 1, 0));
  for_each_chunk(source, threads, [&](uint64_t, const void* s, const Box& box, int w) {
    uint64_t* h = parts[static_cast<size_t>(w)].data();
    const size_t n = box.size();
    for (size_t i = 0; i < n; ++i) {
      const uint32_t v =
          info.width == 2 ? static_cast<const uint16_t*>(s)[i] : static_cast<const uint32_t*>(s)[i];
      ++h[v == 0 ? cells : v >> m];
    }
  });
  for (size_t w = 1; w < workers; ++w)
    for (size_t i = 0; i <= cells; ++i) parts[0][i] += parts[w][i];
  const uint64_t* h = parts[0].data();
  uint64_t plus = 0, minus = 0;
  for (size_t e = 0; e < cells / 2; ++e) plus += h[e], minus += h[e + cells / 2];
  a->rotate = minus * 16 > plus + minus;
  const size_t window = static_cast<size_t>((kRansTokens - 2) >> a->fine), all = cells / 2;
  uint64_t best = 0;
  a->first = 0;
  for (size_t e = 0; e < all; ++e) {
    uint64_t sum = 0;
    for (size_t k = e; k < std::min(all, e + window); ++k) sum += h[k] + (a->rotate ? h[k + all] : 0);
    if (sum > best) {
      best = sum;
      a->first = static_cast<int>(e);
    }
  }
}

std::vector<uint8_t> plan(const MapInfo& info, const Source& source, const Options& options, int threads) {
  const uint64_t chunks = source.chunks();
  Model m;
  Alphabet& a = m.alphabet;
  a.kind = info.kind;
  a.bits = info.bits;
  const uint64_t elements = info.planes * info.rows * info.cols;
  if (info.kind == Kind::integer) {
    a.fine = info.bits <= 10 ? 2 : 1;
    if (a.fine >= a.bits) a.fine = a.bits - 1;
  } else {
    a.fine = 1;
    if (chunks) choose_float_form(info, source, threads, &a);
  }
  a.build();
  m.prec = elements >= 16384 ? 11 : 10;
  m.keep = elements >= 65536 ? 3 : 2;
  const int64_t wanted = option(options, "classes", 0);
  if (wanted < 0 || wanted > 8) throw ArgumentError("rans: classes must be 1 to 8, or 0 to choose");

  const size_t cells = static_cast<size_t>(m.contexts()) * static_cast<size_t>(a.count);
  const Pairs reader(source, a, info.width);

  // A sample of the map, all of it if it is small.
  constexpr uint64_t kSample = 1 << 18;
  const uint64_t stride = std::max<uint64_t>(1, elements / kSample);
  std::vector<uint16_t> pairs;
  std::vector<Piece> pieces;
  std::vector<uint64_t> ids;
  for (uint64_t c = 0; c < chunks; c += stride) {
    const Box box = source.box(c);
    const size_t plane = static_cast<size_t>(box.rows) * box.cols;
    size_t at = ids.empty() ? 0 : pieces.back().at + pieces.back().size;
    ids.push_back(c);
    for (uint32_t j = 0; j < box.planes; ++j, at += plane)
      pieces.push_back({at, plane, static_cast<uint32_t>((box.first_plane + j) % info.channels)});
  }
  std::vector<size_t> begin(ids.size());
  size_t total = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    begin[i] = total;
    total += source.box(ids[i]).size();
  }
  pairs.resize(total);
  parallel_for(static_cast<int64_t>(ids.size()), threads, [&](int64_t i, int) {
    reader.load(ids[static_cast<size_t>(i)], thread_scratch(), &pairs[begin[static_cast<size_t>(i)]]);
  });

  uint32_t classes = elements >= 131072 ? 8 : elements >= 16384 ? 4 : elements >= 4096 ? 2 : 1;
  if (wanted) classes = static_cast<uint32_t>(wanted);
  classes = static_cast<uint32_t>(std::min<uint64_t>(classes, std::max<uint64_t>(info.channels / 2, 1)));
  std::vector<uint8_t> of;
  if (classes > 1) of = cluster(pairs, pieces, info.channels, cells, a.count, classes, threads);

  // Histograms of the classes over the whole map.
  std::vector<Histogram> h(classes, Histogram(cells, 0));
  auto count = [&](const uint16_t* p, const Piece& piece, Histogram* to) {
    uint64_t* row = to[classes > 1 ? of[piece.channel] : 0].data();
    for (size_t i = 0; i < piece.size; ++i) ++row[p[i]];
  };
  if (stride == 1) {
    for (const Piece& p : pieces) count(&pairs[p.at], p, h.data());
  } else {
    const size_t workers = static_cast<size_t>(threads > 0 ? threads : default_threads());
    std::vector<std::vector<Histogram>> parts(workers, h);
    parallel_for(static_cast<int64_t>(chunks), threads, [&](int64_t i, int w) {
      Scratch& scratch = thread_scratch();
      const Box box = source.box(static_cast<uint64_t>(i));
      uint16_t* p = scratch.get_as<uint16_t>(Scratch::kFirst + 2, box.size());
      reader.load(static_cast<uint64_t>(i), scratch, p);
      const size_t plane = static_cast<size_t>(box.rows) * box.cols;
      for (uint32_t j = 0; j < box.planes; ++j)
        count(p + j * plane, {0, plane, static_cast<uint32_t>((box.first_plane + j) % info.channels)},
              parts[static_cast<size_t>(w)].data());
    });
    for (const auto& part : parts)
      for (uint32_t k = 0; k < classes; ++k)
        for (size_t i = 0; i < cells; ++i) h[k][i] += part[k][i];
  }

  // Tables for these classes, or for all channels together if that costs less: one set a class, then that of
  // all.
  if (classes > 1) {
    h.emplace_back(cells, 0);
    for (uint32_t k = 0; k < classes; ++k)
      for (size_t i = 0; i < cells; ++i) h[classes][i] += h[k][i];
  }
  struct Tables {
    std::vector<uint8_t> start;
    std::vector<std::vector<uint64_t>> counts;
    uint64_t cost = 0;
  };
  std::vector<Tables> sets(wanted && classes > 1 ? classes : h.size());
  parallel_for(static_cast<int64_t>(sets.size()), threads, [&](int64_t i, int) {
    const size_t k = static_cast<size_t>(i);
    Tables& t = sets[k];
    t.cost = merge_contexts(h[k].data(), m.contexts(), a.count,
                            k < classes ? kMaxTables / classes : kMaxTables, &t.start, &t.counts);
  });
  m.classes = classes;
  size_t first = 0, last = classes;
  if (classes > 1) {
    uint64_t cost = 256 * static_cast<uint64_t>(bits_for(classes)) * info.channels;
    for (uint32_t k = 0; k < classes; ++k) cost += sets[k].cost;
    if (!wanted && sets[classes].cost <= cost) {
      m.classes = 1;
      first = classes;
      last = classes + 1;
    } else {
      m.class_of = std::move(of);
    }
  }
  std::vector<std::vector<uint64_t>> counts;
  for (size_t k = first; k < last; ++k) {
    m.start.push_back(std::move(sets[k].start));
    for (auto& c : sets[k].counts) counts.push_back(std::move(c));
  }
  for (const auto& c : counts) m.tables.push_back(normalise(c.data(), a.count, m.prec, m.keep));
  return write_model(m);
}

// ---------------------------------------------------------------------------------------------- coding

struct EncodeEntry {
  uint64_t reciprocal;  // ceil(2^44 / frequency)
  uint16_t frequency, first;
};

class RansCoder final : public Coder {
 public:
  RansCoder(const MapInfo& info, Model model) : info_(info), m_(std::move(model)) {
    const size_t slots = size_t{1} << m_.prec;
    slots_.resize(m_.tables.size() * slots);
    contexts_.assign(m_.classes * kRansContexts, 0);
    index_.assign(m_.classes * kRansContexts, 0);
    uint32_t table = 0;
    for (uint32_t k = 0; k < m_.classes; ++k) {
      for (size_t c = 0; c < kRansContexts; ++c) {
        if (c > 0 && c < m_.start[k].size() && m_.start[k][c]) ++table;
        index_[k * kRansContexts + c] = static_cast<uint8_t>(table);
        contexts_[k * kRansContexts + c] = table << m_.prec;
      }
      ++table;
    }
    for (size_t k = 0; k < m_.tables.size(); ++k) {
      uint32_t* to = &slots_[k * slots];
      for (uint32_t t = 0; t < kRansTokens; ++t) {
        const uint32_t f = m_.tables[k][t];
        for (uint32_t i = 0; i < f; ++i) *to++ = t << 25 | i << 13 | f;
      }
    }
    entries_.resize(m_.tables.size() * kRansTokens);
    for (size_t k = 0; k < m_.tables.size(); ++k) {
      uint32_t first = 0;
      for (size_t t = 0; t < kRansTokens; ++t) {
        const uint32_t f = m_.tables[k][t];
        EncodeEntry& e = entries_[k * kRansTokens + t];
        e.frequency = static_cast<uint16_t>(f);
        e.first = static_cast<uint16_t>(first);
        e.reciprocal = f ? ((uint64_t{1} << 44) + f - 1) / f : 0;
        first += f;
      }
    }
  }

  size_t bound(const Box& b) const override {
    return b.size() * (m_.alphabet.wide ? 6 : 4) + 4 * kRansMaxLanes + 64;
  }

  size_t encode(const void* symbols, const Box& box, uint8_t* out, Scratch& scratch) const override {
    if (info_.width == 1) return encode_as(static_cast<const uint8_t*>(symbols), box, out, scratch);
    if (info_.width == 2) return encode_as(static_cast<const uint16_t*>(symbols), box, out, scratch);
    return encode_as(static_cast<const uint32_t*>(symbols), box, out, scratch);
  }

  void decode(const uint8_t* in, size_t size, const Box& box, void* symbols,
              Scratch& scratch) const override {
    const Stripes s = stripes_of(box);
    const size_t lanes = static_cast<size_t>(s.lanes), head = 4 * lanes;
    if (size < head) throw FormatError("byte " + std::to_string(size) + ": the states are cut off");
    if ((size - head) % 2) throw FormatError("byte " + std::to_string(size - 1) + ": half a word");
    RansStream stream;
    std::fill(stream.state, stream.state + kRansMaxLanes, kRansLow);
    for (size_t l = 0; l < lanes; ++l) {
      stream.state[l] = load_u32(in + 4 * l);
      if (stream.state[l] < kRansLow)
        throw FormatError("byte " + std::to_string(4 * l) + ": a state below 65536");
    }
    stream.at = in + head;
    stream.end = in + size;
    stream.tail_size = std::min(size - head, kRansTail);
    uint8_t* tail = scratch.get_as<uint8_t>(Scratch::kFirst, 2 * kRansTail);
    std::memcpy(tail, stream.end - stream.tail_size, stream.tail_size);
    std::memset(tail + stream.tail_size, 0, 2 * kRansTail - stream.tail_size);
    stream.tail = tail;
    stream.in_tail = false;
    stream.safe = stream.end - std::min<size_t>(size - head, 256);
    if (size - head < 256) stream.refill();

    RansGroup g;
    g.lanes = s.lanes;
    g.cols = s.cols;
    g.prec = m_.prec;
    g.wide = m_.alphabet.wide;
    g.rotate = m_.alphabet.rotate;
    g.width = info_.width;
    g.contexts = contexts_.data();
    g.slots = slots_.data();
    g.tokens = &m_.alphabet.table;
    const size_t back = std::min(s.cols, s.run) * lanes;
    g.history = scratch.get_as<uint8_t>(Scratch::kFirst + 1, back + s.run * lanes);
    g.tile = scratch.get_as<uint8_t>(Scratch::kFirst + 2, size_t{kRansTile} * kRansMaxLanes * 4);
    std::memset(g.history, 0, back);
    const RansDecodeGroup run = rans_decoder(active_isa());
    for (uint64_t first = 0; first < s.count; first += lanes) {
      g.steps = 0;
      for (size_t l = 0; l < kRansMaxLanes; ++l) {
        const uint64_t k = first + l;
        const bool here = l < lanes && k < s.count;
        g.length[l] = here ? s.length(k) : 0;
        g.row[l] = here ? class_of(box, k / s.per_plane) * kRansContexts : 0;
        g.out[l] =
            here ? static_cast<uint8_t*>(symbols) + s.offset(k) * static_cast<size_t>(info_.width) : nullptr;
        g.steps = std::max(g.steps, g.length[l]);
      }
      if (!run(g, &stream)) throw FormatError("byte " + std::to_string(size) + ": the words end too early");
    }
    const uint8_t* end = stream.in_tail ? stream.tail + stream.tail_size : stream.end;
    if (stream.at != end)
      throw FormatError(stream.at > end
                            ? "byte " + std::to_string(size) + ": the words end too early"
                            : "byte " + std::to_string(size - static_cast<size_t>(end - stream.at)) +
                                  ": more words than symbols need");
    for (size_t l = 0; l < lanes; ++l)
      if (stream.state[l] != kRansLow)
        throw FormatError("byte " + std::to_string(size) + ": the state of lane " + std::to_string(l) +
                          " is not 65536 in the end");
  }

 private:
  uint32_t class_of(const Box& box, uint64_t plane) const {
    return m_.classes > 1 ? m_.class_of[(box.first_plane + plane) % info_.channels] : 0;
  }

  template <class U>
  size_t encode_as(const U* symbols, const Box& box, uint8_t* out, Scratch& scratch) const {
    const Stripes s = stripes_of(box);
    const size_t n = box.size(), lanes = static_cast<size_t>(s.lanes);
    const Alphabet& a = m_.alphabet;
    uint8_t* tok = scratch.get_as<uint8_t>(Scratch::kFirst, n);
    uint8_t* tab = scratch.get_as<uint8_t>(Scratch::kFirst + 1, n);
    tokens_of(symbols, n, a, info_.width, tok);
    contexts_of(s, tok, tab);
    for (uint32_t j = 0; j < box.planes; ++j) {
      const uint8_t* index = &index_[class_of(box, j) * kRansContexts];
      uint8_t* t = tab + static_cast<size_t>(j) * s.plane;
      for (size_t i = 0; i < s.plane; ++i) t[i] = index[t[i]];
    }
    uint8_t* const end = out + (bound(box) & ~size_t{1});
    uint8_t* w = end;
    uint32_t state[kRansMaxLanes], length[kRansMaxLanes];
    size_t offset[kRansMaxLanes];
    std::fill(state, state + lanes, kRansLow);
    auto put = [&](uint32_t x) {
      w -= 2;
      w[0] = static_cast<uint8_t>(x);
      w[1] = static_cast<uint8_t>(x >> 8);
    };
    const int prec = m_.prec;
    const bool wide = a.wide, rotate = a.rotate;
    for (uint64_t g = (s.count + lanes - 1) / lanes; g-- > 0;) {
      const size_t here = static_cast<size_t>(std::min<uint64_t>(lanes, s.count - g * lanes));
      uint32_t steps = 0;
      for (size_t l = 0; l < here; ++l) {
        offset[l] = s.offset(g * lanes + l);
        length[l] = s.length(g * lanes + l);
        steps = std::max(steps, length[l]);
      }
      for (uint32_t i = steps; i-- > 0;) {
        if (wide) {
          for (size_t l = here; l-- > 0;) {
            if (i >= length[l]) continue;
            const uint32_t t = tok[offset[l] + i], raw = a.table.raw[t];
            if (raw <= 16) continue;
            const uint32_t v =
                static_cast<uint32_t>(rotate_left(symbols[offset[l] + i], rotate)) - a.table.base[t];
            state[l] = push_raw(state[l], v >> 16, static_cast<int>(raw) - 16, put);
          }
        }
        for (size_t l = here; l-- > 0;) {
          if (i >= length[l]) continue;
          const uint32_t t = tok[offset[l] + i], raw = std::min(a.table.raw[t], 16u);
          const uint32_t v =
              static_cast<uint32_t>(rotate_left(symbols[offset[l] + i], rotate)) - a.table.base[t];
          state[l] = push_raw(state[l], v & ((1u << raw) - 1), static_cast<int>(raw), put);
        }
        for (size_t l = here; l-- > 0;) {
          if (i >= length[l]) continue;
          const EncodeEntry& e = entries_[size_t{tab[offset[l] + i]} * kRansTokens + tok[offset[l] + i]];
          uint32_t x = state[l];
          if (x >> (32 - prec) >= e.frequency) {
            put(x);
            x >>= 16;
          }
          const uint32_t q = divide(x, e);
          state[l] = (q << prec) + (x - q * e.frequency) + e.first;
        }
      }
    }
    for (size_t l = 0; l < lanes; ++l) store_u32(out + 4 * l, state[l]);
    const size_t words = static_cast<size_t>(end - w);
    std::memmove(out + 4 * lanes, w, words);
    return 4 * lanes + words;
  }

  static uint32_t divide(uint32_t x, const EncodeEntry& e) {
#ifdef __SIZEOF_INT128__
    __extension__ using Wide = unsigned __int128;
    return static_cast<uint32_t>(static_cast<Wide>(e.reciprocal) * x >> 44);  // exact: frequency <= 2^12
#else
    return x / e.frequency;
#endif
  }

  template <class Put>
  static uint32_t push_raw(uint32_t x, uint32_t v, int raw, Put& put) {
    if (static_cast<uint64_t>(x) << raw >> 32) {
      put(x);
      x >>= 16;
    }
    return x << raw | v;
  }

  MapInfo info_;
  Model m_;
  std::vector<uint32_t> contexts_, slots_;
  std::vector<uint8_t> index_;
  std::vector<EncodeEntry> entries_;
};

std::unique_ptr<Coder> open(const MapInfo& info, const uint8_t* params, size_t size) {
  return std::make_unique<RansCoder>(info, read_model(info, params, size));
}

}  // namespace

const Codec kRans = {6,
                     "rans",
                     "context model and interleaved rANS: the smallest",
                     kIntegers | kFloats,
                     "classes",
                     {0.08, 0.15, 0.25, 0.5},
                     plan,
                     open};

}  // namespace actzip::codec
