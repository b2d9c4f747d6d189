// `rans`: the dense codec. Each symbol becomes a token (its magnitude, roughly) and raw bits; the token is
// coded by interleaved range asymmetric numeral systems with a static table that is chosen by the class of
// the channel and by the tokens of the left and the upper neighbour. docs/bitstream.md describes the format.
//
// J. Duda, "Asymmetric numeral systems", arXiv:1311.2540 (rANS: section 3); F. Giesen, "Interleaved entropy
// coders", arXiv:1402.3392 (interleaving and vectors).
//
// rans_tokens: symbols as tokens and stripes; rans_model: the parameters; rans_plan, rans_classes: choosing
// them; here: chunks, encoded and decoded; rans.inl.h: the decoder's inner loop.
#include <algorithm>
#include <cstring>

#include "codec/bytes.h"
#include "codec/codec.h"
#include "codec/rans_lanes.h"
#include "codec/rans_model.h"
#include "codec/rans_plan.h"
#include "common/isa_table.h"

namespace actzip::codec {

ACTZIP_ISA_TABLE(rans_decoder, RansDecodeGroup, kRansDecodeGroup)

namespace rans {
namespace {

struct EncodeEntry {
  uint64_t reciprocal;  // ceil(2^44 / frequency)
  uint16_t frequency, first;
};

class RansCoder final : public Coder {
 public:
  RansCoder(const MapInfo& info, Model model) : info_(info), m_(std::move(model)) {
    place_tables();
    fill_slots();
    fill_entries();
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
    const size_t lanes = static_cast<size_t>(s.lanes);
    RansStream stream = open_stream(in, size, lanes, scratch);
    RansGroup g = group_of(s, scratch);
    const RansDecodeGroup run = rans_decoder(active_isa());
    for (uint64_t first = 0; first < s.count; first += lanes) {
      set_lanes(&g, s, box, first, static_cast<uint8_t*>(symbols));
      if (!run(g, &stream)) throw FormatError("byte " + std::to_string(size) + ": the words end too early");
    }
    check_end(stream, size, lanes);
  }

