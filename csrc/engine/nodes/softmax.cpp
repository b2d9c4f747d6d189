// softmax: along `axis`; log: its logarithm.
#include <cstring>

#include "engine/nodes/map_node.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class SoftmaxNode final : public DenseNode {
 public:
  SoftmaxNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec& x = value(values, spec.inputs[0]);
    same_shape(spec, x, value(values, spec.output));
    log_ = one(spec, "log", 0) != 0;
    axis_ = static_cast<size_t>(one(spec, "axis", -1));
    if (axis_ >= x.dims.size() || x.batch[axis_]) fail(spec, "axis");
  }
  size_t scratch(const Context& c, int) const override {
    return round_floats(in(c).dims[axis_]) * sizeof(float);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    Loops loops;
    for (size_t d = 0; d < static_cast<size_t>(x.rank); ++d)
      if (d != axis_) loops.push_back({y.dims[d], y.strides[d], x.strides[d], 0});
    const int64_t n = x.dims[axis_], sx = x.strides[axis_], sy = y.strides[axis_];
    parallel_for(product(loops, 0, loops.size()), threads, [&](int64_t at, int worker) {
      const Place p = place(loops, loops.size(), at);
      if (sx == 1 && sy == 1) {
        std::memcpy(y.data + p.out, x.data + p.a, static_cast<size_t>(n) * sizeof(float));
        rows_.softmax(y.data + p.out, n, log_);
        return;
      }
      auto* line = reinterpret_cast<float*>(c.scratch_of(worker));
      for (int64_t i = 0; i < n; ++i) line[i] = x.data[p.a + i * sx];
      rows_.softmax(line, n, log_);
      for (int64_t i = 0; i < n; ++i) y.data[p.out + i * sy] = line[i];
    });
  }

 private:
  bool log_ = false;
  size_t axis_ = 0;
};

}  // namespace

std::unique_ptr<Node> make_softmax(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<SoftmaxNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
