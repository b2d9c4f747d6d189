// What a plan may be: every value and node is checked before a node is made.
#include <algorithm>
#include <stdexcept>

#include "engine/node.h"

namespace actzip::engine {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

std::string name_of(const ValueSpec& v) { return "value '" + v.name + "'"; }
std::string name_of(const NodeSpec& n) { return n.op + " '" + n.name + "'"; }

// One value for itself.
void check(const ValueSpec& v) {
  const std::string who = name_of(v);
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
}

// Whether `child` lies in `parent` as another shape, not as channels of it. `who` lies in both.
bool check_parent(const std::string& who, const ValueSpec& child, const ValueSpec& parent) {
  if ((child.layout == Layout::packed || parent.layout == Layout::packed) && child.layout != parent.layout)
    fail(who + ": packed and dense share no memory");
  const bool maps = child.layout == Layout::map && parent.layout == Layout::map;
  const bool regrouped = maps && child.dims[1] == parent.dims[1] && child.dims != parent.dims;
  if (child.layout != Layout::plain && parent.layout != Layout::plain && !regrouped) {
    for (size_t d : {size_t{0}, size_t{2}, size_t{3}})
      if (child.dims[d] != parent.dims[d] || child.batch[d] != parent.batch[d])
        fail(who + ": sizes differ from its parent's");
    if (child.offset < 0 || child.offset + child.dims[1] > parent.dims[1])
      fail(who + ": channels outside its parent");
    return false;
  }
  if (child.offset != 0 || elements(child, 1) != elements(parent, 1) ||
      elements(child, 3) != elements(parent, 3))
    fail(who + ": sizes differ from its parent's");
  const ValueSpec& m = child.layout == Layout::map ? child : parent;
  if (child.layout != parent.layout && (m.dims[2] != 1 || m.dims[3] != 1))
    fail(who + ": only a map of one pixel is plain memory too");
  return true;
}

// Channels [at, at + C) of a packed root are whole blocks of it.
void check_blocks(const ValueSpec& v, const ValueSpec& root, int64_t at) {
  const auto blocks = root.parts.empty() ? split_channels(root.dims[1]) : split_channels(root.parts);
  bool starts = false, ends = false;
  for (const ChannelBlock& b : blocks) {
    starts = starts || b.first == at;
    ends = ends || b.first + b.width == at + v.dims[1];
  }
  if (!starts || !ends || blocks.back().first + blocks.back().width != root.dims[1])
    fail(name_of(v) + ": is not cut at blocks of its packed parent");
}

}  // namespace

int PlanBuilder::value(ValueSpec spec) {
  values_.push_back(std::move(spec));
  return static_cast<int>(values_.size()) - 1;
}
void PlanBuilder::node(NodeSpec spec) { nodes_.push_back(std::move(spec)); }
void PlanBuilder::input(int value) { inputs_.push_back(value); }
void PlanBuilder::output(int value) { outputs_.push_back(value); }

const ValueSpec& PlanBuilder::known(int64_t v, const std::string& who) const {
  if (v < 0 || v >= static_cast<int64_t>(values_.size()))
    fail(who + ": value " + std::to_string(v) + " does not exist");
  return values_[static_cast<size_t>(v)];
}

// The root of value i, and its first channel there.
void PlanBuilder::find_root(size_t i, Plan* plan) const {
  const ValueSpec& v = values_[i];
  const std::string who = name_of(v);
  const ValueSpec* at = &v;
  int root = static_cast<int>(i);
  int64_t channel = 0;
  const ValueSpec* reshaped = nullptr;  // what has to be all of the root
  for (size_t hops = 0; at->parent >= 0; ++hops) {
    const ValueSpec& parent = known(at->parent, who);
    if (hops > values_.size()) fail(who + ": parents in a circle");
    if (hops == 0 && parent.band > 0) fail(who + ": part of a map that is kept in bands");
    const bool maps = at->layout == Layout::map && parent.layout == Layout::map;
    if (check_parent(who, *at, parent) && reshaped != &v) reshaped = maps ? at : &v;
    channel += at->offset;
    root = at->parent;
    at = &parent;
  }
  if (reshaped != nullptr && elements(*reshaped, 1) != elements(*at, 1))
    fail(who + ": another shape of a part of a map");
  if (v.layout == Layout::packed) check_blocks(v, *at, channel);
  plan->roots_[i] = root;
  plan->ats_[i] = channel;
}

void PlanBuilder::check_inputs(std::vector<bool>* written) const {
  for (int v : inputs_) {
    const ValueSpec& s = known(v, "input");
    if (s.layout != Layout::plain || s.parent >= 0 || !s.data.empty())
      fail("input '" + s.name + "' is not plain memory");
    (*written)[static_cast<size_t>(v)] = true;
  }
  for (size_t i = 0; i < values_.size(); ++i)
    if (!values_[i].data.empty()) (*written)[i] = true;
}

