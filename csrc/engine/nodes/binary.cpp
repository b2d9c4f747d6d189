// binary: any dense layouts, broadcasting; then an activation without per-channel numbers (or with, on maps).
#include <algorithm>

#include "common/thread_pool.h"
#include "engine/nodes/node_act.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class BinaryNode final : public DenseNode {
 public:
  BinaryNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 2, 2);
    fn_ = named<BinaryFn>(spec, kBinaryNames, "kind", spec.strings["kind"]);
    const ValueSpec& y = value(values, spec.output);
    for (int v : spec.inputs) {
      const ValueSpec& x = value(values, v);
      if (x.dims.size() > y.dims.size()) fail(spec, "'" + x.name + "' does not broadcast");
      for (size_t d = 0; d < x.dims.size(); ++d) {
        const size_t e = d + y.dims.size() - x.dims.size();
        if (!(x.dims[d] == 1 && !x.batch[d]) && (x.dims[d] != y.dims[e] || x.batch[d] != y.batch[e]))
          fail(spec, "'" + x.name + "' does not broadcast");
      }
    }
    act_ = NodeAct(spec, -1);
    if (act_.param.size() > 1) fail(spec, "an activation with numbers per channel");
  }
  void run(Context& c, int threads) const override {
    const View &a = in(c, 0), &b = in(c, 1), &y = out(c);
    auto step = [&](const View& v, int d) -> int64_t {
      const int e = d - (y.rank - v.rank);
      return e < 0 || v.dims[static_cast<size_t>(e)] == 1 ? 0 : v.strides[static_cast<size_t>(e)];
    };
    Loops loops;
    for (int d = 0; d < y.rank; ++d) {
      if (y.dims[static_cast<size_t>(d)] == 0) return;
      loops.push_back(
          {y.dims[static_cast<size_t>(d)], y.strides[static_cast<size_t>(d)], step(a, d), step(b, d)});
    }
    loops = arranged(std::move(loops));
    const Loop last = loops.back();
    const bool direct = last.out == 1 && last.a <= 1 && last.b <= 1;
    // long rows are cut so that threads have something to share
    if (direct && loops.size() == 1 && last.size > 8192) {
      const int64_t piece = 4096;
      parallel_for((last.size + piece - 1) / piece, threads, [&](int64_t i, int) {
        const int64_t at = i * piece, n = std::min(piece, last.size - at);
        rows_.binary(fn_, a.data + at * last.a, last.a, b.data + at * last.b, last.b, y.data + at, n);
        act_.apply(rows_, y.data + at, 0, n);
      });
      return;
    }
    over(loops, threads, [&](const Place& p) {
      if (direct) {
        rows_.binary(fn_, a.data + p.a, last.a, b.data + p.b, last.b, y.data + p.out, last.size);
        act_.apply(rows_, y.data + p.out, 0, last.size);
        return;
      }
      for (int64_t k = 0; k < last.size; ++k) {
        float* to = y.data + p.out + k * last.out;
        rows_.binary(fn_, a.data + p.a + k * last.a, 0, b.data + p.b + k * last.b, 0, to, 1);
        act_.apply(rows_, to, 0, 1);
      }
    });
  }

 private:
  BinaryFn fn_ = BinaryFn::add;
  NodeAct act_;
};

}  // namespace

std::unique_ptr<Node> make_binary(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<BinaryNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
