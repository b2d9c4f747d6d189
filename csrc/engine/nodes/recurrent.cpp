// recurrent: the steps of an LSTM or a GRU. What their inputs give (x @ W.T + biases) is a linear layer of
// all steps before it; here each step adds what the hidden state gives and updates it.
//
// Columns of the recurrent weights lie in chunks as wide as a tile of the dense kernel, so that a chunk is
// one run of memory; a step takes each chunk to some images in turn.
#include <algorithm>
#include <cstring>

#include "common/thread_pool.h"
#include "engine/nodes/strided.h"
#include "kernels/kernels.h"

namespace actzip::engine {
namespace {

constexpr int64_t kImages = 24;  // together, at most

class RecurrentNode final : public DenseNode {
 public:
  RecurrentNode(NodeSpec s, const Values& values, Isa isa)
      : DenseNode(std::move(s), values, isa),
        kernels_(kernels::kernels_for(isa)),
        nv_(kernels_.dense_mr[4] > 0 ? 4 : 2),
        chunk_(nv_ * kernels_.vl) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    if (is_map(values, spec.inputs[0]) || is_map(values, spec.output) || x.dims.size() != 3 ||
        y.dims.size() != 3)
      fail(spec, "needs plain values of 3 dimensions");
    const auto kind = spec.strings.find("kind");
    if (kind == spec.strings.end() || (kind->second != "lstm" && kind->second != "gru"))
      fail(spec, "kind is not lstm or gru");
    lstm_ = kind->second == "lstm";
    ways_ = one(spec, "directions", 1);
    backward_ = one(spec, "reverse", 0) != 0;
    reset_first_ = one(spec, "reset_before", 0) != 0;
    if (ways_ < 1 || ways_ > 2 || x.batch[2] || y.batch[2] || y.dims[2] % ways_ != 0)
      fail(spec, "directions do not fit");
    size_ = y.dims[2] / ways_;
    gates_ = lstm_ ? 4 : 3;
    for (size_t d : {size_t{0}, size_t{1}})
      if (x.dims[d] != y.dims[d] || x.batch[d] != y.batch[d]) fail(spec, "steps or images differ");
    if (size_ < 1 || x.dims[2] != ways_ * gates_ * size_) fail(spec, "gates do not fit the hidden size");
    const std::vector<float> weight = take(spec, "weight", ways_ * gates_ * size_ * size_);
    if (weight.empty()) fail(spec, "has no weight");
    keep(weight, isa);
    bias_ = take(spec, "bias", -1);
    if (lstm_ ? !bias_.empty() : static_cast<int64_t>(bias_.size()) != ways_ * size_)
      fail(spec, "bias does not fit");
  }
  size_t scratch(const Context&, int) const override {
    return static_cast<size_t>(kImages * (width() + 3 * size_)) * sizeof(float);
  }
  void weights(Weights* found) const override {
    (*found)[weight_.get()] = static_cast<size_t>(ways_ * width() * size_) * sizeof(float);
    (*found)[bias_.data()] = bias_.size() * sizeof(float);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    // Few groups, which read the weights seldom, but one for every thread.
    const int64_t images = x.dims[1], least = ceil_div(images, kImages);
    const int64_t groups = std::max(least, std::min(images, ceil_div(std::max(threads, 1), ways_)));
    parallel_for(groups * ways_, threads, [&](int64_t i, int worker) {
      const int64_t group = i / ways_;
      steps(x, y, i % ways_, group * images / groups, (group + 1) * images / groups,
            reinterpret_cast<float*>(c.scratch_of(worker)));
    });
  }

 private:
  // Of an LSTM all gates are multiplied at once; the last of a GRU by itself.
  int64_t first_part() const { return lstm_ ? 4 * size_ : 2 * size_; }
  int64_t second_part() const { return lstm_ ? 0 : size_; }
  int64_t chunks(int64_t columns) const { return ceil_div(columns, chunk_); }
  int64_t width() const { return (chunks(first_part()) + chunks(second_part())) * chunk_; }

