// The nodes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "common/thread_pool.h"
#include "engine/node_util.h"
#include "kernels/conv.h"

namespace actzip::engine {
namespace {

// --- convolution -------------------------------------------------------------------------------------------

struct Rewritten {  // a linear layer's rows as the pixels of a map
  int64_t ih, iw;
};
Rewritten as_pixels(int64_t rows) {
  for (int64_t iw : {32, 28, 24, 16, 49, 14, 7})
    if (rows > iw && rows % iw == 0) return {rows / iw, iw};
  return {1, rows};
}

ConvProblem conv_problem(const NodeSpec& s, const std::vector<ValueSpec>& values, const NodeAct& act,
                         int64_t oc, int64_t weights) {
  const ValueSpec &x = value(values, s.inputs[0]), &y = value(values, s.output);
  ConvProblem p;
  p.hint_density = x.layout == Layout::packed ? x.density : 1.0;
  if (s.op == "linear") {
    if (x.layout != Layout::plain || y.layout != Layout::plain || x.dims.empty())
      fail(s, "needs plain input and output");
    p.ic = x.dims.back();
    p.oc = y.dims.back();
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < x.dims.size(); ++i) rows *= x.dims[i];
    const Rewritten r = as_pixels(rows);
    p.hint_h = r.ih;
    p.hint_w = r.iw;
  } else {
    if (x.layout == Layout::plain || y.layout == Layout::plain) fail(s, "needs maps");
    const auto stride = list(s, "stride", 2, 1), dilation = list(s, "dilation", 2, 1),
               kernel = list(s, "kernel", 2, 1), padding = list(s, "padding", 4, 0);
    p.ic = x.dims[1];
    p.oc = y.dims[1];
    p.kh = kernel[0];
    p.kw = kernel[1];
    p.sh = stride[0];
    p.sw = stride[1];
    p.dh = dilation[0];
    p.dw = dilation[1];
    p.pad_top = padding[0];
    p.pad_left = padding[1];
    p.pad_bottom = padding[2];
    p.pad_right = padding[3];
    p.groups = one(s, "groups", 1);
    p.hint_h = x.dims[2];
    p.hint_w = x.dims[3];
    p.in_packed = x.layout == Layout::packed;
    p.out_packed = y.layout == Layout::packed;
    if (p.in_packed) {
      int root = s.inputs[0];
      int64_t at = 0;
      while (value(values, root).parent >= 0) {
        at += value(values, root).offset;
        root = value(values, root).parent;
      }
      const ValueSpec& r = value(values, root);
      for (const ChannelBlock& b : r.parts.empty() ? split_channels(r.dims[1]) : split_channels(r.parts))
        if (b.first >= at && b.first < at + p.ic) p.in_blocks.push_back(b);
    }
    if (p.groups < 1 || p.ic % p.groups != 0 || p.oc % p.groups != 0)
      fail(s, "groups do not divide the channels");
    if (p.out_h(x.dims[2]) != y.dims[2] || p.out_w(x.dims[3]) != y.dims[3])
      fail(s, "the output's size does not fit");
  }
  if (oc >= 0 && oc != p.oc) fail(s, "channels do not fit");
  if (weights >= 0 && weights != p.oc * (p.ic / p.groups) * p.kh * p.kw)
    fail(s, "weight has " + std::to_string(weights) + " numbers");
  switch (act.act.fn) {
    case Fn::relu:
      p.act = ActKind::relu;
      break;
    case Fn::clip:
      p.act = ActKind::clip;
      p.lo = act.act.lo;
      p.hi = act.act.hi;
      break;
    case Fn::threshold:
      if (std::isinf(act.act.hi)) {
        p.act = ActKind::threshold;
        p.lo = act.param[0];
        if (act.param.size() > 1) p.thresholds = act.param;
      }
      break;
    default:
      break;
  }
  return p;
}

class ConvNode final : public Node {
 public:
  ConvNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) : rows_(rows_for(isa)) {
    arity(s, 1, 2);
    linear_ = s.op == "linear";
    const ValueSpec& y = value(values, s.output);
    const int64_t oc = linear_ ? (y.dims.empty() ? 0 : y.dims.back()) : y.dims.size() == 4 ? y.dims[1] : 0;
    act_ = NodeAct(s, oc);
    const std::vector<float> own = take(s, "weight", -1), bias = take(s, "bias", -1);
    Borrowed weight{own.data(), own.size()};
    if (const auto lent = s.borrowed.find("weight"); lent != s.borrowed.end()) weight = lent->second;
    s.borrowed.clear();
    if (!bias.empty() && static_cast<int64_t>(bias.size()) != oc)
      fail(s, "bias has " + std::to_string(bias.size()) + " numbers");
    const ConvProblem p = conv_problem(s, values, act_, oc, static_cast<int64_t>(weight.size));
    later_ = act_ && p.act == ActKind::none;
    if (later_ && p.out_packed) fail(s, "this activation cannot be written packed");
    if (s.inputs.size() > 1) {
      same_shape(s, value(values, s.inputs[1]), y);
      if (linear_ && value(values, s.inputs[1]).layout != Layout::plain) fail(s, "residual is not plain");
      if (!linear_ && value(values, s.inputs[1]).layout == Layout::plain) fail(s, "residual is not a map");
    }
    const auto it = s.strings.find("variant");
    try {
      conv_ = Conv::make(p, it == s.strings.end() ? "" : it->second, weight.data,
                         bias.empty() ? nullptr : bias.data());
    } catch (const std::invalid_argument& e) {
      fail(s, e.what());
    }
    spec = std::move(s);
  }

  size_t weight_bytes() const override { return conv_->weight_bytes(); }
  std::string kernel() const override { return conv_->kernel().name; }
  std::string kind() const override { return conv_->kernel().kind; }
  size_t scratch(const Context& c, int threads) const override {
    return conv_->scratch_bytes(args(c, out(c)), threads);
  }
  const Conv& conv() const { return *conv_; }
  bool later() const { return later_; }  // an activation that the kernel does not do

  void run(Context& c, int threads) const override {
    const ConvArgs a = args(c, out(c));
    const int64_t items = conv_->items(a, threads);
    parallel_for(items, threads, [&](int64_t i, int worker) {
      conv_->run_item(a, threads, i, c.scratch_of(worker));
      if (later_) activate(a, conv_->part(a, threads, i));
    });
  }

