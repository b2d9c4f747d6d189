// Plans under sanitizers: a network of convolutions (packed and dense), pools, a concatenation, a residual
// sum, a linear layer and a softmax; residual blocks by direct and Winograd kernels; inverted residual blocks
// by turns; on every instruction set of this CPU.
//
//   plan_test             all checks, each small
//   plan_test concurrent  only many threads on one plan, with different batches (for thread sanitizer)
//
// Checks: packed and dense plans agree; results are the same bit for bit for every number of threads and when
// many threads share one plan; packed maps that outgrow their calibrated density spill and stay right; a spec
// that does not fit throws std::invalid_argument. Exit code 0: all passed.
#include "engine/plan.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "common/cpu.h"

using namespace actzip;
using namespace actzip::engine;

namespace {

int failures = 0;
void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

constexpr int64_t kC = 3, kH = 19, kW = 23, kClasses = 10;

struct Net {
  PlanBuilder b;
  std::mt19937 random{7};
  bool packed;
  double density;
  int64_t images;  // of a plan that fixes them, 0: the run's batch

  Net(bool packed_, double density_, int64_t images_ = 0)
      : packed(packed_), density(density_), images(images_) {}

  std::vector<float> numbers(int64_t n, float spread) {
    std::normal_distribution<float> d(0.0f, spread);
    std::vector<float> v(static_cast<size_t>(n));
    for (float& x : v) x = d(random);
    return v;
  }
  int value(const std::string& name, std::vector<int64_t> dims, Layout layout,
            std::vector<int64_t> parts = {}, int parent = -1, int64_t offset = 0, int64_t band = 0) {
    ValueSpec v;
    v.name = name;
    v.batch.assign(dims.size(), false);
    v.batch[0] = images == 0;
    v.dims = std::move(dims);
    if (images != 0) v.dims[0] *= images;
    v.layout = layout;
    v.parent = parent;
    v.offset = offset;
    v.density = density;
    v.parts = std::move(parts);
    v.band = band;
    return b.value(std::move(v));
  }
  Layout storage() const { return packed ? Layout::packed : Layout::map; }
  void node(NodeSpec s) { b.node(std::move(s)); }
  NodeSpec conv_spec(const std::string& name, std::vector<int> in, int out, int64_t ic, int64_t oc, int64_t k,
                     int64_t stride, int64_t groups = 1) {
    NodeSpec s;
    s.op = "conv";
    s.name = name;
    s.inputs = std::move(in);
    s.output = out;
    s.ints = {{"kernel", {k, k}},
              {"stride", {stride, stride}},
              {"padding", {k / 2, k / 2, k / 2, k / 2}},
              {"dilation", {1, 1}},
              {"groups", {groups}}};
    s.arrays["weight"] =
        numbers(oc * (ic / groups) * k * k, 1.4f / std::sqrt(static_cast<float>(ic / groups * k * k)));
    s.arrays["bias"] = numbers(oc, 0.1f);
    s.strings["act"] = "relu";
    return s;
  }
  void conv(const std::string& name, std::vector<int> in, int out, int64_t ic, int64_t oc, int64_t k,
            int64_t stride, int64_t groups = 1, const std::string& variant = "", int64_t pool = 1) {
    NodeSpec s = conv_spec(name, std::move(in), out, ic, oc, k, stride, groups);
    s.ints["pool"] = {pool};
    s.strings["variant"] = variant;
    node(std::move(s));
  }
  // An inverted residual block of map x (`ic` channels, kH x kW): its output. by_turns: one node.
  int block(const std::string& name, int x, int64_t ic, int64_t wide, int64_t oc, int64_t stride,
            bool by_turns) {
    const int64_t h = (kH + stride - 1) / stride, w = (kW + stride - 1) / stride, rows = 2;
    const int64_t first = by_turns ? (rows - 1) * stride + 3 : 0;
    const int a = value(name + "a", {1, wide, kH, kW}, Layout::map, {}, -1, 0, first);
    const int b_ = value(name + "b", {1, wide, h, w}, Layout::map, {}, -1, 0, by_turns ? rows : 0);
    const int y = value(name + "y", {1, oc, h, w}, Layout::map);
    NodeSpec s = conv_spec(name, {x}, a, ic, wide, 1, 1),
             next = conv_spec(name + "d", {a}, b_, wide, wide, 3, stride, wide);
    NodeSpec last = conv_spec(name + "p", {b_}, y, wide, oc, 1, 1);
    if (stride == 1 && ic == oc) last.inputs.push_back(x);
    if (!by_turns) {
      for (NodeSpec* one : {&s, &next, &last}) node(std::move(*one));
      return y;
    }
    const auto put = [&](const std::string& prefix, NodeSpec& n) {
      for (auto& [k, v] : n.ints) s.ints[prefix + '_' + k] = v;
      for (auto& [k, v] : n.arrays) s.arrays[prefix + '_' + k] = v;
      for (auto& [k, v] : n.strings) s.strings[prefix + '_' + k] = v;
      s.strings[prefix] = n.name;
    };
    put("next", next);
    put("last", last);
    s.op = "conv_depthwise";
    s.ints["band"] = {a, b_};
    s.inputs.insert(s.inputs.end(), last.inputs.begin() + 1, last.inputs.end());
    s.output = y;
    node(std::move(s));
    return y;
  }
  void pool(const std::string& name, const std::string& kind, int in, int out, int64_t k, int64_t stride,
            int64_t pad) {
    NodeSpec s;
    s.op = "pool";
    s.name = name;
    s.inputs = {in};
    s.output = out;
    s.ints = {{"kernel", {k, k}},
              {"stride", {stride, stride}},
              {"padding", {pad, pad, pad, pad}},
              {"dilation", {1, 1}},
              {"count_include_pad", {0}}};
    s.strings["kind"] = kind;
    node(std::move(s));
  }
  void simple(const std::string& op, int in, int out, std::map<std::string, std::vector<int64_t>> ints = {},
              std::map<std::string, std::string> strings = {}) {
    NodeSpec s;
    s.op = op;
    s.name = op;
    s.inputs = {in};
    s.output = out;
    s.ints = std::move(ints);
    s.strings = std::move(strings);
    node(std::move(s));
  }
  // A linear layer on the means of map x: what it gives.
  int head(int x, int64_t channels) {
    const int g = value("g", {1, channels, 1, 1}, Layout::map);
    const int flat = value("flat", {1, channels}, Layout::plain, {}, g, 0);
    const int logits = value("logits", {1, kClasses}, Layout::plain);
    simple("adaptive_pool", x, g, {}, {{"kind", "avg"}});
    NodeSpec fc;
    fc.op = "linear";
    fc.name = "fc";
    fc.inputs = {flat};
    fc.output = logits;
    fc.arrays["weight"] = numbers(kClasses * channels, 0.3f);
    fc.arrays["bias"] = numbers(kClasses, 0.1f);
    node(std::move(fc));
    return logits;
  }
};

std::unique_ptr<Plan> network(bool packed, double density, int64_t images = 0) {
  Net n(packed, density, images);
  const Layout s = n.storage();
  const int x = n.value("x", {1, kC, kH, kW}, Layout::plain);
  const int xm = n.value("xm", {1, kC, kH, kW}, Layout::map);
  const int a = n.value("a", {1, 70, kH, kW}, s, {70});
  const int p = n.value("p", {1, 70, 10, 12}, s, {70});
  const int cat = n.value("cat", {1, 70 + 33, 10, 12}, s, {70, 33});
  const int l = n.value("l", {1, 70, 10, 12}, s, {}, cat, 0);
  const int r = n.value("r", {1, 33, 10, 12}, s, {}, cat, 70);
  const int q = n.value("q", {1, 103, 10, 12}, s, {70, 33});
  const int d = n.value("d", {1, 96, 10, 12}, s, {96});
  const int e = n.value("e", {1, 96, 10, 12}, s, {96});
  const int dw = n.value("dw", {1, 96, 5, 6}, s, {96});
  const int out = n.value("out", {1, kClasses}, Layout::plain);
  n.b.input(x);
  n.simple("copy", x, xm);
  n.conv("c0", {xm}, a, kC, 70, 3, 1);
  n.pool("max", "max", a, p, 3, 2, 1);
  n.conv("c1", {p}, l, 70, 70, 1, 1);
  n.conv("c2", {p}, r, 70, 33, 5, 1);
  n.pool("avg", "avg", cat, q, 3, 1, 1);
  n.conv("c3", {q}, d, 103, 96, 3, 1);
  n.conv("c4", {d, d}, e, 96, 96, 3, 1, 3);
  n.conv("c5", {e}, dw, 96, 96, 3, 2, 96);
  const int logits = n.head(dw, 96);
  n.simple("softmax", logits, out, {{"axis", {1}}});
  n.b.output(out);
  return n.b.build();
}

// A residual block, a convolution and the pool behind it, which tiles write at once, by `variant` where it is
// not empty. Density 1: packed outputs lie where their residuals did.
std::unique_ptr<Plan> residual(bool packed, const std::string& variant) {
  Net n(packed, 1.0);
  const Layout s = n.storage();
  const bool tiles = !variant.empty();
  const int x = n.value("x", {1, kC, kH, kW}, Layout::plain);
  const int xm = n.value("xm", {1, kC, kH, kW}, Layout::map);
  const int a = n.value("a", {1, 64, kH, kW}, s);
  const int b = n.value("b", {1, 64, kH, kW}, s);
  const int c = n.value("c", {1, 64, kH, kW}, s);
  const int d = n.value("d", {1, 64, kH, kW}, s);
  const int e = n.value("e", {1, 64, kH, kW}, s);
  const int whole = n.value("whole", {1, 96, kH, kW}, s);
  const int p = n.value("p", {1, 96, kH / 2, kW / 2}, s);
  n.b.input(x);
  n.simple("copy", x, xm);
  n.conv("r0", {xm}, a, kC, 64, 3, 1);
  n.conv("r1", {a}, b, 64, 64, 3, 1, 1, variant);
  n.conv("r2", {b, a}, c, 64, 64, 3, 1, 1, variant);
  n.conv("r3", {c}, d, 64, 64, 3, 1, 1, variant);
  n.conv("r4", {d, c}, e, 64, 64, 3, 1, 1, variant);
  n.conv("r5", {e}, tiles ? p : whole, 64, 96, 3, 1, 1, variant, tiles ? 2 : 1);
  if (!tiles) n.pool("max", "max", whole, p, 2, 2, 0);
  const int logits = n.head(p, 96);
  n.b.output(logits);
  return n.b.build();
}

// Two inverted residual blocks, the first with a residual.
std::unique_ptr<Plan> inverted(bool by_turns) {
  Net n(false, 1.0);
  const int x = n.value("x", {1, kC, kH, kW}, Layout::plain);
  const int xm = n.value("xm", {1, kC, kH, kW}, Layout::map);
  const int a = n.value("a", {1, 24, kH, kW}, Layout::map);
  n.b.input(x);
  n.simple("copy", x, xm);
  n.conv("c0", {xm}, a, kC, 24, 3, 1);
  const int b = n.block("one", a, 24, 72, 24, 1, by_turns), c = n.block("two", b, 24, 72, 40, 2, by_turns);
  const int logits = n.head(c, 40);
  n.b.output(logits);
  return n.b.build();
}

std::vector<float> image(int64_t batch, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> d;
  std::vector<float> v(static_cast<size_t>(batch * kC * kH * kW));
  for (float& x : v) x = d(random);
  return v;
}

std::vector<float> run(const Plan& plan, const std::vector<float>& x, int64_t batch, int threads) {
  std::vector<float> y(static_cast<size_t>(batch * kClasses), -1.0f);
  plan.run(batch, {x.data()}, {y.data()}, threads);
  return y;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void concurrent(const std::unique_ptr<Plan>& plan) {
  constexpr int kThreads = 4, kRounds = 6;
  std::vector<std::vector<float>> inputs, want;
  for (int t = 0; t < kThreads; ++t) {
    inputs.push_back(image(1 + t % 3, static_cast<unsigned>(t)));
    want.push_back(run(*plan, inputs.back(), 1 + t % 3, 1));
  }
  std::vector<int> wrong(kThreads, 0);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      const auto k = static_cast<size_t>(t);
      for (int i = 0; i < kRounds; ++i)
        if (!same(run(*plan, inputs[k], 1 + t % 3, 1 + (t + i) % 3), want[k])) ++wrong[k];
    });
  for (auto& t : threads) t.join();
  for (int w : wrong) expect(w == 0, "concurrent runs of one plan differ");
}

