// Internal: nodes on maps, dense or packed.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "engine/nodes/attributes.h"
#include "engine/rows.h"

namespace actzip::engine {

inline size_t round_floats(int64_t n) { return static_cast<size_t>((n + 31) / 16 * 16); }

// Common to nodes that read and write maps, dense or packed, in blocks of channels.
class MapNode : public Node {
 protected:
  MapNode(NodeSpec s, const Values& values, Isa isa) : rows_(rows_for(isa)) {
    for (int v : s.inputs)
      if (value(values, v).layout == Layout::plain) fail(s, "'" + value(values, v).name + "' is not a map");
    if (value(values, s.output).layout == Layout::plain) fail(s, "the output is not a map");
    spec = std::move(s);
  }

  // Channels to work on at once: the output's blocks, else the input's, else all.
  static std::vector<BlockOf> cuts(const View& x, const View& y) {
    if (y.layout == Layout::packed) return blocks_of(y);
    if (x.layout == Layout::packed) return blocks_of(x);
    return {{0, 0, y.c()}};
  }

  // Row y of channels [first, first + width), as pixels `*stride` floats apart: the map's own memory, or
  // unpacked to `scratch` (w * (64 or width rounded) floats and one block more).
  static const float* load(const View& v, int64_t n, int64_t y, int64_t first, int64_t width, float* scratch,
                           int64_t* stride) {
    if (v.layout == Layout::map) {
      *stride = v.pixel();
      return v.row(n, y) + first;
    }
    *stride = (width + 15) / 16 * 16;
    const auto& blocks = v.packed->layout().blocks;
    for (size_t b = static_cast<size_t>(v.first_block); b < blocks.size(); ++b) {
      const int64_t from = blocks[b].first - v.first_channel, to = from + blocks[b].width;
      if (to <= first) continue;
      if (from >= first + width) break;
      if (from >= first && to <= first + width) {
        unpack_row(*v.packed, n, y, static_cast<int64_t>(b), scratch + (from - first), *stride);
        continue;
      }
      float* side = scratch + *stride * v.w();
      unpack_row(*v.packed, n, y, static_cast<int64_t>(b), side, 64);
      const int64_t a = std::max(from, first), e = std::min(to, first + width);
      for (int64_t x = 0; x < v.w(); ++x)
        std::memcpy(scratch + x * *stride + (a - first), side + x * 64 + (a - from),
                    static_cast<size_t>(e - a) * sizeof(float));
    }
    return scratch;
  }
  static int64_t load_floats(const View& v, int64_t width) {
    if (v.layout == Layout::map) return 0;
    return static_cast<int64_t>(round_floats(v.w() * ((width + 15) / 16 * 16) + v.w() * 64 + 64));
  }

  const Rows& rows_;
};

// A node whose output rows can be computed some at a time.
class RowsNode : public MapNode {
 public:
  using MapNode::MapNode;
  // Rows [y0, y1) of image n of y, from x, of which the rows that they need are there.
  virtual void run_rows(Context& c, const View& x, const View& y, int64_t n, int64_t y0, int64_t y1,
                        int threads) const = 0;
};

// op "pool", for a node that pools what it computes.
std::unique_ptr<RowsNode> make_rows_pool(NodeSpec s, const Values& values, Isa isa);

}  // namespace actzip::engine
