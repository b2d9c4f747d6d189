#include <algorithm>
#include <atomic>
#include <numeric>

#include "codec/rans_plan.h"
#include "common/thread_pool.h"

namespace actzip::codec::rans {
namespace {

struct LogTable {
  uint16_t row[4096];
  LogTable() {
    row[0] = 0;
    for (uint32_t v = 1; v < 4096; ++v) {
      int e = 31;
      while (!(v >> e)) --e;
      uint64_t m = static_cast<uint64_t>(v) << (31 - e);
      uint32_t r = static_cast<uint32_t>(e);
      for (int k = 0; k < 8; ++k) {
        m = m * m >> 31;
        r = r << 1 | static_cast<uint32_t>(m >> 32);
        m >>= m >> 32;
      }
      row[v] = static_cast<uint16_t>(r);
    }
  }
};

constexpr size_t kWide = 8;  // classes, at most: the prices of a pair lie together

class Clustering {
 public:
  Clustering(const Sample& sample, uint32_t classes, int threads)
      : s_(sample), classes_(classes), threads_(threads), of_(sample.channels) {
    // The pieces of each channel together: one thread has all of them.
    begin_.assign(s_.channels + 1, 0);
    for (const Piece& p : s_.pieces) ++begin_[p.channel + 1];
    std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
    std::vector<size_t> next = begin_;
    sorted_.resize(s_.pieces.size());
    for (const Piece& p : s_.pieces) sorted_[next[p.channel]++] = p;
    counts_.resize(s_.cells * classes);
    price_.resize(s_.cells * kWide);
    parts_.resize(static_cast<size_t>(threads > 0 ? threads : default_threads()));
  }

  std::vector<uint8_t> run() {
    start();
    for (int round = 0; round < 3; ++round) {
      count();
      set_prices();
      if (!move()) break;
    }
    return std::move(of_);
  }

 private:
  // f(channel, worker) on all threads.
  template <class F>
  void each_channel(F&& f) const {
    const size_t together = s_.channels / 64 + 1;  // channels of a task
    const auto tasks = static_cast<int64_t>((s_.channels + together - 1) / together);
    parallel_for(tasks, threads_, [&](int64_t i, int w) {
      const size_t first = static_cast<size_t>(i) * together;
      for (size_t c = first; c < std::min(s_.channels, first + together); ++c) f(c, w);
    });
  }
  template <class F>
  void each_piece(size_t channel, F&& f) const {
    for (size_t k = begin_[channel]; k < begin_[channel + 1]; ++k) f(sorted_[k]);
  }

  // Classes of equal size, by the channels' mean pair.
  void start() {
    std::vector<uint64_t> mean(s_.channels);
    each_channel([&](size_t c, int) {
      uint64_t sum = 0, size = 0;
      each_piece(c, [&](const Piece& p) {
        for (size_t i = p.at; i < p.at + p.size; ++i) sum += s_.pairs[i];
        size += p.size;
      });
      mean[c] = size ? (sum << 8) / size : 0;
    });
    std::vector<uint32_t> order(s_.channels);
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return mean[a] != mean[b] ? mean[a] < mean[b] : a < b; });
    for (size_t i = 0; i < s_.channels; ++i) of_[order[i]] = static_cast<uint8_t>(i * classes_ / s_.channels);
  }

  // The pairs of each class.
  void count() {
    for (auto& part : parts_) std::fill(part.begin(), part.end(), 0u);
    each_channel([&](size_t c, int w) {
      auto& part = parts_[static_cast<size_t>(w)];
      part.resize(counts_.size(), 0u);
      uint32_t* row = &part[of_[c] * s_.cells];
      each_piece(c, [&](const Piece& p) {
        for (size_t i = p.at; i < p.at + p.size; ++i) ++row[s_.pairs[i]];
      });
    });
    std::fill(counts_.begin(), counts_.end(), 0u);
    for (const auto& part : parts_)
      for (size_t i = 0; i < part.size(); ++i) counts_[i] += part[i];
  }

  // What each pair costs in each class.
  void set_prices() {
    std::fill(price_.begin(), price_.end(), 0u);
    const auto tokens = static_cast<size_t>(s_.tokens);
    for (uint32_t k = 0; k < classes_; ++k)
      for (size_t c = 0; c < s_.cells; c += tokens) {
        const uint32_t* row = &counts_[k * s_.cells + c];
        uint64_t total = tokens;
        for (size_t t = 0; t < tokens; ++t) total += 16 * static_cast<uint64_t>(row[t]);
        const uint64_t all = log2_256(total);
        for (size_t t = 0; t < tokens; ++t)
          price_[(c + t) * kWide + k] =
              static_cast<uint32_t>(all - log2_256(16 * static_cast<uint64_t>(row[t]) + 1));
      }
  }

  void add_costs(const Piece& p, uint64_t* cost) const {
    for (size_t i = p.at; i < p.at + p.size;) {
      uint32_t acc[kWide] = {};
      const size_t end = std::min(p.at + p.size, i + 65536);
      for (; i < end; ++i) {
        const uint32_t* from = &price_[s_.pairs[i] * kWide];
        for (size_t k = 0; k < kWide; ++k) acc[k] += from[k];
      }
      for (size_t k = 0; k < kWide; ++k) cost[k] += acc[k];
    }
  }

  // Each channel to its cheapest class; whether one has moved.
  bool move() {
    std::atomic<bool> moved{false};
    each_channel([&](size_t c, int) {
      uint64_t cost[kWide] = {};
      each_piece(c, [&](const Piece& p) { add_costs(p, cost); });
      uint8_t best = of_[c];
      for (uint32_t k = 0; k < classes_; ++k)
        if (cost[k] < cost[best]) best = static_cast<uint8_t>(k);
      if (best != of_[c]) moved.store(true, std::memory_order_relaxed);
      of_[c] = best;
    });
    return moved;
  }

  const Sample& s_;
  uint32_t classes_;
  int threads_;
  std::vector<uint8_t> of_;    // the class of each channel
  std::vector<size_t> begin_;  // of each channel in sorted_
  std::vector<Piece> sorted_;
  std::vector<uint32_t> counts_, price_;      // [class][pair], [pair][class]
  std::vector<std::vector<uint32_t>> parts_;  // counts of each worker
};

}  // namespace

uint64_t log2_256(uint64_t v) {
  static const LogTable table;
  uint64_t shift = 0;
  while (v >= (uint64_t{1} << 24)) v >>= 12, shift += 12;
  while (v >= 4096) v >>= 1, ++shift;
  return shift * 256 + table.row[v];
}

std::vector<uint8_t> cluster(const Sample& sample, uint32_t classes, int threads) {
  return Clustering(sample, classes, threads).run();
}

}  // namespace actzip::codec::rans
