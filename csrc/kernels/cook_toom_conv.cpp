// Long one-dimensional kernels by F(4, 4), Winograd's (Cook and Toom's) transform along one axis. The kernel
// is cut into groups of four taps. Four outputs of a group are seven products of transformed pixels and
// weights instead of sixteen; groups meet transformed pixels four apart, so that each is made once:
//
//   tile u: pixels 4 u .. 4 u + 6; output tile t, place p: sum over groups g of V[p][t + g] U[p][g]
//
// which is a convolution of ceil(taps / 4) taps for each of the seven places, by the dense kernel.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/conv_base.h"

namespace actzip {
namespace {

constexpr int kOut = kernels::kCookOut, kPlaces = kernels::kCookPlaces;
constexpr int64_t kShortest = 12;           // taps
constexpr int64_t kTiles = 48;              // at once
constexpr int64_t kPanelBytes = 192 << 10;  // of weights, for the second-level cache

struct Matrices {
  float in[kPlaces * kPlaces], out[kOut * kPlaces];
  double weight[kPlaces * 4];
};
// Of the points 1/2, -1/2, 1, -1, 2, -2 and infinity: rows scaled by powers of two.
const Matrices& matrices() {
  static const Matrices made = [] {
    constexpr double points[kPlaces - 1] = {0.5, -0.5, 1, -1, 2, -2};
    Matrices m{};
    for (int p = 0; p < kPlaces; ++p) {
      const bool infinite = p == kPlaces - 1;
      double poly[kPlaces] = {1}, apart = 1, most = 0;  // of (x - point) over the other points
      int degree = 0;
      for (int q = 0; q + 1 < kPlaces; ++q) {
        if (q == p) continue;
        for (int i = ++degree; i > 0; --i) poly[i] = poly[i - 1] - points[q] * poly[i];
        poly[0] *= -points[q];
        if (!infinite) apart *= points[p] - points[q];
      }
      for (double c : poly) most = std::max(most, std::fabs(c));
      const double scale = std::exp2(std::round(std::log2(most)));
      for (int i = 0; i < kPlaces; ++i) m.in[p * kPlaces + i] = static_cast<float>(poly[i] / scale);
      for (int i = 0; i < 4; ++i) {
        const double power = infinite ? i == 3 : std::pow(points[p], i);
        m.weight[p * 4 + i] = power / apart * scale;
        m.out[i * kPlaces + p] = static_cast<float>(power);
      }
    }
    return m;
  }();
  return made;
}

class CookToomConv final : public ConvBase {
 public:
  CookToomConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias,
               std::shared_ptr<const void> owner) {
    init(p, v, isa, bias, v.nv);
    columns_ = p.kw == 1;
    groups_ = ceil_div(taps_, 4);
    const int64_t panel = v.nv * kernels_->vl;
    slice_ = std::max<int64_t>(32, kPanelBytes / (4 * panel * groups_));
    slice_ = ceil_div(p.ic, ceil_div(p.ic, slice_));
    pack_weights(weight);
    keep_raw(weight, p.oc * p.ic * taps_, std::move(owner));
  }

  int64_t unit_width(int64_t widest) const override { return std::max<int64_t>(widest, 128); }
  int64_t items(const ConvArgs& a, int) const override {
    const Cut c = cut_lines(a);
    return c.images * c.bands * static_cast<int64_t>(units_.size());
  }
  ConvPart part(const ConvArgs& a, int, int64_t item) const override {
    const Cut c = cut_lines(a);
    const auto unit = static_cast<size_t>(item / (c.images * c.bands));
    return part_of(c, item, unit, unit + 1);
  }
  size_t scratch_bytes(const ConvArgs& a, int) const override {
    Carver carver{nullptr};
    carve(carver, cut_lines(a), a);
    return carver.used;
  }
  void run_item(const ConvArgs& a, int, int64_t item, void* scratch) const override;

