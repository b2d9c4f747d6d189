#include "kernels/conv.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/thread_pool.h"
#include "kernels/ops.h"

namespace actzip {

using kernels::DenseTile;
using kernels::DepthwiseRow;
using kernels::EpilogueRow;
using kernels::Ops;
using kernels::ops_for;
using kernels::SparseRun;

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Packed weights of many layers lie together in regions that may use large pages: a layer reads its rows at
// random, and all layers together far exceed what the TLB covers with small ones.
struct Region {
  unsigned char* base = nullptr;
  size_t size = 0, used = 0, mapped = 0;
  void* memory = nullptr;
#if defined(__linux__)
  ~Region() {
    if (memory != nullptr) munmap(memory, mapped);
  }
#endif
};

struct Free {
  std::shared_ptr<Region> region;  // null: from the heap
  void operator()(float* p) const {
    if (region == nullptr) std::free(p);
  }
};
using Floats = std::unique_ptr<float[], Free>;
Floats make_floats(int64_t count) {
  const auto bytes = static_cast<size_t>(round_up(count * 4 + 64, 64));
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (p == nullptr) throw std::bad_alloc();
  std::memset(p, 0, bytes);
  return Floats(p);
}

// Zeros, like make_floats.
Floats make_weights(int64_t count) {
#if defined(__linux__)
  constexpr size_t kPage = size_t{2} << 20, kRegion = size_t{32} << 20;
  const auto bytes = static_cast<size_t>(round_up(count * 4 + 64, 64));
  if (bytes < (size_t{16} << 10)) return make_floats(count);
  static std::mutex mutex;
  static std::weak_ptr<Region> current;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Region> r = current.lock();
  if (r == nullptr || r->used + bytes > r->size) {
    r = std::make_shared<Region>();
    r->size = std::max(kRegion, (bytes + kPage - 1) / kPage * kPage);
    const size_t mapped = r->size + kPage;
    void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    r->memory = memory;
    r->mapped = mapped;
    r->base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory) + kPage - 1) &
                                               ~static_cast<uintptr_t>(kPage - 1));
    madvise(r->base, r->size, MADV_HUGEPAGE);
    current = r;
  }
  auto* p = reinterpret_cast<float*>(r->base + r->used);
  r->used += bytes;
  return Floats(p, Free{r});
#else
  return make_floats(count);
#endif
}

// Cuts scratch memory into aligned pieces; with a null base it only adds sizes up.
struct Carver {
  unsigned char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return p;
  }
};

enum class Algorithm { sparse, sparse_row, sparse_pair, sparse_taps, sparse_taps_pair, dense, depthwise };

struct Variant {
  KernelRow row;
  Algorithm algorithm;
  int nv;        // vectors of the widest oc tile
  int64_t tile;  // output pixels whose accumulators are kept together
};

const char* const kDesign = "docs/design.md, Kernels";
const char* const kIndirect = "Dukhan, The Indirect Convolution Algorithm, arXiv:1907.02129";
const char* const kGoto = "Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008";

const std::vector<Variant>& variants(Isa isa) {
  static const std::vector<Variant> narrow = {
      {{"sparse-32", "sparse", 32, 1, kDesign}, Algorithm::sparse, 8, 64},
      {{"pair-16", "sparse", 16, 2, kDesign}, Algorithm::sparse_pair, 4, 64},
      {{"taps-48", "sparse", 48, 1, kDesign}, Algorithm::sparse_taps, 12, 64},
      {{"dense-6x8", "dense", 8, 6, kIndirect}, Algorithm::dense, 2, 96},
      {{"depthwise", "depthwise", 4, 1, kDesign}, Algorithm::depthwise, 1, 1},
  };
  static const std::vector<Variant> neon = {
      {{"sparse-48", "sparse", 48, 1, kDesign}, Algorithm::sparse, 12, 64},
      {{"sparse-32", "sparse", 32, 1, kDesign}, Algorithm::sparse, 8, 64},
      {{"pair-32", "sparse", 32, 2, kDesign}, Algorithm::sparse_pair, 8, 64},
      {{"taps-48", "sparse", 48, 1, kDesign}, Algorithm::sparse_taps, 12, 64},
      {{"dense-6x16", "dense", 16, 6, kIndirect}, Algorithm::dense, 4, 96},
      {{"depthwise", "depthwise", 4, 1, kDesign}, Algorithm::depthwise, 1, 1},
  };
  static const std::vector<Variant> avx2 = {
      {{"sparse-64", "sparse", 64, 1, kDesign}, Algorithm::sparse, 8, 64},
      {{"sparse-96", "sparse", 96, 1, kDesign}, Algorithm::sparse, 12, 64},
      {{"sparse-32", "sparse", 32, 1, kDesign}, Algorithm::sparse, 4, 96},
      {{"pair-32", "sparse", 32, 2, kDesign}, Algorithm::sparse_pair, 4, 96},
      {{"pair-48", "sparse", 48, 2, kDesign}, Algorithm::sparse_pair, 6, 64},
      {{"row-64", "sparse", 64, 1, kDesign}, Algorithm::sparse_row, 8, 64},
      {{"row-96", "sparse", 96, 1, kDesign}, Algorithm::sparse_row, 12, 64},
      {{"taps-96", "sparse", 96, 1, kDesign}, Algorithm::sparse_taps, 12, 64},
      {{"dense-6x16", "dense", 16, 6, kIndirect}, Algorithm::dense, 2, 96},
      {{"dense-4x24", "dense", 24, 4, kGoto}, Algorithm::dense, 3, 96},
      {{"depthwise", "depthwise", 8, 1, kDesign}, Algorithm::depthwise, 1, 1},
  };
  static const std::vector<Variant> avx512 = {
      {{"sparse-64", "sparse", 64, 1, kDesign}, Algorithm::sparse, 4, 64},
      {{"sparse-128", "sparse", 128, 1, kDesign}, Algorithm::sparse, 8, 64},
      {{"pair-64", "sparse", 64, 2, kDesign}, Algorithm::sparse_pair, 4, 64},
      {{"pair-128", "sparse", 128, 2, kDesign}, Algorithm::sparse_pair, 8, 64},
      {{"row-128", "sparse", 128, 1, kDesign}, Algorithm::sparse_row, 8, 64},
      {{"taps-192", "sparse", 192, 1, kDesign}, Algorithm::sparse_taps, 12, 64},
      {{"taps-pair-192", "sparse", 192, 2, kDesign}, Algorithm::sparse_taps_pair, 12, 64},
      {{"dense-6x64", "dense", 64, 6, kIndirect}, Algorithm::dense, 4, 96},
      {{"dense-8x48", "dense", 48, 8, kIndirect}, Algorithm::dense, 3, 96},
      {{"dense-12x32", "dense", 32, 12, kIndirect}, Algorithm::dense, 2, 96},
      {{"depthwise", "depthwise", 16, 1, kDesign}, Algorithm::depthwise, 1, 1},
  };
  switch (isa) {
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
    case Isa::avx512_icl:
      return avx512;
    case Isa::neon:
      return neon;
    default:
      return narrow;
  }
}