void agreement() {
  const auto dense = network(false, 1.0), packed = network(true, 0.5), tight = network(true, 0.0);
  for (int64_t batch : {1, 2, 5, 13}) {
    const auto x = image(batch, 11);
    const auto want = run(*dense, x, batch, 1);
    const auto got = run(*packed, x, batch, 1);
    float worst = 0;
    for (size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::fabs(got[i] - want[i]));
    expect(worst < 1e-5f, "packed and dense plan differ by " + std::to_string(worst));
    for (int threads : {2, 5, 3, 1}) {
      expect(same(run(*packed, x, batch, threads), got), "threads change the packed result");
      expect(same(run(*dense, x, batch, threads), want), "threads change the dense result");
    }
    expect(same(run(*tight, x, batch, 2), got), "a map that spills changes the result");
    expect(tight->spilled_bytes() > 0, "nothing spilled");
  }
  {  // the images of packed maps are their own, not the run's batch
    const auto x = image(3, 11);
    std::vector<float> y(static_cast<size_t>(3 * kClasses), -1.0f);
    network(true, 0.5, 3)->run(1, {x.data()}, {y.data()}, 2);
    expect(same(y, run(*packed, x, 3, 1)), "a plan that fixes its images differs");
  }
  const auto profile = [&](const Plan& p) {
    const auto x = image(1, 3);
    std::vector<float> y(kClasses);
    return p.densities(1, {x.data()}, {y.data()}, 2);
  };
  const auto a = profile(*packed), b = profile(*dense);
  for (size_t i = 0; i < a.size(); ++i)
    expect(std::fabs(a[i] - b[i]) < 1e-3, "densities of value " + std::to_string(i));
}