  // The packed weights, in the plan's store where it has one: plans for other sizes find them there.
  void keep(const std::vector<float>& weight, Isa isa) {
    const int64_t count = ways_ * width() * size_;
    if (spec.store == nullptr) {
      Floats fresh = make_weights(count);
      pack(weight, fresh.get());
      weight_ = std::move(fresh);
      return;
    }
    std::string key = spec.name + '/' + isa_name(isa) + "/recurrent";
    for (int64_t k : {ways_, gates_, size_}) key += '/' + std::to_string(k);
    weight_ = spec.store->get(key, count, [&](float* to) { pack(weight, to); });
  }
  // (directions, gates * hidden, hidden) to [direction][part][chunk][hidden][columns of the chunk], into
  // zeros.
  void pack(const std::vector<float>& w, float* to) const {
    for (int64_t d = 0; d < ways_; ++d)
      for (int64_t part = 0, from = 0; part < 2; ++part) {
        const int64_t columns = part == 0 ? first_part() : second_part();
        for (int64_t at = 0; at < columns; at += chunk_, to += chunk_ * size_)
          for (int64_t j = at; j < std::min(columns, at + chunk_); ++j)
            for (int64_t k = 0; k < size_; ++k)
              to[k * chunk_ + j - at] = w[static_cast<size_t>((d * gates_ * size_ + from + j) * size_ + k)];
        from += columns;
      }
  }
  // sums[n] = h[n] @ w, of chunks [from, to) of a direction's weights.
  void multiply(const float* w, const float* h, float* sums, int64_t images, int64_t from, int64_t to) const {
    const int64_t most = kernels_.dense_mr[nv_], tiles = ceil_div(images, most);
    const int32_t tap = 0;
    const float* pixels[kernels::kMaxMr];
    kernels::DenseTile t{};
    t.in = pixels;
    t.tap_ids = &tap;
    t.taps = 1;
    t.depth = size_;
    t.first = true;
    t.acc_stride = width();
    t.last = kernels_.vl;
    for (int64_t k = from; k < to; ++k)
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of even size
        const int64_t first = tile * images / tiles, mr = (tile + 1) * images / tiles - first;
        for (int64_t m = 0; m < mr; ++m) pixels[m] = h + (first + m) * size_;
        t.in_table_stride = mr;
        t.weight = w + k * chunk_ * size_;
        t.acc = sums + first * width() + k * chunk_;
        kernels_.dense[nv_][mr](t);
      }
  }
  void steps(const View& x, const View& y, int64_t way, int64_t first, int64_t last, float* scratch) const {
    const int64_t count = x.dims[0], images = last - first, mine = chunks(first_part());
    const float* w = weight_.get() + way * width() * size_;
    const float* bias = bias_.empty() ? nullptr : bias_.data() + way * size_;
    float *sums = scratch, *h = sums + kImages * width(), *cell = h + kImages * size_,
          *reset = cell + kImages * size_;
    memset(sums, 0, static_cast<size_t>(kImages * (width() + 3 * size_)) * sizeof(float));
    const bool back = way == 1 || backward_;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = back ? count - 1 - t : t;
      if (t > 0) multiply(w, h, sums, images, 0, reset_first_ ? mine : width() / chunk_);
      const auto gates = [&](int64_t n) {
        return x.data + at * x.strides[0] + (first + n) * x.strides[1] + way * gates_ * size_;
      };
      const auto out = [&](int64_t n) {
        return y.data + at * y.strides[0] + (first + n) * y.strides[1] + way * size_;
      };
      if (lstm_) {
        for (int64_t n = 0; n < images; ++n)
          lstm(sums + n * width(), gates(n), h + n * size_, cell + n * size_, out(n));
        continue;
      }
      for (int64_t n = 0; n < images; ++n)
        open(sums + n * width(), gates(n), h + n * size_, reset + n * size_);
      if (reset_first_) multiply(w, reset, sums, images, mine, width() / chunk_);
      for (int64_t n = 0; n < images; ++n) renew(sums + n * width(), gates(n), bias, h + n * size_, out(n));
    }
  }
  void act(Fn fn, float* x, int64_t n) const {
    Act a;
    a.fn = fn;
    rows_.activate(a, x, x, n, nullptr, 0);
  }
  void lstm(float* sums, const float* gates, float* h, float* cell, float* out) const {  // i, f, g, o
    rows_.accumulate(sums, gates, 4 * size_);
    act(Fn::sigmoid, sums, 2 * size_);
    act(Fn::tanh, sums + 2 * size_, size_);
    act(Fn::sigmoid, sums + 3 * size_, size_);
    const float *i = sums, *f = sums + size_, *g = f + size_, *o = g + size_;
    for (int64_t k = 0; k < size_; ++k) out[k] = cell[k] = f[k] * cell[k] + i[k] * g[k];
    act(Fn::tanh, out, size_);
    for (int64_t k = 0; k < size_; ++k) h[k] = out[k] = out[k] * o[k];
  }
  // A GRU's gates r and z, and the state as r resets it.
  void open(float* sums, const float* gates, const float* h, float* reset) const {
    rows_.accumulate(sums, gates, 2 * size_);
    act(Fn::sigmoid, sums, 2 * size_);
    if (!reset_first_) return;
    for (int64_t k = 0; k < size_; ++k) reset[k] = sums[k] * h[k];
  }
  // Its new state.
  void renew(float* sums, const float* gates, const float* bias, float* h, float* out) const {
    const float *r = sums, *z = sums + size_;
    float* n = sums + chunks(first_part()) * chunk_;
    if (reset_first_)
      for (int64_t k = 0; k < size_; ++k) n[k] += bias[k] + gates[2 * size_ + k];
    else
      for (int64_t k = 0; k < size_; ++k) n[k] = (n[k] + bias[k]) * r[k] + gates[2 * size_ + k];
    act(Fn::tanh, n, size_);
    for (int64_t k = 0; k < size_; ++k) h[k] = out[k] = (1.0f - z[k]) * n[k] + z[k] * h[k];
  }

  bool lstm_ = true, backward_ = false, reset_first_ = false;
  const kernels::Kernels& kernels_;
  int nv_;
  int64_t chunk_, ways_ = 1, size_ = 1, gates_ = 4;
  SharedFloats weight_;
  std::vector<float> bias_;
};

}  // namespace

std::unique_ptr<Node> make_recurrent(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<RecurrentNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
