// Convolutions by Winograd's transforms, zeros skipped: see winograd.inl.h.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/conv_base.h"

namespace actzip {
namespace {

using kernels::WinogradInput;
using kernels::WinogradOutput;
using kernels::WinogradProduct;

// G g G^T of a 3x3 kernel, a number a place.
template <int M>
void winograd_weights(const float* kernel, float* places) {
  constexpr int A = M + 2;
  static const auto g = [] {
    const double p = M == 4 ? std::sqrt(0.5) : 1.0;  // the points that winograd_in has
    const double points[7] = {0, p, -p, 2 * p, -2 * p, p / 2, -p / 2};
    std::array<std::array<double, 3>, A> rows{};
    for (size_t i = 0; i + 1 < A; ++i) {
      double f = M == 2 && i == 0 ? -1 : 1;  // its sign there
      for (size_t j = 0; j + 1 < A; ++j)
        if (j != i) f *= points[i] - points[j];
      rows[i] = {1 / f, points[i] / f, points[i] * points[i] / f};
    }
    rows[A - 1] = {0, 0, 1};
    return rows;
  }();
  double half[A][3];
  for (size_t i = 0; i < A; ++i)
    for (size_t j = 0; j < 3; ++j)
      half[i][j] = g[i][0] * kernel[j] + g[i][1] * kernel[3 + j] + g[i][2] * kernel[6 + j];
  for (size_t i = 0; i < A; ++i)
    for (size_t j = 0; j < A; ++j)
      places[kernels::winograd_place(M, static_cast<int>(i), static_cast<int>(j))] =
          static_cast<float>(half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2]);
}

class WinogradConv final : public ConvBase {
 public:
  WinogradConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias,
               std::shared_ptr<const void> owner)
      : m_(v.row.pixel_tile == 4    ? 2
           : v.row.pixel_tile == 16 ? 4
                                    : 6),
        a_(m_ + 2),
        places_(a_ * a_),
        out_(m_ / p.pool),
        most_(std::min(16, 64 / m_)) {
    init(p, v, isa, bias, v.nv);
    const int64_t vl = kernels_->vl;
    int64_t total = 0;
    for (Unit& u : units_)
      for (Sub& s : u.subs) {
        s.weight = total;
        total += places_ * p.ic * s.nv * vl;
      }
    keep_weights(
        total,
        [&](float* packed) {
          for (const Unit& u : units_)
            for (const Sub& s : u.subs) transform_weights(s, weight, packed + s.weight);
        },
        "/by kind");
    keep_raw(weight, p.oc * p.ic * 9, std::move(owner));
  }

  int64_t unit_width(int64_t widest) const override {
    // 192 channels are better cut into twice 96 than into 128 and 64.
    return problem_.oc % 128 != 0 && widest == 128 ? 192 : std::max<int64_t>(64, widest);
  }

