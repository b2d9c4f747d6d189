// expand: dimensions of size 1, and missing leading ones, repeated to the output's size.
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class ExpandNode final : public DenseNode {
 public:
  ExpandNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    if (x.dims.size() > y.dims.size()) fail(spec, "ranks differ");
    for (size_t d = 0; d < x.dims.size(); ++d) {
      const size_t e = d + y.dims.size() - x.dims.size();
      if (!(x.dims[d] == 1 && !x.batch[d]) && (x.dims[d] != y.dims[e] || x.batch[d] != y.batch[e]))
        fail(spec, "sizes differ");
    }
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const auto rank = static_cast<size_t>(y.rank), missing = rank - static_cast<size_t>(x.rank);
    Loops loops;
    for (size_t d = 0; d < rank; ++d) {
      const bool there = d >= missing && x.dims[d - missing] != 1;
      loops.push_back({y.dims[d], y.strides[d], there ? x.strides[d - missing] : 0, 0});
    }
    copy_strided(rows_, std::move(loops), x.data, y.data, threads);
  }
};

}  // namespace

std::unique_ptr<Node> make_expand(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ExpandNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
