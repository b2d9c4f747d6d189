// `seg` and `eg`: sparse-exponential-Golomb and plain exponential-Golomb codes of order k, the order chosen
// per map or per channel to make the map as short as possible. In a chunk the parts of the codes lie in
// separate streams: first all zero flags (seg only), then all prefixes, then all suffixes
// (docs/bitstream.md).
#include <algorithm>
#include <cstring>

#include "codec/bytes.h"
#include "codec/codec.h"

namespace actzip::codec {
namespace {

constexpr uint8_t kPerChannel = 0xff;
constexpr int kOrders = 16;

int bit_length(uint32_t v) {
  int n = 0;
  while (v != 0) ++n, v >>= 1;
  return n;
}

struct BitWriter {
  uint8_t* p;
  uint64_t acc = 0;
  int have = 0;
  void put(uint32_t v, int n) {
    acc |= static_cast<uint64_t>(v) << have;
    have += n;
    while (have >= 8) {
      *p++ = static_cast<uint8_t>(acc);
      acc >>= 8;
      have -= 8;
    }
  }
  uint8_t* flush() {
    if (have > 0) *p++ = static_cast<uint8_t>(acc);
    acc = 0;
    have = 0;
    return p;
  }
};

struct BitReader {
  const uint8_t* p;
  size_t bits, at = 0;
  const char* what;
  bool bit() {
    if (at >= bits)
      throw FormatError(std::string(what) + " ends at bit " + std::to_string(at) + ", more is needed");
    const bool b = (p[at >> 3] >> (at & 7)) & 1;
    ++at;
    return b;
  }
  uint32_t get(int n) {
    uint32_t v = 0;
    for (int i = 0; i < n; ++i) v |= static_cast<uint32_t>(bit()) << i;
    return v;
  }
  void finish() {
    if (bits - at >= 8)
      throw FormatError(std::string(what) + " has bytes left over after bit " + std::to_string(at));
    while (at < bits)
      if (bit()) throw FormatError(std::string(what) + " has padding bits that are not zero");
  }
};

class SegCoder final : public Coder {
 public:
  SegCoder(const MapInfo& m, bool sparse, std::vector<uint8_t> orders)
      : m_(m), sparse_(sparse), orders_(std::move(orders)) {}

  int order(const Box& b, size_t i) const {
    if (orders_.size() == 1) return orders_[0];
    const uint64_t plane = b.first_plane + i / (static_cast<size_t>(b.rows) * b.cols);
    return orders_[plane % orders_.size()];
  }

  // A code has at most 1 + 2 * 16 + 1 + 16 bits.
  size_t bound(const Box& b) const override { return b.size() * 7 + 64; }

  size_t encode(const void* s, const Box& b, uint8_t* out, Scratch& scratch) const override {
    return m_.width == 1 ? encode_as(static_cast<const uint8_t*>(s), b, out, scratch)
                         : encode_as(static_cast<const uint16_t*>(s), b, out, scratch);
  }
  void decode(const uint8_t* in, size_t size, const Box& b, void* s, Scratch&) const override {
    m_.width == 1 ? decode_as(in, size, b, static_cast<uint8_t*>(s))
                  : decode_as(in, size, b, static_cast<uint16_t*>(s));
  }

 private:
  template <class U>
  size_t encode_as(const U* s, const Box& b, uint8_t* out, Scratch& scratch) const {
    const size_t n = b.size();
    uint8_t* const flags = scratch.get_as<uint8_t>(Scratch::kFirst, n / 8 + 8);
    uint8_t* const prefix = scratch.get_as<uint8_t>(Scratch::kFirst + 1, n * 3 + 8);
    uint8_t* const suffix = scratch.get_as<uint8_t>(Scratch::kFirst + 2, n * 3 + 8);
    BitWriter f{flags}, p{prefix}, q{suffix};
    for (size_t i = 0; i < n; ++i) {
      uint32_t x = s[i];
      if (sparse_) {
        f.put(x == 0, 1);
        if (x == 0) continue;
        --x;
      }
      const int k = order(b, i);
      const uint32_t g = x + (1u << k);
      const int len = bit_length(g) - 1;
      p.put(1u << (len - k), len - k + 1);
      q.put(g & ((1u << len) - 1), len);
    }
    const size_t nf = static_cast<size_t>(f.flush() - flags), np = static_cast<size_t>(p.flush() - prefix),
                 nq = static_cast<size_t>(q.flush() - suffix);
    uint8_t* o = out + write_varint(out, np);
    if (sparse_) std::memcpy(o, flags, nf), o += nf;
    std::memcpy(o, prefix, np), o += np;
    std::memcpy(o, suffix, nq), o += nq;
    return static_cast<size_t>(o - out);
  }

  template <class U>
  void decode_as(const uint8_t* in, size_t size, const Box& b, U* s) const {
    const size_t n = b.size();
    Reader r(in, size, "payload");
    const uint64_t np = r.varint("length of the prefixes");
    BitReader f{nullptr, 0, 0, "flags"};
    if (sparse_) f = {r.take((n + 7) / 8, "flags"), (n + 7) / 8 * 8, 0, "flags"};
    if (np > r.left()) r.fail("prefixes", "are longer than the payload");
    BitReader p{r.take(static_cast<size_t>(np), "prefixes"), static_cast<size_t>(np) * 8, 0, "prefixes"};
    BitReader q{r.here(), r.left() * 8, 0, "suffixes"};
    const uint32_t limit = 1u << m_.bits;
    for (size_t i = 0; i < n; ++i) {
      if (sparse_ && f.bit()) {
        s[i] = 0;
        continue;
      }
      const int k = order(b, i);
      int len = k;
      while (!p.bit())
        if (++len > 17) throw FormatError("prefixes: a code is too long, at bit " + std::to_string(p.at));
      const uint32_t x = (1u << len) + q.get(len) - (1u << k) + (sparse_ ? 1 : 0);
      if (x >= limit)
        throw FormatError("symbol " + std::to_string(i) + " is " + std::to_string(x) + ", not below 2^" +
                          std::to_string(m_.bits));
      s[i] = static_cast<U>(x);
    }
    f.finish();
    p.finish();
    q.finish();
  }

