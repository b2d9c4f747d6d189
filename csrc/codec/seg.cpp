// `seg` and `eg`: sparse-exponential-Golomb and plain exponential-Golomb codes of order k, the order chosen
// per map or per channel to make the map as short as possible. In a chunk the parts of the codes lie in
// separate streams: first all zero flags (seg only), then all prefixes, then all suffixes
// (docs/bitstream.md).
#include <algorithm>
#include <cstring>

#include "codec/bytes.h"
#include "codec/codec.h"
#include "codec/kernels.h"

namespace actzip::codec {
namespace {

constexpr uint8_t kPerChannel = 0xff;
constexpr int kOrders = 16;

enum Slot { kValues = Scratch::kFirst, kPrefixes, kSuffixes, kPositions };

// Overloads over the symbol type.
size_t compress(const uint8_t* s, size_t n, uint8_t flip, uint8_t* mask, uint8_t* v) {
  return kernels().compress8(s, n, flip, mask, v);
}
size_t compress(const uint16_t* s, size_t n, uint8_t flip, uint8_t* mask, uint16_t* v) {
  return kernels().compress16(s, n, flip, mask, v);
}
void expand(const uint8_t* mask, uint8_t flip, const uint8_t* v, size_t n, uint8_t* s) {
  kernels().expand8(mask, flip, v, n, s);
}
void expand(const uint8_t* mask, uint8_t flip, const uint16_t* v, size_t n, uint16_t* s) {
  kernels().expand16(mask, flip, v, n, s);
}
void eg_encode(const uint8_t* v, size_t n, int k, int bias, BitSink* p, BitSink* q) {
  kernels().eg_encode8(v, n, k, bias, p, q);
}
void eg_encode(const uint16_t* v, size_t n, int k, int bias, BitSink* p, BitSink* q) {
  kernels().eg_encode16(v, n, k, bias, p, q);
}
EgStatus eg_decode(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                   uint64_t end, uint64_t* bit, uint8_t* v) {
  return kernels().eg_decode8(at, n, k, bias, most, suffix, end, bit, v);
}
EgStatus eg_decode(const uint8_t* at, size_t n, int k, int bias, uint32_t most, const uint8_t* suffix,
                   uint64_t end, uint64_t* bit, uint16_t* v) {
  return kernels().eg_decode16(at, n, k, bias, most, suffix, end, bit, v);
}
size_t eg_bounds(const uint8_t* s, size_t n, int bias, uint64_t* sum) {
  return kernels().eg_bounds8(s, n, bias, sum);
}
size_t eg_bounds(const uint16_t* s, size_t n, int bias, uint64_t* sum) {
  return kernels().eg_bounds16(s, n, bias, sum);
}
uint64_t eg_zeros(const uint8_t* s, size_t n, int bias, int k) { return kernels().eg_zeros8(s, n, bias, k); }
uint64_t eg_zeros(const uint16_t* s, size_t n, int bias, int k) {
  return kernels().eg_zeros16(s, n, bias, k);
}

// Ones of the bits [from, to) of a mask (64 readable bytes of slack).
size_t ones_between(const uint8_t* mask, size_t from, size_t to) {
  if (from == to) return 0;
  const size_t a = from / 8, b = (to - 1) / 8;
  size_t n = kernels().ones(mask + a, b - a + 1);
  const uint8_t before = static_cast<uint8_t>(mask[a] & ((1u << (from % 8)) - 1));
  const uint8_t after = static_cast<uint8_t>(to % 8 == 0 ? 0 : mask[b] >> (to % 8));
  return n - kernels().ones(&before, 1) - kernels().ones(&after, 1);
}

class SegCoder final : public Coder {
 public:
  // `orders`: one, or one a channel. sparse: seg, else eg.
  SegCoder(const MapInfo& m, bool sparse, std::vector<uint8_t> orders)
      : m_(m), sparse_(sparse), orders_(std::move(orders)) {}

  // With k < bits, a code has at most 17 prefix and 16 suffix bits and a flag; `encode` lets streams of that
  // size grow apart in scratch memory and only then writes them out.
  size_t bound(const Box& b) const override {
    const size_t bits = static_cast<size_t>(m_.bits);
    return b.size() * (2 * bits + 2) / 8 + 64;
  }

  size_t encode(const void* s, const Box& b, uint8_t* out, Scratch& scratch) const override {
    struct Here final : Place {
      uint8_t* out;
      uint8_t* at(size_t) override { return out; }
    } here;
    here.out = out;
    return encode_to(s, b, here, scratch);
  }
  size_t encode_to(const void* s, const Box& b, Place& place, Scratch& scratch) const override {
    return m_.width == 1 ? encode_as(static_cast<const uint8_t*>(s), b, place, scratch)
                         : encode_as(static_cast<const uint16_t*>(s), b, place, scratch);
  }
  void decode(const uint8_t* in, size_t size, const Box& b, void* s, Scratch& scratch) const override {
    m_.width == 1 ? decode_as(in, size, b, static_cast<uint8_t*>(s), scratch)
                  : decode_as(in, size, b, static_cast<uint16_t*>(s), scratch);
  }

