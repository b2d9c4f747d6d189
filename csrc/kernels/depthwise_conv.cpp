// Depthwise convolutions: a channel of output from the same channel of input, one output row an item.
#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/conv_base.h"

namespace actzip {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

class DepthwiseConv final : public ConvBase {
 public:
  DepthwiseConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias) {
    init(p, v, isa, bias, 0);
    const int64_t vl = kernels_->vl;
    keep_weights(taps_ * round_up(p.ic, vl), [&](float* to) {
      for (int64_t ch = 0; ch < p.ic; ++ch)
        for (int64_t t = 0; t < taps_; ++t) to[(ch / vl * taps_ + t) * vl + ch % vl] = weight[ch * taps_ + t];
    });
  }

  struct Scratch {
    float* acc;
    float* rows;
    const float** pointers;
    Finish finish;
  };
  Scratch carve(Carver& carver, const Cut& c, const ConvArgs& a) const {
    Scratch s{};
    s.acc = carver.take<float>(c.segment * 64);
    s.rows = carver.take<float>(problem_.in_packed ? problem_.kh * a.iw * 64 : 0);
    s.pointers = carver.take<const float*>(problem_.kh);
    s.finish = take_finish(carver, a, c, 1);
    return s;
  }
  // An item: one row, or some of a dense map, enough of them for every thread.
  Cut cut_rows(const ConvArgs& a, int threads) const {
    Cut c = whole_or_part(problem_, a);
    c.segment = c.ow;
    c.segments = 1;
    const int64_t height = c.end_row - c.first_row;
    c.rows =
        direct(a) ? std::clamp<int64_t>(c.images * height / (threads > 1 ? 8 * threads : 1), 1, kRows) : 1;
    c.bands = ceil_div(height, c.rows);
    c.in_rows = problem_.kh;
    return c;
  }
  int64_t items(const ConvArgs& a, int threads) const override {
    const Cut c = cut_rows(a, threads);
    return c.images * c.bands;
  }
  ConvPart part(const ConvArgs& a, int threads, int64_t item) const override {
    return part_of(cut_rows(a, threads), item, 0, units_.size());
  }
  size_t scratch_bytes(const ConvArgs& a, int threads) const override {
    Carver carver{nullptr};
    carve(carver, cut_rows(a, threads), a);
    return carver.used;
  }

  void run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const override {
    const Cut c = cut_rows(a, threads);
    Carver carver{static_cast<unsigned char*>(scratch)};
    const Scratch s = carve(carver, c, a);
    const int64_t n = c.first_image + item / c.bands, y = c.first_row + item % c.bands * c.rows;
    if (direct(a)) return run_tiles(a, c, n, y, std::min(c.rows, c.end_row - y), s);
    for (const Unit& u : units_) {
      point(a, n, y, u, s);
      compute(a, u, s, 0, c.ow, s.acc, 64);
      finish(a, c, u, s.finish, {n, y, 0, c.ow, s.acc, 64});
    }
  }

 private:
  static constexpr int64_t kRows = 16;  // of an item
  static constexpr int64_t kChannels =
      128;  // of a tile: their weights and some pixels fit the first-level cache
  static constexpr int64_t kNear = 4 << 20;    // bytes of a map of which much is near
  static constexpr int64_t kWindow = 8 << 10;  // floats of the input rows that an output row of a tile reads

  // Rows [y, y + rows) of a dense map: some pixels and channels of all of them, then the next, so that an
  // input row is in the first-level cache when the rows below read it again.
  void run_tiles(const ConvArgs& a, const Cut& c, int64_t n, int64_t y, int64_t rows,
                 const Scratch& s) const {
    const ConvProblem& p = problem_;
    const int64_t channels = ceil_div(p.ic, ceil_div(p.ic, kChannels) * kernels_->vl) * kernels_->vl;
    const bool near = a.rows >= 0 || 4 * a.ih * a.iw * p.ic <= kNear;
    const int64_t fit = near ? kWindow / (channels * p.sw * ((p.kh - 1) * p.dh + 1)) : c.ow;
    const int64_t pixels = round_up(ceil_div(c.ow, ceil_div(c.ow, std::max<int64_t>(fit, 16))), 8);
    for (int64_t first = 0; first < p.ic; first += channels) {
      const Unit u{first, std::min(channels, p.ic - first), 0, 0, 0, false, {}};
      for (int64_t x = 0; x < c.ow; x += pixels)
        for (int64_t r = y; r < y + rows; ++r) {
          point(a, n, r, u, s);
          compute(a, u, s, x, std::min(pixels, c.ow - x),
                  a.out + ((n * c.oh + r) * c.ow + x) * a.out_stride + first, a.out_stride);
        }
    }
  }

