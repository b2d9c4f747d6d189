#include "engine/plan.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "common/float_mode.h"
#include "common/thread_pool.h"
#include "engine/node.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace actzip::engine {
namespace {

constexpr size_t kAlign = 64;
constexpr size_t kLargePage = size_t{2} << 20;
size_t rounded(size_t x) { return (x + kAlign - 1) / kAlign * kAlign; }
// Room above the calibrated density of a packed map, as a factor and as a share of the elements.
constexpr double kRoomFactor = 1.1, kRoomShare = 0.02;
// Readable and writable bytes behind every dense value (kernels work in whole vectors).
constexpr size_t kSlack = 64;

int64_t dim(const ValueSpec& v, size_t i, int64_t batch) {
  return v.batch[i] ? v.dims[i] * batch : v.dims[i];
}

// Throws std::bad_alloc for more than any memory holds: products of sizes never overflow.
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

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

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

}  // namespace

std::vector<BlockOf> blocks_of(const View& v) {
  std::vector<BlockOf> out;
  const auto& blocks = v.packed->layout().blocks;
  for (size_t b = static_cast<size_t>(v.first_block); b < blocks.size(); ++b) {
    const int64_t first = blocks[b].first - v.first_channel;
    if (first >= v.c()) break;
    out.push_back({static_cast<int64_t>(b), first, blocks[b].width});
  }
  return out;
}

Plan::~Plan() = default;

std::vector<int64_t> Plan::shape(int value, int64_t batch) const {
  const ValueSpec& v = values_.at(static_cast<size_t>(value));
  std::vector<int64_t> s(v.dims.size());
  for (size_t i = 0; i < s.size(); ++i) s[i] = dim(v, i, batch);
  return s;
}