bool is_depthwise(const ConvProblem& p) { return p.groups > 1 && p.groups == p.ic && p.groups == p.oc; }

std::vector<ChannelBlock> input_blocks(const ConvProblem& p) {
  return p.in_blocks.empty() ? split_channels(p.ic) : p.in_blocks;
}

void validate(const ConvProblem& p) {
  const auto bad = [](const std::string& what) { throw std::invalid_argument("convolution: " + what); };
  if (p.ic < 1 || p.oc < 1 || p.kh < 1 || p.kw < 1) bad("channels and kernel size must be positive");
  if (p.sh < 1 || p.sw < 1 || p.dh < 1 || p.dw < 1) bad("stride and dilation must be positive");
  if (p.pad_top < 0 || p.pad_left < 0 || p.pad_bottom < 0 || p.pad_right < 0)
    bad("padding must not be negative");
  if (p.groups < 1 || p.ic % p.groups != 0 || p.oc % p.groups != 0)
    bad("groups must divide both channel counts");
  if (!p.thresholds.empty() && static_cast<int64_t>(p.thresholds.size()) != p.oc)
    bad("one threshold per output channel is needed, or none");
  if (p.in_packed) {
    int64_t total = 0;
    for (const ChannelBlock& b : input_blocks(p)) {
      if (b.width < 1 || b.width > 64) bad("input blocks hold 1 to 64 channels");
      total += b.width;
    }
    if (total != p.ic) bad("input blocks do not cover the input channels");
  }
}

bool applicable(const Variant& v, const ConvProblem& p) {
  switch (v.algorithm) {
    case Algorithm::sparse:
    case Algorithm::sparse_pair:
      return p.in_packed;
    case Algorithm::sparse_row:
      return p.in_packed && p.kw > 1;
    case Algorithm::sparse_taps_pair:
      return p.in_packed && p.kw == 3 && p.sw == 1 && p.dw == 1;
    case Algorithm::sparse_taps:
      return p.in_packed && p.kw > 1 && p.kw <= 4 && p.sw == 1 && p.dw == 1;
    case Algorithm::dense:
      return true;
    case Algorithm::depthwise:
      return is_depthwise(p);
  }
  return false;
}

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

class ConvBase : public Conv {
 public:
  void init(const ConvProblem& p, const Variant& v, const float* bias) {
    problem_ = p;
    variant_ = v;
    row_ = &kernel_table(isa_)[static_cast<size_t>(&v - variants(isa_).data())];
    ops_ = &ops_for(isa_);
    in_blocks_ = input_blocks(p);
    out_blocks_ = split_channels(p.oc);
    const int64_t vl = ops_->vl;
    const int64_t padded = round_up(p.oc, 64) + 64;
    bias_ = make_floats(padded);
    if (bias != nullptr) std::memcpy(bias_.get(), bias, static_cast<size_t>(p.oc) * 4);
    if (!p.thresholds.empty()) {
      thresholds_ = make_floats(padded);
      std::memcpy(thresholds_.get(), p.thresholds.data(), static_cast<size_t>(p.oc) * 4);
    }
    // Units: as many blocks as the tile is wide. Subs: a unit's channels of one group, in even shares.
    const int64_t ocg = p.oc / p.groups;
    const bool depthwise = v.algorithm == Algorithm::depthwise;
    const bool fused = v.algorithm == Algorithm::sparse_taps || v.algorithm == Algorithm::sparse_taps_pair;
    const int widest_nv = fused ? v.nv / static_cast<int>(p.kw) : v.nv;
    const int64_t widest = widest_nv * vl;
    int64_t bias_floats = 0;
    for (size_t b = 0; b < out_blocks_.size();) {
      Unit u{};
      u.first = out_blocks_[b].first;
      u.first_block = static_cast<int64_t>(b);
      do {
        u.width += out_blocks_[b].width;
        ++u.blocks;
        ++b;
      } while (b < out_blocks_.size() && round_up(u.width + out_blocks_[b].width, vl) <= unit_width(widest));
      int64_t at = 0;
      if (depthwise) {
        at = round_up(u.width, vl);
      } else {
        for (int64_t c = u.first; c < u.first + u.width;) {
          const int64_t g = c / ocg;
          const int64_t end = std::min((g + 1) * ocg, u.first + u.width);
          int64_t vectors = ceil_div(end - c, vl);
          for (int64_t pieces = ceil_div(vectors, widest_nv); pieces > 0; --pieces) {
            const int64_t nv = ceil_div(vectors, pieces);
            const int64_t width = std::min(end - c, nv * vl);
            u.subs.push_back({c, width, static_cast<int>(nv), at, g, 0});
            if (at != c - u.first) u.compact = true;
            at += nv * vl;
            c += width;
            vectors -= nv;
          }
        }
      }
      u.stride = at;
      bias_floats += at;
      units_.push_back(std::move(u));
    }
    // The bias again, laid out as the accumulators are.
    tile_bias_ = make_floats(bias_floats);
    int64_t at = 0;
    for (const Unit& u : units_) {
      tile_bias_at_.push_back(at);
      for (const Sub& s : u.subs)
        std::memcpy(tile_bias_.get() + at + s.offset, bias_.get() + s.first,
                    static_cast<size_t>(s.width) * 4);
      if (u.subs.empty())
        std::memcpy(tile_bias_.get() + at, bias_.get() + u.first, static_cast<size_t>(u.width) * 4);
      at += u.stride;
    }
    taps_ = p.kh * p.kw;
  }

  virtual int64_t unit_width(int64_t widest) const { return widest; }

  // Of an item of units [unit, last) where those of one unit follow each other.
  ConvPart part_of(const Cut& c, int64_t item, size_t unit, size_t last) const {
    const int64_t i = item % (c.images * c.bands), row = c.first_row + i % c.bands * c.rows;
    const Unit &u = units_[unit], &end = units_[last - 1];
    return {c.first_image + i / c.bands, row, std::min(c.rows, c.end_row - row), u.first,
            end.first + end.width - u.first};
  }

