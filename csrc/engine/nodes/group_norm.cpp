// group_norm: the channels of each group normalised together, over all further dimensions.
#include <algorithm>
#include <array>
#include <cmath>

#include "common/thread_pool.h"
#include "engine/nodes/map_node.h"
#include "engine/nodes/strided.h"

namespace actzip::engine {
namespace {

class GroupNormNode final : public DenseNode {
 public:
  GroupNormNode(NodeSpec s, const Values& values, Isa isa) : DenseNode(std::move(s), values, isa) {
    arity(spec, 1, 1);
    const ValueSpec &x = value(values, spec.inputs[0]), &y = value(values, spec.output);
    same_shape(spec, x, y);
    if (x.layout != y.layout) fail(spec, "a map and a plain value");
    groups_ = one(spec, "groups", 0);
    if (x.dims.size() < 2 || groups_ < 1 || x.dims[1] % groups_ != 0)
      fail(spec, "groups do not divide the channels");
    for (size_t d = 1; d < x.dims.size(); ++d)
      if (x.batch[d]) fail(spec, "the batch is not normalised over");
    eps_ = static_cast<float>(number(spec, "eps", 1e-5));
    weight_ = take(spec, "weight", -1);
    bias_ = take(spec, "bias", -1);
    for (const auto* v : {&weight_, &bias_})
      if (!v->empty() && static_cast<int64_t>(v->size()) != x.dims[1])
        fail(spec, "weight or bias does not fit");
  }
  size_t scratch(const Context& c, int) const override {
    const View& x = in(c);
    if (x.layout == Layout::plain) return 0;
    const Bands b(x);
    return round_floats(2 * x.n() * b.count * groups_) * sizeof(float) +
           3 * round_floats(x.n() * x.c()) * sizeof(float);
  }
  void run(Context& c, int threads) const override {
    if (in(c).layout == Layout::plain)
      run_plain(in(c), out(c), threads);
    else
      run_map(c, threads);
  }

 private:
  static constexpr int64_t kLine = 64, kNumbers = 16384;  // summed at once in float32

  // The pixels of an image in bands, whose sums do not depend on the number of threads.
  struct Bands {
    explicit Bands(const View& x)
        : pixels(x.h() * x.w()),
          size(std::max<int64_t>(1, kNumbers / std::max<int64_t>(1, x.c()))),
          count((pixels + size - 1) / size) {}
    int64_t pixels, size, count;
  };
  float scale(double variance, int64_t channel) const {
    const auto by = static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(eps_)));
    return weight_.empty() ? by : by * weight_[static_cast<size_t>(channel)];
  }
  float shift(int64_t channel) const { return bias_.empty() ? 0.0f : bias_[static_cast<size_t>(channel)]; }

  // The sum of numbers that follow each other, or of their squared distances to *less.
  double line_sum(const float* x, int64_t n, const float* less) const {
    std::array<float, kLine> means;
    if (less != nullptr) means.fill(*less);
    const float* m = less == nullptr ? nullptr : means.data();
    double sum = 0;
    while (n > 0) {
      const int64_t pixels = std::min(n, kNumbers) / kLine;
      rows_.pixel_sums(x, kLine, std::max<int64_t>(pixels, 1), pixels > 0 ? kLine : n, m, kLine, &sum);
      x += pixels > 0 ? pixels * kLine : n;
      n -= pixels > 0 ? pixels * kLine : n;
    }
    return sum;
  }

  void run_plain(const View& x, const View& y, int threads) const {
    const int64_t channels = x.dims[1], each = channels / groups_;
    const int64_t inner = channels == 0 ? 0 : x.strides[0] / channels, n = each * inner;
    parallel_for(x.n() * groups_, threads, [&](int64_t i, int) {
      const float* from = x.data + i * n;
      const auto mean = static_cast<float>(line_sum(from, n, nullptr) / static_cast<double>(n));
      const double variance = line_sum(from, n, &mean) / static_cast<double>(n);
      for (int64_t k = 0; k < each; ++k) {
        std::array<float, kLine> less, by, plus;
        less.fill(mean);
        by.fill(scale(variance, i % groups_ * each + k));
        plus.fill(shift(i % groups_ * each + k));
        const float* line = from + k * inner;
        float* to = y.data + i * n + k * inner;
        const int64_t whole = inner / kLine * kLine;
        rows_.pixel_norm(line, kLine, to, kLine, whole / kLine, kLine, less.data(), by.data(), plus.data());
        rows_.pixel_norm(line + whole, 0, to + whole, 0, 1, inner - whole, less.data(), by.data(),
                         plus.data());
      }
    });
  }

  // Sums of all bands, then scales and shifts of all channels, then all bands again.
  void run_map(Context& c, int threads) const {
    const View &x = in(c), &y = out(c);
    const Bands b(x);
    const int64_t channels = x.c(), each = channels / groups_, all = x.n() * channels;
    auto* sums = reinterpret_cast<double*>(c.scratch_of(0));
    float* mean = reinterpret_cast<float*>(sums) + round_floats(2 * x.n() * b.count * groups_);
    float *by = mean + round_floats(all), *plus = by + round_floats(all);
    auto of_bands = [&](const float* less) {
      parallel_for(x.n() * b.count, threads, [&](int64_t i, int) {
        const int64_t n = i / b.count, first = i % b.count * b.size, m = std::min(b.size, b.pixels - first);
        const float* from = x.data + n * x.strides[0] + first * x.pixel();
        const float* l = less == nullptr ? nullptr : less + n * channels;
        double* into = sums + i * groups_;
        std::fill_n(into, groups_, 0.0);
        if (groups_ == 1 && x.pixel() == channels)
          *into = line_sum(from, m * channels, l);
        else
          rows_.pixel_sums(from, x.pixel(), m, channels, l, each, into);
      });
    };
    auto average = [&](int64_t i) {  // of the group of number i of (image, channel)
      double sum = 0;
      for (int64_t k = 0; k < b.count; ++k)
        sum += sums[(i / channels * b.count + k) * groups_ + i % channels / each];
      return sum / static_cast<double>(each * b.pixels);
    };
    of_bands(nullptr);
    for (int64_t i = 0; i < all; ++i) mean[i] = i % each == 0 ? static_cast<float>(average(i)) : mean[i - 1];
    of_bands(mean);
    double variance = 0;
    for (int64_t i = 0; i < all; ++i) {
      if (i % each == 0) variance = average(i);
      by[i] = scale(variance, i % channels);
      plus[i] = shift(i % channels);
    }
    parallel_for(x.n() * b.count, threads, [&](int64_t i, int) {
      const int64_t n = i / b.count, first = i % b.count * b.size, m = std::min(b.size, b.pixels - first);
      rows_.pixel_norm(x.data + n * x.strides[0] + first * x.pixel(), x.pixel(),
                       y.data + n * y.strides[0] + first * y.pixel(), y.pixel(), m, channels,
                       mean + n * channels, by + n * channels, plus + n * channels);
    });
  }

  int64_t groups_ = 1;
  float eps_ = 1e-5f;
  std::vector<float> weight_, bias_;
};

}  // namespace

std::unique_ptr<Node> make_group_norm(NodeSpec s, const Values& values, Isa isa) {
  return std::make_unique<GroupNormNode>(std::move(s), values, isa);
}

}  // namespace actzip::engine
