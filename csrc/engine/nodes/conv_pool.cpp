// A convolution and the pool that alone reads it, by turns: some rows of the one, then those of the other
// that they allow. The map between is never there in whole: `band` rows of one image, which lie in the cache.
#include <algorithm>
#include <cstring>

#include "common/thread_pool.h"
#include "engine/nodes/conv.h"
#include "engine/nodes/map_node.h"

namespace actzip::engine {
namespace {

class ConvPoolNode final : public Node {
 public:
  ConvPoolNode(NodeSpec s, const Values& values, Isa isa) {
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
    conv_ = make_conv_kernel(std::move(conv), values, isa);
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

  std::unique_ptr<KernelNode> conv_;
  std::unique_ptr<RowsNode> pool_;
  int mid_ = -1;
  int64_t stride_ = 1, above_ = 0, reach_ = 1, step_ = 1;
};

}  // namespace

std::unique_ptr<Node> make_conv_pool(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ConvPoolNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
