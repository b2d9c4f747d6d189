// y = act(scale * x + shift) per channel, dense <-> packed too: batch_norm, and copy and activation on maps.
#include "engine/nodes/affine.h"

#include "common/thread_pool.h"
#include "engine/nodes/map_node.h"
#include "engine/nodes/node_act.h"

namespace actzip::engine {
namespace {

class AffineNode final : public MapNode {
 public:
  AffineNode(NodeSpec s, const Values& values, Isa isa) : MapNode(std::move(s), values, isa) {
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

}  // namespace

std::unique_ptr<Node> make_affine(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<AffineNode>(std::move(s), values, isa);
}

std::unique_ptr<Node> make_batch_norm(NodeSpec s, const Values& values, Isa isa) {
  return make_affine(std::move(s), values, isa);
}

}  // namespace actzip::engine
