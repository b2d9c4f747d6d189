// Dense convolutions: tiles of pixels times output channels, the pixels' input found through a table of
// pointers (indirect convolution). Packed input is expanded by bands of rows.
#include <algorithm>
#include <cstring>

#include "kernels/conv_base.h"

namespace actzip {
namespace {

constexpr int64_t kPanelBytes = 192 << 10;
constexpr int64_t kBandBytes = 128 << 10;  // of the input of a band of a 1x1 convolution
constexpr int64_t kLongest = 1024;         // its pixels
constexpr int64_t kShared = 256;  // channels of an item: they share the expanded input and the pointer table

bool merges(const ConvProblem& p) { return p.groups == 1 && p.kw > 1 && p.dw == 1 && p.ic < 16; }

class DenseConv final : public ConvBase {
 public:
  DenseConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias) {
    init(p, v, isa, bias, v.nv);
    // Few input channels (first layers): the taps of a kernel row are one run of kw * ic floats in a padded
    // copy of the input rows.
    merged_ = merges(p);
    steps_ = merged_ ? p.kh : taps_;
    depth_ = merged_ ? p.kw * p.ic : p.ic / p.groups;
    // Depth is cut so that a panel's weights stay in the second-level cache.
    const int64_t panel = v.nv * kernels_->vl;
    slice_ = std::max<int64_t>(32, kPanelBytes / (4 * panel * steps_));
    slice_ = ceil_div(depth_, ceil_div(depth_, slice_));
    // Pixels in the order in which whole tiles fall into the padding together.
    by_columns_ = p.kw > 1 && p.kw >= p.kh && !merged_;
    // What is done once a band weighs where a pixel has few products: longer bands.
    if (!gathered() && (merged_ || taps_ == 1))
      variant_.tile = std::clamp(kBandBytes / (4 * p.ic), variant_.tile, kLongest);
    zeros_ = make_floats(p.ic + 16);
    shared_ = kShared / unit_width(0);
    bunches_ = ceil_div(static_cast<int64_t>(units_.size()), shared_);
    pack_weights(weight);
  }

  // Wide units are cut into even tiles: 144 channels are three of 48, not two of 64 and one of 16.
  int64_t unit_width(int64_t) const override { return gathered() ? 64 : kShared; }

  int64_t items(const ConvArgs& a, int threads) const override {
    const Cut c = cut(a, threads, bunches_);
    return c.images * c.bands * bunches_;
  }
  ConvPart part(const ConvArgs& a, int threads, int64_t item) const override {
    const Cut c = cut(a, threads, bunches_);
    const auto unit = static_cast<size_t>(item / (c.images * c.bands) * shared_);
    return part_of(c, item, unit, std::min(units_.size(), unit + static_cast<size_t>(shared_)));
  }
  size_t scratch_bytes(const ConvArgs& a, int threads) const override {
    Carver carver{nullptr};
    carve(carver, cut(a, threads, bunches_), a);
    return carver.used;
  }
  void run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const override;

 private:
  struct Scratch {
    float* acc;
    const float** table;  // [tile][tap][mr]: where the tile's pixels find a tap's input
    int32_t* taps;        // [tile][1 + steps]: how many taps meet the input, and which
    float* rows;          // expanded or padded input rows
    int64_t row_stride;
    Finish finish;
  };
  // What an item computes: segment [x0, x0 + count) of rows [y0, y0 + rows).
  struct Band {
    const ConvArgs& a;
    const Cut& cut;
    const Scratch& s;
    int64_t n, y0, rows, iy0;
    int64_t x0 = 0, count = 0;
    int64_t mr = 0;  // that the table is laid out for

    int64_t pixels() const { return rows * count; }
    int64_t first_pixel() const { return (n * cut.oh + y0) * cut.ow + x0; }
  };

