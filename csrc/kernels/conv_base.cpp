#include "kernels/conv_base.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace actzip {

Cut whole_or_part(const ConvProblem& p, const ConvArgs& a) {
  Cut c{};
  c.oh = p.out_h(a.ih);
  c.ow = p.out_w(a.iw);
  c.first_image = a.first_image;
  c.images = a.images < 0 ? a.n - a.first_image : a.images;
  c.first_row = a.first_row;
  c.end_row = a.rows < 0 ? c.oh : a.first_row + a.rows;
  return c;
}

void ConvBase::init(const ConvProblem& p, const Variant& v, Isa isa, const float* bias, int nv) {
  problem_ = p;
  variant_ = v;
  isa_ = isa;
  row_ = &kernel_table(isa)[static_cast<size_t>(&v - variants(isa).data())];
  kernels_ = &kernels::kernels_for(isa);
  in_blocks_ = p.blocks();
  out_blocks_ = split_channels(p.oc);
  taps_ = p.kh * p.kw;
  const int64_t padded = round_up(p.oc, 64) + 64;
  bias_ = make_floats(padded);
  if (bias != nullptr) std::memcpy(bias_.get(), bias, static_cast<size_t>(p.oc) * 4);
  if (!p.thresholds.empty()) {
    thresholds_ = make_floats(padded);
    std::memcpy(thresholds_.get(), p.thresholds.data(), static_cast<size_t>(p.oc) * 4);
  }
  cut_units(nv);
  place_bias();
}

// The key names the layer, the kernel and all that decides the order of the weights: how the input's and the
// output's channels are cut, and what a layer that shares them may have of its own.
void ConvBase::keep_weights(int64_t count, const std::function<void(float*)>& pack, const char* order) {
  weight_bytes_ = static_cast<size_t>(count) * 4;
  if (problem_.store == nullptr) {
    Floats fresh = make_weights(count);
    pack(fresh.get());
    weights_ = std::move(fresh);
    return;
  }
  std::string key = problem_.layer + '/' + isa_name(isa_) + '/' + row_->name + order;
  for (size_t i = 0; i < in_blocks_.size(); ++i)
    key += (i == 0 ? '/' : '.') + std::to_string(in_blocks_[i].width);
  for (const Unit& u : units_)
    for (const Sub& s : u.subs) key += (&s == &u.subs.front() ? '/' : '.') + std::to_string(s.width);
  const ConvProblem& p = problem_;
  for (int64_t k : {p.groups, p.sh, p.sw, p.dh, p.dw, int64_t{p.in_packed}}) key += ',' + std::to_string(k);
  weights_ = problem_.store->get(key, count, pack);
}

void ConvBase::keep_raw(const float* weight, int64_t count, std::shared_ptr<const void> owner) {
  raw_ = weight;
  raw_owner_ = std::move(owner);
  if (raw_owner_ != nullptr) return;
  raw_copy_ = make_weights(count);
  std::memcpy(raw_copy_.get(), weight, static_cast<size_t>(count) * 4);
  raw_ = raw_copy_.get();
  weight_bytes_ += static_cast<size_t>(count) * 4;
}

// As many blocks as the tile is wide.
void ConvBase::cut_units(int nv) {
  const int64_t vl = kernels_->vl, most = unit_width(nv * vl);
  for (size_t b = 0; b < out_blocks_.size();) {
    Unit u{};
    u.first = out_blocks_[b].first;
    u.first_block = static_cast<int64_t>(b);
    do {
      u.width += out_blocks_[b].width;
      ++u.blocks;
      ++b;
    } while (b < out_blocks_.size() && round_up(u.width + out_blocks_[b].width, vl) <= most);
    u.stride = round_up(u.width, vl);
    if (nv > 0) cut_subs(u, nv);
    units_.push_back(std::move(u));
  }
}

