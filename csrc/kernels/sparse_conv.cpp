// Sparse convolutions: they skip the zeros of a packed input. An item is a band of output rows of one unit;
// all share how items are cut and how the input is found, and differ in what one visit of a pixel computes.
#include <algorithm>
#include <cstring>

#include "kernels/conv_base.h"

namespace actzip {
namespace {

constexpr int64_t kFirstLevel = 28 << 10;  // bytes of weights for the first-level cache
constexpr int64_t kRowWeights = 26 << 10;
constexpr size_t kSecondLevel = 256 << 10;  // weights beyond it are asked for early
constexpr int64_t kStays = 512 << 10;
constexpr int64_t kShared = 256;  // channels of an item

class SparseConv : public ConvBase {
 public:
  int64_t items(const ConvArgs& a, int threads) const override {
    const Cut c = cut_units(a, threads);
    return c.images * c.bands * static_cast<int64_t>(units_.size());
  }
  ConvPart part(const ConvArgs& a, int threads, int64_t item) const override {
    const Cut c = cut_units(a, threads);
    const auto unit = static_cast<size_t>(item / (c.images * c.bands));
    return part_of(c, item, unit, unit + 1);
  }
  size_t scratch_bytes(const ConvArgs& a, int threads) const override {
    Carver carver{nullptr};
    carve(carver, cut_units(a, threads), a);
    return carver.used;
  }
  void run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const override;

 protected:
  // Subs of at most `nv` vectors; `across`: taps whose weights lie side by side in a channel's row.
  SparseConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias, int nv,
             int64_t across) {
    init(p, v, isa, bias, nv);
    across_ = across;
    pack_weights(weight);
  }

  struct Scratch {
    float* acc;              // as the algorithm lays them out
    float* line;             // see line_floats
    const float** pointers;  // [in_rows][iw]
    float* values;           // [in_rows][iw * 64 + 16]
    Finish finish;
  };
  // What an item computes: segment [x0, x0 + count) of rows [y0, y0 + rows).
  struct Band {
    const ConvArgs& a;
    const Cut& cut;
    const Scratch& s;
    const Unit& u;
    int64_t n, y0, rows;
    int64_t iy0, in_rows;  // the input rows of the band
    bool fetch;            // the weights come from beyond the second-level cache: ask for them early
    int64_t x0 = 0, count = 0;

    bool inside(int64_t iy) const { return iy >= 0 && iy < a.ih; }
    // Where input pixels from (iy, x) on lie, block b.
    void look(kernels::SparseRun& run, int64_t block, int64_t iy, int64_t x) const {
      run.masks = a.in_map->masks(n, iy, a.in_first_block + block) + x;
      run.values = s.pointers + (iy - iy0) * a.iw + x;
    }
  };
  // Input channels [first, first + width) of the convolution; [lo, hi) of them are of the sub's group.
  struct Block {
    int64_t index, first, width;
    int64_t lo = 0, hi = 0;

    int64_t rows() const { return hi - lo; }  // of weights, a tap
  };

  // What the algorithms do, each its own way: accumulators beside a row's own on either side; ...
  virtual int64_t halo() const { return 0; }
  // ... floats of a row of sums where `sums` gathers them; ...
  virtual int64_t line_floats(const Cut&) const { return 0; }
  // ... whether values are read expanded, a channel a place; ...
  virtual bool expanded() const { return false; }
  // ... accumulators of a row; ...
  virtual int64_t slots(const Band& b) const { return b.count; }
  // ... one block of input channels, all taps; `run` knows which channels; ...
  virtual void accumulate(const Band& b, const Sub& sub, const Block& block,
                          kernels::SparseRun& run) const = 0;
  // ... and the sums of output row y0 + y, u.stride floats a pixel.
  virtual float* sums(const Band& b, int64_t y) const { return b.s.acc + y * b.count * b.u.stride; }

  int64_t floats(const Sub& sub) const { return sub.nv * kernels_->vl; }
  // Where the row of the block's first channel would be, of the group or not.
  const float* weights_of(const Sub& sub, const Block& block, int64_t tap) const {
    const int64_t before = block.first + block.lo - sub.group * group_width_;
    return weights_.get() + sub.weight +
           (before * taps_ + tap * block.rows() - block.lo * across_) * floats(sub);
  }

