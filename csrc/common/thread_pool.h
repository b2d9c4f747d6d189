// One thread pool for the whole module.
//
// `parallel_for(n, threads, fn)` calls fn(i, worker) once for every i in [0, n), on at most `threads`
// threads, of which the calling one is one (worker 0), and returns when all calls have returned. `worker`
// is in [0, threads), and no two calls run at once with the same one inside a parallel_for: use it to
// index per-thread scratch memory. threads <= 0 means default_threads(). Calls may come from several
// threads at once (they share the workers) and may nest (the inner one runs on its own thread alone).
// If a call throws, the rest is skipped and the first exception is rethrown on the calling thread. All calls
// run in the floating-point mode of the calling thread (float_mode.h).
// Order is unspecified; results must not depend on it.
//
// Not OpenMP: torch brings its own copy of libgomp, thread sanitizer cannot see through either, and wheels
// for macOS and Windows would have to ship a third one.
#pragma once

#include <cstdint>

namespace actzip {

using RangeFn = void (*)(void* context, int64_t index, int worker);

// ACTZIP_NUM_THREADS, else OMP_NUM_THREADS, else the number of CPUs that this process may use.
int default_threads();

void parallel_for_raw(int64_t n, int threads, RangeFn fn, void* context);

template <class F>
void parallel_for(int64_t n, int threads, F&& fn) {
  auto* f = &fn;
  parallel_for_raw(
      n, threads, [](void* c, int64_t i, int w) { (*static_cast<decltype(f)>(c))(i, w); },
      const_cast<void*>(static_cast<const void*>(f)));
}

}  // namespace actzip
