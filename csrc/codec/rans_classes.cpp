#include <algorithm>
#include <numeric>

#include "codec/kernels.h"
#include "codec/rans_plan.h"
#include "common/thread_pool.h"

namespace actzip::codec::rans {

namespace {

constexpr LogTable make_logs() {
  LogTable t{};
  for (uint32_t v = 1; v < 4096; ++v) {
    const int e = static_cast<int>(std::bit_width(v)) - 1;
    uint64_t m = static_cast<uint64_t>(v) << (31 - e);
    uint32_t r = static_cast<uint32_t>(e);
    for (int k = 0; k < 8; ++k) {
      m = m * m >> 31;
      r = r << 1 | static_cast<uint32_t>(m >> 32);
      m >>= m >> 32;
    }
    t.row[v] = static_cast<uint16_t>(r);
  }
  return t;
}

size_t worker_count(int threads) { return static_cast<size_t>(threads > 0 ? threads : default_threads()); }

// f(channel, worker) on all threads.
template <class F>
void each_channel(size_t channels, int threads, F&& f) {
  const size_t together = channels / 64 + 1;  // channels of a task
  const auto tasks = static_cast<int64_t>((channels + together - 1) / together);
  parallel_for(tasks, threads, [&](int64_t i, int w) {
    const size_t first = static_cast<size_t>(i) * together;
    for (size_t c = first; c < std::min(channels, first + together); ++c) f(c, w);
  });
}

}  // namespace

constexpr LogTable kLogTable = make_logs();

size_t PairCounter::squeeze(const uint16_t* pairs, size_t n) {
  return kernels().compress16(pairs, n, 0, mask_, some_);
}

Channels::Channels(const Sample& sample, size_t pairs, int threads) : spans_(sample.channels) {
  // The pieces of each channel together: one thread has all of them.
  std::vector<size_t> begin(sample.channels + 1, 0);
  for (const Piece& p : sample.pieces) {
    ++begin[p.channel + 1];
    spans_[p.channel].symbols += p.size;
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<size_t> next = begin;
  std::vector<Piece> sorted(sample.pieces.size());
  for (const Piece& p : sample.pieces) sorted[next[p.channel]++] = p;
  // Room for as many pairs as a channel can have.
  const auto room = [&](const Span& span) { return std::min<size_t>(span.symbols, pairs); };
  size_t most = 0;
  for (const Span& span : spans_) most += room(span);
  RansCount* to = thread_scratch().get_as<RansCount>(Scratch::kFirst + 5, most);
  for (Span& span : spans_) {
    span.begin = to;
    to += room(span);
  }

  struct Work {
    PairCounter counter;
    std::vector<uint32_t> row;
    std::vector<uint16_t> seen;
  };
  std::vector<std::unique_ptr<Work>> works(worker_count(threads));
  each_channel(sample.channels, threads, [&](size_t c, int w) {
    std::unique_ptr<Work>& work = works[static_cast<size_t>(w)];
    if (!work) {
      work = std::make_unique<Work>();
      work->row.assign(pairs, 0);
      work->seen.resize(pairs + 1);
    }
    size_t seen = 0;
    for (size_t i = begin[c]; i < begin[c + 1]; ++i) {
      const Piece& p = sorted[i];
      seen += work->counter.add_seen(&sample.pairs[p.at], p.size, work->row.data(), &work->seen[seen]);
    }
    RansCount* out = spans_[c].begin;
    const auto take = [&](uint32_t pair) {
      *out++ = {pair, work->row[pair]};
      work->row[pair] = 0;
    };
    if (work->row[0] > 0) take(0);
    for (size_t i = 0; i < seen; ++i) take(work->seen[i]);
    spans_[c].end = out;
  });
}

namespace {

class Clustering {
 public:
  Clustering(const Channels& channels, size_t pairs, int tokens, uint32_t classes, int threads)
      : channels_(channels), pairs_(pairs), tokens_(tokens), classes_(classes), threads_(threads) {
    counts_.assign(pairs * classes, 0);
    price_.assign(pairs * kRansClasses, 0);
    start();
    find_used();
  }

  Classes run() {
    for (int round = 0; round < 3; ++round) {
      set_prices();
      if (!move()) break;
    }
    return {std::move(of_), std::move(counts_)};
  }

 private:
  // Channels by the mean of their pairs, cut into classes of equal size.
  void start() {
    const size_t n = channels_.size();
    std::vector<uint64_t> mean(n, 0);
    for (size_t c = 0; c < n; ++c) {
      uint64_t sum = 0;
      for (const RansCount* p = channels_.begin(c); p != channels_.end(c); ++p)
        sum += uint64_t{p->pair} * p->count;
      if (channels_.symbols(c)) mean[c] = (sum << 8) / channels_.symbols(c);
    }
    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0u);
    std::sort(order.begin(), order.end(),
              [&](uint32_t a, uint32_t b) { return mean[a] != mean[b] ? mean[a] < mean[b] : a < b; });
    of_.resize(n);
    for (size_t i = 0; i < n; ++i) {
      of_[order[i]] = static_cast<uint8_t>(i * classes_ / n);
      add(order[i], of_[order[i]], 1);
    }
  }

  // The channel's counts to its class's, or (times: -1) from them.
  void add(size_t channel, uint8_t to, uint32_t times) {
    uint32_t* row = &counts_[to * pairs_];
    for (const RansCount* p = channels_.begin(channel); p != channels_.end(channel); ++p)
      row[p->pair] += times * p->count;
  }

  void find_used() {
    for (size_t pair = 0; pair < pairs_; ++pair) {
      uint32_t any = 0;
      for (uint32_t k = 0; k < classes_; ++k) any |= counts_[k * pairs_ + pair];
      if (any) used_.push_back(static_cast<uint32_t>(pair));
    }
  }

  // What each pair that occurs costs in each class.
  void set_prices() {
    const auto tokens = static_cast<uint32_t>(tokens_);
    for (size_t from = 0, to = 0; from < used_.size(); from = to) {
      const uint32_t context = used_[from] / tokens;
      while (to < used_.size() && used_[to] / tokens == context) ++to;
      for (uint32_t k = 0; k < classes_; ++k) {
        const uint32_t* row = &counts_[k * pairs_];
        uint64_t total = tokens;
        for (size_t i = from; i < to; ++i) total += 16 * uint64_t{row[used_[i]]};
        const uint64_t all = log2_256(total);
        for (size_t i = from; i < to; ++i)
          price_[used_[i] * kRansClasses + k] =
              static_cast<uint32_t>(all - log2_256(16 * uint64_t{row[used_[i]]} + 1));
      }
    }
  }

  uint8_t cheapest(size_t channel) const {
    uint64_t cost[kRansClasses] = {};
    const RansCount *begin = channels_.begin(channel), *end = channels_.end(channel);
    if (channels_.symbols(channel) <= kRansFewest) {
      rans_kernels().costs(begin, static_cast<size_t>(end - begin), price_.data(), cost);
    } else {
      for (const RansCount* p = begin; p != end; ++p)
        for (size_t k = 0; k < kRansClasses; ++k)
          cost[k] += uint64_t{p->count} * price_[p->pair * kRansClasses + k];
    }
    uint8_t best = of_[channel];
    for (uint32_t k = 0; k < classes_; ++k)
      if (cost[k] < cost[best]) best = static_cast<uint8_t>(k);
    return best;
  }

  // Each channel to its cheapest class; whether one has moved.
  bool move() {
    std::vector<uint8_t> next(of_.size());
    each_channel(of_.size(), threads_, [&](size_t c, int) { next[c] = cheapest(c); });
    bool moved = false;
    for (size_t c = 0; c < next.size(); ++c) {
      if (next[c] == of_[c]) continue;
      add(c, of_[c], ~0u);
      add(c, next[c], 1);
      moved = true;
    }
    of_ = std::move(next);
    return moved;
  }

  const Channels& channels_;
  size_t pairs_;
  int tokens_;
  uint32_t classes_;
  int threads_;
  std::vector<uint8_t> of_;               // the class of each channel
  std::vector<uint32_t> counts_, price_;  // [class][pair], [pair][class]
  std::vector<uint32_t> used_;            // pairs that occur, ascending
};

}  // namespace

Classes cluster(const Channels& channels, size_t pairs, int tokens, uint32_t classes, int threads) {
  return Clustering(channels, pairs, tokens, classes, threads).run();
}

}  // namespace actzip::codec::rans