  void pack_weights(const float* weight);
  Scratch carve(Carver& carver, const Cut& c, const ConvArgs& a) const;
  bool copied() const { return problem_.in_packed || merged_; }  // the input is read from Scratch::rows
  void read_rows(const Band& b) const;
  void read_row(const ConvArgs& a, int64_t n, int64_t iy, float* dst) const;
  // Whether sums are gathered before they are stored, whatever the band.
  bool gathered() const { return problem_.out_packed || !problem_.bounds(); }
  bool direct(const Band& b, const Unit& u) const;
  void run_sub(Band& b, size_t unit, const Sub& sub) const;
  void run_tiles(const Band& b, const Sub& sub, kernels::DenseTile t, float* acc) const;
  void tabulate(const Band& b) const;
  void tabulate_pixels(const Band& b, const float* base, int64_t row_stride, int64_t pixel_stride) const;
  void tabulate_runs(const Band& b, const float* base, int64_t row_stride, int64_t pixel_stride) const;

  bool merged_ = false, by_columns_ = false;
  int64_t steps_ = 1, depth_ = 1, slice_ = 1, shared_ = 1, bunches_ = 1;  // shared_: units of an item
  Floats zeros_;
};

// [unit][sub][slice][step][channel][nv * vl]
void DenseConv::pack_weights(const float* weight) {
  const ConvProblem& p = problem_;
  const int64_t vl = kernels_->vl, icg = p.ic / p.groups;
  int64_t total = 0;
  for (Unit& u : units_)
    for (Sub& s : u.subs) {
      s.weight = total;
      total += steps_ * depth_ * s.nv * vl;
    }
  keep_weights(total, [&](float* to) {
    for (const Unit& u : units_)
      for (const Sub& s : u.subs) {
        float* w = to + s.weight;
        for (int64_t k0 = 0; k0 < depth_; k0 += slice_)
          for (int64_t t = 0; t < steps_; ++t)
            for (int64_t k = k0; k < std::min(depth_, k0 + slice_); ++k, w += s.nv * vl) {
              const int64_t c = merged_ ? k % p.ic : k;
              const int64_t tap = merged_ ? t * p.kw + k / p.ic : t;
              for (int64_t o = 0; o < s.width; ++o) w[o] = weight[((s.first + o) * icg + c) * taps_ + tap];
            }
      }
  });
}

DenseConv::Scratch DenseConv::carve(Carver& carver, const Cut& c, const ConvArgs& a) const {
  const ConvProblem& p = problem_;
  Scratch s{};
  s.acc = carver.take<float>(c.rows * c.segment * widest_unit());
  s.table = carver.take<const float*>((c.rows * c.segment + kernels::kMaxMr) * steps_);
  s.taps = carver.take<int32_t>(c.rows * c.segment * (1 + steps_));
  s.row_stride = merged_ ? (a.iw + p.pad_left + p.pad_right) * p.ic + 16 : a.iw * p.ic + 16;
  s.rows = carver.take<float>(copied() ? c.in_rows * s.row_stride : 0);
  s.finish = take_finish(carver, a, c, shared_);
  return s;
}

void DenseConv::run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const {
  const Cut c = cut(a, threads, bunches_);
  Carver carver{static_cast<unsigned char*>(scratch)};
  const Scratch s = carve(carver, c, a);
  const int64_t per_bunch = c.images * c.bands, at = item % per_bunch;
  const auto first_unit = static_cast<size_t>(item / per_bunch * shared_);
  const size_t last_unit = std::min(units_.size(), first_unit + static_cast<size_t>(shared_));
  const int64_t y0 = c.first_row + at % c.bands * c.rows;
  Band b{a,
         c,
         s,
         c.first_image + at / c.bands,
         y0,
         std::min(c.rows, c.end_row - y0),
         y0 * problem_.sh - problem_.pad_top};
  if (copied()) read_rows(b);
  for (b.x0 = 0; b.x0 < c.ow; b.x0 += c.segment) {
    b.count = std::min(c.segment, c.ow - b.x0);
    b.mr = 0;
    for (size_t unit = first_unit; unit < last_unit; ++unit) {
      const Unit& u = units_[unit];
      for (const Sub& sub : u.subs) run_sub(b, unit, sub);
      if (direct(b, u)) continue;
      const int64_t slot = c.segments > 1 ? u.first_block - units_[first_unit].first_block : 0;
      for (int64_t y = 0; y < b.rows; ++y) {
        float* acc = s.acc + y * (by_columns_ ? 1 : b.count) * u.stride;
        finish(a, c, u, s.finish, {b.n, y0 + y, b.x0, b.count, acc, (by_columns_ ? b.rows : 1) * u.stride},
               slot);
      }
    }
  }
}

// The band's input rows, expanded; between the padding's zeros where taps are merged.
void DenseConv::read_rows(const Band& b) const {
  const ConvProblem& p = problem_;
  const ConvArgs& a = b.a;
  const int64_t in_rows = (b.rows - 1) * p.sh + (p.kh - 1) * p.dh + 1;
  const int64_t left = merged_ ? p.pad_left : 0, padded = merged_ ? a.iw + p.pad_left + p.pad_right : a.iw;
  for (int64_t r = 0; r < in_rows; ++r) {
    if (!touched(r, b.rows)) continue;
    const int64_t iy = b.iy0 + r;
    float* row = b.s.rows + r * b.s.row_stride;
    if (iy < 0 || iy >= a.ih) {
      if (merged_) std::memset(row, 0, static_cast<size_t>(padded * p.ic) * 4);
      continue;
    }
    std::memset(row, 0, static_cast<size_t>(left * p.ic) * 4);
    read_row(a, b.n, iy, row + left * p.ic);
    std::memset(row + (left + a.iw) * p.ic, 0, static_cast<size_t>((padded - left - a.iw) * p.ic) * 4);
  }
}

void DenseConv::read_row(const ConvArgs& a, int64_t n, int64_t iy, float* dst) const {
  const ConvProblem& p = problem_;
  if (p.in_planes) {
    const int64_t plane = a.ih * a.iw;
    const float* src = a.in + n * p.ic * plane + iy * a.iw;
    if (p.ic == 3) return kernels_->interleave3(src, plane, a.iw, dst);
    for (int64_t c = 0; c < p.ic; ++c)
      for (int64_t x = 0; x < a.iw; ++x) dst[x * p.ic + c] = src[c * plane + x];
    return;
  }
  if (!p.in_packed) {
    const float* src = a.in + (n * a.ih + iy) * a.iw * a.in_stride;
    if (a.in_stride == p.ic) {
      std::memcpy(dst, src, static_cast<size_t>(a.iw * p.ic) * 4);
      return;
    }
    for (int64_t x = 0; x < a.iw; ++x)
      std::memcpy(dst + x * p.ic, src + x * a.in_stride, static_cast<size_t>(p.ic) * 4);
    return;
  }
  int64_t first = 0;
  for (size_t b = 0; b < in_blocks_.size(); first += in_blocks_[b].width, ++b) {
    const PackedMap& map = *a.in_map;
    const int64_t block = a.in_first_block + static_cast<int64_t>(b);
    if (map.layout().type == ValueType::f32)
      kernels_->expand(map.masks(n, iy, block), static_cast<const float*>(map.segment(n, iy, block)), a.iw,
                       in_blocks_[b].width, dst + first, p.ic);
    else
      unpack_row(map, n, iy, block, dst + first, p.ic);
  }
}

// Whether the unit's sums go to the output at once: its pixels follow each other, and what lies beyond a
// tile's channels is never needed again; nor is the residual there, by other slices.
bool DenseConv::direct(const Band& b, const Unit& u) const {
  return !gathered() && b.a.residual_map == nullptr && !by_columns_ && (b.rows == 1 || b.cut.segments == 1) &&
         (depth_ <= slice_ || (u.width == u.stride && b.a.residual != b.a.out));
}

void DenseConv::run_sub(Band& b, size_t unit, const Sub& sub) const {
  const ConvProblem& p = problem_;
  const ConvArgs& a = b.a;
  const Unit& u = units_[unit];
  // Tiles of equal size: 35 pixels by 6 are five of 6 and one of 5.
  const int64_t mr = ceil_div(b.pixels(), ceil_div(b.pixels(), kernels_->dense_mr[sub.nv]));
  if (b.mr != mr) {
    b.mr = mr;
    tabulate(b);
  }
  const float* weight = weights_.get() + sub.weight;
  for (int64_t k0 = 0; k0 < depth_; k0 += slice_) {
    kernels::DenseTile t{};
    t.in_table_stride = mr;
    t.depth = std::min(slice_, depth_ - k0);
    t.in_offset = k0 + (merged_ ? 0 : sub.group * depth_);
    t.weight = weight;
    t.weight_tap_stride = t.depth * sub.nv * kernels_->vl;
    t.first = k0 == 0;
    t.bias = k0 + slice_ >= depth_ ? bias_of(unit, sub.offset) : nullptr;
    t.acc_stride = u.stride;
    t.last = kernels_->vl;
    float* acc = b.s.acc + sub.offset;
    if (direct(b, u)) {
      const int64_t pixel = b.first_pixel();
      acc = a.out + pixel * a.out_stride + sub.first;
      t.acc_stride = a.out_stride;
      if (k0 + slice_ >= depth_) {
        t.last = sub.width - (sub.nv - 1) * kernels_->vl;
        t.floor = p.act == ActKind::relu || p.act == ActKind::clip;
        t.ceiling = p.act == ActKind::clip;
        t.lo = t.ceiling ? p.lo : 0.0f;
        t.hi = p.hi;
        if (a.residual != nullptr) t.residual = a.residual + pixel * a.residual_stride + sub.first;
        t.residual_stride = a.residual_stride;
      }
    }
    run_tiles(b, sub, t, acc);
    weight += steps_ * t.weight_tap_stride;
  }
}

void DenseConv::run_tiles(const Band& b, const Sub& sub, kernels::DenseTile t, float* acc) const {
  const float* residual = t.residual;
  const int64_t pixels = b.pixels();
  for (int64_t i = 0, tile = 0; i < pixels; i += b.mr, ++tile) {
    const int32_t* taps = b.s.taps + tile * (1 + steps_);
    t.in = b.s.table + i * steps_;
    t.taps = taps[0];
    t.tap_ids = taps + 1;
    t.acc = acc + i * t.acc_stride;
    if (residual != nullptr) t.residual = residual + i * t.residual_stride;
    kernels_->dense[sub.nv][std::min(b.mr, pixels - i)](t);
  }
}

// Fills the table and the taps for tiles of b.mr pixels. A tap that lies in the padding for the whole tile is
// left out; for single pixels of a tile it points to zeros.
void DenseConv::tabulate(const Band& b) const {
  const ConvProblem& p = problem_;
  const ConvArgs& a = b.a;
  const int64_t pixels = b.pixels(), pixel_stride = copied() ? p.ic : a.in_stride;
  const int64_t row_stride = copied() ? b.s.row_stride : a.iw * a.in_stride;
  const float* base = copied() ? b.s.rows : a.in + (b.n * a.ih + b.iy0) * a.iw * a.in_stride;
  if (taps_ == 1 && p.pad_top + p.pad_left + p.pad_bottom + p.pad_right == 0)
    return tabulate_pixels(b, base, row_stride, pixel_stride);
  if (merged_) return tabulate_runs(b, base, row_stride, pixel_stride);
  int64_t y = 0, x = b.x0;
  int32_t* taps = b.s.taps;
  for (int64_t first = 0; first < pixels; first += b.mr, taps += 1 + steps_) {
    const int64_t here = std::min(b.mr, pixels - first);
    int64_t rs[kernels::kMaxMr], xs[kernels::kMaxMr];  // the window's first row and column, of each pixel
    int64_t at[kernels::kMaxMr];                       // where they lie
    bool inner = true;                                 // no window reaches into the padding
    for (int64_t m = 0; m < here; ++m) {
      rs[m] = y * p.sh;
      xs[m] = x * p.sw - p.pad_left;
      at[m] = rs[m] * row_stride + xs[m] * pixel_stride;
      inner &= b.iy0 + rs[m] >= 0 && b.iy0 + rs[m] + (p.kh - 1) * p.dh < a.ih && xs[m] >= 0 &&
               xs[m] + (p.kw - 1) * p.dw < a.iw;
      if (by_columns_) {
        if (++y == b.rows) y = 0, ++x;
      } else {
        if (++x == b.x0 + b.count) x = b.x0, ++y;
      }
    }
    const float** to = b.s.table + first * steps_;
    int32_t used = 0;
    int32_t step = 0;
    for (int64_t ky = 0; ky < p.kh; ++ky)
      for (int64_t kx = 0; kx < p.kw; ++kx, ++step) {
        const int64_t dy = ky * p.dh, dx = kx * p.dw, offset = dy * row_stride + dx * pixel_stride;
        bool any = inner;
        for (int64_t m = 0; m < here; ++m) {
          const bool inside =
              inner || (static_cast<uint64_t>(b.iy0 + rs[m] + dy) < static_cast<uint64_t>(a.ih) &&
                        static_cast<uint64_t>(xs[m] + dx) < static_cast<uint64_t>(a.iw));
          to[m] = inside ? base + at[m] + offset : zeros_.get();
          any |= inside;
        }
        if (!any) continue;
        taps[++used] = step;
        to += b.mr;
      }
    taps[0] = used;
  }
}

// The same where every output pixel reads one that exists.
void DenseConv::tabulate_pixels(const Band& b, const float* base, int64_t row_stride,
                                int64_t pixel_stride) const {
  const ConvProblem& p = problem_;
  const float** to = b.s.table;
  for (int64_t y = 0; y < b.rows; ++y) {
    const float* from = base + y * p.sh * row_stride + b.x0 * p.sw * pixel_stride;
    for (int64_t x = 0; x < b.count; ++x, from += p.sw * pixel_stride) *to++ = from;
  }
  int32_t* taps = b.s.taps;
  for (int64_t first = 0; first < b.pixels(); first += b.mr, taps += 2) taps[0] = 1, taps[1] = 0;
}

// The same of merged taps, whose padding is there.
void DenseConv::tabulate_runs(const Band& b, const float* base, int64_t row_stride,
                              int64_t pixel_stride) const {
  const ConvProblem& p = problem_;
  const int64_t pixels = b.pixels(), down = p.dh * row_stride;
  const float* from[kernels::kMaxMr];
  int32_t* taps = b.s.taps;
  for (int64_t first = 0, y = 0, x = 0; first < pixels; first += b.mr) {
    const int64_t here = std::min(b.mr, pixels - first);
    for (int64_t m = 0; m < here; ++m) {
      from[m] = base + y * p.sh * row_stride + (b.x0 + x) * p.sw * pixel_stride;
      if (++x == b.count) x = 0, ++y;
    }
    const float** to = b.s.table + first * steps_;
    *taps++ = static_cast<int32_t>(steps_);
    for (int64_t step = 0; step < steps_; ++step, to += b.mr) {
      for (int64_t m = 0; m < here; ++m) to[m] = from[m] + step * down;
      *taps++ = static_cast<int32_t>(step);
    }
  }
}

bool can(const Variant&, const ConvProblem& p) { return !p.in_planes || merges(p); }

}  // namespace

const Family kDense = {can, make_as<DenseConv>};

}  // namespace actzip
