#include "engine/plan.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <stdexcept>

#include "common/float_mode.h"
#include "common/thread_pool.h"
#include "engine/node.h"

namespace actzip::engine {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

// Non-zeros of a value.
int64_t count_nonzero(const View& v, const Rows& rows) {
  if (v.layout == Layout::plain) return rows.count_nonzero(v.data, v.count());
  int64_t nonzero = 0;
  const auto each_row = [&](auto&& f) {
    for (int64_t n = 0; n < v.n(); ++n)
      for (int64_t y = 0; y < v.h(); ++y) f(n, y);
  };
  if (v.layout == Layout::packed) {
    for (const BlockOf& b : blocks_of(v))
      each_row([&](int64_t n, int64_t y) {
        const uint64_t* masks = v.packed->masks(n, y, b.block);
        for (int64_t x = 0; x < v.w(); ++x) nonzero += __builtin_popcountll(masks[x]);
      });
    return nonzero;
  }
  each_row([&](int64_t n, int64_t y) {
    for (int64_t x = 0; x < v.w(); ++x) nonzero += rows.count_nonzero(v.row(n, y) + x * v.pixel(), v.c());
  });
  return nonzero;
}

}  // namespace

std::vector<BlockOf> blocks_of(const View& v) {
  std::vector<BlockOf> out;
  const auto& blocks = v.packed->layout().blocks;
  for (size_t b = static_cast<size_t>(v.first_block); b < blocks.size(); ++b) {
    const int64_t first = blocks[b].first - v.first_channel;
    if (first >= v.c()) break;
    out.push_back({static_cast<int64_t>(b), first, blocks[b].width});
  }
  return out;
}

Plan::~Plan() = default;

std::unique_ptr<Context> Plan::acquire(int64_t batch, int threads) const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = idle_.size(); i-- > 0;)
      if (idle_[i]->batch == batch && idle_[i]->threads == threads) {
        auto c = std::move(idle_[i]);
        idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(i));
        return c;
      }
  }
  return make_context(batch, threads);
}

void Plan::give_back(std::unique_ptr<Context> context) const {
  size_t spilled = 0;
  for (const auto& m : context->maps)
    if (m != nullptr) spilled += m->spilled_bytes();
  const std::lock_guard<std::mutex> lock(mutex_);
  spilled_ = std::max(spilled_, spilled);
  if (idle_.size() >= kMaxContexts + static_cast<size_t>(most_threads_)) idle_.erase(idle_.begin());
  idle_.push_back(std::move(context));
}

void Plan::release() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.clear();
}

size_t Plan::arena_bytes(int64_t batch, int threads) const {
  if (threads <= 0) threads = default_threads();
  const Shares s = shares(batch, threads);
  auto c = s.count > 0 ? acquire(s.images, 1) : acquire(batch, threads);
  const size_t bytes = c->arena_bytes;
  give_back(std::move(c));
  return bytes * static_cast<size_t>(std::clamp<int64_t>(s.count, 1, threads));
}

size_t Plan::spilled_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return spilled_;
}

size_t Plan::weight_bytes() const {
  Node::Weights found;
  for (const auto& n : nodes_) n->weights(&found);
  size_t bytes = 0;
  for (const auto& [at, size] : found) bytes += size;
  for (const ValueSpec& v : values_) bytes += v.data.size() * sizeof(float);
  return bytes;
}

// Inputs and outputs, and plain values that are another shape of them, lie where the caller says.
void Plan::place_operands(Context& c, const std::vector<const float*>& inputs,
                          const std::vector<float*>& outputs) const {
  for (size_t i = 0; i < inputs.size(); ++i)
    c.views[static_cast<size_t>(inputs_[i])].data = const_cast<float*>(inputs[i]);
  for (size_t i = 0; i < outputs.size(); ++i) c.views[static_cast<size_t>(outputs_[i])].data = outputs[i];
  for (size_t i = 0; i < values_.size(); ++i)
    if (values_[i].parent >= 0 && values_[i].layout != Layout::packed) {
      const auto root = static_cast<size_t>(roots_[i]);
      if (values_[root].data.empty()) c.views[i].data = c.views[root].data + ats_[i];
    }
}

