// lrn: local response normalisation over neighbouring channels of maps; `before` of the `size` channels are
// in front.
#include <algorithm>
#include <cmath>

#include "common/thread_pool.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class LrnNode final : public DenseNode {
 public:
  LrnNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    if (x.layout != Layout::map || y.layout != Layout::map) fail(spec, "needs maps");
    size_ = one(spec, "size", 0);
    before_ = one(spec, "before", size_ / 2);
    if (size_ < 1 || before_ < 0 || before_ >= size_) fail(spec, "size");
    alpha_ = number(spec, "alpha", 1e-4);
    beta_ = number(spec, "beta", 0.75);
    k_ = number(spec, "k", 1);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t before = before_, after = size_ - 1 - before_;
    parallel_for(x.n() * x.h(), threads, [&](int64_t i, int) {
      for (int64_t p = 0; p < x.w(); ++p) {
        const float* src = x.row(i / x.h(), i % x.h()) + p * x.pixel();
        float* dst = y.row(i / x.h(), i % x.h()) + p * y.pixel();
        for (int64_t ch = 0; ch < x.c(); ++ch) {
          float sum = 0;
          for (int64_t k = std::max<int64_t>(0, ch - before); k <= std::min(x.c() - 1, ch + after); ++k)
            sum += src[k] * src[k];
          dst[ch] = src[ch] / std::pow(static_cast<float>(k_) +
                                           static_cast<float>(alpha_ / static_cast<double>(size_)) * sum,
                                       static_cast<float>(beta_));
        }
      }
    });
  }

 private:
  int64_t size_ = 1, before_ = 0;
  double alpha_ = 0, beta_ = 0, k_ = 1;
};

}  // namespace

std::unique_ptr<Node> make_lrn(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<LrnNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
