// argmax: the index of the greatest or least along `axis`, as float32; of equals the first, or the `last`.
// NaN counts as the greatest and as the least, as in PyTorch.
#include "common/thread_pool.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

bool greater(float v, float best) { return v > best || (v != v && best == best); }
bool less(float v, float best) { return v < best || (v != v && best == best); }
bool equal(float v, float best) { return v == best || (v != v && best != best); }

class ArgMaxNode final : public DenseNode {
 public:
  ArgMaxNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const std::string kind = spec.strings["kind"];
    if (kind != "max" && kind != "min") fail(spec, "kind '" + kind + "' is not known");
    better_ = kind == "max" ? greater : less;
    last_ = one(spec, "last", 0) != 0;
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    axis_ = static_cast<size_t>(one(spec, "axis", -1));
    if (axis_ >= x.dims.size() || x.batch[axis_]) fail(spec, "axis");
    if (x.dims[axis_] < 1 || x.dims[axis_] > (int64_t{1} << 24)) fail(spec, "the size of the axis");
    std::vector<int64_t> kept, have;
    for (size_t d = 0; d < x.dims.size(); ++d)
      if (d != axis_ && !(x.dims[d] == 1 && !x.batch[d])) kept.push_back(x.dims[d]);
    for (size_t d = 0; d < y.dims.size(); ++d)
      if (!(y.dims[d] == 1 && !y.batch[d])) have.push_back(y.dims[d]);
    if (kept != have || y.layout != Layout::plain) fail(spec, "the output's shape does not fit");
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    Loops outer;
    for (size_t d = 0; d < static_cast<size_t>(x.rank); ++d)
      if (d != axis_) outer.push_back({x.dims[d], 0, x.strides[d], 0});
    const int64_t n = x.dims[axis_], step = x.strides[axis_];
    const int64_t total = y.count(), chunk = std::max<int64_t>(1, 4096 / n);
    parallel_for((total + chunk - 1) / chunk, threads, [&](int64_t block, int) {
      for (int64_t at = block * chunk; at < std::min(total, (block + 1) * chunk); ++at) {
        const float* line = x.data + place(outer, outer.size(), at).a;
        int64_t best = 0;
        for (int64_t i = 1; i < n; ++i) {
          const float v = line[i * step], b = line[best * step];
          if (better_(v, b) || (last_ && equal(v, b))) best = i;
        }
        y.data[at] = static_cast<float>(best);
      }
    });
  }

 private:
  bool (*better_)(float, float) = nullptr;
  bool last_ = false;
  size_t axis_ = 0;
};

}  // namespace

std::unique_ptr<Node> make_argmax(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ArgMaxNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
