// Internal: nodes on dense values, plain or maps, whose operands are walked by strides.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/thread_pool.h"
#include "engine/nodes/attributes.h"
#include "engine/rows.h"

namespace actzip::engine {

// One dimension of the output: its size, and the steps of the operands.
struct Loop {
  int64_t size, out, a, b;
};
using Loops = std::vector<Loop>;

// Dimensions of size 1 go, the rest is ordered by the output's step (largest first) and merged where all
// operands allow. Never empty.
Loops arranged(Loops loops);

int64_t product(const Loops& loops, size_t first, size_t last);

// Offsets of the operands at one index of loops [0, count), the last of them running fastest.
struct Place {
  int64_t out = 0, a = 0, b = 0;
};
inline Place place(const Loops& loops, size_t count, int64_t index) {
  Place p;
  for (size_t i = count; i-- > 0;) {
    const int64_t k = index % loops[i].size;
    index /= loops[i].size;
    p.out += k * loops[i].out;
    p.a += k * loops[i].a;
    p.b += k * loops[i].b;
  }
  return p;
}

// Counts through loops [0, count), at most kMaxRank + 1 of them, from an index on: no division a step.
class Places {
 public:
  Places(const Loops& loops, size_t count, int64_t index)
      : loops_(loops.data()), count_(count), at_(place(loops, count, index)) {
    for (size_t i = count; i-- > 0;) {
      index_[i] = index % loops[i].size;
      index /= loops[i].size;
    }
  }
  const Place& operator*() const { return at_; }
  void operator++() {
    for (size_t i = count_; i-- > 0;) {
      const Loop& l = loops_[i];
      at_.out += l.out;
      at_.a += l.a;
      at_.b += l.b;
      if (++index_[i] < l.size) return;
      at_.out -= l.out * l.size;
      at_.a -= l.a * l.size;
      at_.b -= l.b * l.size;
      index_[i] = 0;
    }
  }

 private:
  const Loop* loops_;
  size_t count_;
  Place at_;
  std::array<int64_t, kMaxRank + 1> index_{};
};

// f(place) for every index of all loops but the last.
template <class F>
void over(const Loops& loops, int threads, F f) {
  const size_t outer = loops.size() - 1;
  const int64_t total = product(loops, 0, outer);
  const int64_t chunk = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, loops[outer].size));
  parallel_for((total + chunk - 1) / chunk, threads, [&](int64_t block, int) {
    Places places(loops, outer, block * chunk);
    for (int64_t left = std::min(total - block * chunk, chunk); left > 0; --left, ++places) f(*places);
  });
}

// dst[out] = src[a] over all loops.
void copy_strided(const Rows& rows, Loops loops, const float* src, float* dst, int threads);
// `number` everywhere in y.
void fill(const Rows& rows, const View& y, float number, int threads);

class DenseNode : public Node {
 protected:
  DenseNode(NodeSpec s, const Values& values, Isa isa) : rows_(rows_for(isa)) {
    for (int v : s.inputs)
      if (is_packed(values, v)) fail(s, "'" + value(values, v).name + "' is packed");
    if (is_packed(values, s.output)) fail(s, "the output is packed");
    spec = std::move(s);
  }
  const Rows& rows_;
};

}  // namespace actzip::engine