  // How the output of a run is cut: into bands of tile rows, or groups of whole images where those are small;
  // long tile rows into spans, one after the other. `shares`: of the units, among items. Pixels a dilation
  // apart are a map of their own, a phase: first come the tile rows of the first phase, and so across.
  struct Tiling {
    Cut cut;
    int64_t tall, wide;     // tiles of a phase
    int64_t high, across;   // tiles of what is computed, of all phases
    int64_t bands, groups;  // of an image; of images
    int64_t even;           // 2: the last tile of a row goes with that below it, and bands begin at even rows
    int64_t group;          // images of a group
    int64_t span, most;     // tiles of a span; of an item at once
    int64_t shares;
  };
  // Of as many tiles at once as share the weights' way from memory, or as scratch is to hold.
  Tiling tile(const ConvArgs& a, int threads) const {
    const int64_t least = variant_.tile * kLeast / 8;
    for (int64_t budget = variant_.tile;; budget -= variant_.tile / 8) {
      const Tiling t = tiles_of(a, threads, budget);
      if (a.scratch_limit == 0 || budget - variant_.tile / 8 < least || bytes_of(t, a) <= a.scratch_limit)
        return t;
    }
  }
  Tiling tiles_of(const ConvArgs& a, int threads, int64_t budget) const {
    Tiling t{};
    t.cut = whole_or_part(problem_, a);
    t.cut.segment = t.cut.ow;
    t.cut.segments = 1;
    const int64_t height = t.cut.end_row - t.cut.first_row;
    t.tall = ceil_div(ceil_div(height, problem_.dh), out_);
    t.wide = ceil_div(ceil_div(t.cut.ow, problem_.dw), out_);
    t.high = t.tall * std::min(height, problem_.dh);
    t.across = t.wide * std::min(t.cut.ow, problem_.dw);
    const auto units = static_cast<int64_t>(units_.size());
    const int64_t spans = std::max<int64_t>(1, (t.across + budget / 2) / budget);
    t.span = round_up(ceil_div(t.across, spans), 2);
    t.group = std::clamp<int64_t>(budget / std::max<int64_t>(1, t.high * t.across), 1,
                                  std::max<int64_t>(1, t.cut.images));
    int64_t rows = t.group > 1 ? t.high
                               : std::clamp<int64_t>((budget + t.across / 2) / t.across, 1,
                                                     std::max<int64_t>(1, t.high));
    t.shares = spans > 1 ? units : 1;
    t.even = t.across % 2 == 0 || rows < 2 ? 1 : 2;
    if (t.even == 2) rows = std::min(t.high, std::max<int64_t>(1, (budget + t.across) / (2 * t.across)) * 2);
    const auto items = [&] { return ceil_div(t.cut.images, t.group) * ceil_div(t.high, rows) * t.shares; };
    if (threads > 1 && items() < 4 * threads) {
      // Items for every thread. Smaller groups of images cost less than reading the input once more for every
      // share of the units, and those less than bands of fewer tiles, over which weights are used.
      while (t.group > 1 && items() < threads) --t.group;
      if (items() < 2 * threads) t.shares = units;
      while (t.group > 1 && items() < 2 * threads) --t.group;
      while (t.group == 1 && rows > t.even && items() < 2 * threads) --rows;
    }
    t.groups = ceil_div(t.cut.images, t.group);
    t.group = t.groups == 0 ? 1 : ceil_div(t.cut.images, t.groups);
    t.bands = t.high == 0 ? 0 : ceil_div(t.high, rows);
    t.cut.rows = t.bands == 0 ? 0 : std::min(t.high, round_up(ceil_div(t.high, t.bands), t.even)) * out_;
    t.span = std::min(t.span, t.across);
    t.most = t.group * (t.cut.rows / out_) * t.span;
    return t;
  }
  // The first pixel that comes out of a tile.
  int64_t row_of(const Tiling& t, int64_t ty) const {
    return t.cut.first_row + ty / t.tall + ty % t.tall * out_ * problem_.dh;
  }
  int64_t column_of(const Tiling& t, int64_t tx) const {
    return tx / t.wide + tx % t.wide * out_ * problem_.dw;
  }
  // Pixels that a tile row's tiles reach.
  int64_t line_of(const Tiling& t) const { return t.wide * out_ * problem_.dw; }