  Cut cut(const ConvArgs& a, int threads, int64_t groups_of_units) const {
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

  // Whether row `r` of a band's input rows meets a kernel row of one of `rows` output rows.
  bool touched(int64_t r, int64_t rows) const {
    const ConvProblem& p = problem_;
    for (int64_t ky = 0; ky < p.kh; ++ky) {
      const int64_t d = r - ky * p.dh;
      if (d >= 0 && d % p.sh == 0 && d / p.sh < rows) return true;
    }
    return false;
  }

  // Staging for the packed output rows of one unit and for residuals.
  struct Finish {
    float* staged;  // [blocks][staged_stride]
    int64_t staged_stride;
    int64_t* counts;  // per block, of the row so far
    float* residual;  // [segment][64]
  };
  Finish take_finish(Carver& carver, const Cut& c, int64_t units_at_once) const {
    Finish f{};
    int64_t blocks = 1;
    for (const Unit& u : units_) blocks = std::max(blocks, u.blocks);
    if (c.segments > 1) blocks *= units_at_once;  // all their rows are unfinished at once
    f.staged_stride = c.ow * 64 + 16;
    f.staged = carver.take<float>(problem_.out_packed ? blocks * f.staged_stride : 0);
    f.counts = carver.take<int64_t>(blocks);
    f.residual = carver.take<float>(c.segment * 64 + 16);
    return f;
  }

  // `slot`: of the unit's first block in the staging. Output pixels x0 .. x0 + count of row (n, y): residual,
  // activation, and to where the output goes. Segments of a row come from left to right.
  void finish(const ConvArgs& a, const Cut& c, const Unit& u, const Finish& f, int64_t n, int64_t y,
              int64_t x0, int64_t count, float* acc, int64_t stride, int64_t slot = 0) const {
    const ConvProblem& p = problem_;
    if (u.compact)
      for (int64_t i = 0; i < count; ++i)
        for (const Sub& s : u.subs)
          std::memmove(acc + i * stride + (s.first - u.first), acc + i * stride + s.offset,
                       static_cast<size_t>(s.width) * 4);
    const int64_t pixel = (n * c.oh + y) * c.ow + x0;
    for (int64_t b = 0; b < u.blocks; ++b) {
      const int64_t block = u.first_block + b;
      const ChannelBlock cb = out_blocks_[static_cast<size_t>(block)];
      const int64_t at = cb.first - u.first;
      EpilogueRow e{};
      e.acc = acc + at;
      e.acc_stride = stride;
      e.count = count;
      e.width = cb.width;
      e.act = static_cast<int>(p.act);
      e.lo = p.lo;
      e.hi = p.hi;
      e.thresholds = thresholds_ ? thresholds_.get() + cb.first : nullptr;
      if (a.residual != nullptr) {
        e.residual = a.residual + pixel * a.residual_stride + cb.first;
        e.residual_stride = a.residual_stride;
      } else if (a.residual_map != nullptr) {
        unpack_pixels(*a.residual_map, n, y, a.residual_first_block + block, x0, count, f.residual);
        e.residual = f.residual;
        e.residual_stride = 64;
      }
      if (!p.out_packed) {
        e.out = a.out + pixel * a.out_stride + cb.first;
        e.out_stride = a.out_stride;
      }
      if (p.out_packed || e.residual != nullptr || e.act != 0 || e.out != nullptr) ops_->epilogue(e);
      if (p.out_packed) {
        PackedMap& map = *a.out_map;
        const int type = static_cast<int>(map.layout().type);
        const int64_t to = a.out_first_block + block;
        const ChannelBlock& to_block = map.layout().blocks[static_cast<size_t>(to)];
        float* staged = f.staged + (slot + b) * f.staged_stride;
        const int64_t before = x0 == 0 ? 0 : f.counts[slot + b];
        const int64_t total =
            before + ops_->compress(e.acc, stride, count, cb.width, type, to_block.scale, to_block.top,
                                    map.masks(n, y, to) + x0, staged + before);
        f.counts[slot + b] = total;
        if (x0 + count == c.ow) {
          void* dst = map.allocate(static_cast<size_t>(total) * value_size(map.layout().type));
          ops_->store_values(staged, total, type, dst);
          map.segment(n, y, to) = dst;
        }
      }
    }
  }

  // Part of a row, every channel of a block, 64 floats a pixel.
  void unpack_pixels(const PackedMap& map, int64_t n, int64_t y, int64_t block, int64_t x0, int64_t count,
                     float* dst) const {
    const PackedLayout& l = map.layout();
    const uint64_t* masks = map.masks(n, y, block);
    int64_t before = 0;
    for (int64_t x = 0; x < x0; ++x) before += __builtin_popcountll(masks[x]);
    const auto* src = static_cast<const unsigned char*>(map.segment(n, y, block)) +
                      static_cast<size_t>(before) * value_size(l.type);
    const int64_t width = l.blocks[static_cast<size_t>(block)].width;
    if (l.type == ValueType::f32) {
      ops_->expand(masks + x0, reinterpret_cast<const float*>(src), count, width, dst, 64);
      return;
    }
    alignas(64) float values[64 + 16];
    const float scale = l.blocks[static_cast<size_t>(block)].scale;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t some = __builtin_popcountll(masks[x0 + i]);
      ops_->load_values(src, some, static_cast<int>(l.type), scale, values);
      src += static_cast<size_t>(some) * value_size(l.type);
      ops_->expand(masks + x0 + i, values, 1, width, dst + i * 64, 64);
    }
  }

 protected:
  Variant variant_{};
  const Ops* ops_ = nullptr;
  std::vector<ChannelBlock> in_blocks_, out_blocks_;
  std::vector<Unit> units_;
  Floats bias_, thresholds_, tile_bias_, weights_;
  std::vector<int64_t> tile_bias_at_;
  int64_t taps_ = 1;

  friend class actzip::Conv;
};

// ------------------------------------------------------------------------------------------------ sparse

