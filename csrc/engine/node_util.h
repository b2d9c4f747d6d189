// Internal: what the nodes' sources share: reading a spec's attributes, the activation behind a node, and the
// base of nodes that work on maps row by row.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "engine/node.h"

namespace actzip::engine {

[[noreturn]] inline void fail(const NodeSpec& s, const std::string& what) {
  throw std::invalid_argument(s.op + " '" + s.name + "': " + what);
}

inline int64_t one(const NodeSpec& s, const char* key, int64_t otherwise) {
  const auto it = s.ints.find(key);
  return it == s.ints.end() || it->second.empty() ? otherwise : it->second[0];
}
inline double number(const NodeSpec& s, const char* key, double otherwise) {
  const auto it = s.floats.find(key);
  return it == s.floats.end() || it->second.empty() ? otherwise : it->second[0];
}
inline std::vector<int64_t> list(const NodeSpec& s, const char* key, size_t length, int64_t least) {
  const auto it = s.ints.find(key);
  if (it == s.ints.end() || it->second.size() != length)
    fail(s, std::string(key) + " needs " + std::to_string(length) + " integers");
  for (int64_t v : it->second)
    if (v < least || v > (int64_t{1} << 30)) fail(s, std::string(key) + " has " + std::to_string(v));
  return it->second;
}
inline std::vector<float> take(NodeSpec& s, const char* key, int64_t size) {
  const auto it = s.arrays.find(key);
  if (it == s.arrays.end()) return {};
  std::vector<float> v = std::move(it->second);
  s.arrays.erase(it);
  if (size >= 0 && static_cast<int64_t>(v.size()) != size)
    fail(s, std::string(key) + " has " + std::to_string(v.size()) + " numbers, not " + std::to_string(size));
  return v;
}
inline const ValueSpec& value(const std::vector<ValueSpec>& values, int i) {
  return values[static_cast<size_t>(i)];
}
inline void arity(const NodeSpec& s, size_t least, size_t most) {
  if (s.inputs.size() < least || s.inputs.size() > most) fail(s, std::to_string(s.inputs.size()) + " inputs");
}
inline void same_shape(const NodeSpec& s, const ValueSpec& a, const ValueSpec& b) {
  if (a.dims != b.dims || a.batch != b.batch)
    fail(s, "shapes of '" + a.name + "' and '" + b.name + "' differ");
}

inline const std::unordered_map<std::string, Fn>& fn_names() {
  static const std::unordered_map<std::string, Fn> names = {{"none", Fn::none},
                                                            {"relu", Fn::relu},
                                                            {"clip", Fn::clip},
                                                            {"threshold", Fn::threshold},
                                                            {"leaky_relu", Fn::leaky_relu},
                                                            {"prelu", Fn::prelu},
                                                            {"elu", Fn::elu},
                                                            {"selu", Fn::selu},
                                                            {"celu", Fn::celu},
                                                            {"softplus", Fn::softplus},
                                                            {"softsign", Fn::softsign},
                                                            {"sigmoid", Fn::sigmoid},
                                                            {"logsigmoid", Fn::logsigmoid},
                                                            {"hardsigmoid", Fn::hardsigmoid},
                                                            {"tanh", Fn::tanh},
                                                            {"silu", Fn::silu},
                                                            {"gelu", Fn::gelu},
                                                            {"gelu_tanh", Fn::gelu_tanh},
                                                            {"hardswish", Fn::hardswish},
                                                            {"mish", Fn::mish},
                                                            {"exp", Fn::exp},
                                                            {"log", Fn::log},
                                                            {"sqrt", Fn::sqrt},
                                                            {"rsqrt", Fn::rsqrt},
                                                            {"reciprocal", Fn::reciprocal},
                                                            {"square", Fn::square},
                                                            {"neg", Fn::neg},
                                                            {"abs", Fn::abs},
                                                            {"sign", Fn::sign},
                                                            {"floor", Fn::floor},
                                                            {"ceil", Fn::ceil},
                                                            {"round", Fn::round},
                                                            {"erf", Fn::erf},
                                                            {"sin", Fn::sin},
                                                            {"cos", Fn::cos}};
  return names;
}

// The activation of a node: strings["act"], floats act_alpha ..., array act_param (1 or C numbers).
struct NodeAct {
  Act act;
  std::vector<float> param;