 private:
  void pack_weights(const float* weight);
  bool meets(const Sub& sub, Block* block) const;
  Cut cut_units(const ConvArgs& a, int threads) const {
    return cut(a, threads, static_cast<int64_t>(units_.size()));
  }
  Scratch carve(Carver& carver, const Cut& c, const ConvArgs& a) const;
  void run_block(const Band& b, Block block) const;
  void point(const ConvArgs& a, int64_t n, int64_t iy, int64_t block, int64_t width, const float** pointers,
             float* values) const;

  int64_t group_width_ = 0;  // input channels of a convolution group
  int64_t across_ = 1;
};

// Which channels of the block are of the sub's group; whether there are any.
bool SparseConv::meets(const Sub& sub, Block* block) const {
  block->lo = std::max<int64_t>(0, sub.group * group_width_ - block->first);
  block->hi = std::min(block->width, (sub.group + 1) * group_width_ - block->first);
  return block->lo < block->hi;
}

// [unit][sub][ic block][tap][channel of the block and the sub's group][nv * vl]. Taps side by side: a
// channel's row holds those of a kernel row, last first.
void SparseConv::pack_weights(const float* weight) {
  const int64_t icg = group_width_ = problem_.ic / problem_.groups;
  int64_t total = 0;
  for (Unit& u : units_)
    for (Sub& s : u.subs) {
      s.weight = total;
      total += icg * taps_ * floats(s);
    }
  keep_weights(total, [&](float* to) {
    for (const Unit& u : units_)
      for (const Sub& s : u.subs) {
        float* w = to + s.weight;
        Block b{0, 0, 0};
        for (const ChannelBlock& block : in_blocks_) {
          b.width = block.width;
          if (meets(s, &b))
            for (int64_t t = 0; t < taps_; t += across_)
              for (int64_t k = b.first + b.lo - s.group * icg, n = b.rows(); n > 0; ++k, --n)
                for (int64_t j = across_ - 1; j >= 0; --j, w += floats(s))
                  for (int64_t o = 0; o < s.width; ++o)
                    w[o] = weight[((s.first + o) * icg + k) * taps_ + t + j];
          b.first += b.width;
        }
      }
  });
}

SparseConv::Scratch SparseConv::carve(Carver& carver, const Cut& c, const ConvArgs& a) const {
  Scratch s{};
  const int64_t slots = c.rows * (c.segment + 2 * halo()) + 1;  // one more is read by pairs
  s.acc = carver.take<float>(slots * widest_unit());
  s.line = carver.take<float>(line_floats(c));
  s.pointers = carver.take<const float*>(c.in_rows * a.iw);
  const bool values = expanded() || (a.in_map != nullptr && a.in_map->layout().type != ValueType::f32);
  s.values = carver.take<float>(values ? c.in_rows * (a.iw * 64 + 16) : 0);
  s.finish = take_finish(carver, a, c, 1);
  return s;
}

void SparseConv::run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const {
  const ConvProblem& p = problem_;
  const Cut c = cut_units(a, threads);
  Carver carver{static_cast<unsigned char*>(scratch)};
  const Scratch s = carve(carver, c, a);
  // Items of one unit follow each other: its weights stay in the cache. Every thread's first band of a unit
  // brings its weights; where they do not stay, every band does.
  const int64_t per_unit = c.images * c.bands, at = item % per_unit;
  const auto unit = static_cast<size_t>(item / per_unit);
  const Unit& u = units_[unit];
  const int64_t y0 = c.first_row + at % c.bands * c.rows;
  const int64_t rows = std::min(c.rows, c.end_row - y0);
  const bool fetch = weight_bytes_ > kSecondLevel && (at < threads || u.stride * p.ic * taps_ * 4 > kStays);
  Band b{a,
         c,
         s,
         u,
         c.first_image + at / c.bands,
         y0,
         rows,
         y0 * p.sh - p.pad_top,
         (rows - 1) * p.sh + (p.kh - 1) * p.dh + 1,
         fetch};
  for (b.x0 = 0; b.x0 < c.ow; b.x0 += c.segment) {
    b.count = std::min(c.segment, c.ow - b.x0);
    std::memset(s.acc, 0, static_cast<size_t>(rows * slots(b) * u.stride) * 4);
    Block block{0, 0, 0};
    for (const ChannelBlock& cb : in_blocks_) {
      block.width = cb.width;
      run_block(b, block);
      block.first += cb.width;
      ++block.index;
    }
    for (int64_t y = 0; y < rows; ++y)
      finish(a, c, u, s.finish, {b.n, y0 + y, b.x0, b.count, sums(b, y), u.stride, bias_.get()});
  }
}

void SparseConv::run_block(const Band& b, Block block) const {
  bool pointed = false;
  for (const Sub& sub : b.u.subs) {
    if (!meets(sub, &block)) continue;
    for (int64_t r = 0; r < b.in_rows && !pointed; ++r)
      if (b.inside(b.iy0 + r) && touched(r, b.rows))
        point(b.a, b.n, b.iy0 + r, b.a.in_first_block + block.index, block.width, b.s.pointers + r * b.a.iw,
              b.s.values + r * (b.a.iw * 64 + 16));
    pointed = true;
    kernels::SparseRun run{};
    run.acc_stride = b.u.stride;
    run.step = problem_.sw;
    run.clip = (block.rows() == 64 ? ~uint64_t{0} : ((uint64_t{1} << block.rows()) - 1)) << block.lo;
    accumulate(b, sub, block, run);
  }
}

// Where each pixel's values begin, decoded to float32 and expanded as the kernel wants them.
void SparseConv::point(const ConvArgs& a, int64_t n, int64_t iy, int64_t block, int64_t width,
                       const float** pointers, float* values) const {
  const PackedMap& map = *a.in_map;
  const PackedLayout& l = map.layout();
  const uint64_t* masks = map.masks(n, iy, block);
  if (expanded()) {
    if (l.type == ValueType::f32)
      kernels_->expand(masks, static_cast<const float*>(map.segment(n, iy, block)), a.iw, width, values, 64);
    else
      unpack_pixels(map, n, iy, block, 0, a.iw, values);
    for (int64_t x = 0; x < a.iw; ++x) pointers[x] = values + x * 64;
    return;
  }
  const float* v = static_cast<const float*>(map.segment(n, iy, block));
  if (l.type != ValueType::f32) {
    const int64_t count = kernels_->count_values(masks, a.iw);
    kernels_->load_values(map.segment(n, iy, block), count, static_cast<int>(l.type),
                          l.blocks[static_cast<size_t>(block)].scale, values);
    v = values;
  }
  kernels_->point_values(masks, a.iw, v, pointers);
}

// A tap at a time, for one output pixel a visit or for pairs of them.
template <int PIXELS>
class TapConv : public SparseConv {
 public:
  TapConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias)
      : SparseConv(p, v, isa, weight, bias, v.nv, 1) {}

