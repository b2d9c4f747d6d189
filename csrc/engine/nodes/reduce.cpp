// reduce: over `axes`, by the function `kind`. Sums are taken in double.
#include <cmath>
#include <limits>

#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

// The numbers that one output element is made of.
class Numbers {
 public:
  Numbers(const Loops& loops, int64_t count, const float* first)
      : loops_(loops), count_(count), first_(first) {}
  int64_t count() const { return count_; }
  template <class F>
  void each(F f) const {
    for (int64_t k = 0; k < count_; ++k) f(first_[place(loops_, loops_.size(), k).a]);
  }

 private:
  const Loops& loops_;
  int64_t count_;
  const float* first_;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class F>
double total(const Numbers& x, F f) {
  double sum = 0;
  x.each([&](float v) { sum += f(v); });
  return sum;
}
double square(float v) { return static_cast<double>(v) * v; }

float sum(const Numbers& x) {
  return static_cast<float>(total(x, [](float v) { return static_cast<double>(v); }));
}
float mean(const Numbers& x) {
  return static_cast<float>(total(x, [](float v) { return static_cast<double>(v); }) /
                            static_cast<double>(x.count()));
}
float greatest(const Numbers& x) {
  float best = -kInfinity;
  x.each([&](float v) { best = v > best || v != v ? v : best; });
  return best;
}
float least(const Numbers& x) {
  float best = kInfinity;
  x.each([&](float v) { best = v < best || v != v ? v : best; });
  return best;
}
float product_of(const Numbers& x) {
  double product = 1;
  x.each([&](float v) { product *= static_cast<double>(v); });
  return static_cast<float>(product);
}
float l1(const Numbers& x) {
  return static_cast<float>(total(x, [](float v) { return static_cast<double>(std::fabs(v)); }));
}
float l2(const Numbers& x) { return static_cast<float>(std::sqrt(total(x, square))); }
float sum_square(const Numbers& x) { return static_cast<float>(total(x, square)); }
float log_sum_exp(const Numbers& x) {
  const float best = greatest(x), top = std::isinf(best) ? 0.0f : best;
  const double sum = total(x, [=](float v) { return std::exp(static_cast<double>(v - top)); });
  return static_cast<float>(std::log(sum)) + top;
}

struct Kind {
  const char* name;
  float (*reduce)(const Numbers&);
};
constexpr Kind kKinds[] = {{"mean", mean},
                           {"sum", sum},
                           {"max", greatest},
                           {"min", least},
                           {"prod", product_of},
                           {"l1", l1},
                           {"l2", l2},
                           {"sum_square", sum_square},
                           {"log_sum_exp", log_sum_exp}};

class ReduceNode final : public DenseNode {
 public:
  ReduceNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const std::string kind = spec.strings["kind"];
    for (const Kind& k : kKinds)
      if (kind == k.name) reduce_ = k.reduce;
    if (reduce_ == nullptr) fail(spec, "kind '" + kind + "' is not known");
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    const auto axes = spec.ints.find("axes");
    if (axes == spec.ints.end()) fail(spec, "axes are missing");
    gone_.assign(x.dims.size(), false);
    for (int64_t a : axes->second) {
      if (a < 0 || a >= static_cast<int64_t>(x.dims.size()) || x.batch[static_cast<size_t>(a)])
        fail(spec, "axes");
      gone_[static_cast<size_t>(a)] = true;
    }
    std::vector<int64_t> kept, have;
    for (size_t d = 0; d < x.dims.size(); ++d)
      if (!gone_[d] && !(x.dims[d] == 1 && !x.batch[d])) kept.push_back(x.dims[d]);
    for (size_t d = 0; d < y.dims.size(); ++d)
      if (!(y.dims[d] == 1 && !y.batch[d])) have.push_back(y.dims[d]);
    if (kept != have || y.layout != Layout::plain) fail(spec, "the output's shape does not fit");
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    Loops outer, inner;
    for (size_t d = 0; d < gone_.size(); ++d)
      (gone_[d] ? inner : outer).push_back({x.dims[d], x.strides[d], x.strides[d], 0});
    std::stable_sort(inner.begin(), inner.end(), [](const Loop& p, const Loop& q) { return p.a > q.a; });
    const int64_t count = product(inner, 0, inner.size());
    parallel_for(y.count(), threads, [&](int64_t at, int) {
      y.data[at] = reduce_(Numbers(inner, count, x.data + place(outer, outer.size(), at).a));
    });
  }

 private:
  float (*reduce_)(const Numbers&) = nullptr;
  std::vector<bool> gone_;
};

}  // namespace

std::unique_ptr<Node> make_reduce(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ReduceNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
