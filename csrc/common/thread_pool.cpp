#include "common/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "common/float_mode.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace actzip {
namespace {

thread_local bool t_inside = false;

void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// While it lives, the calling thread may not run on `cpu`, unless it may run nowhere else. A virtual
// machine's kernel takes sleeping CPUs for busy ones and wakes a thread where its waker runs; that one does
// not let it run, and they would share one CPU for milliseconds while another has nothing to do.
class Elsewhere {
 public:
#if defined(__linux__)
  explicit Elsewhere(int cpu) {
    if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof before_, &before_) != 0) return;
    if (!CPU_ISSET(cpu, &before_) || CPU_COUNT(&before_) < 2) return;
    during_ = before_;
    CPU_CLR(cpu, &during_);
    set_ = sched_setaffinity(0, sizeof during_, &during_) == 0;
  }
  ~Elsewhere() {
    cpu_set_t now;  // another set than ours: somebody else has changed it meanwhile
    if (set_ && sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &during_))
      sched_setaffinity(0, sizeof before_, &before_);
  }
#else
  explicit Elsewhere(int) {}
#endif
  Elsewhere(const Elsewhere&) = delete;
  Elsewhere& operator=(const Elsewhere&) = delete;

 private:
#if defined(__linux__)
  cpu_set_t before_, during_;
  bool set_ = false;
#endif
};

// One parallel_for. It lives on the caller's stack: a worker joins only under the pool's lock while the
// job is listed, and the caller leaves only after unlisting it and seeing `inside` fall to zero.
struct Job {
  int64_t n;
  RangeFn fn;
  void* context;
  int max_workers;                // the caller included
  FloatMode mode = float_mode();  // the caller's, in which all calls run
  int joined = 1;                 // guarded by the pool's lock
  std::atomic<int> inside{0};     // workers (not the caller) that still hold a pointer to this job
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // written once by whoever sets `failed`

