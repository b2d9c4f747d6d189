// pool: max or avg over windows. Work items are bands of output rows of one channel block, so that a packed
// input row is expanded once a band, whatever the window's height.
#include "engine/nodes/pool.h"

#include <algorithm>

#include "common/isa_table.h"
#include "common/thread_pool.h"
#include "engine/nodes/map_node.h"
#include "engine/nodes/node_act.h"

namespace actzip::engine {

ACTZIP_ISA_TABLE(pool_for, PoolTable, kPool)

std::vector<BlockOf> pool_blocks(const View& x, const View& y) {
  if (y.layout == Layout::packed) return blocks_of(y);
  if (x.layout == Layout::packed) return blocks_of(x);
  std::vector<BlockOf> blocks;
  for (int64_t c = 0; c < y.c(); c += kPoolBlock) blocks.push_back({0, c, std::min(kPoolBlock, y.c() - c)});
  return blocks;
}

namespace {

class PoolNode final : public RowsNode {
 public:
  PoolNode(NodeSpec s, const Values& values, Isa isa)
      : RowsNode(std::move(s), values, isa), pool_(pool_for(isa)) {
    NodeSpec& n = spec;
    arity(n, 1, 1);
    const ValueSpec &x = value(values, n.inputs[0]), &y = value(values, n.output);
    max_ = n.strings["kind"] == "max";
    if (!max_ && n.strings["kind"] != "avg") fail(n, "kind is neither max nor avg");
    kernel_ = list(n, "kernel", 2, 1);
    stride_ = list(n, "stride", 2, 1);
    padding_ = list(n, "padding", 4, 0);
    dilation_ = list(n, "dilation", 2, 1);
    include_ = one(n, "count_include_pad", 1) != 0;
    divisor_ = one(n, "divisor", 0);
    if (x.dims[1] != y.dims[1] || x.batch != y.batch || x.dims[0] != y.dims[0])
      fail(n, "channels or images differ");
    for (size_t k : {size_t{0}, size_t{1}}) {
      const int64_t last = (y.dims[2 + k] - 1) * stride_[k] - padding_[k];
      if (y.dims[2 + k] < 1 || last >= x.dims[2 + k]) fail(n, "a window lies outside the map");
      if (padding_[k] > dilation_[k] * (kernel_[k] - 1)) fail(n, "padding wider than the window");
    }
    act_ = NodeAct(n, y.dims[1]);
    bias_ = take(n, "bias", -1);
    if (!bias_.empty() && static_cast<int64_t>(bias_.size()) != y.dims[1]) fail(n, "bias does not fit");
  }

  size_t scratch(const Context& c, int) const override {
    const View &x = in(c), &y = out(c);
    Scratch s;
    return carve(s, nullptr, x, y);
  }

  void run(Context& c, int threads) const override {
    const View& y = out(c);
    some(c, in(c), y, 0, y.n(), 0, y.h(), threads);
  }
  void run_rows(Context& c, const View& x, const View& y, int64_t n, int64_t y0, int64_t y1,
                int threads) const override {
    some(c, x, y, n, 1, y0, y1, threads);
  }

 private:
  void some(Context& c, const View& x, const View& y, int64_t n, int64_t images, int64_t from, int64_t to,
            int threads) const {
    const auto blocks = pool_blocks(x, y);
    const auto nb = static_cast<int64_t>(blocks.size());
    // bands as high as leave every thread enough items
    const int64_t height = to - from;
    int64_t rows = height;
    if (threads > 1)
      rows = std::clamp<int64_t>(images * nb * height / (4 * static_cast<int64_t>(threads)),
                                 std::min<int64_t>(2, height), height);
    const int64_t bands = (height + rows - 1) / rows;
    parallel_for(images * nb * bands, threads, [&](int64_t i, int worker) {
      const int64_t y0 = from + i % bands * rows;
      band(x, y, n + i / bands / nb, y0, std::min(to, y0 + rows), blocks[static_cast<size_t>(i / bands % nb)],
           c.scratch_of(worker));
    });
  }