 private:
  // Calls fn(number of coded symbols, k) for each run of one order; `mask` has a one for each that is not
  // coded.
  template <class F>
  void runs(const Box& b, const uint8_t* mask, size_t coded, F&& fn) const {
    if (orders_.size() == 1) {
      fn(coded, orders_[0]);
      return;
    }
    const size_t plane = static_cast<size_t>(b.rows) * b.cols;
    size_t pending = 0;
    for (uint32_t j = 0; j < b.planes; ++j) {
      pending += plane - (mask ? ones_between(mask, j * plane, (j + 1) * plane) : 0);
      const int k = orders_[(b.first_plane + j) % orders_.size()];
      const int next = j + 1 < b.planes ? orders_[(b.first_plane + j + 1) % orders_.size()] : -1;
      if (k == next) continue;
      fn(pending, k);
      pending = 0;
    }
  }

  template <class U>
  size_t encode_as(const U* s, const Box& b, Place& place, Scratch& scratch) const {
    const size_t n = b.size(), nf = sparse_ ? (n + 7) / 8 : 0;
    // The prefixes' length comes first and is not known yet: flags go to scratch as well.
    const size_t bits = static_cast<size_t>(m_.bits);
    uint8_t* const prefixes = scratch.get_as<uint8_t>(kPrefixes, n * (bits + 1) / 8 + nf + 64);
    uint8_t* const suffixes = scratch.get_as<uint8_t>(kSuffixes, n * bits / 8 + 64);
    uint8_t* const flags = prefixes;
    const U* v = s;
    size_t coded = n;
    if (sparse_) {
      U* const values = scratch.get_as<U>(kValues, n + 64);
      coded = compress(s, n, 0xff, flags, values);
      v = values;
    }
    BitSink p{prefixes + nf}, q{suffixes};
    runs(b, sparse_ ? flags : nullptr, coded, [&](size_t count, int k) {
      eg_encode(v, count, k, sparse_, &p, &q);
      v += count;
    });
    const size_t np = static_cast<size_t>(p.finish() - prefixes) - nf;
    const size_t nq = static_cast<size_t>(q.finish() - suffixes);
    uint8_t length[16];
    const size_t nl = static_cast<size_t>(write_varint(length, np));
    const size_t size = nl + nf + np + nq;
    if (uint8_t* const out = place.at(size)) {
      std::memcpy(out, length, nl);
      std::memcpy(out + nl, prefixes, nf + np);
      std::memcpy(out + nl + nf + np, suffixes, nq);
    }
    return size;
  }

  template <class U>
  void decode_as(const uint8_t* in, size_t size, const Box& b, U* s, Scratch& scratch) const {
    const size_t n = b.size(), nf = sparse_ ? (n + 7) / 8 : 0;
    Reader r(in, size, "payload");
    const uint64_t np = r.varint("length of the prefixes");
    const uint8_t* flags = r.take(nf, "zero flags");
    if (np > r.left()) r.fail("prefixes", "are longer than what is left of the payload");
    const uint8_t* prefixes = r.take(static_cast<size_t>(np), "prefixes");
    const uint8_t* suffixes = r.here();
    const uint64_t end = static_cast<uint64_t>(r.left()) * 8;

    if (sparse_ && n % 8 != 0 && flags[nf - 1] >> (n % 8) != 0)
      throw FormatError("padding bits of the zero flags are not zero");
    const size_t coded = sparse_ ? n - kernels().ones(flags, nf) : n;
    const size_t have = kernels().ones(prefixes, static_cast<size_t>(np));
    if (have != coded)
      throw FormatError(std::to_string(have) + " prefixes found, " + std::to_string(coded) +
                        " were expected");
    if (np > 0 && prefixes[np - 1] == 0) throw FormatError("bytes are left over after the prefixes");
    // One place before the first position stands for the one that closed an imaginary prefix before.
    uint8_t* const at = scratch.get_as<uint8_t>(kPositions, coded + 192) + 64;
    at[-1] = 0xff;
    if (!kernels().positions(prefixes, static_cast<size_t>(np), at))
      throw FormatError("a prefix is too long");

    U* const values = scratch.get_as<U>(kValues, coded + 128);
    uint64_t bit = 0;
    size_t done = 0;
    const uint32_t most = (1u << m_.bits) - 1;
    runs(b, sparse_ ? flags : nullptr, coded, [&](size_t count, int k) {
      const EgStatus st = eg_decode(at + done, count, k, sparse_, most, suffixes, end, &bit, values + done);
      if (st != EgStatus::ok)
        throw FormatError(std::string(st == EgStatus::too_long    ? "a prefix is too long"
                                      : st == EgStatus::exhausted ? "the suffixes end too early"
                                                                  : "a symbol is too large") +
                          ", among coded symbols " + std::to_string(done) + " to " +
                          std::to_string(done + count));
      done += count;
    });
    if (end - bit >= 8) throw FormatError("bytes are left over after suffix bit " + std::to_string(bit));
    if (bit % 8 != 0 && suffixes[bit / 8] >> (bit % 8) != 0)
      throw FormatError("padding bits of the suffixes are not zero");
    if (sparse_)
      expand(flags, 0xff, values, n, s);
    else
      std::memcpy(s, values, n * sizeof(U));
  }

