// Every kernel of the table on every instruction set of this CPU against a plain loop in double precision:
// random shapes, strides, paddings, dilations, groups, densities, epilogues, value types. Dense maps lie in
// memory of exactly their size and packed ones in an arena that may overflow, so that sanitizers see every
// step beyond. Also run for AArch64 under qemu (`make test-neon`).
//
//   kernels_test [cases a kernel, default 40] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/conv.h"
#include "kernels/packed.h"

using namespace actzip;

namespace {

std::mt19937 rng;
int64_t pick(std::initializer_list<int64_t> v) { return *(v.begin() + rng() % v.size()); }
double unit() { return static_cast<double>(rng() >> 8) / (1 << 24); }

std::vector<float> sparse(int64_t count, double density) {
  std::vector<float> v(static_cast<size_t>(count));
  for (float& x : v) x = unit() < density ? static_cast<float>(unit() * 2 - 0.8) : 0.0f;
  return v;
}

struct Memory {
  std::unique_ptr<PackedMap> map;
  std::vector<uint64_t> index, values;
  static void* aligned(std::vector<uint64_t>& v, size_t bytes) {
    v.assign(bytes / 8 + 9, 0xa5a5a5a5a5a5a5a5ull);
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(v.data()) + 63) & ~uintptr_t{63});
  }
  Memory(int64_t n, int64_t h, int64_t w, std::vector<ChannelBlock> blocks, ValueType type, double density) {
    PackedLayout l;
    l.n = n;
    l.h = h;
    l.w = w;
    l.c = blocks.back().first + blocks.back().width;
    l.blocks = std::move(blocks);
    l.type = type;
    map = std::make_unique<PackedMap>(l);
    const size_t capacity = l.value_bytes(density);
    void* i = aligned(index, l.index_bytes());
    map->bind(n, i, aligned(values, capacity), capacity);
  }
};

struct Case {
  ConvProblem p;
  int64_t n = 1, h = 1, w = 1;
  double density = 0.5, capacity = 1.0;
  ValueType type = ValueType::f32;
  int residual = 0, threads = 1;
  bool bias = true;
};

Case random_case(const KernelRow& row) {
  const std::string kind = row.kind, name = row.name;
  const bool packed = kind == "sparse", depthwise = kind == "depthwise", winograd = kind == "winograd";
  const bool cook = name.rfind("cook", 0) == 0, lines = name.rfind("lines", 0) == 0;
  Case c;
  ConvProblem& p = c.p;
  p.kh = pick({1, 1, 3, 3, 5, 7});
  p.kw = pick({1, 1, 3, 3, 2, 5, 7});
  p.sh = pick({1, 1, 2, 3});
  p.sw = pick({1, 1, 1, 2});
  p.dh = pick({1, 1, 2});
  p.dw = pick({1, 1, 1, 2});
  if (winograd) {
    p.kh = p.kw = 3;
    p.sh = p.sw = 1;
    p.dh = pick({1, 1, 2, 6});
    p.dw = p.dh == 1 ? 1 : pick({1, 2, 3});
  }
  if (cook) {  // one row or one column of many taps
    const bool column = rng() % 2 == 0;
    p.kh = column ? pick({12, 15, 30}) : 1;
    p.kw = column ? 1 : pick({12, 15, 30});
    p.sh = p.sw = p.dh = p.dw = 1;
  }
  p.pad_top = pick({0, 1, 2});
  p.pad_left = pick({0, 1, 3});
  p.pad_bottom = pick({0, 1});
  p.pad_right = pick({0, 1, 2});
  if (cook && p.kw == 1) p.pad_left = p.pad_right = 0;
  if (cook && p.kh == 1) p.pad_top = p.pad_bottom = 0;
  c.n = pick({1, 1, 2});
  c.h = std::max<int64_t>(pick({1, 4, 9}), p.dh * (p.kh - 1) + 1 - p.pad_top - p.pad_bottom);
  c.w = std::max<int64_t>(pick({1, 7, 17, 90}), p.dw * (p.kw - 1) + 1 - p.pad_left - p.pad_right);
  p.groups = depthwise ? pick({2, 16, 24, 70}) : winograd || cook ? 1 : pick({1, 1, 1, 2, 4});
  if (winograd && p.dh == 1 && p.dw == 1 && p.out_h(c.h) > 1 && p.out_w(c.w) > 1) p.pool = pick({1, 2});
  const int64_t icg = depthwise ? 1 : pick({1, 3, 16, 33, 64, 80}),
                ocg = depthwise ? 1
                      : lines   ? pick({1, 3, 5, 8})
                                : pick({1, 5, 16, 48, 64, 96, 130});
  p.ic = p.groups * icg;
  p.oc = p.groups * ocg;
  p.in_packed = packed || rng() % 2 == 0;
  p.out_packed = rng() % 2 == 0;
  p.act = static_cast<ActKind>(rng() % 4);
  p.lo = p.act == ActKind::threshold ? 0.25f : 0.0f;
  p.hi = 0.6f;
  if (p.act == ActKind::threshold && rng() % 2 == 0) {
    p.thresholds.resize(static_cast<size_t>(p.oc));
    for (float& t : p.thresholds) t = static_cast<float>(unit() * 0.5);
  }
  if (p.ic > 2 && rng() % 2 == 0) {
    const int64_t cut = 1 + static_cast<int64_t>(rng()) % (p.ic - 1);
    p.in_blocks = split_channels(std::vector<int64_t>{cut, p.ic - cut});
  }
  const double densities[] = {0, 0.1, 0.4, 0.8, 1};
  c.density = densities[rng() % 5];
  c.capacity = static_cast<double>(pick({0, 1, 2})) / 2;
  c.type = rng() % 3 == 0 ? ValueType::f16 : ValueType::f32;
  c.residual = p.pool == 1 ? static_cast<int>(rng() % 3) : 0;
  c.threads = static_cast<int>(pick({1, 1, 2}));
  c.bias = rng() % 4 != 0;
  return c;
}

