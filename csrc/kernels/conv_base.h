// Internal: what the convolutions share: how the output is cut into work items, and what follows the sums.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/conv.h"
#include "kernels/kernels.h"
#include "kernels/memory.h"
#include "kernels/variants.h"
#include "kernels/weight_store.h"

namespace actzip {

// Output channels computed together: some vectors wide, inside one convolution group.
struct Sub {
  int64_t first, width;  // output channels
  int nv;
  int64_t offset;  // floats from the unit's first accumulator
  int64_t group;
  int64_t weight;  // offset of its packed weights
};
// Whole output blocks that share an accumulator tile.
struct Unit {
  int64_t first, width;  // output channels
  int64_t first_block, blocks;
  int64_t stride;  // floats of a pixel's accumulators
  bool compact;    // sub tiles have holes between them
  std::vector<Sub> subs;
};

// How the output of one run is cut: bands of rows, and rows into segments where they are long.
struct Cut {
  int64_t oh, ow, rows, bands, segment, segments, in_rows;
  int64_t first_image, images, first_row, end_row;  // what is computed
};
Cut whole_or_part(const ConvProblem& p, const ConvArgs& a);

// Output pixels x0 .. x0 + count of one row, and where their sums lie.
struct RowPart {
  int64_t n, y, x0, count;
  float* acc;
  int64_t stride;               // floats between the accumulators of pixels
  const float* bias = nullptr;  // of every channel, padded; null: the sums hold it
};

class ConvBase : public Conv {
 public:
  const void* weights() const final { return weights_.get(); }

 protected:
  // Units and subs of at most `nv` vectors (0: units without subs), the bias and thresholds.
  void init(const ConvProblem& p, const Variant& v, Isa isa, const float* bias, int nv);
  // weights_: `count` of them, of the problem's store or written by `pack` into zeros. `order`: part of their
  // key, where kernels of this name had them in another order before.
  void keep_weights(int64_t count, const std::function<void(float*)>& pack, const char* order = "");
  // `count` weights of the layer as they are, as raw_: those of an owner, which is kept, or a copy.
  void keep_raw(const float* weight, int64_t count, std::shared_ptr<const void> owner);
  // Channels that a unit may have, where a sub may have `widest`.
  virtual int64_t unit_width(int64_t widest) const { return widest; }

  // Of an item of units [unit, last) where those of one unit follow each other.
  ConvPart part_of(const Cut& c, int64_t item, size_t unit, size_t last) const;
  Cut cut(const ConvArgs& a, int threads, int64_t groups_of_units) const;
  // Whether row `r` of a band's input rows meets a kernel row of one of `rows` output rows.
  bool touched(int64_t r, int64_t rows) const;

  // Staging for the packed output rows of one unit and for residuals.
  struct Finish {
    float* staged;  // [blocks][staged_stride]
    int64_t staged_stride;
    int64_t* counts;  // per block, of the row so far
    float* residual;  // [segment][64]
  };
  Finish take_finish(Carver& carver, const ConvArgs& a, const Cut& c, int64_t units_at_once) const;
  // Residual, activation, and to where the output goes. Segments of a row come from left to right. `slot`: of
  // the unit's first block in the staging.
  void finish(const ConvArgs& a, const Cut& c, const Unit& u, const Finish& f, const RowPart& part,
              int64_t slot = 0) const;

  // Part of a row, every channel of a block, 64 floats a pixel.
  void unpack_pixels(const PackedMap& map, int64_t n, int64_t y, int64_t block, int64_t x0, int64_t count,
                     float* dst) const;

  const float* bias_of(size_t unit, int64_t offset = 0) const {  // laid out as the accumulators are
    return tile_bias_.get() + tile_bias_at_[unit] + offset;
  }
  int64_t widest_unit() const;  // the greatest stride

  Variant variant_{};
  const kernels::Kernels* kernels_ = nullptr;
  std::vector<ChannelBlock> in_blocks_, out_blocks_;
  std::vector<Unit> units_;
  Floats bias_, thresholds_;
  SharedFloats weights_;
  const float* raw_ = nullptr;  // [oc][ic][taps], where `keep_raw` was called
  int64_t taps_ = 1;

 private:
  void cut_units(int nv);
  void cut_subs(Unit& u, int nv) const;
  void place_bias();
  void compact(const Unit& u, const RowPart& part) const;
  void pack(const ConvArgs& a, const Cut& c, const Finish& f, const RowPart& part, int64_t block,
            const kernels::EpilogueRow& row, int64_t slot) const;

  Floats tile_bias_;
  std::shared_ptr<const void> raw_owner_;
  Floats raw_copy_;
  std::vector<int64_t> tile_bias_at_;
};

}  // namespace actzip