  struct Scratch {
    float* values;  // [place][block][tile][64], places a little further apart
    int64_t place;
    uint64_t* masks;  // [kind of place][block][tile]
    int64_t kind;
    uint64_t* joint;  // [block][tile]: of places of several kinds
    float* products;  // [place][tile][nv * vl]
    int64_t product_place;
    float* rows;     // [image, tile row][m][pixel of whole tiles][unit's stride]; one tile row: see `at_once`
    uint64_t* none;  // packed input: masks of rows outside the map
    float* decoded;  // of another type than float32: [a][values of a strip]
    float* redo;     // [a][a][64], and a tile before its pool
    Finish finish;
  };
  Scratch carve(Carver& carver, const Tiling& t, const ConvArgs& a) const {
    const auto blocks = static_cast<int64_t>(in_blocks_.size());
    int64_t floats = 0, stride = 0;
    for (const Unit& u : units_) {
      stride = std::max(stride, u.stride);
      for (const Sub& s : u.subs) floats = std::max<int64_t>(floats, s.nv * kernels_->vl);
    }
    Scratch s{};
    s.place = blocks * t.most * 64 + kApart;
    s.product_place = t.most * floats + kApart;
    if (units_.size() == 1 && units_[0].subs.size() == 1) {
      // No other sub reads a place's values: products lie where those of the places before them were.
      const int64_t ahead = kernels_->winograd_product[units_[0].subs[0].nv].places;
      s.place = s.product_place = std::max(s.place, s.product_place);
      s.products = carver.take<float>((places_ + ahead) * s.place);
      s.values = s.products + ahead * s.place;
    } else {
      s.values = carver.take<float>(places_ * s.place);
      s.products = carver.take<float>(places_ * s.product_place);
    }
    s.kind = blocks * t.most;
    s.masks = carver.take<uint64_t>(kernels::kPlaceKinds * s.kind);
    s.joint = carver.take<uint64_t>(s.kind);
    const int64_t high = at_once(t) ? out_ : t.group * t.cut.rows;
    s.rows = carver.take<float>(high * line_of(t) * stride);
    const bool packed = problem_.in_packed;
    s.none = carver.take<uint64_t>(packed ? a.iw + 8 : 0);
    s.decoded = carver.take<float>(decodes(a) ? a_ * decoded_row(t, a) : 0);
    s.redo = carver.take<float>(a_ * a_ * 64 + (problem_.pool == 1 ? 0 : m_ * m_ * floats) + 16);
    s.finish = take_finish(carver, a, t.cut, 1);
    return s;
  }

  int64_t items(const ConvArgs& a, int threads) const override {
    const Tiling t = tile(a, threads);
    return t.groups * t.bands * t.shares;
  }
  size_t bytes_of(const Tiling& t, const ConvArgs& a) const {
    Carver carver{nullptr};
    carve(carver, t, a);
    return carver.used;
  }
  size_t scratch_bytes(const ConvArgs& a, int threads) const override {
    return bytes_of(tile(a, threads), a);
  }

  // What an item computes: images and tile rows [first, last), units.
  struct Work {
    int64_t image, images, first, last;
    size_t unit, end;
  };
  Work work(const Tiling& t, int64_t item) const {
    const int64_t per_share = t.groups * t.bands, share = item / per_share;
    const int64_t group = item % per_share / t.bands, band = item % t.bands;
    const auto units = static_cast<int64_t>(units_.size());
    Work w{};
    w.image = t.cut.first_image + group * t.cut.images / t.groups;
    w.images = t.cut.first_image + (group + 1) * t.cut.images / t.groups - w.image;
    const int64_t steps = ceil_div(t.high, t.even);
    w.first = steps * band / t.bands * t.even;
    w.last = std::min(t.high, steps * (band + 1) / t.bands * t.even);
    w.unit = static_cast<size_t>(units * share / t.shares);
    w.end = static_cast<size_t>(units * (share + 1) / t.shares);
    return w;
  }
  ConvPart part(const ConvArgs& a, int threads, int64_t item) const override {
    const Tiling t = tile(a, threads);
    const Work w = work(t, item);
    const int64_t y0 = t.cut.first_row + w.first * out_,  // undilated: see `apart`
        y1 = std::min(t.cut.first_row + w.last * out_, t.cut.end_row);
    const Unit &u = units_[w.unit], &last = units_[w.end - 1];
    return {w.image, y0, y1 - y0, u.first, last.first + last.width - u.first, w.images};
  }

  bool apart() const override { return problem_.dh > 1; }

