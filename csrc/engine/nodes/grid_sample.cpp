// grid_sample: a map at the places (x, y) in [-1, 1] of a grid (N, H', W', 2), as PyTorch has it: `mode`
// bilinear or nearest, `padding` zeros, border or reflection, `align_corners`. A place that is not a number
// is 0 where places are moved into the map; among zeros it gives NaN (bilinear) or 0 (nearest).
#include <cmath>

#include "common/thread_pool.h"
#include "engine/nodes/attributes.h"
#include "engine/rows.h"

namespace actzip::engine {
namespace {

enum class Outside { zeros, border, reflection };

class GridSampleNode final : public Node {
 public:
  GridSampleNode(NodeSpec s, const Values& values, Isa isa) : rows_(rows_for(isa)) {
    arity(s, 2, 2);
    const ValueSpec &x = value(values, s.inputs[0]), &grid = value(values, s.inputs[1]);
    const ValueSpec& y = value(values, s.output);
    if (x.layout != Layout::map || y.layout != Layout::map) fail(s, "needs dense maps");
    if (grid.layout != Layout::plain || grid.dims.size() != 4) fail(s, "the grid is not plain, of rank 4");
    if (x.dims[0] != y.dims[0] || x.batch != y.batch || x.dims[1] != y.dims[1] || x.dims[2] < 1 ||
        x.dims[3] < 1)
      fail(s, "images or channels differ");
    const std::vector<int64_t> want{y.dims[0], y.dims[2], y.dims[3], 2};
    if (grid.dims != want || grid.batch != y.batch) fail(s, "the grid's shape does not fit");
    const std::string mode = s.strings["mode"], padding = s.strings["padding"];
    if (mode != "bilinear" && mode != "nearest") fail(s, "mode '" + mode + "' is not known");
    nearest_ = mode == "nearest";
    if (padding == "border")
      outside_ = Outside::border;
    else if (padding == "reflection")
      outside_ = Outside::reflection;
    else if (padding != "zeros")
      fail(s, "padding '" + padding + "' is not known");
    align_ = one(s, "align_corners", 0) != 0;
    nothing_.assign(static_cast<size_t>(x.dims[1]), 0.0f);
    spec = std::move(s);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &grid = in(c, 1), &y = out(c);
    parallel_for(y.n() * y.h(), threads, [&](int64_t i, int) {
      const int64_t n = i / y.h(), oy = i % y.h();
      const float* at = grid.data + n * grid.strides[0] + oy * grid.strides[1];
      for (int64_t ox = 0; ox < y.w(); ++ox, at += grid.strides[2]) {
        const float px = moved(at[0], x.w()), py = moved(at[grid.strides[3]], x.h());
        float* o = y.row(n, oy) + ox * y.pixel();
        if (nearest_)
          rows_.lerp4(o, pixel(x, n, std::nearbyint(py), std::nearbyint(px)), nothing(), nothing(), nothing(),
                      1, 0, 0, 0, y.c());
        else
          bilinear(o, x, n, py, px);
      }
    });
  }

 private:
  const float* nothing() const { return nothing_.data(); }
  // The channels of a pixel; zeros outside the map.
  const float* pixel(const View& x, int64_t n, float py, float px) const {
    const bool inside =
        py >= 0 && py < static_cast<float>(x.h()) && px >= 0 && px < static_cast<float>(x.w());
    return inside ? x.row(n, static_cast<int64_t>(py)) + static_cast<int64_t>(px) * x.pixel() : nothing();
  }
  void bilinear(float* o, const View& x, int64_t n, float py, float px) const {
    const float top = std::floor(py), left = std::floor(px), fy = py - top, fx = px - left;
    rows_.lerp4(o, pixel(x, n, top, left), pixel(x, n, top, left + 1), pixel(x, n, top + 1, left),
                pixel(x, n, top + 1, left + 1), (1 - fy) * (1 - fx), (1 - fy) * fx, fy * (1 - fx), fy * fx,
                x.c());
  }
  // From [-1, 1] to pixels, moved into the map as `padding` says.
  float moved(float v, int64_t size) const {
    const auto n = static_cast<float>(size), last = n - 1;
    float p = align_ ? (v + 1) / 2 * last : ((v + 1) * n - 1) / 2;
    if (outside_ == Outside::zeros) return p;
    if (outside_ == Outside::reflection) {
      const float low = align_ ? 0.0f : -0.5f, span = align_ ? last : n;
      p = span > 0 ? std::fmod(std::fabs(p - low), 2 * span) : 0;
      p = low + std::min(p, 2 * span - p);
    }
    return p > 0 ? std::min(p, last) : 0;
  }

  const Rows& rows_;
  bool nearest_ = false, align_ = false;
  Outside outside_ = Outside::zeros;
  std::vector<float> nothing_;
};

}  // namespace

std::unique_ptr<Node> make_grid_sample(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<GridSampleNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
