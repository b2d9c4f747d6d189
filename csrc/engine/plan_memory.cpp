// The memory of a plan: where its values lie in the arena of a context.
#include <algorithm>
#include <cstdlib>
#include <new>

#include "engine/node.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace actzip::engine {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;
// Room above the calibrated density of a packed map, as a factor and as a share of the elements.
constexpr double kRoomFactor = 1.1, kRoomShare = 0.02;
// Readable and writable bytes behind every dense value (kernels work in whole vectors).
constexpr size_t kSlack = 64;

int64_t dim(const ValueSpec& v, size_t i, int64_t batch) {
  return v.batch[i] ? v.dims[i] * batch : v.dims[i];
}

struct Piece {
  size_t size;
  int first, last;  // nodes
  size_t offset = 0;
};

// Offsets such that pieces whose lives overlap do not: the largest first, each at the lowest place that is
// free. Returns the bytes needed.
size_t place(std::vector<Piece>& pieces) {
  std::vector<size_t> order(pieces.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return pieces[a].size > pieces[b].size; });
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

PackedLayout packed_layout(const ValueSpec& v, int64_t batch) {
  PackedLayout l;
  l.n = dim(v, 0, batch);
  l.c = v.dims[1];
  l.h = v.dims[2];
  l.w = v.dims[3];
  l.blocks = v.parts.empty() ? split_channels(l.c) : split_channels(v.parts);
  l.type = v.type;
  int64_t first = 0;
  for (size_t p = 0; p < v.scales.size(); ++p) {
    const int64_t count = v.scales.size() == 1 ? -1 : static_cast<int64_t>(split_channels(v.parts[p]).size());
    l.set_scale(v.scales[p], v.tops.empty() ? 0.0f : v.tops[p], first, count);
    first += count;
  }
  return l;
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

// Whether the output of a node takes over the memory of an input that it is the last to read.
void Plan::take_over(size_t node) {
  const Node& n = *nodes_[node];
  const int input = n.in_place(), now = static_cast<int>(node);
  if (input < 0) return;
  const auto x = static_cast<size_t>(n.spec.inputs[static_cast<size_t>(input)]),
             y = static_cast<size_t>(n.spec.output);
  const ValueSpec &from = values_[x], &to = values_[y];
  const auto whole = [&](size_t i) {
    return roots_[i] == static_cast<int>(i) && in_arena(i) && values_[i].layout == Layout::map &&
           values_[i].band == 0;
  };
  const auto times = std::count_if(n.spec.inputs.begin(), n.spec.inputs.end(), [&](int v) {
    return roots_[static_cast<size_t>(v)] == static_cast<int>(x);
  });
  if (!whole(x) || !whole(y) || first_[y] != now || last_[x] != now || times != 1 || from.dims != to.dims ||
      from.batch != to.batch)
    return;
  const size_t first = heir_of_[x] < 0 ? x : static_cast<size_t>(heir_of_[x]);
  heir_of_[y] = static_cast<int>(first);
  last_[first] = last_[y];
}

std::unique_ptr<Context> Plan::make_context(int64_t batch) const {
  auto c = std::make_unique<Context>();
  c->batch = batch;
  c->views.resize(values_.size());
  c->maps.resize(values_.size());
  c->regions.resize(values_.size());
  // A dense value is one piece, a packed map two: its index and its values.
  std::vector<Piece> pieces;
  std::vector<size_t*> offset_of;
  std::vector<size_t> dense(values_.size(), 0);
  const auto piece = [&](size_t i, size_t bytes, size_t* offset) {
    pieces.push_back({bytes, first_[i], last_[i]});
    offset_of.push_back(offset);
  };
  for (size_t i = 0; i < values_.size(); ++i) {
    const ValueSpec& v = values_[i];
    const int64_t all = elements(v, batch);
    if (!in_arena(i) || heir_of_[i] >= 0) continue;
    if (v.layout == Layout::packed) {
      const PackedLayout l = packed_layout(v, batch);
      Context::Region& r = c->regions[i];
      r.capacity = l.value_bytes(std::min(1.0, v.density * kRoomFactor + kRoomShare));
      c->maps[i] = std::make_unique<PackedMap>(l);
      piece(i, l.index_bytes(), &r.index);
      piece(i, r.capacity, &r.values);
    } else {
      const int64_t count = v.band > 0 ? v.band * v.dims[1] * v.dims[3] : all;
      piece(i, rounded(static_cast<size_t>(count) * sizeof(float) + kSlack), &dense[i]);
    }
  }
  allocate_arena(*c, rounded(place(pieces) + kAlign));
  for (size_t k = 0; k < pieces.size(); ++k) *offset_of[k] = pieces[k].offset;
  for (size_t i = 0; i < values_.size(); ++i) {
    auto root = static_cast<size_t>(roots_[i]);
    if (heir_of_[root] >= 0) root = static_cast<size_t>(heir_of_[root]);
    const bool ours = values_[root].layout != Layout::packed && in_arena(root);
    set_view(*c, i, ours ? reinterpret_cast<float*>(c->arena.get() + dense[root]) : nullptr);
  }
  return c;
}

// The view of value i, whose root lies at `base` (null: not in the arena).
void Plan::set_view(Context& c, size_t i, float* base) const {
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
  else if (base != nullptr)
    w.data = base + ats_[i];
}

}  // namespace actzip::engine
