// `huffman`: canonical Huffman code of at most 12 bits, one table a map, made by package-merge. Symbols of
// more than 8 bits are coded as a magnitude class and raw low bits.
#include <algorithm>
#include <cstring>

#include "codec/bytes.h"
#include "codec/codec.h"
#include "codec/kernels.h"

namespace actzip::codec {
namespace {

constexpr int kMaxLength = 12;
constexpr int kStreams = 4;
enum Slot { kScratch = Scratch::kFirst };

int bit_length(uint32_t v) {
  int n = 0;
  while (v != 0) ++n, v >>= 1;
  return n;
}

// Symbols of `bits` bits as classes: themselves up to 8 bits; else themselves below 16, then 8 classes for
// each bit length (by the 3 bits after the leading one), the bits after those kept raw.
struct Classes {
  int bits;
  explicit Classes(int b) : bits(b) {}
  int count() const { return bits <= 8 ? 1 << bits : 16 + 8 * (bits - 4); }
  int of(uint32_t x) const {
    if (bits <= 8 || x < 16) return static_cast<int>(x);
    const int n = bit_length(x);
    return 16 + 8 * (n - 5) + static_cast<int>(x >> (n - 4) & 7);
  }
  int raw_bits(int c) const { return bits <= 8 || c < 16 ? 0 : (c - 16) / 8 + 1; }
  uint32_t base(int c) const {
    return bits <= 8 || c < 16 ? static_cast<uint32_t>(c)
                               : (8u + static_cast<uint32_t>((c - 16) % 8)) << raw_bits(c);
  }
};

// Lengths (0: not used) of an optimal prefix code of at most kMaxLength bits: package-merge. Ties are broken
// by class, so that the result is one and the same everywhere.
std::vector<uint8_t> code_lengths(const std::vector<uint64_t>& counts) {
  std::vector<int> used;
  for (size_t c = 0; c < counts.size(); ++c)
    if (counts[c] > 0) used.push_back(static_cast<int>(c));
  std::vector<uint8_t> lengths(counts.size(), 0);
  if (used.empty()) return lengths;
  if (used.size() == 1) {
    lengths[static_cast<size_t>(used[0])] = 1;
    return lengths;
  }
  std::stable_sort(used.begin(), used.end(), [&](int a, int b) {
    return counts[static_cast<size_t>(a)] < counts[static_cast<size_t>(b)];
  });
  struct Item {
    uint64_t weight;
    std::vector<int> members;  // indices into `used`, with repetition
  };
  std::vector<Item> leaves;
  for (size_t i = 0; i < used.size(); ++i)
    leaves.push_back({counts[static_cast<size_t>(used[i])], {static_cast<int>(i)}});
  std::vector<Item> row = leaves;
  for (int level = 1; level < kMaxLength; ++level) {
    std::vector<Item> pairs;
    for (size_t i = 0; i + 1 < row.size(); i += 2) {
      Item p{row[i].weight + row[i + 1].weight, row[i].members};
      p.members.insert(p.members.end(), row[i + 1].members.begin(), row[i + 1].members.end());
      pairs.push_back(std::move(p));
    }
    std::vector<Item> next;  // merged, leaves first among equals
    size_t a = 0, b = 0;
    while (a < leaves.size() || b < pairs.size()) {
      if (b == pairs.size() || (a < leaves.size() && leaves[a].weight <= pairs[b].weight))
        next.push_back(leaves[a++]);
      else
        next.push_back(std::move(pairs[b++]));
    }
    row = std::move(next);
  }
  for (size_t i = 0; i < 2 * used.size() - 2; ++i)
    for (int m : row[i].members) ++lengths[static_cast<size_t>(used[static_cast<size_t>(m)])];
  return lengths;
}

// A class's code, its first bit lowest; or, by the next 12 bits of the stream, which class comes.
struct Code {
  uint16_t bits = 0;
  uint8_t length = 0;
};
struct Entry {
  uint16_t cls = 0;
  uint8_t length = 0;  // of the code
  uint8_t raw = 0;     // bits after it
};

class HuffmanCoder final : public Coder {
 public:
  HuffmanCoder(const MapInfo& m, const std::vector<uint8_t>& lengths) : width_(m.width), classes_(m.bits) {
    // Canonical: codes of a length are consecutive numbers, in order of class.
    uint32_t next = 0;
    lone_ = static_cast<size_t>(std::count(lengths.begin(), lengths.end(), 0)) + 1 == lengths.size();
    codes_.resize(lengths.size());
    table_.resize(size_t{1} << kMaxLength);
    for (int len = 1; len <= kMaxLength; ++len, next <<= 1)
      for (size_t c = 0; c < lengths.size(); ++c) {
        if (lengths[c] != len) continue;
        uint32_t reversed = 0;
        for (int i = 0; i < len; ++i) reversed |= (next >> i & 1u) << (len - 1 - i);
        codes_[c] = {static_cast<uint16_t>(reversed), static_cast<uint8_t>(len)};
        const Entry e{static_cast<uint16_t>(c), static_cast<uint8_t>(len),
                      static_cast<uint8_t>(classes_.raw_bits(static_cast<int>(c)))};
        for (uint32_t w = reversed; w < table_.size(); w += lone_ ? 1u : 1u << len) table_[w] = e;
        ++next;
      }
    for (int c = 0; c < classes_.count(); ++c) bases_.push_back(static_cast<uint16_t>(classes_.base(c)));
  }