  void run(int worker) {
    while (!failed.load(std::memory_order_relaxed)) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= n) return;
      try {
        fn(context, i, worker);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  // Engines post a job per layer, a few microseconds apart: workers look for the next one for about 50
  // microseconds (up to 200 where the CPU's pause is long) before they sleep, which saves the wake-up through
  // the kernel. So do those that were woken and came too late: calls that take less than a wake-up would else
  // never be joined, each waking a worker that finds nothing and goes back to sleep.
  static constexpr int kSpins = 8000;

  void run(Job& job) {
    grow(job.max_workers - 1);
    bool wake;
    {
      const std::lock_guard<Lock> lock(lock_);
      jobs_.push_back(&job);
      wake = sleeping_ > 0;
    }
    // After the lock: who sees it would else wait for that. Who goes to sleep later looks at the list first.
    posted_.fetch_add(1, std::memory_order_release);
    if (wake) wake_.notify_all();
    t_inside = true;
    job.run(0);
    t_inside = false;
    poster_.store(current_cpu(), std::memory_order_relaxed);
    {
      const std::lock_guard<Lock> lock(lock_);
      for (size_t i = 0; i < jobs_.size(); ++i)
        if (jobs_[i] == &job) {
          jobs_.erase(jobs_.begin() + static_cast<std::ptrdiff_t>(i));
          break;
        }
    }
    // Whoever is still inside may wait for this very CPU: the kernel puts a woken thread on the one of who
    // woke it where the others are asleep.
    for (int spin = 0; job.inside.load(std::memory_order_acquire) != 0; ++spin) {
      if (spin < kSpins / 8)
        relax();
      else
        std::this_thread::yield();
    }
    if (job.failed.load(std::memory_order_acquire)) std::rethrow_exception(job.error);
  }

 private:
  // A mutex that is tried for some microseconds before its owner's time slice may have ended: it is held for
  // some tens of nanoseconds, and waiting in the kernel costs 5 to 10 microseconds.
  class Lock {
   public:
    void lock() {
      for (int spin = 0; spin < 100; ++spin) {
        if (mutex_.try_lock()) return;
        relax();
      }
      mutex_.lock();
    }
    void unlock() { mutex_.unlock(); }

   private:
    std::mutex mutex_;
  };

  void grow(int workers) {
    if (started_.load(std::memory_order_relaxed) >= workers) return;
    const std::lock_guard<Lock> lock(lock_);
    while (started_.load(std::memory_order_relaxed) < workers) {
      try {
        std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        return;  // the system has no more threads: those that there are do the work
      }
      started_.fetch_add(1, std::memory_order_relaxed);
    }
  }

  // Under the lock: a job with a free place, or null.
  Job* take(int* worker) {
    for (Job* job : jobs_) {
      if (job->joined < job->max_workers && job->next.load(std::memory_order_relaxed) < job->n &&
          !job->failed.load(std::memory_order_relaxed)) {
        *worker = job->joined++;
        job->inside.fetch_add(1, std::memory_order_relaxed);
        return job;
      }
    }
    return nullptr;
  }

  void work() {
    t_inside = true;
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && posted_.load(std::memory_order_acquire) == seen; ++spin) relax();
      int worker = 0;
      Job* job;
      bool late;  // something was posted, and others have done it
      {
        const std::lock_guard<Lock> lock(lock_);
        job = take(&worker);
        late = posted_.load(std::memory_order_acquire) != seen;
        seen = posted_.load(std::memory_order_acquire);
      }
      if (job == nullptr && !late) job = sleep(&seen, &worker);
      if (job == nullptr) continue;
      {
        const WithFloatMode mode(job->mode);
        job->run(worker);
      }
      job->inside.fetch_sub(1, std::memory_order_release);
    }
  }

  // As take, after something was posted after `*seen`.
  Job* sleep(uint64_t* seen, int* worker) {
    const Elsewhere elsewhere(poster_.load(std::memory_order_relaxed));
    std::unique_lock<Lock> lock(lock_);
    Job* job = take(worker);
    if (job != nullptr) return job;
    ++sleeping_;
    wake_.wait(lock, [&] { return posted_.load(std::memory_order_acquire) != *seen; });
    --sleeping_;
    job = take(worker);
    *seen = posted_.load(std::memory_order_acquire);
    return job;
  }

  Lock lock_;
  std::condition_variable_any wake_;
  std::vector<Job*> jobs_;
  std::atomic<uint64_t> posted_{0};
  int sleeping_ = 0;             // guarded by the lock
  std::atomic<int> poster_{-1};  // the CPU where the last job's caller ran
  std::atomic<int> started_{0};
};

std::atomic<Pool*> g_pool{nullptr};

#if defined(__linux__) || defined(__APPLE__)
// A forked child has none of the parent's threads: it starts with a fresh pool (the old one is leaked, its
// lock may be held by a thread that no longer exists).
void forget_pool() {
  g_pool.store(nullptr);
  t_inside = false;
}
#endif

Pool& pool() {
  Pool* p = g_pool.load(std::memory_order_acquire);
  if (p != nullptr) return *p;
#if defined(__linux__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
#endif
  Pool* fresh = new Pool;  // never destroyed: its threads outlive main
  if (g_pool.compare_exchange_strong(p, fresh)) return *fresh;
  delete fresh;
  return *p;
}

}  // namespace

int default_threads() {
  static const int n = [] {
    for (const char* name : {"ACTZIP_NUM_THREADS", "OMP_NUM_THREADS"}) {
      const char* env = std::getenv(name);  // OpenMP's may be a list, one a level: the first counts
      const int v = env != nullptr ? std::atoi(env) : 0;
      if (v > 0) return v;
    }
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
    const unsigned h = std::thread::hardware_concurrency();
    return h > 0 ? static_cast<int>(h) : 1;
  }();
  return n;
}

void parallel_for_raw(int64_t n, int threads, RangeFn fn, void* context) {
  if (n <= 0) return;
  if (threads <= 0) threads = default_threads();
  if (threads > n) threads = static_cast<int>(n);
  if (threads == 1 || t_inside) {
    for (int64_t i = 0; i < n; ++i) fn(context, i, 0);
    return;
  }
  Job job{n, fn, context, threads};
  pool().run(job);
}

}  // namespace actzip
