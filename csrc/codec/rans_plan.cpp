#include "codec/rans_plan.h"

#include <algorithm>
#include <memory>

#include "codec/rans_bits.h"
#include "codec/rans_model.h"
#include "common/thread_pool.h"

namespace actzip::codec::rans {
namespace {

using Histogram = std::vector<uint64_t>;  // [context][token]

// The tables of one class.
struct Tables {
  std::vector<uint8_t> start;     // see Model
  std::vector<Histogram> counts;  // of each table, by token
  uint64_t cost = 0;
};

// The cost in 1/256 bits of coding with an own table, its own cost included.
uint64_t cost_of(const uint64_t* c, int n) {
  uint64_t total = 0, sum = 0;
  int seen = 0, last = 0;
  for (int t = 0; t < n; ++t) {
    total += c[t];
    sum += c[t] * log2_256(c[t]);
    seen += c[t] != 0;
    last = c[t] != 0 ? t : last;
  }
  if (total == 0) return 0;
  return total * log2_256(total) - sum + 256 * 12 + 1024 * static_cast<uint64_t>(seen) +
         256 * static_cast<uint64_t>(last + 1 - seen);
}

// Adjacent contexts of one class that share a table while that is cheaper.
class Runs {
 public:
  // h: [context][token]
  Runs(const uint64_t* h, int contexts, int tokens) : contexts_(contexts), n_(tokens) {
    for (int k = 0; k < contexts; ++k) {
      const uint64_t* c = h + static_cast<size_t>(k) * static_cast<size_t>(n_);
      const int used = used_of(c);
      if (used == 0) continue;
      used_ = std::max(used_, used);
      runs_.push_back({k, std::vector<uint64_t>(c, c + n_), cost_of(c, used)});
    }
    if (runs_.empty()) {
      runs_.push_back({0, std::vector<uint64_t>(static_cast<size_t>(n_), 0), 0});
      runs_[0].c[0] = 1;
    }
    both_.resize(static_cast<size_t>(used_));
    for (size_t i = 0; i < runs_.size(); ++i) set_gain(i);
  }

  // Merges while that gains, and until there are `limit` at most.
  void merge(size_t limit) {
    while (runs_.size() > 1) {
      size_t best = 0;
      for (size_t i = 1; i + 1 < runs_.size(); ++i)
        if (runs_[i].gain > runs_[best].gain) best = i;
      if (runs_[best].gain <= 0 && runs_.size() <= limit) break;
      for (size_t t = 0; t < both_.size(); ++t) runs_[best].c[t] += runs_[best + 1].c[t];
      runs_[best].cost += runs_[best + 1].cost - static_cast<uint64_t>(runs_[best].gain);
      runs_.erase(runs_.begin() + static_cast<std::ptrdiff_t>(best) + 1);
      set_gain(best);
      if (best > 0) set_gain(best - 1);
    }
  }

  Tables tables() && {
    Tables t;
    t.start.assign(static_cast<size_t>(contexts_), 0);
    for (size_t i = 0; i < runs_.size(); ++i) {
      if (i > 0) t.start[static_cast<size_t>(runs_[i].first)] = 1;
      t.cost += runs_[i].cost;
      t.counts.push_back(std::move(runs_[i].c));
    }
    return t;
  }

 private:
  struct Run {
    int first;
    std::vector<uint64_t> c;
    uint64_t cost;
    int64_t gain = 0;  // of merging with the next
  };
  void set_gain(size_t i) {
    if (i + 1 >= runs_.size()) return;
    for (size_t t = 0; t < both_.size(); ++t) both_[t] = runs_[i].c[t] + runs_[i + 1].c[t];
    runs_[i].gain = static_cast<int64_t>(runs_[i].cost + runs_[i + 1].cost) -
                    static_cast<int64_t>(cost_of(both_.data(), used_));
  }
  // Tokens up to the last that occurs.
  int used_of(const uint64_t* c) const {
    int n = n_;
    while (n > 0 && c[n - 1] == 0) --n;
    return n;
  }

