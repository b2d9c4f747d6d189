// Loops of packing, on the threads of the OpenMP runtime that the framework beside us computes with.
//
// Such a runtime keeps its threads looking for work for milliseconds after each of its loops. Threads of ours
// beside them get half a CPU, and a loop of a tenth of a millisecond waits for one that is not running.
#pragma once

#include <cstdint>

namespace actzip::training {

// GOMP_parallel of libgomp and of the runtimes that stand in for it: fn(data) on `threads` threads (0: as
// many as it likes), returns when all have.
using OpenMP = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

// From now on loops run there; null: on the pool of thread_pool.h.
void use_openmp(OpenMP parallel);

// fn(context, i) once for every i in [0, n), in any order, on at most `threads` threads in the floating-point
// mode of this one; threads and exceptions as parallel_for takes them.
void each_raw(int64_t n, int threads, void (*fn)(void* context, int64_t i), void* context);

template <class F>
void each(int64_t n, int threads, F&& fn) {
  auto* f = &fn;
  each_raw(
      n, threads, [](void* c, int64_t i) { (*static_cast<decltype(f)>(c))(i); },
      const_cast<void*>(static_cast<const void*>(f)));
}

}  // namespace actzip::training