// A unit's channels of one group, in even shares.
void ConvBase::cut_subs(Unit& u, int nv) const {
  const int64_t vl = kernels_->vl, ocg = problem_.oc / problem_.groups, end = u.first + u.width;
  int64_t at = 0;
  for (int64_t c = u.first; c < end;) {
    const int64_t g = c / ocg, last = std::min((g + 1) * ocg, end);
    int64_t vectors = ceil_div(last - c, vl);
    for (int64_t pieces = ceil_div(vectors, nv); pieces > 0; --pieces) {
      const int64_t share = ceil_div(vectors, pieces), width = std::min(last - c, share * vl);
      u.subs.push_back({c, width, static_cast<int>(share), at, g, 0});
      if (at != c - u.first) u.compact = true;
      at += share * vl;
      c += width;
      vectors -= share;
    }
  }
  u.stride = at;
}

// The bias again, laid out as the accumulators are.
void ConvBase::place_bias() {
  int64_t at = 0;
  for (const Unit& u : units_) at += u.stride;
  tile_bias_ = make_floats(at);
  at = 0;
  for (const Unit& u : units_) {
    tile_bias_at_.push_back(at);
    for (const Sub& s : u.subs)
      std::memcpy(tile_bias_.get() + at + s.offset, bias_.get() + s.first, static_cast<size_t>(s.width) * 4);
    if (u.subs.empty())
      std::memcpy(tile_bias_.get() + at, bias_.get() + u.first, static_cast<size_t>(u.width) * 4);
    at += u.stride;
  }
}

int64_t ConvBase::widest_unit() const {
  int64_t stride = 0;
  for (const Unit& u : units_) stride = std::max(stride, u.stride);
  return stride;
}

ConvPart ConvBase::part_of(const Cut& c, int64_t item, size_t unit, size_t last) const {
  const int64_t i = item % (c.images * c.bands), row = c.first_row + i % c.bands * c.rows;
  const Unit &u = units_[unit], &end = units_[last - 1];
  return {c.first_image + i / c.bands, row, std::min(c.rows, c.end_row - row), u.first,
          end.first + end.width - u.first};
}

Cut ConvBase::cut(const ConvArgs& a, int threads, int64_t groups_of_units) const {
  const ConvProblem& p = problem_;
  Cut c = whole_or_part(p, a);
  const int64_t height = c.end_row - c.first_row;
  const int64_t tile = variant_.tile;
  c.segments = std::max<int64_t>(1, ceil_div(c.ow, tile + tile / 3));
  c.segment = round_up(ceil_div(c.ow, c.segments), 2);
  c.segments = ceil_div(c.ow, c.segment);
  int64_t rows = c.segments > 1 ? 1 : std::max<int64_t>(1, (tile + c.ow / 2) / c.ow);
  // Enough items for every thread, of even size.
  if (threads > 1)
    while (rows > 1 && c.images * ceil_div(height, rows) * groups_of_units < 2 * threads) --rows;
  c.bands = ceil_div(height, rows);
  c.rows = ceil_div(height, c.bands);
  c.bands = ceil_div(height, c.rows);
  c.in_rows = (c.rows - 1) * p.sh + (p.kh - 1) * p.dh + 1;
  return c;
}

bool ConvBase::touched(int64_t r, int64_t rows) const {
  const ConvProblem& p = problem_;
  for (int64_t ky = 0; ky < p.kh; ++ky) {
    const int64_t d = r - ky * p.dh;
    if (d >= 0 && d % p.sh == 0 && d / p.sh < rows) return true;
  }
  return false;
}

ConvBase::Finish ConvBase::take_finish(Carver& carver, const ConvArgs& a, const Cut& c,
                                       int64_t units_at_once) const {
  Finish f{};
  int64_t blocks = 1;
  for (const Unit& u : units_) blocks = std::max(blocks, u.blocks);
  if (c.segments > 1) blocks *= units_at_once;  // all their rows are unfinished at once
  f.staged_stride = c.ow * 64 + 16;
  f.staged = carver.take<float>(problem_.out_packed ? blocks * f.staged_stride : 0);
  f.counts = carver.take<int64_t>(blocks);
  f.residual = carver.take<float>(a.residual_map != nullptr ? c.segment * 64 + 16 : 0);
  return f;
}

// Closes the holes between sub tiles.
void ConvBase::compact(const Unit& u, const RowPart& part) const {
  for (int64_t i = 0; i < part.count; ++i)
    for (const Sub& s : u.subs)
      std::memmove(part.acc + i * part.stride + (s.first - u.first), part.acc + i * part.stride + s.offset,
                   static_cast<size_t>(s.width) * 4);
}