  ConvArgs args(const Context& c, const View& y) const {
    ConvArgs a;
    const View& x = in(c);
    if (linear_) {
      const int64_t k = conv_->problem().ic;
      const Rewritten r = as_pixels(k == 0 ? 0 : x.count() / k);
      a.n = 1;
      a.ih = r.ih;
      a.iw = r.iw;
      a.in = x.data;
      a.in_stride = k;
      a.out = y.data;
      a.out_stride = conv_->problem().oc;
      if (spec.inputs.size() > 1) {
        a.residual = in(c, 1).data;
        a.residual_stride = conv_->problem().oc;
      }
      return a;
    }
    a.n = x.n();
    a.ih = x.h();
    a.iw = x.w();
    if (x.layout == Layout::packed) {
      a.in_map = x.packed;
      a.in_first_block = x.first_block;
    } else {
      a.in = x.data;
      a.in_stride = x.pixel();
    }
    if (y.layout == Layout::packed) {
      a.out_map = y.packed;
      a.out_first_block = y.first_block;
    } else {
      a.out = y.data;
      a.out_stride = y.pixel();
    }
    if (spec.inputs.size() > 1) {
      const View& r = in(c, 1);
      if (r.layout == Layout::packed) {
        a.residual_map = r.packed;
        a.residual_first_block = r.first_block;
      } else {
        a.residual = r.data;
        a.residual_stride = r.pixel();
      }
    }
    return a;
  }

 private:
  void activate(const ConvArgs& a, const ConvPart& part) const {
    const int64_t ow = conv_->problem().out_w(a.iw), oh = conv_->problem().out_h(a.ih);
    const int64_t pixels = part.rows * ow;
    float* x = a.out + (part.image * oh + part.first_row) * ow * a.out_stride + part.first;
    if (part.width == a.out_stride && act_.param.size() <= 1) {
      act_.apply(rows_, x, 0, pixels * part.width);
      return;
    }
    for (int64_t i = 0; i < pixels; ++i) act_.apply(rows_, x + i * a.out_stride, part.first, part.width);
  }

  const Rows& rows_;
  NodeAct act_;
  bool linear_ = false, later_ = false;
  std::unique_ptr<Conv> conv_;
};

// A convolution and the pool that alone reads it, by turns: some rows of the one, then those of the other
// that they allow. The map between is never there in whole: `band` rows of one image, which lie in the cache.
class ConvPoolNode final : public Node {
 public:
  ConvPoolNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) {
    NodeSpec conv = s, pool;
    conv.op = "conv";
    conv.output = mid_ = static_cast<int>(list(s, "band", 1, 0)[0]);
    pool.op = "pool";
    pool.name = s.name;
    pool.inputs = {mid_};
    pool.output = s.output;
    pool.strings["kind"] = s.strings["pool"];
    for (const char* key : {"kernel", "stride", "padding", "dilation"})
      pool.ints[key] = s.ints[std::string("pool_") + key];
    pool.ints["count_include_pad"] = s.ints["count_include_pad"];
    pool.ints["divisor"] = s.ints["divisor"];
    pool_ = make_rows_pool(pool, values, isa);
    stride_ = pool.ints["stride"][0];
    above_ = pool.ints["padding"][0];
    reach_ = (pool.ints["kernel"][0] - 1) * pool.ints["dilation"][0] + 1;
    const int64_t band = value(values, mid_).band;
    if (band < reach_) fail(s, "the band is lower than the window");
    step_ = (band - reach_) / stride_ + 1;
    conv_ = std::make_unique<ConvNode>(std::move(conv), values, isa);
    if (conv_->later()) fail(s, "this activation needs the whole map");
    s.arrays.clear();
    s.borrowed.clear();
    spec = std::move(s);
  }

  size_t weight_bytes() const override { return conv_->weight_bytes(); }
  std::string kernel() const override { return conv_->kernel(); }
  std::string kind() const override { return conv_->kind(); }
  size_t scratch(const Context& c, int threads) const override {
    size_t most = pool_->scratch(c, threads);
    turns(c.views[static_cast<size_t>(mid_)].h(), out(c).h(), [&](const Turn& t) {
      ConvArgs a = conv_->args(c, c.views[static_cast<size_t>(mid_)]);
      a.images = 1;
      a.first_row = t.have;
      a.rows = t.end - t.have;
      if (a.rows > 0) most = std::max(most, conv_->conv().scratch_bytes(a, threads));
    });
    return most;
  }

  void run(Context& c, int threads) const override {
    const View& y = out(c);
    View mid = c.views[static_cast<size_t>(mid_)];
    float* const base = mid.data;
    const int64_t row = mid.strides[2], height = mid.h();
    mid.strides[0] = 0;
    for (int64_t n = 0; n < y.n(); ++n) {
      int64_t from = 0;  // the row that lies at base
      turns(height, y.h(), [&](const Turn& t) {
        if (t.have > t.first && t.first > from)
          std::memmove(base, base + (t.first - from) * row,
                       static_cast<size_t>((t.have - t.first) * row) * sizeof(float));
        from = t.first;
        mid.data = base - from * row;
        if (t.end > t.have) {
          ConvArgs a = conv_->args(c, mid);
          a.out = mid.data - n * height * row;
          a.first_image = n;
          a.images = 1;
          a.first_row = t.have;
          a.rows = t.end - t.have;
          const Conv& conv = conv_->conv();
          parallel_for(conv.items(a, threads), threads,
                       [&](int64_t i, int worker) { conv.run_item(a, threads, i, c.scratch_of(worker)); });
        }
        pool_->run_rows(c, mid, y, n, t.y0, t.y1, threads);
      });
    }
  }

 private:
  struct Turn {
    int64_t y0, y1;            // rows of the pool's output
    int64_t first, have, end;  // of the map between: rows [first, end) are needed, [first, have) are there
  };
  template <class F>
  void turns(int64_t height, int64_t pooled, F&& f) const {
    int64_t have = 0;
    for (int64_t y0 = 0; y0 < pooled; y0 += step_) {
      Turn t{};
      t.y0 = y0;
      t.y1 = std::min(pooled, y0 + step_);
      t.first = std::clamp<int64_t>(y0 * stride_ - above_, 0, height);
      t.end = std::clamp<int64_t>((t.y1 - 1) * stride_ - above_ + reach_, t.first, height);
      t.have = std::max(have, t.first);
      t.end = std::max(t.end, t.have);
      f(t);
      have = t.end;
    }
  }

  std::unique_ptr<ConvNode> conv_;
  std::unique_ptr<RowsNode> pool_;
  int mid_ = -1;
  int64_t stride_ = 1, above_ = 0, reach_ = 1, step_ = 1;
};

// --- maps row by row ---------------------------------------------------------------------------------------

