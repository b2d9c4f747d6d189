// The memory of a plan: where its values lie in the arena of a context.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <new>
#include <utility>

#include "common/thread_pool.h"
#include "engine/node.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace actzip::engine {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;
// Room above the calibrated density of a packed map, as a factor and as a share of the elements.
constexpr double kRoomFactor = 1.1, kRoomShare = 0.02;
// Scratch is cut where the arena is this much smaller then.
constexpr double kWorth = 0.9;
constexpr int kTries = 16;  // to place the pieces of an arena in the order at hand
// Readable and writable bytes behind every dense value (kernels work in whole vectors).
constexpr size_t kSlack = 64;

int64_t dim(const ValueSpec& v, size_t i, int64_t batch) {
  return v.batch[i] ? v.dims[i] * batch : v.dims[i];
}

std::vector<ChannelBlock> blocks_of_map(const ValueSpec& v) {
  return v.parts.empty() ? split_channels(v.dims[1]) : split_channels(v.parts);
}

PackedLayout packed_layout(const ValueSpec& v, int64_t batch) {
  PackedLayout l;
  l.n = dim(v, 0, batch);
  l.c = v.dims[1];
  l.h = v.dims[2];
  l.w = v.dims[3];
  l.blocks = blocks_of_map(v);
  l.type = v.type;
  int64_t first = 0;
  for (size_t p = 0; p < v.scales.size(); ++p) {
    const int64_t count = v.scales.size() == 1 ? -1 : static_cast<int64_t>(split_channels(v.parts[p]).size());
    l.set_scale(v.scales[p], v.tops.empty() ? 0.0f : v.tops[p], first, count);
    first += count;
  }
  return l;
}

// Whether each segment of the packed map `to` may lie where the same pixels of `from` do, which are read
// before it is written: all of a dense row that it touches, or the segment of the same block.
bool in_slots_of(const ValueSpec& from, const ValueSpec& to) {
  const std::vector<ChannelBlock> blocks = blocks_of_map(to);
  if (from.layout == Layout::map) return blocks.size() == 1;
  const std::vector<ChannelBlock> before = blocks_of_map(from);
  return std::equal(blocks.begin(), blocks.end(), before.begin(), before.end(),
                    [](const ChannelBlock& a, const ChannelBlock& b) { return a.width == b.width; });
}

void set_map_strides(View& w, int64_t pixel) {
  w.strides[1] = 1;
  w.strides[3] = pixel;
  w.strides[2] = pixel * w.dims[3];
  w.strides[0] = pixel * w.dims[3] * w.dims[2];
}
void set_plain_strides(View& w) {
  int64_t s = 1;
  for (auto d = static_cast<size_t>(w.rank); d-- > 0;) {
    w.strides[d] = s;
    s *= w.dims[d];
  }
}

void allocate_arena(Context& c, size_t bytes) {
  const size_t align = bytes >= kLargePage ? kLargePage : kAlign;
  const size_t whole = (bytes + align - 1) / align * align;
  c.arena_bytes = bytes;
  c.arena.reset(static_cast<unsigned char*>(std::aligned_alloc(align, whole)));
  if (c.arena == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (align == kLargePage) madvise(c.arena.get(), whole, MADV_HUGEPAGE);
#endif
}

}  // namespace

// Each piece, in this order, at the lowest place that is free while it lives. Returns the bytes needed.
size_t Plan::place(std::vector<Piece>& pieces, const std::vector<size_t>& order) {
  std::vector<size_t> placed;
  size_t total = 0;
  for (size_t i : order) {
    Piece& p = pieces[i];
    std::vector<std::pair<size_t, size_t>> taken;
    for (size_t j : placed)
      if (pieces[j].first <= p.last && p.first <= pieces[j].last)
        taken.emplace_back(pieces[j].offset, pieces[j].offset + pieces[j].size);
    std::sort(taken.begin(), taken.end());
    size_t at = 0;
    for (const auto& [from, to] : taken) {
      if (at + p.size <= from) break;
      at = std::max(at, to);
    }
    p.offset = at;
    total = std::max(total, at + p.size);
    placed.push_back(i);
  }
  return total;
}