 protected:
  // Channels that do not fill tiles are better cut into even ones: 160 into twice 80, not into 128 and 32.
  int64_t unit_width(int64_t widest) const override {
    const int64_t oc = problem_.oc;
    if (widest % 64 == 0 && oc % widest == 0) return widest;
    return std::max(widest, round_up(ceil_div(oc, ceil_div(oc, kShared)), 64));
  }
  bool expanded() const override { return PIXELS == 2 && kernels_->expanded_pairs; }

  void accumulate(const Band& b, const Sub& sub, const Block& block, kernels::SparseRun& run) const override {
    const ConvProblem& p = problem_;
    const auto kernel = PIXELS == 2 ? kernels_->sparse_pair[sub.nv] : kernels_->sparse[sub.nv];
    const int64_t weights = block.rows() * floats(sub);  // of a tap
    const int64_t visits = std::max<int64_t>(1, b.rows * b.count / PIXELS);
    const int64_t lines = b.fetch ? ceil_div(weights, 16 * visits) : 0;
    const float* weight = weights_of(sub, block, 0);
    for (int64_t ky = 0; ky < p.kh; ++ky)
      for (int64_t kx = 0; kx < p.kw; ++kx, weight += weights) {
        const int64_t dx = kx * p.dw - p.pad_left;
        // Output pixels whose input pixel exists.
        const int64_t from = std::max(b.x0, dx < 0 ? ceil_div(-dx, p.sw) : 0);
        const int64_t last = b.a.iw - 1 - dx;
        const int64_t to = std::min(b.x0 + b.count, last < 0 ? 0 : last / p.sw + 1);
        if (from >= to) continue;
        run.weight = weight;
        run.count = to - from;
        // The next tap's weights, or the next block's, follow in memory.
        run.next_weight = weight + weights;
        run.next_lines = lines;
        for (int64_t y = 0; y < b.rows; ++y) {
          const int64_t iy = b.iy0 + y * p.sh + ky * p.dh;
          if (!b.inside(iy)) continue;
          run.acc = b.s.acc + (y * b.count + from - b.x0) * b.u.stride + sub.offset;
          b.look(run, block.index, iy, from * p.sw + dx);
          kernel(run);
          run.next_weight += lines * 16 * (run.count / PIXELS);
        }
      }
  }
};

