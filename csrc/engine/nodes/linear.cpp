// linear: a matrix of weights on the last dimension of a plain value: a 1x1 convolution of its rows, taken as
// the pixels of a map.
#include "engine/nodes/conv.h"

namespace actzip::engine {
namespace {

struct MapSize {
  int64_t h, w;
};
MapSize as_pixels(int64_t rows) {
  for (int64_t w : {32, 28, 24, 16, 49, 14, 7})
    if (rows > w && rows % w == 0) return {rows / w, w};
  return {1, rows};
}

class LinearNode final : public KernelNode {
 public:
  LinearNode(NodeSpec s, const Values& values, Isa isa, const ConvProblem& p)
      : KernelNode(std::move(s), values, isa, p) {
    if (spec.inputs.size() > 1 && is_map(values, spec.inputs[1])) fail(spec, "residual is not plain");
  }

  ConvArgs args(const Context& c, const View& y) const override {
    const View& x = in(c);
    const int64_t ic = conv().problem().ic, oc = conv().problem().oc;
    const MapSize size = as_pixels(ic == 0 ? 0 : x.count() / ic);
    ConvArgs a;
    a.n = 1;
    a.ih = size.h;
    a.iw = size.w;
    a.in = x.data;
    a.in_stride = ic;
    a.out = y.data;
    a.out_stride = oc;
    if (spec.inputs.size() < 2) return a;
    a.residual = in(c, 1).data;
    a.residual_stride = oc;
    return a;
  }
};

}  // namespace

ConvProblem linear_problem(const NodeSpec& s, const Values& values) {
  arity(s, 1, 2);
  const ValueSpec &x = value(values, s.inputs[0]), &y = value(values, s.output);
  if (x.layout != Layout::plain || y.layout != Layout::plain || x.dims.empty() || y.dims.empty())
    fail(s, "needs plain input and output");
  ConvProblem p;
  p.ic = x.dims.back();
  p.oc = y.dims.back();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.dims.size(); ++i) rows *= x.dims[i];
  const MapSize size = as_pixels(rows);
  p.hint_h = size.h;
  p.hint_w = size.w;
  return p;
}

std::unique_ptr<Node> make_linear(NodeSpec s, const Values& values, Isa isa) {
  const ConvProblem p = linear_problem(s, values);
  return std::make_unique<LinearNode>(std::move(s), values, isa, p);
}

}  // namespace actzip::engine