// Copies (dense <-> packed too) and y = act(scale * x + shift) per channel: copy, batch_norm, activation on
// maps.
class AffineNode final : public MapNode {
 public:
  AffineNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) : MapNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    act_ = NodeAct(spec, y.dims[1]);
    scale_ = take(spec, "scale", -1);
    shift_ = take(spec, "shift", -1);
    if (scale_.size() != shift_.size() ||
        (!scale_.empty() && static_cast<int64_t>(scale_.size()) != y.dims[1]))
      fail(spec, "scale and shift do not fit the channels");
  }
  size_t scratch(const Context& c, int) const override {
    const View &x = in(c), &y = out(c);
    size_t bytes = static_cast<size_t>(load_floats(x, 64)) * sizeof(float);
    if (y.layout == Layout::packed)
      bytes += round_floats(y.w() * 64) * sizeof(float) + pack_row_scratch_bytes(y.w());
    return bytes + 64;
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const auto blocks = cuts(x, y);
    const auto nb = static_cast<int64_t>(blocks.size());
    parallel_for(y.n() * y.h() * nb, threads, [&](int64_t i, int worker) {
      const BlockOf& b = blocks[static_cast<size_t>(i % nb)];
      const int64_t n = i / nb / y.h(), oy = i / nb % y.h();
      auto* scratch = reinterpret_cast<float*>(c.scratch_of(worker));
      int64_t stride = 0;
      const float* src = load(x, n, oy, b.first, b.width, scratch, &stride);
      float* rest = scratch + load_floats(x, 64);
      const bool plain = scale_.empty() && !act_;
      if (y.layout == Layout::packed && plain) {
        pack_row(*y.packed, n, oy, b.block, src, stride, rest);
        return;
      }
      float* dst = rest;
      int64_t dst_stride = 64;
      if (y.layout == Layout::map) {
        dst = y.row(n, oy) + b.first;
        dst_stride = y.pixel();
      }
      const float* scale = scale_.empty() ? nullptr : scale_.data() + b.first;
      const float* shift = scale_.empty() ? nullptr : shift_.data() + b.first;
      for (int64_t ox = 0; ox < y.w(); ++ox) {
        float* o = dst + ox * dst_stride;
        const float* p = src + ox * stride;
        if (scale != nullptr) {
          rows_.affine(p, o, scale, shift, b.width);
          act_.apply(rows_, o, b.first, b.width);
        } else {
          act_.apply(rows_, p, o, b.first, b.width);
        }
      }
      if (y.layout == Layout::packed)
        pack_row(*y.packed, n, oy, b.block, dst, 64, rest + round_floats(y.w() * 64));
    });
  }

 private:
  std::vector<float> scale_, shift_;
  NodeAct act_;
};

class ResizeNode final : public MapNode {
 public:
  ResizeNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) : MapNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    if (x.layout != Layout::map || y.layout != Layout::map) fail(spec, "needs dense maps");
    if (x.dims[1] != y.dims[1] || x.dims[0] != y.dims[0] || x.dims[2] < 1 || x.dims[3] < 1)
      fail(spec, "channels or images differ");
    // tables made by the caller: source indices and weights per output row and column
    for (int axis : {0, 1}) {
      const std::string k = axis == 0 ? "y" : "x";
      const auto n = static_cast<size_t>(y.dims[static_cast<size_t>(2 + axis)]);
      low_[axis] = list(spec, (k + "_low").c_str(), n, 0);
      high_[axis] = list(spec, (k + "_high").c_str(), n, 0);
      part_[axis] = take(spec, (k + "_part").c_str(), static_cast<int64_t>(n));
      for (size_t i = 0; i < n; ++i)
        if (std::max(low_[axis][i], high_[axis][i]) >= x.dims[static_cast<size_t>(2 + axis)])
          fail(spec, "source outside the map");
    }
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    parallel_for(y.n() * y.h(), threads, [&](int64_t i, int) {
      const int64_t n = i / y.h(), oy = i % y.h();
      const auto ry = static_cast<size_t>(oy);
      const float *top = x.row(n, low_[0][ry]), *bottom = x.row(n, high_[0][ry]);
      const float fy = part_[0][ry];
      for (int64_t ox = 0; ox < y.w(); ++ox) {
        const auto rx = static_cast<size_t>(ox);
        const float fx = part_[1][rx];
        const int64_t l = low_[1][rx] * x.pixel(), r = high_[1][rx] * x.pixel();
        float* o = y.row(n, oy) + ox * y.pixel();
        if (fx == 0.0f && fy == 0.0f) {
          std::memcpy(o, top + l, static_cast<size_t>(y.c()) * sizeof(float));
        } else {
          rows_.lerp4(o, top + l, top + r, bottom + l, bottom + r, (1 - fy) * (1 - fx), (1 - fy) * fx,
                      fy * (1 - fx), fy * fx, y.c());
        }
      }
    });
  }

 private:
  std::array<std::vector<int64_t>, 2> low_, high_;
  std::array<std::vector<float>, 2> part_;
};

// --- strided work on dense values
// ----------------------------------------------------------------------------

struct Loop {  // one dimension of the output: its size, and the steps of the operands
  int64_t size, out, a, b;
};

// Dimensions of size 1 go, the rest is ordered by the output's step (largest first) and merged where all
// operands allow.
std::vector<Loop> arranged(std::vector<Loop> loops) {
  loops.erase(std::remove_if(loops.begin(), loops.end(), [](const Loop& l) { return l.size == 1; }),
              loops.end());
  std::stable_sort(loops.begin(), loops.end(), [](const Loop& x, const Loop& y) { return x.out > y.out; });
  std::vector<Loop> merged;
  for (const Loop& l : loops) {
    if (!merged.empty()) {
      Loop& m = merged.back();
      if (m.out == l.out * l.size && m.a == l.a * l.size && m.b == l.b * l.size) {
        m = {m.size * l.size, l.out, l.a, l.b};
        continue;
      }
    }
    merged.push_back(l);
  }
  if (merged.empty()) merged.push_back({1, 1, 1, 1});
  return merged;
}

// f(out offset, a offset, b offset) for every index of all loops but the last `inner`.
template <class F>
void over(const std::vector<Loop>& loops, size_t inner, int threads, F f) {
  const size_t outer = loops.size() - inner;
  int64_t total = 1;
  for (size_t i = 0; i < outer; ++i) total *= loops[i].size;
  int64_t work = 1;
  for (size_t i = outer; i < loops.size(); ++i) work *= loops[i].size;
  const int64_t chunk = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, work));
  parallel_for((total + chunk - 1) / chunk, threads, [&](int64_t block, int) {
    for (int64_t at = block * chunk; at < std::min(total, (block + 1) * chunk); ++at) {
      int64_t rest = at, o = 0, a = 0, b = 0;
      for (size_t i = outer; i-- > 0;) {
        const int64_t k = rest % loops[i].size;
        rest /= loops[i].size;
        o += k * loops[i].out;
        a += k * loops[i].a;
        b += k * loops[i].b;
      }
      f(o, a, b);
    }
  });
}