  size_t bound(const Box& b) const override { return b.size() * (kMaxLength + 12) / 8 + 128; }

  size_t encode(const void* s, const Box& b, uint8_t* out, Scratch& scratch) const override {
    return width_ == 1 ? encode_as(static_cast<const uint8_t*>(s), b.size(), out, scratch)
                       : encode_as(static_cast<const uint16_t*>(s), b.size(), out, scratch);
  }
  void decode(const uint8_t* in, size_t size, const Box& b, void* s, Scratch&) const override {
    width_ == 1 ? decode_as(in, size, b.size(), static_cast<uint8_t*>(s))
                : decode_as(in, size, b.size(), static_cast<uint16_t*>(s));
  }

 private:
  template <class U>
  size_t encode_as(const U* s, size_t n, uint8_t* out, Scratch& scratch) const {
    const size_t quarter = (n + kStreams - 1) / kStreams;
    uint8_t* const work = scratch.get_as<uint8_t>(kScratch, n * (kMaxLength + 12) / 8 + 64);
    uint8_t* p = work;
    size_t sizes[kStreams];
    for (size_t j = 0; j < kStreams; ++j) {
      const size_t begin = std::min(n, j * quarter), end = std::min(n, begin + quarter);
      uint8_t* const start = p;
      uint64_t acc = 0;
      int have = 0;
      for (size_t i = begin; i < end; ++i) {
        const int c = classes_.of(s[i]);
        const Code code = codes_[static_cast<size_t>(c)];
        acc |= static_cast<uint64_t>(code.bits) << have;
        have += code.length;
        const int raw = classes_.raw_bits(c);
        acc |= static_cast<uint64_t>(s[i] & ((1u << raw) - 1)) << have;
        have += raw;
        for (; have >= 8; have -= 8, acc >>= 8) *p++ = static_cast<uint8_t>(acc);
      }
      if (have > 0) *p++ = static_cast<uint8_t>(acc);
      sizes[j] = static_cast<size_t>(p - start);
    }
    uint8_t* o = out;
    for (size_t j = 0; j + 1 < kStreams; ++j) o += write_varint(o, sizes[j]);
    std::memcpy(o, work, static_cast<size_t>(p - work));
    return static_cast<size_t>(o - out) + static_cast<size_t>(p - work);
  }

  // With a lone class: whether one of its codes, at every 1 + raw bits, is a one.
  bool ones(const uint8_t* data, uint64_t end, size_t count) const {
    const uint64_t step = 1u + table_[0].raw;
    for (size_t i = 0; i < count && i * step < end; ++i)
      if (data[i * step / 8] >> (i * step % 8) & 1) return true;
    return false;
  }

  struct Stream {
    const uint8_t* data;
    uint64_t bit = 0, end;  // bits
  };

  // The symbol at st.bit; at most 24 bits are used, from at most 4 bytes, which may lie in the slack.
  template <class U>
  U next(Stream& st) const {
    const uint32_t window = load_u32(st.data + (st.bit >> 3)) >> (st.bit & 7);
    const Entry e = table_[window & ((1u << kMaxLength) - 1)];
    const uint32_t raw = window >> e.length & ((1u << e.raw) - 1);
    st.bit += static_cast<uint64_t>(e.length) + e.raw;
    return static_cast<U>(bases_[e.cls] + raw);
  }

  template <class U>
  void decode_as(const uint8_t* in, size_t size, size_t n, U* s) const {
    Reader r(in, size, "payload");
    uint64_t sizes[kStreams];
    for (size_t j = 0; j + 1 < kStreams; ++j) sizes[j] = r.varint("length of a stream");
    const size_t quarter = (n + kStreams - 1) / kStreams;
    Stream st[kStreams];
    size_t begin[kStreams], count[kStreams];
    for (size_t j = 0; j < kStreams; ++j) {
      if (j + 1 == kStreams) sizes[j] = r.left();
      if (sizes[j] > r.left()) r.fail("a stream", "is longer than what is left of the payload");
      st[j] = {r.take(static_cast<size_t>(sizes[j]), "a stream"), 0, sizes[j] * 8};
      begin[j] = std::min(n, j * quarter);
      count[j] = std::min(n, begin[j] + quarter) - begin[j];
    }
    // All four at once while none can run out: a symbol takes at most 24 bits. A stream that is at its end
    // may read into the next one or the slack, but never further.
    size_t i = 0;
    for (;;) {
      uint64_t safe = count[kStreams - 1] - i;
      for (const Stream& x : st) safe = std::min<uint64_t>(safe, (x.end - x.bit) / 24);
      if (safe == 0) break;
      for (const size_t stop = i + static_cast<size_t>(safe); i < stop; ++i)
        for (size_t j = 0; j < kStreams; ++j) s[begin[j] + i] = next<U>(st[j]);
    }
    for (size_t j = 0; j < kStreams; ++j) {
      Stream& x = st[j];
      for (size_t k = i; k < count[j]; ++k) {
        if (x.bit >= x.end)
          throw FormatError("stream " + std::to_string(j) + " ends before symbol " + std::to_string(k));
        s[begin[j] + k] = next<U>(x);
      }
      if (count[j] > 0 && lone_ && ones(x.data, x.end, count[j]))
        throw FormatError("stream " + std::to_string(j) + " has a bit that begins no code");
      if (x.bit > x.end) throw FormatError("stream " + std::to_string(j) + " ends within its last symbol");
      if (x.end - x.bit >= 8)
        throw FormatError("stream " + std::to_string(j) + " has bytes left over after bit " +
                          std::to_string(x.bit));
      if (x.bit % 8 != 0 && x.data[x.bit / 8] >> (x.bit % 8) != 0)
        throw FormatError("padding bits of stream " + std::to_string(j) + " are not zero");
    }
  }