// The taps of a kernel row in one visit of an output pixel, where their weights fit the first-level cache.
class RowConv final : public TapConv<1> {
 public:
  using TapConv::TapConv;

 protected:
  void accumulate(const Band& b, const Sub& sub, const Block& block, kernels::SparseRun& run) const override {
    const ConvProblem& p = problem_;
    if (block.rows() * p.kw * floats(sub) * 4 > kRowWeights) return TapConv::accumulate(b, sub, block, run);
    run.tap_step = p.dw;
    run.tap_weight = block.rows() * floats(sub);
    run.next_lines = b.fetch ? ceil_div(p.kw * run.tap_weight, 16 * b.rows * b.count) : 0;
    for (int64_t ky = 0; ky < p.kh; ++ky) {
      const float* weight = weights_of(sub, block, ky * p.kw);
      run.next_weight = weight + p.kw * run.tap_weight;
      for (int64_t y = 0; y < b.rows; ++y) {
        const int64_t iy = b.iy0 + y * p.sh + ky * p.dh;
        if (b.inside(iy)) run_row(b, sub, block, {y, iy, weight}, run);
      }
    }
  }

 private:
  struct Row {
    int64_t y, iy;
    const float* weight;
  };
  void run_row(const Band& b, const Sub& sub, const Block& block, const Row& row,
               kernels::SparseRun& run) const {
    const ConvProblem& p = problem_;
    const auto kernel = kernels_->sparse_row[sub.nv];
    // Output pixels of which every tap meets the input: [lo, hi).
    const int64_t end = b.x0 + b.count, last = b.a.iw - 1 + p.pad_left - (p.kw - 1) * p.dw;
    const int64_t lo = std::clamp(ceil_div(p.pad_left, p.sw), b.x0, end);
    const int64_t hi = std::clamp(last < 0 ? 0 : last / p.sw + 1, lo, end);
    const auto part = [&](int64_t from, int64_t to, int64_t t0, int64_t t1) {
      run.weight = row.weight + t0 * run.tap_weight;
      run.taps = t1 - t0;
      run.count = to - from;
      run.acc = b.s.acc + (row.y * b.count + from - b.x0) * b.u.stride + sub.offset;
      b.look(run, block.index, row.iy, from * p.sw - p.pad_left + t0 * p.dw);
      kernel(run);
      run.next_weight += run.next_lines * 16 * run.count;
    };
    const auto border = [&](int64_t x) {
      const int64_t left = p.pad_left - x * p.sw, right = b.a.iw - 1 + left;
      const int64_t t0 = left > 0 ? ceil_div(left, p.dw) : 0;
      const int64_t t1 = right < 0 ? 0 : std::min(p.kw, right / p.dw + 1);
      if (t0 < t1) part(x, x + 1, t0, t1);
    };
    for (int64_t x = b.x0; x < lo; ++x) border(x);
    if (lo < hi) part(lo, hi, 0, p.kw);
    for (int64_t x = hi; x < end; ++x) border(x);
  }
};