void copy_strided(const Rows& rows, std::vector<Loop> loops, const float* src, float* dst, int threads) {
  for (const Loop& l : loops)
    if (l.size == 0) return;
  loops = arranged(std::move(loops));
  const Loop last = loops.back();
  if (last.out == 1 && last.a == 1) {
    over(loops, 1, threads, [&](int64_t o, int64_t a, int64_t) {
      std::memcpy(dst + o, src + a, static_cast<size_t>(last.size) * sizeof(float));
    });
    return;
  }
  // a transposition: the dimension that is contiguous in the source next to the last
  for (size_t i = 0; i + 1 < loops.size() && last.out == 1 && last.a != 0; ++i)
    if (loops[i].a == 1) {
      const Loop cols = loops[i];
      std::vector<Loop> order = loops;
      order.erase(order.begin() + static_cast<std::ptrdiff_t>(i));
      // split the source's contiguous dimension so that threads have something to share
      const int64_t piece = 64;
      const int64_t pieces = (cols.size + piece - 1) / piece;
      order.insert(order.begin(), Loop{pieces, cols.out * piece, piece, 0});
      const size_t outer = order.size() - 1;
      int64_t total = 1;
      for (size_t k = 0; k < outer; ++k) total *= order[k].size;
      parallel_for(total, threads, [&](int64_t at, int) {
        int64_t rest = at, o = 0, a = 0, first = 0;
        for (size_t k = outer; k-- > 0;) {
          const int64_t j = rest % order[k].size;
          rest /= order[k].size;
          o += j * order[k].out;
          a += j * order[k].a;
          if (k == 0) first = j;
        }
        const int64_t width = std::min(piece, cols.size - first * piece);
        rows.transpose(src + a, last.a, dst + o, cols.out, last.size, width);
      });
      return;
    }
  over(loops, 1, threads, [&](int64_t o, int64_t a, int64_t) {
    for (int64_t k = 0; k < last.size; ++k) dst[o + k * last.out] = src[a + k * last.a];
  });
}

class DenseNode : public Node {
 protected:
  DenseNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) : rows_(rows_for(isa)) {
    for (int v : s.inputs)
      if (value(values, v).layout == Layout::packed) fail(s, "'" + value(values, v).name + "' is packed");
    if (value(values, s.output).layout == Layout::packed) fail(s, "the output is packed");
    spec = std::move(s);
  }
  const Rows& rows_;
};

