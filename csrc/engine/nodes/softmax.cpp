// softmax: along `axis`; log: its logarithm.
#include <algorithm>
#include <utility>

#include "engine/nodes/map_node.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class SoftmaxNode final : public DenseNode {
 public:
  SoftmaxNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec& x = value(values, spec.inputs[0]);
    same_shape(spec, x, value(values, spec.output));
    log_ = one(spec, "log", 0) != 0;
    axis_ = static_cast<size_t>(one(spec, "axis", -1));
    if (axis_ >= x.dims.size() || x.batch[axis_]) fail(spec, "axis");
    // decided from one image, so that no result depends on the others of a batch
    int64_t places = 1;
    for (size_t d = 0; d < x.dims.size(); ++d) places *= d == axis_ ? 1 : x.dims[d];
    columns_ = x.dims[axis_] <= kLongest && places >= kFewest;
  }
  size_t scratch(const Context& c, int) const override {
    return round_floats(in(c).dims[axis_]) * sizeof(float) * (columns_ ? kSoftmaxColumns : 1);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    Loops loops;
    for (size_t d = 0; d < static_cast<size_t>(x.rank); ++d)
      if (d != axis_) loops.push_back({y.dims[d], y.strides[d], x.strides[d], 0});
    const int64_t n = x.dims[axis_], sx = x.strides[axis_], sy = y.strides[axis_];
    if (columns_) {
      in_columns(c, arranged(std::move(loops)), n, sx, sy, threads);
      return;
    }
    parallel_for(product(loops, 0, loops.size()), threads, [&](int64_t at, int worker) {
      const Place p = place(loops, loops.size(), at);
      if (sx == 1 && sy == 1) {
        rows_.softmax(x.data + p.a, y.data + p.out, n, log_);
        return;
      }
      auto* line = reinterpret_cast<float*>(c.scratch_of(worker));
      for (int64_t i = 0; i < n; ++i) line[i] = x.data[p.a + i * sx];
      rows_.softmax(line, line, n, log_);
      for (int64_t i = 0; i < n; ++i) y.data[p.out + i * sy] = line[i];
    });
  }

 private:
  static constexpr int64_t kLongest = 128, kFewest = 16;

  // Many short rows: so many of them side by side, a vector across them.
  void in_columns(Context& c, const Loops& loops, int64_t n, int64_t sx, int64_t sy, int threads) const {
    const View &x = in(c), &y = out(c);
    const Loop& last = loops.back();
    const int64_t blocks = (last.size + kSoftmaxColumns - 1) / kSoftmaxColumns;
    parallel_for(product(loops, 0, loops.size() - 1) * blocks, threads, [&](int64_t at, int worker) {
      const Place p = place(loops, loops.size() - 1, at / blocks);
      const int64_t first = at % blocks * kSoftmaxColumns;
      const int64_t m = std::min(kSoftmaxColumns, last.size - first);
      const float* from = x.data + p.a + first * last.a;
      float* to = y.data + p.out + first * last.out;
      auto* t = reinterpret_cast<float*>(c.scratch_of(worker));
      for (int64_t i = 0; i < n; ++i) {
        float* line = t + i * kSoftmaxColumns;
        for (int64_t j = 0; j < m; ++j) line[j] = from[i * sx + j * last.a];
        std::fill(line + m, line + kSoftmaxColumns, 0.0f);
      }
      rows_.softmax_columns(t, n, log_);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j) to[i * sy + j * last.out] = t[i * kSoftmaxColumns + j];
    });
  }

  bool log_ = false, columns_ = false;
  size_t axis_ = 0;
};

}  // namespace

std::unique_ptr<Node> make_softmax(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<SoftmaxNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
