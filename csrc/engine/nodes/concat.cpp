// concat: the inputs behind each other along `axis`, or at `offsets` (the rest of the output is another's).
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class ConcatNode final : public DenseNode {
 public:
  ConcatNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    const ValueSpec& y = value(values, spec.output);
    const size_t rank = y.dims.size();
    axis_ = static_cast<size_t>(one(spec, "axis", 1));
    if (axis_ >= rank || spec.inputs.empty()) fail(spec, "axis or inputs");
    int64_t sum = 0;
    for (int v : spec.inputs) {
      const ValueSpec& x = value(values, v);
      if (x.dims.size() != rank) fail(spec, "ranks differ");
      for (size_t d = 0; d < rank; ++d)
        if (d != axis_ && (x.dims[d] != y.dims[d] || x.batch[d] != y.batch[d])) fail(spec, "sizes differ");
      offsets_.push_back(sum);
      sum += x.dims[axis_];
    }
    if (spec.ints.count("offsets") == 0) {
      if (sum != y.dims[axis_]) fail(spec, "sizes do not add up");
      return;
    }
    offsets_ = list(spec, "offsets", spec.inputs.size(), 0);
    for (size_t i = 0; i < offsets_.size(); ++i)
      if (offsets_[i] + value(values, spec.inputs[i]).dims[axis_] > y.dims[axis_])
        fail(spec, "outside the output");
  }
  void run(Context& c, int threads) const override {
    const View& y = out(c);
    for (size_t k = 0; k < spec.inputs.size(); ++k) {
      const View& x = in(c, k);
      float* dst = y.data + offsets_[k] * y.strides[axis_];
      if (dst == x.data) continue;  // placed
      Loops loops;
      for (size_t d = 0; d < static_cast<size_t>(y.rank); ++d)
        loops.push_back({x.dims[d], y.strides[d], x.strides[d], 0});
      copy_strided(rows_, std::move(loops), x.data, dst, threads);
    }
  }

 private:
  size_t axis_ = 0;
  std::vector<int64_t> offsets_;
};

}  // namespace

std::unique_ptr<Node> make_concat(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ConcatNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