class SparseConv final : public ConvBase {
 public:
  SparseConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias) {
    isa_ = isa;
    init(p, v, bias);
    pair_ = v.algorithm == Algorithm::sparse_pair;
    row_taps_ = v.algorithm == Algorithm::sparse_row;
    expand_ = pair_ && ops_->expanded_pairs;
    fused_ = v.algorithm == Algorithm::sparse_taps || v.algorithm == Algorithm::sparse_taps_pair;
    fused_pair_ = v.algorithm == Algorithm::sparse_taps_pair;
    const int64_t vl = ops_->vl, icg = p.ic / p.groups;
    // [unit][sub][ic block][tap][channel of the block][nv * vl]; channels outside the sub's group have no
    // rows' use but keep their place.
    int64_t total = 0;
    for (Unit& u : units_)
      for (Sub& s : u.subs) {
        s.weight = total;
        total += p.ic * taps_ * s.nv * vl;
      }
    weights_ = make_weights(total);
    weight_bytes_ = static_cast<size_t>(total) * 4;
    fetch_ = weight_bytes_ > kSecondLevel;
    for (const Unit& u : units_)
      for (const Sub& s : u.subs) {
        float* w = weights_.get() + s.weight;
        int64_t first = 0;
        for (const ChannelBlock& b : in_blocks_) {
          // Fused taps: a channel's row holds those of a kernel row, last first.
          const int64_t across = fused_ ? p.kw : 1;
          for (int64_t t = 0; t < taps_; t += across)
            for (int64_t k = 0; k < b.width; ++k)
              for (int64_t j = across - 1; j >= 0; --j, w += s.nv * vl) {
                const int64_t c = first + k - s.group * icg;
                if (c < 0 || c >= icg) continue;
                for (int64_t o = 0; o < s.width; ++o)
                  w[o] = weight[((s.first + o) * icg + c) * taps_ + t + j];
              }
          first += b.width;
        }
      }
  }

  struct Scratch {
    float* acc;   // [rows][segment][unit's stride]; fused: [sub][rows][halo, segment, halo][nv * vl]
    float* line;  // fused: a row of the unit's subs side by side
    const float** pointers;  // [in_rows][iw]
    float* values;           // [in_rows][iw * 64 + 16]
    Finish finish;
  };
  Scratch carve(Carver& carver, const Cut& c, const ConvArgs& a) const {
    Scratch s{};
    int64_t stride = 0;
    for (const Unit& u : units_) stride = std::max(stride, u.stride);
    s.acc =
        carver.take<float>((c.rows * (c.segment + 2 * halo()) + 1) * stride);  // one more is read by pairs
    s.line = carver.take<float>(fused_ ? c.segment * stride : 0);
    s.pointers = carver.take<const float*>(c.in_rows * a.iw);
    const bool values = expand_ || (a.in_map != nullptr && a.in_map->layout().type != ValueType::f32);
    s.values = carver.take<float>(values ? c.in_rows * (a.iw * 64 + 16) : 0);
    s.finish = take_finish(carver, c, 1);
    return s;
  }

  int64_t items(const ConvArgs& a, int threads) const override {
    const Cut c = cut(a, threads, static_cast<int64_t>(units_.size()));
    return c.images * c.bands * static_cast<int64_t>(units_.size());
  }
  ConvPart part(const ConvArgs& a, int threads, int64_t item) const override {
    const Cut c = cut(a, threads, static_cast<int64_t>(units_.size()));
    const auto unit = static_cast<size_t>(item / (c.images * c.bands));
    return part_of(c, item, unit, unit + 1);
  }
  size_t scratch_bytes(const ConvArgs& a, int threads) const override {
    Carver carver{nullptr};
    carve(carver, cut(a, threads, static_cast<int64_t>(units_.size())), a);
    return carver.used;
  }

  void run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const override {
    const ConvProblem& p = problem_;
    const Cut c = cut(a, threads, static_cast<int64_t>(units_.size()));
    Carver carver{static_cast<unsigned char*>(scratch)};
    const Scratch s = carve(carver, c, a);
    // Items of one unit follow each other: its weights stay in the cache.
    const int64_t per_unit = c.images * c.bands;
    const auto unit = static_cast<size_t>(item / per_unit);
    const Unit& u = units_[unit];
    const int64_t n = c.first_image + item % per_unit / c.bands;
    const int64_t y0 = c.first_row + item % per_unit % c.bands * c.rows;
    const int64_t rows = std::min(c.rows, c.end_row - y0);
    const int64_t iy0 = y0 * p.sh - p.pad_top;
    const int64_t in_rows = (rows - 1) * p.sh + (p.kh - 1) * p.dh + 1;
    const int64_t vl = ops_->vl, icg = p.ic / p.groups;
    // Every thread's first band of a unit brings its weights; where they do not stay, every band does.
    const bool fetch = fetch_ && (item % per_unit < threads || u.stride * p.ic * taps_ * 4 > kStays);
    for (int64_t x0 = 0; x0 < c.ow; x0 += c.segment) {
      const int64_t count = std::min(c.segment, c.ow - x0);
      const int64_t slots = count + 2 * halo();  // accumulators of a row
      if (fused_)
        for (const Sub& sub : u.subs)
          ops_->fill(s.acc + rows * slots * sub.offset, sub.nv * vl, rows * slots,
                     tile_bias_.get() + tile_bias_at_[unit] + sub.offset, sub.nv * vl);
      else
        ops_->fill(s.acc, u.stride, rows * count, tile_bias_.get() + tile_bias_at_[unit], u.stride);
      int64_t first = 0;
      for (size_t ib = 0; ib < in_blocks_.size(); first += in_blocks_[ib].width, ++ib) {
        const int64_t width = in_blocks_[ib].width;
        // Only groups that meet this unit's channels.
        bool used = false;
        for (const Sub& sub : u.subs)
          used |= first < (sub.group + 1) * icg && first + width > sub.group * icg;
        if (!used) continue;
        for (int64_t r = 0; r < in_rows; ++r) {
          const int64_t iy = iy0 + r;
          if (iy < 0 || iy >= a.ih || !touched(r, rows)) continue;
          point(a, n, iy, a.in_first_block + static_cast<int64_t>(ib), width, s.pointers + r * a.iw,
                s.values + r * (a.iw * 64 + 16));
        }
        for (const Sub& sub : u.subs) {
          const int64_t lo = std::max<int64_t>(0, sub.group * icg - first);
          const int64_t hi = std::min(width, (sub.group + 1) * icg - first);
          if (lo >= hi) continue;
          const uint64_t clip = (hi - lo == 64 ? ~uint64_t{0} : ((uint64_t{1} << (hi - lo)) - 1)) << lo;
          SparseRun run{};
          run.acc_stride = u.stride;
          run.step = p.sw;
          run.clip = clip;
          if (fused_) {
            run_fused(a, s, sub, run, n, static_cast<int64_t>(ib), first, x0, count, rows, iy0);
            continue;
          }
          if (row_taps_ && width * p.kw * sub.nv * vl * 4 <= kRowWeights) {
            run_row(a, s, u, sub, run, n, static_cast<int64_t>(ib), first, x0, count, rows, iy0, fetch);
            continue;
          }
          const auto kernel = pair_ ? ops_->sparse_pair[sub.nv] : ops_->sparse[sub.nv];
          const int64_t block = width * sub.nv * vl;  // floats of a tap's weights
          const int64_t visits = std::max<int64_t>(1, rows * count / (pair_ ? 2 : 1));
          const int64_t lines = fetch ? ceil_div(block, 16 * visits) : 0;
          for (int64_t t = 0; t < taps_; ++t) {
            const int64_t ky = t / p.kw, kx = t % p.kw;
            const int64_t dx = kx * p.dw - p.pad_left;
            // Output pixels whose input pixel exists.
            const int64_t from = std::max(x0, dx < 0 ? ceil_div(-dx, p.sw) : 0);
            const int64_t last = a.iw - 1 - dx;
            const int64_t to = std::min(x0 + count, last < 0 ? 0 : last / p.sw + 1);
            if (from >= to) continue;
            run.weight = weights_.get() + sub.weight + (first * taps_ + t * width) * sub.nv * vl;
            run.count = to - from;
            // The next tap's weights, or the next block's, follow in memory.
            run.next_weight = run.weight + block;
            run.next_lines = lines;
            for (int64_t y = 0; y < rows; ++y) {
              const int64_t r = y * p.sh + ky * p.dh, iy = iy0 + r;
              if (iy < 0 || iy >= a.ih) continue;
              const int64_t x = from * p.sw + dx;
              run.acc = s.acc + (y * count + from - x0) * u.stride + sub.offset;
              run.masks = a.in_map->masks(n, iy, a.in_first_block + static_cast<int64_t>(ib)) + x;
              run.values = s.pointers + r * a.iw + x;
              kernel(run);
              run.next_weight += lines * 16 * (pair_ ? run.count / 2 : run.count);
            }
          }
        }
      }
      for (int64_t y = 0; y < rows; ++y) {
        float* row = s.acc + y * count * u.stride;
        if (fused_) {
          row = s.line;
          for (const Sub& sub : u.subs) {
            float* from = s.acc + rows * slots * sub.offset + (y * slots + halo()) * sub.nv * vl;
            if (u.subs.size() == 1)
              row = from;
            else
              for (int64_t x = 0; x < count; ++x)
                std::memcpy(row + x * u.stride + sub.offset, from + x * sub.nv * vl,
                            static_cast<size_t>(sub.nv * vl) * 4);
          }
        }
        finish(a, c, u, s.finish, n, y0 + y, x0, count, row, u.stride);
      }
    }
  }

 private:
  // Where each pixel's values begin, decoded to float32 and expanded as the kernel wants them.
  void point(const ConvArgs& a, int64_t n, int64_t iy, int64_t block, int64_t width, const float** pointers,
             float* values) const {
    const PackedMap& map = *a.in_map;
    const PackedLayout& l = map.layout();
    const uint64_t* masks = map.masks(n, iy, block);
    if (expand_) {
      if (l.type == ValueType::f32)
        ops_->expand(masks, static_cast<const float*>(map.segment(n, iy, block)), a.iw, width, values, 64);
      else
        unpack_pixels(map, n, iy, block, 0, a.iw, values);
      for (int64_t x = 0; x < a.iw; ++x) pointers[x] = values + x * 64;
      return;
    }
    const float* v = static_cast<const float*>(map.segment(n, iy, block));
    if (l.type != ValueType::f32) {
      int64_t count = 0;
      for (int64_t x = 0; x < a.iw; ++x) count += __builtin_popcountll(masks[x]);
      ops_->load_values(map.segment(n, iy, block), count, static_cast<int>(l.type),
                        l.blocks[static_cast<size_t>(block)].scale, values);
      v = values;
    }
    for (int64_t x = 0; x < a.iw; ++x) {
      pointers[x] = v;
      v += __builtin_popcountll(masks[x]);
    }
  }

  // All taps of a kernel row in one visit of an input pixel: its outputs lie side by side, and the
  // accumulators have room for those beyond the segment, which are not used.
  int64_t halo() const { return fused_ ? problem_.kw - 1 : 0; }
  void run_fused(const ConvArgs& a, const Scratch& s, const Sub& sub, SparseRun run, int64_t n, int64_t ib,
                 int64_t first, int64_t x0, int64_t count, int64_t rows, int64_t iy0) const {
    const ConvProblem& p = problem_;
    const int64_t floats = sub.nv * ops_->vl, slots = count + 2 * halo();
    const int64_t width = in_blocks_[static_cast<size_t>(ib)].width;
    const auto kernel = fused_pair_ ? ops_->sparse_taps_pair[sub.nv] : ops_->sparse[sub.nv * p.kw];
    const int64_t from = std::max<int64_t>(0, x0 - p.pad_left);
    const int64_t to = std::min(a.iw, x0 + count - p.pad_left + p.kw - 1);
    if (from >= to) return;
    run.acc_stride = floats;
    run.step = 1;
    run.count = to - from;
    // As many channels at a time as have weights for the first-level cache.
    const int64_t channels = floats * p.kw * 64 * 4 > kFirstLevel ? 32 : 64;
    const uint64_t clip = run.clip;
    for (int64_t ky = 0; ky < p.kh; ++ky) {
      run.weight = weights_.get() + sub.weight + (first * taps_ + ky * p.kw * width) * floats;
      for (int64_t k = 0; k < width; k += channels) {
        run.clip = channels == 64 ? clip : clip & (uint64_t{0xffffffff} << k);
        for (int64_t y = 0; y < rows; ++y) {
          const int64_t r = y * p.sh + ky * p.dh, iy = iy0 + r;
          if (iy < 0 || iy >= a.ih) continue;
          // The leftmost output of input pixel `from`, in slots of the row.
          const int64_t slot = from + p.pad_left - (p.kw - 1) - x0 + halo();
          run.acc = s.acc + rows * slots * sub.offset + (y * slots + slot) * floats;
          run.masks = a.in_map->masks(n, iy, a.in_first_block + ib) + from;
          run.values = s.pointers + r * a.iw + from;
          kernel(run);
        }
      }
    }
  }

  // The taps of a kernel row in one visit of an output pixel.
  void run_row(const ConvArgs& a, const Scratch& s, const Unit& u, const Sub& sub, SparseRun run, int64_t n,
               int64_t ib, int64_t first, int64_t x0, int64_t count, int64_t rows, int64_t iy0,
               bool fetch) const {
    const ConvProblem& p = problem_;
    const int64_t floats = sub.nv * ops_->vl;
    const int64_t width = in_blocks_[static_cast<size_t>(ib)].width;
    const auto kernel = ops_->sparse_row[sub.nv];
    run.tap_step = p.dw;
    run.tap_weight = width * floats;
    run.next_lines = fetch ? ceil_div(p.kw * width * floats, 16 * rows * count) : 0;
    // Output pixels of which every tap meets the input: [lo, hi).
    const int64_t end = x0 + count, last = a.iw - 1 + p.pad_left - (p.kw - 1) * p.dw;
    const int64_t lo = std::clamp(ceil_div(p.pad_left, p.sw), x0, end);
    const int64_t hi = std::clamp(last < 0 ? 0 : last / p.sw + 1, lo, end);
    for (int64_t ky = 0; ky < p.kh; ++ky) {
      const float* weight = weights_.get() + sub.weight + (first * taps_ + ky * p.kw * width) * floats;
      run.next_weight = weight + p.kw * width * floats;
      for (int64_t y = 0; y < rows; ++y) {
        const int64_t r = y * p.sh + ky * p.dh, iy = iy0 + r;
        if (iy < 0 || iy >= a.ih) continue;
        const uint64_t* masks = a.in_map->masks(n, iy, a.in_first_block + ib);
        const auto part = [&](int64_t from, int64_t to, int64_t t0, int64_t t1) {
          const int64_t x = from * p.sw - p.pad_left + t0 * p.dw;
          run.weight = weight + t0 * width * floats;
          run.taps = t1 - t0;
          run.count = to - from;
          run.acc = s.acc + (y * count + from - x0) * u.stride + sub.offset;
          run.masks = masks + x;
          run.values = s.pointers + r * a.iw + x;
          kernel(run);
          run.next_weight += run.next_lines * 16 * run.count;
        };
        const auto border = [&](int64_t x) {
          const int64_t left = p.pad_left - x * p.sw, right = a.iw - 1 + left;
          const int64_t t0 = left > 0 ? ceil_div(left, p.dw) : 0;
          const int64_t t1 = right < 0 ? 0 : std::min(p.kw, right / p.dw + 1);
          if (t0 < t1) part(x, x + 1, t0, t1);
        };
        for (int64_t x = x0; x < lo; ++x) border(x);
        if (lo < hi) part(lo, hi, 0, p.kw);
        for (int64_t x = hi; x < end; ++x) border(x);
      }
    }
  }

  static constexpr int64_t kFirstLevel = 28 << 10;
  static constexpr int64_t kRowWeights = 26 << 10;
  static constexpr size_t kSecondLevel = 256 << 10;
  static constexpr int64_t kStays = 512 << 10;
  bool fetch_ = false;  // weights come from beyond the second-level cache: ask for them early
  bool row_taps_ = false, pair_ = false, expand_ = false, fused_ = false, fused_pair_ = false;
};

