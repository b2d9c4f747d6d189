// copy: the same values, in whatever layout the output has.
#include "engine/nodes/affine.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class CopyNode final : public DenseNode {
 public:
  CopyNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    same_shape(spec, value(values, spec.inputs[0]), value(values, spec.output));
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    Loops loops;
    for (size_t d = 0; d < static_cast<size_t>(y.rank); ++d)
      loops.push_back({y.dims[d], y.strides[d], x.strides[d], 0});
    copy_strided(rows_, std::move(loops), x.data, y.data, threads);
  }
};

}  // namespace

std::unique_ptr<Node> make_copy(NodeSpec s, const Values& values, Isa isa) {
  if (is_packed(values, s.output) || (!s.inputs.empty() && is_packed(values, s.inputs[0])))
    return make_affine(std::move(s), values, isa);
  return std::make_unique<CopyNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