  void run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const override {
    const Tiling t = tile(a, threads);
    const Work w = work(t, item);
    Carver carver{static_cast<unsigned char*>(scratch)};
    const Scratch s = carve(carver, t, a);
    for (int64_t x = 0; x < t.across; x += t.span) {
      const int64_t span = std::min(t.span, t.across - x);
      transform(a, t, s, w, x, span);
      for (size_t unit = w.unit; unit < w.end; ++unit) {
        const Unit& u = units_[unit];
        multiply(a, t, s, w, u, x, span);
        if (at_once(t) || x + span < t.across) continue;
        for (int64_t i = 0; i < w.images; ++i)
          for (int64_t ty = w.first; ty < w.last; ++ty) finish_tiles(a, t, s, w, u, i, ty);
      }
    }
  }

 private:
  void transform_weights(const Sub& s, const float* weight, float* packed) const {
    const int64_t ic = problem_.ic, floats = s.nv * kernels_->vl;
    const int at_once = kernels_->winograd_product[s.nv].places;
    const auto transform = m_ == 2   ? winograd_weights<2>
                           : m_ == 4 ? winograd_weights<4>
                                     : winograd_weights<6>;
    float places[64];
    for (int64_t k = 0; k < ic; ++k)
      for (int64_t o = 0; o < s.width; ++o) {
        transform(weight + ((s.first + o) * ic + k) * 9, places);
        for (int p = 0; p < places_; ++p)
          packed[((p / at_once * ic + k) * at_once + p % at_once) * floats + o] = places[p];
      }
  }

  // Whether a tile row's pixels are finished as soon as they are there: nothing else of them is to come.
  bool at_once(const Tiling& t) const {
    bool single = t.span == t.across;
    for (const Unit& u : units_) single &= u.subs.size() == 1;
    return single;
  }

  // Where a tile row's pixels are gathered.
  float* tile_row(const Tiling& t, const Scratch& s, const Work& w, const Unit& u, int64_t image,
                  int64_t ty) const {
    if (at_once(t)) return s.rows;
    return s.rows + (image * (w.last - w.first) + ty - w.first) * out_ * line_of(t) * u.stride;
  }

  void finish_tiles(const ConvArgs& a, const Tiling& t, const Scratch& s, const Work& w, const Unit& u,
                    int64_t image, int64_t ty) const {
    float* pixels = tile_row(t, s, w, u, image, ty);
    for (int64_t r = 0; r < out_; ++r, pixels += line_of(t) * u.stride) {
      const int64_t y = row_of(t, ty) + r * problem_.dh;
      if (y < t.cut.end_row)
        finish(a, t.cut, u, s.finish, {w.image + image, y, 0, t.cut.ow, pixels, u.stride});
    }
  }

  // Packed values of another type than float32 are decoded first: those of a strip of tiles, which stay in
  // the first caches, or, dilated, of whole rows.
  bool decodes(const ConvArgs& a) const {
    return problem_.in_packed && a.in_map->layout().type != ValueType::f32;
  }
  int64_t strip(const Tiling& t, const ConvArgs& a) const {
    return decodes(a) && problem_.dw == 1 ? std::min(most_, t.wide) : t.wide;
  }
  int64_t decoded_row(const Tiling& t, const ConvArgs& a) const {
    return (problem_.dw == 1 ? std::min(a.iw, strip(t, a) * m_ + 2) : a.iw) * 64 + 16;
  }

