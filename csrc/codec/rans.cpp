// `rans`: the dense codec. Each symbol becomes a token (its magnitude, roughly) and raw bits; the token is
// coded by interleaved range asymmetric numeral systems with a static table that is chosen by the class of
// the channel and by the tokens of the left and the upper neighbour. docs/bitstream.md describes the format.
//
// J. Duda, "Asymmetric numeral systems", arXiv:1311.2540 (rANS: section 3); F. Giesen, "Interleaved entropy
// coders", arXiv:1402.3392 (interleaving and vectors).
//
// rans_tokens: symbols as tokens and stripes; rans_model: the parameters; rans_plan, rans_classes: choosing
// them; here: chunks, encoded and decoded; rans_encode.inl.h, rans_decode.inl.h: the inner loops.
#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>

#include "codec/bytes.h"
#include "codec/codec.h"
#include "codec/rans_lanes.h"
#include "codec/rans_model.h"
#include "codec/rans_plan.h"
#include "common/isa_table.h"

namespace actzip::codec {

ACTZIP_ISA_TABLE(rans_kernels_for, RansKernels, kRansTable)

const RansKernels& rans_kernels() { return rans_kernels_for(active_isa()); }

namespace rans {
namespace {

constexpr std::array<uint64_t, 4097> make_reciprocals() {
  std::array<uint64_t, 4097> r{};
  for (uint64_t f = 1; f < r.size(); ++f) r[f] = ((uint64_t{1} << 44) + f - 1) / f;
  return r;
}
constexpr std::array<uint64_t, 4097> kReciprocals = make_reciprocals();

// Memory for slots that a thread keeps for its next coder: new pages would cost as much as filling them.
class Spare {
 public:
  static std::unique_ptr<uint32_t[]> take(size_t n) {
    Spare& kept = of_thread();
    if (kept.size_ < n) return std::unique_ptr<uint32_t[]>(new uint32_t[n]);
    kept.size_ = 0;
    return std::move(kept.memory_);
  }
  static void give(std::unique_ptr<uint32_t[]> memory, size_t n) {
    Spare& kept = of_thread();
    if (memory == nullptr || n <= kept.size_) return;
    kept.memory_ = std::move(memory);
    kept.size_ = n;
  }

 private:
  static Spare& of_thread() {
    static thread_local Spare spare;
    return spare;
  }
  std::unique_ptr<uint32_t[]> memory_;
  size_t size_ = 0;
};

class RansCoder final : public Coder {
 public:
  RansCoder(const MapInfo& info, Model model) : info_(info), m_(std::move(model)) {}
  ~RansCoder() override { Spare::give(std::move(slots_), m_.tables.size() << m_.prec); }

  size_t bound(const Box& b) const override {
    return b.size() * (m_.alphabet.wide ? 6 : 4) + 4 * kRansMaxLanes + 64;
  }

  size_t encode(const void* symbols, const Box& box, uint8_t* out, Scratch& scratch) const override {
    std::call_once(to_encode_, [this] { fill_entries(); });
    const Stripes s = stripes_of(box);
    const size_t n = box.size(), lanes = static_cast<size_t>(s.lanes);
    uint16_t* const pairs = scratch.get_as<uint16_t>(Scratch::kFirst + 2, n);
    uint16_t* const words =
        scratch.get_as<uint16_t>(Scratch::kFirst + 3, n * (m_.alphabet.wide ? 3 : 2) + 32);
    pairs_of(symbols, box, m_.alphabet, info_.width, scratch, pairs);
    RansEncodeGroup g = encode_group(s, n, symbols, pairs);
    uint16_t* end = words;
    for (uint64_t k = (s.count + lanes - 1) / lanes; k-- > 0;) {
      set_places(&g, s, box, k * lanes);
      end = rans_kernels().encode(&g, end);
    }
    for (size_t l = 0; l < lanes; ++l) store_u32(out + 4 * l, g.state[lanes - 1 - l]);
    out += 4 * lanes;
    const auto count = static_cast<size_t>(end - words);
    for (size_t i = 0; i < count; ++i) {  // decoding reads them the other way round
      const uint16_t w = words[count - 1 - i];
      out[2 * i] = static_cast<uint8_t>(w);
      out[2 * i + 1] = static_cast<uint8_t>(w >> 8);
    }
    return 4 * lanes + 2 * count;
  }

