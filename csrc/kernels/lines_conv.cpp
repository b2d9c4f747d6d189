// Convolutions of few output channels, where vectors across them would be mostly empty: vectors lie along
// the rows (of a kernel that is one column: along the columns) of the map. A band's input is copied into
// lines, one a channel, with the padding's zeros; positions `stride` apart follow each other there.
#include <algorithm>
#include <cstring>
#include <limits>

#include "kernels/conv_base.h"

namespace actzip {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMost = 8;                // output channels
constexpr int64_t kLinesBytes = 192 << 10;  // of a band's input, for the second-level cache
constexpr int64_t kLongest = 4096;          // positions of a band whose lines are columns

class LinesConv final : public ConvBase {
 public:
  LinesConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias) {
    init(p, v, isa, bias, 0);
    columns_ = p.kw == 1 && p.pad_left + p.pad_right == 0;
    along_ = columns_ ? Axis{p.kh, p.sh, p.dh, p.pad_top} : Axis{p.kw, p.sw, p.dw, p.pad_left};
    across_ = columns_ ? 1 : p.kh;
    for (int64_t first = 0, left = ceil_div(p.oc, kernels_->lines_oc); first < p.oc; --left) {
      const int64_t width = ceil_div(p.oc - first, left);
      pieces_.push_back({first, width, p.ic * taps_ * first});
      first += width;
    }
    // [piece][channel][line][tap][output channel]
    keep_weights(p.oc * p.ic * taps_, [&](float* to) {
      for (const Piece& piece : pieces_)
        for (int64_t c = 0; c < p.ic; ++c)
          for (int64_t t = 0; t < taps_; ++t)
            for (int64_t o = 0; o < piece.width; ++o)
              *to++ = weight[((piece.first + o) * p.ic + c) * taps_ + t];
    });
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
  void run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const override;

 private:
  struct Axis {  // of the window: along the lines
    int64_t taps, step, dilation, pad;
  };
  struct Piece {  // output channels computed together
    int64_t first, width, weight;
  };
  struct Scratch {
    float* lines;          // [input line][channel][phase][position]
    float* row;            // an unpacked input row
    const float** in;      // [channel][line of the window]
    int64_t* offsets;      // [tap]
    float* acc;            // of an output row, or of the band where lines are columns
    int64_t phase, plane;  // floats of a phase, of a channel
    Finish finish;
  };

  Cut cut_rows(const ConvArgs& a, int threads) const;
  Scratch carve(Carver& carver, const Cut& c, const ConvArgs& a) const;
  int64_t positions(const Cut& c) const { return columns_ ? c.rows : c.ow; }
  int64_t reach() const { return (along_.taps - 1) * along_.dilation; }
  void read_rows(const ConvArgs& a, const Scratch& s, int64_t n, int64_t y0, int64_t rows) const;
  void read_columns(const ConvArgs& a, const Scratch& s, int64_t n, int64_t y0) const;
  void split(const ConvArgs& a, const Scratch& s, const float* src, int64_t stride, int64_t first,
             int64_t last, int64_t size, int64_t line) const;
  void run_line(const Scratch& s, int64_t count, bool last, float* out, int64_t stride) const;

  bool columns_ = false;
  Axis along_{};
  int64_t across_ = 1;  // lines of the window
  std::vector<Piece> pieces_;
};

Cut LinesConv::cut_rows(const ConvArgs& a, int threads) const {
  const ConvProblem& p = problem_;
  Cut c = whole_or_part(p, a);
  const int64_t height = c.end_row - c.first_row;
  c.segment = c.ow;
  c.segments = 1;
  const int64_t row = (c.ow * p.sw + p.kw * p.dw) * p.ic * 4;
  int64_t rows = columns_ ? kLongest : std::max<int64_t>(1, (kLinesBytes / row - (p.kh - 1) * p.dh) / p.sh);
  rows = std::clamp<int64_t>(rows, 1, std::max<int64_t>(1, height));
  if (threads > 1)
    while (rows > 1 && c.images * ceil_div(height, rows) < 2 * threads) rows = ceil_div(rows, 2);
  c.bands = ceil_div(height, rows);
  c.rows = std::max<int64_t>(1, ceil_div(height, std::max<int64_t>(1, c.bands)));
  c.bands = ceil_div(height, c.rows);
  c.in_rows = (c.rows - 1) * p.sh + (p.kh - 1) * p.dh + 1;
  return c;
}

LinesConv::Scratch LinesConv::carve(Carver& carver, const Cut& c, const ConvArgs& a) const {
  const ConvProblem& p = problem_;
  Scratch s{};
  const int64_t vl = kernels_->vl;
  s.phase = round_up(round_up(positions(c), vl) + reach() / along_.step + 1, 16);
  s.plane = s.phase * along_.step;
  s.lines = carver.take<float>((columns_ ? c.ow : c.in_rows) * p.ic * s.plane);
  s.row = carver.take<float>(p.in_packed ? a.iw * p.ic + 16 : 0);
  s.in = carver.take<const float*>(p.ic * across_);
  s.offsets = carver.take<int64_t>(along_.taps);
  s.acc = carver.take<float>((columns_ ? c.rows : 1) * c.ow * widest_unit());
  s.finish = take_finish(carver, a, c, 1);
  return s;
}

// Positions [first, last) of `size` that a line of the map has, from `src` (position 0) on, to input line
// `line`; zeros where there are none.
void LinesConv::split(const ConvArgs& a, const Scratch& s, const float* src, int64_t stride, int64_t first,
                      int64_t last, int64_t size, int64_t line) const {
  const ConvProblem& p = problem_;
  const int64_t step = along_.step, begin = std::clamp<int64_t>(0, first, last) - first;
  const int64_t end = std::clamp<int64_t>(size, first + begin, last) - first;
  float* to = s.lines + line * p.ic * s.plane;
  for (int64_t i = 0; i < p.ic * step; ++i) {  // positions below `begin` and from `end` on of each phase
    float* phase = to + i * s.phase;
    const int64_t r = i % step, low = ceil_div(std::max<int64_t>(0, begin - r), step);
    const int64_t high = ceil_div(std::max<int64_t>(0, end - r), step);
    std::fill(phase, phase + low, 0.0f);
    std::fill(phase + std::max(low, high), phase + s.phase, 0.0f);
  }
  if (begin >= end) return;
  // The first position's phase is begin % step: rotate so that the split begins at phase 0.
  const int64_t head = std::min(end, round_up(begin, step));
  const int64_t planes = p.in_planes ? p.ic : 1, channels = p.in_planes ? 1 : p.ic;
  for (int64_t c = 0; c < planes; ++c) {
    const float* from = src + first * stride + c * a.ih * a.iw;
    float* plane = to + c * s.plane;
    for (int64_t i = begin; i < head; ++i)
      for (int64_t k = 0; k < channels; ++k)
        plane[k * s.plane + i % step * s.phase + i / step] = from[i * stride + k];
    if (head < end)
      kernels_->lines_split(from + head * stride, stride, channels, end - head, step, s.phase,
                            plane + head / step, s.plane);
  }
}

void LinesConv::read_rows(const ConvArgs& a, const Scratch& s, int64_t n, int64_t y0, int64_t rows) const {
  const ConvProblem& p = problem_;
  const int64_t in_rows = (rows - 1) * p.sh + (p.kh - 1) * p.dh + 1;
  const int64_t last = s.plane - p.pad_left;
  for (int64_t r = 0; r < in_rows; ++r) {
    const int64_t iy = y0 * p.sh - p.pad_top + r;
    if (iy < 0 || iy >= a.ih || !touched(r, rows)) continue;
    if (p.in_planes) {
      split(a, s, a.in + (n * p.ic * a.ih + iy) * a.iw, 1, -p.pad_left, last, a.iw, r);
    } else if (p.in_packed) {
      int64_t first = 0;
      for (size_t b = 0; b < in_blocks_.size(); first += in_blocks_[b].width, ++b)
        unpack_row(*a.in_map, n, iy, a.in_first_block + static_cast<int64_t>(b), s.row + first, p.ic);
      split(a, s, s.row, p.ic, -p.pad_left, last, a.iw, r);
    } else {
      split(a, s, a.in + (n * a.ih + iy) * a.iw * a.in_stride, a.in_stride, -p.pad_left, last, a.iw, r);
    }
  }
}

// One line an output column.
void LinesConv::read_columns(const ConvArgs& a, const Scratch& s, int64_t n, int64_t y0) const {
  const ConvProblem& p = problem_;
  const int64_t first = y0 * p.sh - p.pad_top, ow = p.out_w(a.iw);
  for (int64_t x = 0; x < ow; ++x) {
    const float* src = p.in_planes ? a.in + n * p.ic * a.ih * a.iw + x * p.sw
                                   : a.in + (n * a.ih * a.iw + x * p.sw) * a.in_stride;
    split(a, s, src, a.iw * (p.in_planes ? 1 : a.in_stride), first, first + s.plane, a.ih, x);
  }
}

// Positions [0, count) of the lines at s.in. `last`: the activation, too.
void LinesConv::run_line(const Scratch& s, int64_t count, bool last, float* out, int64_t stride) const {
  const ConvProblem& p = problem_;
  const int64_t vl = kernels_->vl;
  kernels::LinesTile t{};
  t.in = s.in;
  t.lines = p.ic * across_;
  t.offsets = s.offsets;
  t.taps = along_.taps;
  t.out_stride = stride;
  t.lo = last && p.act == ActKind::relu ? 0.0f : last && p.act == ActKind::clip ? p.lo : -kInfinity;
  t.hi = last && p.act == ActKind::clip ? p.hi : kInfinity;
  for (const Piece& piece : pieces_) {
    t.weight = weights_.get() + piece.weight;
    t.bias = bias_.get() + piece.first;
    t.out = out + piece.first;
    // Tiles of even size.
    int64_t vectors = ceil_div(count, vl);
    t.first = 0;
    for (int64_t left = ceil_div(vectors, kernels_->lines_nx[piece.width]); left > 0; --left) {
      const int64_t nx = ceil_div(vectors, left);
      t.count = std::min(nx * vl, count - t.first);
      kernels_->lines[piece.width][nx](t);
      t.first += nx * vl;
      vectors -= nx;
    }
  }
}

void LinesConv::run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const {
  const ConvProblem& p = problem_;
  const Cut c = cut_rows(a, threads);
  Carver carver{static_cast<unsigned char*>(scratch)};
  const Scratch s = carve(carver, c, a);
  const int64_t n = c.first_image + item / c.bands, y0 = c.first_row + item % c.bands * c.rows;
  const int64_t rows = std::min(c.rows, c.end_row - y0);
  const bool direct = !p.out_packed && p.bounds() && a.residual == nullptr && a.residual_map == nullptr;
  for (int64_t t = 0; t < along_.taps; ++t) {
    const int64_t at = t * along_.dilation;
    s.offsets[t] = at % along_.step * s.phase + at / along_.step;
  }
  const Unit& u = units_[0];
  const auto at = [&](int64_t y, int64_t x) { return a.out + ((n * c.oh + y) * c.ow + x) * a.out_stride; };
  if (columns_) {
    read_columns(a, s, n, y0);
    for (int64_t x = 0; x < c.ow; ++x) {
      for (int64_t ch = 0; ch < p.ic; ++ch) s.in[ch] = s.lines + (x * p.ic + ch) * s.plane;
      if (direct)
        run_line(s, rows, true, at(y0, x), c.ow * a.out_stride);
      else
        run_line(s, rows, false, s.acc + x * u.stride, c.ow * u.stride);
    }
  } else {
    read_rows(a, s, n, y0, rows);
  }
  for (int64_t y = 0; y < rows; ++y) {
    if (!columns_) {
      for (int64_t ch = 0; ch < p.ic; ++ch)
        for (int64_t ky = 0; ky < p.kh; ++ky) {
          const int64_t r = y * p.sh + ky * p.dh, iy = y0 * p.sh - p.pad_top + r;
          s.in[ch * p.kh + ky] = iy < 0 || iy >= a.ih ? nullptr : s.lines + (r * p.ic + ch) * s.plane;
        }
      if (direct)
        run_line(s, c.ow, true, at(y0 + y, 0), a.out_stride);
      else
        run_line(s, c.ow, false, s.acc, u.stride);
    }
    if (!direct)
      finish(a, c, u, s.finish, {n, y0 + y, 0, c.ow, s.acc + (columns_ ? y * c.ow * u.stride : 0), u.stride});
  }
}

bool can(const Variant&, const ConvProblem& p) {
  const bool columns = p.kw == 1 && p.pad_left + p.pad_right == 0;
  return p.groups == 1 && p.oc <= kMost && p.kh * p.kw > 1 && !(columns && p.in_packed);
}

}  // namespace

const Family kLines = {can, make_as<LinesConv>};

}  // namespace actzip