  NodeAct() = default;
  NodeAct(NodeSpec& s, int64_t channels) {
    const auto it = s.strings.find("act");
    if (it == s.strings.end()) return;
    const auto f = fn_names().find(it->second);
    if (f == fn_names().end()) fail(s, "activation '" + it->second + "' is not known");
    act.fn = f->second;
    act.alpha = static_cast<float>(number(s, "act_alpha", 0));
    act.beta = static_cast<float>(number(s, "act_beta", 0));
    act.lo = static_cast<float>(number(s, "act_lo", -std::numeric_limits<float>::infinity()));
    act.hi = static_cast<float>(number(s, "act_hi", std::numeric_limits<float>::infinity()));
    act.limit = static_cast<float>(number(s, "act_limit", 0));
    param = take(s, "act_param", -1);
    const bool needs = act.fn == Fn::threshold || act.fn == Fn::prelu;
    if (needs != !param.empty() || (param.size() > 1 && static_cast<int64_t>(param.size()) != channels))
      fail(s, "activation parameters: " + std::to_string(param.size()) + " numbers for " +
                  std::to_string(channels) + " channels");
  }
  explicit operator bool() const { return act.fn != Fn::none; }
  // On channels [first, first + n) of one pixel.
  void apply(const Rows& rows, float* x, int64_t first, int64_t n) const {
    if (act.fn == Fn::none) return;
    const bool each = param.size() > 1;
    rows.activate(act, x, x, n, param.empty() ? nullptr : param.data() + (each ? first : 0), each ? 1 : 0);
  }
  void apply(const Rows& rows, const float* in, float* out, int64_t first, int64_t n) const {
    const bool each = param.size() > 1;
    rows.activate(act, in, out, n, param.empty() ? nullptr : param.data() + (each ? first : 0), each ? 1 : 0);
  }
};

inline size_t round_floats(int64_t n) { return static_cast<size_t>((n + 31) / 16 * 16); }

// Common to nodes that read and write maps, dense or packed, in blocks of channels.
class MapNode : public Node {
 protected:
  MapNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) : rows_(rows_for(isa)) {
    for (int v : s.inputs)
      if (value(values, v).layout == Layout::plain) fail(s, "'" + value(values, v).name + "' is not a map");
    if (value(values, s.output).layout == Layout::plain) fail(s, "the output is not a map");
    spec = std::move(s);
  }

  // Channels to work on at once: the output's blocks, else the input's, else all.
  static std::vector<BlockOf> cuts(const View& x, const View& y) {
    if (y.layout == Layout::packed) return blocks_of(y);
    if (x.layout == Layout::packed) return blocks_of(x);
    return {{0, 0, y.c()}};
  }

  // Row y of channels [first, first + width), as pixels `*stride` floats apart: the map's own memory, or
  // unpacked to `scratch` (w * (64 or width rounded) floats and one block more).
  static const float* load(const View& v, int64_t n, int64_t y, int64_t first, int64_t width, float* scratch,
                           int64_t* stride) {
    if (v.layout == Layout::map) {
      *stride = v.pixel();
      return v.row(n, y) + first;
    }
    *stride = (width + 15) / 16 * 16;
    const auto& blocks = v.packed->layout().blocks;
    for (size_t b = static_cast<size_t>(v.first_block); b < blocks.size(); ++b) {
      const int64_t from = blocks[b].first - v.first_channel, to = from + blocks[b].width;
      if (to <= first) continue;
      if (from >= first + width) break;
      if (from >= first && to <= first + width) {
        unpack_row(*v.packed, n, y, static_cast<int64_t>(b), scratch + (from - first), *stride);
        continue;
      }
      float* side = scratch + *stride * v.w();
      unpack_row(*v.packed, n, y, static_cast<int64_t>(b), side, 64);
      const int64_t a = std::max(from, first), e = std::min(to, first + width);
      for (int64_t x = 0; x < v.w(); ++x)
        std::memcpy(scratch + x * *stride + (a - first), side + x * 64 + (a - from),
                    static_cast<size_t>(e - a) * sizeof(float));
    }
    return scratch;
  }
  static int64_t load_floats(const View& v, int64_t width) {
    if (v.layout == Layout::map) return 0;
    return static_cast<int64_t>(round_floats(v.w() * ((width + 15) / 16 * 16) + v.w() * 64 + 64));
  }

  const Rows& rows_;
};

// A node whose output rows can be computed some at a time.
class RowsNode : public MapNode {
 public:
  using MapNode::MapNode;
  // Rows [y0, y1) of image n of y, from x, of which the rows that they need are there.
  virtual void run_rows(Context& c, const View& x, const View& y, int64_t n, int64_t y0, int64_t y1,
                        int threads) const = 0;
};

// op "pool" (pool.cpp).
std::unique_ptr<RowsNode> make_rows_pool(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa);
// op "pool" and "adaptive_pool" (pool.cpp).
std::unique_ptr<Node> make_pool_node(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa);

}  // namespace actzip::engine
