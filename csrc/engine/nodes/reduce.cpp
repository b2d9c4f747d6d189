// reduce: over `axes`, by the function `kind`. Sums are taken in double.
//
// A block of outputs that are neighbours in the last kept dimension is folded at once: where they lie side
// by side in the input (an N, C, H, W map over C) row by row, otherwise (over H, W) each for itself in eight
// partial results, which are joined at the end. Either way the compiler makes vectors of the inner loop.
#include <array>
#include <cmath>
#include <limits>

#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 64, kLanes = 8;

// Where the numbers of an output lie, from its first one on: from each start `count`, `stride` apart.
struct Runs {
  std::vector<int64_t> starts;
  int64_t count, stride;
  int64_t total() const { return static_cast<int64_t>(starts.size()) * count; }
};

// What is reduced: how a result begins, what a number counts as, two results in one, the last step.
struct Sum {
  static constexpr double first = 0;
  static double of(float v) { return v; }
  static double join(double a, double b) { return a + b; }
  static double end(double a, int64_t) { return a; }
};
struct Mean : Sum {
  static double end(double a, int64_t count) { return a / static_cast<double>(count); }
};
struct L1 : Sum {
  static double of(float v) { return std::fabs(v); }
};
struct SumSquare : Sum {
  static double of(float v) { return static_cast<double>(v) * v; }
};
struct L2 : SumSquare {
  static double end(double a, int64_t) { return std::sqrt(a); }
};
struct Product : Sum {
  static constexpr double first = 1;
  static double join(double a, double b) { return a * b; }
};
struct Max : Sum {  // NaN wins and stays
  static constexpr double first = -kInfinity;
  static double join(double a, double b) { return b > a || b != b ? b : a; }
};
struct Min : Sum {
  static constexpr double first = kInfinity;
  static double join(double a, double b) { return b < a || b != b ? b : a; }
};

// result[k], k < n, of outputs whose first numbers are x[k * step]; of(number, k) is what a number counts as.
template <class K, class Of>
void fold(const Runs& runs, const float* x, int64_t step, int64_t n, double* result, Of of) {
  std::fill_n(result, n, K::first);
  if (runs.stride != 1 || step == 1) {
    for (int64_t start : runs.starts)
      for (int64_t j = 0; j < runs.count; ++j) {
        const float* row = x + start + j * runs.stride;
        for (int64_t k = 0; k < n; ++k) result[k] = K::join(result[k], of(row[k * step], k));
      }
    return;
  }
  for (int64_t k = 0; k < n; ++k) {
    std::array<double, kLanes> lanes;
    lanes.fill(K::first);
    for (int64_t start : runs.starts) {
      const float* run = x + k * step + start;
      int64_t j = 0;
      for (; j + kLanes <= runs.count; j += kLanes)
        for (int64_t i = 0; i < kLanes; ++i)
          lanes[static_cast<size_t>(i)] = K::join(lanes[static_cast<size_t>(i)], of(run[j + i], k));
      for (; j < runs.count; ++j) lanes[0] = K::join(lanes[0], of(run[j], k));
    }
    for (double lane : lanes) result[k] = K::join(result[k], lane);
  }
}

template <class K>
void reduce(const Runs& runs, const float* x, int64_t step, int64_t n, float* y) {
  double result[kBlock];
  fold<K>(runs, x, step, n, result, [](float v, int64_t) { return K::of(v); });
  for (int64_t k = 0; k < n; ++k) y[k] = static_cast<float>(K::end(result[k], runs.total()));
}

void log_sum_exp(const Runs& runs, const float* x, int64_t step, int64_t n, float* y) {
  double top[kBlock], sum[kBlock];
  fold<Max>(runs, x, step, n, top, [](float v, int64_t) { return Max::of(v); });
  for (int64_t k = 0; k < n; ++k)
    if (std::isinf(top[k])) top[k] = 0;
  fold<Sum>(runs, x, step, n, sum, [&](float v, int64_t k) { return std::exp(v - top[k]); });
  for (int64_t k = 0; k < n; ++k) y[k] = static_cast<float>(std::log(sum[k]) + top[k]);
}

struct Kind {
  const char* name;
  void (*reduce)(const Runs&, const float*, int64_t, int64_t, float*);
};
constexpr Kind kKinds[] = {{"mean", reduce<Mean>},      {"sum", reduce<Sum>},
                           {"max", reduce<Max>},        {"min", reduce<Min>},
                           {"prod", reduce<Product>},   {"l1", reduce<L1>},
                           {"l2", reduce<L2>},          {"sum_square", reduce<SumSquare>},
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
    Loops outer, inner{{1, 0, 0, 0}};
    for (size_t d = 0; d < gone_.size(); ++d)
      if (x.dims[d] != 1) (gone_[d] ? inner : outer).push_back({x.dims[d], 0, x.strides[d], 0});
    if (outer.empty()) outer.push_back({1, 0, 0, 0});
    std::stable_sort(inner.begin() + 1, inner.end(), [](const Loop& p, const Loop& q) { return p.a > q.a; });
    Runs runs{{}, inner.back().size, inner.back().a};
    const int64_t starts = product(inner, 0, inner.size() - 1);
    for (int64_t k = 0; k < starts; ++k) runs.starts.push_back(place(inner, inner.size() - 1, k).a);
    const Loop last = outer.back();
    const int64_t blocks = (last.size + kBlock - 1) / kBlock;
    parallel_for(product(outer, 0, outer.size() - 1) * blocks, threads, [&](int64_t at, int) {
      const int64_t row = at / blocks, k = at % blocks * kBlock;
      const float* first = x.data + place(outer, outer.size() - 1, row).a + k * last.a;
      reduce_(runs, first, last.a, std::min(kBlock, last.size - k), y.data + row * last.size + k);
    });
  }

 private:
  void (*reduce_)(const Runs&, const float*, int64_t, int64_t, float*) = nullptr;
  std::vector<bool> gone_;
};

}  // namespace

std::unique_ptr<Node> make_reduce(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<ReduceNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