float to_type(float x, ValueType t) {
  if (t != ValueType::f16 || x == 0.0f) return x;
  // Round to 11 significant bits (the values here are neither tiny nor large).
  int e = 0;
  const float m = std::frexp(x, &e);
  return std::ldexp(std::nearbyint(m * 2048.0f) / 2048.0f, e);
}

// The sum at an output, in double precision, before any pool.
double sum_at(const Case& c, const std::vector<float>& x, const std::vector<float>& weight, int64_t n,
              int64_t oy, int64_t ox, int64_t o) {
  const ConvProblem& p = c.p;
  const int64_t icg = p.ic / p.groups, ocg = p.oc / p.groups;
  double sum = 0;
  for (int64_t ky = 0; ky < p.kh; ++ky)
    for (int64_t kx = 0; kx < p.kw; ++kx) {
      const int64_t iy = oy * p.sh - p.pad_top + ky * p.dh, ix = ox * p.sw - p.pad_left + kx * p.dw;
      if (iy < 0 || iy >= c.h || ix < 0 || ix >= c.w) continue;
      const float* src = x.data() + ((n * c.h + iy) * c.w + ix) * p.ic + o / ocg * icg;
      for (int64_t k = 0; k < icg; ++k)
        sum += static_cast<double>(src[k]) *
               weight[static_cast<size_t>(((o * icg + k) * p.kh + ky) * p.kw + kx)];
    }
  return sum;
}

