// matmul: of plain matrices, leading sizes broadcast.
#include <algorithm>

#include "common/thread_pool.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class MatMulNode final : public DenseNode {
 public:
  MatMulNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 2, 2);
    for (int v : {spec.inputs[0], spec.inputs[1], spec.output})
      if (value(values, v).layout != Layout::plain || value(values, v).dims.size() < 2)
        fail(spec, "needs plain matrices");
    const ValueSpec &a = value(values, spec.inputs[0]), &b = value(values, spec.inputs[1]),
                    &y = value(values, spec.output);
    auto at = [](const ValueSpec& v, size_t from_end) { return v.dims[v.dims.size() - from_end]; };
    auto is_batch = [](const ValueSpec& v, size_t from_end) { return v.batch[v.batch.size() - from_end]; };
    if (at(a, 1) != at(b, 2) || at(a, 2) != at(y, 2) || at(b, 1) != at(y, 1) ||
        is_batch(a, 1) != is_batch(b, 2) || is_batch(a, 2) != is_batch(y, 2) ||
        is_batch(b, 1) != is_batch(y, 1))
      fail(spec, "matrices do not fit");
    for (const ValueSpec* v : {&a, &b})
      for (size_t d = 3; d <= v->dims.size(); ++d) {
        if (d > y.dims.size()) fail(spec, "ranks do not fit");
        if (!(at(*v, d) == 1 && !is_batch(*v, d)) &&
            (at(*v, d) != at(y, d) || is_batch(*v, d) != is_batch(y, d)))
          fail(spec, "leading sizes do not fit");
      }
  }
  void run(Context& c, int threads) const override {
    const View &a = in(c, 0), &b = in(c, 1), &y = out(c);
    const auto ra = static_cast<size_t>(a.rank), rb = static_cast<size_t>(b.rank),
               ry = static_cast<size_t>(y.rank);
    const int64_t m = y.dims[ry - 2], n = y.dims[ry - 1], k = a.dims[ra - 1];
    int64_t outer = 1;
    for (size_t d = 0; d + 2 < ry; ++d) outer *= y.dims[d];
    auto offset = [&](const View& v, size_t rank, int64_t index) {
      int64_t rest = index, at = 0;
      for (size_t d = 3; d <= ry; ++d) {
        const int64_t i = rest % y.dims[ry - d];
        rest /= y.dims[ry - d];
        if (d <= rank && v.dims[rank - d] != 1) at += i * v.strides[rank - d];
      }
      return at;
    };
    const int64_t blocks = (m + kRows - 1) / kRows;
    parallel_for(outer * blocks, threads, [&](int64_t i, int) {
      const int64_t o = i / blocks, row = i % blocks * kRows;
      rows_.mat_mat(y.data + offset(y, ry, o) + row * n, n, a.data + offset(a, ra, o) + row * k, k,
                    b.data + offset(b, rb, o), n, std::min(kRows, m - row), k, n);
    });
  }

 private:
  static constexpr int64_t kRows = 48;  // at once: a multiple of what the kernels take, few enough to share
};

}  // namespace

std::unique_ptr<Node> make_matmul(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<MatMulNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