  int contexts_, n_, used_ = 1;
  std::vector<Run> runs_;
  std::vector<uint64_t> both_;
};

// Chooses the exponents that have tokens, and whether signs are common enough to be rotated into the raw
// bits.
void choose_float_form(const MapInfo& info, const Source& source, int threads, Alphabet* a) {
  const size_t workers = static_cast<size_t>(threads > 0 ? threads : default_threads());
  const int m = a->mantissa();
  const size_t cells = static_cast<size_t>(a->exponents()) * 2;
  std::vector<std::vector<uint64_t>> parts(workers, std::vector<uint64_t>(cells + 1, 0));
  for_each_chunk(source, threads, [&](uint64_t, const void* s, const Box& box, int w) {
    uint64_t* h = parts[static_cast<size_t>(w)].data();
    const size_t n = box.size();
    for (size_t i = 0; i < n; ++i) {
      const uint32_t v =
          info.width == 2 ? static_cast<const uint16_t*>(s)[i] : static_cast<const uint32_t*>(s)[i];
      ++h[v == 0 ? cells : v >> m];
    }
  });
  for (size_t w = 1; w < workers; ++w)
    for (size_t i = 0; i <= cells; ++i) parts[0][i] += parts[w][i];
  const uint64_t* h = parts[0].data();
  uint64_t plus = 0, minus = 0;
  for (size_t e = 0; e < cells / 2; ++e) plus += h[e], minus += h[e + cells / 2];
  a->rotate = minus * 16 > plus + minus;
  const size_t window = static_cast<size_t>((kRansTokens - 2) >> a->fine), all = cells / 2;
  uint64_t best = 0;
  a->first = 0;
  for (size_t e = 0; e < all; ++e) {
    uint64_t sum = 0;
    for (size_t k = e; k < std::min(all, e + window); ++k) sum += h[k] + (a->rotate ? h[k + all] : 0);
    if (sum > best) {
      best = sum;
      a->first = static_cast<int>(e);
    }
  }
}

class Planner {
 public:
  Planner(const MapInfo& info, const Source& source, int64_t wanted, int threads)
      : info_(info), source_(source), wanted_(wanted), threads_(threads) {}

  std::vector<uint8_t> run() {
    choose_form();
    take_sample();
    choose_classes();
    count();
    choose_tables();
    return write_model(m_);
  }

 private:
  void choose_form();
  void take_sample();
  void choose_classes();
  void count();
  void count_chunks();
  void choose_tables();
  void load_pairs(uint64_t chunk, Scratch& scratch, uint16_t* out) const {
    pairs_of(source_.load(chunk, scratch), source_.box(chunk), m_.alphabet, info_.width, scratch, out);
  }
  size_t cells() const { return m_.alphabet.pairs(); }
  uint32_t channel(const Box& box, uint32_t plane) const {
    return static_cast<uint32_t>((box.first_plane + plane) % info_.channels);
  }
  size_t workers() const { return static_cast<size_t>(threads_ > 0 ? threads_ : default_threads()); }

