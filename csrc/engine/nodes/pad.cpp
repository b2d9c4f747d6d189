// pad: before[d] elements before each dimension (negative: cut), after it what the output's size leaves; mode
// constant (value), reflect or edge.
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class PadNode : public DenseNode {
 protected:
  PadNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    if (x.dims.size() != y.dims.size()) fail(spec, "ranks differ");
    before_ = list(spec, "before", y.dims.size(), -(int64_t{1} << 30));
    for (size_t d = 0; d < y.dims.size(); ++d)
      if ((before_[d] != 0 || x.dims[d] != y.dims[d]) && (x.batch[d] || y.batch[d]))
        fail(spec, "the batch cannot be padded");
  }
  std::vector<int64_t> before_;
};

class PadConstant final : public PadNode {
 public:
  PadConstant(NodeSpec s, const Values& values, Isa isa) : PadNode(std::move(s), values, isa) {
    value_ = static_cast<float>(number(spec, "value", 0));
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    fill(rows_, y, value_, threads);
    const float* src = x.data;
    float* dst = y.data;
    Loops loops;
    for (size_t d = 0; d < before_.size(); ++d) {
      const int64_t from = std::max<int64_t>(0, -before_[d]);
      const int64_t to = std::min(x.dims[d], y.dims[d] - before_[d]);
      if (to <= from) return;
      src += from * x.strides[d];
      dst += (from + before_[d]) * y.strides[d];
      loops.push_back({to - from, y.strides[d], x.strides[d], 0});
    }
    copy_strided(rows_, std::move(loops), src, dst, threads);
  }

 private:
  float value_ = 0;
};

// Index of the input that a padded index takes, `top` the input's last.
using Source = int64_t (*)(int64_t index, int64_t top);
int64_t reflected(int64_t k, int64_t top) {
  k = k < 0 ? -k : k;
  return k > top ? 2 * top - k : k;
}
int64_t nearest(int64_t k, int64_t top) { return std::clamp<int64_t>(k, 0, top); }

class PadFromInput final : public PadNode {
 public:
  PadFromInput(NodeSpec s, const Values& values, Isa isa, Source source)
      : PadNode(std::move(s), values, isa), source_(source) {
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    for (size_t d = 0; d < y.dims.size(); ++d) {
      const int64_t after = y.dims[d] - x.dims[d] - before_[d];
      const int64_t most = source == reflected ? x.dims[d] - 1 : (int64_t{1} << 30);
      if (x.dims[d] < 1 || before_[d] > most || after > most) fail(spec, "padding wider than the tensor");
    }
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const auto rank = static_cast<size_t>(y.rank), last = rank - 1;
    std::vector<std::vector<int64_t>> from(last);  // offsets in the input, of all dimensions but the last
    for (size_t d = 0; d < last; ++d)
      for (int64_t i = 0; i < y.dims[d]; ++i)
        from[d].push_back(source_(i - before_[d], x.dims[d] - 1) * x.strides[d]);
    int64_t outer = 1;
    for (size_t d = 0; d < last; ++d) outer *= y.dims[d];
    parallel_for(outer, threads, [&](int64_t at, int) {
      int64_t rest = at, o = 0, a = 0;
      for (size_t d = last; d-- > 0;) {
        const int64_t k = rest % y.dims[d];
        rest /= y.dims[d];
        o += k * y.strides[d];
        a += from[d][static_cast<size_t>(k)];
      }
      const auto one = [&](int64_t k) {
        y.data[o + k * y.strides[last]] =
            x.data[a + source_(k - before_[last], x.dims[last] - 1) * x.strides[last]];
      };
      const int64_t size = y.dims[last];
      const bool rows = x.strides[last] == 1 && y.strides[last] == 1;  // the input's own numbers in one piece
      const int64_t begin = rows ? std::clamp<int64_t>(before_[last], 0, size) : 0;
      const int64_t end = rows ? std::clamp<int64_t>(before_[last] + x.dims[last], begin, size) : 0;
      for (int64_t k = 0; k < begin; ++k) one(k);
      if (end > begin) std::copy_n(x.data + a + begin - before_[last], end - begin, y.data + o + begin);
      for (int64_t k = end; k < size; ++k) one(k);
    });
  }

 private:
  Source source_;
};

}  // namespace

std::unique_ptr<Node> make_pad(NodeSpec s, const Values& values, Isa isa) {
  const std::string mode = s.strings["mode"];
  if (mode == "constant") return std::make_unique<PadConstant>(std::move(s), values, isa);
  if (mode == "reflect") return std::make_unique<PadFromInput>(std::move(s), values, isa, reflected);
  if (mode == "edge") return std::make_unique<PadFromInput>(std::move(s), values, isa, nearest);
  fail(s, "mode '" + mode + "'");
}

}  // namespace actzip::engine