// ------------------------------------------------------------------------------------------------- dense

class DenseConv final : public ConvBase {
 public:
  DenseConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias) {
    isa_ = isa;
    init(p, v, bias);
    const int64_t vl = ops_->vl, icg = p.ic / p.groups;
    // Few input channels (first layers): the taps of a kernel row are one run of kw * ic floats in a padded
    // copy of the input rows.
    merged_ = p.groups == 1 && p.kw > 1 && p.dw == 1 && p.ic < 16;
    steps_ = merged_ ? p.kh : taps_;
    depth_ = merged_ ? p.kw * p.ic : icg;
    // Depth is cut so that a panel's weights stay in the second-level cache.
    const int64_t panel = v.nv * vl;
    slice_ = std::max<int64_t>(32, kPanelBytes / (4 * panel * steps_));
    slice_ = ceil_div(depth_, ceil_div(depth_, slice_));
    int64_t total = 0;
    for (Unit& u : units_)
      for (Sub& s : u.subs) {
        s.weight = total;
        total += steps_ * depth_ * s.nv * vl;
      }
    weights_ = make_weights(total);
    weight_bytes_ = static_cast<size_t>(total) * 4;
    for (const Unit& u : units_)
      for (const Sub& s : u.subs) {
        float* w = weights_.get() + s.weight;  // [slice][step][channel][nv * vl]
        for (int64_t k0 = 0; k0 < depth_; k0 += slice_)
          for (int64_t t = 0; t < steps_; ++t)
            for (int64_t k = k0; k < std::min(depth_, k0 + slice_); ++k, w += s.nv * vl) {
              const int64_t c = merged_ ? k % p.ic : k;
              const int64_t tap = merged_ ? t * p.kw + k / p.ic : t;
              for (int64_t o = 0; o < s.width; ++o) w[o] = weight[((s.first + o) * icg + c) * taps_ + tap];
            }
      }
    // Pixels in the order in which whole tiles fall into the padding together.
    by_columns_ = p.kw > 1 && p.kw >= p.kh && !merged_;
    zeros_ = make_floats(p.ic + 16);
    // Units that share an item: they share the expanded input and the pointer table.
    shared_ = p.in_packed || merged_ ? 4 : 4;
    bunches_ = ceil_div(static_cast<int64_t>(units_.size()), shared_);
  }

  int64_t unit_width(int64_t widest) const override { return std::max<int64_t>(64, widest); }

  struct Scratch {
    float* acc;
    const float** table;  // [tile][tap][mr]: where the tile's pixels find a tap's input
    int32_t* taps;        // [tile][1 + steps]: how many taps meet the input, and which
    float* rows;          // expanded or padded input rows
    int64_t row_stride;
    Finish finish;
  };
  Scratch carve(Carver& carver, const Cut& c, const ConvArgs& a) const {
    Scratch s{};
    int64_t stride = 0;
    for (const Unit& u : units_) stride = std::max(stride, u.stride);
    s.acc = carver.take<float>(c.rows * c.segment * stride);
    s.table = carver.take<const float*>((c.rows * c.segment + kernels::kMaxMr) * steps_);
    s.taps = carver.take<int32_t>(c.rows * c.segment * (1 + steps_));
    const ConvProblem& p = problem_;
    s.row_stride = merged_ ? (a.iw + p.pad_left + p.pad_right) * p.ic + 16 : a.iw * p.ic + 16;
    s.rows = carver.take<float>(p.in_packed || merged_ ? c.in_rows * s.row_stride : 0);
    s.finish = take_finish(carver, c, shared_);
    return s;
  }

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

  void run_item(const ConvArgs& a, int threads, int64_t item, void* scratch) const override {
    const ConvProblem& p = problem_;
    const Cut c = cut(a, threads, bunches_);
    Carver carver{static_cast<unsigned char*>(scratch)};
    const Scratch s = carve(carver, c, a);
    const int64_t per_bunch = c.images * c.bands;
    const int64_t bunch = item / per_bunch;
    const int64_t n = c.first_image + item % per_bunch / c.bands;
    const int64_t y0 = c.first_row + item % per_bunch % c.bands * c.rows;
    const int64_t rows = std::min(c.rows, c.end_row - y0);
    const int64_t iy0 = y0 * p.sh - p.pad_top;
    const int64_t in_rows = (rows - 1) * p.sh + (p.kh - 1) * p.dh + 1;
    const int64_t left = merged_ ? p.pad_left : 0, padded = merged_ ? a.iw + p.pad_left + p.pad_right : a.iw;
    if (p.in_packed || merged_)
      for (int64_t r = 0; r < in_rows; ++r) {
        if (!touched(r, rows)) continue;
        const int64_t iy = iy0 + r;
        float* row = s.rows + r * s.row_stride;
        if (iy < 0 || iy >= a.ih) {
          if (merged_) std::memset(row, 0, static_cast<size_t>(padded * p.ic) * 4);
          continue;
        }
        std::memset(row, 0, static_cast<size_t>(left * p.ic) * 4);
        read_row(a, n, iy, row + left * p.ic);
        std::memset(row + (left + a.iw) * p.ic, 0, static_cast<size_t>((padded - left - a.iw) * p.ic) * 4);
      }
    const int64_t last_unit = std::min(static_cast<int64_t>(units_.size()), (bunch + 1) * shared_);
    for (int64_t x0 = 0; x0 < c.ow; x0 += c.segment) {
      const int64_t count = std::min(c.segment, c.ow - x0);
      const int64_t pixels = rows * count;
      const bool direct = !p.out_packed && p.act != ActKind::threshold && a.residual_map == nullptr &&
                          !by_columns_ && (rows == 1 || c.segments == 1);
      int64_t tabled = 0;  // mr the table is laid out for
      for (int64_t unit = bunch * shared_; unit < last_unit; ++unit) {
        const Unit& u = units_[static_cast<size_t>(unit)];
        for (const Sub& sub : u.subs) {
          const int64_t top = ops_->dense_mr[sub.nv];
          // Tiles of equal size: 35 pixels by 6 are five of 6 and one of 5.
          const int64_t tiles = ceil_div(pixels, top), mr = ceil_div(pixels, tiles);
          if (tabled != mr) {
            tabulate(a, s, n, y0, x0, rows, count, mr);
            tabled = mr;
          }
          const float* weight = weights_.get() + sub.weight;
          for (int64_t k0 = 0; k0 < depth_; k0 += slice_) {
            DenseTile t{};
            t.in_table_stride = mr;
            t.depth = std::min(slice_, depth_ - k0);
            t.in_offset = k0 + (merged_ ? 0 : sub.group * depth_);
            t.weight = weight;
            t.weight_tap_stride = t.depth * sub.nv * ops_->vl;
            t.init =
                k0 == 0 ? tile_bias_.get() + tile_bias_at_[static_cast<size_t>(unit)] + sub.offset : nullptr;
            t.acc_stride = u.stride;
            // Where the output's pixels follow each other and the tile is full, it goes there directly.
            float* acc = s.acc + sub.offset;
            if (direct && u.width == u.stride) {
              const int64_t pixel = (n * c.oh + y0) * c.ow + x0;
              acc = a.out + pixel * a.out_stride + sub.first;
              t.acc_stride = a.out_stride;
              if (k0 + slice_ >= depth_) {
                t.clip = true;
                t.lo = p.act == ActKind::relu ? 0.0f : p.act == ActKind::clip ? p.lo : -kInfinity;
                t.hi = p.act == ActKind::clip ? p.hi : kInfinity;
                if (a.residual != nullptr) t.residual = a.residual + pixel * a.residual_stride + sub.first;
                t.residual_stride = a.residual_stride;
              }
            }
            const float* residual = t.residual;
            for (int64_t i = 0, tile = 0; i < pixels; i += mr, ++tile) {
              const int32_t* taps = s.taps + tile * (1 + steps_);
              t.in = s.table + i * steps_;
              t.taps = taps[0];
              t.tap_ids = taps + 1;
              t.acc = acc + i * t.acc_stride;
              if (residual != nullptr) t.residual = residual + i * t.residual_stride;
              ops_->dense[sub.nv][std::min(mr, pixels - i)](t);
            }
            weight += steps_ * t.weight_tap_stride;
          }
        }
        if (direct && u.width == u.stride) continue;
        for (int64_t y = 0; y < rows; ++y)
          finish(
              a, c, u, s.finish, n, y0 + y, x0, count, s.acc + y * (by_columns_ ? 1 : count) * u.stride,
              (by_columns_ ? rows : 1) * u.stride,
              c.segments > 1 ? u.first_block - units_[static_cast<size_t>(bunch * shared_)].first_block : 0);
      }
    }
  }

 private:
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr int64_t kPanelBytes = 192 << 10;

  void read_row(const ConvArgs& a, int64_t n, int64_t iy, float* dst) const {
    const ConvProblem& p = problem_;
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
        ops_->expand(map.masks(n, iy, block), static_cast<const float*>(map.segment(n, iy, block)), a.iw,
                     in_blocks_[b].width, dst + first, p.ic);
      else
        unpack_row(map, n, iy, block, dst + first, p.ic);
    }
  }

  // Fills s.table and s.taps for tiles of `mr` pixels. A tap that lies in the padding for the whole tile is
  // left out; for single pixels of a tile it points to zeros.
  void tabulate(const ConvArgs& a, const Scratch& s, int64_t n, int64_t y0, int64_t x0, int64_t rows,
                int64_t count, int64_t mr) const {
    const ConvProblem& p = problem_;
    const int64_t iy0 = y0 * p.sh - p.pad_top;
    const int64_t pixels = rows * count;
    const bool scratch = p.in_packed || merged_;
    const int64_t pixel_stride = scratch ? p.ic : a.in_stride;
    const int64_t row_stride = scratch ? s.row_stride : a.iw * a.in_stride;
    const float* base = scratch ? s.rows : a.in + (n * a.ih + iy0) * a.iw * a.in_stride;
    int64_t y = 0, x = x0, first = 0;
    for (int32_t* taps = s.taps; first < pixels; first += mr, taps += 1 + steps_) {
      const int64_t here = std::min(mr, pixels - first);
      const float** to = s.table + first * steps_;
      int64_t rs[kernels::kMaxMr], cs[kernels::kMaxMr];
      for (int64_t m = 0; m < here; ++m) {
        rs[m] = y * p.sh;
        cs[m] = x * p.sw - (merged_ ? 0 : p.pad_left);
        if (by_columns_ ? ++y == rows : ++x == x0 + count) {
          if (by_columns_)
            y = 0, ++x;
          else
            x = x0, ++y;
        }
      }
      int32_t used = 0;
      for (int64_t step = 0, ky = 0, kx = 0; step < steps_; ++step) {
        bool any = false;
        if (merged_) {
          for (int64_t m = 0; m < here; ++m) to[m] = base + (rs[m] + step * p.dh) * row_stride + cs[m] * p.ic;
          any = true;
        } else {
          for (int64_t m = 0; m < here; ++m) {
            const int64_t r = rs[m] + ky * p.dh, ix = cs[m] + kx * p.dw;
            const bool inside = static_cast<uint64_t>(iy0 + r) < static_cast<uint64_t>(a.ih) &&
                                static_cast<uint64_t>(ix) < static_cast<uint64_t>(a.iw);
            to[m] = inside ? base + r * row_stride + ix * pixel_stride : zeros_.get();
            any |= inside;
          }
          if (++kx == p.kw) kx = 0, ++ky;
        }
        if (!any) continue;
        taps[++used] = static_cast<int32_t>(step);
        to += mr;
      }
      taps[0] = used;
    }
  }

  bool merged_ = false, by_columns_ = false;
  int64_t steps_ = 1, depth_ = 1, slice_ = 1, shared_ = 1, bunches_ = 1;
  Floats zeros_;
};

