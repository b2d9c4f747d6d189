// A convolution and the pool or depthwise convolution that alone reads it, by turns: some rows of the one,
// then those of the other that they allow. The map between is never there in whole: `band` rows of one image,
// which lie in the cache.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "engine/nodes/conv.h"
#include "engine/nodes/map_node.h"

namespace actzip::engine {
namespace {

// The convolution, and by which rows the node behind it reads what it computes.
class TurnsNode : public Node {
 public:
  void weights(Weights* found) const override { conv_->weights(found); }
  std::string kernel() const override { return conv_->kernel(); }
  std::string kind() const override { return conv_->kind(); }
  size_t scratch(const Context& c, int threads) const override {
    size_t most = 0;
    turns(c.views[static_cast<size_t>(mid_)].h(), out(c).h(), [&](const Turn& t) {
      ConvArgs a = conv_->args(c, c.views[static_cast<size_t>(mid_)]);
      a.images = 1;
      a.first_row = t.have;
      a.rows = t.end - t.have;
      if (a.rows > 0) most = std::max(most, conv_->conv().scratch_bytes(a, threads));
      most = std::max(most, next_scratch(c, t.y0, t.y1, threads));
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
          conv_->run_part(c, a, threads);
        }
        next_rows(c, mid, n, t.y0, t.y1, threads);
      });
    }
  }

 protected:
  struct Rows {  // of the map between: the window's, and those between the windows of output rows
    int64_t stride, above, reach;
  };
  // The convolution of `s`, whose output is the map between.
  void begin(NodeSpec conv, const Values& values, Isa isa, Rows rows) {
    conv.op = "conv";
    conv.output = mid_ = static_cast<int>(list(conv, "band", 1, 0)[0]);
    rows_ = rows;
    const int64_t band = value(values, mid_).band;
    if (band < rows.reach) fail(conv, "the band is lower than the window");
    step_ = (band - rows.reach) / rows.stride + 1;
    conv_ = make_conv_kernel(std::move(conv), values, isa);
  }
  // Rows [y0, y1) of the output: of image n, from the map between.
  virtual size_t next_scratch(const Context& c, int64_t y0, int64_t y1, int threads) const = 0;
  virtual void next_rows(Context& c, const View& mid, int64_t n, int64_t y0, int64_t y1,
                         int threads) const = 0;

  std::unique_ptr<KernelNode> conv_;
  int mid_ = -1;

 private:
  struct Turn {
    int64_t y0, y1;            // rows of the output
    int64_t first, have, end;  // of the map between: rows [first, end) are needed, [first, have) are there
  };
  template <class F>
  void turns(int64_t height, int64_t high, F&& f) const {
    int64_t have = 0;
    for (int64_t y0 = 0; y0 < high; y0 += step_) {
      Turn t{};
      t.y0 = y0;
      t.y1 = std::min(high, y0 + step_);
      t.first = std::clamp<int64_t>(y0 * rows_.stride - rows_.above, 0, height);
      t.end = std::clamp<int64_t>((t.y1 - 1) * rows_.stride - rows_.above + rows_.reach, t.first, height);
      t.have = std::max(have, t.first);
      t.end = std::max(t.end, t.have);
      f(t);
      have = t.end;
    }
  }

  Rows rows_{1, 0, 1};
  int64_t step_ = 1;
};

// What belongs to the window of `kernel`, ...: of a pool or a convolution.
int64_t reach(const std::vector<int64_t>& kernel, const std::vector<int64_t>& dilation) {
  return (kernel[0] - 1) * dilation[0] + 1;
}

class ConvPoolNode final : public TurnsNode {
 public:
  ConvPoolNode(NodeSpec s, const Values& values, Isa isa) {
    NodeSpec pool;
    pool.op = "pool";
    pool.name = s.name;
    pool.inputs = {static_cast<int>(list(s, "band", 1, 0)[0])};
    pool.output = s.output;
    pool.strings["kind"] = s.strings["pool"];
    for (const char* key : {"kernel", "stride", "padding", "dilation"})
      pool.ints[key] = s.ints[std::string("pool_") + key];
    pool.ints["count_include_pad"] = s.ints["count_include_pad"];
    pool.ints["divisor"] = s.ints["divisor"];
    pool_ = make_rows_pool(pool, values, isa);
    begin(
        s, values, isa,
        {pool.ints["stride"][0], pool.ints["padding"][0], reach(pool.ints["kernel"], pool.ints["dilation"])});
    if (conv_->later()) fail(s, "this activation needs the whole map");
    s.arrays.clear();
    s.borrowed.clear();
    spec = std::move(s);
  }

 private:
  size_t next_scratch(const Context& c, int64_t, int64_t, int threads) const override {
    return pool_->scratch(c, threads);
  }
  void next_rows(Context& c, const View& mid, int64_t n, int64_t y0, int64_t y1, int threads) const override {
    pool_->run_rows(c, mid, out(c), n, y0, y1, threads);
  }

  std::unique_ptr<RowsNode> pool_;
};

class ConvDepthwiseNode final : public TurnsNode {
 public:
  ConvDepthwiseNode(NodeSpec s, const Values& values, Isa isa) {
    NodeSpec next;
    next.op = "conv";
    next.name = s.strings["next"];
    next.inputs = {static_cast<int>(list(s, "band", 1, 0)[0])};
    next.output = s.output;
    next.store = s.store;
    move(s.ints, next.ints);
    move(s.floats, next.floats);
    move(s.strings, next.strings);
    move(s.arrays, next.arrays);
    move(s.borrowed, next.borrowed);
    const Rows rows{list(next, "stride", 2, 1)[0], list(next, "padding", 4, 0)[0],
                    reach(list(next, "kernel", 2, 1), list(next, "dilation", 2, 1))};
    begin(s, values, isa, rows);
    next_ = make_conv_kernel(std::move(next), values, isa);
    s.arrays.clear();
    s.borrowed.clear();
    spec = std::move(s);
  }
  void weights(Weights* found) const override {
    conv_->weights(found);
    next_->weights(found);
  }

 private:
  // Attributes of the second convolution: next_<name>.
  template <class M>
  static void move(M& from, M& to) {
    for (auto it = from.begin(); it != from.end();) {
      const bool mine = it->first.rfind("next_", 0) == 0;
      if (mine) to[it->first.substr(5)] = std::move(it->second);
      it = mine ? from.erase(it) : std::next(it);
    }
  }
  size_t next_scratch(const Context& c, int64_t y0, int64_t y1, int threads) const override {
    ConvArgs a = next_->args(c, out(c));
    a.images = 1;
    a.first_row = y0;
    a.rows = y1 - y0;
    return next_->conv().scratch_bytes(a, threads);
  }
  void next_rows(Context& c, const View& mid, int64_t n, int64_t y0, int64_t y1, int threads) const override {
    ConvArgs a = next_->args(c, out(c));
    a.in = mid.data - n * mid.h() * mid.strides[2];
    a.first_image = n;
    a.images = 1;
    a.first_row = y0;
    a.rows = y1 - y0;
    next_->run_part(c, a, threads);
  }

  std::unique_ptr<KernelNode> next_;
};

}  // namespace

std::unique_ptr<Node> make_conv_pool(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ConvPoolNode>(std::move(s), values, isa);
}

std::unique_ptr<Node> make_conv_depthwise(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ConvDepthwiseNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
