// layer_norm: over the last `tail` dimensions of plain values, or the channels of each pixel of maps
// (`channels`).
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class LayerNormNode : public DenseNode {
 protected:
  LayerNormNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    same_shape(spec, value(values, spec.inputs[0]), value(values, spec.output));
    eps_ = static_cast<float>(number(spec, "eps", 1e-5));
  }
  void take_affine(int64_t size) {
    size_ = size;
    weight_ = take(spec, "weight", -1);
    bias_ = take(spec, "bias", -1);
    for (const auto* v : {&weight_, &bias_})
      if (!v->empty() && static_cast<int64_t>(v->size()) != size) fail(spec, "weight or bias does not fit");
  }
  void normalise(const float* x, float* y) const {
    rows_.layer_norm(x, y, size_, weight_.empty() ? nullptr : weight_.data(),
                     bias_.empty() ? nullptr : bias_.data(), eps_);
  }
  int64_t size_ = 0;
  float eps_ = 1e-5f;
  std::vector<float> weight_, bias_;
};

class TailNormNode final : public LayerNormNode {
 public:
  TailNormNode(NodeSpec s, const Values& values, Isa isa) : LayerNormNode(std::move(s), values, isa) {
    const ValueSpec& x = value(values, spec.inputs[0]);
    const auto tail = static_cast<size_t>(one(spec, "tail", 1));
    if (is_map(values, spec.inputs[0]) || is_map(values, spec.output) || tail < 1 || tail > x.dims.size())
      fail(spec, "needs plain values");
    int64_t size = 1;
    for (size_t d = x.dims.size() - tail; d < x.dims.size(); ++d) {
      if (x.batch[d]) fail(spec, "the batch is not normalised over");
      size *= x.dims[d];
    }
    take_affine(size);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t lines = size_ == 0 ? 0 : x.count() / size_;
    parallel_for((lines + 7) / 8, threads, [&](int64_t i, int) {
      for (int64_t l = i * 8; l < std::min(lines, i * 8 + 8); ++l)
        normalise(x.data + l * size_, y.data + l * size_);
    });
  }
};

class ChannelNormNode final : public LayerNormNode {
 public:
  ChannelNormNode(NodeSpec s, const Values& values, Isa isa) : LayerNormNode(std::move(s), values, isa) {
    if (!is_map(values, spec.inputs[0]) || !is_map(values, spec.output)) fail(spec, "needs maps");
    take_affine(value(values, spec.inputs[0]).dims[1]);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    parallel_for(x.n() * x.h(), threads, [&](int64_t i, int) {
      const float* src = x.row(i / x.h(), i % x.h());
      float* dst = y.row(i / x.h(), i % x.h());
      for (int64_t p = 0; p < x.w(); ++p) normalise(src + p * x.pixel(), dst + p * y.pixel());
    });
  }
};

}  // namespace

std::unique_ptr<Node> make_layer_norm(NodeSpec s, const Values& values, Isa isa) {
  if (one(s, "channels", 0) != 0) return std::make_unique<ChannelNormNode>(std::move(s), values, isa);
  return std::make_unique<TailNormNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
