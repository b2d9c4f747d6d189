#include "training/team.h"

#include <algorithm>
#include <atomic>
#include <exception>

#include "common/float_mode.h"
#include "common/thread_pool.h"

namespace actzip::training {
namespace {

std::atomic<OpenMP> openmp{nullptr};

struct Loop {
  int64_t n;
  void (*fn)(void* context, int64_t i);
  void* context;
  FloatMode mode = float_mode();
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // written once by whoever sets `failed`

  void run() {
    const WithFloatMode as_caller(mode);
    while (!failed.load(std::memory_order_relaxed)) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= n) return;
      try {
        fn(context, i);
      } catch (...) {  // through frames of another runtime none may go
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

}  // namespace

void use_openmp(OpenMP parallel) { openmp = parallel; }

void each_raw(int64_t n, int threads, void (*fn)(void* context, int64_t i), void* context) {
  const OpenMP parallel = openmp.load(std::memory_order_relaxed);
  if (threads <= 0) threads = default_threads();
  if (parallel == nullptr) {
    parallel_for(n, threads, [&](int64_t i, int) { fn(context, i); });
    return;
  }
  Loop loop{n, fn, context};
  if (threads == 1 || n <= 1) {
    loop.run();
  } else {
    const auto team = static_cast<unsigned>(std::min<int64_t>(threads, n));
    parallel([](void* p) { static_cast<Loop*>(p)->run(); }, &loop, team, 0);
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace actzip::training
