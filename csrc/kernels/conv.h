// Convolutions (and linear layers: 1x1 on a map of one pixel) on dense or packed input, to dense or packed
// output.
//
//   ConvProblem p; ...                                   what is computed, and how input and output are
//   stored auto names = conv_variants(p);                       kernels that can do it here, a sensible one
//   first auto conv = Conv::make(p, names[0], weight, bias);   packs the weights; immutable from here on
//   conv->run(args, threads);                            or, inside somebody else's parallel_for:
//   for i in [0, conv->items(args)): conv->run_item(args, i, scratch of this worker)
//
// Result: out = act(pool(conv(in, weight)) + bias + residual), float32 arithmetic. Each output element is
// summed in an order that depends on the variant alone: it is the same for every number of threads and every
// batch size. A zero input is skipped by sparse kernels: where a weight may be infinite or NaN, use a dense
// one.
//
// Dense maps are NHWC with a free pixel stride (a concatenation or a slice is a pointer to its first
// channel). Packed maps: packed.h. Errors: std::invalid_argument with what is wrong; run_item itself does not
// check.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/cpu.h"
#include "kernels/packed.h"

namespace actzip {

class WeightStore;

enum class ActKind : int {
  none = 0,
  relu = 1,       // max(x, 0), NaN stays NaN
  clip = 2,       // min(max(x, lo), hi), NaN stays NaN
  threshold = 3,  // x if x > T else 0 (T: `lo`, or one per output channel); NaN stays NaN
  quantize = 4,   // step * min(max(round(x / step), lo), hi), half to even; lo and hi are integers
};

struct ConvProblem {
  int64_t ic = 0, oc = 0;
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, dh = 1, dw = 1;
  int64_t pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;  // zeros
  int64_t groups = 1;
  int64_t pool = 1;  // 2: the greatest of every 2 x 2 outputs, by Winograd kernels; no residual then, and an
                     // activation that nowhere falls

  bool in_planes = false;  // dense input as it comes from outside: NCHW, a plane a channel
  bool in_packed = false;
  // Packed input: the blocks read, in order, as the map has them (their `first` may start anywhere: only
  // differences count); they cover ic channels. Empty: split_channels(ic).
  std::vector<ChannelBlock> in_blocks;
  // Packed output: blocks split_channels(oc) are written, starting at ConvArgs::out_first_block.
  bool out_packed = false;

  ActKind act = ActKind::none;
  float lo = 0.0f, hi = 0.0f;
  float step = 1.0f;  // ActKind::quantize
  // Before the residual: another `quantize`, with numbers of its own; 0: none.
  float pre_step = 0.0f, pre_lo = 0.0f, pre_hi = 0.0f;
  std::vector<float> thresholds;  // ActKind::threshold: oc values, or empty for `lo`
  // Whether what follows the sums is an addition and a lower and an upper bound, at most.
  bool bounds() const { return act != ActKind::threshold && act != ActKind::quantize && pre_step == 0; }

  // Where packed weights are kept and found, and the layer's name there; null: by the Conv alone.
  WeightStore* store = nullptr;
  std::string layer;

  // What the variant list is ordered by; neither changes results. Height and width of the input, its density.
  int64_t hint_h = 0, hint_w = 0;
  double hint_density = 1.0;

  // The blocks of a packed input.
  std::vector<ChannelBlock> blocks() const { return in_blocks.empty() ? split_channels(ic) : in_blocks; }
  // Throws std::invalid_argument for what cannot be computed.
  void check() const;

  int64_t out_h(int64_t ih) const {
    return ((ih + pad_top + pad_bottom - dh * (kh - 1) - 1) / sh + 1) / pool;
  }
  int64_t out_w(int64_t iw) const {
    return ((iw + pad_left + pad_right - dw * (kw - 1) - 1) / sw + 1) / pool;
  }
};

// Where the operands of one run lie. Channel strides are 1.
struct ConvArgs {
  int64_t n = 1, ih = 1, iw = 1;

  const float* in = nullptr;  // dense input: pixel (n, y, x) at in + ((n * ih + y) * iw + x) * in_stride;
                              // of planes: as they lie, one after the other
  int64_t in_stride = 0;
  const PackedMap* in_map = nullptr;  // packed input, of n x ih x iw
  int64_t in_first_block = 0;