  int width_;
  Classes classes_;
  std::vector<Code> codes_;
  std::vector<Entry> table_;
  std::vector<uint16_t> bases_;
  bool lone_ = false;
};

template <class U>
void count_symbols(const U* s, size_t n, const Classes& classes, uint64_t* counts) {
  std::vector<uint32_t> part(4 * static_cast<size_t>(classes.count()));
  const size_t stride = static_cast<size_t>(classes.count());
  for (size_t i = 0; i < n; ++i) ++part[(i & 3) * stride + static_cast<size_t>(classes.of(s[i]))];
  for (size_t c = 0; c < part.size(); ++c) counts[c % stride] += part[c];
}

std::vector<uint8_t> plan(const MapInfo& m, const Source& src, const Options&, int threads) {
  const Classes classes(m.bits);
  std::vector<std::vector<uint64_t>> partial(static_cast<size_t>(threads > 0 ? threads : default_threads()));
  for_each_chunk(src, threads, [&](uint64_t, const void* s, const Box& b, int worker) {
    auto& counts = partial[static_cast<size_t>(worker)];
    counts.resize(static_cast<size_t>(classes.count()));
    m.width == 1 ? count_symbols(static_cast<const uint8_t*>(s), b.size(), classes, counts.data())
                 : count_symbols(static_cast<const uint16_t*>(s), b.size(), classes, counts.data());
  });
  std::vector<uint64_t> counts(static_cast<size_t>(classes.count()));
  for (const auto& p : partial)
    for (size_t c = 0; c < p.size(); ++c) counts[c] += p[c];
  std::vector<uint8_t> lengths = code_lengths(counts);
  while (!lengths.empty() && lengths.back() == 0) lengths.pop_back();
  std::vector<uint8_t> params;
  append_varint(&params, lengths.size());
  for (size_t c = 0; c < lengths.size(); c += 2)
    params.push_back(static_cast<uint8_t>(lengths[c] | (c + 1 < lengths.size() ? lengths[c + 1] << 4 : 0)));
  return params;
}

std::unique_ptr<Coder> open(const MapInfo& m, const uint8_t* p, size_t n) {
  const Classes classes(m.bits);
  Reader r(p, n, "code lengths");
  const uint64_t count = r.varint("number of classes");
  if (count > static_cast<uint64_t>(classes.count()))
    r.fail("number of classes",
           "is " + std::to_string(count) + ", there are " + std::to_string(classes.count()));
  const uint8_t* nibbles = r.take(static_cast<size_t>(count + 1) / 2, "lengths");
  if (r.left() != 0) r.fail("lengths", "are followed by something");
  std::vector<uint8_t> lengths(static_cast<size_t>(classes.count()), 0);
  uint32_t kraft = 0, used = 0;
  for (size_t c = 0; c < count; ++c) {
    lengths[c] = nibbles[c / 2] >> (c % 2 * 4) & 15;
    if (lengths[c] > kMaxLength)
      throw FormatError("a code of " + std::to_string(lengths[c]) + " bits: at most 12 are allowed");
    if (lengths[c] > 0) ++used, kraft += 1u << (kMaxLength - lengths[c]);
  }
  if (count > 0 && lengths[count - 1] == 0) throw FormatError("the last class has no code");
  if (count % 2 == 1 && nibbles[count / 2] >> 4 != 0)
    throw FormatError("padding bits of the code lengths are not zero");
  // A lone class has the code `0`; a one is no code then, and the decoder refuses it.
  const bool lone = used == 1 && kraft == 1u << (kMaxLength - 1);
  if (!lone && kraft != 1u << kMaxLength && !(used == 0 && m.planes == 0))
    throw FormatError("the code lengths do not make a complete prefix code");
  return std::make_unique<HuffmanCoder>(m, lengths);
}

}  // namespace

const Codec kHuffman = {3,         "huffman", "canonical Huffman code of at most 12 bits, one table a map",
                        kIntegers, "",        {0.13, 0.13, 0.5, 1.0},
                        plan,      open};

}  // namespace actzip::codec