 private:
  // Which table each class's contexts have.
  void place_tables() {
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
  }
  // For decoding: the token of every slot of a table.
  void fill_slots() {
    const size_t slots = size_t{1} << m_.prec;
    slots_.resize(m_.tables.size() * slots);
    for (size_t k = 0; k < m_.tables.size(); ++k) {
      uint32_t* to = &slots_[k * slots];
      for (uint32_t t = 0; t < kRansTokens; ++t) {
        const uint32_t f = m_.tables[k][t];
        for (uint32_t i = 0; i < f; ++i) *to++ = t << 25 | i << 13 | f;
      }
    }
  }
  // For encoding: the slots of every token.
  void fill_entries() {
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

  static RansStream open_stream(const uint8_t* in, size_t size, size_t lanes, Scratch& scratch) {
    const size_t head = 4 * lanes;
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
    return stream;
  }

  // A group but for its lanes.
  RansGroup group_of(const Stripes& s, Scratch& scratch) const {
    const size_t lanes = static_cast<size_t>(s.lanes);
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
    return g;
  }

  // Stripes [first, first + lanes).
  void set_lanes(RansGroup* group, const Stripes& s, const Box& box, uint64_t first, uint8_t* symbols) const {
    RansGroup& g = *group;
    g.steps = 0;
    for (size_t l = 0; l < kRansMaxLanes; ++l) {
      const uint64_t k = first + l;
      const bool here = l < static_cast<size_t>(s.lanes) && k < s.count;
      g.length[l] = here ? s.length(k) : 0;
      g.row[l] = here ? class_of(box, k / s.per_plane) * kRansContexts : 0;
      g.out[l] = here ? symbols + s.offset(k) * static_cast<size_t>(info_.width) : nullptr;
      g.steps = std::max(g.steps, g.length[l]);
    }
  }

  // All words read and every state where encoding began.
  static void check_end(const RansStream& stream, size_t size, size_t lanes) {
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

  uint32_t class_of(const Box& box, uint64_t plane) const {
    return m_.classes > 1 ? m_.class_of[(box.first_plane + plane) % info_.channels] : 0;
  }

  // Words are written from the end towards the front, as decoding reads them.
  struct Words {
    uint8_t* at;
    void put(uint32_t x) {
      at -= 2;
      at[0] = static_cast<uint8_t>(x);
      at[1] = static_cast<uint8_t>(x >> 8);
    }
  };
  // The stripes that are encoded side by side.
  template <class U>
  struct Lanes {
    size_t here;
    uint32_t steps;
    uint32_t state[kRansMaxLanes], length[kRansMaxLanes];
    size_t offset[kRansMaxLanes];
    const U* symbols;
    const uint8_t *tok, *tab;  // tokens, and which table codes each
  };

  template <class U>
  size_t encode_as(const U* symbols, const Box& box, uint8_t* out, Scratch& scratch) const {
    const Stripes s = stripes_of(box);
    const size_t n = box.size(), lanes = static_cast<size_t>(s.lanes);
    uint8_t* tok = scratch.get_as<uint8_t>(Scratch::kFirst, n);
    uint8_t* tab = scratch.get_as<uint8_t>(Scratch::kFirst + 1, n);
    tokens_of(symbols, n, m_.alphabet, info_.width, tok);
    contexts_of(s, tok, tab);
    for (uint32_t j = 0; j < box.planes; ++j) {
      const uint8_t* index = &index_[class_of(box, j) * kRansContexts];
      uint8_t* t = tab + static_cast<size_t>(j) * s.plane;
      for (size_t i = 0; i < s.plane; ++i) t[i] = index[t[i]];
    }
    uint8_t* const end = out + (bound(box) & ~size_t{1});
    Words words{end};
    Lanes<U> v;
    v.symbols = symbols;
    v.tok = tok;
    v.tab = tab;
    std::fill(v.state, v.state + lanes, kRansLow);
    for (uint64_t g = (s.count + lanes - 1) / lanes; g-- > 0;) {
      v.here = static_cast<size_t>(std::min<uint64_t>(lanes, s.count - g * lanes));
      v.steps = 0;
      for (size_t l = 0; l < v.here; ++l) {
        v.offset[l] = s.offset(g * lanes + l);
        v.length[l] = s.length(g * lanes + l);
        v.steps = std::max(v.steps, v.length[l]);
      }
      encode_lanes(v, words);
    }
    for (size_t l = 0; l < lanes; ++l) store_u32(out + 4 * l, v.state[l]);
    const auto bytes = static_cast<size_t>(end - words.at);
    std::memmove(out + 4 * lanes, words.at, bytes);
    return 4 * lanes + bytes;
  }

  // The phases of a step in reverse: raw bits above 16, those below, the token.
  template <class U>
  void encode_lanes(Lanes<U>& group, Words& out) const {
    Lanes<U> v = group;  // copies that stay in registers
    Words words = out;
    const Alphabet& a = m_.alphabet;
    const int prec = m_.prec;
    const bool wide = a.wide, rotate = a.rotate;
    for (uint32_t i = v.steps; i-- > 0;) {
      if (wide) {
        for (size_t l = v.here; l-- > 0;) {
          if (i >= v.length[l]) continue;
          const uint32_t t = v.tok[v.offset[l] + i], raw = a.table.raw[t];
          if (raw <= 16) continue;
          const uint32_t bits =
              static_cast<uint32_t>(rotate_left(v.symbols[v.offset[l] + i], rotate)) - a.table.base[t];
          v.state[l] = push_raw(v.state[l], bits >> 16, static_cast<int>(raw) - 16, words);
        }
      }
      for (size_t l = v.here; l-- > 0;) {
        if (i >= v.length[l]) continue;
        const uint32_t t = v.tok[v.offset[l] + i], raw = std::min(a.table.raw[t], 16u);
        const uint32_t bits =
            static_cast<uint32_t>(rotate_left(v.symbols[v.offset[l] + i], rotate)) - a.table.base[t];
        v.state[l] = push_raw(v.state[l], bits & ((1u << raw) - 1), static_cast<int>(raw), words);
      }
      for (size_t l = v.here; l-- > 0;) {
        if (i >= v.length[l]) continue;
        const size_t at = v.offset[l] + i;
        const EncodeEntry& e = entries_[size_t{v.tab[at]} * kRansTokens + v.tok[at]];
        uint32_t x = v.state[l];
        if (x >> (32 - prec) >= e.frequency) {
          words.put(x);
          x >>= 16;
        }
        const uint32_t q = divide(x, e);
        v.state[l] = (q << prec) + (x - q * e.frequency) + e.first;
      }
    }
    group = v;
    out = words;
  }

  static uint32_t divide(uint32_t x, const EncodeEntry& e) {
#ifdef __SIZEOF_INT128__
    __extension__ using Wide = unsigned __int128;
    return static_cast<uint32_t>(static_cast<Wide>(e.reciprocal) * x >> 44);  // exact: frequency <= 2^12
#else
    return x / e.frequency;
#endif
  }

  static uint32_t push_raw(uint32_t x, uint32_t v, int raw, Words& words) {
    if (static_cast<uint64_t>(x) << raw >> 32) {
      words.put(x);
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
}  // namespace rans

const Codec kRans = {6,
                     "rans",
                     "context model and interleaved rANS: the smallest",
                     kIntegers | kFloats,
                     "classes",
                     {0.08, 0.15, 0.25, 0.5},
                     rans::plan,
                     rans::open};

}  // namespace actzip::codec