  float* out = nullptr;  // dense output, n x out_h x out_w
  int64_t out_stride = 0;
  PackedMap* out_map = nullptr;  // packed output: bound; its other blocks are not touched
  int64_t out_first_block = 0;

  // At most one residual, of the output's size, elsewhere or just where that lies; its blocks (packed) must
  // be cut as split_channels(oc).
  const float* residual = nullptr;
  int64_t residual_stride = 0;
  const PackedMap* residual_map = nullptr;
  int64_t residual_first_block = 0;

  // The part of the output to compute: rows [first_row, first_row + rows) of images [first_image, first_image
  // + images); -1: to the last. `out` stays where row 0 of image 0 would be.
  int64_t first_image = 0, images = -1, first_row = 0, rows = -1;

  // Bytes of scratch that a kernel should do with, where it can at some cost in time; 0: as it likes.
  size_t scratch_limit = 0;
};

// What of the output a work item computes: channels [first, first + width) of whole rows of one image, or of
// several whole images.
struct ConvPart {
  int64_t image, first_row, rows, first, width;
  int64_t images = 1;
};

// One row of the kernel table: a way to compute a convolution on one instruction set.
struct KernelRow {
  const char* name;       // unique within an instruction set: "sparse-v4", "dense-6x64" ...
  const char* kind;       // "sparse" (skips zeros of packed input), "dense" (packed input is expanded by row
                          // bands), "depthwise", "winograd" (skips channels that a tile does not have)
  int oc_tile;            // output channels computed at once
  int pixel_tile;         // output pixels computed at once
  const char* reference;  // where the idea is described
};
const std::vector<KernelRow>& kernel_table(Isa isa);

// Names of the rows of active_isa() that can compute `p`, most promising first; never empty for a valid
// problem. Throws std::invalid_argument for an impossible one.
std::vector<std::string> conv_variants(const ConvProblem& p);

class Conv {
 public:
  // weight: float32 [oc][ic / groups][kh][kw], bias: [oc] or null. Both are copied; kernels that need the
  // weights as they are, too, share them instead where `owner` keeps them. `variant`: a name of
  // conv_variants(p), or empty for the first. The kernel is that of the instruction set active now, for good.
  static std::unique_ptr<Conv> make(const ConvProblem& p, const std::string& variant, const float* weight,
                                    const float* bias, const std::shared_ptr<const void>& owner = nullptr);
  virtual ~Conv() = default;

  const ConvProblem& problem() const { return problem_; }
  const KernelRow& kernel() const { return *row_; }
  Isa isa() const { return isa_; }
  size_t weight_bytes() const { return weight_bytes_; }
  virtual const void* weights() const = 0;  // where they lie; layers of one store may share them

  // Throws std::invalid_argument when args do not fit the problem.
  void check(const ConvArgs& args) const;
  // Work items of a run, independent of each other, any order, any thread. `threads` only shapes them (more,
  // smaller ones): give the same value to items, scratch_bytes and run_item.
  virtual int64_t items(const ConvArgs& args, int threads) const = 0;
  // Scratch each concurrent run_item needs: bytes, aligned to 64, content irrelevant before and after.
  virtual size_t scratch_bytes(const ConvArgs& args, int threads) const = 0;
  virtual void run_item(const ConvArgs& args, int threads, int64_t item, void* scratch) const = 0;
  // For those who go on with a dense output while it lies in the cache.
  virtual ConvPart part(const ConvArgs& args, int threads, int64_t item) const = 0;
  // Whether an item's rows lie apart, so that `part` does not apply.
  virtual bool apart() const { return false; }

  // check, then all items on `threads` threads with scratch of its own. Convenience for tests and trials.
  void run(const ConvArgs& args, int threads) const;

 protected:
  ConvProblem problem_;
  const KernelRow* row_ = nullptr;
  Isa isa_ = Isa::baseline;
  size_t weight_bytes_ = 0;
};

// GFLOP/s (two a multiply-add) of one core by a loop of independent FMAs in registers on active_isa(), best
// of several tries within about `seconds`: the peak that shares are measured against.
double measure_peak_gflops(double seconds);

}  // namespace actzip