 private:
  struct Scratch {
    float* input;                   // unpacked
    float* places;                  // [place][line][tile][channel]
    float* product;                 // [place][line][output tile][nv * vl]
    const float** table;            // [tile of pixels][group][mr]
    float* acc;                     // [line][position][stride]
    int64_t in_stride, out_stride;  // of places
    Finish finish;
  };
  // What an item computes: positions [first, first + count) of `lines` lines, from line `line` on.
  struct Band {
    const ConvArgs& a;
    const Scratch& s;
    int64_t n, line, lines, first, count;
    int64_t tiles() const { return ceil_div(count, kOut); }
  };

  Cut cut_lines(const ConvArgs& a) const;
  Scratch carve(Carver& carver, const Cut& c, const ConvArgs& a) const;
  void pack_weights(const float* weight);
  int64_t channels() const { return round_up(problem_.ic, 16); }
  int64_t pad() const { return columns_ ? problem_.pad_top : problem_.pad_left; }
  int64_t batch(int64_t count) const { return std::max<int64_t>(1, kTiles / ceil_div(count, kOut)); }
  const float* pixel(const Band& b, int64_t line, int64_t at) const;
  void unpack(const Band& b) const;
  void transform(const Band& b, int64_t line, int64_t lines) const;
  void multiply(const Band& b, const Sub& sub, int64_t lines) const;
  void sums(const Band& b, size_t unit, const Sub& sub, int64_t line, int64_t lines) const;
  void direct(const Band& b, const Sub& sub, int64_t line, int64_t at, int64_t count, float* out,
              int64_t stride) const;