// copy, transpose (perm), slice (starts, steps), expand, concat (axis), pad (before; mode constant, reflect,
// edge), dilate
class MoveNode final : public DenseNode {
 public:
  MoveNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    NodeSpec& n = spec;
    const ValueSpec& y = value(values, n.output);
    rank_ = y.dims.size();
    if (n.op == "concat") {
      axis_ = static_cast<size_t>(one(n, "axis", 1));
      if (axis_ >= rank_ || n.inputs.empty()) fail(n, "axis or inputs");
      int64_t sum = 0;
      for (int v : n.inputs) {
        const ValueSpec& x = value(values, v);
        if (x.dims.size() != rank_) fail(n, "ranks differ");
        for (size_t d = 0; d < rank_; ++d)
          if (d != axis_ && (x.dims[d] != y.dims[d] || x.batch[d] != y.batch[d])) fail(n, "sizes differ");
        sum += x.dims[axis_];
      }
      const auto offsets =
          n.ints.find("offsets");  // where each input goes; the rest of the output is another's
      if (offsets != n.ints.end()) {
        offsets_ = list(n, "offsets", n.inputs.size(), 0);
        for (size_t i = 0; i < offsets_.size(); ++i)
          if (offsets_[i] + value(values, n.inputs[i]).dims[axis_] > y.dims[axis_])
            fail(n, "outside the output");
      } else {
        if (sum != y.dims[axis_]) fail(n, "sizes do not add up");
        int64_t at = 0;
        for (int v : n.inputs) {
          offsets_.push_back(at);
          at += value(values, v).dims[axis_];
        }
      }
      return;
    }
    arity(n, 1, 1);
    const ValueSpec& x = value(values, n.inputs[0]);
    if (n.op == "transpose") {
      perm_ = list(n, "perm", rank_, 0);
      std::vector<bool> seen(rank_, false);
      if (x.dims.size() != rank_) fail(n, "ranks differ");
      for (size_t d = 0; d < rank_; ++d) {
        const auto p = static_cast<size_t>(perm_[d]);
        if (p >= rank_ || seen[p]) fail(n, "perm is no permutation");
        seen[p] = true;
        if (x.dims[p] != y.dims[d] || x.batch[p] != y.batch[d]) fail(n, "sizes differ");
      }
    } else if (n.op == "slice" || n.op == "dilate") {
      if (x.dims.size() != rank_) fail(n, "ranks differ");
      starts_ = list(n, "starts", rank_, 0);
      steps_ = list(n, "steps", rank_, 1);
      for (size_t d = 0; d < rank_; ++d) {
        const bool whole =
            starts_[d] == 0 && steps_[d] == 1 && x.dims[d] == y.dims[d] && x.batch[d] == y.batch[d];
        if (whole) continue;
        const ValueSpec &small = n.op == "slice" ? y : x, &large = n.op == "slice" ? x : y;
        if (x.batch[d] || y.batch[d]) fail(n, "the batch cannot be cut");
        if (small.dims[d] > 0 && starts_[d] + (small.dims[d] - 1) * steps_[d] >= large.dims[d])
          fail(n, "outside the tensor");
      }
    } else if (n.op == "expand") {
      if (x.dims.size() > rank_) fail(n, "ranks differ");
      for (size_t d = 0; d < x.dims.size(); ++d) {
        const size_t e = d + rank_ - x.dims.size();
        if (!(x.dims[d] == 1 && !x.batch[d]) && (x.dims[d] != y.dims[e] || x.batch[d] != y.batch[e]))
          fail(n, "sizes differ");
      }
    } else if (n.op == "pad") {
      if (x.dims.size() != rank_) fail(n, "ranks differ");
      before_ = list(n, "before", rank_, -(int64_t{1} << 30));
      mode_ = n.strings["mode"];
      fill_ = static_cast<float>(number(n, "value", 0));
      if (mode_ != "constant" && mode_ != "reflect" && mode_ != "edge") fail(n, "mode '" + mode_ + "'");
      for (size_t d = 0; d < rank_; ++d)
        if ((before_[d] != 0 || x.dims[d] != y.dims[d]) && (x.batch[d] || y.batch[d]))
          fail(n, "the batch cannot be padded");
      if (mode_ != "constant")
        for (size_t d = 0; d < rank_; ++d) {
          const int64_t after = y.dims[d] - x.dims[d] - before_[d];
          const int64_t most = mode_ == "reflect" ? x.dims[d] - 1 : (int64_t{1} << 30);
          if (x.dims[d] < 1 || before_[d] > most || after > most) fail(n, "padding wider than the tensor");
        }
    } else if (n.op == "copy") {
      same_shape(n, x, y);
    } else {
      fail(n, "is not known");
    }
  }

  void run(Context& c, int threads) const override {
    const View& y = out(c);
    const NodeSpec& n = spec;
    if (n.op == "concat") {
      for (size_t k = 0; k < n.inputs.size(); ++k) {
        const View& x = in(c, k);
        float* dst = y.data + offsets_[k] * y.strides[axis_];
        if (dst == x.data) continue;  // placed
        std::vector<Loop> loops;
        for (size_t d = 0; d < rank_; ++d) loops.push_back({x.dims[d], y.strides[d], x.strides[d], 0});
        copy_strided(rows_, std::move(loops), x.data, dst, threads);
      }
      return;
    }
    const View& x = in(c);
    std::vector<Loop> loops;
    const float* src = x.data;
    float* dst = y.data;
    if (n.op == "transpose") {
      for (size_t d = 0; d < rank_; ++d)
        loops.push_back({y.dims[d], y.strides[d], x.strides[static_cast<size_t>(perm_[d])], 0});
    } else if (n.op == "slice") {
      for (size_t d = 0; d < rank_; ++d) {
        src += starts_[d] * x.strides[d];
        loops.push_back({y.dims[d], y.strides[d], x.strides[d] * steps_[d], 0});
      }
    } else if (n.op == "dilate") {
      fill(y, 0.0f, threads);
      for (size_t d = 0; d < rank_; ++d) {
        dst += starts_[d] * y.strides[d];
        loops.push_back({x.dims[d], y.strides[d] * steps_[d], x.strides[d], 0});
      }
    } else if (n.op == "expand") {
      const size_t missing = rank_ - static_cast<size_t>(x.rank);
      for (size_t d = 0; d < rank_; ++d) {
        const bool there = d >= missing && x.dims[d - missing] != 1;
        loops.push_back({y.dims[d], y.strides[d], there ? x.strides[d - missing] : 0, 0});
      }
    } else if (n.op == "pad") {
      if (mode_ != "constant") return pad_mirrored(x, y, threads);
      fill(y, fill_, threads);
      for (size_t d = 0; d < rank_; ++d) {
        const int64_t from = std::max<int64_t>(0, -before_[d]),
                      to = std::min(x.dims[d], y.dims[d] - before_[d]);
        if (to <= from) return;
        src += from * x.strides[d];
        dst += (from + before_[d]) * y.strides[d];
        loops.push_back({to - from, y.strides[d], x.strides[d], 0});
      }
    } else {
      for (size_t d = 0; d < rank_; ++d) loops.push_back({y.dims[d], y.strides[d], x.strides[d], 0});
    }
    copy_strided(rows_, std::move(loops), src, dst, threads);
  }

 private:
  void fill(const View& y, float number, int threads) const {
    std::vector<Loop> loops;
    for (int d = 0; d < y.rank; ++d)
      loops.push_back({y.dims[static_cast<size_t>(d)], y.strides[static_cast<size_t>(d)], 0, 0});
    copy_strided(rows_, std::move(loops), &number, y.data, threads);
  }
  void pad_mirrored(const View& x, const View& y, int threads) const {
    const bool reflect = mode_ == "reflect";
    std::vector<std::vector<int64_t>> from(rank_);
    for (size_t d = 0; d < rank_; ++d)
      for (int64_t i = 0; i < y.dims[d]; ++i) {
        int64_t k = i - before_[d];
        const int64_t top = x.dims[d] - 1;
        if (k < 0) k = reflect ? -k : 0;
        if (k > top) k = reflect ? 2 * top - k : top;
        from[d].push_back(k * x.strides[d]);
      }
    const size_t last = rank_ - 1;
    int64_t outer = 1;
    for (size_t d = 0; d < last; ++d) outer *= y.dims[d];
    parallel_for(outer, threads, [&](int64_t at, int) {
      int64_t rest = at, o = 0, a = 0;
      for (size_t d = last; d-- > 0;) {
        const int64_t k = rest % y.dims[d];
        rest /= y.dims[d];
        o += k * y.strides[d];
        a += from[d][static_cast<size_t>(k)];
      }
      for (int64_t k = 0; k < y.dims[last]; ++k)
        y.data[o + k * y.strides[last]] = x.data[a + from[last][static_cast<size_t>(k)]];
    });
  }

  size_t rank_ = 0, axis_ = 0;
  std::vector<int64_t> offsets_, perm_, starts_, steps_, before_;
  std::string mode_;
  float fill_ = 0;
};

// Any dense layouts, broadcasting; then an activation without per-channel numbers (or with, on maps).
class BinaryNode final : public DenseNode {
 public:
  BinaryNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa)
      : DenseNode(std::move(s), values, isa) {
    arity(spec, 2, 2);
    static const std::unordered_map<std::string, BinaryFn> names = {
        {"add", BinaryFn::add}, {"sub", BinaryFn::sub}, {"mul", BinaryFn::mul}, {"div", BinaryFn::div},
        {"max", BinaryFn::max}, {"min", BinaryFn::min}, {"pow", BinaryFn::pow}};
    const auto it = names.find(spec.strings["kind"]);
    if (it == names.end()) fail(spec, "kind '" + spec.strings["kind"] + "' is not known");
    fn_ = it->second;
    const ValueSpec& y = value(values, spec.output);
    for (int v : spec.inputs) {
      const ValueSpec& x = value(values, v);
      if (x.dims.size() > y.dims.size()) fail(spec, "'" + x.name + "' does not broadcast");
      for (size_t d = 0; d < x.dims.size(); ++d) {
        const size_t e = d + y.dims.size() - x.dims.size();
        if (!(x.dims[d] == 1 && !x.batch[d]) && (x.dims[d] != y.dims[e] || x.batch[d] != y.batch[e]))
          fail(spec, "'" + x.name + "' does not broadcast");
      }
    }
    act_ = NodeAct(spec, -1);
    if (act_.param.size() > 1) fail(spec, "an activation with numbers per channel");
  }
  void run(Context& c, int threads) const override {
    const View &a = in(c, 0), &b = in(c, 1), &y = out(c);
    auto step = [&](const View& v, int d) -> int64_t {
      const int e = d - (y.rank - v.rank);
      return e < 0 || v.dims[static_cast<size_t>(e)] == 1 ? 0 : v.strides[static_cast<size_t>(e)];
    };
    std::vector<Loop> loops;
    for (int d = 0; d < y.rank; ++d) {
      if (y.dims[static_cast<size_t>(d)] == 0) return;
      loops.push_back(
          {y.dims[static_cast<size_t>(d)], y.strides[static_cast<size_t>(d)], step(a, d), step(b, d)});
    }
    loops = arranged(std::move(loops));
    const Loop last = loops.back();
    const bool direct = last.out == 1 && last.a <= 1 && last.b <= 1;
    // long rows are cut so that threads have something to share
    if (direct && loops.size() == 1 && last.size > 8192) {
      const int64_t piece = 4096;
      parallel_for((last.size + piece - 1) / piece, threads, [&](int64_t i, int) {
        const int64_t at = i * piece, n = std::min(piece, last.size - at);
        rows_.binary(fn_, a.data + at * last.a, last.a, b.data + at * last.b, last.b, y.data + at, n);
        act_.apply(rows_, y.data + at, 0, n);
      });
      return;
    }
    over(loops, 1, threads, [&](int64_t o, int64_t pa, int64_t pb) {
      if (direct) {
        rows_.binary(fn_, a.data + pa, last.a, b.data + pb, last.b, y.data + o, last.size);
        act_.apply(rows_, y.data + o, 0, last.size);
        return;
      }
      for (int64_t k = 0; k < last.size; ++k) {
        float* p = y.data + o + k * last.out;
        rows_.binary(fn_, a.data + pa + k * last.a, 0, b.data + pb + k * last.b, 0, p, 1);
        act_.apply(rows_, p, 0, 1);
      }
    });
  }

 private:
  BinaryFn fn_ = BinaryFn::add;
  NodeAct act_;
};

