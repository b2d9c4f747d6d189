// activation: on plain values (per-channel numbers: dimension 1); on maps, see affine.h.
#include <algorithm>

#include "common/thread_pool.h"
#include "engine/nodes/affine.h"
#include "engine/nodes/node_act.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class ActivateNode final : public DenseNode {
 public:
  ActivateNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    if (x.layout != Layout::plain || y.layout != Layout::plain) fail(spec, "needs plain values");
    act_ = NodeAct(spec, y.dims.size() > 1 ? y.dims[1] : -1);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t total = y.count();
    if (act_.param.size() <= 1) {
      const int64_t piece = 4096;
      parallel_for((total + piece - 1) / piece, threads, [&](int64_t i, int) {
        act_.apply(rows_, x.data + i * piece, y.data + i * piece, 0, std::min(piece, total - i * piece));
      });
      return;
    }
    const int64_t channels = y.dims[1], inner = y.strides[1];
    parallel_for(y.dims[0], threads, [&](int64_t n, int) {
      for (int64_t ch = 0; ch < channels; ++ch) {
        const int64_t at = n * y.strides[0] + ch * inner;
        rows_.activate(act_.act, x.data + at, y.data + at, inner, act_.param.data() + ch, 0);
      }
    });
  }

 private:
  NodeAct act_;
};

}  // namespace

std::unique_ptr<Node> make_activation(NodeSpec s, const Values& values, Isa isa) {
  if (is_map(values, s.output) && !s.inputs.empty() && is_map(values, s.inputs[0]))
    return make_affine(std::move(s), values, isa);
  return std::make_unique<ActivateNode>(std::move(s), values, isa);
}

std::vector<std::string> activation_names() {
  return {std::begin(kFunctionNames) + 1, std::end(kFunctionNames)};
}

}  // namespace actzip::engine