  bool columns_ = false;
  int64_t groups_ = 1, slice_ = 1;
};

// [unit][sub][place][slice][group][channel][nv * vl]
void CookToomConv::pack_weights(const float* weight) {
  const int64_t ic = problem_.ic, vl = kernels_->vl;
  int64_t total = 0;
  for (Unit& u : units_)
    for (Sub& s : u.subs) {
      s.weight = total;
      total += kPlaces * groups_ * ic * s.nv * vl;
    }
  keep_weights(total, [&](float* to) {
    for (const Unit& u : units_)
      for (const Sub& s : u.subs) {
        float* w = to + s.weight;
        for (int p = 0; p < kPlaces; ++p)
          for (int64_t k0 = 0; k0 < ic; k0 += slice_)
            for (int64_t g = 0; g < groups_; ++g)
              for (int64_t k = k0; k < std::min(ic, k0 + slice_); ++k, w += s.nv * vl)
                for (int64_t o = 0; o < s.width; ++o) {
                  const float* taps = weight + ((s.first + o) * ic + k) * taps_;
                  double sum = 0;
                  for (int64_t i = 0; i < 4 && 4 * g + i < taps_; ++i)
                    sum += matrices().weight[p * 4 + i] * taps[4 * g + i];
                  w[o] = static_cast<float>(sum);
                }
      }
  });
}

Cut CookToomConv::cut_lines(const ConvArgs& a) const {
  Cut c = whole_or_part(problem_, a);
  const int64_t height = c.end_row - c.first_row;
  c.segment = c.ow;
  c.segments = 1;
  c.rows = columns_ ? std::max<int64_t>(1, height) : std::min(std::max<int64_t>(1, height), batch(c.ow));
  c.bands = ceil_div(height, c.rows);
  c.in_rows = columns_ ? c.rows + taps_ - 1 : c.rows;
  return c;
}

CookToomConv::Scratch CookToomConv::carve(Carver& carver, const Cut& c, const ConvArgs& a) const {
  const ConvProblem& p = problem_;
  Scratch s{};
  const int64_t lines = columns_ ? c.ow : c.rows, count = columns_ ? c.rows : c.ow;
  const int64_t tiles = ceil_div(count, kOut), at_once = std::min(lines, batch(count));
  s.in_stride = at_once * (tiles + groups_ - 1) * channels() + 16;
  s.out_stride = at_once * tiles * variant_.nv * kernels_->vl + 16;
  s.input = carver.take<float>(p.in_packed ? std::min(c.in_rows, a.ih) * a.iw * p.ic + 16 : 0);
  s.places = carver.take<float>(kPlaces * s.in_stride);
  s.product = carver.take<float>(kPlaces * s.out_stride);
  s.table = carver.take<const float*>((at_once * tiles + kernels::kMaxMr) * groups_);
  s.acc = carver.take<float>(lines * count * widest_unit());
  s.finish = take_finish(carver, a, c, 1);
  return s;
}

// Null outside the map.
const float* CookToomConv::pixel(const Band& b, int64_t line, int64_t at) const {
  const ConvArgs& a = b.a;
  if (at < 0 || at >= (columns_ ? a.ih : a.iw)) return nullptr;
  const int64_t y = columns_ ? at : line, x = columns_ ? line : at;
  if (!problem_.in_packed) return a.in + ((b.n * a.ih + y) * a.iw + x) * a.in_stride;
  const int64_t top = columns_ ? std::max<int64_t>(0, b.first - pad()) : b.line;
  return b.s.input + ((y - top) * a.iw + x) * problem_.ic;
}

void CookToomConv::unpack(const Band& b) const {
  const ConvArgs& a = b.a;
  const int64_t top = columns_ ? std::max<int64_t>(0, b.first - pad()) : b.line;
  const int64_t end = columns_ ? std::min(a.ih, b.first - pad() + b.count + taps_ - 1) : b.line + b.lines;
  for (int64_t y = top; y < end; ++y) {
    int64_t first = 0;
    for (size_t k = 0; k < in_blocks_.size(); first += in_blocks_[k].width, ++k)
      unpack_row(*a.in_map, b.n, y, a.in_first_block + static_cast<int64_t>(k),
                 b.s.input + (y - top) * a.iw * problem_.ic + first, problem_.ic);
  }
}

void CookToomConv::transform(const Band& b, int64_t line, int64_t lines) const {
  const int64_t all = b.tiles() + groups_ - 1;
  kernels::CookInput t{};
  t.channels = problem_.ic;
  t.matrix = matrices().in;
  t.out = b.s.places;
  t.place_stride = b.s.in_stride;
  for (int64_t l = 0; l < lines; ++l)
    for (int64_t u = 0; u < all; ++u, t.out += channels()) {
      for (int i = 0; i < kPlaces; ++i) t.pixels[i] = pixel(b, line + l, b.first - pad() + kOut * u + i);
      kernels_->cook_input(t);
    }
}

void CookToomConv::multiply(const Band& b, const Sub& sub, int64_t lines) const {
  const int64_t tiles = b.tiles(), pixels = lines * tiles, floats = sub.nv * kernels_->vl;
  const int64_t mr = ceil_div(pixels, ceil_div(pixels, kernels_->dense_mr[sub.nv]));
  const float** to = b.s.table;
  for (int64_t i = 0; i < pixels; i += mr)
    for (int64_t g = 0; g < groups_; ++g, to += mr)
      for (int64_t m = 0; m < std::min(mr, pixels - i); ++m) {
        const int64_t l = (i + m) / tiles, u = (i + m) % tiles + g;
        to[m] = b.s.places + (l * (tiles + groups_ - 1) + u) * channels();
      }
  std::memset(b.s.product, 0, static_cast<size_t>(kPlaces * b.s.out_stride) * 4);
  kernels::DenseTile t{};
  const int32_t first = 0;
  t.in_table_stride = mr;
  t.tap_ids = &first;
  t.taps = 1;
  t.last = kernels_->vl;
  t.acc_stride = floats;
  const float* weight = weights_.get() + sub.weight;
  // The weights come from memory: those of the next slice while this one is multiplied.
  const int64_t calls = ceil_div(pixels, mr) * groups_;
  for (int p = 0; p < kPlaces; ++p)
    for (int64_t k0 = 0; k0 < problem_.ic; k0 += slice_) {
      t.depth = std::min(slice_, problem_.ic - k0);
      t.in_offset = p * b.s.in_stride + k0;
      const float* next = weight + groups_ * t.depth * floats;
      const int64_t lines_each = ceil_div(groups_ * t.depth * floats, 16 * calls);
      for (int64_t i = 0; i < pixels; i += mr) {
        t.in = b.s.table + i * groups_;
        t.acc = b.s.product + p * b.s.out_stride + i * floats;
        t.weight = weight;
        const kernels::DenseFn kernel = kernels_->dense[sub.nv][std::min(mr, pixels - i)];
        for (int64_t g = 0; g < groups_; ++g, t.in += mr, t.weight += t.depth * floats) {
          kernel(t);
          for (int64_t j = 0; j < lines_each; ++j, next += 16) __builtin_prefetch(next, 0, 2);
        }
      }
      weight += groups_ * t.depth * floats;
    }
}

void CookToomConv::sums(const Band& b, size_t unit, const Sub& sub, int64_t line, int64_t lines) const {
  const Unit& u = units_[unit];
  kernels::CookOutput t{};
  t.acc = b.s.product;
  t.place_stride = b.s.out_stride;
  t.floats = sub.nv * kernels_->vl;
  t.matrix = matrices().out;
  t.bias = bias_of(unit, sub.offset);
  t.out_stride = u.stride;
  for (int64_t l = line; l < line + lines; ++l)
    for (int64_t at = 0; at < b.count; at += kOut, t.acc += t.floats) {
      t.count = std::min<int64_t>(kOut, b.count - at);
      t.out = b.s.acc + ((l - b.line) * b.count + at) * u.stride + sub.offset;
      if (!kernels_->cook_output(t)) direct(b, sub, l, b.first + at, t.count, t.out, u.stride);
    }
}

// A tile whose result is not finite, again: a transform spreads infinities, NaN and overflows.
void CookToomConv::direct(const Band& b, const Sub& sub, int64_t line, int64_t at, int64_t count, float* out,
                          int64_t stride) const {
  const int64_t ic = problem_.ic;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t o = 0; o < sub.width; ++o) {
      float sum = bias_.get()[sub.first + o];
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const float* x = pixel(b, line, at + i + tap - pad());
        const float* w = raw_ + (sub.first + o) * ic * taps_ + tap;
        for (int64_t k = 0; x != nullptr && k < ic; ++k) sum += x[k] * w[k * taps_];
      }
      out[i * stride + o] = sum;
    }
}

