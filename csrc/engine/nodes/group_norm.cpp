// group_norm: the channels of each group normalised together, over all further dimensions.
#include <cmath>

#include "common/thread_pool.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class GroupNormNode final : public DenseNode {
 public:
  GroupNormNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    groups_ = one(spec, "groups", 0);
    if (x.dims.size() < 2 || groups_ < 1 || x.dims[1] % groups_ != 0)
      fail(spec, "groups do not divide the channels");
    for (size_t d = 1; d < x.dims.size(); ++d)
      if (x.batch[d]) fail(spec, "the batch is not normalised over");
    eps_ = static_cast<float>(number(spec, "eps", 1e-5));
    weight_ = take(spec, "weight", -1);
    bias_ = take(spec, "bias", -1);
    for (const auto* v : {&weight_, &bias_})
      if (!v->empty() && static_cast<int64_t>(v->size()) != x.dims[1])
        fail(spec, "weight or bias does not fit");
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t each = x.dims[1] / groups_;
    int64_t inner = 1;
    for (int d = 2; d < x.rank; ++d) inner *= x.dims[static_cast<size_t>(d)];
    // all further dimensions as one: contiguous behind each other in both layouts
    const int64_t sx = x.rank > 2 ? x.strides[static_cast<size_t>(x.rank - 1)] : 1;
    const int64_t sy = y.rank > 2 ? y.strides[static_cast<size_t>(y.rank - 1)] : 1;
    parallel_for(x.dims[0] * groups_, threads, [&](int64_t i, int) {
      const int64_t n = i / groups_, g = i % groups_;
      double sum = 0, square = 0;
      for (int64_t ch = g * each; ch < (g + 1) * each; ++ch)
        for (int64_t k = 0; k < inner; ++k) sum += x.data[n * x.strides[0] + ch * x.strides[1] + k * sx];
      const double mean = sum / static_cast<double>(each * inner);
      for (int64_t ch = g * each; ch < (g + 1) * each; ++ch)
        for (int64_t k = 0; k < inner; ++k) {
          const double d = x.data[n * x.strides[0] + ch * x.strides[1] + k * sx] - mean;
          square += d * d;
        }
      const auto scale = static_cast<float>(
          1.0 / std::sqrt(square / static_cast<double>(each * inner) + static_cast<double>(eps_)));
      const auto m = static_cast<float>(mean);
      for (int64_t ch = g * each; ch < (g + 1) * each; ++ch) {
        const float w = weight_.empty() ? 1.0f : weight_[static_cast<size_t>(ch)];
        const float b = bias_.empty() ? 0.0f : bias_[static_cast<size_t>(ch)];
        for (int64_t k = 0; k < inner; ++k)
          y.data[n * y.strides[0] + ch * y.strides[1] + k * sy] =
              (x.data[n * x.strides[0] + ch * x.strides[1] + k * sx] - m) * scale * w + b;
      }
    });
  }

 private:
  int64_t groups_ = 1;
  float eps_ = 1e-5f;
  std::vector<float> weight_, bias_;
};

}  // namespace

std::unique_ptr<Node> make_group_norm(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<GroupNormNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