  // From a dense map to a dense map, without anything in between.
  bool direct(const ConvArgs& a) const {
    const ConvProblem& p = problem_;
    return !p.in_packed && !p.out_packed && p.bounds() && a.residual == nullptr && a.residual_map == nullptr;
  }

  // Where the unit's channels of the kernel's input rows lie: null in the padding. Input blocks may be cut
  // differently from the output's: read by output block, from what overlaps it.
  void point(const ConvArgs& a, int64_t n, int64_t y, const Unit& u, const Scratch& s) const {
    const ConvProblem& p = problem_;
    for (int64_t ky = 0; ky < p.kh; ++ky) {
      const int64_t iy = y * p.sh - p.pad_top + ky * p.dh;
      s.pointers[ky] = nullptr;
      if (iy < 0 || iy >= a.ih) continue;
      if (!p.in_packed) {
        s.pointers[ky] = a.in + (n * a.ih + iy) * a.iw * a.in_stride + u.first;
        continue;
      }
      float* row = s.rows + ky * a.iw * 64;
      unpack_channels(a, n, iy, u.first, u.width, row);
      s.pointers[ky] = row;
    }
  }

  // Output pixels [x, x + count) of the row whose input rows are pointed to.
  void compute(const ConvArgs& a, const Unit& u, const Scratch& s, int64_t x, int64_t count, float* to,
               int64_t stride) const {
    const ConvProblem& p = problem_;
    kernels::DepthwiseRow d{};
    d.rows = s.pointers;
    d.in_stride = p.in_packed ? 64 : a.in_stride;
    d.iw = a.iw;
    d.kh = p.kh;
    d.kw = p.kw;
    d.sw = p.sw;
    d.dw = p.dw;
    d.pad_left = p.pad_left;
    d.weight = weights_.get() + u.first * taps_;
    d.bias = bias_.get() + u.first;
    d.channels = u.width;
    const bool last = to != s.acc;
    d.lo = last && p.act == ActKind::relu ? 0.0f : last && p.act == ActKind::clip ? p.lo : -kInfinity;
    d.hi = last && p.act == ActKind::clip ? p.hi : kInfinity;
    d.acc = to;
    d.acc_stride = stride;
    d.first = x;
    d.count = count;
    kernels_->depthwise(d);
  }

  void unpack_channels(const ConvArgs& a, int64_t n, int64_t iy, int64_t first, int64_t width,
                       float* dst) const {
    const PackedMap& map = *a.in_map;
    int64_t at = 0;
    for (size_t b = 0; b < in_blocks_.size(); at += in_blocks_[b].width, ++b) {
      const int64_t block = a.in_first_block + static_cast<int64_t>(b);
      const int64_t w = in_blocks_[b].width;
      if (at + w <= first || at >= first + width) continue;
      if (at >= first && at + w <= first + width) {
        unpack_row(map, n, iy, block, dst + (at - first), 64);
        continue;
      }
      alignas(64) float pixel[64 + 16];
      const int64_t lo = std::max(at, first), hi = std::min(at + w, first + width);
      const uint64_t* masks = map.masks(n, iy, block);
      const PackedLayout& l = map.layout();
      const auto* src = static_cast<const unsigned char*>(map.segment(n, iy, block));
      alignas(64) float values[64 + 16];
      for (int64_t x = 0; x < a.iw; ++x) {
        const int64_t some = __builtin_popcountll(masks[x]);
        kernels_->load_values(src, some, static_cast<int>(l.type), l.blocks[static_cast<size_t>(block)].scale,
                              values);
        src += static_cast<size_t>(some) * value_size(l.type);
        kernels_->expand(masks + x, values, 1, w, pixel, 64);
        std::memcpy(dst + x * 64 + (lo - first), pixel + (lo - at), static_cast<size_t>(hi - lo) * 4);
      }
    }
  }
};

bool can(const Variant&, const ConvProblem& p) { return is_depthwise(p) && !p.in_planes; }

}  // namespace

const Family kDepthwise = {can, make_as<DepthwiseConv>};

}  // namespace actzip