std::unique_ptr<Context> Plan::acquire(int64_t batch) const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = idle_.size(); i-- > 0;)
      if (idle_[i]->batch == batch) {
        auto c = std::move(idle_[i]);
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(i));
        return c;
      }
  }
  auto c = std::make_unique<Context>();
  c->batch = batch;
  c->views.resize(values_.size());
  c->maps.resize(values_.size());
  c->regions.resize(values_.size());
  std::vector<Piece> pieces;
  std::vector<int> owner;
  for (size_t i = 0; i < values_.size(); ++i) {
    const ValueSpec& v = values_[i];
    elements(v, batch);
    const bool external = std::find(inputs_.begin(), inputs_.end(), static_cast<int>(i)) != inputs_.end() ||
                          std::find(outputs_.begin(), outputs_.end(), static_cast<int>(i)) != outputs_.end();
    if (v.parent >= 0 || !v.data.empty() || external || first_[i] < 0) continue;
    if (v.layout == Layout::packed) {
      PackedLayout l;
      l.n = dim(v, 0, batch);
      l.c = v.dims[1];
      l.h = v.dims[2];
      l.w = v.dims[3];
      l.blocks = v.parts.empty() ? split_channels(l.c) : split_channels(v.parts);
      l.type = v.type;
      int64_t first = 0;
      for (size_t p = 0; p < v.scales.size(); ++p) {
        const int64_t count =
            v.scales.size() == 1 ? -1 : static_cast<int64_t>(split_channels(v.parts[p]).size());
        l.set_scale(v.scales[p], v.tops.empty() ? 0.0f : v.tops[p], first, count);
        first += count;
      }
      const double density = std::min(1.0, v.density * kRoomFactor + kRoomShare);
      c->regions[i].capacity = l.value_bytes(density);
      c->maps[i] = std::make_unique<PackedMap>(l);
      pieces.push_back({l.index_bytes(), first_[i], last_[i]});
      owner.push_back(static_cast<int>(i));
      pieces.push_back({c->regions[i].capacity, first_[i], last_[i]});
      owner.push_back(-1 - static_cast<int>(i));
    } else {
      const int64_t count = v.band > 0 ? v.band * v.dims[1] * v.dims[3] : elements(v, batch);
      pieces.push_back({rounded(static_cast<size_t>(count) * sizeof(float) + kSlack), first_[i], last_[i]});
      owner.push_back(static_cast<int>(i));
    }
  }
  c->arena_bytes = rounded(place(pieces) + kAlign);
  const size_t align = c->arena_bytes >= kLargePage ? kLargePage : kAlign;
  c->arena.reset(
      static_cast<unsigned char*>(std::aligned_alloc(align, (c->arena_bytes + align - 1) / align * align)));
  if (c->arena == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (align == kLargePage)
    madvise(c->arena.get(), (c->arena_bytes + align - 1) / align * align, MADV_HUGEPAGE);
#endif
  std::vector<float*> base(values_.size(), nullptr);
  for (size_t k = 0; k < pieces.size(); ++k) {
    if (owner[k] < 0) {
      c->regions[static_cast<size_t>(-1 - owner[k])].values = pieces[k].offset;
    } else if (c->maps[static_cast<size_t>(owner[k])] != nullptr) {
      c->regions[static_cast<size_t>(owner[k])].index = pieces[k].offset;
    } else {
      base[static_cast<size_t>(owner[k])] = reinterpret_cast<float*>(c->arena.get() + pieces[k].offset);
    }
  }
  for (size_t i = 0; i < values_.size(); ++i) {
    const ValueSpec& v = values_[i];
    const auto root = static_cast<size_t>(roots_[i]);
    View& w = c->views[i];
    w.layout = v.layout;
    w.rank = static_cast<int>(v.dims.size());
    for (size_t d = 0; d < v.dims.size(); ++d) w.dims[d] = dim(v, d, batch);
    if (v.layout == Layout::packed) {
      w.packed = c->maps[root].get();
      w.first_channel = ats_[i];
      if (w.packed != nullptr) {
        const auto& blocks = w.packed->layout().blocks;
        while (blocks[static_cast<size_t>(w.first_block)].first < w.first_channel) ++w.first_block;
      }
      continue;
    }
    if (v.layout == Layout::map) {
      const int64_t pixel = values_[root].layout == Layout::map ? values_[root].dims[1] : w.dims[1];
      w.strides[1] = 1;
      w.strides[3] = pixel;
      w.strides[2] = pixel * w.dims[3];
      w.strides[0] = pixel * w.dims[3] * w.dims[2];
    } else {
      int64_t s = 1;
      for (size_t d = v.dims.size(); d-- > 0;) {
        w.strides[d] = s;
        s *= w.dims[d];
      }
    }
    if (!values_[root].data.empty()) {
      w.data = const_cast<float*>(values_[root].data.data());
    } else if (base[root] != nullptr) {
      w.data = base[root] + ats_[i];
    }
  }
  return c;
}

void Plan::give_back(std::unique_ptr<Context> context) const {
  size_t spilled = 0;
  for (const auto& m : context->maps)
    if (m != nullptr) spilled += m->spilled_bytes();
  const std::lock_guard<std::mutex> lock(mutex_);
  spilled_ = std::max(spilled_, spilled);
  if (idle_.size() >= kMaxContexts) idle_.erase(idle_.begin());
  idle_.push_back(std::move(context));
}

void Plan::release() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.clear();
}

size_t Plan::arena_bytes(int64_t batch) const {
  auto c = acquire(batch);
  const size_t bytes = c->arena_bytes;
  give_back(std::move(c));
  return bytes;
}

size_t Plan::spilled_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return spilled_;
}

size_t Plan::weight_bytes() const {
  size_t bytes = 0;
  for (const auto& n : nodes_) bytes += n->weight_bytes();
  for (const ValueSpec& v : values_) bytes += v.data.size() * sizeof(float);
  return bytes;
}