// An activation on plain values (per-channel numbers: dimension 1).
class ActivateNode final : public DenseNode {
 public:
  ActivateNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa)
      : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    if (x.layout != Layout::plain || y.layout != Layout::plain) fail(spec, "needs plain values");
    act_ = NodeAct(spec, y.dims.size() > 1 ? y.dims[1] : -1);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t total = y.count();
    if (act_.param.size() <= 1) {
      const int64_t piece = 4096;
      parallel_for((total + piece - 1) / piece, threads, [&](int64_t i, int) {
        act_.apply(rows_, x.data + i * piece, y.data + i * piece, 0, std::min(piece, total - i * piece));
      });
      return;
    }
    const int64_t channels = y.dims[1], inner = y.strides[1];
    parallel_for(y.dims[0], threads, [&](int64_t n, int) {
      for (int64_t ch = 0; ch < channels; ++ch) {
        const int64_t at = n * y.strides[0] + ch * inner;
        rows_.activate(act_.act, x.data + at, y.data + at, inner, act_.param.data() + ch, 0);
      }
    });
  }

 private:
  NodeAct act_;
};

class MatMulNode final : public DenseNode {
 public:
  MatMulNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa)
      : DenseNode(std::move(s), values, isa) {
    arity(spec, 2, 2);
    for (int v : {spec.inputs[0], spec.inputs[1], spec.output})
      if (value(values, v).layout != Layout::plain || value(values, v).dims.size() < 2)
        fail(spec, "needs plain matrices");
    const ValueSpec &a = value(values, spec.inputs[0]), &b = value(values, spec.inputs[1]),
                    &y = value(values, spec.output);
    auto at = [](const ValueSpec& v, size_t from_end) { return v.dims[v.dims.size() - from_end]; };
    auto is_batch = [](const ValueSpec& v, size_t from_end) { return v.batch[v.batch.size() - from_end]; };
    if (at(a, 1) != at(b, 2) || at(a, 2) != at(y, 2) || at(b, 1) != at(y, 1) ||
        is_batch(a, 1) != is_batch(b, 2) || is_batch(a, 2) != is_batch(y, 2) ||
        is_batch(b, 1) != is_batch(y, 1))
      fail(spec, "matrices do not fit");
    for (const ValueSpec* v : {&a, &b})
      for (size_t d = 3; d <= v->dims.size(); ++d) {
        if (d > y.dims.size()) fail(spec, "ranks do not fit");
        if (!(at(*v, d) == 1 && !is_batch(*v, d)) &&
            (at(*v, d) != at(y, d) || is_batch(*v, d) != is_batch(y, d)))
          fail(spec, "leading sizes do not fit");
      }
  }
  void run(Context& c, int threads) const override {
    const View &a = in(c, 0), &b = in(c, 1), &y = out(c);
    const auto ra = static_cast<size_t>(a.rank), rb = static_cast<size_t>(b.rank),
               ry = static_cast<size_t>(y.rank);
    const int64_t m = y.dims[ry - 2], n = y.dims[ry - 1], k = a.dims[ra - 1];
    int64_t outer = 1;
    for (size_t d = 0; d + 2 < ry; ++d) outer *= y.dims[d];
    auto offset = [&](const View& v, size_t rank, int64_t index) {
      int64_t rest = index, at = 0;
      for (size_t d = 3; d <= ry; ++d) {
        const int64_t i = rest % y.dims[ry - d];
        rest /= y.dims[ry - d];
        if (d <= rank && v.dims[rank - d] != 1) at += i * v.strides[rank - d];
      }
      return at;
    };
    parallel_for(outer * m, threads, [&](int64_t i, int) {
      const int64_t o = i / m, row = i % m;
      rows_.vec_mat(y.data + offset(y, ry, o) + row * n, a.data + offset(a, ra, o) + row * k, 1,
                    b.data + offset(b, rb, o), n, k, n);
    });
  }
};