  void decode(const uint8_t* in, size_t size, const Box& box, void* symbols,
              Scratch& scratch) const override {
    std::call_once(to_decode_, [this] { fill_slots(); });
    const Stripes s = stripes_of(box);
    const size_t lanes = static_cast<size_t>(s.lanes);
    RansStream stream = open_stream(in, size, lanes, scratch);
    RansGroup g = group_of(s, scratch);
    const auto run = rans_kernels().decode;
    for (uint64_t first = 0; first < s.count; first += lanes) {
      set_lanes(&g, s, box, first, static_cast<uint8_t*>(symbols));
      if (!run(g, &stream)) throw FormatError("byte " + std::to_string(size) + ": the words end too early");
    }
    check_end(stream, size, lanes);
  }

 private:
  // Calls fn(class, context, table) for every context of every class.
  template <class F>
  void each_context(F&& fn) const {
    size_t table = 0;
    for (size_t k = 0; k < m_.classes; ++k, ++table)
      for (size_t c = 0; c < m_.start[k].size(); ++c) {
        if (c > 0 && m_.start[k][c]) ++table;
        fn(k, c, table);
      }
  }
  // For decoding: the token of every slot of a table, and where the table of every context begins.
  void fill_slots() const {
    const size_t slots = size_t{1} << m_.prec;
    slots_ = Spare::take(m_.tables.size() * slots);
    for (size_t k = 0; k < m_.tables.size(); ++k) {
      uint32_t* to = &slots_[k * slots];
      for (uint32_t t = 0; t < kRansTokens; ++t) {
        const uint32_t f = m_.tables[k][t], entry = t << 25 | f;
        for (uint32_t i = 0; i < f; ++i) to[i] = entry | i << 13;
        to += f;
      }
    }
    contexts_.assign(m_.classes * kRansContexts, 0);
    each_context([&](size_t k, size_t c, size_t table) {
      contexts_[k * kRansContexts + c] = static_cast<uint32_t>(table) << m_.prec;
    });
  }
  // For encoding: the slots and raw bits of every pair.
  void fill_entries() const {
    const auto tokens = static_cast<size_t>(m_.alphabet.count);
    std::vector<uint32_t> rows(m_.tables.size() * tokens);
    for (size_t k = 0; k < m_.tables.size(); ++k) {
      uint32_t first = 0;
      for (size_t t = 0; t < tokens; ++t) {
        const uint32_t f = m_.tables[k][t];
        rows[k * tokens + t] = f ? m_.alphabet.table.raw[t] << 25 | first << 13 | f : 0;
        first += f;
      }
    }
    entries_ = std::unique_ptr<uint32_t[]>(new uint32_t[m_.classes * m_.alphabet.pairs()]);
    each_context([&](size_t k, size_t c, size_t table) {
      std::copy_n(&rows[table * tokens], tokens, &entries_[k * m_.alphabet.pairs() + c * tokens]);
    });
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
    g.slots = slots_.get();
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

  // A group but for its places.
  RansEncodeGroup encode_group(const Stripes& s, size_t n, const void* symbols, const uint16_t* pairs) const {
    RansEncodeGroup g;
    g.lanes = s.lanes;
    g.last = static_cast<uint32_t>(n - 1);
    g.prec = m_.prec;
    g.wide = m_.alphabet.wide;
    g.rotate = m_.alphabet.rotate;
    g.width = info_.width;
    g.entries = entries_.get();
    g.reciprocals = kReciprocals.data();
    g.pairs = pairs;
    g.symbols = symbols;
    std::fill(g.state, g.state + kRansMaxLanes, kRansLow);
    return g;
  }

  // Stripes [first, first + lanes), the last one first.
  void set_places(RansEncodeGroup* group, const Stripes& s, const Box& box, uint64_t first) const {
    RansEncodeGroup& g = *group;
    const auto lanes = static_cast<size_t>(s.lanes);
    g.steps = 0;
    for (size_t l = 0; l < kRansMaxLanes; ++l) {
      const uint64_t k = first + lanes - 1 - l;
      const bool here = l < lanes && k < s.count;
      g.offset[l] = here ? static_cast<uint32_t>(s.offset(k)) : 0;
      g.length[l] = here ? s.length(k) : 0;
      g.row[l] = here ? class_of(box, k / s.per_plane) * static_cast<uint32_t>(m_.alphabet.pairs()) : 0;
      g.steps = std::max(g.steps, g.length[l]);
    }
  }

  MapInfo info_;
  Model m_;
  mutable std::once_flag to_decode_, to_encode_;  // each fills what follows it
  mutable std::vector<uint32_t> contexts_;
  mutable std::unique_ptr<uint32_t[]> slots_, entries_;
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