  const MapInfo& info_;
  const Source& source_;
  int64_t wanted_;  // classes, or 0
  int threads_;
  uint64_t elements_ = info_.planes * info_.rows * info_.cols;
  uint64_t stride_ = 1;  // between the chunks of the sample
  Model m_;
  Sample sample_;
  uint32_t classes_ = 1;
  Classes of_;  // of the channels, where there are two or more
  std::vector<Histogram> h_;
};

void Planner::choose_form() {
  Alphabet& a = m_.alphabet;
  a.kind = info_.kind;
  a.bits = info_.bits;
  if (info_.kind == Kind::integer) {
    a.fine = info_.bits <= 10 ? 2 : 1;
    if (a.fine >= a.bits) a.fine = a.bits - 1;
  } else {
    a.fine = 1;
    if (source_.chunks()) choose_float_form(info_, source_, threads_, &a);
  }
  a.build();
  m_.prec = elements_ >= 16384 ? 11 : 10;
  m_.keep = elements_ >= 65536 ? 3 : 2;
}

// Some chunks of the map, all of them if it is small.
void Planner::take_sample() {
  constexpr uint64_t kSample = 1 << 18;
  stride_ = std::max<uint64_t>(1, elements_ / kSample);
  std::vector<uint64_t> ids;
  std::vector<size_t> begin;
  size_t at = 0;
  for (uint64_t c = 0; c < source_.chunks(); c += stride_) {
    const Box box = source_.box(c);
    const size_t plane = static_cast<size_t>(box.rows) * box.cols;
    ids.push_back(c);
    begin.push_back(at);
    for (uint32_t j = 0; j < box.planes; ++j, at += plane)
      sample_.pieces.push_back({at, plane, channel(box, j)});
  }
  uint16_t* const pairs = thread_scratch().get_as<uint16_t>(Scratch::kFirst + 4, at);
  sample_.pairs = pairs;
  sample_.channels = info_.channels;
  parallel_for(static_cast<int64_t>(ids.size()), threads_, [&](int64_t i, int) {
    const auto k = static_cast<size_t>(i);
    load_pairs(ids[k], thread_scratch(), pairs + begin[k]);
  });
}

// Classes, and the histograms of what the sample has.
void Planner::choose_classes() {
  classes_ = elements_ >= 131072 ? 8 : elements_ >= 16384 ? 4 : elements_ >= 4096 ? 2 : 1;
  if (wanted_) classes_ = static_cast<uint32_t>(wanted_);
  classes_ = static_cast<uint32_t>(std::min<uint64_t>(classes_, std::max<uint64_t>(info_.channels / 2, 1)));
  h_.assign(classes_, Histogram(cells(), 0));
  if (classes_ > 1) {
    const Channels channels(sample_, cells(), threads_);
    of_ = cluster(channels, cells(), m_.alphabet.count, classes_, threads_);
    for (uint32_t k = 0; k < classes_; ++k) std::copy_n(&of_.counts[k * cells()], cells(), h_[k].begin());
  } else if (stride_ == 1) {
    PairCounter counter;
    for (const Piece& p : sample_.pieces) counter.add(&sample_.pairs[p.at], p.size, h_[0].data());
  }
}

// Histograms of the classes over the whole map, and that of all of them.
void Planner::count() {
  if (stride_ > 1) count_chunks();
  if (classes_ == 1) return;
  h_.emplace_back(cells(), 0);
  for (uint32_t k = 0; k < classes_; ++k)
    for (size_t i = 0; i < cells(); ++i) h_[classes_][i] += h_[k][i];
}

void Planner::count_chunks() {
  struct Work {
    PairCounter counter;
    std::vector<Histogram> h;
  };
  std::vector<std::unique_ptr<Work>> works(workers());
  parallel_for(static_cast<int64_t>(source_.chunks()), threads_, [&](int64_t i, int w) {
    std::unique_ptr<Work>& work = works[static_cast<size_t>(w)];
    if (!work) {
      work = std::make_unique<Work>();
      work->h.assign(classes_, Histogram(cells(), 0));
    }
    Scratch& scratch = thread_scratch();
    const Box box = source_.box(static_cast<uint64_t>(i));
    uint16_t* p = scratch.get_as<uint16_t>(Scratch::kFirst + 2, box.size());
    load_pairs(static_cast<uint64_t>(i), scratch, p);
    const size_t plane = static_cast<size_t>(box.rows) * box.cols;
    for (uint32_t j = 0; j < box.planes; ++j, p += plane)
      work->counter.add(p, plane, work->h[classes_ > 1 ? of_.of[channel(box, j)] : 0].data());
  });
  h_.assign(classes_, Histogram(cells(), 0));
  for (const auto& work : works)
    for (uint32_t k = 0; work && k < classes_; ++k)
      for (size_t i = 0; i < cells(); ++i) h_[k][i] += work->h[k][i];
}

// Tables for the classes, or for all channels together if that costs less.
void Planner::choose_tables() {
  std::vector<Tables> sets(wanted_ && classes_ > 1 ? classes_ : h_.size());
  parallel_for(static_cast<int64_t>(sets.size()), threads_, [&](int64_t i, int) {
    const auto k = static_cast<size_t>(i);
    Runs runs(h_[k].data(), m_.alphabet.contexts(), m_.alphabet.count);
    runs.merge(k < classes_ ? kMaxTables / classes_ : kMaxTables);
    sets[k] = std::move(runs).tables();
  });
  m_.classes = classes_;
  size_t first = 0, last = classes_;
  if (classes_ > 1) {
    uint64_t cost = 256 * static_cast<uint64_t>(bits_for(classes_)) * info_.channels;
    for (uint32_t k = 0; k < classes_; ++k) cost += sets[k].cost;
    if (!wanted_ && sets[classes_].cost <= cost) {
      m_.classes = 1;
      first = classes_;
      last = classes_ + 1;
    } else {
      m_.class_of = std::move(of_.of);
    }
  }
  for (size_t k = first; k < last; ++k) {
    m_.start.push_back(std::move(sets[k].start));
    for (const auto& c : sets[k].counts)
      m_.tables.push_back(normalise(c.data(), m_.alphabet.count, m_.prec, m_.keep));
  }
}

}  // namespace

std::vector<uint8_t> plan(const MapInfo& info, const Source& source, const Options& options, int threads) {
  const int64_t wanted = option(options, "classes", 0);
  if (wanted < 0 || wanted > 8) throw ArgumentError("rans: classes must be 1 to 8, or 0 to choose");
  return Planner(info, source, wanted, threads).run();
}

}  // namespace actzip::codec::rans