// What node i reads and writes, and when its values live.
void PlanBuilder::check_node(size_t i, std::vector<bool>* written, Plan* plan) const {
  const NodeSpec& n = nodes_[i];
  const std::string who = name_of(n);
  const auto now = static_cast<int>(i);
  if (known(n.output, who).band > 0) fail(who + ": writes what is kept in bands only");
  if (const auto mid = n.ints.find("band"); mid != n.ints.end()) {
    if (mid->second.empty() || mid->second.size() > (n.op == "conv_depthwise" ? 2 : 1))
      fail(who + ": names no value that is kept in bands, or too many");
    for (int64_t v : mid->second) {
      if (known(v, who).band < 1) fail(who + ": '" + known(v, who).name + "' is not kept in bands");
      const auto b = static_cast<size_t>(v);
      if (plan->first_[b] >= 0) fail(who + ": '" + values_[b].name + "' belongs to another node");
      plan->first_[b] = plan->last_[b] = now;
    }
  }
  for (int v : n.inputs) {
    const ValueSpec& x = known(v, who);
    if (x.band > 0) fail(who + ": reads what is kept in bands only");
    const auto root = static_cast<size_t>(plan->roots_[static_cast<size_t>(v)]);
    if (!(*written)[static_cast<size_t>(v)] && !(*written)[root])
      fail(who + ": reads '" + x.name + "' before it is written");
    plan->last_[root] = now;
  }
  const auto root = static_cast<size_t>(plan->roots_[static_cast<size_t>(n.output)]);
  if (!values_[root].data.empty() ||
      std::find(inputs_.begin(), inputs_.end(), static_cast<int>(root)) != inputs_.end())
    fail(who + ": writes a constant or an input");
  if (plan->first_[root] < 0) {
    plan->first_[root] = now;
    if (values_[root].layout == Layout::packed) plan->binds_[i].push_back(static_cast<int>(root));
  }
  plan->last_[root] = now;
  (*written)[static_cast<size_t>(n.output)] = true;
  (*written)[root] = true;
}

void PlanBuilder::check_outputs(const Plan& plan) const {
  for (int v : outputs_) {
    const ValueSpec& s = known(v, "output");
    if (s.layout != Layout::plain || s.parent >= 0 || !s.data.empty() ||
        plan.first_[static_cast<size_t>(v)] < 0)
      fail("output '" + s.name + "' is not plain memory written by a node");
  }
}

// Whether the first size of every value that is not a constant, and that one alone, is the batch: nodes
// combine along sizes that are known, so that no image meets another.
bool PlanBuilder::images_apart() const {
  return std::all_of(values_.begin(), values_.end(), [](const ValueSpec& v) {
    return !v.data.empty() || (!v.dims.empty() && v.batch[0] && v.dims[0] == 1 &&
                               std::count(v.batch.begin(), v.batch.end(), true) == 1);
  });
}

std::unique_ptr<Plan> PlanBuilder::build(const std::function<void(size_t)>& packed) {
  std::unique_ptr<Plan> plan(new Plan());
  plan->isa_ = active_isa();
  plan->roots_.resize(values_.size());
  plan->ats_.resize(values_.size());
  plan->first_.assign(values_.size(), -1);
  plan->last_.assign(values_.size(), -1);
  plan->binds_.resize(nodes_.size());
  for (const ValueSpec& v : values_) check(v);
  for (size_t i = 0; i < values_.size(); ++i) find_root(i, plan.get());
  std::vector<bool> written(values_.size(), false);
  check_inputs(&written);
  for (size_t i = 0; i < nodes_.size(); ++i) check_node(i, &written, plan.get());
  check_outputs(*plan);
  const bool apart = images_apart();
  plan->inputs_ = inputs_;
  plan->outputs_ = outputs_;
  for (NodeSpec& n : nodes_) {
    n.store = store_.get();
    plan->nodes_.push_back(make_node(std::move(n), values_, plan->isa_));
    if (packed) packed(plan->nodes_.size() - 1);
  }
  plan->values_ = std::move(values_);
  plan->heir_of_.assign(plan->values_.size(), -1);
  plan->slot_heir_of_.assign(plan->values_.size(), -1);
  for (size_t i = 0; i < plan->nodes_.size(); ++i) plan->take_over(i);
  if (apart) plan->share_ = Plan::share_of(plan->weight_bytes());
  *this = PlanBuilder();
  return plan;
}

}  // namespace actzip::engine