void Plan::execute(Context& c, const std::vector<const float*>& inputs, const std::vector<float*>& outputs,
                   int threads, std::vector<NodeTiming>* timings, std::vector<double>* densities) const {
  if (inputs.size() != inputs_.size() || outputs.size() != outputs_.size())
    fail("plan: " + std::to_string(inputs.size()) + " inputs and " + std::to_string(outputs.size()) +
         " outputs given, " + std::to_string(inputs_.size()) + " and " + std::to_string(outputs_.size()) +
         " needed");
  if (threads <= 0) threads = default_threads();
  for (size_t i = 0; i < inputs.size(); ++i)
    c.views[static_cast<size_t>(inputs_[i])].data = const_cast<float*>(inputs[i]);
  for (size_t i = 0; i < outputs.size(); ++i) c.views[static_cast<size_t>(outputs_[i])].data = outputs[i];
  // plain values that are another shape of an input or output
  for (size_t i = 0; i < values_.size(); ++i)
    if (values_[i].parent >= 0 && values_[i].layout != Layout::packed) {
      const auto root = static_cast<size_t>(roots_[i]);
      if (values_[root].data.empty()) c.views[i].data = c.views[root].data + ats_[i];
    }
  if (c.scratch_threads != threads) {  // fewer threads may mean larger work items
    size_t most = 0;
    for (const auto& n : nodes_) most = std::max(most, n->scratch(c, threads));
    c.scratch_stride = rounded(most + kAlign);
    const size_t bytes = c.scratch_stride * static_cast<size_t>(threads);
    if (bytes > c.scratch_bytes) {
      c.scratch.reset();
      c.scratch.reset(static_cast<unsigned char*>(std::aligned_alloc(kAlign, bytes)));
      if (c.scratch == nullptr) throw std::bad_alloc();
      c.scratch_bytes = bytes;
    }
    c.scratch_threads = threads;
  }
  const FlushSubnormals flush;
  using Clock = std::chrono::steady_clock;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    for (int root : binds_[i]) {
      const Context::Region& r = c.regions[static_cast<size_t>(root)];
      PackedMap& map = *c.maps[static_cast<size_t>(root)];
      map.bind(map.layout().n, c.arena.get() + r.index, c.arena.get() + r.values, r.capacity);
    }
    if (timings != nullptr) {
      const auto start = Clock::now();
      nodes_[i]->run(c, threads);
      NodeTiming& t = (*timings)[i];
      t.seconds = std::chrono::duration<double>(Clock::now() - start).count();
    } else {
      nodes_[i]->run(c, threads);
    }
    if (densities != nullptr) {
      const auto o = static_cast<size_t>(nodes_[i]->spec.output);
      const View& v = c.views[o];
      const int64_t total = v.count();
      if (total == 0) continue;
      int64_t nonzero = 0;
      if (v.layout == Layout::packed) {
        for (const BlockOf& b : blocks_of(v))
          for (int64_t n = 0; n < v.n(); ++n)
            for (int64_t y = 0; y < v.h(); ++y) {
              const uint64_t* masks = v.packed->masks(n, y, b.block);
              for (int64_t x = 0; x < v.w(); ++x) nonzero += __builtin_popcountll(masks[x]);
            }
      } else if (v.layout == Layout::map) {
        const Rows& rows = rows_for(isa_);
        for (int64_t n = 0; n < v.n(); ++n)
          for (int64_t y = 0; y < v.h(); ++y)
            for (int64_t x = 0; x < v.w(); ++x)
              nonzero += rows.count_nonzero(v.row(n, y) + x * v.pixel(), v.c());
      } else {
        nonzero = rows_for(isa_).count_nonzero(v.data, total);
      }
      (*densities)[o] = static_cast<double>(nonzero) / static_cast<double>(total);
    }
  }
}

void Plan::run(int64_t batch, const std::vector<const float*>& inputs, const std::vector<float*>& outputs,
               int threads) const {
  if (batch < 1) fail("plan: batch " + std::to_string(batch) + " is not at least 1");
  auto c = acquire(batch);
  execute(*c, inputs, outputs, threads, nullptr, nullptr);  // a context that threw is dropped, not kept
  give_back(std::move(c));
}

std::vector<NodeTiming> Plan::profile(int64_t batch, const std::vector<const float*>& inputs,
                                      const std::vector<float*>& outputs, int threads) const {
  if (batch < 1) fail("plan: batch " + std::to_string(batch) + " is not at least 1");
  std::vector<NodeTiming> timings;
  for (const auto& n : nodes_) timings.push_back({n->spec.op, n->spec.name, n->kernel(), n->kind(), 0.0});
  auto c = acquire(batch);
  execute(*c, inputs, outputs, threads, &timings, nullptr);
  give_back(std::move(c));
  return timings;
}

