// adaptive_pool: max or avg over windows that divide the map evenly, as PyTorch's adaptive pools do.
#include "common/thread_pool.h"
#include "engine/nodes/map_node.h"
#include "engine/nodes/pool.h"

namespace actzip::engine {
namespace {

class AdaptivePoolNode final : public MapNode {
 public:
  AdaptivePoolNode(NodeSpec s, const Values& values, Isa isa)
      : MapNode(std::move(s), values, isa), pool_(pool_for(isa)) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    max_ = spec.strings["kind"] == "max";
    if (!max_ && spec.strings["kind"] != "avg") fail(spec, "kind is neither max nor avg");
    if (y.layout != Layout::map) fail(spec, "the output is not a dense map");
    if (x.dims[1] != y.dims[1] || x.dims[0] != y.dims[0] || x.batch != y.batch || x.dims[2] < 1 ||
        x.dims[3] < 1 || y.dims[2] < 1 || y.dims[3] < 1)
      fail(spec, "channels or images differ");
  }
  size_t scratch(const Context& c, int) const override {
    return static_cast<size_t>(load_floats(in(c), kPoolBlock)) * sizeof(float) + 64;
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const auto blocks = pool_blocks(x, y);
    const auto nb = static_cast<int64_t>(blocks.size());
    parallel_for(y.n() * y.h() * nb, threads, [&](int64_t i, int worker) {
      const BlockOf& b = blocks[static_cast<size_t>(i % nb)];
      const int64_t n = i / nb / y.h(), oy = i / nb % y.h();
      auto* scratch = reinterpret_cast<float*>(c.scratch_of(worker));
      const int64_t y0 = oy * x.h() / y.h(), y1 = ((oy + 1) * x.h() + y.h() - 1) / y.h();
      const float unit = 1.0f;
      alignas(64) float line[kPoolBlock];
      PoolCols k{};
      k.ow = 1;
      k.sw = k.dw = 1;
      k.width = b.width;
      k.scale = &unit;
      k.out = line;
      k.out_stride = kPoolBlock;
      for (int64_t iy = y0; iy < y1; ++iy) {
        const float* row = load(x, n, iy, b.first, b.width, scratch, &k.in_stride);
        for (int64_t ox = 0; ox < y.w(); ++ox) {
          float* o = y.row(n, oy) + ox * y.pixel() + b.first;
          const int64_t x0 = ox * x.w() / y.w(), x1 = ((ox + 1) * x.w() + y.w() - 1) / y.w();
          k.in = row + x0 * k.in_stride;
          k.iw = k.kw = x1 - x0;
          if (iy == y0) k.out = o;
          (max_ ? pool_.cols_max : pool_.cols_sum)(k);
          if (iy != y0) (max_ ? rows_.accumulate_max : rows_.accumulate)(o, line, b.width);
          k.out = line;
          if (!max_ && iy + 1 == y1) {
            const float scale = 1.0f / static_cast<float>((y1 - y0) * (x1 - x0));
            rows_.binary(BinaryFn::mul, o, 1, &scale, 0, o, b.width);
          }
        }
      }
    });
  }

 private:
  const PoolTable& pool_;
  bool max_ = false;
};

}  // namespace

std::unique_ptr<Node> make_adaptive_pool(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<AdaptivePoolNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
