#include <algorithm>
#include <chrono>

#include "kernels/conv.h"
#include "kernels/kernels.h"

namespace actzip {

double measure_peak_gflops(double seconds) {
  const kernels::Kernels& o = kernels::kernels_for(active_isa());
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double best = 0;
  do {
    const auto t0 = Clock::now();
    const double flops = o.peak(200000);
    const double dt = std::chrono::duration<double>(Clock::now() - t0).count();
    if (dt > 0) best = std::max(best, flops / dt * 1e-9);
  } while (std::chrono::duration<double>(Clock::now() - start).count() < seconds);
  return best;
}

}  // namespace actzip
