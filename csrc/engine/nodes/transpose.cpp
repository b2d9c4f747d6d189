// transpose: output dimension d is input dimension perm[d].
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class TransposeNode final : public DenseNode {
 public:
  TransposeNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    const size_t rank = y.dims.size();
    perm_ = list(spec, "perm", rank, 0);
    if (x.dims.size() != rank) fail(spec, "ranks differ");
    std::vector<bool> seen(rank, false);
    for (size_t d = 0; d < rank; ++d) {
      const auto p = static_cast<size_t>(perm_[d]);
      if (p >= rank || seen[p]) fail(spec, "perm is no permutation");
      seen[p] = true;
      if (x.dims[p] != y.dims[d] || x.batch[p] != y.batch[d]) fail(spec, "sizes differ");
    }
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    Loops loops;
    for (size_t d = 0; d < perm_.size(); ++d)
      loops.push_back({y.dims[d], y.strides[d], x.strides[static_cast<size_t>(perm_[d])], 0});
    copy_strided(rows_, std::move(loops), x.data, y.data, threads);
  }

 private:
  std::vector<int64_t> perm_;
};

}  // namespace

std::unique_ptr<Node> make_transpose(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<TransposeNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