  // The item's tiles of a span, in the order of images and tile rows.
  void transform(const ConvArgs& a, const Tiling& t, const Scratch& s, const Work& w, int64_t x,
                 int64_t span) const {
    const ConvProblem& p = problem_;
    WinogradInput in{};
    in.place_stride = s.place;
    in.pixel_stride = a.in_stride;
    in.step = p.dw;
    in.iw = a.iw;
    in.tile_masks = s.masks;
    in.kind_stride = s.kind;
    in.out = s.values;
    if (p.in_packed) std::memset(s.none, 0, static_cast<size_t>(a.iw + 8) * 8);
    int64_t channel = 0;
    for (size_t b = 0; b < in_blocks_.size(); channel += in_blocks_[b].width, ++b) {
      in.width = in_blocks_[b].width;
      for (int64_t n = w.image; n < w.image + w.images; ++n)
        for (int64_t ty = w.first; ty < w.last; ++ty)
          for (int64_t tx = x; tx < x + span; tx += in.tiles) {
            in.tiles = std::min({strip(t, a), x + span - tx, t.wide - tx % t.wide});  // of one phase
            in.x = column_of(t, tx) * p.pool - p.pad_left;
            const int64_t y = row_of(t, ty) * p.pool - p.pad_top;
            if (p.in_packed)
              point_packed(a, t, s, n, y, a.in_first_block + static_cast<int64_t>(b), in);
            else
              point(a, n, y, channel, in);
            kernels_->winograd[m_].input(in);
            in.tile_masks += in.tiles;
            in.out += in.tiles * 64;
          }
    }
  }

  // Rows iy, iy + dh, ... of a dense map's channels as the tiles' rows.
  void point(const ConvArgs& a, int64_t n, int64_t iy, int64_t channel, WinogradInput& in) const {
    for (int r = 0; r < a_; ++r, iy += problem_.dh)
      in.rows[r] = iy < 0 || iy >= a.ih ? nullptr : a.in + (n * a.ih + iy) * a.iw * a.in_stride + channel;
  }
  // Those of a packed block.
  void point_packed(const ConvArgs& a, const Tiling& t, const Scratch& s, int64_t n, int64_t iy,
                    int64_t block, WinogradInput& in) const {
    const PackedMap& map = *a.in_map;
    const PackedLayout& l = map.layout();
    const int64_t reach = (in.tiles * m_ + 2) * problem_.dw;
    if (decodes(a)) in.from = problem_.dw == 1 ? std::clamp<int64_t>(in.x, 0, a.iw) : 0;
    const int64_t end = problem_.dw == 1 ? std::clamp<int64_t>(in.x + reach, in.from, a.iw) : a.iw;
    for (int r = 0; r < a_; ++r, iy += problem_.dh) {
      in.masks[r] = s.none;
      in.rows[r] = reinterpret_cast<const float*>(s.none);
      if (iy < 0 || iy >= a.ih) continue;
      in.masks[r] = map.masks(n, iy, block);
      in.rows[r] = static_cast<const float*>(map.segment(n, iy, block));
      if (!decodes(a)) continue;
      const int64_t before = kernels_->count_values(in.masks[r], in.from);
      float* const decoded = s.decoded + r * decoded_row(t, a);
      kernels_->load_values(static_cast<const unsigned char*>(map.segment(n, iy, block)) +
                                static_cast<size_t>(before) * value_size(l.type),
                            kernels_->count_values(in.masks[r] + in.from, end - in.from),
                            static_cast<int>(l.type), l.blocks[static_cast<size_t>(block)].scale, decoded);
      in.rows[r] = decoded;
    }
  }

