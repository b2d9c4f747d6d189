// A convolution and the pool or depthwise convolution that alone reads it, by turns: some rows of the one,
// then those of the other that they allow, and of a 1x1 convolution behind it. The maps between are never
// there in whole: `band` rows of one image, which lie in the cache.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "common/thread_pool.h"
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
    if (alone(c, threads)) threads = 1;
    size_t most = 0;
    turns(c.views[static_cast<size_t>(mid_)].h(), 0, out(c).h(), [&](const Turn& t) {
      for (const int64_t from : {t.first, t.have}) {
        const ConvArgs a =
            rows_of(conv_->args(c, c.views[static_cast<size_t>(mid_)]), 0, from, std::max(from, t.end));
        if (a.rows > 0) most = std::max(most, conv_->conv().scratch_bytes(a, threads));
      }
      most = std::max(most, next_scratch(c, t.y0, t.y1, threads));
    });
    return most;
  }
  int bands(const Context& c) const override { return alone(c, c.threads) ? c.threads : 1; }

  void run(Context& c, int threads) const override {
    const View& y = out(c);
    if (!alone(c, threads)) {
      for (int64_t n = 0; n < y.n(); ++n) run_rows(c, n, 0, y.h(), {threads, -1});
      return;
    }
    const int64_t shares = shares_of(y, threads);
    parallel_for(y.n() * shares, threads, [&](int64_t i, int worker) {
      const int64_t share = i % shares;
      run_rows(c, i / shares, share * y.h() / shares, (share + 1) * y.h() / shares, {1, worker});
    });
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
    band_ = band;
    step_ = (band - rows.reach) / rows.stride + 1;
    conv_ = make_conv_kernel(std::move(conv), values, isa);
  }
  // All threads together, or one that has scratch and bands of its own: its number.
  struct Who {
    int threads, worker;
    int64_t own() const { return worker < 0 ? 0 : worker; }
  };
  // Rows [y0, y1) of the output: of image n, from the map between.
  virtual size_t next_scratch(const Context& c, int64_t y0, int64_t y1, int threads) const = 0;
  virtual void next_rows(Context& c, const View& mid, int64_t n, int64_t y0, int64_t y1, Who who) const = 0;

  // Of rows [y0, y1) of image n.
  static ConvArgs rows_of(ConvArgs a, int64_t n, int64_t y0, int64_t y1) {
    a.first_image = n;
    a.images = 1;
    a.first_row = y0;
    a.rows = y1 - y0;
    return a;
  }
  int64_t step() const { return step_; }  // rows of the output that a turn makes, at most

  std::unique_ptr<KernelNode> conv_;
  int mid_ = -1;
  bool apart_ = false;  // sums do not depend on which rows are computed together

 private:
  struct Turn {
    int64_t y0, y1;            // rows of the output
    int64_t first, have, end;  // of the map between: rows [first, end) are needed, [first, have) are there
  };
  static int64_t shares_of(const View& y, int threads) {  // of the rows of an image
    return y.n() % threads == 0 ? 1 : threads;
  }
  // Whether each thread takes rows of its own, and all their turns: two at least, for it computes the rows
  // between its own and its neighbour's once more.
  bool alone(const Context& c, int threads) const {
    const View& y = out(c);
    return apart_ && threads > 1 && y.h() >= 2 * step_ * shares_of(y, threads);
  }
  // Rows [low, high) of image n of the output.
  void run_rows(Context& c, int64_t n, int64_t low, int64_t high, Who who) const {
    View mid = c.views[static_cast<size_t>(mid_)];
    const int64_t row = mid.strides[2], height = mid.h();
    float* const base = mid.data + who.own() * band_ * row;
    mid.strides[0] = 0;
    int64_t from = 0;  // the row that lies at base
    turns(height, low, high, [&](const Turn& t) {
      if (t.have > t.first && t.first > from)
        std::memmove(base, base + (t.first - from) * row,
                     static_cast<size_t>((t.have - t.first) * row) * sizeof(float));
      from = t.first;
      mid.data = base - from * row;
      if (t.end > t.have) {
        ConvArgs a = rows_of(conv_->args(c, mid), n, t.have, t.end);
        a.out = mid.data - n * height * row;
        conv_->run_part(c, a, who.threads, who.worker);
      }
      next_rows(c, mid, n, t.y0, t.y1, who);
    });
  }
  template <class F>
  void turns(int64_t height, int64_t low, int64_t high, F&& f) const {
    int64_t have = 0;
    for (int64_t y0 = low; y0 < high; y0 += step_) {
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
  int64_t band_ = 1, step_ = 1;
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
    s.arrays.clear();
    s.borrowed.clear();
    spec = std::move(s);
  }

 private:
  size_t next_scratch(const Context& c, int64_t, int64_t, int threads) const override {
    return pool_->scratch(c, threads);
  }
  void next_rows(Context& c, const View& mid, int64_t n, int64_t y0, int64_t y1, Who who) const override {
    pool_->run_rows(c, mid, out(c), n, y0, y1, who.threads);
  }

  std::unique_ptr<RowsNode> pool_;
};