  struct Scratch {
    float* ring;  // input rows, expanded
    int64_t ring_floats, slots;
    int64_t* held;      // slot -> input row
    const float** row;  // slot -> where it lies, its pixels `stride` floats apart
    int64_t stride = kPoolBlock;
    const float** window;  // rows of the window
    float* column;         // [iw][64]: the window's rows folded
    float* result;         // [ow][64], packed output only
    float* scale;          // [ow]
    unsigned char* pack;
  };
  size_t carve(Scratch& s, unsigned char* base, const View& x, const View& y) const {
    size_t used = 0;
    auto take_bytes = [&](size_t bytes) {
      unsigned char* p = base == nullptr ? nullptr : base + used;
      used += (bytes + 63) / 64 * 64;
      return p;
    };
    s.slots = (kernel_[0] - 1) * dilation_[0] + 1;
    s.slots = std::min(s.slots, x.h());
    s.ring_floats = load_floats(x, kPoolBlock);
    s.ring =
        reinterpret_cast<float*>(take_bytes(static_cast<size_t>(s.slots * s.ring_floats) * sizeof(float)));
    s.held = reinterpret_cast<int64_t*>(take_bytes(static_cast<size_t>(s.slots) * sizeof(int64_t)));
    s.row = reinterpret_cast<const float**>(take_bytes(static_cast<size_t>(s.slots) * sizeof(float*)));
    s.window = reinterpret_cast<const float**>(take_bytes(static_cast<size_t>(kernel_[0]) * sizeof(float*)));
    s.column = reinterpret_cast<float*>(take_bytes(static_cast<size_t>(x.w() * kPoolBlock) * sizeof(float)));
    s.result = reinterpret_cast<float*>(
        take_bytes(y.layout == Layout::packed ? static_cast<size_t>(y.w() * kPoolBlock) * sizeof(float) : 0));
    s.scale = reinterpret_cast<float*>(take_bytes(static_cast<size_t>(y.w()) * sizeof(float)));
    s.pack = take_bytes(y.layout == Layout::packed ? pack_row_scratch_bytes(y.w()) : 0);
    return used;
  }

  void band(const View& x, const View& y, int64_t n, int64_t y0, int64_t y1, const BlockOf& b,
            unsigned char* scratch) const {
    Scratch s;
    carve(s, scratch, x, y);
    std::fill(s.held, s.held + s.slots, int64_t{-1});
    const bool packed = y.layout == Layout::packed;
    PoolCols k = columns(x, y, b, s);
    for (int64_t oy = y0; oy < y1; ++oy) {
      fold_rows(x, y, n, oy, b, s);
      k.out = packed ? s.result : y.row(n, oy) + b.first;
      k.out_stride = packed ? kPoolBlock : y.pixel();
      (max_ ? pool_.cols_max : pool_.cols_sum)(k);
      if (act_)
        for (int64_t ox = 0; ox < y.w(); ++ox) act_.apply(rows_, k.out + ox * k.out_stride, b.first, b.width);
      if (packed) pack_row(*y.packed, n, oy, b.block, s.result, kPoolBlock, s.pack);
    }
  }

  // The rows of the window of output row oy, folded into s.column; rows that the ring holds are not read
  // again.
  void fold_rows(const View& x, const View& y, int64_t n, int64_t oy, const BlockOf& b, Scratch& s) const {
    PoolRows r{};
    r.rows = s.window;
    r.pixels = x.w();
    r.width = b.width;
    r.out = s.column;
    const int64_t top = oy * stride_[0] - padding_[0];
    int64_t counted = 0;
    for (int64_t t = 0; t < kernel_[0]; ++t) {
      const int64_t iy = top + t * dilation_[0];
      if (iy < x.h() + padding_[2]) ++counted;
      if (iy < 0 || iy >= x.h()) continue;
      const int64_t slot = iy % s.slots;
      if (s.held[slot] != iy) {
        s.row[slot] = load(x, n, iy, b.first, b.width, s.ring + slot * s.ring_floats, &s.stride);
        s.held[slot] = iy;
      }
      s.window[r.count++] = s.row[slot];
    }
    r.stride = s.stride;
    (max_ ? pool_.rows_max : pool_.rows_sum)(r);
    if (!max_) scales(x, y, r.count, counted, s.scale);
  }

  PoolCols columns(const View& x, const View& y, const BlockOf& b, const Scratch& s) const {
    PoolCols k{};
    k.in = s.column;
    k.in_stride = kPoolBlock;
    k.iw = x.w();
    k.ow = y.w();
    k.kw = kernel_[1];
    k.sw = stride_[1];
    k.dw = dilation_[1];
    k.pad_left = padding_[1];
    k.width = b.width;
    k.scale = s.scale;
    k.bias = bias_.empty() ? nullptr : bias_.data() + b.first;
    return k;
  }

  void scales(const View& x, const View& y, int64_t rows, int64_t counted, float* scale) const {
    for (int64_t ox = 0; ox < y.w(); ++ox) {
      int64_t by = divisor_;
      if (by == 0) {
        const int64_t left = ox * stride_[1] - padding_[1];
        int64_t inside = 0, wide = 0;
        for (int64_t t = 0; t < kernel_[1]; ++t) {
          const int64_t ix = left + t * dilation_[1];
          if (ix < x.w() + padding_[3]) ++wide;
          if (ix >= 0 && ix < x.w()) ++inside;
        }
        by = include_ ? counted * wide : rows * inside;
      }
      scale[ox] = 1.0f / static_cast<float>(by);
    }
  }

  const PoolTable& pool_;
  bool max_ = false, include_ = true;
  int64_t divisor_ = 0;
  std::vector<int64_t> kernel_, stride_, padding_, dilation_;
  std::vector<float> bias_;
  NodeAct act_;
};

}  // namespace

std::unique_ptr<RowsNode> make_rows_pool(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<PoolNode>(std::move(s), values, isa);
}

std::unique_ptr<Node> make_pool(NodeSpec s, const Values& values, Isa isa) {
  return make_rows_pool(std::move(s), values, isa);
}

}  // namespace actzip::engine