  // The unit's products of the transformed tiles, back to pixels.
  void multiply(const ConvArgs& a, const Tiling& t, const Scratch& s, const Work& w, const Unit& u, int64_t x,
                int64_t span) const {
    const int64_t tiles = w.images * (w.last - w.first) * span, vl = kernels_->vl;
    const float* bias = bias_of(static_cast<size_t>(&u - units_.data()));
    const unsigned needed = needed_kinds(t);
    for (const Sub& sub : u.subs) {
      const int64_t floats = sub.nv * vl;
      const auto& products = kernels_->winograd_product[sub.nv];
      WinogradProduct product{};
      product.tiles = tiles;
      product.across = span;
      product.high = t.even == 1 ? 1 : w.last - w.first;
      unsigned joined = 0;
      product.weight = weights_.get() + sub.weight;
      product.values_stride = s.place;
      product.acc_stride = s.product_place;
      for (int place = 0; place < places_; place += products.places) {
        product.acc = s.products + place * s.product_place;
        const unsigned kinds = kinds_of(place, products.places);
        if ((kinds & needed) == 0) {
          for (int i = 0; i < products.places; ++i)
            std::memset(product.acc + i * s.product_place, 0, static_cast<size_t>(tiles * floats) * 4);
          product.weight += problem_.ic * floats * products.places;
          continue;
        }
        const uint64_t* masks = masks_of(s, kinds, tiles, &joined);
        for (size_t b = 0; b < in_blocks_.size(); ++b) {
          const int64_t block = in_blocks_[b].width * floats * products.places,
                        first = static_cast<int64_t>(b) * tiles;
          product.values = s.values + place * s.place + first * 64;
          product.masks = masks + first;
          product.first = b == 0;
          product.next_weight = product.weight + block;
          product.next_lines = ceil_div(block, 16 * ceil_div(tiles, 2));
          products.run(product);
          product.weight += block;
        }
      }
      const auto back = problem_.pool == 1 ? kernels_->winograd[m_].output : kernels_->winograd[m_].pooled;
      WinogradOutput out{};
      out.place_stride = s.product_place;
      out.floats = floats;
      out.bias = bias + sub.offset;
      out.row_stride = line_of(t) * u.stride;
      out.pixel_stride = problem_.dw * u.stride;
      out.acc = s.products;
      for (int64_t i = 0; i < w.images; ++i)
        for (int64_t ty = w.first; ty < w.last; ++ty) {
          float* const row = tile_row(t, s, w, u, i, ty) + sub.offset;
          for (int64_t tx = x; tx < x + span; ++tx, out.acc += floats) {
            out.out = row + column_of(t, tx) * u.stride;
            if (!back(out)) direct(a, s, w.image + i, row_of(t, ty), column_of(t, tx), sub, out);
          }
          if (at_once(t)) finish_tiles(a, t, s, w, u, i, ty);
        }
    }
  }

  // Kinds of places, as bits: of `count` places, and those that contribute to a pixel that is there: the last
  // row and column of places do to the last row and column of a tile alone, which maps of less than a tile do
  // not have.
  unsigned kinds_of(int place, int count) const {
    unsigned kinds = 0;
    for (int p = place; p < place + count; ++p) kinds |= 1u << kernels::place_kind(m_, p);
    return kinds;
  }
  unsigned needed_kinds(const Tiling& t) const {
    const int64_t height = t.cut.end_row - t.cut.first_row;
    unsigned kinds = (1u << kernels::kPlaceKinds) - 1;
    if (t.tall == 1 && height * problem_.pool <= problem_.dh * (m_ - 1)) kinds &= ~kernels::kLastRow;
    if (t.wide == 1 && t.cut.ow * problem_.pool <= problem_.dw * (m_ - 1)) kinds &= ~kernels::kLastColumn;
    return kinds;
  }
  // The tiles' masks for places of these kinds.
  const uint64_t* masks_of(const Scratch& s, unsigned kinds, int64_t tiles, unsigned* joined) const {
    const uint64_t* one = s.masks;
    unsigned left = kinds;
    for (; (left & 1) == 0; left >>= 1) one += s.kind;
    if (left == 1) return one;
    if (kinds == *joined) return s.joint;
    *joined = kinds;
    const int64_t count = static_cast<int64_t>(in_blocks_.size()) * tiles;
    std::memcpy(s.joint, one, static_cast<size_t>(count) * 8);
    while ((left >>= 1) != 0) {
      one += s.kind;
      if ((left & 1) != 0)
        for (int64_t i = 0; i < count; ++i) s.joint[i] |= one[i];
    }
    return s.joint;
  }

  // A tile whose result is not finite, again: a transform spreads infinities, NaN and overflows over the
  // whole tile.
  void direct(const ConvArgs& a, const Scratch& s, int64_t n, int64_t y0, int64_t x0, const Sub& sub,
              const WinogradOutput& to) const;