// All taps of a kernel row in one visit of an input pixel, or of two: its outputs lie side by side, and the
// accumulators have room for those beyond the segment, which are not used. They are laid out
// [sub][rows][halo, segment, halo][nv * vl].
template <int PIXELS>
class TapsConv final : public SparseConv {
 public:
  TapsConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias)
      : SparseConv(p, v, isa, weight, bias, v.nv / static_cast<int>(p.kw), p.kw) {}

 protected:
  int64_t halo() const override { return problem_.kw - 1; }
  int64_t line_floats(const Cut& c) const override { return c.segment * widest_unit(); }

  int64_t slots(const Band& b) const override { return b.count + 2 * halo(); }

  void accumulate(const Band& b, const Sub& sub, const Block& block, kernels::SparseRun& run) const override {
    const ConvProblem& p = problem_;
    const auto kernel = PIXELS == 2 ? kernels_->sparse_taps_pair[sub.nv] : kernels_->sparse[sub.nv * p.kw];
    const int64_t from = std::max<int64_t>(0, b.x0 - p.pad_left);
    const int64_t to = std::min(b.a.iw, b.x0 + b.count - p.pad_left + p.kw - 1);
    if (from >= to) return;
    run.acc_stride = floats(sub);
    run.step = 1;
    run.count = to - from;
    // As many channels at a time as have weights for the first-level cache.
    const int64_t channels = floats(sub) * p.kw * 64 * 4 > kFirstLevel ? 32 : 64;
    const uint64_t clip = run.clip;
    // The leftmost output of input pixel `from`, in slots of the row.
    const int64_t slot = from + p.pad_left - (p.kw - 1) - b.x0 + halo();
    for (int64_t ky = 0; ky < p.kh; ++ky) {
      run.weight = weights_of(sub, block, ky * p.kw);
      for (int64_t k = 0; k < block.width; k += channels) {
        run.clip = channels == 64 ? clip : clip & (uint64_t{0xffffffff} << k);
        for (int64_t y = 0; y < b.rows; ++y) {
          const int64_t iy = b.iy0 + y * p.sh + ky * p.dh;
          if (!b.inside(iy)) continue;
          run.acc = acc_of(b, sub) + (y * slots(b) + slot) * floats(sub);
          b.look(run, block.index, iy, from);
          kernel(run);
        }
      }
    }
  }

  // A row of the unit's subs side by side.
  float* sums(const Band& b, int64_t y) const override {
    const auto row_of = [&](const Sub& sub) {
      return acc_of(b, sub) + (y * slots(b) + halo()) * floats(sub);
    };
    if (b.u.subs.size() == 1) return row_of(b.u.subs[0]);
    for (const Sub& sub : b.u.subs) {
      const float* from = row_of(sub);
      for (int64_t x = 0; x < b.count; ++x)
        std::memcpy(b.s.line + x * b.u.stride + sub.offset, from + x * floats(sub),
                    static_cast<size_t>(floats(sub)) * 4);
    }
    return b.s.line;
  }

 private:
  float* acc_of(const Band& b, const Sub& sub) const { return b.s.acc + b.rows * slots(b) * sub.offset; }
};

// Depthwise: a vector of one weight and zeros for every value would be more work than the zeros save.
bool packed(const Variant&, const ConvProblem& p) { return p.in_packed && !is_depthwise(p); }
bool wide(const Variant& v, const ConvProblem& p) { return packed(v, p) && p.kw > 1; }
bool neighbours(const Variant& v, const ConvProblem& p) {
  const bool taps = v.row.pixel_tile == 2 ? p.kw == 3 : p.kw > 1 && p.kw <= 4;
  return packed(v, p) && taps && p.sw == 1 && p.dw == 1;
}

// One pixel or two, as the row says.
template <template <int> class C>
std::unique_ptr<Conv> make_pixels(const ConvProblem& p, const Variant& v, Isa isa, const float* weight,
                                  const float* bias, const std::shared_ptr<const void>& owner) {
  return (v.row.pixel_tile == 2 ? make_as<C<2>> : make_as<C<1>>)(p, v, isa, weight, bias, owner);
}

}  // namespace

const Family kSparse = {packed, make_pixels<TapConv>};
const Family kSparseRow = {wide, make_as<RowConv>};
const Family kSparseTaps = {neighbours, make_pixels<TapsConv>};

}  // namespace actzip