void CookToomConv::run_item(const ConvArgs& a, int, int64_t item, void* scratch) const {
  const Cut c = cut_lines(a);
  Carver carver{static_cast<unsigned char*>(scratch)};
  const Scratch s = carve(carver, c, a);
  const int64_t per_unit = c.images * c.bands, i = item % per_unit;
  const auto unit = static_cast<size_t>(item / per_unit);
  const Unit& u = units_[unit];
  const int64_t y0 = c.first_row + i % c.bands * c.rows, rows = std::min(c.rows, c.end_row - y0);
  const int64_t n = c.first_image + i / c.bands;
  const Band b = columns_ ? Band{a, s, n, 0, c.ow, y0, rows} : Band{a, s, n, y0, rows, 0, c.ow};
  if (problem_.in_packed) unpack(b);
  for (int64_t l = 0, some; l < b.lines; l += some) {
    some = std::min(batch(b.count), b.lines - l);
    transform(b, b.line + l, some);
    for (const Sub& sub : u.subs) {
      multiply(b, sub, some);
      sums(b, unit, sub, b.line + l, some);
    }
  }
  for (int64_t y = 0; y < rows; ++y) {
    float* acc = s.acc + y * (columns_ ? 1 : b.count) * u.stride;
    finish(a, c, u, s.finish, {n, y0 + y, 0, c.ow, acc, (columns_ ? b.count : 1) * u.stride});
  }
}

// Along one axis, without stride; few channels do not pay for the transforms.
bool can(const Variant&, const ConvProblem& p) {
  const bool columns = p.kw == 1 && p.pad_left + p.pad_right == 0;
  const bool rows = p.kh == 1 && p.pad_top + p.pad_bottom == 0;
  return p.groups == 1 && !p.in_planes && (columns || rows) && p.kh * p.kw >= kShortest && p.sh == 1 &&
         p.sw == 1 && p.dh == 1 && p.dw == 1 && p.ic >= 16 && p.oc >= 16;
}

std::unique_ptr<Conv> make(const ConvProblem& p, const Variant& v, Isa isa, const float* weight,
                           const float* bias, const std::shared_ptr<const void>& owner) {
  return std::make_unique<CookToomConv>(p, v, isa, weight, bias, owner);
}

}  // namespace

const Family kCookToom = {can, make};

}  // namespace actzip