void ConvBase::finish(const ConvArgs& a, const Cut& c, const Unit& u, const Finish& f, const RowPart& part,
                      int64_t slot) const {
  const ConvProblem& p = problem_;
  if (u.compact) compact(u, part);
  const int64_t pixel = (part.n * c.oh + part.y) * c.ow + part.x0;
  for (int64_t b = 0; b < u.blocks; ++b) {
    const int64_t block = u.first_block + b;
    const ChannelBlock cb = out_blocks_[static_cast<size_t>(block)];
    kernels::EpilogueRow e{};
    e.acc = part.acc + (cb.first - u.first);
    e.acc_stride = part.stride;
    e.count = part.count;
    e.width = cb.width;
    if (part.bias != nullptr) e.bias = part.bias + cb.first;
    e.act = static_cast<int>(p.act);
    e.lo = p.lo;
    e.hi = p.hi;
    e.step = p.step;
    e.pre_lo = p.pre_lo;
    e.pre_hi = p.pre_hi;
    e.pre_step = p.pre_step;
    e.thresholds = thresholds_ ? thresholds_.get() + cb.first : nullptr;
    if (a.residual != nullptr) {
      e.residual = a.residual + pixel * a.residual_stride + cb.first;
      e.residual_stride = a.residual_stride;
    } else if (a.residual_map != nullptr) {
      unpack_pixels(*a.residual_map, part.n, part.y, a.residual_first_block + block, part.x0, part.count,
                    f.residual);
      e.residual = f.residual;
      e.residual_stride = 64;
    }
    if (!p.out_packed) {
      e.out = a.out + pixel * a.out_stride + cb.first;
      e.out_stride = a.out_stride;
    }
    if (p.out_packed)
      pack(a, c, f, part, block, e, slot + b);
    else
      kernels_->epilogue(e);
  }
}

// Appends to the staged row of the block; stores it where the row is complete.
void ConvBase::pack(const ConvArgs& a, const Cut& c, const Finish& f, const RowPart& part, int64_t block,
                    const kernels::EpilogueRow& row, int64_t slot) const {
  PackedMap& map = *a.out_map;
  const ValueType type = map.layout().type;
  const int64_t to = a.out_first_block + block;
  const ChannelBlock& cb = map.layout().blocks[static_cast<size_t>(to)];
  float* staged = f.staged + slot * f.staged_stride;
  const int64_t before = part.x0 == 0 ? 0 : f.counts[slot];
  const int64_t total = before + kernels_->compress(row, static_cast<int>(type), cb.scale, cb.top,
                                                    map.masks(part.n, part.y, to) + part.x0, staged + before);
  f.counts[slot] = total;
  if (part.x0 + part.count != c.ow) return;
  void* dst = map.allocate(part.n, part.y, to, static_cast<size_t>(total) * value_size(type));
  kernels_->store_values(staged, total, static_cast<int>(type), dst);
  map.segment(part.n, part.y, to) = dst;
}

void ConvBase::unpack_pixels(const PackedMap& map, int64_t n, int64_t y, int64_t block, int64_t x0,
                             int64_t count, float* dst) const {
  const PackedLayout& l = map.layout();
  const uint64_t* masks = map.masks(n, y, block);
  const int64_t before = kernels_->count_values(masks, x0);
  const auto* src = static_cast<const unsigned char*>(map.segment(n, y, block)) +
                    static_cast<size_t>(before) * value_size(l.type);
  const int64_t width = l.blocks[static_cast<size_t>(block)].width;
  if (l.type == ValueType::f32) {
    kernels_->expand(masks + x0, reinterpret_cast<const float*>(src), count, width, dst, 64);
    return;
  }
  alignas(64) float values[64 + 16];
  const float scale = l.blocks[static_cast<size_t>(block)].scale;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t some = __builtin_popcountll(masks[x0 + i]);
    kernels_->load_values(src, some, static_cast<int>(l.type), scale, values);
    src += static_cast<size_t>(some) * value_size(l.type);
    kernels_->expand(masks + x0 + i, values, 1, width, dst + i * 64, 64);
  }
}

}  // namespace actzip
