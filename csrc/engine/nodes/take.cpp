// take: elements index[k] of dimension `axis`, in that order.
#include "common/thread_pool.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class TakeNode final : public DenseNode {
 public:
  TakeNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    axis_ = static_cast<size_t>(one(spec, "axis", -1));
    if (axis_ >= x.dims.size() || x.dims.size() != y.dims.size() || x.batch[axis_]) fail(spec, "axis");
    index_ = list(spec, "index", static_cast<size_t>(y.dims[axis_]), 0);
    for (int64_t i : index_)
      if (i >= x.dims[axis_]) fail(spec, "index " + std::to_string(i) + " is outside");
    for (size_t d = 0; d < x.dims.size(); ++d)
      if (x.batch[d] != y.batch[d] || (d != axis_ && x.dims[d] != y.dims[d])) fail(spec, "sizes differ");
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t from = x.strides[axis_], to = y.strides[axis_];
    Loops rest;
    for (size_t d = 0; d < static_cast<size_t>(y.rank); ++d)
      if (d != axis_) rest.push_back({y.dims[d], y.strides[d], x.strides[d], 0});
    const auto count = static_cast<int64_t>(index_.size());
    if (to != 1)
      return parallel_for(count, threads, [&](int64_t k, int) {
        copy_strided(rows_, rest, x.data + index_[static_cast<size_t>(k)] * from, y.data + k * to, 1);
      });
    rest = arranged(std::move(rest));
    rest.push_back({1, 0, 0, 0});
    over(rest, threads, [&](const Place& p) {
      for (int64_t k = 0; k < count; ++k)
        y.data[p.out + k] = x.data[p.a + index_[static_cast<size_t>(k)] * from];
    });
  }

 private:
  size_t axis_ = 0;
  std::vector<int64_t> index_;
};

}  // namespace

std::unique_ptr<Node> make_take(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<TakeNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