// ... and, where `band` names a second map, a convolution of one tap behind them, for which the depthwise one
// leaves its rows in that map.
class ConvDepthwiseNode final : public TurnsNode {
 public:
  ConvDepthwiseNode(NodeSpec s, const Values& values, Isa isa) {
    const std::vector<int64_t> between = s.ints["band"];
    NodeSpec next = behind(s, "next"), last = behind(s, "last");
    next.inputs = {static_cast<int>(between.at(0))};
    next.output = between.size() > 1 ? static_cast<int>(between[1]) : s.output;
    const Rows rows{list(next, "stride", 2, 1)[0], list(next, "padding", 4, 0)[0],
                    reach(list(next, "kernel", 2, 1), list(next, "dilation", 2, 1))};
    NodeSpec first = s;
    first.ints["band"].resize(1);
    if (between.size() > 1) {
      end_ = next.output;
      last.inputs = {end_};
      last.inputs.insert(last.inputs.end(), s.inputs.begin() + 1, s.inputs.end());  // the residual
      first.inputs.resize(1);
      if (reach(list(last, "kernel", 2, 1), {1}) > 1 || list(last, "stride", 2, 1)[0] > 1)
        fail(s, "the last convolution has more than one tap");
      last_ = make_conv_kernel(std::move(last), values, isa);
    }
    begin(std::move(first), values, isa, rows);
    if (end_ >= 0) end_band_ = value(values, end_).band;
    if (end_ >= 0 && end_band_ < step()) fail(s, "the second band is lower than a turn");
    next_ = make_conv_kernel(std::move(next), values, isa);
    apart_ = conv_->kind() != "winograd";
    s.arrays.clear();
    s.borrowed.clear();
    spec = std::move(s);
  }
  void weights(Weights* found) const override {
    conv_->weights(found);
    next_->weights(found);
    if (last_ != nullptr) last_->weights(found);
  }

 private:
  // The convolution whose attributes are <prefix>_<name>, which are taken out of `s`.
  static NodeSpec behind(NodeSpec& s, const std::string& prefix) {
    NodeSpec n;
    n.op = "conv";
    n.name = s.strings[prefix];
    n.output = s.output;
    n.store = s.store;
    const auto take = [&](auto& from, auto& to) {
      for (auto it = from.begin(); it != from.end();) {
        const bool mine = it->first.rfind(prefix + '_', 0) == 0;
        if (mine) to[it->first.substr(prefix.size() + 1)] = std::move(it->second);
        it = mine ? from.erase(it) : std::next(it);
      }
    };
    take(s.ints, n.ints);
    take(s.floats, n.floats);
    take(s.strings, n.strings);
    take(s.arrays, n.arrays);
    take(s.borrowed, n.borrowed);
    return n;
  }
  // Where row 0 of image n would lie, if row `first` lies at the beginning of a band.
  static float* shifted(const View& band, int64_t n, int64_t first) {
    return band.data - (n * band.h() + first) * band.strides[2];
  }
  View second_band(const Context& c, Who who) const {
    View y = c.views[static_cast<size_t>(end_)];
    y.data += who.own() * end_band_ * y.strides[2];
    return y;
  }

  size_t next_scratch(const Context& c, int64_t y0, int64_t y1, int threads) const override {
    const View& y = end_ < 0 ? out(c) : c.views[static_cast<size_t>(end_)];
    const size_t bytes = next_->conv().scratch_bytes(rows_of(next_->args(c, y), 0, y0, y1), threads);
    if (last_ == nullptr) return bytes;
    return std::max(bytes, last_->conv().scratch_bytes(rows_of(last_->args(c, out(c)), 0, y0, y1), threads));
  }
  void next_rows(Context& c, const View& mid, int64_t n, int64_t y0, int64_t y1, Who who) const override {
    const View y = end_ < 0 ? out(c) : second_band(c, who);
    ConvArgs a = rows_of(next_->args(c, y), n, y0, y1);
    a.in = shifted(mid, n, 0);
    if (last_ != nullptr) a.out = shifted(y, n, y0);
    next_->run_part(c, a, who.threads, who.worker);
    if (last_ == nullptr) return;
    a = rows_of(last_->args(c, out(c)), n, y0, y1);
    a.in = shifted(y, n, y0);
    last_->run_part(c, a, who.threads, who.worker);
  }

  std::unique_ptr<KernelNode> next_, last_;
  int end_ = -1;
  int64_t end_band_ = 0;  // rows
};

}  // namespace

std::unique_ptr<Node> make_conv_pool(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ConvPoolNode>(std::move(s), values, isa);
}

std::unique_ptr<Node> make_conv_depthwise(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ConvDepthwiseNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
