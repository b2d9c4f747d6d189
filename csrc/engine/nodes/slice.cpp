// slice: every steps[d]-th index of dimension d from starts[d] on, backwards where that is negative. dilate,
// its reverse, forwards alone: the input at those indices of the output, zeros elsewhere.
#include <algorithm>

#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class Lattice : public DenseNode {
 protected:
  Lattice(NodeSpec s, const Values& values, Isa isa, int64_t least) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const size_t rank = value(values, spec.output).dims.size();
    if (value(values, spec.inputs[0]).dims.size() != rank) fail(spec, "ranks differ");
    starts_ = list(spec, "starts", rank, 0);
    steps_ = list(spec, "steps", rank, least);
  }
  void check(const ValueSpec& small, const ValueSpec& large) const {
    for (size_t d = 0; d < starts_.size(); ++d) {
      const bool whole = starts_[d] == 0 && steps_[d] == 1 && small.dims[d] == large.dims[d] &&
                         small.batch[d] == large.batch[d];
      if (whole) continue;
      if (small.batch[d] || large.batch[d]) fail(spec, "the batch cannot be cut");
      const int64_t last = starts_[d] + (small.dims[d] - 1) * steps_[d];
      if (steps_[d] == 0) fail(spec, "a step of 0");
      if (small.dims[d] > 0 &&
          (std::min(starts_[d], last) < 0 || std::max(starts_[d], last) >= large.dims[d]))
        fail(spec, "outside the tensor");
    }
  }
  std::vector<int64_t> starts_, steps_;
};

class SliceNode final : public Lattice {
 public:
  SliceNode(NodeSpec s, const Values& values, Isa isa)
      : Lattice(std::move(s), values, isa, -(int64_t{1} << 30)) {
    check(value(values, spec.output), value(values, spec.inputs[0]));
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const float* src = x.data;
    Loops loops;
    for (size_t d = 0; d < starts_.size(); ++d) {
      src += starts_[d] * x.strides[d];
      loops.push_back({y.dims[d], y.strides[d], x.strides[d] * steps_[d], 0});
    }
    copy_strided(rows_, std::move(loops), src, y.data, threads);
  }
};

class DilateNode final : public Lattice {
 public:
  DilateNode(NodeSpec s, const Values& values, Isa isa) : Lattice(std::move(s), values, isa, 1) {
    check(value(values, spec.inputs[0]), value(values, spec.output));
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    fill(rows_, y, 0.0f, threads);
    float* dst = y.data;
    Loops loops;
    for (size_t d = 0; d < starts_.size(); ++d) {
      dst += starts_[d] * y.strides[d];
      loops.push_back({x.dims[d], y.strides[d] * steps_[d], x.strides[d], 0});
    }
    copy_strided(rows_, std::move(loops), x.data, dst, threads);
  }
};

}  // namespace

std::unique_ptr<Node> make_slice(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<SliceNode>(std::move(s), values, isa);
}
std::unique_ptr<Node> make_dilate(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<DilateNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