bool check(const Case& c, const std::string& name) {
  const ConvProblem& p = c.p;
  const int64_t oh = p.out_h(c.h), ow = p.out_w(c.w), icg = p.ic / p.groups;
  std::vector<float> x = sparse(c.n * c.h * c.w * p.ic, c.density),
                     r = sparse(c.n * oh * ow * p.oc, c.density);
  for (float& v : x) v = to_type(v, c.type);
  for (float& v : r) v = to_type(v, c.type);
  std::vector<float> weight = sparse(p.oc * icg * p.kh * p.kw, 1), bias = sparse(p.oc, 1);
  const float shrink = 1.0f / std::sqrt(static_cast<float>(icg * p.kh * p.kw));
  for (float& v : weight) v *= shrink;
  const auto conv = Conv::make(p, name, weight.data(), c.bias ? bias.data() : nullptr);
  ConvArgs a;
  a.n = c.n;
  a.ih = c.h;
  a.iw = c.w;
  std::unique_ptr<Memory> in, out, res;
  std::vector<float> y(static_cast<size_t>(c.n * oh * ow * p.oc), -9.0f);
  if (p.in_packed) {
    in = std::make_unique<Memory>(c.n, c.h, c.w, p.in_blocks.empty() ? split_channels(p.ic) : p.in_blocks,
                                  c.type, c.capacity);
    pack_map(*in->map, x.data(), p.ic, 0, -1, 1);
    a.in_map = in->map.get();
  } else {
    a.in = x.data();
    a.in_stride = p.ic;
  }
  if (p.out_packed) {
    out = std::make_unique<Memory>(c.n, oh, ow, split_channels(std::vector<int64_t>{3, p.oc}), ValueType::f32,
                                   c.capacity);
    a.out_map = out->map.get();
    a.out_first_block = 1;
  } else {
    a.out = y.data();
    a.out_stride = p.oc;
  }
  if (c.residual == 1) {
    a.residual = r.data();
    a.residual_stride = p.oc;
  } else if (c.residual == 2) {
    res = std::make_unique<Memory>(c.n, oh, ow, split_channels(p.oc), c.type, c.capacity);
    pack_map(*res->map, r.data(), p.oc, 0, -1, 1);
    a.residual_map = res->map.get();
  }
  conv->run(a, c.threads);
  if (p.out_packed) unpack_map(*a.out_map, y.data(), p.oc, 1, -1, 1);
  for (int64_t n = 0; n < c.n; ++n)
    for (int64_t oy = 0; oy < oh; ++oy)
      for (int64_t ox = 0; ox < ow; ++ox)
        for (int64_t o = 0; o < p.oc; ++o) {
          double want = -std::numeric_limits<double>::infinity();
          for (int64_t i = 0; i < p.pool * p.pool; ++i)
            want = std::max(want,
                            sum_at(c, x, weight, n, oy * p.pool + i / p.pool, ox * p.pool + i % p.pool, o));
          if (c.bias) want += bias[static_cast<size_t>(o)];
          const auto at = static_cast<size_t>(((n * oh + oy) * ow + ox) * p.oc + o);
          if (c.residual != 0) want += r[at];
          const double t = p.thresholds.empty() ? p.lo : p.thresholds[static_cast<size_t>(o)];
          if (p.act == ActKind::threshold && std::fabs(want - t) < 1e-4) continue;
          if (p.act == ActKind::relu) want = std::max(want, 0.0);
          if (p.act == ActKind::clip)
            want = std::min(std::max(want, static_cast<double>(p.lo)), static_cast<double>(p.hi));
          if (p.act == ActKind::threshold && want <= t) want = 0;
          if (!(std::fabs(want - y[at]) <= 3e-5)) {
            std::printf(
                "%s: %lldx%lldx%lldx%lld -> %lld, %lldx%lld: at (%lld, %lld, %lld, %lld) %g, not %g\n",
                name.c_str(), static_cast<long long>(c.n), static_cast<long long>(c.h),
                static_cast<long long>(c.w), static_cast<long long>(p.ic), static_cast<long long>(p.oc),
                static_cast<long long>(p.kh), static_cast<long long>(p.kw), static_cast<long long>(n),
                static_cast<long long>(oy), static_cast<long long>(ox), static_cast<long long>(o), y[at],
                want);
            return false;
          }
        }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 40;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
  int failures = 0;
  for (Isa isa : supported_isas()) {
    force_isa(isa_name(isa));
    for (const KernelRow& row : kernel_table(isa)) {
      rng.seed(seed);
      int done = 0;
      for (int i = 0; i < 50 * cases && done < cases; ++i) {  // until enough that the kernel is for
        const Case c = random_case(row);
        const auto names = conv_variants(c.p);
        if (std::find(names.begin(), names.end(), row.name) == names.end()) continue;
        ++done;
        if (!check(c, row.name)) {
          ++failures;
          break;
        }
      }
      std::printf("%s %s: %d problems\n", isa_name(isa), row.name, done);
      if (done == 0) ++failures;
    }
  }
  return failures == 0 ? 0 : 1;
}
