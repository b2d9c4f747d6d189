// conv: a convolution between maps, dense or packed, with an optional residual (second input) and activation.
#include "engine/nodes/conv.h"

#include <cmath>
#include <stdexcept>

#include "common/thread_pool.h"

namespace actzip::engine {
namespace {

// The blocks of a packed value: those of its root map that it covers.
std::vector<ChannelBlock> packed_blocks(const Values& values, int v) {
  const int64_t channels = value(values, v).dims[1];
  int64_t at = 0;
  for (; value(values, v).parent >= 0; v = value(values, v).parent) at += value(values, v).offset;
  const ValueSpec& root = value(values, v);
  std::vector<ChannelBlock> blocks;
  for (const ChannelBlock& b : root.parts.empty() ? split_channels(root.dims[1]) : split_channels(root.parts))
    if (b.first >= at && b.first < at + channels) blocks.push_back(b);
  return blocks;
}

class ConvNode final : public KernelNode {
 public:
  ConvNode(NodeSpec s, const Values& values, Isa isa, const ConvProblem& p)
      : KernelNode(std::move(s), values, isa, p) {
    if (spec.inputs.size() > 1 && !is_map(values, spec.inputs[1])) fail(spec, "residual is not a map");
  }

  ConvArgs args(const Context& c, const View& y) const override {
    ConvArgs a;
    const View& x = in(c);
    a.n = x.n();
    a.ih = x.h();
    a.iw = x.w();
    a.scratch_limit = c.scratches[c.node].limit;
    if (x.layout == Layout::packed) {
      a.in_map = x.packed;
      a.in_first_block = x.first_block;
    } else {
      a.in = x.data;
      a.in_stride = x.pixel();
    }
    if (y.layout == Layout::packed) {
      a.out_map = y.packed;
      a.out_first_block = y.first_block;
    } else {
      a.out = y.data;
      a.out_stride = y.pixel();
    }
    if (spec.inputs.size() < 2) return a;
    const View& r = in(c, 1);
    if (r.layout == Layout::packed) {
      a.residual_map = r.packed;
      a.residual_first_block = r.first_block;
    } else {
      a.residual = r.data;
      a.residual_stride = r.pixel();
    }
    return a;
  }
};

}  // namespace

ConvProblem map_problem(const NodeSpec& s, const Values& values) {
  arity(s, 1, 2);
  const ValueSpec &x = value(values, s.inputs[0]), &y = value(values, s.output);
  if (y.layout == Layout::plain || x.dims.size() != 4) fail(s, "needs maps");
  const auto stride = list(s, "stride", 2, 1), dilation = list(s, "dilation", 2, 1),
             kernel = list(s, "kernel", 2, 1), padding = list(s, "padding", 4, 0);
  ConvProblem p;
  p.ic = x.dims[1];
  p.oc = y.dims[1];
  p.kh = kernel[0];
  p.kw = kernel[1];
  p.sh = stride[0];
  p.sw = stride[1];
  p.dh = dilation[0];
  p.dw = dilation[1];
  p.pad_top = padding[0];
  p.pad_left = padding[1];
  p.pad_bottom = padding[2];
  p.pad_right = padding[3];
  p.groups = one(s, "groups", 1);
  p.pool = one(s, "pool", 1);
  p.hint_h = x.dims[2];
  p.hint_w = x.dims[3];
  p.in_packed = x.layout == Layout::packed;
  p.in_planes = x.layout == Layout::plain;
  p.out_packed = y.layout == Layout::packed;
  p.hint_density = p.in_packed ? x.density : 1.0;
  if (p.in_packed) p.in_blocks = packed_blocks(values, s.inputs[0]);
  if (p.groups < 1 || p.ic % p.groups != 0 || p.oc % p.groups != 0)
    fail(s, "groups do not divide the channels");
  if (p.out_h(x.dims[2]) != y.dims[2] || p.out_w(x.dims[3]) != y.dims[3])
    fail(s, "the output's size does not fit");
  return p;
}

void fuse(const NodeAct& act, ConvProblem* p) {
  switch (act.act.fn) {
    case Fn::relu:
      p->act = ActKind::relu;
      return;
    case Fn::clip:
      p->act = ActKind::clip;
      p->lo = act.act.lo;
      p->hi = act.act.hi;
      return;
    case Fn::threshold:
      if (!std::isinf(act.act.hi)) return;
      p->act = ActKind::threshold;
      p->lo = act.param[0];
      if (act.param.size() > 1) p->thresholds = act.param;
      return;
    case Fn::quantize:
      if (!p->out_packed && p->pool == 1) return;  // kernels that finish bounds in place are quicker so
      p->act = ActKind::quantize;
      p->lo = act.act.lo;
      p->hi = act.act.hi;
      p->step = act.act.alpha;
      return;
    default:
      return;
  }
}

KernelNode::KernelNode(NodeSpec s, const Values& values, Isa isa, ConvProblem p) : rows_(rows_for(isa)) {
  if (s.inputs.size() > 1) same_shape(s, value(values, s.inputs[1]), value(values, s.output));
  act_ = NodeAct(s, p.oc);
  fuse(act_, &p);
  p.pre_step = static_cast<float>(number(s, "pre_step", 0));
  p.pre_lo = static_cast<float>(number(s, "pre_lo", 0));
  p.pre_hi = static_cast<float>(number(s, "pre_hi", 0));
  if (p.pre_step != 0) {
    check_quantizer(s, p.pre_step, p.pre_lo, p.pre_hi);
    if (s.inputs.size() < 2) fail(s, "a quantizer before the residual, and no residual");
  }
  later_ = act_ && p.act == ActKind::none;
  if (p.pool != 1 && (later_ || s.inputs.size() > 1))
    fail(s, "no residual before a pool, nor this activation");
  if (later_ && p.out_packed) fail(s, "this activation cannot be written packed");
  const std::vector<float> bias = take(s, "bias", -1);
  if (!bias.empty() && static_cast<int64_t>(bias.size()) != p.oc)
    fail(s, "bias has " + std::to_string(bias.size()) + " numbers");
  std::vector<float> own;
  auto lent = s.borrowed.find("weight");
  if (lent == s.borrowed.end()) own = take(s, "weight", -1);
  const Borrowed weight = lent == s.borrowed.end() ? Borrowed{own.data(), own.size(), {}} : lent->second;
  s.borrowed.clear();
  if (static_cast<int64_t>(weight.size) != p.oc * (p.ic / p.groups) * p.kh * p.kw)
    fail(s, "weight has " + std::to_string(weight.size) + " numbers");
  p.store = s.store;
  const auto keeper = s.strings.find("weights");
  p.layer = keeper == s.strings.end() ? s.name : keeper->second;
  try {
    conv_ =
        Conv::make(p, s.strings["variant"], weight.data, bias.empty() ? nullptr : bias.data(), weight.owner);
  } catch (const std::invalid_argument& e) {
    fail(s, e.what());
  }
  spec = std::move(s);
}

void KernelNode::run_part(Context& c, const ConvArgs& a, int threads, int worker) const {
  parallel_for(conv_->items(a, threads), threads, [&](int64_t i, int one) {
    conv_->run_item(a, threads, i, c.scratch_of(worker < 0 ? one : worker));
    if (later_ && !conv_->apart()) activate(a, conv_->part(a, threads, i));
  });
  if (!later_ || !conv_->apart()) return;
  const ConvProblem& p = conv_->problem();
  const int64_t images = a.images < 0 ? a.n - a.first_image : a.images;
  const int64_t rows = a.rows < 0 ? p.out_h(a.ih) - a.first_row : a.rows;
  parallel_for(images * rows, threads, [&](int64_t i, int) {
    activate(a, {a.first_image + i / rows, a.first_row + i % rows, 1, 0, p.oc});
  });
}

void KernelNode::activate(const ConvArgs& a, const ConvPart& part) const {
  const int64_t ow = conv_->problem().out_w(a.iw), oh = conv_->problem().out_h(a.ih);
  const int64_t pixels = part.images * part.rows * ow;  // several images only as a whole: without gaps
  float* x = a.out + (part.image * oh + part.first_row) * ow * a.out_stride + part.first;
  if (part.width == a.out_stride && act_.param.size() <= 1) {
    act_.apply(rows_, x, 0, pixels * part.width);
    return;
  }
  for (int64_t i = 0; i < pixels; ++i) act_.apply(rows_, x + i * a.out_stride, part.first, part.width);
}

std::unique_ptr<KernelNode> make_conv_kernel(NodeSpec s, const Values& values, Isa isa) {
  const ConvProblem p = map_problem(s, values);
  return std::make_unique<ConvNode>(std::move(s), values, isa, p);
}
std::unique_ptr<Node> make_conv(NodeSpec s, const Values& values, Isa isa) {
  return make_conv_kernel(std::move(s), values, isa);
}

std::vector<std::string> node_variants(const NodeSpec& spec, const Values& values) {
  NodeSpec s = spec;
  const bool plain = value(values, s.output).layout == Layout::plain;
  ConvProblem p = plain ? linear_problem(s, values) : map_problem(s, values);
  fuse(NodeAct(s, p.oc), &p);
  return conv_variants(p);
}

}  // namespace actzip::engine
