// The profiler's counts over maps, for Python.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "stats/map_stats.h"

namespace actzip {

inline void bind_stats(nanobind::module_& m) {
  namespace nb = nanobind;
  using Values = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
  using Counts = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  m.def(
      "count_maps",
      [](Values x, Counts image_nonzeros, Counts channel_nonzeros, Counts position_nonzeros,
         Counts magnitudes, Counts zero_runs, Counts bursts) {
        const auto n = static_cast<int64_t>(x.shape(0)), c = static_cast<int64_t>(x.shape(1)),
                   p = static_cast<int64_t>(x.shape(2));
        if (static_cast<int64_t>(image_nonzeros.size()) != n ||
            static_cast<int64_t>(channel_nonzeros.size()) != c ||
            (position_nonzeros.size() != 0 && static_cast<int64_t>(position_nonzeros.size()) != p) ||
            magnitudes.size() != kMagnitudeBins || (zero_runs.size() != 0 && zero_runs.size() != kRunBins) ||
            zero_runs.size() != bursts.size())
          throw nb::value_error("count_maps: the arrays of counts do not fit the values");
        MapCounts counts{image_nonzeros.data(),
                         channel_nonzeros.data(),
                         position_nonzeros.size() ? position_nonzeros.data() : nullptr,
                         magnitudes.data(),
                         zero_runs.size() ? zero_runs.data() : nullptr,
                         bursts.size() ? bursts.data() : nullptr};
        {
          nb::gil_scoped_release release;
          count_maps(x.data(), n, c, p, &counts);
        }
        return nb::make_tuple(counts.negatives, counts.max_abs);
      },
      nb::arg("x"), nb::arg("image_nonzeros"), nb::arg("channel_nonzeros"), nb::arg("position_nonzeros"),
      nb::arg("magnitudes"), nb::arg("zero_runs"), nb::arg("bursts"),
      "Adds the counts of maps (images, channels, positions) to the arrays; returns (negatives, max_abs).");
}

}  // namespace actzip