// --------------------------------------------------------------------------------------------- depthwise

class DepthwiseConv final : public ConvBase {
 public:
  DepthwiseConv(const ConvProblem& p, const Variant& v, Isa isa, const float* weight, const float* bias) {
    isa_ = isa;
    init(p, v, bias);
    stride_ = round_up(p.ic, 64);
    weights_ = make_floats(taps_ * stride_ + 64);
    weight_bytes_ = static_cast<size_t>(taps_ * stride_) * 4;
    for (int64_t t = 0; t < taps_; ++t)
      for (int64_t ch = 0; ch < p.ic; ++ch)
        weights_[static_cast<size_t>(t * stride_ + ch)] = weight[ch * taps_ + t];
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
    s.finish = take_finish(carver, c, 1);
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
    const ConvProblem& p = problem_;
    const Cut c = cut_rows(a);
    Carver carver{static_cast<unsigned char*>(scratch)};
    const Scratch s = carve(carver, c, a);
    const int64_t n = c.first_image + item / c.bands, y = c.first_row + item % c.bands;
    // Input blocks may be cut differently from the output's: read by output block, from what overlaps it.
    for (const Unit& u : units_) {
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
      DepthwiseRow d{};
      d.rows = s.pointers;
      d.in_stride = p.in_packed ? 64 : a.in_stride;
      d.iw = a.iw;
      d.kh = p.kh;
      d.kw = p.kw;
      d.sw = p.sw;
      d.dw = p.dw;
      d.pad_left = p.pad_left;
      d.weight = weights_.get() + u.first;
      d.weight_stride = stride_;
      d.bias = bias_.get() + u.first;
      d.channels = u.width;
      d.acc = s.acc;
      d.acc_stride = 64;
      d.first = 0;
      d.count = c.ow;
      ops_->depthwise(d);
      finish(a, c, u, s.finish, n, y, 0, c.ow, s.acc, 64);
    }
  }