// Offsets such that pieces whose lives overlap do not: the best of some orders. By size, or from the nodes at
// which most is used to those at which least is; then, again and again, with what lies highest first. Returns
// the bytes needed.
size_t Plan::place(std::vector<Piece>& pieces) const {
  if (pieces.empty()) return 0;
  const std::vector<size_t> used = live(pieces);
  const size_t least = used.empty() ? 0 : *std::max_element(used.begin(), used.end());
  const auto size = [](const Piece& p) { return p.size; };
  const auto most = [&](const Piece& p) {
    return *std::max_element(used.begin() + p.first, used.begin() + p.last + 1);
  };
  std::vector<Piece> best;
  size_t bytes = SIZE_MAX;
  for (const std::function<size_t(const Piece&)>& rank :
       {std::function<size_t(const Piece&)>(size), {most}}) {
    std::vector<size_t> order(pieces.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      return std::pair(rank(pieces[a]), pieces[a].size) > std::pair(rank(pieces[b]), pieces[b].size);
    });
    for (int i = 0; i < kTries && bytes > least; ++i) {
      const size_t now = place(pieces, order);
      if (now < bytes) {
        bytes = now;
        best = pieces;
      }
      const auto top = std::find_if(order.begin(), order.end(),
                                    [&](size_t k) { return pieces[k].offset + pieces[k].size == now; });
      std::rotate(order.begin(), top, top + 1);
    }
  }
  pieces = std::move(best);
  return bytes;
}

int64_t elements(const ValueSpec& v, int64_t batch) {
  int64_t k = 1;
  for (size_t i = 0; i < v.dims.size(); ++i) {
    int64_t d = v.dims[i];
    if (v.batch[i] && __builtin_mul_overflow(d, batch, &d)) throw std::bad_alloc();
    if (d > 0 && k > (int64_t{1} << 46) / d) throw std::bad_alloc();
    k *= d;
  }
  return k;
}

std::vector<int64_t> Plan::shape(int value, int64_t batch) const {
  const ValueSpec& v = values_.at(static_cast<size_t>(value));
  std::vector<int64_t> s(v.dims.size());
  for (size_t i = 0; i < s.size(); ++i) s[i] = dim(v, i, batch);
  return s;
}

// Whether value i has memory of its own in the arena.
bool Plan::in_arena(size_t i) const {
  const ValueSpec& v = values_[i];
  const auto listed = [i](const std::vector<int>& l) {
    return std::find(l.begin(), l.end(), static_cast<int>(i)) != l.end();
  };
  return v.parent < 0 && v.data.empty() && first_[i] >= 0 && !listed(inputs_) && !listed(outputs_);
}

// Whether the output of a node takes over the memory of an input that it is the last to read, or may.
void Plan::take_over(size_t node) {
  const Node& n = *nodes_[node];
  const int input = n.in_place(), now = static_cast<int>(node);
  if (input < 0) return;
  const auto x = static_cast<size_t>(n.spec.inputs[static_cast<size_t>(input)]),
             y = static_cast<size_t>(n.spec.output);
  const ValueSpec &from = values_[x], &to = values_[y];
  const auto whole = [&](size_t i) {
    return roots_[i] == static_cast<int>(i) && in_arena(i) && values_[i].layout != Layout::plain &&
           values_[i].type == ValueType::f32 && values_[i].band == 0;
  };
  const auto times = std::count_if(n.spec.inputs.begin(), n.spec.inputs.end(), [&](int v) {
    return roots_[static_cast<size_t>(v)] == static_cast<int>(x);
  });
  if (!whole(x) || !whole(y) || first_[y] != now || last_[x] != now || times != 1 || from.dims != to.dims ||
      from.batch != to.batch)
    return;
  if (to.layout == Layout::map && from.layout == Layout::map) {
    const size_t first = heir_of_[x] < 0 ? x : static_cast<size_t>(heir_of_[x]);
    heir_of_[y] = static_cast<int>(first);
    last_[first] = last_[y];
  } else if (to.layout == Layout::packed && in_slots_of(from, to)) {
    const int first = from.layout == Layout::map ? heir_of_[x] : slot_heir_of_[x];
    slot_heir_of_[y] = first < 0 ? static_cast<int>(x) : first;
  }
}