  MapInfo m_;
  bool sparse_;
  std::vector<uint8_t> orders_;
};

// Calls fn(row, symbols, count) for the planes of a chunk, or for the whole of it where there is one row.
template <class U, class F>
void for_each_row(const U* s, const Box& b, size_t rows, F&& fn) {
  if (rows == 1) {
    fn(size_t{0}, s, b.size());
    return;
  }
  const size_t plane = static_cast<size_t>(b.rows) * b.cols;
  for (uint32_t j = 0; j < b.planes; ++j) fn((b.first_plane + j) % rows, s + j * plane, plane);
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
  const int bias = sparse ? 1 : 0;
  const size_t workers = static_cast<size_t>(threads > 0 ? threads : default_threads());

  // A code of order k has k + 1 bits, twice as many more as its prefix has zeros, and the flag. With b the
  // bit length of what is coded, the prefix has between max(b - k, 0) - (b > k + 1) and max(b - k, 0) zeros:
  // one look at the map leaves few orders for an exact count.
  struct Row {
    uint64_t sum[kOrders + 2] = {};  // of max(b - k, 0)
    uint64_t zeros[kOrders] = {};    // exact
    uint64_t coded = 0;
    uint32_t candidates = 0;
    uint64_t most(int i) const { return sum[i]; }
    uint64_t fewest(int i) const { return sum[i] - sum[i + 1] + sum[i + 2]; }
  };
  std::vector<std::vector<Row>> partial(workers);
  auto each = [&](auto&& fn) {
    for_each_chunk(src, threads, [&](uint64_t, const void* s, const Box& b, int worker) {
      auto& mine = partial[static_cast<size_t>(worker)];
      mine.resize(rows);
      auto visit = [&](size_t row, auto* p, size_t n) { fn(row, mine[row], p, n); };
      m.width == 1 ? for_each_row(static_cast<const uint8_t*>(s), b, rows, visit)
                   : for_each_row(static_cast<const uint16_t*>(s), b, rows, visit);
    });
  };
  each([&](size_t, Row& r, auto* s, size_t n) { r.coded += eg_bounds(s, n, bias, r.sum); });
  std::vector<Row> total(rows);
  std::vector<uint8_t> best(rows);
  std::vector<uint64_t> cost(rows);
  for (size_t c = 0; c < rows; ++c) {
    Row& t = total[c];
    for (const auto& p : partial) {
      if (p.empty()) continue;
      t.coded += p[c].coded;
      for (int i = 0; i < kOrders; ++i) t.sum[i] += p[c].sum[i];
    }
    // The guess to begin with: the least middle of the bounds.
    uint64_t least = UINT64_MAX;
    for (int i = 0; i < m.bits; ++i) {
      const uint64_t both = 2 * t.coded * static_cast<uint64_t>(i) + 2 * (t.most(i) + t.fewest(i));
      if (both < least) least = both, best[c] = static_cast<uint8_t>(i);
    }
    t.candidates = 1u << best[c];
  }
  // Counts exactly what the candidates cost, all rows in one look, and keeps the best, of equals the lowest.
  auto settle = [&] {
    each([&](size_t row, Row& r, auto* s, size_t n) {
      for (int i = 0; i < m.bits; ++i)
        if (total[row].candidates >> i & 1) r.zeros[i] += eg_zeros(s, n, bias, i);
    });
    for (size_t c = 0; c < rows; ++c)
      for (int i = 0; i < m.bits; ++i) {
        if ((total[c].candidates >> i & 1) == 0) continue;
        uint64_t exact = total[c].coded * static_cast<uint64_t>(i);
        for (const auto& p : partial)
          if (!p.empty()) exact += 2 * p[c].zeros[i];
        if (cost[c] == 0 || exact < cost[c] - 1 || (exact == cost[c] - 1 && i < best[c])) {
          cost[c] = exact + 1;  // 0: none yet
          best[c] = static_cast<uint8_t>(i);
        }
      }
  };
  settle();
  bool more = false;
  for (size_t c = 0; c < rows; ++c) {
    Row& t = total[c];
    const uint32_t seen = t.candidates;
    t.candidates = 0;
    for (int i = 0; i < m.bits; ++i)
      if ((seen >> i & 1) == 0 && t.coded * static_cast<uint64_t>(i) + 2 * t.fewest(i) <= cost[c] - 1)
        t.candidates |= 1u << i;
    more |= t.candidates != 0;
  }
  if (more) settle();
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
    {0.8, 0.6, 0.8, 1.5},
    [](const MapInfo& m, const Source& s, const Options& o, int t) { return plan(m, s, o, t, false); },
    [](const MapInfo& m, const uint8_t* p, size_t n) { return open(m, p, n, false); }};

}  // namespace actzip::codec