 private:
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
        ops_->load_values(src, some, static_cast<int>(l.type), l.blocks[static_cast<size_t>(block)].scale,
                          values);
        src += static_cast<size_t>(some) * value_size(l.type);
        ops_->expand(masks + x, values, 1, w, pixel, 64);
        std::memcpy(dst + x * 64 + (lo - first), pixel + (lo - at), static_cast<size_t>(hi - lo) * 4);
      }
    }
  }

  int64_t stride_ = 0;
};

}  // namespace

// ------------------------------------------------------------------------------------------------ public

const std::vector<KernelRow>& kernel_table(Isa isa) {
  static const std::vector<std::vector<KernelRow>> tables = [] {
    std::vector<std::vector<KernelRow>> all(kIsaCount);
    for (int i = 0; i < kIsaCount; ++i)
      for (const Variant& v : variants(static_cast<Isa>(i))) all[static_cast<size_t>(i)].push_back(v.row);
    return all;
  }();
  return tables[static_cast<size_t>(isa)];
}

std::vector<std::string> conv_variants(const ConvProblem& p) {
  validate(p);
  std::vector<std::string> names;
  // Which first: depthwise, else sparse below the usual break-even density, else dense; within a kind in
  // table order.
  const bool sparse_first = p.hint_density < 0.75;
  for (int pass = 0; pass < 2; ++pass)
    for (const Variant& v : variants(active_isa())) {
      if (!applicable(v, p)) continue;
      const bool sparse = std::strcmp(v.row.kind, "sparse") == 0;
      const bool early = is_depthwise(p) ? v.algorithm == Algorithm::depthwise : sparse == sparse_first;
      if (early == (pass == 0)) names.emplace_back(v.row.name);
    }
  return names;
}

