#include "kernels/conv.h"

#include <cstdlib>
#include <stdexcept>

#include "common/thread_pool.h"
#include "kernels/conv_base.h"

namespace actzip {
namespace {

[[noreturn]] void bad(const std::string& what) { throw std::invalid_argument("convolution: " + what); }

// Whether blocks [first, ...) of the map are those, and its size that of the run.
bool fits(const ConvArgs& a, const PackedMap& m, int64_t h, int64_t w, int64_t first,
          const std::vector<ChannelBlock>& blocks) {
  const PackedLayout& l = m.layout();
  if (l.n != a.n || l.h != h || l.w != w) return false;
  if (first < 0 || first + static_cast<int64_t>(blocks.size()) > m.blocks()) return false;
  for (size_t i = 0; i < blocks.size(); ++i)
    if (l.blocks[static_cast<size_t>(first) + i].width != blocks[i].width) return false;
  return true;
}

}  // namespace

void ConvProblem::check() const {
  if (ic < 1 || oc < 1 || kh < 1 || kw < 1) bad("channels and kernel size must be positive");
  if (sh < 1 || sw < 1 || dh < 1 || dw < 1) bad("stride and dilation must be positive");
  if (pad_top < 0 || pad_left < 0 || pad_bottom < 0 || pad_right < 0) bad("padding must not be negative");
  if (pool != 1 && (pool != 2 || dh != 1 || dw != 1)) bad("pools of 2 x 2 undilated outputs alone");
  if (groups < 1 || ic % groups != 0 || oc % groups != 0) bad("groups must divide both channel counts");
  if (!thresholds.empty() && static_cast<int64_t>(thresholds.size()) != oc)
    bad("one threshold per output channel is needed, or none");
  if (in_planes && in_packed) bad("planes are not packed");
  if (in_packed) {
    int64_t total = 0;
    for (const ChannelBlock& b : blocks()) {
      if (b.width < 1 || b.width > 64) bad("input blocks hold 1 to 64 channels");
      total += b.width;
    }
    if (total != ic) bad("input blocks do not cover the input channels");
  }
}

std::unique_ptr<Conv> Conv::make(const ConvProblem& p, const std::string& variant, const float* weight,
                                 const float* bias, const std::shared_ptr<const void>& owner) {
  p.check();
  const Isa isa = active_isa();
  std::string name = variant;
  if (name.empty()) {
    const std::vector<std::string> able = conv_variants(p);
    if (able.empty()) bad("no kernel computes this problem");
    name = able.front();
  }
  for (const Variant& v : variants(isa)) {
    if (name != v.row.name) continue;
    if (!computes(v, p)) bad("kernel " + name + " cannot compute this problem");
    return v.family->make(p, v, isa, weight, bias, owner);
  }
  bad("no kernel named " + name + " for " + isa_name(isa));
}

void Conv::check(const ConvArgs& a) const {
  const ConvProblem& p = problem_;
  if (a.n < 0 || a.ih < 1 || a.iw < 1) bad("input sizes must be positive");
  const int64_t oh = a.ih + p.pad_top + p.pad_bottom - p.dh * (p.kh - 1);
  const int64_t ow = a.iw + p.pad_left + p.pad_right - p.dw * (p.kw - 1);
  if (oh < 1 || ow < 1) bad("the kernel is larger than the padded input");
  const int64_t h = p.out_h(a.ih), w = p.out_w(a.iw);
  if (h < 1 || w < 1) bad("nothing is left of the output by its pool");
  if (p.in_packed) {
    if (a.in_map == nullptr || !fits(a, *a.in_map, a.ih, a.iw, a.in_first_block, p.blocks()))
      bad("a packed input of the problem's blocks is needed");
  } else if (a.in == nullptr || (!p.in_planes && a.in_stride < p.ic)) {
    bad("a dense input is needed, its pixel stride not below the channels");
  }
  if (p.out_packed) {
    if (a.out_map == nullptr || !fits(a, *a.out_map, h, w, a.out_first_block, split_channels(p.oc)))
      bad("a packed output whose blocks fit the output channels is needed");
  } else if (a.out == nullptr || a.out_stride < p.oc) {
    bad("a dense output is needed, its pixel stride not below the channels");
  }
  const Cut part = whole_or_part(p, a);
  if (part.first_image < 0 || part.images < 0 || part.first_image + part.images > a.n || part.first_row < 0 ||
      part.end_row < part.first_row || part.end_row > h)
    bad("the part to compute lies outside the output");
  if (a.residual != nullptr && a.residual_map != nullptr) bad("one residual at most");
  if (p.pool != 1 && (a.residual != nullptr || a.residual_map != nullptr)) bad("no residual before a pool");
  if (a.residual != nullptr && a.residual_stride < p.oc)
    bad("the residual's pixel stride is below the channels");
  if (a.residual_map != nullptr &&
      !fits(a, *a.residual_map, h, w, a.residual_first_block, split_channels(p.oc)))
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

}  // namespace actzip