  MapInfo m_;
  bool sparse_;
  std::vector<uint8_t> orders_;
};

// Total code length of the chunks' symbols for every order, added to cost[channel * 16 + k].
template <class U>
void add_costs(const U* s, const Box& b, const MapInfo& m, bool sparse, uint64_t* cost) {
  const size_t plane = static_cast<size_t>(b.rows) * b.cols;
  for (uint32_t j = 0; j < b.planes; ++j) {
    uint64_t* c = cost + (b.first_plane + j) % m.channels * kOrders;
    for (size_t i = 0; i < plane; ++i) {
      uint32_t x = s[j * plane + i];
      if (sparse) {
        if (x == 0) continue;
        --x;
      }
      for (int k = 0; k < m.bits; ++k) c[k] += static_cast<uint64_t>(2 * bit_length(x + (1u << k)) - k - 1);
    }
  }
}

std::vector<uint8_t> plan(const MapInfo& m, const Source& src, const Options& o, int threads, bool sparse) {
  const int64_t k = option(o, "k", -1);
  const bool per_channel = option(o, "per_channel", 0) != 0;
  if (k != -1 && (k < 0 || k >= m.bits || per_channel))
    throw ArgumentError("option k must be from 0 to " + std::to_string(m.bits - 1) +
                        " (bits - 1), and not together with per_channel");
  if (k >= 0) return {static_cast<uint8_t>(k)};
  if (src.chunks() == 0) return {0};
  if (m.channels > (uint64_t{1} << 24)) throw ArgumentError("too many channels for per_channel");
  const size_t rows = per_channel ? m.channels : 1;
  MapInfo one = m;
  if (!per_channel) one.channels = 1;
  std::vector<std::vector<uint64_t>> partial(static_cast<size_t>(threads > 0 ? threads : default_threads()));
  for_each_chunk(src, threads, [&](uint64_t, const void* s, const Box& b, int worker) {
    auto& cost = partial[static_cast<size_t>(worker)];
    cost.resize(rows * kOrders);
    one.width == 1 ? add_costs(static_cast<const uint8_t*>(s), b, one, sparse, cost.data())
                   : add_costs(static_cast<const uint16_t*>(s), b, one, sparse, cost.data());
  });
  std::vector<uint8_t> best(rows);
  for (size_t c = 0; c < rows; ++c) {
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < m.bits; ++i) {
      uint64_t total = 0;
      for (const auto& p : partial)
        if (!p.empty()) total += p[c * kOrders + static_cast<size_t>(i)];
      if (total < least) {
        least = total;
        best[c] = static_cast<uint8_t>(i);
      }
    }
  }
  if (!per_channel) return best;
  std::vector<uint8_t> params{kPerChannel};
  for (size_t c = 0; c < rows; c += 2)
    params.push_back(static_cast<uint8_t>(best[c] | (c + 1 < rows ? best[c + 1] << 4 : 0)));
  return params;
}

std::unique_ptr<Coder> open(const MapInfo& m, const uint8_t* p, size_t n, bool sparse) {
  if (n == 0) throw FormatError("no parameters: the order is missing");
  std::vector<uint8_t> orders;
  if (p[0] != kPerChannel) {
    if (n != 1) throw FormatError("1 byte of parameters expected, " + std::to_string(n) + " found");
    orders.push_back(p[0]);
  } else {
    if (n - 1 != m.channels / 2 + m.channels % 2)
      throw FormatError("orders of " + std::to_string(m.channels) + " channels expected, " +
                        std::to_string(n - 1) + " bytes found");
    for (uint64_t c = 0; c < m.channels; ++c) orders.push_back(p[1 + c / 2] >> (c % 2 * 4) & 15);
    if (m.channels % 2 && p[n - 1] >> 4) throw FormatError("padding bits are not zero");
  }
  for (size_t c = 0; c < orders.size(); ++c)
    if (orders[c] >= m.bits)
      throw FormatError("order " + std::to_string(orders[c]) + " of channel " + std::to_string(c) +
                        " is not below " + std::to_string(m.bits));
  if (m.channels > 0 && orders.size() == m.channels &&
      std::equal(orders.begin() + 1, orders.end(), orders.begin()))
    orders.resize(1);
  return std::make_unique<SegCoder>(m, sparse, std::move(orders));
}

}  // namespace

const Codec kSeg = {
    1,
    "seg",
    "sparse exponential-Golomb, best order per map or channel",
    kIntegers,
    "k per_channel",
    {0.8, 1.5, 0.8, 1.5},
    [](const MapInfo& m, const Source& s, const Options& o, int t) { return plan(m, s, o, t, true); },
    [](const MapInfo& m, const uint8_t* p, size_t n) { return open(m, p, n, true); }};

const Codec kEg = {
    2,
    "eg",
    "exponential-Golomb, best order per map or channel",
    kIntegers,
    "k per_channel",
    {0.8, 1.5, 0.8, 1.5},
    [](const MapInfo& m, const Source& s, const Options& o, int t) { return plan(m, s, o, t, false); },
    [](const MapInfo& m, const uint8_t* p, size_t n) { return open(m, p, n, false); }};

}  // namespace actzip::codec