namespace {

// Of one thread its own time, which nothing else that runs on the machine adds to.
double seconds(int threads) {
#if defined(__linux__) || defined(__APPLE__)
  if (timespec t{}; threads == 1 && clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0)
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
#endif
  (void)threads;
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Four dimensions as N x H x W x C.
std::vector<float> content(const View& v) {
  std::vector<float> all(static_cast<size_t>(v.count()));
  float* to = all.data();
  for (int64_t n = 0; n < v.n(); ++n)
    for (int64_t y = 0; y < v.h(); ++y, to += v.w() * v.c()) {
      if (v.layout == Layout::plain) {
        for (int64_t ch = 0; ch < v.c(); ++ch)
          for (int64_t x = 0; x < v.w(); ++x)
            to[x * v.c() + ch] = v.data[((n * v.c() + ch) * v.h() + y) * v.w() + x];
      } else if (v.layout == Layout::packed) {
        for (const BlockOf& b : blocks_of(v)) unpack_row(*v.packed, n, y, b.block, to + b.first, v.c());
      } else {
        for (int64_t x = 0; x < v.w(); ++x)
          std::memcpy(to + x * v.c(), v.row(n, y) + x * v.pixel(),
                      static_cast<size_t>(v.c()) * sizeof(float));
      }
    }
  return all;
}

}  // namespace

void Plan::check_call(int64_t batch, const std::vector<const float*>& inputs,
                      const std::vector<float*>& outputs) const {
  if (batch < 1) fail("plan: batch " + std::to_string(batch) + " is not at least 1");
  if (inputs.size() != inputs_.size() || outputs.size() != outputs_.size())
    fail("plan: " + std::to_string(inputs.size()) + " inputs and " + std::to_string(outputs.size()) +
         " outputs given, " + std::to_string(inputs_.size()) + " and " + std::to_string(outputs_.size()) +
         " needed");
}

void Plan::execute(Context& c, const std::vector<const float*>& inputs, const std::vector<float*>& outputs,
                   std::vector<NodeTiming>* timings, std::vector<double>* densities,
                   std::map<int, std::vector<float>>* captured) const {
  place_operands(c, inputs, outputs);
  const int threads = c.threads;
  const FlushSubnormals flush;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    c.node = i;
    for (int root : binds_[i]) {
      const Context::Region& r = c.regions[static_cast<size_t>(root)];
      PackedMap& map = *c.maps[static_cast<size_t>(root)];
      unsigned char* const index = c.arena.get() + r.index;
      if (r.slots < 0)
        map.bind(map.layout().n, index, c.arena.get() + r.values, r.capacity);
      else
        map.bind_slots(map.layout().n, index, c.arena.get() + c.regions[static_cast<size_t>(r.slots)].values);
    }
    if (captured != nullptr)
      for (int v : nodes_[i]->spec.inputs)
        if (const auto it = captured->find(v); it != captured->end() && it->second.empty())
          it->second = content(c.views[static_cast<size_t>(v)]);
    if (timings != nullptr) {
      const double start = seconds(threads);
      nodes_[i]->run(c, threads);
      (*timings)[i].seconds = seconds(threads) - start;
    } else {
      nodes_[i]->run(c, threads);
    }
    if (densities != nullptr) {
      const auto o = static_cast<size_t>(nodes_[i]->spec.output);
      const View& v = c.views[o];
      const int64_t total = v.count();
      if (total == 0) continue;
      (*densities)[o] = static_cast<double>(count_nonzero(v, rows_for(isa_))) / static_cast<double>(total);
    }
  }
}

// Maps of few images stay in the caches between nodes; weights want many images for each time that they are
// read. The most images of a share: one for every 32 MB of weights, 4 to 32.
//
//   Zen 5, batch 32, ms an image, shares of 4 / 8 / 32    1 thread               2 threads
//   ResNet-50, weights of 0.1 GB                          23.7 / 24.1 / 25.2    12.2 / 13.6 / 13.1
//   VGG-16, weights of 0.55 GB                            43.1 / 41.7 / 40.4    22.6 / 21.7 / 21.0
int64_t Plan::share_of(size_t weight_bytes) {
  return std::clamp<int64_t>(static_cast<int64_t>(weight_bytes >> 25), 4, 32);
}

