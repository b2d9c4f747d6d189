// topk: the greatest or least along `axis` in order, as many as the output has there; with `indices` where
// they are, as float32. Of equals the first comes first; NaN is the greatest, as in PyTorch.
#include <algorithm>
#include <numeric>

#include "common/thread_pool.h"
#include "engine/nodes/map_node.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

bool greater(float a, float b) { return a > b || (a != a && b == b); }

class TopKNode final : public DenseNode {
 public:
  TopKNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    largest_ = one(spec, "largest", 1) != 0;
    indices_ = one(spec, "indices", 0) != 0;
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    axis_ = static_cast<size_t>(one(spec, "axis", -1));
    if (axis_ >= x.dims.size() || x.batch[axis_]) fail(spec, "axis");
    if (y.dims.size() != x.dims.size() || y.batch != x.batch || y.layout != Layout::plain)
      fail(spec, "the output's shape does not fit");
    for (size_t d = 0; d < x.dims.size(); ++d)
      if (d != axis_ && x.dims[d] != y.dims[d]) fail(spec, "the output's shape does not fit");
    if (x.dims[axis_] > (int64_t{1} << 24) || y.dims[axis_] < 1 || y.dims[axis_] > x.dims[axis_])
      fail(spec, std::to_string(y.dims[axis_]) + " of " + std::to_string(x.dims[axis_]));
  }
  // The line, and the order of its elements.
  size_t scratch(const Context& c, int) const override {
    return round_floats(in(c).dims[axis_]) * (sizeof(float) + sizeof(int32_t));
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    Loops loops;
    for (size_t d = 0; d < static_cast<size_t>(x.rank); ++d)
      if (d != axis_) loops.push_back({x.dims[d], y.strides[d], x.strides[d], 0});
    const int64_t n = x.dims[axis_], k = y.dims[axis_], sx = x.strides[axis_], sy = y.strides[axis_];
    parallel_for(product(loops, 0, loops.size()), threads, [&](int64_t at, int worker) {
      const Place p = place(loops, loops.size(), at);
      auto* line = reinterpret_cast<float*>(c.scratch_of(worker));
      auto* order = reinterpret_cast<int32_t*>(line + round_floats(n));
      for (int64_t i = 0; i < n; ++i) line[i] = x.data[p.a + i * sx];
      std::iota(order, order + n, 0);
      std::partial_sort(order, order + k, order + n, [&](int32_t i, int32_t j) {
        const float a = largest_ ? line[i] : line[j], b = largest_ ? line[j] : line[i];
        return greater(a, b) || (!greater(b, a) && i < j);
      });
      for (int64_t i = 0; i < k; ++i)
        y.data[p.out + i * sy] = indices_ ? static_cast<float>(order[i]) : line[order[i]];
    });
  }

 private:
  bool largest_ = true, indices_ = false;
  size_t axis_ = 0;
};

}  // namespace

std::unique_ptr<Node> make_topk(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<TopKNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