std::unique_ptr<Conv> Conv::make(const ConvProblem& p, const std::string& variant, const float* weight,
                                 const float* bias) {
  validate(p);
  const Isa isa = active_isa();
  const std::string name = variant.empty() ? conv_variants(p).front() : variant;
  for (const Variant& v : variants(isa)) {
    if (name != v.row.name) continue;
    if (!applicable(v, p))
      throw std::invalid_argument("convolution: kernel " + name + " cannot compute this problem");
    switch (v.algorithm) {
      case Algorithm::sparse:
      case Algorithm::sparse_row:
      case Algorithm::sparse_pair:
      case Algorithm::sparse_taps:
      case Algorithm::sparse_taps_pair:
        return std::make_unique<SparseConv>(p, v, isa, weight, bias);
      case Algorithm::dense:
        return std::make_unique<DenseConv>(p, v, isa, weight, bias);
      case Algorithm::depthwise:
        return std::make_unique<DepthwiseConv>(p, v, isa, weight, bias);
    }
  }
  throw std::invalid_argument("convolution: no kernel named " + name + " for " + isa_name(isa));
}

void Conv::check(const ConvArgs& a) const {
  const ConvProblem& p = problem_;
  const auto bad = [](const std::string& what) { throw std::invalid_argument("convolution: " + what); };
  if (a.n < 0 || a.ih < 1 || a.iw < 1) bad("input sizes must be positive");
  const int64_t oh = a.ih + p.pad_top + p.pad_bottom - p.dh * (p.kh - 1);
  const int64_t ow = a.iw + p.pad_left + p.pad_right - p.dw * (p.kw - 1);
  if (oh < 1 || ow < 1) bad("the kernel is larger than the padded input");
  const auto fits = [&](const PackedMap& m, int64_t h, int64_t w, int64_t first,
                        const std::vector<ChannelBlock>& blocks) {
    const PackedLayout& l = m.layout();
    if (l.n != a.n || l.h != h || l.w != w) return false;
    if (first < 0 || first + static_cast<int64_t>(blocks.size()) > m.blocks()) return false;
    for (size_t i = 0; i < blocks.size(); ++i)
      if (l.blocks[static_cast<size_t>(first) + i].width != blocks[i].width) return false;
    return true;
  };
  const int64_t h = p.out_h(a.ih), w = p.out_w(a.iw);
  if (p.in_packed) {
    if (a.in_map == nullptr || !fits(*a.in_map, a.ih, a.iw, a.in_first_block, input_blocks(p)))
      bad("a packed input of the problem's blocks is needed");
  } else if (a.in == nullptr || a.in_stride < p.ic) {
    bad("a dense input is needed, its pixel stride not below the channels");
  }
  if (p.out_packed) {
    if (a.out_map == nullptr || !fits(*a.out_map, h, w, a.out_first_block, split_channels(p.oc)))
      bad("a packed output whose blocks fit the output channels is needed");
  } else if (a.out == nullptr || a.out_stride < p.oc) {
    bad("a dense output is needed, its pixel stride not below the channels");
  }
  const Cut part = whole_or_part(p, a);
  if (part.first_image < 0 || part.images < 0 || part.first_image + part.images > a.n || part.first_row < 0 ||
      part.end_row < part.first_row || part.end_row > h)
    bad("the part to compute lies outside the output");
  if (a.residual != nullptr && a.residual_map != nullptr) bad("one residual at most");
  if (a.residual != nullptr && a.residual_stride < p.oc)
    bad("the residual's pixel stride is below the channels");
  if (a.residual_map != nullptr && !fits(*a.residual_map, h, w, a.residual_first_block, split_channels(p.oc)))
    bad("the packed residual's blocks do not fit the output channels");
}

void Conv::run(const ConvArgs& a, int threads) const {
  check(a);
  if (a.n == 0) return;
  if (threads <= 0) threads = default_threads();
  const size_t bytes = scratch_bytes(a, threads) + 64;
  std::unique_ptr<unsigned char, decltype(&std::free)> memory(
      static_cast<unsigned char*>(
          std::aligned_alloc(64, (bytes + 63) / 64 * 64 * static_cast<size_t>(threads))),
      &std::free);
  if (memory == nullptr) throw std::bad_alloc();
  const size_t each = (bytes + 63) / 64 * 64;
  parallel_for(items(a, threads), threads, [&](int64_t item, int worker) {
    run_item(a, threads, item, memory.get() + each * static_cast<size_t>(worker));
  });
}

double measure_peak_gflops(double seconds) {
  const Ops& o = ops_for(active_isa());
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double best = 0;
  do {
    const auto t0 = Clock::now();
    const double flops = o.peak(200000);
    const double dt = std::chrono::duration<double>(Clock::now() - t0).count();
    if (dt > 0) best = std::max(best, flops / dt * 1e-9);
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace actzip
