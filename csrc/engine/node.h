// Internal: what nodes see of a run.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/plan.h"
#include "engine/rows.h"
#include "kernels/packed.h"

namespace actzip::engine {

inline constexpr int kMaxRank = 8;
using Values = std::vector<ValueSpec>;

inline constexpr size_t kAlign = 64;
inline size_t rounded(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Elements of a value. Throws std::bad_alloc for more than any memory holds: products of sizes never
// overflow.
int64_t elements(const ValueSpec& v, int64_t batch);

// A value in a context.
struct View {
  Layout layout = Layout::plain;
  int rank = 0;
  std::array<int64_t, kMaxRank> dims{};     // logical
  std::array<int64_t, kMaxRank> strides{};  // in floats, per logical dimension; dense only
  float* data = nullptr;                    // dense
  PackedMap* packed = nullptr;
  int64_t first_block = 0;    // packed: the first block of this value in the map
  int64_t first_channel = 0;  // and its first channel there

  int64_t n() const { return dims[0]; }
  int64_t c() const { return dims[1]; }
  int64_t h() const { return dims[2]; }
  int64_t w() const { return dims[3]; }
  int64_t pixel() const { return strides[3]; }  // of a map
  int64_t count() const {
    int64_t k = 1;
    for (int i = 0; i < rank; ++i) k *= dims[static_cast<size_t>(i)];
    return k;
  }
  float* row(int64_t image, int64_t y) const { return data + image * strides[0] + y * strides[2]; }
};

struct Context {
  int64_t batch = 0;
  int threads = 1;
  std::vector<View> views;
  std::vector<std::unique_ptr<PackedMap>> maps;  // by root value, null for others
  struct Region {
    size_t index = 0, values = 0, capacity = 0;  // offsets in the arena
    int slots = -1;  // a packed map whose segments have places of their own: the root where those lie
  };
  std::vector<Region> regions;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char, Free> arena;
  size_t arena_bytes = 0;
  // Of each node: where its scratch begins in the arena, bytes of each worker's, and how many there should be
  // at most.
  struct Scratch {
    size_t begin = 0, stride = 0, limit = 0;
  };
  std::vector<Scratch> scratches;
  size_t node = 0;  // that runs now

  unsigned char* scratch_of(int worker) const {
    return arena.get() + scratches[node].begin + static_cast<size_t>(worker) * scratches[node].stride;
  }
};

// The blocks of a packed value, as channels of the value.
struct BlockOf {
  int64_t block;  // in the map
  int64_t first;  // channel of the value
  int64_t width;
};
std::vector<BlockOf> blocks_of(const View& v);

class Node {
 public:
  NodeSpec spec;  // arrays that are packed elsewhere are emptied
  virtual ~Node() = default;
  // Bytes of scratch each worker needs: no more than the context's limit for the node, where it can.
  virtual size_t scratch(const Context&, int threads) const {
    (void)threads;
    return 0;
  }
  virtual void run(Context& c, int threads) const = 0;
  // How many copies of the values that it keeps in bands are there.
  virtual int bands(const Context&) const { return 1; }
  // The input whose memory the output may take over, for each number of it is read before it is written; -1.
  virtual int in_place() const { return -1; }
  // Where its packed weights lie, and bytes of them: nodes may share some.
  using Weights = std::map<const void*, size_t>;
  virtual void weights(Weights* found) const { (void)found; }
  virtual std::string kernel() const { return {}; }
  virtual std::string kind() const { return "dense"; }
  const View& in(const Context& c, size_t i = 0) const {
    return c.views[static_cast<size_t>(spec.inputs[i])];
  }
  const View& out(const Context& c) const { return c.views[static_cast<size_t>(spec.output)]; }
};

// Throws std::invalid_argument naming the node when attributes, layouts or shapes do not fit. Takes the
// arrays of `spec`.
std::unique_ptr<Node> make_node(NodeSpec spec, const Values& values, Isa isa);

}  // namespace actzip::engine
