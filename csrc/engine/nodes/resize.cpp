// resize: by tables of source indices and weights per output row and column, made by the caller.
#include <algorithm>
#include <array>
#include <cstring>

#include "common/thread_pool.h"
#include "engine/nodes/map_node.h"

namespace actzip::engine {
namespace {

class ResizeNode final : public MapNode {
 public:
  ResizeNode(NodeSpec s, const Values& values, Isa isa) : MapNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    if (x.layout != Layout::map || y.layout != Layout::map) fail(spec, "needs dense maps");
    if (x.dims[1] != y.dims[1] || x.dims[0] != y.dims[0] || x.dims[2] < 1 || x.dims[3] < 1)
      fail(spec, "channels or images differ");
    // tables made by the caller: source indices and weights per output row and column
    for (int axis : {0, 1}) {
      const std::string k = axis == 0 ? "y" : "x";
      const auto n = static_cast<size_t>(y.dims[static_cast<size_t>(2 + axis)]);
      low_[axis] = list(spec, (k + "_low").c_str(), n, 0);
      high_[axis] = list(spec, (k + "_high").c_str(), n, 0);
      part_[axis] = take(spec, (k + "_part").c_str(), static_cast<int64_t>(n));
      for (size_t i = 0; i < n; ++i)
        if (std::max(low_[axis][i], high_[axis][i]) >= x.dims[static_cast<size_t>(2 + axis)])
          fail(spec, "source outside the map");
    }
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    parallel_for(y.n() * y.h(), threads, [&](int64_t i, int) {
      const int64_t n = i / y.h(), oy = i % y.h();
      const auto ry = static_cast<size_t>(oy);
      const float *top = x.row(n, low_[0][ry]), *bottom = x.row(n, high_[0][ry]);
      const float fy = part_[0][ry];
      for (int64_t ox = 0; ox < y.w(); ++ox) {
        const auto rx = static_cast<size_t>(ox);
        const float fx = part_[1][rx];
        const int64_t l = low_[1][rx] * x.pixel(), r = high_[1][rx] * x.pixel();
        float* o = y.row(n, oy) + ox * y.pixel();
        if (fx == 0.0f && fy == 0.0f) {
          std::memcpy(o, top + l, static_cast<size_t>(y.c()) * sizeof(float));
        } else {
          rows_.lerp4(o, top + l, top + r, bottom + l, bottom + r, (1 - fy) * (1 - fx), (1 - fy) * fx,
                      fy * (1 - fx), fy * fx, y.c());
        }
      }
    });
  }

 private:
  std::array<std::vector<int64_t>, 2> low_, high_;
  std::array<std::vector<float>, 2> part_;
};

}  // namespace

std::unique_ptr<Node> make_resize(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ResizeNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