void tiles() {
  const auto direct = residual(false, "");
  for (const char* variant : {"", "winograd-2x2", "winograd-4x4", "winograd-6x6"})
    for (bool packed : {false, true}) {
      const auto plan = residual(packed, variant);
      const std::string what = std::string(packed ? " packed " : " dense ") + variant;
      for (int64_t batch : {1, 3, 5}) {
        const auto x = image(batch, 5);
        const auto want = run(*direct, x, batch, 1), got = run(*plan, x, batch, 1);
        float worst = 0, most = 0;
        for (size_t i = 0; i < got.size(); ++i) {
          worst = std::max(worst, std::fabs(got[i] - want[i]));
          most = std::max(most, std::fabs(want[i]));
        }
        expect(worst < 1e-4f * most, "residual blocks differ by " + std::to_string(worst) + what);
        for (int threads : {2, 3}) expect(same(run(*plan, x, batch, threads), got), "threads change" + what);
      }
      size_t values = 0, all = 0;
      for (const NodeMemory& row : plan->memory(1, 1)) {
        values = std::max(values, row.values);
        all = std::max(all, row.values + row.scratch);
      }
      const size_t map = 64 * kH * kW * 4;
      expect(plan->arena_bytes(1, 1) >= all, "an arena without room for scratch" + what);
      expect(variant[0] == 0 || 10 * values < 26 * map, "a residual's place is not used again" + what);
    }
}