std::vector<double> Plan::densities(int64_t batch, const std::vector<const float*>& inputs,
                                    const std::vector<float*>& outputs, int threads) const {
  if (batch < 1) fail("plan: batch " + std::to_string(batch) + " is not at least 1");
  std::vector<double> d(values_.size(), -1.0);
  auto c = acquire(batch);
  execute(*c, inputs, outputs, threads, nullptr, &d);
  give_back(std::move(c));
  return d;
}

int PlanBuilder::value(ValueSpec spec) {
  values_.push_back(std::move(spec));
  return static_cast<int>(values_.size()) - 1;
}
void PlanBuilder::node(NodeSpec spec) { nodes_.push_back(std::move(spec)); }
void PlanBuilder::input(int value) { inputs_.push_back(value); }
void PlanBuilder::output(int value) { outputs_.push_back(value); }

std::unique_ptr<Plan> PlanBuilder::build() {
  const auto count = static_cast<int>(values_.size());
  auto known = [&](int v, const std::string& who) {
    if (v < 0 || v >= count) fail(who + ": value " + std::to_string(v) + " does not exist");
  };
  std::unique_ptr<Plan> plan(new Plan());
  plan->isa_ = active_isa();
  plan->roots_.resize(values_.size());
  plan->ats_.resize(values_.size());
  for (size_t i = 0; i < values_.size(); ++i) {
    const ValueSpec& v = values_[i];
    const std::string who = "value '" + v.name + "'";
    if (v.dims.size() > static_cast<size_t>(kMaxRank))
      fail(who + ": more than " + std::to_string(kMaxRank) + " dimensions");
    if (v.batch.size() != v.dims.size()) fail(who + ": dims and batch differ in length");
    int64_t total = 1;
    for (int64_t d : v.dims) {
      if (d < 0 || d > (int64_t{1} << 40)) fail(who + ": size " + std::to_string(d));
      if (d > 0 && total > (int64_t{1} << 46) / d) fail(who + ": too many elements");
      total *= d;
    }
    if (v.layout != Layout::plain && v.dims.size() != 4) fail(who + ": a map has 4 dimensions");
    if (v.layout != Layout::plain && (v.batch[1] || v.batch[2] || v.batch[3]))
      fail(who + ": only N of a map may be the batch");
    if (!v.data.empty() && static_cast<int64_t>(v.data.size()) != total) fail(who + ": data of another size");
    if (v.band < 0 || (v.band > 0 && (v.layout != Layout::map || v.parent >= 0 || v.band > (1 << 24))))
      fail(who + ": only a map without parent is kept in bands");
    if (v.parent >= 0 && v.parent < count && values_[static_cast<size_t>(v.parent)].band > 0)
      fail(who + ": part of a map that is kept in bands");
    int root = static_cast<int>(i);
    int64_t at = 0;
    bool reshaped = false;
    for (int hops = 0; values_[static_cast<size_t>(root)].parent >= 0; ++hops) {
      const ValueSpec& child = values_[static_cast<size_t>(root)];
      known(child.parent, who);
      if (hops > count) fail(who + ": parents in a circle");
      const ValueSpec& parent = values_[static_cast<size_t>(child.parent)];
      if (child.layout == Layout::packed || parent.layout == Layout::packed) {
        if (child.layout != parent.layout) fail(who + ": packed and dense share no memory");
      }
      const bool channels = child.layout != Layout::plain && parent.layout != Layout::plain;
      if (channels) {
        for (size_t d : {size_t{0}, size_t{2}, size_t{3}})
          if (child.dims[d] != parent.dims[d] || child.batch[d] != parent.batch[d])
            fail(who + ": sizes differ from its parent's");
        if (child.offset < 0 || child.offset + child.dims[1] > parent.dims[1])
          fail(who + ": channels outside its parent");
      } else if (child.offset != 0 || elements(child, 1) != elements(parent, 1) ||
                 elements(child, 3) != elements(parent, 3)) {
        fail(who + ": sizes differ from its parent's");
      } else {
        const ValueSpec& m = child.layout == Layout::map ? child : parent;
        if (child.layout != parent.layout && (m.dims[2] != 1 || m.dims[3] != 1))
          fail(who + ": only a map of one pixel is plain memory too");
        reshaped = true;
      }
      at += child.offset;
      root = child.parent;
    }
    plan->roots_[i] = root;
    plan->ats_[i] = at;
    if (reshaped && elements(v, 1) != elements(values_[static_cast<size_t>(root)], 1))
      fail(who + ": another shape of a part of a map");
    if (v.layout == Layout::packed) {
      const ValueSpec& r = values_[static_cast<size_t>(root)];
      const auto blocks = r.parts.empty() ? split_channels(r.dims[1]) : split_channels(r.parts);
      bool starts = false, ends = false;
      for (const ChannelBlock& b : blocks) {
        starts = starts || b.first == at;
        ends = ends || b.first + b.width == at + v.dims[1];
      }
      if (!starts || !ends || blocks.back().first + blocks.back().width != r.dims[1])
        fail(who + ": is not cut at blocks of its packed parent");
    }
  }
  plan->first_.assign(values_.size(), -1);
  plan->last_.assign(values_.size(), -1);
  std::vector<bool> written(values_.size(), false);
  for (int v : inputs_) {
    known(v, "input");
    const ValueSpec& s = values_[static_cast<size_t>(v)];
    if (s.layout != Layout::plain || s.parent >= 0 || !s.data.empty())
      fail("input '" + s.name + "' is not plain memory");
    written[static_cast<size_t>(v)] = true;
  }
  for (size_t i = 0; i < values_.size(); ++i)
    if (!values_[i].data.empty()) written[i] = true;
  plan->binds_.resize(nodes_.size());
  for (size_t i = 0; i < nodes_.size(); ++i) {
    const NodeSpec& n = nodes_[i];
    const std::string who = n.op + " '" + n.name + "'";
    known(n.output, who);
    if (values_[static_cast<size_t>(n.output)].band > 0) fail(who + ": writes what is kept in bands only");
    if (const auto mid = n.ints.find("band"); mid != n.ints.end()) {
      if (mid->second.size() != 1 || mid->second[0] < 0 || mid->second[0] >= count ||
          values_[static_cast<size_t>(mid->second[0])].band < 1)
        fail(who + ": names no value that is kept in bands");
      const auto b = static_cast<size_t>(mid->second[0]);
      if (plan->first_[b] >= 0) fail(who + ": '" + values_[b].name + "' belongs to another node");
      plan->first_[b] = plan->last_[b] = static_cast<int>(i);
    }
    for (int v : n.inputs) {
      known(v, who);
      if (values_[static_cast<size_t>(v)].band > 0) fail(who + ": reads what is kept in bands only");
      const auto root = static_cast<size_t>(plan->roots_[static_cast<size_t>(v)]);
      if (!written[static_cast<size_t>(v)] && !written[root])
        fail(who + ": reads '" + values_[static_cast<size_t>(v)].name + "' before it is written");
      plan->last_[root] = static_cast<int>(i);
    }
    const auto root = static_cast<size_t>(plan->roots_[static_cast<size_t>(n.output)]);
    if (!values_[root].data.empty() ||
        std::find(inputs_.begin(), inputs_.end(), static_cast<int>(root)) != inputs_.end())
      fail(who + ": writes a constant or an input");
    if (plan->first_[root] < 0) {
      plan->first_[root] = static_cast<int>(i);
      if (values_[root].layout == Layout::packed) plan->binds_[i].push_back(static_cast<int>(root));
    }
    plan->last_[root] = static_cast<int>(i);
    written[static_cast<size_t>(n.output)] = true;
    written[root] = true;
  }
  for (int v : outputs_) {
    known(v, "output");
    const ValueSpec& s = values_[static_cast<size_t>(v)];
    if (s.layout != Layout::plain || s.parent >= 0 || !s.data.empty() ||
        plan->first_[static_cast<size_t>(v)] < 0)
      fail("output '" + s.name + "' is not plain memory written by a node");
  }
  plan->inputs_ = inputs_;
  plan->outputs_ = outputs_;
  for (NodeSpec& n : nodes_) plan->nodes_.push_back(make_node(std::move(n), values_, plan->isa_));
  plan->values_ = std::move(values_);
  *this = PlanBuilder();
  return plan;
}

}  // namespace actzip::engine