// The pieces of the values, as c.regions' slots say.
std::vector<Plan::Piece> Plan::value_pieces(Context& c) const {
  // A dense value is one piece, a packed map two: its index and its values.
  std::vector<Piece> pieces;
  std::vector<int> last = last_;
  for (size_t i = 0; i < values_.size(); ++i)
    if (const int at = c.regions[i].slots; at >= 0)
      last[static_cast<size_t>(at)] = std::max(last[static_cast<size_t>(at)], last_[i]);
  for (size_t i = 0; i < values_.size(); ++i) {
    const ValueSpec& v = values_[i];
    const int64_t all = elements(v, c.batch);
    if (!in_arena(i) || heir_of_[i] >= 0) continue;
    Context::Region& r = c.regions[i];
    if (v.layout == Layout::packed) {
      const PackedLayout& l = c.maps[i]->layout();
      const double share = r.slots >= 0 ? 1.0 : std::min(1.0, v.density * kRoomFactor + kRoomShare);
      r.capacity = l.value_bytes(share);
      pieces.push_back({l.index_bytes(), first_[i], last_[i], &r.index});
      if (r.slots < 0 || r.slots == static_cast<int>(i))
        pieces.push_back({r.capacity, first_[i], last[i], &r.values});
    } else {
      const auto copies = [&] { return nodes_[static_cast<size_t>(first_[i])]->bands(c); };
      const int64_t count = v.band > 0 ? copies() * v.band * v.dims[1] * v.dims[3] : all;
      const size_t bytes = rounded(static_cast<size_t>(count) * sizeof(float) + kSlack);
      pieces.push_back({bytes, first_[i], last[i], &r.values});
    }
  }
  return pieces;
}

// Bytes that are used while each node runs.
std::vector<size_t> Plan::live(const std::vector<Piece>& pieces) const {
  std::vector<size_t> bytes(nodes_.size() + 1);
  for (const Piece& p : pieces) {
    bytes[static_cast<size_t>(p.first)] += p.size;
    bytes[static_cast<size_t>(p.last) + 1] -= p.size;  // modulo 2^64, until summed
  }
  for (size_t i = 1; i < bytes.size(); ++i) bytes[i] += bytes[i - 1];
  bytes.resize(nodes_.size());
  return bytes;
}

// Packed maps in the place of residuals: all that may, then none of those without which the most that is used
// at a time is no more.
void Plan::choose_slots(Context& c) const {
  std::vector<size_t> roots;
  const auto set = [&](size_t root, bool on) {
    for (size_t i = 0; i < values_.size(); ++i)
      if (slot_heir_of_[i] == static_cast<int>(root) || (i == root && values_[i].layout == Layout::packed))
        c.regions[i].slots = on ? static_cast<int>(root) : -1;
  };
  for (const int heir : slot_heir_of_)
    if (heir >= 0) roots.push_back(static_cast<size_t>(heir));
  std::sort(roots.begin(), roots.end());
  roots.erase(std::unique(roots.begin(), roots.end()), roots.end());
  const auto most = [&] {
    const std::vector<size_t> bytes = live(value_pieces(c));
    size_t found = 0;
    for (size_t i = 0; i < bytes.size(); ++i)
      found = std::max(found, bytes[i] + c.scratches[i].stride * static_cast<size_t>(c.threads));
    return found;
  };
  for (const size_t root : roots) set(root, true);
  size_t least = most();
  for (const size_t root : roots) {
    set(root, false);
    const size_t now = most();
    if (now > least) set(root, true);
    least = std::min(least, now);
  }
}

// Of all nodes, where each gets at most so much; 0: as much as it likes.
void Plan::set_scratch(Context& c, size_t limit) const {
  for (size_t i = 0; i < nodes_.size(); ++i) {
    c.node = i;
    c.scratches[i].limit = limit;
    c.scratches[i].stride = rounded(nodes_[i]->scratch(c, c.threads));
  }
}