void turns() {
  const auto apart = inverted(false), plan = inverted(true);
  for (int64_t batch : {1, 2, 5}) {
    const auto x = image(batch, 5);
    const auto want = run(*apart, x, batch, 1);
    for (int threads : {1, 2, 3, 5})
      expect(same(run(*plan, x, batch, threads), want), "layers by turns differ from those apart");
  }
  expect(plan->arena_bytes(1, 1) < apart->arena_bytes(1, 1), "bands take as much as whole maps");
}

template <class F>
void refuses(const std::string& what, F f) {
  try {
    f();
    expect(false, what + " is accepted");
  } catch (const std::invalid_argument&) {
  }
}

void refusals() {
  refuses("a value that does not exist", [] {
    Net n(false, 1);
    const int x = n.value("x", {1, 4}, Layout::plain);
    n.b.input(x);
    n.simple("copy", x, 17);
    n.b.build();
  });
  refuses("a read before the write", [] {
    Net n(false, 1);
    const int x = n.value("x", {1, 4}, Layout::plain), y = n.value("y", {1, 4}, Layout::plain),
              z = n.value("z", {1, 4}, Layout::plain);
    n.b.input(x);
    n.simple("copy", y, z);
    n.b.output(z);
    n.b.build();
  });
  refuses("an unknown operator", [] {
    Net n(false, 1);
    const int x = n.value("x", {1, 4}, Layout::plain), y = n.value("y", {1, 4}, Layout::plain);
    n.b.input(x);
    n.simple("frobnicate", x, y);
    n.b.output(y);
    n.b.build();
  });
  refuses("a pool larger than its map", [] {
    Net n(false, 1);
    const int x = n.value("x", {1, 4, 4, 4}, Layout::plain), m = n.value("m", {1, 4, 4, 4}, Layout::map),
              y = n.value("y", {1, 4, 9, 9}, Layout::map), z = n.value("z", {1, 4, 9, 9}, Layout::plain);
    n.b.input(x);
    n.simple("copy", x, m);
    n.pool("p", "max", m, y, 3, 2, 1);
    n.simple("copy", y, z);
    n.b.output(z);
    n.b.build();
  });
  refuses("absurd sizes", [] {
    Net n(false, 1);
    const int64_t big = int64_t{1} << 39;
    const int x = n.value("x", {big, big}, Layout::plain), y = n.value("y", {big, big}, Layout::plain);
    n.b.input(x);
    n.simple("copy", x, y);
    n.b.output(y);
    n.b.build();
  });
  refuses("batch 0", [] {
    const auto plan = network(true, 0.5);
    plan->run(0, {nullptr}, {nullptr}, 1);
  });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  for (Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    std::printf("%s\n", isa_name(isa));
    if (mode != "concurrent") {
      agreement();
      tiles();
      turns();
    }
    concurrent(network(true, 0.5));
    concurrent(inverted(true));
  }
  force_isa("");
  if (mode != "concurrent") refusals();
  if (failures != 0) std::fprintf(stderr, "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
