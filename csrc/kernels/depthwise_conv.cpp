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
  Cut cut_rows(const ConvArgs& a) const {
    Cut c = whole_or_part(problem_, a);
    c.segment = c.ow;
    c.rows = c.segments = 1;
    c.bands = c.end_row - c.first_row;
    c.in_rows = problem_.kh;
    return c;
  }
  int64_t items(const ConvArgs& a, int) const override {
    const Cut c = cut_rows(a);
    return c.images * c.bands;
  }
  ConvPart part(const ConvArgs& a, int, int64_t item) const override {
    return part_of(cut_rows(a), item, 0, units_.size());
  }
  size_t scratch_bytes(const ConvArgs& a, int) const override {
    Carver carver{nullptr};
    carve(carver, cut_rows(a), a);
    return carver.used;
  }

  void run_item(const ConvArgs& a, int, int64_t item, void* scratch) const override {
    const Cut c = cut_rows(a);
    Carver carver{static_cast<unsigned char*>(scratch)};
    const Scratch s = carve(carver, c, a);
    const int64_t n = c.first_image + item / c.bands, y = c.first_row + item % c.bands;
    if (direct(a)) {
      for (int64_t first = 0; first < problem_.ic; first += kAtOnce) {
        const Unit u{first, std::min(kAtOnce, problem_.ic - first), 0, 0, 0, false, {}};
        point(a, n, y, u, s);
        compute(a, u, s, c.ow, a.out + (n * c.oh + y) * c.ow * a.out_stride + first, a.out_stride);
      }
      return;
    }
    for (const Unit& u : units_) {
      point(a, n, y, u, s);
      compute(a, u, s, c.ow, s.acc, 64);
      finish(a, c, u, s.finish, {n, y, 0, c.ow, s.acc, 64});
    }
  }

 private:
  static constexpr int64_t kAtOnce = 384;  // channels whose weights stay in the first-level cache

  // From a dense map to a dense map, without anything in between.
  bool direct(const ConvArgs& a) const {
    const ConvProblem& p = problem_;
    return !p.in_packed && !p.out_packed && p.act != ActKind::threshold && a.residual == nullptr &&
           a.residual_map == nullptr;
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

  void compute(const ConvArgs& a, const Unit& u, const Scratch& s, int64_t count, float* to,
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
    d.first = 0;
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