// Nodes that the arena's size hangs on get less scratch, where it is a tenth smaller for that.
void Plan::limit_scratch(Context& c) const {
  const auto threads = static_cast<size_t>(c.threads);
  const std::vector<size_t> values = live(value_pieces(c));
  std::vector<Context::Scratch> full = c.scratches;
  set_scratch(c, 1);
  size_t most = 0, least = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    most = std::max(most, values[i] + full[i].stride * threads);
    least = std::max(least, values[i] + c.scratches[i].stride * threads);
  }
  const bool pays = static_cast<double>(least) < kWorth * static_cast<double>(most);
  for (size_t i = 0; i < values.size(); ++i) {
    Context::Scratch& s = c.scratches[i];
    if (pays && values[i] + full[i].stride * threads > least) {
      c.node = i;
      s.limit = (least - values[i]) / threads / kAlign * kAlign;
      s.stride = rounded(nodes_[i]->scratch(c, c.threads));
    } else {
      s = full[i];
    }
  }
}

// A context without memory, and the pieces of what it is to have.
std::unique_ptr<Context> Plan::lay_out(int64_t batch, int threads, std::vector<Piece>* pieces) const {
  auto c = std::make_unique<Context>();
  c->batch = batch;
  c->threads = threads;
  c->views.resize(values_.size());
  c->maps.resize(values_.size());
  c->regions.resize(values_.size());
  c->scratches.resize(nodes_.size());
  for (size_t i = 0; i < values_.size(); ++i)
    if (in_arena(i) && values_[i].layout == Layout::packed)
      c->maps[i] = std::make_unique<PackedMap>(packed_layout(values_[i], batch));
  for (size_t i = 0; i < values_.size(); ++i) set_view(*c, i);
  set_scratch(*c, 0);
  choose_slots(*c);
  limit_scratch(*c);
  *pieces = value_pieces(*c);
  for (size_t i = 0; i < nodes_.size(); ++i) {
    Context::Scratch& s = c->scratches[i];
    const auto now = static_cast<int>(i);
    if (s.stride > 0) pieces->push_back({s.stride * static_cast<size_t>(threads), now, now, &s.begin});
  }
  return c;
}

std::unique_ptr<Context> Plan::make_context(int64_t batch, int threads) const {
  std::vector<Piece> pieces;
  auto c = lay_out(batch, threads, &pieces);
  allocate_arena(*c, rounded(place(pieces) + kAlign));
  for (const Piece& p : pieces) *p.offset_of = p.offset;
  for (size_t i = 0; i < values_.size(); ++i) set_view(*c, i);
  return c;
}

std::vector<NodeMemory> Plan::memory(int64_t batch, int threads) const {
  if (threads <= 0) threads = default_threads();
  std::vector<Piece> pieces;
  const auto c = lay_out(batch, threads, &pieces);
  const std::vector<size_t> bytes = live(pieces);
  std::vector<NodeMemory> rows;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const size_t scratch = c->scratches[i].stride * static_cast<size_t>(threads);
    rows.push_back({nodes_[i]->spec.name, bytes[i] - scratch, scratch});
  }
  return rows;
}

// The view of value i; where it is, once there is an arena.
void Plan::set_view(Context& c, size_t i) const {
  const ValueSpec& v = values_[i];
  const auto root = static_cast<size_t>(roots_[i]);
  View& w = c.views[i];
  w.layout = v.layout;
  w.rank = static_cast<int>(v.dims.size());
  for (size_t d = 0; d < v.dims.size(); ++d) w.dims[d] = dim(v, d, c.batch);
  if (v.layout == Layout::packed) {
    w.packed = c.maps[root].get();
    w.first_channel = ats_[i];
    if (w.packed == nullptr) return;
    const auto& blocks = w.packed->layout().blocks;
    while (blocks[static_cast<size_t>(w.first_block)].first < w.first_channel) ++w.first_block;
    return;
  }
  if (v.layout == Layout::map)
    set_map_strides(w, values_[root].layout == Layout::map ? values_[root].dims[1] : w.dims[1]);
  else
    set_plain_strides(w);
  if (!values_[root].data.empty())
    w.data = const_cast<float*>(values_[root].data.data());
  else if (in_arena(root) && c.arena != nullptr) {
    const size_t at = heir_of_[root] < 0 ? root : static_cast<size_t>(heir_of_[root]);
    w.data = reinterpret_cast<float*>(c.arena.get() + c.regions[at].values) + ats_[i];
  }
}

}  // namespace actzip::engine