Plan::Shares Plan::shares(int64_t batch, int threads) const {
  if (share_ == 0 || batch < threads) return {};
  const int64_t rounds = (batch / threads + share_ - 1) / share_;
  return {batch / (rounds * threads), rounds * threads};
}

// Images that are left over when every thread has had its shares are run by all threads together.
void Plan::run_in_shares(int64_t batch, const std::vector<const float*>& inputs,
                         const std::vector<float*>& outputs, int threads,
                         std::vector<NodeTiming>* timings) const {
  check_call(batch, inputs, outputs);
  if (threads <= 0) threads = default_threads();
  if (most_threads_ < threads) most_threads_ = threads;
  const auto from = [&](auto all, const std::vector<int>& values, int64_t image) {
    for (size_t i = 0; i < all.size(); ++i)
      all[i] += image * elements(values_[static_cast<size_t>(values[i])], 1);
    return all;
  };
  const auto some = [&](int64_t first, int64_t images, int by, std::vector<NodeTiming>* times) {
    auto c = acquire(images, by);  // one that threw is dropped, not kept
    if (first == 0)
      execute(*c, inputs, outputs, times, nullptr);
    else
      execute(*c, from(inputs, inputs_, first), from(outputs, outputs_, first), times, nullptr);
    give_back(std::move(c));
  };
  const Shares s = shares(batch, threads);
  parallel_for(s.count, threads,
               [&](int64_t i, int) { some(i * s.images, s.images, 1, i == 0 ? timings : nullptr); });
  const int64_t done = s.images * s.count;
  if (done < batch) some(done, batch - done, threads, done == 0 ? timings : nullptr);
  if (timings != nullptr && done > 0)
    for (NodeTiming& t : *timings)
      t.seconds *= static_cast<double>(batch) / static_cast<double>(s.images * threads);
}

void Plan::run(int64_t batch, const std::vector<const float*>& inputs, const std::vector<float*>& outputs,
               int threads) const {
  run_in_shares(batch, inputs, outputs, threads, nullptr);
}

std::vector<NodeTiming> Plan::profile(int64_t batch, const std::vector<const float*>& inputs,
                                      const std::vector<float*>& outputs, int threads) const {
  std::vector<NodeTiming> timings;
  for (const auto& n : nodes_) timings.push_back({n->spec.op, n->spec.name, n->kernel(), n->kind(), 0.0});
  run_in_shares(batch, inputs, outputs, threads, &timings);
  return timings;
}

std::vector<double> Plan::densities(int64_t batch, const std::vector<const float*>& inputs,
                                    const std::vector<float*>& outputs, int threads) const {
  check_call(batch, inputs, outputs);
  std::vector<double> d(values_.size(), -1.0);
  auto c = acquire(batch, threads > 0 ? threads : default_threads());
  execute(*c, inputs, outputs, nullptr, &d);
  give_back(std::move(c));
  return d;
}

std::vector<std::vector<float>> Plan::capture(int64_t batch, const std::vector<const float*>& inputs,
                                              const std::vector<float*>& outputs, int threads,
                                              const std::vector<int>& values) const {
  check_call(batch, inputs, outputs);
  std::map<int, std::vector<float>> captured;
  for (int v : values) {
    if (v < 0 || v >= static_cast<int>(values_.size())) fail("plan: no value " + std::to_string(v));
    const ValueSpec& spec = values_[static_cast<size_t>(v)];
    if (spec.dims.size() != 4 || spec.band > 0)
      fail("plan: value '" + spec.name + "' has no four dimensions, or is never there as a whole");
    captured[v];
  }
  auto c = acquire(batch, threads > 0 ? threads : default_threads());
  execute(*c, inputs, outputs, nullptr, nullptr, &captured);
  give_back(std::move(c));
  std::vector<std::vector<float>> all;
  for (int v : values) all.push_back(captured[v]);
  return all;
}

}  // namespace actzip::engine
