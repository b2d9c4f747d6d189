// depth_to_space: blocks of channels become pixels, ONNX's DCR.
#include <cstring>

#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class DepthToSpaceNode final : public DenseNode {
 public:
  DepthToSpaceNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    const auto block = list(spec, "block", 2, 1);
    high_ = block[0];
    wide_ = block[1];
    const bool fits = x.dims.size() == 4 && y.dims.size() == 4 && x.dims[0] == y.dims[0] &&
                      x.batch == y.batch && x.dims[1] == y.dims[1] * high_ * wide_ &&
                      y.dims[2] == x.dims[2] * high_ && y.dims[3] == x.dims[3] * wide_;
    if (!fits) fail(spec, "the output is not of the size that the blocks give");
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t each = y.c() * x.strides[1];  // of the input's channels, a pixel
    if (x.layout == Layout::map && y.layout == Layout::map && y.pixel() == y.c())
      return by_rows(x, y, threads);
    const Loops loops = {
        {y.n(), y.strides[0], x.strides[0], 0}, {x.h(), y.strides[2] * high_, x.strides[2], 0},
        {high_, y.strides[2], each * wide_, 0}, {x.w(), y.strides[3] * wide_, x.strides[3], 0},
        {wide_, y.strides[3], each, 0},         {y.c(), y.strides[1], x.strides[1], 0}};
    copy_strided(rows_, loops, x.data, y.data, threads);
  }

 private:
  // A row of the output is made of runs of `wide_` pixels.
  void by_rows(const View& x, const View& y, int threads) const {
    const int64_t run = wide_ * y.c(), width = x.w(), pixel = x.pixel();
    parallel_for(y.n() * y.h(), threads, [&](int64_t i, int) {
      const int64_t n = i / y.h(), oy = i % y.h();
      const float* from = x.row(n, oy / high_) + oy % high_ * run;
      float* to = y.row(n, oy);
      if (run == 2) {
        for (int64_t at = 0; at < width; ++at) std::memcpy(to + at * 2, from + at * pixel, 2 * sizeof(float));
        return;
      }
      for (int64_t at = 0; at < width; ++at)
        std::memcpy(to + at * run, from + at * pixel, static_cast<size_t>(run) * sizeof(float));
    });
  }

  int64_t high_ = 1, wide_ = 1;
};

}  // namespace

std::unique_ptr<Node> make_depth_to_space(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<DepthToSpaceNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
