// recurrent: the steps of an LSTM or a GRU. What their inputs give (x @ W.T + biases) is a linear layer of
// all steps before it; here each step adds what the hidden state gives and updates it.
//
// Columns of the recurrent weights lie in chunks of 64, so that a chunk is one run of memory; a step takes
// each chunk to some images in turn.
#include <algorithm>
#include <cstring>

#include "common/thread_pool.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

constexpr int64_t kChunk = 64, kImages = 8;

int64_t chunks(int64_t columns) { return (columns + kChunk - 1) / kChunk; }

class RecurrentNode final : public DenseNode {
 public:
  RecurrentNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
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
    pack(take(spec, "weight", ways_ * gates_ * size_ * size_));
    bias_ = take(spec, "bias", -1);
    if (lstm_ ? !bias_.empty() : static_cast<int64_t>(bias_.size()) != ways_ * size_)
      fail(spec, "bias does not fit");
  }
  size_t scratch(const Context&, int) const override {
    return static_cast<size_t>(kImages * (width() + 3 * size_) + kChunk) * sizeof(float);
  }
  void weights(Weights* found) const override {
    (*found)[weight_.data()] = (weight_.size() + bias_.size()) * sizeof(float);
  }
  void run(Context& c, int threads) const override {
    const View &x = in(c), &y = out(c);
    const int64_t images = x.dims[1], groups = (images + kImages - 1) / kImages;
    parallel_for(groups * ways_, threads, [&](int64_t i, int worker) {
      const int64_t first = i / ways_ * kImages;
      steps(x, y, i % ways_, first, std::min(images, first + kImages),
            reinterpret_cast<float*>(c.scratch_of(worker)));
    });
  }

 private:
  // Of an LSTM all gates are multiplied at once; the last of a GRU by itself.
  int64_t first_part() const { return lstm_ ? 4 * size_ : 2 * size_; }
  int64_t second_part() const { return lstm_ ? 0 : size_; }
  int64_t width() const { return (chunks(first_part()) + chunks(second_part())) * kChunk; }

  void pack(const std::vector<float>& w) {  // (directions, gates * hidden, hidden)
    if (w.empty()) fail(spec, "has no weight");
    weight_.assign(static_cast<size_t>(ways_ * width() * size_), 0.0f);
    float* to = weight_.data();
    for (int64_t d = 0; d < ways_; ++d)
      for (int64_t part = 0, from = 0; part < 2; ++part) {
        const int64_t columns = part == 0 ? first_part() : second_part();
        for (int64_t at = 0; at < columns; at += kChunk, to += kChunk * size_)
          for (int64_t j = at; j < std::min(columns, at + kChunk); ++j)
            for (int64_t k = 0; k < size_; ++k)
              to[k * kChunk + j - at] = w[static_cast<size_t>((d * gates_ * size_ + from + j) * size_ + k)];
        from += columns;
      }
  }
  // sums[n] = h[n] @ w, of chunks [from, to) of a direction's weights.
  void multiply(const float* w, const float* h, float* sums, int64_t images, int64_t from, int64_t to) const {
    for (int64_t k = from; k < to; ++k)
      for (int64_t n = 0; n < images; ++n)
        rows_.vec_mat(sums + n * width() + k * kChunk, h + n * size_, 1, w + k * kChunk * size_, kChunk,
                      size_, kChunk);
  }
  void steps(const View& x, const View& y, int64_t way, int64_t first, int64_t last, float* scratch) const {
    const int64_t count = x.dims[0], images = last - first, mine = chunks(first_part());
    const float* w = weight_.data() + way * width() * size_;
    const float* bias = bias_.empty() ? nullptr : bias_.data() + way * size_;
    float *sums = scratch, *h = sums + kImages * width(), *cell = h + kImages * size_,
          *reset = cell + kImages * size_;
    memset(sums, 0, static_cast<size_t>(kImages * (width() + 3 * size_)) * sizeof(float));
    const bool back = way == 1 || backward_;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = back ? count - 1 - t : t;
      const bool all = !reset_first_;
      if (t > 0) multiply(w, h, sums, images, 0, all ? width() / kChunk : mine);
      for (int64_t n = 0; n < images; ++n) {
        const float* gates = x.data + at * x.strides[0] + (first + n) * x.strides[1] + way * gates_ * size_;
        float* out = y.data + at * y.strides[0] + (first + n) * y.strides[1] + way * size_;
        if (lstm_)
          lstm(sums + n * width(), gates, h + n * size_, cell + n * size_, out);
        else
          gru(w, sums + n * width(), gates, bias, h + n * size_, reset + n * size_, out);
      }
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
    memset(sums, 0, static_cast<size_t>(width()) * sizeof(float));
  }
  void gru(const float* w, float* sums, const float* gates, const float* bias, float* h, float* reset,
           float* out) const {  // r, z, n
    rows_.accumulate(sums, gates, 2 * size_);
    act(Fn::sigmoid, sums, 2 * size_);
    const int64_t mine = chunks(first_part());
    const float *r = sums, *z = sums + size_;
    float* n = sums + mine * kChunk;
    if (reset_first_) {
      for (int64_t k = 0; k < size_; ++k) reset[k] = r[k] * h[k];
      multiply(w, reset, sums, 1, mine, width() / kChunk);
      for (int64_t k = 0; k < size_; ++k) n[k] += bias[k] + gates[2 * size_ + k];
    } else {
      for (int64_t k = 0; k < size_; ++k) n[k] = (n[k] + bias[k]) * r[k] + gates[2 * size_ + k];
    }
    act(Fn::tanh, n, size_);
    for (int64_t k = 0; k < size_; ++k) h[k] = out[k] = (1.0f - z[k]) * n[k] + z[k] * h[k];
    memset(sums, 0, static_cast<size_t>(width()) * sizeof(float));
  }

  bool lstm_ = true, backward_ = false, reset_first_ = false;
  int64_t ways_ = 1, size_ = 1, gates_ = 4;
  std::vector<float> weight_, bias_;
};

}  // namespace

std::unique_ptr<Node> make_recurrent(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<RecurrentNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