  static constexpr int64_t kLeast = 4;   // eighths of the tiles at once that scratch is never cut below
  static constexpr int64_t kApart = 16;  // keeps the places of a tile out of one set of the cache
  const int m_, a_, places_;
  const int64_t out_;   // pixels that come out of a tile's side
  const int64_t most_;  // tiles side by side whose rows stay in the first caches
};

void WinogradConv::direct(const ConvArgs& a, const Scratch& s, int64_t n, int64_t y0, int64_t x0,
                          const Sub& sub, const WinogradOutput& to) const {
  const ConvProblem& p = problem_;
  float* const pixels = s.redo;  // [a][a][64]
  const bool pooled = p.pool != 1;
  float* const whole = pooled ? pixels + a_ * a_ * 64 : to.out;
  const int64_t pixel = pooled ? to.floats : to.pixel_stride, row = pooled ? m_ * pixel : to.row_stride;
  for (int r = 0; r < m_; ++r)
    for (int c = 0; c < m_; ++c)
      std::memcpy(whole + r * row + c * pixel, to.bias, static_cast<size_t>(to.floats) * 4);
  int64_t channel = 0;
  for (size_t b = 0; b < in_blocks_.size(); channel += in_blocks_[b].width, ++b) {
    const int64_t width = in_blocks_[b].width;
    std::memset(pixels, 0, static_cast<size_t>(a_ * a_) * 64 * 4);
    for (int r = 0; r < a_; ++r)
      for (int c = 0; c < a_; ++c) {
        const int64_t iy = y0 * p.pool + r * p.dh - p.pad_top, ix = x0 * p.pool + c * p.dw - p.pad_left;
        if (iy < 0 || iy >= a.ih || ix < 0 || ix >= a.iw) continue;
        float* at = pixels + (r * a_ + c) * 64;
        if (p.in_packed)
          unpack_pixels(*a.in_map, n, iy, a.in_first_block + static_cast<int64_t>(b), ix, 1, at);
        else
          std::memcpy(at, a.in + ((n * a.ih + iy) * a.iw + ix) * a.in_stride + channel,
                      static_cast<size_t>(width) * 4);
      }
    for (int64_t k = 0; k < width; ++k)
      for (int r = 0; r < m_; ++r)
        for (int c = 0; c < m_; ++c)
          for (int tap = 0; tap < 9; ++tap) {
            const float v = pixels[((r + tap / 3) * a_ + c + tap % 3) * 64 + k];
            if (v == 0) continue;
            const float* w = raw_ + (sub.first * p.ic + channel + k) * 9 + tap;
            float* out = whole + r * row + c * pixel;
            for (int64_t o = 0; o < sub.width; ++o) out[o] += v * w[o * p.ic * 9];
          }
  }
  if (!pooled) return;
  for (int64_t r = 0; r < out_; ++r)
    for (int64_t c = 0; c < out_; ++c)
      for (int64_t o = 0; o < sub.width; ++o) {
        const float* at = whole + 2 * r * row + 2 * c * pixel + o;
        float most = at[0];
        for (const float v : {at[pixel], at[row], at[row + pixel]})
          if (v > most || v != v) most = v;  // NaN as PyTorch has it
        to.out[r * to.row_stride + c * to.pixel_stride + o] = most;
      }
}

bool can(const Variant&, const ConvProblem& p) {
  return p.kh == 3 && p.kw == 3 && p.sh == 1 && p.sw == 1 && p.groups == 1 && !p.in_planes;
}
std::unique_ptr<Conv> make(const ConvProblem& p, const Variant& v, Isa isa, const float* weight,
                           const float* bias, const std::shared_ptr<const void>& owner) {
  return std::make_unique<WinogradConv>(p, v, isa, weight, bias, owner);
}

}  // namespace

const Family kWinograd = {can, make};

}  // namespace actzip