// softmax (axis, log), layer_norm (tail of plain values, or channels of maps), reduce (kind, axes): lines of
// a dense value.
class LineNode final : public DenseNode {
 public:
  LineNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    log_ = one(spec, "log", 0) != 0;
    softmax_ = spec.op == "softmax";
    if (softmax_) {
      axis_ = static_cast<size_t>(one(spec, "axis", -1));
      if (axis_ >= x.dims.size() || x.batch[axis_]) fail(spec, "axis");
      return;
    }
    eps_ = static_cast<float>(number(spec, "eps", 1e-5));
    tail_ = static_cast<size_t>(one(spec, "tail", 1));
    channels_ = one(spec, "channels", 0) != 0;
    int64_t size = 1;
    if (channels_) {
      if (x.layout != Layout::map || y.layout != Layout::map) fail(spec, "needs maps");
      size = x.dims[1];
    } else {
      if (x.layout != Layout::plain || y.layout != Layout::plain || tail_ < 1 || tail_ > x.dims.size())
        fail(spec, "needs plain values");
      for (size_t d = x.dims.size() - tail_; d < x.dims.size(); ++d) {
        if (x.batch[d]) fail(spec, "the batch is not normalised over");
        size *= x.dims[d];
      }
    }
    weight_ = take(spec, "weight", -1);
    bias_ = take(spec, "bias", -1);
    if ((!weight_.empty() && static_cast<int64_t>(weight_.size()) != size) ||
        (!bias_.empty() && static_cast<int64_t>(bias_.size()) != size))
      fail(spec, "weight or bias does not fit");
    size_ = size;
  }
  size_t scratch(const Context& c, int) const override {
    return softmax_ ? round_floats(in(c).dims[axis_]) * sizeof(float) : 0;
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    if (softmax_) {
      std::vector<Loop> loops;
      for (size_t d = 0; d < static_cast<size_t>(x.rank); ++d)
        if (d != axis_) loops.push_back({y.dims[d], y.strides[d], x.strides[d], 0});
      const int64_t n = x.dims[axis_], sx = x.strides[axis_], sy = y.strides[axis_];
      int64_t total = 1;
      for (const Loop& l : loops) total *= l.size;
      parallel_for(total, threads, [&](int64_t at, int worker) {
        int64_t rest = at, o = 0, a = 0;
        for (size_t i = loops.size(); i-- > 0;) {
          const int64_t k = rest % loops[i].size;
          rest /= loops[i].size;
          o += k * loops[i].out;
          a += k * loops[i].a;
        }
        auto* line = reinterpret_cast<float*>(c.scratch_of(worker));
        for (int64_t i = 0; i < n; ++i) line[i] = x.data[a + i * sx];
        rows_.softmax(line, n, log_);
        for (int64_t i = 0; i < n; ++i) y.data[o + i * sy] = line[i];
      });
      return;
    }
    const float* w = weight_.empty() ? nullptr : weight_.data();
    const float* b = bias_.empty() ? nullptr : bias_.data();
    if (channels_) {
      parallel_for(x.n() * x.h(), threads, [&](int64_t i, int) {
        const float* src = x.row(i / x.h(), i % x.h());
        float* dst = y.row(i / x.h(), i % x.h());
        for (int64_t p = 0; p < x.w(); ++p)
          rows_.layer_norm(src + p * x.pixel(), dst + p * y.pixel(), size_, w, b, eps_);
      });
      return;
    }
    const int64_t lines = size_ == 0 ? 0 : x.count() / size_;
    parallel_for((lines + 7) / 8, threads, [&](int64_t i, int) {
      for (int64_t l = i * 8; l < std::min(lines, i * 8 + 8); ++l)
        rows_.layer_norm(x.data + l * size_, y.data + l * size_, size_, w, b, eps_);
    });
  }

 private:
  bool softmax_ = false, log_ = false, channels_ = false;
  size_t axis_ = 0, tail_ = 1;
  int64_t size_ = 0;
  float eps_ = 1e-5f;
  std::vector<float> weight_, bias_;
};

class GroupNormNode final : public DenseNode {
 public:
  GroupNormNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa)
      : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    groups_ = one(spec, "groups", 0);
    if (x.dims.size() < 2 || groups_ < 1 || x.dims[1] % groups_ != 0)
      fail(spec, "groups do not divide the channels");
    for (size_t d = 1; d < x.dims.size(); ++d)
      if (x.batch[d]) fail(spec, "the batch is not normalised over");
    eps_ = static_cast<float>(number(spec, "eps", 1e-5));
    weight_ = take(spec, "weight", -1);
    bias_ = take(spec, "bias", -1);
    for (const auto* v : {&weight_, &bias_})
      if (!v->empty() && static_cast<int64_t>(v->size()) != x.dims[1])
        fail(spec, "weight or bias does not fit");
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t each = x.dims[1] / groups_;
    int64_t inner = 1;
    for (int d = 2; d < x.rank; ++d) inner *= x.dims[static_cast<size_t>(d)];
    // all further dimensions as one: contiguous behind each other in both layouts
    const int64_t sx = x.rank > 2 ? x.strides[static_cast<size_t>(x.rank - 1)] : 1;
    const int64_t sy = y.rank > 2 ? y.strides[static_cast<size_t>(y.rank - 1)] : 1;
    parallel_for(x.dims[0] * groups_, threads, [&](int64_t i, int) {
      const int64_t n = i / groups_, g = i % groups_;
      double sum = 0, square = 0;
      for (int64_t ch = g * each; ch < (g + 1) * each; ++ch)
        for (int64_t k = 0; k < inner; ++k) sum += x.data[n * x.strides[0] + ch * x.strides[1] + k * sx];
      const double mean = sum / static_cast<double>(each * inner);
      for (int64_t ch = g * each; ch < (g + 1) * each; ++ch)
        for (int64_t k = 0; k < inner; ++k) {
          const double d = x.data[n * x.strides[0] + ch * x.strides[1] + k * sx] - mean;
          square += d * d;
        }
      const auto scale = static_cast<float>(
          1.0 / std::sqrt(square / static_cast<double>(each * inner) + static_cast<double>(eps_)));
      const auto m = static_cast<float>(mean);
      for (int64_t ch = g * each; ch < (g + 1) * each; ++ch) {
        const float w = weight_.empty() ? 1.0f : weight_[static_cast<size_t>(ch)];
        const float b = bias_.empty() ? 0.0f : bias_[static_cast<size_t>(ch)];
        for (int64_t k = 0; k < inner; ++k)
          y.data[n * y.strides[0] + ch * y.strides[1] + k * sy] =
              (x.data[n * x.strides[0] + ch * x.strides[1] + k * sx] - m) * scale * w + b;
      }
    });
  }

 private:
  int64_t groups_ = 1;
  float eps_ = 1e-5f;
  std::vector<float> weight_, bias_;
};

class LrnNode final : public DenseNode {
 public:
  LrnNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    if (x.layout != Layout::map || y.layout != Layout::map) fail(spec, "needs maps");
    size_ = one(spec, "size", 0);
    if (size_ < 1) fail(spec, "size");
    alpha_ = number(spec, "alpha", 1e-4);
    beta_ = number(spec, "beta", 0.75);
    k_ = number(spec, "k", 1);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t before = size_ / 2, after = (size_ - 1) / 2;
    parallel_for(x.n() * x.h(), threads, [&](int64_t i, int) {
      for (int64_t p = 0; p < x.w(); ++p) {
        const float* src = x.row(i / x.h(), i % x.h()) + p * x.pixel();
        float* dst = y.row(i / x.h(), i % x.h()) + p * y.pixel();
        for (int64_t ch = 0; ch < x.c(); ++ch) {
          float sum = 0;
          for (int64_t k = std::max<int64_t>(0, ch - before); k <= std::min(x.c() - 1, ch + after); ++k)
            sum += src[k] * src[k];
          dst[ch] = src[ch] / std::pow(static_cast<float>(k_) +
                                           static_cast<float>(alpha_ / static_cast<double>(size_)) * sum,
                                       static_cast<float>(beta_));
        }
      }
    });
  }

 private:
  int64_t size_ = 1;
  double alpha_ = 0, beta_ = 0, k_ = 1;
};

class ReduceNode final : public DenseNode {
 public:
  ReduceNode(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa)
      : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    kind_ = spec.strings["kind"];
    static const std::vector<std::string> kinds = {"mean", "sum", "max",        "min",        "prod",
                                                   "l1",   "l2",  "sum_square", "log_sum_exp"};
    if (std::find(kinds.begin(), kinds.end(), kind_) == kinds.end())
      fail(spec, "kind '" + kind_ + "' is not known");
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    const auto it = spec.ints.find("axes");
    if (it == spec.ints.end()) fail(spec, "axes are missing");
    gone_.assign(x.dims.size(), false);
    for (int64_t a : it->second) {
      if (a < 0 || a >= static_cast<int64_t>(x.dims.size()) || x.batch[static_cast<size_t>(a)])
        fail(spec, "axes");
      gone_[static_cast<size_t>(a)] = true;
    }
    std::vector<int64_t> kept;
    for (size_t d = 0; d < x.dims.size(); ++d)
      if (!gone_[d] && !(x.dims[d] == 1 && !x.batch[d])) kept.push_back(x.dims[d]);
    std::vector<int64_t> have;
    for (size_t d = 0; d < y.dims.size(); ++d)
      if (!(y.dims[d] == 1 && !y.batch[d])) have.push_back(y.dims[d]);
    if (kept != have || y.layout != Layout::plain) fail(spec, "the output's shape does not fit");
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    std::vector<Loop> outer, inner;
    for (size_t d = 0; d < gone_.size(); ++d)
      (gone_[d] ? inner : outer).push_back({x.dims[d], x.strides[d], x.strides[d], 0});
    std::stable_sort(inner.begin(), inner.end(), [](const Loop& p, const Loop& q) { return p.a > q.a; });
    int64_t count = 1, total = y.count();
    for (const Loop& l : inner) count *= l.size;
    parallel_for(total, threads, [&](int64_t at, int) {
      int64_t rest = at, a = 0;
      for (size_t i = outer.size(); i-- > 0;) {
        a += rest % outer[i].size * outer[i].a;
        rest /= outer[i].size;
      }
      double acc = kind_ == "prod" ? 1.0 : 0.0;
      float best =
          kind_ == "max" ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::infinity();
      if (kind_ == "log_sum_exp") best = -std::numeric_limits<float>::infinity();
      auto each = [&](auto f) {
        for (int64_t k = 0; k < count; ++k) {
          int64_t r = k, o = a;
          for (size_t i = inner.size(); i-- > 0;) {
            o += r % inner[i].size * inner[i].a;
            r /= inner[i].size;
          }
          f(x.data[o]);
        }
      };
      float result = 0;
      if (kind_ == "mean" || kind_ == "sum") {
        each([&](float v) { acc += v; });
        result = static_cast<float>(kind_ == "mean" ? acc / static_cast<double>(count) : acc);
      } else if (kind_ == "max") {
        each([&](float v) { best = v > best || v != v ? v : best; });
        result = best;
      } else if (kind_ == "min") {
        each([&](float v) { best = v < best || v != v ? v : best; });
        result = best;
      } else if (kind_ == "prod") {
        each([&](float v) { acc *= v; });
        result = static_cast<float>(acc);
      } else if (kind_ == "l1") {
        each([&](float v) { acc += std::fabs(v); });
        result = static_cast<float>(acc);
      } else if (kind_ == "log_sum_exp") {
        each([&](float v) { best = v > best || v != v ? v : best; });
        const float top = std::isinf(best) ? 0.0f : best;
        each([&](float v) { acc += std::exp(static_cast<double>(v - top)); });
        result = static_cast<float>(std::log(acc)) + top;
      } else {
        each([&](float v) { acc += static_cast<double>(v) * v; });
        result = static_cast<float>(kind_ == "l2" ? std::sqrt(acc) : acc);
      }
      y.data[at] = result;
    });
  }

 private:
  std::string kind_;
  std::vector<bool> gone_;
};

}  // namespace

std::unique_ptr<Node> make_node(NodeSpec s, const std::vector<ValueSpec>& values, Isa isa) {
  const std::string op = s.op;
  const bool maps = value(values, s.output).layout != Layout::plain && !s.inputs.empty() &&
                    value(values, s.inputs[0]).layout != Layout::plain;
  const bool packed = value(values, s.output).layout == Layout::packed ||
                      (!s.inputs.empty() && value(values, s.inputs[0]).layout == Layout::packed);
  if (op == "conv" || op == "linear") return std::make_unique<ConvNode>(std::move(s), values, isa);
  if (op == "conv_pool") return std::make_unique<ConvPoolNode>(std::move(s), values, isa);
  if (op == "pool" || op == "adaptive_pool") return make_pool_node(std::move(s), values, isa);
  if (op == "batch_norm" || (op == "activation" && maps) || (op == "copy" && packed))
    return std::make_unique<AffineNode>(std::move(s), values, isa);
  if (op == "activation") return std::make_unique<ActivateNode>(std::move(s), values, isa);
  if (op == "resize") return std::make_unique<ResizeNode>(std::move(s), values, isa);
  if (op == "binary") return std::make_unique<BinaryNode>(std::move(s), values, isa);
  if (op == "matmul") return std::make_unique<MatMulNode>(std::move(s), values, isa);
  if (op == "softmax" || op == "layer_norm") return std::make_unique<LineNode>(std::move(s), values, isa);
  if (op == "group_norm") return std::make_unique<GroupNormNode>(std::move(s), values, isa);
  if (op == "lrn") return std::make_unique<LrnNode>(std::move(s), values, isa);
  if (op == "reduce") return std::make_unique<ReduceNode>(std::move(s), values, isa);
  return std::make_unique<MoveNode>(std::move(s), values, isa);
}

std::vector<std::string> node_variants(const NodeSpec& spec, const std::vector<ValueSpec>& values) {
  NodeSpec s = spec;
  if (s.inputs.empty()) fail(s, "no input");
  const ValueSpec& y = values.at(static_cast<size_t>(s.output));
  const int64_t oc = s.op == "linear" ? y.dims.back() : y.dims.at(1);
  const NodeAct act(s, oc);
  return conv_variants(conv_problem(s, values, act, -1, -1));
}

}  // namespace actzip::engine
